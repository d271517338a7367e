"""New scans → predictions of a model that `brainfm finetune --keep-models` kept."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch

from brainfm.downstream.certainty import UNLIKE
from brainfm.downstream.conformal import least_scans, prediction_sets, probabilities, radius
from brainfm.downstream.kept import KeptModel, read_kept
from brainfm.embed import embed_for
from brainfm.errors import BrainfmError, ScanError
from brainfm.files import atomic_path
from brainfm.manifest import ScanRecord, ScansLike, list_scans
from brainfm.system import expanded
from brainfm.table import Embeddings, text_columns, write_errors

logger = logging.getLogger("brainfm")


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions, a row a scan.

    Attributes:
        table: The columns that `predict` says.
        errors: The scans that failed, and why.
    """

    table: pd.DataFrame
    errors: list[tuple[ScanRecord, str]] = field(default_factory=list)


def predict(
    folder: str | os.PathLike[str],
    scans: ScansLike,
    *,
    output: str | os.PathLike[str] | None = None,
    coverage: float = 0.9,
    threshold: float | None = None,
    batch_size: int | Literal["auto"] = "auto",
    device: str | torch.device = "auto",
    num_workers: int = 2,
    on_error: Literal["skip", "raise"] = "skip",
    strict_qc: bool = False,
    progress: bool = False,
) -> Predictions:
    """Predict what a kept model learned, of new scans: each prepared as its contract says, with how sure that is.

    On one processor, a scan at a time (as "auto" does), predictions are those that the run itself recorded.

    Args:
        folder: The folder of the model, such as `results/models/…` of `brainfm finetune --keep-models`.
        scans: As of `brainfm.embed`.
        output: Where to write the table, a .csv; failed scans are listed in `<name>.errors.csv`. As with
            `brainfm.embed`, a run that was interrupted goes on, and one beside it is refused.
        coverage: How often an interval or a set should hold the truth, for new scans like the validation part's.
        threshold: The probability from which the positive class of a binary task is predicted; None is the model's.
        batch_size: As of `brainfm.embed`, and so are the others.
        device: Where to compute.
        num_workers: Threads that prepare scans ahead.
        on_error: "skip" notes a bad scan and goes on, "raise" stops at it.
        strict_qc: Refuse scans whose preparation failed.
        progress: Show a progress bar.

    Returns:
        Columns `image_path` (or one a channel), `mask_path`, `patient_id` and `scan_id`. Of a regression `prediction`,
        `low` and `high` (infinite where the validation part is too small for the coverage). Of classes `p_CLASS` for
        each, the predicted `prediction`, and `set`, all classes that are not refused, joined by |. Then `distance`, the
        Mahalanobis distance of the embedding from the training part's, and `unlike`, the percentage of the validation
        part's scans that were nearer: 100 is farther than any. `out_of_distribution` is 1 where it is farther than
        such scans are 1 time in 20; never where the validation part has fewer than 19.

    Raises:
        WeightsNotFoundError, WeightsError: The folder holds no model that predicts, or a damaged one.
        ScanError: The list is wrong, or with on_error="raise" a scan.
        BrainfmError: The coverage or threshold is no probability, the output cannot be written, or another run is
            writing it.

    Example:
        >>> found = predict("results/models/age…", "new_scans/", output="predictions.csv")
        >>> found.table[["scan_id", "prediction", "low", "high", "unlike"]]
    """
    least = least_scans(coverage)
    if threshold is not None and not 0 <= threshold <= 1:
        raise BrainfmError(f"threshold is {threshold}, and must be a probability, 0 to 1")
    path = None if output is None else expanded(output)
    if path is not None and (path.suffix != ".csv" or path.is_dir()):
        raise ScanError(f"{path}: predictions are written as .csv; give a name that ends so")
    records = list_scans(scans)
    model = read_kept(folder)
    if threshold is not None and model.head.kind != "binary":
        raise BrainfmError(f"threshold is of a binary task, and this model predicts {model.head.label}: leave it out")
    known = len(model.arrays["val.scores"])
    if known < least:
        logger.warning(
            "a coverage of %g takes %d validation scans, and this model has %d: intervals and sets hold everything; "
            "ask for %.2g at most",
            *(coverage, least, known, math.floor(100 * known / (known + 1)) / 100),
        )

    def write(table: Embeddings, to: Path) -> None:
        with atomic_path(to) as temporary:
            predictions_of(model, table, coverage, threshold).to_csv(temporary, index=False, float_format="%.9g")
        write_errors(table.errors, to)

    table = embed_for(
        records,
        model.encoder,
        path,
        write,
        optimised=model.head.optimised,
        batch_size=batch_size,
        device=device,
        num_workers=num_workers,
        on_error=on_error,
        strict_qc=strict_qc,
        progress=progress,
    )
    return Predictions(predictions_of(model, table, coverage, threshold), table.errors)


def predictions_of(
    model: KeptModel, table: Embeddings, coverage: float = 0.9, threshold: float | None = None
) -> pd.DataFrame:
    """The table of `predict`, of embeddings that the model's encoder gave."""
    head, vectors = model.head, table.vectors
    columns: dict[str, object] = dict(text_columns([replace(record, extra={}) for record in table.records]))
    q = radius(model.arrays["val.scores"], coverage)
    nothing = np.empty((0, head.outputs) if head.kind == "multiclass" else 0)
    found = model.predictions(vectors) if len(table) else nothing
    if head.kind == "regression":
        columns |= {"prediction": found, "low": found - q, "high": found + q}
    else:
        chances = probabilities(found)
        columns |= {f"p_{name}": chances[:, n] for n, name in enumerate(head.classes)}
        limit = head.threshold if threshold is None else threshold
        chosen = (found >= limit).astype(int) if head.kind == "binary" else chances.argmax(axis=1)
        columns["prediction"] = [head.classes[n] for n in chosen]
        sets = prediction_sets(found, q)
        columns["set"] = [
            "|".join(name for name, is_in in zip(head.classes, row, strict=True) if is_in) for row in sets
        ]
    distances = model.distances(vectors) if len(table) else np.empty(0)
    far = distances > radius(model.arrays["val.distances"], UNLIKE / 100)
    columns |= {"distance": distances, "unlike": model.percentiles(distances), "out_of_distribution": far.astype(int)}
    return pd.DataFrame(columns)
