"""Operations that move voxels, against plain NumPy and SciPy: their values, and their place in the world."""

from __future__ import annotations

import math
import sys
import warnings
from dataclasses import replace
from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage
from volumes import AFFINE, EVERY, PICKS, image_of, interpolated, kind, scan, world_of

from brainfm import MissingExtraError, ScanError
from brainfm.contract import (
    CropBox,
    CropCenter,
    CropForeground,
    CropToMultiple,
    Pad,
    Reorient,
    Resample,
    Resize,
    Transpose,
    Volume,
)

AXCODES = ["".join(code) for axes in permutations(("RL", "AP", "SI")) for code in product(*axes)]
NEAREST_LENGTHS = [(6, 9), (9, 4), (7, 7), (5, 10)]

# --- Where the voxels go --------------------------------------------------------------------------


@pytest.mark.parametrize("operation", PICKS, ids=kind)
def test_picking_voxels_gives_views_of_the_stored_array(operation):
    volume = scan(dtype=np.uint8)
    picked = operation(replace(volume, slope=2.0, inter=1.0))
    assert np.shares_memory(picked.stored, volume.stored)
    assert np.shares_memory(picked.mask, volume.mask)
    assert picked.stored.dtype == np.uint8
    assert (picked.slope, picked.inter) == (2.0, 1.0)


@pytest.mark.parametrize(
    "operation",
    [
        *PICKS,
        Reorient("RAS"),
        Pad((12, 11, 20), -1e6),
        Resize((18, 5, 13)),
        Resize((3, 5, 11), "area"),
        Resample((1.5, 2.0, 1.1), order=1),
        Resample((1.5, 2.0, 1.1), order=1, keep="first_voxel"),
        Resize((5, 4, 6), "nearest_corners"),
    ],
    ids=kind,
)
def test_every_voxel_stays_at_its_place_in_the_world(operation):
    index = np.zeros((9, 10, 11), dtype=bool)
    index[2:7, 3:8, 1:9] = True
    before = Volume(np.empty((3, 9, 10, 11)), index, AFFINE)
    before = replace(before, stored=world_of(before).astype(np.float32))
    after = operation(before)
    world = world_of(after).reshape(3, -1)
    index = np.linalg.inv(AFFINE[:3, :3]) @ (world - AFFINE[:3, 3:])
    inside = ((index > -1e-6) & (index < np.array([[8], [9], [10]]) + 1e-6)).all(axis=0)
    assert inside.sum() >= 40
    np.testing.assert_allclose(after.image.reshape(3, -1)[:, inside], world[:, inside], atol=1e-4)


@pytest.mark.parametrize(
    "operation",
    [*PICKS, Pad((12, 11, 10)), Resize((9, 5, 16), "nearest"), Resample((1.5, 2.0, 1.1), order=0)],
    ids=kind,
)
def test_the_mask_goes_where_its_voxels_go(operation):
    volume = scan()
    moved = operation(replace(volume, stored=volume.mask[None].astype(np.uint8)))
    assert moved.mask.dtype == bool
    np.testing.assert_array_equal(moved.mask, moved.image[0] > 0.5)


@pytest.mark.parametrize("operation", [o for o in EVERY if getattr(o, "region", "") != "mask"], ids=kind)
def test_a_volume_without_a_mask_stays_without_one(operation):
    assert operation(replace(scan(), mask=None)).mask is None


@pytest.mark.parametrize("axcodes", AXCODES)
def test_reorient_does_what_nibabel_does(axcodes):
    volume = scan()
    turned = Reorient(axcodes)(volume)
    turn = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(axcodes))
    np.testing.assert_array_equal(turned.mask, nib.apply_orientation(volume.mask, turn))
    for channel, expected in zip(turned.stored, volume.stored, strict=True):
        np.testing.assert_array_equal(channel, nib.apply_orientation(expected, turn))
    np.testing.assert_allclose(turned.affine, AFFINE @ nib.orientations.inv_ornt_aff(turn, volume.shape), atol=1e-12)


