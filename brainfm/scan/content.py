"""What a scan holds against what its contract says of it: judged by its voxels, since headers say little.

Figures the limits were set from: fifteen scans of people (T1w, T2w, FLAIR; 1 mm to 5.5 mm; whole, defaced, cut at the
crown, skull-stripped) and the MNI152 average, as stored and as programs change them. "Below 0" is the fraction of the
sum of all intensities' sizes.

| what                                                         | below 0        |
|--------------------------------------------------------------|----------------|
| as stored; one of them resampled by its authors with splines | 0 to 0.0001    |
| resampled with splines of order 3 or 5                       | 0.0007–0.0035  |
| z-scored (brain, head, or all voxels; 0 outside, or kept)    | 0.50 to 0.98   |
| WhiteStripe, of a brain                                      | 0.84 to 0.99   |

| what               | litres that are not background | most of a side of the image |
|--------------------|--------------------------------|-----------------------------|
| skull-stripped     | 1.1 to 1.9                     | 0.00; 0.01 in its box alone |
| whole head         | 2.6 to 12                      | 0.17 and more               |
| hard-cut defaced   | 8.9 to 9.7                     | 0.00 to 0.21                |
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainfm.contract.geometry import CropBox, CropCenter, Reorient, Transpose
from brainfm.contract.intensity import ZScore
from brainfm.contract.spec import InputSpec
from brainfm.contract.volume import Volume, any_true, not_zero
from brainfm.errors import ScanError
from brainfm.scan.placement import MAX_LITRES, contrast_fault, correlate, measure, too_large

MAX_BELOW_ZERO = 0.1  # of the sum of all intensities' sizes, in an image that nobody shifted
MAX_OFFSET = 0.2  # of the highest intensity: air, which is 0 or nearly so, lies in every field of view
RANGE_SLACK = 0.05  # of an intensity range, for what resampling overshoots
LEAST_FILLED = 0.1  # of an intensity range
FLOAT32_STEP, LEAST_STEPS = 2.0**-23, 4096  # of float32, relative to its number; of those in an intensity range
LEAST_RANGE = 1e-4  # of intensities; the z-scores of published weights add 1e-8 to the standard deviation
MOST_GREY_MATTER = 4.0  # a modulated map holds fractions times how far each voxel was stretched
MAX_ON_A_SIDE = 0.05  # of a side of the image: a neck or a cut head covers more of it, a whole brain hardly reaches it


def check_content(volume: Volume, spec: InputSpec, source: str, missing: Collection[int] = (), code: int = 0) -> None:
    """Raise ScanError where a scan on its contract's grid is seen not to be what the contract takes.

    Args:
        volume: The scan.
        spec: The contract.
        source: What the scan is called.
        missing: Channels that were filled with zeros.
        code: NIfTI-1's of the space that the scan's header says its affine leads to, 0 where it says none.
    """
    seen = _field_of_view(volume, spec)
    channels = list(_channels(seen, spec, source, missing))
    for name, kind, alone in channels:
        _check_image(alone.stored[0], name)
        _check_precision(alone, name)
        _check_intensities(alone, spec, kind, name)
    if spec.skull_strip == "forbidden" and (litres := _stripped_litres(volume)):
        raise ScanError(
            f"{source}: only {litres:.1f} litres of the image are not background: it is skull-stripped, and this "
            "contract takes the whole head; use the scan from before the brain extraction"
        )
    if spec.grid is None and not spec.in_mni152 and spec.skull_strip != "required":
        brain = None
    else:
        brain = _brain(seen, spec)
        if not any_true(brain):
            raise ScanError(f"{source}: no brain voxel is in the contract's field of view; is the mask the scan's own?")
    for name, kind, alone in channels:
        if fault := _fault(alone, brain, spec, kind, code):
            raise ScanError(f"{name}: {fault}")


def _channels(
    seen: Volume, spec: InputSpec, source: str, missing: Collection[int]
) -> Iterator[tuple[str, str, Volume]]:
    """Of each channel that is there, its name in messages, what it should be (see `_kind`), and its image alone."""
    several = len(spec.channels) > 1
    for number, channel in enumerate(spec.channels):
        if number not in missing:
            alone = replace(seen, stored=seen.stored[number : number + 1])
            yield (
                f"{source}: {channel}" if several else source,
                _kind(channel if several else spec.representation),
                alone,
            )


def _fault(alone: Volume, brain: NDArray[np.bool_] | None, spec: InputSpec, kind: str, code: int) -> str:
    """What is wrong with a channel's place, contrast or skull, or an empty string."""
    if kind == "grey matter":
        held = spec.in_mni152 or spec.space is None
        return contrast_fault(correlate(alone, kind), kind) if held else ""
    if brain is None:
        return ""
    required = spec.skull_strip == "required"
    if not spec.in_mni152:
        litres = _litres(brain, alone) if required else 0.0
        return too_large(litres, _blanks(spec)) if litres > MAX_LITRES else ""
    if required or _litres(brain, alone) <= MAX_LITRES:
        placement = measure(alone, brain)
        return placement.fault(spec.registration, _blanks(spec), code) or contrast_fault(placement.correlation, kind)
    return contrast_fault(correlate(alone, kind), kind, is_head=True) if kind else ""


