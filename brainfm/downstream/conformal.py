"""Split-conformal prediction: intervals and sets that hold the truth as often as was asked for, whatever the model.

Scores are of scans that the model did not learn from: the validation part. The promise is on average over new scans
that are like them (exchangeable): not for each scan, nor for another site or scanner. It is a little too good where the
validation part also chose the epoch, and where several of its scans are of one patient.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from brainfm.downstream.statistics import Kind
from brainfm.errors import BrainfmError, MissingExtraError

try:
    from scipy.stats import betabinom
except ModuleNotFoundError as error:
    raise MissingExtraError(error.name or "scipy", "eval") from error


def nonconformity(labels: ArrayLike, predictions: ArrayLike, kind: Kind) -> NDArray[np.float64]:
    """[n]: how far predictions are from the truth: |label − prediction|, or 1 − the probability of the label's class.

    Args:
        labels: [n] numbers, or classes from 0.
        predictions: [n] numbers or probabilities of class 1, or [n, classes] probabilities.
        kind: What the labels are.
    """
    truth, guesses = np.asarray(labels), np.asarray(predictions, dtype=np.float64)
    if kind == "regression":
        return np.abs(truth - guesses)
    chosen: NDArray[np.float64] = probabilities(guesses)[np.arange(len(truth)), truth.astype(int)]
    return 1 - chosen


def probabilities(predictions: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n] probabilities of class 1 as [n, 2] of both; [n, classes] as they are."""
    return np.stack([1 - predictions, predictions], axis=1) if predictions.ndim == 1 else predictions


def radius(scores: ArrayLike, coverage: float) -> float:
    """The least score q such that a new one is at most q with probability `coverage` or more.

    The ⌈(n + 1) · coverage⌉-th smallest of n scores (Vovk et al. 2005; Lei et al. 2018,
    doi:10.1080/01621459.2017.1307116); infinite where n is too small for that, see `least_scans`.

    Raises:
        BrainfmError: The coverage is not between 0 and 1.
    """
    least_scans(coverage)
    ordered = np.sort(np.asarray(scores, dtype=np.float64))
    rank = _ceil((len(ordered) + 1) * coverage)
    return float(ordered[rank - 1]) if rank <= len(ordered) else math.inf


def least_scans(coverage: float) -> int:
    """How many scores a finite radius of a coverage takes: 9 of 0.9, 19 of 0.95. Raises BrainfmError as `radius`."""
    if not 0 < coverage < 1:
        raise BrainfmError(f"coverage is {coverage}, and must be between 0 and 1, such as 0.9")
    return _ceil(coverage / (1 - coverage))


def expected_coverage(scores: int, tested: int, coverage: float, runs: int = 1) -> tuple[float, float]:
    """How often the truth should be held by runs with so many scores and tested scans: the mean, and its std.

    Of one run the number held has the beta-binomial law of k = ⌈(n + 1) · coverage⌉ and n + 1 − k (Vovk 2012,
    arXiv:1209.2673; Angelopoulos & Bates 2023, doi:10.1561/2200000101): the mean is k / (n + 1), which is above what
    was asked for where n is small. The std of several runs is that of independent ones.
    """
    k = _ceil((scores + 1) * coverage)
    if k > scores:
        return 1.0, 0.0
    law = betabinom(tested, k, scores + 1 - k)
    return float(law.mean() / tested), float(law.std() / tested / math.sqrt(runs))


def _ceil(value: float) -> int:
    """Up to the next whole number, but not for what rounding added: (9 + 1) · 0.9 is 9."""
    return math.ceil(value - 1e-9)


def prediction_sets(predictions: ArrayLike, q: float) -> NDArray[np.bool_]:
    """[n, classes]: which classes have 1 − probability of at most q: all that are not refused at that coverage.

    A set of several says that the model cannot tell them apart; an empty one that no class fits, which is rare where
    q comes from scans like these.
    """
    return 1 - probabilities(np.asarray(predictions, dtype=np.float64)) <= q
