"""What the methods minimise, exact across processes, and what a contrastive loss tells of an embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from brainfm.columns import Kind

Gradient = Literal["exact", "upstream"]


def nt_xent_loss(z_i: Tensor, z_j: Tensor, temperature: float = 0.5, gradient: Gradient = "exact") -> Tensor:
    """The normalised-temperature cross entropy of pairs of views, Chen et al. 2020 (arXiv 2002.05709), equation 1.

    Each view's positive is the other view of its scan; all other views, those on other processes included, are its
    negatives. Cosine similarity; both directions averaged. Where `torch.distributed` is running, each process gives its
    own pairs, as many as every other one.

    Args:
        z_i: [B, D] projections of the first views.
        z_j: [B, D] projections of the second views, in the same order.
        temperature: Divides the cosines; 0.5 in the released code; the paper gives none.
        gradient: Under DistributedDataParallel, which averages gradients over W processes, "exact" gives the parameters
            the gradient of the loss of the joined batch. "upstream" gives that divided by W, as the released code does:
            its gather passes no gradient to other processes. Adam hides the difference; clipping, SGD and LARS do not.

    Returns:
        The loss, a scalar, computed in float64. "exact": of this process's pairs; its mean over processes is that of
        the joined batch. "upstream": that of the joined batch.

    Raises:
        ValueError: The projections are not two equal matrices.

    Example:
        >>> import torch
        >>> from brainfm.train import nt_xent_loss
        >>> z = torch.eye(4)
        >>> bool(nt_xent_loss(z, z) < nt_xent_loss(z, z.flip(0)))
        True
    """
    _check_pairs(z_i, z_j)
    with torch.autocast(z_i.device.type, enabled=False):
        # Half precision cannot hold exp(similarity / temperature), and float32 is TF32 in a GPU's matrix products.
        views = F.normalize(torch.stack([z_i, z_j]).double(), dim=2)
        everyone, rank = _from_everyone(views, passes_gradient=gradient == "exact")
        anchors, first = (views, rank * len(z_i)) if gradient == "exact" else (everyone, 0)
        loss = _cross_entropy(anchors, everyone, first, temperature)
        return loss.to(torch.promote_types(z_i.dtype, torch.float32))


def yaware_loss(
    z_i: Tensor,
    z_j: Tensor,
    labels: Tensor,
    sigma: float,
    temperature: float = 0.5,
    gradient: Gradient = "exact",
) -> Tensor:
    """y-Aware InfoNCE: NT-Xent whose positives are all views, as far as their scans' labels are alike.

    Dufumier et al. 2021 (arXiv 2106.08808): a view's cross entropy is to weights exp(-(y - y')² / 2σ²) of all other
    views, which are made to sum to 1. Ours is that both views of a scan are anchors, as in `nt_xent_loss`, which
    this is for σ → 0. A scan without a label (nan) is alike to itself alone.

    Args:
        z_i: [B, D] projections of the first views.
        z_j: [B, D] projections of the second views, in the same order.
        labels: [B] of the scans.
        sigma: Of the Gaussian kernel, in the labels' unit; 5 years in the paper.
        temperature: As in `nt_xent_loss`.
        gradient: As in `nt_xent_loss`.

    Returns:
        The loss, as in `nt_xent_loss`.

    Raises:
        ValueError: The projections are not two equal matrices with a label a row.

    Example:
        >>> import torch
        >>> from brainfm.train import yaware_loss
        >>> z, ages = torch.eye(4), torch.tensor([20.0, 20.0, 70.0, 70.0])
        >>> alike = torch.eye(4)[[0, 0, 1, 1]]
        >>> bool(yaware_loss(alike, alike, ages, sigma=5) < yaware_loss(z, z, ages, sigma=5))
        True
    """
    _check_pairs(z_i, z_j)
    if labels.shape != z_i.shape[:1]:
        raise ValueError(f"expected {len(z_i)} labels, got {list(labels.shape)}")
    with torch.autocast(z_i.device.type, enabled=False):
        views = F.normalize(torch.stack([z_i, z_j]).double(), dim=2)
        everyone, rank = _from_everyone(views, passes_gradient=gradient == "exact")
        known = _from_everyone(labels.double()[None, :, None], passes_gradient=False)[0].flatten()
        anchors, first = (views, rank * len(z_i)) if gradient == "exact" else (everyone, 0)
        similarity, itself, _ = _similarity(anchors, everyone, first, temperature)
        pairs = torch.arange(first, first + anchors.shape[1], device=known.device)
        alike = (-((known[pairs, None] - known) ** 2) / (2 * sigma**2)).exp().nan_to_num(0.0)
        weights = alike.scatter(1, pairs[:, None], 1.0).repeat(2, 2).scatter(1, itself[:, None], 0.0)
        weights = weights / weights.sum(dim=1, keepdim=True)
        logs = similarity.log_softmax(dim=1).scatter(1, itself[:, None], 0.0)
        return -(weights * logs).sum(dim=1).mean().to(torch.promote_types(z_i.dtype, torch.float32))


def _check_pairs(z_i: Tensor, z_j: Tensor) -> None:
    if z_i.ndim != 2 or z_i.shape != z_j.shape:
        raise ValueError(f"expected two matrices [B, D] of one shape, got {list(z_i.shape)} and {list(z_j.shape)}")


def _cross_entropy(anchors: Tensor, everyone: Tensor, first: int, temperature: float) -> Tensor:
    """Mean over the anchors [2, B, D], which are the pairs `first` … of all pairs [2, N, D]."""
    similarity, _, partners = _similarity(anchors, everyone, first, temperature)
    return F.cross_entropy(similarity, partners)


def _similarity(anchors: Tensor, everyone: Tensor, first: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the anchors' views for all [2·B, 2·N], which of all each itself is (−∞ there), and its partner."""
    pairs, total = anchors.shape[1], everyone.shape[1]
    similarity = anchors.flatten(0, 1) @ everyone.flatten(0, 1).T / temperature
    numbers = torch.arange(first, first + pairs, device=anchors.device)
    itself = torch.cat([numbers, numbers + total])
    similarity = similarity.scatter(1, itself[:, None], float("-inf"))
    return similarity, itself, torch.cat([numbers + total, numbers])


