"""The journal of an interrupted run: rows of what it did, for the run that goes on."""

from __future__ import annotations

import json
import os
import tracemalloc

import numpy as np
import pytest

from brainfm.journal import Journal, scan_identity
from brainfm.manifest import ScanRecord


@pytest.fixture
def records(tmp_path):
    for name in ("a", "b", "mask"):
        (tmp_path / f"{name}.nii").write_text(name)
    return [ScanRecord(tmp_path / "a.nii", tmp_path / "mask.nii"), ScanRecord(tmp_path / "b.nii")]


VECTOR = np.array([np.float32(1) / 3, -0.0, np.finfo(np.float32).tiny, 16777217], dtype=np.float32)


def kept(output, records, made_by="weights"):
    """What a new run finds."""
    journal = Journal(output, 0, made_by)
    found = [journal.find(record) for record in records]
    journal.close()
    return found


def test_row_comes_back_to_the_bit(records, tmp_path):
    journal = Journal(tmp_path / "out.csv", 0, "weights")
    journal.add(records[0], VECTOR)
    first, second = kept(tmp_path / "out.csv", records)  # flushed: the run that wrote it was killed
    journal.close()
    assert first.dtype == np.float32
    assert first.tobytes() == VECTOR.tobytes()
    assert second is None


def test_row_that_something_else_made_is_not_taken(records, tmp_path):
    journal = Journal(tmp_path / "out.csv", 0, "weights")
    journal.add(records[0], VECTOR)
    journal.close()
    assert kept(tmp_path / "out.csv", records, "other weights") == [None, None]
    assert kept(tmp_path / "other.csv", records) == [None, None]


@pytest.mark.parametrize("file", ["a.nii", "mask.nii"])
def test_scan_whose_file_changed_is_another_scan(file, records, tmp_path):
    journal = Journal(tmp_path / "out.csv", 0, "weights")
    journal.add(records[0], VECTOR)
    journal.close()
    os.utime(tmp_path / file, ns=(1, 1))
    assert kept(tmp_path / "out.csv", records) == [None, None]


def test_channels_and_masks_are_part_of_a_scans_identity(records, tmp_path):
    a, b = (record.image for record in records)
    scans = [
        ScanRecord(a),
        records[0],
        ScanRecord({"T1w": a, "FLAIR": b}),
        ScanRecord({"T1w": b, "FLAIR": a}),
        ScanRecord({"T1w": a, "T2w": b}),
        ScanRecord({"T1w": a}, b),
    ]
    identities = [scan_identity(scan) for scan in scans]
    assert None not in identities
    assert len(set(identities)) == len(scans)
    assert scan_identity(ScanRecord({"FLAIR": b, "T1w": a})) == identities[2]


@pytest.mark.parametrize("image", ["missing.nii", (np.zeros((2, 2, 2)), np.eye(4))], ids=["missing", "in memory"])
def test_scan_without_a_file_has_no_row(image, tmp_path):
    record = ScanRecord(image)
    assert scan_identity(record) is None
    journal = Journal(tmp_path / "out.csv", 0, "weights")
    journal.add(record, VECTOR)
    assert journal.find(record) is None
    journal.close()
    assert list(tmp_path.iterdir()) == []  # an empty journal is not left behind


def test_processes_find_each_others_rows_and_remove_all(records, tmp_path):
    output = tmp_path / "out[1].csv"  # a name that means something to a file search
    for rank, record in enumerate(records):
        journal = Journal(output, rank, "weights")
        journal.add(record, VECTOR * (rank + 1))
        journal.close()
    (tmp_path / ".out1.csv.rank0.journal").write_text("another table's")
    found = kept(output, records)
    np.testing.assert_array_equal(found, [VECTOR, VECTOR * 2])
    journal = Journal(output, 0, "weights")
    journal.close()
    journal.remove()
    assert sorted(p.name for p in tmp_path.glob(".out*")) == [".out1.csv.rank0.journal"]


@pytest.mark.parametrize("torn", [1, 5, 40])
def test_torn_line_costs_its_own_row_only(torn, records, tmp_path):
    journal = Journal(tmp_path / "out.csv", 0, "weights")
    for record in records:
        journal.add(record, VECTOR)
    journal.close()
    (path,) = tmp_path.glob(".out.csv*")
    path.write_bytes(path.read_bytes()[:-torn])
    journal = Journal(tmp_path / "out.csv", 0, "weights")
    assert [journal.find(record) is None for record in records] == [False, True]
    journal.add(records[1], VECTOR)  # on a line of its own
    journal.close()
    assert [vector is None for vector in kept(tmp_path / "out.csv", records)] == [False, False]


def old_format(records):
    return json.dumps({"model": "weights", "scan": scan_identity(records[0]), "vector": [1.0]})


@pytest.mark.parametrize(
    "content",
    ["[1, 2]", '"text"', '{"model": "weights"}', old_format, "\x00\xff", "[" * 100_000, " ", "0123456789abcdef {}"],
    ids=["list", "text", "no vector", "old format", "bytes", "nested", "blank", "wrong checksum"],
)
def test_what_is_no_row_is_passed_over(content, records, tmp_path):
    journal = Journal(tmp_path / "out.csv", 0, "weights")
    journal.add(records[1], VECTOR)
    journal.close()
    (path,) = tmp_path.glob(".out.csv*")
    line = (content(records) if callable(content) else content).encode("latin-1")
    path.write_bytes(line + b"\n" + path.read_bytes() + b"\n" + line)
    first, second = kept(tmp_path / "out.csv", records)
    assert first is None
    assert second.tobytes() == VECTOR.tobytes()


def test_row_with_any_letter_changed_is_done_again(records, tmp_path):
    journal = Journal(tmp_path / "out.csv", 0, "weights")
    journal.add(records[0], VECTOR)
    journal.close()
    (path,) = tmp_path.glob(".out.csv*")
    whole = path.read_bytes()
    for place in range(1, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert kept(tmp_path / "out.csv", records) == [None, None], place


def test_rows_of_an_earlier_run_take_no_memory_before_they_are_asked_for(records, tmp_path):
    journal = Journal(tmp_path / "out.csv", 0, "weights")
    journal.add(records[0], np.ones(10_000, np.float32))
    journal.close()
    tracemalloc.start()
    journal = Journal(tmp_path / "out.csv", 0, "weights")
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 10_000
    assert journal.find(records[0]).nbytes == 40_000
    assert journal.find(records[0]).flags.owndata


def test_run_that_is_ended_before_its_first_row_leaves_another_process_s_rows(records, tmp_path):
    first, second = (Journal(tmp_path / "out.csv", 1, "weights") for _ in range(2))
    second.close()
    first.add(records[0], VECTOR)
    first.close()
    assert kept(tmp_path / "out.csv", records)[0] is not None
