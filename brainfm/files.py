"""Files, once for all rooms: written whole or not at all, by one command at a time, known by digest or state."""

from __future__ import annotations

import csv
import datetime
import errno
import hashlib
import json
import logging
import os
import platform
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

from brainfm.errors import BrainfmError
from brainfm.system import launched

logger = logging.getLogger("brainfm")

_BUSY = (errno.EACCES, errno.EBUSY)  # of a move: the file that is replaced is open
_LOST = (errno.EIO, errno.ENOSPC, errno.EDQUOT)  # of a sync: what was written is not on the disk


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; moved there, synced, when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    temporary.touch()
    mode = temporary.stat().st_mode  # as the user's umask has it, whatever the writer makes of it
    try:
        yield temporary
        with suppress(OSError):  # CIFS and some FUSE file systems have no modes
            temporary.chmod(mode)
        sync(temporary)
        _replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _replace(temporary: Path, path: Path) -> None:
    """Move a file over another, which Windows and its shares refuse as long as another program has that open."""
    for pause in (0.05, 0.1, 0.2, 0.4, 0.8):
        try:
            temporary.replace(path)
            return
        except OSError as error:
            if error.errno not in _BUSY:
                raise
        time.sleep(pause)
    temporary.replace(path)


def temporary_path(path: Path) -> Path:
    """A hidden name beside `path` that says whose it is: `.stem-machine-process-random.suffix`; see `sweep`."""
    return path.with_name(f".{path.stem}-{_machine()}-{os.getpid()}-{secrets.token_hex(2)}{path.suffix}")


def _machine() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:4]


def sync(path: Path) -> None:
    """Bring a file's content to the disk; a file system that cannot is trusted.

    Raises OSError where it says that the content is lost.
    """
    try:
        with path.open("r+b") as file:  # Windows syncs no file that is open for reading only
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno in _LOST:
            raise


def list_below(folder: Path, pattern: str) -> list[Path]:
    """Files and folders anywhere below a folder, by their name; folders that others remove meanwhile are passed over.

    As `sorted(folder.rglob(pattern))`, which Python before 3.13 ends in a FileNotFoundError where a folder goes.
    """
    names = ((top, name) for top, folders, files in os.walk(folder) for name in (*folders, *files))
    return sorted(Path(top, name) for top, name in names if fnmatchcase(name, pattern))


def sweep(output: Path, *, others: bool = False) -> None:
    """Remove what killed processes left of an output: temporary files beside a file, or anywhere in a folder.

    Only those of `temporary_path`, and of processes of this machine that have ended; with `others` those of other
    machines too, for whoever holds the output's lock.
    """
    in_folder = output.is_dir()
    found = list_below(output, ".*") if in_folder else output.parent.glob(".*")
    ours = r"\.(?P<stem>.+)-(?P<machine>[0-9a-f]{4})-(?P<process>\d+)-[0-9a-f]{4}(\.[^.]*)?"
    for path in list(found):
        name = re.fullmatch(ours, path.name)
        if name is None or not (in_folder or f"{name['stem']}.".startswith(f"{output.stem}.")):
            continue
        if not _has_ended(int(name["process"])) if name["machine"] == _machine() else not others:
            continue
        with suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _has_ended(process: int) -> bool:
    if os.name == "nt":
        return False  # os.kill would end it
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        pass
    try:  # in a container whose first process waits for no other's children, a killed one stays, as a zombie
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
        return state.split()[0] == "Z"
    except (OSError, IndexError):
        return False


@contextmanager
def held(output: Path) -> Iterator[None]:
    """Keep other commands off an output while the block runs; what killed ones left of it is swept away first.

    The lock is a hidden file beside a file, or in a folder that is there, and ends with its process, however that
    ends. Under torchrun the first process holds it for all. On a file system without locks, or with locks that lock
    nothing, a file that says who holds the output stands in for it, as long as that process lives.

    Raises:
        BrainfmError: Another command is writing the output; the message says which process, where, and since when.
    """
    from filelock import FileLock, Timeout

    if launched().rank != 0:
        yield
        return
    in_folder = output.is_dir()
    output.parent.mkdir(parents=True, exist_ok=True)
    place = output / ".lock" if in_folder else output.with_name(f".{output.name}.lock")
    holder = place.with_suffix(".holder")
    lock = FileLock(place)
    why_not = ""
    try:
        lock.acquire(timeout=0)
        while not place.exists():  # it was removed by its last holder between our opening and our locking it
            lock.release()
            lock.acquire(timeout=0)
        with suppress(Timeout), FileLock(place).acquire(timeout=0):
            why_not = "its locks lock nothing"
    except Timeout as error:
        raise BrainfmError(
            f"{output}: {_said_by(holder)} is writing it; wait until that has ended, or name another output"
        ) from error
    except (OSError, NotImplementedError) as error:
        why_not = one_line(error)
    if why_not:
        logger.warning("%s: cannot be locked here (%s); start no second command on it", output, why_not)
    try:
        if why_not and _lives(holder):
            raise BrainfmError(
                f"{output}: {_said_by(holder)} is writing it; wait until that has ended, or name another output. If it "
                f"has ended, remove {holder}"
            )
        since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        said = f"process {os.getpid()} on {platform.node()}, since {since},"
        with suppress(OSError):
            holder.write_text(said, encoding="utf-8")
        try:
            sweep(output, others=not why_not)
            yield
        finally:
            if not why_not or _said_by(holder) == said:  # else another's, who began at the same moment
                for path in (holder, place):  # before the lock is given up: after that they may be another's
                    with suppress(OSError):
                        path.unlink()
    finally:
        lock.release()


