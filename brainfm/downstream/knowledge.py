"""What embeddings know, without a task: whose they are, whether they repeat, what leaks in, what is unlike the rest.

Everything takes vectors [n, d], a row a scan, and columns [n] of the same table (`brainfm.Embeddings`: `.vectors` and
`.columns()`), and keeps the scans of a patient together.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from brainfm.downstream.covariates import numbers_of
from brainfm.downstream.statistics import icc, metrics
from brainfm.errors import BrainfmError, MissingExtraError
from brainfm.files import atomic_path
from brainfm.system import torch_threads
from brainfm.tabular import is_missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_Array: TypeAlias = NDArray[np.float64]

GOOD_ICC = 0.75  # "good" reliability and better: Koo & Li 2016, doi:10.1016/j.jcm.2016.02.012

_ROWS = 1024  # scans whose similarities to all others are held at a time
_CATEGORIES = 10  # a column of numbers with more values than this is a scale
_LEGEND = 20  # a legend with more entries than this is not drawn
_DOT, _UNKNOWN = 14, "0.8"  # points²; light grey


# --- Who is scanned -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Retrieval:
    """How often a scan's nearest neighbour is of the same patient.

    Attributes:
        fraction: Of the scans that have another one of their patient; a tie counts by the fraction that is right.
        chance: The fraction that random neighbours would give.
        scans: How many scans were looked up; all others are candidates only.
        patients: Whose they are.
    """

    fraction: float
    chance: float
    scans: int
    patients: int


def retrieval(vectors: ArrayLike, patient_ids: ArrayLike) -> Retrieval:
    """Look for each scan's nearest neighbour, by cosine, among all other scans: is it of the same patient?

    Args:
        vectors: [n, d] embeddings.
        patient_ids: [n] the patient of each scan.

    Raises:
        ValueError: No patient has two scans; lengths differ; a patient is unknown; or a vector is not finite, or 0.
    """
    directions, patients = _directions(vectors), _column(patient_ids, "patient_ids", len(np.asarray(vectors)))
    _, patient, counts = np.unique(patients, return_inverse=True, return_counts=True)
    others = counts[patient] - 1  # scans of the same patient
    queries = np.flatnonzero(others)
    if not len(queries):
        raise ValueError("no patient has two scans; retrieval needs some (check patient_ids)")
    hits = 0.0
    for start in range(0, len(queries), _ROWS):
        rows = queries[start : start + _ROWS]
        similarity = directions[rows] @ directions.T
        similarity[np.arange(len(rows)), rows] = -np.inf
        nearest = similarity >= similarity.max(axis=1, keepdims=True) - 1e-12  # equal vectors differ by rounding
        same = patient[rows][:, None] == patient
        hits += float(((nearest & same).sum(axis=1) / nearest.sum(axis=1)).sum())
    chance = float((others[queries] / (len(patient) - 1)).mean())
    return Retrieval(hits / len(queries), chance, len(queries), int((counts > 1).sum()))


@dataclass(frozen=True)
class SamePatientSimilarity:
    """How well an embedding repeats itself in a second scan.

    Attributes:
        within: Mean cosine similarity of two scans of one patient.
        between: The mean cosine similarity of scans of two patients.
        icc: [d] ICC(2,1) of each dimension (Shrout & Fleiss 1979); nan where it is constant.
        icc_median: Their median, without the constant ones; a fraction of the variance, as they are.
        icc_good: The fraction of all dimensions above `GOOD_ICC`; constant ones are not.
        patients: How many with two scans.
    """

    within: float
    between: float
    icc: _Array
    icc_median: float
    icc_good: float
    patients: int


def same_patient_similarity(vectors: ArrayLike, patient_ids: ArrayLike) -> SamePatientSimilarity:
    """Compare the first two scans, in the order of the rows, of each patient who has two: test and retest.

    Args:
        vectors: [n, d] embeddings.
        patient_ids: [n] the patient of each scan.

    Raises:
        ValueError: Fewer than two patients have two scans; or as of `retrieval`.
    """
    directions, matrix = _directions(vectors), _matrix(vectors)
    _, patient = np.unique(_column(patient_ids, "patient_ids", len(matrix)), return_inverse=True)
    scans = [np.flatnonzero(patient == number)[:2] for number in range(patient.max() + 1)]
    pairs = np.array([pair for pair in scans if len(pair) == 2])
    if len(pairs) < 2:
        raise ValueError(f"{len(pairs)} patients have two scans; test and retest needs two such patients at least")
    first, second = pairs.T
    similarity = directions[first] @ directions[second].T
    within, count = float(similarity.trace()), len(pairs)
    between = (float(similarity.sum()) - within) / (count * (count - 1))
    each = np.array([icc(dimension[pairs]).agreement for dimension in matrix.T])
    known = each[~np.isnan(each)]
    median = float(np.median(known)) if len(known) else float("nan")
    return SamePatientSimilarity(within / count, between, each, median, float((each > GOOD_ICC).mean()), count)


# --- What leaks -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LeakageProbe:
    """How well a linear model reads a column from embeddings of patients it has not seen.

    Attributes:
        balanced_accuracy: The mean recall of the classes, a fraction.
        chance: That of guessing, the fraction 1 / classes.
        accuracy: The fraction of right guesses.
        majority: The fraction that is right by always guessing the commonest class.
        classes: The column's values.
        scans: How many were guessed.
        patients: Whose they are.
    """

    balanced_accuracy: float
    chance: float
    accuracy: float
    majority: float
    classes: tuple[str, ...]
    scans: int
    patients: int


def leakage_probe(
    vectors: ArrayLike, column: ArrayLike, patient_ids: ArrayLike, *, folds: int = 5, seed: int = 0
) -> LeakageProbe:
    """Read a column (site, scanner, sex, …) by logistic regression, cross-validated with patients kept together.

    Dimensions are standardised and classes weighted to count alike, both within the training folds; every scan is
    guessed once, and the guesses of all folds are scored together. A balanced accuracy well above chance for a site or
    a scanner says that a model on these embeddings can use it in place of the disease.

    Args:
        vectors: [n, d] embeddings.
        column: [n] classes, as text or numbers.
        patient_ids: [n] the patient of each scan.
        folds: Of the cross-validation.
        seed: Of the folds.

    Raises:
        ValueError: The column has one value, an unknown one, or one with fewer patients than folds; or as of
            `retrieval`.
        MissingExtraError: scikit-learn is not installed.
    """
    matrix = _matrix(vectors)
    classes, label = np.unique(_column(column, "column", len(matrix)), return_inverse=True)
    patients, patient = np.unique(_column(patient_ids, "patient_ids", len(matrix)), return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"column has one value, {str(classes[0])!r}, and there is nothing to tell apart")
    if folds < 2:
        raise ValueError(f"folds is {folds}, and must be at least 2")
    for number, name in enumerate(classes):
        have = len(np.unique(patient[label == number]))
        if have < folds:
            raise ValueError(
                f"{str(name)!r} of the column has {have} patients for {folds} folds; leave it out, take fewer folds, "
                "or put a column of measurements in a few classes first"
            )
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ModuleNotFoundError as error:
        raise MissingExtraError("scikit-learn", "eval") from error
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    split = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    guess = cross_val_predict(model, matrix, label, groups=patient, cv=split)
    scores = metrics(label, np.eye(len(classes))[guess], "multiclass")
    return LeakageProbe(
        balanced_accuracy=scores["balanced_accuracy"],
        chance=1 / len(classes),
        accuracy=scores["accuracy"],
        majority=float(np.bincount(label).max() / len(label)),
        classes=tuple(str(name) for name in classes),
        scans=len(label),
        patients=len(patients),
    )


# --- A map ----------------------------------------------------------------------------------------


def embedding_map(vectors: ArrayLike, *, method: Literal["pca", "umap"] = "pca", seed: int = 0) -> NDArray[np.float32]:
    """[n, 2]: embeddings on a plane.

    Args:
        vectors: [n, d] embeddings.
        method: "pca" (distances are true, as far as two dimensions go) or "umap" (neighbours are kept; distances and
            the sizes of clusters mean nothing), which needs `pip install umap-learn`.
        seed: Of UMAP.

    Returns:
        [n, 2] places, a row an embedding.

    Raises:
        ValueError: Fewer than three scans or two dimensions; or an unknown method.
        BrainfmError: umap-learn is not installed.
        MissingExtraError: scikit-learn is not installed.
    """
    matrix = _matrix(vectors)
    if matrix.shape[0] < 3 or matrix.shape[1] < 2:
        raise ValueError(f"a map needs three scans and two dimensions at least, not {list(matrix.shape)}")
    if method == "umap":
        try:
            from umap import UMAP
        except ModuleNotFoundError as error:
            raise BrainfmError("umap-learn is not installed; run: pip install umap-learn, or take 'pca'") from error
        model = UMAP(n_components=2, n_neighbors=min(15, len(matrix) - 1), random_state=seed, n_jobs=1)
    elif method == "pca":
        try:
            from sklearn.decomposition import PCA
        except ModuleNotFoundError as error:
            raise MissingExtraError("scikit-learn", "eval") from error
        model = PCA(n_components=2, svd_solver="full")
    else:
        raise ValueError(f"no method {method!r}; there are 'pca' and 'umap'")
    with torch_threads():  # UMAP's numba sets those of the whole process
        return np.asarray(model.fit_transform(matrix), dtype=np.float32)


def plot_map(points: ArrayLike, column: Sequence[Any], path: str | os.PathLike[str], *, title: str = "") -> None:
    """Draw a map, coloured by a column, as a .png or .svg; needs no display.

    A column of numbers (as text, too) with more than ten values is a colour scale, every other one categories with a
    legend; one of more than ten numbers and some words is refused. Scans without a value are grey.

    Args:
        points: [n, 2], as of `embedding_map`.
        column: [n] values; None, nan, "" and "n/a" are unknown.
        path: The picture's file; written atomically.
        title: Of the legend or the colour scale: the column's name.

    Raises:
        ValueError: Points and column do not fit, numbers of the column have words among them, or the path ends in
            neither .png nor .svg.
        MissingExtraError: matplotlib is not installed.
    """
    path, places = Path(path), _matrix(points)
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"{path}: a map is drawn as .png or .svg, by the ending of its name")
    values = list(column)
    if places.shape != (len(values), 2):
        raise ValueError(f"points {list(places.shape)} and a column of {len(values)} do not fit; give points [n, 2]")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingExtraError("matplotlib", "eval") from error
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.add_subplot(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
    unknown = np.array([_is_unknown(value) for value in values])
    axes.scatter(
        places[unknown, 0], places[unknown, 1], s=_DOT, color=_UNKNOWN, label="unknown" if unknown.any() else ""
    )
    numbers = _numbers([value for value, absent in zip(values, unknown, strict=True) if not absent])
    if numbers is not None:
        dots = axes.scatter(places[~unknown, 0], places[~unknown, 1], s=_DOT, c=numbers)
        figure.colorbar(dots, label=title)
    else:
        _scatter_categories(axes, places, np.array([str(value) for value in values]), unknown, title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=150)


def _scatter_categories(axes: Axes, places: _Array, names: NDArray[np.str_], unknown: Any, title: str) -> None:
    from matplotlib import colormaps

    categories = np.unique(names[~unknown])
    for number, category in enumerate(categories):
        if len(categories) <= 10:
            colour = colormaps["tab10"](number)
        else:
            colour = colormaps["turbo"](number / (len(categories) - 1))
        chosen = places[~unknown & (names == category)]
        axes.scatter(chosen[:, 0], chosen[:, 1], s=_DOT, color=colour, label=category)
    if len(categories) <= _LEGEND:
        axes.legend(title=title or None, fontsize="small")


def _numbers(values: Sequence[Any]) -> _Array | None:
    """The values as a scale; None where they are categories: few, or none of them numbers."""
    numbers = numbers_of([str(value) for value in values])
    words = list(dict.fromkeys(str(value) for value, number in zip(values, numbers, strict=True) if np.isnan(number)))
    if len(np.unique(numbers[~np.isnan(numbers)])) <= _CATEGORIES:
        return None
    if words:
        raise ValueError(f"the column has numbers, and {words[0]!r}; write that as a number, or empty it")
    return numbers


# --- What is unlike the rest ----------------------------------------------------------------------


class OutOfDistribution:
    """How unlike a reference a scan's embedding is: its Mahalanobis distance as a percentile of the reference's own.

    The reference's scans are dealt into folds, a patient's to one. For each fold, mean and covariance (Ledoit & Wolf's
    shrunk one, for there are seldom many more scans than dimensions) are those of the other folds, and so the distances
    of the fold's own scans are those of scans that were not fitted. A new scan's distance in that fold's eyes is ranked
    among them, and the ranks of all folds make the percentile (the cross-conformal prediction of Vovk 2015,
    doi:10.1007/s10472-013-9368-4). For new scans like the reference it is about uniform between 0 and 100; 99 means
    that 1 % of such scans would be as far away. Every scan beyond the farthest of the reference has 100:
    `distance` tells these apart.

    The reference's own scans, scored again, come out too near; so do other scans of its patients. A percentile says
    nothing of what is unusual: site, contrast, disease or a failed registration.

    Attributes:
        folds: Of the cross-fitting.
        seed: Of the folds.
    """

    def __init__(self, *, folds: int = 5, seed: int = 0) -> None:
        if folds < 2:
            raise ValueError(f"folds is {folds}, and must be at least 2")
        self.folds, self.seed = folds, seed
        self._fitted: list[
            tuple[_Shrunk, _Array]
        ] = []  # an estimator, and the sorted distances of scans held out of it

    def fit(self, vectors: ArrayLike, patient_ids: ArrayLike | None = None) -> OutOfDistribution:
        """Learn the reference; returns itself.

        Args:
            vectors: [n, d] its embeddings; a few hundred at least, for percentiles near 100 to mean something.
            patient_ids: [n] the patient of each scan; None if each is a patient of their own.

        Raises:
            ValueError: Fewer patients than folds; or as of `retrieval`.
            MissingExtraError: scikit-learn is not installed.
        """
        matrix = _matrix(vectors)
        ids = np.arange(len(matrix)) if patient_ids is None else _column(patient_ids, "patient_ids", len(matrix))
        patients, patient = np.unique(ids, return_inverse=True)
        if len(patients) < self.folds:
            raise ValueError(f"{len(patients)} patients are too few for {self.folds} folds")
        fold = np.random.default_rng(self.seed).permutation(len(patients))[patient] % self.folds
        self._fitted = []
        for number in range(self.folds):
            held_out = fold == number
            estimator = _Shrunk(matrix[~held_out])
            self._fitted.append((estimator, np.sort(estimator.distances(matrix[held_out]))))
        return self

    def score(self, vectors: ArrayLike) -> _Array:
        """[n]: the percentile, 0 to 100, of each of [n, d] embeddings of new scans; high is unlike the reference.

        Raises:
            ValueError: Nothing was fitted, the width is another, or a number is not finite.
        """
        matrix = self._new(vectors)
        nearer = [np.searchsorted(own, estimator.distances(matrix)) for estimator, own in self._fitted]
        percentile: _Array = 100 * np.sum(nearer, axis=0) / sum(len(own) for _, own in self._fitted)
        return percentile

    def distance(self, vectors: ArrayLike) -> _Array:
        """[n]: the Mahalanobis distance of each of [n, d] embeddings, the mean over the folds; errors as of `score`."""
        matrix = self._new(vectors)
        distance: _Array = np.mean([estimator.distances(matrix) for estimator, _ in self._fitted], axis=0)
        return distance

    def _new(self, vectors: ArrayLike) -> _Array:
        if not self._fitted:
            raise ValueError("fit a reference first: OutOfDistribution().fit(vectors)")
        matrix, width = _matrix(vectors), len(self._fitted[0][0].mean)
        if matrix.shape[1] != width:
            raise ValueError(
                f"vectors have {matrix.shape[1]} dimensions, and the reference {width}: another encoder's?"
            )
        return matrix


class _Shrunk:
    """Mean and Ledoit & Wolf's covariance of [n, d], by its n principal axes: no [d, d] matrix is inverted."""

    def __init__(self, matrix: _Array) -> None:
        try:
            from sklearn.covariance import ledoit_wolf_shrinkage
        except ModuleNotFoundError as error:
            raise MissingExtraError("scikit-learn", "eval") from error
        self.mean = matrix.mean(axis=0)
        centred = matrix - self.mean
        shrinkage, rest = float(ledoit_wolf_shrinkage(matrix)), float((centred**2).mean())
        _, singular, self.axes = np.linalg.svd(centred, full_matrices=False)
        floor = max(shrinkage * rest, np.finfo(float).tiny)
        self.along = (1 - shrinkage) * singular**2 / len(matrix) + floor
        self.across = floor if len(self.axes) < matrix.shape[1] else np.inf  # all axes are there: across is nothing

    def distances(self, matrix: _Array) -> _Array:
        """[n]: the Mahalanobis distance of each row of [n, d]."""
        away = matrix - self.mean
        parts = away @ self.axes.T
        across = np.maximum((away**2).sum(axis=1) - (parts**2).sum(axis=1), 0)
        distances: _Array = np.sqrt((parts**2 / self.along).sum(axis=1) + across / self.across)
        return distances


