"""Every public name says what it takes, gives and raises, by an example that runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import shutil

import pytest

import brainfm
from brainfm import registry
from brainfm.contract import operation

MORE = {  # beside brainfm.__all__: what is there to be called in its parts
    "hub": None,
    "train": None,
    "downstream": ("predict", "compare_encoders"),
    "prep.batch": ("prepare_all",),
    "view": ("write_view",),
}
# Their examples need what takes minutes to make. What they say is run by tests/downstream and tests/prep.
TOO_SLOW = {"downstream.predict", "downstream.compare_encoders", "prep.batch.prepare_all"}
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def public():
    found = {name: getattr(brainfm, name) for name in brainfm.__all__}
    for part, names in MORE.items():
        module = importlib.import_module(f"brainfm.{part}")
        found |= {f"{part}.{name}": getattr(module, name) for name in names or module.__all__}
    return found


PUBLIC = public()


def gaps(name, thing):
    """What a docstring leaves open."""
    text = inspect.getdoc(thing) or ""
    said = set(re.findall(r"^ {4}\*{0,2}(\w+)(?:, \w+)*:", text, re.MULTILINE))
    an_error = inspect.isclass(thing) and issubclass(thing, Exception)  # which callers catch, and do not make
    parameters = [] if an_error else list(inspect.signature(thing).parameters)
    found = [f"{name}: no word of {parameter}" for parameter in parameters if parameter not in said]
    if not inspect.isclass(thing):
        gives = inspect.signature(thing).return_annotation not in (None, "None")
        found += [f"{name}: no Returns"] * (gives and "Returns:\n" not in text)
        found += [f"{name}: nothing of what it raises"] * (not re.search(r"Raises:\n|\braises\b", text))
    return found + [f"{name}: no example"] * ("Example:\n" not in text or ">>>" not in text)


def test_no_public_name_leaves_anything_open():
    assert len(PUBLIC) > 45
    assert [gap for name, thing in PUBLIC.items() for gap in gaps(name, thing)] == []


def test_gaps_are_found():
    def scale(volume, factor: float) -> float:
        """Scale a volume.

        Args:
            volume: [z, y, x].
        """

    assert gaps("scale", scale) == [
        "scale: no word of factor",
        "scale: no Returns",
        "scale: nothing of what it raises",
        "scale: no example",
    ]


@pytest.fixture
def here(hub, small_sample, tmp_path, monkeypatch):
    """A folder with the sample scan at 4 mm and its mask, and a Hub that can be written to."""
    for path in small_sample:
        shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "write-token")
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(operation, "_operations", dict(operation._operations))
    monkeypatch.setattr("brainfm.hub.golden.compute", lambda model: None)


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - TOO_SLOW))
def test_example_runs(name, here):
    said = []
    example = doctest.DocTestParser().get_doctest(inspect.getdoc(PUBLIC[name]), {}, name, None, None)
    assert example.examples
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    runner.run(example, out=said.append)
    assert runner.failures == 0, "".join(said)
