"""What an interrupted run of `embed` had done: kept beside its table until that is written."""

from __future__ import annotations

import base64
import glob
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from brainfm.files import file_state
from brainfm.manifest import ScanRecord


class Journal:
    """Finished rows of an interrupted run: one line a scan, added and flushed as it is done.

    A line is a checksum and the row as JSON; one that is not as it was written is passed over, and its scan done again.
    Whoever has the output's lock (`brainfm.files.held`) may remove the journals of all processes.

    Args:
        output: The table that is to be written.
        rank: Of this process.
        made_by: What makes the rows; those that something else made are not taken.
    """

    def __init__(self, output: Path, rank: int, made_by: str) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        self._output = output
        self._path = output.with_name(f".{output.name}.rank{rank}.journal")
        self._made_by = made_by
        self._places: dict[bytes, tuple[Path, int]] = {}  # of each scan's line; the vectors stay on the disk
        for path in self._all():  # whoever wrote it, with however many processes
            self._read(path)
        self._file: IO[bytes] | None = None  # opened for the first row: no run leaves an empty one

    def _all(self) -> Iterable[Path]:
        """The journals of all processes."""
        return self._output.parent.glob(f".{glob.escape(self._output.name)}.rank*.journal")

    def _read(self, path: Path) -> None:
        with path.open("rb") as file:
            place = 0
            for line in file:
                row = _row(line)
                if row is not None and row["model"] == self._made_by:
                    self._places[_key(row["scan"])] = path, place
                place += len(line)

    def find(self, record: ScanRecord) -> NDArray[np.float32] | None:
        """The vector that an earlier run made of a scan."""
        identity = scan_identity(record) if self._places else None
        if identity is None or _key(identity) not in self._places:
            return None
        path, place = self._places[_key(identity)]
        with path.open("rb") as file:
            file.seek(place)
            row = _row(file.readline())
        return None if row is None else np.frombuffer(base64.b64decode(row["vector"]), dtype="<f4").astype(np.float32)

    def add(self, record: ScanRecord, vector: NDArray[np.float32]) -> None:
        """Keep a row; an image in memory has none."""
        identity = scan_identity(record)
        if identity is None:
            return
        numbers = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        content = json.dumps({"model": self._made_by, "scan": identity, "vector": numbers}).encode()
        if self._file is None:
            self._file = self._path.open("ab")
        self._file.write(b"\n" + _checksum(content) + b" " + content)  # on a line of its own, after a torn one too
        self._file.flush()

    def close(self) -> None:
        """End the writing; what is written stays."""
        if self._file is not None:
            self._file.close()

    def remove(self) -> None:
        """Remove the journals of all processes."""
        for path in self._all():
            path.unlink(missing_ok=True)


def _row(line: bytes) -> dict[str, str] | None:
    """The row of a line; None of one that is damaged, of another format, or was cut off when the run was killed."""
    checksum, _, content = line.rstrip(b"\n").partition(b" ")
    if checksum != _checksum(content):
        return None
    row: dict[str, str] = json.loads(content)
    return row


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest()[:16].encode()


def _key(identity: str) -> bytes:
    """A scan's identity in little memory."""
    return hashlib.sha256(identity.encode()).digest()[:16]


def scan_identity(record: ScanRecord) -> str | None:
    """A scan's files with their sizes and times: a file that changed is another scan. Images in memory have none."""
    parts: list[list[Any]] = []
    for channel, item in (*sorted(record.images.items()), ("mask", record.mask)):
        if item is None:
            parts.append([channel])
        elif isinstance(item, str | os.PathLike) and Path(item).exists():
            parts.append([channel, *file_state(item)])
        else:
            return None
    return json.dumps(parts)
