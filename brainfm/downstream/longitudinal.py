"""Embeddings of patients who were scanned again: how well they repeat, how fast they change, what that foretells.

Everything is of tables of embeddings and a table that says when each scan was made. Scans of a patient that lie close
in time are a test and a retest: their distance, against that between patients, is the floor above which a change means
something. The change a year is the slope of a least-squares line through a patient's embeddings. Two kinds of labels
say how a patient fared: the slope of a measure, and the time to an event (see `brainfm.downstream.progression`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from brainfm.columns import numbers_of
from brainfm.downstream import progression
from brainfm.downstream.precomputed import TableLike, read_embedded
from brainfm.downstream.progression import Comparison, Score
from brainfm.downstream.statistics import icc
from brainfm.downstream.task import TaskData
from brainfm.errors import MissingExtraError, TaskError
from brainfm.files import held, write_csv, write_text
from brainfm.manifest import ScanRecord
from brainfm.table import Embeddings

try:
    from scipy.spatial.distance import cdist, pdist
except ModuleNotFoundError as error:
    raise MissingExtraError(error.name or "scipy", "eval") from error

_Array: TypeAlias = NDArray[np.float64]

RETEST_YEARS = 0.25  # between scans that are taken for a test and a retest: little changes in three months (ours)
LEAST_PAIRS = 3


@dataclass(frozen=True)
class Reliability:
    """How alike two scans of a patient are, and how fast a patient's embedding moves. Distances are Euclidean.

    Attributes:
        model: The table of embeddings.
        patients: With a scan.
        pairs: Of a test and a retest; the next six are nan with fewer than three.
        icc_agreement: ICC(2,1), the median over the embedding's numbers.
        icc_consistency: ICC(3,1), likewise.
        icc_low, icc_high: The quartiles of ICC(2,1) over the numbers.
        within: The median distance of a pair; 1 is the median distance between two patients.
        identified: The fraction of tests whose nearest retest is the same patient's.
        followed: Patients with two times or more.
        change: The median length of the change a year, in the same unit; nan where nobody was followed.
        years_to_floor: After how many years that change is as long as `within`.
    """

    model: str
    patients: int
    pairs: int
    icc_agreement: float
    icc_consistency: float
    icc_low: float
    icc_high: float
    within: float
    identified: float
    followed: int
    change: float
    years_to_floor: float


@dataclass(frozen=True, eq=False)
class Visits:
    """Patients' scans in the order of time.

    Attributes:
        patients: Each once.
        rows: The rows of each patient's scans, first to last.
        years: [n] when each row's scan was made.
    """

    patients: list[str]
    rows: list[NDArray[np.intp]]
    years: _Array

    @property
    def first(self) -> NDArray[np.intp]:
        """The row of each patient's first scan."""
        return np.array([rows[0] for rows in self.rows])

    @property
    def followed(self) -> list[int]:
        """Patients, by number, with two times or more."""
        return [n for n, rows in enumerate(self.rows) if np.ptp(self.years[rows]) > 0]

    def retests(self, within: float) -> list[tuple[int, int, int]]:
        """Of each patient that has one, the pair of rows that is closest in time, at most so many years apart."""
        found = []
        for n, rows in enumerate(self.rows):
            gaps = np.diff(self.years[rows])
            if len(gaps) and gaps.min() <= within:
                at = int(gaps.argmin())
                found.append((n, int(rows[at]), int(rows[at + 1])))
        return found

    def slopes(self, values: _Array) -> _Array:
        """[followed, …]: the least-squares slope a year of values [n, …], of each patient that is `followed`."""
        found = []
        for n in self.followed:
            rows = self.rows[n]
            centred = self.years[rows] - self.years[rows].mean()
            found.append(np.tensordot(centred, values[rows], axes=1) / (centred**2).sum())
        return np.array(found)


def visits(data: TaskData) -> Visits:
    """The visits of patients whose label is the time of each scan, in years."""
    years = np.asarray(data.labels, dtype=np.float64)
    by_patient: dict[str, list[int]] = {}
    for row, patient in enumerate(data.patients):
        if not patient:
            raise TaskError(f"{data.records[row].name}: no patient_id; without it nobody's scans can be told together")
        by_patient.setdefault(patient, []).append(row)
    rows = [np.array(sorted(own, key=lambda row: years[row])) for own in by_patient.values()]
    return Visits(list(by_patient), rows, years)


