"""Read a scan and its brain mask, and hold them to an input contract. A refusal is a ScanError that says what to do."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from brainfm.errors import ScanError
from brainfm.operations import CropBox, CropCenter, Reorient, Transpose, Volume, any_true, not_zero
from brainfm.pretrained import InputSpec
from brainfm.scan.grid import TOLERANCE_MM, corner_distance, on_grid
from brainfm.scan.placement import measure
from brainfm.scan.read import ImageLike, StoredImage, read_image

__all__ = ["ImageLike", "Scan", "load_scan"]

logger = logging.getLogger("brainfm.scan")


@dataclass(frozen=True, eq=False)
class Scan(Volume):
    """A scan that keeps an input contract: a `Volume` on the contract's grid, with where it came from.

    Attributes:
        source: The file, or what was passed in its place.
        notes: What was done to bring the scan to the contract, such as "moved by (+2, +2, +6) whole voxels".
    """

    source: str = ""
    notes: tuple[str, ...] = ()


def load_scan(
    image: ImageLike,
    mask: ImageLike | None = None,
    *,
    spec: InputSpec,
    on_mismatch: Literal["resample", "raise"] = "resample",
) -> Scan:
    """Read a scan in any orientation and bring it to a contract's orientation and grid, or refuse it.

    The voxels stay as they are stored (`Scan.image` gives real intensities) until the contract's operations run.

    Args:
        image: A NIfTI (.nii, .nii.gz) or MGZ file, a nibabel image, or a pair (array [x, y, z], affine [4, 4] to RAS
            mm).
        mask: The brain mask on the same voxels: a file, an image, a pair, or an array of the scan's shape. Voxels above
            0 are brain. Without one, the non-zero voxels of a skull-stripped image are.
        spec: The input contract.
        on_mismatch: What to do with a scan in template space on another grid of the same or finer spacing: "resample"
            moves it (whole-voxel shifts are copied, others averaged), "raise" refuses it.

    Returns:
        The scan on the contract's grid.

    Raises:
        ScanError: The scan or mask cannot be read, is not 3-D, holds non-finite values or nothing, the two do not fit,
            the scan is not in the contract's space or not skull-stripped where it must be. The message says what to do.

    Example:
        >>> cfg = brainfm.get_pretrained_cfg("simclr_resnet18_3d")
        >>> scan = brainfm.load_scan("normalized.nii.gz", "mask.nii.gz", spec=cfg.input_spec)
        >>> scan.image.shape
        (1, 193, 229, 193)
    """
    if on_mismatch not in ("resample", "raise"):
        raise ValueError(f'on_mismatch must be "resample" or "raise", not {on_mismatch!r}')
    if len(spec.channels) != 1:
        raise ScanError(
            f"this contract takes {len(spec.channels)} registered channels ({', '.join(spec.channels)}); "
            "stack them in a brainfm.operations.Volume and call spec.apply"
        )
    stored = read_image(image)
    brain = _brain_mask(stored, mask, spec)
    volume = Volume(stored.array[None], brain, stored.affine, stored.slope, stored.inter)
    volume, note = on_grid(volume, spec, on_mismatch, stored.source)
    _check_content(volume, spec, stored.source)
    if note:
        logger.info("%s: %s", stored.source, note)
    return Scan(
        volume.stored, volume.mask, volume.affine, volume.slope, volume.inter, stored.source, (note,) if note else ()
    )


def _brain_mask(stored: StoredImage, mask: ImageLike | None, spec: InputSpec) -> NDArray[np.bool_] | None:
    """[i, j, k] booleans on the stored voxels, from the mask or, where the contract allows it, the non-zero voxels."""
    if spec.mask == "none":
        return None
    if mask is not None and spec.mask != "nonzero":
        return _read_mask(mask, stored)
    if spec.mask == "file":
        raise ScanError(f"{stored.source}: this contract needs a brain mask; pass mask=")
    return not_zero(stored.array, stored.slope, stored.inter)


def _read_mask(mask: ImageLike, image: StoredImage) -> NDArray[np.bool_]:
    if isinstance(mask, np.ndarray):
        mask = (mask, image.affine)
    stored = read_image(mask, "mask")
    names = f"{image.source}: the mask {stored.source}"
    if stored.array.shape != image.array.shape:
        raise ScanError(
            f"{names} has {stored.array.shape} voxels and the scan {image.array.shape}; "
            "use the mask made from this scan, or resample it to the scan's grid"
        )
    if corner_distance(stored.affine, image.affine, stored.array.shape) > TOLERANCE_MM:
        raise ScanError(f"{names} lies elsewhere: its affine is not the scan's; resample it to the scan's grid")
    values: NDArray[Any] = stored.array
    step: float = 0  # an integer for integers: against 0.0 they are compared as float64
    if (stored.slope, stored.inter) != (1.0, 0.0):
        values = values * np.float32(stored.slope) + np.float32(stored.inter)
        step = abs(stored.slope) / 2  # scaled integers hold 0 and 1 to half a step
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise ScanError(f"{names} holds NaN or infinite values; make it 0 outside the brain and 1 inside")
        if ((values > step) & (values < 1 - step)).any():
            raise ScanError(f"{names} holds fractions between 0 and 1 (a probability map?); threshold it first")
    if values.dtype.kind != "u" and (values < -step).any():
        raise ScanError(f"{names} holds negative values: is it an image? Make it 0 outside the brain and 1 inside")
    is_zero_or_one = values.dtype == np.uint8 and values.max() <= 1  # as nearly all masks: those bytes are booleans
    brain: NDArray[np.bool_] = values.view(np.bool_) if is_zero_or_one else values > step
    if not brain.any():
        raise ScanError(f"{names} is empty: no voxel is above 0; make it 1 inside the brain")
    return brain


def _check_content(volume: Volume, spec: InputSpec, source: str) -> None:
    """Refuse what the header lets through: empty, not finite, not stripped, or not where its affine says it is."""
    seen = _field_of_view(volume, spec)
    image = seen.stored[0]
    if not _is_finite(image):
        raise ScanError(
            f"{source}: the image holds NaN or infinite values; replace them "
            "(0 outside the brain; inside it the scan is damaged)"
        )
    if all((plane == image[0, 0, 0]).all() for plane in image):
        raise ScanError(
            f"{source}: every voxel in the field of view has the same value: there is no image; check the file"
        )
    if spec.grid is None and spec.skull_strip != "required":
        return
    brain = seen.mask
    if brain is None:
        brain = not_zero(image, seen.slope, seen.inter)
    if not any_true(brain):
        raise ScanError(f"{source}: no brain voxel is in the contract's field of view; is the mask the scan's own?")
    if spec.space is None or not spec.space.startswith("MNI152") or spec.representation != "T1w":
        return
    placement = measure(seen, brain)
    if placement.fault:
        raise ScanError(f"{source}: {placement.fault}")


def _is_finite(image: NDArray[Any]) -> bool:
    """Whether all voxels are. So they are where their sum is, and einsum sums a crop several times as fast as `sum`."""
    if image.dtype.kind != "f":
        return True
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.einsum("ijk->", image)) or np.isfinite(image).all())


def _field_of_view(volume: Volume, spec: InputSpec) -> Volume:
    """What the contract's leading crops leave: a view, so that voxels nobody asked for are never read."""
    for operation in spec.operations:
        if not isinstance(operation, Reorient | Transpose | CropBox | CropCenter):
            break
        volume = operation(volume)
    return volume
