"""Many scans → a table: whole, in order, with the bad ones listed, and none done twice after an interruption."""

import csv
import gzip
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path

import forked_ranks
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import nn

import brainfm
from brainfm import BrainfmError, ScanError, system
from brainfm.cli import main
from brainfm.contract import InputSpec, Readout
from brainfm.embed import Embeddings
from brainfm.files import held, temporary_path
from brainfm.manifest import ScanRecord
from brainfm.models.encoder import Encoder, stage
from brainfm.report import read_report

module = sys.modules["brainfm.embed"]  # which the function of the same name hides


class Pooled(nn.Module):
    """An encoder for this file: means over 2×2×2 blocks of the tensor, with a weight. Counts and fails on demand."""

    seen: list[int] = []  # noqa: RUF012 - of the class, since `embed` runs a copy
    interrupt_at: int | None = None
    num_features = 8

    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.pretrained_cfg = brainfm.get_pretrained_cfg("test_resnet_3d")

    def forward(self, x):
        if self.interrupt_at is not None and sum(self.seen) >= self.interrupt_at:
            raise KeyboardInterrupt
        self.seen.append(len(x))
        return F.adaptive_avg_pool3d(x, 2).flatten(1) * self.weight


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """Forwards of `Pooled`, as the numbers of scans in each, counted afresh in each test."""
    monkeypatch.setattr(Pooled, "seen", [])
    monkeypatch.setattr(Pooled, "interrupt_at", None)
    return lambda: sum(Pooled.seen)


@pytest.fixture(scope="module")
def originals(tmp_path_factory, small_sample):
    """Six brains of other contrasts, and their mask."""
    folder = tmp_path_factory.mktemp("cohort")
    image = nib.load(small_sample[0])
    voxels = np.asarray(image.dataobj)
    paths = [folder / f"sub-{n:02}_T1w.nii" for n in range(1, 7)]
    for n, path in enumerate(paths):
        contrast = (voxels / voxels.max()) ** (0.7 + 0.15 * n)
        nib.Nifti1Image(contrast.astype(np.float32), image.affine).to_filename(path)
    return paths, small_sample[1]


@pytest.fixture
def pairs(originals):
    paths, mask = originals
    return [(path, mask) for path in paths]


@pytest.fixture
def bad(tmp_path_factory, small_sample):
    """Three scans that fail for different reasons."""
    folder = tmp_path_factory.mktemp("bad")
    image = nib.load(small_sample[0])
    nib.Nifti1Image(np.asarray(image.dataobj)[:, :, ::-1], image.affine).to_filename(folder / "upside_down.nii")
    (folder / "notes.nii").write_text("not an image, but long enough to hold a header of 348 bytes" * 10)
    return [folder / "upside_down.nii", folder / "missing.nii", folder / "notes.nii"]


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def numbers(path, width=8):
    return np.array([[np.float32(row[f"e{n}"]) for n in range(width)] for row in rows(path)])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- The table ------------------------------------------------------------------------------------


def test_each_vector_is_the_models_on_the_transforms_tensor(pairs):
    model = Pooled()
    table = brainfm.embed(pairs, model)
    transform = brainfm.create_transform(model)
    for pair, vector in zip(pairs, table.vectors, strict=True):
        np.testing.assert_array_equal(vector, model(transform(*pair)[None])[0].detach().numpy())
    assert table.vectors.dtype == np.float32
    assert table.errors == []


@pytest.mark.parametrize("num_workers", [0, 1, 4])
def test_rows_keep_the_order_of_the_scans(pairs, num_workers):
    order = [4, 0, 5, 2, 1, 3, 0]
    forward = brainfm.embed(pairs, Pooled()).vectors
    table = brainfm.embed([pairs[n] for n in order], Pooled(), batch_size=2, num_workers=num_workers)
    assert [record.image for record in table.records] == [str(pairs[n][0]) for n in order]
    np.testing.assert_array_equal(table.vectors, forward[order])
    assert len(np.unique(forward, axis=0)) == len(pairs)


def test_batch_size_and_workers_change_vectors_by_rounding_only(pairs, small_model):
    alone = brainfm.embed(pairs[:3], small_model, batch_size=1, num_workers=0).vectors
    for batch_size, num_workers in ((2, 2), (3, 1)):
        found = brainfm.embed(pairs[:3], small_model, batch_size=batch_size, num_workers=num_workers).vectors
        assert np.linalg.norm(found - alone) <= 1e-6 * np.linalg.norm(alone)


def test_batches_are_full_but_for_the_last(pairs):
    brainfm.embed(pairs[:5], Pooled(), batch_size=2)
    assert Pooled.seen == [2, 2, 1]


def test_model_may_be_named(small_sample, small_model):
    table = brainfm.embed([small_sample], "test_resnet_3d")
    expected = brainfm.embed([small_sample], small_model)
    np.testing.assert_array_equal(table.vectors, expected.vectors)


def test_models_own_mode_and_weights_stay_as_they_are(pairs):
    model = Pooled().train()
    brainfm.embed(pairs[:1], model)
    assert model.training
    assert model.weight.requires_grad


def test_table_is_an_array_to_numpy(pairs):
    table = brainfm.embed(pairs[:2], Pooled())
    assert len(table) == 2
    assert np.asarray(table).shape == (2, 8)
    assert np.asarray(table, dtype=np.float64).dtype == np.float64


def test_images_in_memory_are_embedded(pairs):
    image, mask = (nib.load(path) for path in pairs[0])
    array = (np.asarray(image.dataobj), image.affine)
    table = brainfm.embed([(image, mask), (array, mask), array], Pooled())
    from_file = brainfm.embed([pairs[0], pairs[0][0]], Pooled())
    np.testing.assert_array_equal(table.vectors, from_file.vectors[[0, 0, 1]])
    assert table.columns()["image_path"] == ["", "", ""]


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"num_workers": -1}, {"on_error": "ignore"}, {"dtype": "float8"}]
)
def test_wrong_options_are_value_errors_before_any_work(options, pairs, counted):
    with pytest.raises(ValueError, match=next(iter(options))):
        brainfm.embed(pairs, Pooled(), **options)
    assert counted() == 0


def test_unknown_table_format_is_refused_before_any_work(pairs, tmp_path, counted):
    with pytest.raises(ScanError, match=r"out\.xlsx: a table is written as \.csv, \.parquet, \.npz"):
        brainfm.embed(pairs, Pooled(), output=tmp_path / "out.xlsx")
    assert counted() == 0


