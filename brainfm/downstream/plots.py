"""The figures of an evaluation, from plain numbers: one style, colours that colour-blind readers tell apart.

Each function returns a matplotlib Figure that belongs to no window and no global state; `save_figure` writes it as PNG
and SVG. The same numbers give the same files, byte for byte, with the same matplotlib.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from brainfm.errors import MissingExtraError
from brainfm.files import atomic_path

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter
    from sklearn.calibration import calibration_curve  # type: ignore[import-untyped, unused-ignore]
    from sklearn.metrics import roc_auc_score, roc_curve  # type: ignore[import-untyped, unused-ignore]
except ModuleNotFoundError as error:
    raise MissingExtraError(error.name or "matplotlib", "eval") from error

Vector: TypeAlias = NDArray[np.float64]

# Okabe & Ito's palette (https://jfly.uni-koeln.de/color), without its yellow, which is too light for a line on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("solid", "dashed", "dotted")
_GREYS = ("#555555", "#888888", "#AAAAAA")

_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "savefig.dpi": 160,
    "svg.fonttype": "path",
    "svg.hashsalt": "brainfm",
    "text.parse_math": False,
}
_RASTERED = 1500  # points above which a scatter is an image in the SVG, to keep it small


@dataclass(frozen=True)
class Look:
    """One row's name, and its colour, marker and line in every figure."""

    title: str
    colour: str
    marker: str
    line: str


def looks(titles: Sequence[str], controls: Sequence[str] = ()) -> list[Look]:
    """A look for each title, then for each control: those are grey and dash-dotted."""

    def look(title: str, n: int, colours: Sequence[str], lines: Sequence[str]) -> Look:
        turn, n = divmod(n, len(colours))
        return Look(title, colours[n], _MARKERS[(n + turn) % len(_MARKERS)], lines[turn % len(lines)])

    rows = [look(title, n, _COLOURS, _LINES) for n, title in enumerate(titles)]
    return rows + [look(title, n, _GREYS, ("dashdot",)) for n, title in enumerate(controls)]


@contextmanager
def _style() -> Iterator[None]:
    """The figures' style, whatever the user's own is."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


@_style()
def save_figure(figure: Figure, stem: Path) -> tuple[Path, Path]:
    """Write `stem`.png and `stem`.svg, atomically."""
    paths = (stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".svg"))
    for path, metadata in zip(paths, ({"Software": None}, {"Date": None}), strict=True):
        with atomic_path(path) as temporary:
            figure.savefig(temporary, metadata=metadata)
        figure.set_layout_engine("none")  # as laid out for the first file
    return paths


@_style()
def label_efficiency(
    curves: Sequence[tuple[Look, Vector, Vector, Vector]], ticks: Mapping[float, str], title: str, metric: str
) -> Figure:
    """Score against the fraction of training labels: the mean as a line, ± the standard deviation as a band.

    Args:
        curves: For each row its look, its fractions, and at each the mean and the standard deviation (NaN: no band).
        ticks: Fraction → what stands under the axis there, such as "20 %" and, on the next line, patients.
        title: Above the figure.
        metric: Beside the vertical axis.
    """
    figure, axes = _figure(title)
    for look, fractions, mean, std in curves:
        axes.plot(fractions, mean, color=look.colour, linestyle=look.line, marker=look.marker, ms=4, label=look.title)
        axes.fill_between(fractions, mean - std, mean + std, color=look.colour, alpha=0.15, linewidth=0)
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set(xlabel="labelled training patients", ylabel=metric)
    _legend(figure, axes)
    return figure


@_style()
def robustness(
    panels: Sequence[tuple[str, str, Sequence[tuple[Look, Vector, Vector]]]], title: str, metric: str
) -> Figure:
    """Score against the strength of each corruption, a small panel each, on one vertical axis.

    Args:
        panels: For each corruption its name, its unit, and for each row its look, the strengths and the scores.
        title: Above the figure.
        metric: Beside the vertical axes.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(7.2, 1 + 2.1 * rows), layout="constrained")
    figure.suptitle(textwrap.fill(title, 70))
    axes: Any = None
    for n, (name, unit, curves) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, n + 1, sharey=axes)
        for look, strengths, values in curves:
            line, marker = look.line, look.marker
            axes.plot(strengths, values, color=look.colour, linestyle=line, marker=marker, ms=4, label=look.title)
        axes.set_title(name.replace("_", " "), fontsize="medium")
        axes.set(xlabel=textwrap.fill(unit, 30), ylabel=metric if n % columns == 0 else "")
    _legend(figure, axes)
    return figure


