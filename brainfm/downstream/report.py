"""A benchmark's results → the tables, the figures and one page, in the layout of the paper's Table 2 and Figures 4–5.

A results folder holds `grid.json` (what was planned: `Grid`), `results.csv` (a row a run and metric, on the test
split), and `predictions.csv` (a row a run and test patient; may be missing). `write_report` reads them and writes
`table.md`, `table.tex`, `figures/` and `index.html` beside them: at any time, as often as wanted, on half a run too.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import json
import math
import os
import platform
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

import brainfm
from brainfm.downstream import plots
from brainfm.downstream.statistics import HIGHER_IS_BETTER
from brainfm.errors import BrainfmError, MissingExtraError
from brainfm.operations import Checked
from brainfm.weights import atomic_path

try:
    import pandas as pd
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise MissingExtraError(error.name or "pandas", "eval") from error

_TEMPLATES = Path(__file__).parent / "templates"

_TITLES = {
    "auc": "AUC",
    "brier": "Brier score",
    "ece": "ECE",
    "mae": "MAE",
    "rmse": "RMSE",
    "r2": "R²",
    "pearson": "Pearson r",
}
_IN_UNITS = ("mae", "rmse")
_NONE = "–"

_RULE = (
    "A gain is claimed only over the controls: a row is above its controls where its interval (of its runs, the ends "
    "averaged over the seeds) lies wholly on the better side of the mean of every control."
)
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
    for drawing in _drawings(run):
        _, svg = plots.save_figure(drawing.figure, folder / "figures" / drawing.name)
        pictures.append(_Picture(drawing.task, drawing.caption, drawing.alt, svg.read_bytes()))
    _write(folder / "table.md", _markdown(run))
    _write(folder / "table.tex", _latex(run))
    _write(folder / "index.html", _page(run, pictures))
    return folder / "index.html"


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


# --- What was planned -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Published(Checked):
    """A published mean, and its standard deviation where it has one, of the row "model/mode"."""

    row: str
    mean: float
    sd: float | None = None


@dataclass(frozen=True)
class Task(Checked):
    """A task.

    Attributes:
        name: Its name in the CSV files, and in the names of its figures.
        title: Its name for readers.
        kind: What is predicted.
        metric: The metric of the main table.
        unit: Of the label, such as "years"; "" is none.
        label: What is predicted, in words for an axis.
        published: Numbers to show beside ours.
        published_source: Where they were published.
    """

    name: str
    title: str
    kind: Literal["binary", "multiclass", "regression"]
    metric: str
    unit: str = ""
    label: str = ""
    published: tuple[Published, ...] = ()
    published_source: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name or not set(self.name) <= set(string.ascii_letters + string.digits + "_-"):
            raise ValueError(f"Task: name is {self.name!r}, and must be letters, digits, - and _")
        if self.metric not in HIGHER_IS_BETTER:
            raise ValueError(f"Task: metric is {self.metric!r}, and must be one of {', '.join(HIGHER_IS_BETTER)}")


@dataclass(frozen=True)
class Row(Checked):
    """A row of the table: a model used in one mode, and its name for readers."""

    model: str
    mode: str
    title: str

    @property
    def key(self) -> str:
        """As `published` and `tests` name it: "model/mode"."""
        return f"{self.model}/{self.mode}"


@dataclass(frozen=True)
class Note(Checked):
    """A mark on the cells of a model and task, in one mode or (None) in all."""

    task: str
    model: str
    text: str
    mode: str | None = None


@dataclass(frozen=True)
class PairedTest(Checked):
    """A test of two rows ("model/mode") on the same patients; None is a number that could not be had."""

    task: str
    first: str
    second: str
    test: str
    difference: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    p_value: float | None = None


@dataclass(frozen=True)
class Grid(Checked):
    """What `grid.json` says: tasks × rows × seeds × fractions, and what to print with them.

    Attributes:
        title: Of the page.
        tasks: The columns of the table.
        rows: Its rows.
        controls: What a row must beat before anything is claimed for it.
        seeds: Runs of one cell.
        runs: Runs planned in all.
        made_by, date, command: How the runs were made.
        fractions: Shares of the training labels.
        notes: Marks on cells.
        statements: Sentences for the top of everything.
        tests: Paired tests.
    """

    title: str
    tasks: tuple[Task, ...]
    rows: tuple[Row, ...]
    seeds: int
    runs: int
    controls: tuple[Row, ...] = ()
    made_by: str = ""
    date: str = ""
    command: str = ""
    fractions: tuple[float, ...] = (1.0,)
    notes: tuple[Note, ...] = ()
    statements: tuple[str, ...] = ()
    tests: tuple[PairedTest, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for what, names in (("task", [t.name for t in self.tasks]), ("row", [row.key for row in self.everything])):
            if not names:
                raise ValueError(f"there is no {what}")
            if len(set(names)) < len(names):
                raise ValueError(f"the {what} {max(names, key=names.count)} is there twice")

    @property
    def everything(self) -> tuple[Row, ...]:
        """Rows, then controls."""
        return self.rows + self.controls


T = TypeVar("T")


def read_grid(path: Path) -> Grid:
    """The grid of a JSON file; fields that are not ours are left alone. Raises BrainfmError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)  # NaN: not a number
    except FileNotFoundError as error:
        raise BrainfmError(f"{path}: no such file; a report is made in the folder that a benchmark wrote") from error
    except (OSError, ValueError) as error:
        raise BrainfmError(f"{path}: not a readable JSON file ({error})") from error
    try:
        return _made(Grid, data)
    except ValueError as error:
        raise BrainfmError(f"{path}: {error}; correct it, or write it anew with the benchmark") from error


