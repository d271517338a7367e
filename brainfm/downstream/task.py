"""Tasks: what is to be predicted of which scans, from a YAML file and a manifest, checked before anything starts."""

from __future__ import annotations

import difflib
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from brainfm.columns import MOST_CLASSES, in_order, plain_kind
from brainfm.downstream.covariates import encoded, numbers_of
from brainfm.downstream.probe import Target
from brainfm.downstream.split import PAPER_FRACTIONS, SPLITS, UNUSED, check_split, make_fold, make_split
from brainfm.downstream.statistics import HIGHER_IS_BETTER, Kind, metrics
from brainfm.errors import BrainfmError, TaskError
from brainfm.files import one_line
from brainfm.manifest import ScanRecord, read_manifest
from brainfm.schema import Checked, read_yaml
from brainfm.tabular import is_missing

logger = logging.getLogger("brainfm")

TASKS = Path(__file__).parent / "tasks"

_METRIC = {"binary": "auc", "multiclass": "balanced_accuracy", "regression": "mae"}


@dataclass(frozen=True, kw_only=True)
class Task(Checked):
    """What is to be predicted.

    Attributes:
        name: Letters, digits, - and _.
        label: The manifest's column that holds it.
        kind: "binary", "multiclass" or "regression".
        title: Its name for readers; "" is the name.
        manifest: CSV of scans with the label; relative to the task's file.
        test_manifest: Another list of scans with the label, of other patients; relative to the task's file. What
            learned from the manifest's train part is tested on all of it, beside the manifest's own test part.
        leave_out: A column of the manifest, such as "site". Each of its values is tested once by what learned from the
            others, beside the split of all.
        metric: What the table shows; "" is auc, balanced_accuracy or mae, by the kind.
        selection: The epoch of a fine-tuning is chosen on val by the "metric", or by the "loss".
        target: What a regression learns where it is fine-tuned or trained from scratch: its labels "standardised", or
            "raw", as in the released code of the paper; see `LinearHead`. A mode's own recipe comes first.
        age_bias: "keep", or the rule of `age_bias_correction`, learned on val, applied to test; of regressions.
        unit: Of the label, such as "years".
        classes: The label's words in order, the first is 0; () takes whole numbers, or the words in alphabetical order.
        positive: Of a binary label the word that is 1; "" is the second of the classes.
        split: The manifest's column that says "train", "val" or "test"; where it has none, each seed draws a split.
        fractions: Of the patients for train, val and test, where a split is drawn.
        covariates: Columns that a control predicts from without an image, as numbers, or as categories where they hold
            words; head size is added where there are masks.
        categorical: Those of them whose values are categories though they look like numbers, such as codes of sites.
        cohorts: Names of the data, to say which models were pretrained on them.
        published: "model/mode" → [mean, standard deviation] of the paper's table.
        published_source: Where that is from.
    """

    name: str
    label: str
    kind: Kind
    title: str = ""
    manifest: str = ""
    test_manifest: str = ""
    leave_out: str = ""
    metric: str = ""
    selection: str = "metric"
    target: Target = "standardised"
    age_bias: Literal["keep", "cole", "beheshti"] = "keep"
    unit: str = ""
    classes: tuple[str, ...] = ()
    positive: str = ""
    split: str = "split"
    fractions: tuple[float, float, float] = PAPER_FRACTIONS
    covariates: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    cohorts: tuple[str, ...] = ()
    published: dict[str, tuple[float, ...]] = field(default_factory=dict)
    published_source: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = metrics([0.0, 1.0], [0.0, 1.0], "regression" if self.kind == "regression" else "binary")
        object.__setattr__(self, "metric", self.metric or _METRIC[self.kind])
        object.__setattr__(self, "title", self.title or self.name)
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise ValueError(
                f"name is {self.name!r}, and must be letters, digits, - and _; give name: in the task's file"
            )
        if min(self.fractions) <= 0 or not math.isclose(sum(self.fractions), 1):
            raise ValueError(f"fractions are {self.fractions}, and must be above 0 and 1 together")
        if self.metric not in known:
            raise ValueError(f"metric is {self.metric!r}, and must be one of {', '.join(known)}")
        if self.selection not in ("metric", "loss"):
            raise ValueError(f"selection is {self.selection!r}, and must be 'metric' or 'loss'")
        if self.test_manifest and self.leave_out:
            raise ValueError("test_manifest and leave_out are two ways to test elsewhere; give one, or make two tasks")
        if self.target == "raw" and self.kind != "regression":
            raise ValueError("target is of a regression")
        if self.positive and self.kind != "binary":
            raise ValueError("positive is of a binary task: the word of its label that is 1")
        if self.positive and self.classes and self.positive not in self.classes:
            raise ValueError(f"positive is {self.positive!r}, and must be one of the classes {', '.join(self.classes)}")
        if self.age_bias != "keep" and self.kind != "regression":
            raise ValueError("age_bias is of a regression")
        if self.label in self.covariates:
            raise ValueError(f"covariates hold the label {self.label!r} itself")
        if other := [name for name in self.categorical if name not in self.covariates]:
            raise ValueError(f"categorical names {other[0]!r}, which is none of the covariates")

    @property
    def higher_is_better(self) -> bool:
        """Whether more of the metric is better."""
        return HIGHER_IS_BETTER[self.metric]


