"""A masked autoencoder on 3D patches: He et al. 2022 (arXiv 2111.06377) as Kaczmarek et al. 2025 use it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainfm.contract import InputSpec, Triple
from brainfm.errors import RecipeError
from brainfm.manifest import ScanRecord
from brainfm.models.encoder import Encoder
from brainfm.models.vit import Block, VisionTransformer, sincos_positions
from brainfm.train.data import Batch
from brainfm.train.recipe import Recipe
from brainfm.train.step import PretrainingMethod


class MaskedAutoencoder(nn.Module):
    """A ViT that sees a quarter of the patches, and a decoder that fills in the rest.

    The encoder's modules are taken over under their own names, and the decoder's have those of `facebookresearch/mae`,
    so that checkpoints of that family load strictly. The encoder given stays what `create_model` made, and learns.

    Args:
        encoder: A ViT without a classifier; its `img_size` is that of the volumes.
        decoder_dim: Width of the decoder; 512, as its depth and heads, in the authors' code for photographs.
        decoder_depth: Its blocks.
        decoder_heads: Its attention heads.
        norm_pix_loss: Compare with patches that are each normalised (unbiased variance, 1e-6), instead of as they are.

    Example:
        >>> import brainfm, torch
        >>> from brainfm.train import MaskedAutoencoder
        >>> network = MaskedAutoencoder(brainfm.create_model("test_vit_3d"), decoder_dim=32, decoder_depth=1)
        >>> loss, prediction, mask = network(torch.randn(2, 1, 40, 48, 48))  # [B, in_chans, z, y, x]
        >>> prediction.shape, mask.shape  # a patch a row, of 8×8×8 voxels each
        (torch.Size([2, 180, 512]), torch.Size([2, 180]))
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        norm_pix_loss: bool = False,
    ) -> None:
        super().__init__()
        if encoder.num_classes:
            raise ValueError("MaskedAutoencoder takes an encoder without a classifier: reset_classifier(0)")
        if encoder.adapters:
            raise ValueError("MaskedAutoencoder takes an encoder without adapters: they would be left out")
        self.norm_pix_loss = norm_pix_loss
        self.grid = encoder.grid
        self.patch_embed = encoder.patch_embed
        self.cls_token = encoder.cls_token
        self.pos_embed = encoder.pos_embed
        self.blocks = encoder.blocks
        self.norm = encoder.norm

        dim, voxels = encoder.num_features, encoder.in_chans * _product(encoder.patch_embed.patch_size)
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(decoder_dim, self.grid), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(decoder_dim, decoder_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, voxels)
        for module in (self.decoder_embed, *self.decoder_blocks.modules(), self.decoder_pred):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self, volumes: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None, predict_all: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hide patches, and predict their voxels.

        Args:
            volumes: [B, C, D, H, W] of the encoder's `img_size`.
            mask_ratio: Fraction of patches to hide.
            noise: [B, patches]; the patches of lowest noise are kept. None draws it from torch's generator.
            predict_all: Predict the voxels of visible patches too, which the loss does not need.

        Returns:
            The mean squared error of the hidden patches' voxels; the prediction [B, patches, voxels a patch], or
            without `predict_all` that of the hidden patches alone, in the order of their noise; the mask [B, patches],
            1 where a patch was hidden.
        """
        if self.patch_embed.grid(volumes.shape[2:]) != self.grid:
            raise ValueError(f"expected volumes of {self.grid} patches, got {list(volumes.shape)}")
        count = _product(self.grid)
        if noise is None:
            noise = torch.rand(len(volumes), count, device=volumes.device)
        shuffle = noise.argsort(dim=1)
        kept = int(count * (1 - mask_ratio))
        visible, hidden = shuffle[:, :kept], shuffle[:, kept:]
        patches = patchify(volumes, self.patch_embed.patch_size)
        tokens = self.decode(self.encode(_take(patches, visible), visible), shuffle)
        prediction = self.predict(tokens if predict_all else _take(tokens, hidden))
        loss = self.loss(_take(prediction, hidden) if predict_all else prediction, _take(patches, hidden))
        return loss, prediction, torch.ones_like(noise, dtype=volumes.dtype).scatter(1, visible, 0)

    def encode(self, patches: Tensor, places: Tensor) -> Tensor:
        """The visible patches [B, kept, voxels a patch], and which they are → tokens [B, 1 + kept, dim], CLS first."""
        embed = self.patch_embed.proj  # a convolution whose stride is its kernel: a matrix product, of these alone
        tokens = F.linear(patches, embed.weight.permute(0, 2, 3, 4, 1).flatten(1), embed.bias)
        tokens = tokens + _take(self.pos_embed[:, 1:].expand(len(places), -1, -1), places)
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        tokens = torch.cat([cls_token.to(tokens.dtype), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)  # type: ignore[no-any-return]

    def decode(self, latent: Tensor, shuffle: Tensor) -> Tensor:
        """Tokens of the visible patches, which come first in `shuffle` → those of all, in place [B, patches, dim]."""
        tokens = self.decoder_embed(latent)
        hidden = self.mask_token.to(tokens.dtype).expand(len(tokens), shuffle.shape[1] + 1 - tokens.shape[1], -1)
        patches = _take(torch.cat([tokens[:, 1:], hidden], dim=1), shuffle.argsort(dim=1))
        tokens = torch.cat([tokens[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            tokens = block(tokens)
        return tokens[:, 1:]  # type: ignore[no-any-return]

    def predict(self, tokens: Tensor) -> Tensor:
        """The decoder's tokens of some patches → their voxels [B, patches, voxels a patch]."""
        return self.decoder_pred(self.decoder_norm(tokens))  # type: ignore[no-any-return]

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean squared error, a scalar, of the voxels predicted of patches, [patches, voxels], and those there."""
        if self.norm_pix_loss:
            target = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        return F.mse_loss(prediction.to(target.dtype), target)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay leaves alone, beside biases and norms: none that learns.

        As in the authors' code, by timm's rule, `cls_token` and `mask_token` are decayed; fine-tuning spares the one.
        """
        return {"pos_embed", "decoder_pos_embed"}


