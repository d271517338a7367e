"""Labels of a manifest as numbers: kinds by their values or stated, scales of the scans, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from brainfm import RecipeError
from brainfm.manifest import ScanRecord
from brainfm.train.labels import read_numbers, read_targets


def scans(**columns: str) -> list[ScanRecord]:
    """Scans with columns of words between blanks; "." is a missing one."""
    rows = zip(*(text.split(" ") for text in columns.values()), strict=True)
    return [
        ScanRecord(f"{n}.nii", extra=dict(zip(columns, ["" if word == "." else word for word in row], strict=True)))
        for n, row in enumerate(rows)
    ]


MANY = " ".join(f"{20 + n * 1.5}" for n in range(24))


def test_kinds_are_those_that_the_values_leave_no_doubt_of():
    found, labels = read_targets(
        scans(age=MANY, sex=" ".join("MF." * 8), site=" ".join(["B", "A", "C"] * 8)), ["age", "sex", "site"], {}
    )
    assert [target.kind for target in found] == ["regression", "binary", "multiclass"]
    assert [target.classes for target in found] == [(), ("F", "M"), ("A", "B", "C")]
    assert [target.outputs for target in found] == [1, 1, 3]
    assert labels[:3, 1].tolist()[:2] == [1, 0]
    assert math.isnan(labels[2, 1])
    assert labels[:3, 2].tolist() == [1, 0, 2]


def test_numbers_are_standardised_by_the_scans_that_have_them():
    (age,), labels = read_targets(scans(age="40 . 50 n/a 66 44"), ["age"], {"age": "regression"})
    assert (age.mean, age.std) == (50, pytest.approx(np.std([40, 50, 66, 44])))
    assert np.isnan(labels[:, 0]).tolist() == [False, True, False, True, False, False]
    assert np.nanmean(labels) == pytest.approx(0, abs=1e-12)
    assert np.nanstd(labels) == pytest.approx(1)
    numbers = read_numbers(scans(age="40 . 50 n/a 66 44"), "age")
    assert numbers[[0, 2, 4, 5]].tolist() == pytest.approx([40, 50, 66, 44])
    assert np.isnan(numbers[1])


def test_codes_of_sites_may_be_said_to_be_classes():
    (site,), labels = read_targets(scans(site="3 10 3 . 10 7 7 3"), ["site"], {"site": "multiclass"})
    assert site.classes == ("3", "7", "10")
    assert labels[:3, 0].tolist() == [0, 2, 0]


@pytest.mark.parametrize(
    ("column", "kinds", "reason"),
    [
        ("40 50 60 .", {}, r"x has 3 different values.*Say kinds.x=regression or multiclass"),
        ("40 50 old 60", {"x": "regression"}, "x must be numbers, and 1 scans have none, such as 'old'"),
        ("a b c a", {"x": "binary"}, "3 different values"),
        ("a b c d", {}, "free text, or ids"),
        ("a a a .", {}, "x has 1 different values; it teaches nothing"),
        (". . . .", {}, "x has 0 different values"),
        ("5 5 5 5", {"x": "regression"}, "teaches nothing"),
    ],
)
def test_columns_that_teach_nothing_are_refused_with_their_values(column, kinds, reason):
    with pytest.raises(RecipeError, match=reason):
        read_targets(scans(x=column), ["x"], kinds)


def test_column_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(RecipeError, match="no column 'Age'; it has age, sex"):
        read_targets(scans(age="1 2 3", sex="M F M"), ["Age"], {})
