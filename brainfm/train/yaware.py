"""y-Aware contrastive learning: SimCLR whose positives are all scans of people of about the same age.

Dufumier et al. 2021 (arXiv 2106.08808); any number of the manifest takes the place of age.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from brainfm.manifest import ScanRecord
from brainfm.models.encoder import Encoder
from brainfm.train.labels import read_numbers
from brainfm.train.losses import yaware_loss
from brainfm.train.recipe import Recipe
from brainfm.train.simclr import SimCLRMethod


class YAwareMethod(SimCLRMethod):
    """As `SimCLRMethod`, by `yaware_loss`; a scan without the label has its own other view alone as its positive."""

    name = "y-Aware"

    def __init__(self, recipe: Recipe, encoder: Encoder, records: Sequence[ScanRecord] = ()) -> None:
        super().__init__(recipe, encoder, records)
        self._labels = torch.from_numpy(read_numbers(records, recipe.targets[0])) if records else torch.empty(0)

    def _loss(self, z_i: Tensor, z_j: Tensor, scans: Sequence[int]) -> Tensor:
        recipe = self.recipe
        labels = self._labels[list(scans)].to(z_i.device)
        return yaware_loss(z_i, z_j, labels, recipe.kernel_sigma, recipe.temperature, recipe.gradient)
