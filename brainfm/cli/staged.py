"""The options of what reads scans by way of a local disk."""

from __future__ import annotations

from typing import Any

import click

_SIZE_GB = 100.0  # as `brainfm.stage.SIZE_GB`, whose import would make every --help slow


def stage_options(command: Any) -> Any:
    """Give a command --stage and --stage-size."""
    size = click.option(
        "--stage-size",
        type=click.FloatRange(0, min_open=True),
        default=_SIZE_GB,
        show_default=True,
        metavar="GB",
        help="The most that --stage holds.",
    )
    folder = click.option(
        "--stage",
        metavar="DIR",
        help="A folder on a local disk for copies of scans that lie on a network's: those that are read next are "
        "copied ahead, and what was used least recently leaves. Several commands may share it.",
    )
    return folder(size(command))
