"""ComBat and CovBat as a step of a pipeline: fitted on the rows it is given, so that a test part is never looked at.

The formulas are those of neuroCombat (Johnson et al. 2007, doi:10.1093/biostatistics/kxj037; Fortin et al. 2018,
doi:10.1016/j.neuroimage.2017.11.024) and CovBat (Chen et al. 2022, doi:10.1002/hbm.25688), with what is fitted kept
apart from what is changed. They are ours because no package has both: neuroCombat harmonises all rows at once, and
combatlearn 2.3 draws its priors from a feature's sites in place of a site's features, which gives other numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainfm.downstream.features import table_of
from brainfm.downstream.probe import fit_probe, predict_probe
from brainfm.downstream.statistics import bootstrap_interval, metrics
from brainfm.downstream.task import TaskData
from brainfm.errors import MissingExtraError, TaskError
from brainfm.tabular import is_missing

try:
    from sklearn.base import BaseEstimator, TransformerMixin
except ModuleNotFoundError as error:
    raise MissingExtraError("scikit-learn", "eval") from error

_Array = NDArray[np.float64]

LEAST_OF_A_SITE = 5  # training scans; ours: below, a site's own variance is chance
COVBAT_VARIANCE = 0.95  # of the components that CovBat harmonises, as its authors' code has it
_TOLERANCE, _ROUNDS = 1e-4, 1000  # of the empirical Bayes estimates, as neuroCombat has it; ours


class Harmoniser(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """A scikit-learn transformer: takes away what is a site's in mean and variance, and with "covbat" in covariance.

    A row is a scan's features, and after them the number of its site (`sites_of`; below 0 is unknown) and `covariates`
    numbers that are protected, whose part is put back. Features of sites with fewer than `LEAST_OF_A_SITE` fitted rows
    stay as they are, and so do all where there are no two sites (`check_sites` refuses that of a task).

    Args:
        method: "combat" or "covbat".
        covariates: How many columns after the site are protected.
    """

    def __init__(self, method: str = "combat", covariates: int = 0) -> None:
        self.method, self.covariates = method, covariates

    def fit(self, rows: _Array, labels: Any = None) -> Harmoniser:  # noqa: ARG002 - scikit-learn's
        """Learn what is a site's, and how features depend on covariates."""
        features, site, covariates = self._parts(rows)
        self.sites_ = np.array(enough(site, np.arange(len(site))), dtype=np.float64)
        if len(self.sites_) < 2:
            self.sites_ = np.empty(0)
            return self
        of = self._members(site)
        known = of >= 0
        features, covariates, of = features[known], covariates[known], of[known]
        one_hot = np.eye(len(self.sites_))[of]
        design = np.hstack([one_hot, covariates])
        slopes = np.linalg.lstsq(design, features, rcond=None)[0]
        self.slopes_ = slopes[len(self.sites_) :]
        self.mean_ = one_hot.mean(axis=0) @ slopes[: len(self.sites_)]
        spread = np.sqrt(((features - design @ slopes) ** 2).mean(axis=0))
        self.varies_ = spread > 1e-12 * np.maximum(np.abs(self.mean_), 1)  # a feature that does not is left alone
        self.spread_ = np.where(self.varies_, spread, 1)
        standard = self._standard(features, covariates)
        parts = [standard[of == n] for n in range(len(self.sites_))]
        self.shift_, self.scale_ = np.zeros((len(parts), len(spread))), np.ones((len(parts), len(spread)))
        for n, part in enumerate(parts):
            self.shift_[n, self.varies_], self.scale_[n, self.varies_] = _empirical_bayes(part[:, self.varies_])
        if self.method == "covbat":
            self._fit_components(self._shifted(standard, of), of)
        return self

    def transform(self, rows: _Array) -> _Array:
        """[n, d]: the features, harmonised, without the columns after them."""
        features, site, covariates = self._parts(rows)
        of = self._members(site)
        known = of >= 0
        if not known.any():
            return features
        standard = self._shifted(self._standard(features[known], covariates[known]), of[known])
        if self.method == "covbat":
            scores = (standard - self.centre_) / self.width_ @ self.components_
            moved = (scores - self.score_shift_[of[known]]) / self.score_scale_[of[known]] * self.score_spread_
            standard = standard + (moved + self.score_mean_ - scores) @ self.components_.T * self.width_
        found: _Array = features.copy()
        found[known] = standard * self.spread_ + self.mean_ + covariates[known] @ self.slopes_
        return found

    def _parts(self, rows: _Array) -> tuple[_Array, _Array, _Array]:
        place = rows.shape[1] - self.covariates - 1
        return rows[:, :place].astype(np.float64), rows[:, place], rows[:, place + 1 :].astype(np.float64)

    def _members(self, site: _Array) -> NDArray[np.intp]:
        """For each row which of the fitted sites it is of; −1 is none."""
        found = site[:, None] == self.sites_
        return np.where(found.any(axis=1), found.argmax(axis=1) if found.shape[1] else 0, -1)

    def _standard(self, features: _Array, covariates: _Array) -> _Array:
        standard: _Array = (features - self.mean_ - covariates @ self.slopes_) / self.spread_
        return standard

    def _shifted(self, standard: _Array, of: NDArray[np.intp]) -> _Array:
        shifted: _Array = (standard - self.shift_[of]) / np.sqrt(self.scale_[of])
        return shifted

    def _fit_components(self, standard: _Array, of: NDArray[np.intp]) -> None:
        """CovBat's second step: the scores of the first principal components get one mean and variance in all sites."""
        self.centre_, width = standard.mean(axis=0), standard.std(axis=0, ddof=1)
        self.width_ = np.where(width > 0, width, 1)
        _, singular, directions = np.linalg.svd((standard - self.centre_) / self.width_, full_matrices=False)
        share = np.cumsum(singular**2) / (singular**2).sum()
        self.components_ = directions[: int(np.searchsorted(share, COVBAT_VARIANCE)) + 1].T
        scores = (standard - self.centre_) / self.width_ @ self.components_
        each = [scores[of == n] for n in range(len(self.sites_))]
        self.score_mean_ = scores.mean(axis=0)
        residual = np.concatenate([part - part.mean(axis=0) for part in each])
        self.score_spread_ = np.sqrt((residual**2).mean(axis=0))
        self.score_shift_ = np.stack([part.mean(axis=0) for part in each])
        self.score_scale_ = np.stack([part.std(axis=0, ddof=1) for part in each])


