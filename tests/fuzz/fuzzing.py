"""What every fuzzed file must come to: a result or one line of refusal, soon, and in little memory.

As tests run by default the examples are few and the same every time. `HYPOTHESIS_PROFILE=long pytest tests/fuzz -n 0`
draws new ones, a hundred times as many; `BRAINFM_FUZZ_TIMES=1000` says how many times as many.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from brainfm import BrainfmError

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
TIMES = int(os.environ.get("BRAINFM_FUZZ_TIMES", "100" if LONG else "1"))
SECONDS = 20  # of a processor, for one example: hundreds of times what it takes
WAITING = 300  # seconds, on a machine however busy, of an example that waits for something
MEGABYTES = 512

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def examples(number: int) -> settings:
    """A test's budget: `number` examples in CI."""
    return settings(
        max_examples=number * TIMES,
        derandomize=not LONG,
        database=None,
        deadline=None,  # `bounded` ends an example that hangs, which a deadline does not
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
    )


class _Hang(BaseException):
    """Not an Exception: what catches those must not catch this one."""


@contextmanager
def bounded(seconds: int = SECONDS, megabytes: int = MEGABYTES) -> Iterator[None]:
    """Fail where the block takes longer, or more memory on top of what the process has."""

    def hangs(*_: Any) -> None:
        raise _Hang

    timers = {}
    if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
        timers = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, WAITING)}
    before = {number: signal.signal(number, hangs) for number in timers}
    for timer, limit in timers.values():
        signal.setitimer(timer, limit)
    start = _peak(reset=True)
    try:
        yield
    except _Hang:
        raise AssertionError(f"no end after {seconds} s of a processor, or {WAITING} s") from None
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])
    taken = (_peak() - start) // 1024
    assert taken < megabytes, f"took {taken} MB"


def _peak(reset: bool = False) -> int:
    """The most memory that this process had, in kB, since it was reset; 0 where the system does not say."""
    if not _CLEAR.exists():
        return 0
    if reset:
        _CLEAR.write_text("5")
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    return int(found[1]) if found else 0


def outcome(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a function gives, or the BrainfmError that it raises, whose message is one line. All else is a failure."""
    with bounded():
        try:
            return function(*args, **kwargs)
        except BrainfmError as error:
            said = str(error)
            assert said.strip(), "an error without a word"
            assert len(said.splitlines()) == 1, said
            assert said.isprintable(), said
            assert len(said) <= 4001, said
            return error


class File(bytes):
    """A file's content, of which a failing example is not to print all."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


@st.composite
def damaged(draw: Callable[[Any], Any], content: bytes, where: int | None = None) -> bytes:
    """A file's content with bytes changed (before `where`), and perhaps cut off, repeated, or with more after it."""
    changed = bytearray(content)
    for place in draw(st.lists(st.integers(0, (where or len(content)) - 1), max_size=4)):
        changed[place] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
    kind = draw(st.sampled_from(["whole", "whole", "cut", "twice", "longer"]))
    if kind == "cut":
        del changed[draw(st.integers(0, len(changed))) :]
    elif kind == "twice":
        start = draw(st.integers(0, len(changed)))
        changed[start:start] = changed[start : start + draw(st.integers(1, 64))]
    elif kind == "longer":
        changed += draw(st.binary(min_size=1, max_size=64))
    return File(changed)


# What stands where something else is meant, in JSON and YAML.
ODD = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, -1, 1, 3, 2**31, 2**63, 10**30, -(10**30), 0.5, 1e300, float("nan"), float("inf")])
    | st.sampled_from(
        ["", "\0", "a\nb", "__class__", "../..", "1e3", "\ud800", "x" * 3000, "RAS", "mean", "{x.__class__}"]
    )
    | st.text(max_size=8)
    | st.recursive(
        st.none(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    )
)


@st.composite
def mutated(draw: Callable[[Any], Any], data: Any) -> Any:
    """Plain data with up to three of its parts replaced, renamed, left out, or given twice."""
    import copy

    data = copy.deepcopy(data)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(data))
        if not places:
            return draw(ODD)
        parent, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(["odd", "odd", "odd", "near", "gone", "renamed", "nested", "exchanged"]))
        old = parent[key]
        if kind == "gone":
            del parent[key]
        elif kind == "renamed" and isinstance(parent, dict):
            parent[draw(st.text(max_size=6))] = parent.pop(key)
        elif kind == "near" and isinstance(old, int | float) and not isinstance(old, bool):
            parent[key] = draw(st.sampled_from([old + 1, old - 1, -old, old * 1000, float(old), str(old)]))
        elif kind == "nested":
            for _ in range(draw(st.sampled_from([1, 2, 50]))):
                old = [old] if draw(st.booleans()) else {"x": old}
            parent[key] = old
        elif kind == "exchanged":
            other, name = draw(st.sampled_from(places))
            parent[key] = copy.deepcopy(other[name])
        else:
            parent[key] = draw(ODD)
    return data


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every part of plain data, by what holds it and its key there."""
    for key, value in list(data.items() if isinstance(data, dict) else enumerate(data)):
        yield data, key
        if isinstance(value, dict | list):
            yield from _places(value)
