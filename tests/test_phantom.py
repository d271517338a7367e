"""Phantoms: synthetic scans with known labels. They must be the same every time, load like scans, and be learnable."""

from __future__ import annotations

import csv
from dataclasses import asdict
from itertools import pairwise

import nibabel as nib
import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score, roc_auc_score
from torch import nn

import brainfm
from brainfm.errors import BrainfmError
from brainfm.manifest import list_scans
from brainfm.phantom import SITES, make_cohort, make_labels, make_phantom

PATIENTS = 60

SPEC_1MM = brainfm.get_pretrained_cfg("simclr_resnet18_3d").input_spec
SPEC_4MM = brainfm.get_pretrained_cfg("test_resnet_3d").input_spec


@pytest.fixture(scope="module")
def phantoms():
    """Two scans each of some patients at 4 mm: [patient][scan]."""
    return [[make_phantom(patient, scan, spacing=4.0) for scan in range(2)] for patient in range(PATIENTS)]


@pytest.fixture(scope="module")
def tensors(phantoms):
    """[patients, scans, z, y, x]: what the contract of the test models makes of them, refusing none."""
    return np.stack([[_tensor(phantom).numpy()[0] for phantom in scans] for scans in phantoms])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A cohort on disk: three patients, two scans each, at 4 mm."""
    folder = tmp_path_factory.mktemp("phantoms") / "cohort"
    make_cohort(3, folder, spacing=4.0, scans_per_patient=2)
    return folder


# --- The same every time --------------------------------------------------------------------------


def test_phantom_does_not_depend_on_what_was_made_before_it(phantoms):
    again = make_phantom(7, 1, spacing=4.0)

    np.testing.assert_array_equal(again.image, phantoms[7][1].image)
    np.testing.assert_array_equal(again.mask, phantoms[7][1].mask)
    assert again.labels == phantoms[7][1].labels


def test_seed_gives_another_world_of_patients(phantoms):
    other = make_phantom(0, spacing=4.0, seed=1)

    assert (other.image != phantoms[0][0].image).any()
    assert [make_labels(patient, seed=1) for patient in range(8)] != [make_labels(patient) for patient in range(8)]


def test_scans_of_a_patient_share_labels_and_differ_in_every_voxel_of_noise(phantoms):
    first, second = phantoms[0]

    both = (first.mask & second.mask) > 0
    assert first.labels == second.labels
    assert (first.image[both] != second.image[both]).mean() > 0.9


@pytest.mark.parametrize("workers", [1, 3])
def test_cohort_has_the_same_bytes_with_any_number_of_workers_and_of_patients(folder, tmp_path, workers):
    make_cohort(2, tmp_path / "fewer", spacing=4.0, scans_per_patient=1, workers=workers)

    for name in ("normalized.nii.gz", "mask.nii.gz"):
        for patient in ("sub-0001", "sub-0002"):
            path = f"{patient}/ses-1/{name}"
            assert (tmp_path / "fewer" / path).read_bytes() == (folder / path).read_bytes()


def test_second_run_writes_only_what_is_missing_and_the_same_bytes(tmp_path):
    make_cohort(2, tmp_path, spacing=4.0)
    lost, kept = (tmp_path / patient / "ses-1" / "normalized.nii.gz" for patient in ("sub-0001", "sub-0002"))
    before, times = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()

    make_cohort(3, tmp_path, spacing=4)

    assert lost.read_bytes() == before
    assert kept.stat().st_mtime_ns == times
    assert (tmp_path / "sub-0003" / "ses-1" / "mask.nii.gz").exists()
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


# --- Labels ---------------------------------------------------------------------------------------


def test_labels_stay_in_their_ranges_and_are_balanced():
    labels = [make_labels(patient) for patient in range(400)]

    ages = np.array([label.age for label in labels])
    lesions = np.array([label.severity for label in labels if label.severity])
    assert (ages.min() >= 20, ages.min() < 22, ages.max() <= 90, ages.max() > 88) == (True,) * 4
    assert sum(label.sex for label in labels) == sum(label.disease for label in labels) == len(lesions) == 200
    assert (lesions.min(), lesions.max()) == (1, 42)
    assert all(sum(label.site == site for label in labels) == 100 for site in SITES)


def test_eight_patients_hold_every_combination_of_sex_disease_and_lesion():
    combinations = {(label.sex, label.disease, label.severity > 0) for label in map(make_labels, range(16, 24))}

    assert len(combinations) == 8


def test_labels_are_independent_of_one_another_and_of_the_site():
    labels = [make_labels(patient) for patient in range(4000)]
    columns = [[getattr(label, name) for label in labels] for name in ("age", "sex", "disease", "severity")]
    columns += [[label.site == site for label in labels] for site in SITES]

    correlations = np.corrcoef(np.array(columns, dtype=float))[:4] - np.eye(4, 8)
    assert np.abs(correlations).max() < 0.06


# --- Files ----------------------------------------------------------------------------------------


def test_files_lie_on_the_contracts_grid(folder):
    image, mask = (nib.load(folder / "sub-0002" / "ses-2" / name) for name in ("normalized.nii.gz", "mask.nii.gz"))
    phantom = make_phantom(1, 1, spacing=4.0)

    for stored in (image, mask):
        assert stored.shape == SPEC_4MM.grid.shape
        np.testing.assert_array_equal(stored.affine, SPEC_4MM.grid.affine("RAS"))
        assert (int(stored.header["qform_code"]), int(stored.header["sform_code"])) == (4, 4)
    assert (image.get_data_dtype(), mask.get_data_dtype()) == (np.int16, np.uint8)
    np.testing.assert_array_equal(np.asarray(image.dataobj), phantom.image)
    np.testing.assert_array_equal(np.asarray(mask.dataobj), phantom.mask)


def test_background_is_a_negative_constant_as_whitestripe_leaves_it(phantoms):
    image, mask = phantoms[5][0].image, phantoms[5][0].mask > 0

    assert (image.dtype, phantoms[5][0].mask.dtype) == (np.float32, np.uint8)
    background = image[~mask]
    assert (background == background[0]).all()
    assert (image[mask] > background[0]).all()
    assert np.abs(np.percentile(image[mask], 90)) < 0.1 * -background[0]  # white matter


def test_manifest_lists_every_scan_with_its_labels(folder):
    with (folder / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    records = list_scans(folder / "manifest.csv")

    assert list(rows[0]) == [
        *("image_path", "mask_path", "patient_id", "scan_id"),
        *("site", "age", "sex", "disease", "severity", "source"),
    ]
    assert {row["source"] for row in rows} == {"phantom"}
    assert rows[3]["image_path"] == "sub-0002/ses-2/normalized.nii.gz"
    for n, (row, record) in enumerate(zip(rows, records, strict=True)):
        assert (record.patient_id, record.scan_id) == (f"sub-{n // 2 + 1:04d}", f"ses-{n % 2 + 1}")
        assert {name: str(value) for name, value in asdict(make_labels(n // 2)).items()}.items() <= row.items()
    assert [(r.patient_id, r.scan_id) for r in list_scans(folder)] == [(r.patient_id, r.scan_id) for r in records]


def test_readme_says_that_they_are_not_people(folder):
    assert "phantoms, not people" in (folder / "README.txt").read_text()


def test_cohort_embeds_as_it_is(folder, small_model):
    table = brainfm.embed(folder / "manifest.csv", small_model)

    assert (len(table), table.errors) == (6, [])
    assert {record.extra["source"] for record in table.records} == {"phantom"}


@pytest.mark.parametrize(
    ("patients", "arguments"),
    [
        (0, {}),
        (1, {"scans_per_patient": 0}),
        (1, {"workers": 0}),
        (1, {"seed": -1}),
        (1, {"spacing": 0.5}),
        (1, {"spacing": 9}),
        (1, {"spacing": float("nan")}),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, patients, arguments):
    with pytest.raises(ValueError, match="must be"):
        make_cohort(patients, tmp_path / "none", **arguments)

    assert not (tmp_path / "none").exists()


def test_negative_patient_is_refused():
    with pytest.raises(ValueError, match="0 or more"):
        make_phantom(-1, spacing=4.0)


@pytest.mark.parametrize("arguments", [{"spacing": 4.0, "seed": 1}, {"spacing": 5.0}])
def test_folder_of_other_phantoms_is_refused(folder, arguments):
    with pytest.raises(BrainfmError, match="give another folder"):
        make_cohort(1, folder, **arguments)


def test_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "sub-0001").mkdir()

    with pytest.raises(BrainfmError, match="not an empty folder"):
        make_cohort(1, tmp_path, spacing=4.0)

    assert not (tmp_path / "README.txt").exists()


# --- Scans that load and can be told apart --------------------------------------------------------


@pytest.mark.slow
def test_contract_accepts_finer_phantoms_and_finds_the_same_anatomy(phantoms, tensors):
    fine = make_phantom(3, spacing=2.0)

    tensor = SPEC_4MM.apply(brainfm.load_scan((fine.image, fine.affine), (fine.mask, fine.affine), spec=SPEC_4MM))
    likeness = [np.corrcoef(tensor.image.ravel(), other[0].ravel())[0, 1] for other in tensors]
    assert np.argmax(likeness) == 3
    assert likeness[3] > 0.85


@pytest.mark.slow
def test_full_size_phantom_keeps_the_published_contract():
    phantom = make_phantom(0)

    scan = brainfm.load_scan(
        (phantom.image, phantom.affine), (phantom.mask, phantom.affine), spec=SPEC_1MM, on_mismatch="raise"
    )
    assert SPEC_1MM.apply(scan).image.shape == SPEC_1MM.output_shape
    assert scan.notes == ()


def test_patient_is_the_nearest_neighbour_of_its_second_scan(tensors):
    vectors = tensors.reshape(*tensors.shape[:2], -1)
    vectors = vectors - vectors.mean(axis=-1, keepdims=True)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)

    likeness = vectors[:, 1] @ vectors[:, 0].T
    found = likeness.argmax(axis=1) == np.arange(PATIENTS)
    assert found.mean() >= 0.95


# --- Labels that can be seen ----------------------------------------------------------------------


def test_csf_follows_age(phantoms, tensors):
    brain = _masks(phantoms)
    csf = ((tensors[:, 0] < -1.2) & brain).sum(axis=(1, 2, 3)) / brain.sum(axis=(1, 2, 3))

    assert np.corrcoef(csf, _labels(phantoms, "age"))[0, 1] >= 0.8


def test_ventricles_follow_age(phantoms, tensors):
    x, y, z = _places()
    middle = (abs(x) < 14) & (y > -60) & (y < 35) & (z > -2) & (z < 32)
    dark = (tensors[:, 0][:, middle] < -1.5).sum(axis=1)

    assert np.corrcoef(dark, _labels(phantoms, "age"))[0, 1] >= 0.8


def test_head_size_follows_sex(phantoms):
    volume = _masks(phantoms).sum(axis=(1, 2, 3))

    assert np.corrcoef(volume, _labels(phantoms, "sex"))[0, 1] >= 0.8


def test_medial_temporal_intensity_follows_disease(phantoms, tensors):
    x, y, z = _places()
    box = (abs(abs(x) - 25) < 9) & (abs(y + 20) < 17) & (abs(z + 14) < 9)
    mean = tensors[:, 0][:, box].mean(axis=1)

    assert np.corrcoef(mean, _labels(phantoms, "disease"))[0, 1] <= -0.8


def test_dark_voxels_on_one_side_follow_severity(phantoms, tensors):
    x, y, z = _places()
    deep = (abs(x) > 16) & (abs(x) < 48) & (y > -65) & (y < 40) & (z > -2) & (z < 44)
    left, right = ((tensors[:, 0][:, deep & side] < -1.2).sum(axis=1) for side in (x < 0, x > 0))

    severity = _labels(phantoms, "severity")
    excess = abs(left - right)
    assert np.corrcoef(excess, severity)[0, 1] >= 0.8
    assert np.corrcoef(excess[severity > 0], severity[severity > 0])[0, 1] >= 0.8


# --- Labels that can be learnt --------------------------------------------------------------------


@pytest.mark.slow
def test_small_network_learns_every_label_from_300_patients(phantoms, tensors):
    train, epochs, batch = 300, 5, 10
    more = [[make_phantom(patient, spacing=4.0)] for patient in range(PATIENTS, train + 100)]
    inputs = torch.cat([torch.from_numpy(tensors[:, :1]), torch.stack([_tensor(scans[0]) for scans in more])])
    names = ("sex", "disease", "age", "severity")
    values = np.stack([_labels(phantoms + more, name) for name in names], axis=1)
    targets = torch.from_numpy((values - values[:train].mean(axis=0)) / values[:train].std(axis=0)).float()

    torch.manual_seed(0)
    widths = (1, 16, 32, 64, 128)
    halved = [
        nn.Sequential(nn.Conv3d(*pair, 3, stride=2, padding=1, bias=False), nn.BatchNorm3d(pair[1]), nn.ReLU())
        for pair in pairwise(widths)
    ]
    model = nn.Sequential(*halved, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(widths[-1], len(names)))
    model, inputs = (each.to(memory_format=torch.channels_last_3d) for each in (model, inputs))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * train // batch)
    for _ in range(epochs):
        for chosen in torch.randperm(train).split(batch):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(inputs[chosen]), targets[chosen]).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.inference_mode():
        found = model(inputs[train:]).numpy()

    scores = {name: roc_auc_score(values[train:, n], found[:, n]) for n, name in enumerate(names[:2])}
    scores |= {name: r2_score(targets[train:, n], found[:, n]) for n, name in enumerate(names[2:], start=2)}
    assert min(scores["sex"], scores["disease"]) >= 0.9
    assert min(scores["age"], scores["severity"]) >= 0.5


def _tensor(phantom):
    scan = brainfm.load_scan(
        (phantom.image, phantom.affine), (phantom.mask, phantom.affine), spec=SPEC_4MM, on_mismatch="raise"
    )
    return torch.from_numpy(SPEC_4MM.apply(scan).image)


def _masks(phantoms):
    return np.stack([scans[0].mask.T > 0 for scans in phantoms])


def _labels(phantoms, name):
    return np.array([getattr(scans[0].labels, name) for scans in phantoms], dtype=float)


def _places():
    """RAS mm of the tensors' voxels, [z, y, x] each."""
    grid = SPEC_4MM.grid
    axes = [start + 4.0 * np.arange(size) for start, size in zip(grid.origin, grid.shape, strict=True)]
    return [axis.T for axis in np.meshgrid(*axes, indexing="ij")]