def reliability(model: str, vectors: _Array, seen: Visits, within: float = RETEST_YEARS) -> Reliability:
    """Test–retest and change of one table, [n, d] its vectors. Raises TaskError for one patient alone."""
    if len(seen.patients) < 2:
        raise TaskError("one patient alone says nothing of patients; give two at least")
    between = float(np.median(pdist(vectors[seen.first])))
    pairs = seen.retests(within)
    agreement = consistency = np.array([math.nan])
    apart = identified = math.nan
    if len(pairs) >= LEAST_PAIRS:
        test, retest = (vectors[[pair[part] for pair in pairs]] for part in (1, 2))
        found = [icc(np.stack([test[:, d], retest[:, d]], axis=1)) for d in range(vectors.shape[1])]
        agreement, consistency = (
            np.array([getattr(one, name) for one in found]) for name in ("agreement", "consistency")
        )
        apart = float(np.median(np.linalg.norm(test - retest, axis=1))) / between
        identified = float((cdist(test, retest).argmin(axis=1) == np.arange(len(pairs))).mean())
    slopes = seen.slopes(vectors)
    change = float(np.median(np.linalg.norm(slopes, axis=1))) / between if len(slopes) else math.nan
    low, middle, high = np.nanpercentile(agreement, (25, 50, 75)) if np.isfinite(agreement).any() else [math.nan] * 3
    return Reliability(
        model=model,
        patients=len(seen.patients),
        pairs=len(pairs),
        icc_agreement=float(middle),
        icc_consistency=float(np.nanmedian(consistency)) if np.isfinite(consistency).any() else math.nan,
        icc_low=float(low),
        icc_high=float(high),
        within=apart,
        identified=identified,
        followed=len(seen.followed),
        change=change,
        years_to_floor=apart / change if change > 0 else math.nan,
    )


@dataclass(frozen=True, eq=False)
class Found:
    """What `longitudinal` found; the same is in the files of its output."""

    reliability: list[Reliability]
    scores: list[Score]
    comparisons: list[Comparison]
    notes: list[str]


def longitudinal(
    labels: Any,
    embeddings: TableLike | Mapping[str, TableLike],
    output: str | os.PathLike[str],
    *,
    time: str,
    slope: str = "",
    event: str = "",
    duration: str = "",
    covariates: Sequence[str] = (),
    retest_years: float = RETEST_YEARS,
    seed: int = 0,
) -> Found:
    """Reliability and change of embeddings, and how well they foretell a slope or an event.

    Args:
        labels: A table, a row a scan, joined as of `read_embedded`.
        embeddings: A table of `brainfm embed`, or several by name, of the same scans.
        output: A folder: `reliability.csv`, `scores.csv`, `comparisons.csv` (of several tables), a table of the change
            a year a model (`change_….csv`, a row a patient, for 'brainfm probe'), and `longitudinal.md`, the page.
        time: The column that says when a scan was made, in years from any day that is the patient's own: such as age.
        slope: A column of a measure at each scan, whose slope a year is predicted.
        event: A column of 0 and 1, whether the patient had the event; with `duration`.
        duration: A column of years from the patient's first scan to the event, or to when it was last known not to be.
        covariates: Columns that a control predicts from without an image, as they are at the first scan.
        retest_years: Scans of a patient no further apart are a test and a retest.
        seed: Of the folds.

    Raises:
        TaskError: As of `read_embedded`; a column is not there or not a number, or too few patients have it.
    """
    if bool(event) != bool(duration):
        raise TaskError("an event needs both its column of 0 and 1 (--event) and its column of years (--duration)")
    data = read_embedded(labels, embeddings, label=time, kind="regression", to_learn=False)
    data = _everywhere(data)
    seen = visits(data)
    output = Path(output)
    notes = list(data.notes)
    names = {name: data.made_by.get(name, Path(name).stem) for name in data.embeddings}
    if len(set(names.values())) < len(names):
        names = {name: name for name in names}
    vectors = {names[name]: found.astype(np.float64) for name, found in data.embeddings.items()}
    reliable = [reliability(name, found, seen, retest_years) for name, found in vectors.items()]
    known = progression.Known.of(vectors, seen, data.records, covariates)
    scores: list[Score] = []
    comparisons: list[Comparison] = []
    if slope:
        task = f"slope of {slope}"
        measured = column(data.records, slope)
        outcome = progression.predict_slope(task, known, measured, seed)
        scores, comparisons = outcome.scores, outcome.comparisons
    if event:
        happened, years = (_of_patients(data.records, seen, name) for name in (event, duration))
        scores = scores + progression.predict_event(f"time to {event}", known, happened, years, seed)
    found = Found(reliable, scores, comparisons, notes)
    with held(output):
        _write(output, found, vectors, seen)
    return found


