"""A table to be printed, on a console or in Markdown, LaTeX or HTML: rows of cells by group under a head."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from typing import NamedTuple

_TITLE = 14  # letters in a line of a column's title on a console, where its cells and words are shorter


class Cell(NamedTuple):
    """Plain text, to be escaped by the template that prints it; `marks` are letters of footnotes."""

    text: str
    bold: bool = False
    marks: str = ""


def by_first(lines: Iterable[Sequence[str]]) -> list[tuple[str, list[list[Cell]]]]:
    """Groups of a table's rows by what stands first in each, which is their title then; in the order of the titles."""
    groups: dict[str, list[list[Cell]]] = {}
    for title, *line in lines:
        groups.setdefault(title, []).append([Cell(text) for text in line])
    return list(groups.items())


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

    @property
    def titles(self) -> list[str]:
        """The head in one line."""
        return [under if under == "published" or not title else title for title, under in self.head]

    def __str__(self) -> str:
        """For a console: a line a row, each column as wide as its cells, under titles that are wrapped to that."""
        body: list[list[str]] = []
        for title, rows in self.groups:
            body += [[title]] * bool(title)
            for first, *others in rows:
                marked = (f"{cell.text} {cell.marks}".rstrip() for cell in others)
                body.append(["  " * bool(title) + first.text, *marked])
        widths = []
        for n, title in enumerate(self.titles):
            words = [*title.split(), title[:_TITLE], *(line[n] for line in body if n < len(line))]
            widths.append(max(map(len, words)))
        wrapped = map(textwrap.wrap, self.titles, widths)
        lines = [*zip_longest(*wrapped, fillvalue=""), ["-" * width for width in widths], *body]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
