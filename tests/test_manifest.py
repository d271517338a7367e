"""Lists of scans: files, manifests, TurboPrep folders and BIDS derivatives; what cannot be one is refused by name."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from brainfm import ScanError, load_scan
from brainfm.cli import main
from brainfm.manifest import ScanRecord, list_scans

DICOM = bytes(128) + b"DICM" + bytes(500)


def touch(*paths, content=b"x"):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return paths[0]


def manifest(folder, text, name="scans.csv", encoding="utf-8"):
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


# --- Files and lists ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.nii", "scan.mgz"])
@pytest.mark.parametrize("kind", [str, Path])
def test_one_image_file_is_one_scan(name, kind, tmp_path):
    path = touch(tmp_path / name)
    assert list_scans(kind(path)) == [ScanRecord(path)]


def test_list_of_paths_pairs_and_records_keeps_its_order():
    record = ScanRecord("c.nii", "m.nii", "p3", extra={"age": "71"})
    assert list_scans(["b.nii", ("a.nii", Path("a_mask.nii")), record, ("d.nii", None)]) == [
        ScanRecord("b.nii"),
        ScanRecord("a.nii", Path("a_mask.nii")),
        record,
        ScanRecord("d.nii"),
    ]


def test_list_of_scans_of_several_channels():
    scan = {"T1w": "sub-01/anat/sub-01_ses-2_T1w.nii", "FLAIR": "sub-01/anat/sub-01_ses-2_FLAIR.nii"}
    assert list_scans([scan, (scan, "m.nii")]) == [
        ScanRecord(scan, None, "sub-01", "ses-2"),
        ScanRecord(scan, "m.nii", "sub-01", "ses-2"),
    ]


def test_array_with_its_affine_is_one_image_not_an_image_and_a_mask():
    image, affine = np.zeros((5, 6, 7)), np.eye(4)
    bare, masked = list_scans([(image, affine), ((image, affine), image > 0)])
    assert bare.image[0] is image
    assert bare.mask is None
    assert masked.image[1] is affine
    assert masked.mask.dtype == bool


def test_bids_names_in_a_path_give_patient_and_scan():
    path = "/data/sub-01/ses-02/anat/sub-01_ses-02_acq-mprage_run-1_T1w.nii.gz"
    assert list_scans([path]) == [ScanRecord(path, None, "sub-01", "ses-02_acq-mprage_run-1")]


def test_generator_of_paths_is_a_list_too():
    assert len(list_scans(name for name in ("a.nii", "b.nii"))) == 2


@pytest.mark.parametrize("given", [42, None, ScanRecord("a.nii"), {"T1w": "a.nii", "FLAIR": "b.nii"}])
def test_what_is_no_list_is_refused(given):
    with pytest.raises(ScanError, match=f"not one {type(given).__name__}; put it in a list"):
        list_scans(given)


@pytest.mark.parametrize("name", ["missing_folder", "missing.csv"])
def test_folder_or_manifest_that_is_not_there_is_refused(name, tmp_path):
    with pytest.raises(ScanError, match=f"{name}: no such"):
        list_scans(tmp_path / name)


# --- Manifests ------------------------------------------------------------------------------------


def test_manifest_paths_are_relative_to_it_and_other_columns_are_kept(tmp_path):
    text = (
        "image_path,mask_path,patient_id,scan_id,label,site\n"
        "a/scan.nii.gz,a/mask.nii.gz,p1,s1,AD,London\n"
        "/abs/b.nii.gz,,p2,,CN,\n"
    )
    assert list_scans(manifest(tmp_path, text)) == [
        ScanRecord(
            tmp_path / "a/scan.nii.gz", tmp_path / "a/mask.nii.gz", "p1", "s1", {"label": "AD", "site": "London"}
        ),
        ScanRecord(Path("/abs/b.nii.gz"), None, "p2", "", {"label": "CN", "site": ""}),
    ]


def test_manifest_needs_no_other_column_than_image_path(tmp_path):
    assert list_scans(manifest(tmp_path, "image_path\na.nii\n")) == [ScanRecord(tmp_path / "a.nii")]


def test_columns_may_come_in_any_order(tmp_path):
    records = list_scans(manifest(tmp_path, "label,mask_path,image_path\nAD,m.nii,a.nii\n"))
    assert records == [ScanRecord(tmp_path / "a.nii", tmp_path / "m.nii", extra={"label": "AD"})]


@pytest.mark.parametrize(
    ("text", "name", "encoding"),
    [
        ("image_path,mask_path\na.nii,m.nii\n", "scans.csv", "utf-8-sig"),
        ("image_path , mask_path\n a.nii , m.nii \n", "scans.csv", "utf-8"),
        ("image_path\tmask_path\na.nii\tm.nii\n", "scans.tsv", "utf-8"),
        ("image_path,mask_path\r\na.nii,m.nii\r\n", "scans.csv", "utf-8"),
        ("image_path,mask_path\n\na.nii,m.nii\n,\n\n", "scans.csv", "utf-8"),
        ('"image_path","mask_path"\n"a.nii","m.nii"', "SCANS.CSV", "utf-8"),
    ],
    ids=["byte order mark", "spaces", "tsv", "windows", "blank lines", "quotes and capitals"],
)
def test_manifest_as_programs_write_it(text, name, encoding, tmp_path):
    records = list_scans(manifest(tmp_path, text, name, encoding))
    assert records == [ScanRecord(tmp_path / "a.nii", tmp_path / "m.nii")]


def test_quoted_field_may_hold_a_comma_and_names_may_hold_any_letter(tmp_path):
    records = list_scans(manifest(tmp_path, 'image_path,note\nMüller/сcan ü.nii,"left, frontal"\n'))
    assert records == [ScanRecord(tmp_path / "Müller/сcan ü.nii", extra={"note": "left, frontal"})]


def test_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    records = list_scans(manifest(tmp_path, "image_path,mask_path\n~/a.nii,~/m.nii\n"))
    assert records == [ScanRecord(Path("/home/ann/a.nii"), Path("/home/ann/m.nii"))]


def test_column_a_channel_makes_scans_of_several_channels(tmp_path):
    text = "t1w_path,flair_path,mask_path,patient_id,age\na.nii,/abs/b.nii,m.nii,p1,71\nc.nii,d.nii,,p2,\n"
    assert list_scans(manifest(tmp_path, text)) == [
        ScanRecord(
            {"t1w": tmp_path / "a.nii", "flair": Path("/abs/b.nii")}, tmp_path / "m.nii", "p1", extra={"age": "71"}
        ),
        ScanRecord({"t1w": tmp_path / "c.nii", "flair": tmp_path / "d.nii"}, None, "p2", extra={"age": ""}),
    ]


def test_channel_whose_field_is_empty_is_missing(tmp_path):
    records = list_scans(manifest(tmp_path, "t1w_path,flair_path\na.nii,\n,b.nii\na.nii,b.nii\n"))
    assert [sorted(record.image) for record in records] == [["t1w"], ["flair"], ["flair", "t1w"]]


def test_same_file_as_another_channel_is_another_scan(tmp_path):
    records = list_scans(manifest(tmp_path, "t1w_path,flair_path\na.nii,\n,a.nii\n"))
    assert [record.image for record in records] == [
        {"t1w": str(tmp_path / "a.nii")},
        {"flair": str(tmp_path / "a.nii")},
    ]


def test_image_path_wins_over_a_column_a_channel_which_stays_as_it_is(tmp_path):
    records = list_scans(manifest(tmp_path, "t1w_path,image_path,report_path\na.nii,b.nii,r.pdf\n,c.nii,\n"))
    assert records == [
        ScanRecord(tmp_path / "b.nii", extra={"t1w_path": "a.nii", "report_path": "r.pdf"}),
        ScanRecord(tmp_path / "c.nii", extra={"t1w_path": "", "report_path": ""}),
    ]


def test_path_of_dense_features_is_no_channel(tmp_path):
    records = list_scans(manifest(tmp_path, "t1w_path,dense_path\na.nii,features/a.nii\n"))
    assert records == [ScanRecord({"t1w": tmp_path / "a.nii"}, extra={"dense_path": "features/a.nii"})]


def test_scan_of_several_channels_is_read_from_its_manifest(tmp_path, small_sample, small_spec):
    (tmp_path / "scans").symlink_to(small_sample[0].parent)
    text = "T1w_path,FLAIR_path,mask_path\nscans/normalized.nii.gz,,scans/mask.nii.gz\n"
    (record,) = list_scans(manifest(tmp_path, text))
    scan = load_scan(record.image, record.mask, spec=small_spec)
    np.testing.assert_array_equal(scan.image, load_scan(*small_sample, spec=small_spec).image)


def test_one_scan_with_two_masks_is_two_rows(tmp_path):
    records = list_scans(manifest(tmp_path, "image_path,mask_path\na.nii,m.nii\na.nii,n.nii\n"))
    assert [Path(record.mask).name for record in records] == ["m.nii", "n.nii"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the table is empty; it needs a header line, such as image_path"),
        ("\n\n", "the table is empty; it needs a header line, such as image_path"),
        ("image_path,mask_path\n", "a header but no rows"),
        ("image_path,mask_path\n,\n", "a header but no rows"),
        (
            "path,mask_path\na.nii,m.nii\n",
            r"no column image_path, nor one a channel such as t1w_path \(it has path, mask_path\)",
        ),
        ("a.nii,m.nii\nb.nii,n.nii\n", "no column image_path"),
        ("path;mask_path\na.nii;m.nii\n", r"no column image_path.*it has path, mask_path"),
        ("mask_path,dense_path,label\nm.nii,d.nii,AD\n", "no column image_path"),
        ("t1w_path,flair_path,label\n,,AD\n", "row 2: t1w_path and flair_path are empty"),
        ("t1w_path,flair_path\na.nii,b.nii\na.nii,./b.nii\n", "row 3: a.nii, ./b.nii is already in row 2"),
        ("t1w_path,flair_path\na.nii,\nb.nii,\na.nii,\n", "row 4: a.nii is already in row 2"),
        ("image_path,t1w_path\na.nii,\n,b.nii\n", "row 3: image_path is empty"),
        ("image_path,mask_path\na.nii,m.nii\nb.nii,\na.nii,m.nii\n", "row 4: a.nii is already in row 2; remove one"),
        ("image_path\na.nii\n./a.nii\n", "row 3: ./a.nii is already in row 2"),
        ("image_path,label,label\na.nii,1,2\n", "the column label twice"),
        ("image_path,label\na.nii,AD,London\n", r"row 2: more fields than the header has \('London'\); quote fields"),
        ("image_path,label\na.nii,AD\n,CN\n", "row 3: image_path is empty"),
    ],
)
def test_bad_manifest_is_refused_with_the_row(text, message, tmp_path):
    path = manifest(tmp_path, text)
    with pytest.raises(ScanError, match=message) as caught:
        list_scans(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_spreadsheet_saved_as_csv_by_name_only_is_refused(tmp_path):
    path = touch(tmp_path / "scans.csv", content=b"PK\x03\x04\xff\xfe\x00" * 50)
    with pytest.raises(ScanError, match="by its content it is an Excel file"):
        list_scans(path)


# --- TurboPrep folders ----------------------------------------------------------------------------


def turboprep(*folders):
    for folder in folders:
        touch(folder / "normalized.nii.gz", folder / "mask.nii.gz", folder / "segm.nii.gz")


def test_turboprep_folder_of_one_scan(tmp_path):
    folder = tmp_path / "patient7"
    turboprep(folder)
    assert list_scans(folder) == [ScanRecord(folder / "normalized.nii.gz", folder / "mask.nii.gz", "patient7")]


def test_turboprep_folder_without_a_mask(tmp_path):
    image = touch(tmp_path / "p1" / "normalized.nii.gz")
    assert list_scans(tmp_path) == [ScanRecord(image, None, "p1")]


def test_nested_turboprep_folders_give_patient_and_scan(tmp_path):
    turboprep(tmp_path / "p2" / "baseline", tmp_path / "p1" / "month12" / "again", tmp_path / "p1" / "baseline")
    records = list_scans(str(tmp_path))
    assert [(record.patient_id, record.scan_id) for record in records] == [
        ("p1", "baseline"),
        ("p1", "month12_again"),
        ("p2", "baseline"),
    ]
    assert all(Path(record.mask) == Path(record.image).with_name("mask.nii.gz") for record in records)


def test_turboprep_folders_with_bids_names(tmp_path):
    turboprep(tmp_path / "sub-02" / "ses-1", tmp_path / "sub-01" / "ses-2", tmp_path / "sub-01" / "ses-1")
    found = [(record.patient_id, record.scan_id) for record in list_scans(tmp_path)]
    assert found == [("sub-01", "ses-1"), ("sub-01", "ses-2"), ("sub-02", "ses-1")]


def test_names_of_folders_above_the_given_one_are_not_patients(tmp_path):
    folder = tmp_path / "sub-study" / "ses-final" / "prepared"
    turboprep(folder / "p1", folder / "p2")
    assert [(record.patient_id, record.scan_id) for record in list_scans(folder)] == [("p1", ""), ("p2", "")]


# --- BIDS derivatives -----------------------------------------------------------------------------


def derivative(folder, subject, space="_space-MNI152NLin2009cAsym_res-1", session="", mask=True):
    """fMRIPrep's names of one preprocessed T1w image and its mask."""
    anat = folder / f"sub-{subject}" / (f"ses-{session}" if session else "") / "anat"
    stem = f"sub-{subject}" + (f"_ses-{session}" if session else "") + space
    touch(anat / f"{stem}_desc-preproc_T1w.nii.gz", anat / f"{stem}_desc-preproc_T1w.json")
    if mask:
        touch(anat / f"{stem}_desc-brain_mask.nii.gz")
    touch(anat / f"{stem}_label-GM_probseg.nii.gz")
    return anat / f"{stem}_desc-preproc_T1w.nii.gz"


