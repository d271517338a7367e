"""Scans of several channels: found by name, held against the contract each, stacked in the contract's order."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from nibabel.affines import from_matvec

from brainfm import InputSpec, ScanError, load_scan
from brainfm.contract import CropForeground, MinMax, Resize, ZScore

THREE = InputSpec(
    representation="T1w, T2w and FLAIR",
    channels=("T1w", "T2w", "FLAIR"),
    skull_strip="required",
    mask="file or nonzero",
    operations=(ZScore("mask", background="zero"),),
)
ZEROS = replace(THREE, missing_channel="zeros", operations=())
PLACED = replace(THREE, space="MNI152NLin2009cSym")


@pytest.fixture(scope="module")
def images(coarse):
    """Three contrasts of one brain: T1w, T2w and, brighter where the brain is dark or bright, FLAIR."""
    voxels = coarse[0]
    brain = voxels > 0
    return {
        "T1w": voxels,
        "T2w": np.where(brain, 256 - voxels, 0).astype(np.uint8),
        "FLAIR": np.where(brain, 20 + np.abs(voxels - 150), 0).astype(np.int16),
    }


@pytest.fixture
def files(images, saved):
    """The three as files."""
    return {name: saved(image, name=f"{name}.nii") for name, image in images.items()}


def tensor_of(scan, spec, mask=None):
    return spec.apply(load_scan(scan, mask, spec=spec)).image


# --- Found by name, in the contract's order -------------------------------------------------------


def test_files_of_three_channels_become_one_tensor_in_the_contracts_order(files, images):
    brain = images["T1w"] > 0
    expected = [(c - c[brain].mean()) / c[brain].std() for c in (i.astype(np.float64) for i in images.values())]
    for order in permutations(files):
        tensor = tensor_of({name: files[name] for name in order}, THREE)
        np.testing.assert_allclose(tensor, np.where(brain, expected, 0), atol=1e-4)


def test_names_are_taken_in_any_case(files):
    named = {"t1W": files["T1w"], "T2W": files["T2w"], "flair": files["FLAIR"]}
    np.testing.assert_array_equal(tensor_of(named, THREE), tensor_of(files, THREE))


def test_channels_of_every_kind_of_image_make_the_same_scan(files, images, coarse):
    affine = coarse[1]
    mixed = {
        "T1w": (images["T1w"], affine),
        "T2w": nib.load(files["T2w"]),
        "FLAIR": MetaTensor(torch.from_numpy(images["FLAIR"])[None], affine=torch.from_numpy(affine)),
    }
    np.testing.assert_array_equal(tensor_of(mixed, THREE), tensor_of(files, THREE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int16])
def test_tensor_with_a_channel_a_channel_is_taken_in_the_contracts_order(files, images, coarse, dtype):
    stacked = torch.stack([torch.from_numpy(np.array(image)).to(dtype) for image in images.values()])
    tensor = MetaTensor(stacked, affine=torch.from_numpy(coarse[1]))
    np.testing.assert_array_equal(tensor_of(tensor, THREE), tensor_of(files, THREE))


def test_stored_scaling_of_each_channel_is_its_own(files, images, coarse, tmp_path):
    nifti = nib.Nifti1Image((images["T2w"].astype(np.int16) + 100) * 2, coarse[1])
    nifti.header.set_slope_inter(0.5, -100.0)
    nifti.to_filename(tmp_path / "scaled.nii")
    scan = load_scan(files | {"T2w": tmp_path / "scaled.nii"}, spec=THREE)
    np.testing.assert_array_equal(scan.image, load_scan(files, spec=THREE).image)
    np.testing.assert_array_equal(scan.mask, images["T1w"] > 0)


def test_a_mask_of_all_channels_is_what_any_of_them_holds(files, images, saved):
    left, right = images["T1w"].copy(), images["FLAIR"].copy()
    left[:48], right[48:] = 0, 0
    halves = files | {"T1w": saved(left, name="l.nii"), "FLAIR": saved(right, name="r.nii")}
    halves["T2w"] = halves["T1w"]
    np.testing.assert_array_equal(load_scan(halves, spec=THREE).mask, images["T1w"] > 0)


def test_a_given_mask_is_one_for_all_channels(files, images):
    mask = (images["T1w"] > 120).astype(np.uint8)
    tensor = tensor_of(files, THREE, mask)
    assert (tensor[:, mask == 0] == 0).all()
    np.testing.assert_allclose(tensor[:, mask == 1].std(axis=1, dtype=np.float64), 1, atol=1e-4)


def test_operations_take_all_channels(files):
    spec = replace(THREE, operations=(CropForeground("mask"), Resize((32, 32, 16), "area"), MinMax("all")))
    tensor = tensor_of(files, spec)
    assert tensor.shape == (3, 32, 32, 16)
    np.testing.assert_allclose(tensor.max(axis=(1, 2, 3)), 1)


def test_contract_of_one_channel_takes_its_own_from_among_several(files, coarse_spec):
    alone = tensor_of(files["T1w"], coarse_spec)
    np.testing.assert_array_equal(tensor_of(files | {"FLAIR": "nowhere.nii.gz"}, coarse_spec), alone)


@pytest.mark.parametrize("channel", ["any contrast", "CT or MR"])
def test_contract_of_any_channel_takes_the_only_one_whatever_its_name(files, channel):
    spec = InputSpec(representation=channel, channels=(channel,))
    np.testing.assert_array_equal(tensor_of({"FLAIR": files["FLAIR"]}, spec), tensor_of(files["FLAIR"], spec))


# --- Missing, unknown and unlike channels ---------------------------------------------------------


def test_missing_channel_is_refused_by_name(files):
    del files["FLAIR"]
    with pytest.raises(ScanError, match=r"FLAIR is missing; this contract takes T1w, T2w, FLAIR.*has T1w, T2w"):
        tensor_of(files, THREE)


def test_misnamed_channel_is_refused_with_the_names(files):
    files["FLAIRE"] = files.pop("FLAIR")
    with pytest.raises(ScanError, match=r"FLAIR is missing.*the scan has T1w, T2w, FLAIRE"):
        tensor_of(files, THREE)


@pytest.mark.parametrize("absent", ["T1w", "FLAIR"])
@pytest.mark.parametrize("how", ["not named", "None"])
def test_missing_channel_is_filled_with_zeros_where_the_contract_says_so(files, absent, how):
    whole = load_scan(files, spec=ZEROS)
    files |= {absent: None}
    if how == "not named":
        del files[absent]
    scan = load_scan(files, spec=ZEROS)
    number = ZEROS.channels.index(absent)
    assert (scan.image[number] == 0).all()
    rest = [n for n in range(3) if n != number]
    np.testing.assert_array_equal(scan.image[rest], whole.image[rest])
    assert scan.notes == (f"filled {absent} with zeros",)


def test_scan_without_any_channel_of_the_contract_is_refused_though_zeros_may_fill_them(files):
    with pytest.raises(ScanError, match=r"T1w, T2w, FLAIR is missing.*the scan has DWI"):
        load_scan({"DWI": files["T1w"]}, spec=ZEROS)


def test_further_channels_are_left_out(files):
    np.testing.assert_array_equal(tensor_of(files | {"DWI": "nowhere.nii.gz"}, THREE), tensor_of(files, THREE))


def test_channel_named_twice_is_refused(files):
    with pytest.raises(ScanError, match=r"named twice: T1w, T2w, FLAIR, t1w"):
        load_scan(files | {"t1w": files["T1w"]}, spec=THREE)


def test_one_file_for_three_channels_says_what_to_pass(files):
    with pytest.raises(ScanError, match=r"T1w\.nii: this contract takes 3 channels; pass \{'T1w': …, 'T2w': …"):
        load_scan(files["T1w"], spec=THREE)


def test_tensor_of_another_number_of_channels_says_what_to_pass(coarse):
    tensor = MetaTensor(torch.ones(2, *coarse[0].shape), affine=torch.from_numpy(coarse[1]))
    with pytest.raises(ScanError, match="this contract takes 3 channels; pass"):
        load_scan(tensor, spec=THREE)


@pytest.mark.parametrize("unlike", ["shape", "place"])
def test_channels_on_other_voxels_are_refused(files, images, coarse, saved, unlike):
    image, affine = images["FLAIR"], coarse[1]
    if unlike == "shape":
        image = image[:-1]
    else:
        affine = affine @ from_matvec(np.eye(3), (0, 0, 0.5))
    moved = saved(image, affine, "moved.nii")
    with pytest.raises(ScanError, match=r"moved\.nii: FLAIR lies on other voxels than .*T1w\.nii; register"):
        load_scan(files | {"FLAIR": moved}, spec=THREE)


def test_channel_whose_axes_are_turned_lies_on_the_same_voxels(files, images, coarse, saved):
    flipped = images["FLAIR"][::-1], coarse[1] @ from_matvec(np.diag([-1, 1, 1]), (96, 0, 0))
    turned = images["FLAIR"].transpose(2, 0, 1), coarse[1][:, [2, 0, 1, 3]]
    for moved in (flipped, turned):
        path = saved(*moved, "moved.nii")
        np.testing.assert_array_equal(tensor_of(files | {"FLAIR": path}, THREE), tensor_of(files, THREE))


# --- Each channel is held against its name --------------------------------------------------------


def test_channels_in_template_space_are_taken_and_mixed_up_ones_refused(files):
    load_scan(files, spec=PLACED)
    with pytest.raises(ScanError, match="T1w: inside the brain, the intensities do not follow a T1w image"):
        load_scan(files | {"T1w": files["T2w"], "T2w": files["T1w"]}, spec=PLACED)
    with pytest.raises(ScanError, match="T2w: inside the brain, the intensities do not follow a T2w image"):
        load_scan(files | {"T2w": files["T1w"]}, spec=PLACED)


def test_channel_that_was_filled_with_zeros_is_not_judged(files):
    files["T2w"] = None
    load_scan(files, spec=replace(PLACED, missing_channel="zeros"))


@pytest.mark.parametrize("channel", ["T1w", "T2w", "FLAIR"])
def test_normalised_channel_is_refused_by_name_where_all_must_be_raw(files, images, saved, channel):
    spec = replace(THREE, intensities="raw")
    load_scan(files, spec=spec)
    image = images[channel].astype(np.float32)
    scored = np.where(image > 0, (image - image[image > 0].mean()) / image[image > 0].std(), 0)
    with pytest.raises(ScanError, match=rf"{channel}: .*normalised already"):
        load_scan(files | {channel: saved(scored, name="scored.nii")}, spec=spec)


@pytest.mark.parametrize("channel", ["T1w", "T2w", "FLAIR"])
def test_channel_that_holds_nothing_is_refused_by_name(files, images, saved, channel):
    empty = saved(np.zeros_like(images["T1w"]), name="empty.nii")
    with pytest.raises(ScanError, match=f"{channel}: every voxel in the field of view has the same value"):
        load_scan(files | {channel: empty}, spec=THREE)


def test_a_slip_in_the_name_of_a_channel_is_not_filled_with_zeros(small_sample, small_spec):
    image, mask = small_sample
    spec = replace(small_spec, channels=("T1w", "FLAIR"), missing_channel="zeros", output_shape=None)
    with pytest.raises(ScanError, match="FLAIR is missing; is 'fliar' meant for it"):
        load_scan({"T1w": image, "FLIAR": image}, mask, spec=spec)
    scan = load_scan({"T1w": image, "T2w": image}, mask, spec=spec)  # another channel is not one misspelt
    assert scan.notes == ("filled FLAIR with zeros",)
