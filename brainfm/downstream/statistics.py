"""Statistics of a downstream task: metrics, intervals and tests that respect patients, age-bias correction, ICC.

A metric here is a function of weighted cases, of many weightings at once: one of ones is the metric itself, and the
counts of a bootstrap resample are another. So a thousand resamples cost a few array operations, and the number in a
table and its interval come from the same lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from brainfm.columns import Kind as Kind
from brainfm.errors import MissingExtraError

AgeBiasRule: TypeAlias = Literal["cole", "beheshti"]

_Array: TypeAlias = NDArray[np.float64]
_Metric: TypeAlias = Callable[[_Array, _Array, _Array], _Array]  # labels, predictions, weights [r, n] → values [r]

HIGHER_IS_BETTER = {
    "auc": True,
    "balanced_accuracy": True,
    "accuracy": True,
    "brier": False,
    "ece": False,
    "mae": False,
    "rmse": False,
    "r2": True,
    "pearson": True,
}

THRESHOLD = 0.5  # a probability of this or more is a guess of class 1
ECE_BINS = 10  # [0, 0.1), [0.1, 0.2), … [0.9, 1]

_PROBABILITY_TOLERANCE = 1e-3  # rows of half-precision softmax sum to 1 within this
_CONSTANT = 1e-12  # a variance below this fraction of the mean square is rounding
_LEAST_SLOPE = 1e-6  # of predicted on true age; below, it is that of a constant, up to rounding
_CHUNK = 4_000_000  # weights held at a time, 32 MB
_ENOUGH, TIMES = 10, 20  # resamples that decide a p-value, and how many times as many are drawn where fewer do


def metrics(labels: ArrayLike, predictions: ArrayLike, kind: Kind) -> dict[str, float]:
    """Every metric of a kind of task, by name; `HIGHER_IS_BETTER` has their directions.

    - "binary": auc; balanced_accuracy and accuracy at `THRESHOLD`; brier; ece.
    - "multiclass": auc, the plain mean over classes of each one against the rest; balanced_accuracy, the mean recall;
      accuracy; brier, the squared distance from the one-hot label, 0 to 2; ece of the likeliest class.
    - "regression": mae and rmse, in the labels' unit; r2, the fraction of variance explained, below 0 where guessing
      the mean is better; pearson.

    ece is the expected calibration error of Guo et al. 2017 (arXiv 1706.04599): cases are put in `ECE_BINS` bins of
    equal width by their confidence, and the gaps between a bin's mean confidence and its fraction of successes
    are averaged, weighted by the bin's cases. Confidence is of the likeliest class, and success that it is right; for
    "binary" they are of class 1.

    Args:
        labels: [n]: 0 and 1; class numbers from 0; or values.
        predictions: [n] probabilities of class 1; [n, classes] probabilities; or [n] values.
        kind: "binary", "multiclass" or "regression".

    Returns:
        Name → value. What is undefined is nan: auc and balanced accuracy where a class has no case, r2 and pearson
        where the labels are all one value, pearson where the predictions are.

    Raises:
        ValueError: Lengths differ, a number is not finite, a label is no class, or a probability none; never because a
            metric is undefined.
    """
    labels, predictions = _checked(labels, predictions, kind)
    once = np.ones((1, len(labels)))
    with np.errstate(divide="ignore", invalid="ignore"):
        return {name: float(metric(labels, predictions, once)[0]) for name, metric in _METRICS[kind].items()}


def summarise(values: ArrayLike) -> tuple[float, float]:
    """Mean and sample standard deviation (n − 1) over seeds; the deviation of one seed is nan.

    Raises:
        ValueError: There are no values.
    """
    array = np.asarray(values, dtype=np.float64).ravel()
    if not len(array):
        raise ValueError("no values to summarise")
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else float("nan")


# --- Metrics of weighted cases --------------------------------------------------------------------


def _mean(values: NDArray[Any], weights: _Array) -> _Array:
    """[r]: the mean under each weighting; nan where all weights are 0."""
    mean: _Array = weights @ values / weights.sum(axis=1)
    return mean


def _auc(positive: NDArray[np.bool_], scores: _Array, weights: _Array) -> _Array:
    """The fraction of pairs (positive, negative) in which the positive scores higher; equal scores are half a pair."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))  # of the runs of equal scores
    positives = np.add.reduceat((weights * positive)[:, order], starts, axis=1)
    negatives = np.add.reduceat((weights * ~positive)[:, order], starts, axis=1)
    won = (positives * (np.cumsum(negatives, axis=1) - negatives / 2)).sum(axis=1)
    auc: _Array = won / (positives.sum(axis=1) * negatives.sum(axis=1))
    return auc


