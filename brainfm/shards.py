"""A part of a list of scans that one of several commands does, side by side and without knowing of each other."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from brainfm.errors import BrainfmError


@dataclass(frozen=True)
class Shard:
    """One of several equal parts of a list; `index` counts from 0, and what people write from 1."""

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"

    @classmethod
    def of(cls, text: str) -> Shard:
        """The shard that "3/8" names, the third of eight, or "slurm", the array's task that this process is.

        Raises BrainfmError for what names none.
        """
        if text.strip().lower() == "slurm":
            found = cls.of_slurm()
            if found is None:
                raise BrainfmError(
                    "--shard slurm: no SLURM_ARRAY_TASK_ID and _COUNT here; this is no task of a Slurm array"
                )
            return found
        named = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", text)
        if named is None or not 1 <= int(named[1]) <= int(named[2]):
            raise BrainfmError(f"--shard {text}: write which of how many, from 1/8 to 8/8, or slurm")
        return cls(int(named[1]) - 1, int(named[2]))

    @classmethod
    def of_slurm(cls) -> Shard | None:
        """The task of a Slurm array that this process is, whatever number the array begins with; None in none."""
        names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")
        if not all(os.environ.get(name) for name in names):
            return None
        try:
            task, count, first, step = (
                int(os.environ.get(name) or default)
                for name, default in (
                    *zip(names, ("", ""), strict=True),
                    ("SLURM_ARRAY_TASK_MIN", "0"),
                    ("SLURM_ARRAY_TASK_STEP", "1"),
                )
            )
            shard = cls((task - first) // step, count)
        except (ValueError, ZeroDivisionError):
            shard = cls(-1)
        if not 0 <= shard.index < shard.count:
            said = ", ".join(
                f"{key}={value}" for key, value in os.environ.items() if key.startswith("SLURM_ARRAY_TASK")
            )
            raise BrainfmError(f"the Slurm array does not say which of its tasks this is ({said}); give --shard i/n")
        return shard

    def numbers(self, many: int) -> range:
        """The numbers of this shard's scans among so many."""
        return range(self.index, many, self.count)
