"""Phantoms with labels, and their embeddings, made once."""

from __future__ import annotations

import pytest

from brainfm.phantom import make_cohort


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """A manifest of 40 phantoms at 4 mm, one scan each."""
    return make_cohort(40, tmp_path_factory.mktemp("labelled"), spacing=4.0, seed=3)
