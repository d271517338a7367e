"""What a page shows of sites, groups and certainty: a section each, where a results folder has its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from brainfm.downstream.certainty import COVERAGE, UNLIKE
from brainfm.downstream.results import Run
from brainfm.downstream.tables import Cell, Table, by_first
from brainfm.downstream.wording import (
    NONE,
    arrow,
    decimals_of,
    mean_std,
    metric_name,
    number,
    p_value_text,
    span_text,
    summary_text,
)
from brainfm.errors import BrainfmError

_WORDS = ("task", "model", "mode", "column", "group", "metric", "lowest", "highest", "note")


class Figure(NamedTuple):
    """A picture of a section."""

    caption: str
    alt: str
    svg: bytes


class Section(NamedTuple):
    """A title, a sentence or two, tables, and pictures."""

    title: str
    text: str
    tables: list[Table]
    pictures: Sequence[Figure] = ()


RECOVERY, LONGITUDINAL, SEGMENTATION = "recovery", "longitudinal", "segmentation"  # folders in that of the results


def sections(folder: Path, run: Run) -> Iterator[Section]:
    """The sections that there are numbers for, those of other commands in the folder's own `recovery` and others."""
    for make in (_certainty, _sites, _groups):
        if section := make(folder, run):
            yield section
    for name, of in ((RECOVERY, _recovery), (LONGITUDINAL, _longitudinal), (SEGMENTATION, _segmentation)):
        if found := of(folder / name):
            yield found


def _certainty(folder: Path, run: Run) -> Section | None:
    found = _read(folder / "certainty.csv", run)
    if found is None:
        return None
    tables = []
    for title, own in found.groupby("task", sort=False):
        task = next(one for one in run.evaluation.tasks if one.title == title)
        regression = task.kind == "regression"
        levels = own["nominal"].drop_duplicates().tolist()
        decimals = decimals_of(run, task, "mae") if regression else 2
        size = f"Width at 90 %{f' ({task.unit})' if task.unit else ''}" if regression else "Classes in a set at 90 %"
        calibration = [] if regression else ["brier", "ece"]
        lines = []
        for row in run.evaluation.everything:
            mine = own[own["row"] == row.title].set_index("nominal")
            if mine.empty:
                continue
            line = [row.title]
            for level in levels:
                at = mine.loc[level].rename({"coverage": "value"})
                line.append(_interval(at, 3) if level == COVERAGE else number(at["value"], 3))
            wide, flagged = mine.loc[COVERAGE, "size"], mine["out_of_distribution"].iloc[0]
            line.append(NONE if math.isnan(wide) else number(wide, decimals))
            line += [summary_text(run.summary(task, row, name), 3, run.evaluation.seeds) for name in calibration]
            lines.append([*line, NONE if math.isnan(flagged) else f"{100 * flagged:.1f} %"])
        head = ["Row", *(f"{100 * level:g} %" for level in levels), size, *(metric_name(task, n) for n in calibration)]
        if "expected" in own:  # not in what was written before
            first = own.drop_duplicates("nominal").set_index("nominal")
            said = [mean_std(first.loc[level, "expected"], first.loc[level, "expected_sd"], 3) for level in levels]
            lines.append(["Expected", *said, *[NONE] * (len(calibration) + 2)])
        scans = int(own["val_scans"].min())
        what = f"{title}: how often intervals or sets held the truth, by {scans} validation scans or more"
        tables.append(_table(what, (*head, "Unlike training"), lines))
    text = (
        "Intervals and sets are split-conformal: as wide as the validation part's errors ask for, so that new scans "
        "like these are held as often as said; at 90 %, each test scan's are in predictions.csv. They promise nothing "
        "for another site or scanner. Coverage is of all seeds, at 90 % with its 95 % interval by bootstrap over "
        "patients, as certainty.csv has it of each; expected is its mean and standard deviation by the beta-binomial "
        "law of so many scans. "
        "Unlike training: test scans whose embedding is farther from the training part than that part's own are "
        f"{UNLIKE:g} times in 100 (Mahalanobis distance, cross-fitted): 5 % of scans that are like it."
    )
    return Section("Certainty", text, tables)


def _sites(folder: Path, run: Run) -> Section | None:
    found = _read(folder / "harmonisation.csv", run)
    if found is None:
        return None
    lines = []
    for (task, row), own in found.groupby(["task", "row"], sort=False):
        left = span_text((int(own["left_as_they_are_test"].min()), int(own["left_as_they_are_test"].max())))
        scores = [_mean_std(own[f"site_{when}"]) for when in ("before", "after")]
        sizes = span_text((int(own["sites"].min()), int(own["sites"].max())))
        lines.append([task, row, sizes, _mean_std(own["chance"]), *scores, left])
    text = (
        "How well another linear probe, fitted on the training part, tells the sites of the test part's scans: "
        "balanced accuracy, mean ± standard deviation over the seeds. After harmonisation it should be near chance; "
        "where empirical Bayes leaves some of it in features that go together, try '-noeb' after the method. "
        "What that costs is said by the paired tests of each harmonised row with the plain one."
    )
    head = ("Row", "Sites", "Chance", "As they are", "Harmonised", "Test scans left as they are")
    return Section("Sites", text, [_grouped("Sites read from the embeddings", head, lines)])