def _empirical_bayes(standard: _Array) -> tuple[_Array, _Array]:
    """A site's shift and variance of each feature, drawn towards what they are over all of its features."""
    shift, scale = standard.mean(axis=0), standard.var(axis=0, ddof=1)
    scale = np.where(scale == 0, 1, scale)
    if len(shift) < 2 or np.ptp(scale) == 0:
        return shift, scale  # nothing to borrow strength from
    prior, variance = shift.mean(), shift.var(ddof=1)
    mean, spread = scale.mean(), scale.var(ddof=1)
    a, b = 2 + mean**2 / spread, mean + mean**3 / spread
    n, sums, squares = len(standard), standard.sum(axis=0), (standard**2).sum(axis=0)
    found, width = shift, scale
    for _ in range(_ROUNDS):
        new = (variance * n * shift + width * prior) / (variance * n + width)
        wide = (0.5 * (squares - 2 * new * sums + n * new**2) + b) / (n / 2 + a - 1)
        change = max(
            (np.abs(new - found) / np.maximum(np.abs(found), 1e-12)).max(), (np.abs(wide - width) / width).max()
        )
        found, width = new, wide
        if change <= _TOLERANCE:
            break
    return found, width


# --- Of a task ------------------------------------------------------------------------------------


def sites_of(data: TaskData, column: str) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """The sites of a task by name, and of each scan the number of its own; −1 is unknown. Raises TaskError."""
    columns = list(data.records[0].extra)
    if column not in columns:
        raise TaskError(f"{data.task.name}: --site {column}: there is no such column; it has {', '.join(columns)}")
    if column == data.task.label:
        raise TaskError(f"{data.task.name}: --site {column} is what is to be predicted; harmonised, nothing is left")
    texts = ["" if is_missing(record.extra[column]) else record.extra[column] for record in data.records]
    names = sorted(set(texts) - {""})
    return tuple(names), np.array([names.index(text) if text else -1 for text in texts])


