"""Scans read and prepared ahead of the encoder, in batches of one shape."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brainfm.errors import ScanError
from brainfm.manifest import ScanRecord
from brainfm.transforms import InputTransform

MOST_SCANS = 16  # a batch whose size is found; ours
_FRACTION_OF_MEMORY = 0.8


@dataclass(frozen=True, eq=False)
class PreparedScan:
    """A scan as its contract's tensor [C, D, H, W], with its name, brain mask and affine."""

    name: str
    tensor: Tensor
    mask: NDArray[np.bool_] | None
    affine: NDArray[np.float64]


def prepared_scans(
    records: Sequence[ScanRecord], todo: Sequence[int], transform: InputTransform, workers: int, most_ahead: int
) -> Iterator[tuple[int, PreparedScan | ScanError]]:
    """Scans in order with their numbers, prepared by threads: inflating and NumPy release the interpreter's lock.

    Args:
        records: All scans.
        todo: The numbers of those to prepare.
        transform: How.
        workers: Threads; 0 prepares in turn.
        most_ahead: Scans that may wait for whoever takes them.
    """

    def prepare(n: int) -> PreparedScan | ScanError:
        name = records[n].name or f"scan {n}"
        try:
            volume = transform.volume(records[n].image, records[n].mask)
            return PreparedScan(name, transform.tensor(volume), volume.mask, volume.affine)
        except ScanError as error:
            return error
        except Exception as error:  # one bad scan never stops a batch
            return ScanError(f"{name}: {type(error).__name__}: {error}")

    if workers == 0:
        yield from ((n, prepare(n)) for n in todo)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="brainfm-scan")
    try:
        ahead: deque[tuple[int, Future[PreparedScan | ScanError]]] = deque()
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


class Batches:
    """Scans in batches of one shape, in their order; one that could not be prepared passes by itself.

    Args:
        items: The scans with their numbers.
        size: Scans of a batch. "auto" is 1 on a CPU, and on a GPU, after a first batch of 1, what its memory holds.
        device: Where the batches go.
    """

    def __init__(
        self, items: Iterator[tuple[int, PreparedScan | ScanError]], size: int | Literal["auto"], device: torch.device
    ) -> None:
        self._items, self._device = items, device
        self._size = 1 if size == "auto" else size
        self._grows = size == "auto" and device.type == "cuda"
        self._affordable = 0  # voxels of a batch that has grown

    def __iter__(self) -> Iterator[tuple[list[int], list[PreparedScan] | ScanError]]:
        numbers: list[int] = []
        scans: list[PreparedScan] = []
        for n, scan in self._items:
            if isinstance(scan, ScanError):
                yield [n], scan
                continue
            if scans and scan.tensor.shape != scans[0].tensor.shape:
                yield numbers, scans
                numbers, scans = [], []
            numbers.append(n)
            scans.append(scan)
            if len(scans) >= self._most(scan.tensor):
                yield numbers, scans
                numbers, scans = [], []
                if self._grows and not self._affordable:
                    self._affordable = self._scans_that_fit() * scan.tensor.numel()
        if scans:
            yield numbers, scans

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
