"""Many scans → a table of embeddings: read ahead in threads, resumable, split over processes under torchrun."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from brainfm.dense import DenseDType, dense_affine, dense_paths, write_dense
from brainfm.errors import ScanError
from brainfm.factory import create_model
from brainfm.files import progress_bar, write_json
from brainfm.inference import DTypeName, available_cores, optimize, resolve_device, resolve_dtype
from brainfm.journal import Journal
from brainfm.manifest import ScanRecord, ScansLike, list_scans
from brainfm.overlap import overlap_of_scans
from brainfm.readout import Reader
from brainfm.table import Embeddings, Origin, check_output, write
from brainfm.transforms import InputTransform, create_transform
from brainfm.weights import weights_digest

logger = logging.getLogger("brainfm")

_MOST_SCANS = 16  # a batch; ours
_FRACTION_OF_MEMORY = 0.8


@dataclass(frozen=True)
class _Options:
    """What `embed` is told beside scans, models and places; see there."""

    batch_size: int | Literal["auto"]
    device: str | torch.device
    dtype: DTypeName | torch.dtype
    num_workers: int
    dense_dtype: DenseDType
    on_error: Literal["skip", "raise"]
    strict_qc: bool
    progress: bool

    def __post_init__(self) -> None:
        if self.on_error not in ("skip", "raise"):
            raise ValueError(f'on_error must be "skip" or "raise", not {self.on_error!r}')
        if self.dense_dtype not in ("float16", "float32"):
            raise ValueError(f'dense_dtype must be "float16" or "float32", not {self.dense_dtype!r}')
        if self.num_workers < 0 or (self.batch_size != "auto" and self.batch_size < 1):
            raise ValueError(
                'batch_size must be at least 1 or "auto", and num_workers at least 0, '
                f"not {self.batch_size!r} and {self.num_workers}"
            )


@overload
def embed(
    scans: ScansLike,
    model: nn.Module | str,
    *,
    batch_size: int | Literal["auto"] = ...,
    device: str | torch.device = ...,
    dtype: DTypeName | torch.dtype = ...,
    num_workers: int = ...,
    output: str | os.PathLike[str] | None = ...,
    dense: str | os.PathLike[str] | None = ...,
    dense_dtype: DenseDType = ...,
    report: str | os.PathLike[str] | None = ...,
    on_error: Literal["skip", "raise"] = ...,
    strict_qc: bool = ...,
    progress: bool = ...,
) -> Embeddings: ...


@overload
def embed(
    scans: ScansLike,
    model: list[Any],
    *,
    batch_size: int | Literal["auto"] = ...,
    device: str | torch.device = ...,
    dtype: DTypeName | torch.dtype = ...,
    num_workers: int = ...,
    output: str | os.PathLike[str] | None = ...,
    dense: str | os.PathLike[str] | None = ...,
    dense_dtype: DenseDType = ...,
    report: str | os.PathLike[str] | None = ...,
    on_error: Literal["skip", "raise"] = ...,
    strict_qc: bool = ...,
    progress: bool = ...,
) -> list[Embeddings]: ...


def embed(
    scans: ScansLike,
    model: nn.Module | str | list[Any],
    *,
    batch_size: int | Literal["auto"] = "auto",
    device: str | torch.device = "auto",
    dtype: DTypeName | torch.dtype = "auto",
    num_workers: int = 2,
    output: str | os.PathLike[str] | None = None,
    dense: str | os.PathLike[str] | None = None,
    dense_dtype: DenseDType = "float16",
    report: str | os.PathLike[str] | None = None,
    on_error: Literal["skip", "raise"] = "skip",
    strict_qc: bool = False,
    progress: bool = False,
) -> Embeddings | list[Embeddings]:
    """Embed every scan of a list, each prepared as the model's input contract says and read out as its readout says.

    With `output`, finished rows are kept in a journal beside it as they come, and the table is written at the end; a
    run that was interrupted goes on where it stopped when it is started again with the same model and dtype. Scans
    whose file changed in between are done again. Under torchrun each process takes its share, and rank 0 writes and
    returns all.

    Args:
        scans: A path (image, manifest CSV, TurboPrep or BIDS-derivatives folder), or a list of paths, images, scans of
            several channels {channel: image}, or (image, mask) pairs.
        model: An encoder of `create_model`, or the name of one with published weights; or several of them.
        batch_size: Scans a forward pass; "auto" is 1 on a CPU, and on a GPU as many as its free memory holds, by what
            the first scan took, at most 16. Scans whose tensors differ in shape are not put in one batch.
        device: "auto" (CUDA where there is one, else the CPU), or a torch device.
        dtype: See `brainfm.optimize`; "auto" is float32.
        num_workers: Threads that read and prepare scans ahead of the encoder; 0 reads in turn.
        output: Where to write the table: .csv, .parquet or .npz. Failed scans are listed in `<name>.errors.csv`. Of
            several models, each has its table: `<name>.<model>.csv`.
        dense: A folder for dense features: the last feature map of each scan as NIfTI [x, y, z, C], whose affine puts
            every cell where it looks. The table's column `dense_path` names the files.
        dense_dtype: Of the dense features; see `brainfm.dense.write_dense`.
        report: Where to write, as JSON, what was done: the table's origin, counts, seconds, and the scans that failed.
        on_error: "skip" notes a bad scan and goes on, "raise" stops at it.
        strict_qc: Refuse scans that `brainfm prep` judged to have failed; without it, the column `qc` says so.
        progress: Show a progress bar.

    Returns:
        The table, in the order of the scans; of several models a list of tables.

    Raises:
        ScanError: The list itself is wrong, or with on_error="raise" a scan.
        BrainfmError: The device cannot be used.
        ValueError: The model has a classifier, or an argument is out of range.

    Example:
        >>> table = brainfm.embed("turboprep_output/", "simclr_resnet18_3d", output="embeddings.csv")
        >>> table.vectors.shape
        (24, 512)
    """
    options = _Options(batch_size, device, dtype, num_workers, dense_dtype, on_error, strict_qc, progress)
    records = list_scans(scans)
    if isinstance(model, nn.Module | str):
        return _embed(records, model, options, _path(output), _path(dense), _path(report))
    names = [_file_name(one) for one in model]
    if len(set(names)) != len(names):
        raise ValueError(f"the models have the same name, {', '.join(names)}: embed them one by one")
    return [
        _embed(
            records,
            one,
            options,
            _path(output, name),
            None if dense is None else Path(dense) / name,
            _path(report, name),
        )
        for one, name in zip(model, names, strict=True)
    ]


def _path(path: str | os.PathLike[str] | None, model: str = "") -> Path | None:
    """A path, of several models with the model's name before its ending."""
    if path is None:
        return None
    path = Path(path).expanduser()
    return path.with_name(f"{path.stem}.{model}{path.suffix}") if model else path


