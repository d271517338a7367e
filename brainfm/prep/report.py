"""The page of many prepared scans: one HTML file with every picture, figure and verdict, and nothing outside it."""

from __future__ import annotations

import base64
import hashlib
import html
import os
import string
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

import brainfm
from brainfm import downstream
from brainfm.errors import BrainfmError
from brainfm.files import atomic_path
from brainfm.prep.batch import list_records
from brainfm.prep.quality import RANGES, VERDICTS, Range

_TEMPLATES = Path(__file__).parent / "templates"
_PAGES = Path(downstream.__file__).parent / "templates"  # the look and the sorting of every page of brainfm
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
    with atomic_path(output) as temporary:
        temporary.write_text(_page(records, order), encoding="utf-8", newline="\n")
    return [records[name][1]["verdict"] for name in order]


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


def _page(records: Records, order: list[str]) -> str:
    script = (_PAGES / "page.js").read_text(encoding="utf-8")
    style = (_PAGES / "page.css").read_text(encoding="utf-8") + (_TEMPLATES / "qc.css").read_text(encoding="utf-8")
    counts = Counter(record["verdict"] for _, record in records.values())
    summary = ", ".join(f"{counts[verdict]} {verdict}" for verdict in reversed(VERDICTS))
    head = ["Scan", "Picture", "Verdict", "Why", *RANGES]
    return string.Template((_TEMPLATES / "qc.html").read_text(encoding="utf-8")).substitute(
        title=f"Quality of {len(records)} prepared scans",
        style=style,
        script=script,
        style_hash=_content_hash(style),
        script_hash=_content_hash(script),
        state="done" if counts["pass"] == len(records) else "unfinished",
        summary=summary,
        head="".join(f'<th scope="col">{html.escape(name)}</th>' for name in head),
        rows="".join(_row(name, *records[name]) for name in order),
        ranges="".join(_range_row(name, usual) for name, usual in RANGES.items()),
        making=_making(records),
    )


def _row(name: str, folder: Path, record: dict[str, Any]) -> str:
    try:
        data = base64.b64encode((folder / "qc.png").read_bytes()).decode()
        picture = f'<img tabindex="0" src="data:image/png;base64,{data}" alt="slices of {html.escape(name)}">'
    except OSError:
        picture = "no qc.png"
    verdict = record["verdict"]
    reasons = "".join(f"<div>{html.escape(f['reason'])}</div>" for f in record["quality"] if f["reason"])
    if record["input"]["stripped"]:
        reasons += "<div>came without its skull</div>"
    figures = {figure["name"]: figure for figure in record["quality"]}
    cells = "".join(_cell(figures.get(figure)) for figure in RANGES)
    return (
        f'<tr><th scope="row">{html.escape(name)}</th><td>{picture}</td>'
        f'<td class="{html.escape(verdict)}">{html.escape(verdict)}</td><td class="reasons">{reasons}</td>{cells}</tr>'
    )


def _cell(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "<td>–</td>"
    return f'<td class="{html.escape(figure["verdict"])}">{figure["value"]:.3g}</td>'


def _range_row(name: str, usual: Range) -> str:
    def between(limits: tuple[float, float]) -> str:
        return f"{limits[0]:g} to {limits[1]:g}"

    cells = (usual.title, between(usual.passes), between(usual.looks))
    return f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"


def _making(records: Records) -> str:
    """The settings and tools, each with the number of scans it was used for where that is not all of them."""
    lines: Counter[tuple[str, str]] = Counter()
    for _, record in records.values():
        lines.update((step, str(tool)) for step, tool in record["tools"].items())
        lines.update(
            (name, str(value)) for name, value in record["settings"].items() if name in ("registration", "mask")
        )
    lines[("page", f"brainfm {brainfm.__version__}")] = len(records)
    return "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}"
        f"{'' if count == len(records) else f' ({count} scans)'}</dd>"
        for (name, value), count in lines.items()
    )


def _content_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
