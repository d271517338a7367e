"""What README shows is what the program says and does."""

from __future__ import annotations

from pathlib import Path

import pytest

import brainfm
from brainfm import registry
from brainfm.cli import main
from brainfm.hub.card import model_table, plain_monai
from brainfm.registry import network_of

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_readme_shows_the_lines_that_cards_show():
    """Those of the cards are run by tests/hub/test_card.py."""
    assert plain_monai(*network_of("simclr_resnet18_3d"), in_chans=1) in README


def test_readme_shows_the_table_of_the_registry(monkeypatch):
    """`python .ci/make_readme_table.py` writes it."""
    monkeypatch.setattr(registry, "_registered", {})  # what other tests may have added to this package's cards
    assert f"<!-- models -->\n{model_table()}\n<!-- /models -->" in README


def test_readme_shows_the_contract_as_describe_prints_it(spec):
    assert brainfm.describe(spec) in README


@pytest.mark.parametrize("name", sorted(set(main.commands) - {"list"}))
def test_every_command_is_in_the_readme(name):
    assert f"brainfm {name}" in README
