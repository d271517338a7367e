"""A pretrained encoder as a scikit-learn transformer: scans in, a row of features a scan out.

The encoder learns nothing here. What stands after it in a `Pipeline` does, and sees in each fold of a cross-validation
the training rows alone.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from brainfm.embed import embed, origin_of
from brainfm.errors import MissingExtraError, ScanError, WeightsError
from brainfm.factory import create_model
from brainfm.inference import DTypeName
from brainfm.manifest import ScanRecord, ScansLike, check_found, list_scans
from brainfm.system import expanded
from brainfm.tabular import is_frame
from brainfm.transforms import check_channels, create_transform

try:
    from sklearn.base import BaseEstimator, TransformerMixin
    from sklearn.utils.validation import check_is_fitted
except ModuleNotFoundError as error:
    raise MissingExtraError("scikit-learn", "eval") from error

logger = logging.getLogger("brainfm")

_Row: TypeAlias = "ScanRecord | ScanError"  # a scan, or why there is none


class BrainEncoder(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Scans → embeddings [n, width] float32, a row a scan in the order of the scans.

    X is what `brainfm.embed` takes: a list of paths, of images in memory or of (image, mask) pairs; a DataFrame with a
    manifest's columns, of which those that name files are read; an array or Series of paths, or of two columns, paths
    and those of masks; or the path of a manifest or folder. Rows are never left out, so that they stay beside their
    labels, and a scan that stands in several rows is embedded once.

    `fit` learns nothing: it looks whether X is a list of scans and the model one that embeds, and records what makes
    the features. A pickle of an estimator with published weights holds their digest, not the weights, which are loaded
    again; other weights under the same name are refused then.

    Args:
        model: The name of an encoder, or one of `create_model`.
        pretrained: Whether a name's published weights are loaded; without them each `fit` draws others, which is a
            control and no encoder.
        device: See `brainfm.embed`.
        dtype: See `brainfm.embed`.
        cache: A folder where embeddings are kept, by the scans' files with their sizes and times, and by what makes
            the features (weights, contract, readout, dtype): each scan is then embedded once, however many folds,
            pipelines or processes ask for it. They are the parts that `brainfm.embed(…, shard="1/1")` writes. None
            keeps nothing. Images in memory are not kept.
        on_error: "raise" stops at a bad scan; "nan" makes its row NaN, with a warning in the log, for an imputer or a
            classifier that takes them. Where no file of X is there, both raise.
        batch_size: See `brainfm.embed`.
        num_workers: See `brainfm.embed`.
        strict_qc: See `brainfm.embed`; what is refused is a bad scan.

    Attributes:
        origin_: What makes the features, as `brainfm.Embeddings.origin`.
        n_features_in_: How many columns of X name files; 1 of a list.
        feature_names_in_: These columns, where X was a DataFrame.

    Raises:
        ScanError: X is no list of scans, one of its entries is a folder of several, or a scan is bad.
        WeightsError: The weights cannot be had, or are not those of the `fit`.
        ValueError: An argument is out of range, or the model has a classifier or gives maps.

    Example:
        >>> encoder = BrainEncoder("simclr_resnet18_3d", cache="embeddings/")
        >>> pipeline = make_pipeline(encoder, StandardScaler(), LogisticRegression())
        >>> cross_val_score(pipeline, paths, diagnoses, groups=patients, cv=StratifiedGroupKFold(5))
    """

    def __init__(
        self,
        model: str | nn.Module = "simclr_resnet18_3d",
        *,
        pretrained: bool = True,
        device: str | torch.device = "auto",
        dtype: DTypeName | torch.dtype = "auto",
        cache: str | os.PathLike[str] | None = None,
        on_error: Literal["raise", "nan"] = "raise",
        batch_size: int | Literal["auto"] = "auto",
        num_workers: int = 2,
        strict_qc: bool = False,
    ) -> None:
        self.model = model
        self.pretrained = pretrained
        self.device = device
        self.dtype = dtype
        self.cache = cache
        self.on_error = on_error
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.strict_qc = strict_qc

    def fit(self, X: ScansLike, y: Any = None) -> BrainEncoder:  # noqa: ARG002, N803 - scikit-learn's names
        """Look at the list of scans and at the model; nothing is learned, and no scan is read.

        Args:
            X: The scans; see the class.
            y: Ignored.

        Raises:
            ScanError: X is no list of scans, or none of their files is there.
            WeightsError: The weights cannot be had.
            ValueError: An argument is out of range, or the model has a classifier or takes other channels.
        """
        if self.on_error not in ("raise", "nan"):
            raise ValueError(f'on_error must be "raise" or "nan", not {self.on_error!r}')
        check_found([row for row in _rows(X, self.on_error) if isinstance(row, ScanRecord)])
        encoder = self._load()
        if getattr(encoder, "num_classes", 0):
            raise ValueError("this model ends in a classifier and gives logits; call model.reset_classifier(0) first")
        check_channels(encoder, create_transform(encoder).spec)
        self.encoder_, self.origin_ = encoder, origin_of(encoder, self.dtype)
        self.n_features_in_ = _width(X)
        if is_frame(X):
            self.feature_names_in_ = np.array(_file_columns(X), dtype=object)
        elif hasattr(self, "feature_names_in_"):
            del self.feature_names_in_
        return self

    def transform(self, X: ScansLike) -> NDArray[np.float32]:  # noqa: N803 - scikit-learn's name
        """The embeddings [n, width] float32 of n scans, in their order.

        Args:
            X: The scans; see the class. They need not be in the form of those of `fit`.

        Raises:
            ScanError: X is no list of scans, or with on_error="raise" one of them is bad.
            WeightsError: The estimator was unpickled where the model has other weights.
            NotFittedError: `fit` was not called.
        """
        check_is_fitted(self, "origin_")
        encoder = self._encoder()
        rows = _rows(X, self.on_error)
        scans: dict[Any, ScanRecord] = {}
        for row in rows:
            if isinstance(row, ScanRecord):
                # Its place stands for its name, which may be that of another scan in another list.
                scans.setdefault(_key(row), ScanRecord(row.image, row.mask, scan_id=str(len(scans))))
        kept = None if self.cache is None else expanded(self.cache) / f"{self.origin_.model}-{self.origin_.digest[:16]}"
        table = embed(
            list(scans.values()),
            encoder,
            batch_size=self.batch_size,
            device=self.device,
            dtype=self.dtype,
            num_workers=self.num_workers,
            output=kept,
            shard=None if kept is None else "1/1",
            on_error="raise" if self.on_error == "raise" else "skip",
            strict_qc=self.strict_qc,
        )
        vectors = np.full((len(scans), table.vectors.shape[1]), np.nan, dtype=np.float32)
        vectors[[int(record.scan_id) for record in table.records]] = table.vectors
        failed = [str(row) for row in rows if isinstance(row, ScanError)] + [why for _, why in table.errors]
        if failed:
            logger.warning(
                "%d of %d scans are bad, and their rows NaN; the first: %s", len(failed), len(rows), failed[0]
            )
        places = {key: n for n, key in enumerate(scans)}
        made = np.full((len(rows), vectors.shape[1]), np.nan, dtype=np.float32)
        for n, row in enumerate(rows):
            if isinstance(row, ScanRecord):
                made[n] = vectors[places[_key(row)]]
        return made

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[Any]:  # noqa: ARG002 - scikit-learn's name
        """The names e0, e1, … [width], as in every table of embeddings.

        Raises NotFittedError where `fit` was not called.
        """
        check_is_fitted(self, "origin_")
        return np.array([f"e{n}" for n in range(int(self._encoder().num_features))], dtype=object)

    def _load(self) -> Any:
        if isinstance(self.model, str):
            return create_model(self.model, pretrained=self.pretrained)
        return self.model

    def _encoder(self) -> Any:
        """The encoder of `fit`, loaded again after unpickling and held against what is known of it."""
        if not hasattr(self, "encoder_"):
            encoder = self._load()
            if differ := origin_of(encoder, self.dtype).differences(self.origin_):
                raise WeightsError(
                    f"{self.model}: differs in {', '.join(differ)} from the model that this estimator was fitted with "
                    f"({self.origin_.weights}); fit it again, or give it that model"
                )
            self.encoder_ = encoder
        return self.encoder_

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        if isinstance(self.model, str) and self.pretrained:
            state.pop("encoder_", None)
        return state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False  # but paths and images
        tags.input_tags.string = True
        tags.transformer_tags.preserves_dtype = []
        return tags


