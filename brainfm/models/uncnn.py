"""Two CNNs that nobody trained, of epics-lab/untrained-cnn (MIT): controls, whose weights are the initial ones.

Four levels of convolution, GroupNorm and ReLU, each halved by an average; the embedding is each level's map averaged to
2×2×2 cells, all in a row.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainfm.models.encoder import Encoder, Halved, stage
from brainfm.models.fast.chain import Chained

GROUPS, CELLS = 8, 2


class SeparableConv(nn.Sequential):
    """A 3×3×3 convolution of each channel alone, then one of 1×1×1 over the channels."""

    def __init__(self, before: int, width: int) -> None:
        depthwise = nn.Conv3d(before, before, 3, padding=1, groups=before)
        super().__init__(OrderedDict(depthwise=depthwise, pointwise=nn.Conv3d(before, width, 1)))


class UntrainedCNN(Chained, Encoder):
    """[B, in_chans, D, H, W] → 8 values of each channel of each of four levels, 7680 in all.

    Args:
        widths: Channels of the levels. The first has whole convolutions, the others separable ones.
        convolutions: In each level: 1 (`uncnn_dwsep`) or 2 (`uncnn_doubleconv`).
        num_classes: Outputs of the classifier `fc`; 0 for none.
        in_chans: Input channels.
        global_pool: "cells": 2×2×2 of each level.
        drop_rate: Dropout on the embedding, in training.
    """

    pools = ("cells",)
    classifier_name = "fc"

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 256, 512),
        convolutions: int = 2,
        *,
        num_classes: int = 0,
        in_chans: int = 3,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_chans, global_pool, drop_rate)
        self.letters = ("",) if convolutions == 1 else tuple("abcdefgh"[:convolutions])
        self.first_conv = f"conv1{self.letters[0]}"  # type: ignore[misc]
        for level, (before, width) in enumerate(pairwise((in_chans, *widths)), start=1):
            for letter in self.letters:
                conv = nn.Conv3d(before, width, 3, padding=1) if level == 1 else SeparableConv(before, width)
                self.add_module(f"conv{level}{letter}", conv)
                self.add_module(f"norm{level}{letter}", nn.GroupNorm(GROUPS, width))
                before = width
            self.add_module(f"down{level}", Halved())
        self.num_features = sum(widths) * CELLS**3
        # An average of two looks between its voxels.
        self.feature_info = [
            stage(f"down{level}", width, (2**level,) * 3, ((2**level - 1) / 2,) * 3)
            for level, width in enumerate(widths, start=1)
        ]
        self.reset_classifier(num_classes)

    def _level(self, number: int, x: Tensor) -> Tensor:
        layers: list[nn.Module] = []
        for letter in self.letters:
            layers += self._part(f"conv{number}{letter}"), self._part(f"norm{number}{letter}"), nn.ReLU()
        return self.through([*layers, self._part(f"down{number}")], x)

    # From level to level goes a map, with the cells of all levels so far.

    def _begin(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x,)

    def _stage(self, number: int, x: Any, needed: bool) -> tuple[Tensor, ...]:  # noqa: ARG002 - the contract's
        last, *cells = x
        return self._run(lambda x: self._level(number + 1, x), last), *cells

    def _adapted(self, number: int, x: Any) -> tuple[Tensor, ...]:
        last, *cells = x
        last = super()._adapted(number, last)
        wide = last.to(torch.promote_types(last.dtype, torch.float32))  # as in `Halved`
        return last, *cells, F.adaptive_avg_pool3d(wide, CELLS).to(last.dtype)

    def _as_map(self, x: Any, shape: Sequence[int]) -> Tensor:  # noqa: ARG002 - the contract's
        last: Tensor = x[0] if isinstance(x, tuple) else x
        return last

    def _finish(self, x: Any) -> Tensor:
        """[B, channels of all levels, 2, 2, 2]."""
        return torch.cat(x[1:], dim=1)

    def features_and_map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features, maps = self.forward_intermediates(x, [-1])
        return features, maps[0]

    def pool(self, features: Tensor) -> Tensor:
        return features.flatten(1)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:  # noqa: ARG002 - a level is a group
        return {"stem": r"^(conv|norm)1", "blocks": r"^(?:conv|norm)([2-9])"}
