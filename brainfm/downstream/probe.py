"""Linear probes: what a linear model reads from embeddings of an encoder that stays as it is."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from brainfm.downstream.statistics import HIGHER_IS_BETTER, Kind, metrics
from brainfm.errors import MissingExtraError
from brainfm.train.data import EpochSampler
from brainfm.zoo.cards import Head

Target: TypeAlias = Literal["standardised", "raw"]  # what a regression learns, see `LinearHead`

# Strengths of regularisation that the inner cross-validation tries: C of the logistic, alpha of the ridge regression.
# Ours: wide enough that the ends are seldom chosen, for features of mean 0 and std 1.
LOGISTIC_C = tuple(10.0**n for n in range(-4, 3))
RIDGE_ALPHA = tuple(10.0 ** (n / 2) for n in range(-4, 11))
_FOLDS = 5


def fit_probe(
    features: NDArray[Any],
    labels: NDArray[Any],
    kind: Kind,
    *,
    patients: list[str] | None = None,
    seed: int = 0,
    before: Sequence[Any] = (),
) -> Any:
    """A linear model on standardised features: logistic or ridge regression, its strength by inner cross-validation.

    Args:
        features: [n, d] of the training scans.
        labels: [n] classes from 0, or numbers.
        kind: What the labels are.
        patients: Whose the scans are; a patient is in one fold only.
        seed: Of the folds.
        before: Transformers that come first, fitted with the rest on what each fold learns from.

    Returns:
        A fitted scikit-learn estimator for `predict_probe`.
    """
    try:
        from sklearn.linear_model import LogisticRegression, Ridge
        from sklearn.model_selection import GridSearchCV, GroupKFold, StratifiedGroupKFold
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
        from threadpoolctl import threadpool_limits
    except ModuleNotFoundError as error:
        raise MissingExtraError("scikit-learn", "eval") from error
    groups = np.unique(patients if patients is not None else np.arange(len(labels)).astype(str), return_inverse=True)[1]
    features = features.astype(np.float64)
    folds: Any
    scoring: Any
    if kind == "regression":
        model = make_pipeline(*before, StandardScaler(), Ridge())
        grid, scoring = {"ridge__alpha": RIDGE_ALPHA}, "neg_mean_squared_error"
        count, folds = len(set(groups)), GroupKFold
    else:
        model = make_pipeline(*before, StandardScaler(), LogisticRegression(max_iter=5000))
        grid, scoring = {"logisticregression__C": LOGISTIC_C}, _log_likelihood
        count, folds = min(len(set(groups[labels == label])) for label in np.unique(labels)), StratifiedGroupKFold
    splits = []
    if count > 1:
        parts = folds(min(_FOLDS, count), shuffle=True, random_state=seed).split(features, labels, groups)
        classes = 1 if kind == "regression" else len(np.unique(labels))
        splits = [(learn, look) for learn, look in parts if len(np.unique(labels[learn])) >= classes]
    with threadpool_limits(1):  # many small fits: threads cost more than they bring, and change the last digits
        if not splits:
            return model.fit(features, labels)  # too few patients of a class: nothing to choose by
        return (
            GridSearchCV(model, grid, cv=splits, scoring=scoring, error_score="raise")
            .fit(features, labels)
            .best_estimator_
        )


def fit_neighbours(
    features: NDArray[Any], labels: NDArray[Any], kind: Kind, *, by_class: bool = False, before: Sequence[Any] = ()
) -> Any:
    """What embeddings say without training ("zero-shot" transfer): whom a scan is near, by standardised features.

    Args:
        features: [n, d] of the training scans.
        labels: [n] classes from 0, or numbers.
        kind: What the labels are.
        by_class: Take the nearest mean of a class, with probabilities by the variance within classes, as scikit-learn's
            `NearestCentroid` has them. A regression has no classes, and is the mean of the neighbours all the same.
        before: Transformers that come first.

    Returns:
        A fitted scikit-learn estimator for `predict_probe`. Of neighbours it takes √n, a rule of thumb (ours), and
        gives the share of each class among them, or their mean.
    """
    try:
        from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor, NearestCentroid
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ModuleNotFoundError as error:
        raise MissingExtraError("scikit-learn", "eval") from error
    neighbours = max(1, round(math.sqrt(len(features))))
    if kind == "regression":
        model: Any = KNeighborsRegressor(neighbours)
    else:
        model = NearestCentroid() if by_class else KNeighborsClassifier(neighbours)
    return make_pipeline(*before, StandardScaler(), model).fit(features.astype(np.float64), labels)


def _log_likelihood(probe: Any, features: NDArray[Any], labels: NDArray[Any]) -> float:
    """scikit-learn's "neg_log_loss", also of a fold whose few patients do not have every class."""
    chances = probe.predict_proba(features)[np.arange(len(labels)), np.searchsorted(probe.classes_, labels)]
    return float(np.log(np.maximum(chances, np.finfo(np.float64).eps)).mean())


