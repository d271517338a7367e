"""What a step of a training computes: the loss of a batch, its gradient, and what is logged of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from brainfm.contract import InputSpec
from brainfm.manifest import ScanRecord
from brainfm.models.encoder import Encoder
from brainfm.train.data import Batch
from brainfm.train.distributed import ProcessGroup
from brainfm.train.recipe import Recipe, Training


class Method(ABC):
    """A way to train an encoder.

    Attributes:
        settings: How it is trained.
        encoder: What is learned.
        network: The encoder and what it is trained with.
        layer_decay: See `make_optimiser`.
    """

    network: nn.Module
    layer_decay: float | None = None

    def __init__(self, settings: Training, encoder: Encoder) -> None:
        self.settings, self.encoder = settings, encoder

    @abstractmethod
    def backward(self, network: nn.Module, batch: Batch, generator: torch.Generator, rows: slice) -> dict[str, float]:
        """Add a batch's gradient to the parameters.

        Args:
            network: `self.network`, or that inside DistributedDataParallel.
            batch: On the training's device.
            generator: Of this step, the same on every process.
            rows: Which rows of the joined batch these are.

        Returns:
            "loss" and what else is logged.
        """

    def end_epoch(self, group: ProcessGroup) -> dict[str, float]:  # noqa: ARG002 - for those that look at other scans
        """What is to be logged of an epoch, on every process; the epoch with the smallest "score" is the best."""
        return {}

    def _autocast(self, images: Tensor) -> Any:
        return torch.autocast(images.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16")


class WithEncoder(nn.Module):
    """An encoder, without a classifier, and what it is pretrained with."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        if encoder.num_classes:
            raise ValueError(f"{type(self).__name__} takes an encoder without a classifier: reset_classifier(0)")
        self.encoder = encoder

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay leaves alone, beside biases and norms: the encoder's own."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}


class PretrainingMethod(Method):
    """A way to pretrain an encoder.

    Args:
        recipe: How.
        encoder: What is learned; `check` has nothing against it.
        records: The scans that batches name by number, with the labels of those methods that learn labels.

    Attributes:
        name: As it is written, "SimCLR".
        views: Of each scan.
        aside: What the network has beside the encoder is kept as this, by the prefixes of its names.
    """

    name: ClassVar[str]
    views: ClassVar[int]
    aside: ClassVar[tuple[str, tuple[str, ...]]]

    def __init__(self, recipe: Recipe, encoder: Encoder, records: Sequence[ScanRecord] = ()) -> None:  # noqa: ARG002
        super().__init__(recipe, encoder)
        self.recipe = recipe

    @classmethod
    def check(cls, recipe: Recipe, encoder: Encoder, spec: InputSpec) -> None:
        """Raise RecipeError where the method cannot train such a network on views of a contract; reads no scan."""

    def said(self) -> dict[str, Any]:
        """What is kept with the tensors that are kept aside, as plain data."""
        return {}
