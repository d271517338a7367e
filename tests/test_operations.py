"""Every operation against a few lines of plain NumPy or SciPy, the place of its voxels in the world, its refusals."""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from dataclasses import is_dataclass, replace
from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from brainfm import MissingExtraError, ScanError, operations
from brainfm.contract import (
    Clip,
    CropBox,
    CropCenter,
    CropForeground,
    CropToMultiple,
    DivideByMean,
    MinMax,
    Operation,
    Pad,
    Reorient,
    Resample,
    Resize,
    Standardize,
    Transpose,
    Volume,
    ZScore,
)
from brainfm.contract.volume import operation_from_dict, operation_to_dict

# Oblique, with voxel axes near posterior, superior and left, of 2, 1 and 1.5 mm.
AFFINE = np.array([[0.2, 0.05, -1.49, 40.0], [-1.98, 0.1, -0.15, 30.0], [0.15, 0.99, 0.1, -20.0], [0, 0, 0, 1.0]])
AXCODES = ["".join(code) for axes in permutations(("RL", "AP", "SI")) for code in product(*axes)]
NEAREST_LENGTHS = [(6, 9), (9, 4), (7, 7), (5, 10)]

PICKS = [
    Reorient("LPS"),
    Transpose((2, 0, 1)),
    CropBox((1, 0, 2), (5, 6, 8)),
    CropCenter((3, 4, 20)),
    CropForeground("mask"),
    CropToMultiple((4, 3, 2)),
]
EVERY = [
    *PICKS,
    Pad((10, 9, 5), "minimum"),
    Resize((3, 7, 9), "area"),
    Resample((1.0, 2.0, 1.5), order=3, anti_alias=True),
    Clip(0.5, 99.5, percentiles=True, region="nonzero"),
    ZScore("nonzero", 1e-8, "floor", 1, False, "noise", "one_pass"),
    DivideByMean("positive"),
    MinMax("mask", per_channel=False),
    Standardize(0.3, 0.2),
]


def kind(operation: Operation) -> str:
    return type(operation).__name__


