"""Intervals and sets: the formula by hand, and that they hold the truth as often as they say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from brainfm import BrainfmError
from brainfm.downstream.conformal import expected_coverage, least_scans, nonconformity, prediction_sets, radius


def test_radius_is_the_score_of_the_rank_that_the_coverage_takes():
    scores = np.arange(1, 20) / 10  # 19 of them: 0.1 … 1.9
    assert radius(scores, 0.9) == pytest.approx(1.8)  # ⌈20 · 0.9⌉ = 18
    assert radius(scores, 0.95) == pytest.approx(1.9)
    assert radius(scores, 0.5) == pytest.approx(1.0)
    assert radius(np.arange(9.0), 0.9) == 8  # ⌈10 · 0.9⌉ = 9, whatever 10 · 0.9 is in binary


def test_radius_is_infinite_where_there_are_too_few_scores():
    assert (least_scans(0.9), least_scans(0.95), least_scans(0.8)) == (9, 19, 4)
    for coverage in (0.5, 0.8, 0.9, 0.95, 0.99):
        least = least_scans(coverage)
        assert math.isfinite(radius(np.arange(least), coverage))
        assert math.isinf(radius(np.arange(least - 1), coverage))


@pytest.mark.parametrize("coverage", [0.0, 1.0, 1.5, float("nan")])
def test_coverage_that_is_none_is_refused(coverage):
    with pytest.raises(BrainfmError, match="must be between 0 and 1"):
        radius([1.0], coverage)


@pytest.mark.parametrize("kind", ["regression", "binary", "multiclass"])
def test_intervals_and_sets_hold_the_truth_as_often_as_they_say(kind):
    draws, held = np.random.default_rng(0), []
    for _ in range(300):
        labels, predictions = _drawn(draws, kind, 60)
        q = radius(nonconformity(labels[:40], predictions[:40], kind), 0.9)
        if kind == "regression":
            held.append(np.abs(labels[40:] - predictions[40:]) <= q)
        else:
            held.append(prediction_sets(predictions[40:], q)[np.arange(20), labels[40:]])
    assert np.mean(held) == pytest.approx(37 / 41, abs=0.015)  # three standard errors


def _drawn(draws, kind, n):
    if kind == "regression":
        labels = draws.normal(size=n)
        return labels, labels + draws.standard_t(3, n)
    chances = draws.dirichlet(np.ones(2 if kind == "binary" else 4), n)
    labels = np.array([draws.choice(len(row), p=row) for row in chances])
    return labels, chances[:, 1] if kind == "binary" else chances


@pytest.mark.parametrize(("scores", "coverage"), [(24, 0.5), (24, 0.8), (60, 0.9), (5, 0.9)])
def test_coverage_of_few_scores_has_the_mean_and_spread_that_its_law_says(scores, coverage):
    """By simulation: at 24 scores half of new ones are to be held, and 13 in 25 are."""
    draws = np.random.default_rng(1).random((20_000, scores + 30))
    q = np.array([radius(row[:scores], coverage) for row in draws])
    held = (draws[:, scores:] <= q[:, None]).mean(axis=1)
    mean, spread = expected_coverage(scores, 30, coverage)
    assert held.mean() == pytest.approx(mean, abs=0.004)
    assert held.std() == pytest.approx(spread, abs=0.004)
    assert expected_coverage(scores, 30, coverage, runs=4)[1] == pytest.approx(spread / 2)
    if scores == 24:
        assert mean == pytest.approx({0.5: 13, 0.8: 20}[coverage] / 25)
