"""Analyses of encoders beside the evaluations of tasks: planted changes, patients over time, dense features."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from brainfm.cli.evaluation import _ManyValues
from brainfm.cli.verbosity import counted

_HELP = {"help_option_names": ["-h", "--help"]}


@click.command("recovery", cls=_ManyValues, context_settings=_HELP)
@click.argument("scans", nargs=-1, metavar="[SCANS]...")
@click.option("--model", "models", multiple=True, required=True, help="Name of the model; repeat it for several.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the results.")
@click.option("--phantoms", type=click.IntRange(4), help="So many phantoms, instead of SCANS.")
@click.option("--change", "changes", multiple=True, help="Of atrophy, lesion, bias; by default all.")
@click.option("--label", default="", metavar="COLUMN", help="A column of numbers for a probe; of phantoms age.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--device", default="auto", show_default=True)
def recovery_command(scans: tuple[str, ...], phantoms: int | None, changes: tuple[str, ...], **options: Any) -> None:
    """Plant known atrophy, lesions and bias fields in SCANS, and see whether the embeddings follow.

    SCANS are what 'brainfm embed' takes, T1w, four patients at least; or phantoms. A line a model and change: whether
    the distance from the clean scan rises with the size of the change, from which size on it is above the test–retest
    floor (another scan of the same head), and whether a probe reads the size off other patients. OUTPUT has
    recovery.csv, verdicts.csv and a figure a model. Exit code 1: scans were left out.
    """
    from brainfm.downstream.recovery import CHANGES, recovery

    verdicts, failed = recovery(
        (scans[0] if len(scans) == 1 else list(scans)) if scans else None,
        phantoms=phantoms or 0,
        changes=changes or tuple(CHANGES),
        progress=True,
        **options,
    )
    for verdict in verdicts:
        click.echo(str(verdict))
    click.echo(f"{options['output'] / 'verdicts.csv'}: these lines as a table")
    _on_page(options["output"])
    _say_failed(failed)


def _on_page(output: Path) -> None:
    """Write the page anew of the results whose folder this output is in, where it has a place there."""
    from brainfm.downstream.report import write_report
    from brainfm.downstream.sections import LONGITUDINAL, RECOVERY, SEGMENTATION

    folder = output.absolute().parent
    if output.name in (RECOVERY, LONGITUDINAL, SEGMENTATION) and (folder / "grid.json").exists():
        click.echo(f"{write_report(folder)}: on the page of these results too")


def _say_failed(failed: dict[str, str]) -> None:
    """Name the scans that were left out; exit code 1 where there are any."""
    for name, reason in list(failed.items())[:10]:
        click.echo(f"ScanError: {name}: {reason}", err=True)
    if failed:
        sys.exit(1)


@click.command("longitudinal", cls=_ManyValues, context_settings=_HELP)
@click.argument("labels", type=click.Path(path_type=Path))
@click.option("--embeddings", "tables", multiple=True, required=True, metavar="TABLE", help="Of 'brainfm embed'.")
@click.option("--time", required=True, metavar="COLUMN", help="When a scan was made, in years; age will do.")
@click.option("--slope", default="", metavar="COLUMN", help="A measure at each scan, whose slope is predicted.")
@click.option("--event", default="", metavar="COLUMN", help="1 where the patient had the event, else 0.")
@click.option(
    "--duration", default="", metavar="COLUMN", help="Years from the first scan to that, or to the last news."
)
@click.option("--covariates", multiple=True, help="Columns that a control predicts from without an image.")
@click.option("--retest-years", default=0.25, show_default=True, help="Scans no further apart are test and retest.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the folds.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the results.")
def longitudinal_command(labels: Path, tables: tuple[str, ...], output: Path, **options: Any) -> None:
    """How well embeddings of patients repeat, how fast they change, and what that foretells.

    LABELS is a table, a row a scan, joined with the tables as by 'brainfm probe'. OUTPUT has reliability.csv: ICC(2,1)
    and ICC(3,1), the distance of test and retest against that of two patients, and the change a year; change_MODEL.csv,
    the change of each patient, a table for 'brainfm probe'; scores.csv, of --slope (ridge) and --event (Cox,
    concordance), by folds of patients; comparisons.csv of several tables, by mixed-effects models; and longitudinal.md.
    """
    from brainfm.downstream.longitudinal import longitudinal

    found = longitudinal(labels, {name: name for name in tables}, output, **options)
    for one in found.reliability:
        click.echo(
            f"{one.model}: ICC(2,1) {one.icc_agreement:.2f}; test to retest {one.within:.2f} of two patients' distance "
            f"({one.pairs} pairs); change a year {one.change:.2f} ({one.followed} patients)"
        )
    for score in found.scores:
        if score.metric in ("r2", "concordance"):
            click.echo(
                f"{score.task}: {score.model}, {score.features}: {score.metric} {score.value:.3f} "
                f"({score.low:.3f} to {score.high:.3f})"
            )
    click.echo(f"{output / 'longitudinal.md'}: all of it")
    _on_page(output)


@click.command("segment", cls=_ManyValues, context_settings=_HELP)
@click.argument("scans", nargs=-1, metavar="[SCANS]...")
@click.option("--model", "models", multiple=True, required=True, help="Name of the model; repeat it for several.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the results.")
@click.option("--phantoms", type=click.IntRange(4), help="So many phantoms, whose tissues are known, instead of SCANS.")
@click.option("--labels", default="", metavar="COLUMN", help="The manifest's column of label files; else tissues.")
@click.option("--stages", type=click.Choice(["last", "all"]), default="last", show_default=True, help="Of which maps.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--device", default="auto", show_default=True)
def segment_command(scans: tuple[str, ...], phantoms: int | None, **options: Any) -> None:
    """Segment scans by a linear probe on dense features, and score it on patients that it did not learn from.

    SCANS are what 'brainfm embed' takes. OUTPUT has dice.csv, each class with its interval over patients, and the
    controls: the same network untrained, and the intensity alone. Without --labels the classes are tissues by
    intensity, of T1w scans. Exit code 1: scans were left out.
    """
    from brainfm.downstream.segmentation import probe_segmentation

    found, failed = probe_segmentation(
        (scans[0] if len(scans) == 1 else list(scans)) if scans else None,
        phantoms=phantoms or 0,
        progress=True,
        **options,
    )
    for one in found:
        click.echo(
            f"{one.model:34} {one.features:11} {one.label:14} Dice {one.dice:.3f} ({one.low:.3f} to {one.high:.3f}), "
            f"{one.patients} patients"
        )
    click.echo(f"{options['output'] / 'dice.csv'}: these lines as a table")
    _on_page(options["output"])
    _say_failed(failed)


@click.command("regions", context_settings=_HELP)
@click.argument("scans", nargs=-1, required=True, metavar="SCANS...")
@click.option("--model", required=True, help="Name of the model.")
@click.option("--atlas", required=True, type=click.Path(path_type=Path), help="Whole numbers in MNI152, NIfTI.")
@click.option("--space", default="MNI152NLin2009cAsym", show_default=True, help="The atlas's template.")
@click.option("--names", type=click.Path(path_type=Path), help="A table with the columns label and name.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The table: .csv, .parquet, .npz.")
@click.option("--device", default="auto", show_default=True)
def regions_command(
    scans: tuple[str, ...], model: str, atlas: Path, space: str, names: Path | None, output: Path, device: str
) -> None:
    """Average dense features over the regions of an atlas: a table, a row a scan and a block of columns a region.

    SCANS are what 'brainfm embed' takes. OUTPUT's .regions.csv says which columns are whose. A contract for scans in
    their own space takes those that 'brainfm prep' prepared. Exit code 1: scans failed.
    """
    from brainfm.downstream.regions import embed_regions, read_atlas, regions_path

    found = read_atlas(atlas, space=space, names=names)
    given = scans[0] if len(scans) == 1 else list(scans)
    table = embed_regions(given, model, found, output, device=device, progress=True)
    click.echo(f"{counted(len(table))} → {output} ({len(found.numbers)} regions, see {regions_path(output)})")
    _say_failed({record.name: reason for record, reason in table.errors})


@click.command("export-extractor", context_settings=_HELP)
@click.argument("model")
@click.option("--for", "leaderboard", required=True, type=click.Choice(["brainfmbench", "fomo26", "brainmarks"]))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="A new or empty folder.")
@click.option("--weights-url", default="", help="Of brainfmbench: where the weights can be downloaded.")
@click.option("--requirement", default="", help="How pip gets brainfm there; by default this version.")
def export_extractor_command(model: str, leaderboard: Any, output: Path, **options: Any) -> None:
    """Write the folder by which a leaderboard of others takes MODEL.

    brainfmbench: model.yaml, extract.py, weights.txt and requirements.txt, for a pull request. fomo26: Apptainer.def
    and predict.py with the weights, for tasks 6 and 7. brainmarks: a model's file for brainmarks_smri with its weights.
    """
    from brainfm.extractors import export_extractor

    folder = export_extractor(model, leaderboard, output, **options)
    for path in sorted(folder.iterdir()):
        click.echo(str(path))
