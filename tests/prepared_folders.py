"""Folders of prepared scans, as `brainfm prep` writes them, made of the packaged brain."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
from scipy import ndimage

from brainfm.assets import SAMPLE_MASK, SAMPLE_SCAN
from brainfm.prep.store import save, save_head
from brainfm.scan.prepared import FORMAT

# From points of the scan to points of MNI152: turned by 20° and shifted; the affine one stretches it as well.
_TURN = np.array([[0.9397, -0.3420, 0.0], [0.3420, 0.9397, 0.0], [0.0, 0.0, 1.0]])
RIGID = np.block([[_TURN, np.array([[3.0], [-5.0], [7.0]])], [np.zeros((1, 3)), np.ones((1, 1))]])
AFFINE = np.diag([1.08, 0.95, 1.04, 1.0]) @ RIGID
# Its own voxels: 2×2×2.5 mm, and not along the template's axes.
SHAPE, OWN = (
    (112, 128, 88),
    np.diag([2.0, 2.0, 2.5, 1.0]) + np.pad([[-112.0], [-140.0], [-105.0], [0.0]], ((0, 0), (3, 0))),
)


def write(folder, head, brain, *, field=None, lifted_by=0.0, affine_of_voxels=OWN, **fields):
    """A prepared scan's folder, as `brainfm prep` writes it."""
    folder.mkdir(parents=True)
    _, storage = save_head(head.astype(np.float32), brain, affine_of_voxels, folder / "head.nii.gz")
    save(brain.astype(np.uint8), affine_of_voxels, folder / "brain_mask.nii.gz")
    if field is not None:
        coarse = affine_of_voxels @ np.diag([4.0, 4.0, 4.0, 1.0])
        save(field, coarse, folder / "bias_field.nii.gz")
    record = {
        "format": FORMAT,
        "contrast": "T1w",
        "rigid": RIGID.tolist(),
        "affine": AFFINE.tolist(),
        "storage": storage,
        "bias_field": {"lifted_by": lifted_by},
        "input": {"path": "x.nii", "sha256": "0", "found": "", "stripped": False},
        "settings": {},
        "verdict": "pass",
        "quality": [],
        "seconds": {"read": 0.5, "bias": 1.5},
        "peak_memory_gb": 0.1,
    }
    (folder / "prep.json").write_text(json.dumps(record | fields))
    return folder


def moved_head(rigid=RIGID, own=OWN, shape=SHAPE):
    """The packaged brain in a bright scalp, on a scanner's voxels; and the brain."""
    image, mask = (np.asanyarray(nib.load(path).dataobj).astype(np.float32) for path in (SAMPLE_SCAN, SAMPLE_MASK))
    scalp = ndimage.binary_dilation(mask > 0, iterations=12) & ~ndimage.binary_dilation(mask > 0, iterations=8)
    to_template = np.linalg.inv(nib.load(SAMPLE_SCAN).affine) @ rigid @ own
    moved = [
        ndimage.affine_transform(each, to_template[:3, :3], to_template[:3, 3], shape, order=1)
        for each in (np.where(scalp, 300, image * mask), mask)
    ]
    return moved[0], moved[1] > 0.5
