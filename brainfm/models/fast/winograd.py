"""Convolutions of a few planes of a map at a time, and how many outputs they have.

Planes lie along z, channels last: [B, rows, columns, C]. The kernels are cubes.

Where a kernel has 3 planes, Winograd's convolution along z alone (Lavin and Gray 2015, arXiv 1509.09308) takes fewer
multiplications, and its transforms are sums of planes. F(4, 3) takes half of them, and in float32 is off by 1e-6.
F(2, 3) takes two thirds; in bfloat16 it is off by 4e-3, where F(4, 3) would be by 1e-2 and a direct convolution by
2e-3. Of a ResNet-18's embedding, which has other roundings too, it makes the error 3.1e-3 instead of 2.8e-3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE = 4  # planes that a convolution makes at once


def outputs(size: int, layer: nn.Conv3d | nn.MaxPool3d) -> int:
    """How many outputs a layer has along an axis of so many inputs."""
    kernel, stride, margin = geometry(layer)
    return (size + 2 * margin - kernel) // stride + 1


def geometry(layer: nn.Conv3d | nn.MaxPool3d) -> tuple[int, int, int]:
    """Kernel, stride and padding, which are the same along each axis."""
    sizes: Any = layer.kernel_size, layer.stride, layer.padding
    kernel, stride, margin = (size if isinstance(size, int) else size[0] for size in sizes)
    return kernel, stride, margin


def fastest(conv: nn.Conv3d) -> Direct | Winograd4 | Winograd2:
    """The fastest way to compute a convolution a few planes at a time. Winograd's give at most `TILE` outputs."""
    if conv.weight.device.type == "cpu" and conv.kernel_size[0] == 3 and conv.stride[0] == 1:
        if conv.weight.dtype == torch.float32:
            return Winograd4(conv)
        if conv.weight.dtype == torch.bfloat16:
            return Winograd2(conv)
    return Direct(conv)


class Direct:
    """A convolution by torch's own."""

    def __init__(self, conv: nn.Conv3d) -> None:
        self._conv = conv

    def __call__(self, planes: Sequence[Tensor], out: Tensor) -> None:
        """Write to `out` [B, n, rows, columns, C] the n outputs of (n - 1) · stride + kernel planes, padded already."""
        conv = self._conv
        x = torch.stack(list(planes), dim=1).permute(0, 4, 1, 2, 3)  # torch's channels-last
        out.copy_(F.conv3d(x, conv.weight, conv.bias, conv.stride).permute(0, 2, 3, 4, 1))


class _Winograd:
    """Convolutions of planes, with the kernels of planes that a kernel [out, in, 3, rows, columns] gives at points."""

    _POINTS: Sequence[Sequence[float]]

    def __init__(self, conv: nn.Conv3d) -> None:
        planes = conv.weight.float()
        self._bias = conv.bias
        self._weights = [
            torch.tensordot(planes, planes.new_tensor(point), ([2], [0])).to(
                conv.weight.dtype, memory_format=torch.channels_last
            )
            for point in self._POINTS
        ]

    def _convolved(self, point: int, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x.permute(0, 3, 1, 2), self._weights[point], bias).permute(0, 2, 3, 1)


class Winograd4(_Winograd):
    """Winograd's F(4, 3): 6 convolutions of planes, in place of 12, give 4."""

    # Of the kernel's planes, for each of the points 0, 1, -1, 2, -2 and infinity.
    _POINTS = (
        (1 / 4, 0, 0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0, 0, 1),
    )

    def __call__(self, planes: Sequence[Tensor], out: Tensor) -> None:
        """As `Direct`, of at most `TILE` outputs."""
        zeros = [torch.zeros_like(planes[0])] * (TILE + 2 - len(planes))  # after the last of a map
        d0, d1, d2, d3, d4, d5 = *planes, *zeros
        even, odd = torch.sub(d4, d2, alpha=4), torch.sub(d3, d1, alpha=4)
        at_1 = self._convolved(1, even + odd, self._bias)  # which all four outputs hold once, and so the bias
        at_minus_1 = self._convolved(2, even.sub_(odd))
        even, odd = d4 - d2, torch.sub(d3, d1, out=odd)
        at_2 = self._convolved(3, torch.add(even, odd, alpha=2))
        at_minus_2 = self._convolved(4, torch.sub(even, odd, alpha=2))
        at_0 = self._convolved(0, even.add_(d0, alpha=4).sub_(d2, alpha=4))
        at_infinity = self._convolved(5, torch.sub(d5, d3).sub_(odd, alpha=4))

        made = out if out.shape[1] == TILE else out.new_empty(len(out), TILE, *out.shape[2:])
        y0, y1, y2, y3 = made.unbind(1)
        ones, twos = at_1 + at_minus_1, at_2 + at_minus_2
        torch.add(ones, twos, out=y0).add_(at_0)
        torch.add(ones, twos, alpha=4, out=y2)
        ones, twos = at_1.sub_(at_minus_1), at_2.sub_(at_minus_2)
        torch.add(ones, twos, alpha=2, out=y1)
        torch.add(ones, twos, alpha=8, out=y3).add_(at_infinity)
        if made is not out:
            out.copy_(made[:, : out.shape[1]])


class Winograd2(_Winograd):
    """Winograd's F(2, 3): 4 convolutions of planes, in place of 6, give 2."""

    # As above, for 0, 1, -1 and infinity.
    _POINTS = ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1))

    def __call__(self, planes: Sequence[Tensor], out: Tensor) -> None:
        """As `Direct`; pairs of outputs are made as if they were volumes of a batch."""
        batch, count = out.shape[:2]
        planes = [*planes, *[torch.zeros_like(planes[0])] * (count % 2)]  # after the last of a map
        pairs = (len(planes) - 2) // 2
        sums = out.new_empty(4, batch, pairs, *planes[0].shape[1:])
        for pair, x in enumerate(sums.unbind(2)):
            d0, d1, d2, d3 = planes[2 * pair : 2 * pair + 4]
            torch.sub(d0, d2, out=x[0])
            torch.add(d1, d2, out=x[1])
            torch.sub(d2, d1, out=x[2])
            torch.sub(d1, d3, out=x[3])
        at_0, at_1, at_minus_1, at_infinity = (
            self._convolved(point, x.flatten(0, 1), bias).reshape(batch, pairs, *out.shape[2:])
            for point, (x, bias) in enumerate(zip(sums, (None, self._bias, None, None), strict=True))
        )  # both outputs hold the one at 1 once, and so the bias
        torch.add(at_1, at_minus_1, out=out[:, ::2]).add_(at_0)
        odd = slice(count // 2)
        torch.sub(at_1[:, odd], at_minus_1[:, odd], out=out[:, 1::2]).sub_(at_infinity[:, odd])
