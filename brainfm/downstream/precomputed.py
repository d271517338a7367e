"""Labels joined with tables of embeddings that were made before: a probe without a model and without scans."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from brainfm import table
from brainfm.downstream.account import few
from brainfm.downstream.statistics import Kind
from brainfm.downstream.task import LeftOut, Task, TaskData, kind_of, labelled, load_task, make_task, task_data
from brainfm.errors import TaskError
from brainfm.manifest import ScanRecord, is_channel_column, with_ids
from brainfm.system import expanded
from brainfm.table import Embeddings
from brainfm.tabular import is_frame, is_missing, read_rows, rows_of

TableLike: TypeAlias = "str | os.PathLike[str] | Embeddings"


def probe_embeddings(
    labels: Any,
    embeddings: TableLike | Mapping[str, TableLike],
    output: str | os.PathLike[str],
    *,
    label: str = "",
    kind: Kind | None = None,
    covariates: Sequence[str] = (),
    positive: str = "",
    seeds: int = 5,
    replace_all: bool = False,
    progress: bool = False,
) -> Path:
    """How well a linear model predicts a label from embeddings that were made before, as tables, figures and a page.

    Args:
        labels: As of `read_embedded`.
        embeddings: As of `read_embedded`.
        output: As of `benchmark`.
        label: As of `read_embedded`.
        kind: As of `read_embedded`.
        covariates: As of `read_embedded`.
        positive: As of `read_embedded`.
        seeds: Splits, each with a probe of its own.
        replace_all: As of `benchmark`.
        progress: Show a progress bar.

    Returns:
        The page, `index.html`; the numbers are beside it in `results.csv` and `predictions.csv`.

    Raises:
        TaskError: As of `read_embedded`.
        BrainfmError: As of `benchmark`.

    Example:
        >>> from brainfm.downstream.precomputed import probe_embeddings
        >>> probe_embeddings("participants.tsv", "embeddings.parquet", "results", label="sex")
    """
    from brainfm.downstream.benchmark import benchmark
    from brainfm.downstream.plan import Plan

    data = read_embedded(labels, embeddings, label=label, kind=kind, covariates=covariates, positive=positive)
    plan = Plan(models=tuple(data.embeddings), modes=("probe",), seeds=seeds)
    return benchmark([data], plan, output, replace_all=replace_all, progress=progress)


def read_embedded(
    labels: Any,
    embeddings: TableLike | Mapping[str, TableLike],
    *,
    label: str = "",
    kind: Kind | None = None,
    covariates: Sequence[str] = (),
    positive: str = "",
    to_learn: bool = True,
) -> TaskData:
    """Labels and the embeddings of their scans, joined.

    Rows are joined by patient (`patient_id`, else `participant_id`, `subject_id` or `PTID`) and, where the row of a
    label has one, `scan_id`; a row without it is of all scans of its patient. Where the labels name no patients, or
    several rows the same patient and no scan, rows are joined by path (`image_path`, or a column a channel). Patients
    that match only but for BIDS's "sub-" are taken, and that is said. What has no partner is left out, counted and
    named on both sides.

    Args:
        labels: A table (.csv, .tsv), a pandas.DataFrame, or the YAML file of a task whose `manifest` is a table.
        embeddings: A table of `brainfm embed` (.csv, .parquet, .npz) or of `brainfm.embed`, or several by name; scans
            are those of the first.
        label: The column to predict; of a task's file it is known.
        kind: What the label is; None where its values leave no doubt (see `kind_of`).
        covariates: Columns of the labels that a control predicts from without an image.
        positive: Of a binary label the word that is 1.
        to_learn: Whether there must be enough patients to split and to learn from.

    Raises:
        TaskError: There is no such column, nothing matches, a scan is there twice, or as `read_task`.
        BrainfmError: A table of embeddings is not one.
    """
    tables = embeddings if isinstance(embeddings, Mapping) else {_name(embeddings): embeddings}
    read = {name: one if isinstance(one, Embeddings) else table.read(one) for name, one in tables.items()}
    task = None
    if isinstance(labels, str | os.PathLike) and Path(labels).suffix.lower() in (".yaml", ".yml"):
        if label or kind or covariates or positive:
            raise TaskError(f"{labels}: a task's file says label, kind, covariates and positive itself; leave them out")
        task = load_task(labels)
        if not task.manifest:
            raise TaskError(f"{labels}: the task names no table; give it manifest: FILE.csv")
        labels = Path(labels).parent / task.manifest
    rows, source = _read_labels(labels)
    task = task or _task_of(rows, source, label, kind, covariates, positive)
    (name, first), *others = read.items()
    scans = [replace(record, mask=None) for record in first.records]  # its files are not looked at
    joined = _join(rows, source, scans, name)
    data = (task_data if to_learn else labelled)(task, joined.records, source.name)
    vectors = {name: first.vectors[[joined.places[id(record)] for record in data.records]]}
    for other, one in others:
        places = {_identity(record): n for n, record in enumerate(one.records)}
        known = [places.get(_identity(first.records[joined.places[id(record)]]), -1) for record in data.records]
        if max(known) < 0:
            raise TaskError(f"{other}: no scan of it is in {name}; embed the same scans with both models")
        found = one.vectors[known].astype(np.float32)
        found[np.array(known) < 0] = np.nan
        vectors[other] = found
    models = {name: one.origin.model for name, one in read.items() if one.origin}
    left_out = (*data.left_out, *joined.left_out)
    return replace(data, embeddings=vectors, made_by=models, left_out=left_out, notes=joined.notes)


def label_scans(
    labels: Any,
    records: Sequence[ScanRecord],
    *,
    label: str,
    kind: Kind | None = None,
    covariates: Sequence[str] = (),
    positive: str = "",
) -> TaskData:
    """Scans and the labels of a table beside them, joined as `read_embedded` joins those of embeddings."""
    rows, source = _read_labels(labels)
    task = _task_of(rows, source, label, kind, covariates, positive)
    joined = _join(rows, source, records, "the list", "scan")
    data = task_data(task, joined.records, source.name)
    return replace(data, left_out=(*data.left_out, *joined.left_out), notes=joined.notes)


def _name(embeddings: TableLike) -> str:
    return "embeddings" if isinstance(embeddings, Embeddings) else str(embeddings)


@dataclass(frozen=True)
class _Source:
    """Where labels are from: what messages call it, and the folder that its paths are relative to."""

    name: str
    folder: Path


def _read_labels(labels: Any) -> tuple[list[dict[str, str]], _Source]:
    """The rows of a table of labels as text, "" where there is nothing, with patient_id and scan_id."""
    if is_frame(labels):
        rows, source = rows_of(labels), _Source("labels", Path())
    else:
        path = expanded(labels)
        rows, source = read_rows(path), _Source(str(path), path.parent)
    if rows.empty:
        raise TaskError(f"{source.name}: the table of labels has no rows")
    ids = with_ids(rows, source.name)
    for name in ("patient_id", "scan_id"):
        ids[name] = ids[name].mask(ids[name].map(is_missing), "")
    return ids.to_dict("records"), source


def _task_of(
    rows: Sequence[Mapping[str, str]],
    source: _Source,
    label: str,
    kind: Kind | None,
    covariates: Sequence[str],
    positive: str,
) -> Task:
    if label not in rows[0]:
        wrong = f"there is no column {label!r}" if label else "which column is to be predicted? Say --label COLUMN"
        raise TaskError(f"{source.name}: {wrong}; it has {', '.join(rows[0])}")
    return make_task(label, kind or kind_of([row[label] for row in rows], label), covariates, positive)


# --- The join -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Joined:
    """Records of scans with a row of labels as their columns, where each is in the table, and what has no partner."""

    records: list[ScanRecord]
    places: dict[int, int]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]


_Key: TypeAlias = tuple[str, ...]


def _join(
    rows: Sequence[dict[str, str]], source: _Source, records: Sequence[ScanRecord], name: str, thing: str = "embedding"
) -> _Joined:
    named = [(row["patient_id"], row["scan_id"]) for row in rows]
    several = [key for key, count in Counter(named).items() if count > 1 and key[0]]
    paths = [_row_path(row, source) for row in rows]
    notes: list[str] = []
    if any(patient for patient, _ in named) and any(r.patient_id for r in records):
        if not several:
            how, found = "patient and scan", _by_patient(named, records, notes)
        elif any(paths):
            how, found = "path", _by_path(paths, records)
        else:
            patient = " ".join(filter(None, several[0]))
            raise TaskError(
                f"{source.name}: {dict(Counter(named))[several[0]]} rows are of {patient}; say by a column scan_id or "
                "image_path which scan each is of"
            )
    elif any(paths) and any(record.name for record in records):
        how, found = "path", _by_path(paths, records)
    else:
        raise TaskError(
            f"{source.name} and {name} have nothing to be joined by: each needs patient_id, or each image_path; the "
            f"labels have {', '.join(rows[0])}"
        )
    used = set(found.values())
    words = [
        " ".join(filter(None, key)) or " ".join(path) or f"row {n + 2}"
        for n, (key, path) in enumerate(zip(named, paths, strict=True))
    ]
    rest = [words[n] for n in range(len(rows)) if n not in used]
    scans = [_scan(record) for n, record in enumerate(records) if n not in found]
    if not found:
        raise TaskError(
            f"{source.name} and {name}: nothing matches by {how}; the labels have {few(words)}, and the {thing}s "
            f"{few([_scan(record) for record in records])}"
        )
    said = f"joined by {how}: {len(used):,} of {len(rows):,} rows of {source.name} and {len(found):,} of "
    said += f"{len(records):,} {thing}s of {name}"
    said += f"; no {thing} of {len(rest):,} rows: {few(rest)}" if rest else ""
    said += f"; no row for {len(scans):,} {thing}s: {few(scans)}" if scans else ""
    joined = {n: _labelled(records[n], rows[row]) for n, row in sorted(found.items())}
    return _Joined(
        list(joined.values()),
        {id(record): n for n, record in joined.items()},
        (
            *(LeftOut(word, f"no {thing} in {name}") for word in rest),
            *(LeftOut(scan, f"no row in {source.name}") for scan in scans),
        ),
        (said, *notes),
    )


def _by_patient(named: Sequence[_Key], records: Sequence[ScanRecord], notes: list[str]) -> dict[int, int]:
    """For each embedding that has one, its row: by patient and scan, else by a patient's row that names no scan."""
    theirs = [(record.patient_id, record.scan_id) for record in records]
    _refuse_twice([key for key in theirs if all(key)], "the table of embeddings")

    def match(plain: Any) -> dict[int, int]:
        rows = {(plain(patient), scan): n for n, (patient, scan) in enumerate(named) if patient}
        if len(rows) < sum(bool(patient) for patient, _ in named):
            return {}  # two patients would be one
        keys = [((plain(patient), scan), (plain(patient), "")) for patient, scan in theirs]
        hits = {n: rows.get(own, rows.get(whole)) for n, (own, whole) in enumerate(keys) if own[0]}
        return {n: row for n, row in hits.items() if row is not None}

    found = match(str)
    if not found and (found := match(lambda patient: patient.removeprefix("sub-"))):
        notes.append("patients were matched without the prefix 'sub-', which one of the tables has")
    return found


