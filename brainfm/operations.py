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
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol, TypeVar, get_args, get_type_hints, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from brainfm.errors import MissingExtraError, ScanError

Region = Literal["all", "nonzero", "positive", "mask"]
Triple = tuple[int, int, int]


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
        """Real intensities, [C, i, j, k] float32; a copy only where scaling, type or memory order ask for one."""
        image = np.ascontiguousarray(self.stored, dtype=np.float32)
        if (self.slope, self.inter) == (1.0, 0.0):
            return image
        scaled: NDArray[np.float32] = np.multiply(image, np.float32(self.slope))
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

    def region(self, name: Region, image: NDArray[np.float32]) -> NDArray[np.bool_]:
        """[C, i, j, k] booleans: where statistics of `image` are taken. Raises ScanError where the region is empty."""
        if name == "mask":
            if self.mask is None:
                raise ScanError(
                    "this input contract takes statistics inside a brain mask, and there is none: pass mask="
                )
            chosen = np.broadcast_to(self.mask, image.shape)
        elif name == "nonzero":
            chosen = image != 0
        elif name == "positive":
            chosen = image > 0
        else:
            chosen = np.ones(image.shape, dtype=np.bool_)
        if not chosen.any():
            raise ScanError(f"no voxel is left in the region '{name}' after the crop of the input contract")
        return chosen


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


def operation_to_dict(operation: Operation) -> dict[str, Any]:
    """The operation as JSON-ready data: its class under "op", then its parameters."""
    values = {f.name: getattr(operation, f.name) for f in fields(operation)}  # type: ignore[arg-type]
    return {"op": type(operation).__name__} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def operation_from_dict(data: Mapping[str, Any]) -> Operation:
    """The operation that `operation_to_dict` described. Raises ValueError for an unknown name or parameter."""
    parameters = dict(data)
    name = parameters.pop("op", None)
    if name not in _BY_NAME:
        raise ValueError(
            f"unknown operation {name!r} in an input contract; brainfm knows {', '.join(sorted(_BY_NAME))}"
        )
    cls = _BY_NAME[name]
    unknown = set(parameters) - {f.name for f in fields(cls)}
    if unknown:
        raise ValueError(f"operation {name} has no parameter {', '.join(sorted(unknown))}")
    hints = get_type_hints(cls)
    for key, value in parameters.items():
        if isinstance(value, list):
            parameters[key] = tuple(value)
        choices = _literal_choices(hints[key])
        if (
            choices
            and not isinstance(value, list)
            and value not in choices
            and not _is_number_allowed(hints[key], value)
        ):
            raise ValueError(
                f"operation {name}: {key} is {value!r}, and must be one of {', '.join(map(repr, choices))}"
            )
    operation: Operation = cls(**parameters)
    return operation


def _literal_choices(hint: Any) -> tuple[Any, ...]:
    if getattr(hint, "__origin__", None) is Literal:
        return get_args(hint)
    return tuple(choice for part in get_args(hint) for choice in _literal_choices(part))


def _is_number_allowed(hint: Any, value: Any) -> bool:
    return float in get_args(hint) and isinstance(value, int | float)


# --- Geometry on views: voxels are picked, flipped or reordered, never changed --------------------


@_operation
@dataclass(frozen=True)
class Reorient:
    """Flip and permute the axes so that they point along `axcodes`, such as "RAS" or "LAS"."""

    axcodes: str

    def __call__(self, volume: Volume) -> Volume:
        axes, flips = axes_towards(volume.affine, self.axcodes)
        return _pick(_permute(volume, axes), tuple(slice(None, None, -1 if flip else 1) for flip in flips))

    def __str__(self) -> str:
        return f"turn the axes to {self.axcodes}"


@_operation
@dataclass(frozen=True)
class Transpose:
    """Put the spatial axes in the order `axes`: (2, 1, 0) turns (x, y, z) into (z, y, x)."""

    axes: Triple

    def __call__(self, volume: Volume) -> Volume:
        return _permute(volume, self.axes)

    def __str__(self) -> str:
        return f"put the axes in the order {self.axes}"


@_operation
@dataclass(frozen=True)
class CropBox:
    """Keep the voxels `start` up to, not including, `stop` along each axis. A box that sticks out is a ScanError."""

    start: Triple
    stop: Triple

    def __call__(self, volume: Volume) -> Volume:
        if any(high > size for high, size in zip(self.stop, volume.shape, strict=True)):
            raise ScanError(f"the fixed crop up to {self.stop} does not fit in a volume of {volume.shape} voxels")
        return _pick(volume, tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True)))

    def __str__(self) -> str:
        return "crop the fixed box [" + ", ".join(f"{a}:{b}" for a, b in zip(self.start, self.stop, strict=True)) + "]"


