"""What other tools write and hold in memory is taken where its meaning is plain: the tensor is the NIfTI file's."""

from __future__ import annotations

import bz2
import gzip
import lzma
import sys
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.utils import SpaceKeys

import brainfm
from brainfm import ScanError
from brainfm.scan import packed

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@pytest.fixture(scope="module")
def held(small_sample):
    """The small scan in memory: voxels, its mask as 0 and 1, affine."""
    image, mask = map(nib.load, small_sample)
    return np.asarray(image.dataobj), np.asarray(mask.dataobj), image.affine


@pytest.fixture(scope="module")
def transform():
    return brainfm.create_transform("test_resnet_3d")


@pytest.fixture(scope="module")
def expected(transform, small_sample):
    return transform(*small_sample)


# --- Files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SCAN.NII", "SCAN.NII.GZ", "Scan.Nii.gz", "scan.MGZ", "scan.MGH", "scan.mgh.gz"])
def test_ending_may_be_in_any_case(name, held, transform, expected, tmp_path):
    image, mask, affine = held
    kind = nib.MGHImage if "mg" in name.lower() else nib.Nifti1Image
    plain = kind(image, affine).to_bytes()
    (tmp_path / name).write_bytes(gzip.compress(plain) if name.lower().endswith(("gz", "mgz")) else plain)
    torch.testing.assert_close(transform(tmp_path / name, mask), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "pack"), [("scan.nii.bz2", bz2.compress), ("scan.nii.xz", lzma.compress)])
def test_other_compressions_are_read(name, pack, small_sample, transform, expected, tmp_path):
    path = tmp_path / name
    path.write_bytes(pack(nib.load(small_sample[0]).to_bytes()))
    assert torch.equal(transform(path, small_sample[1]), expected)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ScanError, match="damaged or incomplete"):
        transform(path, small_sample[1])