def test_output_that_is_a_folder_is_refused_before_any_work(pairs, tmp_path, counted):
    (tmp_path / "out.csv").mkdir()
    with pytest.raises((ScanError, OSError), match=r"out\.csv"):
        brainfm.embed(pairs, Pooled(), output=tmp_path / "out.csv")
    assert counted() == 0


def test_model_without_a_contract_is_refused(pairs):
    with pytest.raises(ValueError, match="no input contract"):
        brainfm.embed(pairs, nn.Flatten())


# --- Scans of several shapes ----------------------------------------------------------------------


class Means(nn.Module):
    """The mean of the image and the number of its voxels, of any shape; some shapes it refuses."""

    num_features = 2
    most_voxels = 10**9
    refused = ()
    shapes: list = []  # noqa: RUF012 - of the class, since `embed` runs a copy

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        spec = InputSpec(representation="any contrast", channels=("any",))
        self.pretrained_cfg = brainfm.PretrainedCfg(architecture="means", input_spec=spec)

    def forward(self, x):
        if x.shape[2] in self.refused:
            raise ValueError(f"the network takes no volume of\n{list(x.shape[2:])}")
        if x.numel() > self.most_voxels:
            raise torch.OutOfMemoryError("there is no memory")
        self.shapes.append(tuple(x.shape))
        return torch.stack([x.mean(dim=(1, 2, 3, 4)), torch.full((len(x),), float(x[0].numel()))], dim=1) * self.weight


def striped(depth, mean):
    """Voxels [depth, 3, 4] that are not all the same."""
    return (np.tile([0.5, 1.5], (depth, 3, 2)) * mean).astype(np.float32)


@pytest.fixture
def of_shapes(monkeypatch):
    """A function (depths) → scans in memory of these depths, each of its own brightness."""
    monkeypatch.setattr(Means, "shapes", [])

    def make(*depths):
        return [(striped(depth, n + 1), np.eye(4)) for n, depth in enumerate(depths)]

    return make


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_scans_of_unequal_tensors_go_in_batches_by_their_shape(batch_size, of_shapes):
    depths = [5, 5, 7, 5, 5, 5, 5, 5, 6]
    table = brainfm.embed(of_shapes(*depths), Means(), batch_size=batch_size)
    assert table.errors == []
    np.testing.assert_allclose(table.vectors[:, 0], np.arange(len(depths)) + 1)
    np.testing.assert_array_equal(table.vectors[:, 1], np.array(depths) * 12)
    sizes = {1: [1] * 9, 2: [2, 1, 2, 2, 1, 1], 4: [2, 1, 4, 1, 1]}[batch_size]
    assert [shape[0] for shape in Means.shapes] == sizes


@pytest.mark.parametrize("batch_size", [1, 4])
def test_scan_that_the_network_refuses_fails_alone(batch_size, of_shapes, monkeypatch):
    monkeypatch.setattr(Means, "refused", (7,))
    table = brainfm.embed(of_shapes(5, 7, 5, 5), Means(), batch_size=batch_size)
    assert [int(value) for value in table.vectors[:, 0]] == [1, 3, 4]
    ((_, reason),) = table.errors
    assert reason == "scan 1: ValueError: the network takes no volume of [7, 3, 4]"
    with pytest.raises(ScanError, match="scan 1: ValueError"):
        brainfm.embed(of_shapes(5, 7, 5, 5), Means(), batch_size=batch_size, on_error="raise")


def test_batch_that_the_memory_does_not_hold_goes_one_by_one(of_shapes, monkeypatch):
    monkeypatch.setattr(Means, "most_voxels", 100)
    table = brainfm.embed(of_shapes(5, 5, 5, 9, 5), Means(), batch_size=3)
    assert [int(value) for value in table.vectors[:, 0]] == [1, 2, 3, 5]
    assert [shape[0] for shape in Means.shapes] == [1, 1, 1, 1]
    ((_, reason),) = table.errors
    assert reason == "scan 3: OutOfMemoryError: there is no memory"


class Cells(Encoder):
    """Cells of 3×3×3 voxels."""

    classifier_name = "head"
    first_conv = "body"

    def __init__(self):
        super().__init__(0, 1, None, 0.0)
        self.body = nn.Conv3d(1, 4, 3, stride=3)
        self.num_features, self.feature_info = 4, [stage("body", 4, (3, 3, 3), (1.0, 1.0, 1.0))]
        self.reset_classifier(0)
        spec = InputSpec(representation="any contrast", channels=("any",), mask="file")
        self.pretrained_cfg = brainfm.PretrainedCfg(input_spec=spec, readout=Readout("brain"))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_scan_that_the_readout_refuses_fails_alone(batch_size, of_shapes):
    """That no cell is centred in its mask is found out after the scan was read, when its batch is embedded."""
    torch.manual_seed(0)
    model, scans = Cells().eval(), of_shapes(6, 6, 6)
    masks = [np.ones((6, 3, 4), dtype=np.uint8) for _ in scans]
    masks[1][:] = 0
    masks[1][0, 0, 0] = 1
    pairs = [(scan, (mask, np.eye(4))) for scan, mask in zip(scans, masks, strict=True)]
    table = brainfm.embed(pairs, model, batch_size=batch_size)
    np.testing.assert_allclose(table.vectors, brainfm.embed(pairs[::2], model).vectors, rtol=1e-6)
    assert len(table) == 2
    ((_, reason),) = table.errors
    assert reason.startswith("scan 1: no cell of the model's feature map is centred in the brain mask")


def test_embedding_that_is_not_finite_fails_its_scan_by_name(of_shapes):
    scans = of_shapes(5, 5, 5)
    scans[1] = (striped(5, 2e38), np.eye(4))
    table = brainfm.embed(scans, Means(), batch_size=3)
    assert [int(value) for value in table.vectors[:, 0]] == [1, 3]
    assert table.errors[0][1] == "scan 1: the embedding is not finite: an overflow; use dtype float32"


# --- Bad scans ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (2, 2), (4, 1)])
def test_bad_scans_are_listed_and_all_good_ones_embedded(pairs, bad, batch_size, num_workers):
    mixed = [bad[0], pairs[0], pairs[1], bad[1], bad[2], pairs[2], pairs[3]]
    table = brainfm.embed(mixed, Pooled(), batch_size=batch_size, num_workers=num_workers)
    np.testing.assert_array_equal(table.vectors, brainfm.embed(pairs[:4], Pooled()).vectors)
    assert [record.image for record in table.records] == [str(path) for path, _ in pairs[:4]]
    assert [record.image for record, _ in table.errors] == list(map(str, bad))
    for path, (_, message) in zip(bad, table.errors, strict=True):
        assert message.startswith(str(path))