def _file_name(model: nn.Module | str) -> str:
    cfg = getattr(model, "pretrained_cfg", None)
    name = model if isinstance(model, str) else getattr(cfg, "name", "") or type(model).__name__
    return "".join(letter if letter.isalnum() or letter in "_-." else "-" for letter in name)


def _embed(
    records: list[ScanRecord],
    model: nn.Module | str,
    options: _Options,
    output: Path | None,
    dense: Path | None,
    report: Path | None,
) -> Embeddings:
    """One model's table."""
    started = time.monotonic()
    maps = [] if dense is None else dense_paths(records, dense)
    if maps:
        records = [replace(r, extra=r.extra | {"dense_path": str(path)}) for r, path in zip(records, maps, strict=True)]
    if output is not None:
        check_output(output, records)
    encoder = create_model(model, pretrained=True) if isinstance(model, str) else model
    if getattr(encoder, "num_classes", 0):
        raise ValueError("this model ends in a classifier and gives logits; call model.reset_classifier(0) first")
    transform = create_transform(encoder)
    for overlap in overlap_of_scans(encoder, records):
        logger.warning("%s: an evaluation on it is one on training data", overlap)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    place = resolve_device(options.device)
    width = getattr(encoder, "num_features", 0)
    origin = origin_of(encoder, options.dtype)
    reader = Reader(optimize(encoder, options.dtype).to(place), dense=dense is not None)
    del encoder  # where a name was given, its weights are not kept twice

    mine = range(rank, len(records), world)
    failed = {n: reason for n in mine if (reason := _failed_qc(records[n]))} if options.strict_qc else {}
    if failed and options.on_error == "raise":
        raise ScanError(failed[min(failed)])
    journal = Journal(output, rank, origin.digest) if output else None
    done: dict[int, NDArray[np.float32]] = {}
    if journal is not None:
        left = [n for n in mine if n not in failed and (not maps or maps[n].is_file())]
        done = {n: vector for n in left if (vector := journal.find(records[n])) is not None}
        if done:
            logger.info("%s: %d scans were done by an earlier run", output, len(done))
    resumed = len(done)
    todo = [n for n in mine if n not in done and n not in failed]
    size, workers = options.batch_size, options.num_workers
    most = size if size != "auto" else _MOST_SCANS if place.type == "cuda" else 1
    batches = _Batches(_prepared(records, todo, transform, workers, workers + most), size, place)
    shown = options.progress and rank == 0
    bar = progress_bar(total=len(mine), unit="scan", doing="embedding", shown=shown, done=len(mine) - len(todo))
    try:
        with _own_cores(place), bar:
            for n, outcome in _embedded(reader, batches, place):
                if isinstance(outcome, ScanError):
                    if options.on_error == "raise":
                        raise outcome
                    failed[n] = str(outcome)
                else:
                    done[n] = outcome.vector
                    if outcome.cells is not None:
                        write_dense(outcome.cells, outcome.affine, maps[n], options.dense_dtype)
                    if journal is not None:
                        journal.add(records[n], outcome.vector)
                bar.update()
    finally:
        if journal is not None:
            journal.close()
    if world > 1:
        done, failed = _gathered(done, failed, world)
    origin = replace(origin, scans=len(records), failed=len(failed))
    table = _table(records, done, failed, width, origin)
    if rank == 0:
        if output is not None and journal is not None:
            write(table, output)
            journal.remove()
        if report is not None:
            write_json(report, _report(table, output, resumed, time.monotonic() - started))
    return table


