"""Checked dataclasses: what their fields may hold, and the way to plain data and back."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, dataclass, field, replace
from typing import Any, Literal

import pytest

from brainfm.contract import InputSpec, Transpose, ZScore
from brainfm.schema import Checked, as_tuples, check_keys, read_yaml


@dataclass(frozen=True)
class Scanner(Checked):
    vendor: str
    tesla: float = 3.0


@dataclass(frozen=True)
class Site(Checked):
    name: str
    scans: int
    scanner: Scanner | None = None
    others: tuple[Scanner, ...] = ()
    by_year: dict[str, Scanner] = field(default_factory=dict)
    counts: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    box: tuple[int, float, str] = (1, 2.0, "mm")
    open: bool = True
    kind: Literal["ward", "lab", 7] = "lab"
    note: str | int | None = None
    free: Any = None


FULL = Site(
    name="Bonn",
    scans=12,
    scanner=Scanner("A", 1.5),
    others=(Scanner("B"), Scanner("C", 7)),
    by_year={"2019": Scanner("D")},
    counts={"T1w": {"sub-01": (1, 2), "sub-02": ()}},
    box=(4, 0.5, "cm"),
    open=False,
    kind="ward",
    note="new",
    free=(1, ("two", 3.0)),
)


def through_json(data):
    return json.loads(json.dumps(data))


# --- To plain data and back -----------------------------------------------------------------------


def test_nested_fields_become_plain_data():
    data = FULL.to_dict()
    assert data["scanner"] == {"vendor": "A", "tesla": 1.5}
    assert data["others"] == [{"vendor": "B", "tesla": 3.0}, {"vendor": "C", "tesla": 7}]
    assert data["by_year"] == {"2019": {"vendor": "D", "tesla": 3.0}}
    assert data["counts"] == {"T1w": {"sub-01": [1, 2], "sub-02": []}}
    assert (data["box"], data["free"]) == ([4, 0.5, "cm"], [1, ["two", 3.0]])
    assert list(data) == list(Site.__dataclass_fields__)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("site", [FULL, Site("Bonn", 1), replace(FULL, scanner=None, others=(), note=None)])
def test_what_was_written_comes_back(site, sparse):
    again = Site.from_dict(through_json(site.to_dict(sparse=sparse)))
    assert again == site
    assert type(again.others) is tuple
    assert all(type(scanner) is Scanner for scanner in again.others)


def test_sparse_data_leaves_out_what_would_be_so_anyway():
    assert Site("Bonn", 1).to_dict(sparse=True) == {"name": "Bonn", "scans": 1}
    site = Site("Bonn", 1, others=(Scanner("B"), Scanner("C", 7.0)), by_year={"2019": Scanner("D")}, open=False)
    assert site.to_dict(sparse=True) == {
        "name": "Bonn",
        "scans": 1,
        "others": [{"vendor": "B"}, {"vendor": "C", "tesla": 7.0}],
        "by_year": {"2019": {"vendor": "D"}},
        "open": False,
    }


def test_a_default_that_is_made_anew_is_no_ones_else():
    first, second = Site("Bonn", 1), Site("Bonn", 1)
    first.by_year["2019"] = Scanner("D")
    assert second.by_year == {}


def test_lists_are_taken_for_tuples_when_written_in_python_too():
    assert Site("Bonn", 1, others=[Scanner("B")], box=[1, 2.0, "mm"], free=[[1], [2]]) == Site(
        "Bonn", 1, others=(Scanner("B"),), box=(1, 2.0, "mm"), free=((1,), (2,))
    )


def test_fields_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        FULL.name = "Köln"


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": 3}, "Site: name is 3, and must be str"),
        ({"scans": 1.0}, "Site: scans is 1.0, and must be int"),
        ({"scans": True}, "Site: scans is True, and must be int"),
        ({"scans": "1"}, "Site: scans is '1', and must be int"),
        ({"open": 1}, "Site: open is 1, and must be bool"),
        ({"open": None}, "Site: open is None, and must be bool"),
        ({"kind": "Lab"}, "Site: kind is 'Lab', and must be 'ward' or 'lab' or 7"),
        ({"kind": 7.0}, "Site: kind is 7.0, and must be 'ward' or 'lab' or 7"),
        ({"note": 1.5}, "Site: note is 1.5, and must be str or int or None"),
        ({"note": False}, "Site: note is False, and must be str or int or None"),
        ({"box": [1, 2.0]}, "Site: box is .* and must be a tuple of int, float, str"),
        ({"box": [1, 2.0, "mm", 4]}, "Site: box is .* and must be a tuple of int, float, str"),
        ({"box": "1mm"}, "Site: box is '1mm', and must be a tuple"),
        ({"box": [1, True, "mm"]}, "Site: box is"),
        ({"others": {"vendor": "B"}}, "Site: others is .* and must be a tuple of Scanners"),
        ({"others": ["B"]}, "Site: others is .* and must be a tuple of Scanners"),
        ({"others": [None]}, "Site: others is"),
        ({"scanner": "A"}, "Site: scanner is 'A', and must be Scanner or None"),
        ({"scanner": []}, "Site: scanner is .* and must be Scanner or None"),
        ({"by_year": [{"vendor": "A"}]}, "Site: by_year is .* and must be a mapping of Scanners"),
        ({"by_year": {2019: {"vendor": "A"}}}, "Site: by_year is"),
        ({"by_year": {"2019": "A"}}, "Site: by_year is"),
        ({"counts": {"T1w": {"sub-01": [1, "2"]}}}, "Site: counts is"),
        ({"scanner": {"vendor": "A", "tesla": "3T"}}, "Scanner: tesla is '3T', and must be float"),
        ({"scanner": {"vendor": "A", "tesla": True}}, "Scanner: tesla is True"),
        ({"scanner": {"vendor": "A", "tesla": math.nan}}, "Scanner: tesla is nan"),
        ({"scanner": {"vendor": "A", "tesla": -math.inf}}, "Scanner: tesla is -inf"),
        ({"scanner": {"vendor": "A", "tesla": 10**400}}, "Scanner: tesla is 1000"),
        ({"scanner": {"tesla": 3.0}}, "Scanner lacks vendor"),
        ({"others": [{"vendor": "A", "Tesla": 3.0}]}, r"Scanner has no field Tesla; did you mean tesla\?"),
        ({"zzz": 1}, "Site has no field zzz; it has name, scans, scanner"),
        ({3: 1}, "Site has no field 3"),
    ],
)
def test_a_value_of_another_kind_is_refused_with_the_field_and_what_it_must_be(changes, message):
    with pytest.raises(ValueError, match=message):
        Site.from_dict({"name": "Bonn", "scans": 1} | changes)


@pytest.mark.parametrize("changes", [{"scans": 1.0}, {"open": 1}, {"kind": "Lab"}, {"others": ("B",)}, {"box": (1,)}])
def test_the_same_is_refused_when_written_in_python(changes):
    with pytest.raises(ValueError, match=f"Site: {next(iter(changes))} is"):
        replace(FULL, **changes)


@pytest.mark.parametrize(("data", "lacking"), [({}, "name, scans"), ({"name": "Bonn"}, "scans")])
def test_a_field_that_is_lacking_is_named(data, lacking):
    with pytest.raises(ValueError, match=f"^Site lacks {lacking}$"):
        Site.from_dict(data)


@pytest.mark.parametrize("data", [None, [], "name", 3, [["name", "Bonn"]]])
def test_what_is_no_mapping_is_refused(data):
    with pytest.raises(ValueError, match="Site is made of named fields, not of"):
        Site.from_dict(data)


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(ValueError, match="scans is 'xxx") as refusal:
        Site("Bonn", "x" * 10_000)
    assert len(str(refusal.value)) < 200


def test_a_prefix_says_where_the_fields_are():
    with pytest.raises(ValueError, match=r"Scanner has no field scanner\.tesle; did you mean scanner\.tesla\?"):
        check_keys({"tesle": 1}, Scanner, "scanner.")


@pytest.mark.parametrize("number", [3, 3.5, -1, 0])
def test_an_integer_is_a_float_too(number):
    assert Scanner("A", number).tesla == number


# --- Operations in a contract ---------------------------------------------------------------------


def test_operations_go_by_their_names_in_plain_data():
    spec = InputSpec(operations=(Transpose((2, 1, 0)), ZScore("mask", eps=1e-12)))
    data = spec.to_dict(sparse=True)["operations"]
    assert data == [{"op": "Transpose", "axes": [2, 1, 0]}, {"op": "ZScore", "region": "mask", "eps": 1e-12}]
    assert InputSpec.from_dict({"operations": data}) == spec
    assert InputSpec.from_dict(through_json(spec.to_dict())) == spec


@pytest.mark.parametrize(
    ("operations", "message"),
    [
        ([{"op": "Blur"}], "unknown operation 'Blur' in an input contract; known: AddFiltered, Clip, CropBox"),
        ([{"axes": [0, 1, 2]}], "unknown operation"),
        ([{"op": ["ZScore"]}], "unknown operation"),
        ([{"op": "ZScore", "sigma": 1}], "ZScore has no field sigma"),
        ([{"op": "ZScore", "region": "brain"}], "ZScore: region is 'brain', and must be"),
        (["ZScore"], "InputSpec: operations is"),
        ({"op": "ZScore"}, "InputSpec: operations is"),
        ("ZScore", "InputSpec: operations is"),
        ([{"op": "Transpose", "axes": [2, 1]}], "Transpose: axes is"),
    ],
)
def test_operations_that_are_none_are_refused_by_name(operations, message):
    with pytest.raises(ValueError, match=message):
        InputSpec.from_dict({"operations": operations})


# --- Plain data -----------------------------------------------------------------------------------


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def test_lists_become_tuples_at_any_depth():
    assert as_tuples([1, [2, [3]], (4, [5])]) == (1, (2, (3,)), (4, (5,)))
    assert as_tuples("text") == "text"
    with pytest.raises(RecursionError):
        as_tuples(nested(100_000))


@pytest.mark.parametrize("name", ["free", "others", "note", "counts", "scanner"])
def test_data_nested_to_death_is_an_error_and_no_crash(name):
    with pytest.raises((ValueError, RecursionError)):
        Site.from_dict({"name": "Bonn", "scans": 1, name: nested(100_000)})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{a: 1e-12, b: -3E5, c: 1.5e3, d: 2.e-3}", {"a": 1e-12, "b": -3e5, "c": 1500.0, "d": 0.002}),
        ("{a: 1.0e-12, b: 3, c: 0.5}", {"a": 1e-12, "b": 3, "c": 0.5}),
        ("[1e5x, e5, 12e, '1e5', 1e]", ["1e5x", "e5", "12e", "1e5", "1e"]),
        ("", None),
    ],
)
def test_yaml_is_read_with_numbers_as_they_are_written_elsewhere(text, value):
    assert read_yaml(text) == value


@pytest.mark.parametrize("text", ["{a: 1", "a: b: c", "\t- x", "!!python/object/apply:os.system [ls]", "[" * 100_000])
def test_what_is_no_yaml_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match=r"^not YAML \(") as refusal:
        read_yaml(text)
    assert "\n" not in str(refusal.value)
