"""Features by region: an atlas in MNI152, a cell's place in the world, and scans in a space of their own."""

from __future__ import annotations

import csv
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner

import brainfm
from brainfm.assets import SAMPLE_MASK
from brainfm.cli import main
from brainfm.contract import InputSpec
from brainfm.downstream.regions import Atlas, embed_regions, read_atlas, region_means, to_mni
from brainfm.errors import BrainfmError, ScanError
from brainfm.manifest import ScanRecord
from brainfm.scan.spaces import FSL_MNI152
from brainfm.table import read as read_table


@pytest.fixture(scope="module")
def atlas_file(tmp_path_factory):
    """The brain in four: 1 left front, 2 right front, 3 left back, 7 right back; of 2 mm voxels, axes turned."""
    mask = nib.load(SAMPLE_MASK)
    brain = np.asarray(mask.dataobj)[::2, ::2, ::2] > 0
    affine = mask.affine @ np.diag([2, 2, 2, 1])
    x, y, _ = np.moveaxis(np.indices(brain.shape).T @ affine[:3, :3].T + affine[:3, 3], -1, 0).transpose(0, 3, 2, 1)
    labels = np.select([(x < 0) & (y > 0), (x >= 0) & (y > 0), x < 0], [1, 2, 3], 7) * brain
    path = tmp_path_factory.mktemp("atlas") / "quarters.nii.gz"
    image = nib.Nifti1Image(labels.astype(np.int16), affine)
    image.as_reoriented([[0, -1], [2, 1], [1, -1]]).to_filename(path)
    return path


def test_regions_become_blocks_of_columns_with_their_names(atlas_file, small_sample, small_model, tmp_path):
    names = tmp_path / "names.csv"
    names.write_text("index,name\n1,left front\n2,right front\n3,left back\n7,right back\n")
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(b"no image")
    scans = tmp_path / "scans.csv"
    scans.write_text(f"image_path,mask_path,patient_id\n{small_sample[0]},{small_sample[1]},a\n{bad},,b\n")
    output = tmp_path / "regions.csv"
    command = ["regions", scans, "--model", "test_resnet_3d", "--atlas", atlas_file, "--names", names, "-o", output]
    result = CliRunner().invoke(main, [str(word) for word in command])
    assert result.exit_code == 1  # one scan failed
    assert "1 scan → " in result.output
    table = read_table(output)
    assert table.vectors.shape == (1, 4 * small_model.num_features)
    assert table.records[0].patient_id == "a"
    assert table.origin.readout["regions"] == 4
    rows = list(csv.DictReader((tmp_path / "regions.regions.csv").open(encoding="utf-8")))
    assert [row["name"] for row in rows] == ["left front", "right front", "left back", "right back"]
    assert (rows[3]["label"], rows[3]["first"], rows[3]["last"]) == ("7", "e384", "e511")

    dense = brainfm.embed([small_sample], small_model, dense=tmp_path / "dense", dense_dtype="float32")
    cells = nib.load(dense.records[0].extra["dense_path"])  # the same cells, by what `brainfm embed --dense` writes
    numbers = np.asarray(cells.dataobj)
    places = np.indices(numbers.shape[:3]).reshape(3, -1).T @ cells.affine[:3, :3].T + cells.affine[:3, 3]
    found = read_atlas(atlas_file).at(places)
    for block, label in enumerate((1, 2, 3, 7)):
        own = numbers.reshape(-1, numbers.shape[-1])[found == label]
        wanted = own.mean(axis=0) if len(own) else None
        assert (wanted is None) == (rows[block]["cells"] == "0")
        if wanted is not None:
            np.testing.assert_allclose(table.vectors[0].reshape(4, -1)[block], wanted, rtol=1e-3, atol=1e-5)


