"""What is read, and from where."""

from __future__ import annotations

import locale

import nibabel as nib
import numpy as np
import pytest

from brainfm.errors import ScanError
from brainfm.prep.image import affine_of, sitk, to_array, to_itk
from brainfm.prep.source import find_sources, read_source

NAME = "DOE^JANE"


@pytest.fixture
def small(tmp_path):
    """A scan of 4 mm in a file, its voxels and its affine."""
    array = np.random.default_rng(0).integers(0, 200, (40, 48, 40)).astype(np.int16)
    affine = np.diag((4.0, 4.0, 4.0, 1.0))
    affine[:3, 3] = -80, -90, -70
    nib.Nifti1Image(array, affine).to_filename(tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz", array, affine


def write_series(folder, array, *, modality="MR", series="1", skip=()):
    """A DICOM series of axial slices of 4 mm, with a patient's name in every header."""
    folder.mkdir(exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for z in range(array.shape[2]):
        if z in skip:
            continue
        image = sitk.GetImageFromArray(array[:, :, z].T[None])
        image.SetSpacing((4.0, 4.0, 4.0))
        tags = {
            "0010|0010": NAME,
            "0008|0060": modality,
            "0008|103e": f"T1 of {NAME}",
            "0020|000d": "1.2.826.0.1.3680043.2.1125.1",
            "0020|000e": f"1.2.826.0.1.3680043.2.1125.1.{series}",
            "0008|0018": f"1.2.826.0.1.3680043.2.1125.1.{series}.{z + 1}",
            "0020|0032": f"-80\\-90\\{-70 + 4 * z}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0020|0013": str(z + 1),
        }
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{series}-{z:03}.dcm"))
        writer.Execute(image)
    return folder


def test_any_order_and_direction_of_the_axes_is_read_as_the_same_head(small, tmp_path):
    path, array, affine = small
    straight = read_source(path).image
    flip = np.eye(4)
    flip[0, 0], flip[0, 3] = -1, array.shape[0] - 1
    turned = (affine @ flip)[:, [2, 0, 1, 3]]
    nib.Nifti1Image(array[::-1].transpose(2, 0, 1), turned).to_filename(tmp_path / "turned.nii")
    again = read_source(tmp_path / "turned.nii").image
    assert np.array_equal(to_array(straight), to_array(again))
    assert np.allclose(affine_of(straight), affine_of(again))
    assert np.array_equal(to_array(straight), array)


def test_scaled_integers_are_read_as_what_they_mean(tmp_path):
    array = np.random.default_rng(0).integers(0, 200, (40, 48, 40)).astype(np.int16)
    image = nib.Nifti1Image(array, np.diag((4.0, 4, 4, 1)))
    image.header.set_slope_inter(0.5, 3)
    image.to_filename(tmp_path / "scan.nii.gz")
    read = to_array(read_source(tmp_path / "scan.nii.gz").image)
    assert np.allclose(read, nib.load(tmp_path / "scan.nii.gz").get_fdata())


def test_affine_goes_to_itk_and_back():
    affine = np.array([[0, -1.1, 0.2, 5], [0.9, 0, 0.1, -7], [0.1, 0.2, 3, 11], [0, 0, 0, 1.0]])
    assert np.allclose(affine_of(to_itk(np.zeros((3, 4, 5), np.float32), affine)), affine)


def test_scan_whose_skull_is_off_is_known_by_its_background(sample, tmp_path):
    assert read_source(sample[0]).stripped
    array = np.random.default_rng(0).integers(0, 200, (40, 48, 40)).astype(np.int16)
    nib.Nifti1Image(array, np.diag((4.0, 4, 4, 1))).to_filename(tmp_path / "noise.nii")
    assert not read_source(tmp_path / "noise.nii").stripped


def test_bids_data_set_stands_for_its_t1w_images(tmp_path):
    names = [
        "sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz",
        "sub-02/anat/sub-02_run-1_T1w.nii",
        "sub-02/anat/sub-02_T2w.nii",
    ]
    for name in [*names, "derivatives/other/sub-01/anat/sub-01_T1w.nii.gz"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    sources = find_sources([tmp_path])
    assert [source.name for source in sources] == ["sub-01_ses-a", "sub-02_run-1"]


def test_bids_data_set_without_t1w_is_refused(tmp_path):
    (tmp_path / "sub-01").mkdir()
    with pytest.raises(ScanError, match="without a T1w"):
        find_sources([tmp_path])


def test_same_names_are_told_apart_by_their_folders(tmp_path):
    paths = [tmp_path / folder / "T1.nii.gz" for folder in ("ann", "bob")]
    assert [source.name for source in find_sources(paths)] == ["ann_T1", "bob_T1"]
    assert len(find_sources([paths[0], paths[0]])) == 1
    with pytest.raises(ScanError, match="would share the folder"):
        find_sources([tmp_path / "1" / "ann" / "T1.nii", tmp_path / "2" / "ann" / "T1.nii"])


def test_dicom_series_is_read_with_its_geometry(small, tmp_path, capfd):
    _, array, _ = small
    head = read_source(write_series(tmp_path / "series", array))
    # DICOM's patient axes are LPS: the array is turned to RAS
    assert np.array_equal(to_array(head.image), array[::-1, ::-1])
    assert np.allclose(affine_of(head.image)[:3, 3], (80 - 4 * 39, 90 - 4 * 47, -70))
    assert NAME not in repr(head)
    assert NAME not in "".join(capfd.readouterr())


def test_dicom_reader_leaves_the_locale_as_it_was(small, tmp_path):
    before = locale.setlocale(locale.LC_ALL)
    folder = write_series(tmp_path / "series", small[1])
    locale.setlocale(locale.LC_ALL, before)
    read_source(folder)
    assert locale.setlocale(locale.LC_ALL) == before


def test_dicom_of_several_series_is_refused_with_their_sizes(small, tmp_path):
    _, array, _ = small
    write_series(tmp_path / "two", array)
    write_series(tmp_path / "two", array[:, :, :30], series="2")
    with pytest.raises(ScanError, match="2 DICOM series, of 40, 30 files") as refusal:
        read_source(tmp_path / "two")
    assert NAME not in str(refusal.value)


def test_dicom_of_another_modality_is_refused(small, tmp_path):
    with pytest.raises(ScanError, match="modality CT"):
        read_source(write_series(tmp_path / "ct", small[1], modality="CT"))


def test_dicom_with_a_missing_slice_is_refused(small, tmp_path):
    with pytest.raises(ScanError, match="slices are missing"):
        read_source(write_series(tmp_path / "gap", small[1], skip=(20,)))


def test_damaged_dicom_is_refused_without_a_word_of_its_header(small, tmp_path):
    folder = write_series(tmp_path / "cut", small[1])
    victim = folder / "1-005.dcm"
    victim.write_bytes(victim.read_bytes()[:-500])
    with pytest.raises(ScanError) as refusal:
        read_source(folder)
    assert NAME not in str(refusal.value)
