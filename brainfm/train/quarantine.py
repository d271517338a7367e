"""Scans that failed twice as they are: passed over, without being read, until one of their files changes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from brainfm.files import size_and_time, write_csv
from brainfm.manifest import ScanRecord
from brainfm.tabular import read_rows

FILE = "quarantine.csv"

State = tuple[tuple[int, int], ...]


class Quarantine:
    """What failed in a run, how often, and what is passed over for it.

    Args:
        path: The list that an earlier part of the run left, and that this one goes on with; None keeps none. A line
            that is taken out of it has its scan tried again.
        records: The scans of the run: a line of one whose file has changed counts no more.
    """

    def __init__(self, path: Path | None = None, records: Iterable[ScanRecord] = ()) -> None:
        self._path = path
        self._failed: dict[str, tuple[State, str, int]] = {}  # by name: as what, why, how often
        rows = read_rows(path) if path is not None and path.is_file() else None
        said = {} if rows is None else {row["image_path"]: row for row in rows.to_dict("records")}
        for record in records if said else ():
            row = said.get(record.name)
            if row is not None and row["state"] == _written(state_of(record)):
                self._failed[record.name] = (state_of(record), row["error"], 2)

    def listed(self) -> dict[str, str]:
        """The scans that are passed over, and why each failed."""
        return {name: why for name, (_, why, often) in self._failed.items() if often > 1}

    def why(self, record: ScanRecord) -> str:
        """Why a scan is passed over; "" where it is not."""
        state, why, often = self._failed.get(record.name, ((), "", 0))
        return why if often > 1 and state == state_of(record) else ""

    def note(self, failed: Iterable[tuple[ScanRecord, str]]) -> None:
        """Scans failed once more. Those that are listed with it are written to the list."""
        before = len(self.listed())
        for record, why in failed:
            if not record.name:  # an image in memory
                continue
            known, state = self._failed.get(record.name), state_of(record)
            often = known[2] if known is not None and known[0] == state else 0
            self._failed[record.name] = (state, why, often + 1)
        if self._path is not None and len(self.listed()) != before:
            rows = [(name, _written(state), why) for name, (state, why, often) in self._failed.items() if often > 1]
            write_csv(self._path, [("image_path", "state", "error"), *rows])


def _written(state: State) -> str:
    return " ".join(f"{size}@{time}" for size, time in state) or "not there"


def state_of(record: ScanRecord) -> State:
    """Bytes and times of a scan's files, by the names of its channels; a file that is not there has none."""
    found = []
    for item in files_by_channel(record).values():
        if isinstance(item, str | os.PathLike):
            with suppress(OSError, ValueError):  # ValueError: a null character in the name
                found.append(size_and_time(item))
    return tuple(found)


def files_by_channel(record: ScanRecord) -> dict[str, Any]:
    """The image of each channel in the order of their names, and the mask."""
    images = {channel.casefold(): image for channel, image in record.images.items()}
    return {channel: images[channel] for channel in sorted(images)} | {"mask": record.mask}
