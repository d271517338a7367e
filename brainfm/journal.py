"""What an interrupted run of `embed` had done: kept beside its table until that is written."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainfm.files import file_state
from brainfm.manifest import ScanRecord


class Journal:
    """Finished rows of an interrupted run: one JSON line a scan, added and flushed as it is done.

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
        self._rows: dict[str, list[float]] = {}
        for path in self._all():  # whoever wrote it, with however many processes
            self._read(path)
        self._file = self._path.open("a", encoding="utf-8")

    def _all(self) -> Iterable[Path]:
        """The journals of all processes."""
        return self._output.parent.glob(f".{glob.escape(self._output.name)}.rank*.journal")

    def _read(self, path: Path) -> None:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the line that was being written when the run was killed
            if isinstance(row, dict) and row.get("model") == self._made_by and isinstance(row.get("vector"), list):
                self._rows[str(row.get("scan"))] = row["vector"]

    def find(self, record: ScanRecord) -> NDArray[np.float32] | None:
        """The vector that an earlier run made of a scan."""
        identity = scan_identity(record)
        vector = None if identity is None else self._rows.get(identity)
        return None if vector is None else np.array(vector, dtype=np.float32)

    def add(self, record: ScanRecord, vector: NDArray[np.float32]) -> None:
        """Keep a row; an image in memory has none."""
        identity = scan_identity(record)
        if identity is None:
            return
        row = {"model": self._made_by, "scan": identity, "vector": vector.astype(float).tolist()}
        self._file.write("\n" + json.dumps(row))
        self._file.flush()

    def close(self) -> None:
        """End the writing; what is written stays."""
        self._file.close()
        if self._path.stat().st_size == 0:
            self._path.unlink()

    def remove(self) -> None:
        """Remove the journals of all processes."""
        for path in self._all():
            path.unlink(missing_ok=True)


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
