"""Convolutions whose dilation is a half or a third of the map, as of a crop of 64 voxels in MedicalNet's last stage.

The voxels that a kernel of 3 sees along an axis then lie so far apart that a line of the map falls into lines of one to
three voxels, with 0 at both sides. Of their 1, 4 and 7 products that are not of 0 they take 1, 3 and 5 (which Karatsuba
and Toom-Cook found for polynomials), and three axes as many as theirs multiplied. Layers of so few voxels wait for
their weights, so that the kernel's transform, which is done at each call, has to be cheap: it is a matrix product too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainfm.models.fast.scratch import scratch

_OUTPUTS_AT_ONCE = 256  # channels whose kernels are transformed at a time: 24 MB of 512 channels
_ENOUGH_CHANNELS = 128  # below, transforms cost more than they save

# Of a line of so many voxels: its outputs, the kernel and the voxels, each as sums at the points that are multiplied.
_Matrix = tuple[tuple[float, ...], ...]
_SCHEMES: dict[int, tuple[_Matrix, _Matrix, _Matrix]] = {
    1: (((1,),), ((0, 1, 0),), ((1,),)),
    2: (
        ((1, 1, 0), (1, 0, 1)),
        ((0, 1, 0), (0, -1, 1), (1, -1, 0)),
        ((1, 1), (0, 1), (1, 0)),
    ),
    3: (  # Winograd's F(3, 3) at 0, 1, -1, 2 and infinity, of which the first and the last voxel are 0
        ((1, 1, 1, 1, 0), (0, 1, -1, 2, 0), (0, 1, 1, 4, 1)),
        ((1 / 2, 0, 0), (-1 / 2, -1 / 2, -1 / 2), (-1 / 6, 1 / 6, -1 / 6), (1 / 6, 1 / 3, 2 / 3), (0, 0, 1)),
        ((-1, -2, 1), (-2, -1, 1), (2, -3, 1), (-1, 0, 1), (2, -1, -2)),
    ),
}


def lines(size: Sequence[int], conv: nn.Conv3d) -> tuple[int, ...] | None:
    """Voxels of the lines into which each axis of a map [D, H, W] falls; None where it is not so simple, or no gain."""
    dilation = int(conv.dilation[0])
    is_simple = (
        set(conv.dilation) == {dilation} == set(conv.padding)
        and (set(conv.kernel_size), set(conv.stride), conv.groups, conv.padding_mode) == ({3}, {1}, 1, "zeros")
        and min(conv.in_channels, conv.out_channels) >= _ENOUGH_CHANNELS
    )
    found = tuple(-(-n // dilation) for n in size)
    return found if dilation > 1 and is_simple and max(found) in _SCHEMES and min(found) < 3 else None


def convolved(x: Tensor, conv: nn.Conv3d, along: tuple[int, ...]) -> Tensor:
    """A convolution [B, D, H, W, C] → [B, D, H, W, outputs] of a map whose `lines` are these."""
    batch, *size, channels = x.shape
    apart, count = int(conv.dilation[0]), conv.out_channels
    of_outputs, of_kernel, of_voxels = _schemes(along, x.dtype)
    points = len(of_kernel)

    ends = [end for n, line in zip(reversed(size), reversed(along), strict=True) for end in (0, line * apart - n)]
    split = F.pad(x, (0, 0, *ends)).view(batch, *(n for line in along for n in (line, apart)), channels)
    gathered = split.permute(1, 3, 5, 0, 2, 4, 6, 7)  # the places in a line first
    sums = torch.mm(of_voxels, gathered.reshape(of_voxels.shape[1], -1)).view(points, -1, channels)
    kernels = conv.weight.permute(0, 2, 3, 4, 1).reshape(count, 27, channels)  # as it lies, channels-last

    made = x.new_empty(len(of_outputs), sums.shape[1], count)
    for first in range(0, count, _OUTPUTS_AT_ONCE):
        some = kernels[first : first + _OUTPUTS_AT_ONCE]
        at_points = scratch(0, x, len(some), points, channels)
        torch.bmm(of_kernel.expand(len(some), -1, -1), some, out=at_points)
        products = torch.bmm(sums, at_points.permute(1, 2, 0), out=scratch(1, x, *sums.shape[:2], len(some)))
        made[..., first : first + len(some)] = torch.mm(of_outputs, products.flatten(1)).view(*made.shape[:2], -1)
    if conv.bias is not None:
        made += conv.bias
    made = made.view(*gathered.shape[:-1], count).permute(3, 0, 4, 1, 5, 2, 6, 7)
    made = made.reshape(batch, *(line * apart for line in along), count)
    return made[:, : size[0], : size[1], : size[2]].contiguous()


@lru_cache(maxsize=16)
def _schemes(along: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The matrices of three axes together, of [places or taps] of z, y and x in this order."""
    of_axes = [[torch.tensor(matrix, dtype=torch.float64) for matrix in _SCHEMES[line]] for line in along]
    outputs, kernel, voxels = (torch.kron(torch.kron(z, y), x) for z, y, x in zip(*of_axes, strict=True))
    return outputs.to(dtype), kernel.to(dtype), voxels.to(dtype)