def test_fmriprep_folder_gives_each_template_space_image_with_its_mask(tmp_path):
    derivative(tmp_path, "01", space="")  # in the scanner's space
    image = derivative(tmp_path, "01")
    other = derivative(tmp_path, "02", mask=False)
    mask = image.with_name("sub-01_space-MNI152NLin2009cAsym_res-1_desc-brain_mask.nii.gz")
    assert list_scans(tmp_path) == [ScanRecord(image, mask, "sub-01"), ScanRecord(other, None, "sub-02")]


def test_the_finest_resolution_of_a_scan_is_taken(tmp_path):
    image = derivative(tmp_path, "01", space="_space-MNI152NLin2009cAsym_res-1")
    derivative(tmp_path, "01", space="_space-MNI152NLin2009cAsym_res-2")
    coarse = derivative(tmp_path, "02", space="_space-MNI152NLin2009cAsym_res-02")
    assert [record.image for record in list_scans(tmp_path)] == [str(image), str(coarse)]


def test_image_without_a_resolution_is_the_template_s_own(tmp_path):
    image = derivative(tmp_path, "01", space="_space-MNI152NLin2009cAsym")
    derivative(tmp_path, "01", space="_space-MNI152NLin2009cAsym_res-2")
    assert [record.image for record in list_scans(tmp_path)] == [str(image)]


