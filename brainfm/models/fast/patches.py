"""Patches → tokens by one matrix product: what a convolution does whose stride is its kernel, in less time."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def embedded(x: Tensor, conv: nn.Conv3d) -> Tensor:
    """`conv(x)` of volumes [B, C, D, H, W] that its kernel divides, channels last: [B, d, h, w, outputs].

    What a patch of nothing but 0 becomes, as beside a brain, is the bias, and where patches are large these are left
    out of the product.
    """
    a, b, c = conv.kernel_size
    batch, channels, *size = x.shape
    d, h, w = (n // step for n, step in zip(size, (a, b, c), strict=True))
    patches = (
        x.reshape(batch, channels, d, a, h, b, w, c).permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch * d * h * w, -1)
    )
    weight = conv.weight.flatten(1).t()
    bias = conv.bias if conv.bias is not None else weight.new_zeros(conv.out_channels)
    large = patches.shape[1] > conv.out_channels
    filled = torch.linalg.vector_norm(patches, 1, dim=1) != 0 if large else None  # faster than `any`
    if filled is None or bool(filled.all()):
        tokens = torch.addmm(bias, patches, weight)
    else:
        tokens = bias.repeat(len(patches), 1)
        tokens[filled] = torch.addmm(bias, patches[filled], weight)
    return tokens.view(batch, d, h, w, -1)
