"""From one prepared scan to the tensors of contracts, against the two-step way: files by SimpleITK, then the transform.

3D-Neuro-SimCLR's, against TurboPrep's own files, is in `test_pipeline`.
"""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from prepared_folders import moved_head, write

import brainfm
from brainfm.prep.image import affine_of, sitk, to_array, to_itk

# From points of FSL's MNI152 to those of 2009c, RAS mm.
FSL = np.array(
    [
        [1.01303, 0.00029, -0.00079, -0.54005],
        [-0.01575, 1.0117, 0.00852, 0.35138],
        [0.00046, -0.01213, 1.02396, -0.20205],
        [0, 0, 0, 1],
    ]
)
_LPS = np.diag((-1.0, -1.0, 1.0, 1.0))
# name → the registration that its contract starts from, None for the scan's own space
CONTRACTS = {
    "sfcn_age": "affine",
    "pyment_sfcn_reg": "rigid",
    "synthba_densenet201": "affine",
    "openmind_resencl": None,
    "simclr_resnet18_3d": "rigid",
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """With a bias field that was taken away, of no strength."""
    head, brain = moved_head()
    field = np.zeros([-(-n // 4) for n in head.shape], np.float32)
    return write(tmp_path_factory.mktemp("prepared") / "sub-01", head, brain, field=field)


def registered(folder, spec, kind, output):
    """The brain on the contract's voxels, resampled by SimpleITK, as files of an image and its mask."""
    matrix = np.linalg.inv(json.loads((folder / "prep.json").read_text())[kind])
    matrix = _LPS @ matrix @ (FSL if spec.space == "MNI152NLin6Asym" else np.eye(4)) @ _LPS
    to_scan = sitk.AffineTransform(3)
    to_scan.SetMatrix(matrix[:3, :3].ravel().tolist())
    to_scan.SetTranslation(matrix[:3, 3].tolist())
    grid = to_itk(np.zeros(spec.grid.shape, np.float32), spec.grid.affine(spec.orientation))
    image, mask = (
        to_array(sitk.Resample(to_itk(stored.get_fdata(dtype=np.float32), stored.affine), grid, to_scan))
        for stored in (nib.load(folder / name) for name in ("head.nii.gz", "brain_mask.nii.gz"))
    )
    files = output / "brain.nii", output / "mask.nii"
    for path, array in zip(files, (image * (mask > 0.5), (mask > 0.5).astype(np.uint8)), strict=True):
        nib.Nifti1Image(array, affine_of(grid)).to_filename(path)
    return files


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if kind is None else []) for name, kind in CONTRACTS.items()]
)
def test_tensor_of_a_prepared_scan_is_that_of_the_two_steps(name, prepared, tmp_path):
    transform, kind = brainfm.create_transform(name), CONTRACTS[name]
    files = (prepared / "head.nii.gz", None) if kind is None else registered(prepared, transform.spec, kind, tmp_path)
    if transform.spec.mask == "none":
        files = files[:1]
    one_step, two_steps = transform(prepared), transform(*files)
    assert one_step.std() > 0.05
    assert one_step.shape == two_steps.shape
    assert (one_step - two_steps).abs().max() <= 1e-5 * two_steps.abs().max(), name
