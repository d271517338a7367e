"""A quick brain and contract for the tests of scans."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from brainfm import Grid
from brainfm.contract import Transpose

SPACING = 2.0


@pytest.fixture(scope="session")
def coarse_spec(spec):
    """The published contract at 2 mm, without its crop."""
    grid = Grid((97, 115, 97), (SPACING,) * 3, spec.grid.origin)
    return replace(spec, grid=grid, operations=(Transpose((2, 1, 0)), spec.operations[-1]), output_shape=None)


@pytest.fixture(scope="session")
def coarse(brain):
    """Every second voxel of the packaged brain, and their affine."""
    image, mask, affine = brain
    strided = (image * mask)[::2, ::2, ::2].astype(np.float32)
    strided.setflags(write=False)
    return strided, affine @ np.diag([SPACING, SPACING, SPACING, 1])


@pytest.fixture(scope="session")
def head(coarse):
    """The brain in a dark skull and a bright scalp 12 mm thick, in air that is 0; its affine is the brain's."""
    voxels, affine = coarse
    mm = np.stack(np.indices(voxels.shape), axis=-1) * SPACING + affine[:3, 3] - (0.0, -18.0, 8.0)

    def ellipsoid(*radii):
        return (np.square(mm / radii).sum(axis=-1) <= 1) & (voxels == 0)

    inner, outer = ellipsoid(80, 98, 88), ellipsoid(92, 110, 100)
    made = np.where(outer & ~inner, 240, voxels).astype(np.float32)
    made.setflags(write=False)
    return made


@pytest.fixture
def saved(tmp_path, coarse):
    """A function (voxels, affine, name) → the path of a NIfTI file that holds them, on the coarse brain's voxels."""

    def save(voxels, affine=None, name="scan.nii"):
        image = nib.Nifti1Image(voxels, coarse[1] if affine is None else affine)
        image.to_filename(tmp_path / name)
        return tmp_path / name

    return save
