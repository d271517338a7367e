"""Operations that change intensities: clipped, scaled, z-scored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from brainfm.contract.operation import Operation, register_operation
from brainfm.contract.volume import REGIONS, Region, Volume, with_image
from brainfm.errors import ScanError

_BLOCK = 2**16  # voxels


@register_operation
@dataclass(frozen=True)
class Clip(Operation):
    """Clip to [low, high]: intensities, or with `percentiles` each channel's percentiles over `region`.

    Attributes:
        low: The lowest intensity, or its percentile, from 0 to 100.
        high: The highest intensity, likewise.
        percentiles: Whether these are percentiles.
        region: The voxels that percentiles are of.
    """

    low: float
    high: float
    percentiles: bool = False
    region: Region = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low > self.high or (self.percentiles and not 0 <= self.low <= self.high <= 100):
            raise ValueError(f"limits rise, and percentiles are 0 to 100, not {self.low} and {self.high}")

    def __call__(self, volume: Volume) -> Volume:
        image = volume.image
        if not self.percentiles:
            return with_image(volume, np.clip(image, np.float32(self.low), np.float32(self.high)))
        chosen = volume.region(self.region)
        limits = [np.percentile(c[r], (self.low, self.high)) for c, r in zip(image, chosen, strict=True)]
        clipped = [np.clip(c, *limit.astype(np.float32)) for c, limit in zip(image, limits, strict=True)]
        return with_image(volume, np.stack(clipped))

    def __str__(self) -> str:
        if self.percentiles:
            return f"clip to the {self.low}–{self.high} percentiles of the {REGIONS[self.region]}"
        return f"clip to {self.low}…{self.high}"


@register_operation
@dataclass(frozen=True)
class ZScore(Operation):
    """Subtract the mean and divide by the standard deviation over `region`.

    Attributes:
        region: Where mean and standard deviation are taken.
        eps: A small intensity that keeps the divisor from zero, used as `eps_rule` says.
        eps_rule: "under_root": √(variance + eps); "added": std + eps; "floor": max(std, eps); "one_if_zero": a
            std of 0 becomes 1 (`eps` unused); "none": a std of 0 is a ScanError.
        ddof: 0 for the population's variance, 1 for the sample's.
        per_channel: Each channel by itself, or all with one mean and std.
        background: Voxels outside `region` afterwards: "keep" (shifted and scaled like the rest), "zero", or "noise"
            (standard normal, seeded by 0: the same for every scan).
        method: "two_pass" (default) takes both moments in float64, the variance about the mean. "one_pass" is the
            released 3D-Neuro-SimCLR code's float32 E[x²] − E[x]²: it loses digits where the mean is large against the
            std, and is here to reproduce that code; the two agree to 1e-5 on T1w scans.
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
            mean, std = map(np.float32, self._moments(image[group], chosen[group], inside))
            if self.background == "keep":
                np.subtract(image[group], mean, out=out[group])
                out[group] /= std
            else:
                values = inside if kept is chosen else image[group][kept[group]]
                values -= mean
                values /= std
                out[group][kept[group]] = values
        return with_image(volume, out)

    def _moments(
        self, image: NDArray[np.float32], chosen: NDArray[np.bool_], inside: NDArray[np.float32]
    ) -> tuple[float, float]:
        """The mean of the voxels `inside`, which are those of `image` that are `chosen`, and what to divide by."""
        count = inside.size
        if count <= self.ddof:
            raise ScanError(f"one voxel in the {REGIONS[self.region]} has no sample standard deviation")
        if self.method == "one_pass":
            import torch

            values = torch.from_numpy(np.multiply(image, chosen, order="C"))
            mean = values.sum() / count
            variance = float(((values * values).sum() / count - mean * mean).clamp(min=0)) * count / (count - self.ddof)
            return float(mean), self._divisor(variance)
        # About the first block's mean, then corrected: with n blocks it is at most √n std off, which costs float64
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
        std = math.sqrt(variance)
        divisor = {
            "under_root": math.sqrt(variance + self.eps),
            "added": std + self.eps,
            "floor": max(std, self.eps),
            "one_if_zero": std or 1.0,
            "none": std,
        }[self.eps_rule]
        if divisor == 0:
            raise ScanError(f"the {REGIONS[self.region]} holds one intensity only: a z-score divides by zero")
        return divisor

    def __str__(self) -> str:
        rule = {
            "under_root": f", {self.eps:.12g} added to the variance",
            "added": f", {self.eps:.12g} added to the std",
            "floor": f", std at least {self.eps:.12g}",
            "one_if_zero": ", a std of 0 taken as 1",
            "none": "",
        }[self.eps_rule]
        where = "elsewhere" if self.background_is == "outside" else "where it was 0"
        rest = {"keep": "", "zero": f", 0 {where}", "noise": f", seeded noise {where}"}[self.background]
        each = "" if self.per_channel else " over all channels together"
        kind = "sample" if self.ddof else "population"
        how = " [upstream's float32 one-pass formula]" if self.method == "one_pass" else ""
        return f"z-score over the {REGIONS[self.region]}{each} ({kind} std{rule}){rest}{how}"


