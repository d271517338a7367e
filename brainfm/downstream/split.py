"""Splits into train, val and test by patient: stratified, seeded, checked, and kept in a file.

No patient is in two splits. Who is in which depends on the patients, their labels and the seed, not on the order of the
rows nor on the folder they lie in.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from brainfm.downstream.statistics import Kind
from brainfm.errors import BrainfmError
from brainfm.files import write_csv
from brainfm.manifest import ScanRecord, check_patients, read_manifest

SPLITS = ("train", "val", "test")
UNUSED = "unused"  # scans that a split leaves out: of the test part of those at hand, where another cohort is tested
PAPER_FRACTIONS = (0.6, 0.2, 0.2)  # paper, downstream evaluation on SOOP and IXI
_MAX_BINS = 10  # of a regression's labels; ours
_SMALLEST_BIN = 5  # patients of which a fifth, the paper's smallest fraction of the training data, is one

_Indices: TypeAlias = NDArray[np.intp]


def make_split(
    records: Sequence[ScanRecord],
    labels: Iterable[Any],
    *,
    kind: Kind,
    fractions: Sequence[float] = PAPER_FRACTIONS,
    seed: int = 0,
) -> list[str]:
    """A split of the scans by patient, with every label in every split.

    Patients are divided class by class; for a regression, in up to ten bins of as many patients each along the label.
    Each class and bin is divided to within one patient, and so is the whole, except that a class of few patients has
    one in each split at least. A patient of several scans has the most frequent class, or the mean value, of the scans.

    Args:
        records: The scans, each with its patient.
        labels: One a scan: classes, or numbers for a regression.
        kind: What the labels are.
        fractions: Of train, val and test: each above 0, 1 together. The default is the paper's.
        seed: Another one, another split.

    Returns:
        "train", "val" or "test" for each scan.

    Raises:
        BrainfmError: A patient is unknown or written in two ways, a label is missing, all are the same, or a class has
            too few patients to be in every split.
        ValueError: An argument is out of range.

    Example:
        >>> records = read_manifest(Path("manifest.csv"))
        >>> splits = make_split(records, [record.extra["sex"] for record in records], kind="binary")
    """
    parts = np.asarray(fractions, dtype=np.float64)
    if parts.shape != (len(SPLITS),) or not (parts > 0).all() or not math.isclose(parts.sum(), 1):
        raise ValueError(f"fractions must be three numbers above 0 that sum to 1, not {tuple(fractions)}")
    patients = _patients(records)
    smallest_bin = math.ceil(1 / parts.min() - 1e-9)
    values = _patient_labels(records, patients, labels, kind)
    _check_sizes(values, kind, smallest_bin)
    strata = _strata(values, kind, smallest_bin, seed)

    splits = [""] * len(records)
    owed = np.zeros(len(SPLITS))  # patients that each split is short of, so far
    for stratum in sorted(strata, key=len):  # the small ones first: the others make up for their rounding
        counts = _divide(len(stratum), parts, owed)
        for patient, split in zip(stratum, np.repeat(SPLITS, counts), strict=True):
            for row in patients[patient]:
                splits[row] = str(split)
    return splits


def make_fold(
    records: Sequence[ScanRecord], labels: Iterable[Any], *, kind: Kind, folds: int, fold: int, seed: int = 0
) -> list[str]:
    """A fold of a cross-validation by patient: one part of `folds` is test, the next is val, and the others are train.

    Over all folds each patient is in test once, and in val once. Stratified as `make_split` is.

    Args:
        records: As of `make_split`.
        labels: As of `make_split`.
        kind: As of `make_split`.
        folds: 3 or more.
        fold: Which of them, from 0.
        seed: Another one, other folds.

    Raises:
        BrainfmError: As `make_split`; a class has fewer patients than folds.
        ValueError: An argument is out of range.
    """
    if folds < 3 or not 0 <= fold < folds:
        raise ValueError(f"fold {fold} of {folds}: there must be 3 or more, one each for train, val and test")
    patients = _patients(records)
    values = _patient_labels(records, patients, labels, kind)
    if kind == "regression" and len(values) < folds:
        raise BrainfmError(f"{len(values)} patients are too few for {folds} folds")
    for label, count in zip(*np.unique(values, return_counts=True), strict=True) if kind != "regression" else ():
        if count < folds:
            raise BrainfmError(
                f"class {label} has {count} patient(s), and {folds} folds need one each: give fewer --folds, or leave "
                "the class out"
            )
    splits, place = [""] * len(records), 0
    for stratum in _strata(values, kind, folds, seed):
        for patient in stratum:
            part = {fold: "test", (fold + 1) % folds: "val"}.get(place % folds, "train")
            for row in patients[patient]:
                splits[row] = part
            place += 1  # goes on from stratum to stratum: no fold gets all that is left over
    return splits


def subsample(
    records: Sequence[ScanRecord],
    labels: Iterable[Any],
    splits: Sequence[str],
    fraction: float,
    *,
    kind: Kind,
    seed: int = 0,
) -> list[int]:
    """The rows of a fraction of the training patients, for curves of label efficiency (paper, figures 4 and 5).

    Stratified as `make_split` is, and nested: with one seed, the rows of a smaller fraction are among those of a
    larger. Each class is rounded down (paper: of 53 patients of a class in AIBL, 20 % are 10) and has one patient at
    least; of a regression the whole is rounded.

    Args:
        records: All scans, those of val and test too.
        labels: One a scan; those of val and test are not looked at.
        splits: One a scan, as `make_split` gives them.
        fraction: Of the training patients, above 0 up to 1.
        kind: What the labels are.
        seed: Another one, other patients.

    Returns:
        Row numbers in `records`, rising.

    Raises:
        BrainfmError: The split is wrong (see `check_split`), or a label of a training scan is missing.
        ValueError: An argument is out of range.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, not {fraction}")
    check_split(records, splits)
    rows = [row for row, split in enumerate(splits) if split == "train"]
    training, values = [records[row] for row in rows], list(labels)
    _check_length(records, values, "labels")
    patients = _patients(training)
    strata = _strata(
        _patient_labels(training, patients, [values[row] for row in rows], kind), kind, _SMALLEST_BIN, seed
    )
    if kind == "regression":
        # The n-th of N patients of a bin comes at (n - 1)/N, ties by lot: every first part of the queue is stratified.
        places = np.concatenate([np.arange(len(stratum)) / len(stratum) for stratum in strata])
        lots = np.random.default_rng((seed, len(places))).random(len(places))
        queue = np.concatenate(strata)[np.lexsort((lots, places))]
        kept = queue[: max(len(strata), math.floor(fraction * len(queue) + 0.5))]
    else:
        counts = [max(1, math.floor(fraction * len(stratum) + 1e-9)) for stratum in strata]
        kept = np.concatenate([stratum[:count] for stratum, count in zip(strata, counts, strict=True)])
    return sorted(rows[row] for patient in kept for row in patients[patient])