@dataclass(frozen=True)
class LeftOut:
    """A scan or a row of labels that is not used.

    Attributes:
        scan: Its path, or whose it is.
        why: In words.
        failed: Whether it should have been used: a scan that is not there or cannot be read.
    """

    scan: str
    why: str
    failed: bool = False


@dataclass(frozen=True, eq=False)
class TaskData:
    """The scans of a task that have a label.

    Attributes:
        task: The task.
        records: The scans.
        labels: [n]: float64 for a regression, else int64 from 0.
        classes: The words of the classes.
        given_split: "train", "val" or "test" of each scan, where the manifest says it.
        folds: Of a cross-validation in place of splits drawn apart: seed n is fold n, and after all of them come those
            of another; 0 is none.
        elsewhere: Whether each scan is of the site or cohort that is the test part, of which nothing is learned; () is
            a task that is tested on a part of its own.
        left_out: What is not used: rows without a label, scans that are not there.
        embeddings: Vectors [n, d] that were made before, by the name of their table; NaN where one has none of a scan.
        made_by: The model that made each of them, where the table says it.
        notes: What the results say of the data.
    """

    task: Task
    records: list[ScanRecord]
    labels: NDArray[Any]
    classes: tuple[str, ...]
    given_split: list[str] | None
    left_out: tuple[LeftOut, ...] = ()
    embeddings: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    made_by: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    elsewhere: tuple[bool, ...] = ()
    folds: int = 0

    @property
    def patients(self) -> list[str]:
        """The patient of each scan."""
        return [record.patient_id for record in self.records]

    @property
    def has_masks(self) -> bool:
        """Whether a scan comes with a mask, and so with the size of a head."""
        return any(record.brain_mask is not None for record in self.records)

    @property
    def has_covariates(self) -> bool:
        """Whether there is something to predict from without an image."""
        return bool(self.task.covariates) or self.has_masks

    def split(self, seed: int) -> list[str]:
        """The manifest's split, or the one that the seed draws; what is elsewhere takes the test part's place."""
        if self.elsewhere:
            here = self.at(n for n, is_elsewhere in enumerate(self.elsewhere) if not is_elsewhere)
            own = iter(here.split(seed))
            parts = ["" if is_elsewhere else next(own) for is_elsewhere in self.elsewhere]
            return [{"": "test", "test": UNUSED}.get(part, part) for part in parts]
        if self.given_split is not None:
            return self.given_split
        if self.folds:
            again, fold = divmod(seed, self.folds)
            kind = self.task.kind
            return make_fold(self.records, self.labels, kind=kind, folds=self.folds, fold=fold, seed=again)
        return make_split(self.records, self.labels, kind=self.task.kind, fractions=self.task.fractions, seed=seed)

    def at(self, rows: Iterable[int]) -> TaskData:
        """Some of the scans, by their numbers, none of them elsewhere."""
        kept = list(rows)
        return replace(
            self,
            records=[self.records[n] for n in kept],
            labels=self.labels[kept],
            given_split=None if self.given_split is None else [self.given_split[n] for n in kept],
            embeddings={name: vectors[kept] for name, vectors in self.embeddings.items()},
            elsewhere=(),
        )

    def without(self, reasons: Mapping[int, str]) -> TaskData:
        """The task without some of its scans, which failed for the reasons given; raises TaskError if few are left."""
        if not reasons:
            return self
        kept = [n for n in range(len(self.records)) if n not in reasons]
        failed = [LeftOut(self.records[n].name, why, failed=True) for n, why in sorted(reasons.items())]
        first = f"{len(failed)} of {len(self.records)} scans are left out, such as {failed[0].scan} ({failed[0].why})"
        if not kept:
            raise TaskError(f"{self.task.name}: {first}: none is left")
        data = replace(
            self.at(kept),
            left_out=(*self.left_out, *failed),
            elsewhere=tuple(self.elsewhere[n] for n in kept) if self.elsewhere else (),
        )
        check_parts(data, f"{self.task.name}: {first}")
        return data


