"""BatchNorm folded into the convolution before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


def convolutions_with_norms(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Conv3d, str]]:
    """Each convolution that a BatchNorm3d follows, the module they are in, and the norm's name there.

    The order of registration has to be that of the forward pass, as it is in every sequence, and in MONAI's ResNets
    within a block (conv1, bn1, conv2, bn2, …); that does not hold for any network.
    """
    previous: nn.Module | None = None
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm3d) and isinstance(previous, nn.Conv3d):
            yield module, previous, name
        yield from convolutions_with_norms(child)
        previous = child


def weights_made_anew(model: nn.Module) -> dict[int, Any]:
    """Weights that a copy need not copy, since `fold_batch_norms` makes them anew, by their ids, for `deepcopy`."""
    folded = [conv for _, conv, _ in convolutions_with_norms(model)]
    return {id(conv.weight): nn.Parameter(conv.weight.detach(), requires_grad=False) for conv in folded}


def fold_batch_norms(model: nn.Module, dtype: torch.dtype) -> None:
    """Fold each norm into its convolution, whose weights are made anew in the type, one by one to save memory."""
    for module, conv, name in reversed(list(convolutions_with_norms(model))):  # the largest first leave no gaps
        norm: Any = getattr(module, name)
        statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
        conv.requires_grad_(False).to(dtype=dtype, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        setattr(module, name, nn.Identity().eval())
