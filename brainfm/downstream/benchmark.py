"""A grid of evaluations: tasks × models × modes × seeds, resumable run by run, ending in tables, figures and a page."""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from brainfm.downstream.account import are_phantoms, class_patients, few, is_test_model, label_words, shares, unused
from brainfm.downstream.features import head_sizes, name_of, read_features, table_of
from brainfm.downstream.finetuning import Finetuning, Labelled, finetune, read_recipe
from brainfm.downstream.preflight import check_model, check_output, check_packages, check_splits, missing_files
from brainfm.downstream.probe import AdamProbe, fit_probe, predict_probe
from brainfm.downstream.report import write_report
from brainfm.downstream.results import Column, Evaluation, Note, PairedTest, Published, Row, Unused, read_evaluation
from brainfm.downstream.split import save_split, subsample
from brainfm.downstream.statistics import (
    AgeBiasCorrection,
    age_bias_correction,
    bootstrap_interval,
    metrics,
    paired_bootstrap_over_runs,
)
from brainfm.downstream.task import Task, TaskData
from brainfm.downstream.wording import too_small
from brainfm.errors import BrainfmError, ModelNameError, RecipeError, TaskError, WeightsNotFoundError
from brainfm.factory import create_model
from brainfm.files import held, progress_bar, write_csv, write_json
from brainfm.names import resolve
from brainfm.overlap import overlap_of_scans, pretraining_overlap
from brainfm.pretrained import PretrainedCfg
from brainfm.registry import get_pretrained_cfg
from brainfm.train.distributed import ProcessGroup, process_group
from brainfm.train.recipe import read_overrides
from brainfm.version import __version__

logger = logging.getLogger("brainfm")

