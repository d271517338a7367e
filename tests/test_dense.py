"""Dense features: a NIfTI a scan whose cells lie, in the scan's own world, where they look."""

from __future__ import annotations

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

import brainfm
from brainfm import ScanError
from brainfm.contract import CropBox, InputSpec, Pad, Readout, Transpose, Window
from brainfm.dense import dense_affine, dense_paths, write_dense
from brainfm.manifest import ScanRecord
from brainfm.models.encoder import Encoder, stage
from brainfm.readout import Reader


class Toy(Encoder):
    """Cells of some voxels, each by itself."""

    classifier_name = "head"
    first_conv = "body"
    seen: int = 0

    def __init__(self, steps=(2, 3, 4)):
        super().__init__(0, 1, None, 0.0)
        self.body = nn.Conv3d(1, 5, steps, stride=steps)
        self.num_features = 5
        self.feature_info = [stage("body", 5, steps, tuple((step - 1) / 2 for step in steps))]
        self.reset_classifier(0)

    def forward_features(self, x):
        Toy.seen += len(x)
        return super().forward_features(x)


# A contract that turns, crops and pads: what becomes of a voxel is not to be guessed.
TURNING = InputSpec(
    representation="any contrast",
    channels=("any",),
    orientation="RAS",
    operations=(Transpose(axes=(2, 0, 1)), CropBox(start=(1, 0, 3), stop=(19, 24, 27)), Pad(shape=(20, 27, 28))),
)


def toy(spec: InputSpec = TURNING, readout: Readout | None = None, **arguments) -> Toy:
    torch.manual_seed(0)
    model = Toy(**arguments).eval()
    model.pretrained_cfg = brainfm.PretrainedCfg(architecture="toy", input_spec=spec, readout=readout or Readout())
    return model


# Axes run to the front, to the left and down; there is an offset, and no two spacings are the same.
AFFINE = np.array([[0, -1.5, 0, 20.5], [2.0, 0, 0, -31], [0, 0, -3.0, 44], [0, 0, 0, 1]])
SHAPE = (28, 26, 21)


def world(affine: np.ndarray, voxel) -> np.ndarray:
    return affine[:3, :3] @ np.asarray(voxel) + affine[:3, 3]


def scan(folder, name="scan", blob=None, shape=SHAPE):
    """A file of noise, with a brighter voxel where one is wanted."""
    values = np.random.default_rng(0).random(shape).astype(np.float32)
    if blob is not None:
        values[blob] += 20
    path = folder / f"{name}.nii.gz"
    nib.Nifti1Image(values, AFFINE).to_filename(path)
    return path


def largest_change(before, after) -> tuple[np.ndarray, np.ndarray]:
    """RAS mm of the cell that changed most, and mm from one cell to the next along the world's axes."""
    one, other = nib.load(before), nib.load(after)
    np.testing.assert_array_equal(one.affine, other.affine)
    change = np.linalg.norm(other.get_fdata() - one.get_fdata(), axis=-1)
    cell = np.unravel_index(change.argmax(), change.shape)
    return world(one.affine, cell), np.abs(one.affine[:3, :3]).sum(axis=1)


