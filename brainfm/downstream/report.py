"""A benchmark's results → the tables, the figures and one page, in the layout of the paper's Table 2 and Figures 4–5.

A results folder holds `grid.json` (what was planned: `Grid`), `results.csv` (a row a run and metric, on the test
split), and `predictions.csv` (a row a run and test patient; may be missing). `write_report` reads them and writes
`table.md`, `table.tex`, `figures/` and `index.html` beside them: at any time, as often as wanted, on half a run too.
"""

from __future__ import annotations

import base64
import hashlib
import html
import os
import platform
import string
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import brainfm
from brainfm.downstream import plots
from brainfm.downstream.figures import Picture, drawings
from brainfm.downstream.results import Column, Grid, Row, Run, read_run
from brainfm.downstream.statistics import HIGHER_IS_BETTER
from brainfm.downstream.wording import (
    NONE,
    RULE,
    arrow,
    claims,
    decimals_of,
    mean_sd,
    metric_name,
    number,
    p_value_text,
    progress_text,
    score_text,
)
from brainfm.files import atomic_path

_TEMPLATES = Path(__file__).parent / "templates"


_READING = "Mean ± standard deviation (n − 1) over the seeds; n=… where they are not {seeds}. Bold: the best row."


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write `table.md`, `table.tex`, `figures/*.png`, `figures/*.svg` and `index.html` of a results folder.

    The same inputs give the same files. Each is written whole or not at all.

    Args:
        folder: Holds `grid.json`, `results.csv` and, for the figures drawn from them, `predictions.csv`.

    Returns:
        The path of `index.html`: one page without anything outside it.

    Raises:
        BrainfmError: A file is missing or is not what it should be; the message says where and what to do.
        MissingExtraError: pandas, matplotlib or scikit-learn is not installed (on import of this module).
    """
    folder = Path(folder)
    run = read_run(folder)
    pictures = []
    for drawing in drawings(run):
        _, svg = plots.save_figure(drawing.figure, folder / "figures" / drawing.name)
        pictures.append(Picture(drawing.task, drawing.caption, drawing.alt, svg.read_bytes()))
    _write(folder / "table.md", _markdown(run))
    _write(folder / "table.tex", _latex(run))
    _write(folder / "index.html", _page(run, pictures))
    return folder / "index.html"


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


# --- Tables ---------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """Plain text, to be escaped by whoever prints it; `marks` are letters of footnotes."""

    text: str
    bold: bool = False
    marks: str = ""


@dataclass(frozen=True)
class Table:
    """A table to be printed in any language.

    Attributes:
        title: What it is.
        head: For each column its title and, where columns share a title, what this one is.
        groups: Rows by group, a line between groups, each with its title ("" is none).
    """

    title: str
    head: Sequence[tuple[str, str]]
    groups: Sequence[tuple[str, Sequence[Sequence[Cell]]]]

    @property
    def two_lines(self) -> bool:
        """Whether the head needs a second line."""
        return any(under for _, under in self.head)

    def spans(self) -> list[tuple[str, int]]:
        """Titles of the head, and how many columns each spans."""
        return [(title, len(list(columns))) for title, columns in groupby(title for title, _ in self.head)]


def _main_table(run: Run) -> Table:
    """Rows × tasks, each with the published number beside it; the controls in a group of their own."""
    head = [("", "Model")]
    for task in run.grid.tasks:
        title = f"{task.title}: {metric_name(task, task.metric)}{arrow(task.metric)}"
        head += [(title, "here"), (title, "published")]

    def cells(row: Row, may_win: bool) -> list[Cell]:
        line = [Cell(row.title)]
        for task in run.grid.tasks:
            score, best, decimals = run.score(task, row), run.best(task), decimals_of(run, task, task.metric)
            wins = score and best and round(score.mean, decimals) == round(best.mean, decimals)
            text = score_text(score, decimals, run.grid.seeds)
            line.append(Cell(text, may_win and bool(wins), _marks(run.grid, task, row)))
            found = next((p for p in task.published if p.row == row.key), None)
            line.append(Cell(mean_sd(found.mean, found.sd, decimals) if found else NONE))
        return line

    groups = [("", [cells(row, True) for row in run.grid.rows])]
    if run.grid.controls:
        groups.append(("Controls", [cells(row, False) for row in run.grid.controls]))
    return Table("Results on the test split", head, groups)


def _metric_tables(run: Run) -> Iterator[Table]:
    """For each task, every other metric there is."""
    for task in run.grid.tasks:
        own = run.results["task"] == task.name
        names = [name for name in run.results[own]["metric"].unique() if name != task.metric]
        known = list(HIGHER_IS_BETTER)
        names.sort(key=lambda name: (known.index(name) if name in known else len(known), name))
        groups = [
            (title, [[Cell(row.title), *(_metric_cell(run, task, row, name) for name in names)] for row in rows])
            for title, rows in (("", run.grid.rows), ("Controls", run.grid.controls))
            if rows
        ]
        if names:
            columns = [(metric_name(task, name) + arrow(name), "") for name in names]
            yield Table(f"{task.title}: other metrics", [("Model", ""), *columns], groups)


def _metric_cell(run: Run, task: Column, row: Row, name: str) -> Cell:
    return Cell(score_text(run.score(task, row, name), decimals_of(run, task, name), run.grid.seeds))


def _test_table(run: Run) -> Table | None:
    """The paired tests; None without any."""
    titles = {row.key: row.title for row in run.grid.everything}
    tasks = {task.name: task for task in run.grid.tasks}
    rows = []
    for test in run.grid.tests:
        task = tasks.get(test.task)
        title, decimals = (task.title, decimals_of(run, task, task.metric)) if task else (test.task, 3)
        numbers = [NONE if n is None else number(n, decimals) for n in (test.difference, test.ci_low, test.ci_high)]
        names = [title, titles.get(test.first, test.first), titles.get(test.second, test.second), test.test]
        cells = [*names, numbers[0], f"{numbers[1]} to {numbers[2]}", p_value_text(test.p_value)]
        rows.append([Cell(text) for text in cells])
    head = ("Column", "First", "Second", "Test", "Difference (first − second)", "Interval", "p")
    return Table("Paired tests", [(name, "") for name in head], [("", rows)]) if rows else None


def _notes(grid: Grid) -> dict[str, str]:
    """Text → letter."""
    texts = dict.fromkeys(note.text for note in grid.notes)
    return {text: string.ascii_lowercase[n % 26] * (n // 26 + 1) for n, text in enumerate(texts)}


def _marks(grid: Grid, task: Column, row: Row) -> str:
    letters = _notes(grid)
    mine = [n for n in grid.notes if (n.task, n.model) == (task.name, row.model) and n.mode in (None, row.mode)]
    return ", ".join(dict.fromkeys(letters[note.text] for note in mine))


def _sources(grid: Grid) -> list[str]:
    """Where the published numbers are from, a sentence a source."""
    sources: dict[str, list[str]] = {}
    for task in grid.tasks:
        if task.published and task.published_source:
            sources.setdefault(task.published_source, []).append(task.title)
    return [f"Published numbers of {', '.join(titles)}: {source}" for source, titles in sources.items()]


# --- In Markdown ----------------------------------------------------------------------------------


def _md(text: str) -> str:
    """Text that Markdown prints as it is."""
    text = " ".join(text.split()).replace("&", "&amp;")
    return "".join("\\" + letter if letter in "\\`*_[]<>|~$" else letter for letter in text)


def _md_table(table: Table) -> str:
    def cell(cell: Cell) -> str:
        text = f"**{_md(cell.text)}**" if cell.bold else _md(cell.text)
        return text + (f" <sup>{cell.marks}</sup>" if cell.marks else "")

    head = [_md(under if under in ("published", "Model") else title) for title, under in table.head]
    lines = [head, ["---"] * len(head)]
    for title, rows in table.groups:
        if title:
            lines.append([f"*{_md(title)}*", *[""] * (len(head) - 1)])
        lines += [[cell(one) for one in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _md_list(texts: Iterable[str]) -> str:
    return "\n".join(f"- {_md(text)}" for text in texts)


def _markdown(run: Run) -> str:
    grid = run.grid
    parts = [
        f"# {_md(grid.title)}",
        _md_list(grid.statements),
        _md(progress_text(run)),
        _md_table(_main_table(run)),
        _md(_READING.format(seeds=grid.seeds)),
        "\n".join(f"- <sup>{letter}</sup> {_md(text)}" for text, letter in _notes(grid).items()),
        _md_list(_sources(grid)),
        f"## Gains\n\n{_md(RULE)}",
        *(f"{_md(task.title)}\n\n{_md_list(claims(run, task))}" for task in grid.tasks),
    ]
    for table in (*_metric_tables(run), _test_table(run)):
        parts += [f"## {_md(table.title)}", _md_table(table)] if table else []
    parts.append("## How it was made\n\n" + _md_list(f"{name}: {value}" for name, value in _making(grid).items()))
    return "\n\n".join(filter(None, parts)) + "\n"


def _making(grid: Grid) -> dict[str, str]:
    """How the runs and this report were made; what is not known is left out."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("pandas", "scikit-learn", "matplotlib"))
    facts = {
        "Command": grid.command,
        "Made by": grid.made_by,
        "Date": grid.date,
        "Report": f"brainfm {brainfm.__version__}, Python {platform.python_version()}, {packages}",
    }
    return {name: value for name, value in facts.items() if value}


