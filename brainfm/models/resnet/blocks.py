"""Residual blocks of He et al. 2016 in 3D, as MONAI has them: the same names and numbers, drawn in the same order.

MONAI itself is not imported for them: that imports all of it, with pandas, scikit-learn, matplotlib and tensorboard
where they are installed, which takes longer than to embed a scan.
"""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

Shortcut = Literal["A", "B"]


class PaddedShortcut(nn.Module):
    """Shortcut A of He et al. 2016: every `stride`-th voxel, and channels of zeros after those that are there.

    It has no parameters. A gradient passes through it, as it does not in MedicalNet's code, which detaches it.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, 0, 0, self.channels - x.shape[1]))


class Basic(nn.Module):
    """Two 3×3×3 convolutions."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, dilation: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, width, stride, dilation)
        self.bn1 = nn.BatchNorm3d(width)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = _conv(width, width, 1, dilation)
        self.bn2 = nn.BatchNorm3d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.act(out)  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """A 3×3×3 convolution between two of 1×1×1, of which the second has four times its channels."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, dilation: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = _conv(width, width, stride, dilation)
        self.bn2 = nn.BatchNorm3d(width)
        self.conv3 = nn.Conv3d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm3d(width * self.expansion)
        self.act = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(self.conv1(x)))
        out = self.act(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.act(out)  # type: ignore[no-any-return]


def residual_stage(
    block: type[Basic | Bottleneck],
    inputs: int,
    width: int,
    many: int,
    stride: int,
    dilation: int = 1,
    shortcut: Shortcut = "B",
    bias: bool = True,
) -> nn.Sequential:
    """The blocks of a stage.

    Args:
        block: Their kind.
        inputs: Channels before the stage.
        width: Channels in it, before the block's expansion.
        many: How many.
        stride: Of the first; 1 where the stage is dilated, which keeps the size of its map.
        dilation: Of the 3×3×3 kernels.
        shortcut: Where the map's size or width changes: "B", a 1×1×1 convolution and a norm, or "A", `PaddedShortcut`.
        bias: Whether that convolution has one.
    """
    outputs = width * block.expansion
    changes = stride != 1 or inputs != outputs
    stride = stride if dilation == 1 else 1
    downsample: nn.Module | None = None
    if changes and shortcut == "A":
        downsample = PaddedShortcut(outputs, stride)
    elif changes:
        downsample = nn.Sequential(nn.Conv3d(inputs, outputs, 1, stride, bias=bias), nn.BatchNorm3d(outputs))
    first = block(inputs, width, stride, dilation, downsample)
    return nn.Sequential(first, *(block(outputs, width, 1, dilation, None) for _ in range(many - 1)))


def draw(network: nn.Module) -> None:
    """Draw the weights of convolutions as He et al. 2015 do, by what goes out; a norm changes nothing at first."""
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm3d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def _conv(inputs: int, outputs: int, stride: int, dilation: int) -> Any:
    return nn.Conv3d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)
