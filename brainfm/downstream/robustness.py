"""How much of a score is left when scans are corrupted: one curve a corruption, by a probe fitted on clean scans."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from brainfm.downstream.corruptions import CORRUPTIONS, corrupted
from brainfm.downstream.features import name_of, read_features
from brainfm.downstream.probe import fit_probe, predict_probe
from brainfm.downstream.statistics import metrics
from brainfm.downstream.task import TaskData
from brainfm.embed import embed, origin_of
from brainfm.errors import BrainfmError
from brainfm.factory import create_model
from brainfm.files import held, progress_bar, write_csv
from brainfm.models.encoder import Encoder
from brainfm.transforms import create_transform

COLUMNS = ("task", "model", "mode", "corruption", "unit", "strength", "metric", "value", "n_test", "made_of")


def robustness(
    data: Sequence[TaskData],
    models: Sequence[str],
    output: str | os.PathLike[str],
    *,
    names: Sequence[str] = tuple(CORRUPTIONS),
    seed: int = 0,
    device: str = "auto",
    progress: bool = False,
) -> Path:
    """Probe each model on clean training scans, and test it on test scans that are corrupted more and more.

    A curve has the scans that can be read at each of its strengths. A run that was interrupted goes on; a curve of
    other scans, labels, weights or another seed is done again.

    Args:
        data: Tasks, which may share scans.
        models: Names of `create_model`.
        output: A folder; its `embeddings` are used and added to.
        names: Of `CORRUPTIONS`.
        seed: Of the split and of the corruptions.
        device: See `brainfm.embed`.
        progress: Show a progress bar.

    Returns:
        `output/robustness.csv`: a row a task, model, corruption and strength.

    Raises:
        BrainfmError: No test scan can be read at all strengths of a corruption; or another command is writing
            the output.
    """
    output = Path(output)
    with held(output):
        return _robustness(data, models, output, names, seed, device, progress)


def _robustness(
    data: Sequence[TaskData],
    models: Sequence[str],
    output: Path,
    names: Sequence[str],
    seed: int,
    device: str,
    progress: bool,
) -> Path:
    path = output / "robustness.csv"
    rows = _read(path)
    jobs = [(one, model, name) for one in data for model in models for name in names]
    made_of: dict[tuple[str, str], str] = {}
    bar = progress_bar(jobs, total=len(jobs), unit="curve", doing="robustness", shown=progress)
    for one, model_name, name in bar:
        pair = (one.task.name, model_name)
        if pair not in made_of:
            made_of[pair] = _made_of(one, create_model(model_name, pretrained=True), seed)
        mine = [row for row in rows if (row["task"], row["model"], row["corruption"]) == (*pair, name)]
        if mine and all(row["made_of"] == made_of[pair] for row in mine):
            continue
        curve = _curve(one, model_name, name, output, seed, device)
        rows = [row for row in rows if row not in mine] + [row | {"made_of": made_of[pair]} for row in curve]
        _write(path, rows)
    return path


def _made_of(data: TaskData, model: Encoder, seed: int) -> str:
    """Says which scans, labels and weights a curve is of."""
    scans = [[name_of(record), record.patient_id] for record in data.records]
    content = [scans, data.labels.tolist(), data.split(seed), origin_of(model).digest, seed, data.task.metric]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def _curve(data: TaskData, model_name: str, name: str, output: Path, seed: int, device: str) -> list[dict[str, Any]]:
    model = create_model(model_name, pretrained=True)
    spec = create_transform(model).spec
    clean = read_features(data.records, model, output / "embeddings", model_name, device=device).vectors
    readable = set(np.flatnonzero(np.isfinite(clean).all(axis=1)).tolist())
    splits = data.split(seed)
    train = [n for n, part in enumerate(splits) if part == "train" and n in readable]
    test = [n for n, part in enumerate(splits) if part == "test" and n in readable]
    patients = [data.patients[n] for n in train]
    probe = fit_probe(clean[train], data.labels[train], data.task.kind, patients=patients, seed=seed)
    levels = CORRUPTIONS[name].levels
    found: dict[float, dict[int, Any]] = {levels[0]: {n: clean[n] for n in test}}
    records = [data.records[n] for n in test]
    for strength in levels[1:]:
        scans = corrupted(records, name, strength, spec=spec, seed=seed)
        table = embed(scans, model, device=device)
        places = {id(record): n for record, n in zip(scans, test, strict=True)}
        found[strength] = {places[id(r)]: vector for r, vector in zip(table.records, table.vectors, strict=True)}
    common = sorted(set.intersection(*(set(part) for part in found.values())))
    if not common:
        raise BrainfmError(f"{data.task.name}: no test scan can be read at every strength of {name}")
    rows = []
    for strength, vectors in found.items():
        predictions = predict_probe(probe, np.stack([vectors[n] for n in common]), data.task.kind)
        value = metrics(data.labels[common], predictions, data.task.kind)[data.task.metric]
        numbers = (CORRUPTIONS[name].unit, strength, data.task.metric, value, len(common))
        rows.append(dict(zip(COLUMNS[:-1], (data.task.name, model_name, "probe", name, *numbers), strict=True)))
    return rows


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{"made_of": "", **row} for row in csv.DictReader(file)]


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_csv(path, [COLUMNS, *([row[column] for column in COLUMNS] for row in rows)])
