"""What is read, and from where."""

from __future__ import annotations

import json
import locale

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from brainfm.cli import main
from brainfm.errors import ScanError
from brainfm.prep import batch
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


AXIAL, SAGITTAL = (1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1)


def write_series(folder, array, *, modality="MR", series="1", skip=(), along=AXIAL, step=4.0, compressor="", **changed):
    """A DICOM series of slices [columns, rows, slice] of 4 mm, with a patient's name in every header.

    Args:
        folder: Where to.
        array: Its voxels.
        modality: Of the header.
        series: Ends its UID.
        skip: Slices that are not written.
        along: Directions of a row and of a column, LPS.
        step: From a slice to the next along their cross product, mm.
        compressor: As GDCM knows it.
        changed: By the number of a slice as "n5", tags and values of its header.
    """
    folder.mkdir(exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    if compressor:
        writer.UseCompressionOn()
        writer.SetCompressor(compressor)
    normal = np.cross(along[:3], along[3:])
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
            "0020|0032": "\\".join(f"{mm:g}" for mm in np.array((-80, -90, -70)) + z * step * normal),
            "0020|0037": "\\".join(map(str, along)),
            "0020|0013": str(z + 1),
        }
        for tag, value in (tags | changed.get(f"n{z}", {})).items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{series}-{z:03}.dcm"))
        writer.Execute(image)
    return folder


def brightest(head):
    """Where the brightest voxel of a head lies, RAS mm."""
    array = to_array(head.image)
    return affine_of(head.image)[:3] @ (*np.unravel_index(array.argmax(), array.shape), 1)


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
    with pytest.raises(
        ScanError, match="40 files of 40×48×40 voxels of 4×4×4 mm; 30 files of 40×48×30 voxels"
    ) as refusal:
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


@pytest.mark.parametrize("step", [4.0, -4.0])
@pytest.mark.parametrize("along", [AXIAL, SAGITTAL, (1, 0, 0, 0, 0, -1), (0, -1, 0, 0, 0, 1), (0.6, 0.8, 0, 0, 0, -1)])
def test_dicom_lies_where_each_slice_says_in_whatever_order(along, step, small, tmp_path):
    _, array, _ = small
    array = array.copy()
    column, row, n = 7, 11, 30
    array[column, row, n] = 1000
    negative = {
        f"n{z}": {"0018|0088": "-4"} for z in range(array.shape[2])
    }  # spacing between slices, as Philips has it
    head = read_source(write_series(tmp_path / "series", array, along=along, step=step, **negative))
    position = np.array((-80, -90, -70)) + n * step * np.cross(along[:3], along[3:])
    lps = position + 4 * column * np.array(along[:3]) + 4 * row * np.array(along[3:])
    assert np.allclose(brightest(head), lps * (-1, -1, 1), atol=1e-3)
    assert np.linalg.det(affine_of(head.image)) > 0


def test_dicom_without_preamble_is_read_as_with_it(small, tmp_path):
    _, array, _ = small
    usual = read_source(write_series(tmp_path / "usual", array))
    bare = write_series(tmp_path / "bare", array)
    for file in bare.iterdir():
        file.write_bytes(file.read_bytes()[132:])
    again = read_source(bare)
    assert np.array_equal(to_array(again.image), to_array(usual.image))
    assert np.array_equal(affine_of(again.image), affine_of(usual.image))


BAD_SERIES = {
    "a slice is missing": ({"skip": (20,)}, r"from 4\.00 to 8\.00 mm, as between 1-019\.dcm and 1-021\.dcm"),
    "two images at a place": ({"n7": {"0020|0032": "-80\\-90\\-46"}}, r"1-00[67]\.dcm lie at the same place"),
    "a slice beside the others": ({"n7": {"0020|0032": "-70\\-90\\-42"}}, r"1-007\.dcm lies 10\.00 mm from where"),
    "not parallel": ({"n7": {"0020|0037": "0\\1\\0\\0\\0\\-1"}}, r"1-007\.dcm are not parallel|1-000\.dcm and"),
}


