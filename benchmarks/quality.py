"""The score that judges prepared scans: fitted on people's heads, sound and spoiled, and tried on those left out.

SCANS is a table (CSV) of raw scans with the columns `path`; `person`, for scans of one person are left out together; and
`truth`: "sound", "odd" (reported, not fitted on), or what is wrong with it, a word of SEEN. Each is prepared as
`brainfm prep` does (about 40 s of processor time; kept in CACHE), then moved and spoiled on the contract's grid in each
way of SOUND and SPOILED, and judged. No head comes with brainfm.

The rule. A figure's typical value is the median over sound cases, each person counting once; its spread is what 95 % of
sound cases lie within on the side that is worse. Excesses count up to MOST spreads. A logistic regression (scikit-learn,
C = 1, classes and persons weighted equally, negative weights left out) gives the probability that a case is spoiled. A
score is looked at from the highest one at which no more than TAIL of sound cases are (a person's own median case
counting most), and fails where all but TAIL_OF_FAILED pass below it. Hard limits are in HARD.

python benchmarks/quality.py SCANS CACHE [--write] [--only-figures]
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainfm.assets import QUALITY
from brainfm.files import write_json
from brainfm.prep.image import like, sitk, template, to_array
from brainfm.prep.quality import MEANINGS, Prepared, Scale, Score, judged, measured
from brainfm.scan.alignment import rotation

Spoil = Callable[[Prepared, np.random.Generator], Prepared]

# Which figures tell the truth about each kind of spoiling.
SEEN: dict[str, set[str]] = {
    "place": {"shift", "turn", "upright", "similarity"},
    "cut": {"cut"},
    "mask": {"litres", "spill", "bright_rim", "missing", "cut_rim"},
    "contrast": {"contrast", "similarity"},
    "quality": {"noise", "similarity", "symmetry", "contrast"},
    "no head": set(MEANINGS),
}


# --- What is done to a prepared scan ----------------------------------------------------------------


def _moved(prepared: Prepared, matrix: NDArray[np.float64], mm: NDArray[np.float64]) -> Prepared:
    """Turned about the brain's centre and shifted; RAS mm."""
    centre = np.argwhere(prepared.brain[::2, ::2, ::2]).mean(axis=0) * 2
    origin, lps = np.array(template().GetOrigin()), np.diag((-1.0, -1.0, 1.0))
    move = sitk.AffineTransform(3)
    move.SetCenter(
        (origin + lps @ (lps @ np.diag(np.reshape(template().GetDirection(), (3, 3)).diagonal()) @ centre)).tolist()
    )
    back = lps @ np.linalg.inv(matrix) @ lps
    move.SetMatrix(back.ravel().tolist())
    move.SetTranslation((-back @ lps @ mm).tolist())

    def resampled(array: NDArray[Any], how: int, around: float = 0.0) -> NDArray[Any]:
        return to_array(sitk.Resample(like(array, template()), template(), move, how, around))

    image = resampled(prepared.image, sitk.sitkLinear)
    brain, seen = (
        resampled(part.astype(np.uint8), sitk.sitkNearestNeighbor, around) > 0
        for part, around in ((prepared.brain, 0.0), (prepared.seen, 0.0 if not prepared.seen.all() else 1.0))
    )
    return replace(prepared, image=image, brain=brain, seen=seen)


def turned(degrees: float, axis: int | None = None) -> Spoil:
    def spoil(prepared: Prepared, draw: np.random.Generator) -> Prepared:
        angles = degrees * np.eye(3)[axis if axis is not None else draw.integers(3)] * draw.choice((-1, 1))
        return _moved(prepared, rotation(tuple(angles)), np.zeros(3))

    return spoil


def shifted(mm: float, axis: int | None = None) -> Spoil:
    def spoil(prepared: Prepared, draw: np.random.Generator) -> Prepared:
        way = np.eye(3)[axis] * draw.choice((-1, 1)) if axis is not None else draw.normal(size=3)
        return _moved(prepared, np.eye(3), mm * way / np.linalg.norm(way))

    return spoil


def axes(order: tuple[int, int, int], signs: tuple[int, int, int] = (1, 1, 1)) -> Spoil:
    matrix = np.diag(signs) @ np.eye(3)[list(order)]
    return lambda prepared, draw: _moved(prepared, matrix, np.zeros(3))


