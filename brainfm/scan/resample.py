"""Resample an image through an affine transform, once, by linear interpolation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from brainfm.contract.volume import Triple

_PLANES = 2  # of the new image at a time: their coordinates, six times the voxels' memory, are to stay in a cache


Box: TypeAlias = tuple[slice, slice, slice]


def resample(
    image: NDArray[Any] | Sequence[NDArray[Any]],
    to_image: NDArray[np.float64],
    shape: Triple,
    *,
    beyond: Literal["zeros", "border"] = "zeros",
    within: Box | None = None,
) -> NDArray[np.float32]:
    """The image on another grid: linear between the centres of its voxels, in float64.

    Where the new voxels are larger than the old ones (twice or more along an axis), each is the mean of as many points
    as old voxels fit in it along that axis: a single point would take the noise of one voxel for the whole.

    Args:
        image: [i, j, k], or several on the same voxels, which cost little more than one.
        to_image: [4, 4] from voxel indices of the new grid to those of the image.
        shape: Of the new grid.
        beyond: What lies beyond the image: "zeros", which the last half voxel fades into, or "border", its edge.
        within: The part of the new grid that is wanted, which takes so much less time; elsewhere it is 0.

    Returns:
        [*shape], or of several [C, *shape], float32, the first axis of space fastest, as in files.
    """
    import torch
    import torch.nn.functional as F

    # torch's axes run the other way round, so that its coordinates (x, y, z) are (i, j, k) here.
    channels = [image] if isinstance(image, np.ndarray) else image
    source = torch.empty(1, len(channels), *channels[0].shape[::-1], dtype=torch.float64)
    for into, channel in zip(source.numpy()[0], channels, strict=True):
        into[:] = channel.T
    # −1 and 1 are the centres of the first and last voxel; of an axis of one voxel, its centre is 0.
    size = np.asarray(channels[0].shape)
    unit = 2 / np.maximum(size - 1, 1)
    points = [point * unit for point in _points_in_a_voxel(to_image[:3, :3].T)]
    steps = to_image[:3, :3].T * unit  # [axis of the new grid, axis of the image]
    start = to_image[:3, 3] * unit - (size > 1)
    out = np.zeros((len(channels), *shape[::-1]), dtype=np.float32)
    box = within or tuple(slice(0, n) for n in shape)
    # [coordinate, place along the axis]: the sums are fast where the coordinates do not alternate in memory.
    i, j, k = (
        torch.from_numpy(np.arange(part.start, part.stop) * step[:, None])
        for part, step in zip(box, steps, strict=True)
    )
    plane = j[:, None, :, None] + i[:, None, None]
    for first in range(0, k.shape[1], _PLANES):
        planes = k[:, first : first + _PLANES, None, None] + plane
        total: Any = 0
        for point in points:
            places = planes + torch.from_numpy(start + point)[:, None, None, None]
            grid = places.permute(1, 2, 3, 0)[None]
            total += F.grid_sample(source, grid, padding_mode=beyond, align_corners=True)[0]
        whole = box[2].start + first
        out[:, whole : whole + planes.shape[1], box[1], box[0]] = (total / len(points)).numpy()
    return out[0].T if isinstance(image, np.ndarray) else out.transpose(0, 3, 2, 1)


def box_of(region: NDArray[np.bool_]) -> Box:
    """The smallest box that holds every True of [i, j, k]; an empty one where there is none."""
    box = []
    for axis in range(3):
        hits = np.flatnonzero(region.any(axis=tuple(other for other in range(3) if other != axis)))
        box.append(slice(int(hits[0]), int(hits[-1]) + 1) if len(hits) else slice(0, 0))
    return box[0], box[1], box[2]


def reach(box: Box, to_image: NDArray[np.float64], shape: Triple) -> Box:
    """The part of the new grid that a box of the image reaches, when it is resampled."""
    # A voxel reaches to the centres of its neighbours, and a new voxel's points half a voxel out of it.
    corners = np.array([(*corner, 1) for corner in product(*((part.start - 1, part.stop) for part in box))])
    there = corners @ np.linalg.inv(to_image)[:3].T
    low = np.clip(np.floor(there.min(axis=0) - 0.5).astype(int), 0, shape)
    high = np.clip(np.ceil(there.max(axis=0) + 0.5).astype(int) + 1, low, shape)
    i, j, k = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    return i, j, k


def _points_in_a_voxel(steps: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """Where in a new voxel the image is looked at: offsets from its centre, in voxels of the image [3]."""
    counts = [max(1, int(np.linalg.norm(step) + 0.5)) for step in steps]
    offsets = [(np.arange(count) + 0.5) / count - 0.5 for count in counts]
    for place in product(*offsets):
        yield np.asarray(place) @ steps
