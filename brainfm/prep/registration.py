"""Registration of a brain to the template by mutual information: rigid, and from that affine."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from brainfm.errors import ScanError
from brainfm.prep.image import sitk
from brainfm.system import torch_threads

if TYPE_CHECKING:
    from brainfm.prep.similarity import Position, Similarity

TransformType: TypeAlias = Literal["rigid", "affine"]

# Of each round, the turns about each axis that are looked at: up to, in steps of; and how many of them are followed.
ROUNDS = ((45.0, 15.0, 5), (52.5, 15.0, 12))
# Against the header, in all. Beyond it lie the turns by 90° and 180° that make a header with reversed or swapped axes
# fit: left and right look alike, and the brain would be its mirror image.
MOST_TURN_DEG = 70.0
APART_DEG = 20.0  # what is followed differs by as much
AGREE_DEG, AGREE_MM = 2.0, 2.0  # ends that are one and the same
PUSH_DEG, PUSH_MM = 5.0, 5.0  # what the result is moved by for the second look
STEADY_DEG = 0.5  # and within which it has to come back
# Voxels: of the last steps of the rigid one. Larger ones leap over the ruts that its similarity has in a brain of
# another size, to wherever.
SMALL_STEP = 0.3
MOST_STRETCH = 1.5  # of a head against the template, either way
SEED = 1  # of the points at which scan and template are compared
_COARSEST, _COARSE, _MIDDLE, _FINE = range(4)  # levels of `Similarity`


@dataclass(frozen=True, eq=False)
class Registered:
    """Where a brain lies.

    Attributes:
        rigid: From points of the template to points of the scan (LPS mm), six degrees of freedom.
        affine: The same with twelve, or None where it went astray.
        similarity: The mutual information of each, nats. Empty where the backend does not say.
        starts: How they were found: turns `looked_at` and `followed`, how many of these `agree` with the best to 2° and
            2 mm, itself among them, the `rank` of its start among all that were looked at, from 1; by how many degrees
            the second look `moved_deg` the affine one, whether a `second_round` was needed, and whether it is `steady`
            now. Empty likewise.
        reason: Why there is no affine one.
    """

    rigid: sitk.AffineTransform
    affine: sitk.AffineTransform | None
    similarity: dict[str, float]
    starts: dict[str, Any]
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """All but the transforms, as JSON has it."""
        found = {"similarity": self.similarity, "starts": self.starts}
        return found | ({"no_affine": self.reason} if self.reason else {})

    def wanted(self, transform_type: TransformType) -> sitk.AffineTransform:
        """The transform of this type. Raises ScanError for an affine one that went astray."""
        found = self.rigid if transform_type == "rigid" else self.affine
        if found is None:
            raise ScanError(self.reason)
        return found


@dataclass(frozen=True, eq=False)
class _End:
    """Where the way from a start ended."""

    rank: int
    position: Position
    similarity: float


def settings() -> dict[str, Any]:
    """What a registration is done with, for the record."""
    from brainfm.prep.similarity import BINS, LEVELS

    return {
        "measure": f"mutual information, {BINS} bins",
        "levels_mm": [level.mm for level in LEVELS],
        "points": [level.points for level in LEVELS],
        "least_steps_mm": [level.least_step for level in LEVELS],
        "starts": [f"±{most:g}° by {step:g}°, {followed} followed" for most, step, followed in ROUNDS],
        "rigid": f"from the nearest to the affine one, in steps of {SMALL_STEP:g} voxels at most",
        "seed": SEED,
    }


def register(brain: sitk.Image, device: str = "cpu") -> Registered:
    """The rigid and the affine transform from points of the template to points of the scan.

    The brain's centre of mass is put on the template's. Turns of up to 45° about each axis are looked at on voxels of
    8 mm; the best that differ are followed to 4 mm, and the best of these, as an affine one, to 2 mm. Then the second
    look: turned and shifted by 5° and 5 mm, the result has to come back to within 0.5°, or a second round begins from
    more turns. It is the affine one that has to, for a rigid one, where the brain is of another size, fits nearly as
    well in several places and ends in another from each header. So the rigid one is climbed to last, in small steps,
    from the rigid motion that is nearest to the affine one over the template's brain. The same brain gives the same
    transforms, to the bit: one thread does it on the processor.

    No header that mirrors the brain is put right: left and right look alike, so it would be the other way round.

    Args:
        brain: The scan, 0 outside the brain.
        device: Torch's. On a GPU sums are added up in another order each time, and the last digits differ.

    Raises:
        ScanError: There is no brain in it, or it fits only when turned by more than 70°.
    """
    from brainfm.prep.similarity import Similarity

    if not np.max(sitk.GetArrayViewFromImage(brain)) > 0:
        raise ScanError("there is no brain to register: every voxel is 0; is it a T1w scan of a head?")
    with torch_threads(1):  # on so few points several wait for one another longer than they work
        return _registered(Similarity(brain, device))


def _registered(similarity: Similarity) -> Registered:
    ends: list[_End] = []
    rounds = looked_at = count = 0
    for most, step, followed in ROUNDS:
        rounds += 1
        turns = _turns(most, step)
        looked_at += len(turns)
        followed_ends = _ends(similarity, turns, followed)
        count += len(followed_ends)
        ends += [end for end in followed_ends if _turn_deg(end.position) <= MOST_TURN_DEG]
        if not ends:
            continue
        best = max(ends, key=lambda end: end.similarity)
        affine, of_affine = _affine(similarity, best.position)
        again, of_again = _affine(similarity, _nearest_rigid(affine) @ _push())
        moved_deg, _ = _difference(_nearest_rigid(affine), _nearest_rigid(again))
        if of_again > of_affine:
            affine, of_affine = again, of_again
        if moved_deg <= STEADY_DEG:
            break
    if not ends or _turn_deg(_nearest_rigid(affine)) > MOST_TURN_DEG:
        raise ScanError(
            f"the brain fits the template only when it is turned by more than {MOST_TURN_DEG:g}° against its header, "
            "which may have axes swapped or reversed; correct it, or convert the scan from its DICOM files again"
        )
    affine, of_affine = similarity.climbed(affine, _FINE, affine=True)
    reason = astray(_transform(affine))
    rigid = similarity.climbed(best.position, _MIDDLE)[0] if reason else _nearest_rigid(affine)
    rigid, of_rigid = similarity.climbed(rigid, _FINE, voxels=SMALL_STEP)
    return Registered(
        _transform(rigid),
        None if reason else _transform(affine),
        {"rigid": round(of_rigid, 6)} | ({} if reason else {"affine": round(of_affine, 6)}),
        {
            "looked_at": looked_at,
            "followed": count,
            "agree": sum(_agree(best.position, end.position) for end in ends),
            "rank": best.rank,
            "moved_deg": round(moved_deg, 3),
            "second_round": rounds > 1,
            "steady": moved_deg <= STEADY_DEG,
        },
        reason,
    )


def _affine(similarity: Similarity, rigid: Position) -> tuple[Position, float]:
    """The affine position that a rigid one leads to, on voxels of 4 and then 2 mm, and its similarity."""
    affine, _ = similarity.climbed(rigid, _COARSE, affine=True)
    return similarity.climbed(affine, _MIDDLE, affine=True)


def as_affine(transform: sitk.Transform) -> sitk.AffineTransform:
    """A rigid or affine transform as a plain affine one about the origin."""
    origin = np.array(transform.TransformPoint((0.0, 0.0, 0.0)))
    matrix = np.stack([np.array(transform.TransformPoint(tuple(axis))) - origin for axis in np.eye(3)], axis=1)
    affine = sitk.AffineTransform(3)
    affine.SetMatrix(matrix.ravel().tolist())
    affine.SetTranslation(origin.tolist())
    return affine


def astray(affine: sitk.AffineTransform) -> str:
    """Why an affine transform cannot be right; empty where it can."""
    sizes = np.linalg.svd(np.reshape(affine.GetMatrix(), (3, 3)), compute_uv=False)
    if sizes.min() >= 1 / MOST_STRETCH and sizes.max() <= MOST_STRETCH:
        return ""
    return (
        f"the affine registration went astray (it would stretch the brain by {sizes.min():.2f} to "
        f"{sizes.max():.2f}); use the rigid one"
    )


def _ends(similarity: Similarity, turns: NDArray[np.float64], followed: int) -> list[_End]:
    """Where the best of the turns that differ lead to."""
    starts = np.tile(np.eye(4), (len(turns), 1, 1))
    starts[:, :3, :3] = turns
    starts[:, :3, 3] = similarity.centre
    order = np.argsort(-similarity.at(starts, _COARSEST), kind="stable")
    chosen: list[int] = []
    for place, index in enumerate(order):
        if len(chosen) < followed and all(
            _difference(starts[index], starts[order[other]])[0] >= APART_DEG for other in chosen
        ):
            chosen.append(place)
    known: list[tuple[Position, tuple[Position, float]]] = []
    ends = []
    for place in chosen:
        coarsest, _ = similarity.climbed(starts[order[place]], _COARSEST)
        end = next((end for before, end in known if _agree(coarsest, before)), None)
        if end is None:
            end = similarity.climbed(coarsest, _COARSE)
            known.append((coarsest, end))
        ends.append(_End(place + 1, *end))
    return ends


def _turns(most: float, step: float) -> NDArray[np.float64]:
    """Rotation matrices [n, 3, 3] of all combinations of turns about the three axes that are not too far in all."""
    angles = np.radians(np.arange(-most, most + step / 2, step))
    turns = [_about(0, x) @ _about(1, y) @ _about(2, z) for x, y, z in product(angles, repeat=3)]
    return np.stack([turn for turn in turns if _turn_deg(turn) <= MOST_TURN_DEG])


def _about(axis: int, angle: float) -> NDArray[np.float64]:
    turn = np.eye(3)
    one, other = (axis + 1) % 3, (axis + 2) % 3
    turn[[one, other], [one, other]] = np.cos(angle)
    turn[one, other], turn[other, one] = -np.sin(angle), np.sin(angle)
    return turn


def _push() -> Position:
    """A turn about an oblique axis and a shift, of the template about its centre."""
    push = np.eye(4)
    part = np.radians(PUSH_DEG) / np.sqrt(3)
    push[:3, :3] = _about(0, part) @ _about(1, part) @ _about(2, part)
    push[:3, 3] = PUSH_MM / np.sqrt(3)
    return push


def _nearest_rigid(affine: Position) -> Position:
    """The rigid position that puts the template's brain nearest to where an affine one does, by least squares."""
    from brainfm.prep.similarity import spread

    left, _, right = np.linalg.svd(affine[:3, :3] @ spread())
    nearest = affine.copy()  # the centre stays where it is put: distances are from the brain's
    nearest[:3, :3] = left @ np.diag((1.0, 1.0, np.linalg.det(left @ right))) @ right
    return nearest


def _difference(one: Position, other: Position) -> tuple[float, float]:
    """The angle, °, between two rigid positions, and the distance, mm, between where they put the template's centre."""
    return _turn_deg(one[:3, :3].T @ other[:3, :3]), float(np.linalg.norm(one[:3, 3] - other[:3, 3]))


def _turn_deg(position: NDArray[np.float64]) -> float:
    """The angle of a rigid position or a rotation matrix, °."""
    return float(np.degrees(np.arccos(np.clip((np.trace(position[:3, :3]) - 1) / 2, -1, 1))))


def _agree(one: Position, other: Position) -> bool:
    angle, mm = _difference(one, other)
    return angle <= AGREE_DEG and mm <= AGREE_MM


def _transform(position: Position) -> sitk.AffineTransform:
    from brainfm.prep.similarity import centre

    transform = sitk.AffineTransform(3)
    transform.SetMatrix(position[:3, :3].ravel().tolist())
    transform.SetTranslation((position[:3, 3] - position[:3, :3] @ centre()).tolist())
    return transform
