"""BIDS data sets: what is taken as a T1w image of whom, by 'prep' and by 'embed', and what is left out and why."""

import csv
import errno
import json
import os
import sys
import time
from pathlib import Path

import pytest
from bids_examples import data_sets, row_of
from click.testing import CliRunner

from brainfm import MissingExtraError, ScanError
from brainfm.bids import bids_ids, read_bids, wrongly
from brainfm.cli import main
from brainfm.manifest import list_scans
from brainfm.prep import batch
from brainfm.prep.source import find_sources

pytest.importorskip("bids2table", reason="needs the extra [bids], which needs Python 3.11")
EXAMPLES = os.environ.get("BRAINFM_BIDS_EXAMPLES", "")
MNI = "_space-MNI152NLin2009cAsym_res-1_desc-preproc"


def dataset(folder, *names, ignore=""):
    """A data set of empty files."""
    (folder / "dataset_description.json").parent.mkdir(parents=True, exist_ok=True)
    (folder / "dataset_description.json").write_text('{"Name": "made up", "BIDSVersion": "1.10.0"}')
    if ignore:
        (folder / ".bidsignore").write_text(ignore)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def anat(name, subject="sub-01"):
    return f"{subject}/anat/{subject}{name}"


@pytest.mark.skipif(not EXAMPLES, reason="BRAINFM_BIDS_EXAMPLES is no checkout of bids-standard/bids-examples")
def test_each_of_bids_examples_is_listed_or_refused_with_the_right_number_and_reason():
    with (Path(__file__).parent / "data" / "bids_examples.csv").open(encoding="utf-8") as file:
        expected = {row["data_set"]: row for row in csv.DictReader(file)}
    folders = data_sets(Path(EXAMPLES))
    assert {folder.name for folder in folders} >= expected.keys()
    for folder in folders:
        if folder.name in expected:
            before = time.process_time()
            assert row_of(folder) == expected[folder.name]
            assert time.process_time() - before < 5
            for image in read_bids(folder).images:  # one name, whether of the index or of the file alone
                scan = "_".join(
                    f"{key}-{image.entities[key]}" for key in ("ses", "acq", "run") if key in image.entities
                )
                patient, named = bids_ids(image.path)
                assert patient == f"sub-{image.entities['sub']}"
                assert all(part in named.split("_") for part in filter(None, scan.split("_")))


LEFT_OUT = {
    "_part-phase_T1w.nii.gz": "part-phase: no magnitude image",
    "_part-real_T1w.nii.gz": "part-real: no magnitude image",
    "_chunk-1_T1w.nii.gz": "chunk-1: a piece of an image; join the pieces, and name the whole",
    "_ce-gadolinium_T1w.nii.gz": "ce-gadolinium: after contrast agent, no plain T1w; name the file itself to take it",
    "_inv-1_T1w.nii.gz": "inv-1: an image called T1w has no such entity in BIDS",
    "_flip-1_mt-on_T1w.nii.gz": "flip-1 and mt-on: an image called T1w has no such entity in BIDS",
    "_acq-bad_T1w.nii.gz": "named in .bidsignore",
}


@pytest.mark.parametrize("name", LEFT_OUT)
@pytest.mark.parametrize("space", ["", MNI], ids=["raw", "derivative"])
def test_what_only_looks_like_a_t1w_image_is_left_out_with_the_reason(name, space, tmp_path):
    odd = anat(name.replace("_T1w", f"{space}_T1w"))
    folder = dataset(tmp_path, anat(f"{space}_T1w.nii.gz"), odd, ignore="# ours\n*_acq-bad*_T1w.*\n")
    listed = list_scans(folder) if space else find_sources([folder])
    assert len(listed) == 1
    assert listed.left_out.keys() == {str(folder / odd)}
    assert listed.left_out[str(folder / odd)].startswith(LEFT_OUT[name])
    assert bool(wrongly(listed.left_out)) == ("has no such entity" in LEFT_OUT[name])


