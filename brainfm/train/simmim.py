"""SimMIM, masked image modelling without a decoder, on 3D patches: Xie et al. 2022 (arXiv 2111.09886)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from brainfm.contract import InputSpec, Triple
from brainfm.errors import RecipeError
from brainfm.manifest import ScanRecord
from brainfm.models.encoder import Encoder
from brainfm.train.data import Batch
from brainfm.train.losses import masked_l1_loss
from brainfm.train.mae import unpatchify
from brainfm.train.recipe import Recipe
from brainfm.train.step import PretrainingMethod, WithEncoder


class SimMIM(WithEncoder):
    """An encoder that gets a learned token in place of the patches that are hidden, and one linear head to voxels.

    The encoder sees all its tokens, so that windows and merges stay what they are: any with a `patch_embed` will do.
    Each cell of its last map predicts the voxels that it stands for.

    Args:
        encoder: An encoder without a classifier whose `patch_embed` has a convolution `proj`.
        unit: Voxels that are hidden together, a multiple of the patch; None is a cell of the last map.

    Example:
        >>> import brainfm
        >>> from brainfm.train import SimMIM
        >>> SimMIM(brainfm.create_model("test_vit_3d")).unit
        (8, 8, 8)
    """

    def __init__(self, encoder: Encoder, unit: Triple | None = None) -> None:
        super().__init__(encoder)
        last, embed = encoder.feature_info[-1], patch_embedding(encoder)
        if embed is None:
            raise ValueError(f"SimMIM takes an encoder with a patch embedding, and {type(encoder).__name__} has none")
        self.cell: Triple = last["reduction"]
        self.patch: Triple = embed.proj.kernel_size
        self.unit: Triple = unit or self.cell
        if any(size % patch for size, patch in zip(self.unit, self.patch, strict=True)):
            raise ValueError(f"mask_unit is {self.unit}, and must be a multiple of the network's patch, {self.patch}")
        self.mask_token = nn.Parameter(torch.zeros(embed.proj.out_channels))
        self.head = nn.Linear(last["num_chs"], encoder.in_chans * math.prod(self.cell))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self._mask: Tensor | None = None

    def draw_mask(self, noise: Tensor, mask_ratio: float, shape: Sequence[int]) -> Tensor:
        """Which voxels are hidden: units of most noise.

        Args:
            noise: [B, units], z slowest.
            mask_ratio: The fraction of the units to hide.
            shape: [z, y, x] of the volumes; units that go beyond them are cut.

        Returns:
            [B, 1, z, y, x] bool.
        """
        kept = int(noise.shape[1] * (1 - mask_ratio))
        hidden = noise.argsort(dim=1).argsort(dim=1) >= kept
        mask = hidden.view(-1, 1, *counts(shape, self.unit))
        for axis, size in enumerate(self.unit, start=2):
            mask = mask.repeat_interleave(size, dim=axis)
        z, y, x = shape
        return mask[:, :, :z, :y, :x]

    @contextmanager
    def hiding(self, mask: Tensor) -> Iterator[None]:
        """Hide voxels [B, 1, z, y, x] as long as the block lasts.

        It must last through the backward pass, in which gradient checkpointing computes again.
        """
        embed: Any = patch_embedding(self.encoder)
        # A ViT may call the convolution alone, which is all that its embedding is; a Swin's has a norm after it.
        part = embed if hasattr(embed, "norm") else embed.proj
        self._mask, handle = mask, part.register_forward_hook(self._put_tokens)
        try:
            yield
        finally:
            self._mask = None
            handle.remove()

    def _put_tokens(self, _: nn.Module, __: Any, cells: Tensor) -> Tensor:
        """The mask token in place of hidden cells of patches [B, dim, d, h, w], or of blocks of them [B·blocks, …]."""
        assert self._mask is not None
        hidden = self._mask[:, :, :: self.patch[0], :: self.patch[1], :: self.patch[2]]
        a, b, c = counts(hidden.shape[2:], cells.shape[2:])
        blocks = hidden.reshape(-1, 1, a, cells.shape[2], b, cells.shape[3], c, cells.shape[4])
        hidden = blocks.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(-1, 1, *cells.shape[2:])
        return torch.where(hidden, self.mask_token.to(cells.dtype).view(1, -1, 1, 1, 1), cells)

    def forward(self, volumes: Tensor) -> tuple[Tensor, Tensor]:
        """Volumes [B, C, z, y, x] → the loss of what is hidden (outside `hiding`, of all), and the prediction."""
        cells = self.encoder.dense(volumes)
        grid: Triple = tuple(cells.shape[2:])  # type: ignore[assignment]
        voxels = self.head(cells.flatten(2).transpose(1, 2))
        z, y, x = volumes.shape[2:]
        prediction = unpatchify(voxels, self.cell, grid)[:, :, :z, :y, :x]
        hidden = self._mask if self._mask is not None else torch.ones_like(volumes[:, :1], dtype=torch.bool)
        return masked_l1_loss(prediction, volumes, hidden), prediction


class SimMIMMethod(PretrainingMethod):
    """One view a scan, units of it hidden and their voxels predicted."""

    name, views, aside = "SimMIM", 1, ("head", ("head.", "mask_token"))

    def __init__(self, recipe: Recipe, encoder: Encoder, records: Sequence[ScanRecord] = ()) -> None:
        super().__init__(recipe, encoder, records)
        self.network: SimMIM = SimMIM(encoder, recipe.mask_unit)

    @classmethod
    def check(cls, recipe: Recipe, encoder: Encoder, spec: InputSpec) -> None:
        """As `PretrainingMethod.check`: the network must have a patch embedding, and units be some patches of it."""
        if patch_embedding(encoder) is None:
            raise RecipeError(
                f"simmim needs a patch embedding, as ViTs and Swin transformers have, and {recipe.model} has none; "
                "give another method"
            )
        assert spec.output_shape is not None
        try:
            network = SimMIM(encoder, recipe.mask_unit)
        except ValueError as error:
            raise RecipeError(f"{recipe.model}: {error}") from error
        units = math.prod(counts(spec.output_shape[1:], network.unit))
        if not 0 < int(units * (1 - recipe.mask_ratio)) < units:
            raise RecipeError(
                f"a volume of {spec.output_shape[1:]} voxels has {units} units of mask_unit {network.unit}, of which "
                f"mask_ratio {recipe.mask_ratio:g} leaves none to see; give a smaller mask_unit"
            )

    def backward(self, network: nn.Module, batch: Batch, generator: torch.Generator, rows: slice) -> dict[str, float]:
        """As `Method.backward`; logs the loss."""
        views, ours = batch.views[0], self.network
        units = math.prod(counts(views.shape[2:], ours.unit))
        # Drawn for the joined batch, so that the number of processes changes nothing.
        noise = torch.rand(rows.stop, units, generator=generator)[rows].to(views.device)
        with ours.hiding(ours.draw_mask(noise, self.recipe.mask_ratio, views.shape[2:])):
            with self._autocast(views):
                loss = network(views)[0]
            loss.backward()
        return {"loss": float(loss.detach())}


def patch_embedding(encoder: Encoder) -> Any:
    """The module that makes an encoder's tokens of patches, with a convolution `proj`; None where it has none."""
    embed = getattr(encoder, "patch_embed", None)
    return embed if isinstance(getattr(embed, "proj", None), nn.Conv3d) else None


def counts(shape: Sequence[int], unit: Sequence[int]) -> Triple:
    """How many units it takes to cover a volume, by axis."""
    z, y, x = (-(-size // part) for size, part in zip(shape, unit, strict=True))
    return z, y, x
