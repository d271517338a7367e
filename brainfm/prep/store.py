"""Write the images of a prepared scan: a head in integer steps, a mask, a field; whole or not at all."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainfm.files import atomic_path
from brainfm.scan.stored import StoredImage

MOST_BYTES = 8_000_000  # of a stored head, where steps of FINEST to COARSEST can reach it
FINEST, COARSEST = 1 / 1024, 1 / 256  # of what the brain's brightest percent begins at: the size of a step
_MOST_STEPS = 2**16 - 1
_LEVEL = 1  # of gzip: half the time of 3, and 3 % more bytes


def save_head(
    head: NDArray[np.float32], brain: NDArray[np.bool_], affine: NDArray[np.float64], path: Path
) -> tuple[StoredImage, dict[str, Any]]:
    """Write a head as uint16, in the finest steps that keep the file below 8 MB.

    Args:
        head: [i, j, k] intensities.
        brain: [i, j, k], what of it is brain: steps are a fraction of its brightness.
        affine: To RAS mm.
        path: Of the file.

    Returns:
        The image as it is stored, and how: the size of a `step` in the head's units, the largest error (half of one) as
        a `fraction_of_bright_brain`, and the file's `bytes`.
    """
    low, high = float(head.min()), float(head.max())
    bright = float(np.percentile(head[brain], 99)) - low
    whole = bool((head == np.rint(head)).all()) and high - low <= _MOST_STEPS
    step = 1.0 if whole else max(bright * FINEST, (high - low) / _MOST_STEPS)
    while True:
        steps = head - np.float32(low)
        steps /= np.float32(step)
        voxels = np.rint(steps, out=steps).astype(np.uint16)
        del steps  # while it is packed
        size = _save(voxels, affine, path, step, low)
        if whole or size <= MOST_BYTES or step >= bright * COARSEST:
            break
        step *= 2
    storage = {"step": step, "fraction_of_bright_brain": 0.0 if whole else step / 2 / bright, "bytes": size}
    # As it is read again: a header holds the scaling and the affine in float32.
    as_read = affine.astype(np.float32).astype(np.float64)
    stored = StoredImage(voxels, as_read, float(np.float32(step)), float(np.float32(low)), str(path))
    return stored, storage


def save(image: NDArray[Any], affine: NDArray[np.float64], path: Path, code: str = "scanner") -> None:
    """Write an image [i, j, k] as it is; `code` is NIfTI's word for the space of the affine: "scanner" or "mni"."""
    _save(image, affine, path, code=code)


def _save(
    image: NDArray[Any],
    affine: NDArray[np.float64],
    path: Path,
    slope: float = 1.0,
    inter: float = 0.0,
    code: str = "scanner",
) -> int:
    """Same voxels, same bytes; returns how many."""
    import nibabel as nib

    nifti = nib.Nifti1Image(image, affine)
    nifti.header.set_xyzt_units("mm")
    nifti.set_sform(affine, code)
    nifti.set_qform(affine, code)
    nifti.header.set_slope_inter(slope, inter)
    packed = gzip.compress(nifti.to_bytes(), compresslevel=_LEVEL, mtime=0)
    with atomic_path(path) as temporary:
        temporary.write_bytes(packed)
    return len(packed)