def test_on_error_raise_stops_at_the_bad_scan(pairs, bad):
    with pytest.raises(ScanError, match="upside_down"):
        brainfm.embed([*pairs[:2], bad[0], *pairs[2:]], Pooled(), on_error="raise")


def test_an_error_that_nobody_foresaw_does_not_stop_the_others(pairs):
    class Broken:
        @property
        def dataobj(self):
            raise RuntimeError("disk on fire")

    table = brainfm.embed([pairs[0], Broken(), pairs[1]], Pooled())
    assert len(table) == 2
    assert "disk on fire" in table.errors[0][1]


def test_errors_are_written_beside_the_table_and_removed_by_a_clean_run(pairs, bad, tmp_path):
    output = tmp_path / "out.csv"
    brainfm.embed([pairs[0], *bad], Pooled(), output=output)
    assert names(tmp_path) == ["out.csv", "out.errors.csv", "out.json"]
    listed = rows(tmp_path / "out.errors.csv")
    assert [row["image_path"] for row in listed] == [str(path) for path in bad]
    assert "no such file" in listed[1]["error"]
    brainfm.embed(pairs[:1], Pooled(), output=output)
    assert names(tmp_path) == ["out.csv", "out.json"]


def test_all_scans_bad_gives_no_table_but_a_list(bad, tmp_path):
    table = brainfm.embed(bad, Pooled(), output=tmp_path / "out.npz")
    assert names(tmp_path) == ["out.errors.csv"]
    assert table.vectors.shape == (0, 8)


def test_all_scans_bad_leaves_no_table_of_an_earlier_run(pairs, bad, tmp_path):
    output = tmp_path / "out.csv"
    brainfm.embed(pairs[:1], Pooled(), output=output)
    brainfm.embed(bad, Pooled(), output=output)
    assert names(tmp_path) == ["out.errors.csv"]


# --- Files ----------------------------------------------------------------------------------------


@pytest.fixture
def records(pairs):
    extra = [{"site": "Zürich, CH", "note": 'a "quote"'}, {"site": "two\nlines"}, {"label": "1"}]
    return [
        ScanRecord(path, mask, f"p{n}", "s1", more)
        for n, ((path, mask), more) in enumerate(zip(pairs[:3], extra, strict=True))
    ]


def read_csv(path):
    table = rows(path)
    return numbers(path), {key: [row[key] for row in table] for key in table[0] if not key[1:].isdigit()}


def read_npz(path):
    with np.load(path) as file:
        own = ("embeddings", "brainfm_origin")
        return file["embeddings"], {key: file[key].tolist() for key in file.files if key not in own}


def read_parquet(path):
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = parquet.read_table(path).to_pydict()
    vectors = np.array([columns.pop(f"e{n}") for n in range(8)], dtype=np.float32).T
    return vectors, columns


READERS = {".csv": read_csv, ".npz": read_npz, ".parquet": read_parquet}


@pytest.mark.parametrize("suffix", READERS)
def test_table_reads_back_exactly(suffix, records, tmp_path):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    table = brainfm.embed(records, Pooled(), output=tmp_path / f"out{suffix}")
    vectors, texts = READERS[suffix](tmp_path / f"out{suffix}")
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, table.vectors)
    assert texts == table.columns()
    assert texts["site"] == ["Zürich, CH", "two\nlines", ""]
    assert texts["patient_id"] == ["p0", "p1", "p2"]
    assert names(tmp_path) == [f"out{suffix}"] + (["out.json"] if suffix == ".csv" else [])


def test_any_float32_survives_the_csv(tmp_path):
    info = np.finfo(np.float32)
    values = [info.max, info.tiny, info.smallest_subnormal, -0.1, 1 / 3, 16777217, np.nextafter(np.float32(1), 2), 0]
    vectors = np.array([values], dtype=np.float32)
    Embeddings(vectors, [ScanRecord("a.nii")]).save(tmp_path / "out.csv")
    np.testing.assert_array_equal(numbers(tmp_path / "out.csv"), vectors)


def test_output_folder_is_made(pairs, tmp_path):
    brainfm.embed(pairs[:1], Pooled(), output=tmp_path / "new" / "folder" / "out.csv")
    assert names(tmp_path / "new" / "folder") == ["out.csv", "out.json"]


def test_failed_write_leaves_the_old_table_and_nothing_else(pairs, tmp_path, monkeypatch):
    output = tmp_path / "out.npz"
    brainfm.embed(pairs[:1], Pooled(), output=output)
    before = output.read_bytes()

    def disk_full(*arguments, **arrays):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Embeddings, "_add_vectors", disk_full)
    with pytest.raises(OSError, match="No space left"):
        brainfm.embed(pairs, Pooled(), output=output)
    assert output.read_bytes() == before
    assert [name for name in names(tmp_path) if not name.endswith(".parts")] == ["out.npz"]


def test_tables_are_readable_by_others_as_the_umask_says(pairs, tmp_path):
    brainfm.embed(pairs[:1], Pooled(), output=tmp_path / "out.csv")
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "out.csv").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize(
    ("column", "suffix"), [("e0", ".csv"), ("e0", ".parquet"), ("embeddings", ".npz"), ("file", ".npz")]
)
def test_column_of_the_manifest_that_clashes_with_the_tables_is_refused_before_any_work(
    column, suffix, pairs, tmp_path, counted
):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    record = ScanRecord(*pairs[0], extra={column: "text"})
    with pytest.raises(ScanError, match=column):
        brainfm.embed([record], Pooled(), output=tmp_path / f"out{suffix}")
    assert counted() == 0


# --- What the table and the report say ------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".npz", ".parquet"])
def test_table_says_what_made_it(suffix, records, bad, tmp_path):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    model = Pooled()
    table = brainfm.embed([*records, bad[0]], model, dtype="bfloat16", output=tmp_path / f"out{suffix}")
    found = brainfm.table.read(tmp_path / f"out{suffix}")
    assert found.origin == table.origin
    assert found.columns() == table.columns()
    assert found.vectors.tobytes() == table.vectors.tobytes()
    assert found.origin == brainfm.table.Origin(
        model="test_resnet_3d.phantoms",
        weights=brainfm.weights.weights_digest(model),
        contract=model.pretrained_cfg.input_spec.to_dict(),
        readout={"pool": None, "window": None},
        dtype="bfloat16",
        brainfm=brainfm.__version__,
        torch=torch.__version__,
        scans=4,
        failed=1,
    )


