"""Is this a brain that lies where the template's brain lies, in the contrast it should have? Judged by its voxels.

The scan's brain is averaged into the 4 mm voxels of the MNI152 2009a template (`assets/mni152_brain_4mm.nii.gz`) by the
world coordinates of its voxels; a handful of figures then say whether it can be where its affine claims. MNI152's
variants (2009a, 2009c, FSL's) differ by a few millimetres and count as one here. Left and right cannot be told apart by
content.

The template's brain is fitted to the scan's, moved, stretched and sheared (`brainfm.scan.alignment`): what that moves
it by is what the scan is misplaced by, and contrast is looked at where it then lies. A brain of another size, as rigid
registration leaves it, is fitted as well as one of the template's.

Figures the limits were set from. First the 2009a template's brain, moved on purpose; "scaled" is 0.85 or 1.05 along an
axis:

| what                            | overlap   | offset mm | tilt °    | missing   | correlation    |
|---------------------------------|-----------|-----------|-----------|-----------|----------------|
| scaled                          | 0.77–0.86 | 2         | 1         | 0         | 0.89 to 0.90   |
| scaled, and turned 5°           | 0.86      | 2         | 5         | 0         | 0.90           |
| shifted 5 mm                    | 0.94–0.95 | 5         | 0         | 0         | 0.98           |
| shifted 15 mm                   | 0.84–0.85 | 14        | 0         | 0         | 0.92 to 0.94   |
| turned 5° about x, y or z       | 0.96–0.97 | 1         | 5         | 0         | 0.93 to 0.94   |
| turned 9°                       | 0.94–0.95 | 1–2       | 9         | 0         | 0.93 to 0.94   |
| turned 20°                      | 0.89–0.92 | 1–2       | 20        | 0         | 0.93 to 0.94   |
| turned 45°                      | 0.83–0.89 | 2–4       | 28–45     | 0–0.07    | 0.08 to 0.94   |
| front to back                   | 0.85      | 4         | 5         | 0.12      | 0.30           |
| upside down, or both            | 0.83–0.87 | 5–7       | 8–10      | 0.1–0.2   | 0.07 to 0.17   |
| half a brain                    | 0.61–0.66 | 2–14      | 1–15      | 0.43–0.44 | 0.48 to 0.63   |
| noise instead of the brain      |           | 1         | 0         | 0         | 0.00           |
| inverted contrast               |           | 1         | 0         | 0         | −0.98          |

Then fifteen scans of thirteen people (adults; three with multiple sclerosis, one with a tumour, one with a stroke) as
`brainfm prep` leaves them; "size" is the smallest and the largest along an axis:

| what                            | overlap   | offset mm | tilt °    | size         | correlation    |
|---------------------------------|-----------|-----------|-----------|--------------|----------------|
| T1w of eleven                   | 0.75–0.91 | 1.0–2.6   | 0.4–1.6   | 0.77 to 0.99 | 0.47 to 0.59   |
| T1w after contrast agent        | 0.78      | 1.3       | 1.0       | 0.81 to 0.88 | 0.40           |
| FLAIR                           | 0.83      | 1.4       | 1.1       | 0.87 to 0.95 | 0.15           |
| T2w of two                      | 0.82–0.91 | 0.9–1.0   | 0.7–1.8   | 0.90 to 0.96 | −0.43 to −0.29 |

Not fitted, where nothing says what is brain, T1w of nine correlate by 0.21 to 0.53, T2w of two by −0.43 to −0.12.

A header may name the space that its affine leads to. It decides between the limits where the place is doubtful, and
Talairach is not MNI152; a brain in its place is taken from a header that names the scanner's space, as many tools do.
Where no header says MNI152, a brain may lie in Talairach space all the same: pitched by 3.6° and smaller, by what
Lancaster et al. (2007, Human Brain Mapping 28:1194) fitted to such brains. It is refused where it lies nearer to that
than to MNI152 by far (`TALAIRACH_MM`, `TALAIRACH_SHARE`); turns and shifts count for the one, for the other sizes too,
which brains registered to Talairach space share.

Correlation with the template's map of grey matter, not smoothed and smoothed by 8 mm; the people's maps (of two) are
classes of intensity, registered nonlinearly:

| what                       | the template's own | people's       |
|----------------------------|--------------------|----------------|
| grey matter                | 0.80 to 0.97       | 0.42 to 0.44   |
| – moved by 10 mm           | 0.27 to 0.34       |                |
| cerebrospinal fluid        | −0.06 to 0.05      | 0.05 to 0.20   |
| white matter               | −0.74 to −0.63     | −0.45 to −0.34 |
| T1w                        | −0.22              | −0.26 to −0.20 |
| T2w                        |                    | −0.07 to 0.09  |
| all of the brain alike     | 0.03 to 0.19       |                |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.affines import from_matvec
from numpy.typing import NDArray

from brainfm.assets import COARSE_BRAIN, COARSE_GREY_MATTER
from brainfm.contract.volume import Volume
from brainfm.scan.alignment import Target, align, correlation, product_of, shaded

MIN_LITRES, MAX_LITRES = 0.6, 2.4
MIN_OVERLAP = 0.60  # Dice coefficient with the template's brain
MAX_OUTSIDE = 0.30  # fraction of the scan's brain outside the template's
MAX_OFFSET_MM, MAX_TILT_DEG = 6.0, 7.0  # off the template's place, whatever the header says
DOUBTFUL_OFFSET_MM, DOUBTFUL_TILT_DEG = 4.0, 4.0  # where a header that does not say MNI152 decides
MIN_SIZE, MAX_SIZE = 0.92, 1.08  # of the template's along an axis, where registration gave the brain its size
TALAIRACH_MM = 2.5  # over the brain, off MNI152's place, from which on Talairach's is thought of
TALAIRACH_SHARE = 0.7  # of that, within which it then lies of Talairach's
MAX_MISSING = 0.2  # fraction of the template's brain, once fitted, where the scan has none
MIN_CORRELATION = 0.31  # of T1w intensities at 4 mm, once fitted
MIN_HEAD_CORRELATION = 0.10  # not fitted, where no mask says what is brain
MAX_T2W_CORRELATION = 0.10  # of T2w intensities with the T1w template's
MIN_GREY_CORRELATION = 0.30  # of a map of grey matter with the template's
SCANNER, ALIGNED, TALAIRACH, MNI152 = 1, 2, 3, 4  # NIfTI-1's codes of an affine's space

# From points of FSL's MNI152 to those of Talairach space, RAS mm (Lancaster et al. 2007, "icbm_fsl").
_TO_TALAIRACH = np.array(
    [
        [0.9464, 0.0034, -0.0026, -1.0680],
        [-0.0083, 0.9479, -0.0580, 1.0239],
        [0.0053, 0.0617, 0.9010, 3.1883],
        [0.0, 0.0, 0.0, 1.0],
    ]
)
_CELL_MM = 4.0  # of the template's
_EVERY = 3  # of the template's cells, each how-manieth the fit looks at


@dataclass(frozen=True)
class Placement:
    """How a scan's brain lies against the template's; see the module for what is usual.

    Attributes:
        litres: Its volume.
        overlap: Dice coefficient with the template's brain.
        outside: Fraction of it outside the template's.
        offset_mm: How far the centre of the template's brain moves when it is fitted to this one.
        tilt_deg: How far it turns.
        size: Of the template's along x, y and z.
        missing: Fraction of the template's brain, once fitted, where the scan has none.
        correlation: Of the two's intensities at 4 mm inside the brain, once fitted.
        off_mm: How far the fit moves the template's brain by its turn and its shift, root mean square.
        off_talairach_mm: How far it then lies from where Talairach space has it, sizes included.
    """

    litres: float
    overlap: float
    outside: float
    offset_mm: float
    tilt_deg: float
    size: tuple[float, float, float]
    missing: float
    correlation: float
    off_mm: float
    off_talairach_mm: float

    def fault(self, registration: str = "rigid", takes_mask: bool = True, code: int = 0) -> str:
        """What is wrong with a scan that was registered so, the likely cause, and what to do next, or an empty string.

        Args:
            registration: As the contract has it.
            takes_mask: Whether a brain mask would be as good as a stripped image.
            code: NIfTI-1's of the space that the header says the affine leads to, 0 where it says none.
        """
        if self.litres > MAX_LITRES:
            return too_large(self.litres, takes_mask)
        keeps_size = registration in ("rigid", "none")
        how = "rigidly (brainfm prep, or TurboPrep with -r r)" if keeps_size else _REGISTERED[registration]
        register = f"register it to the template {how}, or check its affine"
        if self.litres < MIN_LITRES:
            return (
                f"only {self.litres:.2f} litres of brain are in the field of view, too little for a whole; {register}"
            )
        most_mm, most_deg = MAX_OFFSET_MM, MAX_TILT_DEG
        if code in (SCANNER, ALIGNED):
            most_mm, most_deg = DOUBTFUL_OFFSET_MM, DOUBTFUL_TILT_DEG
        other_size = not keeps_size and (min(self.size) < MIN_SIZE or max(self.size) > MAX_SIZE)
        along = ", ".join(f"{size:.2f}" for size in self.size)
        figures = (
            (self.offset_mm > most_mm, f"its centre is {self.offset_mm:.0f} mm from the template's"),
            (self.tilt_deg > most_deg, f"it is turned by {self.tilt_deg:.0f}° against the template's"),
            (self.overlap < MIN_OVERLAP, f"its overlap (Dice) with the template's is {self.overlap:.2f}"),
            (self.outside > MAX_OUTSIDE, f"{self.outside:.0%} of it lie outside the template's"),
            (self.missing > MAX_MISSING, f"{self.missing:.0%} of it are missing"),
            (other_size, f"along x, y, z its size is {along} of the template's, as after rigid registration"),
        )
        wrong = "; ".join(words for is_wrong, words in figures if is_wrong)
        if wrong:
            cause = f", and {_CAUSES[code]}" if code in _CAUSES else ""
            return f"the brain does not lie where the template's does: {wrong}{cause}; {register}"
        if code == TALAIRACH:
            return f"{_CAUSES[code]}, which differs from MNI152 by up to a centimetre; {register}"
        if code != MNI152 and self.off_mm > TALAIRACH_MM and self.off_talairach_mm < TALAIRACH_SHARE * self.off_mm:
            return (
                f"the brain lies as in Talairach space, which differs from MNI152 by up to a centimetre: it is within "
                f"{self.off_talairach_mm:.1f} mm of that and {self.off_mm:.1f} mm from the template's place; {register}"
            )
        return ""


_CAUSES = {
    SCANNER: "its header says the scanner's own space (code 1): it may never have been registered",
    ALIGNED: "its header says the space of another image (code 2): it may be aligned to a scan, not to MNI152",
    TALAIRACH: "its header says Talairach space (code 3)",
}

_REGISTERED = {
    "affine": "by an affine transform",
    "linear": "by a linear (affine) transform",
    "nonlinear": "by a nonlinear transform",
}


def too_large(litres: float, takes_mask: bool) -> str:
    """What is wrong with an image of which so much counts as brain, and what to do next: a mask may be enough."""
    strip = "pass mask= (its brain mask), or strip it first" if takes_mask else "strip it first, and make the rest 0"
    return (
        f"the image is not skull-stripped, or its background is not 0: {litres:.1f} litres count as brain "
        f"and a brain has 1 to 2; {strip} (brainfm prep)"
    )


def contrast_fault(correlation: float, kind: str, *, is_head: bool = False) -> str:
    """What is wrong with the contrast of an image in the template's space, or an empty string.

    Args:
        correlation: Of its intensities with the template's: `Placement.correlation`, or that of `correlate`.
        kind: "T1w", "T2w" or "grey matter"; another word takes any contrast.
        is_head: Whether nothing said what of the image is brain.
    """
    if kind == "grey matter" and correlation < MIN_GREY_CORRELATION:
        return (
            f"the values do not follow a map of grey matter in MNI152 space (correlation {correlation:.2f} with the "
            "template's): an image, another tissue's map, or one in another space; use a map such as CAT12's mwp1"
        )
    if kind == "T1w" and correlation < (MIN_HEAD_CORRELATION if is_head else MIN_CORRELATION):
        return (
            f"inside the brain, the intensities do not follow a T1w image (correlation {correlation:.2f} with "
            "the template): another contrast, a label map, or a scan turned upside down; use the T1w scan"
        )
    if kind == "T2w" and correlation > MAX_T2W_CORRELATION:
        return (
            f"inside the brain, the intensities do not follow a T2w image (correlation {correlation:.2f} with the T1w "
            "template): it is T1w, or another contrast; use the T2w scan"
        )
    return ""


def correlate(volume: Volume, kind: str) -> float:
    """How an image of one channel correlates at 4 mm with the template's brain, or its "grey matter".

    What of the image is brain need not be known: the template says where to look.
    """
    template = _template(COARSE_GREY_MATTER if kind == "grey matter" else COARSE_BRAIN)
    steps, every = _about_two_mm(volume)
    image = volume.stored[0][every]
    intensities = image.astype(np.float64).ravel() * volume.slope + volume.inter
    parts = _parts(volume.affine @ np.diag([*steps, 1]))
    count, total = _per_cell(parts, image.shape, slice(None), intensities, template)
    core = template.core & (count > 0)
    return correlation(total[core] / count[core], template.voxels[core])


def _about_two_mm(volume: Volume) -> tuple[NDArray[np.int_], tuple[slice, ...]]:
    """Steps along the axes that leave a voxel about every 2 mm, and the slices that take them."""
    steps = np.maximum(1, np.floor(2.001 / volume.spacing)).astype(int)
    return steps, tuple(slice(None, None, int(step)) for step in steps)


def _parts(affine: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Affines of a grid's voxels; of their parts, where they are as large as the template's: no cell is left out."""
    parts = 1 + np.floor(np.linalg.norm(affine[:3, :3], axis=0) / _CELL_MM + 0.001).astype(int)
    at = product(*((np.arange(many) + 0.5) / many - 0.5 for many in parts))
    return [affine @ from_matvec(np.eye(3), offset) for offset in at]