def predict_probe(probe: Any, features: NDArray[Any], kind: Kind) -> NDArray[np.float64]:
    """Predictions for [n, d] features: [n] numbers or probabilities of class 1, or [n, classes] probabilities."""
    if isinstance(probe, FittedHead):
        with torch.no_grad():
            return probe.head.predictions(probe.layer(torch.from_numpy(features.astype(np.float32))))
    features = features.astype(np.float64)
    if kind == "regression":
        numbers: NDArray[np.float64] = probe.predict(features)
        return numbers
    probabilities: NDArray[np.float64] = probe.predict_proba(features)
    return probabilities[:, 1] if kind == "binary" else probabilities


@dataclass(frozen=True)
class AdamProbe:
    """The released code's linear probe (`main_eval.py`) on embeddings that are computed once.

    One linear layer, Adam, no regularisation, the best epoch by validation; what does not fill a batch is left out.
    The code itself computes the embeddings in each step, by an encoder whose BatchNorm is in training mode: there a
    scan's embedding depends on its batch, and the running statistics drift. Here the encoder is in eval mode; a
    network without BatchNorm has the same result either way. `finetune` with `trained="head"` and `drifting=True`, in
    evaluations the mode "probe_paper", is the code's own.

    Attributes:
        epochs: 100 in the paper.
        lr: 1e-4 in the code.
        batch_size: 6 in the code.
        target: See `LinearHead`; the code's is "raw".
        head_std: See `draw_head`; the code's is None.
    """

    epochs: int = 100
    lr: float = 1e-4
    batch_size: int = 6
    target: Target = "raw"
    head_std: float | None = None

    def fit(
        self,
        train: tuple[NDArray[Any], NDArray[Any]],
        val: tuple[NDArray[Any], NDArray[Any]],
        kind: Kind,
        selection: str = "loss",
        *,
        seed: int = 0,
    ) -> FittedHead:
        """Train on (features, labels), and keep the epoch that is best on val.

        Args:
            train: Features [n, d] and labels [n].
            val: As train.
            kind: What the labels are.
            selection: What the best epoch is chosen by, as of `Finetuning`: a metric, or "loss".
            seed: Of initial weights and order, both as of `finetune`.
        """
        head = LinearHead(kind, train[1], self.target)
        layer = nn.Linear(train[0].shape[1], head.outputs)
        draw_head(layer, self.head_std, seed)
        features, targets = torch.from_numpy(train[0].astype(np.float32)), head.targets(train[1])
        held_out = torch.from_numpy(val[0].astype(np.float32))
        batch_size = min(self.batch_size, len(features))
        order = EpochSampler(len(features), batch_size, seed=seed)
        optimiser = torch.optim.Adam(layer.parameters(), lr=self.lr)
        best, kept = math.inf, layer.state_dict()
        for epoch in range(self.epochs):
            order.epoch = epoch
            for rows in torch.split(torch.tensor([item for _, item in order]), batch_size):
                optimiser.zero_grad()
                head.loss(layer(features[rows]), targets[rows]).backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            with torch.no_grad():
                value = head.score(layer(held_out), val[1], selection, batch_size)["score"]
            if value < best or not math.isfinite(best):  # an undefined score is better than none
                best, kept = value, copy.deepcopy(layer.state_dict())
        layer.load_state_dict(kept)
        return FittedHead(layer, head)