def _made(cls: type[T], data: Any) -> T:
    """A dataclass from JSON, its lists of dataclasses too. Raises ValueError."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{cls.__name__} is {data!r}, and must be an object with keys")
    parts = {"tasks": Task, "rows": Row, "controls": Row, "notes": Note, "tests": PairedTest, "published": Published}
    values = {}
    for item in fields(cls):  # type: ignore[arg-type]
        value = data.get(item.name, MISSING)
        if value is MISSING and item.default is MISSING:
            raise ValueError(f"{cls.__name__} lacks {item.name!r}")
        if item.name == "published" and isinstance(value, Mapping):
            value = [{"row": row, **(one if isinstance(one, Mapping) else {})} for row, one in value.items()]
        if item.name in parts and isinstance(value, list):
            value = tuple(_made(parts[item.name], one) for one in value)
        if value is not MISSING:
            values[item.name] = value
    return cls(**values)


# --- What was measured ----------------------------------------------------------------------------


class Score(NamedTuple):
    """A metric over the seeds: mean, standard deviation (NaN for one seed), seeds, mean ends of the interval."""

    mean: float
    sd: float
    seeds: int
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Run:
    """A results folder as read.

    Attributes:
        grid: What was planned.
        results: `results.csv`, with the column `row`: "model/mode".
        predictions: `predictions.csv` of the runs on all training labels, with the column `row`; empty without one.
        scores: (task, row, metric, fraction) → score.
        robustness: `robustness.csv`, with the column `row`; empty without one.
    """

    grid: Grid
    results: pd.DataFrame
    predictions: pd.DataFrame
    scores: Mapping[tuple[str, str, str, float], Score]
    robustness: pd.DataFrame

    @property
    def done(self) -> int:
        """Runs of which there are results."""
        return len(self.results.drop_duplicates(["task", "row", "fraction", "seed"]))

    def score(self, task: Task, row: Row, metric: str = "", fraction: float = 1.0) -> Score | None:
        """A score on the test split, by the task's own metric where none is named; None where there is none yet."""
        return self.scores.get((task.name, row.key, metric or task.metric, fraction))

    def best(self, task: Task) -> Score | None:
        """The best score of the rows; the controls do not compete."""
        scores = [score for row in self.grid.rows if (score := self.score(task, row))]
        return max(scores, key=lambda score: score.mean * _sign(task.metric), default=None)


