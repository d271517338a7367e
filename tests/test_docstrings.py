"""Every public name says what it takes, gives and raises, by an example that runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import shutil
from pathlib import Path

import generate
import pytest
import torch

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


# What the words about a parameter, an attribute or a result must say, by its type: the first rule that fits it holds.
SHAPE = r"\[[^\]`]*\]|\bscalar\b|\bmatri(x|ces)\b"  # [B, C, D, H, W], [scans, width] or [4, 4]
UNIT = (
    r"(?i)\b(mm|millimetres?|s|seconds|GB|MB|voxels?|degrees|radians|years?|fractions?|percent\w*|probabilit\w+|unit\w*|ratio|"
    r"cosines?|logarithm|times|quantile|standard deviations?|no unit|intensit\w+)\b|%|±| from -?\d+ to \d+"
)
PLACE = r"\b(files?|folders?|paths?|repository|directory)\b|\.\w{2,5}\b"
TYPES = (
    ("a shape", r"^(?!dict).*(Tensor|NDArray|ndarray)", SHAPE),
    ("a unit", r"\bfloat\b", UNIT),
    ("what stands there", r"\bPath(Like)?\b", PLACE),
)
ELSEWHERE = r"\b[Aa]s (of|in|for|with|to) `|\bAs `"  # the words stand at the name that is given


def told(text):
    """Name → the words about it in a docstring's Args and Attributes; "Returns" → those about the result."""
    found = {}
    for names, words in re.findall(r"^ {4}\*{0,2}(\w+(?:, \w+)*): (.*(?:\n {5,}.*)*)", text, re.MULTILINE):
        found |= dict.fromkeys(names.split(", "), words)
    result = re.search(r"^Returns:\n((?: {4}.*\n?|\n(?= {4}))*)", text, re.MULTILINE)
    return found | {"Returns": result[1] if result else ""}


def unmeasured(name, thing, whole=False):
    """The arrays, quantities and paths of which a docstring does not say the shape, the unit or what they are.

    Of a method (`whole`) the words may stand anywhere in its docstring.
    """
    text = inspect.getdoc(thing) or ""
    signature, words = inspect.signature(thing), told(text)
    typed = {one.name: one.annotation for one in signature.parameters.values()}
    if not inspect.isclass(thing):
        typed["Returns"] = signature.return_annotation
    for parameter, annotation in typed.items():
        said = text if whole else words.get(parameter, "")
        rule = next((rule for rule in TYPES if re.search(rule[1], str(annotation))), None)
        if rule and not re.search(f"{rule[2]}|{ELSEWHERE}", said):
            yield f"{name}: {parameter} is {annotation}, without {rule[0]}"


def in_the_reference():
    """Every name that the site's reference has, without the errors and what is a type's name only."""
    for part in generate.modules():
        module = importlib.import_module(f"brainfm.{part}".rstrip("."))
        for name in generate.public(module):
            thing = getattr(module, name)
            if inspect.isfunction(thing) or (inspect.isclass(thing) and not issubclass(thing, Exception)):
                yield f"{part}.{name}".lstrip("."), thing


def with_methods():
    """Every public name, and the methods that a public class defines itself, which have docstrings of their own."""
    for name, thing in {id(thing): (name, thing) for name, thing in [*PUBLIC.items(), *in_the_reference()]}.values():
        if inspect.isclass(thing) and issubclass(thing, Exception):
            continue
        yield name, thing, False
        for method, function in vars(thing).items() if inspect.isclass(thing) else ():
            if inspect.isfunction(function) and method[0] != "_" and function.__doc__:
                yield f"{name}.{method}", function, True


def test_every_array_has_a_shape_and_every_quantity_a_unit():
    assert [gap for name, thing, whole in with_methods() for gap in unmeasured(name, thing, whole)] == []


def test_arrays_without_a_shape_and_quantities_without_a_unit_are_found():
    def scale(volume: torch.Tensor, factor: float, width: float, output: Path) -> torch.Tensor:
        """Scale a volume.

        Args:
            volume: What is scaled.
            factor: By how much.
            width: Of the kernel,
                in mm.
            output: Where it goes, a file.

        Returns:
            [z, y, x].
        """

    assert list(unmeasured("scale", scale)) == [
        "scale: volume is torch.Tensor, without a shape",
        "scale: factor is float, without a unit",
    ]


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
