"""A scan of one or more channels, brought to an input contract's orientation and grid, or refused."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from brainfm.contract.spec import InputSpec
from brainfm.contract.volume import Volume, axes_towards, not_zero, permute, pick
from brainfm.errors import ScanError
from brainfm.scan.content import check_content
from brainfm.scan.grid import corner_distance, on_grid
from brainfm.scan.layout import is_prepared, turboprep_files
from brainfm.scan.memory import is_mapping
from brainfm.scan.prepared import PreparedScan, for_contract, read_prepared, registered_before
from brainfm.scan.read import ImageLike, StoredImage, read_image, split_channels

logger = logging.getLogger("brainfm.scan")

# Of a voxel, at any corner. Tools round what they write (float32, a few decimals), and a whole volume adds that up;
# another grid is half a voxel off or more somewhere, and no mask's edge is surer than this.
SAME_VOXEL = 0.1
OVERSHOOT = 1e-3  # of a mask's highest value: what resampling, in floating point, leaves of 0 and 1

# An image, or of several channels {channel: image}.
ScanLike: TypeAlias = "ImageLike | Mapping[str, ImageLike]"


@dataclass(frozen=True, eq=False)
class Scan(Volume):
    """A scan that keeps an input contract: a `Volume` on the contract's grid, with where it came from.

    Attributes:
        stored: [C, i, j, k] voxels as they are stored, before scaling.
        mask: [i, j, k] booleans, the brain; None where the contract has no mask.
        affine: [4, 4] from voxel indices to RAS millimetres.
        slope: Intensities are stored · slope + inter.
        inter: See `slope`; the intensity of a stored 0.
        source: The file, or what was passed in its place; of several channels, the first one's.
        notes: What was done to bring the scan to the contract, such as "moved by (+2, +2, +6) whole voxels".

    Example:
        >>> import brainfm
        >>> spec = brainfm.get_pretrained_cfg("test_resnet_3d").input_spec
        >>> scan = brainfm.load_scan("normalized.nii.gz", "mask.nii.gz", spec=spec)
        >>> scan.source, scan.image.shape, scan.mask.dtype
        ('normalized.nii.gz', (1, 48, 48, 40), dtype('bool'))
    """

    source: str = ""
    notes: tuple[str, ...] = ()


def load_scan(
    image: ScanLike,
    mask: ImageLike | None = None,
    *,
    spec: InputSpec,
    on_mismatch: Literal["resample", "raise"] = "resample",
) -> Scan:
    """Read a scan in any orientation and bring it to a contract's orientation and grid, or refuse it.

    The voxels stay as they are stored (`Scan.image` gives real intensities) until the contract's operations run.

    Args:
        image: The folder of a scan that `brainfm prep` prepared, which has its mask and is resampled once; a NIfTI
            (.nii, .nii.gz, also .bz2, .xz, .zst) or MGZ file, the bytes of a NIfTI file, a nibabel or
            SimpleITK image, a pair (array [x, y, z], affine [4, 4] to RAS mm), a MetaTensor, or an image of TorchIO.
            Of several channels, {channel: any of these}, named as the contract names them, all on the same voxels; a
            MetaTensor may hold all of them, in the contract's order.
        mask: The brain mask on the same voxels, with its axes in any order: a file, an image, a pair, or an array of
            the scan's shape. Voxels above 0 are brain, whatever the type; fractions are refused, but for what
            resampling leaves of 0 and 1. Without a mask, the non-zero voxels of a skull-stripped image are.
        spec: The input contract.
        on_mismatch: What to do with a scan in template space on another grid of the same or finer spacing: "resample"
            moves it (whole-voxel shifts are copied, others averaged), "raise" refuses it.

    Returns:
        The scan on the contract's grid.

    Raises:
        ScanError: The scan or mask cannot be read, is not 3-D, holds non-finite values or nothing, the two do not fit,
            a channel is missing, or the scan is seen not to be what the contract takes: in another space, with or
            without skull, of another contrast, or normalised already. The message says what to do.

    Example:
        >>> import brainfm
        >>> cfg = brainfm.get_pretrained_cfg("test_resnet_3d")
        >>> scan = brainfm.load_scan("normalized.nii.gz", "mask.nii.gz", spec=cfg.input_spec)
        >>> scan.image.shape
        (1, 48, 48, 40)
    """
    if on_mismatch not in ("resample", "raise"):
        raise ValueError(f'on_mismatch must be "resample" or "raise", not {on_mismatch!r}')
    if not is_mapping(image):
        image, mask = turboprep_files(image, mask)
    images = _of_channels(image, spec)
    missing = {number for number, each in enumerate(images) if each is None}
    found = (_prepared if any(map(is_prepared, images)) else _stored)(images, mask, spec)
    volume, note = on_grid(found.volume, spec, on_mismatch, found.source)
    check_content(volume, spec, found.source, missing, found.code)
    source, notes = found.source, [*found.notes, *([note] if note else [])]
    if missing:
        notes.append(f"filled {', '.join(spec.channels[number] for number in sorted(missing))} with zeros")
    for said in notes:
        logger.info("%s: %s", source, said)
    return Scan(volume.stored, volume.mask, volume.affine, volume.slope, volume.inter, source, tuple(notes))


def image_of(image: ScanLike, spec: InputSpec | None = None) -> ImageLike:
    """One image of a scan, to show its voxels by: the first channel of the contract that is there."""
    if not is_mapping(image):
        channels = split_channels(image, len(spec.channels)) if spec and len(spec.channels) > 1 else None
        return channels[0] if channels else image
    wanted = [channel.casefold() for channel in spec.channels] if spec else []
    named = {str(name).casefold(): value for name, value in image.items()}
    return next((named[name] for name in wanted if name in named), next(iter(image.values())))


def name_of(image: Any) -> str:
    """What a scan is called in messages: its path, or the paths of its channels; empty for images in memory."""
    if isinstance(image, str | os.PathLike):
        return str(image)
    return ", ".join(filter(None, map(name_of, image.values()))) if is_mapping(image) else ""


class _Found(NamedTuple):
    """What is read of a scan: its channels and mask, its name, what its header says of its space, what was done."""

    volume: Volume
    source: str
    code: int = 0
    notes: tuple[str, ...] = ()


def _stored(images: list[ImageLike | None], mask: ImageLike | None, spec: InputSpec) -> _Found:
    """Images as they are stored, one a channel, and their mask."""
    channels = _on_one_grid([None if image is None else read_image(image) for image in images], spec)
    first = next(stored for stored in channels if stored is not None)
    brain = _brain_mask(first, channels, mask, spec)
    if len(channels) == 1:
        volume = Volume(first.array[None], brain, first.affine, first.slope, first.inter)
    else:
        volume = Volume(_stacked(channels, first), brain, first.affine)
    return _Found(volume, first.source, first.code)


def _prepared(images: list[ImageLike | None], mask: ImageLike | None, spec: InputSpec) -> _Found:
    """Prepared scans, one a channel, on the contract's grid or the first one's; its folder, and what was done."""
    if mask is not None:
        raise ScanError(f"{name_of(images[0])}: a prepared scan, which holds its own brain mask; pass no other")
    scans = [_read_prepared(image) for image in images]
    first = next(scan for scan in scans if scan is not None)
    for scan in scans:
        if scan is not None and (fault := registered_before(scan, first)):
            raise ScanError(fault)
    kinds = spec.channels if len(spec.channels) > 1 else (spec.representation,)
    found = [
        None if scan is None else for_contract(scan, spec, kind, first) for scan, kind in zip(scans, kinds, strict=True)
    ]
    made = next(each for each in found if each is not None)
    image = made[0].stored
    if len(found) > 1:
        empty = np.zeros_like(image)
        image = np.concatenate([empty if each is None else each[0].stored for each in found])
    brain = made[0].mask
    if spec.mask in ("none", "nonzero"):
        brain = None if spec.mask == "none" else np.asarray((image != 0).any(axis=0))
    notes = [note for each in found if each is not None for note in each[1]]
    return _Found(Volume(image, brain, made[0].affine), str(first.folder), notes=tuple(dict.fromkeys(notes)))


def _read_prepared(image: Any) -> PreparedScan | None:
    if image is None:
        return None
    if not is_prepared(image):
        raise ScanError(
            f"{name_of(image) or 'the scan'}: beside prepared scans, each channel is the folder of one; prepare it: "
            "brainfm prep"
        )
    return read_prepared(image)


def _of_channels(image: ScanLike, spec: InputSpec) -> list[ImageLike | None]:
    """The image of each channel of the contract, in its order; None where one is missing."""
    wanted = spec.channels
    if image is None:
        read_image(image)  # which says what it takes
    if not is_mapping(image):
        if len(wanted) == 1:
            return [image]
        images = None if is_prepared(image) else split_channels(image, len(wanted))
        if images is None:
            raise ScanError(
                f"{name_of(image) or 'the scan'}: this contract takes {len(wanted)} channels; pass "
                "{" + ", ".join(f"{channel!r}: …" for channel in wanted) + "}, or a column a channel in a manifest"
            )
        return list(images)
    named = {str(name).casefold(): value for name, value in image.items() if value is not None}
    if len({str(name).casefold() for name in image}) < len(image):
        raise ScanError(f"{name_of(image) or 'the scan'}: a channel is named twice: {', '.join(map(str, image))}")
    if len(wanted) == 1 and len(named) == 1 and _takes_any(wanted[0]):
        named = {wanted[0].casefold(): next(iter(named.values()))}
    found = [named.get(channel.casefold()) for channel in wanted]
    missing = [channel for channel, value in zip(wanted, found, strict=True) if value is None]
    if missing and (spec.missing_channel == "refuse" or len(missing) == len(wanted)):
        have = ", ".join(map(str, image)) or "none"
        raise ScanError(
            f"{name_of(image) or 'the scan'}: {', '.join(missing)} is missing; this contract takes "
            f"{', '.join(wanted)}, and the scan has {have}"
        )
    for channel in missing:  # filled with zeros, but not for a slip of the pen
        others = [name for name in named if name not in map(str.casefold, wanted)]
        if near := difflib.get_close_matches(channel.casefold(), others, n=1, cutoff=0.75):
            raise ScanError(f"{name_of(image) or 'the scan'}: {channel} is missing; is {near[0]!r} meant for it?")
    return found


def _on_one_grid(read: list[StoredImage | None], spec: InputSpec) -> list[StoredImage | None]:
    """The stored images of a contract's channels, all turned to the first's axes. Raises where they lie elsewhere."""
    first = next(one for one in read if one is not None)
    stored = [None if one is None else _turned(one, first) for one in read]
    for channel, one in zip(spec.channels, stored, strict=True):
        if one is None or one is first:
            continue
        if one.array.shape != first.array.shape or not _lies_on(one, first):
            raise ScanError(
                f"{one.source}: {channel} lies on other voxels than {first.source}; register the channels to one of "
                "them and resample them to its grid"
            )
    return stored


def _takes_any(channel: str) -> bool:
    return channel.startswith("any") or " or " in channel


def _stacked(channels: list[StoredImage | None], first: StoredImage) -> NDArray[np.float32]:
    """[C, i, j, k] real intensities, zeros for a missing channel; the first axis fastest, as in files."""
    shape = first.array.shape
    stacked = np.zeros((len(channels), *shape[::-1]), dtype=np.float32).transpose(0, 3, 2, 1)
    for out, stored in zip(stacked, channels, strict=True):
        if stored is not None:
            out[...] = Volume(stored.array[None], None, stored.affine, stored.slope, stored.inter).intensities[0]
    return stacked


def _brain_mask(
    first: StoredImage, channels: list[StoredImage | None], mask: ImageLike | None, spec: InputSpec
) -> NDArray[np.bool_] | None:
    """[i, j, k] booleans on the stored voxels, from the mask or, where the contract allows it, the non-zero voxels."""
    if spec.mask == "none":
        return None
    if mask is not None and spec.mask != "nonzero":
        return _read_mask(mask, first)
    if spec.mask == "file":
        raise ScanError(f"{first.source}: this contract needs a brain mask; pass mask=")
    found = [not_zero(stored.array, stored.slope, stored.inter) for stored in channels if stored is not None]
    return found[0] if len(found) == 1 else np.logical_or.reduce(found)


def _turned(one: StoredImage, other: StoredImage) -> StoredImage:
    """An image with its axes in the order and direction of another's, as tools store them that choose their own."""
    import nibabel as nib

    if np.array_equal(one.affine, other.affine):
        return one
    codes = nib.aff2axcodes(other.affine)
    if None in codes:  # an axis whose voxels have no size beside the others'
        return one
    axes, flips = axes_towards(one.affine, "".join(codes))
    if axes == (0, 1, 2) and not any(flips):
        return one
    volume = permute(Volume(one.array[None], None, one.affine), axes)
    volume = pick(volume, tuple(slice(None, None, -1 if flip else 1) for flip in flips))
    return replace(one, array=volume.stored[0], affine=volume.affine)


