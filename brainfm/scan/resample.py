"""Resample an image through an affine transform, once, by linear interpolation."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
from numpy.typing import NDArray

from brainfm.contract.volume import Triple

_PLANES = 8  # of the new image at a time: coordinates take six times the memory of the voxels they lead to


def resample(
    image: NDArray[np.float32],
    to_image: NDArray[np.float64],
    shape: Triple,
    *,
    beyond: str = "zeros",
) -> NDArray[np.float32]:
    """The image on another grid: linear between the centres of its voxels, in float64.

    Where the new voxels are larger than the old ones (twice or more along an axis), each is the mean of as many points
    as old voxels fit in it along that axis: a single point would take the noise of one voxel for the whole.

    Args:
        image: [i, j, k].
        to_image: [4, 4] from voxel indices of the new grid to those of the image.
        shape: Of the new grid.
        beyond: What lies beyond the image: "zeros", which the last half voxel fades into, or "border", its edge.

    Returns:
        [*shape] float32, the first axis fastest, as in files.
    """
    import torch
    import torch.nn.functional as F

    # torch's axes run the other way round, so that its coordinates (x, y, z) are (i, j, k) here.
    source = torch.from_numpy(np.ascontiguousarray(image.T, dtype=np.float64))[None, None]
    size = np.asarray(image.shape)
    steps = to_image[:3, :3].T  # [axis of the new grid, axis of the image]
    points = list(_points_in_a_voxel(steps))
    out = np.empty(shape[::-1], dtype=np.float32)
    i, j = (np.arange(n)[:, None] * step for n, step in zip(shape[:2], steps[:2], strict=True))
    for first in range(0, shape[2], _PLANES):
        k = np.arange(first, min(first + _PLANES, shape[2]))[:, None] * steps[2] + to_image[:3, 3]
        places = k[:, None, None] + j[None, :, None] + i[None, None]
        total = torch.zeros(places.shape[:3], dtype=torch.float64)
        for point in points:
            # −1 and 1 are the centres of the first and last voxel; of an axis of one voxel, its centre is 0.
            relative = 2 * (places + point) / np.maximum(size - 1, 1) - (size > 1)
            total += F.grid_sample(source, torch.from_numpy(relative)[None], padding_mode=beyond, align_corners=True)[
                0, 0
            ]
        out[first : first + _PLANES] = (total / len(points)).numpy()
    return out.T


def _points_in_a_voxel(steps: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """Where in a new voxel the image is looked at: offsets from its centre, in voxels of the image [3]."""
    counts = [max(1, int(np.linalg.norm(step) + 0.5)) for step in steps]
    offsets = [(np.arange(count) + 0.5) / count - 0.5 for count in counts]
    for place in product(*offsets):
        yield np.asarray(place) @ steps