class MAEMethod(PretrainingMethod):
    """One view a scan, most of its patches hidden and filled in."""

    name, views, aside = "MAE", 1, ("decoder", ("decoder_", "mask_token"))

    def __init__(self, recipe: Recipe, encoder: Encoder, records: Sequence[ScanRecord] = ()) -> None:
        super().__init__(recipe, encoder, records)
        assert isinstance(encoder, VisionTransformer)
        self.network = MaskedAutoencoder(
            encoder, recipe.decoder_dim, recipe.decoder_depth, recipe.decoder_heads, recipe.norm_pix_loss
        )
        self._patches = encoder.pos_embed.shape[1] - 1

    @classmethod
    def check(cls, recipe: Recipe, encoder: Encoder, spec: InputSpec) -> None:  # noqa: ARG003 - the method's
        """As `PretrainingMethod.check`: the network must be a ViT with a CLS token and no rotary positions."""
        if not isinstance(encoder, VisionTransformer):
            raise RecipeError(
                f"an MAE needs a ViT, and {recipe.model} is a {type(encoder).__name__}; give another method"
            )
        if not encoder.prefix or encoder.rotation is not None:
            lacks = "has no CLS token" if not encoder.prefix else "has rotary positions"
            raise RecipeError(f"an MAE needs a plain ViT, and {recipe.model} {lacks}; give method=simmim")

    def backward(self, network: nn.Module, batch: Batch, generator: torch.Generator, rows: slice) -> dict[str, float]:
        """As `Method.backward`; logs the loss."""
        # Drawn for the joined batch, so that the number of processes changes nothing.
        views = batch.views[0]
        noise = torch.rand(rows.stop, self._patches, generator=generator)[rows].to(views.device)
        with self._autocast(views):
            loss = network(views, self.recipe.mask_ratio, noise, predict_all=False)[0]
        loss.backward()
        return {"loss": float(loss.detach())}


def patchify(volumes: Tensor, patch_size: Triple) -> Tensor:
    """[B, C, D, H, W] → [B, patches, voxels a patch]: patches z slowest, in each z, y, x, then channels."""
    batch, channels = volumes.shape[:2]
    z, y, x = (size // patch for size, patch in zip(volumes.shape[2:], patch_size, strict=True))
    split = volumes.reshape(batch, channels, z, patch_size[0], y, patch_size[1], x, patch_size[2])
    return split.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(batch, z * y * x, -1)


def unpatchify(patches: Tensor, patch_size: Triple, grid: Triple) -> Tensor:
    """The volumes [B, C, D, H, W] that `patchify` cut up."""
    batch, channels = len(patches), patches.shape[2] // _product(patch_size)
    split = patches.reshape(batch, *grid, *patch_size, channels)
    shape = [patch * count for patch, count in zip(patch_size, grid, strict=True)]
    return split.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(batch, channels, *shape)


def _take(tokens: Tensor, places: Tensor) -> Tensor:
    """Rows [B, taken, dim] of [B, N, dim], by their numbers [B, taken]."""
    return tokens.gather(1, places[:, :, None].expand(-1, -1, tokens.shape[2]))


def _product(triple: Triple) -> int:
    return triple[0] * triple[1] * triple[2]