def read_run(folder: Path) -> Run:
    """Read a results folder. Raises BrainfmError, with file, line and column, for what is not a number or unknown."""
    grid = read_grid(folder / "grid.json")
    key = ["task", "model", "mode", "fraction", "seed"]
    results = _read_csv(
        folder / "results.csv",
        words=("task", "model", "mode", "metric"),
        numbers=("fraction", "seed", "n_train", "n_test"),
        undefined=("value", "ci_low", "ci_high"),
    )
    _check(folder / "results.csv", results, grid, unique=[*key, "metric"])
    path = folder / "predictions.csv"
    if path.exists():
        words, numbers = ("task", "model", "mode", "patient_id"), ("fraction", "seed", "label", "prediction")
        predictions = _read_csv(path, words=words, numbers=numbers)
        _check(path, predictions, grid, unique=[])
        _check_probabilities(path, predictions, grid)
    else:
        predictions = pd.DataFrame(columns=["row", *key, "patient_id", "label", "prediction"])
    whole = predictions[predictions["fraction"] == 1.0]
    return Run(grid, results, whole, _scores(results), _read_robustness(folder / "robustness.csv", grid))


def _read_robustness(path: Path, grid: Grid) -> pd.DataFrame:
    words, numbers = ("task", "model", "mode", "corruption", "unit", "metric"), ("strength", "n_test")
    if not path.exists():
        return pd.DataFrame(columns=["row", *words, *numbers, "value"])
    table = _read_csv(path, words=words, numbers=numbers, undefined=("value",))
    table["row"] = table["model"] + "/" + table["mode"]
    known = table["task"].isin([task.name for task in grid.tasks]) & table["row"].isin([row.key for row in grid.rows])
    return table[known]


def _scores(results: pd.DataFrame) -> dict[tuple[str, str, str, float], Score]:
    groups = results.dropna(subset="value").groupby(["task", "row", "metric", "fraction"])
    table = groups.agg(
        mean=("value", "mean"),
        sd=("value", "std"),
        seeds=("value", "size"),
        low=("ci_low", "mean"),
        high=("ci_high", "mean"),
    )
    return {index: Score(*values) for index, values in zip(table.index, table.itertuples(index=False), strict=True)}


def _read_csv(path: Path, words: Sequence[str], numbers: Sequence[str], undefined: Sequence[str] = ()) -> pd.DataFrame:
    """A table with the column `line`; `undefined` are numbers that may be empty or nan. Raises BrainfmError."""
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            head = [name.strip() for name in next(reader, [])]
            for row in filter(None, reader):
                rows.append(row)
                lines.append(reader.line_num)
    except FileNotFoundError as error:
        raise BrainfmError(f"{path}: no such file; a report is made in the folder that a benchmark wrote") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BrainfmError(f"{path}: not a readable CSV file ({error})") from error
    wanted = [*words, *numbers, *undefined]
    if not head:
        raise BrainfmError(f"{path}: empty; it needs a header line with {', '.join(wanted)}")
    if lacking := [name for name in wanted if head.count(name) != 1]:
        raise BrainfmError(f"{path}, line 1: needs the column {', '.join(lacking)} once; it has {', '.join(head)}")
    if not rows:
        raise BrainfmError(f"{path}: a header but no rows; make the report once a run has finished")
    for line, row in zip(lines, rows, strict=True):
        if len(row) != len(head):
            raise BrainfmError(
                f"{path}, line {line}: {len(row)} fields under a header of {len(head)}; correct or remove the line"
            )
    table = pd.DataFrame(rows, columns=head)[wanted].assign(line=lines)
    for name in (*numbers, *undefined):
        texts = table[name].str.strip()
        table[name] = pd.to_numeric(texts, errors="coerce").astype(float)
        allowed = texts.str.lower().isin(["", "nan"]) if name in undefined else np.zeros(len(table), bool)
        _refuse(path, table, ~(np.isfinite(table[name]) | allowed), name, texts, "a finite number")
    return table


def _check(path: Path, table: pd.DataFrame, grid: Grid, unique: Sequence[str]) -> None:
    """Add the column `row`; raise BrainfmError for what the grid does not know and for what is there twice."""
    table["row"] = table["model"] + "/" + table["mode"]
    tasks, rows = [task.name for task in grid.tasks], [row.key for row in grid.everything]
    for name, known in (("task", tasks), ("row", rows)):
        _refuse(path, table, ~table[name].isin(known), name, table[name], f"of grid.json: {', '.join(known)}")
    share = table["fraction"]
    _refuse(path, table, ~((share > 0) & (share <= 1)), "fraction", share, "above 0 and at most 1")
    for name in {"seed", "n_train", "n_test"} & set(table):
        _refuse(path, table, (table[name] < 0) | (table[name] % 1 != 0), name, table[name], "a count: 0, 1, 2, …")
    if unique and (twice := table.duplicated(unique)).any():
        again = table[twice].iloc[0]
        first = table[(table[unique] == again[unique]).all(axis=1)].iloc[0]
        raise BrainfmError(f"{path}, line {again.line}: the same run and metric as line {first.line}; remove one")


