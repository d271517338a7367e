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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from brainfm.errors import BrainfmError

logger = logging.getLogger("brainfm")

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
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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


def sweep(output: Path, *, others: bool = False) -> None:
    """Remove what killed processes left of an output: temporary files beside a file, or anywhere in a folder.

    Only those of `temporary_path`, and of processes of this machine that have ended; with `others` those of other
    machines too, for whoever holds the output's lock.
    """
    in_folder = output.is_dir()
    found = output.rglob(".*") if in_folder else output.parent.glob(".*")
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
    ends. Under torchrun the first process holds it for all. A file system without locks costs the lock, not the
    result.

    Raises:
        BrainfmError: Another command is writing the output; the message says which process, where, and since when.
    """
    from filelock import FileLock, Timeout

    if os.environ.get("RANK", "0") != "0":
        yield
        return
    in_folder = output.is_dir()
    output.parent.mkdir(parents=True, exist_ok=True)
    place = output / ".lock" if in_folder else output.with_name(f".{output.name}.lock")
    holder = place.with_suffix(".holder")
    lock = FileLock(place)
    locked = True
    try:
        lock.acquire(timeout=0)
        while not place.exists():  # it was removed by its last holder between our opening and our locking it
            lock.release()
            lock.acquire(timeout=0)
    except Timeout as error:
        raise BrainfmError(
            f"{output}: {_said_by(holder)} is writing it; wait until that has ended, or name another output"
        ) from error
    except (OSError, NotImplementedError) as error:
        locked = False
        logger.warning("%s: cannot be locked here (%s); start no second command on it", output, one_line(error))
    try:
        if locked:
            since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
            with suppress(OSError):
                holder.write_text(f"process {os.getpid()} on {platform.node()}, since {since},", encoding="utf-8")
        sweep(output, others=locked)
        yield
    finally:
        if locked:
            for path in (holder, place):  # before the lock is given up: after that they may be another's
                with suppress(OSError):
                    path.unlink()
            lock.release()
        else:
            with suppress(OSError):
                place.unlink()


def _said_by(holder: Path) -> str:
    with suppress(OSError, ValueError):
        return one_line(Exception(holder.read_text(encoding="utf-8"))) or "another process"
    return "another process"


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    """Write plain data as JSON, atomically."""
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def write_csv(path: Path, rows: Iterable[Sequence[Any]], line_end: str = "\r\n") -> None:
    """Write rows, the header first, as CSV in UTF-8, atomically."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator=line_end).writerows(rows)


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

    Raises OSError where there is none.
    """
    path = Path(path)
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def one_line(error: BaseException, most: int = 300) -> str:
    """An error's message without line breaks, `most` characters long at the most."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def progress_bar(items: Any = None, *, total: int, unit: str, doing: str, shown: bool, done: int = 0) -> Any:
    """A bar on the terminal, around an iterator or to be told of each item by `update`.

    Args:
        items: What is gone through; None for a bar that is told.
        total: How many there are.
        unit: What one is.
        doing: What is done to it, such as "embedding".
        shown: Whether to show it at all.
        done: Items that an earlier run did.
    """
    from tqdm import tqdm

    return tqdm(items, total=total, initial=done, unit=unit, desc=doing, disable=not shown)