@_operation
@dataclass(frozen=True)
class CropCenter:
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
class CropForeground:
    """Crop to the smallest box that holds every voxel of `region`, in any channel."""

    region: Region = "nonzero"

    def __call__(self, volume: Volume) -> Volume:
        found: NDArray[np.bool_] = np.asarray(volume.region(self.region, volume.image).any(axis=0))
        box = []
        for axis in range(3):
            hits = np.flatnonzero(np.moveaxis(found, axis, 0).reshape(found.shape[axis], -1).any(axis=1))
            box.append(slice(int(hits[0]), int(hits[-1]) + 1))
        return _pick(volume, tuple(box))

    def __str__(self) -> str:
        return f"crop to the bounding box of the {_region_words(self.region)}"


@_operation
@dataclass(frozen=True)
class CropToMultiple:
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
class Pad:
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
class Resize:
    """Resize the whole array to `shape`, whatever that does to the spacing; the mask follows by nearest neighbour.

    The modes are those of `torch.nn.functional.interpolate` ("nearest" is its "nearest-exact": voxel centres are kept).
    """

    shape: Triple
    mode: Literal["nearest", "trilinear", "area"] = "trilinear"

    def __call__(self, volume: Volume) -> Volume:
        mode = "nearest-exact" if self.mode == "nearest" else self.mode
        image = F.interpolate(torch.from_numpy(volume.image)[None], self.shape, mode=mode)[0].numpy()
        return _regridded(volume, image)

    def __str__(self) -> str:
        return f"resize to {_times(self.shape)} voxels ({self.mode})"


@_operation
@dataclass(frozen=True)
class Resample:
    """Resample to `spacing` mm a voxel by splines of `order` (0 nearest, 1 linear, 3 cubic), the edges kept in place.

    The new size along an axis is size × old spacing / new spacing, rounded; values beyond the edge repeat it. With
    `anti_alias`, axes that get coarser are smoothed first (Gaussian, σ = (ratio − 1) / 2 voxels, scikit-image's rule).
    Needs SciPy, which comes with the extra [eval].
    """

    spacing: tuple[float, float, float]
    order: Literal[0, 1, 2, 3] = 1
    anti_alias: bool = False

    def __call__(self, volume: Volume) -> Volume:
        try:
            from scipy import ndimage
        except ModuleNotFoundError as error:
            raise MissingExtraError("scipy", "eval") from error
        shape = [
            max(1, round(have * old / new))
            for have, old, new in zip(volume.shape, volume.spacing, self.spacing, strict=True)
        ]
        if tuple(shape) == volume.shape:
            return volume
        zoom = [new / have for new, have in zip(shape, volume.shape, strict=True)]
        channels = []
        for channel in volume.image:
            if self.anti_alias:
                channel = ndimage.gaussian_filter(channel, [max(0.0, (1 / z - 1) / 2) for z in zoom], mode="nearest")
            channels.append(ndimage.zoom(channel, zoom, order=self.order, mode="nearest", grid_mode=True))
        return _regridded(volume, np.stack(channels).astype(np.float32, copy=False))

    def __str__(self) -> str:
        smooth = ", smoothed first where it gets coarser" if self.anti_alias else ""
        return f"resample to {_times(self.spacing)} mm (spline order {self.order}{smooth})"


# --- Intensities ----------------------------------------------------------------------------------


@_operation
@dataclass(frozen=True)
class Clip:
    """Clip to [low, high]: intensities, or with `percentiles` each channel's percentiles over `region`."""

    low: float
    high: float
    percentiles: bool = False
    region: Region = "all"

    def __call__(self, volume: Volume) -> Volume:
        image = volume.image
        if not self.percentiles:
            return _with_image(volume, np.clip(image, np.float32(self.low), np.float32(self.high)))
        chosen = volume.region(self.region, image)
        limits = [np.percentile(c[r], (self.low, self.high)) for c, r in zip(image, chosen, strict=True)]
        clipped = [np.clip(c, *limit.astype(np.float32)) for c, limit in zip(image, limits, strict=True)]
        return _with_image(volume, np.stack(clipped))

    def __str__(self) -> str:
        if self.percentiles:
            return f"clip to the {self.low}–{self.high} percentiles of the {_region_words(self.region)}"
        return f"clip to {self.low}…{self.high}"