def test_reorient_back_and_forth_is_the_same_scan():
    volume = scan()
    back = Reorient("PSL")(Reorient("RAS")(volume))
    np.testing.assert_array_equal(back.stored, volume.stored)
    np.testing.assert_allclose(back.affine, volume.affine, atol=1e-12)


@pytest.mark.parametrize("axcodes", ["RA", "RAR", "RLS", "RAX", "ras", ""])
def test_axis_codes_that_name_no_orientation_are_refused(axcodes):
    with pytest.raises(ValueError, match="axis codes"):
        Reorient(axcodes)(scan())


def test_transpose_orders_the_axes_as_numpy_does():
    volume = scan()
    turned = Transpose((2, 0, 1))(volume)
    np.testing.assert_array_equal(turned.stored, np.transpose(volume.stored, (0, 3, 1, 2)))
    np.testing.assert_array_equal(turned.mask, np.transpose(volume.mask, (2, 0, 1)))
    np.testing.assert_allclose(turned.spacing, volume.spacing[[2, 0, 1]])


def test_crop_box_keeps_start_up_to_stop():
    volume = scan()
    np.testing.assert_array_equal(CropBox((1, 0, 2), (5, 6, 8))(volume).stored, volume.stored[:, 1:5, 0:6, 2:8])


@pytest.mark.parametrize(
    ("start", "stop"), [((0, 0, 0), (6, 8, 8)), ((-1, 0, 0), (6, 7, 8)), ((3, 0, 0), (3, 7, 8)), ((4, 0, 0), (2, 7, 8))]
)
def test_a_crop_box_that_sticks_out_or_is_empty_is_refused(start, stop):
    with pytest.raises((ScanError, ValueError)):
        CropBox(start, stop)(scan())


def test_crop_center_takes_the_middle_and_leaves_a_shorter_axis():
    volume = scan((6, 7, 8))
    np.testing.assert_array_equal(CropCenter((4, 3, 20))(volume).stored, volume.stored[:, 1:5, 2:5, :])


@pytest.mark.parametrize(
    ("region", "start", "stop"),
    [("nonzero", (1, 0, 2), (4, 4, 5)), ("positive", (1, 2, 2), (4, 4, 4)), ("mask", (2, 2, 1), (3, 3, 6))],
)
def test_crop_foreground_keeps_the_smallest_box_over_all_channels(region, start, stop):
    image, mask = np.zeros((2, 6, 6, 6), dtype=np.float32), np.zeros((6, 6, 6), dtype=bool)
    image[0, 1, 2, 2] = image[1, 3, 3, 3] = 5
    image[1, 2, 0, 4] = -5
    mask[2, 2, 1:6] = True
    volume = Volume(image, mask, np.eye(4))
    cropped, expected = CropForeground(region)(volume), CropBox(start, stop)(volume)
    np.testing.assert_array_equal(cropped.stored, expected.stored)
    np.testing.assert_array_equal(cropped.affine[:3, 3], start)


def test_crop_foreground_leaves_a_margin_as_far_as_the_volume_goes():
    image = np.zeros((9, 7, 8))
    image[4:6, 1, 3:8] = 1
    volume = image_of(image)
    cropped, expected = CropForeground(margin=2)(volume), CropBox((2, 0, 1), (8, 4, 8))(volume)
    np.testing.assert_array_equal(cropped.stored, expected.stored)
    np.testing.assert_array_equal(cropped.affine, expected.affine)
    with pytest.raises(ValueError, match="margin"):
        CropForeground(margin=-1)


def test_pad_by_the_edge_repeats_it_in_each_channel():
    volume = scan((6, 7, 8))
    padded = Pad((9, 7, 11), "edge")(volume)
    wanted = np.pad(volume.image, [(0, 0), (1, 2), (0, 0), (1, 2)], mode="edge")
    np.testing.assert_array_equal(padded.image, wanted)
    assert not padded.mask[0].any()
    assert not padded.mask[..., -1].any()


def test_crop_foreground_of_an_empty_scan_is_refused():
    with pytest.raises(ScanError, match="no voxel"):
        CropForeground()(image_of(np.zeros((2, 2, 2))))


