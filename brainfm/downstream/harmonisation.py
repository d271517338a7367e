"""ComBat, CovBat and their longitudinal forms as a step of a pipeline: fitted on given rows, never on a test part.

The formulas are those of neuroCombat (Johnson et al. 2007, doi:10.1093/biostatistics/kxj037; Fortin et al. 2018,
doi:10.1016/j.neuroimage.2017.11.024), CovBat (Chen et al. 2022, doi:10.1002/hbm.25688) and longitudinal ComBat (Beer et
al. 2020, doi:10.1016/j.neuroimage.2020.117129), with what is fitted kept apart from what is changed. They are ours
because no package has all: neuroCombat harmonises all rows at once, combatlearn 2.3 draws its priors from a feature's
sites in place of a site's features, which gives other numbers, and longitudinal ComBat is in R alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainfm.downstream.features import table_of
from brainfm.downstream.plan import NO_EB, Plan
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
_SHARES = np.linspace(0, 0.99, 34)  # of the variance that is between patients, where a search of the best begins


class Harmoniser(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """A scikit-learn transformer: takes away what is a site's in mean and variance, and with "covbat" in covariance.

    A row is a scan's features, and after them the number of its site (`sites_of`; below 0 is unknown), of the
    longitudinal methods the number of its patient, and `covariates` numbers that are protected, whose part is put back.
    Features of sites with fewer than `LEAST_OF_A_SITE` fitted rows stay as they are, and so do all where there are no
    two sites (`check_sites` refuses that of a task).

    The longitudinal methods give each patient a level of their own, which is protected too: a random intercept, by
    restricted maximum likelihood a feature. Of a patient who was not fitted it is predicted (the best linear unbiased
    prediction) from the rows of theirs that are transformed together, by the fitted variances.

    Empirical Bayes draws a site's shift and variance of a feature towards those of all its features. What that leaves
    of many features that go together, as an embedding's do, a probe can add up; "-noeb" after a method leaves each
    feature's own estimates as they are (neuroCombat's `eb=False`).

    Args:
        method: "combat", "covbat", "longcombat" or "longcovbat"; "combat-noeb" and so on.
        covariates: How many columns at the end are protected.
    """

    def __init__(self, method: str = "combat", covariates: int = 0) -> None:
        self.method, self.covariates = method, covariates

    @classmethod
    def of(cls, method: str, columns: _Array) -> Harmoniser:
        """One for rows that end in columns of `beside`."""
        return cls(method, columns.shape[1] - 1 - is_longitudinal(method))

    def fit(self, rows: _Array, labels: Any = None) -> Harmoniser:  # noqa: ARG002 - scikit-learn's
        """Learn what is a site's, and how features depend on covariates."""
        features, site, patient, covariates = self._parts(rows)
        self.sites_ = np.array(enough(site, np.arange(len(site))), dtype=np.float64)
        if len(self.sites_) < 2:
            self.sites_ = np.empty(0)
            return self
        of = self._members(site)
        known = of >= 0
        features, covariates, patient, of = features[known], covariates[known], patient[known], of[known]
        one_hot = np.eye(len(self.sites_))[of]
        design = np.hstack([one_hot, covariates])
        slopes = np.linalg.lstsq(design, features, rcond=None)[0]
        spread = np.sqrt(((features - design @ slopes) ** 2).mean(axis=0))
        self.varies_ = spread > 1e-12 * np.maximum(np.abs(features.mean(axis=0)), 1)  # one that does not is left alone
        self.ratio_ = np.zeros(len(spread))
        if is_longitudinal(self.method):
            found = random_intercepts(features[:, self.varies_], design, patient)
            slopes[:, self.varies_], spread[self.varies_], self.ratio_[self.varies_] = found
        self.levels_, self.slopes_ = slopes[: len(self.sites_)], slopes[len(self.sites_) :]
        self.mean_ = one_hot.mean(axis=0) @ self.levels_
        self.spread_ = np.where(self.varies_, spread, 1)
        standard = (features - self._expected(features, of, patient, covariates)) / self.spread_
        parts = [standard[of == n] for n in range(len(self.sites_))]
        self.shift_, self.scale_ = np.zeros((len(parts), len(spread))), np.ones((len(parts), len(spread)))
        for n, part in enumerate(parts):
            varying = part[:, self.varies_]
            estimates = _own if self.method.endswith(NO_EB) else _empirical_bayes
            self.shift_[n, self.varies_], self.scale_[n, self.varies_] = estimates(varying)
        if "covbat" in self.method:
            self._fit_components(self._shifted(standard, of), of)
        return self

    def transform(self, rows: _Array) -> _Array:
        """[n, d]: the features, harmonised, without the columns after them."""
        features, site, patient, covariates = self._parts(rows)
        of = self._members(site)
        known = of >= 0
        if not known.any():
            return features
        expected = self._expected(features[known], of[known], patient[known], covariates[known])
        standard = self._shifted((features[known] - expected) / self.spread_, of[known])
        if "covbat" in self.method:
            scores = (standard - self.centre_) / self.width_ @ self.components_
            moved = (scores - self.score_shift_[of[known]]) / self.score_scale_[of[known]] * self.score_spread_
            standard = standard + (moved + self.score_mean_ - scores) @ self.components_.T * self.width_
        found: _Array = features.copy()
        found[known] = standard * self.spread_ + expected
        return found

    def _parts(self, rows: _Array) -> tuple[_Array, _Array, _Array, _Array]:
        """Features, sites, patients (each row's own, where they do not matter) and covariates."""
        long = is_longitudinal(self.method)
        place = rows.shape[1] - self.covariates - 1 - long
        patient = rows[:, place + 1] if long else np.arange(float(len(rows)))
        return rows[:, :place].astype(np.float64), rows[:, place], patient, rows[:, place + 1 + long :].astype(float)

    def _expected(self, features: _Array, of: NDArray[np.intp], patient: _Array, covariates: _Array) -> _Array:
        """[n, d]: what a row has on average whatever its site, by its covariates and its patient's own level."""
        told: _Array = self.mean_ + covariates @ self.slopes_
        if not self.ratio_.any():
            return told
        left = features - covariates @ self.slopes_ - self.levels_[of]
        _, whose, scans = np.unique(patient, return_inverse=True, return_counts=True)
        sums = np.zeros((len(scans), features.shape[1]))
        np.add.at(sums, whose, left)
        own = self.ratio_ / (1 + self.ratio_ * scans[:, None]) * sums
        return told + own[whose]

    def _members(self, site: _Array) -> NDArray[np.intp]:
        """For each row which of the fitted sites it is of; −1 is none."""
        found = site[:, None] == self.sites_
        return np.where(found.any(axis=1), found.argmax(axis=1) if found.shape[1] else 0, -1)

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


