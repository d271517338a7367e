"""What README shows is what the program says and does."""

from __future__ import annotations

from pathlib import Path

import brainfm
from brainfm import registry
from brainfm.hub.card import model_table, plain_monai
from brainfm.registry import network_of

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def page(name):
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def test_pages_show_the_lines_that_cards_show():
    """Those of the cards are run by tests/hub/test_card.py."""
    assert plain_monai(*network_of("simclr_resnet18_3d"), in_chans=1) in page("pipeline")


def test_readme_shows_the_table_of_the_registry(monkeypatch):
    """`python .ci/make_readme_table.py` writes it."""
    monkeypatch.setattr(registry, "_registered", {})  # what other tests may have added to this package's cards
    assert f"<!-- models -->\n{model_table()}\n<!-- /models -->" in README


def test_readmes_table_names_every_model(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    assert [name for name in brainfm.list_models() if f"`{name}`" not in README] == []


def test_readme_and_the_site_begin_with_the_same_lines():
    lines = README.partition("```python\n")[2].partition("```")[0]
    assert "create_transform(model)" in lines
    assert lines in page("index")


def test_pages_show_the_contract_as_describe_prints_it(spec):
    assert brainfm.describe(spec) in page("how_it_knows")


def test_readme_is_a_screen_and_a_half():
    """Without its table; what it had stands on the pages that it leads to."""
    head, _, rest = README.partition("<!-- models -->")
    assert len((head + rest.partition("<!-- /models -->")[2]).splitlines()) <= 70
