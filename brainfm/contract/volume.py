"""A volume: an image of one or more channels with its brain mask and its place in the world."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from brainfm.errors import ScanError

Region = Literal["all", "nonzero", "positive", "mask"]
Triple = tuple[int, int, int]

MOST_VOXELS = 2**29  # of anything that a contract asks for: a whole head at 0.5 mm, eight times over

REGIONS: dict[Region, str] = {
    "all": "whole array",
    "nonzero": "non-zero voxels",
    "positive": "voxels above 0",
    "mask": "brain mask",
}


@dataclass(frozen=True, eq=False)
class Volume:
    """An image of one or more channels with its brain mask and its place in the world.

    Attributes:
        stored: [C, i, j, k] voxels as the file holds them, before scaling; often a view onto it.
        mask: [i, j, k] booleans, True in the brain, or None.
        affine: [4, 4] from voxel indices to RAS millimetres.
        slope: The file's intensity scaling: real value = stored × slope + inter.
        inter: See `slope`; the intensity of a stored 0.
    """

    stored: NDArray[Any]
    mask: NDArray[np.bool_] | None
    affine: NDArray[np.float64]
    slope: float = 1.0
    inter: float = 0.0

    @property
    def image(self) -> NDArray[np.float32]:
        """Real intensities, [C, i, j, k] float32 in memory order; the stored array itself where it is that already."""
        return np.ascontiguousarray(self.intensities)

    @property
    def intensities(self) -> NDArray[np.float32]:
        """As `image`, but in the stored array's memory order: a view where that is float32 and not scaled."""
        stored = self.stored.astype(np.float32, copy=False)
        if (self.slope, self.inter) == (1.0, 0.0):
            return stored
        scaled: NDArray[np.float32] = np.multiply(stored, np.float32(self.slope))
        scaled += np.float32(self.inter)
        return scaled

    @property
    def shape(self) -> Triple:
        """Voxels along the three spatial axes."""
        i, j, k = self.stored.shape[1:]
        return i, j, k

    @property
    def spacing(self) -> NDArray[np.float64]:
        """Millimetres a voxel along the three axes."""
        spacing: NDArray[np.float64] = np.linalg.norm(self.affine[:3, :3], axis=0)
        return spacing

    def region(self, name: Region) -> NDArray[np.bool_]:
        """[C, i, j, k] booleans: where statistics are taken. Raises ScanError where a channel has no voxel there."""
        if name == "mask":
            if self.mask is None:
                raise ScanError("this input contract takes statistics in a brain mask, and there is none: pass mask=")
            chosen = np.broadcast_to(self.mask, self.stored.shape)
        elif name == "nonzero":
            chosen = not_zero(self.stored, self.slope, self.inter)
        elif name == "positive":
            chosen = self.image > 0
        else:
            chosen = np.ones(self.stored.shape, dtype=np.bool_)
        if not all(map(any_true, chosen)):
            raise ScanError(f"no voxel is left in the {REGIONS[name]} after the crop of the input contract")
        return chosen


def check_shape(shape: Triple, what: str) -> None:
    """Raise ValueError where no array has a shape, or none that a scan of a head can become."""
    if min(shape) < 1 or math.prod(shape) > MOST_VOXELS:
        raise ValueError(
            f"{what} is {shape}, and must be 1 or more voxels along each axis, together at most {MOST_VOXELS}"
        )


def any_true(region: NDArray[np.bool_]) -> bool:
    """Whether a voxel of [i, j, k] is True; looked for plane by plane, as the first planes with brain are enough."""
    return any(plane.any() for plane in region)


def not_zero(stored: NDArray[Any], slope: float, inter: float) -> NDArray[np.bool_]:
    """Where real intensities are not 0. Scaled integers hold 0 to the precision of their scaling only: half a step."""
    if inter == 0:
        return np.asarray(stored != 0)
    tolerance = 0.5 if stored.dtype.kind in "iu" else 0.0
    return np.asarray(np.abs(stored + np.float32(inter / slope)) > tolerance)


def permute(volume: Volume, axes: Triple) -> Volume:
    """The volume with its spatial axes in another order."""
    affine = volume.affine.copy()
    affine[:, :3] = affine[:, list(axes)]
    return replace(
        volume,
        stored=volume.stored.transpose(0, *(axis + 1 for axis in axes)),
        mask=None if volume.mask is None else volume.mask.transpose(axes),
        affine=affine,
    )


def pick(volume: Volume, box: tuple[slice, ...]) -> Volume:
    """The volume in a box, by slices of any step."""
    steps = [(s.indices(n)[0], s.indices(n)[2]) for s, n in zip(box, volume.shape, strict=True)]
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [start for start, _ in steps]
    affine[:3, :3] *= [step for _, step in steps]
    return replace(
        volume,
        stored=volume.stored[(slice(None), *box)],
        mask=None if volume.mask is None else volume.mask[box],
        affine=affine,
    )


def with_image(volume: Volume, image: NDArray[np.float32]) -> Volume:
    """The volume with other intensities on the same voxels.

    Args:
        volume: Whose voxels these are.
        image: [C, i, j, k] float32.

    Returns:
        A volume that is not scaled: `slope` 1 and `inter` 0.
    """
    return replace(volume, stored=image, slope=1.0, inter=0.0)


_DIRECTIONS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}


def axes_towards(affine: NDArray[np.float64], axcodes: str) -> tuple[Triple, tuple[bool, bool, bool]]:
    """Which stored axis becomes each axis of `axcodes`, and whether it has to be flipped.

    Raises:
        ValueError: `axcodes` is not three letters, one of each of R/L, A/P, S/I.
    """
    world = [_DIRECTIONS.get(code, (-1, 0)) for code in axcodes]
    if sorted(axis for axis, _ in world) != [0, 1, 2]:
        raise ValueError(f"axis codes must hold one each of R/L, A/P and S/I, not {axcodes!r}")
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    stored: list[int] = [-1, -1, -1]  # the stored axis that runs along each world axis
    remaining = np.abs(directions)
    for _ in range(3):
        along, axis = np.unravel_index(np.argmax(remaining), (3, 3))
        stored[int(along)] = int(axis)
        remaining[along, :] = -1
        remaining[:, axis] = -1
    first, second, third = (stored[along] for along, _ in world)
    flips = [bool(directions[along, stored[along]] * sign < 0) for along, sign in world]
    return (first, second, third), (flips[0], flips[1], flips[2])