def test_tables_of_two_models_are_not_joined_and_those_of_one_are(pairs, tmp_path):
    first, second = (brainfm.embed(part, Pooled()) for part in (pairs[:2], pairs[2:]))
    whole = brainfm.embed(pairs, Pooled())
    joined = brainfm.table.join([first, second])
    np.testing.assert_array_equal(joined.vectors, whole.vectors)
    assert joined.origin == whole.origin
    for other, options in ((Pooled(2.0), {}), (Pooled(), {"dtype": "bfloat16"})):
        with pytest.raises(brainfm.BrainfmError, match="not joined"):
            brainfm.table.join([first, brainfm.embed(pairs[2:], other, **options)])


def test_report_says_what_was_done(pairs, bad, tmp_path):
    output, report = tmp_path / "out.csv", tmp_path / "run.json"
    model = interrupted([*pairs, bad[1]], output, report=report)
    stopped = read_report(report)
    assert (stopped.state, stopped.asked, stopped.done, len(stopped.failed)) == ("interrupted", 7, 3, 0)
    table = brainfm.embed([*pairs, bad[1]], model, output=output, report=report)
    said = json.loads(report.read_text())
    assert brainfm.table.Origin.from_dict(said.pop("origin")) == table.origin
    assert 0 < said.pop("seconds_per_scan") < said.pop("seconds") < 600
    assert said.pop("peak_memory") > 1e7
    assert said.pop("device").startswith("cpu, ")
    assert said.pop("versions")["brainfm"] == brainfm.__version__
    steps = said.pop("steps")
    assert list(steps) == ["loading the model", "embedding", "waiting for scans", "writing"]
    assert {name: steps["embedding"][name] for name in ("unit", "of", "done", "earlier")} == {
        **{"unit": "scan", "of": 7, "done": 7, "earlier": 3},
    }
    (kind,) = said.pop("failures")
    for name in ("arguments", "machine", "started", "ended"):
        assert said.pop(name)
    assert said == {
        "command": "embed",
        "state": "done",
        "error": "",
        "exit_code": 0,
        "inputs": [],
        "output": str(output),
        "unit": "scan",
        "asked": 7,
        "scans": 7,
        "done": 6,
        "embedded": 6,
        "of_an_earlier_run": 3,
        "failed": [{"scan": str(bad[1]), "error": table.errors[0][1], "kind": kind}],
        "left_out": {},
        "peak_gpu_memory": None,
    }


@pytest.mark.parametrize("name", ["out.csv", "out.json", "out.errors.csv"])
def test_report_in_the_place_of_the_tables_own_files_is_refused_before_any_work(name, pairs, tmp_path, counted):
    with pytest.raises(BrainfmError, match="give the report another name"):
        brainfm.embed(pairs, Pooled(), output=tmp_path / "out.csv", report=tmp_path / name)
    assert counted() == 0


def test_json_that_is_not_ours_is_refused_before_any_work(pairs, tmp_path, counted):
    (tmp_path / "out.json").write_text('{"Name": "BIDS sidecar"}')
    with pytest.raises(ScanError, match=r"out\.json is something else"):
        brainfm.embed(pairs, Pooled(), output=tmp_path / "out.csv")
    assert counted() == 0
    assert names(tmp_path) == ["out.json"]


# --- Several models -------------------------------------------------------------------------------


def _second():
    """`Pooled` under another name, with another weight."""
    model = Pooled(2.0)
    model.pretrained_cfg = model.pretrained_cfg.overlay({"architecture": "other", "tag": ""})
    return model


@pytest.fixture
def second():
    return _second()


@pytest.mark.parametrize("kind", [list, tuple])
def test_several_models_give_a_table_each(kind, pairs, second, tmp_path):
    tables = brainfm.embed(pairs, kind([Pooled(), second]), output=tmp_path / "out.csv", report=tmp_path / "run.json")
    assert isinstance(tables, list)
    np.testing.assert_array_equal(tables[0].vectors * 2, tables[1].vectors)
    model_names = ["test_resnet_3d.phantoms", "other"]
    assert [table.origin.model for table in tables] == model_names
    assert names(tmp_path) == [
        *sorted(
            f"{stem}.{name}.{ending}" for name in model_names for stem, ending in (("out", "csv"), ("out", "json"))
        ),
        "run.json",
    ]
    said = json.loads((tmp_path / "run.json").read_text())["models"]
    for name, table in zip(model_names, tables, strict=True):
        assert brainfm.table.read(tmp_path / f"out.{name}.csv").origin == table.origin
        assert said[name]["output"] == str(tmp_path / f"out.{name}.csv")
        assert said[name]["origin"] == table.origin.to_dict()


def test_one_model_in_a_list_gives_a_list(pairs, tmp_path):
    (table,) = brainfm.embed(pairs[:1], [Pooled()], output=tmp_path / "out.npz")
    assert len(table) == 1
    assert names(tmp_path) == ["out.test_resnet_3d.phantoms.npz"]


def _with_classifier():
    return brainfm.create_model("test_resnet_3d", num_classes=2)


def _without_contract():
    return nn.Flatten()


def _of_three_channels():
    return brainfm.create_model("test_resnet_3d", in_chans=3)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (_second, "have the same name"),
        (_with_classifier, r"reset_classifier\(0\)"),
        (_without_contract, "no input contract"),
        (_of_three_channels, "takes 3 channels, and its input contract gives T1w"),
        (lambda: "test_resnet_4d", "unknown model 'test_resnet_4d'"),
    ],
)
def test_wrong_model_among_several_is_refused_before_any_work(other, reason, second, pairs, tmp_path, counted):
    with pytest.raises(ValueError, match=reason):
        brainfm.embed(pairs, [second, other()], output=tmp_path / "out.csv")
    assert counted() == 0


def contracted(model, name, **changes):
    """A model under another name, with another input contract."""
    cfg = model.pretrained_cfg
    model.pretrained_cfg = replace(cfg, architecture=name, tag="", input_spec=replace(cfg.input_spec, **changes))
    return model


class Overwriting(Pooled):
    """An encoder that leaves nothing of its input."""

    def forward(self, x):
        vectors = super().forward(x)
        x.zero_()
        return vectors


