"""The residual encoder of nnU-Net's presets "ResEnc" (Isensee et al. 2024, arXiv 2404.09556).

A stem, then stages of residual blocks: convolution, InstanceNorm and LeakyReLU, twice, the sum before the last of them.
The first block of each stage but the first halves the volume by its first convolution; its shortcut by a pool of 2, and
where channels change by a 1×1×1 convolution without bias after it. Written from these facts, and held to outputs of
dynamic-network-architectures 0.4.4 (OpenMind) and gardening_tools 0.3.5 (FOMO26).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from brainfm.models.encoder import Encoder, stage
from brainfm.models.fast.chain import Chain, Chained


class ResidualEncoder(Encoder):
    """Volumes whose sizes are multiples of 2 for each stage but the first (32 of six) → a map of the last stage.

    Args:
        widths: Channels of the stages.
        depths: Residual blocks of each.
        shortcut_pool: How shortcuts halve the volume. Files fit either strictly: "avg" is of the networks that were
            pretrained, and the same weights with "max" give something else.
        num_classes: Outputs of the classifier `head`; 0 for none.
        in_chans: Input channels.
        global_pool: "avg".
        drop_rate: Dropout on the pooled embedding, in training.
    """

    classifier_name = "head"
    first_conv = "encoder.stem.convs.0.conv"

    def __init__(
        self,
        widths: Sequence[int] = (32, 64, 128, 256, 320, 320),
        depths: Sequence[int] = (1, 3, 4, 6, 6, 6),
        shortcut_pool: Literal["avg", "max"] = "avg",
        *,
        num_classes: int = 0,
        in_chans: int = 1,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_chans, global_pool, drop_rate)
        if shortcut_pool not in ("avg", "max"):
            raise ValueError(f"shortcut_pool is {shortcut_pool!r}, and must be 'avg' or 'max'")
        stem = _named(convs=nn.Sequential(_convolution(in_chans, widths[0], acts=True)))
        stages: list[nn.Module] = []
        before = widths[0]
        for number, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            halving = _Residual(before, width, 2 if number else 1, shortcut_pool)
            rest = (_Residual(width, width, 1, shortcut_pool) for _ in range(depth - 1))
            stages.append(_named(blocks=nn.Sequential(halving, *rest)))
            before = width
        self.encoder = nn.ModuleDict({"stem": stem, "stages": nn.ModuleList(stages)})
        # A strided convolution looks at the first of its two voxels, and the shortcut between both, each of one spread:
        # together a quarter of the way, and by a quarter of a cell more or less as the weights of a block have it.
        self.feature_info = [
            stage(f"encoder.stages.{n}", width, (2**n,) * 3, ((2**n - 1) / 4,) * 3) for n, width in enumerate(widths)
        ]
        self.num_features = widths[-1]
        self.reset_classifier(num_classes)

    def _begin(self, x: Tensor) -> Tensor:
        step = self.feature_info[-1]["reduction"][0]
        if any(size % step for size in x.shape[2:]):
            raise ValueError(
                f"expected volumes whose sizes are multiples of {step}, got {list(x.shape[2:])}: pad them "
                "with 0, or read them in windows, as brainfm.embed does"
            )
        begun: Tensor = self._part("encoder.stem")(x)
        return begun


class _Average(nn.AvgPool3d):
    """In float32 of what is in half of it, which torch (2.13) does not average on a processor."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float() if x.dtype.itemsize < 4 else x).to(x.dtype)


class _Residual(Chained):
    """Two convolutions, beside the shortcut."""

    def __init__(self, before: int, width: int, stride: int, shortcut_pool: str) -> None:
        super().__init__()
        self.conv1 = _convolution(before, width, stride=stride, acts=True)
        self.conv2 = _convolution(width, width)
        pool = _Average if shortcut_pool == "avg" else nn.MaxPool3d
        shortcut: list[nn.Module] = [pool(stride)] if stride > 1 else []
        if before != width:
            shortcut.append(_convolution(before, width, kernel=1, bias=False))
        self.skip = Chain(*shortcut)
        self.nonlin = nn.LeakyReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.through([self.conv1, self.conv2], x, added=self.skip(x), last=self.nonlin)


def _convolution(
    before: int, width: int, *, kernel: int = 3, stride: int = 1, bias: bool = True, acts: bool = False
) -> Chain:
    layers: dict[str, nn.Module] = {
        "conv": nn.Conv3d(before, width, kernel, stride, kernel // 2, bias=bias),
        "norm": nn.InstanceNorm3d(width, affine=True),
    }
    return Chain(OrderedDict(layers | ({"nonlin": nn.LeakyReLU(inplace=True)} if acts else {})))


def _named(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))
