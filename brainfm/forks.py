"""Processes of `multiprocessing` that are forked, on Linux, by a server which has done their imports.

So these are paid for once; elsewhere forks are unsafe with the system's own libraries, and each process does its own.
Nothing that takes time is imported here: the server may begin while its parent imports what it needs itself.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver, resource_tracker
from typing import Any

FORKS = sys.platform == "linux"
WITHOUT_GUARD = 78  # exit code of a process that found itself in the script that had started it


def get_context() -> Any:
    """How such processes are started here, as `multiprocessing.get_context` has it."""
    return multiprocessing.get_context("forkserver" if FORKS else "spawn")


def start_server(imported: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    """Start the server, where there is one and it is not running: with these modules, and in this environment.

    Neither it nor what it forks hears of Ctrl-C, which is for the parent: that ends what it has started.
    """
    if not FORKS:
        return
    before = dict(os.environ)
    os.environ |= environment or {}
    resource_tracker.ensure_running()  # as the server would, after which SIGINT is heard
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.set_forkserver_preload(list(imported))
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)
        os.environ.clear()
        os.environ |= before


def end_without_guard() -> None:
    """End this process where it is being started and runs the script again that started it: that has no guard."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(WITHOUT_GUARD)  # what began it says so


def guard_is_missing(called: str, of_what: str) -> str:
    """What to say where a process ended with `WITHOUT_GUARD`: the function that was called, and whose process it is."""
    script = getattr(sys.modules["__main__"], "__file__", "the script")
    return (
        f"{script}: calls {called} without a guard, and each {of_what}'s process would run it again; put the call "
        'below if __name__ == "__main__":'
    )