@dataclass(frozen=True, eq=False)
class FittedHead:
    """A trained linear layer and what its outputs mean; `predict_probe` takes it."""

    layer: nn.Linear
    head: LinearHead


def draw_head(layer: nn.Module, std: float | None, seed: int) -> None:
    """Draw the initial weights of a last layer, and leave torch's own generator as it was.

    Args:
        layer: A Linear, or a convolution.
        std: Of normal weights, with biases of 0; None is the way of torch's own layers.
        seed: With None the weights are those of a layer that is made after `torch.manual_seed(seed)`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer.reset_parameters()  # type: ignore[operator]
        if std is not None:
            nn.init.normal_(layer.weight, std=std)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


class LinearHead:
    """What the outputs of a last linear layer mean: the loss they have, and the predictions they are.

    Args:
        kind: What the labels are.
        labels: Of the training scans.
        target: Of a regression. "standardised" (ours) learns numbers with the training labels' mean 0 and std 1, and
            gives them back as they were; "raw" learns them as they are, as the released 3D-Neuro-SimCLR code does.

    Attributes:
        outputs: How many there are.
    """

    def __init__(self, kind: Kind, labels: NDArray[Any], target: Target = "standardised") -> None:
        self.kind = kind
        self.outputs = int(labels.max()) + 1 if kind == "multiclass" else 1
        self.mean, self.std = 0.0, 1.0
        if kind == "regression" and target == "standardised":
            self.mean, self.std = float(labels.mean()), float(labels.std()) or 1.0

    @classmethod
    def known(cls, head: Head) -> LinearHead:
        """The one that a kept model's head describes."""
        one = cls.__new__(cls)
        one.kind, one.outputs, one.mean, one.std = head.kind, head.outputs, head.mean, head.std
        return one

    def targets(self, labels: NDArray[Any]) -> Tensor:
        """[n] labels as what `loss` takes."""
        if self.kind == "multiclass":
            return torch.from_numpy(labels.astype(np.int64))
        return torch.from_numpy(((labels - self.mean) / self.std).astype(np.float32))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy, or the mean square, of outputs [n, outputs]."""
        if self.kind == "multiclass":
            return nn.functional.cross_entropy(outputs, targets)
        if self.kind == "binary":
            return nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], targets)
        return nn.functional.mse_loss(outputs[:, 0], targets)

    def score(
        self, outputs: Tensor, labels: NDArray[Any], selection: str, batch_size: int | None = None
    ) -> dict[str, float]:
        """Metrics and loss of outputs [n, outputs], and "score": the one of them to select by, less is better.

        With `batch_size` the loss is the mean of the batches' means, as the released code has it: a last batch that is
        smaller counts as much as the others.
        """
        values = metrics(labels, self.predictions(outputs), self.kind)
        parts = (torch.split(part, batch_size or len(labels)) for part in (outputs, self.targets(labels)))
        losses = [float(self.loss(*batch)) for batch in zip(*parts, strict=True)]
        values["loss"] = sum(losses) / len(losses)
        return values | {"score": values[selection] * (-1 if HIGHER_IS_BETTER.get(selection, False) else 1)}

    def predictions(self, outputs: Tensor) -> NDArray[np.float64]:
        """[n] numbers or probabilities of class 1, or [n, classes] probabilities."""
        outputs = outputs.detach().double().cpu()
        if self.kind == "multiclass":
            return outputs.softmax(dim=1).numpy()
        if self.kind == "binary":
            return outputs[:, 0].sigmoid().numpy()
        return (outputs[:, 0] * self.std + self.mean).numpy()
