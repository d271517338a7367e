"""The loader of a run: its workers end with the run, however that ends."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.queues import Queue
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from brainfm.errors import ScanError
from brainfm.files import one_line
from brainfm.system import free_shared_memory
from brainfm.train.data import TrainingData

logger = logging.getLogger("brainfm")

# What asks a run to end, where the system has it: a scheduler that wants its node back, and Ctrl-C.
STOPPING = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]

_PREFETCH = 2  # batches that each worker reads ahead

_PATIENCE = 3.0  # seconds that workers have at the end for what they are reading


@contextmanager
def loading(
    data: TrainingData, sampler: Sampler[Any], *, batch_size: int, workers: int, device: torch.device
) -> Iterator[DataLoader[Any]]:
    """Batches in the sampler's order, read ahead by workers.

    The workers are deaf to the signals that stop a run, which needs them until its step has ended. What ends them is
    a pipe that nobody writes to: it closes at the end of the block, or with this process, and even SIGKILL closes it.

    Args:
        data: What is read.
        sampler: The keys of its items.
        batch_size: Items of a batch.
        workers: Processes, or as many as there is shared memory for; 0 reads in this one.
        device: Where the batches will go.
    """
    workers = affordable_workers(workers, batch_size * data.item_bytes)
    closes, held = multiprocessing.Pipe(duplex=False)
    loader: DataLoader[Any] = DataLoader(
        data,
        batch_size,
        sampler=_Ahead(sampler, data),
        num_workers=workers,
        prefetch_factor=_PREFETCH if workers else None,
        collate_fn=data.collate,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=partial(_end_with, closes, held),
    )
    try:
        yield loader
    finally:
        patience = threading.Timer(_PATIENCE, held.close)  # a worker may hang in a read
        patience.start()
        try:
            if loader._iterator is not None:  # an exception's traceback would keep it, and with it its threads
                loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
        finally:
            patience.cancel()
            held.close()
            closes.close()


class _Ahead(Sampler[Any]):
    """A sampler's keys, in turn, as `TrainingData.ahead` gives them."""

    def __init__(self, sampler: Sampler[Any], data: TrainingData) -> None:
        self._sampler, self._data = sampler, data

    def __iter__(self) -> Iterator[Any]:
        return self._data.ahead(iter(self._sampler))

    def __len__(self) -> int:
        return len(self._sampler)  # type: ignore[arg-type]


def batches_of(loader: DataLoader[Any]) -> Iterator[Any]:
    """An epoch of a loader; an error of a worker says what was wrong there, without the worker's traceback.

    Raises:
        ScanError: No scan can be read in place of one that cannot.
    """
    try:
        yield from loader
    except ScanError as error:
        raise ScanError(str(error).rpartition(f"{ScanError.__name__}: ")[2].strip()) from None


def affordable_workers(workers: int, batch_bytes: int) -> int:
    """As many workers as there is shared memory for, with the batches each reads ahead and one in use; says if fewer.

    Batches are the same for any number of workers, so that too little memory costs time, not the run.
    """
    free = free_shared_memory()
    if not workers or (workers * _PREFETCH + 1) * batch_bytes <= free:
        return workers
    fewer = max(0, int((free / batch_bytes - 1) // _PREFETCH))
    logger.warning(
        "/dev/shm has %.2g GB free for this process, and %d workers may need %.2g GB: reading with %d workers, "
        "which is slower; make it larger (docker run --shm-size=…), or batch_size smaller",
        free / 1e9,
        workers,
        (workers * _PREFETCH + 1) * batch_bytes / 1e9,
        fewer,
    )
    return fewer


def _end_with(closes: Connection, held: Connection, _: int) -> None:
    """In a worker: let it outlive signals, and nothing but the other end of the pipe."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    held.close()  # a fork has this end too
    threading.Thread(target=_wait_for, args=(closes,), daemon=True).start()
    # A batch that cannot be handed over would be waited for.
    Queue._on_queue_feeder_error = staticmethod(_end_for)  # type: ignore[attr-defined]


def _wait_for(closes: Connection) -> None:
    with suppress(EOFError, OSError):
        closes.recv_bytes()
    os._exit(0)


def _end_for(error: Exception, _: Any) -> None:
    """In a worker that cannot hand a batch over: say why, and end, which the training process sees."""
    reason = f"{type(error).__name__}: {one_line(error)}"
    os.write(2, f"no shared memory for a batch ({reason}); make /dev/shm larger, or set workers=0\n".encode())
    os._exit(1)
