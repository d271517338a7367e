"""SimCLR: an encoder and the projection head it is pretrained with (Kaczmarek et al. 2025, arXiv 2509.10620)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from brainfm.manifest import ScanRecord
from brainfm.models.encoder import Encoder
from brainfm.train.data import Batch
from brainfm.train.losses import contrastive_metrics, nt_xent_loss
from brainfm.train.recipe import Recipe
from brainfm.train.step import PretrainingMethod


class SimCLR(nn.Module):
    """An encoder with a projection head: Linear → ReLU → Linear, without biases and norms, as the released code has it.

    Its state dict has the released checkpoint's names, `encoder.…` and `projector.…`, and loads it strictly.

    Args:
        encoder: An encoder without a classifier.
        projection_dim: Width of the projection; 64 in the released code.

    Example:
        >>> import brainfm, torch
        >>> from brainfm.train import SimCLR
        >>> network = SimCLR(brainfm.create_model("test_resnet_3d"))
        >>> views = torch.randn(2, 1, 40, 48, 48), torch.randn(2, 1, 40, 48, 48)
        >>> network(*views).shape
        torch.Size([4, 64])
    """

    def __init__(self, encoder: Encoder, projection_dim: int = 64) -> None:
        super().__init__()
        if encoder.num_classes:
            raise ValueError("SimCLR takes an encoder without a classifier: reset_classifier(0)")
        width = encoder.num_features
        self.encoder = encoder
        self.projector = nn.Sequential(
            nn.Linear(width, width, bias=False),
            nn.ReLU(),
            nn.Linear(width, projection_dim, bias=False),
        )

    def forward(self, *views: Tensor) -> Tensor:
        """Views [B, in_chans, D, H, W] each → projections [views · B, projection_dim], not normalised, view after view.

        Each view passes through the network by itself, as in the released code: BatchNorm takes its statistics of one
        view, and moves its running ones with each. All in one call, for DistributedDataParallel prepares a backward
        pass, and sends its buffers, in each.
        """
        return torch.cat([self.projector(self.encoder(view)) for view in views])


class SimCLRMethod(PretrainingMethod):
    """Two views a scan, told apart from all other scans of the joined batch."""

    name, views, aside = "SimCLR", 2, ("projector", ("projector.",))

    def __init__(self, recipe: Recipe, encoder: Encoder, records: Sequence[ScanRecord] = ()) -> None:
        super().__init__(recipe, encoder, records)
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
            return self._backward_in_chunks(network, batch, chunk)
        z_i, z_j = self._project(network, views)
        loss = self._loss(z_i, z_j, batch.scans)
        loss.backward()  # type: ignore[no-untyped-call]
        return {"loss": float(loss.detach())} | contrastive_metrics(z_i.detach(), z_j.detach())

    def _loss(self, z_i: Tensor, z_j: Tensor, scans: Sequence[int]) -> Tensor:  # noqa: ARG002 - for those with labels
        """The loss of the pairs of projections [B, D], which are of these scans."""
        return nt_xent_loss(z_i, z_j, self.recipe.temperature, self.recipe.gradient)

    def _backward_in_chunks(self, network: nn.Module, batch: Batch, chunk: int) -> dict[str, float]:
        """The gradient of the whole batch, with the activations of one chunk at a time: Gao et al. 2021 (2101.06983).

        All projections are computed without activations, the loss gives each its gradient, and each chunk is computed
        again to pass it on. BatchNorm takes the statistics of a chunk, and counts each chunk once.
        """
        parts = batch.views.split(chunk, dim=1)  # type: ignore[no-untyped-call]
        with torch.no_grad(), self.encoder._still_statistics():
            projections = [self._project(network, part) for part in parts]
        z = torch.cat(projections, dim=1).requires_grad_()
        loss = self._loss(z[0], z[1], batch.scans)
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
