"""A table to be printed, in Markdown, LaTeX or HTML: rows of cells by group under a head of one line or two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple


class Cell(NamedTuple):
    """Plain text, to be escaped by the template that prints it; `marks` are letters of footnotes."""

    text: str
    bold: bool = False
    marks: str = ""


class Span(NamedTuple):
    """A title over columns `first` to `last`, counted from 1."""

    title: str
    first: int
    last: int

    @property
    def columns(self) -> int:
        """How many they are."""
        return self.last - self.first + 1


@dataclass(frozen=True)
class Table:
    """A table to be printed in any language.

    Attributes:
        title: What it is.
        head: For each column its title and, where columns have one title together, what this one is.
        groups: Rows by group, a line between groups, each with its title ("" is none).
    """

    title: str
    head: Sequence[tuple[str, str]]
    groups: Sequence[tuple[str, Sequence[Sequence[Cell]]]]

    @property
    def two_lines(self) -> bool:
        """Whether the head needs a second line."""
        return any(under for _, under in self.head)

    @property
    def spans(self) -> list[Span]:
        """The titles of the head, each once, and each column without one by itself."""
        spans = []
        for _, group in groupby(enumerate(self.head, start=1), key=lambda column: column[1][0] or column[0]):
            places = [place for place, _ in group]
            spans.append(Span(self.head[places[0] - 1][0], places[0], places[-1]))
        return spans
