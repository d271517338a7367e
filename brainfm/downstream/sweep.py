"""Pretraining runs that differ in some keys, by what their encoders are good for: one table, and a figure a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from brainfm.downstream import plots
from brainfm.downstream.benchmark import benchmark
from brainfm.downstream.plan import Plan
from brainfm.downstream.results import Column, Row, Run, Summary, read_run
from brainfm.downstream.task import TaskData, load_task, read_task
from brainfm.downstream.wording import arrow, metric_name
from brainfm.errors import BrainfmError
from brainfm.train.sweep import Variant, outcomes, write_rows

_NONE = Summary(float("nan"), float("nan"), 0, float("nan"), float("nan"))


def read_evaluated(text: str) -> TaskData:
    """The scans and labels of "TASK", a name or a YAML file that names its manifest, or of "TASK:MANIFEST.csv".

    Raises:
        TaskError, ScanError, BrainfmError: As `load_task` and `read_task`.
    """
    name, _, manifest = (text, "", "") if Path(text).is_file() else text.partition(":")
    task = load_task(name)
    beside = Path(name).parent / task.manifest if task.manifest else None
    return read_task(task, manifest or beside)


def evaluate_sweep(
    variants: Sequence[Variant],
    failed: Mapping[str, str],
    data: Sequence[TaskData],
    output: Path,
    *,
    seeds: int = 5,
    progress: bool = False,
) -> Path:
    """Probe every variant's encoder, and write how well it does beside what it was trained on.

    Args:
        variants: Runs of `pretrain_variants`.
        failed: What that returned; these are in the table, without scores.
        data: The tasks' scans and labels.
        output: The sweep's folder. It gets `sweep.csv`, a row a variant and a row a control, with of each task the mean
            over the seeds, their standard deviation, and the mean ends of the intervals; a figure a task,
            `sweep_TASK.png` and `.svg`; and `evaluation/`, of `benchmark`, with all else.
        seeds: Splits of each task.
        progress: Show a progress bar.

    Returns:
        The path of `sweep.csv`.

    Raises:
        BrainfmError: No variant has an encoder, or as `benchmark`.
    """
    done = [variant for variant in variants if variant.name not in failed]
    if not done:
        raise BrainfmError(f"{output}: no variant has ended, so there is nothing to evaluate")
    models = {f"local-dir:{variant.export}": variant for variant in done}
    device = done[0].recipe.device
    plan = Plan(models=tuple(models), modes=("probe",), seeds=seeds, settings={"device": device})
    benchmark(data, plan, output / "evaluation", progress=progress)
    run = read_run(output / "evaluation")
    own = {models[row.model].name: row for row in run.evaluation.rows}
    rows = [
        line | _scores(run, own[line["variant"]]) if line["variant"] in own else line
        for line in outcomes(variants, failed)
    ]
    rows += [{"variant": row.title} | _scores(run, row) for row in run.evaluation.controls]
    for task in run.evaluation.tasks:
        _draw(run, task, [(variant, own[variant.name]) for variant in done], output / f"sweep_{task.name}")
    return write_rows(rows, output)


def _scores(run: Run, row: Row) -> dict[str, Any]:
    """The columns of each task."""
    columns: dict[str, Any] = {}
    for task in run.evaluation.tasks:
        found = run.summary(task, row)
        if found is not None:
            name = f"{task.name} {task.metric}"
            columns |= {name: found.mean, f"{name} sd": found.std, f"{name} low": found.low, f"{name} high": found.high}
    return columns


def _draw(run: Run, task: Column, rows: Sequence[tuple[Variant, Row]], stem: Path) -> None:
    """The scores over the values of one key where these are numbers, else a point a variant; controls in grey."""
    controls = [(row, one) for row in run.evaluation.controls if (one := run.summary(task, row))]
    metric = metric_name(task, task.metric) + arrow(task.metric)
    key, values = _swept_number([variant for variant, _ in rows])
    titles = ["linear probe"] if key else [variant.name for variant, _ in rows]
    looks = plots.looks(titles, [row.title for row, _ in controls])
    summaries = [run.summary(task, row) or _NONE for _, row in rows]
    if key:
        order = np.argsort(values)
        x = np.array(values, float)[order]
        mean, std = (np.array([getattr(one, name) for one in summaries])[order] for name in ("mean", "std"))
        flat = [(np.full(len(x), one.mean), np.full(len(x), np.nan)) for _, one in controls]
        curves = [(look, x, *curve) for look, curve in zip(looks, [(mean, std), *flat], strict=True)]
        figure = plots.label_efficiency(curves, {one: f"{one:g}" for one in x}, task.title, metric)
        figure.axes[0].set_xlabel("fraction of the pretraining patients" if key == "patients" else key)
    else:
        found = [*summaries, *(one for _, one in controls)]
        dots = [(look, one.mean, one.low, one.high, None) for look, one in zip(looks, found, strict=True)]
        figure = plots.dots(dots, len(controls), task.title, metric)
    plots.save_figure(figure, stem)


def _swept_number(variants: Sequence[Variant]) -> tuple[str, list[float]]:
    """The one key that all variants set, to a number each, and these; "" where there is none."""
    keys = {key for variant in variants for key in variant.changes}
    values = [value for variant in variants for value in variant.changes.values()]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    one = len(keys) == 1 and len(variants) > 1 and numbers and len(set(values)) == len(values) == len(variants)
    return (keys.pop(), values) if one else ("", [])
