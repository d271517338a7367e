"""A prepared scan's folder: resampled once, from its own voxels, to whatever a contract starts from."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from prepared_folders import AFFINE, OWN, RIGID, SHAPE, moved_head, write
from scipy import ndimage

import brainfm
from brainfm.assets import SAMPLE_MASK, SAMPLE_SCAN
from brainfm.batches import prepared_scans
from brainfm.contract import Grid, InputSpec
from brainfm.errors import ScanError
from brainfm.manifest import ScanRecord
from brainfm.prep.store import save
from brainfm.scan.prepared import for_contract, read_prepared
from brainfm.scan.resample import reach, resample
from brainfm.transforms import InputTransform

GRID = Grid((91, 109, 91), (2.0, 2.0, 2.0), (-90.0, -126.0, -72.0))


def grid_points(grid: Grid) -> np.ndarray:
    """[4, i, j, k] RAS mm."""
    return np.tensordot(grid.affine("RAS"), np.stack([*np.indices(grid.shape), np.ones(grid.shape)]), 1)


@pytest.fixture(scope="module")
def head_and_brain():
    return moved_head()


@pytest.fixture(scope="module")
def prepared(head_and_brain, tmp_path_factory):
    return write(tmp_path_factory.mktemp("prepared") / "sub-07_ses-a", *head_and_brain)


@pytest.fixture(scope="module")
def contract(spec) -> InputSpec:
    """What many start from: the brain on MNI152's voxels of 2 mm."""
    return replace(spec, grid=GRID, operations=(), output_shape=None, registration="rigid")


def sampled(folder, name, grid, matrix="rigid"):
    """The stored voxels at the grid's points, by SciPy."""
    image = nib.load(folder / name)
    matrix = np.array(json.loads((folder / "prep.json").read_text())[matrix])
    to_voxels = np.linalg.inv(image.affine) @ np.linalg.inv(matrix) @ grid.affine("RAS")
    return ndimage.affine_transform(
        image.get_fdata(), to_voxels[:3, :3], to_voxels[:3, 3], grid.shape, order=1, mode="grid-constant"
    )


def test_rigid_contract_is_one_linear_interpolation_from_the_stored_voxels(prepared, contract):
    scan = brainfm.load_scan(prepared, spec=contract)
    brain = sampled(prepared, "brain_mask.nii.gz", GRID) > 0.5
    assert np.array_equal(scan.mask, brain)
    assert np.allclose(scan.image[0], sampled(prepared, "head.nii.gz", GRID) * brain, atol=1e-3)
    assert np.array_equal(scan.affine, GRID.affine("RAS"))
    assert scan.notes == ("resampled once from its own 2×2×2.5 mm voxels, by its rigid registration",)


def test_affine_contract_takes_the_affine_matrix(prepared, contract):
    scan = brainfm.load_scan(prepared, spec=replace(contract, registration="linear"))
    brain = sampled(prepared, "brain_mask.nii.gz", GRID, matrix="affine") > 0.5
    assert np.allclose(scan.image[0], sampled(prepared, "head.nii.gz", GRID, matrix="affine") * brain, atol=1e-3)


def test_folder_is_read_once_for_several_contracts_and_resampled_for_each(prepared, contract, monkeypatch):
    opened, real = Counter(), brainfm.scan.read.open_packed
    monkeypatch.setattr(
        brainfm.scan.read, "open_packed", lambda path, *more: opened.update([path.name]) or real(path, *more)
    )
    transforms = [InputTransform(replace(contract, registration=how)) for how in ("rigid", "linear")]
    ((_, made),) = prepared_scans([ScanRecord(prepared)], [(0, [0, 1])], transforms, 0, 1)
    assert opened == {"head.nii.gz": 1, "brain_mask.nii.gz": 1}
    rigid, linear = (scan.tensor for _, scan in made)
    assert torch.equal(rigid, transforms[0](prepared))
    assert torch.equal(linear, transforms[1](prepared))
    assert not torch.equal(rigid, linear)


def test_contract_of_another_orientation_is_the_same_image(prepared, contract):
    turned = Grid((109, 91, 91), (2.0, 2.0, 2.0), (-90.0, 90.0, -72.0))  # first voxel: left, front, below
    scan = brainfm.load_scan(prepared, spec=replace(contract, orientation="PRS", grid=turned))
    straight = brainfm.load_scan(prepared, spec=contract).image[0]
    assert np.allclose(scan.image[0], straight.transpose(1, 0, 2)[::-1], atol=1e-3)