@pytest.mark.parametrize("name", ["_part-mag", "_rec-norm", "_echo-1", "_acq-mprage_run-01", "_task-rest", "_mine-1"])
def test_entities_of_a_t1w_image_and_those_of_nobody_s_are_taken(name, tmp_path):
    folder = dataset(tmp_path, anat(f"{name}_T1w.nii.gz"), anat(f"{name}_T1w.json"))
    found = find_sources([folder])
    assert [source.name for source in found] == [f"sub-01{name}"]
    assert found.left_out == {}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("sub-01/dwi/sub-01_T1w.nii.gz", "in sub-01/dwi, and not in anat"),
        ("sub-01/ses-1/sub-01_T1w.nii.gz", "in sub-01/ses-1, and not in anat"),
        ("sub-01/anat/sub-02_T1w.nii.gz", "in the folder of sub-01, but its name does not say so: whose is it?"),
        ("sub-01/anat/sub-012_T1w.nii.gz", "in the folder of sub-01, but its name does not say so: whose is it?"),
        ("sub-01/anat/T1w.nii.gz", "in the folder of sub-01, but its name does not say so: whose is it?"),
    ],
)
def test_image_in_a_place_that_says_otherwise_than_its_name_is_left_out(name, reason, tmp_path):
    found = find_sources([dataset(tmp_path, name, anat("_T1w.nii", "sub-03"))])
    assert [source.name for source in found] == ["sub-03"]
    assert found.left_out == wrongly(found.left_out) == {str(tmp_path / name): reason}


@pytest.mark.parametrize(
    ("names", "has"),
    [
        (["_UNIT1.nii.gz", "_inv-1_MP2RAGE.nii.gz", "_inv-2_MP2RAGE.nii.gz"], ", but MP2RAGE, UNIT1"),
        (["_echo-1_MEGRE.nii.gz", "_echo-2_MEGRE.nii.gz"], ", but MEGRE"),
        (["_flip-1_mt-on_MPM.nii.gz"], ", but MPM"),
        (["_inplaneT1.nii.gz", "_T1map.nii.gz"], ", but T1map, inplaneT1"),
        (["_scans.tsv"], ""),
    ],
)
def test_subject_without_a_t1w_image_is_named_with_what_it_has_instead(names, has, tmp_path):
    dataset(tmp_path, *map(anat, names))
    with pytest.raises(ScanError, match=rf"without a T1w image.*sub-01 \(no T1w image in it{has}\)"):
        find_sources([tmp_path])
    dataset(tmp_path, anat("_T1w.nii", "sub-02"))
    found = find_sources([tmp_path])
    assert [source.name for source in found] == ["sub-02"]
    assert found.left_out == {str(tmp_path / "sub-01"): f"no T1w image in it{has}"}
    assert wrongly(found.left_out) == {}


def test_derivatives_inside_are_a_data_set_of_their_own(tmp_path):
    inside = dataset(tmp_path / "derivatives" / "fmriprep", anat(f"{MNI}_T1w.nii.gz"), anat("_desc-preproc_T1w.nii.gz"))
    dataset(tmp_path, anat("_T1w.nii.gz"), "sourcedata/sub-01/anat/sub-01_T1w.nii.gz")
    assert [source.path for source in find_sources([tmp_path])] == [tmp_path / anat("_T1w.nii.gz")]
    with pytest.raises(ScanError, match=rf"no T1w image in MNI152 space.*\(inside are {inside}\)"):
        list_scans(tmp_path)
    assert [record.image for record in list_scans(inside)] == [str(inside / anat(f"{MNI}_T1w.nii.gz"))]
    heads = find_sources([inside])
    assert [source.path.name for source in heads] == ["sub-01_desc-preproc_T1w.nii.gz"]
    assert list(heads.left_out.values()) == [
        "space-MNI152NLin2009cAsym: resampled; 'brainfm embed' takes derivatives, where in MNI152 space"
    ]


