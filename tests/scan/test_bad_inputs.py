"""What cannot give the right tensor is refused: in one line that names it, says what is wrong and what to do."""

import gzip
import logging
import re
import struct
import zlib

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage
from nibabel.affines import from_matvec

import brainfm
from brainfm import ScanError
from brainfm.cli import main

# What a helpful message asks for; see brainfm/errors.py.
ADVICE = re.compile(
    r"\b(pass|use|give|register|convert|copy|check|run|get|make|threshold|resample|name|strip|replace|start again|"
    r"find out|set|rename|is the mask the scan's own)\b",
    re.IGNORECASE,
)
CASES = {}


def bad(fragment):
    """Register a builder (folder, brain) → image, or [image, mask], that is refused with `fragment` in the message."""

    def register(build):
        name = build.__name__.strip("_").replace("_", " ")
        assert name not in CASES
        CASES[name] = build, fragment
        return build

    return register


def parts(folder, brain, image=None, affine=None):
    """A path to write to, and the voxels and affine, the brain's where none are given."""
    return folder / "scan.nii", brain[0] if image is None else image, brain[2] if affine is None else affine


def nifti(folder, brain, image=None, affine=None, name="scan.nii"):
    path, image, affine = parts(folder, brain, image, affine)
    nib.Nifti1Image(image, affine).to_filename(path.with_name(name))
    return path.with_name(name)


def masked(folder, brain, mask, affine=None):
    return [nifti(folder, brain), nifti(folder, brain, mask, affine, "mask.nii")]


def patched(folder, brain, offset, layout, *values):
    """A NIfTI file with some bytes of its header overwritten."""
    path = nifti(folder, brain)
    content = bytearray(path.read_bytes())
    struct.pack_into("<" + layout, content, offset, *values)
    path.write_bytes(content)
    return path


def written(path, content):
    path.write_bytes(content)
    return path


# --- Files ----------------------------------------------------------------------------------------


@bad("no such file")
def missing_file(folder, brain):
    return folder / "scan.nii.gz"


@bad("link leads nowhere")
def broken_symlink(folder, brain):
    (folder / "scan.nii.gz").symlink_to(folder / ".git/annex/objects/x.nii.gz")
    return folder / "scan.nii.gz"


@bad("the file is empty")
def empty_file(folder, brain):
    return written(folder / "scan.nii.gz", b"")