def _groups(folder: Path, run: Run) -> Section | None:
    found, worst = _read(folder / "fairness.csv", run), _read(folder / "disparities.csv", run)
    if found is None:
        return None
    tables = []
    shown = {task.title: task for task in run.evaluation.tasks}
    for (title, column, metric), own in found.groupby(["task", "column", "metric"], sort=False):
        task = shown[title]
        if metric not in (task.metric, "coverage") or own["value"].isna().all():  # such as an AUC by the label itself
            continue
        decimals = decimals_of(run, task, metric)
        names = own["group"].drop_duplicates().tolist()
        patients = own.drop_duplicates("group").set_index("group")["patients"]
        head = [name + ("" if math.isnan(patients[name]) else f" ({int(patients[name])})") for name in names]
        lines = []
        for row, mine in own.groupby("row", sort=False):
            cells = mine.set_index("group")
            lines.append([str(row), *(_interval(cells.loc[name], decimals) for name in names)])
        said = own[own["note"] != ""].drop_duplicates("group")[["group", "note"]].itertuples(index=False)
        notes = "".join(f"; {name}: {why}" for name, why in said if metric == task.metric)
        what = metric_name(task, metric) + (" of 90 % intervals or sets" if metric == "coverage" else arrow(metric))
        tables.append(_table(f"{title}: {what} by {column} (test patients){notes}", ["Row", *head], lines))
    lines = []
    for one in () if worst is None else worst.itertuples():
        task = shown[one.task]
        if one.metric in (task.metric, "coverage"):
            decimals, (first, second) = decimals_of(run, task, one.metric), (one.lowest, one.highest)
            ends = f"{number(one.ci_low, decimals)} to {number(one.ci_high, decimals)}"
            sizes = f"{first} ({one.patients_lowest:.0f}), {second} ({one.patients_highest:.0f})"
            key = [one.task, one.row, one.column, metric_name(task, one.metric), sizes]
            lines.append([*key, number(one.difference, decimals), ends, *map(p_value_text, (one.p_value, one.p_holm))])
    if lines:
        names = ["Row", "By", "Metric", "Lowest, highest (patients)", "Difference", "Interval", "p", "p (Holm)"]
        tables.append(_grouped("The largest disparity", names, lines))
    text = (
        "Means over the seeds, with 95 % intervals by bootstrap over patients. p is how often patients dealt to the "
        "groups at random have as large a difference between any two; the interval is of the two named, which are the "
        "extremes of all, and lies too far from 0 where there are many. Every other metric is in fairness.csv and "
        "disparities.csv."
    )
    return Section("Fairness", text, tables)


# --- Of commands beside the benchmark -------------------------------------------------------------


def _recovery(folder: Path) -> Section | None:
    found = _table_of(folder / "verdicts.csv")
    if found is None:
        return None
    lines = []
    for one in found.itertuples():
        sizes = [NONE if math.isnan(size) else f"{size:g}" for size in (one.seen_from, one.read_from)]
        name = f"{one.change} ({one.unit})"
        ranks = [number(one.distance_rank, 2), number(one.probe_rank, 2)]
        rising = f"{100 * one.rising:.0f} % of {one.patients:.0f}"
        lines.append([str(one.model), name, rising, ranks[0], sizes[0], ranks[1], sizes[1]])
    head = [
        "Model",
        "Change",
        "Farther at every step",
        "ρ",
        "Above the floor from",
        "ρ of a probe",
        "Differences: from",
    ]
    text = (
        "Changes of known size, planted in scans. Patients whose embedding is farther from the clean scan's at every "
        "larger size; Spearman's correlation of distance and size, the median over patients; and the smallest size "
        "from which on the median distance is above the test–retest floor, the 95th percentile of the distances "
        "between scans of one head. A probe reads the size off patients that it did not learn from; one of the "
        "differences from the clean scan has a floor of its own, what it reads off their second scans. "
        f"{NONE}: none of the sizes."
    )
    pictures = [
        Figure(
            f"{path.stem.removeprefix('recovery_')}: distance from the clean scan by size, with its middle half of "
            "patients; dashed the floor, dotted the size from which on it is passed.",
            f"Distance from the clean scan by size of the change, {path.stem}",
            path.read_bytes(),
        )
        for path in sorted(folder.glob("recovery_*.svg"))
    ]
    return Section("Planted changes", text, [_table("How small a change is seen", head, lines)], pictures)


