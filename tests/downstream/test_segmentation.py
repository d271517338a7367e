"""Linear probes on dense features, of phantoms whose tissues are known."""

from __future__ import annotations

import csv

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from sklearn.metrics import f1_score

from brainfm.cli import main
from brainfm.contract import Volume
from brainfm.downstream import segmentation as job
from brainfm.downstream.segmentation import Dice, probe_segmentation
from brainfm.errors import BrainfmError
from brainfm.phantom import make_phantom


def test_phantoms_are_segmented_with_intervals_and_controls(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "VOXELS", 60)
    command = ["segment", "--phantoms", "4", "--model", "test_resnet_3d", "--stages", "all", "-o", str(tmp_path)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader((tmp_path / "dice.csv").open(encoding="utf-8")))
    found = {(row["features"], row["label"]): row for row in rows}
    assert {kind for kind, _ in found} == {"pretrained", "untrained", "intensity"}
    assert {label for _, label in found} == {"CSF", "grey matter", "white matter"}
    for row in rows:
        assert 0 <= float(row["low"]) <= float(row["dice"]) <= float(row["high"]) <= 1
        assert row["patients"] == "4"
    # the first maps of a network have half of its voxels' resolution, and phantoms' tissues are of intensities
    assert float(found["pretrained", "white matter"]["dice"]) > 0.5
    assert float(found["intensity", "white matter"]["dice"]) > 0.6
    each = list(csv.DictReader((tmp_path / "dice_scans.csv").open(encoding="utf-8")))
    own = [float(row["dice"]) for row in each if (row["features"], row["label"]) == ("pretrained", "CSF")]
    assert np.mean(own) == pytest.approx(float(found["pretrained", "CSF"]["dice"]), abs=1e-3)


def test_labels_of_files_are_learned_by_a_map_that_knows_them(tmp_path):
    """A file's labels are found on the tensor's voxels, wherever their axes point, and a bad file leaves a scan out."""
    rows = ["image_path,mask_path,patient_id,lesion"]
    for n in range(5):
        phantom = make_phantom(n, spacing=4.0)
        ball = np.linalg.norm(np.indices(phantom.mask.shape).T - [24, 24, 20], axis=-1).T < 6
        labels = nib.as_closest_canonical(nib.Nifti1Image((ball & (phantom.mask > 0)).astype(np.uint8), phantom.affine))
        turned = labels.as_reoriented([[1, -1], [0, 1], [2, -1]])
        for name, array in (("image", phantom.image), ("mask", phantom.mask)):
            nib.Nifti1Image(array, phantom.affine).to_filename(tmp_path / f"{name}{n}.nii.gz")
        turned.to_filename(tmp_path / f"lesion{n}.nii.gz")
        rows.append(f"image{n}.nii.gz,mask{n}.nii.gz,p{n},{tmp_path / f'lesion{n}.nii.gz' if n else ''}")
    (tmp_path / "scans.csv").write_text("\n".join(rows))
    scores, failed = probe_segmentation(tmp_path / "scans.csv", ["test_resnet_3d"], tmp_path / "out", labels="lesion")
    assert [key.endswith("image0.nii.gz") for key in failed] == [True]
    assert {(one.features, one.label, one.patients) for one in scores} >= {("pretrained", "1", 4)}


def test_the_probe_is_exact_where_features_are_the_labels():
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 3, (12, 12, 12))
    cells = torch.from_numpy(np.stack([labels == k for k in range(3)]).astype(np.float32))
    info = {"reduction": (1, 1, 1), "offset": (0.0, 0.0, 0.0)}
    volume = Volume(labels[None].astype(np.float32), np.ones(labels.shape, bool), np.eye(4))
    cases = [job._Case(f"p{n}", volume, labels) for n in range(4)]
    scores = job._cross_validated(cases, lambda _: [(cells, info)], 0)
    assert scores == [{1: 1.0, 2: 1.0}] * 4
    noise = torch.from_numpy(draw.standard_normal((3, 12, 12, 12)).astype(np.float32))
    assert job._cross_validated(cases, lambda _: [(noise, info)], 0)[0][1] < 0.6


def test_dice_is_the_f1_score_of_scikit_learn_within_the_brain():
    draw = np.random.default_rng(0)
    truth, guess = draw.integers(0, 4, (2, 9, 9, 9))
    inside = draw.random(truth.shape) < 0.7
    case = job._Case("p", Volume(truth[None].astype(np.float32), inside, np.eye(4)), truth)
    each = f1_score(truth[inside], guess[inside], labels=[1, 2, 3], average=None)
    found = job._overlaps(case, guess[tuple(job._brain(case).T)])
    assert [found[label] for label in (1, 2, 3)] == pytest.approx(list(each))


def test_voxels_between_cells_have_what_lies_between_them():
    cells = torch.arange(4.0)[None, :, None, None]
    info = {"reduction": (4, 4, 4), "offset": (1.5, 1.5, 1.5)}
    voxels = np.array([[1, 0, 0], [2, 0, 0], [7, 9, 9], [15, 0, 0]])
    np.testing.assert_allclose(job._sampled(cells, info, voxels)[:, 0], [0, 0.125, 1.375, 3], atol=1e-6)


def test_a_rare_class_is_as_rare_in_the_prediction():
    """Classes are learned in like numbers and their frequencies put back: else a lesion would be seen everywhere."""
    draw = np.random.default_rng(0)
    truth = np.repeat([0, 1], 200)
    features = draw.standard_normal((400, 1)).astype(np.float32)  # nothing to tell them apart by
    probe = job._Probe.fit([(features, truth)], [{0: 0.98, 1: 0.02}])
    cells = torch.from_numpy(draw.standard_normal((1, 10, 10, 10)).astype(np.float32))
    voxels = np.argwhere(np.ones((10, 10, 10)))
    assert probe([(cells, {"reduction": (1, 1, 1), "offset": (0, 0, 0)})], voxels).sum() == 0


def test_intervals_are_over_patients_not_scans():
    values = np.array([0.2, 0.2, 0.2, 0.8])
    found = job._summary("m", "k", "l", values, ["a", "a", "a", "b"])
    assert found == Dice("m", "k", "l", pytest.approx(0.5), pytest.approx(0.2), pytest.approx(0.8), 2)
    alone = job._summary("m", "k", "l", np.array([0.3, np.nan]), ["a", "b"])
    assert (alone.dice, alone.patients) == (0.3, 1)
    assert np.isnan(alone.low)


def test_segmentation_refuses_too_few_and_both(tmp_path):
    with pytest.raises(BrainfmError, match="not both"):
        probe_segmentation("scans.csv", ["test_resnet_3d"], tmp_path, phantoms=4)
    with pytest.raises(BrainfmError, match="give 4 patients at least"):
        probe_segmentation(None, ["test_resnet_3d"], tmp_path, phantoms=2)


def test_tissue_of_a_phantom_is_dark_to_bright_within_its_mask():
    phantom = make_phantom(0, spacing=4.0)
    assert ((phantom.tissue > 0) == (phantom.mask > 0)).all()
    means = [phantom.image[phantom.tissue == kind].mean() for kind in (1, 2, 3)]
    assert means == sorted(means)