@pytest.fixture
def opened(monkeypatch):
    """How often each compressed file was opened to be inflated."""
    counts, real = Counter(), brainfm.scan.read.open_packed

    def open_packed(path, *arguments):
        counts[str(path)] += 1
        return real(path, *arguments)

    monkeypatch.setattr(brainfm.scan.read, "open_packed", open_packed)
    return counts


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (2, 2)])
def test_several_models_read_each_file_once_and_give_the_tables_of_runs_of_their_own(
    batch_size, num_workers, small_sample, second, opened, tmp_path
):
    folders = [shutil.copytree(small_sample[0].parent, tmp_path / f"{n}") for n in range(3)]
    bent = contracted(Pooled(), "bent", operations=second.pretrained_cfg.input_spec.operations[:-1])
    overwriting = contracted(Overwriting(), "overwriting")
    models = [overwriting, second, bent, contracted(Pooled(3.0), "third")]
    options = {"batch_size": batch_size, "num_workers": num_workers}
    tables = brainfm.embed(folders, models, output=tmp_path / "out.csv", **options)
    assert opened == {str(path): 1 for folder in folders for path in folder.iterdir()}
    for model, table in zip(models, tables, strict=True):
        np.testing.assert_array_equal(table.vectors, brainfm.embed(folders, model, **options).vectors)
        assert len(brainfm.table.read(tmp_path / f"out.{model.pretrained_cfg.name}.csv")) == 3


def test_scan_that_one_contract_refuses_is_an_error_of_that_model_alone(pairs, bad, second, tmp_path):
    strict = contracted(Pooled(), "strict", mask="file")
    scans = [pairs[0], pairs[1][0], bad[2]]
    free, of_file = brainfm.embed(scans, [contracted(second, "free"), strict], output=tmp_path / "out.csv")
    assert [record.image for record in free.records] == [str(pairs[0][0]), str(pairs[1][0])]
    assert [record.image for record in of_file.records] == [str(pairs[0][0])]
    errors = {name: [row["error"] for row in rows(tmp_path / f"out.{name}.errors.csv")] for name in ("free", "strict")}
    assert len(errors["free"]) == 1
    assert ["needs a brain mask" in error for error in errors["strict"]] == [True, False]
    assert errors["strict"][1] == errors["free"][0]


def test_scan_that_is_done_for_one_model_is_read_for_the_others_alone(pairs, second, tmp_path, monkeypatch):
    class Halting(Pooled):
        seen: list[int] = []  # noqa: RUF012

    monkeypatch.setattr(Halting, "interrupt_at", 2)
    halting = contracted(Halting(2.0), "halting", operations=second.pretrained_cfg.input_spec.operations[:-1])
    with pytest.raises(KeyboardInterrupt):
        brainfm.embed(pairs, [Pooled(), halting], output=tmp_path / "out.csv", num_workers=0)
    assert (Pooled.seen, Halting.seen) == ([1] * 3, [1] * 2)
    monkeypatch.setattr(Halting, "interrupt_at", None)
    brought = []
    real = brainfm.transforms.load_scan
    monkeypatch.setattr(
        brainfm.transforms, "load_scan", lambda image, mask, **how: brought.append(image) or real(image, mask, **how)
    )
    tables = brainfm.embed(pairs, [Pooled(), halting], output=tmp_path / "out.csv", num_workers=0)
    assert (Pooled.seen, Halting.seen) == ([1] * 6, [1] * 6)
    assert sorted(brought) == sorted(str(path) for path, _ in [*pairs[2:], *pairs[3:]])
    np.testing.assert_array_equal(tables[1].vectors, brainfm.embed(pairs, halting).vectors)
    assert not list(tmp_path.glob(".out*"))


# --- Memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("broken", [0, 1])
def test_vectors_are_kept_once_in_one_array_of_their_own(batch_size, broken, pairs, bad):
    """A view would keep the output of a whole batch, and with it torch's memory, as long as the run lasts."""
    vectors = brainfm.embed([*bad[:broken], *pairs], Pooled(), batch_size=batch_size).vectors
    whole = vectors if vectors.base is None else vectors.base
    assert whole.flags.owndata
    assert whole.nbytes == 4 * 8 * (broken + len(pairs))