# --- In LaTeX -------------------------------------------------------------------------------------

_TEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "[": "{[}", "]": "{]}", "*": "{*}"},
    **{"±": r"$\pm$", "−": "$-$", "–": "--", "×": r"$\times$", "↑": r"$\uparrow$", "↓": r"$\downarrow$"},
    **{"²": r"\textsuperscript{2}", "ρ": r"$\rho$"},
}


def _tex(text: str) -> str:
    """Text that LaTeX prints as it is; brackets and stars in braces, for after a line's end they would be arguments."""
    return "".join(_TEX.get(letter, letter) for letter in " ".join(text.split()))


def _latex(run: Run) -> str:
    """The main table as one `tabular`, to be put in a document that loads booktabs."""
    table = _main_table(run)
    width = len(table.head)

    def cell(cell: Cell) -> str:
        text = rf"\textbf{{{_tex(cell.text)}}}" if cell.bold else _tex(cell.text)
        return text + (rf"\textsuperscript{{{cell.marks}}}" if cell.marks else "")

    def across(text: str) -> str:
        return rf"\multicolumn{{{width}}}{{p{{0.95\linewidth}}}}{{{text}}} \\"

    spans, rules, at = [], [], 1
    for title, columns in table.spans():
        spans.append(rf"\multicolumn{{{columns}}}{{c}}{{{_tex(title)}}}" if title else "")
        rules.append(rf"\cmidrule(lr){{{at}-{at + columns - 1}}}" if title else "")
        at += columns
    lines = [
        r"% needs \usepackage{booktabs}",
        rf"\begin{{tabular}}{{l{'c' * (width - 1)}}}",
        r"\toprule",
        " & ".join(spans) + r" \\",
        "".join(rules),
        " & ".join(_tex(under) for _, under in table.head) + r" \\",
    ]
    for title, rows in table.groups:
        lines.append(r"\midrule")
        if title:
            lines.append(rf"\multicolumn{{{width}}}{{l}}{{\emph{{{_tex(title)}}}}} \\")
        lines += [" & ".join(map(cell, row)) + r" \\" for row in rows]
    lines.append(r"\bottomrule")
    lines += [across(_tex(text)) for text in (*run.grid.statements, progress_text(run))]
    lines += [across(_tex(text)) for text in (_READING.format(seeds=run.grid.seeds), *_sources(run.grid))]
    lines += [across(rf"\textsuperscript{{{letter}}} {_tex(text)}") for text, letter in _notes(run.grid).items()]
    return "\n".join([*lines, r"\end{tabular}"]) + "\n"


