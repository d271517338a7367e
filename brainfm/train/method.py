"""What a step of each method computes: the loss of a batch, its gradient, and what is logged of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from brainfm.errors import RecipeError
from brainfm.models.encoder import Encoder
from brainfm.models.vit import VisionTransformer
from brainfm.train.data import Batch
from brainfm.train.distributed import ProcessGroup
from brainfm.train.losses import contrastive_metrics, nt_xent_loss
from brainfm.train.mae import MaskedAutoencoder
from brainfm.train.recipe import Recipe, Training
from brainfm.train.simclr import SimCLR


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


class PretrainingMethod(Method):
    """A way to pretrain an encoder.

    Attributes:
        name: As it is written, "SimCLR".
        views: Of each scan.
        aside: What the network has beside the encoder is kept as this, by the prefixes of its names.
    """

    name: ClassVar[str]
    views: ClassVar[int]
    aside: ClassVar[tuple[str, tuple[str, ...]]]

    def __init__(self, recipe: Recipe, encoder: Encoder) -> None:
        super().__init__(recipe, encoder)
        self.recipe = recipe


class SimCLRMethod(PretrainingMethod):
    """Two views a scan, told apart from all other scans of the joined batch."""

    name, views, aside = "SimCLR", 2, ("projector", ("projector.",))

    def __init__(self, recipe: Recipe, encoder: Encoder) -> None:
        super().__init__(recipe, encoder)
        self.network = SimCLR(encoder, recipe.projection_dim)

    def backward(
        self,
        network: nn.Module,
        batch: Batch,
        generator: torch.Generator,  # noqa: ARG002 - nothing is drawn here
        rows: slice,  # noqa: ARG002
    ) -> dict[str, float]:
        """As `Method.backward`; logs the loss, top-1, alignment and uniformity."""
        views, chunk = batch.views, self.recipe.batch_chunk
        if chunk is not None and chunk < views.shape[1]:
            return self._backward_in_chunks(network, views, chunk)
        z_i, z_j = self._project(network, views)
        loss = nt_xent_loss(z_i, z_j, self.recipe.temperature, self.recipe.gradient)
        loss.backward()  # type: ignore[no-untyped-call]
        return {"loss": float(loss.detach())} | contrastive_metrics(z_i.detach(), z_j.detach())

    def _backward_in_chunks(self, network: nn.Module, views: Tensor, chunk: int) -> dict[str, float]:
        """The gradient of the whole batch, with the activations of one chunk at a time: Gao et al. 2021 (2101.06983).

        All projections are computed without activations, the loss gives each its gradient, and each chunk is computed
        again to pass it on. BatchNorm takes the statistics of a chunk, and counts each chunk once.
        """
        parts = views.split(chunk, dim=1)  # type: ignore[no-untyped-call]
        with torch.no_grad(), self.encoder._still_statistics():
            projections = [self._project(network, part) for part in parts]
        z = torch.cat(projections, dim=1).requires_grad_()
        loss = nt_xent_loss(z[0], z[1], self.recipe.temperature, self.recipe.gradient)
        loss.backward()  # type: ignore[no-untyped-call]
        assert z.grad is not None
        gradients = z.grad.split(chunk, dim=1)  # type: ignore[no-untyped-call]
        for number, (part, gradient) in enumerate(zip(parts, gradients, strict=True), start=1):
            waits = isinstance(network, DistributedDataParallel) and number < len(parts)
            with network.no_sync() if waits else nullcontext():  # type: ignore[operator]
                self._project(network, part).backward(gradient)  # type: ignore[no-untyped-call]
        return {"loss": float(loss.detach())} | contrastive_metrics(z[0].detach(), z[1].detach())

    def _project(self, network: nn.Module, views: Tensor) -> Tensor:
        """[2, B, C, z, y, x] → projections [2, B, D]."""
        with self._autocast(views):
            projections: Tensor = network(*(views if self.recipe.views == "separate" else [views.flatten(0, 1)]))
        return torch.stack(projections.chunk(2))


class MAEMethod(PretrainingMethod):
    """One view a scan, most of its patches hidden and filled in."""

    name, views, aside = "MAE", 1, ("decoder", ("decoder_", "mask_token"))

    def __init__(self, recipe: Recipe, encoder: Encoder) -> None:
        super().__init__(recipe, encoder)
        if not isinstance(encoder, VisionTransformer):
            raise RecipeError(f"an MAE needs a ViT, and {recipe.model} is a {type(encoder).__name__}")
        self.network = MaskedAutoencoder(
            encoder, recipe.decoder_dim, recipe.decoder_depth, recipe.decoder_heads, recipe.norm_pix_loss
        )
        self._patches = encoder.pos_embed.shape[1] - 1

    def backward(self, network: nn.Module, batch: Batch, generator: torch.Generator, rows: slice) -> dict[str, float]:
        """As `Method.backward`; logs the loss."""
        # Drawn for the joined batch, so that the number of processes changes nothing.
        views = batch.views[0]
        noise = torch.rand(rows.stop, self._patches, generator=generator)[rows].to(views.device)
        with self._autocast(views):
            loss = network(views, self.recipe.mask_ratio, noise, predict_all=False)[0]
        loss.backward()
        return {"loss": float(loss.detach())}


METHODS: dict[str, type[PretrainingMethod]] = {"simclr": SimCLRMethod, "mae": MAEMethod}
