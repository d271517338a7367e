"""The command line of preparing scans."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import click

from brainfm.cli.reported import reported
from brainfm.cli.verbosity import counted

_HELP = {"help_option_names": ["-h", "--help"]}


@reported(inputs="inputs")
@click.command("prep", context_settings=_HELP)
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Gets a folder a scan.")
@click.option(
    "--contrast",
    type=click.Choice(["T1w", "T2w", "FLAIR", "T1c"]),
    default="T1w",
    show_default=True,
    help="Of the scans; others than T1w are registered to the prepared T1w scan of the same person in OUTPUT.",
)
@click.option("--t1w", type=click.Path(path_type=Path), metavar="DIR", help="That scan's folder, for one INPUT.")
@click.option("--longitudinal", is_flag=True, help="Bring each person's visits to the template together.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Scans at once, a process each.")
@click.option(
    "--shard",
    metavar="I/N",
    help="Prepare the I-th of N equal parts of the scans, beside others that prepare theirs; slurm is the task of its "
    "array.",
)
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="For extraction and registration: cpu, which gives the same files to the bit each time, or cuda.",
)
@click.option(
    "--registration",
    type=click.Choice(["rigid", "affine"]),
    default="rigid",
    show_default=True,
    help="Of the picture, its figures, and TurboPrep's files; a prepared scan has both.",
)
@click.option("--bias", type=click.Choice(["n4", "none"]), default="n4", show_default=True)
@click.option(
    "--extraction", type=click.Choice(["deepbet", "hd-bet", "synthstrip"]), default="deepbet", show_default=True
)
@click.option("--registered-by", type=click.Choice(["torch", "ants"]), default="torch", show_default=True)
@click.option(
    "--mask", type=click.Choice(["extraction", "synthseg"]), default="extraction", show_default=True, help="Whose mask."
)
@click.option(
    "--turboprep-files", is_flag=True, help="Write normalized.nii.gz, mask.nii.gz and affine_transf.mat as well."
)
@click.option(
    "--normalization",
    type=click.Choice(["whitestripe", "none"]),
    default="whitestripe",
    show_default=True,
    help="Of TurboPrep's files.",
)
@click.option(
    "--backend",
    type=click.Choice(["pip", "turboprep"]),
    default="pip",
    show_default=True,
    help="The steps above, or TurboPrep's program instead of them.",
)
@click.option(
    "--template",
    default="",
    metavar="FILE",
    help="What TurboPrep registers to: mni_icbm152_t1_tal_nlin_sym_09c.nii. Default: the packaged brain without skull.",
)
def prep_command(
    inputs: tuple[str, ...],
    output: Path,
    jobs: int,
    device: str,
    shard: str | None,
    t1w: Path | None,
    **options: Any,
) -> None:
    """Prepare raw T1w scans of heads, once for every encoder: bias field off, brain found, registered to MNI152.

    INPUT is an image file (.nii, .nii.gz, .mgz, .nrrd) in any orientation and voxel size, a folder of such files, the
    folder of DICOM files, an enhanced DICOM file, a folder of such folders, a BIDS data set, or a manifest (a table
    with image_path). Of several DICOM images the one is taken that alone can be T1w, else none. Each scan gets a folder
    in OUTPUT that 'brainfm embed OUTPUT' takes for any encoder of T1w scans: the head in its own space, its brain mask,
    qc.png, and prep.json with the matrices to MNI152. The same command goes on where it stopped. Scans that fail, by an
    error or by their quality, are listed, and the exit code is 1; so is what cannot be read, or may be a scan. What by
    BIDS is no T1w scan, such as a phase image, is listed as left out, and is no failure.
    """
    from brainfm.paths import is_image
    from brainfm.prep import server

    if len(inputs) == 1 and is_image(inputs[0]) and Path(inputs[0]).is_file():
        server.start(alone=True)  # while this process imports the rest

    from brainfm.bids import wrongly
    from brainfm.prep.batch import prepare_all
    from brainfm.prep.pipeline import Settings
    from brainfm.report import current
    from brainfm.scan.verdict import verdict_of
    from brainfm.shards import Shard

    run = current()

    def said(name: str, outcome: dict[str, Any] | str) -> None:
        if isinstance(outcome, str):
            run.fail(name, outcome)
            click.echo(f"{name}: ScanError: {outcome}", err=True)
            return
        seconds = sum(outcome["seconds"].values())
        click.echo(f"{name}: {outcome['verdict']}, {seconds:.0f} s, {outcome['peak_memory_gb']} GB")
        for reason in _reasons(outcome):
            click.echo(f"  {reason}")

    try:
        settings = Settings(**options)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    report = prepare_all(
        inputs,
        output,
        settings,
        t1w=t1w,
        jobs=jobs,
        device=device,
        shard=Shard.of(shard) if shard else None,
        said=said,
        progress=sys.stderr.isatty(),
    )
    verdicts = {name: verdict_of(output / name) for name in report.records}
    if verdicts:
        counts = ", ".join(f"{n} {verdict}" for verdict, n in Counter(verdicts.values()).most_common())
        earlier = f"; {report.found} were there already" if report.found else ""
        click.echo(f"{output}: {counted(len(verdicts))} prepared ({counts}){earlier}")
        click.echo(f"look at them:  brainfm qc {output} -o qc.html")
    run.asked, run.done = len(verdicts) + len(report.failed), len(verdicts)
    run.of_an_earlier_run, run.left_out = report.found, report.left_out
    run.details["verdicts"] = dict(Counter(verdicts.values()).most_common())
    failed = {name: f"could not be prepared: {why}" for name, why in report.failed.items()}
    for name, verdict in verdicts.items():
        if verdict in ("fail", "unreadable"):
            failed[name] = "; ".join(_reasons(report.records[name], "fail")) or "its decisions.json cannot be read"
            run.fail(name, failed[name])
    if {"pass", "accepted"} & set(verdicts.values()):
        strict = " --strict-qc" if any(name in verdicts for name in failed) else ""
        click.echo(f"embed them:    brainfm embed {output} -o embeddings.csv{strict}")
    if failed:
        click.echo(f"{len(failed)} of {counted(len(verdicts) + len(report.failed))} failed:", err=True)
        for name, reason in failed.items():
            click.echo(f"  {name}: {reason}", err=True)
    for path, why in report.left_out.items():
        click.echo(f"left out: {path}: {why}", err=True)
    if failed or wrongly(report.left_out):
        sys.exit(1)


def _reasons(record: dict[str, Any], *verdicts: str) -> list[str]:
    """Why a prepared scan is doubtful, the worst first."""
    doubts = [figure for figure in record["quality"] if figure["verdict"] in (verdicts or ("fail", "look"))]
    return [f"{one['verdict']}: {one['reason']}" for one in sorted(doubts, key=lambda one: one["verdict"])]


@click.command("qc", context_settings=_HELP)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The page, .html.")
@click.option("--accept", multiple=True, metavar="ID", help="Take this scan whatever its verdict; may be repeated.")
@click.option("--reject", multiple=True, metavar="ID", help="Leave this scan out whatever its verdict; likewise.")
@click.option("--by", metavar="NAME", help="Who accepts or rejects.")
@click.option("--why", metavar="TEXT", help="And why.")
@click.option(
    "--decisions",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Take the decisions that were made on the page and saved from it.",
)
def qc_command(
    folder: Path,
    output: Path | None,
    accept: tuple[str, ...],
    reject: tuple[str, ...],
    by: str | None,
    why: str | None,
    decisions: Path | None,
) -> None:
    """Write one page of the prepared scans in DIR: pictures, figures and verdicts, the doubtful ones first.

    With --accept or --reject, and --by and --why, or with the file that the page's own buttons save (--decisions), a
    person's own decision is kept beside the scan (decisions.json), shown on the page, and followed by 'brainfm embed
    --strict-qc'. ID is the scan's name on the page. The last decision counts, until the scan is prepared anew.
    """
    from brainfm.prep.report import decide_all, take_decisions, write_page

    decided = bool(accept or reject)
    if not decided and output is None and decisions is None:
        raise click.UsageError("name the page (-o qc.html), or decide (--accept, --reject, --decisions)")
    if decided != bool(by and why) or bool(by) != bool(why):
        raise click.UsageError("--accept and --reject go with --by NAME and --why TEXT: who decides, and why")
    said = take_decisions(folder, decisions) if decisions is not None else {}
    if by and why:
        said |= decide_all(folder, accept, reject, by, why)
    for name, verdict in said.items():
        click.echo(f"{name}: {verdict}")
    if output is not None:
        verdicts = write_page(folder, output)
        counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
        click.echo(f"{output}: {counted(len(verdicts))} ({counts})")
