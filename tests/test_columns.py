"""What columns hold: numbers as people write them, kinds that leave no doubt, classes in their order."""

import numpy as np
import pytest

from brainfm.columns import in_order, numbers_of, plain_kind


@pytest.mark.parametrize(
    ("texts", "numbers"),
    [
        (["1", " 2.5 ", "-3e2", "", "89+"], [1, 2.5, -300, np.nan, np.nan]),
        (["62,5", "70"], [62.5, 70]),
        (["1,200", "13,400"], [np.nan, np.nan]),
        (["62,5", "70.5"], [np.nan, 70.5]),
    ],
)
def test_numbers_as_people_write_them(texts, numbers):
    np.testing.assert_array_equal(numbers_of(texts), numbers)


@pytest.mark.parametrize(
    ("texts", "kind"),
    [
        (["M", "F", "", "n/a", "F"], "binary"),
        (["0", "1", "1"], "binary"),
        (["A", "B", "C"], "multiclass"),
        ([str(20 + n) for n in range(21)], "regression"),
        ([str(20 + n) for n in range(20)], None),
        ([*(str(20 + n) for n in range(30)), "old"], None),
    ],
)
def test_kinds_that_values_leave_no_doubt_of(texts, kind):
    assert plain_kind(texts) == kind


def test_classes_are_counted_numbers_first_and_as_numbers():
    assert in_order(["10", "b", "2", "a", "10"]) == ("2", "10", "a", "b")
