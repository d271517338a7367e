"""Convolutions of a few planes of a map at a time, and how many outputs they have.

Planes lie along z, channels last: [B, rows, columns, C]. The kernels are cubes.

Where a kernel has 3 planes, Winograd's F(4, 3) along z alone (Lavin and Gray 2015, arXiv 1509.09308) takes half of the
multiplications, and its transforms are sums of planes. In float32 it is off by 1e-6. In bfloat16 it is off by 1e-2 and
a direct convolution by 2e-3, of which an embedding, which has other roundings too, shows nothing: a ResNet-18's of
noise in a ball, with random weights of four seeds, is off by 2.1e-3 to 2.4e-3 either way.
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


def fastest(conv: nn.Conv3d) -> Direct | Winograd:
    """The fastest way to compute a convolution a few planes at a time. Winograd's gives at most `TILE` outputs."""
    weight = conv.weight
    has_type = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
    has_shape = conv.kernel_size[0] == 3 and conv.stride[0] == 1
    return Winograd(conv) if has_type and has_shape else Direct(conv)


class Direct:
    """A convolution by torch's own."""

    def __init__(self, conv: nn.Conv3d) -> None:
        self._conv = conv

    def __call__(self, planes: Sequence[Tensor], out: Tensor) -> None:
        """Write to `out` [B, n, rows, columns, C] the n outputs of (n - 1) · stride + kernel planes, padded already."""
        conv = self._conv
        x = torch.stack(list(planes), dim=1).permute(0, 4, 1, 2, 3)  # torch's channels-last
        out.copy_(F.conv3d(x, conv.weight, conv.bias, conv.stride).permute(0, 2, 3, 4, 1))


class Winograd:
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
        self._bias = conv.bias
        kernels = conv.weight.float().permute(2, 0, 3, 4, 1)
        at_points = torch.mm(kernels.new_tensor(self._POINTS), kernels.flatten(1)).view(-1, *kernels.shape[1:])
        self._weights = at_points.to(conv.weight.dtype).permute(0, 1, 4, 2, 3).unbind()  # channels-last
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

    def _convolved(self, point: int, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x.permute(0, 3, 1, 2), self._weights[point], bias).permute(0, 2, 3, 1)
