"""Dense features as NIfTI: one file a scan, every cell where it looks, in the scan's own world."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from brainfm.files import atomic_path
from brainfm.manifest import ScanRecord

DenseDType = Literal["float16", "float32"]


def dense_affine(affine: NDArray[np.float64], stage: dict[str, Any]) -> NDArray[np.float64]:
    """[4, 4] from the cells of a map to RAS mm, for a tensor with an affine and an entry of `feature_info`."""
    cells = np.eye(4)
    cells[:3, :3] = np.diag(np.asarray(stage["reduction"], dtype=np.float64))
    cells[:3, 3] = stage["offset"]
    return np.asarray(affine @ cells)


def write_dense(
    cells: NDArray[np.float32], affine: NDArray[np.float64], path: Path, dtype: DenseDType = "float16"
) -> None:
    """Write a map [C, d, h, w] as NIfTI [x, y, z, C], its axes turned to RAS, atomically.

    Args:
        cells: The map.
        affine: Of `dense_affine`.
        path: .nii or .nii.gz.
        dtype: NIfTI has no half precision: "float16" rounds the numbers to it, which halves the compressed file, and
            stores them as float32. Where one is too large for it, none is rounded.
    """
    import nibabel as nib

    numbers = cells.astype(np.float32)
    if dtype == "float16" and np.abs(numbers).max(initial=0) <= np.finfo(np.float16).max:
        numbers = numbers.astype(np.float16).astype(np.float32)
    image = nib.as_closest_canonical(nib.Nifti1Image(np.moveaxis(numbers, 0, -1), affine))
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = b"brainfm dense features"
    content = image.to_bytes()
    with atomic_path(path) as temporary:
        temporary.write_bytes(gzip.compress(content, compresslevel=1, mtime=0) if path.suffix == ".gz" else content)


def dense_paths(records: Sequence[ScanRecord], folder: Path) -> list[Path]:
    """A file for each scan: named by patient and scan where that is one scan's alone, else by its file as well."""
    names = [_plain("_".join(filter(None, (r.patient_id, r.scan_id)))) for r in records]
    own = _once(names)
    paths = []
    for number, (name, record) in enumerate(zip(names, records, strict=True)):
        if name.casefold() not in own:
            place = (
                f"{record.name or f'scan {number}'} {record.mask if isinstance(record.mask, str | os.PathLike) else ''}"
            )
            stem = _plain(Path(record.name).name.partition(".")[0]) or "scan"
            name = "_".join(filter(None, (name, stem, hashlib.sha256(os.fsencode(place)).hexdigest()[:8])))
        paths.append(folder / f"{name}_dense.nii.gz")
    return paths


def _once(names: Sequence[str]) -> set[str]:
    """Names that are there once, whatever their case: some file systems do not know it."""
    count = Counter(name.casefold() for name in names if name)
    return {name for name, n in count.items() if n == 1}


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")
