"""Metrics against scikit-learn and naive loops; intervals and tests against published numbers and their promises."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics
from sklearn.metrics import roc_auc_score

from brainfm.downstream import statistics
from brainfm.downstream.statistics import (
    HIGHER_IS_BETTER,
    age_bias_correction,
    bootstrap_interval,
    corrected_resampled_t_test,
    delong_interval,
    delong_test,
    holm,
    icc,
    metrics,
    paired_bootstrap_over_runs,
    paired_bootstrap_test,
    patients_needed,
    summarise,
)

# 113 patients with a subarachnoid haemorrhage: poor outcome, WFNS grade, and S100β in 0.01 µg/l. The data are those of
# Turck et al. 2010 (doi:10.1007/s00134-009-1641-y), as in `aSAH` of the R package pROC.
POOR = (
    "00001101001011001011101000000000100110110000000001100010001010011101101111000110100000010000000000001111110001000"
)
WFNS = (
    "11113254125255125225211112121134214541425511241125521251222151125214524414121421232421451154221113125225552445111"
)
S100B = """
    13 14 10 4 13 10 47 16 18 10 12 10 44 71 4 8 49 4 7 33 9 9 7 11 7 17 7 11 13 19 5 16 41 14 34 35 48 9 96 25
    50 46 16 7 43 45 11 8 9 86 52 8 6 13 207 10 14 15 7 6 77 5 9 30 3 9 4 23 70 9 27 71 8 26 8 16 9 13 10 8 11
    33 11 28 7 10 32 22 7 5 24 38 10 15 8 14 10 7 4 19 56 14 58 32 82 74 15 47 17 44 15 50 48