def test_crop_to_multiple_keeps_the_largest_multiples_in_the_centre():
    volume = scan((6, 7, 9))
    np.testing.assert_array_equal(CropToMultiple((4, 3, 9))(volume).stored, volume.stored[:, 1:5, 0:6, :])


def test_a_scan_smaller_than_one_multiple_is_refused():
    with pytest.raises(ScanError, match="smaller than one multiple"):
        CropToMultiple((4, 16, 4))(scan())


def test_pad_fills_both_sides_and_puts_the_odd_voxel_last():
    volume = scan((6, 7, 8))
    padded = Pad((9, 7, 4), 3.0)(volume)
    np.testing.assert_array_equal(
        padded.image, np.pad(volume.stored, ((0, 0), (1, 2), (0, 0), (0, 0)), constant_values=3)
    )
    np.testing.assert_array_equal(padded.mask, np.pad(volume.mask, ((1, 2), (0, 0), (0, 0))))


def test_pad_with_the_minimum_takes_each_channels_own():
    stored = np.stack([np.full((2, 2, 2), -4.0), np.full((2, 2, 2), 7.0)]).astype(np.float32)
    stored[:, 0, 0, 0] = [1.0, 9.0]
    padded = Pad((4, 2, 2), "minimum")(Volume(stored, None, np.eye(4)))
    assert padded.image[:, 0].reshape(2, -1).tolist() == [[-4.0] * 4, [7.0] * 4]


def test_pad_fills_a_scaled_scan_with_a_real_intensity():
    volume = Volume(np.full((1, 2, 2, 2), 10, dtype=np.uint8), None, np.eye(4), slope=2.0, inter=-5.0)
    padded = Pad((3, 2, 2), 1.0)(volume)
    assert padded.image[0, :, 0, 0].tolist() == [15.0, 15.0, 1.0]


def test_a_large_enough_scan_is_not_padded():
    volume = scan()
    assert Pad((6, 2, 1))(volume) is volume


# --- Interpolated ---------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", [Resize((3, 7, 9)), Resample((1.0, 2.0, 1.5))], ids=kind)
def test_a_read_only_scan_is_interpolated_without_a_warning(operation):
    torch.set_warn_always(True)  # torch says it once a process otherwise
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            operation(scan())
    finally:
        torch.set_warn_always(False)


@pytest.mark.parametrize("shape", [(9, 5, 16), (3, 14, 8)])
def test_resize_trilinear_is_linear_interpolation_between_voxel_centres(shape):
    volume = scan()
    expected = np.stack([interpolated(channel, shape, order=1) for channel in volume.image])
    np.testing.assert_allclose(Resize(shape)(volume).image, expected, atol=1e-3)


def test_resize_area_by_whole_factors_is_the_mean_of_blocks():
    volume = scan((6, 8, 9))
    expected = volume.stored.astype(np.float64).reshape(2, 3, 2, 2, 4, 9, 1).mean(axis=(2, 4, 6))
    np.testing.assert_allclose(Resize((3, 2, 9), "area")(volume).image, expected, rtol=1e-5)


@pytest.mark.parametrize(("before", "after"), NEAREST_LENGTHS)
@pytest.mark.parametrize("by", ["resize", "resample"])
def test_nearest_takes_the_voxel_that_holds_the_new_centre(before, after, by):
    volume = image_of(np.arange(float(before))[:, None, None])
    operation = Resize((after, 1, 1), "nearest") if by == "resize" else Resample((before / after, 1, 1), order=0)
    expected = np.floor((np.arange(after) + 0.5) * before / after)
    np.testing.assert_array_equal(operation(volume).image.ravel(), expected)


