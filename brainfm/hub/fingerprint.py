"""The golden fingerprint: the embedding of the packaged sample scan, by which a user's set-up is checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from brainfm.errors import BrainfmError, WeightsError
from brainfm.factory import create_model, hub_mirror, resolve
from brainfm.inference import DTypeName, optimize, resolve_device, resolve_dtype
from brainfm.models.contracts import ASSETS, SAMPLE_MASK, SAMPLE_SCAN
from brainfm.models.encoder import Encoder
from brainfm.transforms import create_transform
from brainfm.weights import file_sha256

# What may be lost on the way from the scan to the embedding, relative to its length: float32 rounding of other
# processors and library versions stays below 1e-5 in our tests, bfloat16 has three significant digits.
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 1e-2}


@dataclass(frozen=True)
class Check:
    """How far an embedding of this machine is from the fingerprint.

    Attributes:
        computation: "float32" is the plain model; the others are `brainfm.optimize` of it.
        error: Length of the difference, relative to the fingerprint's.
        tolerance: What it may be.
    """

    computation: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the features are the published ones."""
        return self.error <= self.tolerance


def compute(model: Encoder) -> dict[str, Any]:
    """The fingerprint of a model, as JSON-ready data: its embedding of the packaged scan, in float32 on the CPU.

    Raises:
        ScanError: The model's input contract does not take the packaged scan, a T1w brain in MNI152 space.
    """
    return {
        "scan_sha256": file_sha256(SAMPLE_SCAN),
        "mask_sha256": file_sha256(SAMPLE_MASK),
        "dtype": "float32",
        "torch_version": torch.__version__,
        "embedding": [
            float(f"{value:.9g}") for value in _embedding(model, _sample(model))
        ],  # nine digits hold a float32
    }


def verify(
    name: str, dtypes: Sequence[DTypeName] = ("float32", "bfloat16"), device: str | torch.device = "cpu"
) -> list[Check]:
    """Embed the packaged scan on this machine, file → tensor → embedding, and compare with the stored fingerprint.

    Args:
        name: A model with weights, by any name that `create_model` takes.
        dtypes: What to compute in with `brainfm.optimize`; the plain float32 model always comes first.
        device: Where to compute.

    Returns:
        A check for the plain model, then one a dtype.

    Raises:
        BrainfmError: No fingerprint is known for these weights, or it was made on another sample scan; the device
            cannot be used.
        ValueError: A dtype is not one.
        WeightsError: The weights are not what they should be; see `create_model`.

    Example:
        >>> all(check.ok for check in brainfm.verify("local-dir:simclr_resnet18_3d"))
        True
    """
    place = resolve_device(device)
    model = create_model(name, pretrained=True)
    stored = _stored(name)
    if (stored["scan_sha256"], stored["mask_sha256"]) != (file_sha256(SAMPLE_SCAN), file_sha256(SAMPLE_MASK)):
        raise BrainfmError(f"{name}: its fingerprint was made on another sample scan than that of this brainfm")
    try:
        golden = np.array(stored["embedding"], dtype=np.float64)
    except (TypeError, ValueError):
        golden = np.empty(0)
    if golden.shape != (model.num_features,) or not np.isfinite(golden).all() or not golden.any():
        raise WeightsError(f"{name}: its fingerprint is not an embedding of {model.num_features} numbers")
    computations: dict[str, nn.Module] = {"float32": model.to(place)}
    for dtype in dtypes:
        computed = str(resolve_dtype(dtype)).removeprefix("torch.")
        computations[f"{computed}, optimized"] = optimize(model, dtype)
    tensor = _sample(model)
    checks = []
    for computation, network in computations.items():
        error = np.linalg.norm(_embedding(network, tensor) - golden) / np.linalg.norm(golden)
        checks.append(Check(computation, float(error), TOLERANCES[computation.partition(",")[0]]))
    return checks


def _stored(name: str) -> Mapping[str, Any]:
    """The fingerprint in a model's config.json, or, for weights in this package, in its assets."""
    source = resolve(name, mirror=hub_mirror())
    stored = source.config.get("fingerprint")
    if stored is None and not source.is_place and not source.config:
        stored = json.loads((ASSETS / "fingerprints.json").read_text(encoding="utf-8")).get(source.cfg.name)
    if stored is None:
        raise BrainfmError(
            f"{name}: no fingerprint is known for these weights; 'brainfm convert' and 'brainfm fetch --to FOLDER' "
            "make a folder with one, from weights that you trust"
        )
    if not isinstance(stored, Mapping) or not {"scan_sha256", "mask_sha256", "embedding"} <= stored.keys():
        raise WeightsError(f"{name}: the fingerprint in its config.json is not one")
    return stored


def _sample(model: Encoder) -> Tensor:
    """[C, z, y, x] of the packaged scan, prepared by the model's contract."""
    return create_transform(model)(SAMPLE_SCAN, mask=SAMPLE_MASK)


def _embedding(network: nn.Module, tensor: Tensor) -> NDArray[np.float64]:
    """[num_features] of a prepared scan."""
    with torch.inference_mode():
        vector: Tensor = network(tensor[None].to(next(network.parameters()).device))[0]
    return vector.double().cpu().numpy()
