"""The main job on the packaged sample scan: file → tensor → embedding, with a picture of what the encoder saw."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brainfm.assets import SAMPLE_MASK, SAMPLE_SCAN
from brainfm.factory import create_model
from brainfm.files import atomic_path
from brainfm.inference import optimize
from brainfm.manifest import ScanRecord
from brainfm.picture import MASK_COLOUR, edge
from brainfm.readout import Reader
from brainfm.registry import get_pretrained_cfg
from brainfm.table import Embeddings
from brainfm.transforms import create_transform
from brainfm.weights import cached_weights

REAL_MODEL, TEST_MODEL = "simclr_resnet18_3d", "test_resnet_3d"


@dataclass(frozen=True)
class DemoResult:
    """What the demo did: the model, the shape of its input, the embedding, and the two files written."""

    model_name: str
    notes: str
    input_shape: tuple[int, ...]
    vector: NDArray[np.float32]
    embedding_file: Path
    picture_file: Path


def default_model() -> str:
    """The published encoder where its weights are in the cache already, else the packaged test model."""
    return REAL_MODEL if cached_weights(get_pretrained_cfg(REAL_MODEL)) else TEST_MODEL


def run(model_name: str, folder: str | os.PathLike[str]) -> DemoResult:
    """Embed the packaged sample scan (the MNI152 2009a average brain) and write `embedding.csv` and `input.png`."""
    folder = Path(folder)
    model = create_model(model_name, pretrained=True)
    volume = create_transform(model).volume(SAMPLE_SCAN, SAMPLE_MASK)
    tensor = torch.from_numpy(volume.image)
    vector: NDArray[np.float32] = Reader(optimize(model))(tensor[None], [volume.mask]).vectors[0].numpy()
    table = Embeddings(vector[None], [ScanRecord(SAMPLE_SCAN, SAMPLE_MASK, "MNI152", "2009a")])
    table.save(folder / "embedding.csv")
    draw_tensor(tensor, folder / "input.png")
    notes = model.pretrained_cfg.notes
    return DemoResult(model_name, notes, tuple(tensor.shape), vector, folder / "embedding.csv", folder / "input.png")


def draw_tensor(tensor: Tensor, path: Path, pixels: int = 384) -> None:
    """Write a PNG of the three middle planes of a [1, z, y, x] tensor, its non-zero voxels outlined in yellow.

    From left to right: axial, coronal, sagittal; the scan's left is on the left, its front and top are up. Each panel
    is `pixels` wide and high at the most.
    """
    from PIL import Image

    volume = tensor[0].numpy()
    z, y, x = (size // 2 for size in volume.shape)
    planes = (volume[z, ::-1, :], volume[::-1, y, :], volume[::-1, :, x])
    low, high = np.percentile(volume[volume != 0], (1, 99)) if volume.any() else (0.0, 1.0)
    scale = max(1, pixels // max(volume.shape))
    panels = [_panel(plane, low, high, scale) for plane in planes]
    height = max(panel.shape[0] for panel in panels)
    padded = [np.pad(panel, ((0, height - panel.shape[0]), (4, 4), (0, 0))) for panel in panels]
    with atomic_path(path) as temporary:
        Image.fromarray(np.concatenate(padded, axis=1)).save(temporary, format="PNG")


def _panel(plane: NDArray[np.float32], low: float, high: float, scale: int) -> NDArray[np.uint8]:
    brain = plane != 0
    grey = np.where(brain, np.clip((plane - low) / (high - low), 0, 1) * 215 + 40, 0).astype(np.uint8)
    grey, brain = (np.repeat(np.repeat(a, scale, axis=0), scale, axis=1) for a in (grey, brain))
    rgb = np.repeat(grey[..., None], 3, axis=2)
    rgb[edge(brain)] = MASK_COLOUR
    return rgb
