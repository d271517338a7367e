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


def test_zstandard_is_read_where_something_reads_it(small_sample, transform, expected, tmp_path):
    zstd = pytest.importorskip("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    (tmp_path / "scan.nii.zst").write_bytes(zstd.compress(nib.load(small_sample[0]).to_bytes()))
    assert torch.equal(transform(tmp_path / "scan.nii.zst", small_sample[1]), expected)


# --- Headers of other tools -----------------------------------------------------------------------


def with_extension(image):
    image.header.extensions.append(nib.nifti1.Nifti1Extension(4, b"<AFNI_attributes/>" + bytes(1000)))


def with_fields(**fields):
    def change(image):
        for name, value in fields.items():
            image.header[name] = value

    return change


def qform_only(image):
    image.set_qform(image.affine, 1)
    image.set_sform(None, 0)


HEADERS = {
    "units left out": with_fields(xyzt_units=0),
    "units of seconds alone": with_fields(xyzt_units=8),
    "extension of AFNI": with_extension,
    "qform alone, as ITK": qform_only,
    "another intent": with_fields(intent_code=1002, intent_name=b"label"),
    "a code of later standards": lambda image: image.set_sform(image.affine, 5),
    "slice timing": with_fields(slice_code=3, slice_start=5, slice_end=200, dim_info=57),
    "display range": with_fields(cal_min=-1e30, cal_max=np.nan),
    "further sizes that do not count": with_fields(dim=[3, 48, 48, 40, 0, -3, 7, 1]),
    "description of bytes": with_fields(descrip=bytes(range(128, 208))),
}


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("header", HEADERS)
def test_header_of_another_tool_is_the_same_scan(header, kind, held, transform, expected, tmp_path):
    image, mask, affine = held
    made = kind(image, affine)
    HEADERS[header](made)
    made.to_filename(tmp_path / "scan.nii")
    assert torch.equal(transform(tmp_path / "scan.nii", mask), expected)
    assert torch.equal(transform(nib.load(tmp_path / "scan.nii"), mask), expected)


RAW_FIELDS = {  # where in a NIfTI-1 header, and what nibabel would not write there
    "pixdim[0] of 0": (76, np.float32(0)),
    "slope of NaN, as SPM": (112, np.float32(np.nan)),
    "slope of 0": (112, np.float32(0)),
    "slope of infinity": (112, np.float32(np.inf)),
    "slope and offset of NaN": (112, np.full(2, np.nan, np.float32)),
    "no place of the voxels": (108, np.float32(0)),
    "a fourth axis of one": (40, np.array([4, 48, 48, 40, 1], np.int16)),
    "seven axes": (40, np.array([7, 48, 48, 40, 1, 1, 1, 1], np.int16)),
}


@pytest.mark.parametrize("qform", [False, True])
@pytest.mark.parametrize("field", RAW_FIELDS)
def test_field_that_another_tool_leaves_so_is_the_same_scan(field, qform, held, transform, expected, tmp_path):
    image, mask, affine = held
    made = nib.Nifti1Image(image, affine)
    if qform:
        qform_only(made)
    content, (place, value) = bytearray(made.to_bytes()), RAW_FIELDS[field]
    content[place : place + value.nbytes] = value.tobytes()
    (tmp_path / "scan.nii").write_bytes(content)
    assert torch.equal(transform(tmp_path / "scan.nii", mask), expected)
    assert torch.equal(transform(nib.load(tmp_path / "scan.nii"), mask), expected)


def test_row_of_numbers_of_a_surface_is_named_and_no_scan(transform, tmp_path):
    """FreeSurfer writes numbers of a surface as one row, longer than a NIfTI-1 size: -1, and the size elsewhere."""
    row = nib.Nifti1Image(np.ones((27307, 1, 6), np.float32), np.eye(4))
    row.header["dim"][1], row.header["glmin"] = -1, 163842
    row.set_sform(np.eye(4), 1)
    (tmp_path / "lh.thickness.nii").write_bytes(row.header.binaryblock + bytes(4) + np.ones(163842, "<f4").tobytes())
    with pytest.raises(ScanError):
        transform(tmp_path / "lh.thickness.nii")


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


def test_simpleitk_image_with_a_fourth_axis_of_one_keeps_its_place(held, small_sample, transform, expected, sitk):
    image, mask = (sitk.JoinSeries(sitk.ReadImage(str(path))) for path in small_sample)
    image.SetMetaData("note", "a tool wrote it")
    torch.testing.assert_close(transform(image, mask), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pack", [bytes, bytearray, gzip.compress, bz2.compress, lzma.compress])
def test_bytes_of_a_file_are_taken(pack, held, transform, expected):
    image, mask, affine = held
    plain = nib.Nifti1Image(image, affine).to_bytes()
    brain = nib.Nifti1Image(mask, affine).to_bytes()
    assert torch.equal(transform(pack(plain), pack(brain)), expected)
    with pytest.raises(ScanError, match="damaged or incomplete"):
        transform(pack(plain)[:-100], mask)
    with pytest.raises(ScanError, match="neither NIfTI nor MGZ"):
        transform(b"nothing of the kind", mask)


IN_MEMORY = {
    "from bytes": lambda image: type(image).from_bytes(image.to_bytes()),
    "with a spare axis": lambda image: nib.Nifti1Image(image.dataobj[..., None], image.affine),
    "sliced": lambda image: image.slicer[:, :, :],
    "float64": lambda image: nib.Nifti1Image(image.get_fdata(), image.affine),
    "turned": lambda image: image.as_reoriented(nib.orientations.axcodes2ornt("LPS")),
    "NIfTI-2": lambda image: nib.Nifti2Image.from_image(image),
    "MGH": lambda image: nib.MGHImage(np.asarray(image.dataobj), image.affine),
    "of no format": lambda image: nib.spatialimages.SpatialImage(np.asarray(image.dataobj), image.affine),
}


@pytest.mark.parametrize("kind", IN_MEMORY)
def test_image_of_nibabel_in_memory_is_taken(kind, small_sample, transform, expected):
    made, mask = (IN_MEMORY[kind](nib.load(path)) for path in small_sample)
    torch.testing.assert_close(transform(made, mask), expected, rtol=0, atol=1e-5)


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


class TorchioSubject(dict):
    """TorchIO's Subject: a dictionary of images and of whatever else is known."""

    spacing = spatial_shape = None


def test_torchio_subject_is_its_image_of_the_contracts_name(held, transform, expected):
    image, mask, affine = held
    subject = TorchioSubject(T1w=TorchioImage(image, affine), brain=TorchioImage(mask, affine), age=71)
    assert torch.equal(transform(subject, subject["brain"]), expected)


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


def turned_mask(mask, affine, axes):
    return nib.Nifti1Image(mask, affine).as_reoriented(
        nib.orientations.ornt_transform(nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(axes))
    )


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
    "uint16": lambda mask, affine: (mask.astype(np.uint16), affine),
    "uint64": lambda mask, affine: (mask.astype(np.uint64), affine),
    "float16": lambda mask, affine: (mask.astype(np.float16), affine),
    "noise of 1e-7": lambda mask, affine: (
        mask + np.random.default_rng(1).uniform(-1e-7, 1e-7, mask.shape).astype(np.float32),
        affine,
    ),
    "flipped": lambda mask, affine: turned_mask(mask, affine, "LPI"),
    "axes in another order": lambda mask, affine: turned_mask(mask, affine, "SAR"),
    "axes in another order and flipped": lambda mask, affine: turned_mask(mask, affine, "PIL"),
    "axes in another order, rounded": lambda mask, affine: turned_mask(mask, rounded(affine), "IRA"),
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


@pytest.mark.parametrize("values", ["smoothed", "half at the edge"])
def test_mask_of_probabilities_is_refused(values, held, transform):
    """Where it is cut is the user's to say: at 0.5 or elsewhere is another brain."""
    image, mask, affine = held
    soft = mask.astype(np.float32)
    soft[1:] = (soft[1:] + soft[:-1]) / 2 if values == "smoothed" else np.where(soft[1:] > soft[:-1], 0.5, soft[1:])
    with pytest.raises(ScanError, match=r"probability map.*threshold"):
        transform((image, affine), (soft, affine))


def test_mask_of_a_scan_with_an_axis_without_a_size_is_no_crash(held, transform):
    image, mask, affine = held
    flat = np.array(affine)
    flat[0] *= 1e30
    with pytest.raises(ScanError):
        transform((image, flat), (mask, affine))


def test_mask_on_other_axes_that_lies_elsewhere_is_refused(held, transform):
    image, mask, affine = held
    moved = np.array(affine)
    moved[0, 3] += 2.0
    with pytest.raises(ScanError, match="lies elsewhere"):
        transform((image, affine), turned_mask(mask, moved, "PIL"))


@pytest.mark.parametrize("shift", [0.5, 2.0])
def test_mask_half_a_voxel_off_is_refused(shift, held, transform):
    image, mask, affine = held
    moved = np.array(affine)
    moved[0, 3] += shift * 2
    with pytest.raises(ScanError, match="lies elsewhere"):
        transform((image, affine), (mask, moved))