def origin_of(model: nn.Module, dtype: DTypeName | torch.dtype = "auto") -> Origin:
    """What a table of this model says of itself; the digest is of every weight."""
    from brainfm import __version__

    cfg = getattr(model, "pretrained_cfg", None)
    spec, readout = getattr(cfg, "input_spec", None), getattr(cfg, "readout", None)
    said = readout.to_dict() if readout else {}
    if said.get("pool") != "brain":
        said["pool"] = getattr(model, "global_pool", None)
    return Origin(
        model=getattr(cfg, "name", "") or type(model).__name__,
        weights=weights_digest(model),
        contract=spec.to_dict() if spec else None,
        readout=said,
        dtype=str(resolve_dtype(dtype)).removeprefix("torch."),
        brainfm=__version__,
        torch=torch.__version__,
    )


def _report(table: Embeddings, output: Path | None, resumed: int, seconds: float) -> dict[str, Any]:
    assert table.origin is not None
    return {
        "origin": table.origin.to_dict(),
        "output": None if output is None else str(output),
        "scans": table.origin.scans,
        "embedded": len(table),
        "of_an_earlier_run": resumed,
        "failed": [{"scan": record.name, "error": reason} for record, reason in table.errors],
        "seconds": round(seconds, 3),
    }


def _failed_qc(record: ScanRecord) -> str:
    """Why a scan is refused where a failed preparation is; empty where it is not."""
    if record.extra.get("qc") not in ("fail", "unreadable"):
        return ""
    return (
        f"{record.name}: its preparation did not pass quality control (prep.json beside it: {record.extra['qc']}); "
        "look at its qc.png, prepare it in another way, or embed without --strict-qc"
    )


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A scan as its contract's tensor [C, D, H, W], with its brain mask and affine."""

    tensor: Tensor
    mask: NDArray[np.bool_] | None
    affine: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _Embedded:
    """A scan's vector, and where they were asked for its dense features [C, d, h, w] with their affine."""

    vector: NDArray[np.float32]
    cells: NDArray[np.float32] | None
    affine: NDArray[np.float64]


def _embedded(reader: Reader, batches: _Batches, device: torch.device) -> Iterator[tuple[int, _Embedded | ScanError]]:
    """What each scan of the batches becomes, or the reason why it does not."""
    for numbers, scans in batches:
        try:
            found: Sequence[_Embedded | ScanError] = _batch_embedded(reader, scans, device)
        except ScanError as error:  # of one of them: found out alone
            found = [_alone(reader, scan, device) for scan in scans] if len(scans) > 1 else [error]
        yield from zip(numbers, found, strict=True)


def _alone(reader: Reader, scan: _Prepared | ScanError, device: torch.device) -> _Embedded | ScanError:
    try:
        return _batch_embedded(reader, [scan], device)[0]
    except ScanError as error:
        return error


