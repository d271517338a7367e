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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from brainfm.downstream.features import head_sizes, name_of, read_features, table_of
from brainfm.downstream.finetuning import Finetuning, Labelled, finetune
from brainfm.downstream.probe import AdamProbe, fit_probe, predict_probe
from brainfm.downstream.report import write_report
from brainfm.downstream.results import Column, Evaluation, Note, PairedTest, Published, Row
from brainfm.downstream.split import save_split, subsample
from brainfm.downstream.statistics import (
    AgeBiasCorrection,
    age_bias_correction,
    bootstrap_interval,
    delong_test,
    metrics,
    paired_bootstrap_test,
)
from brainfm.downstream.task import Task, TaskData
from brainfm.errors import BrainfmError, RecipeError, TaskError, WeightsNotFoundError
from brainfm.factory import create_model
from brainfm.files import held, progress_bar, write_csv, write_json
from brainfm.names import resolve
from brainfm.overlap import overlap_of_scans, pretraining_overlap
from brainfm.pretrained import PretrainedCfg
from brainfm.scan.load import image_of
from brainfm.train.distributed import ProcessGroup, process_group
from brainfm.train.recipe import read_overrides
from brainfm.version import __version__

logger = logging.getLogger("brainfm")

Mode = Literal["probe", "probe_adam", "finetune", "scratch"]
MODES: dict[str, str] = {
    "probe": "linear probe",
    "probe_adam": "linear probe (Adam)",
    "finetune": "fine-tuned",
    "scratch": "from scratch",
}
_TRAINED = ("finetune", "scratch")
_COVARIATES = Row("covariates", "covariates", "covariates alone, no image")
EPOCHS = {"probe_adam": 100, "finetune": 100, "scratch": 300}  # paper
_PRETRAINED_ONLY = ("trained", "drifting", "lora_rank", "layer_decay")  # settings that mean nothing from scratch
_AGE_BIAS = {
    "cole": "predictions are corrected for age bias by the line fitted on val (Cole et al. 2018), but in no run where "
    "they do not rise with age; it makes the errors of a weak predictor large, those of a control too.",
    "beheshti": "predictions are corrected for age bias by the true age (Beheshti et al. 2019): every number, those of "
    "the controls too, looks better than the predictor is, and none of them is an accuracy.",
}
_FREE = ("workers", "device")  # settings that change no result
_RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run.

    Attributes:
        models: Names of `create_model`. One without weights is trained from scratch only; one with weights is probed
            and fine-tuned, and trained from scratch where no model without weights is in the list.
        modes: Of `MODES`.
        seeds: Runs of each; the paper has five.
        fractions: Of the training patients, for curves of label efficiency; those below 1 are run with one seed.
        epochs_scale: Times the paper's epochs; at least one is run.
        settings: Fields of `Finetuning` in place of the paper's.
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
        return max(1, round(EPOCHS[mode] * self.epochs_scale))


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
    progress: bool = False,
) -> Path:
    """Run a grid of evaluations, or what is left of it, and write its report.

    Every run has its own file in `output/runs`, so that nothing is done twice; one that was made with other scans (by
    the paths, sizes and times of their files), labels, patients, splits, weights or settings is done again. The test
    part of a split is looked at once a run, after everything is chosen.

    Args:
        data: The tasks' scans and labels.
        plan: What is run.
        output: Where `results.csv`, `predictions.csv`, `table.md`, `table.tex`, `index.html`, `figures/` are written,
            and `embeddings/`, `splits/` and `runs/` kept.
        on_overlap: What is done with a model whose pretraining data hold a task's: "mark" its cells, or "refuse".
        progress: Show a progress bar.

    Returns:
        The page, `index.html`.

    Raises:
        WeightsNotFoundError: A model that was pretrained has no weights here.
        TaskError: A task cannot be run.
        BrainfmError: A model was pretrained on a task's data, with on_overlap="refuse"; scans cannot be read; or
            another command is writing the output.
    """
    output = Path(output)
    names = [one.task.name for one in data]
    if twice := {name for name in names if names.count(name) > 1}:
        raise TaskError(f"the task {', '.join(twice)} is given twice")
    cfgs = {model: resolve(model).cfg for model in plan.models}
    rows, controls = _rows(cfgs, plan), _controls(cfgs, plan)
    notes = _overlaps(data, plan.models, on_overlap)
    jobs = list(_jobs(data, rows, controls, plan))
    evaluation = _evaluation(data, rows, controls, notes, plan, cfgs, len(jobs))
    made_of = {one.task.name: _made_of(one) for one in data}
    output.mkdir(parents=True, exist_ok=True)
    with held(output), process_group(str(plan.settings.get("device", "auto"))) as everyone:
        if everyone.world > 1 and any(job.row.mode not in _TRAINED for job in jobs):
            raise BrainfmError(
                "only training uses several processes: under torchrun give --modes finetune scratch --no-controls, and "
                "then the same command without torchrun and --no-controls, for the probes"
            )
        if everyone.is_first:
            _keep_splits(data, plan, output)
        shown = progress and everyone.is_first
        with progress_bar(total=len(jobs), unit="run", doing="benchmark", shown=shown) as bar:
            for job in jobs:
                bar.set_postfix_str(f"{job.data.task.name} {job.row.title}")
                _run(job, plan, _digest(job, made_of[job.data.task.name], plan, cfgs), cfgs, output, everyone)
                bar.update()
        if everyone.is_first:
            results = {job: _read_result(job, output) for job in jobs}
            _write_tables(results, output)
            evaluation = replace(evaluation, tests=tuple(_tests(results, rows, controls)))
            write_json(output / "grid.json", evaluation.to_dict())
            return write_report(output)
    return output / "index.html"


