"""The command line, run in the tests' own process."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from brainfm.cli import main


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs `brainfm …` in this process; gives its exit code, its output and its lines on stderr."""
    monkeypatch.setattr(logging.getLogger("brainfm"), "handlers", [])  # those of a test go with its stderr

    def call(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        written = capsys.readouterr()
        return SimpleNamespace(code=caught.value.code, out=written.out, err=written.err.splitlines())

    return call
