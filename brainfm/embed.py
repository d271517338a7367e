"""Many scans → a table of embeddings: read ahead in threads, resumable, split over processes under torchrun."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from brainfm.batches import MOST_SCANS, Batches, PreparedScan, prepared_scans
from brainfm.dense import DenseDType, dense_affine, dense_paths, write_dense
from brainfm.errors import ScanError
from brainfm.factory import create_model
from brainfm.files import check_writable, held, one_line, progress_bar, sweep
from brainfm.inference import DTypeName, dtype_name, optimize, resolve_device
from brainfm.manifest import Listing, ScanRecord, ScansLike, check_found, list_scans
from brainfm.models.encoder import Encoder
from brainfm.models.features import FeatureMaps
from brainfm.names import resolve
from brainfm.overlap import overlap_of_scans
from brainfm.parts import About, Parts, Vectors
from brainfm.readout import Reader
from brainfm.report import Run, current, reporting
from brainfm.shards import Shard
from brainfm.stage import SIZE_GB, Stage
from brainfm.system import expanded, give_back_memory, joined, launched, own_cores
from brainfm.table import FORMATS, Embeddings, Origin, check_folder, check_output, files_of, write
from brainfm.transforms import check_channels, create_transform
from brainfm.version import __version__
from brainfm.weights import weights_digest

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger("brainfm")


@dataclass(frozen=True)
class Options:
    """What `embed` is told beside scans, models and places; see there."""

    batch_size: int | Literal["auto"] = "auto"
    device: str | torch.device = "auto"
    dtype: DTypeName | torch.dtype = "auto"
    num_workers: int = 2
    dense_dtype: DenseDType = "float16"
    on_error: Literal["skip", "raise"] = "skip"
    strict_qc: bool = False
    progress: bool = False
    shard: Shard | None = None
    stage: Stage | None = None
    optimised: bool = True  # or by the network itself, whose numbers are those of model(tensor)

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


class _Keywords(TypedDict, total=False):
    """The keywords of `embed`, for both of its signatures."""

    batch_size: int | Literal["auto"]
    device: str | torch.device
    dtype: DTypeName | torch.dtype
    num_workers: int
    output: str | os.PathLike[str] | None
    dense: str | os.PathLike[str] | None
    dense_dtype: DenseDType
    report: str | os.PathLike[str] | None
    on_error: Literal["skip", "raise"]
    strict_qc: bool
    shard: Shard | str | None
    stage: str | os.PathLike[str] | None
    stage_size: float
    progress: bool


@overload
def embed(scans: ScansLike, model: nn.Module | str, **keywords: Unpack[_Keywords]) -> Embeddings: ...


@overload
def embed(scans: ScansLike, model: list[Any], **keywords: Unpack[_Keywords]) -> list[Embeddings]: ...


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
    shard: Shard | str | None = None,
    stage: str | os.PathLike[str] | None = None,
    stage_size: float = SIZE_GB,
    progress: bool = False,
) -> Embeddings | list[Embeddings]:
    """Embed every scan of a list, each prepared as the model's input contract says and read out as its readout says.

    With `output`, finished rows are kept in parts beside it as they come, and the table is written at the end; a run
    that was interrupted goes on where it stopped when it is started again with the same model and dtype. Scans whose
    file changed in between are done again. A second run with the same `output` is refused while the first lasts. Under
    torchrun each process takes its share, and rank 0 writes and returns all.

    Several models share one pass over the scans: each file is read and inflated once, brought once to each of their
    input contracts, and given to one encoder after the other, all of which are in memory. A scan that an earlier run
    embedded with one of them is read for the others alone.

    With `shard` the parts are what is written, to a folder that any number of shards share without waiting for one
    another; `brainfm.parts.merge`, or 'brainfm merge', makes the table of them.

    Args:
        scans: A path (image, manifest, TurboPrep or BIDS-derivatives folder), a DataFrame with a manifest's columns, or
            a list of paths, images, scans of several channels {channel: image}, or (image, mask) pairs.
        model: An encoder of `create_model`, or the name of one with published weights; or a list of them.
        batch_size: Scans a forward pass; "auto" is 1 on a CPU, and on a GPU as many as its free memory holds, by what
            the first scan took, at most 16. Scans whose tensors differ in shape are not put in one batch.
        device: "auto" (CUDA where there is one, else the CPU), or a torch device.
        dtype: See `brainfm.optimize`; "auto" is float32, on a GPU too.
        num_workers: Threads that read and prepare scans ahead of the encoder; 0 reads in turn.
        output: Where to write the table: .csv, .parquet or .npz. Failed scans are listed in `<name>.errors.csv`. Of
            several models, each has its table: `<name>.<model>.csv`, in a folder `embeddings.<model>.csv`. With
            `shard`, a folder of parts.
        dense: A folder for dense features: the last feature map of each scan as NIfTI [x, y, z, C], whose affine puts
            every cell where it looks. The table's column `dense_path` names the files.
        dense_dtype: Of the dense features; see `brainfm.dense.write_dense`.
        report: Where to write, as JSON, what was done (`brainfm.report.RunReport`): counts, scans that failed, what of
            a folder was left out, seconds by step, memory, versions; and of the table, or under `models` of each, its
            origin and the seconds a scan (read, prepared and embedded, without the weights' loading).
        on_error: "skip" notes a bad scan and goes on, "raise" stops at it.
        strict_qc: Refuse scans that `brainfm prep` judged to have failed and nobody accepted by `brainfm qc`, and those
            that somebody rejected; without it, the column `qc` says so.
        shard: Which part of the scans to embed, such as "3/8", the third of eight.
        stage: A folder on a local disk for copies of scans that lie on a network's, made ahead (`brainfm.stage`).
        stage_size: The most that it holds, in GB.
        progress: Show a progress bar.

    Returns:
        The table, in the order of the scans; of several models a list of tables; of a shard its own scans.

    Raises:
        ScanError: The list itself is wrong, as where none of its files is there, or with on_error="raise" a scan.
        BrainfmError: The device cannot be used, or another run is writing the output.
        ValueError: The model has a classifier, gives maps, or takes other channels than its contract gives, or an
            argument is out of range.

    Example:
        >>> import brainfm
        >>> scans = [("normalized.nii.gz", "mask.nii.gz")]  # or a manifest, or a folder of prepared scans
        >>> table = brainfm.embed(scans, "test_resnet_3d", output="embeddings.csv")
        >>> table.vectors.shape
        (1, 128)
    """
    part = Shard.of(shard) if isinstance(shard, str) else shard
    local = None if stage is None else Stage(stage, stage_size)
    options = Options(batch_size, device, dtype, num_workers, dense_dtype, on_error, strict_qc, progress, part, local)
    told = {"output": None if output is None else str(output), "dtype": str(dtype), "device": str(device)}
    with reporting(report, "embed", told, (), told["output"]) if report is not None else nullcontext() as run:
        tables = embed_files(scans, model, options, output=output, dense=dense, run=run, in_memory=True)
    return tables[0] if isinstance(model, nn.Module | str) else tables


def embed_files(
    scans: ScansLike,
    model: nn.Module | str | list[Any],
    options: Options,
    *,
    output: str | os.PathLike[str] | None = None,
    dense: str | os.PathLike[str] | None = None,
    run: Run | None = None,
    in_memory: bool = False,
) -> list[Embeddings]:
    """As `embed`, a table each model. Without `in_memory` only their files have vectors; `run` is told what is done."""
    shard = options.shard
    if shard is not None and output is None:
        raise ValueError("a shard's rows are written to a folder; name it as output")
    records = list_scans(scans)
    give_back_memory()  # what reading a table of many left
    several = not isinstance(model, nn.Module | str)
    models: list[nn.Module | str] = [model] if isinstance(model, nn.Module | str) else list(model)
    output = None if output is None else table_path(output, len(models), shard)
    names = [_file_name(each) for each in models]
    if len(set(names)) != len(names):
        raise ValueError(f"the models have the same name, {', '.join(names)}: embed them one by one")
    jobs = [_job(each, several, records, output, dense, run, shard) for each in models]
    check_found(records)
    with ExitStack() as outputs:
        for job in jobs:
            if job.output is not None:
                check_writable(job.output if shard else job.output.parent)
            if job.output is not None and shard is None:
                outputs.enter_context(held(job.output))
            for folder in (job.dense, job.output if shard else None):
                if folder is not None and folder.is_dir():
                    sweep(folder)
        outputs.enter_context(joined())
        return _embed(records, jobs, options, in_memory)


def embed_for(
    records: Listing,
    model: Encoder,
    output: Path | None,
    write: Callable[[Embeddings, Path], None],
    *,
    optimised: bool = True,
    batch_size: int | Literal["auto"] = "auto",
    device: str | torch.device = "auto",
    num_workers: int = 2,
    on_error: Literal["skip", "raise"] = "skip",
    strict_qc: bool = False,
    progress: bool = False,
) -> Embeddings:
    """As `embed` of one model, but that `write` makes the file `output` of the table: for what is made of embeddings.

    The same parts, lock, shares of torchrun and errors. `optimised` is whether the copy of `brainfm.optimize`
    computes, or the network itself.
    """
    options = Options(
        batch_size=batch_size,
        device=device,
        num_workers=num_workers,
        on_error=on_error,
        strict_qc=strict_qc,
        progress=progress,
        optimised=optimised,
    )
    check_found(records)
    with ExitStack() as outputs:
        if output is not None:
            outputs.enter_context(held(output))
        outputs.enter_context(joined())
        return _embed(records, [_Job(model, output, None, write=write)], options, in_memory=True)[0]


def table_path(output: str | os.PathLike[str], models: int, shard: Shard | None) -> Path:
    """The table that `output` names; of several models, where it names a folder, `embeddings.csv` in that."""
    path = expanded(output)
    return path / "embeddings.csv" if models > 1 and shard is None and path.suffix not in FORMATS else path


def path_of(path: str | os.PathLike[str], model: nn.Module | str | None = None) -> Path:
    """Where `embed` writes the table `path`: of one of several models, at `<name>.<model>.<ending>`."""
    path = expanded(path)
    return path if model is None else path.with_name(f"{path.stem}.{_file_name(model)}{path.suffix}")


def _file_name(model: nn.Module | str) -> str:
    cfg = getattr(model, "pretrained_cfg", None)
    name = model if isinstance(model, str) else getattr(cfg, "name", "") or type(model).__name__
    return "".join(letter if letter.isalnum() or letter in "_-." else "-" for letter in name)


@dataclass(frozen=True, eq=False)
class _Job:
    """One model's table.

    Attributes:
        model: The encoder, or its name.
        output: The path of the table, or of a shard the folder of parts; or None.
        dense: The folder for dense features, or None.
        run: What is told of it, or None.
        details: What of the run is this table's own.
        write: What makes the file of the table.
    """

    model: nn.Module | str
    output: Path | None
    dense: Path | None
    run: Run | None = None
    details: dict[str, Any] = field(default_factory=dict)
    write: Callable[[Embeddings, Path], None] = write


def _job(
    model: nn.Module | str,
    one_of_several: bool,
    records: list[ScanRecord],
    output: str | os.PathLike[str] | None,
    dense: str | os.PathLike[str] | None,
    run: Run | None,
    shard: Shard | None,
) -> _Job:
    """A job with its own paths, checked as far as can be before hours of work for others."""
    own = model if one_of_several else None
    folder = None if dense is None else expanded(dense) / (_file_name(model) if one_of_several else "")
    details: dict[str, Any] = {} if run is None else run.details
    if one_of_several:
        details = details.setdefault("models", {}).setdefault(_file_name(model), {})
    job = _Job(
        model,
        None if output is None else path_of(output, own),
        folder,
        run,
        details,
    )
    if run is not None and job.output is not None:
        run.check_apart(files_of(job.output))
    if job.output is not None and shard is not None:
        check_folder(job.output, records)
    elif job.output is not None:
        check_output(job.output, records)
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ScanError(f"{folder}: dense features are written to a folder, and this is a file")
    if isinstance(model, FeatureMaps):
        raise ValueError(
            "features_only gives maps and no vector; embed the encoder itself, with dense= for its last map"
        )
    if getattr(model, "num_classes", 0):
        raise ValueError("this model ends in a classifier and gives logits; call model.reset_classifier(0) first")
    spec = create_transform(model).spec
    check_channels(resolve(model).cfg if isinstance(model, str) else model, spec)
    return job


def _embed(records: Listing, jobs: Sequence[_Job], options: Options, in_memory: bool) -> list[Embeddings]:
    """A table each job, of one pass over the scans: each is read once, and goes to the encoders in turn."""
    place = resolve_device(options.device)
    dtype_name(options.dtype, place)  # which refuses one that the device does not have
    runs = [_Run(records, job, options, place) for job in jobs]
    asked = ((n, [number for number, run in enumerate(runs) if n in run]) for n in runs[0].scans)
    wanted = ((n, numbers) for n, numbers in asked if numbers)
    size, workers = options.batch_size, options.num_workers
    most = size if size != "auto" else MOST_SCANS if place.type == "cuda" else 1
    ahead = workers + max(1, most // len(runs))  # about as many tensors wait for many encoders as for one
    prepared = prepared_scans(records, wanted, [run.transform for run in runs], workers, ahead, options.stage)
    total, left = len(runs[0].scans) * len(runs), sum(n in run for run in runs for n in run.scans)
    shown, unit = options.progress and launched().rank == 0, "scan" if len(runs) == 1 else "embedding"
    bar = progress_bar(total=total, unit=unit, doing="embedding", shown=shown, done=total - left)
    begun, read = time.monotonic(), 0
    try:
        with own_cores(place), bar, closing(prepared):  # else what is interrupted would read on
            for n, scans in current().waited("waiting for scans", prepared):
                read += 1
                for number, scan in scans:
                    bar.update(runs[number].take(n, scan))
            for run in runs:
                bar.update(run.take_rest())
        per_scan = (time.monotonic() - begun) / read if read else None
        tables = [run.table(per_scan, in_memory) for run in runs]
    except BaseException:
        _tell(runs)
        for run in runs:
            run.keep()
        raise
    _tell(runs)
    return tables


class _Run:
    """One model's table, from what an earlier run left to the files.

    Args:
        records: All scans.
        job: The model, and where its files go.
        options: Those of all models.
        place: The device.

    Attributes:
        scans: The numbers of those that this process embeds.
        transform: The model's.
        reported: The run that is told of it, or None.
    """

    def __init__(self, records: Listing, job: _Job, options: Options, place: torch.device) -> None:
        self._records, self._job, self._options, self._place = records, job, options, place
        with current().step("loading the model"):
            encoder = create_model(job.model, pretrained=True) if isinstance(job.model, str) else job.model
        self.transform = create_transform(encoder)
        for overlap in overlap_of_scans(encoder, records):
            logger.warning("%s: an evaluation on it is one on training data", overlap)
        self._width = getattr(encoder, "num_features", 0)
        self._origin = origin_of(encoder, options.dtype)
        network = optimize(encoder, options.dtype) if options.optimised else encoder
        self._reader = Reader(network.to(place), dense=job.dense is not None)
        self._batches = Batches(options.batch_size, place)
        self._maps = [] if job.dense is None else dense_paths(records, job.dense)

        shard, launch = options.shard, launched()
        self.scans = (shard or Shard()).numbers(len(records))[launch.rank :: launch.world]
        self._failed: dict[int, str] = {}
        if options.strict_qc:
            self._failed = {n: reason for n in self.scans if (reason := _failed_qc(records[n]))}
        if self._failed and options.on_error == "raise":
            raise ScanError(self._failed[min(self._failed)])
        self._done = self._resumed(shard or Shard(launch.rank, launch.world))
        self._known = self._there = len(self._done)
        self._is_written = False
        self.reported, self._asked, self._said = job.run, len(self.scans), dict[str, Any]()

    def _resumed(self, part: Shard) -> _Rows | Parts:
        """The rows, with those that an earlier run finished."""
        records, job, options, maps = self._records, self._job, self._options, self._maps
        if job.output is None:
            return _Rows(self.scans)
        # A row goes with its map: of a run with other maps, or none, no row is taken.
        digest = self._origin.digest
        made_by = digest if job.dense is None else f"{digest} {options.dense_dtype} {job.dense.resolve()}"
        made_by += "" if options.optimised else " not optimised"
        about = About(made_by, replace(self._origin, scans=len(records)).to_dict(), str(part))
        done = Parts(job.output if options.shard else parts_path(job.output), about, self.scans)
        there = (n for n in self.scans if n not in self._failed and (not maps or maps[n].is_file()))
        done.resume(((n, records[n]) for n in there), alone=options.shard is not None)
        if len(done):
            logger.info("%s: %d scans were done by an earlier run", job.output, len(done))
        for n, reason in self._failed.items() if options.shard is not None else ():
            done.fail(n, records[n], reason)
        return done

    def __contains__(self, n: int) -> bool:
        """Whether a scan is still to be embedded."""
        return n not in self._done and n not in self._failed

    def take(self, n: int, scan: PreparedScan | ScanError) -> int:
        """Embed another scan, or have it wait for its batch; how many scans are done with it."""
        if isinstance(scan, ScanError):
            self._keep(n, scan)
            return 1
        return sum(map(self._embed, self._batches.add(n, scan)))

    def take_rest(self) -> int:
        """Embed the scans that wait; how many."""
        return sum(map(self._embed, self._batches.rest()))

    def _embed(self, batch: list[tuple[int, PreparedScan]]) -> int:
        for (n, _), outcome in zip(
            batch, _outcomes(self._reader, [scan for _, scan in batch], self._place), strict=True
        ):
            self._keep(n, outcome)
        return len(batch)

    def _keep(self, n: int, outcome: _Embedded | ScanError) -> None:
        record, maps = self._records[n], self._maps
        if isinstance(outcome, ScanError):
            if self._options.on_error == "raise":
                raise outcome
            self._failed[n] = str(outcome)
            if self._options.shard is not None:
                self._done.fail(n, record, self._failed[n])
            return
        if outcome.cells is not None:
            write_dense(outcome.cells, outcome.affine, maps[n], self._options.dense_dtype)
        self._done.add(n, _with_map(record, maps[n]) if maps else record, outcome.vector)
        self._there += 1

    def keep(self) -> None:
        """Leave what is finished to the run that goes on."""
        with suppress(OSError):
            if not self._is_written:
                self._done.flush()

    def tell(self, told: Run, *, others: bool) -> None:
        """Tell the run that is reported how far this table is; it counts what all of the tables have."""
        job, asked = self._job, self._asked
        told.asked = asked
        told.done = min(told.done, self._there) if others else self._there
        told.of_an_earlier_run = min(told.of_an_earlier_run, self._known) if others else self._known
        told.left_out = self._records.left_out
        for n in sorted(self._failed):
            told.fail(self._records[n].name or f"scan {n}", self._failed[n])
        job.details.update(
            output=None if job.output is None else str(job.output), scans=asked, embedded=self._there, **self._said
        )

    def table(self, per_scan: float | None, in_memory: bool) -> Embeddings:
        """The table of all scans, written; of several processes each gives the same."""
        records, job, shard = self._records, self._job, self._options.shard
        rank, world = launched().rank, launched().world
        together = world > 1 and shard is None
        if together or shard is not None:
            self._done.flush()
        numbers, vectors = self._done.taken()
        failed = self._failed
        if together:
            numbers, vectors, failed = _gathered(numbers, vectors, failed)
        origin = replace(self._origin, scans=len(records), failed=len(failed))
        table = _table(records, self._maps, numbers, vectors, failed, self._width, origin)
        if in_memory:
            table = replace(table, vectors=np.asarray(table.vectors))
        if rank == 0 and job.output is not None and shard is None:
            with current().step("writing"):
                job.write(table, job.output)
        self._is_written = True
        if isinstance(self._done, Parts) and shard is None:
            _wait_for_all(world)  # each has read what it returns
            if rank == 0:
                self._done.remove()
        self._there, self._failed = len(table), failed
        self._asked = len(records) if shard is None else len(self.scans)
        self._said = {"origin": origin.to_dict(), "seconds_per_scan": per_scan, "device": _named(self._place)}
        return table


def _tell(runs: Sequence[_Run]) -> None:
    """Tell the run that is reported how far the tables are."""
    for number, run in enumerate(runs):
        if (told := run.reported) is not None:
            run.tell(told, others=number > 0)


def _wait_for_all(world: int) -> None:
    if world > 1:
        import torch.distributed as dist

        dist.barrier()


def parts_path(output: Path) -> Path:
    """Where the finished rows of a table are kept until it is written: a hidden folder beside it."""
    return output.with_name(f".{output.name}.parts")


def origin_of(model: nn.Module, dtype: DTypeName | torch.dtype = "auto") -> Origin:
    """What a table of this model says of itself; the digest is of every weight."""
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
        dtype=dtype_name(dtype),
        brainfm=__version__,
        torch=torch.__version__,
    )


def _failed_qc(record: ScanRecord) -> str:
    """Why a scan is refused where a failed preparation is; empty where it is not."""
    quality = record.extra.get("qc")
    if quality == "rejected":
        return (
            f"{record.name}: was rejected by a person (decisions.json beside it); embed without --strict-qc to take it"
        )
    if quality not in ("fail", "unreadable"):
        return ""
    return (
        f"{record.name}: its preparation did not pass quality control (prep.json beside it: {quality}); look at its "
        "qc.png, accept it by 'brainfm qc', prepare it in another way, or embed without --strict-qc"
    )


def _named(place: torch.device) -> str:
    return torch.cuda.get_device_name(place) if place.type == "cuda" else f"{place}, {torch.get_num_threads()} threads"


class _Rows:
    """The vectors of scans, by their numbers in a list, in one array: rows of their own would need it all twice.

    Args:
        numbers: Of the scans that may come.
    """

    def __init__(self, numbers: range) -> None:
        self._numbers = numbers
        self._there = np.zeros(len(numbers), dtype=bool)
        self._vectors = np.empty((0, 0), dtype=np.float32)

    def add(self, n: int, _record: ScanRecord, vector: NDArray[np.float32]) -> None:
        if not self._vectors.size:
            self._vectors = np.empty((len(self._numbers), len(vector)), dtype=np.float32)
        place = self._numbers.index(n)
        self._vectors[place] = vector
        self._there[place] = True

    def fail(self, n: int, record: ScanRecord, reason: str) -> None:
        """Nothing is kept of a scan that failed."""

    def flush(self) -> None:
        """Nothing is written."""

    def __contains__(self, n: int) -> bool:
        return bool(self._there[self._numbers.index(n)])

    def __len__(self) -> int:
        return int(self._there.sum())

    def taken(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The numbers of the scans that came, and their vectors, moved together; no more may come then."""
        places = np.flatnonzero(self._there)
        for row, place in enumerate(places):
            if row != place:
                self._vectors[row] = self._vectors[place]
        numbers = self._numbers.start + self._numbers.step * places
        return numbers, self._vectors[: len(places)]


@dataclass(frozen=True, eq=False)
class _Embedded:
    """A scan's vector, and where they were asked for its dense features [C, d, h, w] with their affine."""

    vector: NDArray[np.float32]
    cells: NDArray[np.float32] | None
    affine: NDArray[np.float64]


def _outcomes(reader: Reader, scans: Sequence[PreparedScan], device: torch.device) -> list[_Embedded | ScanError]:
    """What each scan of a batch becomes. Where one of them fails, or all together are too large, each goes alone."""
    try:
        return _forward(reader, scans, device)
    except ScanError as error:
        reason = str(error)
    except (RuntimeError, ValueError) as error:  # the network does not take it, or the memory does not hold it
        reason = f"{type(error).__name__}: {one_line(error)}"
    # Not in the `except`: the traceback would keep the batch that was too large.
    if len(scans) > 1:
        logger.debug("a batch of %d scans one by one: %s", len(scans), reason)
        return [outcome for scan in scans for outcome in _outcomes(reader, [scan], device)]
    return [ScanError(f"{scans[0].name}: {reason}")]


def _forward(reader: Reader, scans: Sequence[PreparedScan], device: torch.device) -> list[_Embedded | ScanError]:
    tensors = [scan.tensor for scan in scans]
    alone = len(tensors) == 1 and not scans[0].shared  # which is not copied
    joined = tensors[0][None] if alone else torch.stack(tensors)
    if device.type == "cuda":
        joined = joined.pin_memory()
    features = reader(joined.to(device, non_blocking=True), [scan.mask for scan in scans])
    vectors = features.vectors.cpu().numpy()
    maps = None if features.maps is None or not reader.dense else features.maps.cpu().numpy()
    outcomes: list[_Embedded | ScanError] = []
    for n, scan in enumerate(scans):
        if not np.isfinite(vectors[n]).all():
            outcomes.append(ScanError(f"{scan.name}: the embedding is not finite: an overflow; use dtype float32"))
            continue
        affine = scan.affine if maps is None else dense_affine(scan.affine, reader.model.feature_info[-1])
        # A copy: a view would keep the whole batch alive, and with it memory of torch's.
        outcomes.append(_Embedded(vectors[n].copy(), None if maps is None else maps[n], affine))
    return outcomes


def _table(
    records: list[ScanRecord],
    maps: Sequence[Path],
    numbers: NDArray[np.int64],
    vectors: NDArray[np.float32] | Vectors,
    failed: dict[int, str],
    width: int,
    origin: Origin,
) -> Embeddings:
    rows = [records[n] for n in numbers]
    if maps:
        rows = [_with_map(row, maps[n]) for row, n in zip(rows, numbers, strict=True)]
    there: Any = vectors if len(rows) else np.empty((0, width), dtype=np.float32)
    return Embeddings(there, rows, [(records[n], failed[n]) for n in sorted(failed)], origin)


def _with_map(record: ScanRecord, path: Path) -> ScanRecord:
    """A scan with where its dense features are."""
    return replace(record, extra=record.extra | {"dense_path": str(path)})


def _gathered(
    numbers: NDArray[np.int64], vectors: NDArray[np.float32] | Vectors, failed: dict[int, str]
) -> tuple[NDArray[np.int64], NDArray[np.float32] | Vectors, dict[int, str]]:
    """What all processes have, on each of them; of vectors in parts, where they are."""
    import torch.distributed as dist

    everyone: list[Any] = [None] * dist.get_world_size()
    in_parts = isinstance(vectors, Vectors)
    dist.all_gather_object(everyone, (numbers, vectors.where if isinstance(vectors, Vectors) else vectors, failed))
    joined_numbers = np.concatenate([theirs for theirs, _, _ in everyone])
    order = np.argsort(joined_numbers, kind="stable")
    rows = [theirs for _, theirs, _ in everyone]
    all_failed = {n: reason for *_, theirs in everyone for n, reason in theirs.items()}
    joined_rows = (
        Vectors.of(rows, order) if in_parts else np.concatenate([row for row in rows if len(row)] or rows)[order]
    )
    return joined_numbers[order], joined_rows, all_failed
