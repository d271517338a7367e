"""One run: fit on the training part, choose on the validation part, and look at the test part once."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from brainfm.downstream.certainty import percentiles_unlike, radii
from brainfm.downstream.features import head_sizes, name_of, read_features, table_of
from brainfm.downstream.finetuning import Finetuning, Labelled, finetune, read_recipe
from brainfm.downstream.grid import Job
from brainfm.downstream.kept import bare, is_kept, keep_model, put_probe
from brainfm.downstream.plan import FREE, MODES, RECIPE_OF, RESAMPLES, TRAINED, WITHOUT_TRAINING, Plan
from brainfm.downstream.probe import AdamProbe, FittedHead, LinearHead, fit_neighbours, fit_probe, predict_probe
from brainfm.downstream.split import subsample
from brainfm.downstream.statistics import AgeBiasCorrection, age_bias_correction, bootstrap_interval, metrics
from brainfm.downstream.task import TaskData
from brainfm.downstream.untrained import built_as, create_untrained
from brainfm.embed import embed_for
from brainfm.errors import BrainfmError
from brainfm.factory import create_model
from brainfm.files import write_json
from brainfm.manifest import Listing
from brainfm.models.encoder import Encoder
from brainfm.pretrained import PretrainedCfg
from brainfm.table import write
from brainfm.train.distributed import ProcessGroup
from brainfm.zoo.cards import Cohort, Head

logger = logging.getLogger("brainfm")


def run_job(
    job: Job, plan: Plan, digest: str, cfgs: Mapping[str, PretrainedCfg], output: Path, everyone: ProcessGroup
) -> None:
    """Fit, predict the test part, and keep the numbers; `digest` says what the run was made of."""
    path = result_path(output, job)
    task, splits = job.data.task, job.data.split(job.seed)
    train = subsample(job.data.records, job.data.labels, splits, job.fraction, kind=task.kind, seed=job.seed)
    val, test = ([n for n, part in enumerate(splits) if part == name] for name in ("val", "test"))
    if job.row.mode in TRAINED:
        work = path.with_suffix(f".{digest[:12]}")
        fitted = _trained(job, plan, cfgs[job.row.model], train, val, work)
    else:
        fitted = _probed(job, plan, train, val, output)
    correct = _correction(job.data, fitted.val)
    kept, predictions = fitted.predict(test)  # everything is chosen: the one look at the test part
    if correct is not None:
        predictions = correct(predictions, job.data.labels[kept])
    if is_to_keep(job, plan):
        _keep(job, fitted, train, val, correct, digest, model_folder(output, job), everyone)
    if not everyone.is_first:
        return
    failed = fitted.failed
    looked_at, held_out = fitted.val
    known = job.data.labels[looked_at]
    labels, patients = job.data.labels[kept], [job.data.patients[n] for n in kept]
    values = metrics(labels, predictions, task.kind)
    intervals = {
        name: bootstrap_interval(labels, predictions, task.kind, name, groups=patients, n=RESAMPLES, seed=job.seed)
        for name, value in values.items()
        if np.isfinite(value)
    }
    content = {
        "digest": digest,
        "metrics": {name: [value, *intervals.get(name, (None, None))] for name, value in values.items()},
        "n_train": len(train),
        "n_test": len(kept),
        "trained_parameters": fitted.sizes[0],
        "parameters": fitted.sizes[1],
        "processes": everyone.world,
        "left_out": {str(n): failed[n] for n in sorted(failed)},
        "rows": kept,
        "patients": patients,
        "labels": labels.tolist(),
        "predictions": predictions.tolist(),
        "certainty": radii(known, held_out if correct is None else correct(held_out, known), task.kind),
    }
    if fitted.unlike is not None:
        content["unlike"] = fitted.unlike(kept)
    if fitted.sites is not None:
        content["sites"] = fitted.sites(kept)
    write_json(path, content)
    for work in path.parent.glob(f"{job.name}.*"):  # this run's, and those of one that stopped and was made otherwise
        if work.is_dir():
            shutil.rmtree(work, ignore_errors=True)


# Rows → those whose scan can be read, and their predictions.
Predict: TypeAlias = Callable[[Sequence[int]], tuple[list[int], NDArray[np.float64]]]


@dataclass(frozen=True, eq=False)
class _Fitted:
    """What a run has learned.

    Attributes:
        predict: Rows → those whose scan can be read, and their predictions.
        failed: By number the scans that cannot be used, which may grow.
        sizes: How many numbers were trained, and of how many where that is known.
        model: The encoder that learned or was probed, where there is one.
        embed: Rows → those whose scan can be read, and their embeddings.
        val: The predictions of the validation part.
        head: What the outputs mean, of a regression.
        probe: What was fitted on embeddings.
        sites: Rows of the test part → what is known of the sites in the embeddings, where these are harmonised.
        unlike: Rows → how unlike the training part they are, as percentiles; None where there is no embedding.
    """

    predict: Predict
    failed: dict[int, str]
    sizes: tuple[int, int | None]
    model: Encoder | None
    embed: Callable[[Sequence[int]], tuple[list[int], NDArray[np.float32]]]
    val: tuple[list[int], NDArray[np.float64]]
    head: LinearHead | None = None
    probe: Any = None
    sites: Callable[[Sequence[int]], dict[str, Any]] | None = None
    unlike: Callable[[Sequence[int]], list[float] | None] | None = None


def _probed(job: Job, plan: Plan, train: Sequence[int], val: Sequence[int], output: Path) -> _Fitted:
    """A linear model on embeddings, or on covariates; and the scans that it cannot use."""
    row, task, labels = job.row, job.data.task, job.data.labels
    features: NDArray[Any]
    failed: dict[int, str] = {}
    frozen: int | None = None
    model: Encoder | None = None
    if row.model in job.data.embeddings:
        features = job.data.embeddings[row.model]
        failed = {int(n): "no finite embedding" for n in np.flatnonzero(~np.isfinite(features).all(axis=1))}
    elif row.mode == "covariates":
        sizes = head_sizes(job.data, output / "embeddings" / f"{task.name}.head_size.json")
        features = table_of(job.data, sizes, train)
    else:
        if row.mode == "untrained":
            torch.manual_seed(job.seed)
            model, name = create_untrained(row.model), f"{row.model}.untrained{job.seed}"
        else:
            model, name = create_model(row.model, pretrained=True), row.model
        frozen = sum(parameter.numel() for parameter in model.parameters())
        device = str(plan.settings.get("device", "auto"))
        features, failed = read_features(job.data.records, model, output / "embeddings", name, device=device)
    readable = set(np.flatnonzero(np.isfinite(features).all(axis=1)).tolist())
    train, val = ([n for n in rows if n in readable] for rows in (train, val))
    if not val or len(set(labels[train].tolist())) < 2:
        raise BrainfmError(f"{task.name}: too few scans can be read{_one_of(failed)}")
    vectors: NDArray[Any] = features
    before: list[Any] = []
    sites: Callable[[Sequence[int]], dict[str, Any]] | None = None
    if row.harmonised:
        from brainfm.downstream.harmonisation import Harmoniser, beside, describe_sites

        columns, own = beside(job.data, plan.site, train, row.harmonised), job.data.patients
        features = np.hstack([vectors.astype(np.float64), columns])
        before = [Harmoniser.of(row.harmonised, columns)]
        sites = partial(
            describe_sites, vectors, columns, train, patients=own, method=row.harmonised, seed=job.seed, n=RESAMPLES
        )
    if row.mode == "probe_adam":
        values = recipe_of(job, plan, None)
        fitted: Any = AdamProbe(**{one.name: values[one.name] for one in fields(AdamProbe)}).fit(
            (features[train], labels[train]),
            (features[val], labels[val]),
            task.kind,
            task.metric if task.selection == "metric" else "loss",
            seed=job.seed,
        )
    elif row.base in WITHOUT_TRAINING:
        fitted = fit_neighbours(
            features[train], labels[train], task.kind, by_class=row.base == "prototype", before=before
        )
    else:
        patients = [job.data.patients[n] for n in train]
        fitted = fit_probe(features[train], labels[train], task.kind, patients=patients, seed=job.seed, before=before)

    def predict(rows: Sequence[int]) -> tuple[list[int], NDArray[np.float64]]:
        kept = [n for n in rows if n in readable]
        if not kept:
            raise BrainfmError(f"{task.name}: none of {len(rows)} scans to predict can be read{_one_of(failed)}")
        return kept, predict_probe(fitted, features[kept], task.kind)

    def embedded(rows: Sequence[int]) -> tuple[list[int], NDArray[np.float32]]:
        kept = [n for n in rows if n in readable]
        return kept, vectors[kept].astype(np.float32)

    head = fitted.head if isinstance(fitted, FittedHead) else None
    size = 0 if row.base in WITHOUT_TRAINING else (vectors.shape[1] + 1) * _outputs(job)
    of = None if frozen is None else frozen + size
    unlike = None if row.mode == "covariates" else partial(percentiles_unlike, vectors, train, job.data.patients)
    return _Fitted(predict, failed, (size, of), model, embedded, predict(val), head, fitted, sites, unlike)


def _outputs(job: Job) -> int:
    return len(job.data.classes) if job.data.task.kind == "multiclass" else 1


def _one_of(failed: Mapping[int, str]) -> str:
    return f"; one of {len(failed)} that cannot: {next(iter(failed.values()))}" if failed else ""


def _trained(job: Job, plan: Plan, cfg: PretrainedCfg, train: Sequence[int], val: Sequence[int], work: Path) -> _Fitted:
    """An encoder trained with a head, pretrained or from scratch; and the scans that it cannot use."""
    task, scratch, records = job.data.task, job.row.mode == "scratch", job.data.records
    torch.manual_seed(job.seed)
    encoder = create_untrained(job.row.model) if scratch else create_model(job.row.model, pretrained=True)
    settings = settings_of(job, plan, cfg, len(train), str(work))
    learned, chosen_by = (Labelled([records[n] for n in rows], job.data.labels[list(rows)]) for rows in (train, val))
    model = finetune(encoder, learned, chosen_by, task.kind, settings)
    failed = {train[n]: reason for n, reason in model.failed.items()}

    def predict(rows: Sequence[int]) -> tuple[list[int], NDArray[np.float64]]:
        predictions, unread = model.predict([records[n] for n in rows])
        failed.update({rows[place]: reason for place, reason in unread.items()})
        return [n for place, n in enumerate(rows) if place not in unread], predictions

    def embedded(rows: Sequence[int]) -> tuple[list[int], NDArray[np.float32]]:
        scans = Listing([records[n] for n in rows])
        table = embed_for(scans, bare(model.encoder), None, write, optimised=False, batch_size=1, device=model.device)
        there = {id(record) for record in table.records}
        return [n for n, record in zip(rows, scans, strict=True) if id(record) in there], table.vectors

    held_out = predict(val)
    sizes = model.trained_parameters, model.parameters
    return _Fitted(predict, failed, sizes, model.encoder, embedded, held_out, model.head)


def is_to_keep(job: Job, plan: Plan) -> bool:
    """Whether a run ends with its model in a folder."""
    return plan.keep_models and job.fraction == 1 and job.row.mode in MODES


def model_folder(output: Path, job: Job) -> Path:
    """Where a run's model is kept."""
    return output / "models" / job.name


