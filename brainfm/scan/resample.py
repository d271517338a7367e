"""Resample an image through an affine transform, once, by linear interpolation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from brainfm.contract.volume import Triple

_PLANES, _MOST_PLANES = 2, 8  # of the new image at a time, one a thread: coordinates take six times the voxels' memory
_BLOCK = 8  # voxels along each axis of the blocks by which `reach` knows a region


def resample(
    image: NDArray[Any] | Sequence[NDArray[Any]],
    to_image: NDArray[np.float64],
    shape: Triple,
    *,
    beyond: Literal["zeros", "border"] = "zeros",
    within: NDArray[np.int64] | None = None,
) -> NDArray[np.float32]:
    """The image on another grid: linear between the centres of its voxels, in float64.

    Where the new voxels are larger than the old ones (twice or more along an axis), each is the mean of as many points
    as old voxels fit in it along that axis: a single point would take the noise of one voxel for the whole.

    Args:
        image: [i, j, k], or several on the same voxels, which cost little more than one.
        to_image: [4, 4] from voxel indices of the new grid to those of the image.
        shape: Of the new grid.
        beyond: What lies beyond the image: "zeros", which the last half voxel fades into, or "border", its edge.
        within: The part of each plane k of the new grid that is wanted, as `reach` gives it, which takes so much less
            time; elsewhere it is 0.

    Returns:
        [*shape], or of several [C, *shape], float32, the first axis of space fastest, as in files.
    """
    import torch
    import torch.nn.functional as F

    channels = [image] if isinstance(image, np.ndarray) else image
    boxes = np.broadcast_to([[0, shape[0]], [0, shape[1]]], (shape[2], 2, 2)) if within is None else within
    seen = _seen(boxes, to_image, channels[0].shape)
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
    i, j, k = (torch.from_numpy(np.arange(n) * step[:, None]) for n, step in zip(shape, steps, strict=True))
    in_plane = (j[:, :, None] + i[:, None, :])[:, None]
    at_once = max(_PLANES, min(torch.get_num_threads(), _MOST_PLANES))
    for first in range(0, shape[2], at_once):
        planes = slice(first, first + at_once)
        rows, columns = _joined(boxes[planes])
        if rows.stop == rows.start:
            continue
        total: Any = None
        for point in points:
            start_of_plane = k[:, planes] + torch.from_numpy(start + point)[:, None]
            places = in_plane[:, :, rows, columns] + start_of_plane[:, :, None, None]
            grid = places.permute(1, 2, 3, 0)[:, None]  # each plane a batch's item: torch shares these among threads
            found = F.grid_sample(
                source.expand(len(grid), -1, -1, -1, -1), grid, padding_mode=beyond, align_corners=True
            )
            total = found if total is None else total.add_(found)
        mean = total / len(points) if len(points) > 1 else total
        out[:, planes, rows, columns] = mean[:, :, 0].transpose(0, 1).numpy()
    return out[0].T if isinstance(image, np.ndarray) else out.transpose(0, 3, 2, 1)


def reach(region: NDArray[np.bool_], to_image: NDArray[np.float64], shape: Triple) -> NDArray[np.int64]:
    """The part of a new grid that a region [i, j, k] of an image reaches, when it is resampled.

    Returns:
        [k, 2, 2]: of each plane of the new grid the first, and the one after the last, along i and along j; both 0
        where nothing is reached.
    """
    padded = np.pad(region, [(0, -n % _BLOCK) for n in region.shape])
    blocks = padded
    for axis in range(3):
        blocks = np.logical_or.reduceat(blocks, np.arange(0, padded.shape[axis], _BLOCK), axis=axis)
    middles = np.argwhere(blocks) * _BLOCK + (_BLOCK - 1) / 2
    back = np.linalg.inv(to_image)[:3]
    # A voxel reaches to the centres of its neighbours, and a new voxel's points half a voxel out of it.
    far = np.abs(back[:, :3]).sum(axis=1) * (_BLOCK + 1) / 2 + 0.5
    there = middles @ back[:, :3].T + back[:, 3]
    low = np.clip(np.floor(there - far), 0, shape).astype(np.int64)
    high = np.clip(np.ceil(there + far) + 1, 0, shape).astype(np.int64)
    found = np.zeros((shape[2], 2, 2), np.int64)
    for plane, box in enumerate(found):
        here = (low[:, 2] <= plane) & (plane < high[:, 2])
        if here.any():
            box[:, 0], box[:, 1] = low[here, :2].min(axis=0), high[here, :2].max(axis=0)
    return found


def _joined(boxes: NDArray[np.int64]) -> tuple[slice, slice]:
    """The rows (j) and columns (i) that hold the boxes of some planes."""
    some = boxes[(boxes[:, :, 0] < boxes[:, :, 1]).all(axis=1)]
    if not len(some):
        return slice(0, 0), slice(0, 0)
    (i, j), (i_end, j_end) = some[:, :, 0].min(axis=0), some[:, :, 1].max(axis=0)
    return slice(int(j), int(j_end)), slice(int(i), int(i_end))


def _seen(boxes: NDArray[np.int64], to_image: NDArray[np.float64], shape: Sequence[int]) -> tuple[slice, ...]:
    """The part of the image that lies under the boxes, with the voxels beside it, and two at least along each axis."""
    planes = np.flatnonzero((boxes[:, :, 0] < boxes[:, :, 1]).all(axis=1))
    if not len(planes):
        return tuple(slice(0, min(2, n)) for n in shape)
    rows, columns = _joined(boxes)
    ends = ((part.start - 0.5, part.stop - 0.5) for part in (columns, rows, slice(planes[0], planes[-1] + 1)))
    corners = np.array([(*corner, 1) for corner in product(*ends)]) @ to_image[:3].T
    low = np.floor(corners.min(axis=0)).astype(int) - 1
    high = np.ceil(corners.max(axis=0)).astype(int) + 2
    starts = np.clip(low, 0, np.maximum(np.asarray(shape) - 2, 0))
    return tuple(
        slice(int(start), int(min(max(stop, start + 2), n))) for start, stop, n in zip(starts, high, shape, strict=True)
    )


def _points_in_a_voxel(steps: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """Where in a new voxel the image is looked at: offsets from its centre, in voxels of the image [3]."""
    counts = [max(1, int(np.linalg.norm(step) + 0.5)) for step in steps]
    offsets = [(np.arange(count) + 0.5) / count - 0.5 for count in counts]
    for place in product(*offsets):
        yield np.asarray(place) @ steps