def target_losses(outputs: Sequence[Tensor], labels: Tensor, kinds: Sequence[Kind]) -> Tensor:
    """[T] the mean loss of each of several targets over the scans of the joined batch that have its label.

    Squared error of a regression, cross entropy of classes. Where `torch.distributed` is running, this process's part
    times the number of processes: the mean over processes, of losses as of gradients, is that of the joined batch.

    Args:
        outputs: Of each target: [B, 1] of a regression, or the logit of class 1 of a binary one; [B, classes].
        labels: [B, T] numbers, or classes from 0; nan is missing.
        kinds: Of each target.
    """
    losses = [_of_scans(*each) for each in zip(outputs, labels.unbind(1), kinds, strict=True)]
    return joined_mean(torch.stack(losses, dim=1), labels.isfinite())


def _of_scans(outputs: Tensor, labels: Tensor, kind: Kind) -> Tensor:
    """[B] the loss of each scan; of one without a label, of any."""
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    labels = labels.nan_to_num(0.0).to(outputs.dtype)
    if kind == "regression":
        return (outputs[:, 0] - labels).square()
    if kind == "binary":
        return F.binary_cross_entropy_with_logits(outputs[:, 0], labels, reduction="none")
    return F.cross_entropy(outputs, labels.long(), reduction="none")


def joined_mean(values: Tensor, known: Tensor) -> Tensor:
    """[T] means over the known ones of [B, T] of the joined batch, as far as they are this process's, times processes.

    Where none is known on any process, 0.
    """
    counts = known.sum(dim=0).to(values.dtype)
    world = 1
    if dist.is_available() and dist.is_initialized():
        world = dist.get_world_size()
        dist.all_reduce(counts)
    return torch.where(known, values, 0.0).sum(dim=0) * world / counts.clamp(min=1)


def masked_l1_loss(prediction: Tensor, volumes: Tensor, hidden: Tensor) -> Tensor:
    """Mean absolute error of hidden voxels, of each scan first: Xie et al. 2022 (arXiv 2111.09886).

    Args:
        prediction: [B, C, z, y, x].
        volumes: [B, C, z, y, x].
        hidden: [B, 1, z, y, x] bool; some of each scan.
    """
    errors = (prediction.to(volumes.dtype) - volumes).abs() * hidden
    return (errors.flatten(1).sum(dim=1) / (hidden.flatten(1).sum(dim=1) * volumes.shape[1])).mean()


def distillation_loss(student: Tensor, teacher: Tensor, kind: Literal["cosine", "smooth_l1"]) -> Tensor:
    """How far features [B, D] are from a teacher's.

    Args:
        student: What the student predicts.
        teacher: The teacher's.
        kind: "cosine": 1 − their cosine, 0 to 2. "smooth_l1": that of PyTorch (squared below 1), from the teacher's
            features after a norm over each vector without weights, as Wei et al. 2022 (arXiv 2205.14141) have it.
    """
    student = student.to(torch.promote_types(student.dtype, torch.float32))
    teacher = teacher.to(student.dtype)
    if kind == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=1).mean()
    return F.smooth_l1_loss(student, F.layer_norm(teacher, teacher.shape[1:]))


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
    """`nt_xent_loss` as a module.

    Args:
        temperature: As of `nt_xent_loss`.
        gradient: As of `nt_xent_loss`.

    Example:
        >>> import torch
        >>> from brainfm.train import NTXentLoss
        >>> NTXentLoss(temperature=0.1)(torch.eye(4), torch.eye(4)).shape
        torch.Size([])
    """

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
