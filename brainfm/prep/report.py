"""The page of many prepared scans: one HTML file with every picture, figure and verdict, and nothing outside it."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from brainfm.errors import BrainfmError
from brainfm.files import write_text
from brainfm.prep.batch import list_records
from brainfm.prep.pipeline import PICTURE
from brainfm.prep.quality import RANGES, VERDICTS
from brainfm.render import render_page
from brainfm.version import __version__

_MIN_SCANS = 5  # below it, nothing is unusual for the group

Records = dict[str, tuple[Path, dict[str, Any]]]


def write_page(folder: str | os.PathLike[str], output: str | os.PathLike[str]) -> list[str]:
    """Write the page of all prepared scans below a folder, and return their verdicts.

    Scans that fail come first, then those to look at; among equals, those whose figures are farthest from the group's
    medians.

    Raises:
        ScanError: There is no prepared scan, or a record is damaged.
        BrainfmError: `output` is no .html file.
    """
    output = Path(output)
    if output.suffix.lower() not in (".html", ".htm") or output.is_dir():
        raise BrainfmError(f"{output}: the page is an HTML file; give it a name that ends in .html")
    records = list_records(folder)
    strange = _strangeness(records)
    order = sorted(records, key=lambda name: (-VERDICTS.index(records[name][1]["verdict"]), -strange[name], name))
    verdicts = [records[name][1]["verdict"] for name in order]
    counts = Counter(verdicts)
    page = render_page(
        "qc.html",
        styles=["qc.css"],
        title=f"Quality of {len(records)} prepared scans",
        all_pass=counts["pass"] == len(records),
        summary=", ".join(f"{counts[verdict]} {verdict}" for verdict in reversed(VERDICTS)),
        scans=[_scan(name, *records[name]) for name in order],
        ranges=RANGES,
        making=_making(records),
    )
    write_text(output, page)
    return verdicts


def _strangeness(records: Records) -> dict[str, float]:
    """For each scan, its figure farthest from the group's median, in the group's median distances."""
    values = {
        name: {figure["name"]: figure["value"] for figure in record["quality"]} for name, (_, record) in records.items()
    }
    strange = dict.fromkeys(records, 0.0)
    for figure in RANGES:
        those = {name: own[figure] for name, own in values.items() if figure in own}
        if len(those) < _MIN_SCANS:
            continue
        column = np.array(list(those.values()))
        distance = np.abs(column - np.median(column))
        usual = float(np.median(distance)) or 1.0
        for name, far in zip(those, distance, strict=True):
            strange[name] = max(strange[name], float(far) / usual)
    return strange


@dataclass(frozen=True)
class _Scan:
    """A scan as the page shows it; its figures as `prep.json` has them, by name."""

    name: str
    verdict: str
    picture: bytes | None
    reasons: list[str]
    figures: dict[str, Any]


def _scan(name: str, folder: Path, record: dict[str, Any]) -> _Scan:
    try:
        picture = (folder / PICTURE).read_bytes()
    except OSError:
        picture = None
    figures = {figure["name"]: figure for figure in record["quality"]}
    reasons = [figure["reason"] for figure in record["quality"] if figure["reason"]]
    if record["input"]["stripped"]:
        reasons.append("came without its skull")
    return _Scan(name, record["verdict"], picture, reasons, figures)


def _making(records: Records) -> Counter[tuple[str, str]]:
    """The settings and tools, each with the number of scans it was used for."""
    lines: Counter[tuple[str, str]] = Counter()
    for _, record in records.values():
        lines.update((step, str(tool)) for step, tool in record["tools"].items())
        lines.update(
            (name, str(value)) for name, value in record["settings"].items() if name in ("registration", "mask")
        )
    lines[("page", f"brainfm {__version__}")] = len(records)
    return lines