def check_split(records: Sequence[ScanRecord], splits: Sequence[str]) -> None:
    """Raise BrainfmError for a split with a patient on two sides, an empty side, or a word that is no side.

    A scan may be "unused". Nor can it be told of scans whose patients are unknown, or written in two ways.
    """
    _check_length(records, splits, "splits")
    unknown = sorted({repr(split) for split in splits if split not in (*SPLITS, UNUSED)})
    if unknown:
        raise BrainfmError(f"a split is one of {', '.join(SPLITS)}, not {_few(unknown)}; correct the column split")
    divided = [_name(records[rows[0]]) for rows in _patients(records) if len({splits[row] for row in rows}) > 1]
    if divided:
        raise BrainfmError(
            f"{len(divided)} patients are in more than one split: {_few(divided)}; give all scans of a patient the "
            "same split, or let make_split draw one"
        )
    empty = [split for split in SPLITS if split not in splits]
    if empty:
        raise BrainfmError(f"no scan is in {' and '.join(empty)}; each of {', '.join(SPLITS)} needs patients")


def save_split(path: str | os.PathLike[str], records: Sequence[ScanRecord], splits: Sequence[str]) -> None:
    """Write a split, atomically, as CSV: image_path relative to the file, patient_id, split.

    Scans of several channels have a path column a channel, as in a manifest. Raises BrainfmError as `check_split` does,
    and for images in memory, which have no path.
    """
    path = Path(path)
    check_split(records, splits)
    paths = [_paths(record) for record in records]
    columns = list(dict.fromkeys(column for one in paths for column in one))

    def relative(place: str | None) -> str:
        return Path(os.path.relpath(place, path.absolute().parent)).as_posix() if place else ""

    rows = [
        (*(relative(one.get(column)) for column in columns), record.patient_id, split)
        for one, record, split in zip(paths, records, splits, strict=True)
    ]
    write_csv(path, [(*columns, "patient_id", "split"), *dict.fromkeys(rows)])