def _mean_recall(labels: _Array, guesses: NDArray[Any], weights: _Array, classes: int) -> _Array:
    members = [labels == number for number in range(classes)]
    recalls = [_mean(guesses[member] == labels[member], weights[:, member]) for member in members]
    mean: _Array = np.stack(recalls).mean(axis=0)
    return mean


def _calibration_error(confidence: _Array, success: NDArray[np.bool_], weights: _Array) -> _Array:
    bins = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    gaps = np.where(bins[:, None] == np.arange(ECE_BINS), (confidence - success)[:, None], 0)
    error: _Array = np.abs(weights @ gaps).sum(axis=1) / weights.sum(axis=1)
    return error


def _variance(values: _Array, weights: _Array) -> _Array:
    """The variance under each weighting; nan where there is none. `values` are centred, or digits would be lost."""
    square = _mean(values**2, weights)
    variance = square - _mean(values, weights) ** 2
    return np.where(variance > _CONSTANT * square, variance, np.nan)


def _centred(values: _Array) -> _Array:
    from_first: _Array = values - values[0]  # exactly 0 for equal values
    centred: _Array = from_first - from_first.mean()
    return centred


def _r2(labels: _Array, predictions: _Array, weights: _Array) -> _Array:
    r2: _Array = 1 - _mean((predictions - labels) ** 2, weights) / _variance(_centred(labels), weights)
    return r2


def _pearson(labels: _Array, predictions: _Array, weights: _Array) -> _Array:
    x, y = _centred(labels), _centred(predictions)
    covariance = _mean(x * y, weights) - _mean(x, weights) * _mean(y, weights)
    pearson: _Array = covariance / np.sqrt(_variance(x, weights) * _variance(y, weights))
    return pearson


def _one_hot(labels: _Array, classes: int) -> NDArray[np.bool_]:
    one_hot: NDArray[np.bool_] = labels[:, None] == np.arange(classes)
    return one_hot


_METRICS: dict[Kind, dict[str, _Metric]] = {
    "binary": {
        "auc": lambda y, p, w: _auc(y == 1, p, w),
        "balanced_accuracy": lambda y, p, w: _mean_recall(y, p >= THRESHOLD, w, 2),
        "accuracy": lambda y, p, w: _mean((p >= THRESHOLD) == y, w),
        "brier": lambda y, p, w: _mean((p - y) ** 2, w),
        "ece": lambda y, p, w: _calibration_error(p, y == 1, w),
    },
    "multiclass": {
        "auc": lambda y, p, w: np.stack([_auc(y == k, p[:, k], w) for k in range(p.shape[1])]).mean(axis=0),
        "balanced_accuracy": lambda y, p, w: _mean_recall(y, p.argmax(axis=1), w, p.shape[1]),
        "accuracy": lambda y, p, w: _mean(p.argmax(axis=1) == y, w),
        "brier": lambda y, p, w: _mean(((p - _one_hot(y, p.shape[1])) ** 2).sum(axis=1), w),
        "ece": lambda y, p, w: _calibration_error(p.max(axis=1), p.argmax(axis=1) == y, w),
    },
    "regression": {
        "mae": lambda y, p, w: _mean(np.abs(p - y), w),
        "rmse": lambda y, p, w: np.sqrt(_mean((p - y) ** 2, w)),
        "r2": _r2,
        "pearson": _pearson,
    },
}


# --- Bootstrap over patients ----------------------------------------------------------------------