def make_task(label: str, kind: Kind, covariates: Sequence[str] = (), positive: str = "") -> Task:
    """A task on a column of a user's own manifest. Raises TaskError."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", label) or "label"
    try:
        return Task(name=name, title=label, label=label, kind=kind, covariates=tuple(covariates), positive=positive)
    except ValueError as error:
        raise TaskError(str(error)) from error


def load_task(name: str | os.PathLike[str]) -> Task:
    """A task that ships with brainfm, such as "age_ixi", or that of a YAML file. Raises TaskError."""
    text = str(name)
    path = Path(text) if text.endswith((".yaml", ".yml")) else TASKS / f"{text}.yaml"
    known = sorted(file.stem for file in TASKS.glob("*.yaml"))
    if not path.is_file():
        near = difflib.get_close_matches(text, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise TaskError(f"no task {text!r}; {hint}Known: {', '.join(known)}, or the path of a .yaml file")
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("a task is a list of 'key: value' lines")
        return Task.from_dict({"name": path.stem, **values})
    except (ValueError, TypeError) as error:
        raise TaskError(f"{path}: {one_line(error)}") from error


def read_task(task: Task, manifest: str | os.PathLike[str] | None = None) -> TaskData:
    """The scans and labels of a task that is tested on a part of its own; of any, see `elsewhere.read_tasks`.

    Args:
        task: The task.
        manifest: Instead of the task's own.

    Raises:
        TaskError: There is no such column, labels are not what the kind says, all are the same, a covariate is neither
            numbers nor categories, patients are unknown, or too few; the message names the values.
        ScanError: The manifest is not one.
        BrainfmError: A patient is in two splits.
    """
    if not (manifest or task.manifest):
        raise TaskError(f"{task.name}: this task needs a manifest: --manifest {task.name}=FILE.csv")
    if task.test_manifest or task.leave_out:
        raise TaskError(
            f"{task.name}: is tested elsewhere too (test_manifest, leave_out), and one test part is asked for"
        )
    path = Path(manifest or task.manifest)
    return task_data(task, read_manifest(path), path)


def task_data(task: Task, everything: Sequence[ScanRecord], path: str | os.PathLike[str]) -> TaskData:
    """The scans of a list that have a label, and their labels; `path` is for errors, which are those of `read_task`."""
    data = labelled(task, everything, path)
    if len(set(data.labels.tolist())) == 1:
        value = data.records[0].extra[task.label]
        raise TaskError(f"{path}: every {task.label} is {value!r}; there is nothing to tell apart")
    check_parts(data, path)
    return data


def labelled(task: Task, everything: Sequence[ScanRecord], path: str | os.PathLike[str]) -> TaskData:
    """As `task_data`, of scans that need not be enough to learn from."""
    for column in (task.label, *task.covariates):
        columns = list(everything[0].extra)
        if column not in columns:
            raise TaskError(f"{path}: there is no column {column!r}; it has {', '.join(columns) or 'no labels at all'}")
    labelled = [n for n, record in enumerate(everything) if not is_missing(record.extra[task.label])]
    records = [everything[n] for n in labelled]
    unlabelled = [record for record in everything if is_missing(record.extra[task.label])]
    if not records:
        raise TaskError(f"{path}: no row has a {task.label}; it is empty in all {len(everything)}")
    texts = [record.extra[task.label] for record in records]
    labels, classes = _labels(texts, task, path)
    kept = getattr(everything, "rows", ())
    numbers = kept if len(kept) else range(2, len(everything) + 2)  # as a spreadsheet counts them
    rows = [numbers[n] for n in labelled]
    for column in task.covariates:
        try:
            values = [record.extra[column] for record in records]
            encoded(column, values, rows, categorical=column in task.categorical)
        except TaskError as error:
            raise TaskError(f"{path}: {error}") from error
    given = _given_split(records, task, path)
    left_out = tuple(LeftOut(record.name or record.patient_id, f"no {task.label}") for record in unlabelled)
    if left_out:
        logger.info("%s: %d of %d rows have no %s and are left out", path, len(left_out), len(everything), task.label)
    return TaskData(task, records, labels, classes, given, left_out)


def kind_of(texts: Sequence[str], label: str) -> Kind:
    """What a label is, where its values leave no doubt: two are binary, words are classes, many numbers a regression.

    Raises:
        TaskError: They leave doubt.
    """
    kind = plain_kind(texts)
    if kind is not None:
        return kind
    values = {text for text in texts if not is_missing(text)}
    raise TaskError(
        f"{label} has {len(values)} different values ({_few(sorted(values))}): classes or a quantity? Say --kind "
        "binary, multiclass or regression"
    )


def _labels(texts: Sequence[str], task: Task, path: str | os.PathLike[str]) -> tuple[NDArray[Any], tuple[str, ...]]:
    return (_numbers(texts, task, path), ()) if task.kind == "regression" else _classes(texts, task, path)


def _numbers(texts: Sequence[str], task: Task, path: str | os.PathLike[str]) -> NDArray[np.float64]:
    labels = numbers_of(texts)
    if wrong := [text for text, value in zip(texts, labels, strict=True) if not np.isfinite(value)]:
        raise TaskError(
            f"{path}: {task.label} must be numbers for a regression, and {len(wrong)} rows are not, such as "
            f"{_few(wrong)}; correct them, or make the task binary or multiclass"
        )
    return labels


def _classes(
    texts: Sequence[str], task: Task, path: str | os.PathLike[str]
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    found = in_order(texts)
    names = task.classes or found
    if strange := [text for text in found if text not in names]:
        raise TaskError(f"{path}: {task.label} has {_few(strange)}, and the task's classes are {', '.join(names)}")
    if task.kind == "binary" and len(names) > 2:
        raise TaskError(
            f"{path}: {task.label} has {len(names)} different values ({_few(names)}), and a binary task has two; "
            "empty the label of all other rows, or make the task multiclass or a regression"
        )
    if task.positive and task.positive not in names:
        raise TaskError(f"{path}: positive is {task.positive!r}, and {task.label} has {_few(names)}")
    if task.positive:
        names = (*(name for name in names if name != task.positive), task.positive)
    if len(names) > MOST_CLASSES:
        raise TaskError(
            f"{path}: {task.label} has {len(names)} different values ({_few(names)}): free text, or numbers? "
            "A class needs several patients; group the values, or make the task a regression"
        )
    return np.array([names.index(text) for text in texts], dtype=np.int64), names


def _given_split(records: Sequence[ScanRecord], task: Task, path: str | os.PathLike[str]) -> list[str] | None:
    if task.split not in records[0].extra:
        return None
    given = [record.extra[task.split] for record in records]
    if strange := sorted(set(given) - set(SPLITS)):
        raise TaskError(f"{path}: the column {task.split} has {_few(strange)}, and must say {', '.join(SPLITS)}")
    return given


def check_parts(data: TaskData, path: str | os.PathLike[str]) -> None:
    """That there are enough patients of every class in each part; raises what `make_split` and `check_split` say."""
    try:
        splits = data.split(0)
        check_split(data.records, splits)
    except BrainfmError as error:
        raise TaskError(f"{path}: {error}") from error
    for part in SPLITS:
        count = Counter(label for label, split in zip(data.labels.tolist(), splits, strict=True) if split == part)
        if data.task.kind != "regression" and len(count) < len(data.classes):
            lacking = next(name for n, name in enumerate(data.classes) if n not in count)
            raise TaskError(f"{path}: no scan of class {lacking!r} is in {part}; each part needs every class")


def _few(values: Sequence[str], most: int = 4) -> str:
    shown = list(dict.fromkeys(map(repr, values)))
    return ", ".join(shown[:most]) + (", …" if len(shown) > most else "")
