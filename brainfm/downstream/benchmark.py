"""A grid of evaluations: tasks × models × modes × seeds, resumable run by run, ending in tables, figures and a page."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from brainfm.downstream.account import few
from brainfm.downstream.fairness import check_groups
from brainfm.downstream.grid import Job, control_rows, list_jobs, model_rows, table_rows
from brainfm.downstream.outcome import keep_splits, write_results
from brainfm.downstream.plan import TRAINED, WITHOUT_TRAINING, Plan
from brainfm.downstream.preflight import check_model, check_packages, check_splits, missing_files
from brainfm.downstream.results import Candidate, Evaluation, Unused, read_evaluation
from brainfm.downstream.runs import (
    digest_of,
    digest_of_data,
    is_done,
    is_to_keep,
    read_result,
    result_path,
    run_job,
    settings_of,
)
from brainfm.downstream.sheet import write_sheet
from brainfm.downstream.split import subsample
from brainfm.downstream.statements import describe, find_overlaps
from brainfm.downstream.task import TaskData
from brainfm.errors import BrainfmError, TaskError
from brainfm.files import check_writable, held, progress_bar
from brainfm.names import resolve
from brainfm.pretrained import PretrainedCfg
from brainfm.train.distributed import process_group

logger = logging.getLogger("brainfm")

# What replacing an evaluation removes; embeddings hold for any.
_WRITTEN = (
    *("grid.json", "results.csv", "predictions.csv", "left_out.csv", "robustness.csv"),
    *("harmonisation.csv", "fairness.csv", "disparities.csv", "certainty.csv", "run.json"),
    *("table.md", "table.tex", "index.html", "figures", "models", "runs", "splits"),
)


def benchmark(
    data: Sequence[TaskData],
    plan: Plan,
    output: str | os.PathLike[str],
    *,
    candidates: Sequence[Candidate] = (),
    title: str = "",
    statements: Sequence[str] = (),
    left_out: Sequence[Unused] = (),
    on_overlap: Literal["mark", "refuse"] = "mark",
    replace_all: bool = False,
    command: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Path:
    """Run a grid of evaluations, or what is left of it, and write its report.

    Every run has its own file in `output/runs`, so that nothing is done twice; one that was made with other scans (by
    the paths, sizes and times of their files), labels, patients, splits, weights or settings is done again, and that is
    said. The test part of a split is looked at once a run, after everything is chosen. What can fail is tried first:
    weights, settings, splits, and whether the output can be written. Scans that are not there or cannot be read are
    left out, counted and named: on the page, in `left_out.csv`, and in `grid.json`.

    Args:
        data: The tasks' scans and labels.
        plan: What is run.
        output: Where `results.csv`, `predictions.csv`, `table.md`, `table.tex`, `index.html`, `figures/` are written,
            and `embeddings/`, `splits/`, `runs/` and, where the plan says so, `models/` kept.
        candidates: Of a comparison of encoders (`compare_encoders`), those whose embeddings the tasks' data hold, and
            those that are left out.
        title: Of the page, in place of its usual one.
        statements: Sentences for the top of the page.
        left_out: What was left out before, each with its reason, for the page and `left_out.csv`.
        on_overlap: What is done with a model whose pretraining data hold a task's: "mark" its cells, or "refuse".
        replace_all: Remove another evaluation that the output holds; else it is an error, but that tasks, rows, seeds
            and fractions may be added.
        command: What made this, for `run.json`, so that `brainfm benchmark --from` can do it again.
        progress: Show a progress bar.

    Returns:
        The page, `index.html`.

    Raises:
        WeightsNotFoundError: A model that was pretrained has no weights here.
        TaskError: A task cannot be run.
        BrainfmError: A model was pretrained on a task's data, with on_overlap="refuse"; scans cannot be read; the
            output holds another evaluation; or another command is writing it.
    """
    output = Path(output)
    names = [one.task.name for one in data]
    if twice := {name for name in names if names.count(name) > 1}:
        raise TaskError(f"the task {', '.join(twice)} is given twice")
    tables = {name for one in data for name in one.embeddings}
    cfgs = {model: resolve(model).cfg for model in plan.models if model not in tables}
    rows = [*model_rows(cfgs, plan), *table_rows(data, plan, candidates)]
    controls = control_rows(cfgs, plan, candidates)
    if not rows and not candidates:
        raise BrainfmError(f"nothing to run: none of {', '.join(plan.models)} is run in {', '.join(plan.modes)}")
    notes = find_overlaps(data, plan.models, on_overlap)
    output.mkdir(parents=True, exist_ok=True)
    with held(output), process_group(str(plan.settings.get("device", "auto"))) as everyone:
        data = [one if one.embeddings else one.without(missing_files(one)) for one in data]
        data = [as_planned(one, plan) for one in data]
        jobs = list(list_jobs(data, rows, controls, plan))
        if everyone.world > 1 and any(job.row.mode not in TRAINED for job in jobs):
            raise BrainfmError(
                "only training uses several processes: under torchrun give --modes finetune scratch --no-controls, and "
                "then the same command without torchrun and --no-controls, for the probes"
            )
        evaluation = describe(data, rows, controls, notes, plan, cfgs, len(jobs), candidates)
        evaluation = replace(
            evaluation,
            title=title or evaluation.title,
            statements=(*statements, *evaluation.statements),
            left_out=tuple(left_out),
        )
        made_of = {one.task.name: digest_of_data(one) for one in data}
        digests = {job: digest_of(job, made_of[job.data.task.name], plan, cfgs) for job in jobs}
        if everyone.is_first:
            check_writable(output)
            _meet_earlier(output, evaluation, replace_all)
        done = everyone.gather({job.name for job in jobs if is_done(output, job, plan, digests[job])})[0]
        todo = [job for job in jobs if job.name not in done]
        _check_ahead(todo, plan, cfgs, everyone.world)
        if everyone.is_first:
            _say_what_is_there(output, jobs, todo)
            keep_splits(data, plan, output)
        shown = progress and everyone.is_first
        with progress_bar(total=len(jobs), unit="run", doing="benchmark", shown=shown, done=len(done)) as bar:
            for job in todo:
                bar.set_postfix_str(f"{job.data.task.name} {job.row.title}")
                run_job(job, plan, digests[job], cfgs, output, everyone)
                bar.update()
        if everyone.is_first:
            page = write_results({job: read_result(job, output) for job in jobs}, evaluation, output, plan)
            write_sheet(output, data, plan, cfgs, made_of, command)
            return page
    return output / "index.html"


def _meet_earlier(output: Path, evaluation: Evaluation, replace_all: bool) -> None:
    """Refuse an output with another evaluation whose numbers would be lost, or empty it."""
    if replace_all:
        if (output / "grid.json").exists():
            logger.warning("%s: the evaluation in it is replaced, all of it", output)
        for path in (output / name for name in _WRITTEN):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    keys = {row.key for row in evaluation.everything}
    check_earlier(output, [task.name for task in evaluation.tasks], evaluation.seeds, evaluation.fractions, keys)


def check_earlier(
    output: Path,
    tasks: Sequence[str],
    seeds: int,
    fractions: Sequence[float] = (1.0,),
    rows: Collection[str] | None = None,
) -> None:
    """Raise BrainfmError where an evaluation in `output` has more than is planned; `rows` may not be known yet."""
    if not (output / "grid.json").exists():
        return
    earlier = read_evaluation(output / "grid.json")
    lost = [task.title for task in earlier.tasks if task.name not in tasks]
    lost += [row.title for row in earlier.everything if rows is not None and row.key not in rows]
    lost += [f"seeds {seeds} to {earlier.seeds - 1}"] if earlier.seeds > seeds else []
    lost += [f"fraction {part:g}" for part in earlier.fractions if part not in fractions]
    if lost:
        raise BrainfmError(
            f"{output} holds another evaluation, of which {few(lost)} would be lost; name another output, or replace "
            "it all by --replace"
        )


def _check_ahead(todo: Sequence[Job], plan: Plan, cfgs: Mapping[str, PretrainedCfg], processes: int) -> None:
    """Try what can fail in the runs that are to be done."""
    if plan.keep_models or any(job.row.mode not in TRAINED for job in todo):
        check_packages()
    for job in todo:
        if is_to_keep(job, plan):
            _check_can_be_kept(job)
    for one in {id(job.data): job.data for job in todo}.values():
        check_splits(one, plan.seeds, {job.fraction for job in todo})
    for job in todo:
        if job.row.harmonised:
            _check_sites(job.data, plan, job.seed, job.fraction)
    models: dict[tuple[str, bool], list[Job]] = {}
    for job in todo:
        cfg = cfgs.get(job.row.model)
        if job.row.model in job.data.embeddings:
            continue
        if job.row.mode == "untrained" or (job.row.mode == "scratch" and cfg):
            models.setdefault((job.row.model, False), []).append(job)
        elif cfg:
            models.setdefault((job.row.model, True), []).append(job)
    for (name, pretrained), jobs in sorted(models.items(), key=lambda item: not item[0][1]):  # weights first
        trained = {job.row.mode: job for job in jobs if job.row.mode in TRAINED}
        settings = [settings_of(job, plan, cfgs[job.row.model], len(job.data.records), "") for job in trained.values()]
        for values in settings:
            values.shared_by(processes)
        check_model(name, list({id(job.data): job.data for job in jobs}.values()), settings, pretrained=pretrained)


def as_planned(data: TaskData, plan: Plan) -> TaskData:
    """The data with the plan's folds. Raises TaskError where they have no such folds, groups or sites."""
    data = _in_folds(data, plan.folds)
    check_groups(data, plan.fairness, plan.least_group)
    if plan.harmonise:
        _check_sites(data, plan, seed=0)
    return data


