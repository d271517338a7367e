"""The score that judges prepared scans: fitted on people's heads, sound and spoiled, and tried on those left out.

SCANS is a table (CSV) of raw scans with the columns `path`; `person`, for one person's scans are left out together; and
`truth`: "sound", "odd" (reported, not fitted on), or what is wrong with it, a word of SEEN. Each is prepared as
`brainfm prep` does (about 40 s of processor time; kept in CACHE), then moved and spoiled on the contract's grid in each
way of SOUND and SPOILED, and judged. No head comes with brainfm.

The rule is RULE, below; LEAST_SPREAD, LEAST_TYPICAL and HARD are set by hand. A new figure needs a first entry of any
limits in `quality.json`, and CACHE without its JSON files.

python benchmarks/quality.py SCANS CACHE [--write]
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainfm.assets import QUALITY
from brainfm.files import write_json
from brainfm.prep.image import like, sitk, template, to_array
from brainfm.prep.quality import MEANINGS, Prepared, Scale, Score, judged, measured, read_score
from brainfm.scan.alignment import rotation
from brainfm.scan.prepared import read_prepared

Spoil = Callable[[Prepared, np.random.Generator], Prepared]

# Which figures tell the truth about each kind of spoiling.
SEEN: dict[str, set[str]] = {
    "place": {"shift", "turn", "upright", "similarity"},
    "cut": {"cut"},
    "mask": {"litres", "bright_rim", "missing", "cut_rim", "bite", "dark_rim"},
    "contrast": {"contrast", "similarity", "bright"},
    "quality": {"noise", "similarity", "symmetry", "contrast", "echo", "bright"},
    "no head": set(MEANINGS),
}

MOST, TAIL, TAIL_OF_FAILED, LEAST_FAILED = 10.0, 0.02, 0.005, 0.97
RULE = (
    "A figure's typical value is the median over people of their sound cases' medians; its spread is what 95 % of "
    f"sound cases lie within on a side that is worse. Excesses count up to {MOST:g} spreads. Logistic regression "
    "(scikit-learn, C = 1), both classes and in each all people weighted the same; figures of negative weight are left "
    f"out. Looked at from the score below which {1 - TAIL:.0%} of sound cases lie; failed from the one below which "
    f"{1 - TAIL_OF_FAILED:.1%} do, and not below {LEAST_FAILED:g}. Hard limits are by what is decisive by itself: "
    "of figures that tell one kind of spoiling, midway between the highest of sound cases and the lowest of that kind "
    "(DECISIVE); of others set by hand (HARD)."
)
LEAST_SPREAD = {
    "litres": 0.3,
    "shift": 0.75,
    "turn": 0.75,
    "upright": 0.05,
    "similarity": 0.1,
    "missing": 0.005,
    "cut": 8.0,
    "symmetry": 0.1,
    "echo": 1.0,
    "bright": 0.005,
    "bright_rim": 0.02,
    "dark_rim": 0.05,
    "cut_rim": 0.1,
    "bite": 0.1,
    "contrast": 0.1,
    "noise": 0.03,
}
# cm²: a stripped brain touches the box that it is stored in, and a field of view may end at the brain stem.
LEAST_TYPICAL = {"cut": 12.0}
# Figures that tell a kind of spoiling by themselves, and the kind: the limit lies between it and sound ones.
DECISIVE = {
    "missing": "bitten, 25 mm",
    "echo": "ghost",
    "bright": "wrapped around",
    "cut_rim": "mask 3 mm too small",
    "bite": "bitten, 25 mm",
}
UNWEIGHTED = {"echo"}  # in the score
# To look at, and to fail.
HARD: dict[str, tuple[float | None, float | None]] = {
    "litres": (0.8, 0.6),
    "shift": (2.1, 8.0),
    "turn": (3.0, 10.0),
    "upright": (0.06, 0.0),
    "similarity": (0.4, 0.25),
    "bright_rim": (0.08, 0.2),
    "dark_rim": (0.25, None),
    "cut": (22.0, 60.0),
    "contrast": (0.06, 0.02),
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
    return lambda prepared, _: _moved(prepared, matrix, np.zeros(3))


def jittered(mm: float, degrees: float) -> Spoil:
    def spoil(prepared: Prepared, draw: np.random.Generator) -> Prepared:
        way, angles = draw.normal(size=3), draw.normal(size=3)
        return _moved(
            prepared,
            rotation(tuple(degrees * angles / np.linalg.norm(angles))),
            mm * way / np.linalg.norm(way),
        )

    return spoil


def sized(litres: float) -> Spoil:
    """A brain of another size, where it was."""

    def spoil(prepared: Prepared, _: np.random.Generator) -> Prepared:
        factor = (litres * 1e6 / prepared.brain.sum()) ** (1 / 3)
        return _moved(prepared, factor * np.eye(3), np.zeros(3))

    return spoil


def stripped(prepared: Prepared, _: np.random.Generator) -> Prepared:
    return replace(prepared, image=prepared.image * prepared.brain, stripped=True)


def boxed(prepared: Prepared, draw: np.random.Generator) -> Prepared:
    """A small brain without its skull, stored in a box that hardly holds it."""
    small = stripped(sized(1.0)(prepared, draw), draw)
    low, high = (bound(np.argwhere(small.brain), axis=0) for bound in (np.min, np.max))
    seen = np.zeros_like(small.brain)
    seen[tuple(slice(max(0, a - 1), b + 2) for a, b in zip(low, high, strict=True))] = True
    return replace(small, seen=seen)


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
    return lambda prepared, _: replace(prepared, brain=_grown(prepared.brain, mm))


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

    def spoil(prepared: Prepared, _: np.random.Generator) -> Prepared:
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
    def spoil(prepared: Prepared, _: np.random.Generator) -> Prepared:
        high = _levels(prepared)[1]
        image = (np.maximum(prepared.image, 0) / high) ** power * high
        return replace(prepared, image=image.astype(np.float32))

    return spoil


def coarse(spacing: tuple[float, float, float]) -> Spoil:
    """Seen in larger voxels, and brought back to those of 1 mm."""

    def spoil(prepared: Prepared, _: np.random.Generator) -> Prepared:
        image = sitk.DiscreteGaussian(like(prepared.image, template()), [max(0.01, (s / 2.5) ** 2) for s in spacing])
        grid = sitk.Image([int(n / s) for n, s in zip(image.GetSize(), spacing, strict=True)], sitk.sitkFloat32)
        grid.SetSpacing(spacing)
        grid.SetOrigin(image.GetOrigin())
        grid.SetDirection(image.GetDirection())
        small = sitk.Resample(image, grid, sitk.Transform(), sitk.sitkLinear, 0.0)
        back = to_array(sitk.Resample(small, template(), sitk.Transform(), sitk.sitkLinear, 0.0))
        return replace(prepared, image=back * prepared.brain if prepared.stripped else back)

    return spoil


def ghosted(prepared: Prepared, _: np.random.Generator) -> Prepared:
    """A copy of it lies over it, half a field of view on."""
    ghost = np.roll(prepared.image, prepared.image.shape[1] // 2 - 20, axis=1)
    image = prepared.image + np.float32(0.4) * ghost
    return replace(prepared, image=image * prepared.brain if prepared.stripped else image)


def wrapped(prepared: Prepared, _: np.random.Generator) -> Prepared:
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
    brain = grid[0] ** 2 + grid[1] ** 2 + grid[2] ** 2 < 70**2
    image = brain * 100 + draw.normal(0, 3, brain.shape)
    return replace(prepared, image=image.astype(np.float32), brain=brain, seen=np.ones_like(brain))


def nothing_but_noise(prepared: Prepared, draw: np.random.Generator) -> Prepared:
    return replace(prepared, image=draw.normal(100, 30, prepared.image.shape).astype(np.float32))


SOUND: dict[str, Spoil] = {
    "as it is": lambda prepared, _: prepared,
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
# Sound too; after the others, whose draws go by their number.
OTHERS: dict[str, Spoil] = {
    "stripped": stripped,
    "of 1.1 litres": sized(1.1),
    "of 1.9 litres": sized(1.9),
    "of 1 litre, stripped, in its box": boxed,
}
ONLY_WITH_SKULL = {f"mask {mm} mm too {what}" for mm, what in ((5, "large"), (9, "large"), (3, "small"), (6, "small"))}
ONLY_WITH_SKULL |= {"half the skull left", "stripped"}
ONLY_ONCE = {"bottle", "ball"}


# --- Figures of all cases -----------------------------------------------------------------------------


def prepared_scan(path: Path, cache: Path) -> Prepared:
    """A scan as `brainfm prep` judges it: on the template's grid, with all that surrounds the brain."""
    kept = cache / f"{path.name.split('.')[0]}.npz"
    if not kept.exists():
        from brainfm.prep.pipeline import Settings, on_the_template, prepare
        from brainfm.prep.source import Source

        with tempfile.TemporaryDirectory() as folder:
            record = prepare(Source(path, ""), Path(folder), Settings())
            made = on_the_template(read_prepared(folder), "rigid", record["input"]["stripped"])
        np.savez(kept, image=made.image, brain=made.brain, seen=made.seen, stripped=made.stripped)
    with np.load(kept) as file:
        image, brain, seen = (np.asfortranarray(file[name]) for name in ("image", "brain", "seen"))
        return Prepared(image, brain, seen, bool(file["stripped"]))


