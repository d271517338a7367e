"""A scan on a contract's grid: copied where the voxels coincide, averaged where they do not, else refused."""

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import from_matvec

import brainfm
from brainfm import Grid, InputSpec, ScanError, load_scan
from brainfm.scan.grid import TOLERANCE_MM

SHAPE, ORIGIN = (20, 24, 18), (-10.0, -12.0, -9.0)
AFFINE = from_matvec(np.eye(3), ORIGIN)
TOY = InputSpec(orientation="RAS", grid=Grid(SHAPE, (1.0, 1.0, 1.0), ORIGIN), mask="file or nonzero")


def noise(shape, seed=0):
    return np.random.default_rng(seed).uniform(1, 100, shape).astype(np.float32)


def placed(spacing, origin):
    return from_matvec(np.diag(np.broadcast_to(np.float64(spacing), 3)), origin)


def loaded(array, affine, mask=None, **options):
    return load_scan((array, affine), mask, spec=TOY, **options)


def moved_by_voxels(array, shift):
    """What the contract's grid sees of voxels that start `shift` voxels before it; 0 beyond them."""
    pad = 60
    return np.pad(array, pad)[tuple(slice(pad + s, pad + s + n) for s, n in zip(shift, SHAPE, strict=True))]


def interpolated(array, affine):
    """`array` at the centres of the contract's voxels, np.interp along each axis in turn, 0 beyond the edge voxels."""
    for axis, (new, have) in enumerate(zip(SHAPE, array.shape, strict=True)):
        old = affine[axis, 3] + affine[axis, axis] * np.arange(-1, have + 1)
        centres = ORIGIN[axis] + np.arange(new)
        ends = [(1, 1) if other == axis else (0, 0) for other in range(3)]
        array = np.apply_along_axis(lambda line: np.interp(centres, old, line), axis, np.pad(array, ends))  # noqa: B023
    return array


def test_scan_on_the_grid_is_a_view_of_its_voxels():
    array = noise(SHAPE)
    scan = loaded(array, AFFINE)
    assert np.shares_memory(scan.stored, array)
    assert scan.notes == ()
    np.testing.assert_array_equal(scan.affine, AFFINE)


# Scans that reach beyond the grid on all sides, that leave part of it empty, and some of both.
SHIFTS = [
    ((24, 30, 20), (2, 3, 1)),
    ((20, 24, 18), (3, -2, 5)),
    ((10, 10, 10), (-4, -5, -6)),
    ((40, 12, 18), (11, -6, -1)),
    ((20, 24, 18), (-19, 0, 0)),
]


@pytest.mark.parametrize(("shape", "shift"), SHIFTS)
@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.uint8])
def test_shift_by_whole_voxels_copies_them_exactly(shape, shift, dtype):
    array = noise(shape).astype(dtype)
    mask = noise(shape, seed=1) > 50
    scan = loaded(array, placed(1, np.add(ORIGIN, np.negative(shift))), mask)
    assert scan.stored.dtype == dtype
    np.testing.assert_array_equal(scan.stored[0], moved_by_voxels(array, shift))
    np.testing.assert_array_equal(scan.mask, moved_by_voxels(mask, shift))
    np.testing.assert_array_equal(scan.affine, AFFINE)
    assert scan.notes == ("moved by ({:+d}, {:+d}, {:+d}) whole voxels".format(*shift),)


def test_scan_beside_the_grid_is_refused():
    with pytest.raises(ScanError, match="field of view"):
        loaded(noise(SHAPE), placed(1, (100, 0, 0)))


def test_scan_that_covers_the_grid_is_not_copied():
    array = noise((24, 30, 20))
    assert np.shares_memory(loaded(array, placed(1, np.subtract(ORIGIN, (2, 3, 1)))).stored, array)


def test_outside_a_scaled_scan_the_real_value_is_zero():
    image = nib.Nifti1Image((noise((10, 10, 10)) * 5).astype(np.int16), placed(1, (-6, -7, -3)))
    image.header.set_slope_inter(0.5, 20)
    image = nib.Nifti1Image.from_bytes(image.to_bytes())
    scan = load_scan(image, spec=TOY)
    np.testing.assert_allclose(scan.image[0], moved_by_voxels(image.get_fdata(), (-4, -5, -6)), rtol=1e-6)
    np.testing.assert_array_equal(scan.mask, moved_by_voxels(np.ones((10, 10, 10), dtype=bool), (-4, -5, -6)))