# --- What is run ----------------------------------------------------------------------------------


def _rows(cfgs: Mapping[str, PretrainedCfg], plan: Plan) -> list[Row]:
    baselines = [model for model, cfg in cfgs.items() if not cfg.has_weights and cfg.ssl_method is None]
    rows = []
    for model, cfg in cfgs.items():
        modes = [mode for mode in dict.fromkeys(plan.modes) if mode != "scratch" or model in baselines or not baselines]
        if model in baselines:
            modes = [mode for mode in modes if mode == "scratch"]
        elif not cfg.has_weights and modes != ["scratch"]:
            raise WeightsNotFoundError(
                f"no weights of {model} were published; pretrain it ('brainfm pretrain') and give local-dir:FOLDER, "
                "or leave it out"
            )
        rows += [Row(model, mode, f"{_short(model)}, {MODES[mode]}") for mode in modes]
    if not rows:
        raise BrainfmError(f"nothing to run: none of {', '.join(cfgs)} is run in {', '.join(plan.modes)}")
    return rows


def _controls(cfgs: Mapping[str, PretrainedCfg], plan: Plan) -> list[Row]:
    if not plan.controls:
        return []
    probed = {cfg.architecture for cfg in cfgs.values() if cfg.has_weights}
    untrained = [Row(name, "untrained", f"{name}, untrained, linear probe") for name in sorted(probed)]
    return [*untrained, _COVARIATES]


def _short(model: str) -> str:
    """A model's name without its scheme and folders."""
    _, colon, place = model.partition(":")
    parts = Path(place).parts if colon else ()
    useful = [part for part in parts if part not in ("export", ".", "/")]
    return useful[-1] if useful else model


def _jobs(data: Sequence[TaskData], rows: Sequence[Row], controls: Sequence[Row], plan: Plan) -> Iterator[_Job]:
    """Cheap runs first: something to look at soon."""
    order = {"covariates": 0, "untrained": 1, "probe": 2, "probe_adam": 3, "finetune": 4, "scratch": 5}
    for row in sorted([*controls, *rows], key=lambda row: order[row.mode]):
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
            found = pretraining_overlap(model, one.task.cohorts) + overlap_of_scans(model, one.records)
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
    path = output / "runs" / f"{job.name}.json"
    if everyone.gather(_is_done(path, digest))[0]:
        return
    task, splits = job.data.task, job.data.split(job.seed)
    train = subsample(job.data.records, job.data.labels, splits, job.fraction, kind=task.kind, seed=job.seed)
    val, test = ([n for n, part in enumerate(splits) if part == name] for name in ("val", "test"))
    if job.row.mode in _TRAINED:
        predict = _trained(job, plan, cfgs[job.row.model], train, val, path.with_suffix(f".{digest[:12]}"))
    else:
        predict = _probed(job, plan, train, val, output)
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


