"""Many scans, each in a process of its own: what one does to memory or to itself leaves the others alone."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeAlias

from brainfm.errors import BrainfmError, ScanError
from brainfm.files import held, list_below, one_line, progress_bar, sweep, temporary_path
from brainfm.forks import WITHOUT_GUARD, end_without_guard, get_context, guard_is_missing
from brainfm.prep import server
from brainfm.prep.contrast import t1w_of, whose
from brainfm.prep.longitudinal import align_all, is_aligned
from brainfm.prep.pipeline import STEPS, Settings, is_done, prepare
from brainfm.prep.source import find_sources
from brainfm.report import current
from brainfm.scan.layout import RECORD
from brainfm.scan.prepared import read_record
from brainfm.shards import Shard
from brainfm.system import available_cores

Outcome: TypeAlias = dict[str, Any] | str  # a scan's record, or why there is none

_FEWER = "run it again with fewer scans at once (--jobs, jobs=), or on a machine with more memory"


@dataclass
class Report:
    """What became of many scans.

    Attributes:
        records: For each scan that is prepared now, its name and `prep.json`, in the order of the inputs.
        found: How many of them were there already.
        failed: For each that could not be, its name and why.
        left_out: What of the inputs' folders could not be looked into, and why.
    """

    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    found: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def prepare_all(
    inputs: Iterable[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    t1w: str | os.PathLike[str] | None = None,
    jobs: int = 1,
    threads: int | None = None,
    device: str = "cpu",
    shard: Shard | None = None,
    said: Callable[[str, Outcome], None] | None = None,
    progress: bool = False,
) -> Report:
    """Prepare scans, a folder each in `output`. Those that are there, with the same settings, are left as they are.

    Each scan has a process of its own, which imports the script that calls this: in a script, call it below
    `if __name__ == "__main__":`. A second call on the same `output` is refused while the first lasts.

    Args:
        inputs: Image files, folders of images, of DICOM series, BIDS data sets, manifests; see `find_sources`.
        output: Holds the scans' folders.
        settings: What to prepare with.
        t1w: Of other contrasts, the folder of the person's prepared T1w scan; without it, it is looked for in `output`
            by the scan's name (`brainfm.prep.contrast.t1w_of`).
        jobs: Scans at once; they share the processor's cores, and the GPU where they use one.
        threads: Of each scan; None divides the cores among the jobs.
        device: Of torch, for extraction and registration: "cpu", "cuda", or "auto", which is a GPU where there is one.
            On "cpu" the same scan gives the same files to the bit.
        shard: Which of several equal parts of the scans to prepare. Shards share `output`, and none locks it: they may
            run at once, on several machines, and one that runs twice finds what is done.
        said: Called with a scan's name and its record, or why it failed, as each ends.
        progress: Show a bar of the steps, with an estimate of the time left.

    Returns:
        The records of the scans that were prepared, as their `prep.json` has them, and why others failed.

    Raises:
        BrainfmError: A tool is not installed, the list of inputs is wrong, another process is writing `output`, or a
            script calls this without a guard: nothing was begun.

    Example:
        >>> report = prepare_all(["sub-01_T1w.nii.gz"], "prep/")
        >>> report.records["sub-01"]["verdict"]
        'pass'
    """
    end_without_guard()
    settings = settings or Settings()
    settings.tools()
    device = _checked(device)
    with current().step("listing"):
        sources = find_sources([Path(item) for item in inputs], settings.contrast)
    # By the inputs, not by what is left of them: a run that goes on, and a shard, compute as the unbroken one would.
    threads = threads or max(1, available_cores() // max(1, min(jobs, len(sources))))
    if shard is not None:
        if settings.longitudinal:
            raise BrainfmError(
                "the visits of a person may be in different shards: prepare these, then run it with --longitudinal and "
                "without --shard"
            )
        sources = sources.of(shard)
    if t1w is not None and (settings.contrast == "T1w" or len(sources) != 1):
        raise BrainfmError("t1w is of one scan of another contrast; name that alone, and its contrast")
    folder = Path(output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise BrainfmError(f"{folder}: a file, and the scans' folders are written to a folder; name another output")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(left_out=sources.left_out)
    outcomes: dict[str, Outcome] = {}

    run = current()

    def ended(name: str, outcome: Outcome) -> None:
        outcomes[name] = outcome
        if not isinstance(outcome, str):
            run.held(outcome["peak_memory_gb"] * 1e9)
            for step, seconds in outcome["seconds"].items():
                run.took(f"preparing: {step}", seconds, "scan")
        if said:
            said(name, outcome)

    with held(folder) if shard is None else nullcontext():
        if shard is not None:
            sweep(folder)
        todo: list[_Task] = []
        for source in sources:
            place = folder / source.name
            try:
                onto = None
                if settings.contrast != "T1w":
                    onto = Path(t1w) if t1w is not None else t1w_of(source.name, settings.contrast, folder)
                if is_done(source, place, settings, onto):
                    outcomes[source.name] = read_record(place) or {}
                    report.found += 1
                else:
                    todo.append(
                        _Task(
                            source.name,
                            source.path,
                            partial(prepare, source, place, settings, onto=onto, device=device),
                        )
                    )
            except (BrainfmError, OSError) as error:
                ended(source.name, one_line(error))
        with _Bar("preparing", "scan", len(sources), len(sources) - len(todo), progress) as bar:
            _run(todo, folder, jobs, threads, bar, ended)
        if settings.longitudinal:
            _align_visits(folder, outcomes, settings, jobs, threads, progress)
    for source in sources:
        outcome = outcomes[source.name]
        if isinstance(outcome, str):
            report.failed[source.name] = outcome
        else:
            report.records[source.name] = outcome
    if is_new and shard is None:
        with suppress(OSError):  # there is something in it
            folder.rmdir()
    return report


def _align_visits(
    output: Path, outcomes: dict[str, Outcome], settings: Settings, jobs: int, threads: int, progress: bool
) -> None:
    """Bring the visits of each person to the template together, where there are several and that is not done yet.

    Those that were prepared before count too. The records of what was prepared now are put into `outcomes`.
    """
    visits: dict[str, list[str]] = {}
    for path in list_below(output, RECORD):
        record = read_record(path.parent)
        if record and record["settings"] == settings.to_dict():
            name = path.parent.relative_to(output).as_posix()
            visits.setdefault(whose(name)[0], []).append(name)
    apart = {
        patient: [output / name for name in names]
        for patient, names in visits.items()
        if len(names) > 1 and not is_aligned([output / name for name in names])
    }
    tasks = [
        _Task(patient, output / patient, partial(align_all, folders, settings)) for patient, folders in apart.items()
    ]

    def ended(patient: str, outcome: Outcome) -> None:
        for name in visits[patient]:
            if name in outcomes:
                why = f"its visits could not be brought together: {outcome}"
                outcomes[name] = why if isinstance(outcome, str) else read_record(output / name) or why

    with _Bar("aligning", "person", len(tasks), 0, progress) as bar:
        _run(tasks, output, jobs, threads, bar, ended)


class _Bar:
    """A bar of many scans, or persons, that moves at each step of each, and says what is being done."""

    def __init__(self, doing: str, unit: str, many: int, done: int, shown: bool) -> None:
        self._whole = sum(STEPS.values())
        self._of, self._done = f"{many} {unit}s", done
        self._passed: dict[str, float] = {}
        self._bar = progress_bar(total=many, unit=unit, doing=doing, shown=shown and many > done, done=done)
        self._bar.bar_format = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]"

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def begun(self, name: str, step: str) -> None:
        steps = list(STEPS)
        before = sum(STEPS[each] for each in steps[: steps.index(step)]) if step in STEPS else 0
        self._bar.set_postfix_str(f"{self._done} of {self._of}, {name}: {step}", refresh=False)
        self._move(name, before / self._whole)

    def ended(self, name: str) -> None:
        self._done += 1
        self._bar.set_postfix_str(f"{self._done} of {self._of}", refresh=False)
        self._move(name, 1)
        self._bar.clear()  # a line is printed now

    def tick(self) -> None:
        """The clock goes on while a step lasts."""
        self._bar.refresh()

    def _move(self, name: str, to: float) -> None:
        self._bar.update(max(0, to - self._passed.get(name, 0)))
        self._passed[name] = max(to, self._passed.get(name, 0))
        self._bar.refresh()


@dataclass(frozen=True, eq=False)
class _Task:
    """What a process of its own does: a scan to prepare, or a person's visits to bring together.

    Attributes:
        name: Of the scan, or the person.
        path: What an error is said of.
        run: Does it, given threads and a function that is told of each step, and returns its record.
    """

    name: str
    path: Path
    run: Callable[..., dict[str, Any]]


@dataclass(frozen=True, eq=False)
class _Running:
    """A task that is being done, its process, and a folder for what that and its programs put down meanwhile."""

    task: _Task
    process: Any
    scratch: Path

    def end(self) -> None:
        """End the process, with the programs that it started, which are in its group."""
        with suppress(OSError, AttributeError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        shutil.rmtree(self.scratch, ignore_errors=True)


def _run(
    todo: list[_Task],
    output: Path,
    jobs: int,
    threads: int,
    bar: _Bar,
    ended: Callable[[str, Outcome], None],
) -> None:
    """Do tasks, `jobs` at a time, and tell of each as it ends."""
    waiting = todo[::-1]
    running: dict[Any, _Running] = {}
    if waiting:
        server.start(alone=len(waiting) == 1)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                connection, one = _started(waiting.pop(), output, threads)
                running[connection] = one
            ready: list[Any] = list(wait(list(running), timeout=0.5))
            for connection in ready:
                one = running[connection]
                try:
                    kind, content = connection.recv()
                except EOFError:
                    one.process.join()
                    if one.process.exitcode == WITHOUT_GUARD:
                        raise BrainfmError(guard_is_missing("prepare_all", "scan")) from None
                    kind, content = "ended", f"{one.task.path}: {_death(one.process.exitcode)}"
                if kind == "begun":
                    bar.begun(one.task.name, content)
                    continue
                del running[connection]
                one.end()
                bar.ended(one.task.name)
                ended(one.task.name, content)
            bar.tick()
    finally:
        for one in running.values():
            one.end()  # interrupted: their folders have no prep.json and are done again


def _checked(device: str) -> str:
    """A device that can be used here. Raises BrainfmError for another; torch is not imported for the processor."""
    if device == "cpu":
        return device
    from brainfm.inference import resolve_device

    return str(resolve_device(device))


def _started(task: _Task, output: Path, threads: int) -> tuple[Connection, _Running]:
    scratch = temporary_path(output / "scratch")  # which `held` sweeps away after us, if we are killed
    scratch.mkdir()
    context = get_context()
    ours, theirs = context.Pipe(duplex=False)
    environment = dict(os.environ) | dict.fromkeys(server.THREAD_VARIABLES, str(threads))
    process = context.Process(target=_work, args=(task, threads, scratch, environment, theirs), daemon=True)
    process.start()
    theirs.close()
    return ours, _Running(task, process, scratch)


def _work(task: _Task, threads: int, scratch: Path, environment: dict[str, str], answer: Connection) -> None:
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # Ctrl-C is for the parent, which ends this process and its programs
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    tempfile.tempdir = str(scratch)
    os.environ.clear()  # the server's is that of when it was started
    os.environ |= environment
    try:
        outcome: Outcome = task.run(threads=threads, begun=lambda step: answer.send(("begun", step)))
    except MemoryError:
        outcome = f"{task.path}: there is too little memory; {_FEWER}"
    except BrainfmError as error:
        outcome = one_line(error)
    except OSError as error:
        outcome = f"{task.path}: {one_line(error)}"
    except Exception as error:  # one failed scan never stops the rest
        outcome = f"{task.path}: {type(error).__name__}: {one_line(error)}"
    answer.send(("ended", outcome))


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        with suppress(OSError, AttributeError):
            os.killpg(0, signal.SIGKILL)  # it was killed, and nobody waits for this scan
        os._exit(1)


def _death(code: int) -> str:
    """Why a process that gave no answer ended, and what to do."""
    if code == -9:
        return f"its process was killed (signal 9), as systems do that run out of memory; {_FEWER}"
    if code < 0:
        return (
            f"its process crashed ({signal.strsignal(-code) or -code}); run it again, and if that repeats, leave it out"
        )
    return f"its process ended with exit code {code} and said no more; run it by itself to see why"


def list_records(folder: str | os.PathLike[str]) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Every prepared scan below a folder: its name → its folder and `prep.json`.

    Raises:
        ScanError: There is none, or a record is damaged.
    """
    root = Path(folder)
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in list_below(root, "prep.json"):
        record = read_record(path.parent)
        if record is not None:
            found[str(path.parent.relative_to(root))] = (path.parent, record)
    if not found:
        raise ScanError(
            f"{root}: no prepared scan (prep.json) in this folder; make some: brainfm prep INPUT… -o {root}"
        )
    return found
