"""The errors that brainfm raises on purpose. Each message says what was wrong, where, and what to do next."""

from __future__ import annotations

MOST_LETTERS = 4000  # of a message: what a file holds in place of a name may be as long as the file


class BrainfmError(Exception):
    """Any refusal by brainfm; the command line prints it as one line, whatever text of a file it quotes."""

    def __str__(self) -> str:
        said = super().__str__()
        said = said if len(said) <= MOST_LETTERS else f"{said[:MOST_LETTERS]}…"
        if said.isprintable():
            return said
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in said)


class ScanError(BrainfmError):
    """A scan, a mask or a list of scans that cannot give the tensor its input contract describes."""


class WeightsError(BrainfmError):
    """A weight file that is not what it should be: unreadable, of another architecture, or with another hash."""


class WeightsNotFoundError(WeightsError):
    """Weights that do not exist, or cannot be reached from here."""


class RecipeError(BrainfmError):
    """A training recipe with an unknown field or a value that cannot be."""


class RunInterruptedError(BrainfmError):
    """A signal stopped a training run after a step; its checkpoint is written, and the same command goes on."""


class TaskError(BrainfmError, ValueError):
    """A downstream task that cannot be: of its labels, its columns or its file."""


class ModelNameError(BrainfmError, ValueError):
    """A model name that means nothing here, or could mean two things."""


class MissingExtraError(BrainfmError, ImportError):
    """A part of brainfm whose optional packages are not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f'{package} is not installed; run: pip install "brainfm[{extra}]"')