def load_split(path: str | os.PathLike[str], records: Sequence[ScanRecord]) -> list[str]:
    """The split in a file of `save_split` (or a CSV with its columns), in the order of `records`.

    Raises:
        BrainfmError: No such file, no column `split`, other scans than those of `records`, or a split that
            `check_split` refuses.
    """
    path = Path(path)
    if not path.is_file():
        raise BrainfmError(f"{path}: no such split file; write one with save_split")
    listed = read_manifest(path)
    if any("split" not in record.extra for record in listed):
        raise BrainfmError(f"{path}: a split file needs the columns image_path and split")
    known = {_place(record): record.extra["split"] for record in listed}
    places = [_place(record) for record in records]
    strangers, missing = [place for place in known if place not in set(places)], [p for p in places if p not in known]
    if strangers or missing:
        found = [f"{len(strangers)} of its scans are not in the manifest ({_few(strangers)})"] if strangers else []
        found += [f"{len(missing)} scans of the manifest are not in it ({_few(missing)})"] if missing else []
        raise BrainfmError(
            f"{path}: the split of another list of scans: {'; '.join(found)}; give the manifest it was made from, or "
            "make a new split"
        )
    splits = [known[place] for place in places]
    check_split(records, splits)
    return splits


# --- Patients and their labels --------------------------------------------------------------------


def _patients(records: Sequence[ScanRecord]) -> list[list[int]]:
    """The rows of each patient, by their ids."""
    unknown = [
        record.name or f"image in memory, row {row}" for row, record in enumerate(records) if not record.patient_id
    ]
    if unknown:
        raise BrainfmError(
            f"nobody says whose {len(unknown)} of {len(records)} scans are: {_few(unknown)}; a split keeps patients "
            "together: give a column patient_id (where each scan is of another person, a number each)"
        )
    check_patients(records)
    rows: dict[str, list[int]] = {}
    for row, record in enumerate(records):
        rows.setdefault(record.patient_id, []).append(row)
    return [rows[patient] for patient in sorted(rows)]


