"""Random views of a scan for pretraining, in the distributions of Kaczmarek et al. 2025 and its released code.

A view is drawn first and made afterwards: `draw_view` says what is done, in plain numbers, and `make_view` does it to
the crop alone, with torch, in a worker of the loader or on a GPU. The released code does the same with MONAI's random
transforms; for the same numbers the two give the same view.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from brainfm.operations import Checked, Triple

_GAMMA_EPS = 1e-7  # MONAI's AdjustContrast
_TINY = 1e-30  # in place of 0, whose logarithm is slow to compute with
_ZSCORE_EPS = 1e-12  # under the root, as in the input contract


@dataclass(frozen=True)
class Augmentation(Checked):
    """Ranges and probabilities that views are drawn from; the defaults are SimCLR's in the paper and its code.

    Attributes:
        crop_min: Smallest crop in voxels; each axis is uniform from here to the whole volume, the place uniform too.
        flip: Probability of mirroring the last axis (left and right).
        rotate: Probability of a rotation about the first axis (so within y and x), by
        rotate_max: up to so many radians either way.
        shift: Probability of adding to all intensities
        shift_max: up to so much either way. The z-score takes it out again, up to rounding.
        contrast: Probability of a gamma curve, with an exponent uniform in
        gamma: this range.
    """

    crop_min: Triple = (30, 40, 40)
    flip: float = 0.5
    rotate: float = 0.5
    rotate_max: float = 0.785
    shift: float = 0.8
    shift_max: float = 0.5
    contrast: float = 0.8
    gamma: tuple[float, float] = (0.5, 1.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("flip", "rotate", "shift", "contrast"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augmentation.{name} is {getattr(self, name)}, and must be a probability")
        if min(self.crop_min) < 1 or not 0 < self.gamma[0] <= self.gamma[1]:
            raise ValueError("augmentation.crop_min must be above 0, and augmentation.gamma a rising pair above 0")


@dataclass(frozen=True)
class View:
    """What is done to a volume; None where a step is left out.

    Attributes:
        start: First voxel of the crop.
        size: Voxels of the crop.
        flip: Whether the last axis is mirrored.
        angle: Radians about the first axis.
        shift: Added to all intensities.
        gamma: Exponent of the contrast curve.
    """

    start: Triple
    size: Triple
    flip: bool = False
    angle: float | None = None
    shift: float | None = None
    gamma: float | None = None

    @property
    def box(self) -> tuple[slice, slice, slice]:
        """The crop as slices."""
        z, y, x = (slice(first, first + size) for first, size in zip(self.start, self.size, strict=True))
        return z, y, x


def draw_view(rng: np.random.Generator, shape: Triple, augmentation: Augmentation) -> View:
    """Draw what is done to a volume of `shape` voxels."""
    a = augmentation
    size = tuple(int(rng.integers(min(low, full), full + 1)) for low, full in zip(a.crop_min, shape, strict=True))
    start = tuple(int(rng.integers(0, full - part + 1)) for full, part in zip(shape, size, strict=True))
    # Every number is drawn, used or not: changing one probability leaves the other draws of a seed as they were.
    flip, rotate, shift, contrast = rng.random(4) < (a.flip, a.rotate, a.shift, a.contrast)
    angle = float(rng.uniform(-a.rotate_max, a.rotate_max))
    offset = float(rng.uniform(-a.shift_max, a.shift_max))
    gamma = float(rng.uniform(*a.gamma))
    return View(
        start,  # type: ignore[arg-type]
        size,  # type: ignore[arg-type]
        bool(flip),
        angle if rotate else None,
        offset if shift else None,
        gamma if contrast else None,
    )


def make_view(image: Tensor, mask: Tensor, view: View, shape: Triple) -> Tensor:
    """Make a view of its crop.

    Args:
        image: [z, y, x] float32, the voxels of `view.box`.
        mask: [z, y, x] bool, the brain's.
        view: What to do.
        shape: Voxels of the result.

    Returns:
        [1, *shape] float32: mean 0 and spread 1 inside the mask, 0 outside.

    Raises:
        ValueError: The mask of the view is empty, or its voxels are not finite.
    """
    image, mask = resize(image, shape, "trilinear"), resize(mask.float(), shape, "nearest")
    if view.flip:
        image, mask = image.flip(-1), mask.flip(-1)
    if view.angle is not None:
        image, mask = rotate(image, view.angle, "bilinear"), rotate(mask, view.angle, "nearest")
    # The image is new memory by now. What follows is done in it: at full size, new memory costs more than the sums.
    if view.shift is not None:
        image += view.shift
    if view.gamma is not None:
        adjust_contrast_(image, view.gamma)
    return masked_zscore_(image, mask)[None]


def resize(volume: Tensor, shape: Triple, mode: str) -> Tensor:
    """[z, y, x] → new [*shape], as MONAI's Resize: voxels as areas (align_corners=False), no smoothing.

    Args:
        volume: [z, y, x] float32.
        shape: Voxels of the result.
        mode: "trilinear", computed within planes and then between them, or "nearest".
    """
    if volume.shape == shape:
        return volume.clone()
    if mode == "nearest":
        return F.interpolate(volume[None, None], size=shape, mode=mode)[0, 0]
    planes = F.interpolate(volume[None], size=shape[1:], mode="bilinear", align_corners=False)[0]
    if len(planes) == shape[0]:
        return planes
    resized = planes.new_empty(shape)
    last = len(planes) - 1
    for n, plane in enumerate(resized):
        place = min(max((n + 0.5) * len(planes) / shape[0] - 0.5, 0), last)
        below = int(place)
        torch.lerp(planes[below], planes[min(below + 1, last)], place - below, out=plane)
    return resized


def rotate(volume: Tensor, angle: float, mode: str) -> Tensor:
    """[z, y, x] turned by `angle` radians within y and x, about the centre; outside, the border's voxels go on.

    A rotation about the first axis moves no voxel to another plane, so that planes are interpolated as the channels of
    one image: the same as MONAI's three-dimensional Rotate, at a fraction of its cost.

    Args:
        volume: [z, y, x] float32.
        angle: Radians.
        mode: "bilinear" or "nearest".
    """
    _, height, width = volume.shape
    y = torch.arange(height, device=volume.device, dtype=torch.float32) - (height - 1) / 2
    x = torch.arange(width, device=volume.device, dtype=torch.float32) - (width - 1) / 2
    y, x = torch.meshgrid(y, x, indexing="ij")
    cos, sin = math.cos(angle), math.sin(angle)
    y, x = cos * y - sin * x, sin * y + cos * x
    if mode == "nearest":
        row = (y + (height - 1) / 2).round().clamp(0, height - 1)
        column = (x + (width - 1) / 2).round().clamp(0, width - 1)
        return volume.flatten(1).index_select(1, (row * width + column).long().flatten()).view(volume.shape)
    grid = torch.stack([x * (2 / width), y * (2 / height)], dim=-1)
    return F.grid_sample(volume[None], grid[None], mode=mode, padding_mode="border", align_corners=False)[0]


def adjust_contrast_(volume: Tensor, gamma: float) -> Tensor:
    """A gamma curve between the smallest and the largest intensity, as MONAI's AdjustContrast; in place."""
    low, high = volume.aminmax()
    span = high - low
    # The power as exp and log, which are twice as fast as pow where there is no infinity.
    share = volume.sub_(low).div_(span + _GAMMA_EPS).clamp_(min=_TINY)
    return share.log_().mul_(gamma).exp_().mul_(span).add_(low)


def masked_zscore_(volume: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and spread 1 (population, 1e-12 under the root) inside, 0 outside, as in the input contract; in place.

    Args:
        volume: [z, y, x].
        mask: [z, y, x] of the same type, 1 inside and 0 outside.

    Raises:
        ValueError: The mask is empty, or a voxel inside is not finite.
    """
    count = _total(mask)  # sums and products: many times faster than taking voxels out by a mask
    if not count:
        raise ValueError("no voxel of the brain mask is in the view")
    volume.mul_(mask)
    volume.sub_(_total(volume) / count).mul_(mask)
    spread = torch.linalg.vector_norm(volume, dim=(1, 2)).square().sum() / count
    if not spread.isfinite():
        raise ValueError("the view has voxels that are not finite")
    return volume.div_((spread + _ZSCORE_EPS).sqrt())


def _total(volume: Tensor) -> Tensor:
    """The sum, plane by plane: the same to the bit whatever the number of threads, in a worker or not."""
    return volume.sum(dim=(1, 2)).sum()
