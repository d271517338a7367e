"""Scans of a network disk on a local one: a bounded cache of copies, made ahead of whoever reads them.

A stage is `brainfm-stage` in a folder, and in that `<key>/<name>`: a copy of a file, or of the folder of a prepared
scan, under its own name. The key is of where that is, its size and its time, so that a file that changed is another. A
copy has its place once it is whole, and what was used least recently leaves first. Any number of processes may share a
stage. What it cannot hold is read where it is: a stage that is full, or on a disk that is, costs its use and never a
result.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from brainfm.errors import ScanError
from brainfm.files import file_state, list_below, one_line, sweep, sync, temporary_path
from brainfm.manifest import ScanRecord
from brainfm.scan.layout import is_prepared
from brainfm.scan.memory import is_mapping
from brainfm.system import expanded, says

T = TypeVar("T")
logger = logging.getLogger("brainfm")

SIZE_GB = 100.0  # some ten thousand scans
_AHEAD = 16  # scans that are copied before they are asked for
_COPIERS = 4  # files that one process copies at a time
_LOCKS = 64  # of the copies, which share them by their keys
_FULL = 0.9  # of the size, to which a stage is emptied: not for each copy anew
_UNSEEN = 16  # processes that may fill what is left before they look again, without going over the size
_KEY = re.compile("[0-9a-f]{20}")
_ONE_OF_SEVERAL = (".hdr", ".img", ".nhdr")  # files of which one says nothing without the other


class Stage:
    """A folder on a local disk that holds copies of the scans that were read last, and are read next.

    Args:
        folder: In which the stage is made where it is not there; what else the folder holds is left alone.
        size_gb: The most that it holds, in GB (10⁹ bytes), of all processes that share it.
    """

    def __init__(self, folder: str | os.PathLike[str], size_gb: float = SIZE_GB) -> None:
        self.folder = expanded(folder) / "brainfm-stage"
        self._most = int(size_gb * 1e9)
        self._unseen = 0  # bytes that this process may copy before it looks what is there
        self._is_off = False
        self._maker = os.getpid()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            sweep(self.folder)
        except OSError as error:
            self._give_up(error)

    def read(self, record: ScanRecord, read: Callable[[ScanRecord], T]) -> T:
        """What `read` makes of a scan's local copies, or where there are none of the scan itself.

        A ScanError names the scan, and not its copy.
        """
        local = self._record(record)
        try:
            return read(local)
        except Exception as error:
            copies = [(copy, own) for copy, own in zip(files_of(local), files_of(record), strict=True) if copy != own]
            if not all(os.path.exists(copy) for copy, _ in copies):  # noqa: PTH110 - it left the stage meanwhile
                return read(record)
            if not copies or not isinstance(error, ScanError):
                raise
            said = str(error)
            for copy, own in copies:
                said = said.replace(copy, own)
            raise ScanError(said) from error

    def ahead(self, items: Iterable[T], files_of: Callable[[T], Iterable[str | os.PathLike[str]]]) -> Iterator[T]:
        """Items in turn, while the files of those that come after them are copied."""
        pool = ThreadPoolExecutor(_COPIERS, thread_name_prefix="brainfm-stage")
        try:
            waiting: deque[tuple[T, list[Future[str]]]] = deque()
            for item in items:
                waiting.append((item, [pool.submit(self.local, file) for file in files_of(item)]))
                if len(waiting) > _AHEAD:
                    yield _due(*waiting.popleft())
            while waiting:
                yield _due(*waiting.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def local(self, path: str | os.PathLike[str]) -> str:
        """Where a file, or the folder of a prepared scan, is on the local disk; itself, where it cannot be there.

        One that is not there is copied; one that another thread or process is copying is waited for.
        """
        own = os.fspath(path)
        if self._is_off or own.lower().endswith(_ONE_OF_SEVERAL):
            return own
        try:
            if not os.path.isfile(own) and not is_prepared(own):  # noqa: PTH113
                return own
            state = [*file_state(own), os.path.basename(own)]  # noqa: PTH119 - a link's own name is kept
            key = hashlib.sha256("\0".join(map(str, state)).encode(errors="surrogateescape")).hexdigest()[:20]
            copy = self.folder / key / state[-1]
            if not copy.exists():
                with self._lock(str(int(key, 16) % _LOCKS)):
                    if not copy.exists() and not self._copy(Path(own), copy):
                        return own
            os.utime(copy.parent)  # when it was used last
        except _NotWrittenError as error:
            self._give_up(error)
            return own
        except OSError as error:  # of the file itself, which whoever reads it says; or the copy left meanwhile
            logger.debug("%s: read where it is (%s)", own, one_line(error))
            return own
        return str(copy)

    def _record(self, record: ScanRecord) -> ScanRecord:
        def local(item: Any) -> Any:
            return self.local(item) if isinstance(item, str | os.PathLike) else item

        images = record.image
        image = {name: local(each) for name, each in images.items()} if is_mapping(images) else local(images)
        return replace(record, image=image, mask=local(record.mask))

    def _copy(self, own: Path, copy: Path) -> bool:
        """Put a copy in its place, whole; False where it is larger than a stage."""
        files = [file for file in own.iterdir() if file.is_file()] if own.is_dir() else [own]
        if not self._make_room(sum(file.stat().st_size for file in files)):
            return False
        place = copy.parent
        temporary = temporary_path(place)
        inside = temporary / copy.name if own.is_dir() else temporary
        try:
            with _writing():
                inside.mkdir(parents=True)
            for file in files:
                _write_copy(file, inside / file.name)
            with _writing():
                temporary.rename(place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return True

    def _make_room(self, size: int) -> bool:
        """Whether a copy of so many bytes may come; what was used least recently leaves for it."""
        with self._lock("room"):
            if size <= self._unseen:
                self._unseen -= size
                return True
            if size > _FULL * self._most:
                return False
            copies = sorted(self._copies())
            total = sum(bytes_ for _, bytes_, _ in copies)
            if total + size > self._most:
                for _, bytes_, place in copies:
                    if total + size <= _FULL * self._most:
                        break
                    _remove(place)
                    total -= bytes_
            self._unseen = max(0, self._most - total - size) // _UNSEEN
            return True

    def _copies(self) -> Iterator[tuple[int, int, str]]:
        """When each copy was used last, its bytes, and its place."""
        with os.scandir(self.folder) as places:
            for place in places:
                with suppress(OSError):  # another process has removed it
                    if _KEY.fullmatch(place.name):
                        yield place.stat().st_mtime_ns, _bytes_in(place.path), place.path

    def _lock(self, name: str) -> Any:
        from filelock import FileLock

        with _writing():
            return FileLock(self.folder / f".{name}.lock", poll_interval=0.01).acquire()

    def _give_up(self, error: Exception) -> None:
        """Read everything where it is from now on, and say so once."""
        line = f"{self.folder}: nothing can be staged there ({one_line(error)}); scans are read where they are"
        if not self._is_off and os.getpid() == self._maker and says(line):
            logger.warning("%s", line)
        self._is_off = True


class _NotWrittenError(Exception):
    """The stage's own disk failed, and not the scan's."""


class _writing:  # noqa: N801 - a context, as those of contextlib
    """Turns an OSError of the block into one of the stage."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, OSError | NotImplementedError):
            raise _NotWrittenError(one_line(error)) from error


def _write_copy(file: Path, copy: Path) -> None:
    with file.open("rb") as source:
        with _writing():
            target = copy.open("wb")
        with target:
            while block := source.read(1 << 20):
                with _writing():
                    target.write(block)
            with _writing():
                target.flush()
    with _writing():
        sync(copy)


def _due(item: T, copies: list[Future[str]]) -> T:
    """An item whose turn has come: what nobody has begun to copy of it, its reader does."""
    for copy in copies:
        copy.cancel()
    return item


def _remove(place: str) -> None:
    """Remove a copy, all of it at once: half of one must never be taken for a whole."""
    path = Path(place)
    gone = temporary_path(path)
    with suppress(OSError):
        path.rename(gone)
        shutil.rmtree(gone)


def _bytes_in(place: str) -> int:
    return sum(file.stat().st_size for file in list_below(Path(place), "*") if file.is_file())


def files_of(record: ScanRecord) -> list[str]:
    """The paths of a scan's images and mask, for `Stage.ahead`."""
    return [str(item) for item in (*record.images.values(), record.mask) if isinstance(item, str | os.PathLike)]
