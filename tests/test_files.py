"""Files: what is written is written whole or not at all; what is read is known by its digest or its state."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from brainfm.errors import BrainfmError
from brainfm.files import (
    atomic_path,
    file_git_blob,
    file_sha256,
    file_state,
    held,
    one_line,
    progress_bar,
    sweep,
    temporary_path,
    write_json,
    write_text,
)


@pytest.mark.parametrize("before", [None, "old"])
def test_atomic_write_that_fails_leaves_things_as_they_were(before, tmp_path):
    target = tmp_path / "table.csv"
    if before:
        target.write_text(before)

    def write():
        with atomic_path(target) as temporary:
            temporary.write_text("half of a tab")
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        write()
    assert [p.name for p in tmp_path.iterdir()] == (["table.csv"] if before else [])
    assert not before or target.read_text() == before


def test_atomic_write_replaces_the_file_when_it_is_done(tmp_path):
    target = tmp_path / "new" / "table.csv"
    for text in ("first", "second"):
        with atomic_path(target) as temporary:
            assert (temporary.parent, temporary.suffix) == (target.parent, ".csv")
            temporary.write_text(text)
            assert not target.exists() or target.read_text() == "first"
        assert target.read_text() == text
    assert [p.name for p in target.parent.iterdir()] == ["table.csv"]
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask


def test_text_and_json_are_written_in_utf8_and_whole(tmp_path, monkeypatch):
    write_text(tmp_path / "new" / "a.txt", "Gehirn – 脑")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "Gehirn – 脑".encode()
    write_json(tmp_path / "a.json", {"name": "脑", "values": [1, 2.5, None]})
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"name": "脑", "values": [1, 2.5, None]}
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"values": object()})
    assert json.loads((tmp_path / "a.json").read_bytes())["name"] == "脑"
    assert {path.name for path in tmp_path.iterdir()} == {"new", "a.json"}


@pytest.mark.parametrize("content", [b"", b"hello\n", b"x" * 3_000_000])
def test_digests_are_those_of_the_whole_content(content, tmp_path):
    (tmp_path / "a").write_bytes(content)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    blob = b"blob %d\0" % len(content) + content
    assert file_git_blob(tmp_path / "a") == hashlib.sha1(blob, usedforsecurity=False).hexdigest()


def test_git_blob_is_what_git_says(tmp_path):
    (tmp_path / "a").write_bytes(b"hello\n")
    assert file_git_blob(tmp_path / "a") == "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object


def test_state_of_a_file_changes_with_its_content_and_not_with_how_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("one")
    os.utime(tmp_path / "a", ns=(0, 10))
    before = file_state(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    assert file_state("a") == before == json.loads(json.dumps(before))
    (tmp_path / "a").write_text("two")
    os.utime(tmp_path / "a", ns=(0, 11))
    changed = file_state("a")
    (tmp_path / "a").write_text("three")
    os.utime(tmp_path / "a", ns=(0, 10))
    assert changed != before != file_state("a")
    with pytest.raises(FileNotFoundError):
        file_state("none")


@pytest.mark.parametrize(
    ("message", "line"), [("a\n  b\tc", "a b c"), ("", "ValueError"), ("x" * 500, "x" * 300), (" \n ", "ValueError")]
)
def test_message_becomes_one_line(message, line):
    assert one_line(ValueError(message)) == line


# --- File systems that lack a call ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "number"),
    [
        *(("chmod", errno.EOPNOTSUPP), ("chmod", errno.EPERM)),  # FUSE, CIFS
        *(("fsync", errno.EOPNOTSUPP), ("fsync", errno.EBADF)),  # Windows, of a folder or what is open to be read
    ],
)
def test_file_system_without_a_call_costs_no_result(call, number, tmp_path, monkeypatch):
    def lacking(*arguments, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, lacking)
    monkeypatch.setattr(type(tmp_path), "chmod", lacking)
    write_text(tmp_path / "a.txt", "whole")
    assert (tmp_path / "a.txt").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_sync_that_says_the_content_is_lost_is_an_error(number, tmp_path, monkeypatch):
    def lost(*arguments):
        raise OSError(number, "lost")

    monkeypatch.setattr(os, "fsync", lost)
    with pytest.raises(OSError, match="lost"):
        write_text(tmp_path / "a.txt", "whole")
    assert list(tmp_path.iterdir()) == []


# --- What killed processes leave ------------------------------------------------------------------


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def left_by(process, path, machine=None):
    """A temporary file of `path`, as if a process had been killed while it wrote it."""
    ours = temporary_path(path)
    name = ours.name.replace(f"-{os.getpid()}-", f"-{process}-")
    if machine:
        name = re.sub(r"-[0-9a-f]{4}-", f"-{machine}-", name, count=1)
    leftover = ours.with_name(name)
    leftover.write_text("half a tab")
    return leftover


def test_sweep_removes_what_ended_processes_left_of_this_output_only(tmp_path):
    output = tmp_path / "out.csv"
    dead = dead_process()
    gone = [left_by(dead, tmp_path / name) for name in ("out.csv", "out.json", "out.errors.csv")]
    others = tmp_path / ".out-1234abcd.csv", tmp_path / ".out.csv.parts", tmp_path / "out.csv"
    stay = [left_by(dead, tmp_path / "outer.csv"), left_by(os.getpid(), output), left_by(os.getppid(), output)]
    for path in others:
        path.write_text("another's")
    elsewhere = left_by(dead, output, machine="0000")
    sweep(output)
    assert not any(path.exists() for path in gone)
    assert all(path.exists() for path in (*others, *stay, elsewhere))
    sweep(output, others=True)
    assert not elsewhere.exists()
    assert all(path.exists() for path in (*others, *stay))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for the state of a process in /proc")
def test_sweep_removes_what_a_killed_process_left_that_nobody_waited_for(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"]) as process:
        left = left_by(process.pid, tmp_path / "out.csv")
        sweep(tmp_path / "out.csv")
        assert left.exists()
        process.kill()
        while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
        sweep(tmp_path / "out.csv")
        assert not left.exists()


def test_sweep_of_a_folder_goes_through_all_of_it(tmp_path):
    (tmp_path / "scans").mkdir()
    left = [left_by(dead_process(), tmp_path / "scans" / name) for name in ("a.image.npy", "b.nii.gz", "model")]
    left[2].unlink()
    left[2].mkdir()  # of a folder that was being written
    (left[2] / "model.safetensors").write_text("half")
    (tmp_path / "scans" / "a.npy").write_text("whole")
    sweep(tmp_path)
    assert [path.name for path in (tmp_path / "scans").iterdir()] == ["a.npy"]


# --- One command at a time ------------------------------------------------------------------------

HOLD = """
import os, pathlib, sys, time
from brainfm.files import held
with held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A function (output) → a process that holds it."""
    processes = []

    def hold(output):
        process = subprocess.Popen([sys.executable, "-c", HOLD, output], stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_output_is_held_by_one_process_which_is_named_and_taken_over_when_it_is_killed(kind, holder, tmp_path):
    output = tmp_path / "out"
    if kind == "folder":
        output.mkdir()
    process = holder(output)
    named = rf"out: process {process.pid} on {re.escape(platform.node())}, since 20"
    with pytest.raises(BrainfmError, match=named), held(output):
        pass
    leftover = left_by(process.pid, output / "a.npy" if kind == "folder" else output)
    process.kill()
    process.wait()
    with held(output):
        assert not leftover.exists()
    assert [path.name for path in tmp_path.rglob("*")] == (["out"] if kind == "folder" else [])


def test_output_is_held_once_within_a_process_and_free_afterwards(tmp_path):
    output = tmp_path / "out.csv"
    for _ in range(2):
        with (
            held(output),
            held(tmp_path / "other.csv"),
            pytest.raises(BrainfmError, match=f"process {os.getpid()} on "),
        ):
            held(output).__enter__()
    with pytest.raises(RuntimeError, match="failed"), held(tmp_path / "out.csv"):
        raise RuntimeError("failed")
    assert list(tmp_path.iterdir()) == []


def test_processes_of_one_torchrun_share_a_lock(tmp_path, monkeypatch):
    with held(tmp_path / "out.csv"):
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", "29500")
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        with held(tmp_path / "out.csv"):
            pass
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(BrainfmError, match="is writing it"), held(tmp_path / "out.csv"):
            pass


@pytest.mark.parametrize("fault", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")])
def test_file_system_without_locks_costs_the_lock_and_not_the_result(fault, tmp_path, monkeypatch, caplog):
    fcntl = pytest.importorskip("fcntl")

    def lacking(*arguments):
        raise fault

    monkeypatch.setattr(fcntl, "flock", lacking)
    with held(tmp_path / "out.csv"):
        write_text(tmp_path / "out.csv", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]
    assert "cannot be locked here" in caplog.text


# --- The bar ----------------------------------------------------------------------------------------

COUNTING = """
from brainfm.files import progress_bar
with progress_bar(total=3, unit="scan", doing="embedding", shown=True) as bar:
    for _ in range(3):
        bar.update()