def _in_folds(data: TaskData, folds: int) -> TaskData:
    if folds and (data.given_split is not None or data.elsewhere):
        said = "its table says the split" if data.given_split is not None else "it is tested elsewhere"
        raise TaskError(f"{data.task.name}: {said}, so there are no --folds to draw; leave them out")
    return replace(data, folds=folds) if folds else data


def _check_sites(data: TaskData, plan: Plan, seed: int, fraction: float = 1.0) -> None:
    """Raise TaskError where the embeddings of a run cannot be harmonised."""
    from brainfm.downstream.harmonisation import check_sites

    splits = data.split(seed)
    train = subsample(data.records, data.labels, splits, fraction, kind=data.task.kind, seed=seed)
    check_sites(data, plan, train, [n for n, part in enumerate(splits) if part == "test"])


def _check_can_be_kept(job: Job) -> None:
    """Raise BrainfmError where a run's model could not predict the scans of people of whom nothing else is known."""
    if job.row.model in job.data.embeddings:
        raise BrainfmError(f"{job.row.title}: a table of embeddings comes without its encoder, so no model can be kept")
    if job.row.mode in WITHOUT_TRAINING:
        raise BrainfmError(
            f"{job.row.title}: is no linear head on an encoder, so no model can be kept; leave the mode out"
        )
    if job.data.task.age_bias == "beheshti":
        raise BrainfmError(
            f"{job.data.task.name}: age bias is corrected by the true age (age_bias: beheshti), which nobody knows of "
            "new scans, so no model can be kept; use 'cole' or 'keep'"
        )


def _say_what_is_there(output: Path, jobs: Sequence[Job], todo: Sequence[Job]) -> None:
    if len(todo) < len(jobs):
        logger.info("%s: %d of %d runs are there from before and are kept", output, len(jobs) - len(todo), len(jobs))
    if made_otherwise := [job for job in todo if result_path(output, job).exists()]:
        logger.warning(
            "%s: %d runs in it were made with other scans, labels, weights or settings, and are replaced",
            output,
            len(made_otherwise),
        )
        (output / "robustness.csv").unlink(missing_ok=True)