@pytest.mark.parametrize("blob", [(5, 4, 3), (20, 11, 15), (13, 20, 9), (8, 15, 17)])
def test_blob_lies_in_the_cell_that_changed_most_in_the_scans_own_world(blob, tmp_path):
    paths = [scan(tmp_path, "without"), scan(tmp_path, "with", blob)]
    table = brainfm.embed(paths, toy(), dense=tmp_path / "maps")
    place, step = largest_change(*table.columns()["dense_path"])
    assert (np.abs(place - world(AFFINE, blob)) <= step / 2 + 1e-6).all()
    image = nib.load(table.columns()["dense_path"][0])
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    assert image.shape == (24 // 3 + 1, 28 // 4, 20 // 2, 5)  # [x, y, z, C]
    np.testing.assert_allclose(step, np.array([1.5 * 3, 2.0 * 4, 3.0 * 2]))


def test_every_cell_is_centred_on_the_voxels_that_it_is_made_of(tmp_path):
    """Not one blob: the map of a network that averages is the scan, resampled to the cells."""
    model = toy()
    model.body.weight.data.fill_(1 / model.body.weight[0].numel())
    model.body.bias.data.zero_()
    index = np.stack(np.indices(SHAPE), axis=-1)
    coordinates = np.moveaxis(index @ AFFINE[:3, :3].T + AFFINE[:3, 3], -1, 0)  # the scan holds its own RAS mm
    for axis in range(3):
        path = tmp_path / f"axis{axis}.nii.gz"
        nib.Nifti1Image(coordinates[axis].astype(np.float32), AFFINE).to_filename(path)
        (file,) = brainfm.embed([path], model, dense=tmp_path, dense_dtype="float32").columns()["dense_path"]
        image = nib.load(file)
        cells = np.stack(np.indices(image.shape[:3]), axis=-1) @ image.affine[:3, :3].T + image.affine[:3, 3]
        inside = tuple(slice(1, -1) for _ in range(3))  # cells at the border hold padding
        np.testing.assert_allclose(image.get_fdata()[inside][..., 0], cells[inside][..., axis], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "blob"),
    [
        ("test_vit_3d", (20, 30, 22)),
        ("test_vit_3d", (30, 15, 12)),
        ("test_resnet_3d", (15, 31, 15)),
        ("test_resnet_3d", (31, 15, 15)),
    ],
)
def test_blob_in_a_brain_lies_in_the_cell_of_a_packaged_model_that_changed_most(name, blob, small_sample, tmp_path):
    image = nib.load(small_sample[0])
    affine = image.affine @ np.array(
        [[-1.0, 0, 0, image.shape[0] - 1], [0, 1, 0, 0], [0, 0, -1, image.shape[2] - 1], [0, 0, 0, 1]]
    )
    values = np.asarray(image.dataobj)
    scans = []
    for kind, more in (("without", 0.0), ("with", 1.0)):
        changed = values.copy()
        changed[tuple(slice(at - 1, at + 2) for at in blob)] += more * values.max()
        path = tmp_path / f"{kind}.nii.gz"
        nib.Nifti1Image(changed[::-1, :, ::-1], affine).to_filename(path)  # stored with two axes turned round
        scans.append(path)
    table = brainfm.embed(scans, name, dense=tmp_path / "maps")
    assert not table.errors
    place, step = largest_change(*table.columns()["dense_path"])
    assert (np.abs(place - world(image.affine, blob)) <= step / 2 + 1e-6).all()


# --- The map --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_resnet_3d", "test_vit_3d"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_map_in_the_file_is_that_of_the_model(name, dtype, small_sample, tmp_path):
    model = brainfm.create_model(name, pretrained=True)
    volume = brainfm.create_transform(model).volume(*small_sample)
    with torch.inference_mode():
        wanted = brainfm.optimize(model, dtype).dense(torch.from_numpy(volume.image)[None])[0].numpy()
    table = brainfm.embed([small_sample], model, dense=tmp_path, dense_dtype="float32", dtype=dtype)
    image = nib.load(table.columns()["dense_path"][0])
    turned = nib.io_orientation(dense_affine(volume.affine, model.feature_info[-1]))
    found = image.get_fdata(dtype=np.float32)
    np.testing.assert_array_equal(nib.apply_orientation(np.moveaxis(wanted, 0, -1), turned), found)
    plain = brainfm.embed([small_sample], model, dtype=dtype)
    np.testing.assert_allclose(table.vectors, plain.vectors, rtol=1e-5, atol=1e-5)


def test_numbers_are_rounded_to_half_precision_unless_asked_otherwise(tmp_path):
    cells = (np.random.default_rng(0).standard_normal((3, 20, 30, 40)) * 100).astype(np.float32)
    for dtype, wanted in (("float16", cells.astype(np.float16).astype(np.float32)), ("float32", cells)):
        write_dense(cells, np.eye(4), tmp_path / f"{dtype}.nii.gz", dtype)
        image = nib.load(tmp_path / f"{dtype}.nii.gz")
        assert image.get_data_dtype() == np.float32
        np.testing.assert_array_equal(image.get_fdata(dtype=np.float32), np.moveaxis(wanted, 0, -1))
        assert image.header.get_xyzt_units()[0] == "mm"
    assert (tmp_path / "float16.nii.gz").stat().st_size < 0.8 * (tmp_path / "float32.nii.gz").stat().st_size


def test_numbers_that_half_precision_cannot_hold_are_not_rounded(tmp_path):
    cells = np.array([1e6, 0.1, -3], dtype=np.float32).reshape(1, 1, 1, 3)
    write_dense(cells, np.eye(4), tmp_path / "map.nii")
    np.testing.assert_array_equal(nib.load(tmp_path / "map.nii").get_fdata(dtype=np.float32)[..., 0], cells[0])