def _keep(
    job: Job,
    fitted: _Fitted,
    train: Sequence[int],
    val: Sequence[int],
    correct: AgeBiasCorrection | None,
    digest: str,
    folder: Path,
    everyone: ProcessGroup,
) -> None:
    """Write the folder of a run's model; every process embeds its share."""
    data, task, encoder = job.data, job.data.task, fitted.model
    assert encoder is not None
    (learned, vectors), (chosen_by, held_out) = fitted.embed(train), fitted.embed(val)
    if not everyone.is_first:
        return
    described = Head(
        label=task.label,
        kind=task.kind,
        title=task.title,
        unit=task.unit,
        classes=data.classes,
        mean=fitted.head.mean if fitted.head else 0.0,
        std=fitted.head.std if fitted.head else 1.0,
        slope=correct.slope if correct else 1.0,
        intercept=correct.intercept if correct else 0.0,
        optimised=job.row.mode not in TRAINED,
        run=digest,
    )
    arrays = put_probe(encoder, fitted.probe, described.outputs) if fitted.probe is not None else {}
    numbers = len({data.patients[n] for n in (*learned, *chosen_by)}), len(learned) + len(chosen_by)
    together = () if len(task.cohorts) == 1 else ("not counted apart",)
    cohorts = tuple(Cohort(name, *(numbers if not together else (0, 0)), together) for name in task.cohorts)
    notes = f"Predicts {task.title}: {job.row.title}, seed {job.seed}, of {len(learned)} training scans."
    readout: dict[str, Any] = (
        {} if described.optimised else {"readout": {}}
    )  # a network that was trained is shown a scan at once
    keep_model(
        folder,
        encoder,
        described,
        vectors,
        (held_out, data.labels[chosen_by]),
        probe=arrays,
        cohorts=cohorts,
        overlay={"notes": notes, **readout},
    )


