"""Labels that a pretraining learns: columns of its manifest, as numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainfm.columns import Kind, in_order, numbers_of, plain_kind
from brainfm.errors import RecipeError
from brainfm.manifest import ScanRecord
from brainfm.tabular import is_missing


@dataclass(frozen=True)
class Target:
    """What is learned of a column, and what its numbers mean.

    Attributes:
        name: The column's.
        kind: What it is.
        classes: The words of classes 0, 1, …
        mean: Of a regression, over the scans that have the label; numbers are standardised by it and by
        std: the (population) standard deviation.
    """

    name: str
    kind: Kind
    classes: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0

    @property
    def outputs(self) -> int:
        """How many numbers are predicted: one, or of several classes a logit each."""
        return len(self.classes) if self.kind == "multiclass" else 1

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def read_targets(
    records: Sequence[ScanRecord], names: Sequence[str], kinds: Mapping[str, Kind]
) -> tuple[list[Target], NDArray[np.float64]]:
    """Columns of a list of scans as targets.

    Args:
        records: The scans.
        names: The columns.
        kinds: What a column is where its values leave doubt (`brainfm.columns.plain_kind`).

    Returns:
        The targets; their labels [scans, targets]: standardised numbers, or classes from 0; nan where one is missing.

    Raises:
        RecipeError: There is no such column, or its values are not what its kind says, or all the same; the message
            names them.
    """
    found = [_read(name, [record.extra.get(name, "") for record in records], kinds.get(name)) for name in names]
    columns = dict.fromkeys(name for record in records for name in record.extra)
    if absent := [name for name in names if name not in columns]:
        raise RecipeError(
            f"targets: the manifest has no column {absent[0]!r}; it has {', '.join(columns) or 'no labels at all'}"
        )
    targets = []
    for name, (kind, classes, values) in zip(names, found, strict=True):
        known = values[np.isfinite(values)]
        if len(set(known.tolist())) < 2:
            raise RecipeError(f"targets: {name} has {len(set(known.tolist()))} different values; it teaches nothing")
        scale = (float(known.mean()), float(known.std())) if kind == "regression" else (0.0, 1.0)
        targets.append(Target(name, kind, classes, *scale))
    labels = np.stack([values for _, _, values in found], axis=1)
    return targets, (labels - [target.mean for target in targets]) / [target.std for target in targets]


def read_numbers(records: Sequence[ScanRecord], name: str) -> NDArray[np.float64]:
    """[scans] a column of numbers, in its own unit; nan where one is missing. Raises RecipeError as `read_targets`."""
    (target,), labels = read_targets(records, [name], {name: "regression"})
    return labels[:, 0] * target.std + target.mean


def _read(name: str, texts: Sequence[str], kind: Kind | None) -> tuple[Kind, tuple[str, ...], NDArray[np.float64]]:
    """A column's kind, its classes and its values."""
    known = [text for text in texts if not is_missing(text)]
    kind = kind or plain_kind(known)
    if kind is None:
        raise RecipeError(
            f"targets: {name} has {len(set(known))} different values ({_few(in_order(known))}): classes or a quantity? "
            f"Say kinds.{name}=regression or multiclass"
        )
    if kind == "regression":
        numbers = numbers_of(["" if is_missing(text) else text for text in texts])
        if odd := [t for t, n in zip(texts, numbers, strict=True) if not np.isfinite(n) and not is_missing(t)]:
            raise RecipeError(f"targets: {name} must be numbers, and {len(odd)} scans have none, such as {_few(odd)}")
        return kind, (), numbers
    counts = Counter(known)
    if kind == "binary" and len(counts) > 2:
        raise RecipeError(f"targets: {name} has {len(counts)} different values ({_few(counts)}), and binary are two")
    if len(counts) > max(2, len(known) // 2):
        raise RecipeError(
            f"targets: {name} has {len(counts)} different values in {len(known)} scans ({_few(counts)}): free text, or "
            "ids? A class needs several scans; group the values, or leave it out"
        )
    classes = in_order(known)
    number = {text: float(n) for n, text in enumerate(classes)}
    return kind, classes, np.array([number.get(text, np.nan) for text in texts])


def _few(values: Sequence[str] | Counter[str], most: int = 4) -> str:
    shown = list(dict.fromkeys(map(repr, values)))
    return ", ".join(shown[:most]) + (", …" if len(shown) > most else "")