def _longitudinal(folder: Path) -> Section | None:
    found = _table_of(folder / "reliability.csv")
    if found is None:
        return None
    columns = {
        "pairs": "Pairs", "icc_agreement": "ICC(2,1)", "icc_consistency": "ICC(3,1)", "within": "Test to retest",
        "identified": "Found again", "followed": "Followed", "change": "Change a year",
        "years_to_floor": "Years to the floor",
    }  # fmt: skip
    lines = [[str(one["model"]), *(_cell(one[name]) for name in columns)] for _, one in found.iterrows()]
    tables = [_table("Test and retest", ["Model", *columns.values()], lines)]
    text = (
        "ICC is the median over the embedding's numbers. Distances are in units of the median distance between two "
        "patients; found again are tests whose nearest retest is the same patient's; years to the floor is after how "
        "many the change is as long as the distance between test and retest."
    )
    if (scores := _table_of(folder / "scores.csv")) is not None:
        lines = [
            [one.task, one.model, one.features, one.metric, _span(one.value, one), f"{one.patients:.0f}",
             f"{one.events:.0f}" if one.events else NONE]
            for one in scores.itertuples()
        ]  # fmt: skip
        head = ["Model", "From", "Metric", "Value", "Patients", "Events"]
        tables.append(_grouped("Progression, of patients that were not learned from", head, lines))
    if (pairs := _table_of(folder / "comparisons.csv")) is not None:
        lines = [
            [one.task, one.features, one.first, one.second, _span(one.difference, one), p_value_text(one.p_holm)]
            for one in pairs.itertuples()
        ]
        head = ["From", "First", "Second", "Second's error less the first's", "p (Holm)"]
        tables.append(_grouped("Models against each other, by mixed-effects models", head, lines))
    return Section("Patients over time", text, tables)


def _segmentation(folder: Path) -> Section | None:
    found = _table_of(folder / "dice.csv")
    if found is None:
        return None
    labels = found["label"].drop_duplicates().tolist()
    lines = []
    for (model, features), own in found.groupby(["model", "features"], sort=False):
        cells = own.set_index("label")
        shown = [
            _span(cells.loc[label, "dice"], cells.loc[label]) if label in cells.index else NONE for label in labels
        ]
        lines.append([f"{model}, {features}", *shown])
    text = (
        "Dice of a linear probe on dense features, of patients that it did not learn from, with 95 % intervals by "
        "bootstrap over patients. Controls: the same network untrained, and the intensity alone."
    )
    most = int(found["patients"].max())
    return Section("Segmentation", text, [_table(f"Dice, of {most} patients", ["Features", *labels], lines)])


def _span(value: float, one: Any) -> str:
    ends = f" [{_cell(one.low)}, {_cell(one.high)}]" if math.isfinite(one.low) else ""
    return _cell(value) + ends


def _cell(value: float) -> str:
    return NONE if math.isnan(value) else f"{value:.0f}" if value == int(value) and value > 1 else number(value, 3)


def _table_of(path: Path) -> pd.DataFrame | None:
    """A table of another command; None where there is none. Raises BrainfmError where it cannot be read."""
    if not path.exists():
        return None
    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(("label", "model", "features", "task"), str))
    except (OSError, ValueError) as error:
        raise BrainfmError(f"{path}: not a table that brainfm wrote ({error}); make it anew") from error
    return None if table.empty else table


def _interval(one: pd.Series, decimals: int) -> str:
    if math.isnan(one["value"]):
        return NONE
    return f"{number(one['value'], decimals)} [{number(one['ci_low'], decimals)}, {number(one['ci_high'], decimals)}]"


def _table(title: str, head: Sequence[str], lines: list[list[str]]) -> Table:
    return Table(title, [(name, "") for name in head], [("", [[Cell(text) for text in line] for line in lines])])


def _grouped(title: str, head: Sequence[str], lines: list[list[str]]) -> Table:
    """As `_table`, but that what stands first in a line, before what the head names, is the title of its group."""
    return Table(title, [(name, "") for name in head], by_first(lines))


def _mean_std(values: pd.Series, decimals: int = 3) -> str:
    known = values.dropna()
    if known.empty:
        return NONE
    return mean_std(float(known.mean()), float(known.std()) if len(known) > 1 else math.nan, decimals)


def _read(path: Path, run: Run) -> pd.DataFrame | None:
    """A table of runs on all training labels, with tasks and rows by their titles; None where there is none."""
    if not path.exists():
        return None
    titles = {row.key: row.title for row in run.evaluation.everything}
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        numbers = [name for name in table if name not in _WORDS]
        table[numbers] = table[numbers].apply(pd.to_numeric)  # nothing is nan
        table = table[table["fraction"] == 1]
        table["row"] = (table["model"] + "/" + table["mode"]).map(titles)
        table["task"] = table["task"].map({task.name: task.title for task in run.evaluation.tasks})
    except (OSError, ValueError, KeyError) as error:
        raise BrainfmError(f"{path}: not a table of a benchmark ({error}); let the benchmark write it anew") from error
    table = table.dropna(subset=["task", "row"])
    return None if table.empty else table