def _batch_embedded(
    reader: Reader, scans: Sequence[_Prepared | ScanError], device: torch.device
) -> list[_Embedded | ScanError]:
    prepared = [scan for scan in scans if isinstance(scan, _Prepared)]
    if not prepared:
        return [scan for scan in scans if isinstance(scan, ScanError)]
    tensors = [scan.tensor for scan in prepared]
    joined = torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]  # one is not copied
    if device.type == "cuda":
        joined = joined.pin_memory()
    features = reader(joined.to(device, non_blocking=True), [scan.mask for scan in prepared])
    vectors = features.vectors.cpu().numpy()
    maps = None if features.maps is None else features.maps.cpu().numpy()
    made: list[_Embedded | ScanError] = []
    for n, scan in enumerate(prepared):
        if not np.isfinite(vectors[n]).all():
            made.append(ScanError("the embedding is not finite: an overflow; use dtype float32"))
            continue
        affine = scan.affine if maps is None else dense_affine(scan.affine, reader.model.feature_info[-1])
        # A copy: a view would keep the whole batch alive, and with it memory of torch's.
        made.append(_Embedded(vectors[n].copy(), None if maps is None else maps[n], affine))
    remaining = iter(made)
    return [scan if isinstance(scan, ScanError) else next(remaining) for scan in scans]


def _table(
    records: list[ScanRecord], done: dict[int, NDArray[np.float32]], failed: dict[int, str], width: int, origin: Origin
) -> Embeddings:
    order = sorted(done)
    vectors = np.stack([done[n] for n in order]) if order else np.empty((0, width), dtype=np.float32)
    errors = [(records[n], failed[n]) for n in sorted(failed)]
    return Embeddings(vectors, [records[n] for n in order], errors, origin)


# --- Reading ahead --------------------------------------------------------------------------------


def _prepared(
    records: list[ScanRecord], todo: list[int], transform: InputTransform, num_workers: int, most_ahead: int
) -> Iterator[tuple[int, _Prepared | ScanError]]:
    """Tensors in order, prepared by threads (inflating and NumPy release the interpreter's lock) a little ahead."""

    def prepare(n: int) -> _Prepared | ScanError:
        try:
            volume = transform.volume(records[n].image, records[n].mask)
            return _Prepared(transform.tensor(volume), volume.mask, volume.affine)
        except ScanError as error:
            return error
        except Exception as error:  # one bad scan never stops a batch
            name = records[n].name or f"scan {n}"
            return ScanError(f"{name}: {type(error).__name__}: {error}")

    if num_workers == 0:
        yield from ((n, prepare(n)) for n in todo)
        return
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="brainfm-scan")
    try:
        ahead: deque[tuple[int, Future[_Prepared | ScanError]]] = deque()
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
    """Scans in batches of a size, or of one that grows from 1 to what a GPU's memory holds, all of one shape."""

    def __init__(
        self, items: Iterator[tuple[int, _Prepared | ScanError]], size: int | Literal["auto"], device: torch.device
    ) -> None:
        self._items, self._device = items, device
        self._size = 1 if size == "auto" else size
        self._grows = size == "auto" and device.type == "cuda"

    def __iter__(self) -> Iterator[tuple[list[int], list[_Prepared | ScanError]]]:
        numbers: list[int] = []
        scans: list[_Prepared | ScanError] = []
        shape: torch.Size | None = None
        for n, scan in self._items:
            if isinstance(scan, _Prepared):
                if shape is not None and scan.tensor.shape != shape:
                    yield numbers, scans
                    numbers, scans = [], []
                shape = scan.tensor.shape
            numbers.append(n)
            scans.append(scan)
            if sum(isinstance(one, _Prepared) for one in scans) == self._size:
                yield numbers, scans
                numbers, scans, shape = [], [], None
                if self._grows:
                    self._size, self._grows = self._affordable(), False
        if numbers:
            yield numbers, scans

    def _affordable(self) -> int:
        """Scans that the free memory of the GPU holds, by the most that the first one took."""
        taken = torch.cuda.max_memory_allocated(self._device) - torch.cuda.memory_allocated(self._device)
        cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        free = torch.cuda.mem_get_info(self._device)[0] + cached
        return max(1, min(_MOST_SCANS, int(_FRACTION_OF_MEMORY * free / max(taken, 1))))


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