def _patient_labels(
    records: Sequence[ScanRecord], patients: list[list[int]], labels: Iterable[Any], kind: Kind
) -> NDArray[Any]:
    """One label a patient, of which there are at least two."""
    if kind not in ("binary", "multiclass", "regression"):
        raise ValueError(f"kind must be binary, multiclass or regression, not {kind!r}")
    given = list(labels)
    _check_length(records, given, "labels")
    missing = [_name(r) for r, v in zip(records, given, strict=True) if v is None or v == "" or v != v]
    if missing:
        raise BrainfmError(f"{len(missing)} scans have no label: {_few(missing)}; leave them out")
    try:
        scans = np.asarray(given, dtype=np.float64 if kind == "regression" else None)
    except ValueError as error:
        raise BrainfmError(f"the label of a regression must be a number ({error})") from error
    if kind == "regression" and not np.isfinite(scans).all():
        raise BrainfmError("the label of a regression must be a finite number; leave the others out")
    summary = np.mean if kind == "regression" else _most_frequent
    values = np.array([summary(np.sort(scans[rows])) for rows in patients])  # sorted: to the bit for any order of rows
    found = np.unique(values)
    if len(found) < 2:
        label = f"the label is {found[0]} for each of {len(patients)} patients" if patients else "there are no scans"
        raise BrainfmError(f"{label}; two different labels are needed to learn from")
    if kind == "binary" and len(found) > 2:
        raise BrainfmError(f"a binary label has two values, and this has {len(found)}: {_few(map(str, found))}")
    return values


def _most_frequent(values: NDArray[Any]) -> Any:
    found, counts = np.unique(values, return_counts=True)
    return found[counts.argmax()]


def _check_sizes(values: NDArray[Any], kind: Kind, smallest_bin: int) -> None:
    """Raise BrainfmError where a class, or the whole of a regression, is too small to be in every split."""
    if kind == "regression":
        if len(values) < smallest_bin:
            raise BrainfmError(
                f"{len(values)} patients are too few for these fractions: at least {smallest_bin} are needed"
            )
        return
    for label, patients in zip(*np.unique(values, return_counts=True), strict=True):
        if patients < len(SPLITS):
            raise BrainfmError(
                f"class {label} has {patients} patient(s), and needs {len(SPLITS)} to be in each of "
                f"{', '.join(SPLITS)}: add patients, or leave the class out"
            )


def _strata(values: NDArray[Any], kind: Kind, smallest_bin: int, seed: int) -> list[_Indices]:
    """Groups of like patients, each shuffled: classes, or bins along the label with `smallest_bin` or more in each."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(values))
    if kind != "regression":
        return [order[values[order] == label] for label in np.unique(values)]
    bins = max(1, min(_MAX_BINS, len(values) // smallest_bin))
    along = order[np.argsort(values[order], kind="stable")]
    return [rng.permutation(group) for group in np.array_split(along, bins)]


def _divide(patients: int, fractions: NDArray[np.float64], owed: NDArray[np.float64]) -> NDArray[np.int64]:
    """Patients of a stratum for each split: its fraction rounded down or up, up where most is owed. Updates `owed`."""
    quota = patients * fractions
    counts = np.floor(quota + 1e-9).astype(np.int64)
    owed += quota
    counts[np.argsort(counts - owed, kind="stable")[: patients - counts.sum()]] += 1
    while patients >= len(fractions) and not counts.all():
        counts[counts.argmin()] += 1
        counts[counts.argmax()] -= 1
    owed -= counts
    return counts


# --- Words ----------------------------------------------------------------------------------------


def _place(record: ScanRecord) -> str:
    """Where a scan lies, whatever the working folder."""
    return ", ".join(place for _, place in sorted(_paths(record).items()))


def _paths(record: ScanRecord) -> dict[str, str]:
    """The path of each image of a scan, by its column in a manifest."""
    paths = {}
    for channel, image in record.images.items():
        if not isinstance(image, str | os.PathLike):
            raise BrainfmError("a split file lists scans by their paths, and this one is an image in memory")
        # Path.absolute would keep the ".." of a relative path
        paths[f"{channel.lower()}_path" if channel else "image_path"] = os.path.abspath(image)  # noqa: PTH100
    return paths


def _name(record: ScanRecord) -> str:
    return record.patient_id or record.name or "an image in memory"


def _few(names: Iterable[str], most: int = 3) -> str:
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def _check_length(records: Sequence[ScanRecord], items: Sequence[Any], what: str) -> None:
    if len(items) != len(records):
        raise ValueError(f"{len(items)} {what} for {len(records)} scans")
