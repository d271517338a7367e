"""The page of many prepared scans: one HTML file with every picture, figure and verdict, and nothing outside it."""

from __future__ import annotations

import difflib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from brainfm.errors import BrainfmError, ScanError
from brainfm.files import file_sha256, one_line, write_text
from brainfm.prep.batch import list_records
from brainfm.prep.quality import RANGES, VERDICTS
from brainfm.render import render_page
from brainfm.scan.layout import PICTURE, RECORD
from brainfm.scan.verdict import Choice, Decision, decide, decision_of, verdict_of
from brainfm.version import __version__

_MIN_SCANS = 5  # below it, nothing is unusual for the group
# The worst first; what a person decided needs no more looking.
_ORDER = ("unreadable", "fail", "look", "pass", "rejected", "accepted")

Records = dict[str, tuple[Path, dict[str, Any]]]


def write_page(folder: str | os.PathLike[str], output: str | os.PathLike[str]) -> list[str]:
    """Write the page of all prepared scans below a folder, and return their verdicts, a person's where there is one.

    Scans that fail come first, then those to look at; among equals, those whose figures are farthest from the group's
    medians.

    Raises:
        ScanError: There is no prepared scan, or a record or decision is damaged.
        BrainfmError: `output` is no .html file.
    """
    output = Path(output)
    if output.suffix.lower() not in (".html", ".htm") or output.is_dir():
        raise BrainfmError(f"{output}: the page is an HTML file; give it a name that ends in .html")
    records = list_records(folder)
    strange = _strangeness(records)
    scans = [_scan(name, *records[name]) for name in records]
    scans.sort(key=lambda scan: (_ORDER.index(scan.verdict), -strange[scan.name], scan.name))
    verdicts = [scan.verdict for scan in scans]
    counts = Counter(verdicts)
    page = render_page(
        "qc.html",
        scripts=["qc.js"],
        title=f"Quality of {len(records)} prepared scan{'' if len(records) == 1 else 's'}",
        all_pass=counts["pass"] + counts["accepted"] == len(records),
        summary=", ".join(f"{counts[verdict]} {verdict}" for verdict in _ORDER if counts[verdict]),
        scans=scans,
        ranges=RANGES,
        making=_making(records),
        folder=os.fspath(folder),
    )
    write_text(output, page)
    return verdicts


def decide_all(
    folder: str | os.PathLike[str], accept: Sequence[str], reject: Sequence[str], by: str, why: str
) -> dict[str, str]:
    """Keep a person's decisions on prepared scans below a folder; return each scan's verdict now. All of them or none.

    Args:
        folder: As of `write_page`.
        accept: Names of scans, as the page has them.
        reject: Likewise.
        by: Who decides.
        why: And why.

    Raises:
        ScanError: There is no scan of a name, or one is both accepted and rejected.
    """
    both = sorted({*accept} & {*reject})
    if both:
        raise ScanError(f"{folder}: {both[0]} is both accepted and rejected; decide")
    chosen: dict[str, Choice] = dict.fromkeys(accept, "accept")
    chosen |= dict.fromkeys(reject, "reject")
    folders = _folders_of(chosen, folder)
    for name, choice in chosen.items():
        decide(folders[name], choice, by, why)
    return {name: f"{verdict_of(folders[name])} by {by}" for name in chosen}


def take_decisions(folder: str | os.PathLike[str], file: str | os.PathLike[str]) -> dict[str, str]:
    """Keep the decisions that were made on the page and saved from it; as `decide_all`. All of them or none.

    Args:
        folder: As of `write_page`.
        file: What the page saved: JSON, a list of scan, decision, by, why, date, and record, the sha256 of the
            `prep.json` that was looked at.

    Raises:
        ScanError: The file is no such list, there is no scan of a name, or one was prepared anew since the page was
            written.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        saved: dict[str, dict[str, str]] = {one["scan"]: one for one in content}
        for one in saved.values():
            if one["decision"] not in ("accept", "reject") or not all(one[key] for key in ("by", "why", "date")):
                raise ValueError(f"{one['scan']} is neither accepted nor rejected by somebody, for a reason, at a time")
            if not all(isinstance(value, str) for value in one.values()):
                raise ValueError("not all is text")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ScanError(f"{file}: not what the page of prepared scans saves ({one_line(error)})") from error
    folders = _folders_of(saved, folder)
    for name, one in saved.items():
        if one.get("record") != file_sha256(folders[name] / RECORD):
            raise ScanError(
                f"{folder}: {name} was prepared anew since the page was written; write the page again (brainfm qc "
                f"{folder} -o qc.html) and look again. Nothing was decided"
            )
    for name, one in saved.items():
        choice: Choice = "accept" if one["decision"] == "accept" else "reject"
        decide(folders[name], choice, one["by"], one["why"], one["date"])
    return {name: f"{verdict_of(folders[name])} by {one['by']}" for name, one in saved.items()}


def _folders_of(names: Iterable[str], folder: str | os.PathLike[str]) -> dict[str, Path]:
    """The prepared scans of these names. Raises ScanError for another name, and where decisions there are damaged."""
    records = list_records(folder)
    for name in names:
        if name not in records:
            near = difflib.get_close_matches(name, records, n=3, cutoff=0.3) or list(records)[:3]
            raise ScanError(f"{folder}: no prepared scan is called {name!r}; there are {', '.join(near)}, …")
        decision_of(records[name][0])
    return {name: records[name][0] for name in names}


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
    """A scan as the page shows it; its figures as `prep.json` has them, those that fail first."""

    name: str
    record: str
    verdict: str
    judged: str
    decision: Decision | None
    picture: bytes | None
    notes: list[str]
    figures: list[dict[str, Any]]


def _scan(name: str, folder: Path, record: dict[str, Any]) -> _Scan:
    try:
        picture = (folder / PICTURE).read_bytes()
    except OSError:
        picture = None
    figures = sorted(record["quality"], key=lambda figure: -VERDICTS.index(figure["verdict"]))
    notes = ["came without its skull"] if record["input"]["stripped"] else []
    digest, decision = file_sha256(folder / RECORD), decision_of(folder)
    return _Scan(name, digest, verdict_of(folder), record["verdict"], decision, picture, notes, figures)


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
