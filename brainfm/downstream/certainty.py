"""How sure predictions are: intervals and sets that hold the truth as often as said, and scans unlike the rest.

What is kept of a run is how far its validation part's predictions were off (`conformal`); from that follows what the
test part's intervals and sets are, and how often they held the truth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from brainfm.downstream.conformal import expected_coverage, nonconformity, prediction_sets, radius
from brainfm.downstream.grid import Job
from brainfm.downstream.statistics import Kind, metric_by_group
from brainfm.files import write_csv

COVERAGE = 0.9  # of the intervals and sets in predictions.csv
LEVELS = (0.5, 0.8, 0.9, 0.95)  # at which coverage is looked at
UNLIKE = 95.0  # from this percentile of the training part's own on, a scan is said to be unlike it: 1 in 20 that is not
LEAST_TO_BE_UNLIKE = 20  # training patients: of fewer, a percentile of 95 means nothing


def radii(labels: ArrayLike, predictions: ArrayLike, kind: Kind) -> dict[str, Any]:
    """What a run keeps: scans of the validation part, and by coverage the radius; None: too few scans."""
    scores = nonconformity(labels, predictions, kind)
    found = {f"{level:g}": radius(scores, level) for level in LEVELS}
    return {"scans": len(scores), "radius": {name: q if np.isfinite(q) else None for name, q in found.items()}}


def percentiles_unlike(
    vectors: NDArray[Any], train: Sequence[int], patients: Sequence[str], rows: Sequence[int]
) -> list[float] | None:
    """How unlike the training part the embeddings of some rows are, 0 to 100; None where there are too few patients."""
    from brainfm.downstream.knowledge import OutOfDistribution

    own = [patients[n] for n in train]
    if len(set(own)) < LEAST_TO_BE_UNLIKE:
        return None
    found: list[float] = OutOfDistribution().fit(vectors[list(train)], own).score(vectors[list(rows)]).tolist()
    return found


def _q(result: Mapping[str, Any], level: float) -> float | None:
    """The radius of a run at a coverage; None where it has none, and infinite where it had too few scans."""
    kept = result.get("certainty")
    if kept is None:
        return None
    q = kept["radius"][f"{level:g}"]
    return float("inf") if q is None else float(q)


def held(result: Mapping[str, Any], kind: Kind, level: float) -> NDArray[np.bool_] | None:
    """Whether the interval or set of each test scan held its label."""
    q = _q(result, level)
    return None if q is None else nonconformity(result["labels"], result["predictions"], kind) <= q


def columns_of(job: Job, result: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """For each test scan low, high, set, unlike and out_of_distribution, as text; "" is what it has not."""
    q, n = _q(result, COVERAGE), len(result["rows"])
    low, high, sets = [""] * n, [""] * n, [""] * n
    if q is not None:
        guesses = np.asarray(result["predictions"], dtype=np.float64)
        if job.data.task.kind == "regression":
            low, high = ([f"{value:.9g}" for value in end] for end in (guesses - q, guesses + q))
        else:
            names = job.data.classes
            sets = [
                "|".join(name for name, is_in in zip(names, row, strict=True) if is_in)
                for row in prediction_sets(guesses, q)
            ]
    unlike = result.get("unlike") or [None] * n
    said = [("", "") if value is None else (f"{value:.4g}", str(int(value >= UNLIKE))) for value in unlike]
    return [(*ends, *own) for ends, own in zip(zip(low, high, sets, strict=True), said, strict=True)]


def write_certainty(output: Path, results: Mapping[Job, dict[str, Any]], n: int) -> None:
    """`certainty.csv`: for each row and level how often intervals or sets held the truth, and how large they are."""
    (output / "certainty.csv").unlink(missing_ok=True)
    rows = list(_rows(results, n))
    head = ["task", "model", "mode", "fraction", "nominal", "coverage", "ci_low", "ci_high", "size", "val_scans"]
    head += ["out_of_distribution", "expected", "expected_sd"]
    if rows:
        write_csv(output / "certainty.csv", [head, *rows])


def _rows(results: Mapping[Job, dict[str, Any]], n: int) -> Iterator[list[Any]]:
    of_row: dict[tuple[str, str, str], list[tuple[Job, dict[str, Any]]]] = {}
    for job, result in results.items():
        if job.fraction == 1 and "certainty" in result:
            of_row.setdefault((job.data.task.name, job.row.model, job.row.mode), []).append((job, result))
    for key, runs in of_row.items():
        kind = runs[0][0].data.task.kind
        flags = [np.mean(np.array(result["unlike"]) >= UNLIKE) for _, result in runs if result.get("unlike")]
        for level in LEVELS:
            cases = [
                (r["labels"], np.asarray(held(r, kind, level), float), np.zeros(len(r["rows"]), int), r["patients"])
                for _, r in runs
            ]
            [whole], _ = metric_by_group(cases, kind, "coverage", n=n)
            size = np.mean([_size(result, kind, level) for _, result in runs])
            numbers = (whole.value, whole.ci_low, whole.ci_high, size)
            scans = min(result["certainty"]["scans"] for _, result in runs)
            flagged = f"{np.mean(flags):.9g}" if flags else ""
            tested = min(len(result["rows"]) for _, result in runs)
            law = expected_coverage(scans, tested, level, len(runs))
            texts = [f"{v:.9g}" if np.isfinite(v) else "" for v in numbers]
            yield [*key, 1, level, *texts, scans, flagged, *(f"{v:.9g}" for v in law)]


def _size(result: Mapping[str, Any], kind: Kind, level: float) -> float:
    """The width of the intervals, or how many classes a set has in the mean."""
    q = _q(result, level)
    assert q is not None
    if kind == "regression":
        return 2 * q
    return float(prediction_sets(result["predictions"], q).sum(axis=1).mean())