def _probed(job: _Job, plan: Plan, train: Sequence[int], val: Sequence[int], output: Path) -> Predict:
    """A linear model on embeddings, or on covariates."""
    row, task, labels = job.row, job.data.task, job.data.labels
    features: NDArray[Any]
    if row.mode == "covariates":
        sizes = head_sizes(job.data, output / "embeddings" / f"{task.name}.head_size.json")
        features = table_of(job.data, sizes, train)
    else:
        if row.mode == "untrained":
            torch.manual_seed(job.seed)
            model, name = create_model(row.model), f"{row.model}.untrained{job.seed}"
        else:
            model, name = create_model(row.model, pretrained=True), row.model
        device = str(plan.settings.get("device", "auto"))
        features = read_features(job.data.records, model, output / "embeddings", name, device=device)
    readable = set(np.flatnonzero(np.isfinite(features).all(axis=1)).tolist())
    train, val = ([n for n in rows if n in readable] for rows in (train, val))
    if not val or len(set(labels[train].tolist())) < 2:
        raise BrainfmError(f"{task.name}: too few scans can be read; see the warnings above")
    if row.mode == "probe_adam":
        fitted: Any = AdamProbe(plan.epochs("probe_adam"), **_only(plan.settings, ("lr", "batch_size"))).fit(
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
            raise BrainfmError(f"{task.name}: none of {len(rows)} scans to predict can be read; see the warnings above")
        return kept, predict_probe(fitted, features[kept], task.kind)

    return predict


def _trained(
    job: _Job, plan: Plan, cfg: PretrainedCfg, train: Sequence[int], val: Sequence[int], work: Path
) -> Predict:
    """An encoder trained with a head, pretrained or from scratch."""
    task, scratch, records = job.data.task, job.row.mode == "scratch", job.data.records
    torch.manual_seed(job.seed)
    encoder = create_model(cfg.architecture if scratch else job.row.model, pretrained=not scratch)
    settings = _settings(job, plan, cfg, len(train), str(work))
    learned, chosen_by = (Labelled([records[n] for n in rows], job.data.labels[list(rows)]) for rows in (train, val))
    model = finetune(encoder, learned, chosen_by, task.kind, settings)

    def predict(rows: Sequence[int]) -> tuple[list[int], NDArray[np.float64]]:
        predictions, failed = model.predict([records[n] for n in rows])
        return [n for place, n in enumerate(rows) if place not in failed], predictions

    return predict


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
    """The paper's settings for a mode, with the plan's in their place."""
    task, scratch = job.data.task, job.row.mode == "scratch"
    values: dict[str, Any] = {
        "epochs": plan.epochs(job.row.mode),
        "augment": scratch or cfg.ssl_method == "MAE",  # paper: no augmentation for SimCLR
        "global_pool": "avg",  # of a ResNet the only one; of a ViT the MAE authors' choice for fine-tuning
        "selection": task.metric if task.selection == "metric" else "loss",
    } | {name: value for name, value in plan.settings.items() if not (scratch and name in _PRETRAINED_ONLY)}
    values["batch_size"] = min(values.get("batch_size", Finetuning.batch_size), scans)
    return Finetuning(**values, seed=job.seed, output=work)


def _made_of(data: TaskData) -> str:
    """Says which scans a task has, as they are now, with their labels, patients, split and covariates."""
    scans = [[name_of(r), r.patient_id, *(r.extra.get(name) for name in data.task.covariates)] for r in data.records]
    content = [scans, data.labels.tolist(), data.given_split]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _digest(job: _Job, made_of: str, plan: Plan, cfgs: Mapping[str, PretrainedCfg]) -> str:
    """Says what a run was made of."""
    cfg = cfgs.get(job.row.model)
    task = job.data.task.to_dict() | {"published": None, "title": None, "manifest": None}
    content: list[Any] = [task, made_of, job.row.mode, job.row.model, job.fraction, job.seed]
    content.append(None if cfg is None else [cfg.sha256, cfg.source])
    if job.row.mode in EPOCHS:
        settings = {name: value for name, value in plan.settings.items() if name not in _FREE}
        content += [plan.epochs(job.row.mode), settings]
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def _is_done(path: Path, digest: str) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if found != digest:
        logger.info("%s: made with other data or settings; done again", path)
    return bool(found == digest)


def _only(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


# --- What is written ------------------------------------------------------------------------------


def _keep_splits(data: Sequence[TaskData], plan: Plan, output: Path) -> None:
    for one in data:
        for seed in range(1 if one.given_split is not None else plan.seeds):
            save_split(output / "splits" / f"{one.task.name}.{seed}.csv", one.records, one.split(seed))


def _read_result(job: _Job, output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / "runs" / f"{job.name}.json").read_text(encoding="utf-8"))
    return content


def _write_tables(results: Mapping[_Job, dict[str, Any]], output: Path) -> None:
    scores, guesses = [], []
    for job, result in results.items():
        key = [job.data.task.name, job.row.model, job.row.mode, f"{job.fraction:g}", job.seed]
        for name, numbers in result["metrics"].items():
            scores.append([*key, name, *map(_text, numbers), result["n_train"], result["n_test"]])
        for patient, label, guess in zip(result["patients"], result["labels"], result["predictions"], strict=True):
            shown = guess[int(label)] if isinstance(guess, list) else guess
            guesses.append([*key, patient, f"{label:.9g}", f"{shown:.9g}"])
    key_names = ["task", "model", "mode", "fraction", "seed"]
    columns = [*key_names, "metric", "value", "ci_low", "ci_high", "n_train", "n_test"]
    write_csv(output / "results.csv", [columns, *scores])
    write_csv(output / "predictions.csv", [[*key_names, "patient_id", "label", "prediction"], *guesses])


def _tests(
    results: Mapping[_Job, dict[str, Any]], rows: Sequence[Row], controls: Sequence[Row]
) -> Iterator[PairedTest]:
    """Each row that was pretrained against each baseline and control, on the same patients, of seed 0."""
    found = {(c.data.task.name, c.row.key): (c, r) for c, r in results.items() if c.fraction == 1 and c.seed == 0}
    tasks = {job.data.task.name: job.data.task for job in results}
    firsts = [row for row in rows if row.mode != "scratch"]
    seconds = [row for row in rows if row.mode == "scratch"] + list(controls)
    for task in tasks.values():
        for one in firsts:
            for other in seconds:
                if (task.name, one.key) in found and (task.name, other.key) in found:
                    yield _paired(task, one, other, found[task.name, one.key][1], found[task.name, other.key][1])


def _paired(task: Task, one: Row, other: Row, first: Mapping[str, Any], second: Mapping[str, Any]) -> PairedTest:
    both = set(first["rows"]) & set(second["rows"])  # a scan that one could not read is left out
    places = [[n for n, row in enumerate(r["rows"]) if row in both] for r in (first, second)]
    labels, patients = (np.array(first[name])[places[0]] for name in ("labels", "patients"))
    ours, theirs = (np.array(r["predictions"])[place] for r, place in zip((first, second), places, strict=True))
    independent = len(set(patients.tolist())) == len(patients)  # DeLong's cases must be
    if task.kind == "binary" and task.metric == "auc" and independent:
        areas = delong_test(labels, ours, theirs)
        numbers = (areas.difference, areas.ci_low, areas.ci_high, areas.p_value)
        return PairedTest(task.name, one.key, other.key, "DeLong", *map(_finite, numbers))
    pair = paired_bootstrap_test(labels, ours, theirs, task.kind, task.metric, groups=patients, n=_RESAMPLES)
    numbers = (pair.difference, pair.ci_low, pair.ci_high, pair.p_value)
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
                _published(one.task, rows, cfgs),
                one.task.published_source,
                () if one.has_covariates else (_COVARIATES.key,),
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
        notes=tuple(notes),
        statements=tuple(_statements(data, plan)),
    )


