"""Numbers in words: names of metrics, rounding, intervals, and what may be claimed of a row."""

from __future__ import annotations

import math
from collections.abc import Sequence

from brainfm.downstream.results import Column, PairedTest, Row, Run, Summary, sign
from brainfm.downstream.statistics import HIGHER_IS_BETTER

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
NONE = "–"
_MOST_NEEDED = 100_000  # patients: above, a number says no more than that

RULE = (
    "A gain is claimed only over the controls, and by one test over all seeds: a row is above its controls where the "
    "95 % interval of its difference from each of them (paired bootstrap, below) lies wholly on the better side of 0."
)
_LEAST_OF_A_CLASS, _LEAST = 10, 20  # patients in a test part; ours: below, one patient moves an AUC by 0.1 or so


def metric_name(task: Column, name: str) -> str:
    """Such as "MAE (years)"."""
    title = _TITLES.get(name, name.replace("_", " "))
    return f"{title} ({task.unit})" if task.unit and name in _IN_UNITS else title


def arrow(name: str) -> str:
    """Which way is better, where that is known."""
    return {True: " ↑", False: " ↓", None: ""}[HIGHER_IS_BETTER.get(name)]


def decimals_of(run: Run, task: Column, metric: str) -> int:
    """As in the paper: three, but two for an error in the label's unit, more where it is below 1."""
    if metric not in _IN_UNITS:
        return 3
    largest = max(
        (abs(found.mean) for row in run.evaluation.everything if (found := run.summary(task, row, metric))), default=1
    )
    return 2 if largest >= 1 or largest == 0 else 2 - math.floor(math.log10(largest))


def number(value: float, decimals: int) -> str:
    """Rounded, with a true minus sign, and no minus zero."""
    return f"{round(value, decimals) + 0.0:.{decimals}f}".replace("-", "−")


def cost_text(value: float | None) -> str:
    """Seconds or gigabytes: three digits, as measured."""
    return NONE if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def mean_std(mean: float, std: float | None, decimals: int) -> str:
    """Such as "5.90 ± 0.16"; without a standard deviation the mean alone."""
    known = std is not None and not math.isnan(std)
    return number(mean, decimals) + (f" ± {number(std, decimals)}" if known and std is not None else "")


def summary_text(summary: Summary | None, decimals: int, seeds: int) -> str:
    """As `mean_std`, with the number of seeds where it is not the planned one."""
    if summary is None:
        return NONE
    text = mean_std(summary.mean, summary.std, decimals)
    return text + (f" (n={summary.seeds})" if summary.seeds != seeds else "")


def parameters_text(sizes: Sequence[tuple[float, float]]) -> str:
    """Such as "1,234 (0.8 %)", of all there are; "513–1,026" where tasks differ, and no percentage that is unknown."""
    if not sizes:
        return NONE
    counts = span_text((round(min(trained for trained, _ in sizes)), round(max(trained for trained, _ in sizes))))
    fractions = [100 * trained / total for trained, total in sizes if total > 0]
    percent = "–".join(dict.fromkeys(f"{part:.2g}" if part < 99.5 else "100" for part in fractions))
    return f"{counts} ({percent} %)" if percent else counts


def p_value_text(value: float | None) -> str:
    """Three decimals."""
    if value is None:
        return NONE
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def needed_text(test: PairedTest) -> str:
    """Such as "310 (here 84)"."""
    needed = test.patients_needed or 0
    shown = f"{needed:,}" if needed <= _MOST_NEEDED else f"over {_MOST_NEEDED:,}"
    return f"{shown} (here {test.patients:,})" if test.patients else shown


def progress_text(run: Run) -> str:
    """How many of the planned runs are in."""
    planned = run.evaluation.runs
    if run.done >= planned:
        return "The one planned run is in." if planned == 1 else f"All {planned} runs are in."
    return f"Not finished: {run.done} of {planned} runs are in; {NONE} is a cell that has none yet."


def too_small(task: Column, patients: Sequence[int]) -> str:
    """Why a test part is too small for intervals and gains; "" where it is not.

    Args:
        task: The task.
        patients: In the test part: of each class or, of a regression, all.
    """
    least = _LEAST if task.kind == "regression" else _LEAST_OF_A_CLASS
    if min(patients) >= least:
        return ""
    if task.kind == "regression":
        return f"{min(patients)} test patients, fewer than {least}"
    name = task.classes[list(patients).index(min(patients))] if task.classes else "a class"
    return f"{min(patients)} test patients of class {name}, fewer than {least}"


def span_text(low_high: tuple[int, int]) -> str:
    """Such as "24", or "24–25" where the seeds' splits differ."""
    return "–".join(f"{count:,}" for count in dict.fromkeys(low_high))


def claims(run: Run, task: Column) -> list[str]:
    """A sentence a row: whether it is above its controls by `RULE`."""
    return [f"{row.title}: {_claim(run, task, row)}" for row in run.evaluation.rows]


def _claim(run: Run, task: Column, row: Row) -> str:
    side, decimals = sign(task.metric), decimals_of(run, task, task.metric)
    controls = [control for control in run.evaluation.controls if control.key not in task.without]
    tests = {
        test.second: test
        for test in run.evaluation.tests
        if (test.task, test.first) == (task.name, row.key) and test.test != "corrected resampled t-test"
    }
    found = run.summary(task, row)
    if found is None:
        return "no result yet."
    if not controls:
        return "no control was planned, so no gain is claimed."
    if task.too_small:
        return f"no gain is claimed of so few patients: {task.too_small}."
    if missing := [control.title for control in controls if run.summary(task, control) is None]:
        return f"no gain is claimed before all controls are in; {', '.join(missing)}: no result yet."
    if untested := [control.title for control in controls if control.key not in tests]:
        return f"no gain is claimed without a paired test against {', '.join(untested)}."

    def lead(control: Row) -> float:  # how far the whole interval is on the better side
        test = tests[control.key]
        ends = [end * side for end in (test.ci_low, test.ci_high) if end is not None]
        return min(ends) if len(ends) == 2 else -math.inf

    closest = min(controls, key=lead)
    theirs, test = run.summary(task, closest), tests[closest.key]
    assert theirs is not None
    interval = "without an interval"
    if test.ci_low is not None and test.ci_high is not None:
        interval = f"[{number(test.ci_low, decimals)}, {number(test.ci_high, decimals)}]"
    difference = NONE if test.difference is None else number(test.difference, decimals)
    return (
        f"{'above' if lead(closest) > 0 else 'not above'} its controls: {number(found.mean, decimals)}; the closest "
        f"control, {closest.title}, has {number(theirs.mean, decimals)}: difference {difference} {interval}."
    )
