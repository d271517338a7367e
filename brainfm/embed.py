"""Many scans → a table of embeddings: read ahead in threads, resumable, split over processes under torchrun."""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import logging
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from brainfm.errors import MissingExtraError, ScanError
from brainfm.factory import create_model
from brainfm.inference import DTypeName, available_cores, optimize, resolve_device, resolve_dtype
from brainfm.manifest import ScanRecord, ScansLike, list_scans
from brainfm.overlap import overlap_of_scans
from brainfm.transforms import InputTransform, create_transform
from brainfm.weights import atomic_path

logger = logging.getLogger("brainfm")

_FORMATS = (".csv", ".parquet", ".npz")
_MOST_SCANS = 16  # a batch; ours
_SHARE_OF_MEMORY = 0.8


@dataclass(frozen=True, eq=False)
class Embeddings:
    """A table of embeddings, a row a scan; NumPy and scikit-learn take it as its vectors.

    Attributes:
        vectors: [scans, width] float32, in the order of the scans.
        records: The scans of the rows.
        errors: The scans that failed, and why.
    """

    vectors: NDArray[np.float32]
    records: list[ScanRecord]
    errors: list[tuple[ScanRecord, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.records)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.vectors, dtype=dtype) if copy else np.asarray(self.vectors, dtype=dtype)

    def columns(self) -> dict[str, list[str]]:
        """The text columns: image_path, mask_path, patient_id, scan_id and the manifest's own."""
        return _text_columns(self.records)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table, atomically: .csv, .parquet (needs the extra [eval]) or .npz.

        CSV and Parquet have the text columns, then e0, e1, …; the .npz holds `embeddings` and an array a text column.
        """
        path = Path(path)
        check_output(path, self.records)
        texts = self.columns()
        with atomic_path(path) as temporary:
            if path.suffix == ".npz":
                arrays: dict[str, Any] = {name: np.array(values, dtype=np.str_) for name, values in texts.items()}
                with temporary.open("wb") as file:
                    np.savez(file, embeddings=self.vectors, **arrays)
            elif path.suffix == ".parquet":
                pyarrow, parquet = _pyarrow()
                numbers = {f"e{n}": np.ascontiguousarray(column) for n, column in enumerate(self.vectors.T)}
                parquet.write_table(pyarrow.table(texts | numbers), temporary)
            else:
                with temporary.open("w", newline="", encoding="utf-8") as file:
                    writer = csv.writer(file)
                    writer.writerow([*texts, *(f"e{n}" for n in range(self.vectors.shape[1]))])
                    for row, vector in zip(zip(*texts.values(), strict=True), self.vectors, strict=True):
                        writer.writerow([*row, *(f"{value:.9g}" for value in vector)])


def check_output(path: Path, records: Sequence[ScanRecord] = ()) -> None:
    """Raise ScanError for a table that could not be written, before any work is done for it."""
    if path.suffix not in _FORMATS:
        raise ScanError(f"{path}: a table is written as {', '.join(_FORMATS)}, by the ending of its name")
    if path.is_dir():
        raise ScanError(f"{path}: a folder; name the table in it")
    if path.suffix == ".parquet":
        _pyarrow()
    names = {name for record in records for name in record.extra}
    clash = sorted(name for name in names if re.fullmatch(r"e\d+|embeddings|error|file|allow_pickle", name))
    if clash:
        raise ScanError(f"the manifest's column {', '.join(clash)} has a name of the table's own; rename it")


def errors_path(output: Path) -> Path:
    """Where the failed scans of a table are listed: `out.errors.csv` beside `out.csv`."""
    return output.with_name(output.stem + ".errors.csv")


def embed(
    scans: ScansLike,
    model: nn.Module | str,
    *,
    batch_size: int | Literal["auto"] = "auto",
    device: str | torch.device = "auto",
    dtype: DTypeName | torch.dtype = "auto",
    num_workers: int = 2,
    output: str | os.PathLike[str] | None = None,
    on_error: Literal["skip", "raise"] = "skip",
    strict_qc: bool = False,
    progress: bool = False,
) -> Embeddings:
    """Embed every scan of a list, each prepared as the model's input contract says.

    With `output`, finished rows are kept in a journal beside it as they come, and the table is written at the end; a
    run that was interrupted goes on where it stopped when it is started again with the same model and dtype. Scans
    whose file changed in between are done again. Under torchrun each process takes its share, and rank 0 writes and
    returns all.

    Args:
        scans: A path (image, manifest CSV, TurboPrep or BIDS-derivatives folder), or a list of paths, images or
            (image, mask) pairs.
        model: An encoder of `create_model`, or the name of one with published weights.
        batch_size: Scans a forward pass; "auto" is 1 on a CPU, and on a GPU as many as its free memory holds, by what
            the first scan took, at most 16.
        device: "auto" (CUDA where there is one, else the CPU), or a torch device.
        dtype: See `brainfm.optimize`; "auto" is float32.
        num_workers: Threads that read and prepare scans ahead of the encoder; 0 reads in turn.
        output: Where to write the table: .csv, .parquet or .npz. Failed scans are listed in `<name>.errors.csv`.
        on_error: "skip" notes a bad scan and goes on, "raise" stops at it.
        strict_qc: Refuse scans that `brainfm prep` judged to have failed; without it, the column `qc` says so.
        progress: Show a progress bar.

    Returns:
        The table, in the order of the scans.

    Raises:
        ScanError: The list itself is wrong, or with on_error="raise" a scan.
        BrainfmError: The device cannot be used.
        ValueError: The model has a classifier, or an argument is out of range.

    Example:
        >>> table = brainfm.embed("turboprep_output/", "simclr_resnet18_3d", output="embeddings.csv")
        >>> table.vectors.shape
        (24, 512)
    """
    if on_error not in ("skip", "raise"):
        raise ValueError(f'on_error must be "skip" or "raise", not {on_error!r}')
    if num_workers < 0 or (batch_size != "auto" and batch_size < 1):
        raise ValueError(
            f'batch_size must be at least 1 or "auto", and num_workers at least 0, not {batch_size!r} and {num_workers}'
        )
    records = list_scans(scans)
    path = None if output is None else Path(output)
    if path is not None:
        check_output(path, records)
    encoder = create_model(model, pretrained=True) if isinstance(model, str) else model
    if getattr(encoder, "num_classes", 0):
        raise ValueError("this model ends in a classifier and gives logits; call model.reset_classifier(0) first")
    transform = create_transform(encoder)
    for overlap in overlap_of_scans(encoder, records):
        logger.warning("%s: an evaluation on it is one on training data", overlap)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    place = resolve_device(device)
    width = getattr(encoder, "num_features", 0)
    identity = fingerprint(encoder, dtype) if path is not None else ""
    fast = optimize(encoder, dtype).to(place)
    del encoder  # where a name was given, its weights are not kept twice

    mine = range(rank, len(records), world)
    failed = {n: reason for n in mine if (reason := _failed_qc(records[n]))} if strict_qc else {}
    if failed and on_error == "raise":
        raise ScanError(failed[min(failed)])
    journal = _Journal(path, rank, identity) if path is not None else None
    done: dict[int, NDArray[np.float32]] = {}
    if journal is not None:
        done = {n: vector for n in mine if n not in failed and (vector := journal.find(records[n])) is not None}
        if done:
            logger.info("%s: %d scans were done by an earlier run", path, len(done))
    todo = [n for n in mine if n not in done and n not in failed]
    most = batch_size if batch_size != "auto" else _MOST_SCANS if place.type == "cuda" else 1
    batches = _Batches(_prepared(records, todo, transform, num_workers, num_workers + most), batch_size, place)
    try:
        with _own_cores(place), _progress_bar(len(mine), len(mine) - len(todo), progress and rank == 0) as bar:
            for n, outcome in _embedded(fast, batches, place):
                if isinstance(outcome, ScanError):
                    if on_error == "raise":
                        raise outcome
                    failed[n] = str(outcome)
                else:
                    done[n] = outcome
                    if journal is not None:
                        journal.add(records[n], outcome)
                bar.update()
    finally:
        if journal is not None:
            journal.close()
    if world > 1:
        done, failed = _gathered(done, failed, world)
    table = _table(records, done, failed, width)
    if path is not None and journal is not None and rank == 0:
        _write(table, path)
        journal.remove()
    return table


def _failed_qc(record: ScanRecord) -> str:
    """Why a scan is refused where a failed preparation is; empty where it is not."""
    if record.extra.get("qc") not in ("fail", "unreadable"):
        return ""
    return (
        f"{record.image}: its preparation did not pass quality control (prep.json beside it: {record.extra['qc']}); "
        "look at its qc.png, prepare it in another way, or embed without --strict-qc"
    )


def _embedded(
    model: nn.Module, batches: _Batches, device: torch.device
) -> Iterator[tuple[int, NDArray[np.float32] | ScanError]]:
    """A vector, or the reason why there is none, for each scan of the batches."""
    for numbers, outcomes in batches:
        tensors = [outcome for outcome in outcomes if isinstance(outcome, Tensor)]
        vectors: list[NDArray[np.float32]] = []
        if tensors:
            joined = torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]  # one is not copied
            if device.type == "cuda":
                joined = joined.pin_memory()
            with torch.inference_mode():
                vectors = list(model(joined.to(device, non_blocking=True)).float().cpu().numpy())
        remaining = iter(vectors)
        for n, outcome in zip(numbers, outcomes, strict=True):
            if isinstance(outcome, ScanError):
                yield n, outcome
                continue
            vector = next(remaining)
            finite = np.isfinite(vector).all()
            yield n, vector if finite else ScanError("the embedding is not finite: an overflow; use dtype float32")


def _table(
    records: list[ScanRecord], done: dict[int, NDArray[np.float32]], failed: dict[int, str], width: int
) -> Embeddings:
    order = sorted(done)
    vectors = np.stack([done[n] for n in order]) if order else np.empty((0, width), dtype=np.float32)
    return Embeddings(vectors, [records[n] for n in order], [(records[n], failed[n]) for n in sorted(failed)])


def _write(table: Embeddings, path: Path) -> None:
    """Write the table and the list of failed scans; neither is left over from an earlier run."""
    if len(table):
        table.save(path)
    else:
        path.unlink(missing_ok=True)
    listed = errors_path(path)
    if not table.errors:
        listed.unlink(missing_ok=True)
        return
    texts = _text_columns([record for record, _ in table.errors])
    with atomic_path(listed) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*texts, "error"])
        writer.writerows(
            [*row, message] for *row, message in zip(*texts.values(), [e for _, e in table.errors], strict=True)
        )


def _text_columns(records: Sequence[ScanRecord]) -> dict[str, list[str]]:
    rows = [record.columns() for record in records]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name, "") for row in rows] for name in names}


# --- Reading ahead --------------------------------------------------------------------------------


def _prepared(
    records: list[ScanRecord], todo: list[int], transform: InputTransform, num_workers: int, most_ahead: int
) -> Iterator[tuple[int, Tensor | ScanError]]:
    """Tensors in order, prepared by threads (inflating and NumPy release the interpreter's lock) a little ahead."""

    def prepare(n: int) -> Tensor | ScanError:
        try:
            return transform(records[n].image, records[n].mask)
        except ScanError as error:
            return error
        except Exception as error:  # one bad scan never stops a batch
            name = records[n].columns()["image_path"] or f"scan {n}"
            return ScanError(f"{name}: {type(error).__name__}: {error}")

    if num_workers == 0:
        yield from ((n, prepare(n)) for n in todo)
        return
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="brainfm-scan")
    try:
        ahead: deque[tuple[int, Future[Tensor | ScanError]]] = deque()
        for n in todo:
            ahead.append((n, pool.submit(prepare, n)))
            if len(ahead) > most_ahead:
                first, future = ahead.popleft()
                yield first, future.result()
        while ahead:
            first, future = ahead.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class _Batches:
    """Scans in batches of a size, or of one that grows from 1 to what a GPU's memory holds."""

    def __init__(
        self, items: Iterator[tuple[int, Tensor | ScanError]], size: int | Literal["auto"], device: torch.device
    ) -> None:
        self._items, self._device = items, device
        self._size = 1 if size == "auto" else size
        self._grows = size == "auto" and device.type == "cuda"

    def __iter__(self) -> Iterator[tuple[list[int], list[Tensor | ScanError]]]:
        numbers: list[int] = []
        outcomes: list[Tensor | ScanError] = []
        for n, outcome in self._items:
            numbers.append(n)
            outcomes.append(outcome)
            if sum(isinstance(o, Tensor) for o in outcomes) == self._size:
                yield numbers, outcomes
                numbers, outcomes = [], []
                if self._grows:
                    self._size, self._grows = self._affordable(), False
        if numbers:
            yield numbers, outcomes

    def _affordable(self) -> int:
        """Scans that the free memory of the GPU holds, by the most that the first one took."""
        taken = torch.cuda.max_memory_allocated(self._device) - torch.cuda.memory_allocated(self._device)
        cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        free = torch.cuda.mem_get_info(self._device)[0] + cached
        return max(1, min(_MOST_SCANS, int(_SHARE_OF_MEMORY * free / max(taken, 1))))