def test_sessions_are_scans_of_one_patient(tmp_path):
    derivative(tmp_path, "01", session="b")
    derivative(tmp_path, "01", session="a")
    found = [(record.patient_id, record.scan_id) for record in list_scans(tmp_path)]
    assert found == [("sub-01", "ses-a"), ("sub-01", "ses-b")]
    assert all("ses-" in str(record.mask) for record in list_scans(tmp_path))


# --- What a folder holds beside its scans ---------------------------------------------------------


def ids(records):
    return [(record.patient_id, record.scan_id) for record in records]


def test_links_to_folders_are_followed_once_each_and_loops_end(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    turboprep(data / "p1", elsewhere / "p2", elsewhere / "p3" / "month12")
    (data / "p2").symlink_to(elsewhere / "p2")
    (data / "again").symlink_to(data / "p1")
    (data / "more").symlink_to(elsewhere)
    (elsewhere / "p3" / "up").symlink_to(data)
    records = list_scans(data)
    assert len({Path(record.image).resolve() for record in records}) == len(records) == 3
    assert records.left_out == {}


def test_bids_subject_behind_a_link_is_listed(tmp_path):
    derivative(tmp_path / "data", "01")
    derivative(tmp_path / "elsewhere", "02")
    (tmp_path / "data" / "sub-02").symlink_to(tmp_path / "elsewhere" / "sub-02")
    records = list_scans(tmp_path / "data")
    assert ids(records) == [("sub-01", ""), ("sub-02", "")]
    assert all(record.mask for record in records)


def test_folder_that_cannot_be_read_and_a_link_to_nothing_are_counted_and_named(tmp_path, monkeypatch, caplog):
    turboprep(tmp_path / "p1", tmp_path / "p2")
    (tmp_path / "p3").symlink_to(tmp_path / "gone")
    scan = os.scandir

    def denied(path):
        if str(path).endswith("p2"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    records = list_scans(tmp_path)
    assert ids(records) == [("p1", "")]
    assert records.left_out == {
        str(tmp_path / "p3"): "a link that leads nowhere",
        str(tmp_path / "p2"): "cannot be read: Permission denied",
    }
    (warning,) = caplog.messages
    assert warning.startswith(f"{tmp_path}: 2 left out: ")
    assert "p2 (cannot be read: Permission denied)" in warning
    assert list_scans(records).left_out == records.left_out


def test_subject_without_the_image_that_is_looked_for_is_counted_and_named(tmp_path, caplog):
    image = derivative(tmp_path, "01", session="a")
    derivative(tmp_path, "01", session="b", space="")
    derivative(tmp_path, "02", space="")
    (tmp_path / "sub-03" / "figures").mkdir(parents=True)
    touch(tmp_path / "logs" / "a.txt")
    records = list_scans(tmp_path)
    assert [record.image for record in records] == [str(image)]
    left = [tmp_path / "sub-01" / "ses-b" / "anat", tmp_path / "sub-02" / "anat"]
    assert records.left_out == {
        **dict.fromkeys(map(str, left), "no T1w image in MNI152 space in it"),
        str(tmp_path / "sub-03"): "no T1w image in it",
    }
    assert "3 left out" in caplog.text


def test_prepared_folder_names_the_patients_without_a_prepared_scan(tmp_path, caplog):
    turboprep(tmp_path / "p1")
    touch(tmp_path / "p1" / "more" / "raw.nii.gz", tmp_path / "p2" / "prep.json", tmp_path / "p3" / "T1.nii")
    touch(tmp_path / "notes" / "a.txt")
    records = list_scans(tmp_path)
    assert records.left_out == dict.fromkeys(map(str, (tmp_path / "p2", tmp_path / "p3")), "no prepared scan in it")


def test_command_says_what_it_left_out_and_its_exit_code_is_one(small_sample, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "p1").symlink_to(small_sample[0].parent)
    (tmp_path / "data" / "p2").symlink_to(tmp_path / "gone")
    report = tmp_path / "run.json"
    arguments = [tmp_path / "data", "--model", "test_resnet_3d", "-o", tmp_path / "out.csv", "--report", report]
    result = CliRunner().invoke(main, ["embed", *map(str, arguments)])
    assert result.exit_code == 1
    assert "1 scan →" in result.output
    assert f"1 left out, such as {tmp_path / 'data' / 'p2'}: a link" in result.output
    assert json.loads(report.read_text())["left_out"] == {str(tmp_path / "data" / "p2"): "a link that leads nowhere"}


def test_resource_fork_of_macos_is_no_scan(tmp_path):
    image = derivative(tmp_path, "01")
    touch(image.with_name(f"._{image.name}"))
    assert [record.image for record in list_scans(tmp_path)] == [str(image)]


# --- Who, and which scan --------------------------------------------------------------------------


@pytest.mark.parametrize("nobody", ["n/a", "NA", "nan", "N/A", "None", "<NA>", " ", ""])
def test_field_that_says_nothing_is_no_patient(nobody, tmp_path):
    records = list_scans(manifest(tmp_path, f"image_path,patient_id,scan_id\na.nii,{nobody},{nobody}\nb.nii,p1,1\n"))
    assert ids(records) == [("", ""), ("p1", "1")]
    assert ids([ScanRecord("a.nii", None, nobody, nobody)]) == [("", "")]


def test_scans_of_nobody_are_not_one_patient_of_all(tmp_path):
    from brainfm.train.data import count_patients

    records = list_scans(manifest(tmp_path, "image_path,patient_id\na.nii,n/a\nb.nii,n/a\nc.nii,NA\n"))
    assert count_patients(records) == 3


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("sub-002_S_0295/sub-002_S_0295_T1w.nii.gz", ("sub-002_S_0295", "")),
        ("sub-002_S_0295/ses-m12/anat/sub-002_S_0295_ses-m12_T1w.nii.gz", ("sub-002_S_0295", "ses-m12")),
        ("sub-002_S_0295/normalized.nii.gz", ("sub-002_S_0295", "")),
        ("sub-002_S_0295_ses-m12/normalized.nii.gz", ("sub-002_S_0295", "ses-m12")),
        ("sub-002_S_0295_T1w.nii.gz", ("sub-002_S_0295", "")),
        ("sub-002-S-0295_T1w.nii.gz", ("sub-002-S-0295", "")),
        ("sub-OAS_30001/sub-OAS_30001_run-1_T1w.nii.gz", ("sub-OAS_30001", "run-1")),
        ("sub-01_T1w/normalized.nii.gz", ("sub-01", "")),
        ("sub-01/sub-012_T1w.nii.gz", ("sub-012", "")),
        ("sub-01_defaced_T1w.nii.gz", ("sub-01", "")),
        ("sub-01/ses-2020-01-31/anat/sub-01_ses-2020-01-31_T1w.nii.gz", ("sub-01", "ses-2020-01-31")),
        (
            "sub-01/anat/sub-01_ce-gd_rec-norm_echo-1_inv-2_part-mag_T1w.nii",
            ("sub-01", "ce-gd_rec-norm_echo-1_inv-2_part-mag"),
        ),
        ("site_sub-01_T1w.nii", ("sub-01", "")),
        ("scan.nii", ("", "")),
    ],
)
def test_patient_and_scan_of_a_name(path, found):
    assert ids(list_scans([path])) == [found]