@pytest.mark.parametrize("part", [(0.5, 0.5, 0.5), (0.25, 0, 0), (0, -0.3, 0), (0.1, 0.7, -0.4), (3.2, -2.6, 0.01)])
def test_shift_by_part_of_a_voxel_interpolates_linearly(part):
    array = noise((22, 22, 20))
    affine = placed(1, np.add(ORIGIN, part))
    scan = loaded(array, affine)
    np.testing.assert_allclose(scan.image[0], interpolated(array, affine), rtol=1e-5, atol=1e-4)
    assert "resampled" in scan.notes[0]


def test_turned_scan_is_interpolated_like_its_upright_self():
    array = noise(SHAPE)
    affine = placed(1, np.add(ORIGIN, 0.3))
    turned = nib.Nifti1Image(array, affine).as_reoriented([[2, -1], [0, 1], [1, -1]])
    expected = loaded(array, affine)
    found = load_scan(turned, spec=TOY)
    np.testing.assert_array_equal(found.image, expected.image)
    np.testing.assert_array_equal(found.affine, AFFINE)


def test_mask_follows_by_majority():
    mask = np.zeros(SHAPE, dtype=bool)
    mask[5:10, 6:12, 4:9] = True
    scan = loaded(noise(SHAPE), placed(1, np.add(ORIGIN, (0.4, 0, 0))), mask)
    np.testing.assert_array_equal(scan.mask, mask)


@pytest.mark.parametrize("spacing", [0.5, 0.8, 0.99, (0.5, 1.0, 0.7)])
def test_finer_scan_inside_the_grid_keeps_its_total(spacing):
    shape = (12, 14, 10)
    array = noise(shape)
    scan = loaded(array, placed(spacing, (-5.3, -6.1, -4.7)))
    cubic_mm = np.prod(np.broadcast_to(spacing, 3))
    assert scan.image.sum(dtype=np.float64) == pytest.approx(array.sum(dtype=np.float64) * cubic_mm, rel=1e-5)


@pytest.mark.parametrize("spacing", [0.5, 0.8])
def test_finer_scan_of_one_intensity_ramp_keeps_the_ramp(spacing):
    shape = tuple(int(np.ceil((n + 4) / spacing)) for n in SHAPE)
    affine = placed(spacing, np.subtract(ORIGIN, 2))
    x, y, z = (affine[axis, 3] + spacing * np.arange(n) for axis, n in enumerate(shape))
    ramp = 100 + x[:, None, None] + 2 * y[:, None] - 3 * z
    scan = loaded(ramp.astype(np.float32), affine)
    x, y, z = (start + np.arange(n) for start, n in zip(ORIGIN, SHAPE, strict=True))
    expected = 100 + x[:, None, None] + 2 * y[:, None] - 3 * z
    # Not exact where a fine voxel straddles two of the grid's: it counts with its mean in both.
    np.testing.assert_allclose(scan.image[0], expected, atol=6 * spacing / 4)


def test_half_millimetre_voxels_become_block_means():
    array = noise([2 * n for n in SHAPE])
    scan = loaded(array, placed(0.5, np.subtract(ORIGIN, 0.25)))
    i, j, k = SHAPE
    blocks = array.reshape(i, 2, j, 2, k, 2).mean(axis=(1, 3, 5), dtype=np.float64)
    np.testing.assert_allclose(scan.image[0], blocks, rtol=1e-5)
    assert scan.mask.all()


