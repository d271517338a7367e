"""One scan, stored in every way that means the same, gives one tensor: the one of the released upstream code."""

from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel import orientations

import brainfm
from brainfm.contract import ZScore

ALL_AXES = ["".join(codes) for axes in permutations(("LR", "PA", "IS")) for codes in product(*axes)]
SOME_AXES = ["LAS", "PIR", "SLA", "IRP"]
KINDS = ["float32", "int16", "mgz"]


def turned(array, affine, axes):
    """The same voxels with the array axes pointing along `axes`, such as "LAS"."""
    change = orientations.ornt_transform(nib.io_orientation(affine), orientations.axcodes2ornt(axes))
    moved = affine @ orientations.inv_ornt_aff(change, array.shape)
    return np.ascontiguousarray(orientations.apply_orientation(array, change)), moved


def encoded(array, affine, kind):
    """An image as read from a file of this kind, without the file."""
    if kind == "mgz":
        return nib.MGHImage.from_bytes(nib.MGHImage(array.astype(np.int16), affine).to_bytes())
    if kind == "int16":
        return scaled(array.astype(np.int16) * 2 + 6, affine, 0.5, -3)
    return nib.Nifti1Image.from_bytes(nib.Nifti1Image(array.astype(np.float32), affine).to_bytes())


def scaled(stored, affine, slope, inter):
    """An image whose real values are stored × slope + inter."""
    image = nib.Nifti1Image(stored, affine)
    image.header.set_slope_inter(slope, inter)
    return nib.Nifti1Image.from_bytes(image.to_bytes())


def assert_same(tensor, expected):
    assert tensor.shape == expected.shape
    assert tensor.dtype == torch.float32
    torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def transform(spec):
    return brainfm.create_transform(spec)


@pytest.fixture(scope="module")
def expected(transform, sample):
    """The tensor of the packaged files, by whether the mask is given."""
    return {True: transform(*sample), False: transform(sample[0])}


def check_orientation(axes, kind, transform, brain, expected):
    image, mask, affine = brain
    scan = encoded(*turned(image, affine, axes), kind)
    assert "".join(nib.aff2axcodes(scan.affine)) == axes
    assert_same(transform(scan), expected[False])
    assert_same(transform(scan, encoded(*turned(mask, affine, axes), "mgz")), expected[True])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axes", SOME_AXES)
def test_turned_and_flipped_scan_gives_the_same_tensor(axes, kind, transform, brain, expected):
    check_orientation(axes, kind, transform, brain, expected)


