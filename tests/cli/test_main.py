"""All commands: help, version, and that an error is one clear line and exit code 1."""

from __future__ import annotations

import subprocess
import sys

import pytest

import brainfm


def in_a_process(*arguments):
    """Runs `brainfm …` in a process of its own."""
    command = [sys.executable, "-m", "brainfm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_debug_shows_the_traceback_and_nothing_else_does():
    plain, debug = (in_a_process(*flags, "info", "nothing_like_it") for flags in ((), ("--debug",)))
    assert (plain.returncode, debug.returncode) == (1, 1)
    assert "Traceback" not in plain.stderr
    assert "Traceback" in debug.stderr
    assert "ModelNameError: unknown model 'nothing_like_it'" in debug.stderr


def test_version_is_the_packages(run):
    result = run("--version")
    assert result.code == 0
    assert brainfm.__version__ in result.out


STARTED = """
import sys
from brainfm.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
loaded = {"torch", "monai", "numpy", "pandas"} & sys.modules.keys()
print(*sorted(loaded), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "loaded"),
    [
        (("--help",), ""),
        (("embed", "--help"), ""),
        (("list",), ""),
        (("list", "--json"), ""),
        (("info", "simclr_resnet18_3d"), "numpy"),
        (("info", "--json", "simclr_resnet18_3d"), "numpy"),
        (("info", "simclr_resnet18_3d", "--overlap", "ADNI"), "numpy"),
    ],
)
def test_what_needs_no_network_imports_none(arguments, loaded):
    command = [sys.executable, "-c", STARTED, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout
    assert ended.stderr.split() == loaded.split()


@pytest.mark.parametrize(
    "command", [(), ("list",), ("info",), ("demo",), ("embed",), ("fetch",), ("convert",), ("push",), ("verify",)]
)
def test_help_is_there_for_every_command(command, run):
    result = run(*command, "--help")
    assert result.code == 0
    assert "Usage:" in result.out
