"""A results folder as data: what was planned (`grid.json`) and what was measured (`results.csv` and its companions)."""

from __future__ import annotations

import csv
import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np

from brainfm.downstream.statistics import HIGHER_IS_BETTER, Kind
from brainfm.errors import BrainfmError, MissingExtraError
from brainfm.schema import Checked

try:
    import pandas as pd
except ModuleNotFoundError as error:
    raise MissingExtraError(error.name or "pandas", "eval") from error

P = TypeVar("P", bound="_Part")
Reason: TypeAlias = Literal[
    "contract", "weights", "licence", "memory", "overlap", "error"
]  # why an encoder is left out


# --- What was planned -----------------------------------------------------------------------------


class _Part(Checked):
    """A part of `grid.json`, in which fields that are not ours are left alone."""

    @classmethod
    def from_dict(cls: type[P], data: Mapping[str, Any]) -> P:
        if isinstance(data, Mapping):
            ours = {item.name for item in fields(cls)}  # type: ignore[arg-type]
            data = {name: value for name, value in data.items() if name in ours}
        return super().from_dict(data)


@dataclass(frozen=True)
class Published(_Part):
    """A published mean, and its standard deviation where it has one, of the row "model/mode"."""

    row: str
    mean: float
    sd: float | None = None


@dataclass(frozen=True)
class Share(_Part):
    """What is in a part of the split, of all seeds' splits the fewest and the most.

    Attributes:
        part: "train", "val" or "test".
        scans: How many.
        patients: How many.
        classes: Patients of each class, in the order of the task's classes.
    """

    part: str
    scans: tuple[int, int]
    patients: tuple[int, int]
    classes: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Unused(_Part):
    """A scan or row that is not used, by one row ("model/mode") of the table or ("") by none; and whether it failed."""

    task: str
    scan: str
    why: str
    row: str = ""
    failed: bool = False


@dataclass(frozen=True)
class Column(_Part):
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
        without: Controls ("model/mode") that this task cannot have, such as covariates where none are known.
        classes: The words of the classes; of a binary task, the first is 0 and the second, the positive one, 1.
        shares: What is in train, val and test.
        too_small: Why the test part is too small to say anything of; "" where it is not.
    """

    name: str
    title: str
    kind: Kind
    metric: str
    unit: str = ""
    label: str = ""
    published: tuple[Published, ...] = ()
    published_source: str = ""
    without: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    shares: tuple[Share, ...] = ()
    too_small: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name or not set(self.name) <= set(string.ascii_letters + string.digits + "_-"):
            raise ValueError(f"Column: name is {self.name!r}, and must be letters, digits, - and _")
        if self.metric not in HIGHER_IS_BETTER:
            raise ValueError(f"Column: metric is {self.metric!r}, and must be one of {', '.join(HIGHER_IS_BETTER)}")

    @property
    def positive(self) -> str:
        """The class that is 1 in a binary task; "" where none is known."""
        return self.classes[1] if self.kind == "binary" and len(self.classes) == 2 else ""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Column:
        """As `Checked` has it, but that what was published may be a mapping by row, as files have it."""
        published = data.get("published") if isinstance(data, Mapping) else None
        if isinstance(published, Mapping):
            rows = [{"row": row, **(one if isinstance(one, Mapping) else {})} for row, one in published.items()]
            data = {**data, "published": rows}
        return super().from_dict(data)

    def to_dict(self, *, sparse: bool = False) -> dict[str, Any]:
        """As `Checked` has it, but that what was published is a mapping by row."""
        data = super().to_dict(sparse=sparse)
        if "published" in data:
            data["published"] = {one.pop("row"): one for one in data["published"]}
        return data


@dataclass(frozen=True)
class Row(_Part):
    """A row of the table: a model used in one mode, and its name for readers."""

    model: str
    mode: str
    title: str

    @property
    def key(self) -> str:
        """As `published` and `tests` name it: "model/mode"."""
        return f"{self.model}/{self.mode}"

    @property
    def base(self) -> str:
        """The mode without what its embeddings are harmonised by: "probe" of "probe+combat"."""
        return self.mode.partition("+")[0]

    @property
    def harmonised(self) -> str:
        """What its embeddings are harmonised by; "" is nothing."""
        return self.mode.partition("+")[2]


@dataclass(frozen=True)
class Note(_Part):
    """A mark on the cells of a model and task, in one mode or (None) in all."""

    task: str
    model: str
    text: str
    mode: str | None = None


@dataclass(frozen=True)
class PairedTest(_Part):
    """A test of two rows ("model/mode") on the same patients, of all seeds; None is a number that could not be had.

    Attributes:
        task, first, second: What is compared.
        test: Its name.
        difference: First minus second.
        ci_low, ci_high: Its 95 % interval.
        p_value: Two-sided.
        p_holm: That, adjusted over all tests of this name in the table.
        patients: In the test parts of all seeds.
        patients_needed: For the difference to be seen with a power of 80 %.
    """

    task: str
    first: str
    second: str
    test: str
    difference: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    p_value: float | None = None
    p_holm: float | None = None
    patients: int | None = None
    patients_needed: int | None = None


@dataclass(frozen=True)
class Candidate(_Part):
    """An encoder of a comparison: what a volume costs, or why it is left out.

    Attributes:
        model: Its name, that of its rows.
        weights: "trained", "control" (drawn by its card's seed), "random" (its own could not be had), or "" (left out).
        width: Numbers in its embedding.
        scans: How many it embedded.
        failed: How many it could not.
        seconds: A volume, read, prepared and embedded.
        gigabytes: The most memory that its process held; on a GPU, that of the GPU.
        device: Where that was measured.
        reason: Why it is left out: "contract", "weights", "licence", "memory", "overlap" or "error".
        why: That in words; of random weights, why it has no others.
    """

    model: str
    weights: Literal["trained", "control", "random", ""] = ""
    width: int = 0
    scans: int = 0
    failed: int = 0
    seconds: float | None = None
    gigabytes: float | None = None
    device: str = ""
    reason: Reason | Literal[""] = ""
    why: str = ""


@dataclass(frozen=True)
class Evaluation(_Part):
    """What `grid.json` says: tasks × rows × seeds × fractions, and what to print with them.

    Attributes:
        title: Of the page.
        tasks: The columns of the table.
        rows: Its rows.
        controls: What a row must beat before anything is claimed for it.
        seeds: Runs of one cell.
        runs: Runs planned in all.
        made_by, date, command: How the runs were made.
        fractions: Of the training labels.
        notes: Marks on cells.
        statements: Sentences for the top of everything.
        tests: Paired tests.
        warnings: What must be read before any number.
        left_out: Scans and rows that are not used, and why.
        candidates: Of a comparison of encoders, all that were looked at.
    """

    title: str
    tasks: tuple[Column, ...]
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
    warnings: tuple[str, ...] = ()
    left_out: tuple[Unused, ...] = ()
    candidates: tuple[Candidate, ...] = ()

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

    def cost(self, row: Row) -> Candidate | None:
        """The encoder of a row, where what it costs is known."""
        return next((one for one in self.candidates if one.model == row.model and one.weights), None)


def read_evaluation(path: Path) -> Evaluation:
    """What a `grid.json` says. Raises BrainfmError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)  # NaN: not a number
    except FileNotFoundError as error:
        raise BrainfmError(f"{path}: no such file; a report is made in the folder that a benchmark wrote") from error
    except (OSError, ValueError) as error:
        raise BrainfmError(f"{path}: not a readable JSON file ({error})") from error
    try:
        return Evaluation.from_dict(data)
    except ValueError as error:
        raise BrainfmError(f"{path}: {error}; correct it, or write it anew with the benchmark") from error


