"""Rows of a table as they are finished: what an interrupted run goes on from, and what shards leave to be merged.

A part is a file of some hundred rows, an .npz: the text columns of a table, the vectors, of each row which scan it is
of and its number in the list, or why the scan failed. (Not Parquet: pyarrow imports pandas to write it, which takes a
seventh of the time of embedding one small scan.) Any number of processes write parts to one folder without knowing of
each other; a scan that two of them did is taken once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from brainfm.errors import BrainfmError
from brainfm.files import atomic_path, file_state, one_line
from brainfm.manifest import ScanRecord
from brainfm.schema import Checked
from brainfm.shards import Shard
from brainfm.table import Embeddings, Origin, check_same_origin, text_columns

logger = logging.getLogger("brainfm")

ROWS = 256  # of a part
SECONDS = 1.0  # of work that a killed process loses, at most; of scans that take longer, none
_SCAN, _NUMBER, _ERROR = "brainfm_scan", "brainfm_number", "brainfm_error"
_ABOUT = "brainfm_part"
_OPEN = 16  # parts whose vectors are kept in memory while a table is written

Place = tuple[int, int]  # of a row: its part, and its number among the vectors there


@dataclass(frozen=True)
class About(Checked):
    """What a part says of itself.

    Attributes:
        made_by: What makes the rows; those that something else made are not taken.
        origin: As `Origin.to_dict`, with the number of scans in the list.
        shard: Such as "3/8".
    """

    made_by: str
    origin: dict[str, Any]
    shard: str = "1/1"


class Row(NamedTuple):
    """What is kept of a scan: its number in the list, and its vector, or why it failed.

    `key` is `scan_key` of it as it was then: a part is written again and again, and its files are asked once.
    """

    number: int
    record: ScanRecord
    vector: NDArray[np.float32] | None
    error: str
    key: str


class Parts:
    """A folder of parts that one process adds to.

    Args:
        folder: Made with the first part.
        about: Of the rows to come; those of earlier runs are taken where they were made by the same.
        numbers: Of the scans that may come.
    """

    def __init__(self, folder: Path, about: About, numbers: range) -> None:
        self.folder, self._about, self._numbers = folder, about, numbers
        self._files: list[Path] = []
        self._places = np.full((len(numbers), 2), -1, dtype=np.int32)
        self._rows: list[Row] = []  # of the part that is filled
        self._token, self._count, self._written = secrets.token_hex(4), 0, time.monotonic()

    def resume(self, records: Iterable[tuple[int, ScanRecord]], *, alone: bool = False) -> None:
        """Take the rows that earlier runs made of scans.

        Args:
            records: The scans, by their numbers.
            alone: Whether the folder may hold rows of this origin alone.

        Raises:
            BrainfmError: It holds others, and may not.
        """
        kept: dict[str, Place] = {}
        for path in list_parts(self.folder):
            try:
                part = read_part(path, texts=False, vectors=False)
            except BrainfmError as error:
                logger.warning("%s: passed over, and its scans are done again", one_line(error))
                continue
            if part.about.made_by == self._about.made_by:
                self._files.append(path)
                kept |= {part.scans[row]: place for row, place in part.places(len(self._files) - 1)}
            elif alone:
                theirs, ours = (Origin.from_dict(about.origin) for about in (part.about, self._about))
                differ = ", ".join(ours.differences(theirs)) or "where dense features are written"
                raise BrainfmError(
                    f"{self.folder}: holds parts that {theirs.model} made, which differ in {differ}; name another one"
                )
        for n, record in records if kept else ():
            place = kept.get(scan_key(record) or "none")
            if place is not None:
                self._places[self._numbers.index(n)] = place

    def __contains__(self, n: int) -> bool:
        return bool(self._places[self._numbers.index(n), 0] >= 0)

    def __len__(self) -> int:
        return int((self._places[:, 0] >= 0).sum())

    def add(self, n: int, record: ScanRecord, vector: NDArray[np.float32]) -> None:
        """Keep a scan's vector."""
        place = (len(self._files), sum(row.vector is not None for row in self._rows))
        self._places[self._numbers.index(n)] = place
        self._put(Row(n, record, vector, "", scan_key(record)))

    def fail(self, n: int, record: ScanRecord, reason: str) -> None:
        """Keep why a scan failed; a run that goes on tries it again."""
        self._put(Row(n, record, None, reason, scan_key(record)))

    def _put(self, row: Row) -> None:
        self._rows.append(row)
        if len(self._rows) >= ROWS:
            self.flush()
            self._files.append(self._path)
            self._rows, self._count = [], self._count + 1
        elif time.monotonic() - self._written >= SECONDS:
            self.flush()

    @property
    def _path(self) -> Path:
        shard = self._about.shard.replace("/", "-of-")
        return self.folder / f"{shard}-{self._token}-{self._count:05}.npz"

    def flush(self) -> None:
        """Write the rows that are in memory alone."""
        if self._rows:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_part(self._path, self._about, self._rows)
        self._written = time.monotonic()

    def taken(self) -> tuple[NDArray[np.int64], Vectors]:
        """The numbers of the scans that came, and their vectors; no more may come then."""
        there = np.flatnonzero(self._places[:, 0] >= 0)
        numbers = self._numbers.start + self._numbers.step * there
        last = [row.vector for row in self._rows if row.vector is not None]
        return numbers, Vectors([*self._files, self._path], self._places[there], np.array(last, dtype=np.float32))

    def remove(self) -> None:
        """Remove the folder and all that it holds."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Vectors:
    """The vectors of rows in parts [rows, width], read as they are asked for; an array to NumPy.

    Args:
        files: The parts.
        places: Of each row, the number of its part and its place among the vectors there [rows, 2].
        last: The vectors of the last part, which need not be written yet.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, files: Sequence[Path], places: NDArray[np.int32], last: NDArray[np.float32]) -> None:
        self.files, self.places = files, places
        self._last = last
        self._load = lru_cache(_OPEN)(self._read)
        self.shape = (len(places), self._load(int(places[0, 0])).shape[1] if len(places) else 0)

    def _read(self, number: int) -> NDArray[np.float32]:
        if len(self._last) and number == len(self.files) - 1:
            return self._last
        return read_part(self.files[number], texts=False).vectors

    @classmethod
    def of(cls, where: Sequence[tuple[Sequence[Path], NDArray[np.int32]]], order: NDArray[np.int64]) -> Vectors:
        """Those of several processes, by their `where`, in an order of all of them."""
        files = [path for paths, _ in where for path in paths]
        before = np.cumsum([0, *(len(paths) for paths, _ in where)])
        moved = [places + np.array([[first, 0]]) for (_, places), first in zip(where, before[:-1], strict=True)]
        return cls([*files, Path()], np.concatenate(moved)[order].astype(np.int32), np.empty((0, 0), np.float32))

    @property
    def where(self) -> tuple[Sequence[Path], NDArray[np.int32]]:
        """The parts, and of each row the number of its part and its place there."""
        return self.files, self.places

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, rows: slice) -> NDArray[np.float32]:
        places = self.places[rows]
        made = np.empty((len(places), self.shape[1]), dtype=np.float32)
        for number in np.unique(places[:, 0]):
            here = places[:, 0] == number
            made[here] = self._load(int(number))[places[here, 1]]
        return made

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self[:].astype(dtype or np.float32, copy=False)