def _kind(representation: str) -> str:
    """What the contrast is held against: "T1w", "T2w", "grey matter", or "" for what takes any."""
    words = representation.casefold().replace("gray", "grey")
    if "grey matter" in words:
        return "grey matter"
    return {"t1w": "T1w", "t1": "T1w", "t2w": "T2w", "t2": "T2w"}.get(words, "")


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


def _check_precision(alone: Volume, name: str) -> None:
    """Raise ScanError where rounding in float32, or the small number in a z-score's divisor, would swallow the image.

    A large constant was added, or the image was multiplied by next to nothing.
    """
    low, high = _extremes(alone)
    if high - low < LEAST_RANGE:
        raise ScanError(
            f"{name}: the intensities are {low:.4g} to {high:.4g}, too small for float32 arithmetic: the header's "
            "scl_slope is damaged, or the image was divided by a large number; multiply it"
        )
    if max(abs(low), abs(high)) * FLOAT32_STEP > (high - low) / LEAST_STEPS:
        raise ScanError(
            f"{name}: the intensities are {low:.8g} to {high:.8g}: a constant was added, or the header's scl_inter is "
            "damaged, beside which float32 cannot tell them apart; use the scan from before that"
        )


def _extremes(alone: Volume) -> tuple[float, float]:
    """The lowest and the highest intensity."""
    stored = alone.stored[0]
    low, high = sorted(float(value) * alone.slope + alone.inter for value in (stored.min(), stored.max()))
    return low, high


def _check_intensities(alone: Volume, spec: InputSpec, kind: str, name: str) -> None:
    if spec.intensities == "any" and spec.intensity_range is None and kind != "grey matter":
        return
    low, high = _extremes(alone)
    found = f"the intensities are {low:.4g} to {high:.4g}"
    prepared = f" (prepared by {' → '.join(spec.preparation)})" if spec.preparation else ""
    shifted = low < 0 and _below_zero(alone) > MAX_BELOW_ZERO
    if spec.intensities == "raw" and shifted:
        raise ScanError(
            f"{name}: {found}, about 0: the image was normalised already (WhiteStripe, a z-score), or is no MR image, "
            "and this contract takes intensities as the scanner gave them; use the scan from before normalisation"
        )
    if spec.intensities == "raw" and low > MAX_OFFSET * high:
        raise ScanError(
            f"{name}: {found}: a constant was added, as no voxel is near 0, and this contract takes intensities as the "
            "scanner gave them; use the scan from before that"
        )
    if spec.intensities == "standardised" and not shifted:
        raise ScanError(
            f"{name}: {found}, not about 0, and this contract takes an image whose intensities were standardised, as "
            f"by a z-score{prepared}"
        )
    if spec.intensity_range is not None:
        least, most = spec.intensity_range
        slack, width = RANGE_SLACK * (most - least), most - least
        if low < least - slack or high > most + slack or high - least < LEAST_FILLED * width:
            raise ScanError(
                f"{name}: {found}, and this contract takes {least:g} to {most:g}{prepared}; give it "
                "an image so prepared"
            )
    if kind == "grey matter" and (low < -RANGE_SLACK or high > MOST_GREY_MATTER):
        raise ScanError(
            f"{name}: {found}, no fractions of grey matter; this contract takes a map such as CAT12's mwp1, not an "
            f"image{prepared}"
        )


def _below_zero(alone: Volume) -> float:
    """The fraction of the sum of all intensities' sizes that lies below 0."""
    image = alone.intensities[0]
    total = float(np.abs(image).sum(dtype=np.float64))
    return (total - float(image.sum(dtype=np.float64))) / (2 * total)


def _stripped_litres(volume: Volume) -> float:
    """The litres that are not background, where the image is a skull-stripped brain; else 0.

    Background is what a corner of the image holds. A head is larger than a brain or, where slices are few, covers more
    of a side of the image.
    """
    found = np.zeros(volume.shape, dtype=np.bool_)
    for channel in volume.stored:
        found |= channel != channel[0, 0, 0]
    sides = [found.take(end, axis).mean() for axis in range(3) for end in (0, -1)]
    litres = _litres(found, volume)
    return litres if litres <= MAX_LITRES and max(sides) <= MAX_ON_A_SIDE else 0.0


def _litres(brain: NDArray[np.bool_], volume: Volume) -> float:
    return float(np.count_nonzero(brain)) * abs(float(np.linalg.det(volume.affine[:3, :3]))) / 1e6


def _brain(volume: Volume, spec: InputSpec) -> NDArray[np.bool_]:
    """[i, j, k]: what counts as brain: the mask or, where none is given or a skull would be left, what is not 0."""
    if volume.mask is not None and (_blanks(spec) or spec.skull_strip != "required"):
        return volume.mask
    found = not_zero(volume.stored, volume.slope, volume.inter)
    return found[0] if len(found) == 1 else np.asarray(found.any(axis=0))


def _blanks(spec: InputSpec) -> bool:
    """Whether an operation blanks what lies outside the brain mask, so that a mask is as good as a stripped image."""
    return any(
        isinstance(step, ZScore)
        and (step.region, step.background_is) == ("mask", "outside")
        and step.background != "keep"
        for step in spec.operations
    )


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
