"""The command line of preparing scans."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

_HELP = {"help_option_names": ["-h", "--help"]}


@click.command("prep", context_settings=_HELP)
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Gets a folder a scan.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Scans at once, a process each.")
@click.option("--registration", type=click.Choice(["rigid", "affine"]), default="rigid", show_default=True)
@click.option("--bias", type=click.Choice(["n4", "none"]), default="n4", show_default=True)
@click.option(
    "--extraction", type=click.Choice(["deepbet", "hd-bet", "synthstrip"]), default="deepbet", show_default=True
)
@click.option("--registered-by", type=click.Choice(["simpleitk", "ants"]), default="simpleitk", show_default=True)
@click.option(
    "--mask", type=click.Choice(["extraction", "synthseg"]), default="extraction", show_default=True, help="Whose mask."
)
@click.option("--normalization", type=click.Choice(["whitestripe", "none"]), default="whitestripe", show_default=True)
@click.option(
    "--backend",
    type=click.Choice(["pip", "turboprep"]),
    default="pip",
    show_default=True,
    help="The steps above, or TurboPrep's program instead of them.",
)
def prep_command(inputs: tuple[str, ...], output: Path, jobs: int, **options: Any) -> None:
    """Prepare raw T1w scans of heads as the released weights want them: N4, skull off, rigidly registered, masked.

    INPUT is an image file (.nii, .nii.gz, .mgz) in any orientation and voxel size, the folder of a DICOM series, or a
    BIDS data set. Each scan gets a folder in OUTPUT that 'brainfm embed OUTPUT' takes, with qc.png and prep.json; the
    same command goes on where it stopped. Scans that fail are listed, and the exit code is 1.
    """
    from brainfm.files import progress_bar
    from brainfm.prep.batch import prepare_all
    from brainfm.prep.pipeline import Settings
    from brainfm.prep.source import find_sources

    found = len(find_sources(list(inputs)))
    with progress_bar(total=found, unit="scan", doing="preparing", shown=sys.stderr.isatty()) as bar:

        def said(name: str, outcome: dict[str, Any] | str) -> None:
            bar.update()
            bar.clear()
            if isinstance(outcome, str):
                click.echo(f"{name}: ScanError: {outcome}", err=True)
                return
            seconds = sum(outcome["seconds"].values())
            click.echo(f"{name}: {outcome['verdict']}, {seconds:.0f} s, {outcome['peak_memory_gb']} GB")
            for figure in outcome["quality"]:
                if figure["reason"]:
                    click.echo(f"  {figure['verdict']}: {figure['reason']}")

        report = prepare_all(inputs, output, Settings(**options), jobs=jobs, said=said)
    verdicts = [record["verdict"] for record in report.records.values()]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("pass", "look", "fail") if v in verdicts)
    if verdicts:
        earlier = f"; {report.found} were there already" if report.found else ""
        click.echo(f"{output}: {len(verdicts)} scans prepared ({counts}){earlier}")
        click.echo(
            f"look at them:  brainfm qc {output} -o qc.html\nembed them:    brainfm embed {output} -o embeddings.csv"
        )
    if report.failed:
        click.echo(f"{len(report.failed)} of {len(verdicts) + len(report.failed)} scans failed:", err=True)
        for name, reason in report.failed.items():
            click.echo(f"  {name}: {reason}", err=True)
        sys.exit(1)


@click.command("qc", context_settings=_HELP)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The page, .html.")
def qc_command(folder: Path, output: Path) -> None:
    """Write one page of the prepared scans in DIR: pictures, figures and verdicts, the doubtful ones first."""
    from brainfm.prep.report import write_page

    verdicts = write_page(folder, output)
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("fail", "look", "pass"))
    click.echo(f"{output}: {len(verdicts)} scans ({counts})")
