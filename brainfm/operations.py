"""The vocabulary of input contracts: small typed operations on a volume, each a frozen dataclass that is data and acts.

An `InputSpec` (see `pretrained.py`) holds an ordered tuple of them; the order is part of the contract. An operation is
called with a `Volume` and returns another. Geometry that only picks, flips or reorders voxels works on views of the
stored array, so that a crop costs nothing until the first arithmetic needs the numbers.

To add one: write a dataclass here with `__call__` and `__str__`, decorate it with `@_operation`, and test it against a
few lines of plain numpy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from types import UnionType
from typing import Any, Literal, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from brainfm.errors import MissingExtraError, ScanError

Region = Literal["all", "nonzero", "positive", "mask"]
Triple = tuple[int, int, int]

_BLOCK = 2**16  # voxels

_REGIONS: dict[Region, str] = {
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
        inter: See `slope`.
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
            raise ScanError(f"no voxel is left in the {_REGIONS[name]} after the crop of the input contract")
        return chosen


def any_true(region: NDArray[np.bool_]) -> bool:
    """Whether a voxel of [i, j, k] is True; looked for plane by plane, as the first planes with brain are enough."""
    return any(plane.any() for plane in region)


def not_zero(stored: NDArray[Any], slope: float, inter: float) -> NDArray[np.bool_]:
    """Where real intensities are not 0. Scaled integers hold 0 to the precision of their scaling only: half a step."""
    if inter == 0:
        return np.asarray(stored != 0)
    tolerance = 0.5 if stored.dtype.kind in "iu" else 0.0
    return np.asarray(np.abs(stored + np.float32(inter / slope)) > tolerance)


@runtime_checkable
class Operation(Protocol):
    """What every operation is: a frozen dataclass, called with a volume; its string says what it does."""

    def __call__(self, volume: Volume) -> Volume:
        """Return the changed volume; the given one stays as it was."""
        ...


T = TypeVar("T")
_BY_NAME: dict[str, Any] = {}


def _operation(cls: type[T]) -> type[T]:
    _BY_NAME[cls.__name__] = cls
    return cls


class Checked:
    """A dataclass whose fields hold what their types say: a word that means nothing is an error, not a default.

    Lists become tuples, so that data from JSON equals data from Python. Raises ValueError.
    """

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, item.name, value)
            if not _fits(value, hints[item.name]):
                name = type(self).__name__
                raise ValueError(f"{name}: {item.name} is {value!r}, and must be {_words(hints[item.name])}")


def _fits(value: Any, hint: Any) -> bool:
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if kind in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is tuple:
        if not isinstance(value, tuple):
            return False
        if parts[-1] is Ellipsis:
            return all(_fits(item, parts[0]) for item in value)
        return len(value) == len(parts) and all(_fits(item, part) for item, part in zip(value, parts, strict=True))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Literal:
        return " or ".join(map(repr, parts))
    if kind in (Union, UnionType):
        return " or ".join(_words(part) for part in parts)
    if kind is tuple:
        return "a tuple of " + (f"{_words(parts[0])}s" if parts[-1] is Ellipsis else ", ".join(map(_words, parts)))
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))


def operation_to_dict(operation: Operation) -> dict[str, Any]:
    """The operation as JSON-ready data: its class under "op", then its parameters."""
    values = {f.name: getattr(operation, f.name) for f in fields(operation)}  # type: ignore[arg-type]
    return {"op": type(operation).__name__} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def operation_from_dict(data: Mapping[str, Any]) -> Operation:
    """The operation that `operation_to_dict` described. Raises ValueError for an unknown name or a wrong parameter."""
    parameters = dict(data)
    name = parameters.pop("op", None)
    if not isinstance(name, str) or name not in _BY_NAME:
        raise ValueError(f"unknown operation {name!r} in an input contract; known: {', '.join(sorted(_BY_NAME))}")
    known = {f.name: f for f in fields(_BY_NAME[name])}
    if unknown := sorted(set(parameters) - set(known)):
        raise ValueError(f"operation {name} has no parameter {', '.join(unknown)}")
    if lacking := [key for key, f in known.items() if f.default is MISSING and key not in parameters]:
        raise ValueError(f"operation {name} lacks its parameter {', '.join(lacking)}")
    operation: Operation = _BY_NAME[name](**parameters)
    return operation


# --- Geometry on views: voxels are picked, flipped or reordered, never changed --------------------


@_operation
@dataclass(frozen=True)
class Reorient(Checked):
    """Flip and permute the axes so that they point along `axcodes`, such as "RAS" or "LAS"."""

    axcodes: str

    def __post_init__(self) -> None:
        super().__post_init__()
        axes_towards(np.eye(4), self.axcodes)

    def __call__(self, volume: Volume) -> Volume:
        axes, flips = axes_towards(volume.affine, self.axcodes)
        return _pick(_permute(volume, axes), tuple(slice(None, None, -1 if flip else 1) for flip in flips))

    def __str__(self) -> str:
        return f"turn the axes to {self.axcodes}"


@_operation
@dataclass(frozen=True)
class Transpose(Checked):
    """Put the spatial axes in the order `axes`: (2, 1, 0) turns (x, y, z) into (z, y, x)."""

    axes: Triple

    def __call__(self, volume: Volume) -> Volume:
        return _permute(volume, self.axes)

    def __str__(self) -> str:
        return f"put the axes in the order {self.axes}"


@_operation
@dataclass(frozen=True)
class CropBox(Checked):
    """Keep the voxels `start` up to, not including, `stop` along each axis. A box that sticks out is a ScanError."""

    start: Triple
    stop: Triple

    def __call__(self, volume: Volume) -> Volume:
        if not all(0 <= a < b <= n for a, b, n in zip(self.start, self.stop, volume.shape, strict=True)):
            raise ScanError(f"{self} does not fit in a volume of {volume.shape} voxels")
        return _pick(volume, tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True)))

    def __str__(self) -> str:
        return "crop the fixed box [" + ", ".join(f"{a}:{b}" for a, b in zip(self.start, self.stop, strict=True)) + "]"


@_operation
@dataclass(frozen=True)
class CropCenter(Checked):
    """Keep at most `shape` voxels around the centre; an axis that is already shorter stays as it is."""

    shape: Triple

    def __call__(self, volume: Volume) -> Volume:
        sizes = [min(want, have) for want, have in zip(self.shape, volume.shape, strict=True)]
        starts = [(have - size) // 2 for have, size in zip(volume.shape, sizes, strict=True)]
        return _pick(volume, tuple(slice(a, a + n) for a, n in zip(starts, sizes, strict=True)))

    def __str__(self) -> str:
        return f"crop the centre to at most {_times(self.shape)} voxels"


@_operation
@dataclass(frozen=True)
class CropForeground(Checked):
    """Crop to the smallest box that holds every voxel of `region`, in any channel."""

    region: Region = "nonzero"

    def __call__(self, volume: Volume) -> Volume:
        found: NDArray[np.bool_] = np.asarray(volume.region(self.region).any(axis=0))
        box = []
        for axis in range(3):
            hits = np.flatnonzero(np.moveaxis(found, axis, 0).reshape(found.shape[axis], -1).any(axis=1))
            box.append(slice(int(hits[0]), int(hits[-1]) + 1))
        return _pick(volume, tuple(box))

    def __str__(self) -> str:
        return f"crop to the bounding box of the {_REGIONS[self.region]}"


@_operation
@dataclass(frozen=True)
class CropToMultiple(Checked):
    """Crop the centre so that each size is the largest multiple of `divisors` that fits."""

    divisors: Triple

    def __call__(self, volume: Volume) -> Volume:
        shape = [have // divisor * divisor for have, divisor in zip(volume.shape, self.divisors, strict=True)]
        if 0 in shape:
            raise ScanError(f"a volume of {volume.shape} voxels is smaller than one multiple of {self.divisors}")
        return CropCenter((shape[0], shape[1], shape[2]))(volume)

    def __str__(self) -> str:
        return f"crop the centre to multiples of {self.divisors} voxels"


@_operation
@dataclass(frozen=True)
class Pad(Checked):
    """Pad the centre out to at least `shape`, with a number or with each channel's minimum; the odd voxel goes last."""

    shape: Triple
    value: float | Literal["minimum"] = 0.0

    def __call__(self, volume: Volume) -> Volume:
        extra = [max(0, want - have) for want, have in zip(self.shape, volume.shape, strict=True)]
        if not any(extra):
            return volume
        before = [n // 2 for n in extra]
        image = volume.image
        size = tuple(have + n for have, n in zip(volume.shape, extra, strict=True))
        inner = tuple(slice(a, a + have) for a, have in zip(before, volume.shape, strict=True))
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
        return f"pad the centre to at least {_times(self.shape)} voxels with {self.value}"


# --- Geometry that interpolates -------------------------------------------------------------------


@_operation
@dataclass(frozen=True)
class Resize(Checked):
    """Resize the whole array to `shape`, whatever that does to the spacing; the mask follows by nearest neighbour.

    The modes are those of `torch.nn.functional.interpolate`, which keep the edges of the volume in place; "nearest" is
    its "nearest-exact". "nearest_corners" keeps the centres of the first and last voxels in place instead, as
    `scipy.ndimage.zoom(order=0)` does.
    """

    shape: Triple
    mode: Literal["nearest", "nearest_corners", "trilinear", "area"] = "trilinear"

    def __call__(self, volume: Volume) -> Volume:
        if self.mode == "nearest_corners":
            return self._corners(volume)
        mode = "nearest-exact" if self.mode == "nearest" else self.mode
        image = F.interpolate(_tensor(volume.image)[None], self.shape, mode=mode)[0].numpy()
        return _regridded(volume, image)

    def _corners(self, volume: Volume) -> Volume:
        steps = [(have - 1) / max(want - 1, 1) for have, want in zip(volume.shape, self.shape, strict=True)]
        picked = np.ix_(*(np.floor(s * np.arange(n) + 0.5).astype(int) for s, n in zip(steps, self.shape, strict=True)))
        affine = volume.affine.copy()
        affine[:3, :3] *= steps
        mask = None if volume.mask is None else volume.mask[picked]
        return replace(volume, stored=volume.stored[(slice(None), *picked)], mask=mask, affine=affine)

    def __str__(self) -> str:
        return f"resize to {_times(self.shape)} voxels ({self.mode})"


@_operation
@dataclass(frozen=True)
class Resample(Checked):
    """Resample to `spacing` mm a voxel, by splines of `order` (0 nearest, 1 linear, 3 cubic). Needs SciPy ([eval]).

    Attributes:
        spacing: Millimetres a voxel.
        order: Of the splines; values beyond the edge repeat it.
        anti_alias: Smooth axes that get coarser first (Gaussian, σ = (ratio − 1) / 2 voxels, scikit-image's rule).
        keep: "edges": the edges of the volume stay in place and the size is size × old / new spacing, rounded, so that
            the new spacing is met only nearly (nnU-Net, scikit-image). "first_voxel": the centre of the first voxel
            stays, and the spacing is exact (MONAI's `Spacing`).
        clip: Clip to the range of the input, since cubic splines overshoot (scikit-image's default).
    """

    spacing: tuple[float, float, float]
    order: Literal[0, 1, 2, 3] = 1
    anti_alias: bool = False
    keep: Literal["edges", "first_voxel"] = "edges"
    clip: bool = False

    def __call__(self, volume: Volume) -> Volume:
        try:
            from scipy import ndimage
        except ModuleNotFoundError as error:
            raise MissingExtraError("scipy", "eval") from error
        ratio = np.asarray(self.spacing) / volume.spacing
        if np.allclose(ratio, 1, rtol=1e-6):
            return volume
        have = np.asarray(volume.shape)
        size = np.rint((have - 1) / ratio + 1) if self.keep == "first_voxel" else np.maximum(1, np.rint(have / ratio))
        shape = tuple(int(n) for n in size)
        step = ratio if self.keep == "first_voxel" else have / size
        start = (step - 1) / 2 if self.keep == "edges" else np.zeros(3)

        def moved(channel: NDArray[Any], order: int) -> NDArray[Any]:
            out: NDArray[Any] = ndimage.affine_transform(channel, step, start, shape, order=order, mode="nearest")
            return out

        channels = []
        for channel in volume.image:
            low, high = channel.min(), channel.max()
            if self.anti_alias:
                channel = ndimage.gaussian_filter(channel, np.maximum(0, (step - 1) / 2), mode="nearest")
            new = moved(channel, self.order)
            channels.append(np.clip(new, low, high) if self.clip else new)
        affine = volume.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ start
        affine[:3, :3] *= step
        mask = None if volume.mask is None else moved(volume.mask.astype(np.uint8), 0).astype(np.bool_)
        return replace(volume, stored=np.stack(channels), mask=mask, affine=affine, slope=1.0, inter=0.0)

    def __str__(self) -> str:
        smooth = ", smoothed first where it gets coarser" if self.anti_alias else ""
        clipped = ", clipped to the range of the input" if self.clip else ""
        place = "edges" if self.keep == "edges" else "first voxel"
        return (
            f"resample to {_times(self.spacing)} mm (spline order {self.order}, {place} kept in place{smooth}{clipped})"
        )


# --- Intensities ----------------------------------------------------------------------------------


@_operation
@dataclass(frozen=True)
class Clip(Checked):
    """Clip to [low, high]: intensities, or with `percentiles` each channel's percentiles over `region`."""

    low: float
    high: float
    percentiles: bool = False
    region: Region = "all"

    def __call__(self, volume: Volume) -> Volume:
        image = volume.image
        if not self.percentiles:
            return _with_image(volume, np.clip(image, np.float32(self.low), np.float32(self.high)))
        chosen = volume.region(self.region)
        limits = [np.percentile(c[r], (self.low, self.high)) for c, r in zip(image, chosen, strict=True)]
        clipped = [np.clip(c, *limit.astype(np.float32)) for c, limit in zip(image, limits, strict=True)]
        return _with_image(volume, np.stack(clipped))

    def __str__(self) -> str:
        if self.percentiles:
            return f"clip to the {self.low}–{self.high} percentiles of the {_REGIONS[self.region]}"
        return f"clip to {self.low}…{self.high}"


@_operation
@dataclass(frozen=True)
class ZScore(Checked):
    """Subtract the mean and divide by the standard deviation over `region`.

    Attributes:
        region: Where mean and spread are taken.
        eps: A small number that keeps the divisor from zero, used as `eps_rule` says.
        eps_rule: "under_root": √(variance + eps); "added": spread + eps; "floor": max(spread, eps); "one_if_zero": a
            spread of 0 becomes 1 (`eps` unused); "none": a spread of 0 is a ScanError.
        ddof: 0 for the population's variance, 1 for the sample's.
        per_channel: Each channel by itself, or all with one mean and spread.
        background: Voxels outside `region` afterwards: "keep" (shifted and scaled like the rest), "zero", or "noise"
            (standard normal, seeded by 0: the same for every scan).
        method: "two_pass" (default) takes both moments in float64, the variance about the mean. "one_pass" is the
            released 3D-Neuro-SimCLR code's float32 E[x²] − E[x]²: it loses digits where the mean is large against the
            spread, and is here to reproduce that code; the two agree to 1e-5 on T1w scans.
        background_is: What counts as background: the voxels "outside" the region, or those that were "zero" before.
    """

    region: Region = "all"
    eps: float = 0.0
    eps_rule: Literal["under_root", "added", "floor", "one_if_zero", "none"] = "none"
    ddof: Literal[0, 1] = 0
    per_channel: bool = True
    background: Literal["keep", "zero", "noise"] = "keep"
    method: Literal["two_pass", "one_pass"] = "two_pass"
    background_is: Literal["outside", "zero"] = "outside"

    def __call__(self, volume: Volume) -> Volume:
        image = volume.intensities
        chosen = volume.region(self.region)
        if self.background == "noise":
            out = np.random.default_rng(0).standard_normal(image.shape, dtype=np.float32)
        else:
            out = np.zeros(image.shape, dtype=np.float32)
        by_zeros = self.background != "keep" and self.background_is == "zero"
        kept = volume.region("nonzero") if by_zeros else chosen
        groups = [slice(c, c + 1) for c in range(len(image))] if self.per_channel else [slice(None)]
        for group in groups:
            inside = image[group][chosen[group]]
            mean, spread = map(np.float32, self._moments(image[group], chosen[group], inside))
            if self.background == "keep":
                np.subtract(image[group], mean, out=out[group])
                out[group] /= spread
            else:
                values = inside if kept is chosen else image[group][kept[group]]
                values -= mean
                values /= spread
                out[group][kept[group]] = values
        return _with_image(volume, out)

    def _moments(
        self, image: NDArray[np.float32], chosen: NDArray[np.bool_], inside: NDArray[np.float32]
    ) -> tuple[float, float]:
        """The mean of the voxels `inside`, which are those of `image` that are `chosen`, and what to divide by."""
        count = inside.size
        if count <= self.ddof:
            raise ScanError(f"one voxel in the {_REGIONS[self.region]} has no sample spread")
        if self.method == "one_pass":
            values = torch.from_numpy(np.multiply(image, chosen, order="C"))
            mean = values.sum() / count
            variance = float(((values * values).sum() / count - mean * mean).clamp(min=0)) * count / (count - self.ddof)
            return float(mean), self._divisor(variance)
        # About the first block's mean, then corrected: with n blocks it is at most √n spreads off, which costs float64
        # two digits. Blocks stay in the processor's cache, and the BLAS behind @ would set threads of its own spinning.
        near = float(inside[:_BLOCK].mean(dtype=np.float64))
        total = squares = 0.0
        for at in range(0, count, _BLOCK):
            block = inside[at : at + _BLOCK].astype(np.float64)
            block -= near
            total += float(block.sum())
            squares += float(np.einsum("i,i->", block, block))
        return near + total / count, self._divisor(max(0.0, squares - total**2 / count) / (count - self.ddof))

    def _divisor(self, variance: float) -> float:
        spread = math.sqrt(variance)
        divisor = {
            "under_root": math.sqrt(variance + self.eps),
            "added": spread + self.eps,
            "floor": max(spread, self.eps),
            "one_if_zero": spread or 1.0,
            "none": spread,
        }[self.eps_rule]
        if divisor == 0:
            raise ScanError(f"the {_REGIONS[self.region]} holds one intensity only: a z-score divides by zero")
        return divisor

    def __str__(self) -> str:
        rule = {
            "under_root": f", {self.eps:.12g} added to the variance",
            "added": f", {self.eps:.12g} added to the spread",
            "floor": f", spread at least {self.eps:.12g}",
            "one_if_zero": ", a spread of 0 taken as 1",
            "none": "",
        }[self.eps_rule]
        where = "elsewhere" if self.background_is == "outside" else "where it was 0"
        rest = {"keep": "", "zero": f", 0 {where}", "noise": f", seeded noise {where}"}[self.background]
        each = "" if self.per_channel else " over all channels together"
        kind = "sample" if self.ddof else "population"
        how = " [upstream's float32 one-pass formula]" if self.method == "one_pass" else ""
        return f"z-score over the {_REGIONS[self.region]}{each} ({kind} spread{rule}){rest}{how}"


@_operation
@dataclass(frozen=True)
class DivideByMean(Checked):
    """Divide each channel by its mean over `region`. A mean of 0 is a ScanError."""

    region: Region = "all"

    def __call__(self, volume: Volume) -> Volume:
        image = volume.image
        chosen = volume.region(self.region)
        means = [float(c[r].mean(dtype=np.float64)) for c, r in zip(image, chosen, strict=True)]
        if 0.0 in means:
            raise ScanError(f"the mean of the {_REGIONS[self.region]} is 0: the input contract divides by it")
        return _with_image(volume, image / np.array(means, dtype=np.float32)[:, None, None, None])

    def __str__(self) -> str:
        return f"divide by the mean of the {_REGIONS[self.region]}"


@_operation
@dataclass(frozen=True)
class MinMax(Checked):
    """Move the intensities of `region` linearly onto 0…1. A constant image is a ScanError."""

    region: Region = "all"
    per_channel: bool = True

    def __call__(self, volume: Volume) -> Volume:
        image = volume.image
        chosen = volume.region(self.region)
        axes = (1, 2, 3) if self.per_channel else None
        low = np.min(image, axis=axes, keepdims=True, where=chosen, initial=np.inf)
        high = np.max(image, axis=axes, keepdims=True, where=chosen, initial=-np.inf)
        if not (high > low).all():
            raise ScanError("the image has one intensity only: it cannot be scaled to 0…1")
        return _with_image(volume, (image - low) / (high - low))

    def __str__(self) -> str:
        return f"scale the {_REGIONS[self.region]} to 0…1" + ("" if self.per_channel else ", all channels together")


@_operation
@dataclass(frozen=True)
class Standardize(Checked):
    """Subtract a fixed `mean` and divide by a fixed `std`, such as those of a training set."""

    mean: float
    std: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.std <= 0:
            raise ValueError(f"Standardize: std is {self.std}, and must be above 0")

    def __call__(self, volume: Volume) -> Volume:
        return _with_image(volume, (volume.image - np.float32(self.mean)) / np.float32(self.std))

    def __str__(self) -> str:
        return f"subtract {self.mean:.12g} and divide by {self.std:.12g}"


# --- Shared geometry ------------------------------------------------------------------------------

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


def _permute(volume: Volume, axes: Triple) -> Volume:
    affine = volume.affine.copy()
    affine[:, :3] = affine[:, list(axes)]
    return replace(
        volume,
        stored=volume.stored.transpose(0, *(axis + 1 for axis in axes)),
        mask=None if volume.mask is None else volume.mask.transpose(axes),
        affine=affine,
    )


def _pick(volume: Volume, box: tuple[slice, ...]) -> Volume:
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


def _with_image(volume: Volume, image: NDArray[np.float32]) -> Volume:
    return replace(volume, stored=image, slope=1.0, inter=0.0)


def _regridded(volume: Volume, image: NDArray[np.float32]) -> Volume:
    """The volume with `image`, which covers the same box with another number of voxels."""
    ratio = np.divide(volume.shape, image.shape[1:])
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ ((ratio - 1) / 2)
    affine[:3, :3] *= ratio
    mask = volume.mask
    if mask is not None:
        soft = _tensor(np.ascontiguousarray(mask)).to(torch.uint8)[None, None]
        mask = F.interpolate(soft, image.shape[1:], mode="nearest-exact")[0, 0].numpy().astype(np.bool_)
    return replace(volume, stored=image, mask=mask, affine=affine, slope=1.0, inter=0.0)


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    """The array as a tensor, without a copy where torch can have it so: it takes no read-only memory."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _times(values: tuple[float, ...]) -> str:
    return "×".join(f"{value:.12g}" for value in values)
