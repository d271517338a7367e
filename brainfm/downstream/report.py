"""A benchmark's results → the tables, the figures and one page, in the layout of the paper's Table 2 and Figures 4–5.

A results folder holds `grid.json` (what was planned: `Evaluation`), `results.csv` (a row a run and metric, on the test
split), and `predictions.csv` (a row a run and test patient; may be missing). `write_report` reads them and writes
`table.md`, `table.tex`, `figures/` and `index.html` beside them: at any time, as often as wanted, on half a run too.
"""

from __future__ import annotations

import os
import platform
import string
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

from brainfm.downstream import plots
from brainfm.downstream.figures import Picture, drawings
from brainfm.downstream.results import Column, Evaluation, Row, Run, read_run
from brainfm.downstream.sections import sections
from brainfm.downstream.sheet import SHEET
from brainfm.downstream.statistics import HIGHER_IS_BETTER
from brainfm.downstream.tables import Cell, Table, by_first
from brainfm.downstream.wording import (
    NONE,
    RULE,
    arrow,
    claims,
    cost_text,
    decimals_of,
    mean_std,
    metric_name,
    needed_text,
    number,
    p_value_text,
    parameters_text,
    progress_text,
    span_text,
    summary_text,
)
from brainfm.files import write_text
from brainfm.render import render, render_page
from brainfm.version import __version__

_READING = (
    "Mean ± standard deviation (n − 1) over the seeds; n=… where they are not {seeds}. "
    "Bold: the best row, where it is better than every control and there are patients enough to say so."
)
_FIGURES = {
    "scores",
    "cost",
    "efficiency",
    "robustness",
    "roc",
    "calibration",
    "agreement",
}  # the last words of their names
_COSTS = ("Width", "Seconds a volume", "GB")
_MOST_SHOWN = 20  # of what is left out


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
    pictures, drawn = [], set[str]()
    for drawing in drawings(run):
        _, svg = plots.save_figure(drawing.figure, folder / "figures" / drawing.name)
        drawn.add(drawing.name)
        pictures.append(Picture(drawing.task, drawing.caption, drawing.alt, svg.read_bytes()))
    for left in (folder / "figures").glob("*_*.*"):  # of an earlier report
        if left.stem not in drawn and left.stem.rpartition("_")[2] in _FIGURES and left.suffix in (".png", ".svg"):
            left.unlink()
    content = _content(folder, run)
    figures = [(title, list(group)) for title, group in groupby(pictures, key=lambda picture: picture.task.title)]
    write_text(folder / "table.md", render("table.md", **content))
    write_text(folder / "table.tex", render("table.tex", **content))
    write_text(folder / "index.html", render_page("report.html", figures=figures, **content))
    return folder / "index.html"


def short_report(folder: str | os.PathLike[str]) -> str:
    """What a console needs of a results folder: the main table, its footnotes, and where the page is.

    Warnings are not in it: they are logged when the report is written, and stand on the page.

    Raises:
        BrainfmError: As `write_report`.
    """
    folder = Path(folder)
    run = read_run(folder)
    notes = [f"{letter}: {text}" for text, letter in _notes(run.evaluation).items()]
    parts = (progress_text(run), str(_main_table(run)), "\n".join(notes))
    return "\n\n".join(filter(None, (*parts, f"{folder / 'index.html'}: the page with all tables and figures")))


def _content(folder: Path, run: Run) -> dict[str, Any]:
    """What the templates say of a run, by their names for it."""
    evaluation = run.evaluation
    return {
        "title": evaluation.title,
        "warnings": list(evaluation.warnings),
        "statements": list(evaluation.statements),
        "progress": progress_text(run),
        "done": run.done >= evaluation.runs,
        "main": _main_table(run),
        "reading": _READING.format(seeds=evaluation.seeds),
        "notes": _notes(evaluation),
        "sources": _sources(evaluation),
        "rule": RULE,
        "data": [table for table in (_encoder_table(run), *_share_tables(run), _left_out_table(run)) if table],
        "sections": list(sections(folder, run)),
        "claims": [(task.title, claims(run, task)) for task in evaluation.tasks],
        "others": [table for table in (*_metric_tables(run), _test_table(run)) if table],
        "making": _making(evaluation),
    }


# --- Tables ---------------------------------------------------------------------------------------


