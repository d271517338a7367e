"""Masks as ITK has them."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from brainfm.prep.image import largest_part


@pytest.mark.parametrize("seed", range(6))
def test_largest_part_has_its_holes_filled_and_no_others(seed):
    """Parts reach the edges of the image, where what is open is no hole."""
    rng = np.random.default_rng(seed)
    blurred = sitk.SmoothingRecursiveGaussian(sitk.GetImageFromArray(rng.normal(size=(24, 20, 28))), 1.2)
    mask = sitk.Cast(sitk.Abs(blurred) > 0.03, sitk.sitkUInt8)
    mask.SetOrigin((3, -4, 5))
    parts = sitk.RelabelComponent(sitk.ConnectedComponent(mask))
    wanted = sitk.BinaryFillhole(parts == 1)
    found = largest_part(mask)
    assert np.array_equal(sitk.GetArrayFromImage(found), sitk.GetArrayFromImage(wanted))
    assert (found.GetOrigin(), found.GetPixelID()) == (mask.GetOrigin(), sitk.sitkUInt8)
    assert sitk.GetArrayViewFromImage(wanted).sum() > sitk.GetArrayViewFromImage(parts == 1).sum()


def test_largest_part_of_nothing_is_nothing():
    mask = sitk.Image((5, 6, 7), sitk.sitkUInt8)
    assert not sitk.GetArrayViewFromImage(largest_part(mask)).any()