def bootstrap_interval(
    labels: ArrayLike,
    predictions: ArrayLike,
    kind: Kind,
    metric: str,
    *,
    groups: ArrayLike | None = None,
    n: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile bootstrap interval of a metric.

    Patients are drawn with replacement, each with all of their scans: scans of one patient are not independent, and
    drawing them one by one gives intervals that are too short. For classification, patients are drawn within strata,
    the sets of classes that their scans have, so that every resample has every class. A stratum of one patient does not
    vary, and the interval is too short by what another patient would have changed.

    Args:
        labels: As of `metrics`.
        predictions: As of `metrics`.
        kind: As of `metrics`.
        metric: One of the kind's.
        groups: [n] the patient of each case; None if each is a patient of their own.
        n: Resamples. The same seed gives the same ones.
        level: Of confidence.
        seed: Of the resamples.

    Returns:
        Low and high. Resamples in which the metric is undefined are left out; nan and nan where all are.

    Raises:
        ValueError: As of `metrics`; or the metric is unknown, or `groups` does not fit.
    """
    labels, predictions = _checked(labels, predictions, kind)
    function = _metric(kind, metric)
    resamples = _resamples(labels, kind, groups, n, seed)
    return _percentiles(_over(resamples, partial(function, labels, predictions)), level)


@dataclass(frozen=True)
class PairedDifference:
    """A metric of a first model minus that of a second on the same cases.

    Attributes:
        difference: First minus second, whatever the metric's direction.
        ci_low, ci_high: The percentile bootstrap interval of the difference.
        p_value: Two-sided.
        standard_error: The standard deviation of the resamples' differences.
    """

    difference: float
    ci_low: float
    ci_high: float
    p_value: float
    standard_error: float = float("nan")


def paired_bootstrap_test(
    labels: ArrayLike,
    first: ArrayLike,
    second: ArrayLike,
    kind: Kind,
    metric: str,
    *,
    groups: ArrayLike | None = None,
    n: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """Compare two models on the same cases, drawn for both alike and as `bootstrap_interval` draws them.

    The p-value is twice the smaller of the fractions of resamples whose difference is at most 0 and at least 0, 1 at
    the most: the level at which the interval touches 0. One is added to the counts and to the number of resamples
    (Davison & Hinkley 1997, section 4.2.3), so that p is never 0. Where fewer than ten resamples decide it, it is of
    twenty times as many (Besag & Clifford 1991), down to 2 / (20 n + 1): else none of a table's would survive Holm.

    Args:
        labels: As of `metrics`.
        first: The predictions of one model.
        second: The predictions of the other.
        kind: As of `metrics`.
        metric: One of the kind's.
        groups: [n] the patient of each case; None if each is a patient of their own.
        n: Resamples.
        level: Of confidence.
        seed: Of the resamples.

    Raises:
        ValueError: As of `bootstrap_interval`.
    """
    return paired_bootstrap_over_runs([(labels, first, second, groups)], kind, metric, n=n, level=level, seed=seed)


def paired_bootstrap_over_runs(
    runs: Sequence[tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike | None]],
    kind: Kind,
    metric: str,
    *,
    n: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """As `paired_bootstrap_test`, of the mean difference over several runs, such as the seeds of an evaluation.

    A patient is drawn for all runs at once: test sets of other splits share patients, and runs are not independent. So
    the difference is that of the means over the runs, and more runs on the same patients do not make it more certain.
    A run of which a resample has too few cases for the metric is left out of that resample.

    Args:
        runs: For each run labels, predictions of the first model and of the second, and groups, as of
            `paired_bootstrap_test`; of several runs the groups must be given.
        kind: As of `metrics`.
        metric: One of the kind's.
        n: Resamples.
        level: Of confidence.
        seed: Of the resamples.

    Raises:
        ValueError: As of `bootstrap_interval`; there is no run, or one of several does not say whose its cases are.
    """
    if not runs or (len(runs) > 1 and any(groups is None for *_, groups in runs)):
        raise ValueError("give at least one run, and the patient of each case where there are several")
    function = _metric(kind, metric)
    cases = [(*_checked(labels, first, kind), _checked(labels, second, kind)[1]) for labels, first, second, _ in runs]
    labels = np.concatenate([part for part, *_ in cases])
    groups = runs[0][3] if len(runs) == 1 else np.concatenate([np.asarray(groups) for *_, groups in runs])
    ends = np.cumsum([len(part) for part, *_ in cases])[:-1]

    def difference(weights: _Array) -> _Array:
        parts = zip(cases, np.split(weights, ends, axis=1), strict=True)
        each = np.stack([function(y, one, w) - function(y, other, w) for (y, one, other), w in parts])
        known = ~np.isnan(each)
        mean: _Array = np.where(known, each, 0).sum(axis=0) / known.sum(axis=0)
        return mean

    differences = _over(_resamples(labels, kind, groups, n, seed), difference)
    observed = float(_over(iter([np.ones((1, len(labels)))]), difference)[0])
    low, high = _percentiles(differences, level)
    known = differences[~np.isnan(differences)]
    error = float(known.std(ddof=1)) if len(known) > 1 else float("nan")
    if min((known <= 0).sum(), (known >= 0).sum()) < _ENOUGH:
        more = _over(_resamples(labels, kind, groups, (TIMES - 1) * n, (seed, 1)), difference)
        known = np.concatenate([known, more[~np.isnan(more)]])
    rarer = min((known <= 0).sum(), (known >= 0).sum())
    p_value = min(1.0, 2 * (1 + rarer) / (1 + len(known))) if len(known) else float("nan")
    return PairedDifference(observed, low, high, float(p_value), error)


@dataclass(frozen=True)
class GroupMetric:
    """A metric of a group of patients, and its percentile bootstrap interval; nan is undefined."""

    value: float
    ci_low: float
    ci_high: float


@dataclass(frozen=True)
class Disparity:
    """The largest difference between two groups.

    Attributes:
        lowest, highest: The groups with the least and the most of the metric, by number.
        difference: Highest minus lowest.
        ci_low, ci_high: The percentile bootstrap interval of the difference of these two. They are the extremes of what
            was looked at, so it lies too far from 0 where there are many groups; the p-value does not.
        p_value: How often patients dealt to the groups at random have as large a difference between any two.
    """

    lowest: int
    highest: int
    difference: float
    ci_low: float
    ci_high: float
    p_value: float


def metric_by_group(
    runs: Sequence[tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike]],
    kind: Kind,
    metric: str,
    *,
    n: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[list[GroupMetric], Disparity | None]:
    """A metric of each group of patients, its mean over several runs, and the largest difference between two groups.

    Patients are drawn as in `paired_bootstrap_over_runs`, for all runs and groups at once. For the p-value the groups
    are permuted among patients, of a classification among those whose scans have the same classes, so that groups with
    more of a class are no disparity by themselves. A patient with scans in several groups is dealt with the first.
    Where fewer than ten permutations decide the p-value, it is of twenty times as many, as in `paired_bootstrap_test`.

    Args:
        runs: For each run labels, predictions, the number of each case's group from 0 (below 0 is none), and patients.
        kind: As of `metrics`.
        metric: One of the kind's, or "coverage": then predictions are whether an interval or a set held the label.
        n: Resamples, and permutations.
        level: Of confidence.
        seed: Of both.

    Returns:
        The metric by group; and the disparity, None where fewer than two groups have the metric.

    Raises:
        ValueError: As of `bootstrap_interval`.
    """
    function = _mean_of_predictions if metric == "coverage" else _metric(kind, metric)
    pairs = [_finite(y, p) if metric == "coverage" else _checked(y, p, kind) for y, p, *_ in runs]
    labels = np.concatenate([y for y, _ in pairs])
    member = np.concatenate([np.asarray(groups) for *_, groups, _ in runs])
    patient = _group_numbers(np.concatenate([np.asarray(patients) for *_, patients in runs]), len(labels))
    ends, count = np.cumsum([len(y) for y, _ in pairs])[:-1], int(member.max()) + 1

    def by_group(weights: _Array, members: NDArray[np.intp]) -> _Array:
        each = np.empty((len(weights), count))
        for number in range(count):
            own = np.split(weights * (members == number), ends, axis=1)
            found = np.stack([function(y, p, w) for (y, p), w in zip(pairs, own, strict=True)])
            known = ~np.isnan(found)
            each[:, number] = np.where(known, found, 0).sum(axis=0) / known.sum(axis=0)
        return each

    once = np.ones((1, len(labels)))
    observed = _over(iter([once]), partial(by_group, members=member))[0]
    drawn = _over(_resamples(labels, kind, patient, n, seed), partial(by_group, members=member))
    groups = [
        GroupMetric(float(value), *_percentiles(drawn[:, number], level)) for number, value in enumerate(observed)
    ]
    if np.isfinite(observed).sum() < 2:
        return groups, None
    lowest, highest = int(np.nanargmin(observed)), int(np.nanargmax(observed))
    difference = float(observed[highest] - observed[lowest])

    def as_large(n: int, seed: int | tuple[int, int]) -> int:
        """How many of n permutations have as large a difference between any two groups."""
        dealt = _permuted(labels, kind, patient, member, n, seed)
        found = 0
        with np.errstate(divide="ignore", invalid="ignore"):
            while part := list(islice(dealt, max(1, _CHUNK // len(labels)))):
                random = by_group(np.ones((len(part), len(labels))), np.concatenate(part))
                spread = np.nanmax(random, axis=1) - np.nanmin(random, axis=1)
                found += int((spread >= difference - 1e-12).sum())
        return found

    permuted, larger = n, as_large(n, seed)
    if larger < _ENOUGH:
        permuted, larger = TIMES * n, larger + as_large((TIMES - 1) * n, (seed, 1))
    p_value = (1 + larger) / (1 + permuted)
    ends_of = _percentiles(drawn[:, highest] - drawn[:, lowest], level)
    return groups, Disparity(lowest, highest, difference, *ends_of, p_value)


def _mean_of_predictions(_: _Array, predictions: _Array, weights: _Array) -> _Array:
    return _mean(predictions, weights)


def _permuted(
    labels: _Array,
    kind: Kind,
    patient: NDArray[np.intp],
    member: NDArray[np.intp],
    n: int,
    seed: int | tuple[int, int],
) -> Iterator[NDArray[np.intp]]:
    """[1, cases]: groups dealt to other patients of the same stratum, n times; who has none keeps none."""
    first = np.unique(patient, return_index=True)[1]
    own = member[first]
    strata = [members[own[members] >= 0] for members in _strata(labels, kind, patient)]
    draw = np.random.default_rng(seed)
    for _ in range(n):
        dealt = own.copy()
        for members in strata:
            dealt[members] = own[draw.permutation(members)]
        yield dealt[None, patient]


def _resamples(
    labels: _Array, kind: Kind, groups: ArrayLike | None, n: int, seed: int | tuple[int, int]
) -> Iterator[_Array]:
    """Weights [r, cases]: how often each case is in each of r resamples, n in all."""
    if n < 1:
        raise ValueError(f"n is {n}; at least one resample is needed")
    group = _group_numbers(groups, len(labels))
    size, strata = group.max() + 1, _strata(labels, kind, group)
    draw = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // len(labels))
    for start in range(0, n, chunk):
        rows = min(chunk, n - start)
        counts = np.empty((rows, size))
        for members in strata:
            counts[:, members] = draw.multinomial(len(members), np.full(len(members), 1 / len(members)), size=rows)
        yield counts[:, group]


def _strata(labels: _Array, kind: Kind, group: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    """Groups of cases whose labels are the same classes; of a regression, all of them together."""
    size = group.max() + 1
    if kind == "regression":
        return [np.arange(size)]
    present = np.zeros((size, int(labels.max()) + 1), dtype=bool)
    present[group, labels.astype(int)] = True
    stratum = np.unique(present, axis=0, return_inverse=True)[1].ravel()
    return [np.flatnonzero(stratum == number) for number in range(stratum.max() + 1)]


def _group_numbers(groups: ArrayLike | None, cases: int) -> NDArray[np.intp]:
    if groups is None:
        return np.arange(cases)
    names = np.asarray(groups)
    if names.shape != (cases,):
        raise ValueError(f"groups has the shape {list(names.shape)}, and the labels {[cases]}; give one patient a case")
    unknown = [name is None or name != name or name == "" for name in names.tolist()]
    if any(unknown):
        raise ValueError(f"{sum(unknown)} cases have no patient in groups; fill them in, or leave these cases out")
    return np.unique(names.astype(str) if names.dtype == object else names, return_inverse=True)[1]


def _over(resamples: Iterator[_Array], function: Callable[[_Array], _Array]) -> _Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.concatenate([function(weights) for weights in resamples])


def _percentiles(values: _Array, level: float) -> tuple[float, float]:
    _check_level(level)
    known = values[~np.isnan(values)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _metric(kind: Kind, name: str) -> _Metric:
    if name not in _METRICS[kind]:
        raise ValueError(f"no metric {name!r} of kind {kind!r}; there are {', '.join(_METRICS[kind])}")
    return _METRICS[kind][name]


# --- Repeated splits, several tests, and how many patients ------------------------------------------


@dataclass(frozen=True)
class ResampledTest:
    """Two models compared over repeated splits of the same patients.

    Attributes:
        difference: First minus second, the mean over the splits.
        ci_low, ci_high: Its interval.
        t: The difference over its standard error.
        p_value: Two-sided.
    """

    difference: float
    ci_low: float
    ci_high: float
    t: float
    p_value: float


def corrected_resampled_t_test(differences: ArrayLike, test_to_train: float, *, level: float = 0.95) -> ResampledTest:
    """The corrected resampled t-test of Nadeau & Bengio 2003 (doi:10.1023/A:1024068626366).

    Repeated splits share training scans, and their differences are not independent: the variance of their mean is not
    1/J of their variance, but (1/J + tested/trained) of it. Of r times k-fold cross-validation the same formula is used
    (Bouckaert & Frank 2004, doi:10.1007/978-3-540-24775-3_3).

    Args:
        differences: [J] of a metric of two models, a split each.
        test_to_train: Scans tested by scans trained on, such as 1/3.
        level: Of confidence.

    Returns:
        The test, with J − 1 degrees of freedom. All but the difference is nan where there is one split, or where splits
        do not differ; of no difference in any, p is 1.

    Raises:
        ValueError: A difference is not finite, there is none, or the ratio is not above 0.
    """
    values = np.asarray(differences, dtype=np.float64).ravel()
    if not len(values) or not np.isfinite(values).all() or not test_to_train > 0:
        raise ValueError("a resampled t-test needs finite differences, and a ratio of test to training scans above 0")
    mean, nan = float(values.mean()), float("nan")
    if not values.any():
        return ResampledTest(0.0, 0.0, 0.0, 0.0, 1.0)
    if len(values) < 2 or np.ptp(values) == 0:
        return ResampledTest(mean, nan, nan, nan, nan)
    error = float(np.sqrt((1 / len(values) + test_to_train) * values.var(ddof=1)))
    student = _scipy_stats().t(len(values) - 1)
    margin = float(student.isf((1 - _check_level(level)) / 2)) * error
    t = mean / error
    return ResampledTest(mean, mean - margin, mean + margin, t, float(2 * student.sf(abs(t))))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values of one family of tests, adjusted as Holm 1979 has it; None and nan are no tests, and stay None."""
    places = [n for n, p in enumerate(p_values) if p is not None and p == p]
    adjusted: list[float | None] = [None] * len(p_values)
    if places:
        try:
            from statsmodels.stats.multitest import multipletests
        except ModuleNotFoundError as error:
            raise MissingExtraError("statsmodels", "eval") from error
        found = multipletests([p_values[n] for n in places], method="holm")[1]
        for place, p in zip(places, found, strict=True):
            adjusted[place] = float(p)
    return adjusted


def patients_needed(
    difference: float, standard_error: float, patients: int, *, power: float = 0.8, alpha: float = 0.05
) -> int | None:
    """How many patients a test part needs for a true difference of this size to be seen.

    Of a two-sided paired test by the normal approximation: ((z(1 − α/2) + z(power)) · σ / difference)², with σ the
    standard error at hand times the root of its patients. It takes for granted that the observed difference is the true
    one, which flatters what was found large by chance.

    Args:
        difference: Between two models.
        standard_error: Of the difference, such as `PairedDifference` has.
        patients: That the standard error is of.
        power: The chance to see it.
        alpha: The level of the test.

    Returns:
        None where there is no difference, or its error is not known.
    """
    if not (np.isfinite([difference, standard_error]).all() and difference and standard_error > 0):
        return None
    norm = _scipy_stats().norm
    effect = abs(difference) / (standard_error * np.sqrt(patients))
    return max(2, int(np.ceil(((norm.isf(alpha / 2) + norm.ppf(power)) / effect) ** 2)))


# --- DeLong ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeLongTest:
    """Two ROC curves of the same cases compared.

    Attributes:
        auc_first, auc_second: Their areas.
        difference: First minus second.
        z: The difference over its standard error.
        p_value: Two-sided.
        ci_low, ci_high: The interval of the difference.
    """

    auc_first: float
    auc_second: float
    difference: float
    z: float
    p_value: float
    ci_low: float
    ci_high: float


def delong_test(labels: ArrayLike, first: ArrayLike, second: ArrayLike, *, level: float = 0.95) -> DeLongTest:
    """The test of DeLong, DeLong & Clarke-Pearson 1988 for two correlated ROC areas, by the midranks of Sun & Xu 2014.

    The cases must be independent: one scan a patient. With several, take `paired_bootstrap_test` and its `groups`.

    Args:
        labels: [n] 0 and 1.
        first: [n] scores of one model, higher for class 1; probabilities or any others.
        second: [n] scores of the other.
        level: Of confidence.

    Returns:
        The test. Where the scores order the cases alike, z is 0 and p is 1. Where a class has fewer than two cases, or
        areas differ without any variance (1 and 0.5, say), what cannot be known is nan.

    Raises:
        ValueError: Lengths differ, a score is not finite, or a label is neither 0 nor 1.
    """
    cases = [_structural_components(labels, scores) for scores in (first, second)]
    auc_first, auc_second = (_area(*components) for components in cases)
    above, below = (one - other for one, other in zip(*cases, strict=True))
    difference, error = auc_first - auc_second, _standard_error(above, below)
    norm = _scipy_stats().norm
    margin = norm.isf((1 - _check_level(level)) / 2) * error
    z = 0.0 if difference == error == 0 else difference / error if error > 0 else float("nan")
    p_value = 2 * float(norm.sf(abs(z)))
    low, high = float(difference - margin), float(difference + margin)
    return DeLongTest(auc_first, auc_second, difference, float(z), p_value, low, high)


def delong_interval(labels: ArrayLike, scores: ArrayLike, *, level: float = 0.95) -> tuple[float, float]:
    """DeLong's interval of one ROC area, low and high, cut at 0 and 1.

    It is too short for an area near 1, and of no width at 1. Cases, labels, nan and errors are as of `delong_test`.
    """
    above, below = _structural_components(labels, scores)
    auc = _area(above, below)
    margin = _scipy_stats().norm.isf((1 - _check_level(level)) / 2) * _standard_error(above, below)
    low, high = np.clip([auc - margin, auc + margin], 0, 1)
    return float(low), float(high)


def _structural_components(labels: ArrayLike, scores: ArrayLike) -> tuple[_Array, _Array]:
    """Of each case of class 1, the fraction of class 0 that scores lower; of each of class 0, that of 1 above it."""
    y, x = _finite(labels, scores)
    _check_classes(y, 2)
    if x.ndim != 1:
        raise ValueError(f"scores must be [n], not {list(x.shape)}")
    positive = y == 1
    rank = _scipy_stats().rankdata
    ranks = rank(x)
    with np.errstate(divide="ignore", invalid="ignore"):
        above = (ranks[positive] - rank(x[positive])) / (~positive).sum()
        below = 1 - (ranks[~positive] - rank(x[~positive])) / positive.sum()
    return above, below


def _area(above: _Array, below: _Array) -> float:
    return float(above.mean()) if len(above) and len(below) else float("nan")


def _standard_error(above: _Array, below: _Array) -> float:
    if min(len(above), len(below)) < 2:
        return float("nan")
    return float(np.sqrt(above.var(ddof=1) / len(above) + below.var(ddof=1) / len(below)))


def _scipy_stats() -> Any:
    try:
        from scipy import stats
    except ModuleNotFoundError as error:
        raise MissingExtraError("scipy", "eval") from error
    return stats


# --- Brain age ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AgeBiasCorrection:
    """Undoes what regression to the mean does to predicted ages: too old for the young, too young for the old.

    Attributes:
        slope: Of predicted on true age, where it was fitted; below 1 as a rule.
        intercept: In years.
        rule: "cole" or "beheshti"; see `age_bias_correction`.
    """

    slope: float
    intercept: float
    rule: AgeBiasRule = "cole"

    def __call__(self, predictions: ArrayLike, ages: ArrayLike | None = None) -> _Array:
        """The predicted ages [n], corrected, in years.

        Args:
            predictions: [n] predicted ages.
            ages: [n] true ages; Beheshti's rule needs them, Cole's does not look at them.

        Raises:
            ValueError: Ages are missing where they are needed, or do not fit.
        """
        predictions = np.asarray(predictions, dtype=np.float64)
        if self.rule == "cole":
            return (predictions - self.intercept) / self.slope
        if ages is None:
            raise ValueError("Beheshti's rule needs the true ages; Cole's corrects without them (rule='cole')")
        true, predicted = _finite(ages, predictions)
        return predicted - (self.slope * true + self.intercept - true)


def age_bias_correction(
    ages_train: ArrayLike, predictions_train: ArrayLike, *, rule: AgeBiasRule = "cole"
) -> AgeBiasCorrection:
    """Fit a correction of predicted ages: a line of predicted on true age.

    Fit it on predictions of scans that the model was not trained on (the validation set, or cross-validation within the
    training set), and never on the test set.

    - "cole" (Cole et al. 2018, doi:10.1038/mp.2017.62): (prediction − intercept) / slope. It is the default, for it
      needs no true age of the person whose age is predicted, so that the result is still a prediction. Its errors are
      larger where slope is below 1.
    - "beheshti" (Beheshti et al. 2019, doi:10.1016/j.nicl.2019.102063): prediction − (slope · age + intercept − age).
      It takes away the part of the error that the true age explains, and so puts the true age into the result: MAE and
      r2 after it look better than the model is, even for a model that knows nothing (Butler et al. 2021,
      doi:10.1002/hbm.25533). It is for brain-age gaps in group comparisons; give no MAE after it.

    Args:
        ages_train: [n] true ages, in years.
        predictions_train: [n] predicted ages, in years.
        rule: "cole" or "beheshti".

    Raises:
        ValueError: Numbers are not finite or lengths differ; ages are all one; or, for Cole's rule, predictions do not
            rise with age.
    """
    if rule not in ("cole", "beheshti"):
        raise ValueError(f"no rule {rule!r}; there are 'cole' and 'beheshti'")
    ages, predictions = _finite(ages_train, predictions_train)
    if predictions.ndim != 1 or np.ptp(ages) == 0:
        raise ValueError("a line of predicted on true age needs [n] predictions of people of different ages")
    slope, intercept = np.polyfit(ages, predictions, 1)
    if rule == "cole" and slope < _LEAST_SLOPE:
        raise ValueError(
            f"predictions do not rise with age (slope {slope:.3g}): Cole's correction would divide by that"
        )
    return AgeBiasCorrection(float(slope), float(intercept), rule)


# --- Reliability ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ICC:
    """Intraclass correlations of a single measurement, Shrout & Fleiss 1979 (doi:10.1037/0033-2909.86.2.420).

    Attributes:
        agreement: ICC(2,1), two-way random, absolute agreement: a shift between sessions counts as disagreement.
        consistency: ICC(3,1), two-way mixed: a shift between sessions does not count.
    """

    agreement: float
    consistency: float


def icc(values: ArrayLike) -> ICC:
    """ICC(2,1) and ICC(3,1) of [subjects, sessions] measurements; nan where all are equal.

    Raises:
        ValueError: Fewer than two subjects or sessions, or a number that is not finite.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or min(table.shape) < 2 or not np.isfinite(table).all():
        raise ValueError(f"an ICC needs finite [subjects, sessions], two of each at least, not {list(table.shape)}")
    subjects, sessions = table.shape
    table = table - table[0, 0]  # exactly 0 for equal values
    subject, session = table.mean(axis=1, keepdims=True), table.mean(axis=0, keepdims=True)
    between_subjects = sessions * subject.var(ddof=1)
    between_sessions = subjects * session.var(ddof=1)
    residual = ((table - subject - session + table.mean()) ** 2).sum() / ((subjects - 1) * (sessions - 1))
    signal, total = between_subjects - residual, between_subjects + (sessions - 1) * residual
    with np.errstate(divide="ignore", invalid="ignore"):
        agreement = signal / (total + sessions * (between_sessions - residual) / subjects)
        return ICC(float(agreement), float(signal / total))


# --- Checks ---------------------------------------------------------------------------------------


def _checked(labels: ArrayLike, predictions: ArrayLike, kind: Kind) -> tuple[_Array, _Array]:
    """Labels and predictions in float64, if they are what the kind says."""
    if kind not in _METRICS:
        raise ValueError(f"no kind {kind!r}; there are {', '.join(_METRICS)}")
    y, p = _finite(labels, predictions)
    if p.ndim != (2 if kind == "multiclass" else 1):
        raise ValueError(
            f"{kind} predictions must be {'[n, classes]' if kind == 'multiclass' else '[n]'}, not {p.shape}"
        )
    if kind != "regression":
        _check_classes(y, p.shape[1] if kind == "multiclass" else 2)
        if p.min() < 0 or p.max() > 1:
            raise ValueError(
                f"predictions from {p.min():.3g} to {p.max():.3g} are no probabilities; put logits through a "
                f"{'softmax' if kind == 'multiclass' else 'sigmoid'}"
            )
    if kind == "multiclass" and np.abs(p.sum(axis=1) - 1).max() > _PROBABILITY_TOLERANCE:
        raise ValueError("the probabilities of a case do not sum to 1; put logits through a softmax")
    return y, p


def _finite(labels: ArrayLike, predictions: ArrayLike) -> tuple[_Array, _Array]:
    y, p = np.asarray(labels, dtype=np.float64), np.asarray(predictions, dtype=np.float64)
    if y.ndim != 1 or not len(y) or not p.ndim or len(p) != len(y):
        raise ValueError(
            f"labels {list(y.shape)} and predictions {list(p.shape)} do not fit; give [n] labels, n above 0"
        )
    for name, values in (("labels", y), ("predictions", p)):
        wrong = int((~np.isfinite(values)).sum())
        if wrong:
            raise ValueError(f"{wrong} of the {name} are not finite; leave these cases out, or find what made them")
    return y, p


def _check_classes(labels: _Array, classes: int) -> None:
    strange = sorted(set(labels.tolist()) - set(range(classes)))
    if strange:
        raise ValueError(f"labels must be classes 0 to {classes - 1}, not {', '.join(f'{v:g}' for v in strange[:5])}")


def _check_level(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, and must be between 0 and 1")
    return level