# --- In HTML --------------------------------------------------------------------------------------


def _page(run: Run, pictures: Sequence[Picture]) -> str:
    """The page, from `templates/`. Its policy forbids requests, and scripts and styles other than its own."""
    grid = run.grid
    parts = {name: (_TEMPLATES / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    others = [table for table in (*_metric_tables(run), _test_table(run)) if table]
    state = "done" if run.done >= grid.runs else "unfinished"
    return string.Template(parts["html"]).substitute(
        title=html.escape(grid.title),
        style=parts["css"],
        script=parts["js"],
        style_hash=content_hash(parts["css"]),
        script_hash=content_hash(parts["js"]),
        statements=_html_list(grid.statements, "statements"),
        progress=f'<p class="{state}">{html.escape(progress_text(run))}</p>',
        table=_html_table(_main_table(run)),
        reading=html.escape(_READING.format(seeds=grid.seeds)),
        sources=_html_list(_sources(grid)),
        notes="".join(f"<p><sup>{mark}</sup> {html.escape(text)}</p>" for text, mark in _notes(grid).items()),
        rule=html.escape(RULE),
        claims="".join(f"<h3>{html.escape(t.title)}</h3>{_html_list(claims(run, t))}" for t in grid.tasks),
        figures=_html_figures(pictures),
        others="".join(map(_html_table, others)),
        making="".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in _making(grid).items()),
    )


def content_hash(text: str) -> str:
    """The source expression of an inline script or style in a Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _html_list(texts: Iterable[str], name: str = "") -> str:
    items = "".join(f"<li>{html.escape(text)}</li>" for text in texts)
    return f'<ul class="{name}">{items}</ul>' if items else ""


def _html_table(table: Table) -> str:
    def cell(cell: Cell, tag: str) -> str:
        text = html.escape(cell.text)
        text = f"<strong>{text}</strong>" if cell.bold else text
        return f"<{tag}>{text}{f'<sup>{cell.marks}</sup>' if cell.marks else ''}</{tag.split()[0]}>"

    head = "".join(f'<th scope="col">{html.escape(under or title)}</th>' for title, under in table.head)
    if table.two_lines:
        spans = "".join(
            f'<th colspan="{n}" scope="colgroup">{html.escape(title)}</th>' if title else "<td></td>"
            for title, n in table.spans()
        )
        head = f"{spans}</tr><tr>{head}"
    bodies = []
    for title, rows in table.groups:
        name = f'<tr class="group"><th colspan="{len(table.head)}">{html.escape(title)}</th></tr>' if title else ""
        lines = (cell(row[0], 'th scope="row"') + "".join(cell(one, "td") for one in row[1:]) for row in rows)
        bodies.append(f"<tbody>{name}{''.join(f'<tr>{line}</tr>' for line in lines)}</tbody>")
    caption = f"<caption>{html.escape(table.title)}</caption>"
    return f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead>{"".join(bodies)}</table></div>'


def _html_figures(pictures: Sequence[Picture]) -> str:
    parts = []
    for title, group in groupby(pictures, key=lambda picture: picture.task.title):
        parts.append(f'<h3>{html.escape(title)}</h3><div class="figures">')
        for picture in group:
            source = f"data:image/svg+xml;base64,{base64.b64encode(picture.svg).decode()}"
            image = f'<img src="{source}" alt="{html.escape(picture.alt)}">'
            parts.append(f"<figure>{image}<figcaption>{html.escape(picture.caption)}</figcaption></figure>")
        parts.append("</div>")
    return "".join(parts) or "<p>None yet.</p>"
