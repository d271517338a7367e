"""What the benchmarks found, from the JSON that they write (benchmarks/results): ratios first, the machine named.

A file is what `zoo.py --json` writes ({"machine", "rows"}), or `run_all.py --json` of a script ({"machine", "command",
"tables"}). Of a model in several files the row of the newest counts, by the date that the machine's line begins with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brainfm.hub.card import table

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
ZOO_HEAD = ("encoder", "faster", "less memory", "processor s", "GB", "upstream s", "upstream GB", "input", "error")


@dataclass(frozen=True)
class Cost:
    """One volume through an encoder: processor seconds and GB by `brainfm.optimize`, and those of upstream's way."""

    seconds: float
    gigabytes: float
    upstream_seconds: float
    upstream_gigabytes: float
    shape: tuple[int, ...]
    error: float
    machine: str

    @property
    def cells(self) -> tuple[str, ...]:
        """A row of the table, after the encoder's name."""
        return (
            f"{self.upstream_seconds / self.seconds:.2f}×",
            f"{self.upstream_gigabytes / self.gigabytes:.1f}×",
            f"{self.seconds:.2f}",
            f"{self.gigabytes:.2f}",
            f"{self.upstream_seconds:.2f}",
            f"{self.upstream_gigabytes:.2f}",
            "×".join(map(str, self.shape)),
            f"{self.error:.0e}",
        )


def measured(folder: Path = RESULTS) -> dict[str, Cost]:
    """What each encoder costs that `zoo.py` has measured."""
    found: dict[str, Cost] = {}
    for result in sorted(_read(folder), key=lambda result: str(result["machine"])):
        for row in result.get("rows", ()):
            (before, after), (gb, gb_after) = (
                (row[key]["upstream"], row[key]["optimize"]) for key in ("processor_s", "gb")
            )
            cost = Cost(after, gb_after, before, gb, tuple(row["shape"]), row["error"], result["machine"])
            found[row["model"]] = cost
    return found


def as_page(text: str, folder: Path = RESULTS) -> str:
    """benchmarks/README.md, its tables replaced by those of the results where there are any of a script."""
    parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    scripts = {Path(result["command"].split()[1]).stem: result for result in _read(folder) if "tables" in result}
    for n, part in enumerate(parts):
        named = re.match(r"## `python benchmarks/(\w+)\.py", part)
        name = named[1] if named else ""
        if name == "zoo" and (costs := measured(folder)):
            parts[n] = _with_tables(part, [_zoo(costs)])
        elif name in scripts:
            result = scripts[name]
            tables = [ratios_first(each["header"], each["rows"]) for each in result["tables"]]
            parts[n] = _with_tables(part, [f"*{result['machine']}*", *tables])
    return "".join(parts)


def ratios_first(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns of ratios (2.5×, or named "of `import torch`") stand after the first."""
    ratios = [
        n for n in range(1, len(header)) if header[n].startswith("of `") or any(row[n].endswith("×") for row in rows)
    ]
    order = [0, *ratios, *(n for n in range(1, len(header)) if n not in ratios)]
    named = [  # a ratio stood after what it is of, and says so now
        f"{name} ({header[n - 1]})" if n in ratios and n - 1 not in (0, *ratios) and "," not in name else name
        for n, name in enumerate(header)
    ]
    return table([[row[n] for n in order] for row in rows], [named[n] for n in order], html=True)


def _zoo(costs: dict[str, Cost]) -> str:
    """A table a machine, the largest ratio first."""
    parts = []
    for machine in dict.fromkeys(cost.machine for cost in costs.values()):
        own = [(name, cost) for name, cost in costs.items() if cost.machine == machine]
        own.sort(key=lambda one: -one[1].upstream_seconds / one[1].seconds)
        parts += [f"*{machine}*", table([(f"`{name}`", *cost.cells) for name, cost in own], ZOO_HEAD, html=True)]
    return "\n\n".join(parts)


def _with_tables(part: str, tables: list[str]) -> str:
    """A section whose first table is replaced by others, and whose later ones go."""
    there = list(re.finditer(r"(?:^\|.*\n)+", part, flags=re.MULTILINE))
    for n, one in reversed(list(enumerate(there))):
        part = part[: one.start()] + ("\n\n".join(tables) + "\n" if n == 0 else "") + part[one.end() :]
    return part


def _read(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.json")):
        yield json.loads(path.read_text(encoding="utf-8"))
