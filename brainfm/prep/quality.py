"""Did the preparation work? Figures of one scan on the contract's grid, each with a range, a verdict and a reason.

A failed skull strip or registration gives an image that looks like any other to a network. Every figure has a range in
which it passes and a wider one in which a person should look at the picture; beyond it the scan fails.

What the ranges were set from: the MNI152 2009a head, moved, dimmed and noisy (`benchmarks/prep.py`); Colin27's head; a
made-up head corrupted on purpose (`tests/prep/test_corrupted_inputs.py`). No patients: of heads of other ages and
scanners more will have to be looked at, and `brainfm qc` shows what is unusual among one's own.

|            | MNI152 2009a, moved | Colin27 | corrupted, for example                                     |
|------------|---------------------|---------|------------------------------------------------------------|
| similarity | 0.91 to 0.96        | 0.68    | 0.18 upside down, 0.38 15 mm off, −0.98 another contrast   |
| upright    | 0.48 to 0.72        | 0.38    | −0.45 upside down, −0.71 back to front                     |
| symmetry   | 0.95 to 0.98        | 0.74    | 0.20 rolled by 15°, 0 half a brain                         |
| tilt       | 0.7 to 1.4          | 0.7     | 23 nodding by 20°                                          |
| offset     | 0.3 to 0.9          | 0.5     | 6 and 15 shifted by as much                                |
| balance    | 0 to 0.005          | 0.003   | 0.16 without the top of one half                           |
| cut_rim    | 0.06 to 0.09        | 0.10    | 0.90 the mask 6 mm too small                               |
| contrast   | 0.25 to 0.27        | 0.26    | 0.08 upside down, −0.81 another contrast                   |
| noise      | 0.003 to 0.011      | 0.004   | 0.28 very noisy                                            |

Left and right cannot be told apart: the template is symmetric, and so is nearly every brain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from brainfm.contract import Volume
from brainfm.prep.image import affine_of, like, sitk, template, to_array
from brainfm.prep.normalize import white_peak
from brainfm.scan.placement import MAX_OFFSET_MM, MAX_TILT_DEG, MIN_CORRELATION, MIN_OVERLAP, measure

Verdict: TypeAlias = Literal["pass", "look", "fail"]
VERDICTS: tuple[Verdict, ...] = ("pass", "look", "fail")

_MM = 4  # block averages of this size for what is compared as a whole
_CORE_MM = 2  # a tissue's own voxels are this far from others in the template


@dataclass(frozen=True, eq=False)
class Prepared:
    """A scan on the contract's grid, before its brightness is normalised.

    Attributes:
        image: [x, y, z] with all that surrounds the brain.
        brain: [x, y, z] booleans, the brain mask.
        seen: [x, y, z] booleans: what the scan's field of view covers.
        stripped: Whether the scan came without its skull.
        normalized: The image as another program normalised it, where one did: what is written then.
    """

    image: NDArray[np.float32]
    brain: NDArray[np.bool_]
    seen: NDArray[np.bool_]
    stripped: bool = False
    normalized: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Range:
    """What is usual for a figure.

    Attributes:
        title: In words, with its unit.
        passes: Lowest and highest value that passes.
        looks: Beyond these it fails.
        low: What a value below `passes` means.
        high: What a value above it means.
    """

    title: str
    passes: tuple[float, float]
    looks: tuple[float, float]
    low: str = ""
    high: str = ""

    def limits(self) -> dict[str, tuple[float, float]]:
        """The two ranges, for the record of a scan."""
        return {"passes": self.passes, "looks": self.looks}


_CUT = "the field of view of the scan cuts off the brain"
_CUT_MM2 = 3000.0  # a brain of 1.5 litres that lacks 1 % is cut over 4000; one that fits closely touches less
_OF_A_WHOLE_BRAIN = ("litres", "overlap", "offset", "tilt", "similarity", "upright", "symmetry", "balance", "unseen")
_MOVED = "the registration may have gone wrong, or the header lies about the axes"

RANGES: dict[str, Range] = {
    "litres": Range(
        "brain volume, litres",
        (0.9, 2.15),
        (0.7, 2.3),
        "brain is missing from the mask",
        "more than brain is in the mask",
    ),
    "overlap": Range("overlap with the template's brain, Dice", (0.8, 1), (MIN_OVERLAP, 1), _MOVED),
    "offset": Range("distance of its centre from the template's, mm", (0, 4), (0, MAX_OFFSET_MM), "", _MOVED),
    "tilt": Range("tilt against the template, °", (0, 8), (0, MAX_TILT_DEG), "", _MOVED),
    "similarity": Range(
        "correlation with the template",
        (0.6, 1),
        (MIN_CORRELATION, 1),
        "it may be no T1w image, or badly registered, or its bias field is left",
    ),
    "upright": Range(
        "similarity as it lies, less that upside down or back to front",
        (0.2, 2),
        (0.05, 2),
        "the header may have up and down, or front and back, the wrong way round",
    ),
    "symmetry": Range(
        "correlation with its own left–right mirror image",
        (0.6, 1),
        (0.4, 1),
        "it is rolled or turned, or a half is corrupted",
    ),
    "balance": Range(
        "difference of the halves' volumes, fraction of the whole",
        (0, 0.04),
        (0, 0.1),
        "",
        "the mask lacks brain on one side, or spills over",
    ),
    "unseen": Range(
        "fraction of the template's brain outside the field of view",
        (0, 0.01),
        (0, 0.05),
        "",
        "the registration may have gone wrong, or the scan cuts off the brain",
    ),
    "bright_rim": Range(
        "fraction of the mask's rim brighter than white matter",
        (0, 0.05),
        (0, 0.15),
        "",
        "scalp, marrow or eye is in the mask",
    ),
    "cut_rim": Range(
        "fraction of the surroundings as bright as brain",
        (0, 0.35),
        (0, 0.6),
        "",
        "the mask may cut into the brain",
    ),
    "contrast": Range(
        "white over grey matter, fraction of white",
        (0.08, 0.6),
        (0.03, 0.8),
        "grey and white matter differ too little for a T1w image",
        "grey and white matter differ too much for a T1w image",
    ),
    "noise": Range(
        "noise, fraction of white matter's brightness", (0, 0.1), (0, 0.2), "", "the scan is noisy or moved"
    ),
}


@dataclass(frozen=True)
class Figure:
    """A measured figure: its name in `RANGES`, and how it came out."""

    name: str
    value: float
    verdict: Verdict
    reason: str


def judge(prepared: Prepared) -> tuple[list[Figure], Verdict]:
    """Every figure of a scan, and the worst verdict among them.

    Where the field of view cuts off the brain, that is the reason for whatever a cut brain puts out of its range.
    """
    values = _measured(prepared)
    cut = values["unseen"] > RANGES["unseen"].passes[1] and _cut_mm2(prepared) > _CUT_MM2
    figures = [_judged(name, value, cut) for name, value in values.items()]
    return figures, max((figure.verdict for figure in figures), key=VERDICTS.index)


def _judged(name: str, value: float, cut: bool = False) -> Figure:
    """A figure, and where it does not pass, the limit that it breaks: of what fails, the one beyond which it fails."""
    usual = RANGES[name]
    shown = float(f"{value:.4g}")
    if usual.passes[0] <= value <= usual.passes[1]:
        return Figure(name, shown, "pass", "")
    verdict: Verdict = "look" if usual.looks[0] <= value <= usual.looks[1] else "fail"
    limits = usual.passes if verdict == "look" else usual.looks
    side, limit, why = ("below", limits[0], usual.low) if value < limits[0] else ("above", limits[1], usual.high)
    if cut and name in _OF_A_WHOLE_BRAIN:
        why = _CUT
    return Figure(name, shown, verdict, f"{usual.title}: {value:.3g} is {side} {limit:g}; {why}")


def _cut_mm2(prepared: Prepared) -> float:
    """How much of the brain lies right at the edge of the field of view, mm²: the area of the cut."""
    beyond = like((~prepared.seen).astype(np.uint8), template())
    return float((prepared.brain & (to_array(sitk.BinaryDilate(beyond, [1, 1, 1])) > 0)).sum())


def _measured(prepared: Prepared) -> dict[str, float]:
    image, brain = prepared.image, prepared.brain
    placement = measure(Volume(image[None], brain, affine_of(template())), brain)
    found = {
        "litres": float(brain.sum()) / 1e6,
        "overlap": placement.overlap,
        "offset": placement.offset_mm,
        "tilt": placement.tilt_deg,
        "similarity": placement.correlation,
        "upright": _upright(image, brain),
        "symmetry": _symmetry(image, brain),
        "balance": _balance(brain),
        "unseen": float((_template_brain() & ~prepared.seen).sum() / _template_brain().sum()),
    }
    return found | ({} if prepared.stripped else _rim(image, brain)) | _tissue(image, brain)


def _upright(image: NDArray[np.float32], brain: NDArray[np.bool_]) -> float:
    """How much more the brain resembles the template as it lies than turned over about its centre."""
    own, usual = _centred(_blocks(image, brain)[0]), _template_blocks()
    turned = [_agreement(np.flip(own, axes), usual) for axes in ((1,), (2,), (1, 2))]
    return _agreement(own, usual) - max(turned)


def _symmetry(image: NDArray[np.float32], brain: NDArray[np.bool_]) -> float:
    own, filled = _blocks(image, brain)
    both = (filled > 0.9) & (filled[::-1] > 0.9)
    return _correlation(own[both], own[::-1][both])


def _balance(brain: NDArray[np.bool_]) -> float:
    middle = brain.shape[0] // 2  # x = 0 mm
    left, right = int(brain[:middle].sum()), int(brain[middle + 1 :].sum())
    return abs(left - right) / max(1, left + right)


def _rim(image: NDArray[np.float32], brain: NDArray[np.bool_]) -> dict[str, float]:
    """What lies right inside and right outside the mask's edge, against the brightness of white matter."""
    core = _cores()[1] & brain
    white = float(np.median(image[core])) if core.any() else white_peak(image[brain])
    box = _box(brain, margin=5)
    image, brain = image[box], brain[box]
    mask = sitk.GetImageFromArray(np.ascontiguousarray(brain.transpose(2, 1, 0)).astype(np.uint8))
    inside = brain & ~(to_array(sitk.BinaryErode(mask, [2, 2, 2])) > 0)
    near, far = (to_array(sitk.BinaryDilate(mask, [mm] * 3)) > 0 for mm in (2, 4))
    outside = far & ~near
    return {
        "bright_rim": float((image[inside] > 1.15 * white).mean()),
        "cut_rim": float(((image[outside] > 0.6 * white) & (image[outside] < 1.1 * white)).mean()),
    }


