"""Analyses of encoders beside the evaluations of tasks: recovery of planted changes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from brainfm.cli.evaluation import _ManyValues

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
    _say_failed(failed)


def _say_failed(failed: dict[str, str]) -> None:
    """Name the scans that were left out; exit code 1 where there are any."""
    for name, reason in list(failed.items())[:10]:
        click.echo(f"ScanError: {name}: {reason}", err=True)
    if failed:
        sys.exit(1)

