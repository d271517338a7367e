"""The golden embedding: the packaged scan's, kept with the weights, by which a user's set-up is checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from brainfm.assets import GOLDEN_EMBEDDINGS, SAMPLE_MASK, SAMPLE_SCAN
from brainfm.contract import Volume
from brainfm.errors import BrainfmError, WeightsError
from brainfm.factory import create_model
from brainfm.files import file_sha256
from brainfm.inference import DTypeName, dtype_name, optimize, resolve_device
from brainfm.models.encoder import Encoder
from brainfm.names import hub_mirror, resolve
from brainfm.readout import Reader
from brainfm.transforms import create_transform

# What may be lost on the way from the scan to the embedding, relative to its length: float32 rounding of other
# processors and library versions stays below 1e-5 in our tests, bfloat16 has three significant digits.
# TF32 rounds to two bits more than bfloat16, and adds up in float32.
TOLERANCES = {"float32": 1e-4, "tf32": 5e-3, "bfloat16": 2e-2, "float16": 1e-2}


@dataclass(frozen=True)
class Check:
    """How far an embedding of this machine is from the golden one.

    Attributes:
        computation: "float32" is the plain model; the others are `brainfm.optimize` of it.
        error: Length of the difference, relative to the golden one's.
        tolerance: What it may be, in the same unit.

    Example:
        >>> import brainfm
        >>> brainfm.hub.Check("float32", error=2e-6, tolerance=1e-4).ok
        True
    """

    computation: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the features are the published ones."""
        return self.error <= self.tolerance


def compute(model: Encoder) -> dict[str, Any]:
    """The golden embedding of a model, as JSON-ready data: its embedding of the packaged scan, in float32 on the CPU.

    Raises:
        ScanError: The model's input contract does not take the packaged scan, a T1w brain in MNI152 space.
    """
    embedding = _embedding(model, _sample(model))
    return {
        "scan_sha256": file_sha256(SAMPLE_SCAN),
        "mask_sha256": file_sha256(SAMPLE_MASK),
        "dtype": "float32",
        "torch_version": torch.__version__,
        "embedding": [float(f"{value:.9g}") for value in embedding],  # nine digits hold a float32
    }


def verify(
    name: str, dtypes: Sequence[DTypeName] = ("float32", "bfloat16"), device: str | torch.device = "cpu"
) -> list[Check]:
    """Embed the packaged scan on this machine, file → tensor → embedding, and compare with the stored one.

    Args:
        name: A model with weights, by any name that `create_model` takes.
        dtypes: What to compute in with `brainfm.optimize`; the plain float32 model always comes first.
        device: Where to compute.

    Returns:
        A check for the plain model, then one a dtype.

    Raises:
        BrainfmError: No golden embedding is known for these weights, or it was made on another sample scan; the device
            cannot be used.
        ValueError: A dtype is not one.
        WeightsError: The weights are not what they should be; see `create_model`.

    Example:
        >>> import brainfm
        >>> all(check.ok for check in brainfm.verify("test_resnet_3d", dtypes=()))
        True
    """
    place = resolve_device(device)
    model = create_model(name, pretrained=True)
    stored = _stored(name)
    if (stored["scan_sha256"], stored["mask_sha256"]) != (file_sha256(SAMPLE_SCAN), file_sha256(SAMPLE_MASK)):
        raise BrainfmError(f"{name}: its golden embedding was made on another sample scan than that of this brainfm")
    try:
        golden = np.array(stored["embedding"], dtype=np.float64)
    except (TypeError, ValueError):
        golden = np.empty(0)
    if golden.shape != (model.num_features,) or not np.isfinite(golden).all() or not golden.any():
        raise WeightsError(f"{name}: its golden embedding is not one of {model.num_features} numbers")
    computations: dict[str, nn.Module] = {"float32": model.to(place)}
    for dtype in dtypes:
        computations[f"{dtype_name(dtype, place)}, optimized"] = optimize(model, dtype)
    sample = _sample(model)
    checks = []
    for computation, network in computations.items():
        error = np.linalg.norm(_embedding(network, sample) - golden) / np.linalg.norm(golden)
        checks.append(Check(computation, float(error), TOLERANCES[computation.partition(",")[0]]))
    return checks


def _stored(name: str) -> Mapping[str, Any]:
    """The golden embedding in a model's config.json, or, for weights in this package, in its assets."""
    source = resolve(name, mirror=hub_mirror())
    stored = source.config.get("golden", source.config.get("fingerprint"))  # its name in format 1
    if stored is None and not source.is_place and not source.config:
        stored = json.loads(GOLDEN_EMBEDDINGS.read_text(encoding="utf-8")).get(source.cfg.name)
    if stored is None:
        raise BrainfmError(
            f"{name}: no golden embedding is known for these weights; 'brainfm convert' and 'brainfm fetch "
            "--to FOLDER' make a folder with one, from weights that you trust"
        )
    if not isinstance(stored, Mapping) or not {"scan_sha256", "mask_sha256", "embedding"} <= stored.keys():
        raise WeightsError(f"{name}: the golden embedding in its config.json is not one")
    return stored


def _sample(model: Encoder) -> Volume:
    """The packaged scan, prepared by the model's contract."""
    return create_transform(model).volume(SAMPLE_SCAN, SAMPLE_MASK)


def _embedding(network: nn.Module, volume: Volume) -> NDArray[np.float64]:
    """[num_features] of a prepared scan, read out as the model's readout says."""
    tensor = torch.from_numpy(volume.image)[None].to(next(network.parameters()).device)
    return Reader(network)(tensor, [volume.mask]).vectors[0].double().cpu().numpy()