# --- Lists of scans, a row an entry ---------------------------------------------------------------


def _rows(X: Any, on_error: Literal["raise", "nan"]) -> Sequence[_Row]:  # noqa: N803
    """The scan of each row; with on_error="nan" also of rows that name none, why."""
    if isinstance(X, str | os.PathLike):
        return list_scans(X)
    entries = _entries(X)
    try:
        return _listed(entries)
    except ScanError:
        if on_error == "raise":
            raise
    return [_one(entry) for entry in (_frames(entries) if is_frame(entries) else entries)]


def _entries(X: Any) -> Any:  # noqa: N803
    """A DataFrame, or a list with an entry a scan."""
    if is_frame(X):
        return X
    if hasattr(X, "tolist") and getattr(X, "ndim", 0) in (1, 2) and getattr(X, "dtype", None) is not None:
        kind = getattr(X.dtype, "kind", "O")
        if kind not in "OUT":
            raise ScanError(f"X holds numbers ({X.dtype}), and a scan is a path or an image; give paths, a row a scan")
        if X.ndim == 1:
            return X.tolist()
        if X.shape[1] > 2:
            raise ScanError(f"X has {X.shape[1]} columns: give the scans' paths, and beside them those of their masks")
        return [row[0] if len(row) == 1 else tuple(row) for row in X.tolist()]
    return X


