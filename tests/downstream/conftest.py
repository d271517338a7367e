"""Phantoms with labels, and their embeddings, made once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from brainfm.cli import main
from brainfm.downstream import outcome, probe, report, runs
from brainfm.downstream.figures import drawings
from brainfm.phantom import make_cohort


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """A manifest of 20 phantoms at 4 mm, one scan each."""
    return make_cohort(20, tmp_path_factory.mktemp("labelled"), spacing=4.0, seed=3)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Evaluations with few resamples and no figures, which take most of their time, but where a file tests these."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (runs, outcome):
            patch.setattr(module, "RESAMPLES", 50)
        patch.setattr(report, "drawings", lambda run: [])
        yield patch


@pytest.fixture(scope="module")
def few_strengths():
    """A probe chooses among two strengths: how it does is tested in test_probe.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "LOGISTIC_C", (0.01, 1.0))
        patch.setattr(probe, "RIDGE_ALPHA", (10.0, 1000.0))
        yield


@pytest.fixture
def figures(monkeypatch):
    """Reports with their figures."""
    monkeypatch.setattr(report, "drawings", drawings)


@pytest.fixture
def no_figures(monkeypatch):
    """Reports without them, in a file that has a `quick` of its own."""
    monkeypatch.setattr(report, "drawings", lambda run: [])


@pytest.fixture
def run():
    """Runs `brainfm …` in this process; gives its exit code and all that it says."""

    def call(*arguments):
        done = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return SimpleNamespace(code=done.exit_code, said=done.output)

    return call
