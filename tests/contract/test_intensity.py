"""Operations that change intensities, against plain NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from volumes import EVERY, PICKS, image_of, kind, scan

from brainfm import ScanError
from brainfm.contract import Clip, CropBox, DivideByMean, MinMax, Standardize, Volume, ZScore
from brainfm.contract.intensity import _BLOCK


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
def test_z_score_subtracts_the_mean_and_divides_by_the_std_of_the_region(region, ddof):
    volume = scan()
    chosen = volume.region(region)
    expected = []
    for image, where in zip(volume.image.astype(np.float64), chosen, strict=True):
        expected.append((image - image[where].mean()) / image[where].std(ddof=ddof))
    np.testing.assert_allclose(ZScore(region, ddof=ddof)(volume).image, expected, atol=1e-5)


def test_z_score_over_all_channels_has_one_mean_and_one_std():
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
def test_the_sample_std_of_a_single_voxel_is_refused(method):
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
    assert error["two_pass"] < 5e-3  # float32 holds 10,000 to 0.0005, of a std of 0.3
    assert error["one_pass"] > 0.1


@pytest.mark.parametrize("ddof", [0, 1])
def test_z_score_of_more_voxels_than_a_block_whose_first_are_far_from_the_mean(ddof):
    values = np.sort(np.random.default_rng(0).gamma(2, 1000, 3 * _BLOCK + 17)).astype(np.float32)
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
