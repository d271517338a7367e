"""What README shows is what the program says and does."""

from __future__ import annotations

from pathlib import Path

import pytest

import brainfm
from brainfm.cli import main
from brainfm.hub.card import plain_monai

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_readme_shows_the_lines_that_cards_show():
    """Those of the cards are run by tests/hub/test_card.py."""
    assert plain_monai(brainfm.get_pretrained_cfg("simclr_resnet18_3d")) in README


def test_readme_shows_the_contract_as_describe_prints_it(spec):
    assert brainfm.describe(spec) in README


@pytest.mark.parametrize("name", sorted(set(main.commands) - {"list"}))
def test_every_command_is_in_the_readme(name):
    assert f"brainfm {name}" in README
