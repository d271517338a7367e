"""What the scripts of the cohorts share: the table of phenotypes, the prepared scans, and the manifest that joins them.

No image is read: the folder's names say whose scan it is.
"""

import argparse
import csv
import hashlib
import math
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import brainfm
from brainfm.downstream.split import SPLITS, check_split
from brainfm.errors import BrainfmError
from brainfm.files import atomic_path
from brainfm.manifest import ScanRecord, list_scans
from brainfm.tabular import read_rows

Labels = dict[str, float]

DISAGREE = "several rows of the table that disagree"


@dataclass(frozen=True)
class ScanId:
    """What a folder's name says of its scan.

    Attributes:
        row: The key of its row in the table.
        patient: Who was scanned.
        scan: Which scan of that patient.
        visit: Where it stands among them; the first comes first.
    """

    row: Hashable
    patient: str
    scan: str
    visit: float = 0


def arguments(description: str, phenotypes: str) -> argparse.ArgumentParser:
    """The arguments that all scripts have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phenotypes", type=Path, help=phenotypes)
    parser.add_argument("scans", type=Path, help="folder of TurboPrep's output, a folder a scan")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the manifest to write, a CSV")
    parser.add_argument("--seed", type=int, default=0, help="of the split (default: 0)")
    return parser


def run(main: Callable[[], None]) -> None:
    """Run a script; an error of the input is one line."""
    try:
        main()
    except BrainfmError as error:
        sys.exit(f"error: {error}")


# --- The table ------------------------------------------------------------------------------------


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a table that has these columns: CSV, TSV, or the first sheet of an Excel file."""
    rows = read_rows(path)
    missing = [column for column in columns if column not in rows]
    if missing:
        raise BrainfmError(
            f"{path}: no column {', '.join(map(repr, missing))}; found: {', '.join(map(repr, rows.columns))}"
        )
    return rows.to_dict("records")


def number(text: str) -> float:
    """A number of the table; NaN where there is none, as in an empty field or "n/a"."""
    try:
        return float(text)
    except ValueError:
        return math.nan


class People(dict[Hashable, Labels | str]):
    """By the key of a row of the table: its labels, or why it cannot be used."""

    def add(self, key: Hashable, labels: Labels | str) -> None:
        """Add a row. Of two rows of a person the usable one counts; two that disagree are not usable."""
        before = self.setdefault(key, labels)
        if before == DISAGREE or isinstance(labels, str):
            return
        if isinstance(before, str):
            self[key] = labels
        elif before != labels:
            self[key] = DISAGREE


# --- The scans ------------------------------------------------------------------------------------


@dataclass
class Cohort:
    """The scans that have labels, one a patient, and what was left out.

    Attributes:
        name: Of the cohort, as in the column `dataset`.
        records: The scans; `extra` holds their labels as text.
        labels: The same as numbers.
        found: How many scans there were.
        left_out: Scans by the reason.
        unused_rows: Usable rows of the table without a scan.
    """

    name: str
    records: list[ScanRecord]
    labels: list[Labels]
    found: int
    left_out: dict[str, list[str]]
    unused_rows: list[str]


def join(
    name: str,
    folder: Path,
    identify: Callable[[str], ScanId | None],
    people: People,
    covariates: Mapping[Hashable, Mapping[str, str]] | None = None,
) -> Cohort:
    """The prepared scans of a folder with their rows of the table; of a patient the first scan that has labels.

    `identify` is given the scan's folder relative to `folder`, such as "IXI002-Guys-0828-T1". `covariates` are further
    columns of each row, for the control that predicts without an image; they may be empty.
    """
    if not folder.is_dir():
        raise BrainfmError(f"{folder}: no such folder")
    left_out = defaultdict[str, list[str]](list)
    usable: list[tuple[ScanId, str, ScanRecord, Labels]] = []
    rows_with_scan = set()
    scans = list_scans(folder)
    for scan in scans:
        place = Path(scan.image).parent.relative_to(folder).as_posix()
        scan_id = identify(place)
        if scan_id is None:
            left_out[f"no {name} id in the folder's name"].append(place)
            continue
        rows_with_scan.add(scan_id.row)
        labels = people.get(scan_id.row, "no row in the table")
        if isinstance(labels, str):
            left_out[labels].append(place)
        elif scan.mask is None:
            left_out["no mask.nii.gz"].append(place)
        else:
            usable.append((scan_id, place, scan, labels))

    cohort = Cohort(name, [], [], len(scans), left_out, [])
    patients = set()
    for scan_id, place, scan, labels in sorted(usable, key=lambda item: (item[0].visit, item[1])):
        if scan_id.patient in patients:
            left_out["an earlier scan of the patient is used"].append(place)
            continue
        patients.add(scan_id.patient)
        extra = {"dataset": name} | {label: f"{value:g}" for label, value in labels.items()}
        extra |= (covariates or {}).get(scan_id.row, {})
        cohort.records.append(ScanRecord(scan.image, scan.mask, scan_id.patient, scan_id.scan, extra))
        cohort.labels.append(labels)
    if not cohort.records:
        why = "; ".join(f"{len(places)}: {reason}, such as {places[0]}" for reason, places in left_out.items())
        raise BrainfmError(f"{folder}: none of {len(scans)} scans can be used ({why})")
    cohort.unused_rows = [
        " ".join(map(str, row)) if isinstance(row, tuple) else str(row)
        for row, labels in people.items()
        if isinstance(labels, dict) and row not in rows_with_scan
    ]
    return cohort


