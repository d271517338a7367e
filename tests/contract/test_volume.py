"""A volume: its real intensities, its spacing, and the regions that statistics are taken over."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from volumes import AFFINE, image_of, scan

from brainfm import ScanError
from brainfm.contract import ZScore


def test_real_intensities_are_the_stored_ones_scaled():
    volume = replace(scan(dtype=np.uint8), slope=0.5, inter=-3.0)
    np.testing.assert_allclose(volume.image, volume.stored.astype(np.float64) * 0.5 - 3.0, atol=1e-5)
    assert volume.image.dtype == np.float32


def test_unscaled_float32_voxels_are_not_copied():
    volume = scan()
    assert np.shares_memory(volume.image, volume.stored)


def test_spacing_is_the_length_of_the_affines_columns():
    np.testing.assert_allclose(scan().spacing, [np.sqrt(sum(AFFINE[:3, axis] ** 2)) for axis in range(3)])


def test_regions_hold_the_voxels_they_name():
    volume = image_of([[[-1.0, 0.0, 2.0]]], mask=np.array([[[True, True, False]]]))
    chosen = {name: volume.region(name).ravel().tolist() for name in ("all", "nonzero", "positive")}
    assert chosen == {"all": [True] * 3, "nonzero": [True, False, True], "positive": [False, False, True]}
    assert volume.region("mask").ravel().tolist() == [True, True, False]


@pytest.mark.parametrize("region", ["nonzero", "positive", "mask"])
def test_an_empty_region_is_refused(region):
    volume = image_of(np.zeros((2, 2, 2)), mask=np.zeros((2, 2, 2), dtype=bool))
    with pytest.raises(ScanError, match="no voxel"):
        volume.region(region)


def test_statistics_in_a_mask_that_is_not_there_are_refused():
    with pytest.raises(ScanError, match="pass mask="):
        ZScore("mask")(replace(scan(), mask=None))