"""


def drawn(rows: int, columns: int, **environment: str) -> str:
    """What a command draws on a terminal of this size."""
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    started = subprocess.Popen([sys.executable, "-c", COUNTING], stderr=theirs, env=os.environ | environment)
    os.close(theirs)
    seen = b""
    while True:
        try:
            block = os.read(ours, 4096)
        except OSError:  # Linux: the other end is closed
            block = b""
        if not block:
            break
        seen += block
    os.close(ours)
    assert started.wait(900) == 0
    return seen.decode()


@pytest.mark.parametrize(("rows", "columns"), [(24, 80), (0, 0), (24, 0), (0, 80)])
def test_bar_is_drawn_on_a_terminal_even_of_no_known_size(rows, columns):
    assert re.search(r"embedding: 100%\|\S{10,}\| 3/3 \[.*scan/s\]", drawn(rows, columns))


def test_bar_is_not_drawn_where_tqdm_is_disabled():
    assert drawn(24, 80, TQDM_DISABLE="1") == ""


def test_bar_is_not_drawn_into_a_pipe():
    ended = subprocess.run([sys.executable, "-c", COUNTING], capture_output=True, text=True, timeout=900, check=True)
    assert (ended.stdout, ended.stderr) == ("", "")


def test_bar_is_drawn_in_a_notebook_whose_stderr_is_no_terminal(monkeypatch, capsys):
    shell = SimpleNamespace(kernel="a kernel", config={})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    with progress_bar(total=2, unit="scan", doing="embedding", shown=True) as bar:
        bar.update(2)
    assert "embedding: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("alive", [True, False])
def test_output_whose_locks_lock_nothing_is_held_by_what_the_holder_says(alive, tmp_path, monkeypatch, caplog):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    process = os.getppid() if alive else dead_process()
    holder = tmp_path / ".out.csv.holder"
    holder.write_text(f"process {process} on {platform.node()}, since 2026-01-01 00:00:00+00:00,")
    if alive:
        with pytest.raises(BrainfmError, match=rf"out\.csv: process {process} on .*If it has ended, remove "):
            held(tmp_path / "out.csv").__enter__()
        assert holder.exists()
        return
    with held(tmp_path / "out.csv"):
        assert f"process {os.getpid()} " in holder.read_text()
        with pytest.raises(BrainfmError, match=f"process {os.getpid()} on "):
            held(tmp_path / "out.csv").__enter__()
    assert not holder.exists()
    assert "its locks lock nothing" in caplog.text


@pytest.mark.parametrize("number", [errno.EACCES, errno.EBUSY])
def test_file_that_another_program_has_open_is_replaced_when_it_is_closed(number, tmp_path, monkeypatch):
    replace, refused = type(tmp_path).replace, []

    def busy(self, target):
        if len(refused) < 2:
            refused.append(target)
            raise OSError(number, "used by another process")
        return replace(self, target)

    monkeypatch.setattr(type(tmp_path), "replace", busy)
    write_text(tmp_path / "a.txt", "whole")
    assert len(refused) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_sweep_passes_over_a_folder_that_another_process_removes_meanwhile(tmp_path, monkeypatch):
    gone, scandir = tmp_path / "a" / "b", os.scandir
    gone.mkdir(parents=True)
    leftover = left_by(999_999_999, tmp_path / "z.npy")

    def removed_first(path="."):
        if os.fspath(path) == str(gone):
            gone.rmdir()
        return scandir(path)

    monkeypatch.setattr(os, "scandir", removed_first)
    sweep(tmp_path)
    assert not gone.exists()
    assert not leftover.exists()
