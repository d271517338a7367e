"""Did the preparation work? Figures of one scan on the contract's grid, one score of them all, a verdict and reasons.

A failed skull strip or registration gives an image that looks like any other to a network. So the template's brain is
fitted to the prepared one (`brainfm.scan.alignment`): how far that moves it is how far the scan is misplaced, and where
it then lies is where brain, grey matter and white matter are looked for.

A figure counts by its excess: how far it lies beyond what is typical of sound scans, on the side that is worse, in
units of its spread among them. The weighted excesses make the score, the probability that a scan is spoiled: a logistic
regression of sound preparations against ones spoiled on purpose. A figure's limits are where it alone would take the
score to the limits of the score; a few hard limits say what is decisive by itself. Coefficients, limits, and what they
were fitted on are in `assets/quality.json`, made by `benchmarks/quality.py`; how well they do on people that they were
not fitted on is in `benchmarks/README.md`.

Left and right cannot be told apart: the template is symmetric, and so is nearly every brain.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from brainfm.assets import QUALITY
from brainfm.prep.image import template, to_array
from brainfm.prep.normalize import white_peak
from brainfm.scan.alignment import Alignment, Lookup, Target, align, correlation, halved, product_of, shaded

Verdict: TypeAlias = Literal["pass", "look", "fail"]
VERDICTS: tuple[Verdict, ...] = ("pass", "look", "fail")

_MM = 2  # cells of this size, and of twice it, for what is compared as a whole
_ECHO_MM, _ECHO_SHARE = 40, 0.05  # least distance of an echo, and what of the brain has to overlap with itself there
_LEAST_CORE = 1000  # places in a tissue, of 8 mm³, fewer of which say nothing


@dataclass(frozen=True, eq=False)
class Prepared:
    """A scan on the contract's grid, before its brightness is normalised.

    Attributes:
        image: [x, y, z] with all that surrounds the brain.
        brain: [x, y, z] booleans, the brain mask.
        seen: [x, y, z] booleans: what the scan's field of view covers.
        stripped: Whether the scan came without its skull.
    """

    image: NDArray[np.float32]
    brain: NDArray[np.bool_]
    seen: NDArray[np.bool_]
    stripped: bool = False


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


@dataclass(frozen=True)
class _Meaning:
    """A figure in words, the values that it can have, and what one sees where it is low or high; "" is never wrong.

    A brain of 2.3 litres would be larger than any that is known.
    """

    title: str
    least: float
    most: float
    low: str = ""
    high: str = ""


_CUT = "the field of view of the scan cuts off the brain"
_OF_A_WHOLE_BRAIN = ("litres", "shift", "turn", "upright", "similarity", "missing", "symmetry")
_MOVED = "the registration may have gone wrong, or the header lies about the axes"

MEANINGS: dict[str, _Meaning] = {
    "litres": _Meaning(
        "brain volume, litres", 0, 2.3, "brain is missing from the mask", "more than brain is in the mask"
    ),
    "shift": _Meaning("misplaced against the template by, mm", 0, 500, "", _MOVED),
    "turn": _Meaning("turned against the template by, °", 0, 180, "", _MOVED),
    "upright": _Meaning(
        "likeness to the template as it lies, less that turned over or with its axes swapped",
        -2,
        2,
        "the header may have up and down, or front and back, the wrong way round",
    ),
    "similarity": _Meaning(
        "correlation with the template inside the brain",
        -1,
        1,
        "it may be no T1w image, or badly registered, or its bias field is left",
    ),
    "missing": _Meaning(
        "fraction of where the template has brain that the mask leaves out", 0, 1, "", "the mask cuts into the brain"
    ),
    "cut": _Meaning("surface of the brain at the edge of the field of view, cm²", 0, 1000, "", _CUT),
    "symmetry": _Meaning(
        "correlation of its left with its right half", -1, 1, "a half is corrupted, or something lies over it"
    ),
    "echo": _Meaning(
        "greatest likeness of the brain to itself 4 cm on or further, against what is usual so far away",
        0,
        1000,
        "",
        "a ghost lies over it, or what was outside the field of view",
    ),
    "bright": _Meaning(
        "fraction of the inside of the brain brighter than white matter by 30 %",
        0,
        1,
        "",
        "it may be no T1w image, or one after contrast agent, or something lies over it, such as what was outside the "
        "field of view",
    ),
    "bright_rim": _Meaning(
        "fraction of the mask's rim brighter than white matter", 0, 1, "", "scalp, marrow or eye is in the mask"
    ),
    "dark_rim": _Meaning(
        "fraction of what lies 4 to 8 mm inside the mask that is much darker than grey matter",
        0,
        1,
        "",
        "skull may be in the mask, or the brain has shrunk much",
    ),
    "cut_rim": _Meaning(
        "fraction of what lies right outside the mask as bright as brain, over that inside",
        0,
        10,
        "",
        "the mask may cut into the brain",
    ),
    "bite": _Meaning(
        "fraction of what lies right outside 3 cm of the mask's edge as bright as brain, where it is highest",
        0,
        1,
        "",
        "the mask may leave out a piece of the brain",
    ),
    "contrast": _Meaning(
        "white over grey matter, fraction of white",
        -10,
        1,
        "grey and white matter differ too little for a T1w image, or the other way round",
        "grey and white matter differ too much for a T1w image",
    ),
    "noise": _Meaning("noise, fraction of white matter's brightness", 0, 10, "", "the scan is noisy or moved"),
}


@dataclass(frozen=True)
class Scale:
    """How a figure counts.

    Attributes:
        typical: The median of sound scans.
        spread: Of sound scans about it.
        weight: Of its excess in the score.
        hard: Values beyond which it is decisive by itself: to look at, and to fail; lowest or highest by what is worse.
    """

    typical: float
    spread: float
    weight: float
    hard: tuple[float | None, float | None] = (None, None)

    def excess(self, value: float, meaning: _Meaning) -> float:
        """How far a value lies beyond what is typical on a side that is worse, in spreads."""
        beyond = (value - self.typical) / self.spread
        return max(0.0, beyond if meaning.high else 0.0, -beyond if meaning.low else 0.0)


@dataclass(frozen=True)
class Score:
    """The calibrated score: `assets/quality.json`, read.

    Attributes:
        scales: Of each figure.
        intercept: Of the logistic regression.
        look: The probability of being spoiled from which a person should look.
        fail: And from which a scan fails.
    """

    scales: dict[str, Scale]
    intercept: float
    look: float
    fail: float

    def contributions(self, values: dict[str, float]) -> dict[str, float]:
        """What each figure adds to the logit."""
        return {
            name: self.scales[name].weight * self.scales[name].excess(values[name], MEANINGS[name]) for name in values
        }

    def of(self, values: dict[str, float]) -> float:
        """The probability that a scan of these figures is spoiled."""
        logit = self.intercept + sum(self.contributions(values).values())
        return 1 / (1 + math.exp(-min(logit, 700)))

    def limits(self, name: str, probability: float, hard: float | None) -> tuple[float, float]:
        """The lowest and highest value at which a figure alone leaves the score below `probability`."""
        meaning, scale = MEANINGS[name], self.scales[name]
        low, high = meaning.least, meaning.most
        if scale.weight > 0:
            away = scale.spread * (math.log(probability / (1 - probability)) - self.intercept) / scale.weight
            low = max(low, scale.typical - away) if meaning.low else low
            high = min(high, scale.typical + away) if meaning.high else high
        if hard is not None:
            low, high = (max(low, hard), high) if meaning.low else (low, min(high, hard))
        return float(f"{low:.4g}"), float(f"{high:.4g}")

    def ranges(self) -> dict[str, Range]:
        """The limits of the score, and those that follow for each figure."""
        found = {"score": Range("probability that the preparation is spoiled", (0, self.look), (0, self.fail))}
        for name, meaning in MEANINGS.items():
            passes, looks = (
                self.limits(name, probability, hard)
                for probability, hard in zip((self.look, self.fail), self.scales[name].hard, strict=True)
            )
            found[name] = Range(meaning.title, passes, looks, meaning.low, meaning.high)
        return found


def read_score(text: str) -> Score:
    """The score that `benchmarks/quality.py` wrote."""
    kept = json.loads(text)
    scales = {
        name: Scale(one["typical"], one["spread"], one["weight"], tuple(one["hard"]))
        for name, one in kept["figures"].items()
    }
    return Score(scales, kept["intercept"], kept["look"], kept["fail"])


SCORE = read_score(QUALITY.read_text(encoding="utf-8"))
RANGES: dict[str, Range] = SCORE.ranges()


@dataclass(frozen=True)
class Figure:
    """A measured figure: its name in `RANGES`, and how it came out."""

    name: str
    value: float
    verdict: Verdict
    reason: str


def judge(prepared: Prepared) -> tuple[list[Figure], Verdict]:
    """The score and every figure of a scan, and the worst verdict among them.

    Where the field of view cuts off the brain, that is the reason for whatever a cut brain puts out of its range.
    """
    return judged(measured(prepared))


def judged(values: dict[str, float], score: Score = SCORE) -> tuple[list[Figure], Verdict]:
    """The score of measured figures with each of them, and the worst verdict among them."""
    ranges = RANGES if score is SCORE else score.ranges()
    cut = values["cut"] > ranges["cut"].passes[1]
    figures = [_judged(name, value, cut, ranges) for name, value in values.items()]
    whole = _judged("score", score.of(values), ranges=ranges)
    if whole.verdict != "pass":
        contributions = score.contributions(values)
        first = max(contributions, key=contributions.__getitem__)
        decided = next(figure for figure in figures if figure.name == first)
        says = decided.reason or _usual(first, values[first], score, cut)
        whole = Figure("score", whole.value, whole.verdict, f"{whole.reason}; mostly by {first}: {says}")
    figures.insert(0, whole)
    return figures, max((figure.verdict for figure in figures), key=VERDICTS.index)


def _usual(name: str, value: float, score: Score, cut: bool) -> str:
    """What a figure says that is within its own limits but decides with others."""
    scale, meaning = score.scales[name], MEANINGS[name]
    why = _CUT if cut and name in _OF_A_WHOLE_BRAIN else meaning.low if value < scale.typical else meaning.high
    return f"{meaning.title}: {value:.3g}, where {scale.typical:.3g} is typical; {why}"


def _judged(name: str, value: float, cut: bool = False, ranges: dict[str, Range] = RANGES) -> Figure:
    why = _CUT if cut and name in _OF_A_WHOLE_BRAIN else ""
    return figure_of(name, value, ranges[name], why)


def figure_of(name: str, value: float, usual: Range, cause: str = "") -> Figure:
    """A figure, and where it does not pass, the limit that it breaks: of what fails, the one beyond which it fails.

    `cause` is what is known to have caused it, instead of what a value on that side means.
    """
    shown = float(f"{value:.4g}")
    if usual.passes[0] <= value <= usual.passes[1]:
        return Figure(name, shown, "pass", "")
    verdict: Verdict = "look" if usual.looks[0] <= value <= usual.looks[1] else "fail"
    limits = usual.passes if verdict == "look" else usual.looks
    side, limit, why = ("below", limits[0], usual.low) if value < limits[0] else ("above", limits[1], usual.high)
    why = cause or why
    return Figure(name, shown, verdict, f"{usual.title}: {value:.3g} is {side} {limit:.3g}{f'; {why}' if why else ''}")


def measured(prepared: Prepared) -> dict[str, float]:
    """The figures of a scan, by name."""
    cells = _Cells.of(prepared.image, prepared.brain)
    usual = _template()
    fit = align(cells.shaded(), usual.target)
    brain, brightness = halved(cells.brain), halved(cells.brain * cells.inside)
    found = {
        "litres": float(prepared.brain.sum()) / 1e6,
        "shift": fit.shift_mm,
        "turn": fit.turn_deg,
        "upright": fit.upright,
    }
    at, mirrored = (_looked_up(brain, brightness, fit, places) for places in (usual.core, usual.mirrored_core))
    both = (at[0] > 0.5) & (mirrored[0] > 0.5)
    found |= {
        "similarity": correlation(at[1][at[0] > 0.5], usual.core_brightness[at[0] > 0.5]),
        "missing": float((at[0] < 0.5).mean()),
        "cut": _cut_cm2(prepared.seen, cells.brain),
        "symmetry": correlation(at[1][both], mirrored[1][both]),
        "echo": _echo(brain, brightness),
    }
    grey, white = (_moved(places, fit) for places in (usual.grey, usual.white))
    tissue, level = _tissue(prepared, grey, white)
    found["bright"] = _fraction(cells.image > 1.3 * level, _shrunk(_shrunk(cells.brain > 0.5)))
    return found | ({} if prepared.stripped else _rim(cells, level, level * (1 - tissue["contrast"]))) | tissue


def get_ready() -> None:
    """Work out what is the template's, which a process needs once and which takes as long as the figures of a scan."""
    _template()


