"""How well embeddings foretell how a patient fares: the slope of a measure, and the time to an event.

Folds are of patients, and all that is fitted (scaling, components, strengths) is fitted on the other folds. A patient's
prediction is the mean over several divisions into folds; scores and their bootstrap intervals, over patients, are of
those means.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from brainfm.downstream.covariates import encoded
from brainfm.downstream.probe import RIDGE_ALPHA
from brainfm.downstream.statistics import bootstrap_interval, metrics
from brainfm.errors import MissingExtraError, TaskError
from brainfm.manifest import ScanRecord

if TYPE_CHECKING:
    from brainfm.downstream.longitudinal import Visits

try:
    import pandas as pd
    from sklearn.decomposition import PCA
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import KFold, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
except ModuleNotFoundError as error:
    raise MissingExtraError(error.name or "scikit-learn", "eval") from error

_Array: TypeAlias = NDArray[np.float64]

FOLDS, DIVISIONS = 5, 3
LEAST_PATIENTS = 20  # with a slope, for five folds of four
LEAST_EVENTS = 10
EVENTS_A_COMPONENT = 10  # of the embedding: ten events a variable (Peduzzi et al. 1995)
MOST_COMPONENTS = 20
_PENALTY = 0.1  # ridge penalty of the Cox regressions (ours)
_RESAMPLES = 500
CONTROL = "no image"

ABOUT = (
    f"Predictions of patients in {FOLDS} folds, the mean over {DIVISIONS} divisions; intervals are of 95 %, by "
    "bootstrap over patients. `baseline` is the first scan's embedding, `change` its change a year over the same time "
    f"as the label's, so that it describes what it does not foretell; `{CONTROL}` knows the covariates, and of a slope "
    "the measure at the first scan. Time to event is by Cox regression on principal components of the embedding, one "
    "for ten events; 0.5 is chance."
)
ABOUT_MODELS = (
    "Absolute errors of the same patients, by a linear mixed-effects model with an intercept of each patient's own; "
    "`difference` is the second model's mean error less the first's; p after Holm over this table."
)


@dataclass(frozen=True)
class Score:
    """One score of one set of features.

    Attributes:
        task: What is predicted.
        model: The table of embeddings, or `CONTROL`.
        features: "baseline", "change", "baseline + change", "covariates", or "baseline + covariates".
        metric: "r2", "mae", "pearson" or "concordance".
        value: Of patients that were not learned from.
        low, high: Its 95 % interval.
        patients: How many.
        events: How many of them had the event; 0 of a slope.
    """

    task: str
    model: str
    features: str
    metric: str
    value: float
    low: float
    high: float
    patients: int
    events: int = 0


@dataclass(frozen=True)
class Comparison:
    """Two models' errors on the same patients, by a mixed-effects model.

    Attributes:
        task: What is predicted.
        features: From what.
        first: The model of the first table.
        second: The other.
        difference: The second's mean absolute error less the first's.
        low, high: Its 95 % interval.
        p_value: Two-sided.
        p_holm: After Holm over all comparisons.
        patients: How many.
    """

    task: str
    features: str
    first: str
    second: str
    difference: float
    low: float
    high: float
    p_value: float
    p_holm: float
    patients: int


@dataclass(frozen=True, eq=False)
class Known:
    """What may be known of patients when they are predicted.

    Attributes:
        seen: Their visits.
        baseline: By model, [patients, d] of the first scan.
        change: By model, [followed, d] a year.
        covariates: [patients, c] at the first scan.
    """

    seen: Visits
    baseline: Mapping[str, _Array]
    change: Mapping[str, _Array]
    covariates: _Array

    @classmethod
    def of(
        cls, vectors: Mapping[str, _Array], seen: Visits, records: Sequence[ScanRecord], covariates: Sequence[str]
    ) -> Known:
        """From vectors [n, d] of all scans, by model."""
        first = seen.first
        columns: list[_Array] = []
        for name in covariates:
            if not any(name in records[row].extra for row in first):
                raise TaskError(f"there is no column {name!r} for a covariate")
            texts = [records[row].extra.get(name, "") for row in first]
            columns += encoded(name, texts, range(len(texts)), categorical=False)
        known = np.stack(columns, axis=1) if columns else np.empty((len(first), 0))
        return cls(
            seen,
            {name: found[first] for name, found in vectors.items()},
            {name: seen.slopes(found) for name, found in vectors.items()},
            known,
        )


@dataclass(frozen=True, eq=False)
class Outcome:
    """Scores of a slope, and the models against each other."""

    scores: list[Score]
    comparisons: list[Comparison]


# --- Slopes ---------------------------------------------------------------------------------------


def predict_slope(task: str, known: Known, measured: _Array, seed: int = 0) -> Outcome:
    """Predict the slope a year of a measure, [n] at each scan, of patients that have it at two times or more.

    Raises:
        TaskError: Fewer than `LEAST_PATIENTS` patients have a slope.
    """
    seen = known.seen
    rows = [own[np.isfinite(measured[own])] for own in seen.rows]
    followed = {n: place for place, n in enumerate(seen.followed)}
    usable = [n for n in followed if len(rows[n]) and np.ptp(seen.years[rows[n]]) > 0]
    if len(usable) < LEAST_PATIENTS:
        raise TaskError(f"{task}: {len(usable)} patients have it at two times; {LEAST_PATIENTS} are needed")
    truth = np.array([np.polyfit(seen.years[rows[n]], measured[rows[n]], 1)[0] for n in usable])
    start = np.array([measured[rows[n][0]] for n in usable])
    places = [followed[n] for n in usable]
    sets = {(CONTROL, "covariates"): np.column_stack([known.covariates[usable], start])}
    for model in known.baseline:
        sets[model, "baseline"] = known.baseline[model][usable]
        sets[model, "change"] = known.change[model][places]
        sets[model, "baseline + change"] = np.hstack([sets[model, "baseline"], sets[model, "change"]])
    predicted = {key: _out_of_fold(features, truth, seed) for key, features in sets.items()}
    scores = []
    for (model, features), guess in predicted.items():
        for metric in ("r2", "mae", "pearson"):
            value = metrics(truth, guess, "regression")[metric]
            low, high = bootstrap_interval(truth, guess, "regression", metric, n=_RESAMPLES, seed=seed)
            scores.append(Score(task, model, features, metric, value, low, high, len(usable)))
    return Outcome(scores, _compared(task, predicted, truth, list(known.baseline)))


def _out_of_fold(features: _Array, truth: _Array, seed: int) -> _Array:
    """[n] predictions of a ridge regression that learned from other patients."""
    total = np.zeros(len(truth))
    for learn, look in _divisions(len(truth), seed):
        ridge = make_pipeline(SimpleImputer(), StandardScaler(), RidgeCV(RIDGE_ALPHA))
        total[look] += ridge.fit(features[learn], truth[learn]).predict(features[look])
    mean: _Array = total / DIVISIONS
    return mean


def _divisions(patients: int, seed: int, strata: Any = None) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """The folds of all divisions: whom to learn from, and whom to look at."""
    for division in range(DIVISIONS):
        folds: Any = KFold if strata is None else StratifiedKFold
        yield from folds(FOLDS, shuffle=True, random_state=seed + division).split(np.zeros(patients), strata)


def _compared(
    task: str, predicted: Mapping[tuple[str, str], _Array], truth: _Array, models: Sequence[str]
) -> list[Comparison]:
    """The first model against each other one, from the same features."""
    first, *others = models
    found = []
    for other in others:
        for features in ("baseline", "change", "baseline + change"):
            errors = [np.abs(predicted[model, features] - truth) for model in (first, other)]
            difference, low, high, p_value = mixed_difference(*errors)
            found.append(Comparison(task, features, first, other, difference, low, high, p_value, math.nan, len(truth)))
    if not found:
        return []
    from statsmodels.stats.multitest import multipletests

    corrected = multipletests([one.p_value for one in found], method="holm")[1]
    return [replace(one, p_holm=float(p)) for one, p in zip(found, corrected, strict=True)]


def mixed_difference(first: _Array, second: _Array) -> tuple[float, float, float, float]:
    """Second less first, of errors [n] of the same patients: difference, its 95 % interval, and p.

    A linear mixed-effects model of statsmodels, with a random intercept a patient. Where both err alike it has nothing
    to estimate, and p is 1.
    """
    try:
        from statsmodels.regression.mixed_linear_model import MixedLM
    except ModuleNotFoundError as error:
        raise MissingExtraError("statsmodels", "eval") from error
    if np.allclose(first, second):
        return 0.0, 0.0, 0.0, 1.0
    patients = np.arange(len(first))
    errors, is_second = np.concatenate([first, second]), np.repeat([0.0, 1.0], len(first))
    design = np.column_stack([np.ones(len(errors)), is_second])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a patients' variance of 0 is a result, not a fault
        fit = MixedLM(errors, design, groups=np.concatenate([patients, patients])).fit(reml=True)
    low, high = np.asarray(fit.conf_int())[1]
    return float(fit.fe_params[1]), float(low), float(high), float(fit.pvalues[1])


# --- Time to event --------------------------------------------------------------------------------


def predict_event(task: str, known: Known, happened: _Array, years: _Array, seed: int = 0) -> list[Score]:
    """Concordance of the order in which patients have an event with the risk that was predicted at their first scan.

    Args:
        task: What it is called.
        known: Of the patients.
        happened: [patients] 1 with the event, else 0; nan is left out.
        years: [patients] from the first scan to the event or the last time without it.
        seed: Of folds and resamples.

    Raises:
        TaskError: Events are not 0 and 1, times are not above 0, or too few had the event.
    """
    usable = np.flatnonzero(np.isfinite(happened) & np.isfinite(years))
    event, time = happened[usable], years[usable]
    if not np.isin(event, (0, 1)).all():
        raise TaskError(
            f"{task}: an event is 1 (it happened) or 0 (not yet), not {event[~np.isin(event, (0, 1))][0]:g}"
        )
    if (time <= 0).any():
        raise TaskError(f"{task}: {int((time <= 0).sum())} patients have 0 years or fewer to it; leave them empty")
    if event.sum() < LEAST_EVENTS:
        raise TaskError(f"{task}: {int(event.sum())} patients had it; {LEAST_EVENTS} are needed")
    covariates = known.covariates[usable]
    sets: dict[tuple[str, str], tuple[_Array, _Array]] = {}
    nothing = np.empty((len(usable), 0))
    if covariates.shape[1]:
        sets[CONTROL, "covariates"] = nothing, covariates
    for model, vectors in known.baseline.items():
        sets[model, "baseline"] = vectors[usable], nothing
        if covariates.shape[1]:
            sets[model, "baseline + covariates"] = vectors[usable], covariates
    scores = []
    for (model, features), (embedded, told) in sets.items():
        risk = _risks(embedded, told, time, event, seed)
        value, low, high = _concordance(time, risk, event, seed)
        scores.append(Score(task, model, features, "concordance", value, low, high, len(usable), int(event.sum())))
    return scores


def _risks(embedded: _Array, told: _Array, time: _Array, event: _Array, seed: int) -> _Array:
    """[n] the logarithm of the hazard against the mean patient's, by Cox regressions on other patients."""
    fitter = _cox()
    total = np.zeros(len(time))
    for learn, look in _divisions(len(time), seed, event):
        count = max(1, min(int(event[learn].sum()) // EVENTS_A_COMPONENT, MOST_COMPONENTS, len(learn) - 1))
        parts = []
        if embedded.shape[1]:
            parts.append(make_pipeline(StandardScaler(), PCA(min(count, embedded.shape[1])), StandardScaler()))
        if told.shape[1]:
            parts.append(make_pipeline(SimpleImputer(), StandardScaler()))
        given = [part for part in (embedded, told) if part.shape[1]]
        seen = np.hstack([part.fit_transform(x[learn]) for part, x in zip(parts, given, strict=True)])
        asked = np.hstack([part.transform(x[look]) for part, x in zip(parts, given, strict=True)])
        cox = fitter(penalizer=_PENALTY)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of columns that part events from the rest: the penalty holds them
            frame = pd.DataFrame(seen).rename(columns=str).assign(time=time[learn], event=event[learn])
            cox.fit(frame, duration_col="time", event_col="event")
        total[look] += cox.predict_log_partial_hazard(pd.DataFrame(asked).rename(columns=str)).to_numpy()
    mean: _Array = total / DIVISIONS
    return mean


def _cox() -> Callable[..., Any]:
    try:
        from lifelines import CoxPHFitter
    except ModuleNotFoundError as error:
        raise MissingExtraError("lifelines", "eval") from error
    fitter: Callable[..., Any] = CoxPHFitter
    return fitter


def _concordance(time: _Array, risk: _Array, event: _Array, seed: int) -> tuple[float, float, float]:
    """Harrell's concordance of lifelines, and its 95 % interval by bootstrap over patients."""
    from lifelines.utils import concordance_index

    draw = np.random.default_rng(seed)
    values: list[float] = []
    for _ in range(_RESAMPLES):
        rows = draw.integers(len(time), size=len(time))
        if event[rows].any():
            values.append(concordance_index(time[rows], -risk[rows], event[rows]))
    low, high = np.percentile(values, (2.5, 97.5))
    return float(concordance_index(time, -risk, event)), float(low), float(high)