def test_resize_keeps_the_field_of_view():
    volume = scan()
    resized = Resize((3, 14, 9))(volume)
    np.testing.assert_allclose(resized.spacing * resized.shape, volume.spacing * volume.shape)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_resample_is_spline_interpolation_with_the_edges_kept(order):
    volume = scan((8, 9, 10))
    resampled = Resample((1.3, 1.7, 1.0), order=order)(volume)
    np.testing.assert_array_equal(resampled.shape, np.rint([8, 9, 10] * volume.spacing / [1.3, 1.7, 1.0]))
    expected = np.stack([interpolated(channel, resampled.shape, order) for channel in volume.image])
    np.testing.assert_allclose(resampled.image, expected, atol=1e-3)
    np.testing.assert_allclose(resampled.spacing * resampled.shape, volume.spacing * volume.shape)


def test_anti_alias_smooths_only_the_axes_that_get_coarser():
    volume = replace(scan((12, 10, 10), channels=1), affine=np.eye(4))
    resampled = Resample((3.0, 0.5, 1.0), order=1, anti_alias=True)(volume)
    smooth = ndimage.gaussian_filter1d(
        volume.image[0].astype(np.float64), sigma=(12 / 4 - 1) / 2, axis=0, mode="nearest"
    )
    np.testing.assert_allclose(resampled.image[0], interpolated(smooth, (4, 20, 10), order=1), atol=1e-3)


def test_anti_alias_by_half_width_is_brainfms_filter_with_zeros_beyond_the_edge():
    volume = replace(scan((12, 10, 10), channels=1), affine=np.eye(4))
    resampled = Resample((3.0, 0.5, 1.0), order=1, anti_alias=True, half_width=5)(volume)
    sigma = math.log(5) / math.pi * 3  # its `torch_resize`, run: equal to 1e-6
    at = np.arange(-math.ceil(2.5 * sigma), math.ceil(2.5 * sigma) + 1)
    kernel = np.exp(-((at / sigma) ** 2) / 2)
    smooth = ndimage.convolve1d(volume.image[0].astype(np.float64), kernel / kernel.sum(), axis=0, mode="constant")
    np.testing.assert_allclose(resampled.image[0], interpolated(smooth, (4, 20, 10), order=1), atol=1e-3)
    with pytest.raises(ValueError, match="half_width is 1"):
        Resample((1.0, 1.0, 1.0), half_width=1)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_thick_slices_are_resampled_by_themselves_then_along_their_axis_by_nearest_neighbour(axis):
    spacing = [1.5, 1.5, 1.5]
    spacing[axis] = 5.0
    shape = [10, 12, 8]
    volume = replace(scan(tuple(shape), channels=1), affine=np.diag([*spacing, 1.0]))
    operation = Resample((1.0, 1.0, 1.0), order=3, clip=True, slices_above=3)
    slices = []
    for each in np.moveaxis(volume.image[0].astype(np.float64), axis, 0):
        size = [round(n * 1.5) for n in each.shape]
        slices.append(interpolated(each, tuple(size), order=3).clip(each.min(), each.max()))
    nearest = np.minimum(np.floor((np.arange(shape[axis] * 5) + 0.5) / 5), shape[axis] - 1).astype(int)
    expected = np.moveaxis(np.stack(slices)[nearest], 0, axis)
    np.testing.assert_allclose(operation(volume).image[0], expected, atol=1e-3)
    within_limit = replace(operation, slices_above=4)
    assert np.abs(within_limit(volume).image[0] - expected).max() > 1


def test_slices_are_thick_only_where_one_axis_alone_is_the_coarsest():
    operation = Resample((1.0, 1.0, 1.0), order=1, slices_above=3)
    plain = replace(operation, slices_above=None)
    for spacing in ([5.0, 5.0, 1.0], [2.0, 1.0, 1.0]):
        volume = replace(scan((6, 7, 8), channels=1), affine=np.diag([*spacing, 1.0]))
        np.testing.assert_array_equal(operation(volume).image, plain(volume).image)


def test_a_scan_of_the_right_spacing_is_not_resampled():
    volume = scan()
    assert Resample(tuple(volume.spacing), order=3)(volume) is volume


def test_resample_without_scipy_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(MissingExtraError, match="pip install scipy"):
        Resample((1.0, 1.0, 1.0))(scan())
