"""3D DenseNets (Huang et al. 2017) as MONAI has them, as SynthBA and y-Aware contrastive learning use them.

The modules have the names of those of MONAI's `DenseNet`, 1.3 to 1.6, so that a state dict of one loads strictly in the
other, and compute the same. MONAI itself is not imported for them: that takes longer than to embed a scan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainfm.models.encoder import Encoder, Halved, stage
from brainfm.models.fast.chain import Chained, is_plain

_BOTTLENECK = 4  # times the growth: channels between a layer's two convolutions


class _DenseLayer(nn.Module):
    """What it is given, and after its channels those that it adds."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        between = _BOTTLENECK * growth
        self.layers = nn.Sequential()
        self.layers.add_module("norm1", nn.BatchNorm3d(inputs))
        self.layers.add_module("relu1", nn.ReLU(inplace=True))
        self.layers.add_module("conv1", nn.Conv3d(inputs, between, 1, bias=False))
        self.layers.add_module("norm2", nn.BatchNorm3d(between))
        self.layers.add_module("relu2", nn.ReLU(inplace=True))
        self.layers.add_module("conv2", nn.Conv3d(between, growth, 3, padding=1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layers(x)], 1)


def _features(inputs: int, stem: int, growth: int, layers: Sequence[int]) -> nn.Sequential:
    """Stem, dense blocks with transitions between them, and the last norm."""
    features = nn.Sequential()
    features.add_module("conv0", nn.Conv3d(inputs, stem, 7, 2, padding=3, bias=False))
    features.add_module("norm0", nn.BatchNorm3d(stem))
    features.add_module("relu0", nn.ReLU(inplace=True))
    features.add_module("pool0", nn.MaxPool3d(3, stride=2, padding=1))
    width = stem
    for number, many in enumerate(layers, start=1):
        block = nn.Sequential()
        for n in range(1, many + 1):
            block.add_module(f"denselayer{n}", _DenseLayer(width, growth))
            width += growth
        features.add_module(f"denseblock{number}", block)
        if number < len(layers):
            transition = nn.Sequential()
            transition.add_module("norm", nn.BatchNorm3d(width))
            transition.add_module("relu", nn.ReLU(inplace=True))
            transition.add_module("conv", nn.Conv3d(width, width // 2, 1, bias=False))
            transition.add_module("pool", Halved())
            features.add_module(f"transition{number}", transition)
            width //= 2
    features.add_module("norm5", nn.BatchNorm3d(width))
    for module in features.modules():
        if isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight)
    return features


class DenseNet(Chained, Encoder):
    """A 3D DenseNet as an encoder: [B, in_chans, D, H, W] → the last map before its ReLU, whose mean is after it.

    Args:
        layers: In each of the dense blocks: (6, 12, 24, 16) is DenseNet-121, (6, 12, 48, 32) DenseNet-201.
        growth: Channels that a layer adds.
        stem: Channels of the first convolution.
        last_norm: Whether a norm, `features.norm5`, comes after the last block. y-Aware's encoder has none, and weights
            that were trained without it mean something else with it.
        num_classes: Outputs of the classifier `class_layers.out`; 0 for none.
        in_chans: Input channels.
        global_pool: "avg", after a ReLU.
        drop_rate: Dropout on the pooled embedding, in training.
    """

    classifier_name = "class_layers.out"
    first_conv = "features.conv0"

    def __init__(
        self,
        layers: Sequence[int] = (6, 12, 24, 16),
        growth: int = 32,
        stem: int = 64,
        last_norm: bool = True,
        *,
        num_classes: int = 0,
        in_chans: int = 1,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_chans, global_pool, drop_rate)
        self.features = _features(in_chans, stem, growth, layers)
        self.class_layers = nn.Module()
        if not last_norm:
            self.features.norm5 = nn.Identity()
        # The stem's kernels are odd and centred; a transition pools two cells, and its first looks between them.
        stages, width, step, offset = [stage("features.relu0", stem, (2, 2, 2))], stem, 4, 0.0
        for number, count in enumerate(layers, start=1):
            width += count * growth
            stages.append(stage(f"features.denseblock{number}", width, (step,) * 3, (offset,) * 3))
            if number < len(layers):
                width, step, offset = width // 2, step * 2, offset + step / 2
        self.feature_info, self.num_features = stages, width
        self.reset_classifier(num_classes)

    def _stage(self, number: int, x: Any, needed: bool) -> Tensor:  # noqa: ARG002 - the contract's
        part: Any = self.features
        if number == 0:
            return self._run(lambda x: self.through([part.conv0, part.norm0, part.relu0], x), x)
        before: Any = getattr(part, f"transition{number - 1}") if number > 1 else part.pool0
        block: Any = getattr(part, f"denseblock{number}")
        return self._run(lambda x: self._block(block, self.through([before], x)), x)

    def _block(self, block: Any, x: Tensor) -> Tensor:
        """A dense block. Together, its layers add to one map what otherwise each joins anew."""
        if not self.together or not is_plain(x):
            return block(x)  # type: ignore[no-any-return]
        width, layers = x.shape[1], [layer.layers for layer in block.children()]
        growth = layers[0].conv2.out_channels
        joined = x.new_empty(len(x), *x.shape[2:], width + growth * len(layers)).permute(0, 4, 1, 2, 3)
        joined[:, :width] = x
        for layer in layers:
            joined[:, width : width + growth] = self.through([layer], joined[:, :width])
            width += growth
        return joined

    def _finish(self, x: Tensor) -> Tensor:
        norm: Any = self.features.norm5
        return norm(x)  # type: ignore[no-any-return]

    def pool(self, features: Tensor) -> Tensor:
        return F.relu(features).mean(dim=(2, 3, 4))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:  # noqa: ARG002 - a block is a group
        last = len(self.feature_info) - 1
        ends = {number: f"transition{number - 1}" if number > 1 else "pool0" for number in range(1, last + 1)}
        blocks = [(rf"^features\.(denseblock{number}|{end})\.", (number,)) for number, end in ends.items()]
        return {"stem": r"^features\.(conv0|norm0)\.", "blocks": [*blocks, (r"^features\.norm5\.", (last,))]}