def _said_by(holder: Path) -> str:
    with suppress(OSError, ValueError):
        return one_line(Exception(holder.read_text(encoding="utf-8"))) or "another process"
    return "another process"


def _lives(holder: Path) -> bool:
    """Whether the process that a file names as the holder may still run; that of another machine may."""
    if not holder.exists():
        return False
    named = re.match(r"process (\d+) on (.*), since ", _said_by(holder))
    return named is None or named[2] != platform.node() or not _has_ended(int(named[1]))


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, atomically; names that are not UTF-8 with backslashes, as JSON reads them back."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    """Write plain data as JSON, atomically."""
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def write_csv(path: Path, rows: Iterable[Sequence[Any]], line_end: str = "\r\n") -> None:
    """Write rows, the header first, as CSV in UTF-8, atomically; names that are not UTF-8 with backslashes."""
    with atomic_path(path) as temporary, _open_text(temporary) as file:
        csv.writer(file, lineterminator=line_end).writerows(rows)


def _open_text(path: Path) -> TextIO:
    return path.open("w", newline="", encoding="utf-8", errors="backslashreplace")


def check_writable(folder: Path) -> None:
    """Make a folder, where it is not there. Raises BrainfmError where nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tried = temporary_path(folder / "writable")
        tried.touch()
        tried.unlink()
    except OSError as error:
        raise BrainfmError(f"{folder}: nothing can be written there ({error}); name another output") from error


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    return _digest(path, hashlib.sha256())


def file_git_blob(path: Path) -> str:
    """The id under which Git keeps a file's content, in hex."""
    header = b"blob %d\0" % path.stat().st_size
    return _digest(path, hashlib.sha1(header, usedforsecurity=False))


def _digest(path: Path, digest: Any) -> str:
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return str(digest.hexdigest())


def file_state(path: str | os.PathLike[str]) -> list[Any]:
    """[absolute path, bytes, time of the last change in ns]: a file whose state is another is another file.

    The folder of a prepared scan changes with its `prep.json`, which is written last. Raises OSError where there is
    none.
    """
    return [_resolved(os.path.abspath(path)), *size_and_time(path)]  # noqa: PTH100 - no Path here: there are many files


def size_and_time(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Bytes and time of the last change of a file, as of `file_state`: of most files the disk is asked once."""
    found = os.stat(path)  # noqa: PTH116
    if stat.S_ISDIR(found.st_mode):
        record = os.path.join(path, "prep.json")  # noqa: PTH118
        found = os.stat(record) if os.path.isfile(record) else found  # noqa: PTH113, PTH116
    return found.st_size, found.st_mtime_ns


def _resolved(path: str) -> str:
    """An absolute path without links; that of a folder is found once for all that is in it."""
    folder, name = os.path.split(path)
    if not name or os.path.islink(path):  # noqa: PTH114
        return os.path.realpath(path)
    return os.path.join(_real_folder(folder), name)  # noqa: PTH118


_real_folder = lru_cache(1024)(_resolved)


def one_line(error: BaseException, most: int = 300) -> str:
    """An error's message without line breaks, `most` characters long at the most."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def progress_bar(items: Any = None, *, total: int | None, unit: str, doing: str, shown: bool, done: int = 0) -> Any:
    """A bar around an iterator, or to be told of each item by `update`; of bytes where the unit is "B".

    It is a step of the run that is reported (`brainfm.report`), drawn or not. It is drawn on a terminal or in a
    notebook, and nowhere else: not into files and pipes, nor where `TQDM_DISABLE` is set.

    Args:
        items: What is gone through; None for a bar that is told.
        total: How many there are, or None.
        unit: What one is.
        doing: What is done to it, such as "embedding".
        shown: Whether to show it at all.
        done: Items that an earlier run did.
    """
    from tqdm.auto import tqdm

    from brainfm.report import current

    size = _terminal_size()
    shown = shown and os.environ.get("TQDM_DISABLE", "0") in ("", "0") and (size is not None or _in_notebook())
    # A terminal that does not know its size says 0 by 0, and tqdm would draw nothing there.
    room = {"ncols": 80, "nrows": 24} if size is not None and 0 in size else {}
    step = current().step(doing, unit, total, done)
    bar = tqdm(
        None if items is None else step.through(items),
        **{"total": total, "initial": done, "unit": unit, "unit_scale": unit == "B", "desc": doing},
        **{"disable": not shown, **room},
    )
    if items is None:
        step.follow(bar)
    return bar


def _terminal_size() -> os.terminal_size | None:
    """That of the terminal that stderr is; None where it is none."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()) if sys.stderr.isatty() else None
    except (OSError, ValueError, AttributeError):  # closed, replaced, or none at all
        return None


def _in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")