@_operation
@dataclass(frozen=True)
class ZScore:
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
    """

    region: Region = "all"
    eps: float = 0.0
    eps_rule: Literal["under_root", "added", "floor", "one_if_zero", "none"] = "none"
    ddof: Literal[0, 1] = 0
    per_channel: bool = True
    background: Literal["keep", "zero", "noise"] = "keep"
    method: Literal["two_pass", "one_pass"] = "two_pass"

    def __call__(self, volume: Volume) -> Volume:
        image = volume.image
        chosen = volume.region(self.region, image)
        out = np.empty_like(image)
        groups = [slice(c, c + 1) for c in range(len(image))] if self.per_channel else [slice(None)]
        for group in groups:
            mean, spread = self._moments(image[group], chosen[group])
            np.subtract(image[group], np.float32(mean), out=out[group])
            out[group] /= np.float32(spread)
        if self.background == "zero":
            out *= chosen
        elif self.background == "noise":
            noise = np.random.default_rng(0).standard_normal(out.shape, dtype=np.float32)
            np.copyto(out, noise, where=~chosen)
        return _with_image(volume, out)

    def _moments(self, image: NDArray[np.float32], chosen: NDArray[np.bool_]) -> tuple[float, float]:
        if not chosen.any():
            raise ScanError(f"a channel has no voxel in the region '{self.region}'")
        if self.method == "one_pass":
            values = torch.from_numpy(image * chosen)
            count = float(chosen.sum())
            mean = values.sum() / count
            variance = float(((values * values).sum() / count - mean * mean).clamp(min=0)) * count / (count - self.ddof)
            return float(mean), self._divisor(variance)
        inside = image[chosen].astype(np.float64)
        mean64 = float(inside.mean())
        inside -= mean64
        return mean64, self._divisor(float(inside @ inside) / (inside.size - self.ddof))

    def _divisor(self, variance: float) -> float:
        spread = math.sqrt(variance)
        if self.eps_rule == "under_root":
            return math.sqrt(variance + self.eps)
        if self.eps_rule == "added":
            return spread + self.eps
        if self.eps_rule == "floor":
            return max(spread, self.eps)
        if self.eps_rule == "one_if_zero":
            return spread or 1.0
        if spread == 0:
            raise ScanError(f"the {_region_words(self.region)} all have the same intensity: a z-score divides by zero")
        return spread

    def __str__(self) -> str:
        rule = {
            "under_root": f", {self.eps:g} added to the variance",
            "added": f", {self.eps:g} added to the spread",
            "floor": f", spread at least {self.eps:g}",
            "one_if_zero": ", a spread of 0 taken as 1",
            "none": "",
        }[self.eps_rule]
        rest = {"keep": "", "zero": ", 0 elsewhere", "noise": ", seeded noise elsewhere"}[self.background]
        each = "" if self.per_channel else " over all channels together"
        kind = "sample" if self.ddof else "population"
        how = " [upstream's float32 one-pass formula]" if self.method == "one_pass" else ""
        return f"z-score over the {_region_words(self.region)}{each} ({kind} spread{rule}){rest}{how}"


@_operation
@dataclass(frozen=True)
class DivideByMean:
    """Divide each channel by its mean over `region`. A mean of 0 is a ScanError."""

    region: Region = "all"

    def __call__(self, volume: Volume) -> Volume:
        image = volume.image
        chosen = volume.region(self.region, image)
        means = [float(c[r].mean(dtype=np.float64)) for c, r in zip(image, chosen, strict=True)]
        if 0.0 in means:
            raise ScanError(f"the mean of the {_region_words(self.region)} is 0: the input contract divides by it")
        return _with_image(volume, image / np.array(means, dtype=np.float32)[:, None, None, None])

    def __str__(self) -> str:
        return f"divide by the mean of the {_region_words(self.region)}"


@_operation
@dataclass(frozen=True)
class MinMax:
    """Move the intensities of `region` linearly onto 0…1. A constant image is a ScanError."""

    region: Region = "all"
    per_channel: bool = True

    def __call__(self, volume: Volume) -> Volume:
        image = volume.image
        chosen = volume.region(self.region, image)
        axes = (1, 2, 3) if self.per_channel else None
        low = np.min(image, axis=axes, keepdims=True, where=chosen, initial=np.inf)
        high = np.max(image, axis=axes, keepdims=True, where=chosen, initial=-np.inf)
        if not (high > low).all():
            raise ScanError("the image has one intensity only: it cannot be scaled to 0…1")
        return _with_image(volume, (image - low) / (high - low))

    def __str__(self) -> str:
        return f"scale the {_region_words(self.region)} to 0…1" + (
            "" if self.per_channel else ", all channels together"
        )


@_operation
@dataclass(frozen=True)
class Standardize:
    """Subtract a fixed `mean` and divide by a fixed `std`, such as those of a training set."""

    mean: float
    std: float

    def __call__(self, volume: Volume) -> Volume:
        return _with_image(volume, (volume.image - np.float32(self.mean)) / np.float32(self.std))

    def __str__(self) -> str:
        return f"subtract {self.mean:g} and divide by {self.std:g}"


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
        soft = torch.from_numpy(np.ascontiguousarray(mask)).to(torch.uint8)[None, None]
        mask = F.interpolate(soft, image.shape[1:], mode="nearest-exact")[0, 0].numpy().astype(np.bool_)
    return replace(volume, stored=image, mask=mask, affine=affine, slope=1.0, inter=0.0)


def _times(values: tuple[float, ...]) -> str:
    return "×".join(f"{value:g}" for value in values)


def _region_words(region: Region) -> str:
    return {"all": "whole array", "nonzero": "non-zero voxels", "positive": "voxels above 0", "mask": "brain mask"}[
        region
    ]