@bad("damaged or incomplete")
def truncated_nii_gz(folder, brain):
    content = nifti(folder, brain, name="scan.nii.gz").read_bytes()
    return written(folder / "scan.nii.gz", content[: len(content) // 2])


@bad("damaged or incomplete")
def truncated_nii(folder, brain):
    content = nifti(folder, brain).read_bytes()
    return written(folder / "scan.nii", content[: len(content) // 2])


@bad("")
def nii_cut_in_its_header(folder, brain):
    return written(folder / "scan.nii", nifti(folder, brain).read_bytes()[:200])


@bad("damaged or incomplete")
def gz_with_a_flipped_byte(folder, brain):
    content = bytearray(nifti(folder, brain, name="scan.nii.gz").read_bytes())
    content[len(content) // 2] ^= 0xFF
    return written(folder / "scan.nii.gz", content)


@bad("damaged or incomplete")
def gz_with_a_wrong_checksum(folder, brain):
    content = bytearray(nifti(folder, brain, name="scan.nii.gz").read_bytes())
    content[-8:-4] = struct.pack("<I", zlib.crc32(b"another file"))
    return written(folder / "scan.nii.gz", content)


@bad("neither NIfTI nor MGZ")
def text_named_nii(folder, brain):
    return written(folder / "scan.nii", b"subject,age\nsub-01,71\n" * 50)


@bad("neither NIfTI nor MGZ")
def compressed_text_named_nii_gz(folder, brain):
    return written(folder / "scan.nii.gz", gzip.compress(b"subject,age\nsub-01,71\n" * 50))


@bad("git lfs pull")
def git_lfs_pointer(folder, brain):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    return written(folder / "scan.nii.gz", pointer)


@bad("DICOM")
def dicom_file(folder, brain):
    return written(folder / "scan.dcm", bytes(128) + b"DICM" + bytes(1000))


@bad("DICOM")
def folder_of_dicom(folder, brain):
    (folder / "series").mkdir()
    for n in range(3):
        written(folder / "series" / f"{n:04}", bytes(128) + b"DICM" + bytes(1000))
    return folder / "series"


def old_dicom(first):
    """A DICOM file without preamble: its first element, and others."""
    return first + bytes(10) + b"\x08\x00\x60\x00CS\x02\x00MR" + bytes(1000)


@bad("a DICOM file; convert it first, for example with dcm2niix")
def dicom_without_preamble(folder, brain):
    return written(folder / "IM0001", old_dicom(b"\x08\x00\x05\x00CS\x0a\x00ISO_IR 100"))


@bad("a DICOM file")
def dicom_without_preamble_of_implicit_types(folder, brain):
    return written(folder / "scan.nii", old_dicom(b"\x08\x00\x00\x00\x04\x00\x00\x00\xb2\x01\x00\x00"))


@bad("a DICOM file")
def dicom_without_preamble_big_endian(folder, brain):
    return written(folder / "IM0001", old_dicom(b"\x00\x08\x00\x05CS\x00\x0aISO_IR 100"))


@bad("a folder of DICOM files")
def folder_of_dicom_without_preamble(folder, brain):
    (folder / "series").mkdir()
    written(folder / "series" / "0001", old_dicom(b"\x08\x00\x05\x00CS\x0a\x00ISO_IR 100"))
    return folder / "series"


@bad("NRRD")
def nrrd(folder, brain):
    return written(folder / "scan.nrrd", b"NRRD0004\ntype: short\ndimension: 3\n" + bytes(1000))


@bad("a MINC 1 file; convert it first, with the MINC tools: mnc2nii")
def minc_1(folder, brain):
    return written(folder / "scan.mnc", b"CDF\x01" + bytes(1000))


@bad("a MINC 2")
def minc_2_compressed(folder, brain):
    return written(folder / "scan.mnc.gz", gzip.compress(b"\x89HDF\r\n\x1a\n" + bytes(1000)))


@bad("an AFNI header; convert it first, with AFNI: 3dAFNItoNIFTI")
def afni_header(folder, brain):
    return written(folder / "scan+orig.HEAD", b"\ntype = string-attribute\nname = TYPESTRING\n" * 20)


@bad("an AFNI dataset; convert it first, with AFNI")
def afni_voxels(folder, brain):
    return written(folder / "scan+orig.BRIK.gz", gzip.compress(bytes(1000)))


@bad("a MetaImage")
def meta_image(folder, brain):
    return written(folder / "scan.mha", b"ObjectType = Image\nNDims = 3\n" + bytes(1000))


@bad("what macOS keeps beside a file")
def resource_fork(folder, brain):
    return written(folder / "._scan.nii.gz", b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(4000))


@bad("a web page")
def login_page(folder, brain):
    return written(folder / "scan.nii.gz", b"<!DOCTYPE html><html><body>Please log in</body></html>" * 20)


@bad("a zip archive")
def zip_archive(folder, brain):
    return written(folder / "scan.nii.gz", b"PK\x03\x04" + bytes(1000))


@bad("does not say where left is")
def analyze_file(folder, brain):
    nib.AnalyzeImage(brain[0].astype(np.int16), brain[2]).to_filename(folder / "scan.img")
    return folder / "scan.hdr"


@bad("does not say where left is")
def voxels_of_an_spm_pair(folder, brain):
    nib.Spm2AnalyzeImage(brain[0].astype(np.int16), brain[2]).to_filename(folder / "scan.img")
    return folder / "scan.img"


@bad("without the header (.hdr) beside them")
def voxels_of_a_pair_without_its_header(folder, brain):
    return written(folder / "scan.img", bytes(10000))


@bad("a folder, not a scan")
def folder_of_images(folder, brain):
    nifti(folder, brain)
    return folder


@bad("damaged")
def header_with_an_unknown_voxel_type(folder, brain):
    return patched(folder, brain, 70, "h", 99)


@bad("damaged")
def header_with_a_negative_size(folder, brain):
    return patched(folder, brain, 42, "h", -193)


@bad("damaged")
def header_with_a_size_beyond_any_memory(folder, brain):
    return patched(folder, brain, 42, "3h", 32000, 32000, 32000)


@bad("damaged")
def header_with_a_slope_but_no_intercept(folder, brain):
    return patched(folder, brain, 112, "2f", 2.0, np.nan)


# --- Wrong objects --------------------------------------------------------------------------------


@bad("cannot read a scan from a")
def wrong_python_type(folder, brain):
    return 42


@bad("cannot read a scan from a")
def none(folder, brain):
    return None


@bad("array, affine")
def array_without_its_affine(folder, brain):
    return brain[0]


@bad("")
def pair_of_paths_as_one_image(folder, brain):
    return (str(nifti(folder, brain)), str(nifti(folder, brain, name="mask.nii")))


@bad("affine")
def affine_that_is_no_matrix(folder, brain):
    return (brain[0], [[1, 2], [3]])


# --- Voxels ---------------------------------------------------------------------------------------


@bad("4-D")
def series_of_volumes(folder, brain):
    return nifti(folder, brain, np.stack([brain[0][::4, ::4, ::4]] * 3, axis=-1))


@bad("2-D")
def one_slice(folder, brain):
    return nifti(folder, brain, np.ascontiguousarray(brain[0][:, :, 90]))


@bad("same value")
def all_zero(folder, brain):
    return nifti(folder, brain, np.zeros_like(brain[0]))


@bad("same value")
def constant(folder, brain):
    return nifti(folder, brain, np.full_like(brain[0], 7))


def with_one(brain, value):
    image = brain[0].astype(np.float32)
    image[96, 110, 80] = value
    return image


@bad("NaN or infinite")
def nan_in_the_brain(folder, brain):
    return nifti(folder, brain, with_one(brain, np.nan))


@bad("NaN or infinite")
def inf_in_the_brain(folder, brain):
    return nifti(folder, brain, with_one(brain, -np.inf))


@bad("NaN or infinite")
def inf_both_ways(folder, brain):
    image = with_one(brain, np.inf)
    image[97, 110, 80] = -np.inf
    return nifti(folder, brain, image)


@bad("NaN or infinite")
def nan_background(folder, brain):
    return nifti(folder, brain, np.where(brain[1] > 0, brain[0], np.float32(np.nan)))


@bad("not grey values")
def rgb_voxels(folder, brain):
    rgb = np.dtype([(channel, np.uint8) for channel in "RGB"])
    return nifti(folder, brain, np.ascontiguousarray(brain[0][..., None].repeat(3, axis=-1)).view(rgb)[..., 0])


@bad("not grey values")
def complex_voxels(folder, brain):
    return nifti(folder, brain, brain[0].astype(np.complex64))


@bad("not skull-stripped")
def whole_head(folder, brain):
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in brain[0].shape), indexing="ij")
    scalp = (x**2 + y**2 + z**2 < 0.95) & (brain[0] == 0)
    return nifti(folder, brain, np.where(scalp, 200, brain[0]).astype(np.uint8))


@bad("background is not 0")
def background_not_zero(folder, brain):
    return nifti(folder, brain, brain[0].astype(np.int16) - 1000)


@bad("do not follow a T1w image")
def t2_like_contrast(folder, brain):
    return nifti(folder, brain, np.where(brain[0] > 0, 300 - brain[0].astype(np.int16), 0).astype(np.int16))


@bad("do not follow a T1w image")
def brain_mask_as_the_image(folder, brain):
    return nifti(folder, brain, np.where(brain[1] > 0, 1, 0).astype(np.uint8))


@bad("register it to the template")
def slab(folder, brain):
    image = brain[0].copy()
    image[:, :, :80] = image[:, :, 110:] = 0
    return nifti(folder, brain, image)


@bad("register it to the template")
def brain_of_a_macaque(folder, brain):
    small = np.zeros_like(brain[0])
    small[58:135, 70:162, 58:135] = brain[0][::5, ::5, ::5].repeat(2, 0).repeat(2, 1).repeat(2, 2)[:77, :92, :77]
    return nifti(folder, brain, small)


# --- Where the scan lies --------------------------------------------------------------------------


def rotation(degrees):
    angle = np.radians(degrees)
    return np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])


@bad("register it to the template")
def native_space_rotated(folder, brain):
    return nifti(folder, brain, affine=from_matvec(rotation(12), (-90.0, -120.0, -80.0)))


@bad("register it to the template")
def native_space_with_its_origin_at_the_image_centre(folder, brain):
    return nifti(folder, brain, affine=from_matvec(np.eye(3), -(np.array(brain[0].shape) - 1) / 2))


@bad("register it to the template")
def native_space_shifted_by_30_mm(folder, brain):
    return nifti(folder, brain, affine=from_matvec(np.eye(3), (-96.0, -102.0, -78.0)))


@bad("field of view")
def scan_far_from_the_template(folder, brain):
    return nifti(folder, brain, affine=from_matvec(np.eye(3), (1000.0, 0.0, 0.0)))


@bad("coarser than the contract's")
def two_millimetre_scan(folder, brain):
    affine = brain[2] @ np.diag([2.0, 2.0, 2.0, 1.0])
    return nifti(folder, brain, np.ascontiguousarray(brain[0][::2, ::2, ::2]), affine)


@bad("codes are 0")
def header_without_orientation(folder, brain):
    path, image, affine = parts(folder, brain)
    scan = nib.Nifti1Image(image, affine)
    scan.set_sform(affine, 0)
    scan.set_qform(affine, 0)
    scan.to_filename(path)
    return path


def mgh_without_orientation_at(path, brain):
    """A FreeSurfer file of the brain, as FreeSurfer writes it where it knows no orientation."""
    plain = path.with_name("plain.mgh")
    nib.MGHImage(brain[0], brain[2]).to_filename(plain)
    content = bytearray(plain.read_bytes())
    content[28:30] = bytes(2)
    return written(path, gzip.compress(content) if path.suffix == ".mgz" else bytes(content))


@bad("goodRASFlag is 0")
def mgz_without_orientation(folder, brain):
    return mgh_without_orientation_at(folder / "scan.mgz", brain)


@bad("goodRASFlag is 0")
def mgh_without_orientation(folder, brain):
    return mgh_without_orientation_at(folder / "scan.mgh", brain)


@bad("goodRASFlag is 0")
def mgz_without_orientation_that_nibabel_loaded(folder, brain):
    return nib.load(mgh_without_orientation_at(folder / "scan.mgz", brain))


@bad("goodRASFlag is 0")
def mgz_without_orientation_as_the_mask(folder, brain):
    return [nifti(folder, brain), mgh_without_orientation_at(folder / "mask.mgz", brain)]


@bad("does not say where left is")
def spm_image_in_memory(folder, brain):
    return nib.Spm2AnalyzeImage(brain[0].astype(np.int16), brain[2])


@bad("does not say where left is")
def analyze_image_as_the_mask(folder, brain):
    return [nifti(folder, brain), nib.AnalyzeImage(brain[1].astype(np.int16), brain[2])]


@bad("codes are 0")
def tensor_of_a_file_without_orientation(folder, brain):
    return LoadImage()(header_without_orientation(folder, brain))


@bad("codes are 0")
def tensor_of_a_file_without_orientation_that_is_gone(folder, brain):
    path = header_without_orientation(folder, brain)
    tensor = LoadImage()(path)
    path.unlink()
    return tensor


@bad("goodRASFlag is 0")
def tensor_of_an_mgz_without_orientation(folder, brain):
    return LoadImage(reader="NibabelReader")(mgh_without_orientation_at(folder / "scan.mgz", brain))


@bad("does not say where left is")
def tensor_without_an_affine(folder, brain):
    return MetaTensor(brain[0])


@bad("not RAS or LPS")
def tensor_in_another_space(folder, brain):
    return MetaTensor(brain[0], affine=brain[2], meta={"space": "LAS"})


@bad("codes are 0")
def itk_image_of_a_file_without_orientation(folder, brain):
    sitk = pytest.importorskip("SimpleITK")
    return sitk.ReadImage(str(header_without_orientation(folder, brain)))


@bad("do not say where left is")
def itk_image_of_an_array_alone(folder, brain):
    sitk = pytest.importorskip("SimpleITK")
    return sitk.GetImageFromArray(brain[0])


@bad("4-D")
def itk_image_of_a_series(folder, brain):
    sitk = pytest.importorskip("SimpleITK")
    return sitk.Image([4, 4, 4, 3], sitk.sitkFloat32)


@bad("not grey values")
def itk_image_of_vectors(folder, brain):
    sitk = pytest.importorskip("SimpleITK")
    return sitk.Image([4, 4, 4], sitk.sitkVectorFloat32)


@bad("disagree on left and right")
def sform_and_qform_of_opposite_handedness(folder, brain):
    path, image, affine = parts(folder, brain)
    scan = nib.Nifti1Image(image, affine)
    scan.set_sform(affine, 1)
    scan.set_qform(affine @ np.diag([-1, 1, 1, 1]), 1)
    scan.to_filename(path)
    return path


@bad("the affine")
def singular_affine(folder, brain):
    return (brain[0], np.diag([1.0, 0.0, 1.0, 1.0]))


@bad("the affine")
def singular_sform(folder, brain):
    return patched(folder, brain, 280, "4f", 0, 0, 0, 0)


@bad("the affine")
def nan_affine(folder, brain):
    return patched(folder, brain, 280, "f", np.nan)


@bad("the affine")
def affine_of_two_dimensions(folder, brain):
    return (brain[0], np.eye(3))


@bad("the affine")
def affine_whose_last_row_is_wrong(folder, brain):
    return (brain[0], brain[2] + np.array([*np.zeros((3, 4)), [1, 0, 0, 0]]))


# --- Masks ----------------------------------------------------------------------------------------


@bad("no such file")
def missing_mask(folder, brain):
    return [nifti(folder, brain), folder / "mask.nii"]


@bad("resample it to the scan's grid")
def mask_of_another_shape(folder, brain):
    return masked(folder, brain, np.ascontiguousarray(brain[1][:-1]))


@bad("lies elsewhere")
def mask_with_another_affine(folder, brain):
    return masked(folder, brain, brain[1], brain[2] + np.array([[0, 0, 0, 1], *np.zeros((3, 4))]))


@bad("is empty")
def empty_mask(folder, brain):
    return masked(folder, brain, np.zeros_like(brain[1]))


@bad("field of view")
def mask_outside_the_crop(folder, brain):
    mask = np.zeros_like(brain[1])
    mask[:, :, :10] = 1
    return masked(folder, brain, mask)


@bad("probability map")
def probability_mask(folder, brain):
    return masked(folder, brain, (brain[0] / 255).astype(np.float32))


@bad("probability map")
def probability_mask_in_scaled_integers(folder, brain):
    image = nib.Nifti1Image((brain[0] / 255).astype(np.float32), brain[2])
    image.set_data_dtype(np.uint8)
    image.to_filename(folder / "mask.nii")
    return [nifti(folder, brain), folder / "mask.nii"]


@bad("negative")
def negative_mask(folder, brain):
    return masked(folder, brain, brain[1].astype(np.int16) - 1)


@bad("NaN")
def nan_mask(folder, brain):
    return masked(folder, brain, np.where(brain[1] > 0, 1, np.nan).astype(np.float32))


@bad("4-D")
def mask_of_two_volumes(folder, brain):
    return masked(folder, brain, np.stack([brain[1]] * 2, axis=-1))


@bad("cannot read a mask from a")
def mask_of_a_wrong_python_type(folder, brain):
    return [nifti(folder, brain), 42]


@bad("too little for a whole")
def mask_of_a_tumour(folder, brain):
    mask = np.zeros_like(brain[1])
    mask[80:110, 100:130, 80:110] = 1
    return masked(folder, brain, mask)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:nibabel")
@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_one_line_that_helps(case, tmp_path, brain, spec):
    build, fragment = CASES[case]
    given = build(tmp_path, brain)
    image, mask = given if isinstance(given, list) else (given, None)
    with pytest.raises(ScanError) as caught:
        brainfm.create_transform(spec)(image, mask)
    message = str(caught.value)
    assert fragment in message
    assert "\n" not in message
    assert any(name in message for name in (str(tmp_path), "array", "in memory", "tensor", "of SimpleITK"))
    assert ADVICE.search(message.replace(str(tmp_path), "")), f"no advice: {message}"


def test_name_that_no_file_can_have_is_refused(tmp_path, spec):
    with pytest.raises(ScanError, match="File name too long"):
        brainfm.load_scan(tmp_path / ("x" * 300), spec=spec)


def test_unreadable_qform_beside_a_good_sform_does_no_harm(tmp_path, brain, spec):
    """nibabel takes the sform where both are set."""
    path = patched(tmp_path, brain, 252, "2h3f", 1, 2, 1.0, 1.0, 1.0)  # quaternion longer than 1
    transform = brainfm.create_transform(spec)
    assert transform(path).equal(transform((brain[0], brain[2])))


def test_intensities_whose_sum_is_beyond_float32_are_no_bad_input(brain, spec):
    transform = brainfm.create_transform(spec)
    image, mask, affine = brain
    huge = image.astype(np.float32) * np.float32(2.0**115)
    with np.errstate(over="ignore"):
        assert np.isinf(huge.sum())
    torch.testing.assert_close(transform((huge, affine), mask), transform((image, affine), mask), rtol=0, atol=1e-5)


def test_whole_head_with_its_brain_mask_is_no_bad_input(tmp_path, brain, spec):
    transform = brainfm.create_transform(spec)
    image, mask, affine = brain
    assert transform(whole_head(tmp_path, brain), mask).equal(transform((image, affine), mask))


@pytest.mark.parametrize("case", ["missing file", "text named nii", "whole head", "truncated nii gz"])
@pytest.mark.parametrize("strict", [True, False])
def test_command_line_says_it_in_one_line(case, strict, tmp_path, brain, capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger("brainfm"), "handlers", [])  # those of this test go with its stderr
    image = CASES[case][0](tmp_path, brain)
    arguments = ["embed", str(image), "--model", "test_resnet_3d", "-o", str(tmp_path / "out.csv")]
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--strict"] if strict else arguments)
    assert caught.value.code == 1
    first, *others = capsys.readouterr().err.splitlines()
    assert first.startswith(f"ScanError: {image}: ")
    assert not any(line.startswith(("ScanError", "Traceback")) for line in others)
    assert not (tmp_path / "out.csv").exists()