def test_mask_is_of_the_same_scan_whatever_its_ending(tmp_path):
    names = [f"_run-{run}_space-MNI152NLin2009cAsym_res-1_desc-" for run in ("1", "2")]
    folder = dataset(
        tmp_path,
        *(anat(f"{name}preproc_T1w.nii.gz") for name in names),
        anat(f"{names[1]}brain_mask.nii"),
        anat(f"{names[0]}other_mask.nii.gz"),
    )
    assert [record.mask and Path(record.mask).name for record in list_scans(folder)] == [
        None,
        f"sub-01{names[1]}brain_mask.nii",
    ]


def test_links_are_followed_once_each_and_those_to_nothing_are_named(tmp_path):
    folder = dataset(tmp_path / "data", anat("_T1w.nii.gz"))
    elsewhere = dataset(tmp_path / "elsewhere", anat("_T1w.nii.gz", "sub-02"))
    (folder / "sub-02").symlink_to(elsewhere / "sub-02")
    (folder / "sub-03").symlink_to(folder / "sub-01")
    (folder / "sub-04").symlink_to(tmp_path / "gone")
    (folder / "sub-01" / "again").symlink_to(folder / "sub-01")
    annexed = folder / anat("_T1w.nii.gz", "sub-05")  # whose content DataLad has not fetched
    annexed.parent.mkdir(parents=True)
    annexed.symlink_to(tmp_path / ".git" / "annex")
    found = find_sources([folder])
    assert [source.name for source in found] == ["sub-01", "sub-02", "sub-05"]
    assert found.left_out == {str(folder / "sub-04"): "a link that leads nowhere"}
    dataset(folder / "derivatives" / "other", anat("_T1w.nii.gz"))
    (folder / "sub-01" / "up").symlink_to(folder)
    assert find_sources([folder]) == found


def test_patient_of_a_folder_that_is_none_of_the_standard_s_is_whole(tmp_path):
    name = "sub-002_S_0295/ses-m12/anat/sub-002_S_0295_ses-m12"
    dataset(tmp_path, f"{name}_T1w.nii.gz", f"{name}{MNI}_T1w.nii.gz")
    assert [source.name for source in find_sources([tmp_path])] == ["sub-002_S_0295_ses-m12"]
    (record,) = list_scans(tmp_path)
    assert (record.patient_id, record.scan_id) == ("sub-002_S_0295", "ses-m12")


def test_data_set_s_folder_may_have_any_name(tmp_path):
    folder = dataset(tmp_path / "sub-study" / "ds000001.v1", anat("_T1w.nii.gz"))
    assert [source.name for source in find_sources([folder])] == ["sub-01"]


def test_data_set_may_be_the_working_folder(tmp_path, monkeypatch):
    dataset(tmp_path, anat("_T1w.nii.gz"), anat("_T2w.nii.gz", "sub-02"))
    monkeypatch.chdir(tmp_path)
    found = find_sources(["."])
    assert [source.path for source in found] == [tmp_path / anat("_T1w.nii.gz")]
    assert found.left_out == {"sub-02": "no T1w image in it, but T2w"}


