"""The table: what is written is read back, and it says what made it."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest

import brainfm
from brainfm import BrainfmError, ScanError
from brainfm.manifest import ScanRecord
from brainfm.table import Embeddings, Origin, check_output, errors_path, join, origin_path, read, write

SPEC = brainfm.get_pretrained_cfg("test_resnet_3d").input_spec
ORIGIN = Origin(
    model="test_resnet_3d.phantoms",
    weights="sha256:1",
    contract=SPEC.to_dict(),
    readout={"pool": "avg", "window": {"shape": (4, 4, 4), "overlap": 0.5}},
    dtype="float32",
    brainfm="1.0",
    torch="2.4",
    scans=4,
    failed=1,
)
SUFFIXES = [".csv", ".npz", ".parquet"]


def table(origin: Origin | None = ORIGIN, seed: int = 0) -> Embeddings:
    """Three scans and one that failed, with text that files tend to lose."""
    vectors = np.random.default_rng(seed).standard_normal((3, 12)).astype(np.float32)
    vectors[0, :4] = [np.finfo(np.float32).max, np.finfo(np.float32).smallest_subnormal, -0.0, 1 / 3]
    records = [
        ScanRecord("a.nii", "mask.nii", "p 1", "007", {"site": "Zürich, CH", "note": 'a "quote"'}),
        ScanRecord("b.nii", None, "p2", "", {"site": "two\nlines", "dense_path": "maps/b_dense.nii.gz"}),
        ScanRecord("c.nii", None, "", "", {"site": " "}),
    ]
    return Embeddings(vectors, records, [(ScanRecord("d.nii"), "d.nii: no such file")], origin)


@pytest.fixture(params=SUFFIXES)
def path(request, tmp_path):
    if request.param == ".parquet":
        pytest.importorskip("pyarrow")
    return tmp_path / f"out{request.param}"


# --- Written and read -----------------------------------------------------------------------------


def test_table_is_read_back_as_it_was(path):
    written = table()
    written.save(path)
    found = read(path)
    assert found.vectors.dtype == np.float32
    assert found.vectors.tobytes() == written.vectors.tobytes()
    assert found.columns() == written.columns()
    assert found.origin == written.origin
    assert (found.records[0].patient_id, found.records[0].scan_id, found.records[0].mask) == ("p 1", "007", "mask.nii")
    assert found.errors == []


def test_scans_of_several_channels_are_read_back(path):
    images = [{"T1w": "a.nii", "FLAIR": "b.nii"}, {"T1w": "c.nii"}]
    written = Embeddings(np.eye(2, dtype=np.float32), [ScanRecord(one) for one in images])
    written.save(path)
    found = read(path)
    assert found.columns() == written.columns()
    assert found.columns()["flair_path"] == ["b.nii", ""]
    assert found.records[1].image == {"t1w": "c.nii"}


def test_table_becomes_a_dataframe_with_its_texts_numbers_and_origin():
    written = table()
    frame = written.to_pandas()
    assert frame["patient_id"].tolist() == ["p 1", "p2", ""]
    assert frame["scan_id"].tolist() == ["007", "", ""]
    assert (frame.dtypes.iloc[-12:] == np.float32).all()
    np.testing.assert_array_equal(frame[[f"e{n}" for n in range(12)]].to_numpy(), written.vectors)
    assert Origin.from_dict(frame.attrs["brainfm_origin"]) == ORIGIN
    empty = replace(written, vectors=written.vectors[:0], records=[])
    assert empty.to_pandas().shape == (0, 12)
    clash = replace(written, records=[replace(r, extra={"e0": "1"}) for r in written.records])
    with pytest.raises(ScanError, match="e0 has a name of the table's own"):
        clash.to_pandas()


def test_repr_is_one_short_line():
    text = repr(replace(table(), vectors=np.zeros((3, 4096), np.float32)))
    assert text == "Embeddings(3 scans, 4096 numbers each of test_resnet_3d.phantoms, 1 failed)"


def test_table_without_an_origin_stays_one(path):
    table().save(path)
    table(origin=None).save(path)
    assert read(path).origin is None
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # the origin of the one before is gone


def test_origin_is_where_other_programs_find_it(path):
    table().save(path)
    if path.suffix == ".csv":
        stamp = json.loads((path.parent / "out.json").read_text())
    elif path.suffix == ".npz":
        stamp = json.loads(str(np.load(path)["brainfm_origin"]))
    else:
        from pyarrow import parquet

        stamp = json.loads(parquet.read_schema(path).metadata[b"brainfm_origin"])
    assert stamp == json.loads(json.dumps(ORIGIN.to_dict()))
    assert set(stamp) == {
        *("model", "weights", "contract", "readout", "dtype", "brainfm", "torch", "scans", "failed"),
    }
    assert brainfm.InputSpec.from_dict(stamp["contract"]) == SPEC


def test_empty_table_of_a_width_is_read_back(path):
    Embeddings(np.empty((0, 5), dtype=np.float32), []).save(path)
    assert read(path).vectors.shape == (0, 5)


@pytest.mark.parametrize("content", [b"", b"not a table", b"a,b\n1,2\n", b"e0,e2\n1,2\n", b"e0\nword\n"])
def test_what_is_no_table_is_refused_by_name(content, path):
    path.write_bytes(content)
    with pytest.raises(BrainfmError, match=rf"out\{path.suffix}: not a table of embeddings"):
        read(path)


def test_missing_table_and_other_endings_are_refused(tmp_path):
    with pytest.raises(BrainfmError, match="no such table"):
        read(tmp_path / "out.csv")
    with pytest.raises(BrainfmError, match=r"\.csv, \.parquet, \.npz"):
        read(tmp_path / "out.xlsx")


def test_csv_whose_origin_was_lost_or_is_something_else_is_read_without_one(tmp_path):
    table().save(tmp_path / "out.csv")
    for content in ('{"Name": "BIDS sidecar"}', "[1]", "no JSON", None):
        if content is None:
            (tmp_path / "out.json").unlink()
        else:
            (tmp_path / "out.json").write_text(content)
        assert read(tmp_path / "out.csv").origin is None


# --- Files that are not ours ----------------------------------------------------------------------


@pytest.mark.parametrize("content", ['{"Name": "BIDS sidecar"}', "no JSON", "[]", '{"model": "m", "weights": 3}'])
@pytest.mark.parametrize("origin", [ORIGIN, None])
def test_json_of_something_else_is_neither_overwritten_nor_removed(content, origin, tmp_path):
    (tmp_path / "out.json").write_text(content)
    with pytest.raises(ScanError, match=r"out\.json is something else"):
        table(origin).save(tmp_path / "out.csv")
    assert (tmp_path / "out.json").read_text() == content
    assert not (tmp_path / "out.csv").exists()
    table(origin).save(tmp_path / "out.npz")  # which needs none


def test_own_json_is_replaced(tmp_path):
    table().save(tmp_path / "out.csv")
    table(replace(ORIGIN, dtype="bfloat16")).save(tmp_path / "out.csv")
    assert read(tmp_path / "out.csv").origin.dtype == "bfloat16"


@pytest.mark.parametrize("name", ["e0", "e17", "embeddings", "file", "error", "brainfm_origin"])
def test_column_of_the_tables_own_is_refused(name, tmp_path):
    with pytest.raises(ScanError, match=name):
        check_output(tmp_path / "out.csv", [ScanRecord("a.nii", extra={name: "text"})])
    check_output(tmp_path / "out.csv", [ScanRecord("a.nii", extra={"e1x": "text", "E1": "text"})])


def test_failed_scans_are_listed_beside_the_table_with_reasons(tmp_path):
    write(table(), tmp_path / "out.csv")
    with errors_path(tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        assert [(row["image_path"], row["error"]) for row in csv.DictReader(file)] == [("d.nii", "d.nii: no such file")]
    write(replace(table(), errors=[]), tmp_path / "out.csv")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.csv", "out.json"]


def test_table_without_a_row_is_not_written_and_leaves_no_older_one(tmp_path):
    write(table(), tmp_path / "out.csv")
    write(replace(table(), vectors=np.empty((0, 12), np.float32), records=[]), tmp_path / "out.csv")
    assert [p.name for p in tmp_path.iterdir()] == ["out.errors.csv"]
    assert not origin_path(tmp_path / "out.csv").exists()


# --- Joined ---------------------------------------------------------------------------------------


def test_tables_of_one_origin_are_joined(tmp_path):
    table().save(tmp_path / "one.csv")
    first, second = read(tmp_path / "one.csv"), table(replace(ORIGIN, torch="2.5", scans=3, failed=0), seed=1)
    joined = join([first, second])
    np.testing.assert_array_equal(joined.vectors, np.concatenate([first.vectors, second.vectors]))
    assert joined.records == first.records + second.records
    assert len(joined.errors) == 1
    assert joined.origin == replace(ORIGIN, torch="2.4, 2.5", scans=7, failed=1)
    assert first.origin.digest == joined.origin.digest


OTHERS = {
    "weights": {"weights": "sha256:2", "model": "another"},
    "contract": {"contract": {**SPEC.to_dict(), "skull_strip": "any"}},
    "readout": {"readout": {"pool": "brain", "window": None}},
    "dtype": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_tables_of_different_origin_are_refused(name):
    other = replace(ORIGIN, **OTHERS[name])
    with pytest.raises(BrainfmError, match=rf"differ in {name}: "):
        join([table(), table(other)])
    assert other.digest != ORIGIN.digest


@pytest.mark.parametrize("change", [{"model": "its other name"}, {"brainfm": "2"}, {"torch": "3"}, {"failed": 2}])
def test_what_does_not_change_the_numbers_does_not_part_tables(change):
    other = replace(ORIGIN, **change)
    assert other.digest == ORIGIN.digest
    assert len(join([table(), table(other)])) == 6


def test_tables_that_do_not_say_what_made_them_are_not_joined():
    for tables in ([table(), table(None)], [table(None), table(None)]):
        with pytest.raises(BrainfmError, match="does not say what made it"):
            join(tables)
    assert len(join([table(None)])) == 3
    with pytest.raises(ValueError, match="no table"):
        join([])