def measure(volume: Volume, brain: NDArray[np.bool_]) -> Placement:
    """Where the voxels marked in `brain` [i, j, k] lie against the template's brain. At least one must be marked."""
    template = _template(COARSE_BRAIN)
    steps, every = _about_two_mm(volume)
    found = np.ascontiguousarray(brain[every])
    if not found.any():
        steps, every, found = np.ones(3, dtype=int), (slice(None),) * 3, brain
    affine, where = volume.affine @ np.diag([*steps, 1]), np.flatnonzero(found)
    parts = _parts(affine)
    number, cubic_mm = len(parts) * len(where), abs(float(np.linalg.det(affine[:3, :3]))) / len(parts)
    intensities = volume.stored[0][every][found].astype(np.float64) * volume.slope + volume.inter
    count, total = _per_cell(parts, found.shape, where, intensities, template)
    inside = int(count[template.brain].sum())
    part, mean = np.minimum(count * cubic_mm / _CELL_MM**3, 1), total / np.maximum(count, 1)
    fit = align(shaded(part, mean), template.target, nearby=False, overturned=False)
    missing, inner_correlation = _inside(count, total, fit.affine, template)
    if inner_correlation < 0:  # the fit took bright for dark, as in a T2w image
        fit = align(shaded(part, -mean), template.target, nearby=False, overturned=False)
        missing, inner_correlation = _inside(count, total, fit.affine, template)

    litres = number * cubic_mm / 1e6
    return Placement(
        litres=litres,
        overlap=2 * inside * cubic_mm / 1e6 / (litres + template.litres),
        outside=1 - inside / number,
        offset_mm=fit.shift_mm,
        tilt_deg=fit.turn_deg,
        size=_size(fit.affine),
        missing=missing,
        correlation=inner_correlation,
        off_mm=_rms(_moved_alone(fit.affine) - np.eye(4), template),
        off_talairach_mm=_rms(fit.affine - _talairach(), template),
    )