@pytest.mark.parametrize("name", BAD_SERIES)
def test_dicom_whose_slices_do_not_follow_each_other_is_refused_with_names(name, small, tmp_path):
    changed, words = BAD_SERIES[name]
    with pytest.raises(ScanError, match=words) as refusal:
        read_source(write_series(tmp_path / "series", small[1], **changed))
    assert NAME not in str(refusal.value)


def test_dicom_that_does_not_say_where_a_slice_lies_is_refused(small, tmp_path):
    victim = write_series(tmp_path / "series", small[1]) / "1-007.dcm"
    victim.write_bytes(victim.read_bytes().replace(b"\x20\x00\x32\x00", b"\x20\x00\x33\x00"))
    with pytest.raises(ScanError, match=r"1-007\.dcm does not say where its slice lies"):
        read_source(tmp_path / "series")


def test_one_file_of_a_series_is_refused_with_what_to_name(small, tmp_path):
    write_series(tmp_path / "series", small[1])
    with pytest.raises(ScanError, match="name the folder that holds the series"):
        read_source(tmp_path / "series" / "1-000.dcm")


# --- Folders and manifests ------------------------------------------------------------------------


def touched(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_folder_stands_for_its_images_and_series(small, tmp_path, caplog):
    folder = touched(
        tmp_path / "all",
        *(
            "a.nii.gz",
            "B.NII",
            "deep/c.mgz",
            "deep/d.nrrd",
            "._a.nii.gz",
            "notes.txt",
            "a_FLAIR.nii.gz",
            "a_mask.nii.gz",
        ),
        *("out/a/prep.json", "out/a/normalized.nii.gz", "out/a/mask.nii.gz"),
    )
    for name in ("s1", "s2"):
        (folder / name).mkdir()
        write_series(folder / name / "T1", small[1][:, :, :3])
    found = find_sources([folder])
    assert sorted(source.name for source in found) == ["B", "a", "c", "d", "s1_T1", "s2_T1"]
    assert {source.path.relative_to(folder).as_posix() for source in found} >= {"s1/T1", "deep/c.mgz"}
    assert "2 left out as no T1w images by name" in caplog.text


def test_exported_examination_stands_for_its_series_and_not_for_its_table_of_contents(small, tmp_path):
    write_series(tmp_path / "cd", small[1][:, :, :1], series="7").joinpath("7-000.dcm").rename(
        tmp_path / "cd" / "DICOMDIR"
    )
    for name in ("S1", "S2"):
        write_series(tmp_path / "cd" / name, small[1][:, :, :2])
    assert sorted(source.name for source in find_sources([tmp_path / "cd"])) == ["S1", "S2"]


def test_same_names_deep_in_a_folder_are_told_apart(tmp_path):
    folder = touched(tmp_path / "all", "p1/ses-a/T1.nii", "p2/ses-a/T1.nii")
    assert [source.name for source in find_sources([folder])] == ["p1_ses-a_T1", "p2_ses-a_T1"]


def test_folder_of_prepared_scans_is_refused(tmp_path):
    folder = touched(tmp_path / "prep", "a/prep.json", "a/normalized.nii.gz", "a/mask.nii.gz")
    with pytest.raises(ScanError, match="prepared already; embed them"):
        find_sources([folder])


def test_what_cannot_be_looked_into_is_named(tmp_path):
    folder = touched(tmp_path / "all", "a.nii")
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    found = find_sources([folder])
    assert [source.name for source in found] == ["a"]
    assert found.left_out == {str(folder / "gone"): "a link that leads nowhere"}


def test_manifest_stands_for_its_images_by_patient_and_scan(tmp_path):
    touched(tmp_path, "x.nii", "y.nii", "z.nii")
    (tmp_path / "m.csv").write_text("image_path,patient_id,scan_id\nx.nii,p1,a\ny.nii,p1,b\nz.nii,p2,\n")
    found = find_sources([tmp_path / "m.csv"])
    assert [(source.name, source.path.name) for source in found] == [
        ("p1/a", "x.nii"),
        ("p1/b", "y.nii"),
        ("p2", "z.nii"),
    ]
    (tmp_path / "c.csv").write_text("t1w_path,flair_path\nx.nii,y.nii\n")
    assert [source.path.name for source in find_sources([tmp_path / "c.csv"])] == ["x.nii"]


@pytest.mark.parametrize("ending", [".tsv", ".txt", ".xlsx", ".parquet"])
def test_every_kind_of_manifest_goes_in(ending, tmp_path):
    touched(tmp_path, "x.nii", "y.nii")
    rows = pd.DataFrame({"image_path": ["x.nii", "y.nii"], "patient_id": ["p1", "p2"]})
    path = tmp_path / f"m{ending}"
    if ending == ".xlsx":
        rows.to_excel(path, index=False)
    elif ending == ".parquet":
        rows.to_parquet(path)
    else:
        rows.to_csv(path, sep="\t", index=False)
    assert [source.path.name for source in find_sources([path])] == ["x.nii", "y.nii"]


def test_other_formats_are_named(tmp_path):
    (tmp_path / "a.mnc").write_bytes(b"CDF\x01" + bytes(1000))
    (tmp_path / "b.hdr").write_bytes(b"\x5c\x01\0\0" + bytes(344))
    words = {
        "a": "a MINC 1 file; convert it first, with the MINC tools",
        "b": "an Analyze or SPM header, which does not say",
    }
    for source in find_sources([tmp_path]):
        with pytest.raises(ScanError, match=words[source.name]):
            read_source(source.path)


def test_mgh_is_read(small, tmp_path):
    _, array, affine = small
    nib.MGHImage(array.astype(np.int32), affine).to_filename(tmp_path / "scan.mgh")
    assert np.array_equal(to_array(read_source(tmp_path / "scan.mgh").image), array)


@pytest.mark.parametrize("name", ["scan.nrrd", "scan.nhdr"])
def test_nrrd_is_read_as_the_nifti_is(name, small, tmp_path):
    path, array, affine = small
    sitk.WriteImage(to_itk(array, affine), str(tmp_path / name))
    head, usual = read_source(tmp_path / name), read_source(path)
    assert np.array_equal(to_array(head.image), to_array(usual.image))
    assert np.allclose(affine_of(head.image), affine_of(usual.image))
    assert [source.name for source in find_sources([tmp_path / name])] == ["scan"]


# --- Through the command --------------------------------------------------------------------------


def test_all_that_goes_in_goes_in_at_once_and_one_bad_scan_is_exit_code_1(small, tmp_path, monkeypatch):
    from test_dicom import stack, write_enhanced
    from test_page import write_scan

    scan, array, affine = small
    write_series(tmp_path / "series", array)
    write_enhanced(tmp_path / "enhanced.dcm", stack(array))
    names = ["bids/sub-01/anat/sub-01_T1w.nii.gz", "plain/a.nii.gz", "plain/deep/b.nii.gz", "listed.nii.gz"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(scan.read_bytes())
    (tmp_path / "m.csv").write_text("image_path,patient_id\nlisted.nii.gz,p1\nseries,p2\n")
    nib.Nifti1Image(array[:, :, :9], affine).to_filename(tmp_path / "bad.nii.gz")

    def read_only(todo, output, *rest):
        for source in todo:
            try:
                read_source(source.path)
                write_scan(output / source.name)
                rest[-1](source.name, json.loads((output / source.name / "prep.json").read_text()))
            except ScanError as error:
                rest[-1](source.name, str(error))

    monkeypatch.setattr(batch, "_run", read_only)
    inputs = ["bad.nii.gz", "enhanced.dcm", "bids", "plain", "m.csv"]
    command = ["prep", *(str(tmp_path / name) for name in inputs), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert "1 of 7 scans failed:" in result.output
    assert "bad: could not be prepared" in result.output
    assert "a slab: 9 slices" in result.output
    made = {path.parent.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("prep.json")}
    assert made == {"enhanced", "sub-01", "a", "b", "p1", "p2"}
    command[-1] = str(tmp_path / "again")
    command.remove(str(tmp_path / "bad.nii.gz"))
    assert CliRunner().invoke(main, command).exit_code == 0
