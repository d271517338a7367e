"""A run's report: what a command was given, what it did and what that cost, as one JSON file.

`reporting` is put around the work. The file is there from the beginning, saying "running", which a run that was killed
still says; at the end, however that comes, it says how the run ended. Work inside tells the `current` run of its steps
(each progress bar is one), its counts and its failures; outside of any run that is told to nobody.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import platform
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from brainfm.errors import BrainfmError, RunInterruptedError
from brainfm.files import one_line, write_json
from brainfm.schema import Checked
from brainfm.system import available_cores, expanded, launched, peak_memory
from brainfm.version import __version__

T = TypeVar("T")
logger = logging.getLogger("brainfm")

State = Literal["running", "done", "failed", "interrupted"]

# Whose versions may change what a run does.
_PACKAGES = (
    *("torch", "monai", "numpy", "scipy", "nibabel", "safetensors", "SimpleITK", "pandas", "pyarrow", "scikit-learn"),
    *("antspyx", "bids2table"),
)
_INTERRUPTED = (75, 130, 143)  # exit codes: a signal after which the same command goes on, Ctrl-C, SIGTERM


# --- What is written ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure(Checked):
    """One thing that could not be done: a scan, mostly.

    Attributes:
        scan: Its name.
        error: Why.
        kind: The same without what is of this scan alone; see `kind_of`.
    """

    scan: str
    error: str
    kind: str


@dataclass(frozen=True)
class Step(Checked):
    """One part of a run.

    Attributes:
        seconds: That it took; of what several processes did at once, the sum of theirs.
        unit: What is gone through in it, such as "scan"; "" where nothing is counted.
        of: How many of these there were to do, those of an earlier run among them; None where nobody knows.
        done: How many it has gone through, whatever came of each, with those of an earlier run.
        earlier: How many of them were done by an earlier run.
    """

    seconds: float
    unit: str = ""
    of: int | None = None
    done: int = 0
    earlier: int = 0


@dataclass(frozen=True)
class RunReport(Checked):
    """What a report says. In the file, `details` stand beside the other fields.

    Attributes:
        command: Such as "brainfm embed".
        arguments: What it was given, defaults among them.
        state: "done", "failed" by an error, "interrupted" by a person or a signal; or "running": it has not ended, or
            was killed.
        error: Why it failed.
        exit_code: Of the command; 1 also where it is done, and some of its scans failed.
        started, ended: In UTC, by ISO 8601; None where it has not ended.
        seconds: Between the two.
        versions: Of Python, brainfm, and the packages that may change what it does.
        machine: Its name, system and processor, the cores that the process may use, and the process's number.
        inputs: Where what was read is.
        output: Where what was written is.
        unit: What is counted in the following: "scan", or "run", "step", "volume", "encoder".
        asked: How many of these were asked for; None where the run did not come so far.
        done: How many are there now, with those of an earlier run.
        of_an_earlier_run: How many of them were there before.
        failed: Those that could not be done, and why.
        failures: How many failed by each kind.
        left_out: What of the inputs is not among those asked for, and why.
        steps: The parts of the run, in their order.
        peak_memory: The most bytes that this process has held, or one of its own of which it knows.
        peak_gpu_memory: The most bytes that torch has held on a GPU; None without one.
        details: What this command has to say beside that.
    """

    command: str
    arguments: dict[str, Any]
    state: State
    started: str
    versions: dict[str, str]
    machine: dict[str, Any]
    error: str = ""
    exit_code: int | None = None
    ended: str | None = None
    seconds: float = 0.0
    inputs: tuple[str, ...] = ()
    output: str | None = None
    unit: str = "scan"
    asked: int | None = None
    done: int = 0
    of_an_earlier_run: int = 0
    failed: tuple[Failure, ...] = ()
    failures: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    steps: dict[str, Step] = field(default_factory=dict)
    peak_memory: int | None = None
    peak_gpu_memory: int | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        content = self.to_dict()
        details = content.pop("details")
        write_json(path, content | {name: value for name, value in details.items() if name not in content})


def read_report(path: Path) -> RunReport:
    """The report that a file holds. Raises BrainfmError where it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        own = {item.name for item in fields(RunReport)}
        known = {name: value for name, value in content.items() if name in own}
        return RunReport.from_dict(known | {"details": {k: v for k, v in content.items() if k not in own}})
    except (OSError, ValueError, AttributeError) as error:
        raise BrainfmError(f"{path}: no report of a run ({one_line(error)})") from error


