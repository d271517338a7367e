"""Numbers in words: names of metrics, rounding, intervals, and what may be claimed of a row."""

from __future__ import annotations

import math

from brainfm.downstream.results import Column, Run, Summary, sign
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

RULE = (
    "A gain is claimed only over the controls: a row is above its controls where its interval (of its runs, the ends "
    "averaged over the seeds) lies wholly on the better side of the mean of every control."
)


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


def p_value_text(value: float | None) -> str:
    """Three decimals."""
    if value is None:
        return NONE
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def progress_text(run: Run) -> str:
    """How many of the planned runs are in."""
    planned = run.evaluation.runs
    if run.done >= planned:
        return f"All {planned} runs are in."
    return f"Not finished: {run.done} of {planned} runs are in; {NONE} is a cell that has none yet."


def claims(run: Run, task: Column) -> list[str]:
    """A sentence a row: whether it is above its controls by `RULE`."""
    side, decimals = sign(task.metric), decimals_of(run, task, task.metric)
    controls = [control for control in run.evaluation.controls if control.key not in task.without]
    bars = [(control.title, run.summary(task, control)) for control in controls]
    missing = [title for title, bar in bars if bar is None]
    strongest = max(((bar.mean * side, title) for title, bar in bars if bar), default=(math.nan, ""))
    sentences = []
    for row in run.evaluation.rows:
        found = run.summary(task, row)
        if found is None:
            said = "no result yet."
        elif not controls:
            said = "no control was planned, so no gain is claimed."
        elif missing:
            said = f"no gain is claimed before all controls are in; {', '.join(missing)}: no result yet."
        else:
            best, title = strongest
            above = found.low * side > best and found.high * side > best  # False without an interval
            interval = f"[{number(found.low, decimals)}, {number(found.high, decimals)}]"
            said = (
                f"{'above' if above else 'not above'} its controls: {number(found.mean, decimals)} "
                f"{'without an interval' if math.isnan(found.low + found.high) else interval}; "
                f"the best control, {title}, has {number(best * side, decimals)}."
            )
        sentences.append(f"{row.title}: {said}")
    return sentences
