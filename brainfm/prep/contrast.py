"""Scans of other contrasts than T1w: brought onto the prepared T1w scan of the same person."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainfm.bids import bids_ids, entities
from brainfm.errors import ScanError
from brainfm.files import file_sha256, list_below
from brainfm.prep.coregister import SETTINGS, coregister
from brainfm.prep.image import affine_of, sitk, to_itk
from brainfm.prep.quality import Figure, Range, figure_of
from brainfm.prep.source import Contrast
from brainfm.scan.layout import RECORD
from brainfm.scan.prepared import PreparedScan, read_record
from brainfm.scan.resample import resample


def onto_t1w(scan: sitk.Image, t1w: PreparedScan) -> tuple[NDArray[np.bool_], dict[str, Any]]:
    """The brain [i, j, k] of a scan, and how it lies against the template, both by way of the person's T1w scan.

    Args:
        scan: Of any contrast, in its own space.
        t1w: The prepared T1w scan.
    """
    affine = affine_of(scan)
    to_scan = coregister(
        scan, to_itk(t1w.image(), t1w.head.affine), to_itk(t1w.brain.astype(np.uint8), t1w.head.affine)
    )
    to_t1w = np.linalg.inv(to_scan)
    i, j, k = scan.GetSize()
    brain = resample(t1w.brain.astype(np.float32), np.linalg.inv(t1w.head.affine) @ to_t1w @ affine, (i, j, k)) > 0.5
    if not brain.any():
        raise ScanError(
            f"the registration to {t1w.folder} failed: its brain lies outside the scan; are both one person's?"
        )
    matrices = {
        name: None if t1w.record[name] is None else (np.array(t1w.record[name]) @ to_t1w).round(8).tolist()
        for name in ("rigid", "affine")
    }
    onto = {"onto": str(t1w.folder), "onto_sha256": file_sha256(t1w.folder / RECORD)}
    return brain, matrices | {"registration": SETTINGS | onto}


AGREEMENT = Range(
    "how much more the scan and the T1w scan say of each other as they lie than moved by 4 mm, nats",
    (0.01, 10),
    (0, 10),
    "the registration to the T1w scan may have gone wrong",
)
ALONE = "registered to the template by itself, without a T1w scan of the person: look at the picture"
_MOVED_MM = 4  # about what is seen by eye
_BINS = 32


def judge_contrast(image: NDArray[np.float32], brain: NDArray[np.bool_], t1w: NDArray[np.float32] | None) -> Figure:
    """Does a scan of another contrast lie where the T1w scan does? What is typical of T1w scans says nothing of it.

    Args:
        image: [x, y, z] on the template's grid, of 1 mm.
        brain: Its brain there.
        t1w: The T1w scan there; without one nothing but a look can tell.
    """
    if t1w is None:
        return Figure("agreement", 0.0, "look", ALONE)
    every = (slice(None, None, 2),) * 3  # a voxel of eight says as much
    moved = []
    for axis in range(3):
        for shift in (-_MOVED_MM, _MOVED_MM):
            moved.append(_information(np.roll(image, shift, axis)[every][brain[every]], t1w[every][brain[every]]))
    value = _information(image[every][brain[every]], t1w[every][brain[every]]) - max(moved)
    return figure_of("agreement", value, AGREEMENT)


def _information(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """The mutual information of two images' voxels, nats."""
    edges = [np.percentile(each, np.linspace(0, 100, _BINS + 1)) for each in (one, other)]
    bins = [np.searchsorted(edge[1:-1], each) for edge, each in zip(edges, (one, other), strict=True)]
    joint = np.bincount(bins[0] * _BINS + bins[1], minlength=_BINS**2).reshape(_BINS, _BINS) / len(one)
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    full = joint > 0
    return float((joint[full] * np.log(joint[full] / apart[full])).sum())


def t1w_of(name: str, contrast: Contrast, output: Path) -> Path | None:
    """The folder of the prepared T1w scan that a scan of another contrast belongs to, or None where there is none.

    It is called as the scan is, without the contrast at its end; else it is the only one of the patient and session.

    Args:
        name: Of the scan's folder.
        contrast: At the end of its name, after "_".
        output: Holds the folders.

    Raises:
        ScanError: There are several.
    """
    if (alike := output / name.removesuffix(f"_{contrast}")) != output / name and (alike / RECORD).is_file():
        return alike
    own = whose(name)
    found = [
        path.parent
        for path in list_below(output, RECORD)
        if whose(path.parent.relative_to(output).as_posix()) == own
        and (read_record(path.parent) or {}).get("contrast") == "T1w"
    ]
    if len(found) > 1:
        raise ScanError(
            f"{name}: may belong to {found[0]} or {found[1]}; call it as its T1w scan is, with _{contrast} at the end"
        )
    return found[0] if found else None


def whose(name: str) -> tuple[str, str]:
    """The patient and session that the name of a scan's folder says."""
    patient, _ = bids_ids(Path(name))
    return (patient, entities(Path(name)).get("ses", "")) if patient else (name.partition("/")[0], "")