@pytest.mark.parametrize("entity", ["rec", "echo", "task", "acq", "run"])
def test_images_that_differ_in_an_entity_are_two_scans(entity, tmp_path):
    for value in "12":
        derivative(tmp_path, "01", space=f"_{entity}-{value}_space-MNI152NLin2009cAsym_res-1")
    assert ids(list_scans(tmp_path)) == [("sub-01", f"{entity}-1"), ("sub-01", f"{entity}-2")]


def test_one_scan_in_two_template_spaces_is_two_rows_with_ids_of_their_own(tmp_path):
    for space in ("MNI152NLin2009cAsym", "MNI152NLin6Asym"):
        derivative(tmp_path, "01", space=f"_space-{space}_res-1")
    derivative(tmp_path, "02")
    assert ids(list_scans(tmp_path)) == [
        ("sub-01", "space-MNI152NLin2009cAsym"),
        ("sub-01", "space-MNI152NLin6Asym"),
        ("sub-02", ""),
    ]


def test_images_of_two_contrasts_in_a_list_are_two_scans():
    assert ids(list_scans(["sub-01_T1w.nii", "sub-01_T2w.nii"])) == [("sub-01", "T1w"), ("sub-01", "T2w")]


def test_two_files_that_would_be_one_scan_of_one_patient_are_refused_by_name(tmp_path):
    turboprep(tmp_path / "siteA" / "sub-01", tmp_path / "siteB" / "sub-01")
    both = [str(tmp_path / site / "sub-01" / "normalized.nii.gz") for site in ("siteA", "siteB")]
    for scans in (tmp_path, both):
        with pytest.raises(ScanError, match="both would be the scan of patient sub-01") as caught:
            list_scans(scans)
        assert all(path in str(caught.value) for path in both)
    with pytest.raises(ScanError, match="both would be the scan of patient sub-01"):
        list_scans(both)
    text = "image_path,patient_id,scan_id\na.nii,p1,m0\nb.nii,p1,m0\n"
    with pytest.raises(ScanError, match=r"a\.nii and .*b\.nii: both would be scan m0 of patient p1"):
        list_scans(manifest(tmp_path, text))
    assert len(list_scans([both[0], both[0]])) == 2  # one file twice is one scan


