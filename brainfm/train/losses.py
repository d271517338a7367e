"""NT-Xent (SimCLR's contrastive loss), exact across processes, and what it tells of an embedding."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

Gradient = Literal["exact", "upstream"]


def nt_xent_loss(z_i: Tensor, z_j: Tensor, temperature: float = 0.5, gradient: Gradient = "exact") -> Tensor:
    """The normalised-temperature cross entropy of pairs of views, Chen et al. 2020 (arXiv 2002.05709), equation 1.

    Each view's positive is the other view of its scan; all other views, those on other processes included, are its
    negatives. Cosine similarity; both directions averaged. Where `torch.distributed` is running, each process gives its
    own pairs, as many as every other one.

    Args:
        z_i: [B, D] projections of the first views.
        z_j: [B, D] projections of the second views, in the same order.
        temperature: Divides the similarities; 0.5 in the released code; the paper gives none.
        gradient: Under DistributedDataParallel, which averages gradients over W processes, "exact" gives the parameters
            the gradient of the loss of the joined batch. "upstream" gives that divided by W, as the released code does:
            its gather passes no gradient to other processes. Adam hides the difference; clipping, SGD and LARS do not.

    Returns:
        The loss, computed in float64. "exact": of this process's pairs; its mean over processes is that of the joined
        batch. "upstream": that of the joined batch.

    Raises:
        ValueError: The projections are not two equal matrices.
    """
    if z_i.ndim != 2 or z_i.shape != z_j.shape:
        raise ValueError(f"expected two matrices [B, D] of one shape, got {list(z_i.shape)} and {list(z_j.shape)}")
    with torch.autocast(z_i.device.type, enabled=False):
        # Half precision cannot hold exp(similarity / temperature), and float32 is TF32 in a GPU's matrix products.
        views = F.normalize(torch.stack([z_i, z_j]).double(), dim=2)
        everyone, rank = _from_everyone(views, passes_gradient=gradient == "exact")
        anchors, first = (views, rank * len(z_i)) if gradient == "exact" else (everyone, 0)
        loss = _cross_entropy(anchors, everyone, first, temperature)
        return loss.to(torch.promote_types(z_i.dtype, torch.float32))


def _cross_entropy(anchors: Tensor, everyone: Tensor, first: int, temperature: float) -> Tensor:
    """Mean over the anchors [2, B, D], which are the pairs `first` … of all pairs [2, N, D]."""
    pairs, total = anchors.shape[1], everyone.shape[1]
    similarity = anchors.flatten(0, 1) @ everyone.flatten(0, 1).T / temperature
    numbers = torch.arange(first, first + pairs, device=anchors.device)
    itself = torch.cat([numbers, numbers + total])
    similarity = similarity.scatter(1, itself[:, None], float("-inf"))
    return F.cross_entropy(similarity, torch.cat([numbers + total, numbers]))


def _from_everyone(views: Tensor, passes_gradient: bool) -> tuple[Tensor, int]:
    """All processes' views [2, N, D] in the order of the ranks, and this process's rank."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return views, 0
    gathered: Tensor = _Gather.apply(views, passes_gradient)  # type: ignore[no-untyped-call]
    return gathered, dist.get_rank()


class _Gather(torch.autograd.Function):
    """Concatenate along the second axis over all processes; backwards, each gets its part of the sum of gradients."""

    @staticmethod
    def forward(ctx: Any, views: Tensor, passes_gradient: bool) -> Tensor:
        ctx.passes_gradient, ctx.pairs = passes_gradient, views.shape[1]
        parts = [torch.empty_like(views) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, views.contiguous())
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        if ctx.passes_gradient:
            dist.all_reduce(gradient)
        first = dist.get_rank() * ctx.pairs
        return gradient[:, first : first + ctx.pairs], None


class NTXentLoss(nn.Module):
    """`nt_xent_loss` as a module."""

    def __init__(self, temperature: float = 0.5, gradient: Gradient = "exact") -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {temperature}")
        self.temperature = temperature
        self.gradient: Gradient = gradient

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        """Two matrices of projections [B, D] → the loss."""
        return nt_xent_loss(z_i, z_j, self.temperature, self.gradient)


@torch.no_grad()
def contrastive_metrics(z_i: Tensor, z_j: Tensor) -> dict[str, float]:
    """How well pairs [B, D] are told apart, on this process.

    Returns:
        "top1": Fraction of first views whose most similar second view is their own; 1 / B by chance.
        "alignment": Mean squared distance of the pairs on the unit sphere, and
        "uniformity": Log of the mean of exp(−2·squared distance) of first views. Both are those of Wang and Isola 2020
            (arXiv 2005.10242).
    """
    first, second = F.normalize(z_i.float(), dim=1), F.normalize(z_j.float(), dim=1)
    nearest = (first @ second.T).argmax(dim=1)
    right = nearest == torch.arange(len(first), device=first.device)
    uniformity = torch.pdist(first).square().mul(-2).exp().mean().log() if len(first) > 1 else torch.zeros(())
    return {
        "top1": float(right.float().mean()),
        "alignment": float((first - second).square().sum(dim=1).mean()),
        "uniformity": float(uniformity),
    }