@_style()
def roc(curves: Sequence[tuple[Look, Sequence[tuple[Vector, Vector]]]], title: str) -> Figure:
    """ROC curves: for each row the mean over its runs of the true positive rate at each false positive rate.

    Args:
        curves: For each row its look and its runs: labels (0 or 1, both there) and predictions, of one length.
        title: Above the figure.
    """
    figure, axes = _figure(title)
    grid = np.linspace(0, 1, 201)
    gap = 24  # points between a curve's marks, which begin elsewhere on each
    axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1)
    for n, (look, runs) in enumerate(curves):
        mean = np.mean([_roc_on(grid, labels, scores) for labels, scores in runs], axis=0)
        area = np.mean([roc_auc_score(labels, scores) for labels, scores in runs])
        marks: Any = {"marker": look.marker, "markevery": (6 + 5 * n % gap, gap), "ms": 4}
        axes.plot(grid, mean, color=look.colour, linestyle=look.line, label=f"{look.title} ({area:.3f})", **marks)
    axes.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    axes.set_aspect("equal")
    _legend(figure, axes)
    return figure


def _roc_on(grid: Vector, labels: Vector, scores: Vector) -> Vector:
    false, true, _ = roc_curve(labels, scores)
    rate: Vector = np.interp(grid, false, true)
    rate[0] = 0
    return rate