# --- Checks ---------------------------------------------------------------------------------------


def _matrix(vectors: ArrayLike) -> _Array:
    matrix = np.asarray(vectors, dtype=np.float64)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"expected [n, d], a row a scan, not {list(matrix.shape)}")
    wrong = int((~np.isfinite(matrix).all(axis=1)).sum())
    if wrong:
        raise ValueError(f"{wrong} of {len(matrix)} rows are not finite; leave these scans out")
    return matrix


def _directions(vectors: ArrayLike) -> _Array:
    """The vectors at length 1: their products are cosines."""
    matrix = _matrix(vectors)
    lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
    if (lengths == 0).any():
        raise ValueError(f"{int((lengths == 0).sum())} of {len(matrix)} vectors are 0 and have no direction")
    directions: _Array = matrix / lengths
    return directions


def _column(column: ArrayLike, name: str, rows: int) -> NDArray[Any]:
    values = np.asarray(column)
    if values.shape != (rows,):
        raise ValueError(f"{name} has the shape {list(values.shape)}, and there are {rows} vectors; give one a vector")
    unknown = sum(_is_unknown(value) for value in values.tolist())
    if unknown:
        raise ValueError(
            f"{name} is unknown (None, nan, '' or 'n/a') for {unknown} of {rows} scans; leave these scans out"
        )
    return values.astype(str) if values.dtype == object else values


def _is_unknown(value: Any) -> bool:
    return value is None or value != value or is_missing(str(value))
