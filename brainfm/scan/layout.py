"""The folder of a prepared scan: what its files are called, and whether a path is one.

    head.nii.gz         the whole head in its own space, without its bias field, in steps of a stated size
    brain_mask.nii.gz   its brain, on the same voxels
    bias_field.nii.gz   the logarithm of the field that was taken away, on coarse voxels; none where none was
    prep.json           how it lies against MNI152 2009c (`rigid`, `affine`), and all that was done; written last
    qc.png              the picture for its quality

TurboPrep's three files may lie beside these. Folders of before hold them alone, already on the template's grid.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

HEAD, BRAIN, FIELD, RECORD, PICTURE = "head.nii.gz", "brain_mask.nii.gz", "bias_field.nii.gz", "prep.json", "qc.png"
TURBOPREP_IMAGE, TURBOPREP_MASK, TURBOPREP_TRANSFORM = "normalized.nii.gz", "mask.nii.gz", "affine_transf.mat"


def is_prepared(path: Any) -> bool:
    """Whether a path is the folder of a prepared scan. False for one of before, which holds TurboPrep's files alone."""
    # With os.path, not Path: it is asked of every scan of a long list.
    return isinstance(path, str | os.PathLike) and all(
        os.path.isfile(os.path.join(path, name))  # noqa: PTH113, PTH118
        for name in (RECORD, HEAD)
    )


def turboprep_files(image: Any, mask: Any) -> tuple[Any, Any]:
    """The image and mask in a folder that holds TurboPrep's files and no prepared scan; anything else as it is."""
    if not isinstance(image, str | os.PathLike) or is_prepared(image):
        return image, mask
    files = Path(image, TURBOPREP_IMAGE), Path(image, TURBOPREP_MASK)
    if not os.path.isfile(files[0]):  # noqa: PTH113 - where pathlib raises, as of a name too long, reading says why
        return image, mask
    return files[0], files[1] if mask is None and files[1].is_file() else mask