def kind_of(error: str, scan: str = "") -> str:
    """A failure without what is of one scan alone: its name and path, numbers, and the advice after a semicolon.

    Example:
        >>> kind_of("/data/sub-01_T1w.nii.gz: a slab: 9 slices; give the T1w scan of the whole head")
        'a slab: … slices'
    """
    said = error.removeprefix(f"{scan}: ").split("; ")[0]
    while re.match(r"[^:]*[/\\][^:]*: |\S*(\.|sub-)\S*: ", said):
        said = said.partition(": ")[2]
    said = re.sub(r"\S*[/\\]\S*", "…", said)
    return re.sub(r"\d+([.,×x]\d+)*(e[+-]?\d+)?", "…", said)[:120].strip() or error[:120]


# --- The run that is reported ---------------------------------------------------------------------


class Ongoing:
    """A step under way: entered as a context, gone `through`, or told of each thing by `update`."""

    def __init__(self, unit: str, of: int | None, done: int) -> None:
        self.seconds, self.unit, self.of, self.earlier = 0.0, unit, of, done
        self.done: float = done
        self._begun: list[float] = []

    def __enter__(self) -> Ongoing:
        self._begun.append(time.monotonic())
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.monotonic() - self._begun.pop()

    def through(self, items: Iterable[T]) -> Iterator[T]:
        """The things that are gone through, each counted when the next is asked for."""
        with self:
            for item in items:
                yield item
                self.update()

    def update(self, many: float = 1) -> None:
        """So many more are done, or parts of one."""
        self.done += many

    def follow(self, bar: Any) -> None:
        """Last as long as a bar of tqdm, and count what that is told of, whether it is drawn or not."""
        update, close = bar.update, bar.close
        self.__enter__()
        is_open = [True]

        def updated(many: float = 1) -> Any:
            self.update(many)
            return update(many)

        def closed() -> None:
            if is_open:
                is_open.clear()
                self.__exit__()
            close()

        bar.update, bar.close = updated, closed

    def said(self) -> Step:
        """What is written of it, now."""
        since = time.monotonic() - self._begun[0] if self._begun else 0.0
        return Step(round(self.seconds + since, 3), self.unit, self.of, int(self.done + 1e-6), self.earlier)


