"""Supervised pretraining: an encoder with a linear head for each of several labels of the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from brainfm.manifest import ScanRecord
from brainfm.models.encoder import Encoder
from brainfm.train.data import Batch
from brainfm.train.labels import Target, read_targets
from brainfm.train.losses import joined_mean, target_losses
from brainfm.train.recipe import Recipe
from brainfm.train.step import PretrainingMethod, WithEncoder


class Supervised(WithEncoder):
    """An encoder and a linear head for each target.

    Args:
        encoder: An encoder without a classifier.
        targets: What the heads predict.
    """

    def __init__(self, encoder: Encoder, targets: Sequence[Target]) -> None:
        super().__init__(encoder)
        heads = [nn.Linear(encoder.num_features, target.outputs) for target in targets]
        for head in heads:
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
        self.heads = nn.ModuleList(heads)

    def forward(self, volumes: Tensor) -> list[Tensor]:
        """Volumes [B, in_chans, D, H, W] → of each target [B, outputs]."""
        features = self.encoder(volumes)
        return [head(features) for head in self.heads]


class SupervisedMethod(PretrainingMethod):
    """One view a scan, and the mean of the targets' losses, each over the scans of the joined batch that have it."""

    name, views, aside = "supervised", 1, ("heads", ("heads.",))

    def __init__(self, recipe: Recipe, encoder: Encoder, records: Sequence[ScanRecord] = ()) -> None:
        super().__init__(recipe, encoder, records)
        self.targets, labels = read_targets(records, recipe.targets, recipe.kinds)
        self._labels = torch.from_numpy(labels)
        self.network = Supervised(encoder, self.targets)

    def backward(
        self,
        network: nn.Module,
        batch: Batch,
        generator: torch.Generator,  # noqa: ARG002 - nothing is drawn here
        rows: slice,  # noqa: ARG002
    ) -> dict[str, float]:
        """As `Method.backward`; logs the loss, and each target's with how well it is told, where it is known."""
        views = batch.views[0]
        labels = self._labels[batch.scans].to(views.device)
        with self._autocast(views):
            outputs = network(views)
        losses = target_losses(outputs, labels, [target.kind for target in self.targets])
        losses.mean().backward()  # type: ignore[no-untyped-call]
        return {"loss": float(losses.detach().mean())} | self._told(outputs, labels, losses)

    @torch.no_grad()
    def _told(self, outputs: Sequence[Tensor], labels: Tensor, losses: Tensor) -> dict[str, float]:
        """Each target's loss, and its mean absolute error in its own unit, or its accuracy."""
        told = {}
        for n, (target, output) in enumerate(zip(self.targets, outputs, strict=True)):
            label = labels[:, n]
            if target.kind == "regression":
                measure, values = "mae", (output[:, 0].double() - label).abs() * target.std
            else:
                guess = output.argmax(dim=1) if target.kind == "multiclass" else output[:, 0] > 0
                measure, values = "accuracy", (guess == label).double()
            told[f"loss_{target.name}"] = float(losses[n])
            told[f"{measure}_{target.name}"] = float(joined_mean(values[:, None], label.isfinite()[:, None]))
        return told

    def said(self) -> dict[str, Any]:
        """As `PretrainingMethod.said`: what the heads' outputs mean, in their order."""
        return {"targets": [target.to_dict() for target in self.targets]}