def _rms(difference: NDArray[np.float64], template: _Template) -> float:
    """The root mean square over the template's brain of what two affines about its centre differ by, mm."""
    return math.sqrt(np.einsum("ij,jk,ik", difference[:3], template.core_moments, difference[:3]))


def _moved_alone(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """The turn and the shift of an affine, without its sizes and shears."""
    left, _, right = np.linalg.svd(affine[:3, :3])
    alone = affine.copy()
    alone[:3, :3] = left @ right
    return alone


@cache
def _talairach() -> NDArray[np.float64]:
    """`_TO_TALAIRACH` about the centre of the template's brain."""
    template = _template(COARSE_BRAIN)
    to_mm = np.eye(4)
    to_mm[:3, 3] = template.affine[:3, :3] @ template.target.centre + template.affine[:3, 3]
    about: NDArray[np.float64] = np.linalg.inv(to_mm) @ _TO_TALAIRACH @ to_mm
    return about


def _cells(shape: tuple[int, ...], affine: NDArray[np.float64], template: _Template) -> NDArray[np.int32]:
    """In which of the template's voxels each voxel of a grid lies: a number, for `_per_cell`.

    The template has a rim of one voxel here, for all that lies outside.
    """
    indices = np.ogrid[tuple(slice(size) for size in shape)]
    cells = np.zeros((1, 1, 1), dtype=np.int32)
    for axis, (size, to_mm) in enumerate(zip(template.voxels.shape, affine[:3], strict=True)):
        # Along an axis-aligned grid a coordinate varies in one direction only, and stays one line of numbers.
        mm = sum(factor * index for factor, index in zip(to_mm[:3], indices, strict=True) if factor) + to_mm[3]
        cell = np.rint((mm - template.affine[axis, 3]) / template.affine[axis, axis])
        cells = cells * (size + 2) + (cell.clip(-1, size) + 1).astype(np.int32)
    return cells


def _per_cell(
    parts: list[NDArray[np.float64]],
    shape: tuple[int, ...],
    where: NDArray[np.intp] | slice,
    weights: NDArray[np.float64],
    template: _Template,
) -> tuple[NDArray[np.int_], NDArray[np.float64]]:
    """[x, y, z]: how many voxels fall into each of the template's, and the sum of their weights.

    Args:
        parts: The affine of the grid, or those of its voxels' parts, which count each.
        shape: Of the grid.
        where: Which of its voxels, in C order.
        weights: Theirs.
        template: The template.
    """
    whole = tuple(size + 2 for size in template.voxels.shape)
    count, total = np.zeros(math.prod(whole), dtype=int), np.zeros(math.prod(whole))
    for affine in parts:
        cells = _cells(shape, affine, template).ravel()[where]
        count += np.bincount(cells, minlength=len(count))
        total += np.bincount(cells, weights, len(total))
    inner = (slice(1, -1),) * 3
    return np.ascontiguousarray(count.reshape(whole)[inner]), np.ascontiguousarray(total.reshape(whole)[inner])


def _inside(
    count: NDArray[Any], total: NDArray[Any], affine: NDArray[np.float64], template: _Template
) -> tuple[float, float]:
    """What fraction of the template's brain, moved onto the scan's, is none there; the correlation inside both."""
    brain = count > 0
    at = product_of(affine[:3, :3], template.core_mm) + affine[:3, 3:]
    at = np.rint(at / _CELL_MM + template.target.centre[:, None]).astype(np.intp)
    where = np.ravel_multi_index(tuple(at), brain.shape, mode="clip")
    inside = _inner(brain).take(where)  # rims are dark in any average
    cells = where[inside]
    missing = 1 - float(brain.take(where).mean())
    return missing, correlation(total.take(cells) / count.take(cells), template.core_values[inside])


def _size(affine: NDArray[np.float64]) -> tuple[float, float, float]:
    """How large the brain is along x, y and z, the template's being 1; turns aside."""
    _, stretch, v = np.linalg.svd(affine[:3, :3])
    x, y, z = np.diag(v.T @ np.diag(stretch) @ v)
    return float(x), float(y), float(z)


def _inner(brain: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The voxels whose six neighbours are brain too."""
    inner = np.zeros_like(brain)
    middle = (slice(1, -1),) * 3
    inner[middle] = brain[middle]
    for axis in range(3):
        for shift in (slice(0, -2), slice(2, None)):
            inner[middle] &= brain[tuple(shift if a == axis else slice(1, -1) for a in range(3))]
    return inner


@dataclass(frozen=True, eq=False)
class _Template:
    """The template's brain, or its grey matter.

    Attributes:
        voxels: [x, y, z] mean T1w intensity in each 4 mm voxel, 0 outside the brain; or the fraction of grey matter.
        affine: To RAS millimetres; diagonal.
        brain: Where they are above 0.
        core: `_inner` of it.
        litres: Its volume.
        target: For a fit.
        core_mm: [3, n]: where the core's voxels lie from the target's centre.
        core_moments: [4, 4]: means of the products of these, and of 1.
        core_values: [n]: what they hold.
    """

    voxels: NDArray[np.float64]
    affine: NDArray[np.float64]
    brain: NDArray[np.bool_]
    core: NDArray[np.bool_]
    litres: float
    target: Target
    core_mm: NDArray[np.float64]
    core_moments: NDArray[np.float64]
    core_values: NDArray[np.float64]


@cache
def _template(file: Path) -> _Template:
    import nibabel as nib

    image = nib.load(file)
    voxels = np.asanyarray(image.dataobj).astype(np.float64)
    brain = voxels > 0
    core = _inner(brain)
    target = Target(shaded(brain.astype(np.float64), voxels), _CELL_MM, _EVERY)
    core_mm = ((np.argwhere(core) - target.centre) * _CELL_MM).T
    litres = int(brain.sum()) * _CELL_MM**3 / 1e6
    points = np.vstack([core_mm, np.ones(core_mm.shape[1])])
    moments = points @ points.T / points.shape[1]
    return _Template(voxels, image.affine, brain, core, litres, target, core_mm, moments, voxels[core])
