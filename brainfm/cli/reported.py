"""`--report FILE.json` of the commands that take long: one option, and the run's report around all that they do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_META = "brainfm.report"


def reported(*, inputs: str, output: str = "output", unit: str = "scan") -> Callable[[click.Command], click.Command]:
    """Give a command the option, and report each of its runs (`brainfm.report`), also to the files it names itself.

    Args:
        inputs: The command's argument that says what is read.
        output: The one that says where what is written goes.
        unit: What it counts.
    """

    def decorate(command: click.Command) -> click.Command:
        work = command.callback
        assert work is not None

        def run(*args: Any, **kwargs: Any) -> Any:
            from brainfm.report import reporting

            context = click.get_current_context()
            given = {name: _plain(value) for name, value in context.params.items()}
            place = given.get(output)
            read = given.get(inputs) or []
            names = list(map(str, read if isinstance(read, list) else [read]))
            with reporting(context.meta.get(_META), f"brainfm {_name(context)}", given, names, place, unit):
                return work(*args, **kwargs)

        run.__doc__ = work.__doc__
        command.callback = run
        command.params.append(
            click.Option(
                ["--report"],
                metavar="FILE.json",
                expose_value=False,
                callback=_note,
                help="Write what was done there: counts, failures by kind, seconds by step, memory, versions.",
            )
        )
        return command

    return decorate


def _name(context: click.Context) -> str:
    """The command without the program, whatever that was called."""
    names: list[str] = []
    while context.parent is not None:
        names.insert(0, context.info_name or "")
        context = context.parent
    return " ".join(names)


def _note(context: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None:
        context.meta[_META] = value


def _plain(value: Any) -> Any:
    """A parameter as JSON has it."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value