def _everywhere(data: TaskData) -> TaskData:
    """The scans that every table has."""
    there = np.logical_and.reduce([np.isfinite(found).all(axis=1) for found in data.embeddings.values()])
    return data if there.all() else data.at(np.flatnonzero(there).tolist())


def column(records: Sequence[ScanRecord], name: str) -> _Array:
    """[n]: a column of the table as numbers, nan where it is empty. Raises TaskError."""
    if not any(name in record.extra for record in records):
        there = ", ".join(dict.fromkeys(key for record in records for key in record.extra))
        raise TaskError(f"there is no column {name!r}; there are {there}")
    texts = [record.extra.get(name, "") for record in records]
    numbers = numbers_of(texts)
    if not np.isfinite(numbers).any():
        raise TaskError(f"the column {name!r} has no number, such as {next(filter(None, texts), 'nothing at all')!r}")
    return np.asarray(numbers, dtype=np.float64)


def _of_patients(records: Sequence[ScanRecord], seen: Visits, name: str) -> _Array:
    """[patients]: a column that has one value a patient, on any of the patient's rows. Raises TaskError."""
    numbers = column(records, name)
    found = np.full(len(seen.patients), math.nan)
    for n, rows in enumerate(seen.rows):
        values = np.unique(numbers[rows][np.isfinite(numbers[rows])])
        if len(values) > 1:
            raise TaskError(f"{name} of {seen.patients[n]} is {values[0]:g} and {values[1]:g}; it is one a patient")
        if len(values):
            found[n] = values[0]
    return found


# --- What is written ------------------------------------------------------------------------------


def _write(output: Path, found: Found, vectors: Mapping[str, _Array], seen: Visits) -> None:
    for name, kind, rows in (
        ("reliability.csv", Reliability, found.reliability),
        ("scores.csv", Score, found.scores),
        ("comparisons.csv", Comparison, found.comparisons),
    ):
        if rows:
            write_csv(output / name, _table(kind, rows))
        else:
            (output / name).unlink(missing_ok=True)
    for name, table in vectors.items():
        _write_changes(
            output / f"change_{''.join(c if c.isalnum() or c in '_-.' else '-' for c in name)}.csv", table, seen
        )
    write_text(output / "longitudinal.md", _page(found))


def _write_changes(path: Path, vectors: _Array, seen: Visits) -> None:
    """The change a year of each patient that was followed, as a table of embeddings; of nobody, none is left."""
    if not seen.followed:
        path.unlink(missing_ok=True)
        return
    records = [
        ScanRecord("", patient_id=seen.patients[n], extra={"years": f"{np.ptp(seen.years[seen.rows[n]]):g}"})
        for n in seen.followed
    ]
    Embeddings(seen.slopes(vectors).astype(np.float32), records).save(path)


def _table(kind: Any, rows: Sequence[Any]) -> list[list[Any]]:
    names = [field.name for field in fields(kind)]
    return [names, *([_cell(getattr(row, name)) for name in names] for row in rows)]


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else ""
    return value


def _page(found: Found) -> str:
    """The tables as Markdown, with what their columns mean."""
    parts = ["# Longitudinal evaluation", *(f"{note[:1].upper()}{note[1:]}." for note in found.notes)]
    parts += ["## Test and retest", _markdown(Reliability, found.reliability)]
    parts += [
        "ICC(2,1) and ICC(3,1) after Shrout & Fleiss 1979, the median over the embedding's numbers. Distances are in "
        "units of the median distance between two patients; `change` is a year's, and `years_to_floor` is after how "
        "many years it is as long as the distance between test and retest."
    ]
    if found.scores:
        parts += ["## Progression", _markdown(Score, found.scores), progression.ABOUT]
    if found.comparisons:
        parts += ["## Models against each other", _markdown(Comparison, found.comparisons), progression.ABOUT_MODELS]
    return "\n\n".join(parts) + "\n"


def _markdown(kind: Any, rows: Sequence[Any]) -> str:
    head, *body = _table(kind, rows)
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