"""


@pytest.fixture(scope="module")
def haemorrhage():
    """Poor outcome (0 or 1), WFNS grade, S100β."""
    return np.array(list(POOR), int), np.array(list(WFNS), float), np.array(S100B.split(), float)


def binary(n: int = 80, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels and probabilities, with ties and values on the edges of bins."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 2, n)
    return labels, np.clip(np.round(0.3 + 0.3 * labels + 0.25 * draw.standard_normal(n), 2), 0, 1)


def multiclass(n: int = 90, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, classes, n)
    logits = draw.standard_normal((n, classes)) + 1.5 * np.eye(classes)[labels]
    return labels, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def regression(n: int = 70, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    ages = draw.uniform(20, 90, n)
    return ages, 20 + 0.7 * ages + 6 * draw.standard_normal(n)


CASES = {"binary": binary, "multiclass": multiclass, "regression": regression}


# --- Metrics --------------------------------------------------------------------------------------


def naive_calibration_error(confidence: np.ndarray, success: np.ndarray) -> float:
    """Guo et al. 2017, equation 3, bin by bin; the last bin is closed."""
    error = 0.0
    for number in range(10):
        low, high = number / 10, (number + 1) / 10
        inside = [k for k, c in enumerate(confidence) if low <= c < high or (number == 9 and c == 1)]
        if inside:
            gap = sum(success[inside]) / len(inside) - sum(confidence[inside]) / len(inside)
            error += len(inside) / len(confidence) * abs(gap)
    return error


@pytest.mark.parametrize("seed", range(5))
def test_binary_metrics_are_those_of_scikit_learn(seed):
    y, p = binary(seed=seed)
    p = np.where(np.isclose(p * 10, np.round(p * 10)) & (p < 1), p + 1e-3, p)  # 0.3 × 10 is 2.9999…: off the edges
    found = metrics(y, p, "binary")
    assert found == pytest.approx(
        {
            "auc": sklearn_metrics.roc_auc_score(y, p),
            "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(y, p >= 0.5),
            "accuracy": sklearn_metrics.accuracy_score(y, p >= 0.5),
            "brier": sklearn_metrics.brier_score_loss(y, p),
            "ece": naive_calibration_error(p, y == 1),
        },
        abs=1e-12,
    )


@pytest.mark.parametrize("seed", range(5))
def test_multiclass_metrics_are_those_of_scikit_learn(seed):
    y, p = multiclass(seed=seed)
    found = metrics(y, p, "multiclass")
    guess = p.argmax(axis=1)
    brier = sum(sum((p[k, c] - (y[k] == c)) ** 2 for c in range(4)) for k in range(len(y))) / len(y)
    assert found == pytest.approx(
        {
            "auc": sklearn_metrics.roc_auc_score(y, p, multi_class="ovr", average="macro"),
            "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(y, guess),
            "accuracy": sklearn_metrics.accuracy_score(y, guess),
            "brier": brier,
            "ece": naive_calibration_error(p.max(axis=1), guess == y),
        },
        abs=1e-12,
    )


@pytest.mark.parametrize("seed", range(5))
def test_regression_metrics_are_those_of_scikit_learn(seed):
    y, p = regression(seed=seed)
    assert metrics(y, p, "regression") == pytest.approx(
        {
            "mae": sklearn_metrics.mean_absolute_error(y, p),
            "rmse": math.sqrt(sklearn_metrics.mean_squared_error(y, p)),
            "r2": sklearn_metrics.r2_score(y, p),
            "pearson": stats.pearsonr(y, p).statistic,
        },
        rel=1e-10,
    )


@pytest.mark.parametrize("kind", CASES)
def test_counting_a_case_twice_is_having_it_twice(kind):
    y, p = CASES[kind](seed=3)
    counts = np.random.default_rng(0).integers(0, 4, len(y))
    repeated = metrics(np.repeat(y, counts), np.repeat(p, counts, axis=0), kind)
    y, p = y.astype(float), p.astype(float)
    weighted = {
        name: function(y, p, counts[None].astype(float)) for name, function in statistics._METRICS[kind].items()
    }
    assert {name: value.item() for name, value in weighted.items()} == pytest.approx(repeated, rel=1e-9)


def test_every_metric_has_a_direction_that_a_better_model_moves_in():
    for kind, cases in CASES.items():
        y, p = cases(n=200)
        worse = metrics(y, p, kind)
        truth = np.eye(4)[y] if kind == "multiclass" else y
        better = metrics(y, 0.3 * p + 0.7 * truth, kind)
        for name in worse.keys() - {"ece"}:  # shrinking towards the truth makes a model too modest
            assert (better[name] > worse[name]) == HIGHER_IS_BETTER[name], name
        assert set(worse) <= set(HIGHER_IS_BETTER)
    assert not HIGHER_IS_BETTER["ece"]


def test_a_probability_of_a_half_is_a_guess_of_class_one():
    found = metrics([0, 1, 1], [0.1, 0.5, 0.9], "binary")
    assert (found["accuracy"], found["balanced_accuracy"]) == (1, 1)


def test_undefined_metrics_are_nan_and_the_others_are_kept():
    one_class = metrics([1, 1, 1], [0.9, 0.8, 0.2], "binary")
    assert math.isnan(one_class["auc"])
    assert math.isnan(one_class["balanced_accuracy"])
    assert one_class["accuracy"] == pytest.approx(2 / 3)
    no_third = metrics([0, 1], [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]], "multiclass")
    assert math.isnan(no_third["auc"])
    assert no_third["accuracy"] == 1
    constant = metrics([0.1] * 7, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], "regression")
    assert math.isnan(constant["r2"])
    assert math.isnan(constant["pearson"])
    assert constant["mae"] == pytest.approx(0.3)
    guess = metrics([50.0, 60.0, 70.0], [60.1] * 3, "regression")
    assert math.isnan(guess["pearson"])
    assert guess["r2"] == pytest.approx(1 - (10.1**2 + 0.1**2 + 9.9**2) / 200)


@pytest.mark.parametrize(
    ("labels", "predictions", "kind", "message"),
    [
        ([0, 1], [0.5], "binary", "do not fit"),
        ([], [], "binary", "do not fit"),
        ([0, 1], [0.5, float("nan")], "binary", "1 of the predictions are not finite"),
        ([0, 1], [0.5, float("inf")], "regression", "1 of the predictions are not finite"),
        ([0, float("nan")], [0.5, 0.5], "binary", "1 of the labels are not finite"),
        ([0, 2], [0.5, 0.5], "binary", "classes 0 to 1, not 2"),
        ([0, 1], [-1.5, 2.0], "binary", "sigmoid"),
        ([0, 1], [[2.0, -1.0], [0.0, 1.0]], "multiclass", "softmax"),
        ([0, 1], [[0.9, 0.9], [0.0, 1.0]], "multiclass", "sum to 1"),
        ([0, 1], [[0.5, 0.5], [0.5, 0.5]], "binary", r"must be \[n\]"),
        ([0, 1], [0.5, 0.5], "multiclass", r"must be \[n, classes\]"),
        ([0, 1], [0.5, 0.5], "survival", "no kind 'survival'"),
    ],
)
def test_wrong_input_is_refused_by_name(labels, predictions, kind, message):
    with pytest.raises(ValueError, match=message):
        metrics(labels, predictions, kind)


def test_summary_of_seeds_is_mean_and_sample_deviation():
    assert summarise([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, math.sqrt(7 / 3)))
    mean, deviation = summarise([3.0])
    assert mean == 3
    assert math.isnan(deviation)
    with pytest.raises(ValueError, match="no values"):
        summarise([])


# --- Bootstrap ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "metric"), [("binary", "auc"), ("multiclass", "brier"), ("regression", "mae")])
def test_interval_is_that_of_a_plain_loop_over_resamples(kind, metric):
    y, p = CASES[kind](seed=1)
    draw = np.random.default_rng(5)
    strata = [np.arange(len(y))] if kind == "regression" else [np.flatnonzero(y == k) for k in np.unique(y)]
    values = []
    for _ in range(4000):
        chosen = np.concatenate([draw.choice(stratum, len(stratum)) for stratum in strata])
        values.append(metrics(y[chosen], p[chosen], kind)[metric])
    width = np.quantile(values, 0.975) - np.quantile(values, 0.025)
    found = bootstrap_interval(y, p, kind, metric, n=4000)
    assert found == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=0.06 * width)  # other draws


def test_interval_of_an_auc_is_near_delongs():
    y, p = binary(n=300)
    assert bootstrap_interval(y, p, "binary", "auc") == pytest.approx(delong_interval(y, p), abs=0.012)


def test_scans_of_a_patient_are_drawn_together():
    y, p = regression(n=60)
    patients = [f"sub-{k}" for k in range(60)]
    once = bootstrap_interval(y, p, "regression", "mae")
    copies = bootstrap_interval(np.tile(y, 4), np.tile(p, 4), "regression", "mae", groups=patients * 4)
    naive = bootstrap_interval(np.tile(y, 4), np.tile(p, 4), "regression", "mae")
    width, naive_width = once[1] - once[0], naive[1] - naive[0]
    assert copies[1] - copies[0] == pytest.approx(width, rel=0.1)  # four copies of a scan tell no more than one
    assert naive_width == pytest.approx(width / 2, rel=0.1)


def test_no_resample_lacks_a_class_even_when_patients_have_scans_of_several():
    labels = np.array([0] * 30 + [1, 1] + [0, 1])
    patients = np.array([*range(30), 100, 100, 101, 101])  # 100 has the disease, 101 came down with it
    weights = np.concatenate(list(statistics._resamples(labels.astype(float), "binary", patients, 500, 0)))
    assert weights.shape == (500, 34)
    assert (weights[:, labels == 1].sum(axis=1) > 0).all()
    assert (weights[:, labels == 0].sum(axis=1) > 0).all()
    assert (weights[:, 30] == weights[:, 31]).all()
    assert (weights[:, :30].sum(axis=1) == 30).all()


def test_resamples_that_leave_a_metric_undefined_are_left_out():
    low, high = bootstrap_interval([1, 1, 2], [1.0, 1.5, 2.5], "regression", "r2")  # 1, 1, 1 is drawn too
    assert math.isfinite(low)
    assert low < high
    assert all(math.isnan(end) for end in bootstrap_interval([1, 1], [0.5, 0.6], "binary", "auc"))


def test_bootstrap_repeats_itself_whatever_its_memory(monkeypatch):
    y, p = binary()
    whole = bootstrap_interval(y, p, "binary", "auc", n=300)
    assert bootstrap_interval(y, p, "binary", "auc", n=300) == whole
    assert bootstrap_interval(y, p, "binary", "auc", n=300, seed=1) != whole
    monkeypatch.setattr(statistics, "_CHUNK", 1000)
    assert bootstrap_interval(y, p, "binary", "auc", n=300) == pytest.approx(whole, abs=0.03)


def test_two_thousand_resamples_of_three_hundred_take_no_seconds():
    y, p = binary(n=300)
    start = time.process_time()
    bootstrap_interval(y, p, "binary", "auc")
    assert time.process_time() - start < 3  # 0.15 s, on a machine that is not busy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "mae"}, "no metric 'mae' of kind 'binary'"),
        ({"groups": ["a"]}, "one patient a case"),
        ({"groups": ["", *"abcdefg"]}, "1 cases have no patient"),
        ({"groups": [float("nan"), *range(7)]}, "1 cases have no patient"),
        ({"n": 0}, "at least one resample"),
        ({"level": 95}, "between 0 and 1"),
    ],
)
def test_wrong_bootstrap_is_refused(change, message):
    y, p = binary(n=8)
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(y, p, **({"kind": "binary", "metric": "auc"} | change))


def test_paired_test_of_a_model_with_itself_finds_nothing():
    y, p = binary()
    same = paired_bootstrap_test(y, p, p, "binary", "auc")
    assert (same.difference, same.ci_low, same.ci_high, same.p_value) == (0, 0, 0, 1)


def test_paired_p_value_is_never_zero_and_signs_follow_the_order():
    y, good = binary(n=200)
    bad = np.random.default_rng(9).uniform(size=200)
    found = paired_bootstrap_test(y, good, bad, "binary", "auc", n=500)
    assert found.p_value == pytest.approx(2 / (20 * 500 + 1))
    assert found.ci_low > 0
    assert found.difference == pytest.approx(metrics(y, good, "binary")["auc"] - metrics(y, bad, "binary")["auc"])
    back = paired_bootstrap_test(y, bad, good, "binary", "auc", n=500)
    assert (back.difference, back.ci_low, back.ci_high) == pytest.approx(
        (-found.difference, -found.ci_high, -found.ci_low)
    )
    assert back.p_value == found.p_value


def test_paired_test_agrees_with_delong(haemorrhage):
    poor, wfns, s100b = haemorrhage
    bootstrap = paired_bootstrap_test(poor, wfns / 5, s100b / 300, "binary", "auc", n=4000)
    delong = delong_test(poor, wfns, s100b)
    assert bootstrap.difference == pytest.approx(delong.difference)
    assert bootstrap.p_value == pytest.approx(delong.p_value, abs=0.015)
    assert (bootstrap.ci_low, bootstrap.ci_high) == pytest.approx((delong.ci_low, delong.ci_high), abs=0.01)


def test_paired_test_keeps_its_level_with_several_scans_a_patient():
    """Two equal models, 40 patients of 5 alike scans: p < 0.05 in about 5 % of studies, far more without groups."""
    patients = np.repeat(np.arange(40), 5)
    grouped, naive = [], []
    for seed in range(120):
        draw = np.random.default_rng(seed)
        ages = draw.uniform(20, 90, 40)[patients]
        first, second = (ages + 5 * draw.standard_normal(40)[patients] for _ in range(2))
        for groups, values in ((patients, grouped), (None, naive)):
            found = paired_bootstrap_test(ages, first, second, "regression", "mae", groups=groups, n=300)
            values.append(found.p_value < 0.05)
    assert np.mean(grouped) < 0.12
    assert np.mean(naive) > 0.25


# --- DeLong ---------------------------------------------------------------------------------------


def naive_delong(labels: np.ndarray, scores: list[np.ndarray]) -> tuple[list[float], np.ndarray]:
    """Areas and their covariance: DeLong et al. 1988, equations 1 to 6, pair by pair."""
    cases, controls = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)

    def psi(x: float, y: float) -> float:
        return 1.0 if y < x else 0.5 if y == x else 0.0

    v10 = [[sum(psi(x[i], x[j]) for j in controls) / len(controls) for i in cases] for x in scores]
    v01 = [[sum(psi(x[i], x[j]) for i in cases) / len(cases) for j in controls] for x in scores]
    areas = [sum(v) / len(v) for v in v10]

    def covariance(components: list[list[float]], r: int, s: int) -> float:
        pairs = zip(components[r], components[s], strict=True)
        return sum((a - areas[r]) * (b - areas[s]) for a, b in pairs) / (len(components[r]) - 1)

    both = range(len(scores))
    return areas, np.array(
        [[covariance(v10, r, s) / len(cases) + covariance(v01, r, s) / len(controls) for s in both] for r in both]
    )


@pytest.mark.parametrize("seed", range(4))
def test_delong_is_that_of_a_naive_loop(seed):
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 2, 40)
    first = np.round(labels + draw.standard_normal(40), 1)  # with ties
    second = np.round(0.5 * labels + 0.5 * first + draw.standard_normal(40))
    areas, covariance = naive_delong(labels, [first, second])
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    found = delong_test(labels, first, second)
    assert (found.auc_first, found.auc_second) == pytest.approx(areas, rel=1e-12)
    assert found.auc_first == pytest.approx(sklearn_metrics.roc_auc_score(labels, first), rel=1e-12)
    assert found.z == pytest.approx((areas[0] - areas[1]) / math.sqrt(variance), rel=1e-10)
    margin = stats.norm.ppf(0.975) * math.sqrt(covariance[0, 0])
    assert delong_interval(labels, first) == pytest.approx((areas[0] - margin, min(1, areas[0] + margin)), rel=1e-10)


def test_delong_gives_the_published_numbers_of_proc(haemorrhage):
    """The numbers of pROC's own tests (github.com/xrobin/pROC, tests/testthat/test-roc.test.R and its AUC helpers)."""
    poor, wfns, s100b = haemorrhage
    found = delong_test(poor, wfns, s100b)
    assert found.auc_first == pytest.approx(0.823678861788618, rel=1e-12)
    assert found.auc_second == pytest.approx(0.731368563685637, rel=1e-12)
    assert found.z == pytest.approx(2.20898359144091, rel=1e-12)
    assert found.p_value == pytest.approx(0.0271757822291882, rel=1e-12)
    assert found.ci_low == pytest.approx(0.0104061769564846, rel=1e-10)
    assert found.ci_high == pytest.approx(0.174214419249478, rel=1e-10)
    back = delong_test(poor, s100b, wfns)
    assert (back.z, back.p_value) == pytest.approx((-found.z, found.p_value), rel=1e-12)


