"""The same scan, corrupted in a known way and strength: for curves of how an encoder's scores fall.

A corruption works on a scan as it is stored, on its own grid, before any input contract is applied, so that reading,
checking and normalising are tested with the encoder. Strength 0 gives the very arrays that were passed in. Two
strengths with the same generator are the same draw, more or less of it: the same noise, scaled; the same axis, turned
further. What changes intensities changes them inside the mask only: what a scanner does to the background, skull
stripping takes away again. `CORRUPTIONS` is the table: name, levels for a curve, unit, and where the levels are from.
The channels of a scan are corrupted alike, by one draw, but for noise, of which each has its own.

Levels end where `brainfm.load_scan` begins to refuse: a head that is enlarged, turned or thickened further no longer
lies where the template's does, or is no longer stripped. None of the levels is refused of the packaged scan, a large
brain of 1.9 litres, at 4 mm. That is why `crop` stops at 4 % where pretraining, which crops tensors that have been
accepted, goes to 80 %. A still larger brain in a shell of 4 mm, or one of an unusual shape turned by 6°, can be
refused; `brainfm.embed` then lists it among its errors, and a curve must be drawn from the scans that all levels have.
"""

# ruff: noqa: ARG001 - all corruptions take the same arguments

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from brainfm.contract import InputSpec
from brainfm.contract.volume import axes_towards, not_zero
from brainfm.errors import MissingExtraError
from brainfm.manifest import ScanRecord, ScansLike, list_scans
from brainfm.scan import Scan, load_scan

try:
    from scipy import fft, ndimage
    from scipy.spatial.transform import Rotation
except ModuleNotFoundError as error:
    raise MissingExtraError("scipy", "eval") from error

Image: TypeAlias = NDArray[np.float32]  # [i, j, k] real intensities
Mask: TypeAlias = NDArray[np.bool_]  # [i, j, k], True in the brain
Affine: TypeAlias = NDArray[np.float64]  # [4, 4] from voxel indices to RAS mm
Corrupt: TypeAlias = Callable[[Image, Mask, Affine, float, np.random.Generator], tuple[Image, Mask]]

SKULL_PERCENTILE = 99.0  # of the brain's intensities: fat and marrow are brighter than any tissue of the brain


@dataclass(frozen=True)
class Corruption:
    """One way to corrupt a scan.

    Attributes:
        corrupt: (image, mask, affine, strength, generator) → (image, mask), for strengths above 0.
        levels: Five strengths for a curve, the first of them 0.
        unit: What the strength measures.
        source: Where the levels are from.
        limit: The highest strength that means something.
        own: Whether each channel of a scan has chance of its own; else all have the same.
    """

    corrupt: Corrupt
    levels: tuple[float, ...]
    unit: str
    source: str
    limit: float = math.inf
    own: bool = False

    def __call__(
        self, image: Image, mask: Mask, affine: Affine, strength: float, rng: np.random.Generator
    ) -> tuple[Image, Mask]:
        """Corrupt an image; the arrays that are given stay as they were.

        Args:
            image: [i, j, k] float32, real intensities.
            mask: [i, j, k] booleans, True in the brain.
            affine: [4, 4] from voxel indices to RAS millimetres.
            strength: 0 to `limit`, in `unit`; 0 returns the arguments themselves.
            rng: Where chance comes from.

        Raises:
            ValueError: The strength is out of range.
        """
        self.check(strength)
        return self.corrupt(image, mask, affine, strength, rng) if strength else (image, mask)

    def each_channel(self, scan: Scan, strength: float, seed: tuple[int, ...]) -> tuple[list[Image], Mask]:
        """Every channel of a scan, corrupted, and the mask; where there is none, of the voxels that are not 0."""
        found = not_zero(scan.stored, scan.slope, scan.inter) if scan.mask is None else scan.mask[None]
        mask, brain, images = found[0], np.logical_or.reduce(found), []
        for number, channel in enumerate(scan.image):
            rng = np.random.default_rng((*seed, number) if self.own and number else seed)
            image, mask = self(channel, brain, scan.affine, strength, rng)  # the mask is the same whatever the image
            images.append(image)
        return images, mask

    def check(self, strength: float) -> None:
        """Raise ValueError for a strength that is negative, above the limit, or not finite."""
        if not (math.isfinite(strength) and 0 <= strength <= self.limit):
            raise ValueError(f"the strength ({self.unit}) must be 0 to {self.limit:g}, not {strength}")