def test_contract_of_mni152_without_a_grid_gets_the_templates(prepared, contract):
    free = replace(contract, grid=None, orientation="RAS")
    scan = brainfm.load_scan(prepared, spec=free)
    assert scan.shape == (193, 229, 193)
    assert scan.affine[:3, 3].tolist() == [-96, -132, -78]
    fsl = brainfm.load_scan(prepared, spec=replace(free, space="MNI152NLin6Asym", registration="affine"))
    assert fsl.shape == (182, 218, 182)
    assert fsl.affine[:3, 3].tolist() == [-91, -126, -72]


def test_contract_of_fsls_template_is_reached_through_its_matrix_and_says_so(tmp_path, contract):
    """An image that rises along MNI152's axes: interpolated linearly it is exact, wherever it is looked at."""
    slopes, numbers = np.array([2.0, 3.0, 5.0]), np.stack([*np.indices(SHAPE), np.ones(SHAPE)])
    head = 1000 + np.tensordot(slopes, np.tensordot(AFFINE @ OWN, numbers, 1)[:3], 1)
    folder = write(tmp_path / "scan", head.astype(np.float32), np.ones(SHAPE, dtype=bool))
    spec = replace(contract, space="MNI152NLin6Asym", registration="affine", skull_strip="any", mask="none")
    scan = read_prepared(folder)
    volume, notes = for_contract(scan, spec, "T1w", scan)
    fsl_to_2009 = np.array(
        [
            [1.01303, 0.00029, -0.00079, -0.54005],
            [-0.01575, 1.0117, 0.00852, 0.35138],
            [0.00046, -0.01213, 1.02396, -0.20205],
        ]
    )
    expected = 1000 + np.tensordot(slopes, np.tensordot(fsl_to_2009, grid_points(GRID), 1), 1)
    inner = (slice(20, 70), slice(30, 80), slice(20, 70))
    assert np.allclose(volume.image[0][inner], expected[inner], atol=1.5 * scan.head.slope)
    assert "by one matrix to FSL's MNI152, which leaves about a millimetre" in notes[0]


def test_native_contract_takes_the_voxels_as_they_are(prepared, head_and_brain, contract):
    native = replace(contract, space=None, registration="none", grid=None, orientation="LPS")
    scan = brainfm.load_scan(prepared, spec=native)
    stored = nib.load(prepared / "head.nii.gz").get_fdata(dtype=np.float32) * head_and_brain[1]
    assert np.array_equal(scan.image[0], stored[::-1, ::-1])
    whole = brainfm.load_scan(prepared, spec=replace(native, skull_strip="any", mask="none"))
    assert whole.image[0][~scan.mask].max() > 200  # the scalp
    assert whole.mask is None


def test_steps_of_a_stored_head_are_as_fine_as_they_say(prepared, head_and_brain):
    head, _ = head_and_brain
    storage = json.loads((prepared / "prep.json").read_text())["storage"]
    error = np.abs(nib.load(prepared / "head.nii.gz").get_fdata() - head).max()
    assert error <= storage["step"] / 2 * 1.001
    assert storage["fraction_of_bright_brain"] <= 1 / 2000
    assert storage["bytes"] == (prepared / "head.nii.gz").stat().st_size


def test_whole_numbers_are_stored_as_they_are(tmp_path):
    head = np.random.default_rng(0).integers(-40, 1200, (20, 20, 20)).astype(np.float32)
    folder = write(tmp_path / "scan", head, head > 500)
    assert np.array_equal(nib.load(folder / "head.nii.gz").get_fdata(), head)


def test_head_of_much_noise_gets_coarser_steps_up_to_a_limit(tmp_path, monkeypatch):
    head = np.random.default_rng(0).uniform(0, 1000, (30, 30, 30)).astype(np.float32)
    monkeypatch.setattr("brainfm.prep.store.MOST_BYTES", 1000)
    folder = write(tmp_path / "scan", head, np.ones(head.shape, dtype=bool))
    storage = json.loads((folder / "prep.json").read_text())["storage"]
    assert storage["fraction_of_bright_brain"] == pytest.approx(1 / 512, rel=0.01)


