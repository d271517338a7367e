"""How far a brain lies off the template's, found by moving one onto the other: least squares on cells of 8 and 4 mm.

The template's gradients are known beforehand (inverse compositional Gauss–Newton; Baker & Matthews 2004, IJCV 56), so a
step costs one interpolation, and a fit some milliseconds. It is a second opinion on a registration and no registration
of its own: nothing is resampled by it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from itertools import permutations, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

NEARBY_DEG = (-20.0, 0.0, 20.0)  # about each axis: where a fit starts, besides where the brain lies
MOST_STEPS = 20
ENOUGH_MM = 0.05  # of a step, at the brain's rim: where a fit ends
_RIM_MM = 70
_WEIGHTS = (1, 3)  # of the affine fit and the rigid one

Affine = NDArray[np.float64]  # [4, 4], mm about the template's centre, from the template's points to the brain's


@dataclass(frozen=True, eq=False)
class Target:
    """A template's brain on cubic cells, with what a fit needs of it.

    Attributes:
        cells: [x, y, z] brightness, 0 outside the brain.
        mm: The size of a cell.
        every: Of these cells, each how-manieth is looked at: 1 is all.
        levels: The brain on cells of twice that size, and on these.
    """

    cells: NDArray[Any]
    mm: float
    every: int = 1
    levels: tuple[_Level, _Level] = field(init=False)

    def __post_init__(self) -> None:
        centre = np.argwhere(self.cells > 0).mean(axis=0)
        coarse = _Level(halved(self.cells), 2 * self.mm, (centre - 0.5) / 2)
        object.__setattr__(self, "levels", (coarse, _Level(self.cells, self.mm, centre, self.every)))

    @property
    def centre(self) -> NDArray[np.float64]:
        """Of its brain, in cells."""
        return self.levels[1].centre

    def likeliest(self, images: tuple[Lookup, Lookup], starts: list[Affine]) -> Affine:
        """Of several starts, that which is most like the brain on the larger cells."""
        coarse, image = self.levels[0], images[0]
        return max(starts, key=lambda start: coarse.likeness(coarse.at(image, start)))

    def followed(self, images: tuple[Lookup, Lookup], starts: list[Affine]) -> tuple[Affine, float]:
        """The best fit from several starts, and its likeness."""
        coarse, fine = self.levels
        ends = [coarse.fitted(images[0], start) for start in starts]
        best, _ = max(ends, key=lambda end: end[1])
        return fine.fitted(images[1], best)


@dataclass(frozen=True, eq=False)
class Alignment:
    """Where a brain lies against the template's, by the best fit.

    A brain of another size is moved differently by an affine and by a rigid fit, and no registration is wrong that lies
    between them: shift and turn are means of the two's, the rigid one's counting three times.

    Attributes:
        affine: [4, 4], mm about the template's centre, from the template's points to the brain's.
        shift_mm: How far the centre of the template's brain is moved.
        turn_deg: By how much it is turned, sizes and shears aside.
        likeness: Correlation of the two in and around the template's brain, once fitted.
        upright: By how much that is more than of the brain lying otherwise: turned over, or its axes swapped.
    """

    affine: Affine
    shift_mm: float
    turn_deg: float
    likeness: float
    upright: float


def align(brain: NDArray[Any], target: Target, *, nearby: bool = True, overturned: bool = True) -> Alignment:
    """Fit the template's brain, moved, stretched and sheared, to one on the same cells.

    Args:
        brain: [x, y, z] brightness, 0 outside the brain.
        target: The template's.
        nearby: Whether the fit also starts from the likeliest of 27 turns by 20°.
        overturned: Whether to look for a brain that is turned over or has its axes swapped; if not, `upright` is 0.
    """
    images = (Lookup(halved(brain)), Lookup(brain))
    starts = [np.eye(4)]
    if nearby and not np.array_equal(likely := target.likeliest(images, _nearby()), starts[0]):
        starts.append(likely)
    best, likeness = target.followed(images, starts)
    upright = 0.0
    if overturned:
        upright = likeness - target.followed(images, [target.likeliest(images, _overturned())])[1]
    fits = [_rigid(best), target.levels[1].fitted(images[1], _rigid(best), rigid=True)[0]]
    mean = np.average(fits, axis=0, weights=_WEIGHTS)
    shift, turn = mean[:3, 3], _angle(_rotation(mean[:3, :3]))
    return Alignment(best, float(np.linalg.norm(shift)), turn, likeness, upright)


class Lookup:
    """Voxels [x, y, z] to look up by trilinear interpolation, with nothing around them."""

    def __init__(self, voxels: NDArray[Any]) -> None:
        padded = np.pad(voxels, 1)
        self._shape = padded.shape
        self._flat: NDArray[np.float64] = np.ascontiguousarray(padded, dtype=np.float64).ravel()

    def at(self, places: NDArray[np.float64]) -> NDArray[np.float64]:
        """[n] values at places [3, n] in voxels; nothing beyond the edge."""
        places = places + 1.0
        for along, size in zip(places, self._shape, strict=True):
            np.clip(along, 0, size - 1.001, out=along)
        low = places.astype(np.intp)
        x, y, z = places - low
        _, width, depth = self._shape
        start = (low[0] * width + low[1]) * depth + low[2]

        # In place: this is where most of a fit's time goes.
        def between(near: NDArray[np.float64], further: NDArray[np.float64], part: Any) -> NDArray[np.float64]:
            further -= near
            further *= part
            further += near
            return further

        def value(offset: int) -> NDArray[np.float64]:
            found: NDArray[np.float64] = self._flat[offset:].take(start, mode="clip")
            return found

        def line(offset: int) -> NDArray[np.float64]:
            return between(value(offset), value(offset + 1), z)

        def plane(offset: int) -> NDArray[np.float64]:
            return between(line(offset), line(offset + depth), y)

        return between(plane(0), plane(width * depth), x)


class _Level:
    """The template's brain at one size of cells."""

    def __init__(self, cells: NDArray[Any], mm: float, centre: NDArray[np.float64], every: int = 1) -> None:
        near = cells > 0
        for axis in range(3):
            near = near | np.roll(near, 1, axis) | np.roll(near, -1, axis)
        self.centre = centre
        where = np.argwhere(near)[::every]
        self._points = np.vstack([((where - centre) * mm).T, np.ones(len(where))])  # [4, n] mm
        self._to_cells = np.column_stack([np.eye(3) / mm, centre])
        values = cells[tuple(where.T)].astype(np.float64)
        self._values = values - values.mean()
        gradient = np.asarray(np.gradient(cells.astype(np.float64), mm))
        slopes = gradient[(slice(None), *where.T)]
        # By how much each point changes with each entry of a small change of the affine, [n, 12].
        changes = (slopes[:, None] * self._points).reshape(12, -1).T
        moves = changes @ _MOVES
        self._step_of = np.linalg.solve(changes.T @ changes, changes.T)
        self._rigid_step_of = _MOVES @ np.linalg.solve(moves.T @ moves, moves.T)

    def at(self, image: Lookup, affine: Affine) -> NDArray[np.float64]:
        """The brain's values at the template's points, less their mean."""
        found = image.at(product_of(self._to_cells @ affine, self._points))
        found -= found.mean()
        return found

    def likeness(self, found: NDArray[np.float64]) -> float:
        """Pearson's correlation of values of `at` with the template's, or 0 where they are constant."""
        size = math.sqrt(inner(found, found) * inner(self._values, self._values))
        return inner(found, self._values) / size if size > 0 else 0.0

    def fitted(self, image: Lookup, affine: Affine, rigid: bool = False) -> tuple[Affine, float]:
        """The likeliest affine on the way of a fit that starts from one, or of a rigid fit the last; and most likeness.

        A rigid fit to a brain of another size ends where the two pull evenly, which is past where they are likest.
        """
        step_of = self._rigid_step_of if rigid else self._step_of
        step_of_none = product_of(step_of, self._values)
        best, most = affine, -1.0
        for _ in range(MOST_STEPS):
            found = self.at(image, affine)
            likeness = self.likeness(found)
            if likeness > most:
                best, most = affine, likeness
            spread = inner(found, found)
            if spread == 0:
                break
            change = np.eye(4)  # by what the brain, as bright as the template, has too much
            step = inner(found, self._values) / spread * product_of(step_of, found) - step_of_none
            change[:3] += step.reshape(3, 4)
            if rigid:
                change = _rigid(change)
            elif abs(np.linalg.det(change) - 1) > 0.5:  # astray
                break
            affine = affine @ np.linalg.inv(change)
            if np.abs(change[:3] - np.eye(3, 4)).max(axis=0) @ (_RIM_MM, _RIM_MM, _RIM_MM, 1) < ENOUGH_MM:
                break
        return (affine if rigid else best), most


