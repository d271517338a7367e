"""Random views of a scan for pretraining, in the distributions of Kaczmarek et al. 2025 and its released code.

A view is drawn first and made afterwards: `draw_view` says what is done, in plain numbers, and `make_view` does it to
the crop alone, with torch, in a worker of the loader or on a GPU. The released code does the same with MONAI's random
transforms; for the same numbers the two give the same view. Of several channels, one view does the same to each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from brainfm.contract import Triple
from brainfm.schema import Checked

_GAMMA_EPS = 1e-7  # MONAI's AdjustContrast
_TINY = 1e-30  # in place of 0, whose logarithm is slow to compute with
_LEAST_NORMAL = 1e-37  # float32 has numbers below it with fewer digits, which processors are slow with
_CONSTANT = 1e-6  # of the mean: a standard deviation that is rounding
_ZSCORE_EPS = 1e-12  # under the root, as in the input contract


@dataclass(frozen=True)
class Augmentation(Checked):
    """Ranges and probabilities that views are drawn from; the defaults are the released code's for SimCLR.

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
        gamma: Exponent of the contrast curve, which goes from the smallest to the largest intensity of each channel.
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


def make_view(image: Tensor, mask: Tensor, view: View, shape: Triple, out: Tensor | None = None) -> Tensor:
    """Make a view of its crop.

    Args:
        image: [C, z, y, x] float32, the voxels of `view.box` as stored: what lies outside the brain is mixed into its
            rim by resizing and turning, and bounds the contrast's range, as in the released code.
        mask: [z, y, x] bool, the brain's.
        view: What to do.
        shape: Voxels of the result.
        out: [C, *shape] float32, where to make it; None takes new memory.

    Returns:
        [C, *shape] float32: in each channel mean 0 and std 1 inside the mask, 0 outside. One of several channels that
        is 0 all over, as a missing one is, stays so.

    Raises:
        ValueError: The mask of the view is empty, its voxels are not finite, or all have one value.
    """
    mask = place_mask(mask, view, shape)
    made = new_memory((len(image), *shape), image.device) if out is None else out
    for channel, volume in zip(image, made, strict=True):
        place_image(channel, view, volume)
        if len(image) > 1 and not channel.any():
            continue  # a constant's z-score would be its rounding
        if view.shift is not None:
            volume += view.shift
        if view.gamma is not None:
            adjust_contrast_(volume, view.gamma)
        masked_zscore_(volume, mask)
    return made


def place_image(image: Tensor, view: View, out: Tensor) -> Tensor:
    """[z, y, x] float32 → `out`, of any shape: resized, mirrored and turned, interpolated linearly.

    As MONAI's Resize (voxels as areas, no smoothing), Flip and Rotate (about the centre; outside, the border's voxels
    go on). A turn about the first axis moves no voxel to another plane, so that planes are interpolated as the channels
    of one image, and before there are more of them: the same as in three dimensions, at a fraction of the cost.
    """
    depth, height, width = out.shape
    planes = out if len(image) == depth else new_memory((len(image), height, width), image.device)
    grid = None
    if view.angle is not None:
        y, x = _turned(height, width, view.angle, image.device)
        grid = torch.stack([x * (2 / width), y * (2 / height)], dim=-1)[None]
    for source, target in zip(_slabs(image), _slabs(planes), strict=True):
        slab = F.interpolate(source[None], size=(height, width), mode="bilinear", align_corners=False)
        if view.flip:
            slab = slab.flip(-1)
        if grid is not None:
            slab = F.grid_sample(slab, grid, mode="bilinear", padding_mode="border", align_corners=False)
        target.copy_(slab[0])
    if planes is not out:
        last = len(planes) - 1
        for n, plane in enumerate(out):
            place = min(max((n + 0.5) * len(planes) / depth - 0.5, 0), last)
            below = int(place)
            torch.lerp(planes[below], planes[min(below + 1, last)], place - below, out=plane)
    return out


