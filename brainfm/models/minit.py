"""MiNiT: one small vision transformer for every block of a volume (github singlaayush/MINIT).

Written from facts of its outputs and its tensors' names. Blocks of 16³ voxels are patched, each has an embedding of its
own that all its tokens get, and none sees another before the classifier, which weighs the blocks' logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from brainfm.contract import Triple
from brainfm.models.encoder import stage
from brainfm.models.fast.first import FirstTokenReader
from brainfm.models.nit import NormedHead, as_kernel
from brainfm.models.vit import Block, PatchEmbed, init_linear, interpolate_positions


class BlockHead(nn.Linear):
    """The authors' classifier: logits of each block, all of which are weighed: [B, blocks, C] → [B, outputs]."""

    def __init__(self, in_features: int, blocks: int, out_features: int) -> None:
        super().__init__(blocks * out_features, out_features)
        self.of_block = NormedHead(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.of_block(x).flatten(1))


class MiNiT(FirstTokenReader):
    """Volumes → CLS tokens of their blocks, whose mean is the embedding.

    `forward_features` gives all tokens after the last layer, [B, blocks, 1 + patches of a block, C]; a map has a cell a
    block: its CLS token, since no gradient ever came to the last layer's other tokens.

    Args:
        dim: Width of the tokens, and of the embedding.
        depth: Layers.
        num_heads: Attention heads.
        mlp_dim: Width of the layers' MLPs.
        skipped: Layers that have weights but are not run. Upstream's evaluation leaves out the second of every four
            (its `drophead` of 0.25); () runs them all, which is another embedding.
        classes: Outputs of the authors' classifier: with so many, the head is theirs; with another number it is linear.
        img_size: Voxels of the volumes.
        block_size: Voxels of a block.
        patch_size: Voxels of a patch.
        num_classes: Outputs of the classifier `head`; 0 for none.
        in_chans: Input channels.
        global_pool: "avg", the mean of the blocks' CLS tokens.
        drop_rate: Dropout on the embedding, in training.
    """

    classifier_name = "head"
    first_conv = "patch_embed.proj"
    dynamic_img_size = False

    def __init__(
        self,
        dim: int = 256,
        depth: int = 6,
        num_heads: int = 8,
        mlp_dim: int = 309,
        skipped: Sequence[int] = (1, 5),
        classes: int = 2,
        *,
        img_size: Triple = (64, 64, 64),
        block_size: Triple = (16, 16, 16),
        patch_size: Triple = (4, 4, 4),
        num_classes: int = 0,
        in_chans: int = 1,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_chans, global_pool, drop_rate)
        if any(size % n for size, n in zip(img_size, block_size, strict=True)):
            raise ValueError(f"blocks of {tuple(block_size)} voxels do not divide a volume of {tuple(img_size)}")
        if not set(skipped) < set(range(depth)):
            raise ValueError(f"skipped layers are some of 0 to {depth - 1}, not {tuple(skipped)}")
        self.num_features, self.classes = dim, classes
        self.img_size, self.block_size = tuple(img_size), tuple(block_size)
        self.grid = tuple(size // n for size, n in zip(img_size, block_size, strict=True))  # of blocks
        self.patch_embed = PatchEmbed(patch_size, in_chans, dim)
        tokens = 1 + math.prod(self.patch_embed.grid(block_size))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dim))
        self.block_embeddings = nn.Parameter(torch.zeros(math.prod(self.grid), tokens, dim))
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, mlp_dim / dim, qkv_bias=False, norm_eps=1e-5) for _ in range(depth)
        )
        for n in skipped:  # no gradient comes to them, which processes that train together would wait for
            self.blocks[n].requires_grad_(False)
        z, y, x = ((size - 1) / 2 for size in block_size)
        self.feature_info = [
            stage(f"blocks.{n}", dim, block_size, (z, y, x)) for n in range(depth) if n not in set(skipped)
        ]
        self.apply(init_linear)
        for parameter in (self.cls_token, self.pos_embed, self.block_embeddings):
            nn.init.normal_(parameter, std=0.02)
        self.reset_classifier(num_classes)

    def _new_head(self, num_classes: int) -> nn.Module:
        if num_classes == self.classes:
            return BlockHead(self.num_features, len(self.block_embeddings), num_classes)
        return super()._new_head(num_classes)

    def _begin(self, x: Tensor) -> Tensor:
        (a, b, c), (d, e, f) = self.grid, self.block_size
        parts = x.reshape(-1, self.in_chans, a, d, b, e, c, f).permute(0, 2, 4, 6, 1, 3, 5, 7)
        patches = self.patch_embed(parts.reshape(-1, self.in_chans, d, e, f))
        tokens = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1) + self.pos_embed
        of_blocks = tokens.reshape(-1, a * b * c, *tokens.shape[1:]) + self.block_embeddings
        return of_blocks.flatten(0, 1)

    def _finish(self, x: Tensor) -> Tensor:
        return x.reshape(-1, math.prod(self.grid), *x.shape[1:])

    def _as_map(self, x: Tensor, shape: Sequence[int]) -> Tensor:  # noqa: ARG002 - the contract's
        latents = x.reshape(-1, math.prod(self.grid), *x.shape[-2:])[:, :, 0]
        return latents.transpose(1, 2).reshape(len(latents), -1, *self.grid)

    def _check_size(self, size: tuple[int, ...]) -> None:
        if size != self.img_size:
            raise ValueError(
                f"this MiNiT takes volumes of {self.img_size} voxels, not {size}; for others, build it by "
                "create_model(…, img_size=…)"
            )
        super()._check_size(size)

    def pool(self, features: Tensor) -> Tensor:
        return features[:, :, 0].mean(dim=1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """As the contract says; the authors' classifier takes the blocks' CLS tokens, and not their mean."""
        if pre_logits or not isinstance(self.head, BlockHead):
            return super().forward_head(x, pre_logits)
        return self.head(self.head_drop(x[:, :, 0]))  # type: ignore[no-any-return]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:  # noqa: ARG002 - the contract's
        return {
            "stem": r"^cls_token|^pos_embed|^block_embeddings|^patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None)],
        }

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "pos_embed", "block_embeddings"}

    def filter_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' patches are flattened, and weighed by a matrix; then as every family does.

        Embeddings of the blocks that were stored for another size of volumes are interpolated between the blocks.
        """
        shape = self.saved_args.get("img_size", self.img_size)
        old = tuple(size // n for size, n in zip(shape, self.block_size, strict=True))
        stored = state.get("block_embeddings")
        if old != self.grid and stored is not None and len(stored) == math.prod(old):
            moved = interpolate_positions(stored.flatten(1)[None], old, self.grid)  # type: ignore[arg-type]
            state = state | {"block_embeddings": moved.reshape(-1, *stored.shape[1:])}
        return super().filter_state_dict(as_kernel(state, self.first_conv, self.patch_embed.patch_size))