@register_operation
@dataclass(frozen=True)
class DivideByMean(Operation):
    """Divide each channel by its mean over `region`. A mean of 0 is a ScanError."""

    region: Region = "all"

    def __call__(self, volume: Volume) -> Volume:
        image = volume.image
        chosen = volume.region(self.region)
        means = [float(c[r].mean(dtype=np.float64)) for c, r in zip(image, chosen, strict=True)]
        if 0.0 in means:
            raise ScanError(f"the mean of the {REGIONS[self.region]} is 0: the input contract divides by it")
        return with_image(volume, image / np.array(means, dtype=np.float32)[:, None, None, None])

    def __str__(self) -> str:
        return f"divide by the mean of the {REGIONS[self.region]}"


@register_operation
@dataclass(frozen=True)
class MinMax(Operation):
    """Move the intensities of `region` linearly onto 0…1. A constant image is a ScanError.

    Attributes:
        region: Whose lowest and highest intensities become 0 and 1.
        per_channel: Each channel by itself, or all together.
        eps: Intensity that is added to the range that is divided by, so that the highest stays below 1.
    """

    region: Region = "all"
    per_channel: bool = True
    eps: float = 0.0

    def __call__(self, volume: Volume) -> Volume:
        image = volume.image
        chosen = volume.region(self.region)
        axes = (1, 2, 3) if self.per_channel else None
        low = np.min(image, axis=axes, keepdims=True, where=chosen, initial=np.inf)
        high = np.max(image, axis=axes, keepdims=True, where=chosen, initial=-np.inf)
        if not (high > low).all():
            raise ScanError("the image has one intensity only: it cannot be scaled to 0…1")
        return with_image(volume, (image - low) / (high - low + np.float32(self.eps)))

    def __str__(self) -> str:
        small = f", {self.eps:.12g} added to the range" if self.eps else ""
        return f"scale the {REGIONS[self.region]} to 0…1{small}" + (
            "" if self.per_channel else ", all channels together"
        )


@register_operation
@dataclass(frozen=True)
class Standardize(Operation):
    """Subtract a fixed `mean` and divide by a fixed `std`, such as those of a training set.

    Attributes:
        mean: The intensity that becomes 0.
        std: The intensity above it that becomes 1.
    """

    mean: float
    std: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.std <= 0:
            raise ValueError(f"Standardize: std is {self.std}, and must be above 0")

    def __call__(self, volume: Volume) -> Volume:
        return with_image(volume, (volume.image - np.float32(self.mean)) / np.float32(self.std))

    def __str__(self) -> str:
        return f"subtract {self.mean:.12g} and divide by {self.std:.12g}"
