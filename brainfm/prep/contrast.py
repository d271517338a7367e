"""Scans of other contrasts than T1w: brought onto the prepared T1w scan of the same person."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainfm.bids import bids_ids, entities
from brainfm.errors import ScanError
from brainfm.files import file_sha256
from brainfm.prep.coregister import SETTINGS, coregister
from brainfm.prep.image import affine_of, sitk, to_itk
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
    whose = _whose(name)
    found = [
        path.parent
        for path in sorted(output.rglob(RECORD))
        if _whose(path.parent.relative_to(output).as_posix()) == whose
        and (read_record(path.parent) or {}).get("contrast") == "T1w"
    ]
    if len(found) > 1:
        raise ScanError(
            f"{name}: may belong to {found[0]} or {found[1]}; call it as its T1w scan is, with _{contrast} at the end"
        )
    return found[0] if found else None


def _whose(name: str) -> tuple[str, str]:
    """The patient and session that the name of a scan's folder says."""
    patient, _ = bids_ids(Path(name))
    return (patient, entities(Path(name)).get("ses", "")) if patient else (name.partition("/")[0], "")
