"""Operations as data, and operations of others."""

from __future__ import annotations

import doctest
import json
from dataclasses import dataclass

import numpy as np
import pytest
import yaml
from volumes import EVERY, kind, scan

import brainfm
from brainfm import InputSpec, contract
from brainfm.contract import (
    CropForeground,
    DivideByMean,
    MinMax,
    Operation,
    Pad,
    Resize,
    Volume,
    ZScore,
    with_image,
)
from brainfm.contract.operation import _operations


def test_every_operation_of_the_package_is_tested_here():
    public = {value for value in vars(contract).values() if isinstance(value, type) and issubclass(value, Operation)}
    assert {type(operation) for operation in EVERY} == public - {Operation}


@pytest.mark.parametrize("operation", EVERY, ids=kind)
def test_an_operation_leaves_the_volume_it_is_given(operation):
    volume, twin = scan(), scan()
    assert isinstance(operation, Operation)
    assert operation(volume) is not volume
    for name in ("stored", "mask", "affine"):
        np.testing.assert_array_equal(getattr(volume, name), getattr(twin, name))


@pytest.mark.parametrize("operation", [*EVERY, Pad((1, 2, 3), -1.5), ZScore(), Resize((4, 4, 4))], ids=kind)
def test_an_operation_survives_json(operation):
    assert Operation.from_dict(json.loads(json.dumps(operation.to_dict()))) == operation


def test_what_json_leaves_out_takes_its_default():
    assert Operation.from_dict({"op": "ZScore", "region": "mask"}) == ZScore("mask")


@pytest.mark.parametrize("data", [{"op": "Blur"}, {"op": "ScanError"}, {"region": "all"}, {}])
def test_an_unknown_operation_is_refused_with_the_known_ones(data):
    with pytest.raises(ValueError, match="ZScore"):
        Operation.from_dict(data)


def test_an_unknown_parameter_is_refused_by_name():
    with pytest.raises(ValueError, match="ZScore has no field sigma; it has region"):
        Operation.from_dict({"op": "ZScore", "sigma": 2})


@pytest.mark.parametrize(
    ("data", "allowed"),
    [
        ({"op": "ZScore", "region": "brain"}, "mask"),
        ({"op": "ZScore", "eps_rule": "plus"}, "under_root"),
        ({"op": "ZScore", "background": "mean"}, "noise"),
        ({"op": "ZScore", "method": "welford"}, "one_pass"),
        ({"op": "ZScore", "ddof": 2}, "0 or 1"),
        ({"op": "ZScore", "region": ["mask"]}, "mask"),
        ({"op": "Resize", "shape": [4, 4, 4], "mode": "bicubic"}, "area"),
        ({"op": "Resample", "spacing": [1, 1, 1], "order": 4}, "3"),
        ({"op": "Pad", "shape": [4, 4, 4], "value": "mirror"}, "minimum"),
    ],
    ids=str,
)
def test_a_value_that_is_not_among_the_choices_is_refused_with_them(data, allowed):
    with pytest.raises(ValueError, match=allowed):
        Operation.from_dict(data)


@pytest.mark.parametrize(
    ("operation", "changes"),
    [
        (ZScore, {"region": "brain"}),
        (ZScore, {"eps_rule": "plus"}),
        (ZScore, {"background": "zeros"}),
        (ZScore, {"method": "onepass"}),
        (DivideByMean, {"region": "foreground"}),
        (MinMax, {"region": "non-zero"}),
        (CropForeground, {"region": "Mask"}),
    ],
)
def test_a_wrong_word_in_python_is_refused_and_not_taken_for_another(operation, changes):
    with pytest.raises(ValueError, match=next(iter(changes.values()))):
        operation(**changes)(scan())


# --- Operations of others -------------------------------------------------------------------------


@dataclass(frozen=True)
class Power(Operation):
    """Raise the image to a power; a third party's."""

    exponent: float = 0.5
    steps: tuple[int, ...] = ()

    def __call__(self, volume: Volume) -> Volume:
        """Return the changed volume."""
        return with_image(volume, volume.image**self.exponent)

    def __str__(self) -> str:
        return f"raise to the power of {self.exponent:g}"


@pytest.fixture(autouse=True)
def _registered_for_one_test():
    known = dict(_operations)
    yield
    _operations.clear()
    _operations.update(known)


def test_an_operation_of_others_is_unknown_until_it_is_registered():
    with pytest.raises(ValueError, match=r"unknown operation 'Power'.*ZScore.*imported, and so registered"):
        InputSpec.from_dict({"operations": [{"op": "Power"}]})


@pytest.mark.parametrize("sparse", [True, False])
def test_a_contract_with_an_operation_of_others_goes_to_yaml_and_back_and_acts(sparse):
    assert brainfm.register_operation(Power) is Power
    spec = InputSpec(operations=(Power(2.0, steps=(1, 2)), ZScore()))
    again = InputSpec.from_dict(yaml.safe_load(yaml.safe_dump(spec.to_dict(sparse=sparse))))
    assert again == spec
    np.testing.assert_array_equal(again.operations[0](scan()).image, scan().image ** 2)
    assert "step 1       raise to the power of 2" in brainfm.describe(again)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"op": "Power", "exponent": "two"}, "exponent is 'two', and must be float"),
        ({"op": "Power", "exponents": 2}, "Power has no field exponents; did you mean exponent"),
    ],
)
def test_parameters_of_an_operation_of_others_are_checked_too(data, message):
    brainfm.register_operation(Power)
    with pytest.raises(ValueError, match=message):
        Operation.from_dict(data)


def test_registering_a_class_again_is_no_clash():
    brainfm.register_operation(Power)
    brainfm.register_operation(Power)


def test_a_name_that_is_taken_is_refused_and_keeps_its_class():
    @dataclass(frozen=True)
    class ZScore(Operation):
        def __call__(self, volume: Volume) -> Volume:
            return volume

    with pytest.raises(ValueError, match=r"an operation named 'ZScore' is already registered, by brainfm\.contract"):
        brainfm.register_operation(ZScore)
    assert type(Operation.from_dict({"op": "ZScore"})) is contract.ZScore


class NoDataclass(Operation):
    """Lacks its decorator."""

    def __call__(self, volume: Volume) -> Volume:
        """Return the volume."""
        return volume


@dataclass(frozen=True)
class NoOperation:
    """Is a dataclass, and no operation."""

    def __call__(self, volume: Volume) -> Volume:
        """Return the volume."""
        return volume


@dataclass(frozen=True)
class DoesNothing(Operation):
    """Cannot be called."""

    exponent: float = 0.5


@pytest.mark.parametrize("given", [NoDataclass, NoOperation, DoesNothing, len, ZScore()], ids=str)
def test_what_is_no_operation_is_refused(given):
    with pytest.raises(ValueError, match="is no operation: write a frozen dataclass"):
        brainfm.register_operation(given)


def test_the_example_of_register_operation_runs():
    examples = doctest.DocTestFinder().find(brainfm.register_operation, "register_operation", globs={})
    results = doctest.DocTestRunner().run(examples[0])
    assert (results.failed, results.attempted) == (0, 6)
