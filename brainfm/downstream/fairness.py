"""Every metric by group of people, and the largest difference between two groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainfm.columns import numbers_of
from brainfm.downstream.account import few
from brainfm.downstream.certainty import COVERAGE, held
from brainfm.downstream.covariates import MOST_LEVELS
from brainfm.downstream.grid import Job
from brainfm.downstream.statistics import Disparity, GroupMetric, holm, metric_by_group
from brainfm.downstream.task import TaskData
from brainfm.errors import TaskError
from brainfm.files import write_csv
from brainfm.tabular import is_missing

BANDS = 4  # of a measurement, each with as many patients; ours
_MOST_VALUES = 6  # of numbers that are groups as they are, such as field strengths
OTHERS = "others"


@dataclass(frozen=True, eq=False)
class Groups:
    """How a column divides the scans of a task.

    Attributes:
        column: Its name.
        names: Of the groups.
        member: [n] of each scan the number of its group; −1 is none.
        notes: By a value of the column, what became of it where it is no group of its own.
    """

    column: str
    names: tuple[str, ...]
    member: NDArray[np.intp]
    notes: Mapping[str, str]


def groups_of(data: TaskData, column: str, least: int, tested: Sequence[Sequence[int]]) -> Groups:
    """The groups of a column: its words or few numbers as they are, and many numbers in bands of as many patients.

    Args:
        data: The task.
        column: Of its table.
        least: Patients that a group has in the test part at least; those below are one group, "others", and that is
            left out where it is too small too. Scans without a value are in none.
        tested: For each seed the rows of the test part.

    Raises:
        TaskError: There is no such column, or it has too many different words.
    """
    columns = list(data.records[0].extra)
    if column not in columns:
        raise TaskError(f"{data.task.name}: --fairness {column}: there is no such column; it has {', '.join(columns)}")
    texts = ["" if is_missing(record.extra[column]) else record.extra[column] for record in data.records]
    named = _named(data, column, texts)
    patients = np.array(data.patients)

    def count(values: set[str]) -> int:
        """Patients of some values, of the seeds' test parts the fewest."""
        return min(len({patients[row] for row in rows if named[row] in values}) for rows in tested)

    values = _in_order(named)
    sizes = {value: count({value}) for value in values}
    small = {value for value, size in sizes.items() if size < least}
    names, notes = [value for value in values if value not in small], {}
    if small:
        together = count(small)
        kept = together >= least
        names += [OTHERS] * kept
        what = f"in {OTHERS}" if kept else f"left out, as all small groups together have {together}"
        notes = {value: f"{sizes[value]} patients, fewer than {least}: {what}" for value in values if value in small}
    if unknown := named.count(""):
        notes["(no value)"] = f"{unknown} scans, left out"
    place = {name: n for n, name in enumerate(names)}
    member = np.array([place.get(name, place.get(OTHERS, -1) if name in small else -1) for name in named])
    return Groups(column, tuple(names), member, notes)


def _named(data: TaskData, column: str, texts: Sequence[str]) -> list[str]:
    """The group of each scan: its value, or the band of that; "" is unknown."""
    numbers = numbers_of(texts)
    known = np.isfinite(numbers)
    if not all(ok or not text for ok, text in zip(known, texts, strict=True)):
        if len(set(texts) - {""}) > MOST_LEVELS:
            raise TaskError(
                f"{data.task.name}: --fairness {column} has {len(set(texts) - {''})} different words, such as "
                f"{few(sorted(set(texts) - {''}))}; groups are {MOST_LEVELS} at most"
            )
        return list(texts)
    if len(np.unique(numbers[known])) <= _MOST_VALUES:
        return [f"{number:g}" if ok else "" for number, ok in zip(numbers, known, strict=True)]
    first = np.unique([patient for patient, ok in zip(data.patients, known, strict=True) if ok], return_index=True)[1]
    ends = np.unique(np.quantile(numbers[known][first], np.linspace(0, 1, BANDS + 1)[1:-1]))
    band = np.searchsorted(ends, numbers, side="right")
    spans = {
        n: f"{numbers[known & (band == n)].min():.4g} to {numbers[known & (band == n)].max():.4g}"
        for n in set(band[known].tolist())
    }
    return [spans[n] if ok else "" for n, ok in zip(band.tolist(), known, strict=True)]


def _in_order(named: Sequence[str]) -> list[str]:
    """Values by number where they begin with one, else by alphabet."""
    values = sorted(set(named) - {""})
    numbers = numbers_of([value.split(" ")[0] for value in values])
    return [values[n] for n in np.argsort(numbers, kind="stable")]