def _check_probabilities(path: Path, table: pd.DataFrame, grid: Grid) -> None:
    kinds = table["task"].map({task.name: task.kind for task in grid.tasks})
    labels, predictions = table["label"], table["prediction"]
    _refuse(path, table, (kinds == "binary") & ~labels.isin([0, 1]), "label", labels, "0 or 1 in a binary task")
    wrong = (kinds != "regression") & ~predictions.between(0, 1)
    _refuse(path, table, wrong, "prediction", predictions, "a probability, between 0 and 1")


def _refuse(path: Path, table: pd.DataFrame, wrong: Any, name: str, values: Any, must_be: str) -> None:
    """Raise BrainfmError for the first row where `wrong` is True."""
    if wrong.any():
        n = int(np.argmax(wrong))
        line, value = table["line"].iloc[n], values.tolist()[n]
        raise BrainfmError(
            f"{path}, line {line}: {name} is {value!r}, and must be {must_be}; correct the line, or remove it and "
            "let the benchmark do that run again"
        )


# --- Numbers in words -----------------------------------------------------------------------------


def _metric(task: Task, name: str) -> str:
    """Such as "MAE (years)"."""
    title = _TITLES.get(name, name.replace("_", " "))
    return f"{title} ({task.unit})" if task.unit and name in _IN_UNITS else title


def _arrow(name: str) -> str:
    return {True: " ↑", False: " ↓", None: ""}[HIGHER_IS_BETTER.get(name)]


def _sign(name: str) -> int:
    """Multiplied by it, more is better."""
    return 1 if HIGHER_IS_BETTER[name] else -1


def _decimals(run: Run, task: Task, metric: str) -> int:
    """As in the paper: three, but two for an error in the label's unit, more where it is below 1."""
    if metric not in _IN_UNITS:
        return 3
    largest = max(
        (abs(score.mean) for row in run.grid.everything if (score := run.score(task, row, metric))), default=1
    )
    return 2 if largest >= 1 or largest == 0 else 2 - math.floor(math.log10(largest))


def _number(value: float, decimals: int) -> str:
    return f"{round(value, decimals) + 0.0:.{decimals}f}".replace("-", "−")


def _mean_sd(mean: float, sd: float | None, decimals: int) -> str:
    known = sd is not None and not math.isnan(sd)
    return _number(mean, decimals) + (f" ± {_number(sd, decimals)}" if known and sd is not None else "")


def _score_text(score: Score | None, decimals: int, seeds: int) -> str:
    if score is None:
        return _NONE
    return _mean_sd(score.mean, score.sd, decimals) + (f" (n={score.seeds})" if score.seeds != seeds else "")


def _p_value(value: float | None) -> str:
    if value is None:
        return _NONE
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _progress(run: Run) -> str:
    if run.done >= run.grid.runs:
        return f"All {run.grid.runs} runs are in."
    return f"Not finished: {run.done} of {run.grid.runs} runs are in; {_NONE} is a cell that has none yet."


def _claims(run: Run, task: Task) -> list[str]:
    """A sentence a row: whether it is above its controls by `_RULE`."""
    sign, decimals = _sign(task.metric), _decimals(run, task, task.metric)
    scores = [(control.title, run.score(task, control)) for control in run.grid.controls]
    missing = [title for title, score in scores if score is None]
    strongest = max(((score.mean * sign, title) for title, score in scores if score), default=(math.nan, ""))
    sentences = []
    for row in run.grid.rows:
        score = run.score(task, row)
        if score is None:
            said = "no result yet."
        elif not scores:
            said = "no control was planned, so no gain is claimed."
        elif missing:
            said = f"no gain is claimed before all controls are in; {', '.join(missing)}: no result yet."
        else:
            bar, title = strongest
            above = score.low * sign > bar and score.high * sign > bar  # False without an interval
            interval = f"[{_number(score.low, decimals)}, {_number(score.high, decimals)}]"
            said = (
                f"{'above' if above else 'not above'} its controls: {_number(score.mean, decimals)} "
                f"{'without an interval' if math.isnan(score.low + score.high) else interval}; "
                f"the best control, {title}, has {_number(bar * sign, decimals)}."
            )
        sentences.append(f"{row.title}: {said}")
    return sentences


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
        title = f"{task.title}: {_metric(task, task.metric)}{_arrow(task.metric)}"
        head += [(title, "here"), (title, "published")]

    def cells(row: Row, may_win: bool) -> list[Cell]:
        line = [Cell(row.title)]
        for task in run.grid.tasks:
            score, best, decimals = run.score(task, row), run.best(task), _decimals(run, task, task.metric)
            wins = score and best and round(score.mean, decimals) == round(best.mean, decimals)
            text = _score_text(score, decimals, run.grid.seeds)
            line.append(Cell(text, may_win and bool(wins), _marks(run.grid, task, row)))
            found = next((p for p in task.published if p.row == row.key), None)
            line.append(Cell(_mean_sd(found.mean, found.sd, decimals) if found else _NONE))
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
            columns = [(_metric(task, name) + _arrow(name), "") for name in names]
            yield Table(f"{task.title}: other metrics", [("Model", ""), *columns], groups)