# --- What was measured ----------------------------------------------------------------------------


class Summary(NamedTuple):
    """A metric over the seeds: mean, standard deviation (NaN for one seed), seeds, mean ends of the interval."""

    mean: float
    std: float
    seeds: int
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Run:
    """A results folder as read.

    Attributes:
        evaluation: What was planned.
        results: `results.csv`, with the column `row`: "model/mode".
        predictions: `predictions.csv` of the runs on all training labels, with the column `row`; empty without one.
        summaries: (task, row, metric, fraction) → the metric over the seeds.
        robustness: `robustness.csv`, with the column `row`; empty without one.
    """

    evaluation: Evaluation
    results: pd.DataFrame
    predictions: pd.DataFrame
    summaries: Mapping[tuple[str, str, str, float], Summary]
    robustness: pd.DataFrame

    def trained_parameters(self, row: Row, task: Column | None = None) -> list[tuple[float, float]]:
        """How many numbers a row trains, and of how many (NaN: not known), in one task or all: each once, sorted."""
        mine = self.results[self.results["row"] == row.key]
        mine = mine if task is None else mine[mine["task"] == task.name]
        found = mine[["trained_parameters", "parameters"]].dropna(subset="trained_parameters")
        return sorted(found.drop_duplicates().itertuples(index=False, name=None))

    @property
    def done(self) -> int:
        """Runs of which there are results."""
        return len(self.results.drop_duplicates(["task", "row", "fraction", "seed"]))

    def summary(self, task: Column, row: Row, metric: str = "", fraction: float = 1.0) -> Summary | None:
        """A metric on the test split, the task's own where none is named; None where there is none yet."""
        return self.summaries.get((task.name, row.key, metric or task.metric, fraction))

    def best(self, task: Column) -> Summary | None:
        """The best of the rows; the controls do not compete."""
        found = [summary for row in self.evaluation.rows if (summary := self.summary(task, row))]
        return max(found, key=lambda summary: summary.mean * sign(task.metric), default=None)

    def is_below_a_control(self, task: Column, summary: Summary) -> bool:
        """Whether a control's mean is as good or better."""
        theirs = [found.mean for row in self.evaluation.controls if (found := self.summary(task, row))]
        return any(mean * sign(task.metric) >= summary.mean * sign(task.metric) for mean in theirs)


