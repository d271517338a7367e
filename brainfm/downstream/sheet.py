"""A run's data sheet, `run.json`: what the numbers were made of, and the command that makes them again."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from brainfm.downstream.plan import Plan
from brainfm.downstream.task import TaskData
from brainfm.errors import BrainfmError
from brainfm.files import file_sha256, write_json
from brainfm.pretrained import PretrainedCfg
from brainfm.weights.fetch import find_weights

SHEET = "run.json"
_PACKAGES = ("brainfm", "torch", "monai", "numpy", "scipy", "scikit-learn", "pandas", "statsmodels")


def write_sheet(
    output: Path,
    data: Sequence[TaskData],
    plan: Plan,
    cfgs: Mapping[str, PretrainedCfg],
    made_of: Mapping[str, str],
    command: Mapping[str, Any] | None,
) -> None:
    """Write `run.json` beside `results.csv`.

    Args:
        output: Of the evaluation.
        data: Its tasks.
        plan: What was run.
        cfgs: Of the models that were run.
        made_of: By task the digest of its scans, labels, patients and covariates.
        command: Name, options and folder of what made it; None where that was no command.
    """
    weights = {name: {"sha256": _weights_sha256(cfg), "source": str(cfg.source)} for name, cfg in cfgs.items()}
    tables = {
        name: hashlib.sha256(np.ascontiguousarray(vectors).tobytes()).hexdigest()
        for one in data
        for name, vectors in one.embeddings.items()
    }
    content = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "versions": _versions(),
        "seeds": plan.seeds,
        "folds": plan.folds,
        "splits": {one.task.name: _splits(one, plan.seeds) for one in data},
        "data": dict(made_of),
        "weights": weights,
        "embeddings": tables,
        "results": file_sha256(output / "results.csv"),
    }
    write_json(output / SHEET, content)


def _weights_sha256(cfg: PretrainedCfg) -> str | None:
    """Of the file that was read; None where the weights are no file, or it is not there any more."""
    if cfg.sha256 or not cfg.has_weights:
        return cfg.sha256
    try:
        return file_sha256(find_weights(cfg))
    except (BrainfmError, OSError):
        return None


def _splits(data: TaskData, seeds: int) -> list[str]:
    """Of each seed's split a digest: who is in which part."""
    whose = [[record.patient_id, record.scan_id] for record in data.records]
    return [
        hashlib.sha256(json.dumps([whose, data.split(seed)]).encode()).hexdigest()
        for seed in range(1 if data.given_split is not None else seeds)
    ]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


def read_sheet(path: Path) -> dict[str, Any]:
    """A data sheet from which an evaluation can be made again. Raises BrainfmError where it is none."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        command = content["command"]
        if command is None:
            raise BrainfmError(f"{path}: was not made by one brainfm command, so there is none to do again")
        if not isinstance(command["options"], dict) or not isinstance(content["results"], str):
            raise TypeError("options and results are not what they should be")
        str(command["name"]), str(command["folder"])
    except FileNotFoundError as error:
        raise BrainfmError(f"{path}: no such file; an evaluation has its {SHEET} beside results.csv") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BrainfmError(f"{path}: not the {SHEET} of an evaluation ({error})") from error
    return content


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[str]:
    """What two evaluations were made of that is not the same, in words."""
    for name, what in (
        ("data", "the scans or labels of"),
        ("splits", "the splits of"),
        ("weights", "the weights of"),
        ("embeddings", "the table of embeddings"),
    ):
        ours, theirs = first.get(name, {}), second.get(name, {})
        for key in sorted({*ours, *theirs}):
            if ours.get(key) != theirs.get(key):
                yield f"{what} {key}"
    ours, theirs = first.get("versions", {}), second.get("versions", {})
    for key in sorted({*ours, *theirs}):
        if ours.get(key) != theirs.get(key):
            yield f"{key} ({ours.get(key)}, now {theirs.get(key)})"