def _looked_up(
    brain: NDArray[Any], brightness: NDArray[Any], fit: Alignment, places: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How much of a scan's cells is brain, and its mean brightness, at places [3, n] of the template."""
    where = _moved(places, fit) / (2 * _MM) + _template().centre[:, None]
    part, total = (Lookup(cells).at(where) for cells in (brain, brightness))
    return part, total / np.maximum(part, 1e-3)


def _moved(places: NDArray[np.float64], fit: Alignment) -> NDArray[np.float64]:
    return product_of(fit.affine[:3, :3], places) + fit.affine[:3, 3:]


def _echo(brain: NDArray[Any], brightness: NDArray[Any]) -> float:
    """How like the brain's fine structure is to itself, shifted by whichever 4 cm or more, as a multiple of the usual.

    A ghost, or what is wrapped around, lies over the brain and once more where it belongs. Shifts of all directions are
    looked at together, on cells of 4 mm, by their Fourier transforms. Likeness is the correlation times the root of the
    number of places that it is over; the usual one, its root mean square over the shifts, is larger where an image is
    smooth.
    """
    whole = (brain > 0.9).astype(np.float32)
    if not whole.any():
        return 0.0
    mean = brightness / np.maximum(brain, 1e-3) * whole
    fine = (mean - _blurred(mean, 5) / np.maximum(_blurred(whole, 5), 1e-3)) * whole
    most = float(np.percentile(np.abs(fine[whole > 0]), 98))
    fine = np.clip(fine, -most, most).astype(np.float32)
    shape = [2 * size for size in whole.shape]
    of_fine, of_square, of_whole = (np.fft.rfftn(part, shape, axes=(0, 1, 2)) for part in (fine, fine**2, whole))
    product, square, places = (
        np.fft.irfftn(one * np.conj(other), shape, axes=(0, 1, 2))
        for one, other in ((of_fine, of_fine), (of_square, of_whole), (of_whole, of_whole))
    )
    # Of the places that overlap, the sums of squares of both copies: one is the other's, shifted the other way.
    squares = square * np.roll(np.flip(square), 1, (0, 1, 2))
    x, y, z = (2 * _MM * np.fft.fftfreq(size, 1 / size) for size in shape)
    far = x[:, None, None] ** 2 + y[:, None] ** 2 + z**2 >= _ECHO_MM**2
    looked_at = far & (places >= max(1.0, _ECHO_SHARE * float(whole.sum()))) & (squares > 1e-6 * squares.max())
    if not looked_at.any():
        return 0.0
    alike = product[looked_at] * np.sqrt(places[looked_at] / squares[looked_at])
    return float(max(0.0, alike.max()) / max(1e-9, np.sqrt(np.mean(alike**2))))


def _blurred(cells: NDArray[Any], width: int) -> NDArray[Any]:
    """Means over so many cells, an odd number, along each axis."""
    half = width // 2
    for axis in range(3):
        beyond = [(half + 1, half) if other == axis else (0, 0) for other in range(3)]
        lines = np.moveaxis(np.cumsum(np.pad(cells, beyond), axis, dtype=np.float64), axis, 0)
        cells = np.moveaxis((lines[width:] - lines[:-width]) / width, 0, axis)
    return cells


def _cut_cm2(seen: NDArray[np.bool_], brain: NDArray[np.float32]) -> float:
    """The area of brain right at the edge of the field of view, of the side of the six where it is largest.

    The slope of what is seen, summed over a volume, is the area of its edge; at the edge, half of it lies in the brain.
    A brain in a box that fits it touches all sides a little: where it was stripped, what is seen is such a box.
    """
    slopes = np.asarray(np.gradient(np.pad(_averaged(seen), 1), _MM))[:, 1:-1, 1:-1, 1:-1]
    edge = (slopes != 0).any(axis=0) & (brain > 0)
    slopes = slopes[:, edge].astype(np.float64)
    axis: NDArray[np.intp] = np.abs(slopes).argmax(axis=0)
    side = 2 * axis + (np.take_along_axis(slopes, axis[None], 0)[0] > 0)
    areas = np.bincount(side, np.linalg.norm(slopes, axis=0) * brain[edge], 6)
    return float(2 * areas.max() * _MM**3 / 100)


def _rim(cells: _Cells, white: float, grey: float) -> dict[str, float]:
    """What lies right inside and right outside the mask's edge, against the brightness of white and grey matter.

    Brain extractions end in the fluid around the brain; where one ends further in, brain lies right outside it. What is
    as bright as brain goes by the scan's own grey matter, whose brightness is 0.56 to 0.85 of white matter's in T1w
    heads. Of pieces of 28 mm, the one of a hundred with the most brain outside tells of a piece left out.
    """
    brain = cells.brain > 0.5
    shells = [brain]
    for _ in range(4):
        shells.append(_shrunk(shells[-1]))
    inside, deeper = brain & ~shells[1], shells[2] & ~shells[4]
    outside = _grown(brain) & ~brain
    like_brain = (cells.image > 0.7 * grey) & (cells.image < 1.1 * white)
    around, of_it = (_blurred(halved(part.astype(np.float32)), 7) for part in (outside, outside & like_brain))
    nearby = halved(outside.astype(np.float32)) > 0
    fractions = of_it[nearby] / np.maximum(around[nearby], 1e-6)
    return {
        "bright_rim": float((cells.image[inside] > 1.15 * white).mean()),
        "dark_rim": float((cells.image[deeper] < 0.6 * grey).mean()) if deeper.any() else 1.0,
        "cut_rim": _fraction(like_brain, outside) / max(_fraction(like_brain, deeper), 0.1),
        "bite": min(1.0, float(np.percentile(fractions, 99))) if nearby.any() else 0.0,
    }


def _fraction(cells: NDArray[np.bool_], of: NDArray[np.bool_]) -> float:
    return float(cells[of].mean()) if of.any() else 0.0


def _tissue(
    prepared: Prepared, grey_places: NDArray[np.float64], white_places: NDArray[np.float64]
) -> tuple[dict[str, float], float]:
    """Contrast and noise, and the brightness of white matter, at places in mm from the template's centre."""
    grey, white = (_voxels(places, prepared.brain) for places in (grey_places, white_places))
    if min(grey.shape[1], white.shape[1]) < _LEAST_CORE:
        return {"contrast": 0.0, "noise": 1.0}, white_peak(prepared.image[prepared.brain])
    image = prepared.image
    level, darker = (float(np.median(image[tuple(voxels)])) for voxels in (white, grey))
    if level <= 0:
        return {"contrast": 0.0, "noise": 1.0}, 1.0
    # Second differences hold noise and little else inside white matter; 1.4826 makes a median a standard deviation.
    step = np.array([[1], [0], [0]])
    ripple = image[tuple(white)] - (image[tuple(white - step)] + image[tuple(white + step)]) / 2
    noise = 1.4826 * float(np.median(np.abs(ripple))) / math.sqrt(1.5)
    return {"contrast": (level - darker) / level, "noise": noise / level}, level


def _voxels(places: NDArray[np.float64], brain: NDArray[np.bool_]) -> NDArray[np.intp]:
    """[3, n]: the voxels of the grid at places in mm from the template's centre, those in the brain."""
    centre = 2 * _MM * _template().centre + 0.5  # a cell of 4 mm holds voxels 4k − 1 to 4k + 2
    voxels = np.rint(places + centre[:, None]).astype(np.intp)
    voxels = voxels[:, ((voxels >= 1) & (voxels < np.array(brain.shape)[:, None] - 1)).all(axis=0)]
    return voxels[:, brain[tuple(voxels)]]


# --- Cells, and the template's ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Cells:
    """A scan on cells of 2 mm: cell k holds voxels 2k − 1 and 2k.

    Attributes:
        image: [x, y, z] mean brightness.
        brain: The fraction that is brain.
        inside: Mean brightness of that part, 0 where there is none.
    """

    image: NDArray[np.float32]
    brain: NDArray[np.float32]
    inside: NDArray[np.float32]

    @classmethod
    def of(cls, image: NDArray[np.float32], brain: NDArray[np.bool_]) -> _Cells:
        part = _averaged(brain)
        inside = _averaged(image * brain) / np.maximum(part, 0.5 / _MM**3)
        return cls(_averaged(image), part, inside.astype(np.float32))

    def shaded(self) -> NDArray[Any]:
        """[x, y, z] on cells of 4 mm, for a fit."""
        return halved(shaded(self.brain, self.inside))


def _averaged(voxels: NDArray[Any]) -> NDArray[np.float32]:
    """Means of 2×2×2 voxels, with one of nothing before the first along each axis."""
    total = voxels.view(np.uint8) if voxels.dtype == np.bool_ else voxels
    for axis in (2, 1, 0):  # the slowest first: whole planes are added
        lines = np.moveaxis(total, axis, 0)
        shape = [n // 2 + 1 if other == axis else n for other, n in enumerate(total.shape)]
        total = np.zeros(shape, dtype=total.dtype, order="C" if total.flags.c_contiguous else "F")
        summed = np.moveaxis(total, axis, 0)
        summed[: len(lines[1::2]) + 1][1:] += lines[1::2]
        summed[: len(lines[::2])] += lines[::2]
    return total.astype(np.float32) / np.float32(_MM**3)


def _grown(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    grown = mask.copy()
    for axis in range(3):
        whole, out = np.moveaxis(mask, axis, 0), np.moveaxis(grown, axis, 0)
        out[1:] |= whole[:-1]
        out[:-1] |= whole[1:]
    return grown


def _shrunk(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return ~_grown(~mask)


@dataclass(frozen=True, eq=False)
class _Template:
    """The template's brain as figures need it; places are [3, n] in mm from its centre.

    Attributes:
        target: What a fit needs.
        centre: Of its brain, in cells of 4 mm.
        core: Places inside its brain, a cell from its edge.
        mirrored_core: The same places on the other side.
        core_brightness: [n] there.
        grey: Places inside its grey matter.
        white: And its white matter.
    """

    target: Target
    centre: NDArray[np.float64]
    core: NDArray[np.float64]
    mirrored_core: NDArray[np.float64]
    core_brightness: NDArray[np.float64]
    grey: NDArray[np.float64]
    white: NDArray[np.float64]


@cache
def _template() -> _Template:
    voxels = to_array(template())
    cells = _Cells.of(voxels, voxels > 0)
    target = Target(cells.shaded(), 2.0 * _MM)
    centre = target.centre
    brain = halved(cells.brain)
    inside = np.argwhere(_shrunk(brain > 0.5))
    core = ((inside - centre) * 2 * _MM).T
    middle = (voxels.shape[0] - 1) / 2  # x = 0 mm
    mirrored = core.copy()
    mirrored[0] = 2 * (middle - (2 * _MM * centre[0] + 0.5)) - core[0]
    white = white_peak(voxels[voxels > 0])
    tissue = []
    for low, high, shrink in ((0.60, 0.82, False), (0.92, 2.0, True)):
        found = (cells.inside > low * white) & (cells.inside < high * white) & (cells.brain > 0.99)
        found = _shrunk(found) if shrink else found
        tissue.append(((np.argwhere(found) - 0.5) / 2 - centre).T * 2 * _MM)
    return _Template(
        target,
        centre,
        core,
        mirrored,
        halved(cells.inside * cells.brain)[tuple(inside.T)],
        *tissue,
    )