def test_delong_of_equal_curves_is_zero_and_of_what_cannot_be_known_is_nan():
    y, p = binary()
    same = delong_test(y, p, np.log(p + 1e-3))  # the same order
    assert (same.difference, same.z, same.p_value, same.ci_low, same.ci_high) == (0, 0, 1, 0, 0)
    no_variance = delong_test([0, 0, 1, 1], [1, 2, 3, 4], [1, 1, 1, 1])
    assert (no_variance.auc_first, no_variance.auc_second, no_variance.difference) == (1, 0.5, 0.5)
    assert math.isnan(no_variance.z)
    assert math.isnan(no_variance.p_value)
    one_case = delong_test([0, 0, 1], [1, 2, 3], [2, 1, 3])
    assert one_case.auc_first == 1
    assert math.isnan(one_case.p_value)
    one_class = delong_test([1, 1, 1], [1, 2, 3], [2, 1, 3])
    assert math.isnan(one_class.auc_first)
    assert all(math.isnan(end) for end in delong_interval([0, 0], [1, 2]))


def test_delong_refuses_what_is_no_score_of_a_case():
    with pytest.raises(ValueError, match="do not fit"):
        delong_test([0, 1], [1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="not finite"):
        delong_test([0, 1], [1, 2], [1, math.nan])
    with pytest.raises(ValueError, match="classes 0 to 1"):
        delong_interval([1, 2], [1, 2])
    with pytest.raises(ValueError, match=r"must be \[n\]"):
        delong_interval([0, 1], [[1, 2], [3, 4]])


# --- Brain age ------------------------------------------------------------------------------------


def test_cole_takes_the_bias_away_without_the_true_age():
    ages, predicted = regression(n=2000)
    correct = age_bias_correction(ages, predicted)
    assert correct.slope == pytest.approx(stats.linregress(ages, predicted).slope)
    corrected = correct(predicted)
    assert np.polyfit(ages, corrected, 1) == pytest.approx([1, 0], abs=1e-8)
    new_ages, new = regression(n=2000, seed=1)
    assert np.corrcoef(new_ages, correct(new) - new_ages)[0, 1] == pytest.approx(0, abs=0.05)
    assert abs(np.corrcoef(new_ages, new - new_ages)[0, 1]) > 0.5
    assert correct([55.0]).tolist() == pytest.approx([(55 - correct.intercept) / correct.slope])


def test_beheshti_makes_a_model_that_knows_nothing_look_perfect_and_cole_refuses_it():
    ages = np.linspace(20, 90, 50)
    nothing = np.full(50, 57.3)
    flattered = age_bias_correction(ages, nothing, rule="beheshti")(nothing, ages)
    assert flattered == pytest.approx(ages)  # the docstring's warning
    with pytest.raises(ValueError, match="do not rise with age"):
        age_bias_correction(ages, nothing)


def test_beheshti_removes_the_line_of_the_error_on_age():
    ages, predicted = regression()
    corrected = age_bias_correction(ages, predicted, rule="beheshti")(predicted, ages)
    alpha, beta = np.polyfit(ages, predicted - ages, 1)  # as the paper writes it
    assert corrected == pytest.approx(predicted - (alpha * ages + beta))
    with pytest.raises(ValueError, match="needs the true ages"):
        age_bias_correction(ages, predicted, rule="beheshti")(predicted)


def test_age_bias_correction_refuses_what_has_no_line():
    with pytest.raises(ValueError, match="different ages"):
        age_bias_correction([50, 50], [49, 51])
    with pytest.raises(ValueError, match="no rule 'lange'"):
        age_bias_correction([50, 60], [49, 51], rule="lange")


# --- ICC ------------------------------------------------------------------------------------------

# Shrout & Fleiss 1979, table 2: four judges on six targets.
RATINGS = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]