def _main_table(run: Run) -> Table:
    """Rows × tasks, the published numbers, if any, beside them; the controls in a group of their own."""
    tasks, keys = run.evaluation.tasks, {row.key for row in run.evaluation.everything}
    beside = any(p.row in keys for task in tasks for p in task.published)
    head = [("", "Model")]
    for task in tasks:
        title = f"{task.title}: {metric_name(task, task.metric)}{arrow(task.metric)}"
        head += [(title, "here"), (title, "published")] if beside else [("", title)]

    def cells(row: Row, may_win: bool) -> list[Cell]:
        line = [Cell(row.title)]
        for task in tasks:
            summary, best, decimals = run.summary(task, row), run.best(task), decimals_of(run, task, task.metric)
            wins = bool(summary and best and round(summary.mean, decimals) == round(best.mean, decimals))
            wins = wins and not task.too_small and best is not None and not run.is_below_a_control(task, best)
            text = summary_text(summary, decimals, run.evaluation.seeds)
            line.append(Cell(text, may_win and wins, _marks(run.evaluation, task, row)))
            if beside:
                found = next((p for p in task.published if p.row == row.key), None)
                line.append(Cell(mean_std(found.mean, found.sd, decimals) if found else NONE))
        return [*line, *(_costs(run, row) if run.evaluation.candidates else _sizes(run, row))]

    head += [("", title) for title in (_COSTS if run.evaluation.candidates else _sizes_head(run))]
    groups = [("", [cells(row, True) for row in run.evaluation.rows])]
    if run.evaluation.controls:
        groups.append(("Controls", [cells(row, False) for row in run.evaluation.controls]))
    return Table("Results on the test split", head, groups)


def _costs(run: Run, row: Row) -> list[Cell]:
    one = run.evaluation.cost(row)
    if one is None:
        return [Cell(NONE)] * len(_COSTS)
    return [Cell(f"{one.width}"), Cell(cost_text(one.seconds)), Cell(cost_text(one.gigabytes))]


def _encoder_table(run: Run) -> Table | None:
    """The encoders of a comparison that are left out, and why; None where none is."""
    lines = [[Cell(one.model), Cell(one.reason), Cell(one.why)] for one in run.evaluation.candidates if not one.weights]
    head = [(name, "") for name in ("Encoder", "For", "Why")]
    return Table(f"Encoders left out: {len(lines)}", head, [("", lines)]) if lines else None


def _sizes_head(run: Run) -> list[str]:
    """The title of the last column; none where no run says how many it trained, as before."""
    return ["Trained parameters"] if run.results["trained_parameters"].notna().any() else []


def _sizes(run: Run, row: Row, task: Column | None = None) -> list[Cell]:
    return [Cell(parameters_text(run.trained_parameters(row, task))) for _ in _sizes_head(run)]


def _share_tables(run: Run) -> Iterator[Table]:
    """For each task, what is in train, validation and test."""
    names = {"train": "training", "val": "validation", "test": "test"}
    for task in run.evaluation.tasks:
        words = [f"{word} ({n})" for n, word in enumerate(task.classes)] if task.kind != "regression" else []
        lines = []
        for share in task.shares:
            counts = (share.scans, share.patients, *share.classes)
            lines.append([Cell(names.get(share.part, share.part)), *(Cell(span_text(count)) for count in counts)])
        if lines:
            head = ["Part", "Scans", "Patients", *(f"Patients: {word}" for word in words)]
            yield Table(f"{task.title}: what is in each part", [(title, "") for title in head], [("", lines)])


def _left_out_table(run: Run) -> Table | None:
    """The first scans and rows that are not used; None where all are."""
    left_out, titles = run.evaluation.left_out, {row.key: row.title for row in run.evaluation.everything}
    names = {task.name: task.title for task in run.evaluation.tasks}
    lines = [
        [
            Cell(names.get(one.task, one.task)),
            Cell(one.scan),
            Cell(one.why),
            Cell(titles.get(one.row, one.row or ("all" if one.task else ""))),  # no task: a part of a comparison
        ]
        for one in left_out[:_MOST_SHOWN]
    ]
    more = f"; the first {_MOST_SHOWN}, all are in left_out.csv" if len(left_out) > _MOST_SHOWN else ""
    head = [(name, "") for name in ("Column", "Left out", "Why", "By")]
    return Table(f"Left out: {len(left_out):,}{more}", head, [("", lines)]) if lines else None


