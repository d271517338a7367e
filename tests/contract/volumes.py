"""Small volumes, one operation of every kind, and plain NumPy and SciPy to hold them against."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from brainfm.contract import (
    AddFiltered,
    Clip,
    CropBox,
    CropCenter,
    CropForeground,
    CropToMultiple,
    DivideByMean,
    MinMax,
    Operation,
    Pad,
    Reorient,
    Resample,
    Resize,
    Standardize,
    Transpose,
    Volume,
    ZScore,
)

# Oblique, with voxel axes near posterior, superior and left, of 2, 1 and 1.5 mm.
AFFINE = np.array([[0.2, 0.05, -1.49, 40.0], [-1.98, 0.1, -0.15, 30.0], [0.15, 0.99, 0.1, -20.0], [0, 0, 0, 1.0]])

PICKS = [
    Reorient("LPS"),
    Transpose((2, 0, 1)),
    CropBox((1, 0, 2), (5, 6, 8)),
    CropCenter((3, 4, 20)),
    CropForeground("mask"),
    CropToMultiple((4, 3, 2)),
]
EVERY = [
    *PICKS,
    Pad((10, 9, 5), "minimum"),
    Resize((3, 7, 9), "area"),
    Resample((1.0, 2.0, 1.5), order=3, anti_alias=True),
    Clip(0.5, 99.5, percentiles=True, region="nonzero"),
    ZScore("nonzero", 1e-8, "floor", 1, False, "noise", "one_pass"),
    DivideByMean("positive"),
    MinMax("mask", per_channel=False),
    Standardize(0.3, 0.2),
    AddFiltered(("median", "unsharp", "sobel")),
]


def kind(operation: Operation) -> str:
    return type(operation).__name__


def frozen(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    for array in arrays:
        array.setflags(write=False)
    return arrays


def scan(shape=(6, 7, 8), channels=2, dtype=np.float32) -> Volume:
    """Intensities of 10 to 200, some zeros, and a mask that touches no edge. Not to be written to."""
    draw = np.random.default_rng(len(shape) + channels)
    stored = draw.uniform(10, 200, (channels, *shape)) * (draw.random((channels, *shape)) > 0.2)
    mask = np.zeros(shape, dtype=bool)
    mask[1:-1, 2:-1, 1:-2] = draw.random((shape[0] - 2, shape[1] - 3, shape[2] - 3)) > 0.3
    return Volume(*frozen(stored.astype(dtype), mask, AFFINE.copy()))


def image_of(values, mask=None) -> Volume:
    """One channel of the given [i, j, k] values, as float32."""
    return Volume(np.asarray(values, dtype=np.float32)[None], mask, np.eye(4))


def world_of(volume: Volume) -> np.ndarray:
    """[3, i, j, k]: the RAS mm of every voxel, by its affine."""
    index = np.indices(volume.shape).reshape(3, -1)
    return (volume.affine[:3, :3] @ index + volume.affine[:3, 3:]).reshape(3, *volume.shape)


def new_centres(before: int, after: int) -> np.ndarray:
    """Where the centres of `after` voxels lie among `before` voxels that cover the same length."""
    return (np.arange(after) + 0.5) * before / after - 0.5


def interpolated(image: np.ndarray, shape: tuple[int, int, int], order: int) -> np.ndarray:
    """One channel in float64 at the centres of the new voxels, by scipy's general interpolator."""
    grid = np.meshgrid(*map(new_centres, image.shape, shape), indexing="ij")
    return ndimage.map_coordinates(image.astype(np.float64), grid, order=order, mode="nearest")
