"""What the results say besides numbers: of the data, the methods, published numbers and pretraining."""

from __future__ import annotations

import datetime
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from brainfm.downstream.account import is_test_model, label_words, shares
from brainfm.downstream.grid import COVARIATES, not_run
from brainfm.downstream.plan import (
    HARMONISE,
    HARMONISED,
    MODES,
    NOT_OF,
    RECIPE_OF,
    RESAMPLES,
    TRAINED,
    Plan,
    paper_epochs,
)
from brainfm.downstream.results import Candidate, Column, Evaluation, Note, Published, Row
from brainfm.downstream.statistics import TIMES
from brainfm.downstream.task import Task, TaskData
from brainfm.errors import BrainfmError, ModelNameError
from brainfm.overlap import overlap_of_scans, pretraining_overlap
from brainfm.pretrained import PretrainedCfg
from brainfm.registry import get_pretrained_cfg
from brainfm.sources import SAID, kind_of_all
from brainfm.version import __version__

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


def describe(
    data: Sequence[TaskData],
    rows: Sequence[Row],
    controls: Sequence[Row],
    notes: Sequence[Note],
    plan: Plan,
    cfgs: Mapping[str, PretrainedCfg],
    runs: int,
    candidates: Sequence[Candidate] = (),
) -> Evaluation:
    """All that is known before the first run."""
    return Evaluation(
        title="Comparison of encoders" if candidates else "Evaluation of pretrained encoders",
        tasks=tuple(
            Column(
                one.task.name,
                one.task.title,
                one.task.kind,
                one.task.metric,
                one.task.unit,
                one.task.label,
                published_beside(one.task, rows, cfgs, plan),
                one.task.published_source,
                () if one.has_covariates else (COVARIATES.key,),
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
        notes=(*notes, *unstated(data, rows, cfgs, plan)),
        statements=(*not_run(cfgs, plan), *_compared(candidates), *statements(data, plan)),
        warnings=(*_random(candidates), *_warnings(data, rows, cfgs, plan)),
        candidates=tuple(candidates),
    )


def _compared(candidates: Sequence[Candidate]) -> Iterator[str]:
    """How a comparison's encoders were taken, and what their cost is."""
    if not candidates:
        return
    taken = [one for one in candidates if one.weights]
    places = dict.fromkeys(one.device for one in taken if one.device)
    yield (
        f"Of {len(candidates)} sets of weights, {len(taken)} embedded the scans, each scan once, one encoder after the "
        f"other, and {len(candidates) - len(taken)} are left out, each with its reason below."
    )
    yield (
        "Cost is measured in this run: seconds a volume to read it, prepare it as the encoder's contract says, and "
        "embed it, without loading the weights; GB, the most memory that the encoder's process held"
        f"{f' ({chr(59).join(places)})' if places else ''}."
    )


def _random(candidates: Sequence[Candidate]) -> Iterator[str]:
    if names := [one.model for one in candidates if one.weights == "random"]:
        yield (
            f"{', '.join(names)}: random weights, because the published ones cannot be had here. They stand among the "
            "controls, and no score of theirs says anything of the published encoders."
        )


def published_beside(
    task: Task, rows: Sequence[Row], cfgs: Mapping[str, PretrainedCfg], plan: Plan
) -> tuple[Published, ...]:
    """The published numbers of the rows' architectures, wherever their weights are from, beside the same method."""
    names = {row.key: f"{cfgs[row.model].architecture}/{row.mode}" for row in rows if row.model in cfgs}
    return tuple(
        Published(key, *task.published[name])
        for key, name in names.items()
        if name in task.published and plan.is_as_published(name.rpartition("/")[2])
    )


def unstated(
    data: Sequence[TaskData], rows: Sequence[Row], cfgs: Mapping[str, PretrainedCfg], plan: Plan
) -> Iterator[Note]:
    """A mark on each row with a published number of which the paper does not say how it was come by."""
    for one in data:
        for row in rows:
            if not published_beside(one.task, [row], cfgs, plan):
                continue
            if row.mode == "scratch" or cfgs[row.model].ssl_method == "MAE":
                yield Note(one.task.name, row.model, _UNSTATED[row.mode], row.mode)


def statements(data: Sequence[TaskData], plan: Plan) -> Iterator[str]:
    """Sentences on the methods and the data."""
    modes = [mode for mode in dict.fromkeys(plan.modes) if mode in RECIPE_OF]
    if plan.epochs_of_all is not None:
        if trained := ", ".join(f"{MODES[m]} ({paper_epochs(m)})" for m in modes):
            yield f"Epochs are {plan.epochs_of_all} alike, in place of the paper's: {trained}."
    elif plan.epochs_scale != 1:
        epochs = ", ".join(f"{plan.epochs(m)} instead of {paper_epochs(m)} ({MODES[m]})" for m in modes)
        yield f"Epochs are scaled by {plan.epochs_scale:g}: {epochs}."
    if plan.settings:
        yield "In place of the recipes' settings: " + ", ".join(f"{k}={v}" for k, v in plan.settings.items()) + "."
    otherwise = [MODES[mode] for mode in modes if mode in TRAINED and not plan.is_as_published(mode)]
    if otherwise and any(one.task.published for one in data):
        yield f"No published number stands beside another method, so none beside: {', '.join(otherwise)}."
    for mode, what in (
        ("scratch", "What is trained from scratch is trained whole"),
        ("probe_paper", "The paper's probe is as it was"),
        *((mode, f"What is {MODES[mode]} is so") for mode in ("norm_bias", "adapter", "lora")),
    ):
        if mode in modes and (left := [name for name in plan.settings if name in NOT_OF[mode]]):
            yield f"{what}, without {', '.join(left)}."
    regressions = any(one.task.kind == "regression" for one in data)
    if regressions and any(m in _RAW_PROBES and plan.of(m).get("target") in (None, "raw") for m in modes):
        yield _RAW
    yield from _harmonised(data, plan)
    yield (
        f"Intervals: 95 %, bootstrap over patients ({RESAMPLES:,} resamples; small p-values are of "
        f"{TIMES * RESAMPLES:,})."
    )
    for one in data:
        title, patients = one.task.title, len(set(one.patients))
        drawn = "the manifest's split" if one.given_split is not None else "a split of its own for each seed"
        if plan.folds:
            times = plan.seeds // plan.folds
            often = "once" if times == 1 else f"{times} times"
            drawn = f"in nested cross-validation of {plan.folds} folds, {often}; a seed is a fold"
        if one.elsewhere:
            drawn += f", and in place of its test part the {sum(one.elsewhere):,} scans that are held out"
        reasons = Counter("not there" if left.failed else left.why for left in one.left_out)
        left_out = "".join(f"; left out: {count:,} ({why})" for why, count in reasons.items())
        if one.task.age_bias != "keep":
            yield f"{title}: {_AGE_BIAS[one.task.age_bias]}"
        yield f"{title}: {len(one.records):,} scans of {patients:,} patients, {drawn}{left_out}."
        if one.classes:
            yield f"{title}: {label_words(one)}."
        yield from (f"{title}: {note}" for note in one.notes)


def _harmonised(data: Sequence[TaskData], plan: Plan) -> Iterator[str]:
    if not plan.harmonise:
        return
    from brainfm.downstream.harmonisation import is_longitudinal

    not_of = [MODES[mode] for mode in dict.fromkeys(plan.modes) if mode not in HARMONISED]
    yield (
        f"Rows after {HARMONISE[plan.harmonise]} take what is of {plan.site} out of the embeddings, fitted on what a "
        "run learns from alone, in each fold of the inner cross-validation anew. Scans of a site that is unknown, or "
        "of which too few are learned from, stay as they are."
        + (f" Not harmonised, for it learns from scans or by itself: {', '.join(not_of)}." if not_of else "")
        + (" Models of these rows are not kept: of a new scan the site would have to be known." * plan.keep_models)
    )
    for one in data:
        names = [name for name in one.task.covariates if name != plan.site]
        said = f"protects {', '.join(names)}" if names else "protects no covariate: what goes with a site is lost too"
        if is_longitudinal(plan.harmonise):
            said += "; of each patient a level of their own stays, predicted from the patient's own scans"
        yield f"{one.task.title}: {HARMONISE[plan.harmonise]} {said}."


def find_overlaps(data: Sequence[TaskData], models: Sequence[str], on_overlap: Literal["mark", "refuse"]) -> list[Note]:
    """A mark on each cell of a model that was pretrained on a task's data; or BrainfmError."""
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


def _warnings(
    data: Sequence[TaskData], rows: Sequence[Row], cfgs: Mapping[str, PretrainedCfg], plan: Plan
) -> Iterator[str]:
    models = dict.fromkeys(row.model for row in rows)
    if tests := [model for model in models if is_test_model(cfgs.get(model) or _cfg_of_table(data, model))]:
        said = "; ".join(plan.titles.get(model, model) for model in tests)
        yield (
            f"{said}: a test model, pretrained on phantoms if at all, and no brain encoder. These numbers "
            "show that code works, and say nothing of what a pretrained encoder can do."
        )
    for one in data:
        kind = kind_of_all(one.records)
        if kind == "phantom":
            yield f"{one.task.title}: phantoms, not people; the numbers say that code works, and nothing of patients."
        elif kind != "scans":
            yield f"{one.task.title}: {SAID[kind]}; the numbers say nothing of patients."


def _cfg_of_table(data: Sequence[TaskData], name: str) -> PretrainedCfg | None:
    """What is known of the model that made a table of embeddings."""
    model = next((one.made_by[name] for one in data if name in one.made_by), "")
    try:
        return get_pretrained_cfg(model) if model else None
    except ModelNameError:
        return None
