"""Is this a skull-stripped T1w brain that lies where the template's brain lies? Judged by content, not by the header.

The scan's brain is averaged into the 4 mm voxels of the MNI152 2009a template (`assets/mni152_brain_4mm.nii.gz`) by the
world coordinates of its voxels; a handful of figures then say whether it can be where its affine claims. MNI152's
variants (2009a, 2009c, FSL's) differ by a few millimetres and count as one here. Left and right cannot be told apart by
content.

Figures the limits were set from, on real brains (the 2009a template; Colin27, skull-stripped, in MNI space), moved on
purpose; "scaled" is 0.85 to 1.05 along each axis, as rigid registration leaves brains of other sizes:

| what                               | litres    | overlap   | outside   | offset mm | tilt °   | correlation |
|------------------------------------|-----------|-----------|-----------|-----------|----------|-------------|
| template, Colin27                  | 1.74–1.88 | 0.94–0.99 | 0–0.02    | 0–1       | 0–1      | 0.7–1.0     |
| the same, scaled                   | 1.07–2.18 | 0.72–0.95 | 0–0.14    | 0–1       | 0–8      | 0.5–0.7     |
| shifted 5 mm, or turned 5–10°      | 1.74–1.88 | 0.90–0.97 | 0.02–0.08 | 0–8       | 0–11     | 0.4–0.8     |
| shifted 15 mm                      | 1.74–1.88 | 0.83–0.85 | 0.13–0.17 | 15        | 0–1      | 0.3–0.4     |
| turned 20° about x or z            | 1.74–1.88 | 0.87–0.91 | 0.06–0.11 | 0–1       | 19–21    | 0.2–0.5     |
| front–back or upside down          | 1.74–1.88 | 0.61–0.87 | 0.11–0.38 | 0–44      | 20–21    | 0.2–0.3     |
| half a brain; a 30 mm slab         | 0.53–0.92 | 0.44–0.66 | 0–0.02    | 5–29      | 0–10     | –           |
| whole head                         | 8.8       | 0.35      | 0.79      | 12        | 10       | –           |
| a macaque's brain                  | 0.11      | 0.11      | 0         | 11        | 1        | –           |
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from brainfm.operations import Volume

TEMPLATE = Path(__file__).parent.parent / "assets" / "mni152_brain_4mm.nii.gz"

MIN_LITRES, MAX_LITRES = 0.6, 2.4
MIN_OVERLAP = 0.60  # Dice coefficient with the template's brain
MAX_OUTSIDE = 0.30  # share of the scan's brain outside the template's
MAX_OFFSET_MM = 10.0  # between the centres of the two brains
MAX_TILT_DEG = 14.0  # between their long axes, nose up or down, or nose left or right
MIN_CORRELATION = 0.15  # of T1w intensities at 4 mm: another contrast gives about −0.7, noise 0


@dataclass(frozen=True)
class Placement:
    """How a scan's brain lies against the template's; see the module for what is usual."""

    litres: float
    overlap: float
    outside: float
    offset_mm: float
    tilt_deg: float
    correlation: float

    @property
    def fault(self) -> str:
        """What is wrong and what to do next, or an empty string."""
        if self.litres > MAX_LITRES:
            return (
                f"the image is not skull-stripped, or its background is not 0: {self.litres:.1f} litres count as brain "
                "and a brain has 1 to 2; pass mask= (its brain mask), or strip it first (SynthStrip, TurboPrep)"
            )
        register = "register it to the template rigidly (TurboPrep with -r r), or check its affine"
        if self.litres < MIN_LITRES:
            return (
                f"only {self.litres:.2f} litres of brain are in the field of view, too little for a whole; {register}"
            )
        figures = (
            (self.offset_mm > MAX_OFFSET_MM, f"its centre is {self.offset_mm:.0f} mm from the template's"),
            (self.tilt_deg > MAX_TILT_DEG, f"it is turned by {self.tilt_deg:.0f}° against the template's"),
            (self.overlap < MIN_OVERLAP, f"its overlap (Dice) with the template's is {self.overlap:.2f}"),
            (self.outside > MAX_OUTSIDE, f"{self.outside:.0%} of it lie outside the template's"),
        )
        wrong = "; ".join(words for is_wrong, words in figures if is_wrong)
        if wrong:
            return f"the brain does not lie where the template's does: {wrong}; {register}"
        if self.correlation < MIN_CORRELATION:
            return (
                f"inside the brain, the intensities do not follow a T1w image (correlation {self.correlation:.2f} with "
                "the template): another contrast, a label map, or a scan turned upside down; use the T1w scan"
            )
        return ""


def measure(volume: Volume, brain: NDArray[np.bool_]) -> Placement:
    """Where the voxels marked in `brain` [i, j, k] lie against the template's brain. At least one must be marked."""
    template, affine = _template()
    steps = np.maximum(1, np.floor(2.001 / volume.spacing)).astype(int)  # about every 2 mm is enough
    every = tuple(slice(None, None, int(step)) for step in steps)
    found = np.argwhere(brain[every]) * steps
    if len(found) == 0:
        steps, found = np.ones(3, dtype=int), np.argwhere(brain)
    intensities = volume.stored[0][tuple(found.T)].astype(np.float64) * volume.slope + volume.inter
    points = found @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    cubic_mm = abs(float(np.linalg.det(volume.affine[:3, :3] * steps)))

    cells = np.rint((points - affine[:3, 3]) / np.diag(affine)[:3]).astype(int)
    in_box = ((cells >= 0) & (cells < template.shape)).all(axis=1)
    flat = np.ravel_multi_index(tuple(cells[in_box].T), template.shape)
    count = np.bincount(flat, minlength=template.size)
    total = np.bincount(flat, weights=intensities[in_box], minlength=template.size)
    in_template = template.ravel() > 0
    inside = int(count[in_template].sum())
    template_mm3 = in_template.sum() * abs(float(np.linalg.det(affine[:3, :3])))
    both = in_template & (count > 0)

    template_points = np.argwhere(template > 0) @ affine[:3, :3].T + affine[:3, 3]
    return Placement(
        litres=len(points) * cubic_mm / 1e6,
        overlap=float(2 * inside * cubic_mm / (len(points) * cubic_mm + template_mm3)),
        outside=1 - inside / len(points),
        offset_mm=float(np.linalg.norm(points.mean(axis=0) - template_points.mean(axis=0))),
        tilt_deg=max(abs(a - b) for a, b in zip(_tilts(points), _tilts(template_points), strict=True)),
        correlation=_correlation(total[both] / count[both], template.ravel()[both]),
    )


def _tilts(points: NDArray[np.float64]) -> tuple[float, float]:
    """The angles of the brain's long axis in degrees: in the y–z plane (nodding) and in the y–x plane (turning)."""
    if len(points) < 4:
        return 0.0, 0.0
    moments = np.cov(points.T)
    nod, turn = (
        float(np.degrees(0.5 * np.arctan2(2 * moments[1, other], moments[1, 1] - moments[other, other])))
        for other in (2, 0)
    )
    return nod, turn


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


@cache
def _template() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean T1w intensity of the brain in each 4 mm voxel (0 outside), and the affine."""
    import nibabel as nib

    image = nib.load(TEMPLATE)
    return np.asanyarray(image.dataobj).astype(np.float64), image.affine