def cases(prepared: Prepared, seed: int, *, first: bool) -> Iterator[tuple[str, str, Prepared]]:
    """Name, truth, and the prepared scan, of each case made of one."""
    sound, others = ({name: (spoil, "sound") for name, spoil in ways.items()} for ways in (SOUND, OTHERS))
    for number, (name, (spoil, truth)) in enumerate((sound | SPOILED | others).items()):
        if not (prepared.stripped and name in ONLY_WITH_SKULL) and (first or name not in ONLY_ONCE):
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
            made: Iterable[tuple[str, str, Prepared]] = [("as it is", scan["truth"], prepared)]
            if scan["truth"] == "sound":
                made = cases(prepared, seed, first=scan is next(one for one in listed if one["truth"] == "sound"))
            own = [{"case": name, "truth": truth, "figures": measured(case)} for name, truth, case in made]
            write_json(kept, own)
        for row in own:
            truth = scan["truth"] if row["case"] == "as it is" else row["truth"]
            rows.append(
                row | {"scan": path.name, "person": scan["person"], "truth": truth, "scan_truth": scan["truth"]}
            )
        print(f"{path.name}: {len(own)} cases", flush=True)
    return rows


# --- The score ------------------------------------------------------------------------------------------


def fitted(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What `assets/quality.json` holds, fitted on cases."""
    from sklearn.linear_model import LogisticRegression

    rows = [row for row in rows if row["scan_truth"] != "odd"]
    is_spoiled = np.array([row["truth"] != "sound" for row in rows])
    weights = _even([row["person"] for row in rows], is_spoiled)
    scales = {name: _scale(name, [row for row in rows if row["truth"] == "sound"]) for name in MEANINGS}
    excesses = np.array([[_excess(row, name, scales[name]) for name in MEANINGS] for row in rows])
    used = np.array([name not in UNWEIGHTED for name in MEANINGS])
    while True:
        model = LogisticRegression(C=1.0, max_iter=5000).fit(excesses[:, used], is_spoiled, sample_weight=weights)
        if (model.coef_[0] >= 0).all():
            break
        used[np.flatnonzero(used)[model.coef_[0].argmin()]] = False
    coefficients = np.zeros(len(MEANINGS))
    coefficients[used] = model.coef_[0]
    intercept = float(model.intercept_[0])
    scores = 1 / (1 + np.exp(-(excesses @ coefficients + intercept)))
    look = _quantile(scores[~is_spoiled], weights[~is_spoiled], 1 - TAIL)
    fail = max(LEAST_FAILED, _quantile(scores[~is_spoiled], weights[~is_spoiled], 1 - TAIL_OF_FAILED))
    return {
        "intercept": round(intercept, 4),
        "look": float(f"{look:.3g}"),
        "fail": float(f"{fail:.4g}"),
        "figures": {
            name: {
                "typical": float(f"{scales[name].typical:.4g}"),
                "spread": float(f"{scales[name].spread:.4g}"),
                "weight": round(float(weight), 4),
                "hard": (_midway(rows, name), None) if name in DECISIVE else HARD.get(name, (None, None)),
            }
            for name, weight in zip(MEANINGS, coefficients, strict=True)
        },
    }


def _midway(rows: list[dict[str, Any]], name: str) -> float:
    """Between the highest of a figure in sound cases and its lowest in the kind of spoiling that it tells."""
    highest = max(row["figures"][name] for row in rows if row["truth"] == "sound" and name in row["figures"])
    lowest = min(row["figures"][name] for row in rows if row["case"] == DECISIVE[name] and name in row["figures"])
    return float(f"{(highest + lowest) / 2:.4g}")


def _even(people: list[str], is_spoiled: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Weights of cases by which both classes, and in each of them all people, count the same; 1 on average."""
    groups = list(zip(people, is_spoiled.tolist(), strict=True))
    weights = np.array([1 / groups.count(group) for group in groups])
    for kind in (True, False):
        weights[is_spoiled == kind] /= weights[is_spoiled == kind].sum()
    return weights * len(weights) / 2


def _scale(name: str, sound: list[dict[str, Any]]) -> Scale:
    values = [(row["person"], row["figures"][name]) for row in sound if name in row["figures"]]
    people = sorted({person for person, _ in values})
    if not values:  # a figure of heads with skull, and none is among them
        return Scale(0.0, LEAST_SPREAD[name], 0.0)
    typical = float(np.median([np.median([v for person, v in values if person == one]) for one in people]))
    typical = max(typical, LEAST_TYPICAL.get(name, typical))
    unit = Scale(typical, 1.0, 1.0)
    beyond = np.array([unit.excess(value, MEANINGS[name]) for _, value in values])
    spread = _quantile(beyond, _even([person for person, _ in values], np.zeros(len(values), bool)), 0.95)
    return Scale(typical, max(spread, LEAST_SPREAD[name]), 0.0)


def _excess(row: dict[str, Any], name: str, scale: Scale) -> float:
    return min(MOST, scale.excess(row["figures"][name], MEANINGS[name])) if name in row["figures"] else 0.0


def _quantile(values: NDArray[np.float64], weights: NDArray[np.float64], q: float) -> float:
    order = np.argsort(values)
    share = np.cumsum(weights[order]) / weights.sum()
    return float(values[order][min(int(np.searchsorted(share, q)), len(values) - 1)])


def score_of(kept: dict[str, Any]) -> Score:
    return read_score(json.dumps(kept))


def left_out(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every case with its verdict and reasons by a score that was fitted without its person."""
    found = []
    for person in sorted({row["person"] for row in rows}):
        score = score_of(fitted([row for row in rows if row["person"] != person]))
        found += [row | _verdict(row, score) for row in rows if row["person"] == person]
    return found


def _verdict(row: dict[str, Any], score: Score) -> dict[str, Any]:
    figures, verdict = judged(row["figures"], score)
    broken = {figure.name for figure in figures if figure.verdict != "pass" and figure.name != "score"}
    first = max(score.contributions(row["figures"]).items(), key=lambda pair: pair[1])[0]
    reasons = broken or {first}
    reason = next((figure.reason for figure in figures if figure.reason), "")
    return {"verdict": verdict, "true_reason": bool(SEEN.get(row["truth"], set()) & reasons), "reason": reason}


def tables(rows: list[dict[str, Any]]) -> str:
    """Markdown: what became of each case, and of each scan as it is."""
    lines = ["| case | cases | pass | look | fail | with the true reason |", "|---|---|---|---|---|---|"]
    names = list(dict.fromkeys(row["case"] for row in rows if row["scan_truth"] == "sound"))
    groups = [(name, [row for row in rows if row["case"] == name and row["scan_truth"] == "sound"]) for name in names]
    for kind in ("sound", "spoiled"):
        groups.append(
            (f"all {kind}", [r for _, g in groups for r in g if (r["truth"] == "sound") == (kind == "sound")])
        )
    for name, group in groups:
        counts = [sum(row["verdict"] == verdict for row in group) for verdict in ("pass", "look", "fail")]
        true = sum(row["true_reason"] for row in group if row["verdict"] != "pass")
        says = "" if group[0]["truth"] == "sound" else f"{true} of {counts[1] + counts[2]}"
        lines.append(f"| {name} | {len(group)} | {counts[0]} | {counts[1]} | {counts[2]} | {says} |")
    lines += ["", "| scan as it is | truth | verdict | first reason |", "|---|---|---|---|"]
    for row in rows:
        if row["case"] == "as it is":
            lines.append(f"| {row['scan']} | {row['scan_truth']} | {row['verdict']} | {row['reason']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--write", action="store_true", help="write brainfm/assets/quality.json")
    args = parser.parse_args()
    rows = figures_of(args.scans, args.cache)
    print(tables(left_out(rows)))
    kept = fitted(rows)
    counted = [row for row in rows if row["scan_truth"] != "odd"]
    about = {
        "made_by": "benchmarks/quality.py, which states the rule",
        "date": datetime.date.today().isoformat(),
        "fitted_on": sorted({row["scan"] for row in counted}),
        "sound_cases": sum(row["truth"] == "sound" for row in counted),
        "spoiled_cases": sum(row["truth"] != "sound" for row in counted),
        "rule": RULE,
    }
    print(json.dumps(about | kept, indent=1))
    if args.write:
        write_json(QUALITY, about | kept)


if __name__ == "__main__":
    main()
