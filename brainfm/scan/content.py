"""What a scan holds against what its contract says of it: judged by its voxels, since headers say little."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainfm.contract.geometry import CropBox, CropCenter, Reorient, Transpose
from brainfm.contract.spec import InputSpec
from brainfm.contract.volume import Volume, any_true, not_zero
from brainfm.errors import ScanError
from brainfm.scan.placement import MAX_LITRES, contrast_fault, correlate, measure

_NEGATIVE_FRACTION = 0.05  # of the 99th percentile: what splines overshoot below 0 is less, what a z-score shifts more
_LEAST_FILLED = 0.1  # of an intensity range
_MOST_GREY_MATTER = 4.0  # a modulated grey-matter map holds fractions times how far the voxel was stretched


def check_content(volume: Volume, spec: InputSpec, source: str, missing: Collection[int] = ()) -> None:
    """Raise ScanError where a scan on its contract's grid is seen not to be what the contract takes.

    Args:
        volume: The scan.
        spec: The contract.
        source: What the scan is called.
        missing: Channels that were filled with zeros.
    """
    seen = _field_of_view(volume, spec)
    for number, channel in enumerate(spec.channels):
        if number in missing:
            continue
        name = f"{source}: {channel}" if len(spec.channels) > 1 else source
        _check_image(seen.stored[number], name)
        _check_intensities(seen, number, spec, name)
    brain = _brain(seen)
    if (spec.skull_strip == "required" or spec.grid is not None) and not any_true(brain):
        raise ScanError(f"{source}: no brain voxel is in the contract's field of view; is the mask the scan's own?")
    _check_skull(seen, brain, spec, source)
    if not spec.in_mni152:
        return
    for number, channel in enumerate(spec.channels):
        if number in missing:
            continue
        alone = replace(seen, stored=seen.stored[number : number + 1])
        kind = _kind(channel if len(spec.channels) > 1 else spec.representation)
        if _is_brain_alone(spec, brain, seen) and kind != "grey matter":
            placement = measure(alone, brain)
            fault = placement.fault(spec.registration) or contrast_fault(placement.correlation, kind)
        else:
            fault = contrast_fault(correlate(alone, kind), kind) if kind else ""
        if fault:
            raise ScanError(f"{source}: {fault}")


def _is_brain_alone(spec: InputSpec, brain: NDArray[np.bool_], volume: Volume) -> bool:
    """Whether what is marked as brain is one, and not a whole head."""
    return spec.skull_strip == "required" or (spec.skull_strip == "any" and _litres(brain, volume) <= MAX_LITRES)


def _kind(representation: str) -> str:
    """What the contrast is held against: "T1w", "T2w", "grey matter", or "" for what takes any."""
    if _is_grey_matter(representation):
        return "grey matter"
    return representation if representation in ("T1w", "T2w") else ""


def _is_grey_matter(representation: str) -> bool:
    return "grey matter" in representation.casefold().replace("gray", "grey")


def _check_image(image: NDArray[Any], name: str) -> None:
    if not _is_finite(image):
        raise ScanError(
            f"{name}: the image holds NaN or infinite values; replace them "
            "(0 outside the brain; inside it the scan is damaged)"
        )
    if all((plane == image[0, 0, 0]).all() for plane in image):
        raise ScanError(
            f"{name}: every voxel in the field of view has the same value: there is no image; check the file"
        )


def _check_intensities(volume: Volume, number: int, spec: InputSpec, name: str) -> None:
    if spec.intensities == "any" and spec.intensity_range is None and not _is_grey_matter(spec.representation):
        return
    stored = volume.stored[number]
    low, high = sorted(float(value) * volume.slope + volume.inter for value in (stored.min(), stored.max()))
    if spec.intensities == "raw" and low < 0:
        values = stored[::2, ::2, ::2].astype(np.float64) * volume.slope + volume.inter
        bottom, top = np.percentile(values, (1, 99))
        if bottom < -_NEGATIVE_FRACTION * max(top, 0) or values.mean() <= 0:
            raise ScanError(
                f"{name}: the image was normalised already, its intensities lie about 0 ({low:.4g} to {high:.4g}), and "
                "this contract takes them as the scanner gave them; use the scan from before WhiteStripe or the z-score"
            )
    if spec.intensities == "standardised" and low >= 0:
        raise ScanError(
            f"{name}: the intensities, {low:.4g} to {high:.4g}, are not shifted about 0, and this contract takes a "
            f"standardised image{_prepared(spec)}"
        )
    if spec.intensity_range is not None:
        least, most = spec.intensity_range
        slack = 1e-3 * (most - least)
        if low < least - slack or high > most + slack or high - least < _LEAST_FILLED * (most - least):
            raise ScanError(
                f"{name}: the intensities are {low:.4g} to {high:.4g}, and this contract takes {least:g} to {most:g}"
                f"{_prepared(spec)}"
            )
    if _is_grey_matter(spec.representation) and not (low >= -1e-3 and high <= _MOST_GREY_MATTER):
        raise ScanError(
            f"{name}: the values, {low:.4g} to {high:.4g}, are no fractions of grey matter; this contract takes a map "
            f"such as CAT12's mwp1, not an image{_prepared(spec)}"
        )


def _prepared(spec: InputSpec) -> str:
    return f" (prepared by {' → '.join(spec.preparation)})" if spec.preparation else ""


def _check_skull(volume: Volume, brain: NDArray[np.bool_], spec: InputSpec, source: str) -> None:
    litres = _litres(brain, volume)
    if spec.skull_strip == "required" and litres > MAX_LITRES:
        raise ScanError(
            f"{source}: the image is not skull-stripped, or its background is not 0: {litres:.1f} litres count as "
            "brain and a brain has 1 to 2; pass mask= (its brain mask), or strip it first (brainfm prep)"
        )
    if spec.skull_strip == "forbidden":
        image: NDArray[np.bool_] = np.any(not_zero(volume.stored, volume.slope, volume.inter), axis=0)
        if _litres(image, volume) <= MAX_LITRES and image.mean() < 0.5:
            raise ScanError(
                f"{source}: only {_litres(image, volume):.1f} litres of the image are not 0: it is skull-stripped, and "
                "this contract takes the whole head; use the scan from before the brain extraction"
            )


def _litres(brain: NDArray[np.bool_], volume: Volume) -> float:
    return float(np.count_nonzero(brain)) * abs(float(np.linalg.det(volume.affine[:3, :3]))) / 1e6


def _brain(volume: Volume) -> NDArray[np.bool_]:
    if volume.mask is not None:
        return volume.mask
    found: NDArray[np.bool_] = not_zero(volume.stored, volume.slope, volume.inter)
    return found[0] if len(found) == 1 else np.asarray(found.any(axis=0))


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
