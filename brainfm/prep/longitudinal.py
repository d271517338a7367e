"""The visits of one person, brought to the template together, so that none of them is favoured.

Registered one by one, each visit meets the template by itself, and the small errors of that look like change.
Registered to the first visit, the first alone is special. Here each visit is registered to each other, both ways; their
midpoint is where all of them meet halfway (as in Reuter et al. 2012); and the mean of the visits there is registered to
the template, once for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainfm.files import write_json
from brainfm.prep.coregister import SETTINGS, coregister
from brainfm.prep.image import itk_threads, sitk, to_itk
from brainfm.prep.pipeline import Clock, Settings, appraise, to_template
from brainfm.prep.registration import register
from brainfm.scan.layout import RECORD
from brainfm.scan.prepared import PreparedScan, read_prepared, read_record
from brainfm.scan.resample import resample
from brainfm.system import torch_threads

_SHAPE = (193, 229, 193)  # of the mean, in voxels of 1 mm about its brain's centre


def align_all(
    folders: Sequence[Path], settings: Settings, threads: int = 1, begun: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """`align` in a process of its own; an empty record, since each visit has one."""
    with torch_threads(threads), itk_threads(threads):
        align(folders, settings, Clock(begun))
    return {}


def align(folders: Sequence[Path], settings: Settings, clock: Clock) -> None:
    """Bring the visits of one person to the template together: their folders' matrices and all that is made by them.

    A folder's `prep.json` is gone while the rest of it is written anew: a visit that this was interrupted on is
    prepared again.

    Args:
        folders: Of prepared scans, of one person, two or more.
        settings: With which they were prepared.
        clock: Told of the steps.
    """
    visits = [read_prepared(folder) for folder in folders]
    with clock("registration"):
        to_mean = to_midpoint(visits)
        found = register(mean_brain(visits, to_mean))
        rigid = np.array(to_template(found.rigid))
        affine = None if found.affine is None else np.array(to_template(found.affine))
    for visit, matrix in zip(visits, to_mean, strict=True):
        together = {
            "rigid": (rigid @ matrix).round(8).tolist(),
            "affine": None if affine is None else (affine @ matrix).round(8).tolist(),
            "registration": found.to_dict() | {"coregistration": SETTINGS},
            "longitudinal": {
                "visits": sorted(other.record["input"]["sha256"] for other in visits),
                "moved_mm": round(_moved_mm(visit, rigid @ matrix), 3),
            },
        }
        record = visit.record | together
        (visit.folder / RECORD).unlink()
        record |= appraise(replace(visit, record=record), settings, record["input"]["stripped"], clock)
        write_json(visit.folder / RECORD, record)


def is_aligned(folders: Sequence[Path]) -> bool:
    """Whether folders of one person's visits were brought to the template together, these and no others."""
    records = [read_record(folder) for folder in folders]
    visits = sorted(record["input"]["sha256"] for record in records if record)
    return all(record and record.get("longitudinal", {}).get("visits") == visits for record in records)


def _moved_mm(visit: PreparedScan, rigid: NDArray[np.float64]) -> float:
    """How far the brain's voxels lie from where the visit's own registration put them, on average."""
    places = np.argwhere(visit.brain)[::997]
    points = np.c_[places, np.ones(len(places))] @ visit.head.affine.T
    own = np.array(visit.record["rigid"])
    return float(np.linalg.norm(points @ (rigid - own).T, axis=1).mean())


def to_midpoint(visits: Sequence[PreparedScan]) -> list[NDArray[np.float64]]:
    """For each of a person's visits, two or more, the matrix [4, 4] from its points to the midpoint's, RAS mm."""
    brains = [to_itk(visit.image() * visit.brain, visit.head.affine) for visit in visits]
    masks = [to_itk(visit.brain.astype(np.uint8), visit.head.affine) for visit in visits]
    numbers = range(len(visits))
    # From points of one visit to points of another.
    found = {(a, b): coregister(brains[b], brains[a], masks[a]) for a, b in permutations(numbers, 2)}
    centre = _centre(visits[0])
    # One place of the brain, as each visit has it: means are taken there, or the choice of an origin would count.
    centres = [centre] + [found[0, b] @ centre for b in numbers[1:]]
    both = {
        (a, b): mean_rigid([found[a, b], np.asarray(np.linalg.inv(found[b, a]))], centres[a])
        for a, b in permutations(numbers, 2)
    } | {(a, a): np.eye(4) for a in numbers}
    return [mean_rigid([both[a, b] for b in numbers], centres[a]) for a in numbers]


def mean_brain(visits: Sequence[PreparedScan], to_mean: Sequence[NDArray[np.float64]]) -> sitk.Image:
    """The mean of the visits' brains at their midpoint, each of the same brightness, on voxels of 1 mm."""
    affine = np.eye(4)
    affine[:3, 3] = (to_mean[0] @ _centre(visits[0]))[:3] - (np.array(_SHAPE) - 1) / 2
    total = np.zeros(_SHAPE, dtype=np.float32)
    for visit, matrix in zip(visits, to_mean, strict=True):
        brain = visit.image() * visit.brain
        to_visit = np.linalg.inv(visit.head.affine) @ np.linalg.inv(matrix) @ affine
        total += resample(brain / np.float32(brain[visit.brain].mean()), to_visit, _SHAPE)
    return to_itk(total / np.float32(len(visits)), affine)


def mean_rigid(matrices: Sequence[NDArray[np.float64]], centre: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of rigid matrices [4, 4]: the rotation nearest to all (chordal); `centre` [4] goes where all put it.

    Turning all of them on the right by one matrix turns the mean by it: midpoints of several visits agree.
    """
    stacked = np.stack(matrices)
    left, _, right = np.linalg.svd(stacked[:, :3, :3].mean(axis=0))
    mean = np.eye(4)
    mean[:3, :3] = left @ np.diag((1.0, 1.0, float(np.sign(np.linalg.det(left @ right))))) @ right
    mean[:3, 3] = (stacked @ centre).mean(axis=0)[:3] - mean[:3, :3] @ centre[:3]
    return mean


def _centre(visit: PreparedScan) -> NDArray[np.float64]:
    """The mean place [4] of a visit's brain, RAS mm."""
    number = np.append(np.argwhere(visit.brain).mean(axis=0), 1.0)
    centre: NDArray[np.float64] = visit.head.affine @ number
    return centre