class Run:
    """What is known of a run so far; each attribute is a field of `RunReport`, and is written as that."""

    def __init__(
        self,
        command: str = "",
        arguments: Mapping[str, Any] | None = None,
        inputs: Iterable[str] = (),
        output: str | None = None,
        unit: str = "scan",
    ) -> None:
        self.command, self.arguments, self.inputs, self.output = command, dict(arguments or {}), tuple(inputs), output
        self.unit = unit
        self.asked: int | None = None
        self.done = self.of_an_earlier_run = 0
        self.failed: dict[tuple[str, str], Failure] = {}
        self.left_out: dict[str, str] = {}
        self.details: dict[str, Any] = {}
        self.error = ""
        self._held = 0
        self._steps: dict[str, Ongoing] = {}
        self._paths: list[Path] = []
        self._started, self._clock = _now(), time.monotonic()

    def step(self, name: str, unit: str = "", of: int | None = None, done: int = 0) -> Ongoing:
        """A part of the run, to be entered; one that comes again goes on."""
        step = self._steps.get(name)
        if step is None:
            return self._steps.setdefault(name, Ongoing(unit, of, done))
        if of is not None:
            step.of = (step.of or 0) + of
        step.done += done
        step.earlier += done
        return step

    def took(self, name: str, seconds: float, unit: str = "") -> None:
        """A step of one thing that took so long, in another process perhaps."""
        step = self.step(name, unit)
        step.seconds += seconds
        step.update()

    def waited(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """Things that come, and how long each was waited for as a step."""
        iterator, nothing = iter(items), object()
        while True:
            with self.step(name):
                item: Any = next(iterator, nothing)
            if item is nothing:
                return
            yield item

    def fail(self, scan: str, error: str) -> None:
        """A scan failed; said twice, it is one failure."""
        self.failed.setdefault((scan, error), Failure(scan, error, kind_of(error, scan)))

    def held(self, memory: float) -> None:
        """Another process of this run has held so many bytes."""
        self._held = max(self._held, int(memory))

    def also(self, path: Path) -> None:
        """Write the report to a further file; outside of any run to none. Raises BrainfmError and OSError."""
        if self.command and launched().rank == 0:
            _check_place(path)
            self.report("running").save(path)
            self._paths.append(path)

    def check_apart(self, files: Iterable[Path]) -> None:
        """Raise BrainfmError where the report would be one of these files, and leave that name to who writes them."""
        own = [path.resolve() for path in files]
        for path in self._paths:
            if path.resolve() in own:
                self._paths.remove(path)
                path.unlink(missing_ok=True)
                raise BrainfmError(f"{path}: is written with the table; give the report another name")

    def report(self, state: State, exit_code: int | None = None) -> RunReport:
        """What is known now. Where nobody has told the counts yet, they are those of the step that goes through all."""
        steps = {name: step.said() for name, step in self._steps.items()}
        of_all = next((step for step in steps.values() if step.unit == self.unit and step.of is not None), None)
        counts = (self.asked, self.done, self.of_an_earlier_run)
        if self.asked is None and of_all is not None:
            failed = len(self.failed) if self.unit == "scan" else 0
            counts = (of_all.of, max(0, of_all.done - failed), of_all.earlier)
        memory = [self._held, peak_memory() or 0]
        return RunReport(
            command=self.command,
            arguments=self.arguments,
            state=state,
            started=self._started,
            versions=_versions(),
            machine=_machine(),
            error=self.error,
            exit_code=exit_code,
            ended=None if state == "running" else _now(),
            seconds=round(time.monotonic() - self._clock, 3),
            inputs=self.inputs,
            output=self.output,
            unit=self.unit,
            asked=counts[0],
            done=counts[1],
            of_an_earlier_run=counts[2],
            failed=tuple(self.failed.values()),
            failures=dict(Counter(failure.kind for failure in self.failed.values()).most_common()),
            left_out=dict(self.left_out),
            steps=steps,
            peak_memory=max(memory) or None,
            peak_gpu_memory=_peak_gpu_memory(),
            details=self.details,
        )

    def end(self, error: BaseException | None) -> None:
        """Write how it ended. Raises OSError where that cannot be written, and the run itself did not fail."""
        ended = self.report(*self._ending(error))
        for path in self._paths:
            try:
                ended.save(path)
            except OSError as why:
                if error is None:
                    raise
                logger.warning("%s: the report is not written (%s)", path, one_line(why))

    def _ending(self, error: BaseException | None) -> tuple[State, int]:
        code = _exit_code(error)
        if code in _INTERRUPTED:
            return "interrupted", code
        if error is not None and not isinstance(error, SystemExit) and type(error).__name__ != "Exit":  # click's
            self.error = f"{type(error).__name__}: {one_line(error)}"
        return "failed" if self.error else "done", code


def _exit_code(error: BaseException | None) -> int:
    """What a command ends with, by an error, or by an exit that it asks for."""
    if isinstance(error, KeyboardInterrupt | RunInterruptedError):
        return 130 if isinstance(error, KeyboardInterrupt) else 75
    code = error.code if isinstance(error, SystemExit) else getattr(error, "exit_code", int(error is not None))
    return code if isinstance(code, int) else int(code is not None)


_current: ContextVar[Run | None] = ContextVar("brainfm run", default=None)


def current() -> Run:
    """The run that is reported, or one that nobody will hear of."""
    return _current.get() or Run()


@contextmanager
def reporting(
    path: str | os.PathLike[str] | None,
    command: str,
    arguments: Mapping[str, Any] | None = None,
    inputs: Iterable[str] = (),
    output: str | None = None,
    unit: str = "scan",
) -> Iterator[Run]:
    """Report what is done in the block as a run: to a file, or to none for what asks for one later (`Run.also`).

    SIGTERM, by which schedulers end what has used up its time, ends the block like an error, so that the report is
    written; the exit code is 143. Under torchrun the first process writes.

    Raises:
        BrainfmError: The file would not be .json, or holds something else than a report.
    """
    run = Run(command, arguments, inputs, output, unit)
    token = _current.set(run)
    try:
        with _ended_by_sigterm():
            if path is not None:
                run.also(expanded(path))
            yield run
    except BaseException as error:
        run.end(error)
        raise
    else:
        run.end(None)
    finally:
        _current.reset(token)


def _check_place(path: Path) -> None:
    if path.suffix != ".json":
        raise BrainfmError(f"{path}: a report is written as .json; give the report another name")
    if path.exists():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            is_report = isinstance(content, dict) and {"seconds", "failed"} <= content.keys()
        except (OSError, ValueError):
            is_report = False
        if not is_report:
            raise BrainfmError(f"{path}: holds something else, which is not overwritten; give the report another name")


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Where nobody else listens, SIGTERM raises SystemExit; in processes that this one forks it ends them at once.

    Not in a process group: whoever started that ends all of them, and one that tidies up would wait for the others.
    """
    own = os.getpid()

    def end(*_: object) -> None:
        if os.getpid() != own:
            os._exit(143)
        raise SystemExit(143)

    alone = threading.current_thread() is threading.main_thread() and launched().world == 1
    if not alone or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"brainfm": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _machine() -> dict[str, Any]:
    return {
        "name": platform.node(),
        "system": platform.platform(),
        "processor": platform.machine(),
        "cores": available_cores(),
        "process": os.getpid(),
    }


def _peak_gpu_memory() -> int | None:
    torch = sys.modules.get("torch")  # who has not imported it has used no GPU
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return max(int(torch.cuda.max_memory_allocated(number)) for number in range(torch.cuda.device_count()))