def test_contract_of_raw_intensities_gets_the_bias_field_back(tmp_path, head_and_brain, contract):
    head, brain = head_and_brain
    shape = tuple(-(-n // 4) + 1 for n in SHAPE)
    field = np.linspace(-0.3, 0.3, shape[0], dtype=np.float32)[:, None, None] * np.ones(shape, np.float32)
    at_head = 0.6 * np.arange(SHAPE[0])[:, None, None] / (4 * (shape[0] - 1)) - 0.3
    folder = write(tmp_path / "scan", head, brain, field=field, lifted_by=-12.0)
    native = replace(contract, space=None, registration="none", grid=None, skull_strip="any", mask="none")
    stored = nib.load(folder / "head.nii.gz").get_fdata()
    for wanted, expected in (("any", stored), ("removed", stored), ("left", stored * np.exp(at_head) - 12)):
        scan = brainfm.load_scan(folder, spec=replace(native, bias_field=wanted))
        assert np.allclose(scan.image[0], expected, atol=2e-3), wanted
        assert ("the bias field put back" in scan.notes) == (wanted == "left")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"registration": "nonlinear"}, "rigid and affine registration, and this contract takes nonlinear"),
        ({"space": "BrainIAC"}, "lies in the space 'BrainIAC', whose template is not at hand"),
        ({"representation": "T2w", "channels": ("T2w",)}, "a prepared T1w scan, and this contract takes T2w"),
        ({"representation": "grey matter"}, "a prepared T1w scan, and this contract takes grey matter"),
        ({"bias_field": "removed"}, "prepared without bias correction.* --bias n4"),
        ({"intensity_range": (0.0, 1.0)}, "and this contract takes 0 to 1"),
        ({"channels": ("T1w", "T2w")}, "this contract takes 2 channels"),
    ],
)
def test_what_a_prepared_scan_cannot_be_is_refused_by_name(prepared, contract, changes, words):
    with pytest.raises(ScanError, match=words) as refusal:
        brainfm.load_scan(prepared, spec=replace(contract, **changes))
    assert str(prepared) in str(refusal.value)


@pytest.mark.parametrize("words", ["any contrast", "CT or MR"])
def test_any_contrast_or_any_mr_takes_a_prepared_t1w_scan(words, prepared, contract):
    spec = replace(contract, representation=words, channels=(words,))
    assert brainfm.load_scan(prepared, spec=spec).shape == GRID.shape


def test_second_mask_is_refused(prepared, contract):
    with pytest.raises(ScanError, match="holds its own brain mask; pass no other"):
        brainfm.load_scan(prepared, prepared / "brain_mask.nii.gz", spec=contract)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"format": 3}, "written by a later version of brainfm"),
        ({"rigid": [[1, 0], [0, 1]]}, "rigid is no matrix"),
        ({"rigid": "ab"}, "not a record of 'brainfm prep'"),
        ({"affine": None}, "affine registration went astray when the scan was prepared"),
        ({"format": 1}, "prepare the scan again"),
    ],
)
def test_damaged_record_is_refused(tmp_path, head_and_brain, contract, damage, words):
    folder = write(tmp_path / "scan", *head_and_brain)
    record = json.loads((folder / "prep.json").read_text())
    (folder / "prep.json").write_text(json.dumps(record | damage))
    with pytest.raises(ScanError, match=words):
        brainfm.load_scan(folder, spec=replace(contract, registration="affine"))


def test_missing_or_foreign_mask_is_refused(tmp_path, head_and_brain, contract):
    folder = write(tmp_path / "scan", *head_and_brain)
    save(np.ones((5, 5, 5), np.uint8), OWN, folder / "brain_mask.nii.gz")
    with pytest.raises(ScanError, match="prepare the scan again"):
        brainfm.load_scan(folder, spec=contract)
    (folder / "brain_mask.nii.gz").unlink()
    with pytest.raises(ScanError, match=r"brain_mask.nii.gz: no such file"):
        brainfm.load_scan(folder, spec=contract)