def _by_path(paths: Sequence[_Key], records: Sequence[ScanRecord]) -> dict[int, int]:
    theirs = [_paths(record) for record in records]
    _refuse_twice([key for key in paths if key], "the table of labels")
    _refuse_twice([key for key in theirs if key], "the table of embeddings")
    rows = {path: n for n, path in enumerate(paths) if path}
    return {n: rows[path] for n, path in enumerate(theirs) if path in rows}


def _refuse_twice(keys: Sequence[_Key], where: str) -> None:
    twice = [" ".join(key) for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise TaskError(f"{where} has {few(twice)} twice; remove one of them")


def _row_path(row: Mapping[str, str], source: _Source) -> _Key:
    """The paths of a row's images; () where it names none."""
    if row.get("image_path") or any(is_channel_column(name) and value for name, value in row.items()):
        return _paths(ScanRecord.from_columns(row, source.folder))
    return ()


def _paths(record: ScanRecord) -> _Key:
    if not record.name:
        return ()
    return tuple(sorted(os.path.abspath(str(item)) for item in record.images.values()))  # noqa: PTH100 - keeps no ".."


def _identity(record: ScanRecord) -> _Key:
    return (record.patient_id, record.scan_id, *_paths(record))


def _scan(record: ScanRecord) -> str:
    return " ".join(filter(None, (record.patient_id, record.scan_id))) or record.name or "an image in memory"


def _labelled(record: ScanRecord, row: Mapping[str, str]) -> ScanRecord:
    """A scan with the columns of its row of labels."""
    own = {
        name: value for name, value in row.items() if name not in ("image_path", "mask_path", "patient_id", "scan_id")
    }
    patient, scan = record.patient_id or row["patient_id"], record.scan_id or row["scan_id"]
    return ScanRecord(record.image, record.mask, patient, scan, record.extra | own)
