"""The figures of a report, each with its caption, and the text for who does not see it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from brainfm.downstream import plots
from brainfm.downstream.results import Column, Row, Run, sign
from brainfm.downstream.wording import arrow, cost_text, decimals_of, metric_name, number
from brainfm.errors import MissingExtraError

try:
    import pandas as pd
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise MissingExtraError(error.name or "pandas", "eval") from error


class Drawing(NamedTuple):
    """A figure of a task: name of its files, caption, and the text for who does not see it."""

    task: Column
    name: str
    caption: str
    alt: str
    figure: Figure


class Picture(NamedTuple):
    """A drawing as it was written."""

    task: Column
    caption: str
    alt: str
    svg: bytes


def drawings(run: Run) -> Iterator[Drawing]:
    """Every figure there are numbers for, task by task."""
    styles = plots.looks([row.title for row in run.evaluation.rows], [row.title for row in run.evaluation.controls])
    looks = dict(zip((row.key for row in run.evaluation.everything), styles, strict=True))
    kinds: dict[str, tuple[Callable[..., Drawing | None], ...]] = {
        "binary": (_draw_dots, _draw_cost, _draw_label_efficiency, _draw_roc, _draw_calibration, _draw_robustness),
        "regression": (_draw_dots, _draw_cost, _draw_label_efficiency, _draw_agreement, _draw_robustness),
        "multiclass": (_draw_dots, _draw_cost, _draw_label_efficiency, _draw_robustness),
    }
    for task in run.evaluation.tasks:
        for draw in kinds[task.kind]:
            drawing = draw(run, task, looks)
            if drawing:
                yield drawing


_Looks = Mapping[str, plots.Look]


def _draw_dots(run: Run, task: Column, looks: _Looks) -> Drawing | None:
    published = {p.row: p.mean for p in task.published}
    found = [(row, summary) for row in run.evaluation.everything if (summary := run.summary(task, row))]
    if not found:
        return None
    rows = [(looks[row.key], s.mean, s.low, s.high, published.get(row.key)) for row, s in found]
    controls = sum(row in run.evaluation.controls for row, _ in found)
    figure = plots.dots(rows, controls, task.title, metric_name(task, task.metric) + arrow(task.metric))
    decimals = decimals_of(run, task, task.metric)
    alt = "; ".join(f"{row.title} {number(summary.mean, decimals)}" for row, summary in found)
    caption = (
        f"{task.title}: {metric_name(task, task.metric)} of every row and, below the line, of the controls. "
        "Points: mean over the seeds. Bars: the runs' intervals, ends averaged. Open diamonds: published."
    )
    return Drawing(task, f"{task.name}_scores", caption, f"{metric_name(task, task.metric)}: {alt}", figure)


def _draw_cost(run: Run, task: Column, looks: _Looks) -> Drawing | None:
    points, said = [], []
    for row in run.evaluation.everything:
        summary, one = run.summary(task, row), run.evaluation.cost(row)
        if summary and one and one.seconds and one.gigabytes:
            points.append((looks[row.key], one.seconds, one.gigabytes, summary.mean))
            cost = f"{cost_text(one.seconds)} s, {cost_text(one.gigabytes)} GB"
            said.append(f"{row.title} {number(summary.mean, decimals_of(run, task, task.metric))} ({cost})")
    if not points:
        return None
    figure = plots.costs(points, task.title, metric_name(task, task.metric) + arrow(task.metric))
    caption = (
        f"{task.title}: {metric_name(task, task.metric)} beside what a volume costs. A mark's area is the most memory "
        "that the encoder's process held; grey and hollow: encoders that were never trained, controls."
    )
    return Drawing(task, f"{task.name}_cost", caption, f"Score and cost: {'; '.join(said)}", figure)


def _draw_label_efficiency(run: Run, task: Column, looks: _Looks) -> Drawing | None:
    own = run.results[(run.results["task"] == task.name) & (run.results["metric"] == task.metric)]
    fractions = sorted(own["fraction"].unique())
    curves = []
    for row in run.evaluation.everything:
        table = own[own["row"] == row.key].pivot_table("value", "seed", "fraction").dropna()
        if len(table.columns) > 1 and len(table):
            curves.append((looks[row.key], table.columns.to_numpy(), table.mean().to_numpy(), table.std().to_numpy()))
    if not curves:
        return None
    ticks = {f: f"{100 * f:g} %\n{_patients(own[own['fraction'] == f]['n_train'])}" for f in fractions}
    figure = plots.label_efficiency(curves, ticks, task.title, metric_name(task, task.metric) + arrow(task.metric))
    alt = "; ".join(
        f"{look.title} from {mean[0]:.3g} at {100 * x[0]:g} % to {mean[-1]:.3g} at {100 * x[-1]:g} %"
        for look, x, mean, _ in curves
    )
    caption = (
        f"{task.title}: {metric_name(task, task.metric)} on the same test split, trained on a fraction of the "
        "labels (below it, patients). Line: mean over the seeds that each fraction was run with, so that the points of "
        "a curve are of the same splits (the table has more); band: ± standard deviation, of two seeds or more."
    )
    return Drawing(task, f"{task.name}_label_efficiency", caption, f"Label efficiency: {alt}", figure)


def _draw_robustness(run: Run, task: Column, looks: _Looks) -> Drawing | None:
    own = run.robustness[run.robustness["task"] == task.name]
    rows = [row for row in run.evaluation.rows if row.key in set(own["row"])]
    if not rows:
        return None
    panels = []
    for name, part in own.groupby("corruption", sort=False):
        curves = []
        for row in rows:
            curve = part[part["row"] == row.key].sort_values("strength")
            curves.append((looks[row.key], curve["strength"].to_numpy(), curve["value"].to_numpy()))
        panels.append((str(name), str(part["unit"].iloc[0]), curves))
    figure = plots.robustness(panels, task.title, metric_name(task, task.metric) + arrow(task.metric))
    caption = (
        f"{task.title}: {metric_name(task, task.metric)} of a probe fitted on clean scans, on test scans that are "
        "corrupted more and more; the first point of each curve is the clean scans. One split."
    )
    alt = f"Robustness of {', '.join(row.title for row in rows)} to {', '.join(name for name, _, _ in panels)}"
    return Drawing(task, f"{task.name}_robustness", caption, alt, figure)


def _patients(counts: pd.Series) -> str:
    low, high = int(counts.min()), int(counts.max())
    return f"{low}" if low == high else f"{low}–{high}"


def _runs(run: Run, task: Column, row: Row) -> list[tuple[plots.Vector, plots.Vector]]:
    """Labels and predictions of each seed, on all training labels."""
    own = run.predictions[(run.predictions["task"] == task.name) & (run.predictions["row"] == row.key)]
    return [(part["label"].to_numpy(float), part["prediction"].to_numpy(float)) for _, part in own.groupby("seed")]


def _draw_roc(run: Run, task: Column, looks: _Looks) -> Drawing | None:
    curves = []
    for row in run.evaluation.everything:
        runs = [pair for pair in _runs(run, task, row) if len(set(pair[0])) == 2]
        if runs:
            curves.append((looks[row.key], runs))
    if not curves:
        return None
    caption = f"{task.title}: ROC on the test split, the mean curve over the seeds, and in brackets the mean area."
    alt = "ROC curves of " + ", ".join(look.title for look, _ in curves)
    return Drawing(task, f"{task.name}_roc", caption, alt, plots.roc(curves, task.title))


def _draw_calibration(run: Run, task: Column, looks: _Looks) -> Drawing | None:
    curves = []
    for row in run.evaluation.everything:
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
    return Drawing(task, f"{task.name}_calibration", caption, alt, plots.calibration(curves, task.title))


def _draw_agreement(run: Run, task: Column, looks: _Looks) -> Drawing | None:
    def rank(row: Row) -> float:  # the best row first; the others and the controls stay in their order
        summary = run.summary(task, row)
        return -summary.mean * sign(task.metric) if summary and row in run.evaluation.rows else math.inf

    found = {row.key: runs[0] for row in run.evaluation.everything if (runs := _runs(run, task, row))}
    if not found:
        return None
    best = min((row for row in run.evaluation.everything if row.key in found), key=rank)
    keys = [best.key, *(key for key in found if key != best.key)]
    label = (task.label or task.title) + (f" ({task.unit})" if task.unit else "")
    figure = plots.agreement([(looks[key], *found[key]) for key in keys], task.title, label)
    caption = f"{task.title}: predicted against true {label} of each test patient, by one run. Large: the best row."
    return Drawing(task, f"{task.name}_agreement", caption, f"Scatter plots; the best row is {best.title}", figure)