def jittered(mm: float, degrees: float) -> Spoil:
    def spoil(prepared: Prepared, draw: np.random.Generator) -> Prepared:
        way, angles = draw.normal(size=3), draw.normal(size=3)
        return _moved(
            prepared,
            rotation(tuple(degrees * angles / np.linalg.norm(angles))),
            mm * way / np.linalg.norm(way),
        )

    return spoil


def cut(fraction: float, axis: int, side: int) -> Spoil:
    """A field of view that ends in the brain, tilted by up to 10°."""

    def spoil(prepared: Prepared, draw: np.random.Generator) -> Prepared:
        normal = side * np.eye(3)[axis] + np.tan(np.radians(draw.uniform(-7, 7, 3)))
        normal /= np.linalg.norm(normal)
        grid = np.ogrid[tuple(slice(size) for size in prepared.brain.shape)]
        along = sum(n * line for n, line in zip(normal.astype(np.float32), grid, strict=True))
        seen = prepared.seen & (along <= np.quantile(along[prepared.brain], 1 - fraction))
        return replace(prepared, image=prepared.image * seen, brain=prepared.brain & seen, seen=seen)

    return spoil


def _grown(mask: NDArray[np.bool_], mm: int) -> NDArray[np.bool_]:
    grow = sitk.BinaryDilate if mm > 0 else sitk.BinaryErode
    grown: NDArray[np.bool_] = to_array(grow(like(mask.astype(np.uint8), template()), [abs(mm)] * 3)) > 0
    return grown


def grown(mm: int) -> Spoil:
    return lambda prepared, draw: replace(prepared, brain=_grown(prepared.brain, mm))


def half_skull(prepared: Prepared, draw: np.random.Generator) -> Prepared:
    """The mask holds scalp and skull on one side."""
    axis, side = draw.integers(3), draw.choice((-1, 1))
    middle = np.argwhere(prepared.brain[::4, ::4, ::4]).mean(axis=0)[axis] * 4
    line = np.arange(prepared.brain.shape[axis]).reshape([-1 if a == axis else 1 for a in range(3)])
    return replace(prepared, brain=prepared.brain | (_grown(prepared.brain, 14) & (side * (line - middle) > 0)))


def bitten(radius: float) -> Spoil:
    def spoil(prepared: Prepared, draw: np.random.Generator) -> Prepared:
        edge = np.argwhere(prepared.brain & ~_grown(prepared.brain, -1))
        centre = edge[draw.integers(len(edge))]
        grid = np.ogrid[tuple(slice(size) for size in prepared.brain.shape)]
        far = sum((line - c) ** 2 for line, c in zip(grid, centre, strict=True)) > radius**2
        image = prepared.image * far if prepared.stripped else prepared.image
        return replace(prepared, image=image, brain=prepared.brain & far)

    return spoil


def _levels(prepared: Prepared) -> tuple[float, float]:
    low, high = np.percentile(prepared.image[prepared.brain], (2, 98))
    return float(low), float(high)


def mapped(levels: tuple[float, ...]) -> Spoil:
    """Another contrast: of what is darkest, …, brightest in the brain, as fractions."""

    def spoil(prepared: Prepared, draw: np.random.Generator) -> Prepared:
        low, high = _levels(prepared)
        at = (prepared.image - low) / max(high - low, 1e-9)
        made = np.interp(at, np.linspace(0, 1, len(levels)), levels).astype(np.float32) * (prepared.image != 0)
        return replace(prepared, image=made * high)

    return spoil


def noisy(fraction: float) -> Spoil:
    def spoil(prepared: Prepared, draw: np.random.Generator) -> Prepared:
        level = fraction * _levels(prepared)[1]
        noise = draw.normal(0, level, (2, *prepared.image.shape)).astype(np.float32)
        image = np.hypot(prepared.image + noise[0], noise[1])
        return replace(prepared, image=image * prepared.brain if prepared.stripped else image)

    return spoil


def dimmed(depth: float) -> Spoil:
    def spoil(prepared: Prepared, draw: np.random.Generator) -> Prepared:
        lines = [np.linspace(-1, 1, size, dtype=np.float32) for size in prepared.image.shape]
        way = draw.normal(size=3)
        way = way / np.linalg.norm(way)
        field = sum(w * part for w, part in zip(way.astype(np.float32), np.ix_(*lines), strict=True))
        return replace(prepared, image=prepared.image * (1 + depth * field).astype(np.float32))

    return spoil


