"""How much the preparation matters: the same scans, prepared in two ways and embedded by one model, side by side."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainfm import table
from brainfm.downstream.account import few
from brainfm.downstream.precomputed import read_embedded
from brainfm.downstream.probe import fit_probe, predict_probe
from brainfm.downstream.statistics import Kind, metrics
from brainfm.errors import MissingExtraError, TaskError
from brainfm.files import write_csv
from brainfm.manifest import ScanRecord
from brainfm.table import Embeddings, check_same_origin

_FOLDS = 5  # of patients: a probe never predicts one that it learned from
_ROWS_AT_ONCE = 1024  # of a matrix of similarities
FEWEST_OTHERS = 10  # patients, below which a rank says little


@dataclass(frozen=True, eq=False)
class Shift:
    """What a probe that learned from the first way predicts of scans prepared in the second.

    Attributes:
        label: What is predicted.
        kind: What the label is.
        first: [scans] predictions of held-out patients: numbers, or probabilities of class 1; of several classes
            [scans, classes].
        second: The same probe's, of the same scans prepared in the second way.
        scores: Each metric of both.
    """

    label: str
    kind: Kind
    first: NDArray[np.float64]
    second: NDArray[np.float64]
    scores: dict[str, tuple[float, float]]

    @property
    def differences(self) -> NDArray[np.float64]:
        """[scans] second − first; of several classes the largest change of a probability."""
        difference = self.second - self.first
        return difference if difference.ndim == 1 else np.abs(difference).max(axis=1)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Scans that both tables have.

    Attributes:
        records: The scans, as the first table names them.
        cosines: [scans] similarity of a scan's two embeddings.
        others: [scans] mean similarity of the first to other patients' second ones: what sameness is seen against.
        ranks: [scans] place of a scan's own second embedding, by similarity, among that and all other patients': 1 is
            the nearest.
        left_out: Scans that one table alone has.
        shift: Of a probe's predictions, where labels were given.
    """

    records: list[ScanRecord]
    cosines: NDArray[np.float64]
    others: NDArray[np.float64]
    ranks: NDArray[np.int64]
    left_out: tuple[str, ...]
    shift: Shift | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a row a scan as .csv, atomically: who, cosines, rank, and predictions where there are."""
        header = ["patient_id", "scan_id", "cosine", "mean_cosine_of_others", "rank"]
        columns: list[Sequence[Any]] = [
            [record.patient_id for record in self.records],
            [record.scan_id for record in self.records],
            *(np.round(values, 9).tolist() for values in (self.cosines, self.others)),
            self.ranks.tolist(),
        ]
        if self.shift is not None:
            many = self.shift.first.ndim == 2
            for name, values in (("first", self.shift.first), ("second", self.shift.second)):
                header += [f"prediction_{name}_{n}" for n in range(values.shape[1])] if many else [f"prediction_{name}"]
                columns += [column.tolist() for column in (values.T if many else [values])]
        write_csv(Path(path), [header, *map(list, zip(*columns, strict=True))])

    def lines(self) -> list[str]:
        """What was found, in words."""
        patients = len({record.patient_id for record in self.records})
        said = [f"{len(self.records):,} scans of {patients:,} patients are in both tables"]
        if self.left_out:
            said.append(f"{len(self.left_out):,} are in one alone: {few(self.left_out)}")
        low, middle, high = np.percentile(self.cosines, [5, 50, 95])
        said.append(
            f"cosine of a scan's two embeddings: median {middle:.4f} (5th to 95th percentile {low:.4f} to {high:.4f}); "
            f"of different patients {self.others.mean():.4f}"
        )
        first = float((self.ranks == 1).mean())
        said.append(
            f"of {patients:,} patients a scan's own is the nearest for {first:.1%} (by chance {1 / patients:.1%}); "
            f"median rank {np.median(self.ranks):g}, worst {self.ranks.max()}"
        )
        if patients <= FEWEST_OTHERS:
            said.append(f"{patients} patients are few: a rank among them says little")
        if self.shift is not None:
            said += _shift_lines(self.shift)
        return said


def compare(
    first: str | os.PathLike[str] | Embeddings,
    second: str | os.PathLike[str] | Embeddings,
    labels: Any = None,
    *,
    label: str = "",
    kind: Kind | None = None,
    seed: int = 0,
) -> Comparison:
    r"""Hold two tables of one model side by side, whose scans were prepared in two ways: with and without N4, say.

    Scans are matched by patient and scan. The probe, where labels are given, is `fit_probe`'s: it learns from the first
    way's embeddings of four fifths of the patients, and predicts the others in both ways.

    Args:
        first: A table of `brainfm embed`.
        second: Of the same scans by the same weights.
        labels: A table with a column to predict; see `brainfm.downstream.precomputed.read_embedded`.
        label: That column.
        kind: What it is; None where its values leave no doubt.
        seed: Of the folds.

    Raises:
        BrainfmError: The tables are of two models, or do not say.
        TaskError: They have no scan in common, fewer than two patients, a scan twice, or as of `read_embedded`.

    Example:
        >>> found = compare("turboprep.parquet", "ours.parquet", "participants.tsv", label="age")
        >>> print(*found.lines(), sep="\\n")
    """
    tables = [one if isinstance(one, Embeddings) else table.read(one) for one in (first, second)]
    check_same_origin(*tables)
    places = [_places(one, name) for one, name in zip(tables, ("first", "second"), strict=True)]
    shared = [key for key in places[0] if key in places[1]]
    if not shared:
        raise TaskError(
            f"the tables have no scan in common: the first has {few([' '.join(key) for key in places[0]])}, the second "
            f"{few([' '.join(key) for key in places[1]])}; patient_id and scan_id must be the same in both"
        )
    patients = np.array([patient for patient, _ in shared])
    if len(set(patients)) < 2:
        raise TaskError("all shared scans are of one patient; a comparison needs two at least")
    rows = [[own[key] for key in shared] for own in places]
    cosines, others, ranks = _likeness(tables[0].vectors[rows[0]], tables[1].vectors[rows[1]], patients)
    alone = [key for n in (0, 1) for key in places[n] if key not in places[1 - n]]
    shift = None if labels is None else _shift(labels, tables, label, kind, seed)
    return Comparison(
        [tables[0].records[n] for n in rows[0]],
        cosines,
        others,
        ranks,
        tuple(" ".join(filter(None, key)) for key in alone),
        shift,
    )


def _places(embeddings: Embeddings, name: str) -> dict[tuple[str, str], int]:
    keys = [(record.patient_id, record.scan_id) for record in embeddings.records]
    if not all(patient for patient, _ in keys):
        raise TaskError(f"the {name} table has rows without a patient_id; embed the scans by a manifest that says it")
    if twice := [" ".join(filter(None, key)) for key, count in Counter(keys).items() if count > 1]:
        raise TaskError(f"the {name} table has {few(twice)} twice; say by scan_id which is which")
    return {key: n for n, key in enumerate(keys)}


def _likeness(
    first: NDArray[np.float32], second: NDArray[np.float32], patients: NDArray[np.str_]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """`cosines`, `others` and `ranks` of a `Comparison`, in parts that need little memory."""
    ours, theirs = _directions(first), _directions(second)
    cosines = np.einsum("ij,ij->i", ours, theirs)
    others, ranks = np.empty_like(cosines), np.empty(len(cosines), dtype=np.int64)
    for start in range(0, len(ours), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        similar, strangers = ours[part] @ theirs.T, patients[part, None] != patients
        others[part] = (similar * strangers).sum(axis=1) / strangers.sum(axis=1)
        ranks[part] = 1 + (strangers & (similar > cosines[part, None])).sum(axis=1)
    return cosines, others, ranks


def _directions(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    exact = vectors.astype(np.float64)
    lengths: NDArray[np.float64] = np.linalg.norm(exact, axis=1, keepdims=True)
    return exact / np.maximum(lengths, np.finfo(np.float64).tiny)


def _shift(labels: Any, tables: Sequence[Embeddings], label: str, kind: Kind | None, seed: int) -> Shift:
    try:
        from sklearn.model_selection import GroupKFold, StratifiedGroupKFold
    except ModuleNotFoundError as error:
        raise MissingExtraError("scikit-learn", "eval") from error
    data = read_embedded(labels, {"first": tables[0]}, label=label, kind=kind)
    places = _places(tables[1], "second")
    keys = [(record.patient_id, record.scan_id) for record in data.records]
    there = [n for n, key in enumerate(keys) if key in places]
    vectors = [data.embeddings["first"][there], tables[1].vectors[[places[keys[n]] for n in there]]]
    targets, patients = data.labels[there], np.array([keys[n][0] for n in there])
    task, least = data.task, len(set(patients))
    if task.kind != "regression":
        least = min(len(set(patients[targets == target])) for target in np.unique(targets))
    if least < _FOLDS:
        raise TaskError(
            f"{task.label}: {least} patients that are in both tables have a label, or one of its classes; a probe of "
            f"held-out patients needs {_FOLDS} at least"
        )
    folds = (GroupKFold if task.kind == "regression" else StratifiedGroupKFold)(_FOLDS, shuffle=True, random_state=seed)
    predictions: list[NDArray[np.float64] | None] = [None, None]
    for learned, held in folds.split(vectors[0], targets, patients):
        own = patients[learned].tolist()
        probe = fit_probe(vectors[0][learned], targets[learned], task.kind, patients=own, seed=seed)
        for n in (0, 1):
            found = predict_probe(probe, vectors[n][held], task.kind)
            whole = predictions[n]
            if whole is None:
                whole = predictions[n] = np.full((len(targets), *found.shape[1:]), np.nan)
            whole[held] = found
    first, second = predictions
    assert first is not None
    assert second is not None
    scores = [metrics(targets, each, data.task.kind) for each in (first, second)]
    both = {name: (scores[0][name], scores[1][name]) for name in scores[0]}
    return Shift(data.task.label, data.task.kind, first, second, both)


def _shift_lines(shift: Shift) -> list[str]:
    moved = shift.differences
    what = {"regression": "predictions", "binary": "probabilities of class 1"}.get(shift.kind, "probabilities")
    said = [
        f"{shift.label}: a probe that learned from the first way moves its {what} by {moved.mean():+.4g} ± "
        f"{moved.std(ddof=1):.4g} (mean ± standard deviation) on the second; half by more than "
        f"{np.median(np.abs(moved)):.4g}"
    ]
    if shift.kind == "multiclass":
        changed = float((shift.first.argmax(axis=1) != shift.second.argmax(axis=1)).mean())
        said.append(f"{shift.label}: {changed:.1%} of the scans change class")
    names = {"regression": ("mae", "r2"), "binary": ("auc",)}.get(shift.kind, ("balanced_accuracy",))
    said += [
        f"{shift.label}: {name} {shift.scores[name][0]:.4g} on the first way, {shift.scores[name][1]:.4g} on the second"
        for name in names
        if name in shift.scores
    ]
    return said
