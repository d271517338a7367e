"""The group level: of what the participants' calls left, one table of the scans, one of embeddings a model, a page."""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import pandas as pd

from brainfm.bids import DESCRIPTION
from brainfm.bidsapp.call import LOGS, Call, check_description
from brainfm.bidsapp.selection import RAW, select
from brainfm.errors import BrainfmError, ScanError
from brainfm.files import atomic_path, one_line, write_text
from brainfm.manifest import ScanRecord
from brainfm.prep.quality import RANGES
from brainfm.render import render_page
from brainfm.report import RunReport, current, kind_of, read_report
from brainfm.table import Embeddings, Origin, write
from brainfm.version import __version__

logger = logging.getLogger("brainfm")

_ORDER = {"unreadable": 0, "fail": 0, "look": 1, "rejected": 3, "accepted": 4}  # on the page; the others between
_IDS = ("subject_id", "session_id")


@dataclass
class Group:
    """What was written, and of what.

    Attributes:
        scans: Rows of the table of scans.
        tables: The tables of embeddings → their rows.
        failed: Scans that failed → why.
        not_run: Scans of the data set that no participant's call was of.
        left_out: What of the data set is no T1w scan, and why.
        problems: Tables that could not be made, and why.
    """

    scans: int = 0
    tables: dict[Path, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    not_run: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def run(call: Call) -> Group:
    """Write `group_T1w.tsv`, `group_desc-<model>_embedding.parquet` for each model, and `group_T1w.html`.

    Raises:
        ScanError: No participant's call has left a scan.
        BrainfmError: A file that one has left is damaged.
    """
    reported = current()
    found = [_read(path) for path in sorted(call.output.glob("sub-*/**/*_T1w.json"))]
    rows = [row for row in found if isinstance(row.get("bids_name"), str)]
    if not rows:
        raise ScanError(
            f"{call.output}: no scan in it; run first: brainfm bids {call.bids_dir} {call.output} participant"
        )
    group = Group(len(rows))
    group.failed = {row["bids_name"]: _why(row) for row in rows if row["errors"]}
    _compare_with_the_data_sets(call, rows, group)
    _write_table(rows, call.output / "group_T1w.tsv")
    sidecars: dict[str, list[Path]] = {}
    for path in sorted(call.output.glob("sub-*/**/*_embedding.json")):
        sidecars.setdefault(path.stem.rpartition("_desc-")[2].removesuffix("_embedding"), []).append(path)
    by_source = {row["Sources"][0]: row for row in rows}
    origins: dict[str, Origin] = {}
    for label, paths in sidecars.items():
        output = call.output / f"group_desc-{label}_embedding.parquet"
        try:
            table = _embeddings(paths, by_source, _links(call.output))
        except BrainfmError as error:
            group.problems.append(str(error))
            continue
        write(table, output)
        group.tables[output] = len(table)
        if table.origin is not None:
            origins[label] = table.origin
    _write_page(call, rows, group, origins)
    reported.asked, reported.done = len(rows) + len(group.not_run), len(rows) - len(group.failed)
    reported.left_out = group.left_out
    for name, why in group.failed.items():
        reported.fail(name, why)
    return group


def _why(row: dict[str, Any]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in row["errors"].items())


def _compare_with_the_data_sets(call: Call, rows: list[dict[str, Any]], group: Group) -> None:
    """Note what of the data sets that were read is left out, and which of their scans no call was of."""
    there = {source for row in rows for source in row["Sources"]}
    links = {**_links(call.output), **call.derivatives}
    for name in dict.fromkeys(source.split(":")[1] for source in sorted(there)):
        try:
            scans, left_out = select(call.bids_dir, {} if name == RAW else {name: links[name]}, call.wanted)
        except (ScanError, KeyError) as error:
            group.problems.append(f"the data set {name} cannot be compared: {one_line(error)}")
            continue
        group.left_out |= left_out
        group.not_run += [scan.name for scan in scans if scan.uri not in there]


def _write_table(rows: list[dict[str, Any]], path: Path) -> None:
    """The table of all scans, as MRIQC's: a row a scan, its ids, its quality; "n/a" is what BIDS writes for nothing."""
    named = {name: None for row in rows for name in row["bids_meta"]}
    ids = [*(name for name in _IDS if name in named), *(name for name in named if name not in _IDS)]
    figures = [name for name in RANGES if any(name in row["figures"] for row in rows)]
    figures += [name for name in dict.fromkeys(name for row in rows for name in row["figures"]) if name not in RANGES]
    table = pd.DataFrame(
        {"bids_name": row["bids_name"]}
        | {name: row["bids_meta"].get(name) for name in ids}
        | {name: row["figures"].get(name) for name in figures}
        | {"verdict": row["verdict"] or None, "error": _why(row) or None}
        for row in rows
    )
    with atomic_path(path) as temporary:
        table.to_csv(temporary, sep="\t", na_rep="n/a", index=False, lineterminator="\n")


def _embeddings(paths: Iterable[Path], rows: dict[str, dict[str, Any]], links: dict[str, Path]) -> Embeddings:
    """One model's table. Raises BrainfmError where the vectors are not all one model's, or a file is damaged."""
    vectors, records, first = [], [], None
    for path in paths:
        said = _read(path)
        try:
            made_by = [said[name] for name in ("Model", "WeightsDigest", "Contract", "Readout", "DType")]
            origin = Origin(*made_by, *(said["SoftwareVersions"][name] for name in ("brainfm", "torch")))
            source = said["Sources"][0]
            vectors.append(np.load(path.with_suffix(".npy"), allow_pickle=False))
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise BrainfmError(
                f"{path}: damaged ({one_line(error)}); remove it, and run its participant again"
            ) from error
        first = first or origin
        if differ := first.differences(origin):
            raise BrainfmError(
                f"{path}: made by another model than the others, which differ in {', '.join(differ)}; run its "
                "participant again"
            )
        row = rows.get(source, {})
        _, name, inner = source.split(":", 2)
        image = links[name] / inner if name in links else inner
        extra = {"qc": row["verdict"]} if row.get("verdict") else {}
        records.append(ScanRecord(image, None, row.get("patient_id", ""), row.get("scan_id", ""), extra))
    return Embeddings(np.stack(vectors), records, [], first and replace(first, scans=len(records)))


def _links(output: Path) -> dict[str, Path]:
    """The folders of the data sets that BIDS URIs name."""
    links = _read(output / DESCRIPTION).get("DatasetLinks", {})
    return {name: Path(url2pathname(urlsplit(uri).path)) for name, uri in links.items()}


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise BrainfmError(f"{path}: damaged ({one_line(error)}); remove it, and run its participant again") from error


def _write_page(call: Call, rows: list[dict[str, Any]], group: Group, origins: dict[str, Origin]) -> None:
    """The page: the scans that failed first, then the doubtful ones."""

    def shown(row: dict[str, Any]) -> dict[str, Any]:
        picture = call.output / row["picture"] if row.get("picture") else None
        verdict = "failed" if row["errors"] else row["verdict"]
        return row | {
            "verdict": verdict or "embedded",
            "picture": picture.read_bytes() if picture and picture.is_file() else None,
            "errors": [f"{name}: {why}" for name, why in row["errors"].items()],
        }

    scans = [shown(row) for row in rows]
    scans.sort(key=lambda scan: (-1 if scan["errors"] else _ORDER.get(scan["verdict"], 2), scan["bids_name"]))
    try:
        name = check_description(call.bids_dir)["Name"]
    except BrainfmError:
        name = call.bids_dir.name
    counts = Counter(scan["verdict"] for scan in scans)
    calls = _calls(call.output)
    page = render_page(
        "bids.html",
        title=f"{name}: {len(rows)} T1w scan{'' if len(rows) == 1 else 's'}",
        complete=not (group.failed or group.not_run or group.problems),
        summary=", ".join(f"{number} {verdict}" for verdict, number in counts.items()),
        scans=scans,
        ranges=RANGES,
        group=group,
        failures=Counter(kind_of(why) for row in rows for why in row["errors"].values()).most_common(),
        calls=calls,
        steps=_steps(calls),
        tables={path.name: (many, origins[label_in(path)]) for path, many in group.tables.items()},
        version=__version__,
    )
    write_text(call.output / "group_T1w.html", page)


def _calls(output: Path) -> list[RunReport]:
    """The reports that the participants' calls left, in the order of their beginning; a damaged one is passed over."""
    found = []
    for path in (output / LOGS).glob("participant-*.json"):
        try:
            found.append(read_report(path))
        except BrainfmError as error:
            logger.warning("%s", error)
    return sorted(found, key=lambda call: call.started)


def _steps(calls: Iterable[RunReport]) -> dict[str, tuple[float, float | None]]:
    """Each step of all calls: its seconds, and those for each thing that was gone through in it, such as a scan."""
    seconds: dict[str, float] = defaultdict(float)
    many: dict[str, int] = defaultdict(int)
    for call in calls:
        for name, step in call.steps.items():
            seconds[name] += step.seconds
            many[name] += step.done - step.earlier
    return {name: (total, total / many[name] if many[name] else None) for name, total in seconds.items()}


def label_in(path: Path) -> str:
    """The model's label in the name of a table of embeddings."""
    return path.stem.removeprefix("group_desc-").removesuffix("_embedding")
