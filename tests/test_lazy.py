"""What `import brainfm` alone gives: names and parts, imported when they are first asked for."""

import importlib

import pytest

import brainfm


@pytest.mark.parametrize(
    "name", ["contract", "downstream", "hub", "models", "phantom", "prep", "scan", "table", "train"]
)
def test_part_is_there_without_an_import_of_its_own(name, monkeypatch):
    monkeypatch.delattr(brainfm, name, raising=False)  # another test may have asked for it
    assert getattr(brainfm, name) is importlib.import_module(f"brainfm.{name}")
    assert name in dir(brainfm)


def test_what_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'brainfm' has no attribute 'trian'"):
        brainfm.trian  # noqa: B018