@pytest.fixture(scope="module")
def coarse(small_spec, small_sample):
    """The 4 mm contract's transform, the packaged scan at 4 mm in whole numbers, and the tensors of that."""
    image, mask = map(nib.load, small_sample)
    brain = np.rint(image.get_fdata()).astype(np.int16), np.asarray(mask.dataobj), image.affine
    transform = brainfm.create_transform(small_spec)
    scan = encoded(brain[0], brain[2], "float32")
    return transform, brain, {True: transform(scan, small_sample[1]), False: transform(scan)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axes", ALL_AXES)
def test_all_48_orientations_give_the_same_tensor(axes, kind, coarse):
    check_orientation(axes, kind, *coarse)


def test_there_are_48_orientations():
    assert len(set(ALL_AXES)) == 48


@pytest.mark.parametrize(("axes", "name"), [("LPS", "scan.nii"), ("ASR", "scan.nii.gz"), ("PIL", "scan.mgz")])
def test_turned_file_gives_the_same_tensor(axes, name, tmp_path, transform, brain, expected):
    image, mask, affine = brain
    cls = nib.MGHImage if name.endswith("mgz") else nib.Nifti1Image
    cls(*turned(image, affine, axes)).to_filename(tmp_path / name)
    nib.Nifti1Image(*turned(mask, affine, axes)).to_filename(tmp_path / "mask.nii.gz")
    assert_same(transform(tmp_path / name, tmp_path / "mask.nii.gz"), expected[True])


def test_scaled_integers_whose_background_is_not_stored_as_zero_need_no_mask(transform, brain, expected):
    image, _, affine = brain
    scan = scaled(image.astype(np.int16) * 3 - 101, affine, 0.0137, 101 * 0.0137)
    assert 0 < abs(scan.dataobj[0, 0, 0]) < 1e-6  # the background is 0 up to the rounding of the header's float32
    assert_same(transform(scan), expected[False])


def test_big_endian_scan_gives_the_same_tensor(transform, brain, expected):
    image, mask, affine = brain
    scan = nib.Nifti1Image(image.astype(np.int16), affine, nib.Nifti1Header(endianness=">"))
    assert_same(transform(nib.Nifti1Image.from_bytes(scan.to_bytes()), mask), expected[True])


def regridded(array, affine, shape, new_affine):
    """Voxels moved onto another grid of the same spacing and axes, by padding and cropping."""
    shift = np.rint(np.linalg.inv(affine) @ new_affine)[:3, 3].astype(int)  # where the new grid starts in the old
    pad = 100
    padded = np.pad(array, pad)
    starts = shift + pad
    return padded[tuple(slice(a, a + n) for a, n in zip(starts, shape, strict=True))]


def test_nilearn_grid_gives_the_same_tensor(transform, brain, expected):
    image, mask, affine = brain
    grid = (197, 233, 189), nib.affines.from_matvec(np.eye(3), (-98, -134, -72))
    moved, moved_mask = (regridded(array, affine, *grid) for array in (image, mask))
    assert_same(transform((moved, grid[1])), expected[False])
    assert_same(transform((moved, grid[1]), (moved_mask, grid[1])), expected[True])


def test_fsl_grid_gives_the_same_tensor(transform, brain, expected):
    image, mask, affine = brain
    ras = nib.affines.from_matvec(np.eye(3), (-91, -126, -72))
    las = nib.affines.from_matvec(np.diag([-1, 1, 1]), (90, -126, -72))
    moved, moved_mask = (regridded(array, affine, (182, 218, 182), ras)[::-1] for array in (image, mask))
    assert_same(transform((moved, las)), expected[False])
    assert_same(transform((moved, las), moved_mask), expected[True])


def test_preprocessed_tensor_is_that_of_the_upstream_code(expected, parity):
    tensor, want = expected[True].double(), parity["preprocessed"]
    assert list(tensor.shape) == want["shape"]
    assert int((tensor != 0).sum()) == want["nonzero"]
    found = {
        "mean": tensor.mean(),
        "std": tensor.std(correction=0),
        "min": tensor.min(),
        "max": tensor.max(),
        "l2": tensor.norm(),
    }
    for name, value in found.items():
        assert float(value) == pytest.approx(want[name], rel=1e-5, abs=1e-5), name
    voxels = {key: float(tensor[tuple(map(int, key.split(",")))]) for key in want["voxels"]}
    assert voxels == pytest.approx(want["voxels"], rel=1e-5, abs=1e-5)


def test_upstream_one_pass_formula_agrees(spec, sample, expected):
    upstream = brainfm.create_transform(spec.with_operation(ZScore, method="one_pass"))
    assert_same(upstream(*sample), expected[True])


def test_z_score_is_that_of_a_plain_float64_reference(brain, expected):
    image, mask, _ = brain
    box = np.s_[10:160, 19:211, 1:193]
    voxels, inside = image.T[box].astype(np.float64), mask.T[box] > 0
    mean = voxels[inside].sum() / inside.sum()
    std = np.sqrt(((voxels[inside] - mean) ** 2).sum() / inside.sum() + 1e-12)
    reference = np.where(inside, (voxels - mean) / std, 0)
    np.testing.assert_allclose(expected[True][0].numpy(), reference, rtol=0, atol=1e-6)