def check_sites(data: TaskData, column: str, train: Sequence[int], test: Sequence[int]) -> None:
    """Raise TaskError where a training part has no two sites, or what cannot be told apart; or a test part no site."""
    _, site = sites_of(data, column)
    fitted = enough(site, train)
    if len(fitted) < 2:
        raise TaskError(
            f"{data.task.name}: {column} has {len(fitted)} values with {LEAST_OF_A_SITE} training scans or more, and "
            "harmonisation needs two; leave --harmonise out, or put small sites together"
        )
    if not np.isin(site[list(test)], fitted).any():
        raise TaskError(
            f"{data.task.name}: no scan of the test part is of a {column} that is in training: what is a site's cannot "
            "be known of another; leave --harmonise out"
        )
    learned = [row for row in train if site[row] in fitted]
    design = np.hstack([site[learned, None] == fitted, beside(data, column, train)[learned, 1:]])
    if np.linalg.matrix_rank(design) < design.shape[1]:
        raise TaskError(
            f"{data.task.name}: the covariates {', '.join(protects(data, column))} tell {column}, or one another, "
            "exactly: what is the site's cannot be told from what is theirs; protect fewer (--covariates)"
        )


def enough(site: NDArray[Any], train: Sequence[int] | NDArray[np.intp]) -> list[int]:
    """The sites of which the training part has enough scans to be harmonised."""
    numbers, counts = np.unique(site[list(train)], return_counts=True)
    return [int(n) for n, count in zip(numbers, counts, strict=True) if n >= 0 and count >= LEAST_OF_A_SITE]


def beside(data: TaskData, column: str, train: Sequence[int]) -> _Array:
    """The columns [n, 1 + c] that `Harmoniser` wants after the features: site, and the task's covariates."""
    _, site = sites_of(data, column)
    rows, names = [site[:, None].astype(np.float64)], protects(data, column)
    if names:
        categorical = tuple(name for name in data.task.categorical if name in names)
        task = replace(data.task, covariates=names, categorical=categorical)
        protected = table_of(replace(data, task=task), [None] * len(site), train)
        rows.append(protected[:, np.ptp(protected[list(train)], axis=0) > 0])
    return np.hstack(rows)


def protects(data: TaskData, column: str) -> tuple[str, ...]:
    """The covariates that harmonisation leaves what they are; the site itself is none."""
    return tuple(name for name in data.task.covariates if name != column)


def site_leak(
    features: _Array,
    columns: _Array,
    train: Sequence[int],
    test: Sequence[int],
    patients: Sequence[str],
    seed: int,
    *,
    method: str = "",
    n: int = 1000,
) -> tuple[float, float, float] | None:
    """How well a linear probe tells the sites apart: balanced accuracy on the test part, and its interval.

    Args:
        features: [n, d].
        columns: [n, 1 + c] of `beside`.
        train: Rows to learn from.
        test: Rows to look at.
        patients: [n] of the scans.
        seed: Of folds and resamples.
        method: Harmonise by it first, fitted on the training rows; "" as they are.
        n: Resamples.

    Returns:
        None where the test part has no two of the sites that training has.
    """
    site = columns[:, 0].astype(np.int64)
    sites = [number for number in enough(site, train) if (site[test] == number).any()]
    if len(sites) < 2:
        return None
    learn, look = ([row for row in rows if site[row] in sites] for rows in (train, test))
    label = np.searchsorted(sites, site)
    rows = np.hstack([features, columns]) if method else features
    steps = [Harmoniser(method, columns.shape[1] - 1)] if method else []
    probe = fit_probe(
        rows[learn], label[learn], "multiclass", patients=[patients[row] for row in learn], seed=seed, before=steps
    )
    guesses, truth, groups = predict_probe(probe, rows[look], "multiclass"), label[look], [patients[n] for n in look]
    value = metrics(truth, guesses, "multiclass")["balanced_accuracy"]
    interval = bootstrap_interval(truth, guesses, "multiclass", "balanced_accuracy", groups=groups, n=n, seed=seed)
    return value, *interval


def describe_sites(
    features: NDArray[Any],
    columns: _Array,
    train: Sequence[int],
    test: Sequence[int],
    *,
    patients: Sequence[str],
    method: str,
    seed: int = 0,
    n: int = 1000,
) -> dict[str, Any]:
    """What a run records of its sites: how well they are told apart before and after, and what is left as it is."""
    site = columns[:, 0].astype(np.int64)
    fitted = enough(site, train)
    seen = [number for number in fitted if (site[list(test)] == number).any()]
    either = {
        name: site_leak(features, columns, train, test, patients, seed, method=how, n=n)
        for name, how in (("before", ""), ("after", method))
    }
    left = {name: int((~np.isin(site[list(rows)], fitted)).sum()) for name, rows in (("train", train), ("test", test))}
    return {"sites": len(fitted), "chance": 1 / len(seen) if len(seen) > 1 else None, **either, "left": left}