# --- Merging --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Merged:
    """What `merge` made of parts.

    Attributes:
        table: Its vectors are read from the parts as they are asked for.
        missing: Scans of the list that no part holds.
        shards: Where these would be, such as "3/8".
    """

    table: Embeddings
    missing: int
    shards: list[str] = field(default_factory=list)


def merge(folders: Sequence[str | os.PathLike[str]]) -> Merged:
    """The one table of the parts in folders, in the order of the list of scans that they are of.

    A scan that several parts hold is taken from the newest, and one that failed where no part holds its vector.

    Raises:
        BrainfmError: There is no part, one cannot be read, or they were made by different weights, contracts, readouts
            or dtypes.
    """
    files = [path for folder in folders for path in list_parts(Path(folder))]
    if not files:
        raise BrainfmError(
            f"{', '.join(map(str, folders))}: no parts of a table; some are written by 'brainfm embed SCANS -o FOLDER "
            "--shard 1/8'"
        )
    files.sort(key=lambda path: (path.stat().st_mtime_ns, path.name))
    rows: dict[str, tuple[int, ScanRecord, Place]] = {}
    failed: dict[str, tuple[int, ScanRecord, str]] = {}
    first: Embeddings | None = None
    scans, most, seen = 0, 1, set()
    for number, path in enumerate(files):
        part = read_part(path, vectors=False)
        this = Embeddings(np.empty((0, 0), np.float32), [], origin=Origin.from_dict(part.about.origin))
        first = this if first is None else first
        check_same_origin(first, this)
        places = dict(part.places(number))
        scans = max(scans, this.origin.scans if this.origin else 0)
        most = max(most, Shard.of(part.about.shard).count)
        for row, (n, text) in enumerate(zip(part.numbers, part.rows(), strict=True)):
            record = ScanRecord.from_columns(text)
            key = f"{record.name}\0{record.mask}" if record.name else str(n)
            seen.add(n)
            if row in places:
                rows[key] = n, record, places[row]
            else:
                failed[key] = n, record, part.errors[row]
    assert first is not None
    assert first.origin is not None
    taken = sorted(rows.values(), key=lambda row: (row[0], row[1].name))
    errors = sorted((row for key, row in failed.items() if key not in rows), key=lambda row: (row[0], row[1].name))
    absent = sorted({*range(scans)} - seen)
    where = np.array([place for *_, place in taken], dtype=np.int32).reshape(len(taken), 2)
    table = Embeddings(
        Vectors(files, where, np.empty((0, 0), np.float32)),  # type: ignore[arg-type]
        [record for _, record, _ in taken],
        [(record, why) for _, record, why in errors],
        replace(first.origin, scans=len(taken) + len(errors) + len(absent), failed=len(errors)),
    )
    return Merged(table, len(absent), [str(Shard(index, most)) for index in sorted({n % most for n in absent})])