def test_icc_of_shrout_and_fleiss():
    found = icc(RATINGS)
    assert round(found.agreement, 2) == 0.29  # their table 4
    assert round(found.consistency, 2) == 0.71


def test_icc_knows_a_shift_from_noise():
    draw = np.random.default_rng(0)
    subjects = draw.standard_normal(200)
    shifted = icc(np.stack([subjects, subjects + 1], axis=1))
    assert shifted.consistency == pytest.approx(1)
    assert shifted.agreement == pytest.approx(subjects.var(ddof=1) / (subjects.var(ddof=1) + 0.5), rel=1e-9)
    assert icc(draw.standard_normal((500, 2))).agreement == pytest.approx(0, abs=0.1)


def test_icc_of_equal_values_is_nan_and_of_one_session_is_refused():
    nothing = icc(np.full((5, 3), 0.1))
    assert math.isnan(nothing.agreement)
    assert math.isnan(nothing.consistency)
    with pytest.raises(ValueError, match="two of each at least"):
        icc([[1.0], [2.0]])


# --- Over runs ------------------------------------------------------------------------------------


def test_paired_bootstrap_over_runs_is_of_the_mean_difference_and_repeats_make_it_no_surer():
    draw = np.random.default_rng(0)
    labels, patients = np.arange(40) % 2, np.array([f"p{n}" for n in range(40)])
    first, second = draw.random((2, 40))
    run = (labels, first, second, patients)
    alone = paired_bootstrap_test(labels, first, second, "binary", "auc", groups=patients, n=500)
    assert paired_bootstrap_over_runs([run], "binary", "auc", n=500) == alone
    again = paired_bootstrap_over_runs([run] * 5, "binary", "auc", n=500)
    assert again.ci_high - again.ci_low == pytest.approx(alone.ci_high - alone.ci_low, rel=0.15)
    half = [(labels[part], first[part], second[part], patients[part]) for part in (slice(0, 24), slice(16, 40))]
    found = paired_bootstrap_over_runs(half, "binary", "auc", n=500)
    wanted = [roc_auc_score(y, a) - roc_auc_score(y, b) for y, a, b, _ in half]
    assert found.difference == pytest.approx(np.mean(wanted))
    assert found.ci_low < found.difference < found.ci_high
    with pytest.raises(ValueError, match="the patient of each case"):
        paired_bootstrap_over_runs([(labels, first, second, None)] * 2, "binary", "auc")