def test_one_millimetre_sample_becomes_the_block_means_of_the_4_mm_contract(brain, small_spec):
    image, mask, affine = brain
    scan = load_scan((image, affine), (mask, affine), spec=small_spec)
    fov = np.s_[1:193, 19:211, 5:165]  # x −95…96, y −113…78, z −73…86 mm
    means = [a[fov].reshape(48, 4, 48, 4, 40, 4).mean(axis=(1, 3, 5), dtype=np.float64) for a in (image, mask)]
    np.testing.assert_allclose(scan.image[0], means[0], rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(scan.mask, means[1] >= 0.5)


@pytest.mark.parametrize("spacing", [1.2, 2, (1, 1, 1.01)])
def test_coarser_scan_is_refused(spacing):
    with pytest.raises(ScanError, match=r"coarser than the contract's \(1, 1, 1\) mm"):
        loaded(noise(SHAPE), placed(spacing, ORIGIN))


@pytest.mark.parametrize("degrees", [0.1, 5, 45])
def test_rotated_scan_is_refused(degrees):
    turn = np.radians(degrees)
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    with pytest.raises(ScanError, match="rotated against the template's axes"):
        loaded(noise(SHAPE), from_matvec(rotation, ORIGIN))


def test_sheared_scan_is_refused():
    with pytest.raises(ScanError, match="rotated against the template's axes"):
        loaded(noise(SHAPE), AFFINE + np.array([[0, 0.1, 0, 0], *np.zeros((3, 4))]))


@pytest.mark.parametrize(
    "affine", [placed(1, np.add(ORIGIN, (2, 0, 0))), placed(1, np.add(ORIGIN, 0.5)), placed(0.5, ORIGIN)]
)
def test_on_mismatch_raise_refuses_another_grid_and_says_both(affine):
    with pytest.raises(ScanError, match=r"the contract's \(20, 24, 18\) voxels .* on_mismatch=\"resample\""):
        loaded(noise((21, 25, 19)), affine, on_mismatch="raise")


def test_on_mismatch_raise_takes_the_contracts_grid_in_any_orientation():
    turned = nib.Nifti1Image(noise(SHAPE), AFFINE).as_reoriented([[1, -1], [2, 1], [0, -1]])
    scan = load_scan(turned, spec=TOY, on_mismatch="raise")
    np.testing.assert_array_equal(scan.stored[0], noise(SHAPE))


def test_unknown_on_mismatch_is_a_value_error():
    with pytest.raises(ValueError, match="on_mismatch"):
        loaded(noise(SHAPE), AFFINE, on_mismatch="ignore")


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("whole", [(0, 0, 0), (2, -1, 3)])
def test_offset_within_a_thousandth_of_a_millimetre_is_taken_as_none(sign, whole):
    array = noise(SHAPE)
    scan = loaded(array, placed(1, np.subtract(ORIGIN, whole) + sign * 0.9 * TOLERANCE_MM))
    np.testing.assert_array_equal(scan.stored[0], moved_by_voxels(array, whole))
    np.testing.assert_array_equal(scan.affine, AFFINE)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("whole", [(0, 0, 0), (2, -1, 3)])
def test_offset_beyond_a_thousandth_of_a_millimetre_is_resampled(sign, whole):
    scan = loaded(noise(SHAPE), placed(1, np.subtract(ORIGIN, whole) + sign * 1.1 * TOLERANCE_MM))
    assert "resampled" in scan.notes[0]


def test_spacing_that_drifts_beyond_the_tolerance_is_resampled():
    within, beyond = (placed(1 + part * TOLERANCE_MM / 23, ORIGIN) for part in (0.9, 1.1))
    assert loaded(noise(SHAPE), within).notes == ()
    assert "resampled" in loaded(noise(SHAPE), beyond).notes[0]


@pytest.mark.parametrize("factor", [0.9, 1.2])
def test_rotation_beyond_a_thousandth_of_a_millimetre_is_refused(factor):
    affine = AFFINE.copy()
    affine[0, 1] = factor * TOLERANCE_MM / SHAPE[1]  # what the far end of the second axis strays along the first
    if factor < 1:
        assert loaded(noise(SHAPE), affine).notes == ()
    else:
        with pytest.raises(ScanError, match="rotated"):
            loaded(noise(SHAPE), affine)


def test_contract_without_a_grid_takes_any():
    spec = InputSpec(orientation="RAS")
    array = noise((9, 8, 7))
    scan = brainfm.load_scan((array, placed(2.5, (1, 2, 3))), spec=spec)
    np.testing.assert_array_equal(scan.image[0], array)