def test_channels_come_each_from_its_folder_in_the_first_ones_space(tmp_path, head_and_brain, contract):
    head, brain = head_and_brain
    first = write(tmp_path / "t1w", head, brain)
    other = np.eye(4)
    other[:3, 3] = 4.0, -6.0, 2.5  # whole voxels: 2, −3 and 1
    second = write(tmp_path / "t2w", head.max() - head, brain, contrast="T2w", rigid=(RIGID @ other).tolist())
    native = replace(
        contract, space=None, registration="none", grid=None, channels=("T1w", "T2w"), skull_strip="any", mask="none"
    )
    scan = brainfm.load_scan({"t1w": first, "t2w": second}, spec=native)
    stored = [nib.load(folder / "head.nii.gz").get_fdata(dtype=np.float32) for folder in (first, second)]
    inner = (slice(20, 90), slice(20, 100), slice(20, 60))
    assert np.array_equal(scan.image[0], stored[0])
    # A point of the first is 4, −6, 2.5 mm from that of the second that leads to the same place in MNI152.
    assert np.allclose(scan.image[1][inner], np.roll(stored[1], (2, -3, 1), (0, 1, 2))[inner], atol=0.01)
    with pytest.raises(ScanError, match="a prepared T1w scan, and this contract takes T2w here"):
        brainfm.load_scan({"t1w": first, "t2w": first}, spec=native)
    with pytest.raises(ScanError, match="beside prepared scans, each channel is the folder of one"):
        brainfm.load_scan({"t1w": first, "t2w": second / "head.nii.gz"}, spec=native)


# --- Wherever scans go in -------------------------------------------------------------------------


def test_folder_goes_into_transform_embed_and_a_manifest(prepared, small_model, tmp_path):
    tensor = brainfm.create_transform(small_model)(prepared)
    assert tuple(tensor.shape) == (1, 40, 48, 48)
    tables = [brainfm.embed(scans, small_model) for scans in (prepared.parent, prepared, [prepared])]
    manifest = tmp_path / "manifest.csv"
    manifest.write_text(f"image_path,patient_id\n{prepared},anna\n")
    tables.append(brainfm.embed(manifest, small_model))
    for table in tables:
        assert not table.errors
        assert np.array_equal(table.vectors, tables[0].vectors)
        assert table.columns()["qc"] == ["pass"]
        assert table.records[0].image == str(prepared)
    record = tables[0].records[0]
    assert (record.patient_id, record.scan_id, record.mask) == ("sub-07", "ses-a", None)
    assert tables[3].records[0].patient_id == "anna"


def test_embedding_is_near_that_of_the_brain_where_it_came_from(prepared, small_model):
    """Moved, cut into coarser voxels, stored in steps, and brought back."""
    table = brainfm.embed([prepared, (SAMPLE_SCAN, SAMPLE_MASK)], small_model)
    back, there = table.vectors
    assert back @ there / np.linalg.norm(back) / np.linalg.norm(there) > 0.99


def test_saliency_map_overlays_the_head_in_its_own_space(prepared, small_model):
    """What is hidden and matters lies in the brain, wherever the scanner saw it."""
    from brainfm.downstream.saliency import grad_cam

    found = grad_cam(small_model, prepared, direction=np.ones(128))
    values = np.abs(found.on_scan())
    brain = nib.load(prepared / "brain_mask.nii.gz")
    assert values.shape == brain.shape
    assert np.array_equal(found.scan_affine, brain.affine)
    box = np.argwhere(np.asanyarray(brain.dataobj) > 0)
    inside = np.argwhere(values > 0)
    # The map's field is 160×192×192 mm about the brain: its centre is the brain's, to 20 mm.
    centres = [each.mean(axis=0) @ brain.affine[:3, :3].T for each in (box, inside)]
    assert np.linalg.norm(centres[0] - centres[1]) < 20


def test_head_size_of_a_prepared_scan_is_that_of_its_mask(prepared, head_and_brain, tmp_path):
    from types import SimpleNamespace

    from brainfm.downstream.features import head_sizes
    from brainfm.manifest import list_scans

    sizes = head_sizes(SimpleNamespace(records=list_scans(prepared)), tmp_path / "sizes.json")
    assert sizes == [pytest.approx(head_and_brain[1].sum() * 10 / 1000)]


def test_scan_that_is_prepared_anew_is_another_file(prepared, tmp_path):
    import shutil

    from brainfm.files import file_state

    copy = shutil.copytree(prepared, tmp_path / "copy")
    before = file_state(copy)
    (copy / "prep.json").write_text((copy / "prep.json").read_text() + "\n")
    assert file_state(copy) != before


def test_turboprep_folder_is_a_scan_too(small_sample, small_spec):
    given = brainfm.load_scan(*small_sample, spec=small_spec)
    assert np.array_equal(brainfm.load_scan(small_sample[0].parent, spec=small_spec).image, given.image)


# --- The resampling itself ------------------------------------------------------------------------