# --- Repeated splits, several tests, and how many patients ------------------------------------------


def test_corrected_resampled_t_test_by_hand_and_against_the_paired_t_test():
    """Mean 0.03, variance 0.00025, error √((1/5 + 1/3) · 0.00025) = 0.011547, t 2.598 of 4 degrees, p 0.0602."""
    differences = [0.02, 0.04, 0.03, 0.05, 0.01]
    found = corrected_resampled_t_test(differences, 1 / 3)
    assert (found.difference, found.t, found.p_value) == pytest.approx((0.03, 2.598076, 0.060170), abs=1e-5)
    usual = stats.ttest_1samp(differences, 0)
    assert found.t == pytest.approx(usual.statistic / np.sqrt(1 + 5 / 3))
    margin = stats.t(4).ppf(0.975) * 0.011547
    assert (found.ci_low, found.ci_high) == pytest.approx((0.03 - margin, 0.03 + margin), abs=1e-5)


def test_corrected_resampled_t_test_keeps_its_level_where_the_usual_one_does_not():
    """Two rules that are equally good, on 30 repeated splits of 100 cases, 25 of them tested, 200 times."""
    draws, usual, ours = np.random.default_rng(0), [], []
    for _ in range(200):
        gain, values = draws.standard_normal(100), []
        for _ in range(30):
            values.append(gain[draws.permutation(100)[:25]].mean())
        ours.append(corrected_resampled_t_test(values, 1 / 3).p_value <= 0.05)
        usual.append(stats.ttest_1samp(values, 0).pvalue <= 0.05)
    assert np.mean(usual) > 0.3
    assert np.mean(ours) == pytest.approx(0.05, abs=0.05)