def frozen(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    for array in arrays:
        array.setflags(write=False)
    return arrays


def scan(shape=(6, 7, 8), channels=2, dtype=np.float32) -> Volume:
    """Intensities of 10 to 200, some zeros, and a mask that touches no edge. Not to be written to."""
    draw = np.random.default_rng(len(shape) + channels)
    stored = draw.uniform(10, 200, (channels, *shape)) * (draw.random((channels, *shape)) > 0.2)
    mask = np.zeros(shape, dtype=bool)
    mask[1:-1, 2:-1, 1:-2] = draw.random((shape[0] - 2, shape[1] - 3, shape[2] - 3)) > 0.3
    return Volume(*frozen(stored.astype(dtype), mask, AFFINE.copy()))


def image_of(values, mask=None) -> Volume:
    """One channel of the given [i, j, k] values, as float32."""
    return Volume(np.asarray(values, dtype=np.float32)[None], mask, np.eye(4))


def world_of(volume: Volume) -> np.ndarray:
    """[3, i, j, k]: the RAS mm of every voxel, by its affine."""
    index = np.indices(volume.shape).reshape(3, -1)
    return (volume.affine[:3, :3] @ index + volume.affine[:3, 3:]).reshape(3, *volume.shape)


def new_centres(before: int, after: int) -> np.ndarray:
    """Where the centres of `after` voxels lie among `before` voxels that cover the same length."""
    return (np.arange(after) + 0.5) * before / after - 0.5


def interpolated(image: np.ndarray, shape: tuple[int, int, int], order: int) -> np.ndarray:
    """One channel in float64 at the centres of the new voxels, by scipy's general interpolator."""
    grid = np.meshgrid(*map(new_centres, image.shape, shape), indexing="ij")
    return ndimage.map_coordinates(image.astype(np.float64), grid, order=order, mode="nearest")


def is_operation(value: object) -> bool:
    return inspect.isclass(value) and is_dataclass(value) and "__call__" in vars(value)


# --- The volume -----------------------------------------------------------------------------------


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


def test_every_operation_of_the_module_is_tested_here():
    assert {type(operation) for operation in EVERY} == set(filter(is_operation, vars(operations).values()))


@pytest.mark.parametrize("operation", EVERY, ids=kind)
def test_an_operation_leaves_the_volume_it_is_given(operation):
    volume, twin = scan(), scan()
    assert isinstance(operation, Operation)
    assert operation(volume) is not volume
    for name in ("stored", "mask", "affine"):
        np.testing.assert_array_equal(getattr(volume, name), getattr(twin, name))


@pytest.mark.parametrize("operation", [Resize((3, 7, 9)), Resample((1.0, 2.0, 1.5))], ids=kind)
def test_a_read_only_scan_is_interpolated_without_a_warning(operation):
    torch.set_warn_always(True)  # torch says it once a process otherwise
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            operation(scan())
    finally:
        torch.set_warn_always(False)


# --- Geometry: where the voxels go ----------------------------------------------------------------


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


# --- Geometry that interpolates -------------------------------------------------------------------


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


def test_a_scan_of_the_right_spacing_is_not_resampled():
    volume = scan()
    assert Resample(tuple(volume.spacing), order=3)(volume) is volume


def test_resample_without_scipy_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(MissingExtraError, match=r"brainfm\[eval\]"):
        Resample((1.0, 1.0, 1.0))(scan())


# --- Intensities ----------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", [o for o in EVERY if o not in PICKS], ids=kind)
def test_arithmetic_works_on_real_intensities_and_returns_them(operation):
    volume = scan(dtype=np.uint8)
    scaled = operation(replace(volume, slope=0.5, inter=1.0))
    plain = operation(replace(volume, stored=volume.stored.astype(np.float32) * 0.5 + 1.0))
    assert (scaled.slope, scaled.inter) == (1.0, 0.0)
    assert scaled.image.dtype == np.float32
    np.testing.assert_allclose(scaled.image, plain.image, rtol=1e-6)


@pytest.mark.parametrize("operation", [Clip(0, 1), ZScore(), DivideByMean(), MinMax(), Standardize(1, 2)], ids=kind)
def test_intensity_operations_leave_mask_and_affine(operation):
    volume = scan()
    changed = operation(volume)
    np.testing.assert_array_equal(changed.affine, volume.affine)
    np.testing.assert_array_equal(changed.mask, volume.mask)


def test_clip_to_fixed_intensities():
    volume = scan()
    np.testing.assert_array_equal(Clip(20, 90.5)(volume).image, np.clip(volume.image, 20, 90.5))


@pytest.mark.parametrize("region", ["all", "nonzero", "mask"])
def test_clip_to_percentiles_takes_each_channels_own_over_the_region(region):
    volume = scan()
    chosen = volume.region(region)
    expected = [
        np.clip(image, *np.percentile(image[where].astype(np.float64), (5, 80)))
        for image, where in zip(volume.image, chosen, strict=True)
    ]
    np.testing.assert_allclose(Clip(5, 80, percentiles=True, region=region)(volume).image, expected, rtol=1e-5)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("region", ["all", "nonzero", "positive", "mask"])
def test_z_score_subtracts_the_mean_and_divides_by_the_spread_of_the_region(region, ddof):
    volume = scan()
    chosen = volume.region(region)
    expected = []
    for image, where in zip(volume.image.astype(np.float64), chosen, strict=True):
        expected.append((image - image[where].mean()) / image[where].std(ddof=ddof))
    np.testing.assert_allclose(ZScore(region, ddof=ddof)(volume).image, expected, atol=1e-5)


def test_z_score_over_all_channels_has_one_mean_and_one_spread():
    stored = scan().stored * np.array([1, 3], dtype=np.float32)[:, None, None, None]
    volume = replace(scan(), stored=stored)
    image = stored.astype(np.float64)
    chosen = image != 0
    expected = (image - image[chosen].mean()) / image[chosen].std()
    np.testing.assert_allclose(ZScore("nonzero", per_channel=False)(volume).image, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("rule", "divisor"),
    [
        ("under_root", lambda variance: np.sqrt(variance + 4.0)),
        ("added", lambda variance: np.sqrt(variance) + 4.0),
        ("floor", lambda variance: max(np.sqrt(variance), 4.0)),
        ("one_if_zero", np.sqrt),
        ("none", np.sqrt),
    ],
)
@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_z_score_enters_eps_as_its_rule_says(rule, divisor, scale):
    volume = replace(scan(channels=1), stored=scan(channels=1).stored * np.float32(scale))
    image = volume.image.astype(np.float64)
    expected = (image - image.mean()) / divisor(image.var())
    np.testing.assert_allclose(ZScore(eps=4.0, eps_rule=rule)(volume).image, expected, atol=1e-5)


@pytest.mark.parametrize("method", ["two_pass", "one_pass"])
@pytest.mark.parametrize(
    ("rule", "eps", "divisor"),
    [("under_root", 1e-4, 1e-2), ("added", 0.5, 0.5), ("floor", 0.25, 0.25), ("one_if_zero", 0.0, 1.0)],
)
def test_z_score_of_a_constant_region_divides_by_what_the_rule_leaves(rule, eps, divisor, method):
    values, mask = np.full((4, 4, 4), 7.0), np.ones((4, 4, 4), dtype=bool)
    values[0], mask[0] = 9.0, False
    scored = ZScore("mask", eps, rule, method=method)(image_of(values, mask)).image[0]
    np.testing.assert_allclose(scored[1:], 0, atol=1e-6)
    np.testing.assert_allclose(scored[0], 2 / divisor, rtol=1e-5)


@pytest.mark.parametrize("rule", ["none", "under_root", "added", "floor"])
def test_a_z_score_that_would_divide_by_zero_is_refused(rule):
    with pytest.raises(ScanError, match="one intensity"):
        ZScore(eps=0.0, eps_rule=rule)(image_of(np.full((3, 3, 3), 7.0)))


@pytest.mark.parametrize("method", ["two_pass", "one_pass"])
def test_the_sample_spread_of_a_single_voxel_is_refused(method):
    mask = np.zeros((3, 3, 3), dtype=bool)
    mask[1, 1, 1] = True
    with pytest.raises(ScanError):
        ZScore("mask", ddof=1, method=method)(image_of(np.arange(27.0).reshape(3, 3, 3), mask))


def test_z_score_backgrounds_differ_outside_the_region_only():
    volume = scan()
    kept, zeroed, noisy = (ZScore("mask", background=b)(volume).image for b in ("keep", "zero", "noise"))
    np.testing.assert_array_equal(zeroed, np.where(volume.mask, kept, 0))
    np.testing.assert_array_equal(noisy[:, volume.mask], kept[:, volume.mask])
    assert (noisy[:, ~volume.mask] != kept[:, ~volume.mask]).all()


def test_the_background_noise_is_standard_normal_and_the_same_for_every_scan():
    mask = np.zeros((40, 40, 40), dtype=bool)
    mask[:2] = True
    draw = np.random.default_rng(1)
    one, two = (ZScore("mask", background="noise")(image_of(draw.random(mask.shape), mask)).image[0] for _ in range(2))
    np.testing.assert_array_equal(one[~mask], two[~mask])
    assert abs(one[~mask].mean()) < 0.02
    assert abs(one[~mask].std() - 1) < 0.02


def test_two_pass_keeps_its_digits_where_one_pass_loses_them():
    values = 10_000 + np.random.default_rng(0).random((20, 20, 20))
    expected = (values - values.mean()) / values.std()
    error = {m: np.abs(ZScore(method=m)(image_of(values)).image - expected).max() for m in ("two_pass", "one_pass")}
    assert error["two_pass"] < 5e-3  # float32 holds 10,000 to 0.0005, of a spread of 0.3
    assert error["one_pass"] > 0.1


@pytest.mark.parametrize("ddof", [0, 1])
def test_z_score_of_more_voxels_than_a_block_whose_first_are_far_from_the_mean(ddof):
    values = np.sort(np.random.default_rng(0).gamma(2, 1000, 3 * operations._BLOCK + 17)).astype(np.float32)
    exact = values.astype(np.float64)
    expected = (exact - exact.mean()) / exact.std(ddof=ddof)
    scored = ZScore(ddof=ddof)(image_of(values.reshape(1, 1, -1))).image.ravel()
    np.testing.assert_allclose(scored, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ddof", [0, 1])
def test_one_pass_and_two_pass_agree_on_a_brain(brain, ddof):
    image, mask, affine = brain
    volume = CropBox((1, 19, 10), (193, 211, 160))(Volume(image[None], mask.astype(bool), affine))
    score = ZScore("mask", 1e-12, "under_root", ddof, background="zero")
    one_pass = replace(score, method="one_pass")
    np.testing.assert_allclose(one_pass(volume).image, score(volume).image, atol=1e-5)


def test_divide_by_mean_takes_each_channels_mean_over_the_region():
    volume = scan()
    expected = [c / c[c > 0].mean() for c in volume.image.astype(np.float64)]
    np.testing.assert_allclose(DivideByMean("positive")(volume).image, expected, rtol=1e-5)


def test_a_mean_of_zero_is_refused():
    with pytest.raises(ScanError, match="mean"):
        DivideByMean()(image_of([[[-2.0, 2.0]]]))


@pytest.mark.parametrize("region", ["all", "nonzero", "mask"])
def test_min_max_moves_each_channels_region_onto_zero_to_one(region):
    volume = scan()
    chosen = volume.region(region)
    expected = []
    for image, where in zip(volume.image.astype(np.float64), chosen, strict=True):
        low, high = image[where].min(), image[where].max()
        expected.append((image - low) / (high - low))
    np.testing.assert_allclose(MinMax(region)(volume).image, expected, atol=1e-6)


def test_min_max_over_all_channels_has_one_minimum_and_one_maximum():
    image = scan().image + np.array([0, 50], dtype=np.float32)[:, None, None, None]
    expected = (image - image.min()) / (image.max() - image.min())
    np.testing.assert_allclose(MinMax(per_channel=False)(replace(scan(), stored=image)).image, expected, atol=1e-6)


def test_a_constant_image_cannot_be_scaled():
    with pytest.raises(ScanError, match="one intensity"):
        MinMax()(image_of(np.full((2, 2, 2), 3.0)))


def test_standardize_uses_the_given_numbers():
    volume = scan()
    np.testing.assert_allclose(Standardize(0.5, 0.25)(volume).image, volume.image * 4.0 - 2.0, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "operation",
    [ZScore("nonzero"), DivideByMean("nonzero"), MinMax("nonzero"), Clip(1, 99, percentiles=True, region="nonzero")],
    ids=kind,
)
def test_a_channel_without_a_voxel_of_the_region_is_refused(operation):
    volume = scan()
    with pytest.raises(ScanError):
        operation(replace(volume, stored=volume.stored * np.array([1, 0], dtype=np.float32)[:, None, None, None]))


# --- Operations as data ---------------------------------------------------------------------------


@pytest.mark.parametrize("operation", [*EVERY, Pad((1, 2, 3), -1.5), ZScore(), Resize((4, 4, 4))], ids=kind)
def test_an_operation_survives_json(operation):
    assert operation_from_dict(json.loads(json.dumps(operation_to_dict(operation)))) == operation


def test_what_json_leaves_out_takes_its_default():
    assert operation_from_dict({"op": "ZScore", "region": "mask"}) == ZScore("mask")


@pytest.mark.parametrize("data", [{"op": "Blur"}, {"op": "ScanError"}, {"region": "all"}, {}])
def test_an_unknown_operation_is_refused_with_the_known_ones(data):
    with pytest.raises(ValueError, match="ZScore"):
        operation_from_dict(data)


def test_an_unknown_parameter_is_refused_by_name():
    with pytest.raises(ValueError, match="ZScore has no parameter sigma"):
        operation_from_dict({"op": "ZScore", "sigma": 2})


@pytest.mark.parametrize(
    ("data", "allowed"),
    [
        ({"op": "ZScore", "region": "brain"}, "mask"),
        ({"op": "ZScore", "eps_rule": "plus"}, "under_root"),
        ({"op": "ZScore", "background": "mean"}, "noise"),
        ({"op": "ZScore", "method": "welford"}, "one_pass"),
        ({"op": "ZScore", "ddof": 2}, "0 or 1"),
        ({"op": "ZScore", "region": ["mask"]}, "mask"),
        ({"op": "Resize", "shape": [4, 4, 4], "mode": "bicubic"}, "area"),
        ({"op": "Resample", "spacing": [1, 1, 1], "order": 4}, "3"),
        ({"op": "Pad", "shape": [4, 4, 4], "value": "edge"}, "minimum"),
    ],
    ids=str,
)
def test_a_value_that_is_not_among_the_choices_is_refused_with_them(data, allowed):
    with pytest.raises(ValueError, match=allowed):
        operation_from_dict(data)


@pytest.mark.parametrize(
    ("operation", "changes"),
    [
        (ZScore, {"region": "brain"}),
        (ZScore, {"eps_rule": "plus"}),
        (ZScore, {"background": "zeros"}),
        (ZScore, {"method": "onepass"}),
        (DivideByMean, {"region": "foreground"}),
        (MinMax, {"region": "non-zero"}),
        (CropForeground, {"region": "Mask"}),
    ],
)
def test_a_wrong_word_in_python_is_refused_and_not_taken_for_another(operation, changes):
    with pytest.raises(ValueError, match=next(iter(changes.values()))):
        operation(**changes)(scan())