def _published(task: Task, rows: Sequence[Row], cfgs: Mapping[str, PretrainedCfg]) -> tuple[Published, ...]:
    """The published numbers of the rows' architectures, wherever their weights are from."""
    names = {row.key: f"{cfgs[row.model].architecture}/{row.mode}" for row in rows}
    return tuple(Published(key, *task.published[name]) for key, name in names.items() if name in task.published)


def _statements(data: Sequence[TaskData], plan: Plan) -> Iterator[str]:
    if plan.epochs_scale != 1:
        epochs = ", ".join(f"{plan.epochs(m)} instead of {EPOCHS[m]} ({MODES[m]})" for m in plan.modes if m in EPOCHS)
        yield f"Epochs are scaled by {plan.epochs_scale:g}: {epochs}."
    if plan.settings:
        yield "In place of the paper's settings: " + ", ".join(f"{k}={v}" for k, v in plan.settings.items()) + "."
    if kept := [name for name in plan.settings if name in _PRETRAINED_ONLY and "scratch" in plan.modes]:
        yield f"What is trained from scratch is trained whole, without {', '.join(kept)}."
    yield f"Intervals: 95 %, bootstrap over patients ({_RESAMPLES:,} resamples). Paired tests are of seed 0."
    for one in data:
        patients, labels = len(set(one.patients)), one.task.label
        drawn = "the manifest's split" if one.given_split is not None else "a split of its own for each seed"
        left_out = f", {one.dropped} rows without {labels} left out" if one.dropped else ""
        if one.task.age_bias != "keep":
            yield f"{one.task.title}: {_AGE_BIAS[one.task.age_bias]}"
        yield f"{one.task.title}: {len(one.records):,} scans of {patients:,} patients, {drawn}{left_out}."
        if _are_phantoms(one):
            yield f"{one.task.title}: phantoms, not people; the numbers say that code works, and nothing of patients."


def _are_phantoms(data: TaskData) -> bool:
    """Whether the path of the first scan, or a README above it, says so."""
    path = Path(str(image_of(data.records[0].image)))
    readmes = [folder / "README.txt" for folder in list(path.parents)[:4]]
    return any("phantom" in part for part in path.parts) or any(
        readme.is_file() and "phantoms" in readme.read_text(errors="replace")[:200] for readme in readmes
    )


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _text(value: float | None) -> str:
    return "" if value is None or not np.isfinite(value) else f"{value:.9g}"