# --- The split ------------------------------------------------------------------------------------


def hashed_split(
    name: str, records: Sequence[ScanRecord], seed: int = 0, groups: Mapping[str, str] | None = None
) -> list[str]:
    """A split of 60, 20 and 20 in a hundred by a hash of each patient's id.

    A patient's part hangs on the cohort's name, the id and the seed alone: whoever has fewer scans, or more, has the
    same patients in test.

    Args:
        name: Of the cohort.
        records: Its scans.
        seed: Another one, another split.
        groups: By patient, whom to keep together with others, such as a family; without it each stands alone.
    """

    def part(patient: str) -> str:
        together = (groups or {}).get(patient, patient)
        digest = hashlib.sha256(f"{name}:{seed}:{together}".encode()).digest()
        fraction = int.from_bytes(digest[:8], "big") / 2**64
        return "train" if fraction < 0.6 else "val" if fraction < 0.8 else "test"

    return [part(record.patient_id) for record in records]


def split_hash(records: Sequence[ScanRecord], splits: Sequence[str]) -> str:
    """Twelve digits that two have alike who have the same patients in the same parts."""
    lines = sorted({f"{record.patient_id}:{split}" for record, split in zip(records, splits, strict=True)})
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


# --- The manifest ---------------------------------------------------------------------------------


def write_manifest(path: Path, cohort: Cohort, splits: Sequence[str]) -> None:
    """Write the manifest, with paths relative to it, in the order of the patients; and print what is in it."""
    check_split(cohort.records, splits)
    rows = [record.columns() | {"split": split} for record, split in zip(cohort.records, splits, strict=True)]
    for row in rows:
        for column in ("image_path", "mask_path"):
            row[column] = Path(os.path.relpath(row[column], path.absolute().parent)).as_posix()
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (len(row["patient_id"]), row["patient_id"])))
    _summarise(path, cohort, splits)


def _summarise(path: Path, cohort: Cohort, splits: Sequence[str]) -> None:
    """Print what is in the manifest, and what is not and why."""
    names = list(cohort.labels[0])
    patients = len({record.patient_id for record in cohort.records})
    print(f"{path}: {len(cohort.records)} scans of {patients} patients, of {cohort.found} scans found")
    print(f"split {split_hash(cohort.records, splits)}")
    print(f"{'split':<8}{'patients':>9}" + "".join(f"{'mean ' + name:>12}" for name in names))
    counts = Counter(splits)
    for split in SPLITS:
        values = [labels for labels, of in zip(cohort.labels, splits, strict=True) if of == split]
        means = [sum(labels[name] for labels in values) / len(values) for name in names]
        print(f"{split:<8}{counts[split]:>9}" + "".join(f"{mean:>12.2f}" for mean in means))
    for reason, places in sorted(cohort.left_out.items()):
        print(f"left out {len(places)}: {reason} ({_few(sorted(places))})")
    if cohort.unused_rows:
        print(f"{len(cohort.unused_rows)} usable rows of the table have no scan ({_few(cohort.unused_rows)})")
    for overlap in brainfm.pretraining_overlap("simclr_resnet18_3d", cohort.name):
        print(f"warning: for simclr_resnet18_3d.kaczmarek2025, {overlap}")


def _few(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