# --- Folders that are neither ---------------------------------------------------------------------


def test_folder_of_dicom_is_refused(tmp_path):
    touch(tmp_path / "series" / "0001", tmp_path / "series" / "0002", content=DICOM)
    with pytest.raises(ScanError, match=r"DICOM files; prepare scans that come from the scanner by .brainfm prep"):
        list_scans(tmp_path)


def test_raw_bids_folder_is_refused_with_the_way_to_prepare_it(tmp_path):
    touch(tmp_path / "dataset_description.json", tmp_path / "sub-01" / "anat" / "sub-01_T1w.nii.gz")
    with pytest.raises(ScanError, match=r"no T1w image in MNI152 space.*--output-spaces"):
        list_scans(tmp_path)


def test_derivatives_in_the_scanner_s_space_alone_are_refused(tmp_path):
    derivative(tmp_path, "01", space="")
    with pytest.raises(ScanError, match="no T1w image in MNI152 space"):
        list_scans(tmp_path)


def test_folder_of_loose_images_is_refused_with_their_number(tmp_path):
    touch(tmp_path / "a.nii.gz", tmp_path / "more" / "b.mgz", tmp_path / "notes.txt")
    with pytest.raises(ScanError, match="name its 2 image files one by one, or list them in a manifest") as caught:
        list_scans(tmp_path)
    assert f"'brainfm prep {tmp_path} -o prep/'" in str(caught.value)  # the next step of whoever skipped it


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(ScanError, match=r"no scans in this folder"):
        list_scans(tmp_path)