def _listed(entries: Any) -> list[ScanRecord]:
    """As `list_scans`, but that each entry is one scan, and may stand in several rows."""
    if not is_frame(entries):
        records = list_scans(entries)
        if len(records) != len(entries):
            several = next((entry for entry in entries if len(list_scans([entry])) != 1), entries)
            raise ScanError(f"{several}: holds several scans, and a row is one; name each")
        return records
    columns = _file_columns(entries)
    if not columns:
        return list_scans(entries)  # says which column is missing
    first = list_scans(entries[~entries.duplicated(columns)])
    return [first[n] for n in entries.groupby(columns, sort=False, dropna=False).ngroup()]


def _one(entry: Any) -> _Row:
    try:
        return _listed(entry if is_frame(entry) else [entry])[0]
    except ScanError as error:
        return error


def _frames(frame: Any) -> list[Any]:
    """A DataFrame of each row."""
    return [frame.iloc[[n]] for n in range(len(frame))]


def _file_columns(frame: Any) -> list[Any]:
    """The columns that name files, as `list_scans` knows them: image_path, mask_path, t1w_path and the like."""
    names = {column: re.sub(r"[^a-z0-9]", "", str(column).casefold()) for column in frame.columns}
    return [column for column, name in names.items() if name.endswith("path") and name != "densepath"]


def _width(X: Any) -> int:  # noqa: N803
    if is_frame(X):
        return len(_file_columns(X))
    return int(X.shape[1]) if getattr(X, "ndim", 1) == 2 else 1


def _key(record: ScanRecord) -> tuple[Any, ...]:
    """The same for rows of the same files, or of the same images in memory."""
    items = (*record.images.items(), ("mask", record.mask))
    return tuple((name, item if isinstance(item, str | None) else id(item)) for name, item in items)