@contextmanager
def _own_cores(device: torch.device) -> Iterator[None]:
    """On a CPU that processes of torchrun share, compute with this one's share of its cores."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    before = torch.get_num_threads()
    if device.type == "cpu" and local > 1:
        torch.set_num_threads(max(1, available_cores() // local))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _progress_bar(total: int, initial: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=initial, unit="scan", desc="embedding", disable=not shown)


def _gathered(
    done: dict[int, NDArray[np.float32]], failed: dict[int, str], world: int
) -> tuple[dict[int, NDArray[np.float32]], dict[int, str]]:
    """What all processes have, on each of them."""
    import torch.distributed as dist

    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo")
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, (done, failed))
    if ours:
        dist.destroy_process_group()
    return {n: v for part, _ in parts for n, v in part.items()}, {n: m for _, part in parts for n, m in part.items()}


# --- The journal ----------------------------------------------------------------------------------


def fingerprint(model: nn.Module, dtype: DTypeName | torch.dtype) -> str:
    """Which features these are: architecture, every weight, input contract and dtype."""
    digest = hashlib.sha256(
        f"{type(model).__name__} {resolve_dtype(dtype)} {getattr(model, 'global_pool', '')}".encode()
    )
    spec = getattr(getattr(model, "pretrained_cfg", None), "input_spec", None)
    digest.update(json.dumps(spec.to_dict() if spec else None, sort_keys=True).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Journal:
    """Finished rows of an interrupted run: one JSON line a scan, added and flushed as it is done."""

    def __init__(self, output: Path, rank: int, fingerprint: str) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        self._output = output
        self._path = output.with_name(f".{output.name}.rank{rank}.journal")
        self._fingerprint = fingerprint
        self._rows: dict[str, list[float]] = {}
        for path in output.parent.glob(
            f".{glob.escape(output.name)}.rank*.journal"
        ):  # whoever did it, with however many processes
            self._read(path)
        self._file = self._path.open("a", encoding="utf-8")

    def _read(self, path: Path) -> None:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the line that was being written when the run was killed
            if isinstance(row, dict) and row.get("model") == self._fingerprint:
                self._rows[row["scan"]] = row["vector"]

    def find(self, record: ScanRecord) -> NDArray[np.float32] | None:
        identity = _identity(record)
        vector = None if identity is None else self._rows.get(identity)
        return None if vector is None else np.array(vector, dtype=np.float32)

    def add(self, record: ScanRecord, vector: NDArray[np.float32]) -> None:
        identity = _identity(record)
        if identity is None:
            return
        row = {"model": self._fingerprint, "scan": identity, "vector": vector.astype(float).tolist()}
        self._file.write("\n" + json.dumps(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()
        if self._path.stat().st_size == 0:
            self._path.unlink()

    def remove(self) -> None:
        for path in self._output.parent.glob(f".{glob.escape(self._output.name)}.rank*.journal"):
            path.unlink(missing_ok=True)


def _identity(record: ScanRecord) -> str | None:
    """A scan's files with their sizes and times: a file that changed is another scan. Images in memory have none."""
    parts: list[list[Any]] = []
    for item in (record.image, record.mask):
        if item is None:
            parts.append([])
        elif isinstance(item, str | os.PathLike) and Path(item).exists():
            stat = Path(item).stat()
            parts.append([str(Path(item).resolve()), stat.st_size, stat.st_mtime_ns])
        else:
            return None
    return json.dumps(parts)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise MissingExtraError("pyarrow", "eval") from error
    return pyarrow, pyarrow.parquet