def _correction(data: TaskData, val: tuple[list[int], NDArray[np.float64]]) -> AgeBiasCorrection | None:
    """The task's correction of age bias, learned on the validation part."""
    if data.task.age_bias == "keep":
        return None
    kept, predictions = val
    try:
        return age_bias_correction(data.labels[kept], predictions, rule=data.task.age_bias)
    except ValueError as error:
        logger.warning("%s: age bias is not corrected in this run: %s", data.task.name, error)
        return None


def settings_of(job: Job, plan: Plan, cfg: PretrainedCfg, scans: int, work: str) -> Finetuning:
    """The settings of a run: its recipe's, with the plan's in their place."""
    values = recipe_of(job, plan, cfg)
    values["batch_size"] = min(values["batch_size"], scans)
    return Finetuning.from_dict(values | {"seed": job.seed, "output": work})


def recipe_of(job: Job, plan: Plan, cfg: PretrainedCfg | None) -> dict[str, Any]:
    """The fields of `Finetuning` that a run has, but for what is its own."""
    task, mode = job.data.task, job.row.mode
    of_mae = mode == "finetune" and cfg is not None and cfg.ssl_method == "MAE"
    recipe = read_recipe("finetune_mae" if of_mae else RECIPE_OF[mode])
    values = {"target": task.target, **recipe, "epochs": plan.epochs(mode)}
    values["selection"] = task.metric if task.selection == "metric" else "loss"
    if "warmup_epochs" in recipe:
        values["warmup_epochs"] = recipe["warmup_epochs"] * values["epochs"] / recipe["epochs"]
    return values | plan.of(mode)