def test_what_a_resampled_t_test_cannot_know_is_nan():
    assert corrected_resampled_t_test([0.0, 0.0], 0.5).p_value == 1
    assert np.isnan(corrected_resampled_t_test([0.1], 0.5).p_value)
    assert np.isnan(corrected_resampled_t_test([0.1, 0.1], 0.5).ci_low)
    for wrong in (([], 0.5), ([np.nan], 0.5), ([0.1, 0.2], 0.0)):
        with pytest.raises(ValueError, match="a resampled t-test needs"):
            corrected_resampled_t_test(*wrong)


def test_holm_by_hand():
    """0.005 · 4, 0.01 · 3, 0.03 · 2, and 0.04 no less than the one before it."""
    assert holm([0.01, 0.04, None, 0.03, 0.005]) == [
        pytest.approx(0.03),
        pytest.approx(0.06),
        None,
        pytest.approx(0.06),
        pytest.approx(0.02),
    ]
    assert holm([None, float("nan")]) == [None, None]
    assert holm([]) == []


def test_patients_needed_are_those_of_statsmodels_and_of_cohens_table():
    """A medium effect of 0.5 in pairs: 34 by the t-test (Cohen 1988; G*Power), 32 by the normal approximation."""
    from statsmodels.stats.power import NormalIndPower, TTestPower

    for effect in (0.1, 0.3, 0.5):
        found = patients_needed(effect, 1 / np.sqrt(50), 50)
        assert found == np.ceil(NormalIndPower().solve_power(effect, ratio=0, power=0.8, alpha=0.05))
        assert found == pytest.approx(TTestPower().solve_power(effect, power=0.8, alpha=0.05), abs=2.5)
    assert patients_needed(-0.5, 1 / np.sqrt(50), 50) == 32
    assert patients_needed(0.0, 0.1, 50) is None
    assert patients_needed(0.1, float("nan"), 50) is None


def test_standard_error_of_a_paired_bootstrap_is_that_of_a_mean():
    draws = np.random.default_rng(0)
    labels = draws.normal(50, 10, 200)
    first, second = labels + draws.normal(0, 3, 200), labels + draws.normal(0, 4, 200)
    found = paired_bootstrap_test(labels, first, second, "regression", "mae")
    pairs = np.abs(first - labels) - np.abs(second - labels)
    assert found.standard_error == pytest.approx(pairs.std(ddof=1) / np.sqrt(200), rel=0.05)
