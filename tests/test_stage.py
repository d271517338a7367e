"""Copies on a local disk: what is read of them, how many stay, and what becomes of a run whose stage fails."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner

from brainfm import ScanError, stage
from brainfm.cli import main
from brainfm.manifest import ScanRecord
from brainfm.stage import Stage, files_of

posix = pytest.mark.skipif(os.name == "nt", reason="forks")


def written(path, size=1000):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(size))
    return path


def copies(folder):
    """The files that are whole; others may be made and renamed meanwhile."""
    names = (name for top, _, files in os.walk(folder) for name in files if "/." not in top.replace(os.sep, "/"))
    return sorted(name for name in names if not name.startswith("."))


@pytest.fixture
def full(monkeypatch):
    """Every disk that a stage is on is full after so many bytes."""

    def after(size):
        def sync(path):
            if path.stat().st_size > size:
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(stage, "sync", sync)

    return after


def test_copy_is_made_once_and_a_file_that_changed_is_another(tmp_path):
    own, local = written(tmp_path / "disk" / "a.nii.gz"), Stage(tmp_path / "stage")
    copy = Path(local.local(own))
    assert copy.name == "a.nii.gz"
    assert copy.is_relative_to(tmp_path / "stage")
    assert copy.read_bytes() == own.read_bytes()
    copy.write_bytes(b"marked")
    assert local.local(own) == str(copy)
    assert copy.read_bytes() == b"marked"  # as nobody has copied it anew
    written(own, 2000)
    assert Path(local.local(own)).read_bytes() == own.read_bytes()


def test_folder_of_a_prepared_scan_is_copied_whole_and_other_folders_and_pairs_stay(tmp_path):
    for name in ("prep.json", "head.nii.gz", "brain_mask.nii.gz"):
        written(tmp_path / "sub-01" / name)
    written(tmp_path / "other" / "prep.json")
    pair = written(tmp_path / "a.hdr")
    local = Stage(tmp_path / "stage")
    copy = Path(local.local(tmp_path / "sub-01"))
    assert copy.name == "sub-01"
    assert sorted(path.name for path in copy.iterdir()) == ["brain_mask.nii.gz", "head.nii.gz", "prep.json"]
    for path in (tmp_path / "other", pair, tmp_path / "gone.nii"):
        assert local.local(path) == str(path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.nii")
        assert local.local(tmp_path / "pipe.nii") == str(tmp_path / "pipe.nii")  # which is not waited for


def test_stage_stays_below_its_size_and_what_was_used_least_recently_leaves(tmp_path):
    files = [written(tmp_path / "disk" / f"{n}.nii", 100_000) for n in range(12)]
    theirs = written(tmp_path / "stage" / "0" / "theirs.bin", 2_000_000)  # somebody has a folder there already
    local = Stage(tmp_path / "stage", size_gb=1e-3)  # ten of these
    held = []
    for n, file in enumerate(files):
        local.local(file)
        os.utime(Path(local.local(files[0])).parent, (2e9 + n, 2e9 + n))  # the first is used again and again
        held.append(sum(path.stat().st_size for path in (tmp_path / "stage").rglob("*.nii")))
    assert max(held) <= 1e6
    assert {"0.nii", "11.nii"} <= set(copies(tmp_path / "stage"))
    assert "1.nii" not in copies(tmp_path / "stage")
    assert theirs.stat().st_size == 2_000_000
    large = written(tmp_path / "disk" / "large.nii", 1_100_000)
    assert local.local(large) == str(large)


def test_error_names_the_scan_and_one_whose_copy_left_is_read_where_it_is(tmp_path):
    record, local = ScanRecord(written(tmp_path / "a.nii.gz")), Stage(tmp_path / "stage")

    def refused(its):
        assert its.image != record.image
        raise ScanError(f"{its.image}: not a scan")

    with pytest.raises(ScanError) as refusal:
        local.read(record, refused)
    assert str(refusal.value) == f"{record.image}: not a scan"

    def gone(its):
        if its.image != record.image:
            shutil.rmtree(Path(its.image).parent)
        return Path(its.image).read_bytes()

    assert local.read(record, gone) == (tmp_path / "a.nii.gz").read_bytes()


def test_full_disk_is_said_once_and_costs_no_scan(tmp_path, full, caplog):
    files = [written(tmp_path / "disk" / f"{n}.nii", 1000 * n) for n in range(1, 6)]
    full(2500)
    local = Stage(tmp_path / "stage")
    assert [Path(local.local(file)).read_bytes() for file in files] == [file.read_bytes() for file in files]
    assert copies(tmp_path / "stage") == ["1.nii", "2.nii"]
    (said,) = (record.message for record in caplog.records)
    assert said.startswith(f"{tmp_path / 'stage' / 'brainfm-stage'}: nothing can be staged there ([Errno 28] No space ")
    (tmp_path / "file").touch()
    record = ScanRecord(files[0])
    assert Stage(tmp_path / "file" / "stage").read(record, lambda its: its.image) == record.image


def test_files_are_copied_ahead_of_their_turn(tmp_path):
    records = [ScanRecord(written(tmp_path / "disk" / f"{n}.nii")) for n in range(40)]
    local, seen = Stage(tmp_path / "stage"), []
    for n, record in enumerate(local.ahead(records, files_of)):
        seen.append(record)
        local.read(record, lambda its: Path(its.image).read_bytes())
        if n == 0:
            assert len(copies(tmp_path / "stage")) <= 17  # and not all
    assert seen == records
    assert len(copies(tmp_path / "stage")) == 40


@posix
def test_processes_share_a_stage_and_one_that_was_killed_leaves_nothing_that_is_taken(tmp_path, monkeypatch):
    files = [written(tmp_path / "disk" / f"{n}.nii", 50_000) for n in range(8)]

    def in_a_process(work):
        if (child := os.fork()) == 0:
            try:
                work()
            finally:
                os._exit(0)
        return child

    def killed():
        monkeypatch.setattr(stage, "sync", lambda _: os._exit(9))  # all is copied, and it has not its name yet
        Stage(tmp_path / "stage").local(files[0])

    assert os.waitpid(in_a_process(killed), 0)[1] != 0
    assert any((tmp_path / "stage").rglob(".*-*"))

    def read_all():
        local = Stage(tmp_path / "stage", size_gb=3e-4)  # six of these: they are taken away from one another
        for file in files * 5:
            if local.read(ScanRecord(file), lambda its: Path(its.image).read_bytes()) != file.read_bytes():
                os._exit(1)

    assert [os.waitpid(child, 0)[1] for child in [in_a_process(read_all) for _ in range(3)]] == [0, 0, 0]
    assert {path.read_bytes() for path in (tmp_path / "stage").rglob("*.nii")} <= {file.read_bytes() for file in files}
    assert not list((tmp_path / "stage").rglob(".*-*-*"))  # what the killed one left is swept away


# --- The commands ---------------------------------------------------------------------------------


@pytest.fixture
def scans(small_sample, tmp_path):
    """A manifest of three scans that differ, one of which is none."""
    image = nib.load(small_sample[0])
    lines = ["image_path,mask_path,patient_id"]
    for n in range(2):
        changed = (image.get_fdata() * (1 + n)) ** (1 + n / 4)
        nib.Nifti1Image(changed.astype(np.float32), image.affine).to_filename(tmp_path / f"{n}.nii.gz")
        lines.append(f"{n}.nii.gz,{small_sample[1]},p{n}")
    (tmp_path / "2.nii.gz").write_bytes(b"nothing" * 100)
    (tmp_path / "scans.csv").write_text("\n".join([*lines, f"2.nii.gz,{small_sample[1]},p2"]))
    return tmp_path / "scans.csv"


def invoke(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_embed_reads_what_is_staged_and_says_what_it_is(scans, tmp_path):
    def table(name, *options):
        done = invoke("embed", scans, "--model", "test_resnet_3d", "-o", tmp_path / name, *options)
        assert done.exit_code == 1
        return (tmp_path / name).read_text(), (tmp_path / name.replace(".csv", ".errors.csv")).read_text()

    place = ["--stage", tmp_path / "stage", "--stage-size", "1"]
    assert table("staged.csv", *place) == table("plain.csv")
    assert copies(tmp_path / "stage") == ["0.nii.gz", "1.nii.gz", "2.nii.gz", "mask.nii.gz"]
    (first,) = (tmp_path / "stage").rglob("0.nii.gz")
    shutil.copy(tmp_path / "1.nii.gz", first)
    rows = table("again.csv", *place)[0].splitlines()
    assert rows[1].split(",")[5:] == rows[2].split(",")[5:]  # the first is read there, and nowhere else


def test_cache_build_by_several_processes_is_the_same_from_a_stage_and_from_a_full_one(scans, tmp_path, full):
    def arrays(name, *options):
        done = invoke("cache", "build", scans, tmp_path / name, "--model", "test_resnet_3d", "--workers", 2, *options)
        assert done.exit_code == 1
        assert "2 scans written, 0 were there, 1 refused" in done.output
        found = {path.name: path.read_bytes() for path in (tmp_path / name / "scans").iterdir()}
        lines = [json.loads(line) for line in (tmp_path / name / "index.jsonl").read_text().splitlines() if line]
        return found, sorted(line["image"] + line.get("error", "") for line in lines)

    plain = arrays("plain")
    assert arrays("staged", "--stage", tmp_path / "stage") == plain
    assert len(copies(tmp_path / "stage")) == 4
    full(0)
    assert arrays("full", "--stage", tmp_path / "other") == plain
    assert copies(tmp_path / "other") == []
