"""The 3D U-Net of Çiçek et al. 2016 in the form of wolny/pytorch-3dunet (MIT), whose features BrainFM reads.

Levels of two convolutions, GroupNorm before and LeakyReLU after each; a max-pool before each level but the first; on
the way back the map is enlarged by nearest neighbour, and joined to that of its level. Written from github
jhuldr/BrainFM (Apache-2.0), whose state dict loads strictly.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from brainfm.models.encoder import Encoder, stage
from brainfm.models.fast.chain import Chain, JoiningChain

_Maps = tuple[Tensor, ...]  # the latest, and those that wait for the way back, the shallowest first


class UNet(Encoder):
    """Volumes of 2 voxels or more for each level but the first (32 of six) → a map of every voxel.

    The embedding is an average over all voxels; one over the brain, or what is not background, is a readout ("brain").

    Args:
        width: Channels of the first level, and of the map; each further level has twice those before it.
        levels: Of the way down; one less lead back.
        groups: Of the norms; a layer whose channels they do not divide has one.
        unit_length: Whether the channels of each voxel of the map have the length 1.
        num_classes: Outputs of the classifier `head`; 0 for none.
        in_chans: Input channels.
        global_pool: "avg".
        drop_rate: Dropout on the pooled embedding, in training.
    """

    classifier_name = "head"
    first_conv = "encoders.0.basic_module.SingleConv1.conv"

    def __init__(
        self,
        width: int = 64,
        levels: int = 6,
        groups: int = 8,
        unit_length: bool = True,
        *,
        num_classes: int = 0,
        in_chans: int = 1,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_chans, global_pool, drop_rate)
        if levels < 1:
            raise ValueError(f"levels is {levels}, and must be 1 or more")
        self.unit_length = unit_length
        widths = [width * 2**level for level in range(levels)]
        self.encoders, self.decoders = nn.ModuleList(), nn.ModuleList()
        for level, (before, after) in enumerate(zip([in_chans, *widths], widths, strict=False)):
            pool = [("pooling", nn.MaxPool3d(2))] if level else []
            convolutions = _two_convolutions(before, max(before, after // 2), after, groups)
            self.encoders.append(nn.Sequential(OrderedDict([*pool, ("basic_module", convolutions)])))
        for level in range(levels - 2, -1, -1):
            convolutions = _two_convolutions(widths[level] + widths[level + 1], widths[level], widths[level], groups)
            self.decoders.append(JoiningChain(OrderedDict(basic_module=convolutions)))
        way = [("encoders", n, n) for n in range(levels)]
        way += [("decoders", n, levels - 2 - n) for n in range(levels - 1)]
        self.feature_info = [
            stage(f"{kind}.{n}", widths[level], (2**level,) * 3, ((2**level - 1) / 2,) * 3) for kind, n, level in way
        ]
        self.num_features = width
        self.reset_classifier(num_classes)

    def filter_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The first norm is of the input's channels, and adapted with the first convolution."""
        first = self.first_conv.replace("conv", "groupnorm")
        norm = {key: value for key in (f"{first}.weight", f"{first}.bias") if (value := state.get(key)) is not None}
        repeated = {
            key: value.repeat(-(-self.in_chans // len(value)))[: self.in_chans]
            for key, value in norm.items()
            if value.ndim == 1 and len(value)
        }
        return super().filter_state_dict(state) | repeated

    def _begin(self, x: Tensor) -> _Maps:
        least = 2 ** (len(self.encoders) - 1)
        if min(x.shape[2:]) < least:
            raise ValueError(f"expected volumes of {least} voxels or more along each axis, got {list(x.shape[2:])}")
        return (x,)

    def _stage(self, number: int, x: _Maps, needed: bool) -> _Maps:  # noqa: ARG002 - every map is made anyway
        latest, *waiting = x
        if number < len(self.encoders):
            deeper = self._run(self.encoders[number], latest)
            return (deeper, *waiting, latest) if number else (deeper,)
        decoder, (*waiting, beside) = self.decoders[number - len(self.encoders)], waiting
        latest = self._run(partial(decoder, beside=beside), latest)
        if self.unit_length and number == len(self.feature_info) - 1:
            latest = F.normalize(latest, dim=1)
        return (latest, *waiting)

    def _adapted(self, number: int, x: _Maps) -> _Maps:
        return (super()._adapted(number, x[0]), *x[1:])

    def _finish(self, x: _Maps) -> Tensor:
        return x[0]

    def _as_map(self, x: Any, shape: Sequence[int]) -> Tensor:  # noqa: ARG002 - a map says its own
        latest: Tensor = x[0] if isinstance(x, tuple) else x
        return latest


def _two_convolutions(before: int, between: int, after: int, groups: int) -> Chain:
    return Chain(
        OrderedDict(SingleConv1=_convolution(before, between, groups), SingleConv2=_convolution(between, after, groups))
    )


def _convolution(before: int, after: int, groups: int) -> Chain:
    return Chain(
        OrderedDict(
            groupnorm=nn.GroupNorm(1 if before % groups else groups, before),
            conv=nn.Conv3d(before, after, 3, padding=1, bias=False),
            LeakyReLU=nn.LeakyReLU(inplace=True),
        )
    )