# --- Files ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Part:
    """A part as it was read; vectors are of the rows without an error, in their order."""

    about: About
    scans: list[str]
    numbers: list[int]
    errors: list[str]
    texts: dict[str, list[str]]
    vectors: NDArray[np.float32]

    def places(self, part: int) -> Iterator[tuple[int, Place]]:
        """Each row that has a vector, and its place."""
        return ((row, (part, n)) for n, row in enumerate(row for row, why in enumerate(self.errors) if not why))

    def rows(self) -> Iterator[dict[str, str]]:
        """The text columns, row by row."""
        return (dict(zip(self.texts, values, strict=True)) for values in zip(*self.texts.values(), strict=True))


def list_parts(folder: Path) -> list[Path]:
    """The parts in a folder, in the order of their names."""
    named = re.compile(r"\d+-of-\d+-[0-9a-f]{8}-\d+\.npz")
    return sorted(path for path in folder.iterdir() if named.fullmatch(path.name)) if folder.is_dir() else []


def write_part(path: Path, about: About, rows: Sequence[Row]) -> None:
    """Write rows as a part, atomically."""
    texts = text_columns([row.record for row in rows])
    texts |= {_SCAN: [row.key for row in rows], _ERROR: [row.error for row in rows]}
    numbers = [row.number for row in rows]
    vectors = [row.vector for row in rows]
    said = json.dumps(about.to_dict())
    with atomic_path(path) as temporary:
        arrays: dict[str, Any] = {name: np.array(values, dtype=np.str_) for name, values in texts.items()}
        there = [vector for vector in vectors if vector is not None]
        arrays |= {_ABOUT: np.array(said), _NUMBER: np.array(numbers, dtype=np.int64)}
        with temporary.open("wb") as file:
            np.savez(file, embeddings=np.array(there, dtype=np.float32).reshape(len(there), -1), **arrays)


def read_part(path: Path, *, texts: bool = True, vectors: bool = True) -> Part:
    """A part, or of it only what says which rows it holds. Raises BrainfmError where it is none, or damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            about = str(arrays[_ABOUT])
            names = [name for name in arrays.files if name not in (_ABOUT, _NUMBER, "embeddings")]
            columns = {name: arrays[name].tolist() for name in names if texts or name in (_SCAN, _ERROR)}
            numbers = arrays[_NUMBER].tolist()
            found = arrays["embeddings"] if vectors else np.empty((0, 0), np.float32)
        scans, errors = columns.pop(_SCAN), columns.pop(_ERROR)
        return Part(About.from_dict(json.loads(about)), scans, numbers, errors, columns, found)
    except Exception as error:  # each reader has its own ways to say that a file is damaged
        raise BrainfmError(
            f"{path}: not a part of a table, or a damaged one ({one_line(error)}); delete it, and run its shard again"
        ) from error


# --- Which scan -----------------------------------------------------------------------------------


def scan_key(record: ScanRecord) -> str:
    """A short name of `scan_identity`; empty without one."""
    identity = scan_identity(record)
    return "" if identity is None else hashlib.sha256(identity.encode()).hexdigest()[:32]


def scan_identity(record: ScanRecord) -> str | None:
    """A scan's files with their sizes and times: a file that changed is another scan. Images in memory have none."""
    parts: list[list[Any]] = []
    for channel, item in (*sorted(record.images.items()), ("mask", record.mask)):
        if item is None:
            parts.append([channel])
        elif isinstance(item, str | os.PathLike):
            try:
                parts.append([channel, *file_state(item)])
            except (OSError, ValueError):  # ValueError: a null character in the name
                return None
        else:
            return None
    return json.dumps(parts)