def _metric_cell(run: Run, task: Task, row: Row, name: str) -> Cell:
    return Cell(_score_text(run.score(task, row, name), _decimals(run, task, name), run.grid.seeds))


def _test_table(run: Run) -> Table | None:
    """The paired tests; None without any."""
    titles = {row.key: row.title for row in run.grid.everything}
    tasks = {task.name: task for task in run.grid.tasks}
    rows = []
    for test in run.grid.tests:
        task = tasks.get(test.task)
        title, decimals = (task.title, _decimals(run, task, task.metric)) if task else (test.task, 3)
        numbers = [_NONE if n is None else _number(n, decimals) for n in (test.difference, test.ci_low, test.ci_high)]
        names = [title, titles.get(test.first, test.first), titles.get(test.second, test.second), test.test]
        cells = [*names, numbers[0], f"{numbers[1]} to {numbers[2]}", _p_value(test.p_value)]
        rows.append([Cell(text) for text in cells])
    head = ("Task", "First", "Second", "Test", "Difference (first − second)", "Interval", "p")
    return Table("Paired tests", [(name, "") for name in head], [("", rows)]) if rows else None


def _notes(grid: Grid) -> dict[str, str]:
    """Text → letter."""
    texts = dict.fromkeys(note.text for note in grid.notes)
    return {text: string.ascii_lowercase[n % 26] * (n // 26 + 1) for n, text in enumerate(texts)}


def _marks(grid: Grid, task: Task, row: Row) -> str:
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
        _md(_progress(run)),
        _md_table(_main_table(run)),
        _md(_READING.format(seeds=grid.seeds)),
        "\n".join(f"- <sup>{letter}</sup> {_md(text)}" for text, letter in _notes(grid).items()),
        _md_list(_sources(grid)),
        f"## Gains\n\n{_md(_RULE)}",
        *(f"{_md(task.title)}\n\n{_md_list(_claims(run, task))}" for task in grid.tasks),
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
    lines += [across(_tex(text)) for text in (*run.grid.statements, _progress(run))]
    lines += [across(_tex(text)) for text in (_READING.format(seeds=run.grid.seeds), *_sources(run.grid))]
    lines += [across(rf"\textsuperscript{{{letter}}} {_tex(text)}") for text, letter in _notes(run.grid).items()]
    return "\n".join([*lines, r"\end{tabular}"]) + "\n"


# --- Figures --------------------------------------------------------------------------------------


class _Drawing(NamedTuple):
    """A figure of a task: name of its files, caption, and the text for who does not see it."""

    task: Task
    name: str
    caption: str
    alt: str
    figure: Figure


class _Picture(NamedTuple):
    task: Task
    caption: str
    alt: str
    svg: bytes


def _drawings(run: Run) -> Iterator[_Drawing]:
    """Every figure there are numbers for, task by task."""
    styles = plots.looks([row.title for row in run.grid.rows], [row.title for row in run.grid.controls])
    looks = dict(zip((row.key for row in run.grid.everything), styles, strict=True))
    kinds: dict[str, tuple[Callable[..., _Drawing | None], ...]] = {
        "binary": (_draw_dots, _draw_label_efficiency, _draw_roc, _draw_calibration, _draw_robustness),
        "regression": (_draw_dots, _draw_label_efficiency, _draw_agreement, _draw_robustness),
        "multiclass": (_draw_dots, _draw_label_efficiency, _draw_robustness),
    }
    for task in run.grid.tasks:
        for draw in kinds[task.kind]:
            drawing = draw(run, task, looks)
            if drawing:
                yield drawing


_Looks = Mapping[str, plots.Look]


def _draw_dots(run: Run, task: Task, looks: _Looks) -> _Drawing | None:
    published = {p.row: p.mean for p in task.published}
    found = [(row, score) for row in run.grid.everything if (score := run.score(task, row))]
    if not found:
        return None
    rows = [(looks[row.key], s.mean, s.low, s.high, published.get(row.key)) for row, s in found]
    controls = sum(row in run.grid.controls for row, _ in found)
    figure = plots.dots(rows, controls, task.title, _metric(task, task.metric) + _arrow(task.metric))
    decimals = _decimals(run, task, task.metric)
    alt = "; ".join(f"{row.title} {_number(score.mean, decimals)}" for row, score in found)
    caption = (
        f"{task.title}: {_metric(task, task.metric)} of every row and, below the line, of the controls. Points: mean "
        "over the seeds. Bars: the runs' intervals, ends averaged. Open diamonds: published."
    )
    return _Drawing(task, f"{task.name}_scores", caption, f"{_metric(task, task.metric)}: {alt}", figure)


def _draw_label_efficiency(run: Run, task: Task, looks: _Looks) -> _Drawing | None:
    own = run.results[(run.results["task"] == task.name) & (run.results["metric"] == task.metric)]
    fractions = sorted(own["fraction"].unique())
    curves = []
    for row in run.grid.everything:
        points = [(f, score) for f in fractions if (score := run.score(task, row, fraction=f))]
        if len(points) > 1:
            numbers = np.array([(fraction, score.mean, score.sd) for fraction, score in points])
            curves.append((looks[row.key], *numbers.T))
    if not curves:
        return None
    ticks = {f: f"{100 * f:g} %\n{_patients(own[own['fraction'] == f]['n_train'])}" for f in fractions}
    figure = plots.label_efficiency(curves, ticks, task.title, _metric(task, task.metric) + _arrow(task.metric))
    alt = "; ".join(
        f"{look.title} from {mean[0]:.3g} at {100 * x[0]:g} % to {mean[-1]:.3g} at {100 * x[-1]:g} %"
        for look, x, mean, _ in curves
    )
    caption = (
        f"{task.title}: {_metric(task, task.metric)} on the same test split, trained on a share of the labels (below "
        "it, patients). Line: mean over the seeds; band: ± standard deviation."
    )
    return _Drawing(task, f"{task.name}_label_efficiency", caption, f"Label efficiency: {alt}", figure)


def _draw_robustness(run: Run, task: Task, looks: _Looks) -> _Drawing | None:
    own = run.robustness[run.robustness["task"] == task.name]
    rows = [row for row in run.grid.rows if row.key in set(own["row"])]
    if not rows:
        return None
    panels = []
    for name, part in own.groupby("corruption", sort=False):
        curves = []
        for row in rows:
            curve = part[part["row"] == row.key].sort_values("strength")
            curves.append((looks[row.key], curve["strength"].to_numpy(), curve["value"].to_numpy()))
        panels.append((str(name), str(part["unit"].iloc[0]), curves))
    figure = plots.robustness(panels, task.title, _metric(task, task.metric) + _arrow(task.metric))
    caption = (
        f"{task.title}: {_metric(task, task.metric)} of a probe fitted on clean scans, on test scans that are spoilt "
        "more and more; the first point of each curve is the clean scans. One split."
    )
    alt = f"Robustness of {', '.join(row.title for row in rows)} to {', '.join(name for name, _, _ in panels)}"
    return _Drawing(task, f"{task.name}_robustness", caption, alt, figure)


def _patients(counts: pd.Series) -> str:
    low, high = int(counts.min()), int(counts.max())
    return f"{low}" if low == high else f"{low}–{high}"


def _runs(run: Run, task: Task, row: Row) -> list[tuple[plots.Vector, plots.Vector]]:
    """Labels and predictions of each seed, on all training labels."""
    own = run.predictions[(run.predictions["task"] == task.name) & (run.predictions["row"] == row.key)]
    return [(part["label"].to_numpy(float), part["prediction"].to_numpy(float)) for _, part in own.groupby("seed")]


def _draw_roc(run: Run, task: Task, looks: _Looks) -> _Drawing | None:
    curves = []
    for row in run.grid.everything:
        runs = [pair for pair in _runs(run, task, row) if len(set(pair[0])) == 2]
        if runs:
            curves.append((looks[row.key], runs))
    if not curves:
        return None
    caption = f"{task.title}: ROC on the test split, the mean curve over the seeds, and in brackets the mean area."
    alt = "ROC curves of " + ", ".join(look.title for look, _ in curves)
    return _Drawing(task, f"{task.name}_roc", caption, alt, plots.roc(curves, task.title))


def _draw_calibration(run: Run, task: Task, looks: _Looks) -> _Drawing | None:
    curves = []
    for row in run.grid.everything:
        if runs := _runs(run, task, row):
            labels, predictions = map(np.concatenate, zip(*runs, strict=True))
            curves.append((looks[row.key], labels, predictions))
    if not curves:
        return None
    caption = (
        f"{task.title}: reliability on the test split, seeds pooled, in ten bins of equally many predictions. On the "
        "diagonal, what is predicted is what happens."
    )
    alt = "Reliability curves of " + ", ".join(look.title for look, *_ in curves)
    return _Drawing(task, f"{task.name}_calibration", caption, alt, plots.calibration(curves, task.title))


def _draw_agreement(run: Run, task: Task, looks: _Looks) -> _Drawing | None:

    def rank(row: Row) -> float:  # the best row first; the others and the controls stay in their order
        score = run.score(task, row)
        return -score.mean * _sign(task.metric) if score and row in run.grid.rows else math.inf

    found = {row.key: runs[0] for row in run.grid.everything if (runs := _runs(run, task, row))}
    if not found:
        return None
    best = min((row for row in run.grid.everything if row.key in found), key=rank)
    keys = [best.key, *(key for key in found if key != best.key)]
    label = (task.label or task.title) + (f" ({task.unit})" if task.unit else "")
    figure = plots.agreement([(looks[key], *found[key]) for key in keys], task.title, label)
    caption = f"{task.title}: predicted against true {label} of each test patient, by one run. Large: the best row."
    return _Drawing(task, f"{task.name}_agreement", caption, f"Scatter plots; the best row is {best.title}", figure)


# --- In HTML --------------------------------------------------------------------------------------


def _page(run: Run, pictures: Sequence[_Picture]) -> str:
    """The page, from `templates/`. Its policy forbids requests, and scripts and styles other than its own."""
    grid = run.grid
    parts = {name: (_TEMPLATES / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    others = [table for table in (*_metric_tables(run), _test_table(run)) if table]
    return string.Template(parts["html"]).substitute(
        title=html.escape(grid.title),
        style=parts["css"],
        script=parts["js"],
        style_hash=content_hash(parts["css"]),
        script_hash=content_hash(parts["js"]),
        statements=_html_list(grid.statements, "statements"),
        progress=f'<p class="{"done" if run.done >= grid.runs else "unfinished"}">{html.escape(_progress(run))}</p>',
        table=_html_table(_main_table(run)),
        reading=html.escape(_READING.format(seeds=grid.seeds)),
        sources=_html_list(_sources(grid)),
        notes="".join(f"<p><sup>{mark}</sup> {html.escape(text)}</p>" for text, mark in _notes(grid).items()),
        rule=html.escape(_RULE),
        claims="".join(f"<h3>{html.escape(t.title)}</h3>{_html_list(_claims(run, t))}" for t in grid.tasks),
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


def _html_figures(pictures: Sequence[_Picture]) -> str:
    parts = []
    for title, group in groupby(pictures, key=lambda picture: picture.task.title):
        parts.append(f'<h3>{html.escape(title)}</h3><div class="figures">')
        for picture in group:
            source = f"data:image/svg+xml;base64,{base64.b64encode(picture.svg).decode()}"
            image = f'<img src="{source}" alt="{html.escape(picture.alt)}">'
            parts.append(f"<figure>{image}<figcaption>{html.escape(picture.caption)}</figcaption></figure>")
        parts.append("</div>")
    return "".join(parts) or "<p>None yet.</p>"
