"""Scans read and prepared ahead of the encoder, in batches of one shape."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brainfm.contract import Volume
from brainfm.errors import ScanError
from brainfm.manifest import ScanRecord
from brainfm.scan.read import each_file_once
from brainfm.stage import Stage, files_of
from brainfm.transforms import InputTransform

MOST_SCANS = 16  # a batch whose size is found; ours
_FRACTION_OF_MEMORY = 0.8


@dataclass(frozen=True, eq=False)
class PreparedScan:
    """A scan as its contract's tensor [C, D, H, W], with its name, brain mask and affine.

    `shared` is whether other models are given the same tensor, which none may write to then.
    """

    name: str
    tensor: Tensor
    mask: NDArray[np.bool_] | None
    affine: NDArray[np.float64]
    shared: bool = False


def prepared_scans(
    records: Sequence[ScanRecord],
    wanted: Iterable[tuple[int, Sequence[int]]],
    transforms: Sequence[InputTransform],
    workers: int,
    most_ahead: int,
    stage: Stage | None = None,
) -> Generator[tuple[int, list[tuple[int, PreparedScan | ScanError]]]]:
    """Scans in order with their numbers, prepared by threads: inflating and NumPy release the interpreter's lock.

    Of each scan comes what every transform that is asked for makes of it, with the transform's number. Its files are
    read once for all of them, and transforms of one contract share one tensor.

    Args:
        records: All scans.
        wanted: The number of each scan to prepare, and the numbers of the transforms that it is wanted for.
        transforms: How, a model each.
        workers: Threads; 0 prepares in turn.
        most_ahead: Scans that may wait for whoever takes them.
        stage: Where copies of the scans are read, which are made ahead; None reads the scans themselves.
    """
    if stage is not None:
        wanted = stage.ahead(wanted, lambda scan: files_of(records[scan[0]]))
    alike = [next(m for m, other in enumerate(transforms) if other.spec == each.spec) for each in transforms]

    def prepare(n: int, asked: Sequence[int]) -> list[tuple[int, PreparedScan | ScanError]]:
        kinds = dict.fromkeys(alike[number] for number in asked)
        shared = len(kinds) < len(asked)
        with each_file_once():
            made = {kind: _prepared(records[n], f"scan {n}", transforms[kind], stage, shared=shared) for kind in kinds}
        return [(number, made[alike[number]]) for number in asked]

    if workers == 0:
        yield from ((n, prepare(n, asked)) for n, asked in wanted)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="brainfm-scan")
    try:
        ahead: deque[tuple[int, Future[list[tuple[int, PreparedScan | ScanError]]]]] = deque()
        for n, asked in wanted:
            ahead.append((n, pool.submit(prepare, n, asked)))
            if len(ahead) > most_ahead:
                first, future = ahead.popleft()
                yield first, future.result()
        while ahead:
            first, future = ahead.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _prepared(
    record: ScanRecord, number: str, transform: InputTransform, stage: Stage | None, *, shared: bool
) -> PreparedScan | ScanError:
    name = record.name or number

    def read(record: ScanRecord) -> Volume:
        return transform.volume(record.image, record.mask)

    try:
        volume = read(record) if stage is None else stage.read(record, read)
        return PreparedScan(name, transform.tensor(volume), volume.mask, volume.affine, shared)
    except ScanError as error:
        return error
    except Exception as error:  # one bad scan never stops a batch
        return ScanError(f"{name}: {type(error).__name__}: {error}")


class Batches:
    """Scans in batches of one shape, in their order, for one model.

    Args:
        size: Scans of a batch. "auto" is 1 on a CPU, and on a GPU, after a first batch of 1, what its memory holds.
        device: Where the batches go.
    """

    def __init__(self, size: int | Literal["auto"], device: torch.device) -> None:
        self._device = device
        self._size = 1 if size == "auto" else size
        self._grows = size == "auto" and device.type == "cuda"
        self._affordable = 0  # voxels of a batch that has grown
        self._waiting: list[tuple[int, PreparedScan]] = []

    def add(self, n: int, scan: PreparedScan) -> Iterator[list[tuple[int, PreparedScan]]]:
        """The batches, of scans with their numbers, that are full with another scan: none, one or two."""
        if self._waiting and scan.tensor.shape != self._waiting[0][1].tensor.shape:
            yield from self.rest()
        self._waiting.append((n, scan))
        if len(self._waiting) >= self._most(scan.tensor):
            yield from self.rest()
            if self._grows and not self._affordable:
                self._affordable = self._scans_that_fit() * scan.tensor.numel()

    def rest(self) -> Iterator[list[tuple[int, PreparedScan]]]:
        """The batch of the scans that wait, if any."""
        batch, self._waiting = self._waiting, []
        if batch:
            yield batch

    def _most(self, tensor: Tensor) -> int:
        """Scans of a batch of tensors like this one."""
        if not self._affordable:
            return self._size
        return max(1, min(MOST_SCANS, self._affordable // tensor.numel()))

    def _scans_that_fit(self) -> int:
        """Scans that the free memory of the GPU holds, by the most that the first one took."""
        taken = torch.cuda.max_memory_allocated(self._device) - torch.cuda.memory_allocated(self._device)
        cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        free = torch.cuda.mem_get_info(self._device)[0] + cached
        return max(1, int(_FRACTION_OF_MEMORY * free / max(taken, 1)))
