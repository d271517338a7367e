"""Numbers in words: names of metrics, rounding, intervals, and what may be claimed of a row."""

from __future__ import annotations

import math

from brainfm.downstream.results import Column, Run, Score, sign
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
        (abs(score.mean) for row in run.grid.everything if (score := run.score(task, row, metric))), default=1
    )
    return 2 if largest >= 1 or largest == 0 else 2 - math.floor(math.log10(largest))


def number(value: float, decimals: int) -> str:
    """Rounded, with a true minus sign, and no minus zero."""
    return f"{round(value, decimals) + 0.0:.{decimals}f}".replace("-", "−")


def mean_sd(mean: float, sd: float | None, decimals: int) -> str:
    """Such as "5.90 ± 0.16"; without a standard deviation the mean alone."""
    known = sd is not None and not math.isnan(sd)
    return number(mean, decimals) + (f" ± {number(sd, decimals)}" if known and sd is not None else "")


def score_text(score: Score | None, decimals: int, seeds: int) -> str:
    """As `mean_sd`, with the number of seeds where it is not the planned one."""
    if score is None:
        return NONE
    return mean_sd(score.mean, score.sd, decimals) + (f" (n={score.seeds})" if score.seeds != seeds else "")


def p_value_text(value: float | None) -> str:
    """Three decimals."""
    if value is None:
        return NONE
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def progress_text(run: Run) -> str:
    """How many of the planned runs are in."""
    if run.done >= run.grid.runs:
        return f"All {run.grid.runs} runs are in."
    return f"Not finished: {run.done} of {run.grid.runs} runs are in; {NONE} is a cell that has none yet."


def claims(run: Run, task: Column) -> list[str]:
    """A sentence a row: whether it is above its controls by `RULE`."""
    side, decimals = sign(task.metric), decimals_of(run, task, task.metric)
    controls = [control for control in run.grid.controls if control.key not in task.without]
    scores = [(control.title, run.score(task, control)) for control in controls]
    missing = [title for title, score in scores if score is None]
    strongest = max(((score.mean * side, title) for title, score in scores if score), default=(math.nan, ""))
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
            above = score.low * side > bar and score.high * side > bar  # False without an interval
            interval = f"[{number(score.low, decimals)}, {number(score.high, decimals)}]"
            said = (
                f"{'above' if above else 'not above'} its controls: {number(score.mean, decimals)} "
                f"{'without an interval' if math.isnan(score.low + score.high) else interval}; "
                f"the best control, {title}, has {number(bar * side, decimals)}."
            )
        sentences.append(f"{row.title}: {said}")
    return sentences