def _metric_tables(run: Run) -> Iterator[Table]:
    """For each task, every other metric there is."""
    for task in run.evaluation.tasks:
        own = run.results["task"] == task.name
        names = [name for name in run.results[own]["metric"].unique() if name != task.metric]
        known = list(HIGHER_IS_BETTER)
        names.sort(key=lambda name: (known.index(name) if name in known else len(known), name))
        groups = [
            (title, [_metric_line(run, task, row, names) for row in rows])
            for title, rows in (("", run.evaluation.rows), ("Controls", run.evaluation.controls))
            if rows
        ]
        if names:
            titles = ["Model", *(metric_name(task, name) + arrow(name) for name in names), *_sizes_head(run)]
            yield Table(f"{task.title}: other metrics", [(title, "") for title in titles], groups)


def _metric_line(run: Run, task: Column, row: Row, names: Sequence[str]) -> list[Cell]:
    return [Cell(row.title), *(_metric_cell(run, task, row, name) for name in names), *_sizes(run, row, task)]


def _metric_cell(run: Run, task: Column, row: Row, name: str) -> Cell:
    return Cell(summary_text(run.summary(task, row, name), decimals_of(run, task, name), run.evaluation.seeds))


def _test_table(run: Run) -> Table | None:
    """The paired tests; None without any."""
    titles = {row.key: row.title for row in run.evaluation.everything}
    tasks = {task.name: task for task in run.evaluation.tasks}
    adjusted = any(test.p_holm is not None for test in run.evaluation.tests)  # not in what was written before
    rows = []
    for test in run.evaluation.tests:
        task = tasks.get(test.task)
        title, decimals = (task.title, decimals_of(run, task, task.metric)) if task else (test.task, 3)
        numbers = [NONE if n is None else number(n, decimals) for n in (test.difference, test.ci_low, test.ci_high)]
        p_value = p_value_text(test.p_value)
        if task and task.too_small:  # an interval of a handful of patients says nothing
            numbers[1:], p_value = [NONE, NONE], NONE
        pair = (titles.get(one, one) for one in (test.first, test.second))
        cells = [f"{title}, {test.test}", *pair, numbers[0], f"{numbers[1]} to {numbers[2]}", p_value]
        if adjusted:
            small = bool(task and task.too_small)
            cells.append(NONE if small else p_value_text(test.p_holm))
            cells.append(NONE if small or test.patients_needed is None else needed_text(test))
        rows.append(cells)
    head = ["First", "Second", "Difference (first − second)", "Interval", "p"]
    head += ["p (Holm, over the table)", "Patients for 80 % power"] if adjusted else []
    return Table("Paired tests, over all seeds", [(name, "") for name in head], by_first(rows)) if rows else None


def _notes(evaluation: Evaluation) -> dict[str, str]:
    """Text → letter."""
    texts = dict.fromkeys(note.text for note in evaluation.notes)
    return {text: string.ascii_lowercase[n % 26] * (n // 26 + 1) for n, text in enumerate(texts)}


def _marks(evaluation: Evaluation, task: Column, row: Row) -> str:
    letters = _notes(evaluation)
    mine = [n for n in evaluation.notes if (n.task, n.model) == (task.name, row.model) and n.mode in (None, row.mode)]
    return ", ".join(dict.fromkeys(letters[note.text] for note in mine))


def _sources(evaluation: Evaluation) -> list[str]:
    """Where the published numbers are from, a sentence a source."""
    sources: dict[str, list[str]] = {}
    for task in evaluation.tasks:
        if task.published and task.published_source:
            sources.setdefault(task.published_source, []).append(task.title)
    return [f"Published numbers of {', '.join(titles)}: {source}" for source, titles in sources.items()]


def _making(evaluation: Evaluation) -> dict[str, str]:
    """How the runs and this report were made; what is not known is left out."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("pandas", "scikit-learn", "matplotlib"))
    facts = {
        "Command": evaluation.command,
        "Made by": evaluation.made_by,
        "Date": evaluation.date,
        "Again": f"brainfm benchmark --from {SHEET} -o ANOTHER_FOLDER" if evaluation.command else "",
        "Report": f"brainfm {__version__}, Python {platform.python_version()}, {packages}",
    }
    return {name: value for name, value in facts.items() if value}