def read_run(folder: Path) -> Run:
    """Read a results folder. Raises BrainfmError, with file, line and column, for what is not a number or unknown."""
    evaluation = read_evaluation(folder / "grid.json")
    key = ["task", "model", "mode", "fraction", "seed"]
    results = _read_csv(
        folder / "results.csv",
        words=("task", "model", "mode", "metric"),
        numbers=("fraction", "seed", "n_train", "n_test"),
        undefined=("value", "ci_low", "ci_high"),
        optional=("trained_parameters", "parameters"),
    )
    _check(folder / "results.csv", results, evaluation, unique=[*key, "metric"])
    path = folder / "predictions.csv"
    if path.exists():
        words, numbers = ("task", "model", "mode", "patient_id"), ("fraction", "seed", "label", "prediction")
        predictions = _read_csv(path, words=words, numbers=numbers)
        _check(path, predictions, evaluation, unique=[])
        _check_probabilities(path, predictions, evaluation)
    else:
        predictions = pd.DataFrame(columns=["row", *key, "patient_id", "label", "prediction"])
    whole = predictions[predictions["fraction"] == 1.0]
    robustness = _read_robustness(folder / "robustness.csv", evaluation)
    return Run(evaluation, results, whole, _summaries(results), robustness)


def _read_robustness(path: Path, evaluation: Evaluation) -> pd.DataFrame:
    words, numbers = ("task", "model", "mode", "corruption", "unit", "metric"), ("strength", "n_test")
    if not path.exists():
        return pd.DataFrame(columns=["row", *words, *numbers, "value"])
    table = _read_csv(path, words=words, numbers=numbers, undefined=("value",))
    table["row"] = table["model"] + "/" + table["mode"]
    tasks, rows = [task.name for task in evaluation.tasks], [row.key for row in evaluation.rows]
    return table[table["task"].isin(tasks) & table["row"].isin(rows)]


def _summaries(results: pd.DataFrame) -> dict[tuple[str, str, str, float], Summary]:
    groups = results.dropna(subset="value").groupby(["task", "row", "metric", "fraction"])
    table = groups.agg(
        mean=("value", "mean"),
        std=("value", "std"),
        seeds=("value", "size"),
        low=("ci_low", "mean"),
        high=("ci_high", "mean"),
    )
    return {index: Summary(*values) for index, values in zip(table.index, table.itertuples(index=False), strict=True)}


def _read_csv(
    path: Path,
    words: Sequence[str],
    numbers: Sequence[str],
    undefined: Sequence[str] = (),
    optional: Sequence[str] = (),
) -> pd.DataFrame:
    """A table with the column `line`; `undefined` numbers may be empty or nan, and `optional` ones be no column at all.

    Raises:
        BrainfmError: The file is not such a table.
    """
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
    table = pd.DataFrame(rows, columns=head).reindex(columns=[*wanted, *optional], fill_value="").assign(line=lines)
    undefined = (*undefined, *optional)
    for name in (*numbers, *undefined):
        texts = table[name].str.strip()
        table[name] = pd.to_numeric(texts, errors="coerce").astype(float)
        allowed = texts.str.lower().isin(["", "nan"]) if name in undefined else np.zeros(len(table), bool)
        _refuse(path, table, ~(np.isfinite(table[name]) | allowed), name, texts, "a finite number")
    return table


def _check(path: Path, table: pd.DataFrame, evaluation: Evaluation, unique: Sequence[str]) -> None:
    """Add the column `row`; raise BrainfmError for what was not planned and for what is there twice."""
    table["row"] = table["model"] + "/" + table["mode"]
    tasks, rows = [task.name for task in evaluation.tasks], [row.key for row in evaluation.everything]
    for name, known in (("task", tasks), ("row", rows)):
        _refuse(path, table, ~table[name].isin(known), name, table[name], f"of grid.json: {', '.join(known)}")
    fraction = table["fraction"]
    _refuse(path, table, ~((fraction > 0) & (fraction <= 1)), "fraction", fraction, "above 0 and at most 1")
    for name in {"seed", "n_train", "n_test"} & set(table):
        _refuse(path, table, (table[name] < 0) | (table[name] % 1 != 0), name, table[name], "a count: 0, 1, 2, …")
    if unique and (twice := table.duplicated(unique)).any():
        again = table[twice].iloc[0]
        first = table[(table[unique] == again[unique]).all(axis=1)].iloc[0]
        raise BrainfmError(f"{path}, line {again.line}: the same run and metric as line {first.line}; remove one")


def _check_probabilities(path: Path, table: pd.DataFrame, evaluation: Evaluation) -> None:
    kinds = table["task"].map({task.name: task.kind for task in evaluation.tasks})
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


def sign(name: str) -> int:
    """Multiplied by it, more is better."""
    return 1 if HIGHER_IS_BETTER[name] else -1
