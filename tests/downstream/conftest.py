"""Phantoms with labels, and their embeddings, made once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from brainfm.cli import main
from brainfm.phantom import make_cohort


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """A manifest of 20 phantoms at 4 mm, one scan each."""
    return make_cohort(20, tmp_path_factory.mktemp("labelled"), spacing=4.0, seed=3)


@pytest.fixture
def no_figures(monkeypatch):
    """Reports without their figures, which take most of the time of one."""
    monkeypatch.setattr("brainfm.downstream.report.drawings", lambda run: [])


@pytest.fixture
def run():
    """Runs `brainfm …` in this process; gives its exit code and all that it says."""

    def call(*arguments):
        done = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return SimpleNamespace(code=done.exit_code, said=done.output)

    return call