def product_of(matrix: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """A matrix [m, n] times one vector [n] or many [n, k], by NumPy itself.

    `@` of many numbers has BLAS share them among a thread for every core. These threads wait for more work at full
    speed for some 30 ms, and take the cores from the network that scans are read ahead of.
    """
    found: NDArray[np.float64] = np.einsum("mn,n...->m...", matrix, points)
    return found


def inner(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The sum of the products of two vectors [n], as `product_of`."""
    return float(np.einsum("n,n", a, b))


def correlation(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Pearson's, or 0 where one of the two is constant."""
    if len(a) < 2:
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt(inner(a, a) * inner(b, b))
    return inner(a, b) / size if size > 0 else 0.0


def halved(cells: NDArray[Any]) -> NDArray[Any]:
    """[x, y, z] averages of 2×2×2 cells, with nothing beyond the last."""
    averages = np.pad(cells, [(0, size % 2) for size in cells.shape])
    for axis in range(3):
        lines = np.moveaxis(averages, axis, 0)
        averages = np.moveaxis((lines[::2] + lines[1::2]) / 2, 0, axis)
    return averages


def shaded(part: NDArray[Any], brightness: NDArray[Any]) -> NDArray[Any]:
    """A brain for a fit: 0.3 to 1 inside it from its darkest to its brightest, times the part of a cell that is brain.

    Shape and brightness both count then, in whatever units and about whatever zero the image was stored.
    """
    whole = brightness[part > 0.99]
    low, high = np.percentile(whole if len(whole) > 1 else brightness[part > 0], (2, 98))
    return np.asarray(part * (0.3 + 0.7 * np.clip((brightness - low) / max(float(high - low), 1e-9), 0, 1.1)))


def rotation(degrees: tuple[float, ...]) -> NDArray[np.float64]:
    """[3, 3]: a turn about x, then y, then z."""
    turned = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        first, second = (a for a in range(3) if a != axis)
        one = np.eye(3)
        one[first, first] = one[second, second] = np.cos(angle)
        one[first, second], one[second, first] = -np.sin(angle), np.sin(angle)
        turned = one @ turned
    return turned


@cache
def _nearby() -> list[Affine]:
    return [_affine(rotation(degrees)) for degrees in product(NEARBY_DEG, repeat=3)]


@cache
def _overturned() -> list[Affine]:
    """The 23 other ways for a brain to lie along the axes; mirror images of these cannot be told from them."""
    ways = (
        np.diag(signs) @ np.eye(3)[list(order)]
        for order in permutations(range(3))
        for signs in product((1, -1), repeat=3)
    )
    return [_affine(way) for way in ways if np.linalg.det(way) > 0 and not np.array_equal(way, np.eye(3))]


def _affine(matrix: NDArray[np.float64]) -> Affine:
    affine = np.eye(4)
    affine[:3, :3] = matrix
    return affine


def _rotation(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rotation nearest to a matrix [3, 3]."""
    left, _, right = np.linalg.svd(matrix)
    return np.asarray(left @ right)


def _rigid(affine: Affine) -> Affine:
    """The nearest that only moves."""
    rigid = affine.copy()
    rigid[:3, :3] = _rotation(affine[:3, :3])
    return rigid


def _angle(turn: NDArray[np.float64]) -> float:
    """By how much a rotation turns, degrees."""
    return float(np.degrees(np.arccos(np.clip((np.trace(turn) - 1) / 2, -1, 1))))


def _moves() -> NDArray[np.float64]:
    """[12, 6]: the small changes of an affine that are turns and shifts."""
    moves = np.zeros((6, 3, 4))
    for axis in range(3):
        first, second = (a for a in range(3) if a != axis)
        moves[axis, first, second], moves[axis, second, first] = -1, 1
        moves[3 + axis, axis, 3] = 1
    return moves.reshape(6, 12).T


_MOVES = _moves()