GROWTH = """
import gc, brainfm, numpy as np, test_embed, torch

class Wide(test_embed.Means):
    num_features = 2
    def forward(self, x):
        return torch.nn.functional.pad(super().forward(x), (0, 2**16))[:, :2]  # as a view, a row would hold 256 KiB

def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

scans = [(test_embed.striped(9, 1 + n % 5), np.eye(4)) for n in range(3000)]
model = Wide()
brainfm.embed(scans[:300], model, batch_size=4)
few = resident()
brainfm.embed(scans, model, batch_size=4)
open(sys.argv[1], "w").write(str(resident() - few))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="there is no /proc")
def test_ten_times_as_many_scans_take_hardly_more_memory(tmp_path):
    result = run_python(GROWTH, tmp_path / "grown")
    assert result.returncode == 0, result.stderr
    assert int((tmp_path / "grown").read_text()) < 50 * 2**20


# --- Going on after an interruption ---------------------------------------------------------------


def interrupted(pairs, output, after=3, **options):
    """A run that is interrupted after some scans, and its model."""
    model = Pooled()
    Pooled.interrupt_at = after
    with pytest.raises(KeyboardInterrupt):
        brainfm.embed(pairs, model, output=output, **options)
    Pooled.interrupt_at = None
    Pooled.seen.clear()
    return model


@pytest.mark.parametrize("suffix", [".csv", ".npz"])
def test_interrupted_run_does_the_rest_only_and_gives_the_same_table(suffix, pairs, bad, tmp_path, counted):
    scans = [bad[0], *pairs]
    output, whole = tmp_path / f"out{suffix}", tmp_path / "whole" / f"out{suffix}"
    model = interrupted(scans, output)
    assert not output.exists()
    brainfm.embed(scans, model, output=output)
    assert counted() == len(pairs) - 3
    brainfm.embed(scans, model, output=whole)
    assert output.read_bytes() == whole.read_bytes()
    stamp = ["out.json"] if suffix == ".csv" else []
    assert names(tmp_path) == sorted(["out.errors.csv", f"out{suffix}", "whole", *stamp])


def test_finished_run_leaves_nothing_to_go_on_from(pairs, tmp_path, counted):
    for _ in range(2):
        brainfm.embed(pairs[:2], Pooled(), output=tmp_path / "out.csv")
    assert counted() == 4


def test_twice_interrupted_run_goes_on(pairs, tmp_path, counted):
    output = tmp_path / "out.csv"
    interrupted(pairs, output, after=2)
    model = interrupted(pairs, output, after=2)
    brainfm.embed(pairs, model, output=output)
    assert counted() == 2


def test_added_scans_are_done_beside_those_of_an_interrupted_run(pairs, tmp_path, counted):
    model = interrupted(pairs[1:4], tmp_path / "out.csv", after=2)
    table = brainfm.embed(pairs, model, output=tmp_path / "out.csv")
    assert counted() == 4
    assert [record.image for record in table.records] == [str(path) for path, _ in pairs]


def test_run_stopped_by_a_bad_scan_goes_on_from_there(pairs, bad, tmp_path, counted):
    model = Pooled()
    with pytest.raises(ScanError):
        brainfm.embed([*pairs[:2], bad[0]], model, output=tmp_path / "out.csv", on_error="raise")
    brainfm.embed(pairs, model, output=tmp_path / "out.csv", on_error="raise")
    assert counted() == len(pairs)


@pytest.mark.parametrize(
    "change",
    [lambda: (Pooled(2.0), {}), lambda: (Pooled(), {"dtype": "bfloat16"})],
    ids=["weights", "dtype"],
)
def test_another_model_does_not_go_on_from_the_rows_of_the_first(change, pairs, tmp_path, counted):
    interrupted(pairs, tmp_path / "out.csv")
    model, options = change()
    table = brainfm.embed(pairs, model, output=tmp_path / "out.csv", **options)
    assert counted() == len(pairs)
    np.testing.assert_array_equal(table.vectors, brainfm.embed(pairs, model, **options).vectors)


def test_another_contract_does_not_go_on_from_the_rows_of_the_first(pairs, tmp_path, counted):
    from brainfm.contract import ZScore

    model = interrupted(pairs, tmp_path / "out.csv")
    spec = model.pretrained_cfg.input_spec.with_operation(ZScore, eps=0.5)
    model.pretrained_cfg = model.pretrained_cfg.overlay({"input_spec": spec})
    brainfm.embed(pairs, model, output=tmp_path / "out.csv")
    assert counted() == len(pairs)


def test_scan_whose_file_changed_is_done_again(pairs, tmp_path, counted):
    copies = [tmp_path / path.name for path, _ in pairs]
    for (path, _), copy in zip(pairs, copies, strict=True):
        copy.write_bytes(path.read_bytes())
    model = interrupted(copies, tmp_path / "out.csv")
    copies[0].write_bytes(pairs[5][0].read_bytes())
    table = brainfm.embed(copies, model, output=tmp_path / "out.csv")
    assert counted() == 1 + len(pairs) - 3
    np.testing.assert_array_equal(table.vectors[0], table.vectors[5])


def test_scan_whose_mask_changed_is_done_again(originals, tmp_path, counted):
    paths, mask = originals
    copy = tmp_path / "mask.nii.gz"
    copy.write_bytes(mask.read_bytes())
    model = interrupted([(path, copy) for path in paths], tmp_path / "out.csv")
    image = nib.load(mask)
    smaller = np.asarray(image.dataobj) * (np.arange(image.shape[0]) > 5)[:, None, None]
    nib.Nifti1Image(smaller.astype(np.uint8), image.affine).to_filename(copy)
    brainfm.embed([(path, copy) for path in paths], model, output=tmp_path / "out.csv")
    assert counted() == len(paths)


def test_image_in_memory_that_changed_is_done_again(pairs, tmp_path):
    image = nib.load(pairs[0][0])
    array = np.asarray(image.dataobj).copy()
    scans = [(array, image.affine), pairs[1]]
    model = interrupted(scans, tmp_path / "out.csv", after=1)
    array[:] = nib.load(pairs[5][0]).dataobj
    table = brainfm.embed(scans, model, output=tmp_path / "out.csv")
    np.testing.assert_array_equal(table.vectors, brainfm.embed(scans, model).vectors)


def test_damaged_part_costs_its_own_scans(pairs, tmp_path, counted):
    output = tmp_path / "out.csv"
    model = interrupted(pairs, output)
    (part,) = (tmp_path / ".out.csv.parts").iterdir()
    interrupted(pairs, output, after=1)
    part.write_bytes(part.read_bytes()[:-20])
    table = brainfm.embed(pairs, model, output=output)
    assert counted() == len(pairs) - 1
    np.testing.assert_array_equal(table.vectors, brainfm.embed(pairs, model).vectors)
    assert names(tmp_path) == ["out.csv", "out.json"]


def test_table_whose_name_holds_wildcards_goes_on_and_leaves_nothing(pairs, tmp_path, counted):
    output = tmp_path / "out[1].csv"
    model = interrupted(pairs, output)
    brainfm.embed(pairs, model, output=output)
    assert counted() == len(pairs) - 3
    assert names(tmp_path) == ["out[1].csv", "out[1].json"]


def test_second_command_on_an_output_is_refused_in_a_line_and_costs_the_first_no_work(pairs, tmp_path, counted):
    output = tmp_path / "out.csv"
    model = interrupted(pairs, output)
    command = [
        sys.executable,
        "-m",
        "brainfm",
        "embed",
        str(pairs[0][0]),
        "--model",
        "test_resnet_3d",
        "-o",
        str(output),
    ]
    with held(output):  # as the first command does
        second = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        assert second.returncode == 1
        _, line = second.stderr.splitlines()  # after "brainfm embed: starting"
        assert f"{output}: process {os.getpid()} on " in line
    brainfm.embed(pairs, model, output=output)
    assert counted() == len(pairs) - 3
    assert names(tmp_path) == ["out.csv", "out.json"]


def test_half_written_files_of_a_killed_run_are_swept_at_the_next_start(small_sample, small_model, tmp_path):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    (tmp_path / "maps").mkdir()
    for path in (tmp_path / "out.csv", tmp_path / "out.errors.csv", tmp_path / "maps" / "sub-01_dense.nii.gz"):
        half = temporary_path(path)
        half.with_name(half.name.replace(f"-{os.getpid()}-", f"-{done.pid}-")).write_text("half a tab")
    table = brainfm.embed([small_sample], small_model, output=tmp_path / "out.csv", dense=tmp_path / "maps")
    assert names(tmp_path) == ["maps", "out.csv", "out.json"]
    assert names(tmp_path / "maps") == [Path(table.columns()["dense_path"][0]).name]


def test_two_tables_in_one_folder_do_not_mix(pairs, tmp_path, counted):
    model = interrupted(pairs, tmp_path / "a.csv")
    brainfm.embed(pairs, model, output=tmp_path / "b.csv")
    assert counted() == len(pairs)
    brainfm.embed(pairs, model, output=tmp_path / "a.csv")
    assert counted() == 2 * len(pairs) - 3


def run_python(code, *arguments, launcher=()):
    """A new interpreter that can import this file."""
    paths = f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(brainfm.__file__).parents[1])!r}]\n"
    script = Path(arguments[-1]).with_name("run.py")
    script.write_text(paths + code, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, *launcher, str(script), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


KILLED = """
import os, signal, brainfm, test_embed
from brainfm import parts

