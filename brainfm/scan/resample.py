"""Resample an image through an affine transform, once, by linear interpolation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import product
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from brainfm.contract.volume import Triple
from brainfm.scan.alignment import product_of

_BLOCK = 4  # voxels along each axis of the blocks in which a new image is made, of which an image may want only some


def resample(
    image: NDArray[Any] | Sequence[NDArray[Any]],
    to_image: NDArray[np.float64],
    shape: Triple,
    *,
    beyond: Literal["zeros", "border"] = "zeros",
    within: NDArray[np.bool_] | None = None,
) -> NDArray[np.float32]:
    """The image on another grid: linear between the centres of its voxels, in float64.

    Where the new voxels are larger than the old ones (twice or more along an axis), each is the mean of as many points
    as old voxels fit in it along that axis: a single point would take the noise of one voxel for the whole.

    Args:
        image: [i, j, k], or several on the same voxels, which cost little more than one.
        to_image: [4, 4] from voxel indices of the new grid to those of the image.
        shape: Of the new grid.
        beyond: What lies beyond the image: "zeros", which the last half voxel fades into, or "border", its edge.
        within: Which blocks of the new grid are wanted, as `reach` gives them, which takes so much less time; elsewhere
            it is 0.

    Returns:
        [*shape], or of several [C, *shape], float32, the first axis of space fastest, as in files.
    """
    import torch
    import torch.nn.functional as F

    channels = [image] if isinstance(image, np.ndarray) else image
    blocks: NDArray[np.bool_] = np.ones(_blocks(shape), np.bool_) if within is None else within
    seen = _seen(blocks, to_image, channels[0].shape)
    to_image = to_image.copy()
    to_image[:3, 3] -= [part.start for part in seen]
    # torch's axes run the other way round, so that its coordinates (x, y, z) are (i, j, k) here.
    size = np.array([part.stop - part.start for part in seen])
    source = torch.empty(1, len(channels), *size[::-1].tolist(), dtype=torch.float64)
    for into, channel in zip(source.numpy()[0], channels, strict=True):
        into[:] = channel[seen].T
    # −1 and 1 are the centres of the first and last voxel; of an axis of one voxel, its centre is 0.
    unit = 2 / np.maximum(size - 1, 1)
    points = [point * unit for point in _points_in_a_voxel(to_image[:3, :3].T)]
    steps = to_image[:3, :3].T * unit  # [axis of the new grid, axis of the image]
    start = to_image[:3, 3] * unit - (size > 1)
    out = np.zeros((len(channels), *shape[::-1]), dtype=np.float32)
    # [coordinate, place along the axis]: the sums are fast where the coordinates do not alternate in memory.
    i, j, k = (np.arange(n) * step[:, None] for n, step in zip(shape, steps, strict=True))
    in_plane = (j[:, :, None] + i[:, None, :]).reshape(3, -1)
    flat = out.reshape(len(channels), shape[2], -1)
    for first, wanted in zip(range(0, shape[2], _BLOCK), np.moveaxis(blocks, 2, 0), strict=True):
        where = np.flatnonzero(wanted.repeat(_BLOCK, axis=0).repeat(_BLOCK, axis=1)[: shape[0], : shape[1]].T)
        if not len(where):
            continue
        planes, here = slice(first, first + _BLOCK), in_plane[:, where]
        total: Any = None
        for point in points:
            places = torch.from_numpy(here[:, None] + (k[:, planes] + (start + point)[:, None])[:, :, None])
            grid = places.permute(1, 2, 0)[:, None, None]  # each plane a batch's item: torch shares these among threads
            found = F.grid_sample(
                source.expand(len(grid), -1, -1, -1, -1), grid, padding_mode=beyond, align_corners=True
            )
            total = found if total is None else total.add_(found)
        mean = total / len(points) if len(points) > 1 else total
        for into, found_of_channel in zip(flat, mean[:, :, 0, 0].transpose(0, 1).float().numpy(), strict=True):
            into[planes, where] = found_of_channel
    return out[0].T if isinstance(image, np.ndarray) else out.transpose(0, 3, 2, 1)


def reach(region: NDArray[np.bool_], to_image: NDArray[np.float64], shape: Triple) -> NDArray[np.bool_]:
    """The part of a new grid that a region [i, j, k] of an image reaches, when it is resampled.

    Returns:
        Which of the blocks of 4×4×4 voxels that the new grid has, [i / 4, j / 4, k / 4], with some around the region.
    """
    some = np.pad(region, [(0, -n % _BLOCK) for n in region.shape])
    for axis in (2, 1, 0):  # of an array as in files, most at first where that is fast
        lines = np.moveaxis(some, axis, 0)
        some = np.moveaxis(reduce(np.logical_or, [lines[first::_BLOCK] for first in range(_BLOCK)]), 0, axis)
    # [n, …]: in how many of the image's blocks before the n-th, along each axis, some of the region lies.
    before = np.pad(some.astype(np.int32).cumsum(0).cumsum(1).cumsum(2), [(1, 0)] * 3)
    low, high = _seen_from(np.indices(_blocks(shape)).reshape(3, -1), to_image)
    sizes = np.array(some.shape)[:, None]
    strides = np.array([[before.shape[1] * before.shape[2]], [before.shape[2]], [1]])
    ends = [np.clip(end, 0, sizes) * strides for end in (low // _BLOCK, high // _BLOCK + 1)]
    count = np.zeros(low.shape[1], np.int32)
    for corner in product((0, 1), repeat=3):  # of a box of blocks: what it holds, by inclusion and exclusion
        x, y, z = (ends[end][axis] for axis, end in enumerate(corner))
        count += (-1) ** (3 - sum(corner)) * before.ravel().take(x + y + z)
    return (count > 0).reshape(_blocks(shape))


def _blocks(shape: Sequence[int]) -> tuple[int, int, int]:
    """How many blocks a grid has along each axis."""
    i, j, k = (-(-n // _BLOCK) for n in shape)
    return i, j, k


def _seen_from(blocks: NDArray[Any], to_image: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first and the last voxel [3, n], of an image without end, on which blocks [3, n] of a new grid depend."""
    middles = blocks * _BLOCK + (_BLOCK - 1) / 2
    there = product_of(to_image[:3, :3], middles) + to_image[:3, 3:]
    # A new voxel's points lie half a voxel from its centre at most, and each depends on the voxels around it.
    far = np.abs(to_image[:3, :3]).sum(axis=1, keepdims=True) * _BLOCK / 2
    return np.floor(there - far).astype(np.int64), np.ceil(there + far).astype(np.int64)


def _seen(blocks: NDArray[np.bool_], to_image: NDArray[np.float64], shape: Sequence[int]) -> tuple[slice, ...]:
    """The part of an image on which some blocks of a new grid depend, two voxels at least along each axis."""
    where = np.array(blocks.nonzero())
    if not where.size:
        return tuple(slice(0, min(2, n)) for n in shape)
    low, high = _seen_from(where, to_image)
    starts = np.clip(low.min(axis=1), 0, np.maximum(np.asarray(shape) - 2, 0))
    return tuple(
        slice(int(start), int(min(max(last + 1, start + 2), n)))
        for start, last, n in zip(starts, high.max(axis=1), shape, strict=True)
    )


def _points_in_a_voxel(steps: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """Where in a new voxel the image is looked at: offsets from its centre, in voxels of the image [3]."""
    counts = [max(1, int(np.linalg.norm(step) + 0.5)) for step in steps]
    offsets = [(np.arange(count) + 0.5) / count - 0.5 for count in counts]
    for place in product(*offsets):
        yield np.asarray(place) @ steps
