"""Many scans, each in a process of its own: what one does to memory or to itself leaves the others alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from brainfm.errors import BrainfmError, ScanError
from brainfm.files import one_line
from brainfm.prep.pipeline import Settings, is_done, prepare, read_record
from brainfm.prep.source import Source, find_sources
from brainfm.system import available_cores

# Read by ITK, OpenMP and the BLAS libraries when a process begins.
_THREAD_VARIABLES = (
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
)


@dataclass
class Report:
    """What became of many scans.

    Attributes:
        records: For each scan that is prepared now, its name and `prep.json`, in the order of the inputs.
        found: How many of them were there already.
        failed: For each that could not be, its name and why.
    """

    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    found: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def prepare_all(
    inputs: Iterable[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    jobs: int = 1,
    said: Callable[[str, dict[str, Any] | str], None] | None = None,
) -> Report:
    """Prepare scans, a folder each in `output`. Those that are there, with the same settings, are left as they are.

    Args:
        inputs: Image files, folders of DICOM series, BIDS data sets.
        output: Holds the scans' folders.
        settings: What to prepare with.
        jobs: Scans at once; they share the processor's cores.
        said: Called with a scan's name and its record, or why it failed, as each ends.

    Raises:
        BrainfmError: A tool is not installed, or the list of inputs is wrong: nothing was begun.

    Example:
        >>> report = prepare_all(["sub-01_T1w.nii.gz"], "prep/")
        >>> report.records["sub-01"]["verdict"]
        'pass'
    """
    settings = settings or Settings()
    settings.tools()
    sources = find_sources([Path(item) for item in inputs])
    report = Report()
    outcomes: dict[str, dict[str, Any] | str] = {}
    todo: list[Source] = []
    for source in sources:
        folder = Path(output) / source.name
        try:
            if is_done(source, folder, settings):
                outcomes[source.name] = read_record(folder) or {}
                report.found += 1
            else:
                todo.append(source)
        except (BrainfmError, OSError) as error:
            outcomes[source.name] = one_line(error)
            if said:
                said(source.name, one_line(error))
    threads = max(1, available_cores() // max(1, min(jobs, len(todo))))
    pool = ThreadPoolExecutor(jobs, thread_name_prefix="brainfm-prep")
    running: list[Any] = []
    try:
        futures: dict[Future[dict[str, Any] | str], Source] = {
            pool.submit(_in_a_process, source, Path(output) / source.name, settings, threads, running): source
            for source in todo
        }
        for future in as_completed(futures):
            name = futures[future].name
            outcomes[name] = future.result()
            if said:
                said(name, outcomes[name])
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in running:
            process.terminate()  # interrupted: their folders have no prep.json and are done again
    for source in sources:
        outcome = outcomes[source.name]
        if isinstance(outcome, str):
            report.failed[source.name] = outcome
        else:
            report.records[source.name] = outcome
    return report


def _in_a_process(
    source: Source, folder: Path, settings: Settings, threads: int, running: list[Any]
) -> dict[str, Any] | str:
    """The record of a scan, or why there is none."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(source, folder, settings, threads, theirs), daemon=True)
    process.start()
    running.append(process)
    theirs.close()
    try:
        outcome: dict[str, Any] | str = ours.recv()
    except EOFError:
        process.join()
        outcome = f"{source.path}: its process ended with exit code {process.exitcode} (-9: killed, often for memory)"
    process.join()
    running.remove(process)
    return outcome


def _work(source: Source, folder: Path, settings: Settings, threads: int, answer: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the parent ends this one
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    os.environ |= dict.fromkeys(_THREAD_VARIABLES, str(threads))
    try:
        answer.send(prepare(source, folder, settings, threads))
    except (BrainfmError, OSError, MemoryError) as error:
        text = one_line(error) if isinstance(error, BrainfmError) else f"{source.path}: {one_line(error)}"
        answer.send(text)
    except Exception as error:  # one failed scan never stops the rest
        answer.send(f"{source.path}: {type(error).__name__}: {one_line(error)}")


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # it was killed, and nobody waits for this scan


def list_records(folder: str | os.PathLike[str]) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Every prepared scan below a folder: its name → its folder and `prep.json`.

    Raises:
        ScanError: There is none, or a record is damaged.
    """
    root = Path(folder)
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in sorted(root.rglob("prep.json")):
        record = read_record(path.parent)
        if record is not None:
            found[str(path.parent.relative_to(root))] = (path.parent, record)
    if not found:
        raise ScanError(
            f"{root}: no prepared scan (prep.json) in this folder; make some: brainfm prep INPUT… -o {root}"
        )
    return found
