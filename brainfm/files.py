"""Files, once for all rooms: written whole or not at all, known by digest or state; and the bar meanwhile."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; moved there, synced, when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    temporary.touch()
    mode = temporary.stat().st_mode  # as the user's umask has it, whatever the writer makes of it
    try:
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
