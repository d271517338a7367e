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

from brainfm.models.fast.scratch import scratch

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
        self._bias = conv.bias
        kernels = conv.weight.float().permute(2, 0, 3, 4, 1)
        at_points = torch.mm(kernels.new_tensor(self._POINTS), kernels.flatten(1)).view(-1, *kernels.shape[1:])
        self._weights = at_points.to(conv.weight.dtype).permute(0, 1, 4, 2, 3).unbind()  # channels-last

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
    # The same of the planes under it: a matrix product goes through memory once, where a sum does for each term.
    _PLANES = (
        (4, 0, -5, 0, 1, 0),
        (0, -4, -4, 1, 1, 0),
        (0, 4, -4, -1, 1, 0),
        (0, -2, -1, 2, 1, 0),
        (0, 2, -1, -2, 1, 0),
        (0, 4, 0, -5, 0, 1),
    )

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__(conv)
        self._of_planes = conv.weight.new_tensor(self._PLANES)

    def __call__(self, planes: Sequence[Tensor] | Tensor, out: Tensor) -> None:
        """As `Direct`, of at most `TILE` outputs; a tensor of planes is [planes, B, rows, columns, C]."""
        if not isinstance(planes, Tensor):
            planes = torch.stack([*planes], out=scratch(0, planes[0], len(planes), *planes[0].shape))
        sums = scratch(1, planes, len(self._POINTS), *planes.shape[1:])
        for volume in range(len(out)):  # after the last plane of a map are zeros
            under = planes[:, volume].flatten(1)
            torch.mm(self._of_planes[:, : len(planes)], under, out=sums[:, volume].flatten(1))
        # All four outputs hold the one at 1 once, and so the bias.
        at_0, at_1, at_minus_1, at_2, at_minus_2, at_infinity = (
            self._convolved(point, x, self._bias if point == 1 else None) for point, x in enumerate(sums)
        )
        made = out.unbind(1)
        ones, twos = scratch(0, out, 2, *made[0].shape)
        for first, joined in ((0, torch.add), (1, torch.sub)):
            joined(at_1, at_minus_1, out=ones)
            joined(at_2, at_minus_2, out=twos)
            for n in range(first, len(made), 2):
                torch.add(ones, twos, alpha=2**n, out=made[n])
        made[0].add_(at_0)
        if len(made) == TILE:
            made[-1].add_(at_infinity)


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
