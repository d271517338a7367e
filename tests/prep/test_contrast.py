"""Scans of other contrasts go onto the person's prepared T1w scan: registered to it, resampled once with it."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from prepared_folders import moved_head, write
from scipy.spatial.transform import Rotation

import brainfm
from brainfm.assets import SAMPLE_MASK, SAMPLE_SCAN
from brainfm.errors import ScanError
from brainfm.prep.contrast import judge_contrast, t1w_of
from brainfm.prep.pipeline import Settings, is_done, prepare
from brainfm.prep.source import find_sources

SHAPE, OWN = (66, 78, 66), np.diag([3.0, 3.0, 3.0, 1.0]) + np.pad([[-98.0], [-130.0], [-88.0], [0.0]], ((0, 0), (3, 0)))


def rigid(degrees, shift):
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    matrix[:3, 3] = shift
    return matrix


T1W, T2W = rigid((4, -3, 6), (3, -2, 5)), rigid((-6, 5, 2), (-8, 6, -4))  # from points of each scan to the template


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """A prepared T1w scan, and beside it a T2w image of the head in another position, not yet prepared."""
    folder = tmp_path_factory.mktemp("contrast")
    head, brain = moved_head(T1W, OWN, SHAPE)
    write(folder / "prep" / "sub-01_ses-a", head, brain, affine_of_voxels=OWN, rigid=T1W.tolist(), affine=T1W.tolist())
    head, brain = moved_head(T2W, OWN, SHAPE)
    dark = np.where(head > 0, np.maximum(260 - head, 5), 0)  # what is bright in one is dark in the other
    dark = np.maximum(dark + np.random.default_rng(0).normal(0, 3, dark.shape), 0)
    nib.Nifti1Image(dark.astype(np.float32), OWN).to_filename(folder / "sub-01_ses-a_T2w.nii")
    nib.Nifti1Image(brain.astype(np.uint8), OWN).to_filename(folder / "truth.nii")
    return folder


@pytest.mark.slow
def test_t2w_scan_is_registered_to_the_t1w_scan_and_gets_its_mask(output, spec):
    settings = Settings(contrast="T2w", bias="none")
    (source,) = find_sources([output / "sub-01_ses-a_T2w.nii"], "T2w")
    assert source.name == "sub-01_ses-a_T2w"
    onto = t1w_of(source.name, "T2w", output / "prep")
    assert onto == output / "prep" / "sub-01_ses-a"
    folder = output / "prep" / source.name
    record = prepare(source, folder, settings, onto=onto)
    points = np.c_[np.random.default_rng(1).uniform((-60, -95, -40), (60, 60, 70), (200, 3)), np.ones(200)].T
    for name in ("rigid", "affine"):
        there = np.array(record[name]) @ np.linalg.inv(T2W) @ points
        assert np.linalg.norm((there - points)[:3], axis=0).max() < 0.6
    brain, truth = (
        np.asanyarray(nib.load(path).dataobj) > 0 for path in (folder / "brain_mask.nii.gz", output / "truth.nii")
    )
    assert 2 * (brain & truth).sum() / (brain.sum() + truth.sum()) > 0.97
    assert record["contrast"] == "T2w"
    assert record["registration"]["onto"] == str(onto)

    (figure,) = record["quality"]
    assert (record["verdict"], figure["name"]) == ("pass", "agreement")

    # encoders of several channels take both on one grid; of T1w, the T1w scan alone
    import dataclasses

    both = dataclasses.replace(spec, channels=("T1w", "T2w"), operations=(), output_shape=None)
    scan = brainfm.load_scan({"t1w": onto, "t2w": folder}, spec=both)
    first, second = (image[scan.mask] for image in scan.image)
    assert np.corrcoef(first, second)[0, 1] < -0.7
    with pytest.raises(ScanError, match="a prepared T2w scan, and this contract takes T1w"):
        brainfm.load_scan(folder, spec=spec)

    # it is done as long as the T1w scan is the same
    assert is_done(source, folder, settings, onto)
    record = json.loads((onto / "prep.json").read_text())
    (onto / "prep.json").write_text(json.dumps(record | {"again": True}))
    assert not is_done(source, folder, settings, onto)
    with pytest.raises(
        ScanError, match=r"_T2w: registered to another preparation of its T1w scan than .*prepare the scan"
    ):
        brainfm.load_scan({"t1w": onto, "t2w": folder}, spec=both)


def test_scan_that_lies_elsewhere_does_not_pass_and_one_without_a_t1w_scan_is_looked_at(spec):
    import dataclasses

    given = brainfm.load_scan(SAMPLE_SCAN, SAMPLE_MASK, spec=dataclasses.replace(spec, operations=()))
    t1w, brain = given.image[0], given.mask
    dark = np.where(brain, 260 - t1w, 0)
    assert judge_contrast(dark, brain, t1w).verdict == "pass"
    for shift in ((4, 0, 0), (0, -5, 0), (3, 3, 3)):
        figure = judge_contrast(np.roll(dark, shift, (0, 1, 2)), brain, t1w)
        assert figure.verdict == "fail"
        assert "the registration to the T1w scan may have gone wrong" in figure.reason
    alone = judge_contrast(dark, brain, None)
    assert alone.verdict == "look"
    assert "without a T1w scan of the person" in alone.reason


def test_t1w_scan_of_another_one_is_found_by_name_patient_and_session(tmp_path):
    for name in ("sub-01_ses-a_run-1", "sub-02_run-1", "sub-02_run-2", "anna/m00", "anna/m12", "scan"):
        write(tmp_path / name, np.ones((4, 4, 4)), np.ones((4, 4, 4), dtype=bool))

    def found(name):
        folder = t1w_of(name, "FLAIR", tmp_path)
        return folder and folder.relative_to(tmp_path).as_posix()

    assert found("sub-01_ses-a_FLAIR") == "sub-01_ses-a_run-1"
    assert found("anna/m12_FLAIR") == "anna/m12"
    assert found("scan_FLAIR") == "scan"
    assert found("sub-01_ses-b_FLAIR") is None
    assert found("sub-03_FLAIR") is None
    with pytest.raises(ScanError, match=r"may belong to .*run-1 or .*run-2; call it as its T1w scan is"):
        found("sub-02_FLAIR")


def test_images_of_a_contrast_are_found_by_the_ends_of_names_and_by_columns(tmp_path):
    anat = tmp_path / "bids" / "sub-01" / "anat"
    anat.mkdir(parents=True)
    for name in ("T1w", "T2w", "FLAIR", "ce-gad_T1w", "acq-x_T2w"):
        (anat / f"sub-01_{name}.nii.gz").touch()
    names = {
        contrast: [source.name for source in find_sources([tmp_path / "bids"], contrast)]
        for contrast in ("T2w", "FLAIR", "T1c")
    }
    assert names["T2w"] == ["sub-01_T2w", "sub-01_acq-x_T2w"]
    assert names["FLAIR"] == ["sub-01_FLAIR"]
    assert names["T1c"] == ["sub-01_ce-gad"]
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("t1w_path,t2w_path,patient_id,scan_id\na.nii,b.nii,anna,m00\nc.nii,,anna,m12\n")
    sources = find_sources([manifest], "T2w")
    assert [(source.path.name, source.name) for source in sources] == [("b.nii", "anna/m00_T2w")]
    assert list(sources.left_out.values()) == ["no T2w image"]
    (anat / "sub-01_FLAIR.nii.gz").unlink()
    with pytest.raises(ScanError, match="BIDS data set without a FLAIR image"):
        find_sources([tmp_path / "bids"], "FLAIR")
