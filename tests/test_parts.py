"""Parts of a table: rows of an interrupted run for the run that goes on, and of shards for the merged table."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import brainfm
from brainfm import parts
from brainfm.cli.main import main
from brainfm.errors import BrainfmError
from brainfm.manifest import ScanRecord
from brainfm.parts import About, Parts, Vectors, list_parts, merge, read_part, scan_identity
from brainfm.table import Origin, read, write

VECTOR = np.array([np.float32(1) / 3, -0.0, np.finfo(np.float32).tiny, 16777217], dtype=np.float32)
ORIGIN = Origin("model", "weights", None, {}, "float32", scans=2)
ENDINGS = [".parquet", ".npz"]


@pytest.fixture(params=ENDINGS)
def ending(request, monkeypatch):
    """With pyarrow, and without."""
    if request.param == ".parquet":
        pytest.importorskip("pyarrow")
    monkeypatch.setattr(parts, "_ending", lambda: request.param)
    return request.param


@pytest.fixture
def records(tmp_path):
    for name in ("a", "b", "mask"):
        (tmp_path / f"{name}.nii").write_text(name)
    return [ScanRecord(tmp_path / "a.nii", tmp_path / "mask.nii"), ScanRecord(tmp_path / "b.nii")]


def about(made_by="weights", origin=ORIGIN, shard="1/1"):
    return About(made_by, origin.to_dict(), shard)


def kept(folder, records, made_by="weights"):
    """What a new run finds: a vector or None of each scan."""
    found = Parts(folder, about(made_by), range(len(records)))
    found.resume(enumerate(records))
    numbers, vectors = found.taken()
    rows = dict(zip(numbers.tolist(), np.asarray(vectors), strict=True))
    return [rows.get(n) for n in range(len(records))]


def put(folder, records, vectors, **said):
    rows = Parts(folder, about(**said), range(len(records)))
    for n, (record, vector) in enumerate(zip(records, vectors, strict=True)):
        rows.fail(n, record, vector) if isinstance(vector, str) else rows.add(n, record, vector)
    rows.flush()


# --- Going on after an interruption ---------------------------------------------------------------


def test_row_comes_back_to_the_bit(ending, records, tmp_path):
    put(tmp_path / "parts", records[:1], [VECTOR])
    first, second = kept(tmp_path / "parts", records)
    assert first.dtype == np.float32
    assert first.tobytes() == VECTOR.tobytes()
    assert second is None
    (path,) = (tmp_path / "parts").iterdir()
    assert path.suffix == ending


def test_row_that_something_else_made_is_not_taken(ending, records, tmp_path):
    put(tmp_path / "parts", records[:1], [VECTOR])
    assert kept(tmp_path / "parts", records, "other weights") == [None, None]
    assert kept(tmp_path / "others", records) == [None, None]


def test_scan_that_failed_is_tried_again(ending, records, tmp_path):
    put(tmp_path / "parts", records, ["no such file", VECTOR])
    first, second = kept(tmp_path / "parts", records)
    assert first is None
    assert second.tobytes() == VECTOR.tobytes()


@pytest.mark.parametrize("file", ["a.nii", "mask.nii"])
def test_scan_whose_file_changed_is_another_scan(file, records, tmp_path):
    put(tmp_path / "parts", records[:1], [VECTOR])
    os.utime(tmp_path / file, ns=(1, 1))
    assert kept(tmp_path / "parts", records) == [None, None]


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
def test_scan_without_a_file_is_never_known_again(image, ending, tmp_path):
    put(tmp_path / "parts", [ScanRecord(image)], [VECTOR])
    assert scan_identity(ScanRecord(image)) is None
    assert kept(tmp_path / "parts", [ScanRecord(image)]) == [None]


def test_rows_are_divided_into_parts_and_read_in_any_order(ending, monkeypatch, tmp_path):
    monkeypatch.setattr(parts, "ROWS", 4)
    monkeypatch.setattr(parts, "_OPEN", 2)
    images = [tmp_path / f"{n}.nii" for n in range(11)]
    for image in images:
        image.write_text(image.name)
    records = [ScanRecord(image) for image in images]
    rows = Parts(tmp_path / "parts", about(), range(11))
    order = np.random.default_rng(0).permutation(11)
    for n in order:
        rows.add(n, records[n], VECTOR + n)
    wanted = np.stack([VECTOR + n for n in range(11)])
    numbers, vectors = rows.taken()  # of which the last are in memory alone
    assert len(list_parts(tmp_path / "parts")) == 2
    assert numbers.tolist() == list(range(11))
    assert vectors.shape == (11, 4)
    np.testing.assert_array_equal(np.asarray(vectors), wanted)
    np.testing.assert_array_equal(vectors[3:8], wanted[3:8])
    rows.flush()
    assert len(list_parts(tmp_path / "parts")) == 3
    np.testing.assert_array_equal(kept(tmp_path / "parts", records), wanted)


def test_slow_scans_are_written_one_by_one_and_quick_ones_once_a_second(ending, monkeypatch, records, tmp_path):
    now = [0.0]
    monkeypatch.setattr(parts.time, "monotonic", lambda: now[0])
    rows = Parts(tmp_path / "parts", about(), range(2))
    rows.add(0, records[0], VECTOR)
    assert not list_parts(tmp_path / "parts")
    now[0] = 1.1
    rows.add(1, records[1], VECTOR)
    (path,) = list_parts(tmp_path / "parts")
    assert read_part(path).numbers == [0, 1]


def test_processes_find_each_others_rows_and_remove_all(ending, records, tmp_path):
    folder = tmp_path / "out[1]"  # a name that means something to a file search
    for rank, record in enumerate(records):
        put(folder, [record], [VECTOR * (rank + 1)], shard=f"{rank + 1}/2")
    np.testing.assert_array_equal(kept(folder, records), [VECTOR, VECTOR * 2])
    Parts(folder, about(), range(1)).remove()
    assert not folder.exists()


def test_damaged_part_is_passed_over_wherever_it_is_damaged(ending, records, tmp_path, caplog):
    put(tmp_path / "parts", records, [VECTOR, VECTOR])
    (path,) = list_parts(tmp_path / "parts")
    whole = path.read_bytes()
    wanted = [VECTOR.tobytes()] * 2
    for place in range(0, len(whole), max(1, len(whole) // 97)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        found = [None if row is None else row.tobytes() for row in _or_damaged(tmp_path / "parts", records)]
        assert found in (wanted, [None, None]), place
    for cut in (1, 20, len(whole) // 2):
        path.write_bytes(whole[:-cut])
        assert kept(tmp_path / "parts", records) == [None, None]
    assert "passed over, and its scans are done again" in caplog.text


def _or_damaged(folder, records):
    """As `kept`; where the vectors alone are damaged, reading them says so."""
    try:
        return kept(folder, records)
    except BrainfmError as error:
        assert "damaged one" in str(error)  # noqa: PT017
        return [None] * len(records)


def test_what_is_no_part_is_passed_over(ending, records, tmp_path):
    put(tmp_path / "parts", records[1:], [VECTOR])
    for name, content in (
        ("1-of-1-00000000-00000" + ending, b"{}"),
        ("notes.txt", b"mine"),
        (".1-of-1-12345678-00000-0000-1-0000.parquet", b""),
    ):
        (tmp_path / "parts" / name).write_bytes(content)
    first, second = kept(tmp_path / "parts", records)
    assert first is None
    assert second.tobytes() == VECTOR.tobytes()


def test_rows_of_an_earlier_run_take_no_memory_before_they_are_asked_for(ending, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "SECONDS", 1e9)
    (tmp_path / "a.nii").write_text("a")
    records = [ScanRecord(tmp_path / "a.nii", tmp_path / "a.nii", f"p{n}") for n in range(1000)]
    put(tmp_path / "parts", records, [np.ones(1000, dtype=np.float32)] * 1000)
    tracemalloc.start()
    rows = Parts(tmp_path / "parts", about(), range(1000))
    rows.resume(enumerate(records))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == 1000
    assert held < 400_000  # the vectors are 4 MB


# --- Shards ---------------------------------------------------------------------------------------


def _run(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.output


@pytest.fixture
def cohort(small_sample, tmp_path):
    """A manifest of seven scans at 4 mm, of which the fifth is none."""
    lines = ["image_path,mask_path,patient_id,age"]
    for n in range(7):
        (tmp_path / f"{n}.nii.gz").write_bytes(b"no" if n == 4 else small_sample[0].read_bytes())
        lines.append(f"{n}.nii.gz,{small_sample[1]},p{n},{50 + n}")
    (tmp_path / "scans.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "scans.csv"


EMBED = ("--model", "test_resnet_3d", "--workers", "0", "-q")


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".npz"])
def test_shards_merged_are_the_table_of_one_run_to_the_bit(suffix, cohort, tmp_path, ending):
    whole, merged = tmp_path / "one" / f"t{suffix}", tmp_path / "merged" / f"t{suffix}"
    assert _run("embed", cohort, *EMBED, "-o", whole)[0] == 1
    for shard in ("2/3", "3/3", "1/3"):
        code, said = _run("embed", cohort, *EMBED, "-o", tmp_path / "parts", "--shard", shard)
        assert code == (1 if shard == "2/3" else 0), said
        assert f"(shard {shard} of 7 scans)" in said
    code, said = _run("merge", tmp_path / "parts", "-o", merged)
    assert code == 1
    assert "6 scans → " in said
    assert "1 scan failed" in said
    for path in sorted(whole.parent.iterdir()):
        assert (merged.parent / path.name).read_bytes() == path.read_bytes(), path.name
    assert sorted(p.name for p in merged.parent.iterdir()) == sorted(p.name for p in whole.parent.iterdir())


def test_shards_of_a_bids_folder_merged_are_the_table_of_one_run(small_sample, tmp_path):
    pytest.importorskip("bids2table")
    bids = tmp_path / "bids"
    for n in range(1, 6):
        anat = bids / f"sub-{n:02}" / "anat"
        anat.mkdir(parents=True)
        for kind, source in zip(("desc-preproc_T1w", "desc-brain_mask"), small_sample, strict=True):
            shutil.copy(source, anat / f"sub-{n:02}_space-MNI152NLin2009cAsym_{kind}.nii.gz")
    (bids / "dataset_description.json").write_text('{"Name": "made", "BIDSVersion": "1.9.0"}')
    assert _run("embed", bids, *EMBED, "-o", tmp_path / "whole.csv")[0] == 0
    for shard in ("2/2", "1/2"):
        code, said = _run("embed", bids, *EMBED, "-o", tmp_path / "parts", "--shard", shard)
        assert code == 0, said
        assert f"(shard {shard} of 5 scans)" in said
    assert _run("merge", tmp_path / "parts", "-o", tmp_path / "t.csv")[0] == 0
    assert read(tmp_path / "t.csv").columns()["patient_id"] == [f"sub-{n:02}" for n in range(1, 6)]
    assert (tmp_path / "t.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_dense_features_are_named_in_the_merged_table_as_in_that_of_one_run(cohort, tmp_path):
    dense = ("--dense", tmp_path / "maps")
    _run("embed", cohort, *EMBED, *dense, "-o", tmp_path / "whole.csv")
    for shard in ("1/2", "2/2"):
        _run("embed", cohort, *EMBED, *dense, "-o", tmp_path / "parts", "--shard", shard)
    _run("merge", tmp_path / "parts", "-o", tmp_path / "t.csv")
    assert "dense_path" in (tmp_path / "whole.csv").read_text().splitlines()[0]
    assert (tmp_path / "t.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_scan_that_failed_quality_control_is_a_failure_of_its_shard_and_not_missing(cohort, tmp_path):
    lines = cohort.read_text().splitlines()
    qc = ["qc", *("fail" if n == 2 else "pass" for n in range(7))]
    cohort.write_text("\n".join(f"{line},{verdict}" for line, verdict in zip(lines, qc, strict=True)) + "\n")
    _run("embed", cohort, *EMBED, "--strict-qc", "-o", tmp_path / "parts", "--shard", "1/1")
    _, said = _run("merge", tmp_path / "parts", "-o", tmp_path / "t.csv")
    assert "2 scans failed" in said
    assert "in no part" not in said
    assert "did not pass quality control" in (tmp_path / "t.errors.csv").read_text()


def test_shard_that_is_missing_is_named_and_the_table_of_the_others_written(cohort, tmp_path):
    _run("embed", cohort, *EMBED, "-o", tmp_path / "parts", "--shard", "1/3")
    _run("embed", cohort, *EMBED, "-o", tmp_path / "parts", "--shard", "3/3")
    code, said = _run("merge", tmp_path / "parts", "-o", tmp_path / "t.csv")
    assert code == 1
    assert "2 scans are in no part: run the shards 2/3 again" in said
    assert read(tmp_path / "t.csv").columns()["patient_id"] == ["p0", "p2", "p3", "p5", "p6"]


def test_shards_that_overlap_and_shards_run_twice_count_each_scan_once(cohort, tmp_path, monkeypatch):
    folder = tmp_path / "parts"
    for shard in ("1/2", "1/2", "1/3", "2/3", "3/3", "2/2"):
        _run("embed", cohort, *EMBED, "-o", folder, "--shard", shard)
    patients = [name for path in list_parts(folder) for name in read_part(path).texts["patient_id"] if name != "p4"]
    assert sorted(patients) == ["p0", "p1", "p2", "p3", "p5", "p6"]  # what another shard did is not done again
    _run("merge", folder, "-o", tmp_path / "t.csv")
    _run("embed", cohort, *EMBED, "-o", tmp_path / "whole.csv")
    assert (tmp_path / "t.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_two_runs_of_one_shard_at_once_give_the_table_of_one(cohort, tmp_path):
    command = [sys.executable, "-m", "brainfm", "embed", str(cohort), *EMBED, "-o", str(tmp_path / "parts")]
    both = [subprocess.Popen([*command, "--shard", "1/1"], stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [one.wait(timeout=900) for one in both] == [1, 1]
    _run("merge", tmp_path / "parts", "-o", tmp_path / "t.csv")
    assert read(tmp_path / "t.csv").columns()["patient_id"] == ["p0", "p1", "p2", "p3", "p5", "p6"]


KILLED = """
import os, signal, sys
import brainfm, importlib, torch
from brainfm import parts

