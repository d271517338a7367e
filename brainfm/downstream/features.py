"""What a linear model is given: embeddings, kept on disk, or covariates without an image."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from brainfm import table
from brainfm.downstream.covariates import encoded
from brainfm.downstream.task import TaskData
from brainfm.embed import embed, origin_of
from brainfm.errors import TaskError
from brainfm.files import file_state, write_json
from brainfm.manifest import ScanRecord
from brainfm.models.encoder import Encoder
from brainfm.scan.read import read_image
from brainfm.table import Embeddings

_STATE = "file_state"  # the column by which a scan is found again


class Features(NamedTuple):
    """Embeddings [n, num_features] of n scans, NaN where a scan cannot be read, and by its number why not."""

    vectors: NDArray[np.float32]
    failed: dict[int, str]


def read_features(
    records: Sequence[ScanRecord],
    model: Encoder,
    folder: str | os.PathLike[str],
    name: str,
    *,
    device: str = "auto",
    batch_size: int = 1,
    report: str | os.PathLike[str] | None = None,
) -> Features:
    """Embeddings of scans: those that are in a folder from before, and the others computed and added.

    Args:
        records: The scans.
        model: The encoder.
        folder: Where one table a model is kept.
        name: Of the model, for the table's name.
        device: See `brainfm.embed`.
        batch_size: See `brainfm.embed`.
        report: See `brainfm.embed`; of the scans that are not there from before, where there are any.

    Returns:
        The embeddings, in the order of the scans.

    Raises:
        BrainfmError: What is in the folder was made by other weights, another contract or dtype, or is damaged.
    """
    plain, origin = re.sub(r"[^\w.-]+", "-", name)[-60:], origin_of(model)
    path = Path(folder) / f"{plain}.{origin.digest[:12]}.npz"
    nothing = Embeddings(np.empty((0, model.num_features), np.float32), [], origin=origin)
    known = table.read(path) if path.is_file() else nothing
    table.check_same_origin(known, nothing)  # whatever its name says
    vectors = _by_state(known)
    reasons: dict[str, str] = {}
    todo = [record for record in records if name_of(record) not in vectors]
    if todo:
        part = path.with_name(f"new.{path.name}")
        new = embed(todo, model, output=part, device=device, batch_size=batch_size, report=report)
        reasons = {name_of(record): reason for record, reason in new.errors}
        rows = [replace(record, extra={_STATE: name_of(record)}) for record in new.records]
        new = replace(new, records=rows, errors=[])
        if rows:
            table.join([known, new] if len(known) else [new]).save(path)
        vectors |= _by_state(new)
        part.unlink(missing_ok=True)
    missing = np.full(model.num_features, np.nan, dtype=np.float32)
    names = [name_of(record) for record in records]
    failed = {n: reasons[name] for n, name in enumerate(names) if name not in vectors}
    return Features(np.stack([vectors.get(name, missing) for name in names]), failed)


def _by_state(rows: Embeddings) -> dict[str, NDArray[np.float32]]:
    """The vectors of a table that `read_features` keeps, by the state of their scans' files."""
    return {record.extra[_STATE]: vector for record, vector in zip(rows.records, rows.vectors, strict=True)}


def name_of(record: ScanRecord) -> str:
    """A scan as it is now: paths, sizes and times of its files."""
    files = [*record.images.items(), ("", record.mask)]
    named = [(channel, Path(str(item))) for channel, item in files if item is not None]
    return " ".join(channel + (":".join(map(str, file_state(p))) if p.exists() else str(p)) for channel, p in named)


def head_sizes(data: TaskData, path: Path) -> list[float | None]:
    """The volume of each scan's brain mask in ml, kept in a file; None where there is no mask, or it cannot be read."""
    known: dict[str, float | None] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    names = [name_of(record) for record in data.records]
    for name, record in zip(names, data.records, strict=True):
        if name not in known:
            known[name] = _volume(record)
    write_json(path, known, indent=None)
    return [known[name] for name in names]


def _volume(record: ScanRecord) -> float | None:
    given = record.brain_mask
    if given is None:
        return None
    try:
        mask = read_image(given, "mask")
        return float(np.count_nonzero(mask.array) * abs(np.linalg.det(mask.affine[:3, :3])) / 1000)
    except Exception:  # a scan that cannot be read has no size
        return None


def table_of(data: TaskData, sizes: Sequence[float | None], train: Sequence[int]) -> NDArray[np.float64]:
    """The task's covariates and head sizes as numbers [n, d]: words one-hot; what is missing is the mean of `train`.

    Raises:
        TaskError: No covariate has a value in train; or as of `brainfm.downstream.covariates.encoded`.
    """
    columns: list[NDArray[np.float64]] = []
    for name in data.task.covariates:
        texts = [record.extra.get(name, "") for record in data.records]
        columns += encoded(name, texts, range(len(texts)), categorical=name in data.task.categorical)
    columns.append(np.array([np.nan if size is None else size for size in sizes]))
    known = [column for column in columns if np.isfinite(column[list(train)]).any()]
    if not known:
        raise TaskError(f"{data.task.name}: its covariates {', '.join(data.task.covariates)} are empty")
    filled = [np.where(np.isfinite(column), column, np.nanmean(column[list(train)])) for column in known]
    return np.stack(filled, axis=1)
