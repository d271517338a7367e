"""Outputs of other encoders' authors' own code, in `data/zoo`, and what a network of ours is held against them by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

FOLDER = Path(__file__).parent / "data" / "zoo"
NORM = ("weight", "bias", "running_mean", "running_var")


@cache
def vectors(name: str) -> dict[str, Any]:
    """The authors' numbers, `keys` written out: an entry "X.@bn" stands for the five tensors of a BatchNorm."""
    numbers: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    keys: dict[str, list[int]] = {}
    for key, shape in numbers["keys"].items():
        if key.endswith("@bn"):
            norm = key.removesuffix("@bn")
            keys |= {norm + part: shape for part in NORM} | {f"{norm}num_batches_tracked": []}
        else:
            keys[key] = shape
    assert digest(keys) == numbers["keys_sha256"]
    return numbers | {"keys": keys}


def digest(keys: dict[str, Any]) -> str:
    """sha256 of names and shapes, as `keys_sha256` is made."""
    lines = sorted(f"{key} {','.join(map(str, shape))}" for key, shape in keys.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def drawn(numbers: dict[str, Any]) -> torch.Tensor:
    """The input that the authors' network was shown."""
    draw = np.random.RandomState(numbers["input_seed"]).standard_normal(numbers["input_shape"])
    return torch.from_numpy(draw.astype(np.float32))


def error(found: Any, wanted: Any) -> float:
    """‖found − wanted‖ / ‖wanted‖."""
    found, wanted = (np.asarray(values, dtype=np.float64).ravel() for values in (found, wanted))
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def check_array(found: Any, numbers: dict[str, Any], names: Iterable[str] = ("mean", "std", "max", "l2")) -> None:
    """Hold a map or a vector against its shape, statistics and 16 samples."""
    array = np.asarray(found, dtype=np.float64)
    assert list(array.shape) == numbers["shape"]
    values = {
        "mean": array.mean(),
        "std": array.std(),
        "min": array.min(),
        "max": array.max(),
        "l2": np.linalg.norm(array),
    }
    for name in names:
        assert abs(values[name] - numbers[name]) <= 1e-5 * numbers["std"] + 1e-5 * abs(numbers[name]), name
    if "samples" in numbers:
        assert error(array.ravel()[np.linspace(0, array.size - 1, 16).astype(int)], numbers["samples"]) < 1e-5


def check_tensor(found: Any, numbers: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Hold what a contract makes of a scan against an entry of `contracts.json`."""
    array = np.asarray(found)
    assert list(array.shape) == numbers["shape"]
    assert np.count_nonzero(array) == numbers["nonzero"]
    array = array.astype(np.float64)
    for name in ("mean", "std", "min", "max"):
        assert abs(getattr(array, name)() - numbers[name]) <= tolerance * numbers["std"], name
    for index, value in numbers["voxels"].items():
        voxel = array[tuple(map(int, index.split(",")))]
        assert abs(voxel - value) <= tolerance * max(numbers["std"], abs(value)), index


def contracts() -> dict[str, Any]:
    """The tensors that the authors' own preprocessing makes of the sample scan."""
    return json.loads((FOLDER / "contracts.json").read_text())