def corrupted(records: ScansLike, name: str, strength: float, *, spec: InputSpec, seed: int = 0) -> list[ScanRecord]:
    """The scans of a list, corrupted: for `brainfm.embed`, or anything else that takes scans.

    Nothing is read here. A scan is read and corrupted when its image is asked for, in the thread that asks, and is not
    kept: the memory stays flat over thousands of scans. Chance comes from the seed and the scan's place in the list,
    and is the same for every strength. `brainfm.embed` cannot take up an interrupted run of such scans, as of any
    others in memory.

    Args:
        records: The scans, as `brainfm.embed` takes them.
        name: A key of `CORRUPTIONS`.
        strength: See there. At 0 the records are returned as they are.
        spec: The input contract of the model, which names the channels and says where brain masks come from.
        seed: Of all chance.

    Returns:
        A record a scan, in order, with its ids, columns and paths (the latter as further columns).

    Raises:
        ScanError: The list is wrong. What is wrong with one scan is raised when it is read.
        ValueError: There is no such corruption, or the strength is out of range.

    Example:
        >>> spec = brainfm.get_pretrained_cfg("simclr_resnet18_3d").input_spec
        >>> for strength in CORRUPTIONS["blur"].levels:
        ...     table = brainfm.embed(corrupted("manifest.csv", "blur", strength, spec=spec), model)
    """
    if name not in CORRUPTIONS:
        near = difflib.get_close_matches(name, CORRUPTIONS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(CORRUPTIONS)}"
        raise ValueError(f"no corruption is called {name!r}; {hint}")
    CORRUPTIONS[name].check(strength)
    scans = list_scans(records)
    if not strength:
        return scans
    own_grid = InputSpec(channels=spec.channels, missing_channel=spec.missing_channel, mask=spec.mask)
    found = []
    for number, record in enumerate(scans):
        scan = _CorruptedScan(record, CORRUPTIONS[name], strength, own_grid, (seed, number))
        mask = _Part(scan, "mask") if scan.has_mask else None
        images = {channel: _Part(scan, channel) for channel in scan.channels}
        image = images if len(spec.channels) > 1 else images[spec.channels[0]]
        found.append(replace(record, image=image, mask=mask, extra=record.columns()))
    return found


# --- Intensities, inside the mask -----------------------------------------------------------------


def noise(image: Image, mask: Mask, affine: Affine, strength: float, rng: np.random.Generator) -> tuple[Image, Mask]:
    """Add Gaussian noise, its std in units of the brain's own."""
    std = strength * image[mask].std(dtype=np.float64)
    return _inside(mask, image + np.float32(std) * rng.standard_normal(image.shape, dtype=np.float32), image), mask


def bias_field(
    image: Image, mask: Mask, affine: Affine, strength: float, rng: np.random.Generator
) -> tuple[Image, Mask]:
    """Multiply by a smooth field that goes from 1 − strength/2 to 1 + strength/2 over the brain.

    Its shape is that of MONAI's `RandBiasField`: Legendre polynomials up to degree 3, with random coefficients. What is
    multiplied is what the scanner received: WhiteStripe moved its 0 to where the background is now.
    """
    from monai.transforms import RandBiasField

    draw = RandBiasField(degree=3, coeff_range=(-1.0, 1.0), prob=1.0)
    draw.set_random_state(seed=int(rng.integers(2**31)))
    shape = np.log(np.asarray(draw(np.ones((1, *image.shape), np.float32)))[0])
    low, high = shape[mask].min(), shape[mask].max()
    field = 1 + np.float32(strength) * ((shape - low) / (high - low) - np.float32(0.5))
    zero = np.median(image[~mask]) if not mask.all() else np.float32(0)
    return _inside(mask, zero + field * (image - zero), image), mask


def ghosting(image: Image, mask: Mask, affine: Affine, strength: float, rng: np.random.Generator) -> tuple[Image, Mask]:
    """Dim every n-th line of k-space along one axis, but for its centre: n fainter copies of the head, shifted.

    The axis and n, 4 to 10, are random. At strength 1 the lines are lost.
    """
    axis, every = int(rng.integers(3)), int(rng.integers(4, 11))
    lines = fft.rfft(image, axis=axis)
    weights = np.ones(lines.shape[axis], np.float32)
    weights[every::every] -= strength
    lines *= np.expand_dims(weights, [other for other in range(3) if other != axis])
    return _inside(mask, fft.irfft(lines, n=image.shape[axis], axis=axis), image), mask