def test_subject_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    dataset(tmp_path, anat("_T1w.nii.gz"), anat("_T1w.nii.gz", "sub-02"))
    scan = os.scandir

    def denied(path):
        if str(path).endswith("sub-02"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    found = find_sources([tmp_path])
    assert [source.name for source in found] == ["sub-01"]
    assert found.left_out == {str(tmp_path / "sub-02"): "cannot be read: Permission denied"}


def test_other_contrasts_go_by_the_suffix_and_contrast_agent(tmp_path):
    names = ["_T1w.nii.gz", "_ce-gad_T1w.nii.gz", "_T2w.nii.gz", "_acq-a_FLAIR.nii.gz", "_part-phase_T2w.nii.gz"]
    folder = dataset(tmp_path, *map(anat, names))
    found = {contrast: find_sources([folder], contrast) for contrast in ("T1w", "T1c", "T2w", "FLAIR")}
    assert {contrast: [source.path.name[7:] for source in each] for contrast, each in found.items()} == {
        "T1w": [names[0][1:]],
        "T1c": [names[1][1:]],
        "T2w": [names[2][1:]],
        "FLAIR": [names[3][1:]],
    }
    assert list(found["T2w"].left_out.values()) == ["part-phase: no magnitude image"]


def test_image_whose_file_is_named_itself_is_taken_without_the_index(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bids2table", None)
    folder = dataset(tmp_path, anat("_ce-gad_T1w.nii.gz"))
    file = folder / anat("_ce-gad_T1w.nii.gz")
    (record,) = list_scans([file])
    assert (record.patient_id, record.scan_id) == ("sub-01", "ce-gad")
    assert [source.name for source in find_sources([file])] == ["sub-01_ce-gad"]
    for listing in (list_scans, lambda path: find_sources([path])):
        with pytest.raises(MissingExtraError, match="bids2table is not installed; run: pip install"):
            listing(folder)


@pytest.mark.parametrize(("odd", "code"), [("_part-phase", 0), ("_ce-gad", 0), ("_inv-1", 1)])
@pytest.mark.parametrize("command", ["embed", "prep"])
def test_exit_code_is_of_what_may_be_a_scan_and_not_of_what_is_none(
    command, odd, code, small_sample, tmp_path, monkeypatch
):
    def prepared(todo, output, jobs, threads, bar, ended):
        for task in todo:
            ended(task.name, {"seconds": {}, "peak_memory_gb": 0.0, "verdict": "pass", "quality": []})

    monkeypatch.setattr(batch, "_run", prepared)
    space = MNI if command == "embed" else ""
    folder = dataset(tmp_path / "data", anat(f"{odd}{space}_T1w.nii.gz"))
    (folder / anat(f"{space}_T1w.nii.gz")).symlink_to(small_sample[0])
    if space:
        (folder / anat(f"{MNI[:-7]}brain_mask.nii.gz")).symlink_to(small_sample[1])
    arguments = [folder, "-o", tmp_path / "out.csv", *(["--model", "test_resnet_3d"] if space else [])]
    result = CliRunner().invoke(main, [command, *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert f"{odd}{space}_T1w.nii.gz: {odd[1:]}: " in result.output


def test_commands_say_what_they_left_out_and_why(small_sample, tmp_path):
    folder = dataset(tmp_path / "data", anat(f"_part-phase{MNI}_T1w.nii.gz"))
    image, mask = (folder / anat(f"{MNI[:-7]}{name}.nii.gz") for name in ("preproc_T1w", "brain_mask"))
    image.symlink_to(small_sample[0])
    mask.symlink_to(small_sample[1])
    report = tmp_path / "run.json"
    arguments = [folder, "--model", "test_resnet_3d", "-o", tmp_path / "out.csv", "--report", report]
    result = CliRunner().invoke(main, ["embed", *map(str, arguments)])
    assert "1 scan →" in result.output
    phase = str(folder / anat(f"_part-phase{MNI}_T1w.nii.gz"))
    assert json.loads(report.read_text())["left_out"] == {phase: "part-phase: no magnitude image"}


@pytest.mark.parametrize("command", ["embed", "prep"])
def test_pieces_are_a_missing_scan_where_no_whole_one_of_the_visit_is_there(command, tmp_path):
    space = MNI if command == "embed" else ""
    names = {
        subject: f"{subject}/ses-1/anat/{subject}_ses-1{chunk}{space}_T1w.nii.gz"
        for subject, chunk in (("sub-01", ""), ("sub-02", "_chunk-1"))
    }
    beside = names["sub-01"].replace("_ses-1", "_ses-1_chunk-1")
    folder = dataset(tmp_path, *names.values(), beside)
    listed = list_scans(folder) if space else find_sources([folder])
    assert len(listed) == 1
    assert listed.left_out.keys() == {str(folder / beside), str(folder / names["sub-02"])}
    assert wrongly(listed.left_out) == {
        str(folder / names["sub-02"]): "chunk-1: a piece of an image; join the pieces, and name the whole"
    }