def test_a_region_smaller_than_the_cells_has_the_nearest_one():
    labels = np.zeros((40, 40, 40), np.int64)
    labels[:20], labels[21, 21, 21] = 1, 2
    atlas = Atlas("made up", labels, np.eye(4), "MNI152NLin2009cAsym", {})
    cells = np.arange(64, dtype=np.float32).reshape(1, 4, 4, 4)
    to_world = np.diag([10.0, 10.0, 10.0, 1.0])
    to_world[:3, 3] = 5
    means, counts = region_means(cells, to_world, atlas)
    assert counts.tolist() == [32, 0]
    assert means[:, 0].tolist() == [np.arange(32).mean(), 2 * 16 + 2 * 4 + 2]  # the cell about (25, 25, 25)


def test_another_template_of_mni152_is_met_by_its_matrix(atlas_file):
    spec = brainfm.get_pretrained_cfg("test_resnet_3d").input_spec
    record = ScanRecord("scan.nii.gz")
    np.testing.assert_array_equal(to_mni(record, spec), np.eye(4))
    np.testing.assert_array_equal(to_mni(record, replace(spec, space="MNI152NLin6Asym")), FSL_MNI152.to_2009c)
    atlas = read_atlas(atlas_file)
    moved = replace(atlas, space="MNI152NLin6Asym", affine=np.linalg.inv(FSL_MNI152.to_2009c) @ atlas.affine)
    points = np.random.default_rng(0).uniform(-60, 60, (500, 3))
    assert (moved.at(points) == atlas.at(points)).mean() > 0.99  # but for rounding at edges


def test_native_contracts_take_prepared_scans_alone():
    native = InputSpec(representation="any contrast", channels=("any",))
    with pytest.raises(ScanError, match="brainfm prep"):
        to_mni(ScanRecord("head.nii.gz"), native)
    own = InputSpec(space="Colin27", grid=brainfm.Grid((4, 4, 4), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)), orientation="RAS")
    with pytest.raises(ScanError, match="from which no way to MNI152 is known"):
        to_mni(ScanRecord("head.nii.gz"), own)


def test_a_prepared_scan_leads_from_its_own_space_by_its_affine_matrix(tmp_path):
    import json

    matrix = np.diag([1.1, 0.9, 1.05, 1.0])
    matrix[:3, 3] = [3, -4, 5]
    for name in ("head.nii.gz", "brain_mask.nii.gz"):
        nib.Nifti1Image(np.ones((4, 4, 4), np.uint8), np.eye(4)).to_filename(tmp_path / name)
    record = {"format": 2, "input": {}, "settings": {}, "verdict": "pass", "quality": {}, "rigid": None}
    (tmp_path / "prep.json").write_text(json.dumps(record | {"affine": matrix.tolist()}))
    native = InputSpec(representation="any contrast", channels=("any",))
    np.testing.assert_allclose(to_mni(ScanRecord(str(tmp_path)), native), matrix)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda labels: labels + 0.5, "holds fractions"),
        (lambda labels: labels * 0, "whole numbers above 0"),
        (lambda labels: np.roll(labels, 40, axis=0), "lie in the brain of MNI152"),
    ],
)
def test_what_is_no_atlas_in_mni152_is_refused(atlas_file, tmp_path, change, said):
    image = nib.load(atlas_file)
    changed = change(np.asarray(image.dataobj).astype(np.float32))
    nib.Nifti1Image(changed, image.affine).to_filename(tmp_path / "atlas.nii.gz")
    with pytest.raises(BrainfmError, match=said):
        read_atlas(tmp_path / "atlas.nii.gz")
    with pytest.raises(BrainfmError, match="taken in MNI152"):
        read_atlas(atlas_file, space="fsaverage")


def test_without_any_scan_the_reason_is_said(atlas_file, tmp_path, small_model):
    (tmp_path / "a.nii.gz").write_bytes(b"")
    with pytest.raises(BrainfmError, match="no scan could be embedded; the first"):
        embed_regions([str(tmp_path / "a.nii.gz")], small_model, read_atlas(atlas_file), tmp_path / "t.csv")
