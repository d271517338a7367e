"""The runs of an evaluation: tasks × rows × fractions × seeds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from brainfm.downstream.plan import HARMONISE, HARMONISED, MODES, TRAINED, Plan
from brainfm.downstream.results import Candidate, Row
from brainfm.downstream.task import TaskData
from brainfm.downstream.untrained import built_as
from brainfm.errors import BrainfmError, WeightsNotFoundError
from brainfm.pretrained import PretrainedCfg

COVARIATES = Row("covariates", "covariates", "covariates alone, no image")


@dataclass(frozen=True)
class Job:
    """One run of the grid."""

    data: TaskData
    row: Row
    fraction: float
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        plain = "".join(letter if letter.isalnum() or letter in "_-" else "-" for letter in self.row.model)
        digest = hashlib.sha256(self.row.model.encode()).hexdigest()[:6]
        return f"{self.data.task.name}.{plain[:40]}-{digest}.{self.row.mode}.{self.fraction:g}.{self.seed}"


def list_jobs(data: Sequence[TaskData], rows: Sequence[Row], controls: Sequence[Row], plan: Plan) -> Iterator[Job]:
    """Cheap runs first: something to look at soon."""
    order = (
        "covariates",
        "untrained",
        "knn",
        "prototype",
        "probe",
        "probe_adam",
        "probe_paper",
        "norm_bias",
        "adapter",
        "lora",
        "finetune",
        "scratch",
    )
    for row in sorted([*controls, *rows], key=lambda row: order.index(row.base)):
        for one in data:
            if row.mode == "covariates" and not one.has_covariates:
                continue
            for fraction in sorted({1.0, *plan.fractions}, reverse=True):
                if fraction < 1 and row in controls:
                    continue
                for seed in range(plan.seeds if fraction == 1 else 1):
                    yield Job(one, row, fraction, seed)


def model_rows(cfgs: Mapping[str, PretrainedCfg], plan: Plan) -> list[Row]:
    """The rows of the models; raises BrainfmError where there are none, or weights that were never published."""
    titles = short_names(list(cfgs)) | dict(plan.titles)
    rows = []
    for model, cfg in cfgs.items():
        modes = _modes(model, cfgs, plan)
        if not cfg.has_weights and cfg.ssl_method is not None and modes != ["scratch"]:
            raise WeightsNotFoundError(
                f"no weights of {model} were published; pretrain it ('brainfm pretrain') and give local-dir:FOLDER, "
                "or leave it out"
            )
        rows += [
            row for mode in modes for row in _with_harmonised(Row(model, mode, f"{titles[model]}, {MODES[mode]}"), plan)
        ]
    if cfgs and not rows:
        raise BrainfmError(f"nothing to run: none of {', '.join(cfgs)} is run in {', '.join(plan.modes)}")
    return rows


def _modes(model: str, cfgs: Mapping[str, PretrainedCfg], plan: Plan) -> list[str]:
    """The modes that a model is run in, of those that are planned."""
    modes, baselines = list(dict.fromkeys(plan.modes)), _baselines(cfgs, plan)
    if model in baselines:
        return [mode for mode in modes if mode == "scratch"]
    return [mode for mode in modes if mode != "scratch" or not baselines]


def _baselines(cfgs: Mapping[str, PretrainedCfg], plan: Plan) -> list[str]:
    """The models that are trained from scratch: without weights, and never meant to have any, or so by the plan."""
    return [
        model
        for model, cfg in cfgs.items()
        if model in plan.scratch or (not cfg.has_weights and cfg.ssl_method is None)
    ]


def not_run(cfgs: Mapping[str, PretrainedCfg], plan: Plan) -> Iterator[str]:
    """A sentence for each model that is not run in all of the planned modes."""
    if plan.scratch:  # which says itself what stands for what
        return
    baselines = _baselines(cfgs, plan)
    for model in cfgs:
        left = [MODES[mode] for mode in dict.fromkeys(plan.modes) if mode not in _modes(model, cfgs, plan)]
        if left and model in baselines:
            yield f"{model} has no weights, and is not run as: {', '.join(left)}."
        elif left:
            yield f"{model} is not trained from scratch: {', '.join(baselines)} stands for that."


def table_rows(data: Sequence[TaskData], plan: Plan, candidates: Sequence[Candidate] = ()) -> list[Row]:
    """The rows of embeddings that were made before; they are probed. Those of untrained encoders are controls."""
    untrained = {one.model for one in candidates if one.weights != "trained"}
    tables = [model for model in plan.models if any(model in one.embeddings for one in data) and model not in untrained]
    titles = short_names(tables)
    modes = [mode for mode in dict.fromkeys(plan.modes) if mode not in TRAINED]
    made_by = {name: f" ({model})" for one in data for name, model in one.made_by.items() if model != name}
    rows = [
        Row(model, mode, f"{titles[model]}{made_by.get(model, '')}, {MODES[mode]}")
        for model in tables
        for mode in modes
    ]
    return [one for row in rows for one in _with_harmonised(row, plan)]


def _with_harmonised(row: Row, plan: Plan) -> list[Row]:
    """A row, and the one of the same mode on harmonised embeddings where that is planned."""
    if not plan.harmonise or row.mode not in HARMONISED:
        return [row]
    return [row, Row(row.model, f"{row.mode}+{plan.harmonise}", f"{row.title}, after {HARMONISE[plan.harmonise]}")]


def control_rows(cfgs: Mapping[str, PretrainedCfg], plan: Plan, candidates: Sequence[Candidate] = ()) -> list[Row]:
    """The same encoders untrained, or those of a comparison that are, and covariates alone."""
    words = {"random": "random weights", "control": "untrained"}
    compared = [
        Row(one.model, "untrained", f"{one.model}, {words[one.weights]}, linear probe")
        for one in candidates
        if one.weights in words
    ]
    if not plan.controls:
        return compared
    untrained = [Row(name, "untrained", f"{title}, untrained, linear probe") for name, title in _untrained(cfgs, plan)]
    return [*untrained, *compared, COVARIATES]


def _untrained(cfgs: Mapping[str, PretrainedCfg], plan: Plan) -> list[tuple[str, str]]:
    """By which name each network of the models with weights is built untrained, and what it is called: each once."""
    first: dict[str, str] = {}
    for model in [*_baselines(cfgs, plan), *cfgs]:
        if cfgs[model].has_weights and not cfgs[model].is_drawn:
            first.setdefault(built_as(model), model)
    short = short_names([*first.values()])
    named = []
    for built, model in first.items():
        architecture = cfgs[model].architecture
        title = plan.titles.get(model, f"{architecture} as in {short[model]}")
        named.append((built, built) if built == architecture else (model, title))
    return sorted(named, key=lambda one: one[1])


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