def test_same_map_gives_the_same_bytes(tmp_path):
    cells = np.random.default_rng(0).random((3, 2, 3, 4)).astype(np.float32)
    for name in ("one.nii.gz", "two.nii.gz"):
        write_dense(cells, AFFINE, tmp_path / name)
    assert (tmp_path / "one.nii.gz").read_bytes() == (tmp_path / "two.nii.gz").read_bytes()


# --- Windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20, 27, 28), (12, 12, 12), (6, 30, 4)])
@pytest.mark.parametrize("width", [(8, 9, 12), (20, 27, 28), (2, 3, 4), (5, 7, 9)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.8])
def test_map_of_windows_is_that_of_the_volume_where_cells_see_no_further(shape, width, overlap):
    model, x = toy(), torch.randn(2, 1, *shape)
    windowed = Reader(model, Readout("avg", Window(width, overlap)), dense=True)(x)
    with torch.inference_mode():
        wanted = model.dense(x)
    torch.testing.assert_close(windowed.maps, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", [1, 3])
def test_map_of_windows_of_strided_points_is_that_of_the_volume(kernel):
    """Strides round up here, and the first cell is centred on the first voxel."""
    model = toy(steps=(1, 1, 1))
    model.body = nn.Conv3d(1, 5, kernel, stride=2, padding=kernel // 2)
    model.feature_info = [stage("body", 5, (2, 2, 2))]
    x = torch.randn(1, 1, 13, 14, 15)
    maps = Reader(model, Readout("avg", Window((8, 8, 8), 0.5)), dense=True)(x).maps
    with torch.inference_mode():
        wanted = model.dense(x)
    assert maps.shape == wanted.shape == (1, 5, 7, 7, 8)
    if kernel == 1:
        torch.testing.assert_close(maps, wanted)
    else:  # windows' borders show
        assert not torch.allclose(maps, wanted, rtol=1e-3)
        torch.testing.assert_close(maps[..., :2, :2, :2], wanted[..., :2, :2, :2])


def test_map_of_windows_is_written_in_the_scans_world(tmp_path):
    readout = Readout("avg", Window((8, 9, 8), 0.5))
    path = scan(tmp_path)
    files = [
        brainfm.embed([path], toy(readout=given), dense=tmp_path / name).columns()["dense_path"][0]
        for name, given in (("whole", None), ("windows", readout))
    ]
    whole, windows = map(nib.load, files)
    np.testing.assert_array_equal(whole.affine, windows.affine)
    np.testing.assert_allclose(windows.get_fdata(), whole.get_fdata(), atol=1e-3)


# --- Files ----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    monkeypatch.setattr(Toy, "seen", 0)


def test_table_names_the_file_of_every_scan_that_has_one(tmp_path):
    good, bad = scan(tmp_path), tmp_path / "missing.nii.gz"
    records = [ScanRecord(good, patient_id="sub-01", scan_id="ses-2"), ScanRecord(bad, patient_id="sub-02")]
    table = brainfm.embed(records, toy(), dense=tmp_path / "maps", output=tmp_path / "out.csv")
    assert table.columns()["dense_path"] == [str(tmp_path / "maps" / "sub-01_ses-2_dense.nii.gz")]
    assert [path.name for path in (tmp_path / "maps").iterdir()] == ["sub-01_ses-2_dense.nii.gz"]
    assert brainfm.table.read(tmp_path / "out.csv").columns() == table.columns()
    assert "dense_path" not in (tmp_path / "out.errors.csv").read_text()


def test_scans_of_the_same_name_get_files_of_their_own(tmp_path):
    records = [
        ScanRecord(tmp_path / "a" / "T1w.nii.gz", None, "sub-01", ""),
        ScanRecord(tmp_path / "b" / "T1w.nii.gz", None, "sub-01", ""),
        ScanRecord(tmp_path / "c" / "T1w.nii.gz", None, "SUB-01", ""),  # the same to some file systems
        ScanRecord(tmp_path / "d" / "T1w.nii.gz", None, "sub/02", ""),
        ScanRecord(tmp_path / "d" / "T1w.nii.gz", tmp_path / "mask.nii.gz", "sub/02", ""),
        ScanRecord((np.zeros((2, 2, 2)), np.eye(4))),
        ScanRecord((np.zeros((2, 2, 2)), np.eye(4))),
        ScanRecord(tmp_path / "e.nii.gz", None, "sub-03", "ses-1"),
    ]
    paths = dense_paths(records, tmp_path)
    assert len({str(path).casefold() for path in paths}) == len(records)
    assert paths[-1].name == "sub-03_ses-1_dense.nii.gz"
    assert all(path.parent == tmp_path for path in paths)
    assert dense_paths(records[1:2] + records[:1], tmp_path) == [paths[1], paths[0]]  # whatever their order


def test_two_records_of_one_patient_without_a_scan_id_are_both_written(tmp_path):
    records = [ScanRecord(scan(tmp_path, name, blob), None, "p1") for name, blob in (("a", None), ("b", (9, 9, 9)))]
    files = brainfm.embed(records, toy(), dense=tmp_path / "maps").columns()["dense_path"]
    one, other = (nib.load(file).get_fdata() for file in files)
    assert not np.array_equal(one, other)


class Stopped(Exception):
    """The run was interrupted."""


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """Three scans, of which an interrupted run did two."""
    paths = [scan(tmp_path, f"scan{n}", (9 + n, 9, 9)) for n in range(3)]
    write = brainfm.embed.__globals__["write_dense"]
    written = []

    def stop(*arguments):
        if len(written) == 2:
            raise Stopped
        written.append(arguments)
        write(*arguments)

    with monkeypatch.context() as patched:
        patched.setitem(brainfm.embed.__globals__, "write_dense", stop)
        with pytest.raises(Stopped):
            brainfm.embed(paths, toy(), output=tmp_path / "out.csv", dense=tmp_path / "maps")
    Toy.seen = 0
    return paths


def test_resumed_run_does_what_is_left(interrupted, tmp_path):
    table = brainfm.embed(interrupted, toy(), output=tmp_path / "out.csv", dense=tmp_path / "maps")
    assert Toy.seen == 1
    assert len(table) == 3


def test_resumed_run_redoes_a_scan_whose_dense_file_is_missing(interrupted, tmp_path):
    first = dense_paths([ScanRecord(path) for path in interrupted], tmp_path / "maps")[0]
    content = first.read_bytes()
    first.unlink()
    brainfm.embed(interrupted, toy(), output=tmp_path / "out.csv", dense=tmp_path / "maps")
    assert Toy.seen == 2
    assert first.read_bytes() == content


@pytest.mark.parametrize("change", [{"dense_dtype": "float32"}, {"dense": "elsewhere"}])
def test_run_with_other_maps_does_not_go_on_from_there(change, interrupted, tmp_path):
    options = {"dense": "maps"} | change
    table = brainfm.embed(
        interrupted, toy(), output=tmp_path / "out.csv", **options | {"dense": tmp_path / options["dense"]}
    )
    assert Toy.seen == 3
    assert all(nib.load(file).shape[3] == 5 for file in table.columns()["dense_path"])


def test_maps_that_another_model_left_are_not_taken(interrupted, tmp_path):
    """The rows of a run without maps say nothing of the files that lie there."""
    other = toy()
    other.body.weight.data *= 2
    with pytest.raises(ScanError):
        brainfm.embed([*interrupted, tmp_path / "none.nii"], other, output=tmp_path / "b.csv", on_error="raise")
    Toy.seen = 0
    table = brainfm.embed(interrupted, other, output=tmp_path / "b.csv", dense=tmp_path / "maps")
    assert Toy.seen == 3
    fresh = brainfm.embed(interrupted, other, dense=tmp_path / "fresh")
    for found, wanted in zip(table.columns()["dense_path"], fresh.columns()["dense_path"], strict=True):
        np.testing.assert_array_equal(nib.load(found).get_fdata(), nib.load(wanted).get_fdata())


def test_folder_that_is_a_file_is_refused_before_any_work(tmp_path):
    (tmp_path / "maps").write_text("text")
    with pytest.raises(ScanError, match="maps: dense features are written to a folder"):
        brainfm.embed([scan(tmp_path)], toy(), dense=tmp_path / "maps")
    assert Toy.seen == 0


def test_module_that_is_no_encoder_is_refused_before_any_work(tmp_path):
    module = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten())
    module.pretrained_cfg = brainfm.PretrainedCfg(input_spec=TURNING)
    with pytest.raises(ValueError, match="no dense features"):
        brainfm.embed([scan(tmp_path)], module, dense=tmp_path / "maps")
    assert not (tmp_path / "maps").exists()


def test_several_models_have_folders_of_their_own(tmp_path):
    second = toy(spec=replace(TURNING, operations=()), steps=(2, 2, 3))
    second.pretrained_cfg = replace(second.pretrained_cfg, architecture="other")
    tables = brainfm.embed([scan(tmp_path)], [toy(), second], dense=tmp_path / "maps")
    files = [table.columns()["dense_path"][0] for table in tables]
    assert [file.split("/")[-2] for file in files] == ["toy", "other"]
    assert nib.load(files[0]).shape != nib.load(files[1]).shape