torch.set_num_threads(1)
parts.SECONDS = 0
module, left = importlib.import_module("brainfm.embed"), int(sys.argv[3])
real = module._outcomes

def outcomes(*arguments):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)

module._outcomes = outcomes
brainfm.embed(sys.argv[1], "test_resnet_3d", output=sys.argv[2], shard="1/1", num_workers=0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL")
def test_shard_that_is_killed_again_and_again_loses_nothing_and_does_nothing_twice(cohort, tmp_path):
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", KILLED, cohort, tmp_path / "parts", "2"], timeout=900)
        assert done.returncode in (-signal.SIGKILL, 0)
    patients = [name for path in list_parts(tmp_path / "parts") for name in read_part(path).texts["patient_id"]]
    assert sorted(name for name in patients if name != "p4") == ["p0", "p1", "p2", "p3", "p5", "p6"]
    assert {path.suffix for path in (tmp_path / "parts").iterdir()} <= {".parquet", ".npz"}


def test_array_task_writes_parts_where_the_output_is_a_folder_and_a_table_where_not(cohort, tmp_path, monkeypatch):
    for name, value in {"ID": "1", "COUNT": "7", "MIN": "0"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    code, said = _run("embed", cohort, *EMBED, "-o", tmp_path / "parts")
    assert code == 0
    assert "(shard 2/7 of 7 scans)" in said
    assert _run("embed", cohort, *EMBED, "-o", tmp_path / "whole.csv")[0] == 1
    assert len(read(tmp_path / "whole.csv")) == 6


def test_parts_of_another_model_are_refused_before_any_work(cohort, tmp_path):
    _run("embed", cohort, *EMBED, "-o", tmp_path / "parts", "--shard", "1/7")
    code, said = _run("embed", cohort, "--model", "test_vit_3d", "-o", tmp_path / "parts", "--shard", "2/7")
    assert code == 1
    assert "holds parts that test_resnet_3d.phantoms made" in said
    put(tmp_path / "others", [ScanRecord("a.nii")], [VECTOR])
    with pytest.raises(BrainfmError, match="differ in weights"):
        merge([tmp_path / "parts", tmp_path / "others"])


@pytest.mark.parametrize("output", ["t.csv", "file"])
def test_shard_whose_output_is_no_folder_is_refused(output, cohort, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, said = _run("embed", cohort, *EMBED, "-o", tmp_path / output, "--shard", "1/2")
    assert code == 1
    assert "a shard's rows go to a folder" in said
    assert (tmp_path / "file").read_text() == "mine"


def test_folder_without_a_shard_is_told_of_shards(cohort, tmp_path):
    code, said = _run("embed", cohort, *EMBED, "-o", tmp_path)
    assert code == 1
    assert "--shard i/n" in said


def test_shard_without_a_scan_says_so(cohort, tmp_path):
    code, said = _run("embed", cohort, *EMBED, "-o", tmp_path / "parts", "--shard", "9/9")
    assert code == 0
    assert "no scan is in shard 9/9 of 7" in said


def test_nothing_to_merge_is_named(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        code, said = _run("merge", folder, "-o", tmp_path / "t.csv")
        assert code == 1
        assert "no parts of a table" in said


def test_damaged_part_is_named_and_not_left_out_of_the_table(cohort, tmp_path):
    _run("embed", cohort, *EMBED, "-o", tmp_path / "parts", "--shard", "1/1")
    (path,) = list_parts(tmp_path / "parts")
    path.write_bytes(path.read_bytes()[:-8])
    code, said = _run("merge", tmp_path / "parts", "-o", tmp_path / "t.csv")
    assert code == 1
    assert f"{path}: not a part of a table, or a damaged one" in said
    assert not (tmp_path / "t.csv").exists()


def test_full_disk_ends_the_run_in_a_line_and_keeps_what_was_written(cohort, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "SECONDS", 0)
    real, left = parts.write_part, [3]

    def full(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(parts, "write_part", full)
    code, said = _run("embed", cohort, *EMBED, "-o", tmp_path / "parts", "--shard", "1/1")
    assert code == 1
    assert "No space left on device" in said
    monkeypatch.setattr(parts, "write_part", real)
    (path,) = list_parts(tmp_path / "parts")
    assert read_part(path).texts["patient_id"] == ["p0", "p1", "p2"]
    assert _run("embed", cohort, *EMBED, "-o", tmp_path / "parts", "--shard", "1/1")[0] == 1  # of p4
    assert _run("merge", tmp_path / "parts", "-o", tmp_path / "t.csv")[1].startswith("6 scans")


def test_row_whose_scan_failed_first_and_succeeded_later_is_no_failure(cohort, tmp_path, small_sample):
    assert _run("embed", cohort, *EMBED, "-o", tmp_path / "parts", "--shard", "1/1")[0] == 1
    (tmp_path / "4.nii.gz").write_bytes(small_sample[0].read_bytes())
    assert _run("embed", cohort, *EMBED, "-o", tmp_path / "parts", "--shard", "1/1")[0] == 0
    assert _run("merge", tmp_path / "parts", "-o", tmp_path / "t.csv")[0] == 0
    table = read(tmp_path / "t.csv")
    assert table.columns()["age"] == [str(50 + n) for n in range(7)]
    assert (table.origin.scans, table.origin.failed) == (7, 0)


def test_shards_of_several_models_have_a_folder_each(cohort, tmp_path):
    models = ("--model", "test_resnet_3d", "--model", "test_vit_3d")
    assert _run("embed", cohort, *models, "-q", "-o", tmp_path / "parts", "--shard", "1/1")[0] == 1
    found = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert found == ["parts.test_resnet_3d", "parts.test_vit_3d"]
    for folder in found:
        _run("merge", tmp_path / folder, "-o", tmp_path / f"{folder}.csv")
        assert len(read(tmp_path / f"{folder}.csv")) == 6


def test_python_gets_the_shards_own_rows(cohort, tmp_path):
    table = brainfm.embed(cohort, "test_resnet_3d", output=tmp_path / "parts", shard="3/4")
    assert isinstance(table.vectors, np.ndarray)
    assert table.columns()["patient_id"] == ["p2", "p6"]
    with pytest.raises(ValueError, match="name it as output"):
        brainfm.embed(cohort, "test_resnet_3d", shard="3/4")


def test_vectors_read_as_they_are_asked_for_are_written_as_those_in_memory(ending, records, tmp_path):
    put(tmp_path / "parts", records, [VECTOR, VECTOR * 2])
    table = merge([tmp_path / "parts"]).table
    assert isinstance(table.vectors, Vectors)
    for suffix in (".csv", ".npz", ".parquet"):
        write(table, tmp_path / f"lazy{suffix}")
        np.testing.assert_array_equal(read(tmp_path / f"lazy{suffix}").vectors, [VECTOR, VECTOR * 2])
    assert isinstance(Path(table.records[0].image), Path)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that nobody may write to")
@pytest.mark.parametrize(
    "command", [("-o", "/proc/parts", "--shard", "1/1"), ("-o", "/proc/t.csv")], ids=["shard", "table"]
)
def test_output_that_cannot_be_written_is_named_before_any_scan_is_read(command, cohort, monkeypatch):
    module = importlib.import_module("brainfm.embed")
    monkeypatch.setattr(module, "prepared_scans", lambda *_: pytest.fail("a scan is read"))
    code, said = _run("embed", cohort, *EMBED, *command)
    assert code == 1
    assert "/proc" in said
    assert "Error: " in said.splitlines()[-1]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(30, "Read-only file system")])
def test_table_that_cannot_be_written_leaves_the_parts_and_no_half_of_it(error, cohort, tmp_path, monkeypatch):
    _run("embed", cohort, *EMBED, "-o", tmp_path / "parts", "--shard", "1/1")
    before = {path: path.read_bytes() for path in (tmp_path / "parts").iterdir()}

    def lost(_):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr("brainfm.files.sync", lost)
        code, said = _run("merge", tmp_path / "parts", "-o", tmp_path / "out" / "t.csv")
    assert code == 1
    assert error.strerror in said.splitlines()[-1]
    assert list((tmp_path / "out").iterdir()) == []
    assert {path: path.read_bytes() for path in (tmp_path / "parts").iterdir()} == before
    assert _run("merge", tmp_path / "parts", "-o", tmp_path / "out" / "t.csv")[1].startswith("6 scans")