@pytest.mark.parametrize("beyond", ["zeros", "border"])
def test_resampling_is_scipys(beyond):
    draw = np.random.default_rng(1)
    image = draw.normal(size=(9, 12, 1 if beyond == "border" else 15)).astype(np.float32)
    matrix = np.eye(4)
    matrix[:3, :3] += draw.normal(0, 0.1, (3, 3))
    matrix[:3, 3] = -1.3, 0.4, 2.2
    mode = {"zeros": "grid-constant", "border": "nearest"}[beyond]
    expected = ndimage.affine_transform(
        image.astype(np.float64), matrix[:3, :3], matrix[:3, 3], (11, 10, 17), order=1, mode=mode
    )
    assert np.allclose(resample(image, matrix, (11, 10, 17), beyond=beyond), expected, atol=1e-6)


def test_whole_voxels_are_copied_to_the_bit():
    image = np.random.default_rng(2).normal(size=(10, 11, 12)).astype(np.float32)
    matrix = np.eye(4)
    matrix[:3, 3] = 2, 3, 1
    assert np.array_equal(resample(image, matrix, (8, 8, 11)), image[2:, 3:, 1:])


BLOCKS = np.random.default_rng(4).random((3, 3, 2)) > 0.5  # of 4×4×4 voxels, the last ones of fewer


@pytest.mark.parametrize("within", [None, BLOCKS], ids=["everywhere", "within blocks"])
def test_several_images_are_resampled_together_as_each_alone(within):
    draw = np.random.default_rng(3)
    images = [*draw.normal(size=(2, 10, 11, 12)).astype(np.float32), draw.random((10, 11, 12)) > 0.5]
    matrix = np.eye(4)
    matrix[:3] += draw.normal(0, 0.2, (3, 4))
    together = resample(images, matrix, (11, 9, 7), within=within)
    assert together.shape == (3, 11, 9, 7)
    for found, image in zip(together, images, strict=True):
        assert np.array_equal(found, resample(image, matrix, (11, 9, 7), within=within))
        assert found.flags.f_contiguous
    if within is not None:
        wanted = within.repeat(4, 0).repeat(4, 1).repeat(4, 2)[:11, :9, :7]
        whole = resample(images, matrix, (11, 9, 7))  # of which another part of the images is looked at
        np.testing.assert_allclose(together, wanted * whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_reach_holds_all_that_a_region_becomes_and_nothing_is_lost_within_it(seed):
    draw = np.random.default_rng(seed)
    region = np.zeros((30, 37, 26), bool)
    low = draw.integers(0, 20, 3)
    region[tuple(slice(n, n + m) for n, m in zip(low, draw.integers(1, 14, 3), strict=True))] = True
    region[tuple(draw.integers(0, region.shape))] = True
    image = draw.normal(size=region.shape).astype(np.float32) * region
    matrix = np.eye(4)
    matrix[:3, :3] = np.diag(draw.choice([-1, 1], 3) * draw.uniform(0.5, 2.6, 3))[draw.permutation(3)]
    matrix[:3, :3] += draw.normal(0, 0.1, (3, 3))
    shape = (24, 31, 28)
    matrix[:3, 3] = np.array(region.shape) / 2 - matrix[:3, :3] @ np.array(shape) / 2 + draw.normal(0, 4, 3)
    whole = resample(image, matrix, shape)
    within = reach(region, matrix, shape)
    np.testing.assert_allclose(resample(image, matrix, shape, within=within), whole, rtol=0, atol=1e-6)
    assert within.shape == (6, 8, 7)
    assert not within.all()


def test_nothing_is_reached_by_nothing_nor_from_afar():
    far = np.eye(4)
    far[:3, 3] = 1000
    assert not reach(np.zeros((9, 9, 9), bool), np.eye(4), (9, 9, 9)).any()
    image = np.ones((9, 9, 9), np.float32)
    assert not reach(image > 0, far, (9, 9, 9)).any()
    assert not resample(image, far, (9, 9, 9)).any()
    assert resample(image, far, (9, 9, 9), beyond="border").all()
    assert not resample(image, np.eye(4), (9, 9, 9), within=reach(image < 0, np.eye(4), (9, 9, 9))).any()


def test_larger_voxels_are_means_of_what_they_hold():
    image = np.random.default_rng(3).normal(size=(16, 16, 16)).astype(np.float32)
    matrix = np.diag([4.0, 2.0, 1.0, 1.0])
    matrix[:3, 3] = 1.5, 0.5, 0
    means = image.reshape(4, 4, 8, 2, 16).mean(axis=(1, 3))
    assert np.allclose(resample(image, matrix, (4, 8, 16)), means, atol=1e-6)