# --- Records as rows of text ----------------------------------------------------------------------


def test_record_as_a_row_of_text():
    record = ScanRecord(Path("a.nii"), None, "p1", "s1", {"label": "AD"})
    assert record.columns() == {
        "image_path": "a.nii",
        "mask_path": "",
        "patient_id": "p1",
        "scan_id": "s1",
        "label": "AD",
    }
    assert ScanRecord((np.zeros(1), np.eye(4))).columns()["image_path"] == ""


def test_record_of_several_channels_as_a_row_of_text():
    record = ScanRecord({"T1w": Path("a.nii"), "FLAIR": None, "T2w": (np.zeros(1), np.eye(4))}, "m.nii")
    assert record.columns() == {
        "t1w_path": "a.nii",
        "flair_path": "",
        "t2w_path": "",
        "mask_path": "m.nii",
        "patient_id": "",
        "scan_id": "",
    }
    assert record.name == "a.nii"


ROWS = [
    ScanRecord("a.nii", "m.nii", "p1", "s1", {"label": "AD"}),
    ScanRecord("a.nii", extra={"t1w_path": "b.nii", "report_path": ""}),
    ScanRecord({"t1w": "a.nii", "flair": "b.nii"}, "m.nii", "p1"),
    ScanRecord({"t1w": "a.nii"}, None, "", "s2", {"dense_path": "d.nii"}),
    ScanRecord(""),
]


@pytest.mark.parametrize("record", ROWS, ids=["image", "image and paths", "channels", "one channel", "in memory"])
def test_record_goes_to_a_row_of_text_and_back(record):
    assert ScanRecord.from_columns(record.columns()) == record


def test_rows_of_one_table_go_back_to_scans_of_one_image_and_of_channels():
    """In a table all rows have the columns of all."""
    blank = dict.fromkeys(("image_path", "t1w_path", "flair_path"), "")
    one, several = ({**blank, **ROWS[number].columns()} for number in (0, 2))
    assert ScanRecord.from_columns(several) == ROWS[2]
    assert ScanRecord.from_columns(one).image == "a.nii"