parts.SECONDS = 0

class Pooled(test_embed.Pooled):
    def forward(self, x):
        if sum(self.seen) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)

*paths, mask, output = sys.argv[1:]
brainfm.embed([(path, mask or None) for path in paths], Pooled(), output=output)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize("masked", [True, False])
def test_killed_process_keeps_what_it_finished(masked, originals, tmp_path, counted):
    paths, mask = originals
    scans = [(path, mask if masked else None) for path in paths]
    output = tmp_path / "out.csv"
    result = run_python(KILLED, *paths, mask if masked else "", output)
    assert result.returncode == -9, result.stderr
    table = brainfm.embed(scans, Pooled(), output=output)
    assert counted() == len(scans) - 3
    np.testing.assert_array_equal(table.vectors, brainfm.embed(scans, Pooled()).vectors)


SHARED = """
import brainfm, test_embed

*paths, mask, forwards, output = sys.argv[1:]
table = brainfm.embed([(path, mask) for path in paths], test_embed.Pooled(), batch_size=2, output=output)
assert len(table) == 6, (len(table), table.errors)
assert sum(test_embed.Pooled.seen) == int(forwards), test_embed.Pooled.seen
"""
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
FORKED = (forked_ranks.__file__, "2")


@pytest.mark.slow
def test_two_processes_share_the_scans_and_write_the_table_of_one(originals, bad, tmp_path):
    paths, mask = originals
    scans = [*paths[:4], bad[2], *paths[4:]]
    whole = tmp_path / "one" / "out.csv"
    brainfm.embed([(scan, mask) for scan in scans], Pooled(), output=whole)
    output = tmp_path / "two" / "out.csv"
    output.parent.mkdir()
    result = run_python(SHARED, *scans, mask, 3, output, launcher=TWO)
    assert result.returncode == 0, result.stderr
    assert output.read_bytes() == whole.read_bytes()
    assert names(output.parent) == ["out.csv", "out.errors.csv", "out.json", "run.py"]
    assert (output.parent / "out.json").read_bytes() == (whole.parent / "out.json").read_bytes()


@pytest.mark.slow
def test_two_processes_go_on_from_one(originals, pairs, tmp_path):
    paths, mask = originals
    output = tmp_path / "out.csv"
    interrupted(pairs, output, after=2)
    result = run_python(SHARED, *paths, mask, 2, output, launcher=FORKED)
    assert result.returncode == 0, result.stderr
    assert names(tmp_path) == ["out.csv", "out.json", "run.py"]


def test_model_with_a_classifier_is_refused(small_sample):
    model = brainfm.create_model("test_resnet_3d", pretrained=True, num_classes=2)
    with pytest.raises(ValueError, match=r"reset_classifier\(0\)"):
        brainfm.embed([small_sample], model)


# --- Scans that the model was pretrained on -------------------------------------------------------


@pytest.fixture
def pretrained_on_adni():
    model = Pooled()
    model.pretrained_cfg = model.pretrained_cfg.overlay({"cohorts": [{"name": "ADNI", "patients": 3, "scans": 4}]})
    return model


@pytest.fixture
def manifest(tmp_path, pairs):
    """A function (data set of every scan) → a manifest of the scans."""

    def write(dataset, column="dataset"):
        lines = [f"{image},{mask},{dataset}" for image, mask in pairs]
        (tmp_path / "scans.csv").write_text("\n".join([f"image_path,mask_path,{column}", *lines]) + "\n")
        return tmp_path / "scans.csv"

    return write


def overlaps(caplog):
    return [record for record in caplog.records if "pretraining data" in record.getMessage()]


def test_warning_names_the_pretraining_data_set_of_a_manifest_once(pretrained_on_adni, manifest, pairs, caplog):
    table = brainfm.embed(manifest("ADNI3"), pretrained_on_adni)
    (warning,) = overlaps(caplog)
    assert (warning.levelname, warning.name) == ("WARNING", "brainfm")
    assert warning.getMessage() == (
        "ADNI3: in the pretraining data (a phase of ADNI: ADNI, 3 patients, 4 scans): "
        "an evaluation on it is one on training data"
    )
    assert len(table) == len(pairs)
    assert table.columns()["dataset"] == ["ADNI3"] * len(pairs)


def test_warning_is_given_before_any_scan_is_embedded(pretrained_on_adni, manifest, caplog, monkeypatch):
    monkeypatch.setattr(Pooled, "interrupt_at", 0)
    with pytest.raises(KeyboardInterrupt):
        brainfm.embed(manifest("ADNI"), pretrained_on_adni)
    assert len(overlaps(caplog)) == 1


def test_warning_is_given_for_a_folder_too(pretrained_on_adni, small_sample, tmp_path, caplog):
    folder = tmp_path / "adni" / "sub-01"
    folder.mkdir(parents=True)
    for path in small_sample:
        (folder / path.name).write_bytes(path.read_bytes())
    brainfm.embed(tmp_path / "adni", pretrained_on_adni)
    assert len(overlaps(caplog)) == 1


@pytest.mark.parametrize(("dataset", "column"), [("IXI", "dataset"), ("", "dataset"), ("ADNI", "label")])
def test_no_warning_for_other_data(dataset, column, pretrained_on_adni, manifest, caplog):
    brainfm.embed(manifest(dataset, column), pretrained_on_adni)
    assert overlaps(caplog) == []


def test_no_warning_where_no_cohorts_are_recorded(small_model, manifest, caplog):
    brainfm.embed(manifest("ADNI"), small_model)
    assert overlaps(caplog) == []


# --- Batches and cores ----------------------------------------------------------------------------


def test_automatic_batch_is_one_on_a_cpu(originals):
    brainfm.embed([(path, originals[1]) for path in originals[0][:3]], Pooled())
    assert Pooled.seen == [1, 1, 1]