def _own(standard: _Array) -> tuple[_Array, _Array]:
    """A site's shift and variance of each feature, each by itself."""
    scale = standard.var(axis=0, ddof=1)
    return standard.mean(axis=0), np.where(scale == 0, 1, scale)


def _empirical_bayes(standard: _Array) -> tuple[_Array, _Array]:
    """The same, drawn towards what they are over all of its features."""
    shift, scale = _own(standard)
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


def random_intercepts(features: _Array, design: _Array, patient: _Array) -> tuple[_Array, _Array, _Array]:
    """A linear model with an intercept of each patient's own, of each feature, by restricted maximum likelihood.

    The likelihood is written in the one number that is left when slopes and error are those that are best for it, how
    much of the variance is between patients, and that is searched for all features at once.

    Args:
        features: [n, d], none of them constant.
        design: [n, p] of full rank.
        patient: [n] numbers.

    Returns:
        Slopes [p, d], the error's std [d], and the patients' variance in units of the error's [d].
    """
    n, p = design.shape
    _, whose, scans = np.unique(patient, return_inverse=True, return_counts=True)
    centre, width = features.mean(axis=0), features.std(axis=0)
    y = (features - centre) / width
    of_design, of_y = np.zeros((len(scans), p)), np.zeros((len(scans), y.shape[1]))
    np.add.at(of_design, whose, design)
    np.add.at(of_y, whose, y)
    outer = np.einsum("jp,jq->jpq", of_design, of_design).reshape(len(scans), -1)
    within, across, total = (design.T @ design).ravel(), design.T @ y, (y**2).sum(axis=0)

    def solved(share: _Array) -> tuple[_Array, _Array, _Array]:
        """Slopes [d, p], the sum of squares that is left, and twice the negative log-likelihood but for a constant."""
        ratio = share / (1 - share)
        weight = ratio / (1 + ratio * scans[:, None])
        normal = (within - weight.T @ outer).reshape(-1, p, p)
        right = (across - of_design.T @ (weight * of_y)).T
        slopes = np.linalg.solve(normal, right[..., None])[..., 0]
        left = np.maximum(total - (weight * of_y**2).sum(axis=0) - (slopes * right).sum(axis=1), 1e-12)
        spread = np.log1p(ratio * scans[:, None]).sum(axis=0) + np.linalg.slogdet(normal)[1]
        return slopes, left, spread + (n - p) * np.log(left)

    every = [solved(np.full(y.shape[1], share))[2] for share in _SHARES]
    best, step = _SHARES[np.argmin(every, axis=0)], _SHARES[1]
    low, high = np.maximum(best - step, 0), np.minimum(best + step, 1 - 1e-6)
    golden = (np.sqrt(5) - 1) / 2
    for _ in range(30):
        first, second = high - golden * (high - low), low + golden * (high - low)
        nearer = solved(first)[2] < solved(second)[2]
        low, high = np.where(nearer, low, first), np.where(nearer, second, high)
    share = (low + high) / 2
    share = np.where(solved(np.zeros_like(share))[2] <= solved(share)[2], 0, share)
    slopes, left, _ = solved(share)
    found = slopes.T * width
    found += np.linalg.lstsq(design, np.ones(n), rcond=None)[0][:, None] * centre
    return found, np.sqrt(left / (n - p)) * width, share / (1 - share)


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


def check_sites(data: TaskData, plan: Plan, train: Sequence[int], test: Sequence[int]) -> None:
    """Raise TaskError where a training part has no two sites, or what cannot be told apart; or a test part no site."""
    column = plan.site
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
    if is_longitudinal(plan.harmonise) and len({data.patients[row] for row in learned}) == len(learned):
        raise TaskError(
            f"{data.task.name}: no patient has two training scans, so nothing is known of a patient's own level; use "
            f"--harmonise {plan.harmonise.removeprefix('long')}"
        )
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


def is_longitudinal(method: str) -> bool:
    """Whether a method gives each patient a level of their own."""
    return method.startswith("long")


def beside(data: TaskData, column: str, train: Sequence[int], method: str = "") -> _Array:
    """The columns [n, 1 + c] that `Harmoniser` wants after the features: site, patient, and the task's covariates."""
    _, site = sites_of(data, column)
    rows, names = [site[:, None].astype(np.float64)], protects(data, column)
    if is_longitudinal(method):
        rows.append(np.unique(data.patients, return_inverse=True)[1][:, None].astype(np.float64))
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
    steps = [Harmoniser.of(method, columns)] if method else []
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