def _tissue(image: NDArray[np.float32], brain: NDArray[np.bool_]) -> dict[str, float]:
    """Contrast and noise, where the template's white and grey matter lie."""
    grey_core, white_core = (core & brain for core in _cores())
    if min(grey_core.sum(), white_core.sum()) < 1000:
        return {"contrast": 0.0, "noise": 1.0}
    grey, white = (float(np.median(image[core])) for core in (grey_core, white_core))
    if white <= 0:
        return {"contrast": 0.0, "noise": 1.0}
    # Second differences hold noise and little else inside white matter; 1.4826 makes a median a standard deviation.
    ripple = image[1:-1] - (image[:-2] + image[2:]) / 2
    noise = 1.4826 * float(np.median(np.abs(ripple[white_core[1:-1]]))) / math.sqrt(1.5)
    return {"contrast": (white - grey) / white, "noise": noise / white}


# --- Shared ---------------------------------------------------------------------------------------


@cache
def _template_brain() -> NDArray[np.bool_]:
    brain: NDArray[np.bool_] = to_array(template()) > 0
    return brain


@cache
def _template_blocks() -> NDArray[np.float64]:
    return _centred(_blocks(to_array(template()), _template_brain())[0])


@cache
def _cores() -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Where the template is grey matter, and where it is white, away from its other tissues."""
    voxels = to_array(template())
    white = white_peak(voxels[voxels > 0])
    cores = []
    for low, high in ((0.60, 0.82), (0.92, 2.0)):
        tissue = (voxels > low * white) & (voxels < high * white)
        radius = [_CORE_MM if high > 1 else 1] * 3
        cores.append(to_array(sitk.BinaryErode(like(tissue.astype(np.uint8), template()), radius)) > 0)
    return cores[0], cores[1]


def _box(brain: NDArray[np.bool_], margin: int) -> tuple[slice, ...]:
    """The smallest box that holds the brain and `margin` voxels around it."""
    box = []
    for axis in range(3):
        hits = np.flatnonzero(brain.any(axis=tuple(other for other in range(3) if other != axis)))
        box.append(slice(max(0, int(hits[0]) - margin), int(hits[-1]) + 1 + margin))
    return tuple(box)


def _blocks(image: NDArray[np.float32], brain: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean brightness of the brain in blocks of 4 mm (0 without brain), and the fraction of each that is brain.

    The blocks are symmetric about x = 0.
    """

    def summed(values: NDArray[Any]) -> NDArray[np.float64]:
        # 193 voxels: the middle one is x = 0; one more on the left makes 194, and 3 on each side 200 = 50 blocks
        padded = np.pad(values, ((3, 4), (1, 2), (3, 4)))
        shape = tuple(n for size in padded.shape for n in (_MM, size // _MM))
        total: NDArray[np.float64] = padded.reshape(shape, order="F").sum(axis=(0, 2, 4), dtype=np.float64)
        return total

    count = summed(brain)
    mean = np.where(count > 0, summed(image * brain) / np.maximum(count, 1), 0)
    return mean, count / _MM**3


def _centred(blocks: NDArray[np.float64]) -> NDArray[np.float64]:
    """The blocks moved so that the centre of what is not 0 is the middle of the array."""
    found = np.argwhere(blocks > 0)
    shift = np.rint((np.array(blocks.shape) - 1) / 2 - (found.min(axis=0) + found.max(axis=0)) / 2).astype(int)
    return np.roll(blocks, shift, axis=(0, 1, 2))


def _agreement(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Correlation over all blocks where either is brain: shape counts as well as brightness."""
    either = (a > 0) | (b > 0)
    return _correlation(a[either], b[either])


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])
