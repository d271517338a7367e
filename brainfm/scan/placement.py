"""Is this a skull-stripped T1w brain that lies where the template's brain lies? Judged by content, not by the header.

The scan's brain is averaged into the 4 mm voxels of the MNI152 2009a template (`assets/mni152_brain_4mm.nii.gz`) by the
world coordinates of its voxels; a handful of figures then say whether it can be where its affine claims. MNI152's
variants (2009a, 2009c, FSL's) differ by a few millimetres and count as one here. Left and right cannot be told apart by
content.

Figures the limits were set from, on real brains (the 2009a template; Colin27, skull-stripped, in MNI space), moved on
purpose; "scaled" is 0.85 to 1.05 along each axis by itself, as rigid registration leaves brains of other sizes and
shapes:

| what                            | litres    | overlap   | outside   | offset mm | tilt ° | correlation    |
|---------------------------------|-----------|-----------|-----------|-----------|--------|----------------|
| template, Colin27               | 1.8–2.0   | 0.95–0.97 | 0.03–0.05 | 0–1       | 0–1    | 0.68 to 0.99   |
| the same, scaled                | 1.1–2.3   | 0.74–0.95 | 0–0.17    | 0–1       | 0–2    | 0.49 to 0.90   |
| shifted 5 mm, or turned 5°      | 1.8–2.0   | 0.92–0.96 | 0.04–0.07 | 0–6       | 0–6    | 0.46 to 0.76   |
| scaled, and turned 5°           | 1.1–2.3   | 0.74–0.93 | 0–0.17    | 0–2       | 0–11   | 0.45 to 0.75   |
| shifted 15 mm                   | 1.8–1.9   | 0.82–0.85 | 0.13–0.18 | 14–16     | 0–1    | 0.04 to 0.39   |
| turned 20° about x or z         | 1.8–2.0   | 0.88–0.91 | 0.08–0.12 | 1–2       | 19–22  | 0.19 to 0.45   |
| turned 20° about y              | 1.8–2.0   | 0.91–0.92 | 0.07–0.10 | 1         | 4–5    | 0.26 to 0.30   |
| front–back, or upside down      | 1.8–1.9   | 0.85–0.87 | 0.11–0.16 | 3–8       | 21–22  | 0.18 to 0.31   |
| turned 180° about x             | 1.8–1.9   | 0.83      | 0.15–0.18 | 8–9       | 0–1    | 0.06 to 0.10   |
| noise instead of the brain      |           |           |           |           |        | 0.00           |
| inverted contrast               |           |           |           |           |        | −0.99 to −0.68 |
| half a brain                    | 0.9–1.0   | 0.64–0.65 | 0.04      | 28        | 2–3    |                |
| whole head                      | 5.5–8.8   | 0.35      | 0.79      | 12        | 10     |                |
| a macaque's brain               | 0.11      | 0.11      | 0         | 11        | 1      |                |

A brain that is only rolled (turned about y, ear to shoulder) by 20° passes: its mask and its contrast stay too
much like an upright one's to refuse it without refusing patients.
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
MIN_CORRELATION = 0.20  # of T1w intensities at 4 mm: another contrast gives about −0.7, noise 0


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
                "and a brain has 1 to 2; pass mask= (its brain mask), or strip it first (brainfm prep)"
            )
        register = "register it to the template rigidly (brainfm prep, or TurboPrep with -r r), or check its affine"
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
    core = _inner(template > 0) & _inner(count.reshape(template.shape) > 0)  # rims are dark in any average
    both = core.ravel()

    template_points = np.argwhere(template > 0) @ affine[:3, :3].T + affine[:3, 3]
    return Placement(
        litres=len(points) * cubic_mm / 1e6,
        overlap=float(2 * inside * cubic_mm / (len(points) * cubic_mm + template_mm3)),
        outside=1 - inside / len(points),
        offset_mm=float(np.linalg.norm(points.mean(axis=0) - template_points.mean(axis=0))),
        tilt_deg=_tilt(points, template_points),
        correlation=_correlation(total[both] / count[both], template.ravel()[both]),
    )


def _tilt(points: NDArray[np.float64], template_points: NDArray[np.float64]) -> float:
    """How far the brain is turned against the template's in degrees, nodding (y–z plane) or turning (y–x plane).

    By the mixed second moment: turning a brain of the template's shape by θ changes it by (difference of its two own
    moments) · sin 2θ / 2. Sizes are made equal first. Brains of another shape have much the same mixed moment, where
    the direction of their longest axis can be anything if two axes are nearly as long. Beyond 45° the ratio of the two
    moments tells: against the template's it is 0.65 or more for shapes of 0.85 to 1.05, and 0.56 or less from 60° on.
    """
    if len(points) < 4:
        return 0.0
    template = np.cov(template_points.T)
    own = np.cov(points.T)
    own *= np.trace(template) / np.trace(own)
    angles = []
    for other in (2, 0):
        spread = template[1, 1] - template[other, other]
        own_angle, usual = (np.arcsin(np.clip(2 * m[1, other] / spread, -1, 1)) / 2 for m in (own, template))
        angle = abs(float(np.degrees(own_angle - usual)))
        relative = (own[1, 1] / own[other, other]) / (template[1, 1] / template[other, other])
        angles.append(90 - angle if relative < 0.58 else angle)
    return max(angles)


def _inner(brain: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The voxels whose six neighbours are brain too."""
    inner = np.zeros_like(brain)
    middle = (slice(1, -1),) * 3
    inner[middle] = brain[middle]
    for axis in range(3):
        for shift in (slice(0, -2), slice(2, None)):
            inner[middle] &= brain[tuple(shift if a == axis else slice(1, -1) for a in range(3))]
    return inner


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