def digest_of_data(data: TaskData) -> str:
    """Says which scans a task has, as they are now, with their labels, patients, split and covariates."""
    name = (lambda record: [record.name, record.scan_id]) if data.embeddings else name_of  # files are not looked at
    scans = [[name(r), r.patient_id, *(r.extra.get(one) for one in data.task.covariates)] for r in data.records]
    content = [
        scans,
        data.labels.tolist(),
        data.given_split,
        *([data.elsewhere] if data.elsewhere else []),
        *([data.folds] if data.folds else []),
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def digest_of(job: Job, made_of: str, plan: Plan, cfgs: Mapping[str, PretrainedCfg]) -> str:
    """Says what a run was made of."""
    cfg = cfgs.get(job.row.model)
    task = job.data.task.to_dict() | {"published": None, "title": None, "manifest": None}
    task = {name: value for name, value in task.items() if name not in ("test_manifest", "leave_out")}
    content: list[Any] = [task, made_of, job.row.mode, job.row.model, job.fraction, job.seed]
    content.append(None if cfg is None else [cfg.sha256, cfg.source])
    if cfg is not None and job.row.mode in ("scratch", "untrained") and built_as(job.row.model) != cfg.architecture:
        content[-1] = built_as(job.row.model)  # of its weights nothing is used
    if (vectors := job.data.embeddings.get(job.row.model)) is not None:
        content.append(hashlib.sha256(np.ascontiguousarray(vectors).tobytes()).hexdigest())
    if job.row.harmonised:
        content.append([plan.site, [record.extra.get(plan.site) for record in job.data.records]])
    if job.row.mode in RECIPE_OF:
        content.append({name: value for name, value in recipe_of(job, plan, cfg).items() if name not in FREE})
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def result_path(output: Path, job: Job) -> Path:
    """Where a run's numbers are kept."""
    return output / "runs" / f"{job.name}.json"


def is_done(output: Path, job: Job, plan: Plan, digest: str) -> bool:
    """Whether a run is there that was made of the same, with its model where that is to be kept."""
    if is_to_keep(job, plan) and not is_kept(model_folder(output, job), digest):
        return False
    try:
        return bool(json.loads(result_path(output, job).read_text(encoding="utf-8"))["digest"] == digest)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_result(job: Job, output: Path) -> dict[str, Any]:
    """The numbers of a run that is done."""
    content: dict[str, Any] = json.loads(result_path(output, job).read_text(encoding="utf-8"))
    return content
