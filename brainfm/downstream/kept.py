"""A model that predicts, as a folder: encoder and head, and what intervals and a warning of unlike scans need.

The folder is one of `brainfm.save_for_hub` whose weights end in the classifier, so that `create_model("local-dir:…")`
gives the encoder, and `num_classes=` its classifier too. Its config.json has a `head` (`brainfm.zoo.cards.Head`), and
beside it `head.safetensors` holds a few arrays: the validation part's scores and distances, mean and inverse covariance
of the training part's embeddings, and of a scikit-learn probe its coefficients in float64. No scan's embedding is kept.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from brainfm.downstream.conformal import nonconformity
from brainfm.downstream.probe import FittedHead, LinearHead
from brainfm.errors import MissingExtraError, WeightsError, WeightsNotFoundError
from brainfm.factory import create_model
from brainfm.files import file_sha256, one_line
from brainfm.hub.folder import HEAD_ARRAYS, save_folder
from brainfm.models.encoder import Encoder
from brainfm.names import resolve
from brainfm.weights import HUB_CONFIG, read_checkpoint
from brainfm.zoo.cards import Cohort, Head

_Array = NDArray[np.float64]
_REFERENCE = ("train.mean", "train.precision", "val.scores", "val.distances")
_PROBE = ("probe.mean", "probe.scale", "probe.weight", "probe.bias")  # of scikit-learn, in float64


@dataclass(frozen=True, eq=False)
class KeptModel:
    """An encoder, and what becomes of its embeddings.

    Attributes:
        encoder: Gives embeddings.
        layer: The classifier that takes them.
        head: What that predicts.
        arrays: Of the folder.
    """

    encoder: Encoder
    layer: nn.Module
    head: Head
    arrays: Mapping[str, NDArray[Any]]

    def predictions(self, vectors: NDArray[np.float32]) -> _Array:
        """Of embeddings [n, d]: [n] numbers or probabilities of the positive class, or [n, classes] probabilities."""
        found = LinearHead.known(self.head).predictions(self._outputs(vectors))
        return (found - self.head.intercept) / self.head.slope if self.head.kind == "regression" else found

    def _outputs(self, vectors: NDArray[np.float32]) -> Tensor:
        if "probe.weight" in self.arrays:
            mean, scale, weight, bias = (self.arrays[name] for name in _PROBE)
            return torch.from_numpy((vectors.astype(np.float64) - mean) / scale @ weight.T + bias)
        with torch.no_grad():  # each alone, as a fine-tuned model predicts: a product of matrices rounds otherwise
            return torch.cat([self.layer(row[None]) for row in torch.from_numpy(vectors)])

    def distances(self, vectors: ArrayLike) -> _Array:
        """[n]: the Mahalanobis distance of embeddings [n, d] from the training part's."""
        return _distances(vectors, self.arrays)

    def percentiles(self, distances: _Array) -> _Array:
        """[n]: the percentage of the validation part's scans that are nearer to the training part; 100 is unlike it."""
        own = self.arrays["val.distances"]
        return 100 * np.searchsorted(own, distances) / len(own)


def keep_model(
    folder: Path,
    encoder: Encoder,
    head: Head,
    train: NDArray[np.float32],
    val: tuple[NDArray[np.float32], NDArray[Any]],
    *,
    probe: Mapping[str, NDArray[Any]] | None = None,
    cohorts: Sequence[Cohort] = (),
    overlay: Mapping[str, Any],
) -> None:
    """Write an encoder that ends in a classifier as a folder that `read_kept` and `create_model` read.

    How unlike the training part a scan is, is said by the Mahalanobis distance, with the shrunk covariance of Ledoit &
    Wolf: it needs no more than a mean and a matrix, whereas nearest neighbours would put every patient's embedding into
    the folder. As a percentile of the validation part's distances, which were not fitted, it has a scale.

    Args:
        folder: Where to write.
        encoder: With its classifier.
        head: What that predicts.
        train: Embeddings [n, d] of the training part.
        val: Embeddings of the validation part, and its labels.
        probe: The coefficients of a scikit-learn probe (`probe_arrays`), where that is what predicts.
        cohorts: What it was trained on now, beside what the encoder was.
        overlay: As of `save_for_hub`.
    """
    vectors, labels = val
    arrays: dict[str, NDArray[Any]] = {**(probe or {}), **_reference(train)}
    arrays["val.distances"] = np.sort(_distances(vectors, arrays))
    predictions = KeptModel(encoder, _on_cpu(encoder.get_classifier()), head, arrays).predictions(vectors)
    arrays["val.scores"] = np.sort(nonconformity(labels, predictions, head.kind))
    earlier = encoder.pretrained_cfg.cohorts
    new = [one for one in cohorts if one.name not in {other.name for other in earlier}]
    tensors = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in arrays.items()}
    save_folder(encoder, folder, {**overlay, "cohorts": (*earlier, *new)}, head, tensors)