def blur(image: Image, mask: Mask, affine: Affine, strength: float, rng: np.random.Generator) -> tuple[Image, Mask]:
    """Smooth by a Gaussian of `strength` mm; its full width at half maximum is 2.35 times that."""
    return _inside(mask, ndimage.gaussian_filter(image, strength / _spacing(affine), mode="nearest"), image), mask


def intensity(
    image: Image, mask: Mask, affine: Affine, strength: float, rng: np.random.Generator
) -> tuple[Image, Mask]:
    """Bend the brain's intensities by a gamma curve between their extremes; exponent e^strength or e^−strength."""
    from monai.transforms import AdjustContrast

    gamma = math.exp(strength if rng.random() < 0.5 else -strength)
    changed = image.copy()
    changed[mask] = np.asarray(AdjustContrast(gamma)(image[mask][None]))[0]
    return changed, mask


# --- Geometry, and what surrounds the brain -------------------------------------------------------


def residual_skull(
    image: Image, mask: Mask, affine: Affine, strength: float, rng: np.random.Generator
) -> tuple[Image, Mask]:
    """Leave a bright shell of `strength` mm about the brain, and take it for brain where it fills half a voxel.

    Its intensity is the 99th percentile of the brain's, and its thickness right to a third of a voxel.
    """
    spacing = _spacing(affine)
    beyond = ndimage.distance_transform_edt(~mask, sampling=spacing)  # mm from the nearest centre of a brain voxel
    voxel = float(np.cbrt(spacing.prod()))
    fraction = np.clip((strength - beyond) / voxel + 1, 0, 1).astype(np.float32) * ~mask
    bright = np.percentile(image[mask], SKULL_PERCENTILE).astype(np.float32)
    return image + fraction * (bright - image), mask | (fraction >= 0.5)


def rotation(image: Image, mask: Mask, affine: Affine, strength: float, rng: np.random.Generator) -> tuple[Image, Mask]:
    """Turn the head by `strength` degrees about an axis through the brain's centre, of random direction."""
    axis = rng.standard_normal(3)
    back = Rotation.from_rotvec(-strength * axis / np.linalg.norm(axis), degrees=True).as_matrix()
    centre = affine[:3, :3] @ ndimage.center_of_mass(mask) + affine[:3, 3]
    from_world = np.eye(4)
    from_world[:3, :3], from_world[:3, 3] = back, centre - back @ centre
    return _moved(image, mask, np.linalg.inv(affine) @ from_world @ affine)


def crop(image: Image, mask: Mask, affine: Affine, strength: float, rng: np.random.Generator) -> tuple[Image, Mask]:
    """Cut a fraction `strength` off each axis, at random ends, and resize the rest to the whole."""
    shape = np.asarray(image.shape)
    first = rng.random(3) * strength * shape  # voxels cut off before the box, not rounded
    from_box = np.diag([1 - strength] * 3 + [1.0])
    from_box[:3, 3] = first - strength / 2  # of voxels, the edges are mapped to the edges
    return _moved(image, mask, from_box)


def flip(image: Image, mask: Mask, affine: Affine, strength: float, rng: np.random.Generator) -> tuple[Image, Mask]:
    """Mirror the array left to right with probability `strength`, as pretraining does."""
    if rng.random() >= strength:
        return image, mask
    (axis, _, _), _ = axes_towards(affine, "RAS")
    return np.flip(image, axis), np.flip(mask, axis)


_TORCHIO = "TorchIO's default range (Pérez-García et al. 2021)"
_PAPER = "Kaczmarek et al. 2025 (arXiv 2509.10620)"

