"""The table of embeddings: a row a scan, stamped with what made it, as CSV, Parquet or NumPy arrays.

A table of other origin looks the same and means something else. So every file says of itself which model, weights,
contract and versions made it (`Origin`): in Parquet's metadata, in an array of the .npz, and beside a .csv in a .json.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainfm.errors import BrainfmError, MissingExtraError, ScanError
from brainfm.files import atomic_path, one_line, write_json
from brainfm.manifest import ScanRecord
from brainfm.paths import printable
from brainfm.schema import Checked
from brainfm.system import expanded

__all__ = ["Embeddings", "Origin", "join", "read"]

FORMATS = (".csv", ".parquet", ".npz")
_KEY = "brainfm_origin"  # in Parquet's metadata and in an .npz
_MEANING = ("weights", "contract", "readout", "dtype")
_ROWS_AT_ONCE = 16_384  # of a Parquet file: its columns are a copy of the rows
_OWN = {"embeddings", "error", "file", "allow_pickle", _KEY}


@dataclass(frozen=True)
class Origin(Checked):
    """What made a table.

    Attributes:
        model: Its name, `architecture.tag`, or the class of one that has none.
        weights: The weights' digest: sha256 of their names and numbers.
        contract: The input contract, as plain data.
        readout: How features became the vectors, as plain data.
        dtype: What was computed in.
        brainfm: Its version.
        torch: Its version.
        scans: How many were asked for.
        failed: How many of them failed.
    """

    model: str
    weights: str
    contract: dict[str, Any] | None
    readout: dict[str, Any]
    dtype: str
    brainfm: str = ""
    torch: str = ""
    scans: int = 0
    failed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("contract", "readout"):  # equal to what a file gives back
            object.__setattr__(self, name, json.loads(json.dumps(getattr(self, name))))

    @property
    def digest(self) -> str:
        """One number for what the vectors mean: of weights, contract, readout and dtype."""
        return hashlib.sha256(_comparable([getattr(self, name) for name in _MEANING]).encode()).hexdigest()

    def differences(self, other: Origin) -> list[str]:
        """What makes the vectors of two tables two things: "weights", "contract", "readout" or "dtype"."""
        return [name for name in _MEANING if _comparable(getattr(self, name)) != _comparable(getattr(other, name))]


def _comparable(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


@dataclass(frozen=True, eq=False)
class Embeddings:
    """A table of embeddings, a row a scan; NumPy and scikit-learn take it as its vectors.

    Attributes:
        vectors: [scans, width] float32, in the order of the scans.
        records: The scans of the rows.
        errors: The scans that failed, and why.
        origin: What made the table; None where nobody said.

    Example:
        >>> import brainfm, numpy
        >>> table = brainfm.embed([("normalized.nii.gz", "mask.nii.gz")], "test_resnet_3d")
        >>> len(table), numpy.asarray(table).shape, table.origin.model
        (1, (1, 128), 'test_resnet_3d.phantoms')
    """

    vectors: NDArray[np.float32]
    records: list[ScanRecord]
    errors: list[tuple[ScanRecord, str]] = field(default_factory=list)
    origin: Origin | None = None

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        model = f" of {self.origin.model}" if self.origin else ""
        return f"Embeddings({len(self)} scans, {self.vectors.shape[1]} numbers each{model}, {len(self.errors)} failed)"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.vectors, dtype=dtype) if copy else np.asarray(self.vectors, dtype=dtype)

    def columns(self) -> dict[str, list[str]]:
        """The text columns: image_path (or a path a channel), mask_path, patient_id, scan_id and the manifest's own."""
        return text_columns(self.records)

    def to_pandas(self) -> Any:
        """The table as a pandas.DataFrame: the text columns, then e0, e1, … in float32; its `attrs` hold the origin.

        Raises:
            MissingExtraError: pandas is not installed.
            ScanError: A column of the manifest has a name of the table's own.
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise MissingExtraError("pandas", "eval") from error
        check_columns(self.records)
        texts = pandas.DataFrame(self.columns(), index=range(len(self)), dtype=object)
        numbers = pandas.DataFrame(self.vectors, columns=[f"e{n}" for n in range(self.vectors.shape[1])])
        frame = pandas.concat([texts, numbers], axis=1)
        frame.attrs = {_KEY: self.origin.to_dict()} if self.origin else {}
        return frame

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table, atomically: .csv, .parquet (needs the extra [eval]) or .npz.

        CSV and Parquet have the text columns, then e0, e1, …; the .npz holds `embeddings` and an array a text column.
        """
        path = Path(path)
        check_output(path, self.records)
        origin = json.dumps(self.origin.to_dict()) if self.origin else ""
        with atomic_path(path) as temporary:
            if path.suffix == ".npz":
                texts = self.columns()
                arrays: dict[str, Any] = {name: np.array(values, dtype=np.str_) for name, values in texts.items()}
                if origin:
                    arrays[_KEY] = np.array(origin)
                with temporary.open("wb") as file:
                    np.savez(file, **arrays)
                self._add_vectors(temporary)
            elif path.suffix == ".parquet":
                self._write_parquet(self.columns(), origin, temporary)
            else:
                with temporary.open("w", newline="", encoding="utf-8") as file:
                    writer = csv.writer(file)
                    names = list(dict.fromkeys(name for record in self.records for name in record.columns()))
                    writer.writerow([*names, *(f"e{n}" for n in range(self.vectors.shape[1]))])
                    vectors = (vector for part in self._parts() for vector in self.vectors[part])
                    for record, vector in zip(self.records, vectors, strict=True):
                        row = record.columns()
                        writer.writerow([*(row.get(name, "") for name in names), *(f"{v:.9g}" for v in vector)])
        if path.suffix == ".csv":
            if self.origin:
                write_json(origin_path(path), self.origin.to_dict())
            else:  # one that is there is another table's
                origin_path(path).unlink(missing_ok=True)

    def _parts(self) -> list[slice]:
        """The rows in parts that are written one after the other: vectors may be read as they are asked for."""
        return [slice(start, start + _ROWS_AT_ONCE) for start in range(0, len(self), _ROWS_AT_ONCE)]

    def _add_vectors(self, path: Path) -> None:
        """Add the vectors to an .npz, part by part, as `embeddings`."""
        header = {"descr": "<f4", "fortran_order": False, "shape": self.vectors.shape}
        with zipfile.ZipFile(path, "a") as archive, archive.open("embeddings.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for part in self._parts():
                file.write(np.ascontiguousarray(self.vectors[part], dtype="<f4").tobytes())

    def _write_parquet(self, texts: dict[str, list[str]], origin: str, path: Path) -> None:
        pyarrow, parquet = _pyarrow()
        numbers = [f"e{n}" for n in range(self.vectors.shape[1])]
        fields = [(name, pyarrow.string()) for name in texts] + [(name, pyarrow.float32()) for name in numbers]
        schema = pyarrow.schema(fields, metadata={_KEY: origin} if origin else None)
        with parquet.ParquetWriter(path, schema) as writer:
            for part in self._parts() or [slice(0)]:
                columns = {name: values[part] for name, values in texts.items()}
                columns |= dict(zip(numbers, np.ascontiguousarray(self.vectors[part].T), strict=True))
                writer.write_table(pyarrow.table(columns, schema))


def read(path: str | os.PathLike[str]) -> Embeddings:
    """The table that `Embeddings.save` wrote, with its origin, but without the scans that failed.

    Args:
        path: The file: .csv, .parquet or .npz.

    Returns:
        The table, whose vectors are [scans, width].

    Raises:
        BrainfmError: There is no such file, or it is no table of embeddings.
        MissingExtraError: It is Parquet, and pyarrow is not installed.

    Example:
        >>> table = brainfm.table.read("embeddings.parquet")
        >>> table.origin.model, table.vectors.shape
        ('simclr_resnet18_3d.kaczmarek2025', (24, 512))
    """
    path = expanded(path)
    if path.suffix not in FORMATS:
        raise BrainfmError(f"{path}: a table is read from {', '.join(FORMATS)}")
    if not path.is_file():
        raise BrainfmError(f"{path}: no such table")
    try:
        texts, vectors, origin = {".npz": _read_npz, ".parquet": _read_parquet, ".csv": _read_csv}[path.suffix](path)
        made_by = Origin.from_dict(json.loads(origin)) if origin else None
    except BrainfmError:
        raise
    except Exception as error:  # each reader has its own ways to say that a file is damaged
        raise BrainfmError(f"{path}: not a table of embeddings, or a damaged one ({one_line(error)})") from error
    rows = [dict(zip(texts, values, strict=True)) for values in zip(*texts.values(), strict=True)]
    records = [ScanRecord.from_columns(row) for row in rows] or [ScanRecord("") for _ in vectors]
    if len(records) != len(vectors):
        raise BrainfmError(f"{path}: {len(records)} rows of text for {len(vectors)} vectors")
    return Embeddings(vectors, records, origin=made_by)


def join(tables: Sequence[Embeddings]) -> Embeddings:
    """Tables of one origin, one below the other.

    Raises:
        BrainfmError: They were made by different weights, contracts, readouts or dtypes, or one does not say.
        ValueError: There is no table.
    """
    if not tables:
        raise ValueError("there is no table to join")
    for other in tables[1:]:
        check_same_origin(tables[0], other)
    origins = [table.origin for table in tables if table.origin is not None]
    joined = None
    if origins:
        joined = replace(
            origins[0],
            brainfm=", ".join(dict.fromkeys(origin.brainfm for origin in origins)),
            torch=", ".join(dict.fromkeys(origin.torch for origin in origins)),
            scans=sum(origin.scans for origin in origins),
            failed=sum(origin.failed for origin in origins),
        )
    return Embeddings(
        np.concatenate([table.vectors for table in tables]),
        [record for table in tables for record in table.records],
        [error for table in tables for error in table.errors],
        joined,
    )


def check_same_origin(first: Embeddings, second: Embeddings) -> None:
    """Raise BrainfmError where the vectors of two tables do not mean the same."""
    if first.origin is None or second.origin is None:
        raise BrainfmError(
            "one of the tables does not say what made it; tables of unknown origin are not joined: embed the scans "
            "again, all with one model"
        )
    if different := first.origin.differences(second.origin):
        models = f"{first.origin.model} and {second.origin.model}"
        raise BrainfmError(
            f"the tables were made by {models}, and differ in {', '.join(different)}: their vectors do not mean the "
            "same and are not joined; embed all scans with one model"
        )


def origin_path(output: Path) -> Path:
    """Where the origin of a .csv is kept: `out.json` beside `out.csv`."""
    return output.with_suffix(".json")


def errors_path(output: Path) -> Path:
    """Where the failed scans of a table are listed: `out.errors.csv` beside `out.csv`."""
    return output.with_name(output.stem + ".errors.csv")


def files_of(output: Path) -> list[Path]:
    """Every file that may be written with a table."""
    return [output, errors_path(output), *([origin_path(output)] if output.suffix == ".csv" else [])]


def check_output(path: Path, records: Sequence[ScanRecord] = ()) -> None:
    """Raise ScanError for a table that could not be written, before any work is done for it."""
    if path.is_dir():
        raise ScanError(f"{path}: a folder; name the table in it, or give --shard i/n for a folder of parts")
    if path.suffix not in FORMATS:
        raise ScanError(f"{path}: a table is written as {', '.join(FORMATS)}, by the ending of its name")
    if path.suffix == ".parquet":
        _pyarrow()
    if path.suffix == ".csv" and origin_path(path).exists() and not _is_origin(origin_path(path)):
        raise ScanError(
            f"{origin_path(path)} is something else, and the origin of {path.name} would be written there; name the "
            "table otherwise, or move that file"
        )
    check_columns(records)


def check_folder(path: Path, records: Sequence[ScanRecord] = ()) -> None:
    """Raise ScanError for a folder of parts that could not be written, before any work is done for it."""
    if path.suffix in FORMATS or path.is_file():
        raise ScanError(f"{path}: a shard's rows go to a folder, from which 'brainfm merge' makes the table; name one")
    check_columns(records)


def check_columns(records: Sequence[ScanRecord]) -> None:
    """Raise ScanError for a manifest's column that has a name of the table's own."""
    names = {name for record in records for name in record.extra}
    clash = sorted(name for name in names if name in _OWN or re.fullmatch(r"e\d+", name))
    if clash:
        raise ScanError(f"the manifest's column {', '.join(clash)} has a name of the table's own; rename it")


def write(table: Embeddings, path: Path) -> None:
    """Write the table and the list of failed scans; neither is left over from an earlier run."""
    if len(table):
        table.save(path)
    else:
        path.unlink(missing_ok=True)
        if path.suffix == ".csv":
            origin_path(path).unlink(missing_ok=True)
    write_errors(table.errors, path)


def write_errors(errors: Sequence[tuple[ScanRecord, str]], path: Path) -> None:
    """Write the list of failed scans of the table at a path; without any, none is left there."""
    listed = errors_path(path)
    if not errors:
        listed.unlink(missing_ok=True)
        return
    texts = text_columns([record for record, _ in errors])
    with atomic_path(listed) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*texts, "error"])
        writer.writerows(
            [*row, printable(message)] for *row, message in zip(*texts.values(), [e for _, e in errors], strict=True)
        )