def test_processes_of_one_machine_share_its_cores(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(system, "available_cores", lambda: 6)
    names = {
        "RANK": 1,
        "LOCAL_RANK": 1,
        "WORLD_SIZE": 2,
        "LOCAL_WORLD_SIZE": 2,
        "MASTER_ADDR": "here",
        "MASTER_PORT": 1,
    }
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    with system.own_cores(torch.device("cpu")):
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before


# --- What a list of scans may be ------------------------------------------------------------------


@pytest.fixture
def cohort(originals, tmp_path):
    """A folder with three of the brains, and what they embed as."""
    for n, path in enumerate(originals[0][:3]):
        shutil.copy(path, tmp_path / f"{n}.nii")
    shutil.copy(originals[1], tmp_path / "mask.nii.gz")
    images = [tmp_path / f"{n}.nii" for n in range(3)]
    return tmp_path, brainfm.embed([(path, tmp_path / "mask.nii.gz") for path in images], Pooled()).vectors


def test_dataframe_is_embedded_as_the_manifest_it_is(cohort, monkeypatch):
    folder, expected = cohort
    monkeypatch.chdir(folder)
    frame = pd.DataFrame({"image_path": ["0.nii", "1.nii", "2.nii"], "mask_path": "mask.nii.gz", "PTID": [7, 8, 9]})
    table = brainfm.embed(frame, Pooled())
    np.testing.assert_array_equal(table.vectors, expected)
    assert table.columns()["patient_id"] == ["7", "8", "9"]


@pytest.mark.parametrize(
    "write",
    [
        lambda frame, path: frame.to_csv(path.with_suffix(".csv"), sep=";", encoding="cp1252"),
        lambda frame, path: frame.to_csv(path.with_suffix(".txt"), sep="\t", encoding="utf-16", index=False),
        lambda frame, path: frame.assign(empty="").to_excel(path.with_suffix(".xlsx"), index=False),
        lambda frame, path: frame.to_parquet(path.with_suffix(".parquet")),
    ],
    ids=["semicolons in Latin-1", "tabs in UTF-16", "Excel", "Parquet"],
)
def test_manifest_of_any_program_is_embedded_by_the_command(write, cohort):
    folder, _ = cohort
    sites = ["Münster", "Brno ", "Köln"]
    frame = pd.DataFrame({"image_path": [f" {n}.nii" for n in range(3)], "mask_path": "'mask.nii.gz'", "site": sites})
    write(frame.assign(participant_id=["007", "008", "009"]), folder / "scans")
    (path,) = folder.glob("scans.*")
    arguments = ["embed", str(path), "--model", "test_resnet_3d", "-o", str(folder / "out.csv")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    columns = brainfm.table.read(folder / "out.csv").columns()
    assert columns["patient_id"] == ["007", "008", "009"]
    assert columns["site"] == ["Münster", "Brno", "Köln"]


def test_folder_in_a_list_is_expanded(cohort, small_sample):
    folder, expected = cohort
    shutil.copytree(small_sample[0].parent, folder / "prepared" / "p1")
    both = brainfm.embed([folder / "prepared", (folder / "0.nii", folder / "mask.nii.gz")], Pooled())
    assert [record.patient_id for record in both.records] == ["p1", ""]
    np.testing.assert_array_equal(both.vectors[1:], expected[:1])


@pytest.mark.parametrize(
    ("scans", "message"),
    [
        (["missing.nii"], "missing.nii: no such file; check the paths"),
        ("missing.nii", "missing.nii: no such file; check the paths"),
        (
            ["a.nii", ("b.nii", "m.nii"), {"T1w": "c.nii"}],
            "a.nii: no such file, nor any of the other 2; check the paths",
        ),
        (["nowhere/"], "nowhere: no such file or folder"),
        ([], "the list of scans is empty"),
        (pd.DataFrame({"image_path": ["a.nii", "b.nii"]}), "a.nii: no such file, nor any of the other 1"),
    ],
)
def test_list_of_which_nothing_is_there_is_refused(scans, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ScanError, match=message):
        brainfm.embed(scans, Pooled(), output="out.csv")
    assert not list(tmp_path.iterdir())


def test_missing_file_among_others_is_that_scan_s_error(cohort):
    folder, expected = cohort
    table = brainfm.embed([folder / "gone.nii", (folder / "0.nii", folder / "mask.nii.gz")], Pooled())
    np.testing.assert_array_equal(table.vectors, expected[:1])
    assert "gone.nii: no such file" in table.errors[0][1]


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux alone")
@pytest.mark.parametrize("ending", [".csv", ".parquet", ".npz"])
def test_names_that_are_not_utf_8_cost_no_table_and_read_back_to_the_same_files(ending, cohort):
    folder, expected = cohort
    place = folder / os.fsdecode(b"sub-caf\xe9") / os.fsdecode(b"ses-\xff")
    place.mkdir(parents=True)
    for name, path in (("normalized.nii.gz", "0.nii"), ("mask.nii.gz", "mask.nii.gz")):
        content = (folder / path).read_bytes()
        (place / name).write_bytes(content if path.endswith("gz") else gzip.compress(content))
    broken = place.with_name("ses-2")
    shutil.copytree(place, broken)
    (broken / "normalized.nii.gz").write_bytes(b"no image")
    output, report = folder / f"out{ending}", folder / "run.json"
    made = brainfm.embed(place.parent, Pooled(), output=output, report=report)
    np.testing.assert_array_equal(made.vectors, expected[:1])
    back = brainfm.table.read(output)
    assert [Path(record.image) for record in back.records] == [place / "normalized.nii.gz"]
    assert (back.records[0].patient_id, back.records[0].scan_id) == ("sub-caf\\udce9", "ses-\\udcff")
    np.testing.assert_array_equal(brainfm.embed(back.records, Pooled()).vectors, expected[:1])
    assert json.loads(report.read_text())["failed"][0]["scan"] == str(broken / "normalized.nii.gz")
    assert "caf\\udce9" in (folder / "out.errors.csv").read_text()
    if ending != ".npz":
        again = brainfm.embed(output, Pooled())  # as a manifest
        np.testing.assert_array_equal(again.vectors, expected[:1])


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux alone")
def test_manifest_in_nfc_embeds_files_in_nfd(cohort):
    folder, expected = cohort
    (folder / "0.nii").rename(folder / unicodedata.normalize("NFD", "Zoë.nii"))
    (folder / "scans.csv").write_text(f"image_path,mask_path\n{unicodedata.normalize('NFC', 'Zoë.nii')},mask.nii.gz\n")
    np.testing.assert_array_equal(brainfm.embed(folder / "scans.csv", Pooled()).vectors, expected[:1])


def test_tf32_is_refused_where_no_gpu_multiplies(small_sample, small_model):
    with pytest.raises(brainfm.BrainfmError, match=r"tf32 is a way in which CUDA GPUs multiply.* use float32"):
        brainfm.embed([small_sample], small_model, device="cpu", dtype="tf32")
    with pytest.raises(brainfm.BrainfmError, match="use float32"):
        brainfm.verify("test_resnet_3d", ["tf32"])