def check_groups(data: TaskData, columns: Sequence[str], least: int) -> None:
    """Raise TaskError where a column is none, or divides nothing."""
    for column in columns:
        tested = [[n for n, part in enumerate(data.split(0)) if part == "test"]]
        groups = groups_of(data, column, least, tested)
        if len(groups.names) < 2:
            said = "; ".join(f"{value}: {why}" for value, why in groups.notes.items())
            raise TaskError(
                f"{data.task.name}: --fairness {column} has {len(groups.names)} groups of {least} test patients or "
                f"more, and two are to be compared ({said or 'it has one value'}); name another column, or give "
                "--least-group"
            )


@dataclass(frozen=True, eq=False)
class ByGroup:
    """A metric of a row by the groups of a column, the mean over its seeds."""

    key: tuple[str, str, str]  # task, model, mode
    groups: Groups
    metric: str
    values: list[GroupMetric]
    disparity: Disparity | None
    patients: list[int]  # of each group in any test part
    scans: list[int]


def metrics_by_group(
    results: Mapping[Job, dict[str, Any]], columns: Sequence[str], least: int, n: int
) -> Iterator[ByGroup]:
    """Every metric of every row on all training labels, and `coverage`, by the groups of each column."""
    rows: dict[tuple[str, str, str], list[tuple[Job, dict[str, Any]]]] = {}
    for job, result in results.items():
        if job.fraction == 1:
            rows.setdefault((job.data.task.name, job.row.model, job.row.mode), []).append((job, result))
    known: dict[tuple[str, str], Groups] = {}
    for key, runs in rows.items():
        data = runs[0][0].data
        for column in columns:
            if (key[0], column) not in known:
                known[key[0], column] = groups_of(data, column, least, [result["rows"] for _, result in runs])
            groups = known[key[0], column]
            tested = {row for _, result in runs for row in result["rows"]}
            of_group = [[row for row in tested if groups.member[row] == n] for n in range(len(groups.names))]
            sizes = [len({data.patients[row] for row in each}) for each in of_group]
            covered = [held(result, data.task.kind, COVERAGE) for _, result in runs]
            whole = all(one is not None for one in covered)
            for metric in (*runs[0][1]["metrics"], *(("coverage",) if whole else ())):
                cases = [
                    (
                        result["labels"],
                        np.asarray(of, dtype=np.float64) if metric == "coverage" else result["predictions"],
                        groups.member[result["rows"]],
                        result["patients"],
                    )
                    for (_, result), of in zip(runs, covered, strict=True)
                ]
                values, disparity = metric_by_group(cases, data.task.kind, metric, n=n)
                yield ByGroup(key, groups, metric, values, disparity, sizes, list(map(len, of_group)))


def write_fairness(output: Path, found: Sequence[ByGroup]) -> None:
    """`fairness.csv`, a row a group and metric, and `disparities.csv`, a row a metric; none where there is nothing."""
    for name in ("fairness.csv", "disparities.csv"):
        (output / name).unlink(missing_ok=True)
    if not found:
        return
    rows, worst, p_values = [], [], list[float | None]()
    for one in found:
        start = (*one.key, 1, one.groups.column)
        for n, (name, own) in enumerate(zip(one.groups.names, one.values, strict=True)):
            numbers = (own.value, own.ci_low, own.ci_high)
            rows.append([*start, name, one.metric, *map(_text, numbers), one.patients[n], one.scans[n], ""])
        rows += [[*start, value, one.metric, "", "", "", "", "", why] for value, why in one.groups.notes.items()]
        if gap := one.disparity:
            pair = (gap.lowest, gap.highest)
            gaps = (gap.difference, gap.ci_low, gap.ci_high, gap.p_value)
            names, sizes = ([each[n] for n in pair] for each in (one.groups.names, one.patients))
            worst.append([*start, one.metric, *names, *map(_text, gaps), *sizes])
            p_values.append(gap.p_value)
    key = ["task", "model", "mode", "fraction", "column"]
    write_csv(
        output / "fairness.csv",
        [[*key, "group", "metric", "value", "ci_low", "ci_high", "patients", "scans", "note"], *rows],
    )
    columns = ["difference", "ci_low", "ci_high", "p_value", "patients_lowest", "patients_highest", "p_holm"]
    adjusted = [[*row, "" if p is None else _text(p)] for row, p in zip(worst, holm(p_values), strict=True)]
    write_csv(output / "disparities.csv", [[*key, "metric", "lowest", "highest", *columns], *adjusted])


def _text(value: float) -> str:
    return f"{value:.9g}" if np.isfinite(value) else ""
