"""The server that forks processes: what it has imported, in which environment, and that Ctrl-C is not for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from brainfm import forks

pytestmark = pytest.mark.skipif(not forks.FORKS, reason="processes are forked on Linux only")

# Starts the server with a module that is slow to import, waits for Ctrl-C, and says what a forked process sees.
SCRIPT = """
import multiprocessing, os, sys, time
from brainfm import forks

def work(answer):
    answer.send((slow.PID == os.getppid(), os.environ["OF_THE_SERVER"]))

def run():
    forks.start_server(["slow"], {"OF_THE_SERVER": "1"})
    assert "OF_THE_SERVER" not in os.environ
    forks.start_server(["other"])  # it is running
    try:
        time.sleep(300)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    ours, theirs = forks.get_context().Pipe(duplex=False)
    process = forks.get_context().Process(target=work, args=(theirs,))
    process.start()
    theirs.close()
    print(*ours.recv())
    process.join()

if __name__ == "__main__":
    run()
else:
    import slow  # as the process that is forked sees it
"""
SLOW = "import os, pathlib, time\nPID = os.getpid()\npathlib.Path('begun').touch()\ntime.sleep(2)\n"


def test_server_has_imported_what_it_should_and_does_not_hear_of_ctrl_c(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "script.py").write_text(SCRIPT)
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler), "start_new_session": True}
    process = subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **heard,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it, to all of the group
    said, complaints = process.communicate(timeout=120)
    assert said.split() == ["interrupted", "True", "1"]
    assert not complaints
    assert process.returncode == 0


def test_process_without_a_guard_is_told_what_to_do():
    said = forks.guard_is_missing("prepare_all", "scan")
    assert "calls prepare_all without a guard, and each scan's process" in said
    assert said.endswith('put the call below if __name__ == "__main__":')