def read_kept(folder: str | os.PathLike[str]) -> KeptModel:
    """The model in a folder that `--keep-models` wrote.

    Raises:
        WeightsNotFoundError: There is no such folder, or a model without a head.
        WeightsError: Its files are damaged, or not of one model.
    """
    text = str(folder)
    name = text if text.startswith("local-dir:") else f"local-dir:{text}"
    place = Path(name.removeprefix("local-dir:")).expanduser()
    resolved = resolve(name)
    said = resolved.config.get("head")
    if said is None:
        raise WeightsNotFoundError(
            f"{place}: this model gives embeddings and predicts nothing; 'brainfm finetune … --keep-models' makes one "
            "that does"
        )
    try:
        head = Head.from_dict(said)
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{place / HUB_CONFIG}: its head is not one ({one_line(error)})") from error
    if (there := resolved.cfg.num_classes) != head.outputs:
        raise WeightsError(f"{place / HUB_CONFIG}: its head has {head.outputs} outputs, and its classifier {there}")
    encoder = create_model(name, num_classes=head.outputs)
    arrays = _read_arrays(place / HEAD_ARRAYS, head, encoder.num_features)
    layer = encoder.get_classifier()
    encoder.reset_classifier(0)
    return KeptModel(encoder, layer, head, arrays)


def is_kept(folder: Path, run: str) -> bool:
    """Whether a folder holds the model of a run."""
    try:
        return bool(json.loads((folder / HUB_CONFIG).read_text(encoding="utf-8"))["head"]["run"] == run)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def bare(encoder: Encoder) -> Encoder:
    """A copy without the classifier."""
    copied = copy.deepcopy(encoder)
    copied.reset_classifier(0)
    return copied.eval()


def put_probe(encoder: Encoder, probe: Any, outputs: int) -> dict[str, NDArray[Any]]:
    """Give an encoder a fitted probe as its classifier; returns the arrays that `keep_model` keeps of it.

    Of a scikit-learn probe the classifier is its coefficients for features as they are, rounded to float32; the arrays
    are the coefficients themselves, for standardised features.
    """
    encoder.reset_classifier(outputs)
    classifier = encoder.get_classifier()
    if isinstance(probe, FittedHead):
        arrays: dict[str, NDArray[Any]] = {}
        weight, bias = probe.layer.weight.detach(), probe.layer.bias.detach()
    else:
        scaler, linear = probe[0], probe[-1]
        mean, scale = np.asarray(scaler.mean_, np.float64), np.asarray(scaler.scale_, np.float64)
        coef = np.atleast_2d(np.asarray(linear.coef_, np.float64))
        intercept = np.atleast_1d(np.asarray(linear.intercept_, np.float64))
        arrays = dict(zip(_PROBE, (mean, scale, coef, intercept), strict=True))
        weight = torch.from_numpy(coef / scale)
        bias = torch.from_numpy(intercept - coef / scale @ mean)
    with torch.no_grad():
        for name, values in (("weight", weight), ("bias", bias)):
            parameter: Tensor = getattr(classifier, name)
            parameter.copy_(values.view_as(parameter))
    return arrays


def _on_cpu(layer: nn.Module) -> nn.Module:
    return copy.deepcopy(layer).cpu()


def _reference(vectors: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """Mean and inverse covariance of embeddings [n, d]."""
    try:
        from sklearn.covariance import LedoitWolf
    except ModuleNotFoundError as error:
        raise MissingExtraError("scikit-learn", "eval") from error
    fitted = LedoitWolf().fit(vectors.astype(np.float64))
    return {
        "train.mean": fitted.location_.astype(np.float32),
        "train.precision": fitted.get_precision().astype(np.float32),
    }


def _distances(vectors: ArrayLike, arrays: Mapping[str, NDArray[Any]]) -> _Array:
    away = np.asarray(vectors, np.float64) - arrays["train.mean"]
    squares = np.einsum("ni,ij,nj->n", away, arrays["train.precision"].astype(np.float64), away, optimize=True)
    distances: _Array = np.sqrt(np.maximum(squares, 0))
    return distances


def _read_arrays(path: Path, head: Head, width: int) -> dict[str, NDArray[Any]]:
    """The arrays beside a head; those that its config was written with, and of the encoder's width."""
    state = read_checkpoint(path).state
    if file_sha256(path) != head.sha256:
        raise WeightsError(
            f"{path}: is not the file that {HUB_CONFIG} beside it was written with; copy the folder again"
        )
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    wanted: dict[str, Sequence[int]] = {"train.mean": (width,), "train.precision": (width, width)}
    if any(name in arrays for name in _PROBE):
        wanted |= {"probe.mean": (width,), "probe.scale": (width,)}
        wanted |= {"probe.weight": (head.outputs, width), "probe.bias": (head.outputs,)}
    if lacking := [name for name in (*_REFERENCE, *wanted) if name not in arrays]:
        raise WeightsError(f"{path}: lacks {', '.join(lacking)}")
    if wrong := [name for name, shape in wanted.items() if arrays[name].shape != tuple(shape)]:
        raise WeightsError(
            f"{path}: {wrong[0]} is {list(arrays[wrong[0]].shape)}, and the encoder gives {width} numbers"
        )
    return arrays