def test_relative_paths_of_a_row_are_relative_to_the_folder_that_is_given():
    row = {"t1w_path": "a.nii", "flair_path": "/abs/b.nii", "mask_path": "m.nii"}
    record = ScanRecord.from_columns(row, Path("/data"))
    assert record.image == {"t1w": str(Path("/data/a.nii")), "flair": str(Path("/abs/b.nii"))}
    assert record.mask == str(Path("/data/m.nii"))


# --- Manifests: who is who ------------------------------------------------------------------------


def rows_of(folder, *lines):
    return list_scans(manifest(folder, "\n".join(lines) + "\n"))


@pytest.mark.parametrize("column", ["participant_id", "subject_id", "Subject", "PTID", "RID", "subject id", "eid"])
def test_patients_are_taken_from_a_column_of_that_meaning_and_said(column, tmp_path, caplog):
    records = rows_of(tmp_path, f"image_path,{column},age", "a.nii,007,71", "b.nii,008,72")
    assert ids(records) == [("007", ""), ("008", "")]
    assert records[0].extra == {column: "007", "age": "71"}
    assert f"no column patient_id; the patients are those of the column {column}" in caplog.text


def test_column_patient_id_goes_before_others_and_its_case_does_not_matter(tmp_path, caplog):
    records = rows_of(tmp_path, "Image_Path,Patient ID,SCAN_ID,subject", "a.nii,p1,m0,x", "b.nii,p1,m1,y")
    assert ids(records) == [("p1", "m0"), ("p1", "m1")]
    assert caplog.text == ""


def test_two_columns_that_tell_patients_apart_in_one_way_are_one(tmp_path):
    records = rows_of(tmp_path, "image_path,RID,PTID", "a.nii,295,002_S_0295", "b.nii,295,002_S_0295", "c.nii,413,n/a")
    assert [record.patient_id for record in records] == ["002_S_0295", "002_S_0295", ""]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["image_path,participant_id,subject_id", "a.nii,1,5", "b.nii,2,5"],
            "participant_id and subject_id tell the patients apart in different ways; rename",
        ),
        (["image_path,patient_id,Patient_ID", "a.nii,1,5"], "patient_id and Patient_ID are both the column patient_id"),
        (["image_path,patient_id", "a.nii,007", "b.nii,7"], "patients '007', '7' may be one"),
        (["image_path,patient_id", "a.nii,7", "b.nii,sub-007", "c.nii,007"], "'7', 'sub-007', '007' may be one"),
        (["image_path,patient_id", "a.nii,AB1", "b.nii,ab1"], "'AB1', 'ab1' may be one"),
        (["image_path,patient_id", "a.nii,7.0", "b.nii,7"], "'7.0', '7' may be one"),
        (["image_path,patient_id", "sub-01_T1w.nii,", "b.nii,01"], "'sub-01', '01' may be one"),
        (["image_path", "siteA/sub-01_T1w.nii", "siteB/sub-01_T1w.nii"], "both would be the scan of patient sub-01"),
        (["image_path,session", "siteA/sub-01_T1w.nii,1", "siteB/sub-01_T1w.nii,1"], "both would be scan 1 of patient"),
    ],
)
def test_patient_that_may_be_two_or_two_that_may_be_one_are_refused_by_name(lines, message, tmp_path):
    with pytest.raises(ScanError, match=message):
        rows_of(tmp_path, *lines)


def test_ids_that_differ_by_more_than_case_and_zeros_are_taken(tmp_path):
    names = ["10", "100", "1", "p-1-1", "p11", "002_S_0295", "002_S_2950", "sub-A", "sub-B", "0"]
    records = rows_of(tmp_path, "image_path,patient_id", *(f"{n}.nii,{name}" for n, name in enumerate(names)))
    assert [record.patient_id for record in records] == names


def test_flat_names_say_who_and_which_scan_where_no_column_does(tmp_path, caplog):
    names = ["sub-OAS30001_ses-d0129_T1w", "sub-OAS30001_ses-d0757_T1w", "sub-OAS_30002_T1w", "sub-002_S_0295_T1w"]
    records = rows_of(tmp_path, "image_path,age", *(f"raw/{name}.nii.gz,70" for name in names), "other.nii,70")
    assert ids(records) == [
        ("sub-OAS30001", "ses-d0129"),
        ("sub-OAS30001", "ses-d0757"),
        ("sub-OAS_30002", ""),
        ("sub-002_S_0295", ""),
        ("", ""),
    ]
    assert "the patient of 4 of 5 scans is that of its file's name, such as sub-OAS30001" in caplog.text


@pytest.mark.parametrize("name", ["sub-002_0295_T1w.nii", "sub-01_20200131_T1w.nii", "sub-01_2_T1w.nii", "007_T1w.nii"])
def test_name_that_may_mean_two_patients_says_none(name, tmp_path):
    assert ids(rows_of(tmp_path, "image_path", name)) == [("", "")]
    assert ids(list_scans([name])) == [("", "")]


