"""How much a command says: `--quiet`, `--verbose` and `--debug`, before or after any command's name."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import click

_FLAGS = {
    ("-q", "--quiet"): "Only results, warnings and errors: no progress, no notes.",
    ("-v", "--verbose"): "More of what happens.",
    ("--debug",): "Show the traceback of an error, and more of what happens.",
}


def takes_verbosity(command: click.Command) -> click.Command:
    """Give a command, and those in it, the three flags; and a first line before what it imports keeps it waiting."""
    known = {name for parameter in command.params for name in parameter.opts}
    if "--quiet" in known or not command.add_help_option:  # it has them, or hands all that it is given to one that has
        return command
    for names, text in _FLAGS.items():
        if not known & set(names):
            command.params.append(click.Option(names, is_flag=True, expose_value=False, callback=_note, help=text))
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            takes_verbosity(inner)
    elif command.callback is not None:
        command.callback = _announced(command.callback)
    return command


def wants(context: click.Context, flag: str) -> bool:
    """Whether "quiet", "verbose" or "debug" was asked for."""
    return bool(context.meta.get(f"brainfm.{flag}"))


def apply(context: click.Context) -> None:
    """Set what is logged, and whether bars are drawn, by the flags seen so far."""
    more = wants(context, "verbose") or wants(context, "debug")
    quiet = wants(context, "quiet") and not more
    logger = logging.getLogger("brainfm")
    logger.setLevel(logging.DEBUG if more else logging.WARNING if quiet else logging.INFO)
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
    logging.getLogger("brainfm.scan").setLevel(logging.DEBUG if more else logging.WARNING)  # else a line a scan
    if quiet:
        os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def _note(context: click.Context, option: click.Parameter, value: bool) -> None:
    if value:
        context.meta[f"brainfm.{option.name}"] = True
        apply(context)


def _announced(callback: Callable[..., Any]) -> Callable[..., Any]:
    """A command that says that it starts, where PyTorch is still to be imported; of a group's processes the first."""

    def start(*args: Any, **kwargs: Any) -> Any:
        context = click.get_current_context()
        waits = context.info_name not in ("list", "info") and "torch" not in sys.modules
        if waits and os.environ.get("RANK", "0") == "0" and not wants(context, "quiet"):
            click.echo(f"{context.command_path}: starting", err=True)
        return callback(*args, **kwargs)

    start.__doc__ = callback.__doc__
    return start


def counted(scans: int) -> str:
    """How many scans, in words: `1 scan`, `2 scans`."""
    return f"{scans} scan{'' if scans == 1 else 's'}"
