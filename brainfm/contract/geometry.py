"""Operations that move voxels: turned, cropped, padded, resized, resampled.

What only picks, flips or reorders voxels works on views of the stored array, so that a crop costs nothing until the
first arithmetic needs the numbers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from brainfm.contract.operation import Operation, register_operation, times
from brainfm.contract.volume import (
    MOST_VOXELS,
    REGIONS,
    Region,
    Triple,
    Volume,
    axes_towards,
    check_shape,
    permute,
    pick,
)
from brainfm.errors import MissingExtraError, ScanError

# --- Geometry on views: voxels are picked, flipped or reordered, never changed --------------------


@register_operation
@dataclass(frozen=True)
class Reorient(Operation):
    """Flip and permute the axes so that they point along `axcodes`, such as "RAS" or "LAS"."""

    axcodes: str

    def __post_init__(self) -> None:
        super().__post_init__()
        axes_towards(np.eye(4), self.axcodes)

    def __call__(self, volume: Volume) -> Volume:
        axes, flips = axes_towards(volume.affine, self.axcodes)
        return pick(permute(volume, axes), tuple(slice(None, None, -1 if flip else 1) for flip in flips))

    def __str__(self) -> str:
        return f"turn the axes to {self.axcodes}"


@register_operation
@dataclass(frozen=True)
class Transpose(Operation):
    """Put the spatial axes in the order `axes`: (2, 1, 0) turns (x, y, z) into (z, y, x)."""

    axes: Triple

    def __post_init__(self) -> None:
        super().__post_init__()
        if sorted(self.axes) != [0, 1, 2]:
            raise ValueError(f"axes are 0, 1 and 2 in some order, not {self.axes}")

    def __call__(self, volume: Volume) -> Volume:
        return permute(volume, self.axes)

    def __str__(self) -> str:
        return f"put the axes in the order {self.axes}"


@register_operation
@dataclass(frozen=True)
class CropBox(Operation):
    """Keep the voxels `start` up to, not including, `stop` along each axis. A box that sticks out is a ScanError."""

    start: Triple
    stop: Triple

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 <= a < b for a, b in zip(self.start, self.stop, strict=True)):
            raise ValueError(f"a box begins at 0 or later and ends after that, not {self}")

    def __call__(self, volume: Volume) -> Volume:
        if not all(0 <= a < b <= n for a, b, n in zip(self.start, self.stop, volume.shape, strict=True)):
            raise ScanError(f"{self} does not fit in a volume of {volume.shape} voxels")
        return pick(volume, tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True)))

    def __str__(self) -> str:
        return "crop the fixed box [" + ", ".join(f"{a}:{b}" for a, b in zip(self.start, self.stop, strict=True)) + "]"


@register_operation
@dataclass(frozen=True)
class CropCenter(Operation):
    """Keep at most `shape` voxels around the centre; an axis that is already shorter stays as it is."""

    shape: Triple

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shape(self.shape, "the shape of a crop")

    def __call__(self, volume: Volume) -> Volume:
        sizes = [min(want, have) for want, have in zip(self.shape, volume.shape, strict=True)]
        starts = [(have - size) // 2 for have, size in zip(volume.shape, sizes, strict=True)]
        return pick(volume, tuple(slice(a, a + n) for a, n in zip(starts, sizes, strict=True)))

    def __str__(self) -> str:
        return f"crop the centre to at most {times(self.shape)} voxels"


@register_operation
@dataclass(frozen=True)
class CropForeground(Operation):
    """Crop to the smallest box that holds every voxel of `region`, in any channel.

    Attributes:
        region: What the box holds.
        margin: Voxels that it is longer at each end, as far as the volume goes.
    """

    region: Region = "nonzero"
    margin: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.margin < 0:
            raise ValueError(f"the margin of a box is 0 or more, not {self.margin}")

    def __call__(self, volume: Volume) -> Volume:
        found: NDArray[np.bool_] = np.asarray(volume.region(self.region).any(axis=0))
        box = []
        for axis in range(3):
            hits = np.flatnonzero(np.moveaxis(found, axis, 0).reshape(found.shape[axis], -1).any(axis=1))
            box.append(slice(max(0, int(hits[0]) - self.margin), int(hits[-1]) + 1 + self.margin))
        return pick(volume, tuple(box))

    def __str__(self) -> str:
        wider = f", {self.margin} voxels wider at each end" if self.margin else ""
        return f"crop to the bounding box of the {REGIONS[self.region]}{wider}"


@register_operation
@dataclass(frozen=True)
class CropToMultiple(Operation):
    """Crop the centre so that each size is the largest multiple of `divisors` that fits."""

    divisors: Triple

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shape(self.divisors, "the divisors' shape")

    def __call__(self, volume: Volume) -> Volume:
        shape = [have // divisor * divisor for have, divisor in zip(volume.shape, self.divisors, strict=True)]
        if 0 in shape:
            raise ScanError(f"a volume of {volume.shape} voxels is smaller than one multiple of {self.divisors}")
        return CropCenter((shape[0], shape[1], shape[2]))(volume)

    def __str__(self) -> str:
        return f"crop the centre to multiples of {self.divisors} voxels"


@register_operation
@dataclass(frozen=True)
class Pad(Operation):
    """Pad the centre out to at least `shape`; the odd voxel goes last.

    Attributes:
        shape: Voxels afterwards, at least.
        value: A number, each channel's "minimum", or what stands at the nearest "edge".
    """

    shape: Triple
    value: float | Literal["minimum", "edge"] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shape(self.shape, "the shape to pad to")

    def __call__(self, volume: Volume) -> Volume:
        extra = [max(0, want - have) for want, have in zip(self.shape, volume.shape, strict=True)]
        if not any(extra):
            return volume
        before = [n // 2 for n in extra]
        image = volume.image
        size = tuple(have + n for have, n in zip(volume.shape, extra, strict=True))
        inner = tuple(slice(a, a + have) for a, have in zip(before, volume.shape, strict=True))
        if self.value == "edge":
            ends = [(0, 0), *((a, n - a) for a, n in zip(before, extra, strict=True))]
            padded = np.pad(image, ends, mode="edge")
        else:
            fill = image.min(axis=(1, 2, 3), keepdims=True) if self.value == "minimum" else np.float32(self.value)
            padded = np.empty((len(image), *size), dtype=np.float32)
            padded[...] = fill
            padded[(slice(None), *inner)] = image
        mask = None
        if volume.mask is not None:
            mask = np.zeros(size, dtype=np.bool_)
            mask[inner] = volume.mask
        affine = volume.affine.copy()
        affine[:3, 3] -= affine[:3, :3] @ before
        return replace(volume, stored=padded, mask=mask, affine=affine, slope=1.0, inter=0.0)

    def __str__(self) -> str:
        value = "what stands at the edge" if self.value == "edge" else self.value
        return f"pad the centre to at least {times(self.shape)} voxels with {value}"


# --- Geometry that interpolates -------------------------------------------------------------------


@register_operation
@dataclass(frozen=True)
class Resize(Operation):
    """Resize the whole array to `shape`, whatever that does to the spacing; the mask follows by nearest neighbour.

    The modes are those of `torch.nn.functional.interpolate`, which keep the edges of the volume in place; "nearest" is
    its "nearest-exact". "nearest_corners" and "trilinear_corners" keep the centres of the first and last voxels in
    place instead, as `scipy.ndimage.zoom` of order 0 and 1 does.
    """

    shape: Triple
    mode: Literal["nearest", "nearest_corners", "trilinear", "trilinear_corners", "area"] = "trilinear"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shape(self.shape, "the shape to resize to")

    def __call__(self, volume: Volume) -> Volume:
        if self.mode.endswith("_corners"):
            return self._corners(volume)
        mode = "nearest-exact" if self.mode == "nearest" else self.mode
        return _regridded(volume, _interpolated(volume.image, self.shape, mode))

    def _corners(self, volume: Volume) -> Volume:
        steps = [(have - 1) / max(want - 1, 1) for have, want in zip(volume.shape, self.shape, strict=True)]
        picked = np.ix_(*(np.floor(s * np.arange(n) + 0.5).astype(int) for s, n in zip(steps, self.shape, strict=True)))
        affine = volume.affine.copy()
        affine[:3, :3] *= steps
        mask = None if volume.mask is None else volume.mask[picked]
        if self.mode == "nearest_corners":
            return replace(volume, stored=volume.stored[(slice(None), *picked)], mask=mask, affine=affine)
        image = _interpolated(volume.image, self.shape, "trilinear", align_corners=True)
        return replace(volume, stored=image, mask=mask, affine=affine, slope=1.0, inter=0.0)

    def __str__(self) -> str:
        return f"resize to {times(self.shape)} voxels ({self.mode})"


@register_operation
@dataclass(frozen=True)
class Resample(Operation):
    """Resample to `spacing` mm a voxel, by splines of `order` (0 nearest, 1 linear, 3 cubic). Needs SciPy ([eval]).

    Attributes:
        spacing: Millimetres a voxel.
        order: Of the splines; values beyond the edge repeat it.
        anti_alias: Smooth axes that get coarser first (Gaussian, σ = (ratio − 1) / 2 voxels, scikit-image's rule).
        half_width: With `anti_alias`, another rule: σ = ln(half_width) / π · ratio voxels, the kernel cut at 2.5 σ, and
            zeros beyond the edge (BrainFM: 5).
        keep: "edges": the edges of the volume stay in place and the size is size × old / new spacing, rounded, so that
            the new spacing is met only nearly (nnU-Net, scikit-image). "first_voxel": the centre of the first voxel
            stays, and the spacing is exact (MONAI's `Spacing`).
        clip: Clip to the range of the input, since cubic splines overshoot (scikit-image's default).
        slices_above: Where one axis alone has the coarsest spacing, and that is more than so many times the finest,
            it is resampled by nearest neighbour, after its slices, each clipped by itself (nnU-Net: 3). None never.
    """

    spacing: tuple[float, float, float]
    order: Literal[0, 1, 2, 3] = 1
    anti_alias: bool = False
    keep: Literal["edges", "first_voxel"] = "edges"
    clip: bool = False
    slices_above: float | None = None
    half_width: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.spacing) <= 0:
            raise ValueError(f"a spacing is above 0 mm, not {self.spacing}")
        if self.half_width is not None and self.half_width <= 1:
            raise ValueError(f"half_width is {self.half_width}, and must be above 1")

    def __call__(self, volume: Volume) -> Volume:
        ratio = np.asarray(self.spacing) / volume.spacing
        if np.allclose(ratio, 1, rtol=1e-6):
            return volume
        try:
            from scipy import ndimage
        except ModuleNotFoundError as error:
            raise MissingExtraError("scipy", "eval") from error
        have = np.asarray(volume.shape)
        size = np.rint((have - 1) / ratio + 1) if self.keep == "first_voxel" else np.maximum(1, np.rint(have / ratio))
        if math.prod(size) > MOST_VOXELS:
            raise ScanError(f"{volume.shape} voxels would become {times(tuple(size))}, too many: {self}")
        shape = tuple(int(n) for n in size)
        step = ratio if self.keep == "first_voxel" else have / size
        start = (step - 1) / 2 if self.keep == "edges" else np.zeros(3)

        def moved(channel: NDArray[Any], order: int, axes: Sequence[int] = (0, 1, 2)) -> NDArray[Any]:
            along = np.isin(np.arange(3), axes)
            to = tuple(np.where(along, shape, channel.shape))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The behavior of affine_transform")  # of a vector, SciPy before 1.16
                out: NDArray[Any] = ndimage.affine_transform(
                    channel, np.where(along, step, 1.0), np.where(along, start, 0.0), to, order=order, mode="nearest"
                )
            return out

        def new(channel: NDArray[Any]) -> NDArray[Any]:
            if self.anti_alias:
                channel = self._smoothed(channel, step)
            thick = self._slices(volume.spacing)
            if thick is None:
                out = moved(channel, self.order)
                return np.clip(out, channel.min(), channel.max()) if self.clip else out
            within = tuple(axis for axis in range(3) if axis != thick)
            out = moved(channel, self.order, within)
            if self.clip:
                out = np.clip(out, channel.min(axis=within, keepdims=True), channel.max(axis=within, keepdims=True))
            return moved(out, 0, (thick,))

        channels = [new(channel) for channel in volume.image]
        affine = volume.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ start
        affine[:3, :3] *= step
        mask = None if volume.mask is None else moved(volume.mask.astype(np.uint8), 0).astype(np.bool_)
        return replace(volume, stored=np.stack(channels), mask=mask, affine=affine, slope=1.0, inter=0.0)

    def _slices(self, spacing: NDArray[np.float64]) -> int | None:
        """The axis that is resampled by itself, if any."""
        if self.slices_above is None:
            return None
        for each in (spacing, np.asarray(self.spacing)):  # the scan's, or else the one it is brought to
            if each.max() > self.slices_above * each.min():
                coarsest = np.flatnonzero(each.max() / each < 1 + 1e-6)
                return int(coarsest[0]) if len(coarsest) == 1 else None
        return None

    def _smoothed(self, channel: NDArray[Any], ratio: NDArray[np.float64]) -> NDArray[Any]:
        from scipy import ndimage

        smooth: NDArray[Any]
        if self.half_width is None:
            smooth = ndimage.gaussian_filter(channel, np.maximum(0, (ratio - 1) / 2), mode="nearest")
            return smooth
        sigma = np.where(ratio > 1, math.log(self.half_width) / math.pi * ratio, 0)
        reach = [int(n) for n in np.ceil(2.5 * sigma)]
        smooth = ndimage.gaussian_filter(channel, sigma, mode="constant", radius=reach)
        return smooth

    def __str__(self) -> str:
        smooth = ", smoothed first where it gets coarser" if self.anti_alias else ""
        if self.anti_alias and self.half_width is not None:
            smooth += f" by ln({self.half_width:g})/π voxels of the new grid"
        clipped = ", clipped to the range of the input" if self.clip else ""
        place = "edges" if self.keep == "edges" else "first voxel"
        slices = f", slices {self.slices_above:g} times thicker by nearest neighbour" if self.slices_above else ""
        how = f"spline order {self.order}, {place} kept in place{smooth}{clipped}{slices}"
        return f"resample to {times(self.spacing)} mm ({how})"


# --- Shared -----------------------------------------------------------------------------------------


def _regridded(volume: Volume, image: NDArray[np.float32]) -> Volume:
    """The volume with `image`, which covers the same box with another number of voxels."""
    ratio = np.divide(volume.shape, image.shape[1:])
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ ((ratio - 1) / 2)
    affine[:3, :3] *= ratio
    mask = volume.mask
    if mask is not None:
        bytes_of_mask = np.ascontiguousarray(mask).view(np.uint8)[None]
        mask = _interpolated(bytes_of_mask, image.shape[1:], "nearest-exact")[0].astype(np.bool_)
    return replace(volume, stored=image, mask=mask, affine=affine, slope=1.0, inter=0.0)


def _interpolated(
    image: NDArray[Any], shape: tuple[int, ...], mode: str, align_corners: bool | None = None
) -> NDArray[Any]:
    """[C, *shape] of an image, by torch's interpolation; it takes no read-only memory."""
    import torch
    import torch.nn.functional as F

    source = torch.from_numpy(image if image.flags.writeable else image.copy())
    resized: NDArray[Any] = F.interpolate(source[None], shape, mode=mode, align_corners=align_corners)[0].numpy()
    return resized