def test_zstandard_is_named_where_nothing_reads_it(transform, tmp_path, monkeypatch):
    for module in ("compression.zstd", "backports.zstd", "pyzstd", "zstandard"):
        monkeypatch.setitem(sys.modules, module, None)
    packed.fastest.cache_clear()
    (tmp_path / "scan.nii.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(1000))
    with pytest.raises(ScanError, match=r"compressed by Zstandard.*pip install backports.zstd.*zstd -d"):
        transform(tmp_path / "scan.nii.zst")
    packed.fastest.cache_clear()


def test_uncompressed_file_named_nii_gz_is_read(small_sample, transform, expected, tmp_path):
    nib.load(small_sample[0]).to_filename(tmp_path / "scan.nii")
    path = (tmp_path / "scan.nii").rename(tmp_path / "scan.nii.gz")
    assert torch.equal(transform(path, small_sample[1]), expected)


@pytest.mark.parametrize("name", ["scan.hdr", "scan.img", "scan.hdr.gz", "scan.img.gz"])
def test_nifti_pair_is_read_by_either_name(name, held, transform, expected, tmp_path):
    image, mask, affine = held
    nib.Nifti1Pair(image, affine).to_filename(tmp_path / name)
    assert torch.equal(transform(tmp_path / name, mask), expected)


def test_file_system_that_maps_nothing_costs_nothing(small_sample, transform, expected, tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise OSError(19, "No such device")

    nib.load(small_sample[0]).to_filename(tmp_path / "scan.nii")
    monkeypatch.setattr(np, "memmap", refused)
    assert torch.equal(transform(tmp_path / "scan.nii", small_sample[1]), expected)


def test_resource_forks_of_macos_are_not_scans_of_a_folder(small_sample, tmp_path):
    anat = tmp_path / "sub-01" / "anat"
    anat.mkdir(parents=True)
    name = "sub-01_space-MNI152NLin2009cAsym_T1w.NII.GZ"
    (anat / name.lower().replace("mni152nlin2009casym_t1w", "MNI152NLin2009cAsym_T1w")).write_bytes(
        small_sample[0].read_bytes()
    )
    (anat / "._sub-01_space-MNI152NLin2009cAsym_T1w.nii.gz").write_bytes(b"\x00\x05\x16\x07" + bytes(4000))
    table = brainfm.embed(tmp_path, "test_resnet_3d")
    assert len(table) == 1


# --- In memory ------------------------------------------------------------------------------------


def test_tensor_in_lps_is_read_as_what_it_is(held, transform, expected):
    image, mask, affine = held
    for space in (SpaceKeys.LPS, "LPS"):
        for tensor in (torch.from_numpy(image), torch.from_numpy(image)[None]):
            given = MetaTensor(tensor, affine=torch.from_numpy(LPS @ affine), meta={"space": space})
            assert torch.equal(transform(given, mask), expected)


@pytest.fixture
def sitk():
    return pytest.importorskip("SimpleITK")


def test_simpleitk_image_is_turned_from_lps(held, small_sample, transform, expected, sitk):
    read = [sitk.ReadImage(str(path)) for path in small_sample]
    torch.testing.assert_close(transform(*read), expected, rtol=0, atol=1e-5)
    flipped = sitk.Flip(read[0], [True, False, False])  # other voxels first, each where it was
    torch.testing.assert_close(transform(flipped, sitk.Flip(read[1], [True, False, False])), expected)


class TorchioImage(dict):
    """What TorchIO's ScalarImage and LabelMap show of themselves; see torchio.data.image.Image."""

    def __init__(self, array, affine, path=None):
        super().__init__()
        self.data, self._affine, self.path = torch.from_numpy(array)[None], affine, path

    @property
    def affine(self):
        return self._affine

    @property
    def shape(self):
        return tuple(self.data.shape)

    def numpy(self):
        return self.data.numpy()


def test_torchio_images_are_taken(held, transform, expected):
    image, mask, affine = held
    assert torch.equal(transform(TorchioImage(image, affine), TorchioImage(mask, affine)), expected)
    with pytest.raises(ScanError, match="does not say where left is"):
        transform(TorchioImage(image, np.eye(4)), mask)


def test_torchio_image_of_a_file_that_does_not_say_where_left_is_is_refused(held, transform, tmp_path):
    image, mask, affine = held
    scan = nib.Nifti1Image(image, affine)
    scan.set_sform(affine, 0)
    scan.set_qform(affine, 0)
    scan.to_filename(tmp_path / "scan.nii.gz")
    with pytest.raises(ScanError, match="codes are 0"):
        transform(TorchioImage(image, affine, tmp_path / "scan.nii.gz"), mask)


# --- Masks ----------------------------------------------------------------------------------------


def rounded(affine):
    header = np.array(affine)
    header[:3, :3] *= 1 + 5e-6
    return header


MASKS = {
    "spacing off by 5e-6": lambda mask, affine: nib.Nifti1Image(mask, rounded(affine)),
    "affine written with three decimals": lambda mask, affine: (mask, affine + 4e-4 * np.eye(4) * [1, 1, 1, 0]),
    "overshoot of resampling": lambda mask, affine: (
        mask.astype(np.float32) + np.random.default_rng(0).uniform(-1e-4, 1e-4, mask.shape).astype(np.float32),
        affine,
    ),
    "just below 1": lambda mask, affine: (mask * np.float32(0.9999999), affine),
    "overshoot of 0 and 255": lambda mask, affine: (mask * 255.0 - 1e-3, affine),
    "0 and 255": lambda mask, affine: (mask.astype(np.uint8) * 255, affine),
    "float64": lambda mask, affine: (mask.astype(np.float64), affine),
    "bool": lambda mask, affine: (mask.astype(bool), affine),
    "int64": lambda mask, affine: (mask.astype(np.int64), affine),
    "big-endian int32": lambda mask, affine: (mask.astype(">i4"), affine),
    "labels": lambda mask, affine: (mask * np.float32(2035) * np.float32(1), affine),
    "one of many labels": lambda mask, affine: (np.where(mask > 0, np.indices(mask.shape)[0] + 1.0, 0.0), affine),
    "trailing axis": lambda mask, affine: (mask[..., None], affine),
}


@pytest.mark.parametrize("kind", MASKS)
def test_mask_of_another_tool_is_the_same_mask(kind, held, transform, expected):
    image, mask, affine = held
    assert torch.equal(transform((image, affine), MASKS[kind](mask, affine)), expected)


@pytest.mark.parametrize("slope", [1 / 255, 1 / 32767, 1.0, 2.0])
def test_mask_in_scaled_integers_is_the_same_mask(slope, held, transform, expected, tmp_path):
    image, mask, affine = held
    stored = nib.Nifti1Image(np.where(mask > 0, round(1 / slope) or 1, 0).astype(np.int16), affine)
    stored.to_filename(tmp_path / "mask.nii")
    content = bytearray((tmp_path / "mask.nii").read_bytes())
    content[112:116] = np.float32(slope).tobytes()
    content[116:120] = bytes(4)
    (tmp_path / "mask.nii").write_bytes(content)
    assert torch.equal(transform((image, affine), tmp_path / "mask.nii"), expected)


def test_channel_whose_affine_was_rounded_lies_on_the_same_voxels(held, small_spec):
    image, mask, affine = held
    spec = replace(small_spec, channels=("T1w", "FLAIR"))
    scan = brainfm.load_scan({"T1w": (image, affine), "FLAIR": (image, rounded(affine))}, mask, spec=spec)
    assert scan.image.shape[0] == 2


@pytest.mark.parametrize("shift", [0.5, 2.0])
def test_mask_half_a_voxel_off_is_refused(shift, held, transform):
    image, mask, affine = held
    moved = np.array(affine)
    moved[0, 3] += shift * 2
    with pytest.raises(ScanError, match="lies elsewhere"):
        transform((image, affine), (mask, moved))