def text_columns(records: Sequence[ScanRecord]) -> dict[str, list[str]]:
    """Every column of the records' rows, as text."""
    columns: dict[str, list[str]] = {}
    for n, record in enumerate(records):  # and not all of them as rows first: they may be many
        row = record.columns()
        for name in [name for name in row if name not in columns]:
            columns[name] = []
        for name, values in columns.items():
            values += [""] * (n - len(values)) + [row.get(name, "")]
    return columns


def _read_npz(path: Path) -> tuple[dict[str, list[str]], NDArray[np.float32], str]:
    with np.load(path, allow_pickle=False) as arrays:
        texts = {name: arrays[name].tolist() for name in arrays.files if name not in ("embeddings", _KEY)}
        return texts, arrays["embeddings"].astype(np.float32), str(arrays[_KEY]) if _KEY in arrays.files else ""


def _read_parquet(path: Path) -> tuple[dict[str, list[str]], NDArray[np.float32], str]:
    _, parquet = _pyarrow()
    columns = parquet.read_table(path)
    numbers = _numbers(columns.column_names)
    texts = {name: columns[name].to_pylist() for name in columns.column_names if name not in numbers}
    vectors = np.stack([columns[name].to_numpy() for name in numbers], axis=1).astype(np.float32)
    return texts, vectors, ((columns.schema.metadata or {}).get(_KEY.encode()) or b"").decode()


def _read_csv(path: Path) -> tuple[dict[str, list[str]], NDArray[np.float32], str]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        names, *rows = csv.reader(file)
    numbers = _numbers(names)
    texts = {name: [row[n] for row in rows] for n, name in enumerate(names) if name not in numbers}
    places = [names.index(name) for name in numbers]
    vectors = np.array([[row[n] for n in places] for row in rows], dtype=np.float32).reshape(len(rows), len(places))
    beside = origin_path(path)
    return texts, vectors, beside.read_text(encoding="utf-8") if _is_origin(beside) else ""


def _is_origin(path: Path) -> bool:
    """Whether a file is what `Embeddings.save` writes beside a .csv."""
    try:
        Origin.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False
    return True


def _numbers(names: Sequence[str]) -> list[str]:
    """The columns e0, e1, … in their order."""
    numbers = sorted((name for name in names if re.fullmatch(r"e\d+", name)), key=lambda name: int(name[1:]))
    if not numbers or numbers != [f"e{n}" for n in range(len(numbers))]:
        raise ValueError("it has no columns e0, e1, … without a gap")
    return numbers


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise MissingExtraError("pyarrow", "eval") from error
    return pyarrow, pyarrow.parquet