@pytest.mark.parametrize(
    ("columns", "rows", "found"),
    [
        ("patient_id,session_id", ["a/t1.nii,p1,m0", "b/t1.nii,p1,m12"], ["m0", "m12"]),
        ("patient_id,session", ["a/t1.nii,p1,m0", "b/t1.nii,p1,m0"], ["m0_a_t1", "m0_b_t1"]),
        ("patient_id", ["sub-1_ses-1_T1w.nii,p1", "sub-1_ses-2_T1w.nii,p1"], ["ses-1", "ses-2"]),
        ("patient_id", ["p1/m00/t1.nii.gz,p1", "p1/m12/t1.nii.gz,p1"], ["m00_t1", "m12_t1"]),
        ("patient_id", ["x_m00.nii,p1", "x_m12.nii,p1"], ["m00", "m12"]),
        ("patient_id,scan_id", ["a.nii,p1,m0", "b.nii,p1,", "c.nii,p1,n/a"], ["m0", "b", "c"]),
        ("patient_id", ["a.nii,p1", "b.nii,p2"], ["", ""]),
    ],
)
def test_scans_of_a_patient_without_ids_are_told_apart_by_session_or_name(columns, rows, found, tmp_path):
    records = rows_of(tmp_path, f"image_path,{columns}", *rows)
    assert [record.scan_id for record in records] == found
    assert list_scans(records) == records


# --- DataFrames, and lists of what a path may be --------------------------------------------------


def test_dataframe_is_a_manifest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frame = pd.DataFrame(
        {
            "image_path": ["a.nii", "b.nii"],
            "patient_id": [7, 8],
            "age": [71.5, None],
            "mask_path": [None, "m.nii"],
        }
    )
    assert list_scans(frame) == [
        ScanRecord(Path("a.nii"), None, "7", "", {"age": "71.5"}),
        ScanRecord(Path("b.nii"), Path("m.nii"), "8", "", {"age": ""}),
    ]
    with pytest.raises(ScanError, match="the DataFrame: the manifest has no column image_path"):
        list_scans(frame.drop(columns="image_path"))
    with pytest.raises(ScanError, match="the DataFrame, row 5: image_path is empty"):
        list_scans(frame.assign(image_path=["a.nii", None]).set_axis([4, 5]))
    assert [record.image for record in list_scans(frame["image_path"])] == ["a.nii", "b.nii"]
    twice = pd.concat([frame, frame])  # with each row's label twice, too
    with pytest.raises(ScanError, match=r"the DataFrame, row 0: a\.nii is already in row 0; remove one of them"):
        list_scans(twice)


def test_folders_and_manifests_in_a_list_are_what_they_are_alone(tmp_path):
    turboprep(tmp_path / "data" / "p1", tmp_path / "data" / "p2")
    (tmp_path / "data" / "p3").symlink_to(tmp_path / "gone")
    table = manifest(tmp_path, "image_path,patient_id,scan_id\na.nii,p4,m0\n")
    records = list_scans([tmp_path / "data", str(table), "b.nii"])
    assert ids(records) == [("p1", ""), ("p2", ""), ("p4", "m0"), ("", "")]
    assert list(records.left_out) == [str(tmp_path / "data" / "p3")]
    with pytest.raises(ScanError, match="no scans in this folder"):
        list_scans([touch(tmp_path / "empty" / "a.txt").parent])
    with pytest.raises(ScanError, match="both would be scan m0 of patient p4"):
        list_scans([table, manifest(tmp_path, "image_path,patient_id,scan_id\nc.nii,p4,m0\n", "more.csv")])


def test_array_is_no_list_of_scans():
    with pytest.raises(ScanError, match="not one ndarray; put it in a list"):
        list_scans(np.zeros((3, 4, 5)))


def test_endings_are_taken_in_any_case(tmp_path):
    image = derivative(tmp_path / "bids", "01")
    for path in image.parent.iterdir():
        path.rename(path.with_name(path.name.replace(".nii.gz", ".NII.GZ")))
    (record,) = list_scans(tmp_path / "bids")
    assert (record.image[-7:], record.mask[-7:]) == (".NII.GZ", ".NII.GZ")
    with pytest.raises(ScanError, match="name its 1 image files"):
        list_scans(touch(tmp_path / "loose" / "A.MGZ").parent)


def test_name_that_no_file_can_have_is_one_bad_scan_of_a_list(tmp_path):
    long = tmp_path / f"{'x' * 300}.nii.gz"
    assert [record.image for record in list_scans([long])] == [str(long)]
    with pytest.raises(ScanError, match="no such file or folder"):
        list_scans(tmp_path / ("x" * 300))