CORRUPTIONS: dict[str, Corruption] = {
    "noise": Corruption(
        noise,
        (0.0, 0.1, 0.25, 0.5, 1.0),
        "std, as a fraction of the brain's",
        f"0.1: supervised augmentation of {_PAPER}; 0.25: the end of {_TORCHIO}; the rest ours",
        own=True,
    ),
    "bias_field": Corruption(
        bias_field,
        (0.0, 0.2, 0.4, 0.6, 0.8),
        "range over the brain, as a fraction of the mean",
        "0.2 and 0.4: BrainWeb's non-uniformity of 20 and 40 % (Cocosco et al. 1997); the rest ours",
        limit=2.0,
    ),
    "ghosting": Corruption(
        ghosting,
        (0.0, 0.25, 0.5, 0.75, 1.0),
        "fraction lost of every n-th line of k-space",
        f"0.5 to 1, and n: {_TORCHIO}; the rest ours",
        limit=1.0,
    ),
    "blur": Corruption(blur, (0.0, 1.0, 2.0, 3.0, 4.0), "std, mm", f"to 2: {_TORCHIO}; the rest ours"),
    "residual_skull": Corruption(residual_skull, (0.0, 1.0, 2.0, 3.0, 4.0), "thickness, mm", "ours"),
    "rotation": Corruption(rotation, (0.0, 1.0, 2.0, 4.0, 6.0), "degrees", "ours: what load_scan takes", limit=180.0),
    "intensity": Corruption(
        intensity,
        (0.0, 0.1, 0.2, 0.4, 0.7),
        "size of the logarithm of gamma",
        f"0.7: gamma 0.5 of the SimCLR views of {_PAPER}; the rest ours",
    ),
    "crop": Corruption(
        crop, (0.0, 0.01, 0.02, 0.03, 0.04), "fraction cut off each axis", "ours: what load_scan takes", limit=0.9
    ),
    "flip": Corruption(
        flip, (0.0, 0.25, 0.5, 0.75, 1.0), "probability", f"0.5: the SimCLR views of {_PAPER}; the rest ours", limit=1.0
    ),
}


def _inside(mask: Mask, changed: NDArray[Any], image: Image) -> Image:
    return np.where(mask, changed, image).astype(np.float32, copy=False)


def _moved(image: Image, mask: Mask, source: NDArray[np.float64]) -> tuple[Image, Mask]:
    """Each voxel taken from the index that `source`, [4, 4], gives for its own: trilinear, the mask nearest, else 0."""
    moved: Image = ndimage.affine_transform(image, source, order=1, mode="constant")
    brain: Mask = ndimage.affine_transform(mask.astype(np.uint8), source, order=0, mode="constant") > 0
    return moved, brain


def _spacing(affine: Affine) -> NDArray[np.float64]:
    spacing: NDArray[np.float64] = np.linalg.norm(affine[:3, :3], axis=0)
    return spacing


# --- Reading late ---------------------------------------------------------------------------------


@dataclass(eq=False)
class _CorruptedScan:
    """A scan that is read and corrupted when one of its images is asked for; the rest is kept until asked for in turn.

    `brainfm.load_scan` asks for each channel and then, where the contract takes one from a file, for the mask.
    """

    record: ScanRecord
    corruption: Corruption
    strength: float
    spec: InputSpec
    seed: tuple[int, int]
    kept: dict[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def channels(self) -> tuple[str, ...]:
        """Those of the contract that the record has: a missing one stays missing."""
        if len(self.spec.channels) == 1 or not isinstance(self.record.image, Mapping):
            return self.spec.channels
        there = {name.casefold() for name, image in self.record.image.items() if image is not None}
        return tuple(channel for channel in self.spec.channels if channel.casefold() in there)

    @property
    def has_mask(self) -> bool:
        return self.spec.mask.startswith("file")

    @cached_property
    def affine(self) -> Affine:
        return self._load().affine

    def take(self, part: str) -> NDArray[Any]:
        """A channel, or the mask. It is not kept: asked for again, it is made again."""
        if part not in self.kept:
            scan = self._load()
            images, mask = self.corruption.each_channel(scan, self.strength, self.seed)
            made = dict(zip(self.spec.channels, images, strict=True))
            self.kept = {channel: made[channel] for channel in self.channels}
            if self.has_mask:
                self.kept["mask"] = mask
            self.affine = scan.affine
        return self.kept.pop(part)

    def _load(self) -> Scan:
        return load_scan(self.record.image, self.record.mask, spec=self.spec)


@dataclass(frozen=True, eq=False)
class _Part:
    """A channel or the mask of a corrupted scan. It is read like a nibabel image whose voxels are not in memory yet."""

    scan: _CorruptedScan
    part: str
    header: None = None

    @property
    def dataobj(self) -> _Part:
        return self

    @property
    def affine(self) -> Affine:
        return self.scan.affine

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self.scan.take(self.part), dtype=dtype)

    def get_filename(self) -> str:
        """The scan's name for messages."""
        columns = self.scan.record.columns()
        name = "mask" if self.part == "mask" else "image" if "image_path" in columns else self.part.lower()
        return f"{columns.get(f'{name}_path') or f'the {name} in memory'} (corrupted)"