def gamma(power: float) -> Spoil:
    def spoil(prepared: Prepared, draw: np.random.Generator) -> Prepared:
        high = _levels(prepared)[1]
        return replace(prepared, image=(np.maximum(prepared.image, 0) / high) ** np.float32(power) * np.float32(high))

    return spoil


def coarse(spacing: tuple[float, float, float]) -> Spoil:
    """Seen in larger voxels, and brought back to those of 1 mm."""

    def spoil(prepared: Prepared, draw: np.random.Generator) -> Prepared:
        image = sitk.DiscreteGaussian(like(prepared.image, template()), [max(0.01, (s / 2.5) ** 2) for s in spacing])
        grid = sitk.Image([int(n / s) for n, s in zip(image.GetSize(), spacing, strict=True)], sitk.sitkFloat32)
        grid.SetSpacing(spacing)
        grid.SetOrigin(image.GetOrigin())
        grid.SetDirection(image.GetDirection())
        small = sitk.Resample(image, grid, sitk.Transform(), sitk.sitkLinear, 0.0)
        back = to_array(sitk.Resample(small, template(), sitk.Transform(), sitk.sitkLinear, 0.0))
        return replace(prepared, image=back * prepared.brain if prepared.stripped else back)

    return spoil


def ghosted(prepared: Prepared, draw: np.random.Generator) -> Prepared:
    """A copy of it lies over it, half a field of view on."""
    ghost = np.roll(prepared.image, prepared.image.shape[1] // 2 - 20, axis=1)
    image = prepared.image + np.float32(0.4) * ghost
    return replace(prepared, image=image * prepared.brain if prepared.stripped else image)


def wrapped(prepared: Prepared, draw: np.random.Generator) -> Prepared:
    """The back of the head lies over the front."""
    image = prepared.image + np.roll(prepared.image, 120, axis=1) * (np.arange(prepared.image.shape[1]) > 110)[:, None]
    return replace(prepared, image=image * prepared.brain if prepared.stripped else image)


def bottle(prepared: Prepared, draw: np.random.Generator) -> Prepared:
    grid = np.ogrid[tuple(slice(-n // 2, n // 2) for n in prepared.image.shape)]
    brain = (grid[0] ** 2 + grid[1] ** 2 < 65**2) & (np.abs(grid[2]) < 65)
    image = brain * 100 + draw.normal(0, 3, brain.shape)
    return replace(prepared, image=image.astype(np.float32), brain=brain, seen=np.ones_like(brain))


def ball(prepared: Prepared, draw: np.random.Generator) -> Prepared:
    grid = np.ogrid[tuple(slice(-n // 2, n // 2) for n in prepared.image.shape)]
    brain = sum(line**2 for line in grid) < 70**2
    image = brain * 100 + draw.normal(0, 3, brain.shape)
    return replace(prepared, image=image.astype(np.float32), brain=brain, seen=np.ones_like(brain))


def nothing_but_noise(prepared: Prepared, draw: np.random.Generator) -> Prepared:
    return replace(prepared, image=draw.normal(100, 30, prepared.image.shape).astype(np.float32))


SOUND: dict[str, Spoil] = {
    "as it is": lambda prepared, draw: prepared,
    "mirrored": axes((0, 1, 2), (-1, 1, 1)),
    "noise of 3 %": noisy(0.03),
    "dimmed by 15 %": dimmed(0.15),
    "1 mm and 1° off": jittered(1, 1),
    "2 mm off": jittered(2, 0),
    "2° off": jittered(0, 2),
    "voxels of 2 mm": coarse((2.0, 2.0, 2.0)),
    "slices of 3 mm": coarse((1.0, 1.0, 3.0)),
    "gamma 0.85": gamma(0.85),
    "gamma 1.2": gamma(1.2),
}
SPOILED: dict[str, tuple[Spoil, str]] = (
    {
        "upside down": (axes((0, 1, 2), (1, 1, -1)), "place"),
        "back to front": (axes((0, 1, 2), (1, -1, 1)), "place"),
        "upside down and back to front": (axes((0, 1, 2), (1, -1, -1)), "place"),
    }
    | {
        f"axes {''.join('xyz'[n] for n in order)}": (axes(order), "place")
        for order in ((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
    }
    | {f"turned {d}° about {'xyz'[axis]}": (turned(d, axis), "place") for d in (4,) for axis in range(3)}
    | {f"turned {d}°": (turned(d), "place") for d in (5, 15, 25, 40)}
    | {f"shifted 3 mm along {'xyz'[axis]}": (shifted(3, axis), "place") for axis in range(3)}
    | {f"shifted {mm} mm": (shifted(mm), "place") for mm in (5, 10, 30)}
    | {
        f"{100 * part:g} % cut off {name}": (cut(part, axis, side), "cut")
        for part, name, axis, side in (
            (0.015, "above", 2, 1),
            (0.015, "below", 2, -1),
            (0.02, "in front", 1, 1),
            (0.03, "behind", 1, -1),
            (0.05, "above", 2, 1),
            (0.1, "below", 2, -1),
            (0.1, "at a side", 0, 1),
            (0.3, "above", 2, 1),
        )
    }
    | {
        "half the skull left": (half_skull, "mask"),
        "mask 5 mm too large": (grown(5), "mask"),
        "mask 9 mm too large": (grown(9), "mask"),
        "mask 3 mm too small": (grown(-3), "mask"),
        "mask 6 mm too small": (grown(-6), "mask"),
        "bitten, 25 mm": (bitten(25), "mask"),
        "bitten, 40 mm": (bitten(40), "mask"),
        "inverted": (mapped((1.0, 0.2)), "contrast"),
        "like T2w": (mapped((1.0, 0.6, 0.55, 0.35)), "contrast"),
        "like FLAIR": (mapped((0.1, 0.7, 0.8, 0.6)), "contrast"),
        "noise of 25 %": (noisy(0.25), "quality"),
        "ghost": (ghosted, "quality"),
        "wrapped around": (wrapped, "quality"),
        "bottle": (bottle, "no head"),
        "ball": (ball, "no head"),
        "noise": (nothing_but_noise, "no head"),
    }
)
ONLY_WITH_SKULL = {"half the skull left", "mask 5 mm too large", "mask 9 mm too large"}
ONLY_ONCE = {"bottle", "ball"}


# --- Figures of all cases -----------------------------------------------------------------------------


def prepared_scan(path: Path, cache: Path) -> Prepared:
    """A scan as `brainfm prep` leaves it before its brightness is normalised."""
    kept = cache / f"{path.name.split('.')[0]}.npz"
    if not kept.exists():
        from brainfm.prep.pipeline import Settings, _Clock, _run
        from brainfm.prep.source import read_source

        made, _ = _run(read_source(path), Settings(), 1, _Clock(None))
        np.savez(kept, image=made.image, brain=made.brain, seen=made.seen, stripped=made.stripped)
    with np.load(kept) as file:
        arrays = (np.asfortranarray(file[name]) for name in ("image", "brain", "seen"))
        return Prepared(*arrays, stripped=bool(file["stripped"]))


def cases(prepared: Prepared, seed: int) -> Iterator[tuple[str, str, Prepared]]:
    """Name, truth, and the prepared scan, of each case made of one."""
    ways = {name: (spoil, "sound") for name, spoil in SOUND.items()} | SPOILED
    for number, (name, (spoil, truth)) in enumerate(ways.items()):
        if not (prepared.stripped and name in ONLY_WITH_SKULL or seed and name in ONLY_ONCE):
            yield name, truth, spoil(prepared, np.random.default_rng([seed, number]))


def figures_of(scans: Path, cache: Path) -> list[dict[str, Any]]:
    """The figures of every case; kept in `cache` by scan."""
    with scans.open(newline="", encoding="utf-8") as file:
        listed = list(csv.DictReader(file))
    rows: list[dict[str, Any]] = []
    for seed, scan in enumerate(listed):
        path = Path(scan["path"])
        kept = cache / f"{path.name.split('.')[0]}.json"
        if kept.exists():
            own = json.loads(kept.read_text(encoding="utf-8"))
        else:
            prepared = prepared_scan(path, cache)
            made = cases(prepared, seed) if scan["truth"] == "sound" else [("as it is", scan["truth"], prepared)]
            own = [{"case": name, "truth": truth, "figures": measured(case)} for name, truth, case in made]
            write_json(kept, own)
        for row in own:
            truth = scan["truth"] if row["case"] == "as it is" else row["truth"]
            rows.append(row | {"scan": path.name, "person": scan["person"], "truth": truth})
        print(f"{path.name}: {len(own)} cases", flush=True)
    return rows
