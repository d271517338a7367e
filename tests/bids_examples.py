"""What becomes of each of bids-standard/bids-examples: real names, empty files. Written as a table by

    python tests/bids_examples.py BIDS_EXAMPLES > tests/data/bids_examples.csv

after the counts were looked at: `found` is the number of files that end in _T1w below sub-*/, by `Path.rglob`.
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

from brainfm.bids import is_bids, read_bids
from brainfm.errors import ScanError
from brainfm.manifest import list_scans
from brainfm.prep.source import bids_heads, find_sources

COLUMNS = ("data_set", "found", "prepared", "embedded", "left_out")


def row_of(folder: Path) -> dict[str, str]:
    """A data set's row: how many T1w images there are, are prepared, are embedded, and why which are left out."""
    found = [path for subject in folder.glob("sub-*") for path in subject.rglob("*_T1w.nii*")]
    try:
        sources = find_sources([folder])
        assert len({source.name.casefold() for source in sources}) == len(sources)
        prepared = str(len(sources))
    except ScanError:
        prepared = "refused"
    try:
        records = list_scans(folder)
        assert len({(record.patient_id, record.scan_id) for record in records}) == len(records)
        embedded = str(len(records))
    except ScanError:
        embedded = "refused"
    reasons: dict[str, str] = {}
    with suppress(ScanError):
        if is_bids(folder):
            bids_heads(read_bids(folder), reasons)
    counts = Counter(reason.split(": ")[0] for reason in reasons.values())
    left_out = "; ".join(f"{number} × {reason}" for reason, number in sorted(counts.items()))
    return dict(zip(COLUMNS, (folder.name, str(len(found)), prepared, embedded, left_out), strict=True))


def data_sets(examples: Path) -> list[Path]:
    """Their folders; those of the repository's own, such as `docs`, are none."""
    return sorted(path.parent for path in examples.glob("*/dataset_description.json"))


if __name__ == "__main__":
    table = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(row_of(folder) for folder in data_sets(Path(sys.argv[1])))