def _lies_on(one: StoredImage, other: StoredImage) -> bool:
    """Whether the voxels of two images of one shape are the same places in the world."""
    apart = corner_distance(one.affine, other.affine, one.array.shape)
    return apart <= SAME_VOXEL * float(np.linalg.norm(other.affine[:3, :3], axis=0).min())


def _read_mask(mask: ImageLike, image: StoredImage) -> NDArray[np.bool_]:
    if isinstance(mask, np.ndarray):
        mask = (mask, image.affine)
    stored = _turned(read_image(mask, "mask"), image)
    names = f"{image.source}: the mask {stored.source}"
    if stored.array.shape != image.array.shape:
        raise ScanError(
            f"{names} has {stored.array.shape} voxels and the scan {image.array.shape}; "
            "use the mask made from this scan, or resample it to the scan's grid"
        )
    if not _lies_on(stored, image):
        raise ScanError(f"{names} lies elsewhere: its affine is not the scan's; resample it to the scan's grid")
    values: NDArray[Any] = stored.array
    step: float = 0  # an integer for integers: against 0.0 they are compared as float64
    if (stored.slope, stored.inter) != (1.0, 0.0):
        values = values * np.float32(stored.slope) + np.float32(stored.inter)
        step = abs(stored.slope) / 2  # scaled integers hold 0 and 1 to half a step
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise ScanError(f"{names} holds NaN or infinite values; make it 0 outside the brain and 1 inside")
        step = max(step, OVERSHOOT * min(float(values.max()), 100.0))  # labels may count to thousands
        if ((values > step) & (values < 1 - step)).any():
            raise ScanError(f"{names} holds fractions between 0 and 1 (a probability map?); threshold it first")
    if values.dtype.kind != "u" and (values < -step).any():
        raise ScanError(f"{names} holds negative values: is it an image? Make it 0 outside the brain and 1 inside")
    is_zero_or_one = values.dtype == np.uint8 and values.max() <= 1  # as nearly all masks: those bytes are booleans
    brain: NDArray[np.bool_] = values.view(np.bool_) if is_zero_or_one else values > step
    if not brain.any():
        raise ScanError(f"{names} is empty: no voxel is above 0; make it 1 inside the brain")
    return brain