Mode = Literal["probe", "probe_paper", "probe_adam", "finetune", "scratch"]
MODES: dict[str, str] = {
    "probe": "linear probe",
    "probe_paper": "linear probe as the paper's",
    "probe_adam": "linear probe as the paper's, but with BatchNorm held still",
    "finetune": "fine-tuned",
    "scratch": "from scratch",
}
_TRAINED = ("probe_paper", "finetune", "scratch")  # on scans, by `finetune`
_COVARIATES = Row("covariates", "covariates", "covariates alone, no image")
_RECIPES = {mode: mode for mode in _TRAINED} | {"probe_adam": "probe_paper"}  # by which a mode is run
_PRETRAINED_ONLY = ("trained", "drifting", "lora_rank", "layer_decay")  # settings that mean nothing from scratch
_NOT_OF = {  # settings that would make something else of a mode
    "scratch": _PRETRAINED_ONLY,
    "probe_paper": (*_PRETRAINED_ONLY, "augment", "drop_path", "trained_positions", "global_pool"),
}
_RAW = (
    "Linear probes as the paper's learn raw labels, as its released code does: the head begins near 0, and at a rate "
    "of 1e-4 its predictions are still far too small after 100 epochs where labels are large and scans few. On the "
    "same embeddings of 300 phantoms (180 for training, test_resnet_3d, five seeds) the mean error of such a probe was "
    "43.0 years of age, with standardised labels (--set target=standardised) 13.1, of the linear probe 11.2, and of a "
    "constant 17.3."
)
_RAW_PROBES = ("probe_paper", "probe_adam")
_UNSTATED = {
    "probe_paper": "how the paper probed its MAE is not stated; here as its released code probes a ResNet",
    "finetune": "how the paper fine-tuned its MAE is not stated; here as facebookresearch/mae does",
    "scratch": "by which optimiser the paper trained from scratch is not stated; here as its released code fine-tunes",
}
_AGE_BIAS = {
    "cole": "predictions are corrected for age bias by the line fitted on val (Cole et al. 2018), but in no run where "
    "they do not rise with age; it makes the errors of a weak predictor large, those of a control too.",
    "beheshti": "predictions are corrected for age bias by the true age (Beheshti et al. 2019): every number, those of "
    "the controls too, looks better than the predictor is, and none of them is an accuracy.",
}
_FREE = ("workers", "device")  # settings that change no result
_RESAMPLES = 1000
# What replacing an evaluation removes; embeddings hold for any.
_WRITTEN = (
    *("grid.json", "results.csv", "predictions.csv", "left_out.csv", "robustness.csv"),
    *("table.md", "table.tex", "index.html", "figures", "runs", "splits"),
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run.

    Attributes:
        models: Names of `create_model`, or of tables of embeddings that the tasks' data hold. One without weights is
            trained from scratch only; one with weights is probed and fine-tuned, and trained from scratch where no
            model without weights is in the list.
        modes: Of `MODES`.
        seeds: Runs of each; the paper has five.
        fractions: Of the training patients, for curves of label efficiency; those below 1 are run with one seed.
        epochs_scale: Times the paper's epochs; at least one is run.
        settings: Fields of `Finetuning` in place of those of the mode's recipe (`brainfm.downstream.recipes`).
        controls: Add the same encoders untrained, and covariates alone.
    """

    models: tuple[str, ...]
    modes: tuple[str, ...] = ("probe", "finetune", "scratch")
    seeds: int = 5
    fractions: tuple[float, ...] = (1.0,)
    epochs_scale: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    controls: bool = True

    def __post_init__(self) -> None:
        if strange := [mode for mode in self.modes if mode not in MODES]:
            raise BrainfmError(f"unknown mode {strange[0]!r}; known: {', '.join(MODES)}")
        if self.seeds < 1 or self.epochs_scale <= 0 or not all(0 < one <= 1 for one in self.fractions):
            raise BrainfmError("seeds must be 1 or more, epochs_scale above 0, and fractions above 0 and at most 1")

    def epochs(self, mode: str) -> int:
        """Epochs of a mode that has them."""
        return max(1, round(paper_epochs(mode) * self.epochs_scale))

    def of(self, mode: str) -> dict[str, Any]:
        """The settings that apply to a mode."""
        return {name: value for name, value in self.settings.items() if name not in _NOT_OF.get(mode, ())}

    def is_as_published(self, mode: str) -> bool:
        """Whether a mode is run by its recipe and nothing else."""
        return mode in _TRAINED and self.epochs_scale == 1 and not self.of(mode).keys() - set(_FREE)


def paper_epochs(mode: str) -> int:
    """Epochs of a mode's recipe."""
    epochs: int = read_recipe(_RECIPES[mode])["epochs"]
    return epochs


def read_settings(overrides: Sequence[str]) -> dict[str, Any]:
    """Fields of `Finetuning` from texts such as "lr=1e-3". Raises RecipeError for an unknown one or a wrong value."""
    values = read_overrides({}, overrides)
    for ours in ("seed", "output", "epochs"):
        if ours in values:
            raise RecipeError(f"{ours} is not set here; see --seeds, --output and --epochs-scale")
    try:
        Finetuning.from_dict(values)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    return values


@dataclass(frozen=True)
class _Job:
    """One run of the grid."""

    data: TaskData
    row: Row
    fraction: float
    seed: int

    @property
    def name(self) -> str:
        plain = "".join(letter if letter.isalnum() or letter in "_-" else "-" for letter in self.row.model)
        digest = hashlib.sha256(self.row.model.encode()).hexdigest()[:6]
        return f"{self.data.task.name}.{plain[:40]}-{digest}.{self.row.mode}.{self.fraction:g}.{self.seed}"


def benchmark(
    data: Sequence[TaskData],
    plan: Plan,
    output: str | os.PathLike[str],
    *,
    on_overlap: Literal["mark", "refuse"] = "mark",
    replace_all: bool = False,
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
            and `embeddings/`, `splits/` and `runs/` kept.
        on_overlap: What is done with a model whose pretraining data hold a task's: "mark" its cells, or "refuse".
        replace_all: Remove another evaluation that the output holds; else it is an error, but that tasks, rows, seeds
            and fractions may be added.
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
    rows, controls = [*_rows(cfgs, plan), *_table_rows(data, plan)], _controls(cfgs, plan)
    if not rows:
        raise BrainfmError(f"nothing to run: none of {', '.join(plan.models)} is run in {', '.join(plan.modes)}")
    notes = _overlaps(data, plan.models, on_overlap)
    output.mkdir(parents=True, exist_ok=True)
    with held(output), process_group(str(plan.settings.get("device", "auto"))) as everyone:
        data = [one if one.embeddings else one.without(missing_files(one)) for one in data]
        jobs = list(_jobs(data, rows, controls, plan))
        if everyone.world > 1 and any(job.row.mode not in _TRAINED for job in jobs):
            raise BrainfmError(
                "only training uses several processes: under torchrun give --modes finetune scratch --no-controls, and "
                "then the same command without torchrun and --no-controls, for the probes"
            )
        evaluation = _evaluation(data, rows, controls, notes, plan, cfgs, len(jobs))
        made_of = {one.task.name: _made_of(one) for one in data}
        digests = {job: _digest(job, made_of[job.data.task.name], plan, cfgs) for job in jobs}
        if everyone.is_first:
            check_output(output)
            _meet_earlier(output, evaluation, replace_all)
        done = everyone.gather({job.name for job in jobs if _is_done(output, job, digests[job])})[0]
        todo = [job for job in jobs if job.name not in done]
        _check_ahead(todo, plan, cfgs, everyone.world)
        if everyone.is_first:
            _say_what_is_there(output, jobs, todo)
            _keep_splits(data, plan, output)
        shown = progress and everyone.is_first
        with progress_bar(total=len(jobs), unit="run", doing="benchmark", shown=shown, done=len(done)) as bar:
            for job in todo:
                bar.set_postfix_str(f"{job.data.task.name} {job.row.title}")
                _run(job, plan, digests[job], cfgs, output, everyone)
                bar.update()
        if everyone.is_first:
            return _write_results({job: _read_result(job, output) for job in jobs}, evaluation, output)
    return output / "index.html"


# --- Before anything is run -----------------------------------------------------------------------


def _meet_earlier(output: Path, evaluation: Evaluation, replace_all: bool) -> None:
    """Refuse an output with another evaluation whose numbers would be lost, or empty it."""
    if replace_all:
        if (output / "grid.json").exists():
            logger.warning("%s: the evaluation in it is replaced, all of it", output)
        for path in (output / name for name in _WRITTEN):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if not (output / "grid.json").exists():
        return
    earlier = read_evaluation(output / "grid.json")
    names, keys = {task.name for task in evaluation.tasks}, {row.key for row in evaluation.everything}
    lost = [task.title for task in earlier.tasks if task.name not in names]
    lost += [row.title for row in earlier.everything if row.key not in keys]
    lost += [f"seeds {evaluation.seeds} to {earlier.seeds - 1}"] if earlier.seeds > evaluation.seeds else []
    lost += [f"fraction {part:g}" for part in earlier.fractions if part not in evaluation.fractions]
    if lost:
        raise BrainfmError(
            f"{output} holds another evaluation, of which {few(lost)} would be lost; name another output, or replace "
            "it all by --replace"
        )


def _check_ahead(todo: Sequence[_Job], plan: Plan, cfgs: Mapping[str, PretrainedCfg], processes: int) -> None:
    """Try what can fail in the runs that are to be done."""
    if any(job.row.mode not in _TRAINED for job in todo):
        check_packages()
    for one in {id(job.data): job.data for job in todo}.values():
        check_splits(one, plan.seeds, {job.fraction for job in todo})
    models: dict[tuple[str, bool], list[_Job]] = {}
    for job in todo:
        cfg = cfgs.get(job.row.model)
        if job.row.mode == "untrained" or (job.row.mode == "scratch" and cfg):
            models.setdefault((cfg.architecture if cfg else job.row.model, False), []).append(job)
        elif cfg:
            models.setdefault((job.row.model, True), []).append(job)
    for (name, pretrained), jobs in sorted(models.items(), key=lambda item: not item[0][1]):  # weights first
        trained = {job.row.mode: job for job in jobs if job.row.mode in _TRAINED}
        settings = [_settings(job, plan, cfgs[job.row.model], len(job.data.records), "") for job in trained.values()]
        for values in settings:
            values.shared_by(processes)
        check_model(name, list({id(job.data): job.data for job in jobs}.values()), settings, pretrained=pretrained)


def _say_what_is_there(output: Path, jobs: Sequence[_Job], todo: Sequence[_Job]) -> None:
    if len(todo) < len(jobs):
        logger.info("%s: %d of %d runs are there from before and are kept", output, len(jobs) - len(todo), len(jobs))
    if made_otherwise := [job for job in todo if _path(output, job).exists()]:
        logger.warning(
            "%s: %d runs in it were made with other scans, labels, weights or settings, and are replaced",
            output,
            len(made_otherwise),
        )
        (output / "robustness.csv").unlink(missing_ok=True)


# --- What is run ----------------------------------------------------------------------------------


def _rows(cfgs: Mapping[str, PretrainedCfg], plan: Plan) -> list[Row]:
    titles = short_names(list(cfgs))
    rows = []
    for model, cfg in cfgs.items():
        modes = _modes(cfg, cfgs, plan)
        if not cfg.has_weights and cfg.ssl_method is not None and modes != ["scratch"]:
            raise WeightsNotFoundError(
                f"no weights of {model} were published; pretrain it ('brainfm pretrain') and give local-dir:FOLDER, "
                "or leave it out"
            )
        rows += [Row(model, mode, f"{titles[model]}, {MODES[mode]}") for mode in modes]
    if cfgs and not rows:
        raise BrainfmError(f"nothing to run: none of {', '.join(cfgs)} is run in {', '.join(plan.modes)}")
    return rows


def _modes(cfg: PretrainedCfg, cfgs: Mapping[str, PretrainedCfg], plan: Plan) -> list[str]:
    """The modes that a model is run in, of those that are planned."""
    modes, baselines = list(dict.fromkeys(plan.modes)), [one for one in cfgs.values() if _is_baseline(one)]
    if _is_baseline(cfg):
        return [mode for mode in modes if mode == "scratch"]
    return [mode for mode in modes if mode != "scratch" or not baselines]


def _is_baseline(cfg: PretrainedCfg) -> bool:
    """Whether a model has no weights and was never meant to have any: it is trained from scratch."""
    return not cfg.has_weights and cfg.ssl_method is None


def _not_run(cfgs: Mapping[str, PretrainedCfg], plan: Plan) -> Iterator[str]:
    """A sentence for each model that is not run in all of the planned modes."""
    baselines = [model for model, cfg in cfgs.items() if _is_baseline(cfg)]
    for model, cfg in cfgs.items():
        left = [MODES[mode] for mode in dict.fromkeys(plan.modes) if mode not in _modes(cfg, cfgs, plan)]
        if left and model in baselines:
            yield f"{model} has no weights, and is not run as: {', '.join(left)}."
        elif left:
            yield f"{model} is not trained from scratch: {', '.join(baselines)} stands for that."


def _table_rows(data: Sequence[TaskData], plan: Plan) -> list[Row]:
    """The rows of embeddings that were made before; they are probed."""
    tables = [model for model in plan.models if any(model in one.embeddings for one in data)]
    titles = short_names(tables)
    modes = [mode for mode in dict.fromkeys(plan.modes) if mode not in _TRAINED]
    made_by = {name: f" ({model})" for one in data for name, model in one.made_by.items()}
    return [
        Row(model, mode, f"{titles[model]}{made_by.get(model, '')}, {MODES[mode]}")
        for model in tables
        for mode in modes
    ]


def _controls(cfgs: Mapping[str, PretrainedCfg], plan: Plan) -> list[Row]:
    if not plan.controls:
        return []
    probed = {cfg.architecture for cfg in cfgs.values() if cfg.has_weights}
    untrained = [Row(name, "untrained", f"{name}, untrained, linear probe") for name in sorted(probed)]
    return [*untrained, _COVARIATES]


def short_names(models: Sequence[str]) -> dict[str, str]:
    """Models by names for readers: without schemes, and of the folders the fewest that tell them apart."""
    parts = {}
    for model in models:
        _, colon, place = model.partition(":")
        folders = [part for part in Path(place if colon else model).parts if part not in ("export", ".", "/")]
        parts[model] = folders or [model]
    for length in range(1, max(map(len, parts.values()), default=0) + 1):
        names = {model: "/".join(folders[-length:]) for model, folders in parts.items()}
        if len(set(names.values())) == len(models):
            return names
    return {model: model for model in models}


def _jobs(data: Sequence[TaskData], rows: Sequence[Row], controls: Sequence[Row], plan: Plan) -> Iterator[_Job]:
    """Cheap runs first: something to look at soon."""
    order = ("covariates", "untrained", "probe", "probe_adam", "probe_paper", "finetune", "scratch")
    for row in sorted([*controls, *rows], key=lambda row: order.index(row.mode)):
        for one in data:
            if row.mode == "covariates" and not one.has_covariates:
                continue
            for fraction in sorted({1.0, *plan.fractions}, reverse=True):
                if fraction < 1 and row in controls:
                    continue
                for seed in range(plan.seeds if fraction == 1 else 1):
                    yield _Job(one, row, fraction, seed)


def _overlaps(data: Sequence[TaskData], models: Sequence[str], on_overlap: Literal["mark", "refuse"]) -> list[Note]:
    notes = []
    for one in data:
        for model in models:
            cfg = _cfg_of_table(data, model) if model in one.embeddings else model
            if cfg is None:
                continue
            found = pretraining_overlap(cfg, one.task.cohorts) + overlap_of_scans(cfg, one.records)
            if found and on_overlap == "refuse":
                raise BrainfmError(f"{model} and {one.task.name}: {found[0]}; evaluate it on other data")
            if found:
                cohorts = ", ".join(dict.fromkeys(overlap.cohort.name for overlap in found))
                notes.append(Note(one.task.name, model, f"pretrained on this task's data ({cohorts})"))
    return notes


# --- One run --------------------------------------------------------------------------------------


def _run(
    job: _Job, plan: Plan, digest: str, cfgs: Mapping[str, PretrainedCfg], output: Path, everyone: ProcessGroup
) -> None:
    path = _path(output, job)
    task, splits = job.data.task, job.data.split(job.seed)
    train = subsample(job.data.records, job.data.labels, splits, job.fraction, kind=task.kind, seed=job.seed)
    val, test = ([n for n, part in enumerate(splits) if part == name] for name in ("val", "test"))
    if job.row.mode in _TRAINED:
        work = path.with_suffix(f".{digest[:12]}")
        predict, failed = _trained(job, plan, cfgs[job.row.model], train, val, work)
    else:
        predict, failed = _probed(job, plan, train, val, output)
    correct = _correction(job.data, predict, val)
    kept, predictions = predict(test)  # everything is chosen: the one look at the test part
    if correct is not None:
        predictions = correct(predictions, job.data.labels[kept])
    if not everyone.is_first:
        return
    labels, patients = job.data.labels[kept], [job.data.patients[n] for n in kept]
    values = metrics(labels, predictions, task.kind)
    intervals = {
        name: bootstrap_interval(labels, predictions, task.kind, name, groups=patients, n=_RESAMPLES, seed=job.seed)
        for name, value in values.items()
        if np.isfinite(value)
    }
    content = {
        "digest": digest,
        "metrics": {name: [value, *intervals.get(name, (None, None))] for name, value in values.items()},
        "n_train": len(train),
        "n_test": len(kept),
        "processes": everyone.world,
        "left_out": {str(n): failed[n] for n in sorted(failed)},
        "rows": kept,
        "patients": patients,
        "labels": labels.tolist(),
        "predictions": predictions.tolist(),
    }
    write_json(path, content)
    for work in path.parent.glob(f"{job.name}.*"):  # this run's, and those of one that stopped and was made otherwise
        if work.is_dir():
            shutil.rmtree(work, ignore_errors=True)


# Rows → those whose scan can be read, and their predictions.
Predict: TypeAlias = Callable[[Sequence[int]], tuple[list[int], NDArray[np.float64]]]
_Fitted: TypeAlias = tuple[Predict, dict[int, str]]  # and by number the scans that cannot be used, which may grow


def _probed(job: _Job, plan: Plan, train: Sequence[int], val: Sequence[int], output: Path) -> _Fitted:
    """A linear model on embeddings, or on covariates; and the scans that it cannot use."""
    row, task, labels = job.row, job.data.task, job.data.labels
    features: NDArray[Any]
    failed: dict[int, str] = {}
    if row.model in job.data.embeddings:
        features = job.data.embeddings[row.model]
        failed = {int(n): "no finite embedding" for n in np.flatnonzero(~np.isfinite(features).all(axis=1))}
    elif row.mode == "covariates":
        sizes = head_sizes(job.data, output / "embeddings" / f"{task.name}.head_size.json")
        features = table_of(job.data, sizes, train)
    else:
        if row.mode == "untrained":
            torch.manual_seed(job.seed)
            model, name = create_model(row.model), f"{row.model}.untrained{job.seed}"
        else:
            model, name = create_model(row.model, pretrained=True), row.model
        device = str(plan.settings.get("device", "auto"))
        features, failed = read_features(job.data.records, model, output / "embeddings", name, device=device)
    readable = set(np.flatnonzero(np.isfinite(features).all(axis=1)).tolist())
    train, val = ([n for n in rows if n in readable] for rows in (train, val))
    if not val or len(set(labels[train].tolist())) < 2:
        raise BrainfmError(f"{task.name}: too few scans can be read{_one_of(failed)}")
    if row.mode == "probe_adam":
        values = _recipe(job, plan, None)
        fitted: Any = AdamProbe(**{one.name: values[one.name] for one in fields(AdamProbe)}).fit(
            (features[train], labels[train]),
            (features[val], labels[val]),
            task.kind,
            task.metric if task.selection == "metric" else "loss",
            seed=job.seed,
        )
    else:
        patients = [job.data.patients[n] for n in train]
        fitted = fit_probe(features[train], labels[train], task.kind, patients=patients, seed=job.seed)

    def predict(rows: Sequence[int]) -> tuple[list[int], NDArray[np.float64]]:
        kept = [n for n in rows if n in readable]
        if not kept:
            raise BrainfmError(f"{task.name}: none of {len(rows)} scans to predict can be read{_one_of(failed)}")
        return kept, predict_probe(fitted, features[kept], task.kind)

    return predict, failed


def _one_of(failed: Mapping[int, str]) -> str:
    return f"; one of {len(failed)} that cannot: {next(iter(failed.values()))}" if failed else ""


def _trained(
    job: _Job, plan: Plan, cfg: PretrainedCfg, train: Sequence[int], val: Sequence[int], work: Path
) -> _Fitted:
    """An encoder trained with a head, pretrained or from scratch; and the scans that it cannot use."""
    task, scratch, records = job.data.task, job.row.mode == "scratch", job.data.records
    torch.manual_seed(job.seed)
    encoder = create_model(cfg.architecture if scratch else job.row.model, pretrained=not scratch)
    settings = _settings(job, plan, cfg, len(train), str(work))
    learned, chosen_by = (Labelled([records[n] for n in rows], job.data.labels[list(rows)]) for rows in (train, val))
    model = finetune(encoder, learned, chosen_by, task.kind, settings)
    failed = {train[n]: reason for n, reason in model.failed.items()}

    def predict(rows: Sequence[int]) -> tuple[list[int], NDArray[np.float64]]:
        predictions, unread = model.predict([records[n] for n in rows])
        failed.update({rows[place]: reason for place, reason in unread.items()})
        return [n for place, n in enumerate(rows) if place not in unread], predictions

    predict(val)  # says which of them were not looked at
    return predict, failed


def _correction(data: TaskData, predict: Predict, val: Sequence[int]) -> AgeBiasCorrection | None:
    """The task's correction of age bias, learned on the validation part."""
    if data.task.age_bias == "keep":
        return None
    kept, predictions = predict(val)
    try:
        return age_bias_correction(data.labels[kept], predictions, rule=data.task.age_bias)
    except ValueError as error:
        logger.warning("%s: age bias is not corrected in this run: %s", data.task.name, error)
        return None


def _settings(job: _Job, plan: Plan, cfg: PretrainedCfg, scans: int, work: str) -> Finetuning:
    """The settings of a run: its recipe's, with the plan's in their place."""
    values = _recipe(job, plan, cfg)
    values["batch_size"] = min(values["batch_size"], scans)
    return Finetuning.from_dict(values | {"seed": job.seed, "output": work})


def _recipe(job: _Job, plan: Plan, cfg: PretrainedCfg | None) -> dict[str, Any]:
    """The fields of `Finetuning` that a run has, but for what is its own."""
    task, mode = job.data.task, job.row.mode
    of_mae = mode == "finetune" and cfg is not None and cfg.ssl_method == "MAE"
    recipe = read_recipe("finetune_mae" if of_mae else _RECIPES[mode])
    values = {"target": task.target, **recipe, "epochs": plan.epochs(mode)}
    values["selection"] = task.metric if task.selection == "metric" else "loss"
    if "warmup_epochs" in recipe:
        values["warmup_epochs"] = recipe["warmup_epochs"] * values["epochs"] / recipe["epochs"]
    return values | plan.of(mode)


def _made_of(data: TaskData) -> str:
    """Says which scans a task has, as they are now, with their labels, patients, split and covariates."""
    name = (lambda record: [record.name, record.scan_id]) if data.embeddings else name_of  # files are not looked at
    scans = [[name(r), r.patient_id, *(r.extra.get(one) for one in data.task.covariates)] for r in data.records]
    content = [scans, data.labels.tolist(), data.given_split]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _digest(job: _Job, made_of: str, plan: Plan, cfgs: Mapping[str, PretrainedCfg]) -> str:
    """Says what a run was made of."""
    cfg = cfgs.get(job.row.model)
    task = job.data.task.to_dict() | {"published": None, "title": None, "manifest": None}
    content: list[Any] = [task, made_of, job.row.mode, job.row.model, job.fraction, job.seed]
    content.append(None if cfg is None else [cfg.sha256, cfg.source])
    if (vectors := job.data.embeddings.get(job.row.model)) is not None:
        content.append(hashlib.sha256(np.ascontiguousarray(vectors).tobytes()).hexdigest())
    if job.row.mode in _RECIPES:
        content.append({name: value for name, value in _recipe(job, plan, cfg).items() if name not in _FREE})
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def _path(output: Path, job: _Job) -> Path:
    """Where a run's numbers are kept."""
    return output / "runs" / f"{job.name}.json"


def _is_done(output: Path, job: _Job, digest: str) -> bool:
    try:
        return bool(json.loads(_path(output, job).read_text(encoding="utf-8"))["digest"] == digest)
    except (OSError, ValueError, KeyError, TypeError):
        return False


# --- What is written ------------------------------------------------------------------------------


def _keep_splits(data: Sequence[TaskData], plan: Plan, output: Path) -> None:
    for one in data:
        for seed in range(1 if one.given_split is not None else plan.seeds):
            path = output / "splits" / f"{one.task.name}.{seed}.csv"
            if one.embeddings:  # which need not say where their scans are
                named = [
                    (r.patient_id, r.scan_id, r.name, s) for r, s in zip(one.records, one.split(seed), strict=True)
                ]
                write_csv(path, [("patient_id", "scan_id", "image_path", "split"), *named])
            else:
                save_split(path, one.records, one.split(seed))


def _read_result(job: _Job, output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(_path(output, job).read_text(encoding="utf-8"))
    return content


def _write_results(results: Mapping[_Job, dict[str, Any]], evaluation: Evaluation, output: Path) -> Path:
    """Everything but the runs themselves; gives the page."""
    _write_tables(results, output)
    columns, left_out, warnings = [], list[Unused](), list(evaluation.warnings)
    for column in evaluation.tasks:
        mine = {job: result for job, result in results.items() if job.data.task.name == column.name}
        data = next(iter(mine)).data
        failed: dict[str, dict[int, str]] = {}
        for job, result in mine.items():
            if job.row.mode != "covariates":
                failed.setdefault(job.row.key, {}).update({int(n): why for n, why in result["left_out"].items()})
        of_this = list(unused(data, failed))
        if broken := list(dict.fromkeys(one.scan for one in of_this if one.failed)):
            asked = len(data.records) + sum(one.failed for one in data.left_out)
            warnings.append(
                f"{column.title}: {len(broken)} of {asked} scans were left out by some row or all, because they are "
                f"not there or cannot be read: {few(broken)}. See 'Left out'."
            )
        counts = [_test_patients(job, result) for job, result in mine.items() if job.fraction == 1]
        small = too_small(column, [min(each) for each in zip(*counts, strict=True)])
        if small:
            warnings.append(
                f"{column.title}: {small}. Intervals, standard deviations and tests of so few mean nothing: none is "
                "bold, and no gain is claimed."
            )
        columns.append(replace(column, too_small=small))
        left_out += of_this
    for text in warnings:
        logger.warning("%s", text)
    head = ("task", "row", "scan", "why", "failed")
    rows = [(one.task, one.row, one.scan, one.why, int(one.failed)) for one in left_out]
    write_csv(output / "left_out.csv", [head, *rows])
    tests = tuple(_tests(results, evaluation))
    evaluation = replace(
        evaluation, tasks=tuple(columns), tests=tests, warnings=tuple(warnings), left_out=tuple(left_out)
    )
    write_json(output / "grid.json", evaluation.to_dict())
    return write_report(output)


def _test_patients(job: _Job, result: Mapping[str, Any]) -> list[int]:
    """Patients of each class in the test part, or all of a regression's."""
    return class_patients(job.data, result["rows"]) or [len(set(result["patients"]))]


def _write_tables(results: Mapping[_Job, dict[str, Any]], output: Path) -> None:
    scores, guesses = [], []
    for job, result in results.items():
        key = [job.data.task.name, job.row.model, job.row.mode, f"{job.fraction:g}", job.seed]
        for name, numbers in result["metrics"].items():
            sizes = (result["n_train"], result["n_test"])
            scores.append([*key, name, *map(_text, numbers), *sizes, _positive(job.data)])
        for patient, label, guess in zip(result["patients"], result["labels"], result["predictions"], strict=True):
            shown = guess[int(label)] if isinstance(guess, list) else guess
            guesses.append([*key, patient, f"{label:.9g}", f"{shown:.9g}", _positive(job.data)])
    key_names = ["task", "model", "mode", "fraction", "seed"]
    columns = [*key_names, "metric", "value", "ci_low", "ci_high", "n_train", "n_test", "positive"]
    write_csv(output / "results.csv", [columns, *scores])
    write_csv(output / "predictions.csv", [[*key_names, "patient_id", "label", "prediction", "positive"], *guesses])


def _positive(data: TaskData) -> str:
    """The word of the class that is 1 in a binary task."""
    return data.classes[1] if data.task.kind == "binary" else ""


def _tests(results: Mapping[_Job, dict[str, Any]], evaluation: Evaluation) -> Iterator[PairedTest]:
    """Each row against each control, and against each that was trained from scratch, by all seeds."""
    found: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for job, result in results.items():
        if job.fraction == 1:
            found.setdefault((job.data.task.name, job.row.key), {})[job.seed] = result
    baselines = [row for row in evaluation.rows if row.mode == "scratch"]
    for task in {job.data.task.name: job.data.task for job in results}.values():
        for one in evaluation.rows:
            for other in [*([] if one.mode == "scratch" else baselines), *evaluation.controls]:
                if (task.name, one.key) in found and (task.name, other.key) in found:
                    yield _paired(task, one, other, found[task.name, one.key], found[task.name, other.key])


def _paired(
    task: Task, one: Row, other: Row, first: Mapping[int, Mapping[str, Any]], second: Mapping[int, Mapping[str, Any]]
) -> PairedTest:
    runs = []
    for seed in sorted(first.keys() & second.keys()):
        pair = first[seed], second[seed]
        both = set(pair[0]["rows"]) & set(pair[1]["rows"])  # a scan that one could not read is left out
        places = [[n for n, row in enumerate(result["rows"]) if row in both] for result in pair]
        labels, patients = (np.array(pair[0][name])[places[0]] for name in ("labels", "patients"))
        ours, theirs = (np.array(r["predictions"])[place] for r, place in zip(pair, places, strict=True))
        runs.append((labels, ours, theirs, patients))
    found = paired_bootstrap_over_runs(runs, task.kind, task.metric, n=_RESAMPLES)
    numbers = (found.difference, found.ci_low, found.ci_high, found.p_value)
    return PairedTest(task.name, one.key, other.key, "paired bootstrap", *map(_finite, numbers))


def _evaluation(
    data: Sequence[TaskData],
    rows: Sequence[Row],
    controls: Sequence[Row],
    notes: Sequence[Note],
    plan: Plan,
    cfgs: Mapping[str, PretrainedCfg],
    runs: int,
) -> Evaluation:
    return Evaluation(
        title="Evaluation of pretrained encoders",
        tasks=tuple(
            Column(
                one.task.name,
                one.task.title,
                one.task.kind,
                one.task.metric,
                one.task.unit,
                one.task.label,
                _published(one.task, rows, cfgs, plan),
                one.task.published_source,
                () if one.has_covariates else (_COVARIATES.key,),
                one.classes,
                shares(one, plan.seeds),
            )
            for one in data
        ),
        rows=tuple(rows),
        controls=tuple(row for row in controls if row.mode != "covariates" or any(one.has_covariates for one in data)),
        seeds=plan.seeds,
        runs=runs,
        made_by=f"brainfm {__version__}, torch {torch.__version__}",
        date=datetime.date.today().isoformat(),
        command=shlex.join(["brainfm", *sys.argv[1:]]) if Path(sys.argv[0]).stem in ("brainfm", "__main__") else "",
        fractions=tuple(sorted({1.0, *plan.fractions})),
        notes=(*notes, *_unstated(data, rows, cfgs, plan)),
        statements=(*_not_run(cfgs, plan), *_statements(data, plan)),
        warnings=tuple(_warnings(data, rows, cfgs)),
    )


def _published(task: Task, rows: Sequence[Row], cfgs: Mapping[str, PretrainedCfg], plan: Plan) -> tuple[Published, ...]:
    """The published numbers of the rows' architectures, wherever their weights are from, beside the same method."""
    names = {row.key: f"{cfgs[row.model].architecture}/{row.mode}" for row in rows if row.model in cfgs}
    return tuple(
        Published(key, *task.published[name])
        for key, name in names.items()
        if name in task.published and plan.is_as_published(name.rpartition("/")[2])
    )


def _unstated(
    data: Sequence[TaskData], rows: Sequence[Row], cfgs: Mapping[str, PretrainedCfg], plan: Plan
) -> Iterator[Note]:
    """A mark on each row with a published number of which the paper does not say how it was come by."""
    for one in data:
        for row in rows:
            if not _published(one.task, [row], cfgs, plan):
                continue
            if row.mode == "scratch" or cfgs[row.model].ssl_method == "MAE":
                yield Note(one.task.name, row.model, _UNSTATED[row.mode], row.mode)


def _statements(data: Sequence[TaskData], plan: Plan) -> Iterator[str]:
    modes = [mode for mode in dict.fromkeys(plan.modes) if mode in _RECIPES]
    if plan.epochs_scale != 1:
        epochs = ", ".join(f"{plan.epochs(m)} instead of {paper_epochs(m)} ({MODES[m]})" for m in modes)
        yield f"Epochs are scaled by {plan.epochs_scale:g}: {epochs}."
    if plan.settings:
        yield "In place of the recipes' settings: " + ", ".join(f"{k}={v}" for k, v in plan.settings.items()) + "."
    otherwise = [MODES[mode] for mode in modes if mode in _TRAINED and not plan.is_as_published(mode)]
    if otherwise and any(one.task.published for one in data):
        yield f"No published number stands beside another method, so none beside: {', '.join(otherwise)}."
    for mode, what in (
        ("scratch", "What is trained from scratch is trained whole"),
        ("probe_paper", "The paper's probe is as it was"),
    ):
        if mode in modes and (left := [name for name in plan.settings if name in _NOT_OF[mode]]):
            yield f"{what}, without {', '.join(left)}."
    regressions = any(one.task.kind == "regression" for one in data)
    if regressions and any(m in _RAW_PROBES and plan.of(m).get("target") in (None, "raw") for m in modes):
        yield _RAW
    yield f"Intervals: 95 %, bootstrap over patients ({_RESAMPLES:,} resamples)."
    for one in data:
        title, patients = one.task.title, len(set(one.patients))
        drawn = "the manifest's split" if one.given_split is not None else "a split of its own for each seed"
        reasons = Counter("not there" if left.failed else left.why for left in one.left_out)
        left_out = "".join(f"; left out: {count:,} ({why})" for why, count in reasons.items())
        if one.task.age_bias != "keep":
            yield f"{title}: {_AGE_BIAS[one.task.age_bias]}"
        yield f"{title}: {len(one.records):,} scans of {patients:,} patients, {drawn}{left_out}."
        if one.classes:
            yield f"{title}: {label_words(one)}."
        yield from (f"{title}: {note}" for note in one.notes)


def _warnings(data: Sequence[TaskData], rows: Sequence[Row], cfgs: Mapping[str, PretrainedCfg]) -> Iterator[str]:
    models = dict.fromkeys(row.model for row in rows)
    if tests := [model for model in models if is_test_model(cfgs.get(model) or _cfg_of_table(data, model))]:
        yield (
            f"{', '.join(tests)}: a test model, pretrained on phantoms if at all, and no brain encoder. These numbers "
            "show that code works, and say nothing of what a pretrained encoder can do."
        )
    for one in data:
        if are_phantoms(one):
            yield f"{one.task.title}: phantoms, not people; the numbers say that code works, and nothing of patients."


def _cfg_of_table(data: Sequence[TaskData], name: str) -> PretrainedCfg | None:
    """What is known of the model that made a table of embeddings."""
    model = next((one.made_by[name] for one in data if name in one.made_by), "")
    try:
        return get_pretrained_cfg(model) if model else None
    except ModelNameError:
        return None


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _text(value: float | None) -> str:
    return "" if value is None or not np.isfinite(value) else f"{value:.9g}"
