"""Phantoms with labels, and their embeddings, made once."""

from __future__ import annotations

import pytest

from brainfm.phantom import make_cohort


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """A manifest of 20 phantoms at 4 mm, one scan each."""
    return make_cohort(20, tmp_path_factory.mktemp("labelled"), spacing=4.0, seed=3)


@pytest.fixture
def no_figures(monkeypatch):
    """Reports without their figures, which take most of the time of one."""
    monkeypatch.setattr("brainfm.downstream.report.drawings", lambda run: [])