@_style()
def calibration(curves: Sequence[tuple[Look, Vector, Vector]], title: str, bins: int = 10) -> Figure:
    """Reliability: how many of those given a probability are positive, in bins of equally many patients.

    Args:
        curves: For each row its look, labels (0 or 1) and predicted probabilities, of one length.
        title: Above the figure.
        bins: At the most; equal predictions share one.
    """
    figure, axes = _figure(title)
    axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1)
    for look, labels, scores in curves:
        observed, predicted = calibration_curve(labels, scores, n_bins=bins, strategy="quantile")
        axes.plot(
            predicted, observed, color=look.colour, linestyle=look.line, marker=look.marker, ms=4, label=look.title
        )
    axes.set(xlabel="predicted probability", ylabel="observed fraction", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.set_aspect("equal")
    _legend(figure, axes)
    return figure


@_style()
def agreement(points: Sequence[tuple[Look, Vector, Vector]], title: str, label: str) -> Figure:
    """Predicted against true values, a point a patient: the first row large, the others small, all on one scale.

    Args:
        points: For each row its look, true values and predictions, of one length.
        title: Above the figure.
        label: What is predicted, with its unit.
    """
    others, columns = points[1:], 4
    lines = math.ceil(len(others) / columns)
    figure = Figure(figsize=(6.4, 4.6 + 1.8 * lines), layout="constrained")
    figure.suptitle(textwrap.fill(title, 70))
    grid = figure.add_gridspec(1 + lines, columns, height_ratios=[2.6, *[1.0] * lines])
    values = np.concatenate([array for _, true, predicted in points for array in (true, predicted)])
    margin = 0.03 * (values.max() - values.min()) or 1.0
    span = (values.min() - margin, values.max() + margin)
    large = figure.add_subplot(grid[0, :])
    _scatter(large, *points[0], span, size=14)
    large.set_title(points[0][0].title, fontsize=9)
    large.set(xlabel=f"true {label}", ylabel=f"predicted {label}")
    for n, point in enumerate(others):
        small = figure.add_subplot(grid[1 + n // columns, n % columns])
        _scatter(small, *point, span, size=6)
        small.set_title(textwrap.fill(point[0].title, 20), fontsize=7)
        small.tick_params(labelsize=6)
    return figure


def _scatter(
    axes: Axes, look: Look, true: Vector, predicted: Vector, span: tuple[float, float], *, size: float
) -> None:
    axes.plot(span, span, color="#bbbbbb", linewidth=1)
    raster = len(true) > _RASTERED
    axes.scatter(true, predicted, s=size, color=look.colour, alpha=0.6, linewidths=0, rasterized=raster)
    axes.set(xlim=span, ylim=span)
    axes.set_aspect("equal")


@_style()
def dots(
    rows: Sequence[tuple[Look, float, float, float, float | None]], controls: int, title: str, metric: str
) -> Figure:
    """Every row's score with its interval, from top to bottom; the controls stand below a line.

    Args:
        rows: For each its look, its mean, the ends of its interval (NaN: none), and the published mean where there is
            one: an open diamond.
        controls: How many of the last rows are controls.
        title: Above the figure.
        metric: Below the axis.
    """
    figure, axes = _figure(title, height=1.5 + 0.36 * len(rows))
    for y, (look, mean, low, high, published) in enumerate(rows):
        if not math.isnan(low + high):
            axes.hlines(y, low, high, color=look.colour, linewidth=2)
        axes.plot(mean, y, marker=look.marker, color=look.colour, linestyle="none", ms=6)
        if published is not None:
            axes.plot(published, y, marker="d", color="black", fillstyle="none", linestyle="none", ms=8)
    if 0 < controls < len(rows):
        axes.axhline(len(rows) - controls - 0.5, color="black", linewidth=0.8)
    if any(published is not None for *_, published in rows):
        axes.plot([], [], marker="d", color="black", fillstyle="none", linestyle="none", ms=8, label="published")
        _legend(figure, axes)
    axes.set_yticks(range(len(rows)), [textwrap.fill(look.title, 34) for look, *_ in rows])
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel=metric)
    return figure


@_style()
def costs(points: Sequence[tuple[Look, float, float, float]], title: str, metric: str) -> Figure:
    """Score against seconds a volume.

    Args:
        points: For each encoder its look, its seconds, its gigabytes (the area of its mark), and its score.
        title: Above the figure.
        metric: Beside the axis.
    """
    figure, axes = _figure(title, height=4.2 + 0.11 * len(points))
    for look, seconds, gigabytes, score in points:
        face = "none" if look.colour in _GREYS else look.colour
        name = f"{look.title} ({gigabytes:.3g} GB)"
        size = 24 + 16 * gigabytes
        axes.scatter(seconds, score, s=size, marker=look.marker, facecolors=face, edgecolors=look.colour, label=name)
    axes.set(xscale="log", xlabel="seconds a volume", ylabel=metric)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter("{x:g}")  # a logarithm's own are formulas, which are not set here
    axes.xaxis.set_minor_formatter(NullFormatter())
    _legend(figure, axes)
    for handle in figure.legends[0].legend_handles:
        handle.set_sizes([36])  # type: ignore[union-attr]
    return figure


def _figure(title: str, height: float = 4.6) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, height), layout="constrained")
    figure.suptitle(textwrap.fill(title, 70))
    return figure, figure.add_subplot()


def _legend(figure: Figure, axes: Axes) -> None:
    handles, titles = axes.get_legend_handles_labels()
    places: dict[str, Any] = {"loc": "outside lower center", "ncols": min(2, len(titles))}
    figure.legend(handles, [textwrap.fill(title, 44) for title in titles], **places)