def place_mask(mask: Tensor, view: View, shape: Triple) -> Tensor:
    """[z, y, x] bool → new [*shape]: as `place_image`, but a voxel is one of the crop's, as by MONAI's mode "nearest".

    Each of the three steps picks whole voxels, and so do the three at once.
    """
    depth, height, width = shape
    row, column = torch.meshgrid(
        torch.arange(height, device=mask.device), torch.arange(width, device=mask.device), indexing="ij"
    )
    if view.angle is not None:
        y, x = _turned(height, width, view.angle, mask.device)
        row = (y + (height - 1) / 2).round().clamp(0, height - 1)
        column = (x + (width - 1) / 2).round().clamp(0, width - 1)
    if view.flip:
        column = width - 1 - column
    layer = torch.arange(depth, device=mask.device)
    layer, row, column = (
        (index * (have / want)).long()
        for index, have, want in zip((layer, row, column), mask.shape, shape, strict=True)
    )
    voxel = (row * mask.shape[2] + column).flatten()
    planes = torch.stack([plane.index_select(0, voxel) for plane in mask.flatten(1)])
    return planes.index_select(0, layer).view(shape)


def _turned(height: int, width: int, angle: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each pixel of a turned plane comes from, as [height, width] distances y and x from the centre."""
    y = torch.arange(height, device=device, dtype=torch.float32) - (height - 1) / 2
    x = torch.arange(width, device=device, dtype=torch.float32) - (width - 1) / 2
    y, x = torch.meshgrid(y, x, indexing="ij")
    cos, sin = math.cos(angle), math.sin(angle)
    return cos * y - sin * x, sin * y + cos * x


def adjust_contrast_(volume: Tensor, gamma: float) -> Tensor:
    """A gamma curve between the smallest and the largest intensity, as MONAI's AdjustContrast; in place."""
    low, high = volume.aminmax()
    span = high - low
    # The power as exp and log, which are twice as fast as pow where there is no infinity, and no power too small to be
    # a normal number: those are many times slower.
    least = max(_TINY, _LEAST_NORMAL ** (1 / gamma))
    for slab in _slabs(volume):
        slab.sub_(low).div_(span + _GAMMA_EPS).clamp_(min=least).log_().mul_(gamma).exp_().mul_(span).add_(low)
    return volume


def masked_zscore_(volume: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and std 1 (population, 1e-12 under the root) inside, 0 outside, as in the input contract; in place.

    Args:
        volume: [z, y, x].
        mask: [z, y, x] bool.

    Raises:
        ValueError: The mask is empty, a voxel inside is not finite, or all inside have one value, up to rounding.
    """
    count = mask.count_nonzero()
    if not count:
        raise ValueError("no voxel of the brain mask is in the view")
    slabs = [(slab, inside) for slab, inside in zip(_slabs(volume), _slabs(mask.view(torch.uint8)), strict=True)]
    # Sums and products: many times faster than taking voxels out by a mask. Sums are taken plane by plane: they are the
    # same to the bit whatever the number of threads, in a worker or not.
    sums = [slab.mul_(inside).sum(dim=(1, 2)) for slab, inside in slabs]
    mean = torch.cat(sums).sum() / count
    norms = [torch.linalg.vector_norm(slab.sub_(mean).mul_(inside), dim=(1, 2)) for slab, inside in slabs]
    variance = torch.cat(norms).square().sum() / count
    if not variance.isfinite():
        raise ValueError("the view has voxels that are not finite")
    if variance.sqrt() <= _CONSTANT * mean.abs():
        raise ValueError("the voxels of the view all have one value")
    return volume.div_((variance + _ZSCORE_EPS).sqrt())


def new_memory(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """An uninitialised float32 tensor, in large pages where the system has them.

    Numpy asks for those and torch does not. Memory that is new to a process costs a sixth in them; in small ones, that
    of a view costs more than its resizing.
    """
    return torch.from_numpy(np.empty(shape, np.float32)) if device.type == "cpu" else torch.empty(shape, device=device)


def _slabs(volume: Tensor) -> tuple[Tensor, ...]:
    """A volume in parts of six planes or a few more, which stay in a processor's cache; on a GPU, in one."""
    return volume.tensor_split(max(1, len(volume) // 6) if volume.is_cpu else 1)
