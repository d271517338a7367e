"""Primus (Wald et al. 2025, arXiv 2503.01835): the EVA-02 transformer on 3D patches, as OpenMind's weights have it.

Learned and rotary positions, SwiGLU with a norm inside, a norm inside attention, LayerScale. Written from the layers of
timm's EVA (Apache-2.0) and the published facts of OpenMind's weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainfm.contract import Triple
from brainfm.models.vit import DropPath, VisionTransformer, rotated


def rotation(grid: Triple, width: int) -> Tensor:
    """Sines and cosines of rotary positions for a grid of patches and heads of a width, [2, patches, width].

    By the place along each axis, in C order, turns a third of a head's n pairs of channels, at 10000^(−3i/n).
    """
    pairs = width // 6
    frequencies = 10000.0 ** (-torch.arange(pairs, dtype=torch.float32) / pairs)
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    angles = torch.cat([axis.flatten()[:, None] * frequencies for axis in axes], dim=1).repeat_interleave(2, dim=1)
    return torch.stack([angles.sin(), angles.cos()])


class EvaAttention(nn.Module):
    """Self-attention with rotary positions, keys without a bias, and a norm before the last projection."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = F.scaled_dot_product_attention(rotated(q, rotation), rotated(k, rotation), v)
        return self.proj(self.norm(x.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


class SwiGLU(nn.Module):
    """A gated MLP, with a norm before its last layer."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1_g = nn.Linear(dim, hidden)
        self.fc1_x = nn.Linear(dim, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(F.silu(self.fc1_g(x)) * self.fc1_x(x)))  # type: ignore[no-any-return]


class EvaBlock(nn.Module):
    """A pre-norm block, each of whose branches is scaled channel by channel (LayerScale)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = EvaAttention(dim, num_heads)
        self.gamma_1 = nn.Parameter(torch.full((dim,), 0.1))
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = SwiGLU(dim, dim * 8 // 3)
        self.gamma_2 = nn.Parameter(torch.full((dim,), 0.1))
        self.drop_path = DropPath(0.0)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x), rotation))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


class Primus(VisionTransformer):
    """`VisionTransformer` of EVA-02's blocks, without a CLS token, whose tokens may come in another order than C's.

    Args:
        dim: Width of the tokens, and of the embedding.
        depth: Blocks.
        num_heads: Attention heads.
        img_size: Voxels of the volumes.
        patch_size: Voxels of a patch.
        token_order: Axes of the grid of patches, the slowest first: in which order patches become tokens, which get
            positions in C order. OpenMind's weights were trained with (1, 0, 2) (nnssl's EvaMAE; and
            dynamic-network-architectures up to 0.4.2), but those of its EvaSimMIM with (0, 1, 2). All load in both.
        **others: As of `VisionTransformer`; `global_pool` is "avg".

    Raises:
        ValueError: The token order is none of three axes, or the heads' width cannot be divided among them.
    """

    pools = ("avg",)

    def __init__(
        self,
        dim: int = 864,
        depth: int = 16,
        num_heads: int = 12,
        *,
        img_size: Triple = (160, 160, 160),
        patch_size: Triple = (8, 8, 8),
        token_order: Triple = (0, 1, 2),
        **others: object,
    ) -> None:
        if sorted(token_order) != [0, 1, 2]:
            raise ValueError(f"token_order is 0, 1 and 2 in some order, not {tuple(token_order)}")
        if dim % (6 * num_heads):
            raise ValueError(f"a width of {dim} cannot be divided among {num_heads} heads, three axes and pairs")
        super().__init__(
            dim,
            depth,
            num_heads,
            img_size=img_size,
            patch_size=patch_size,
            class_token=False,
            norm_eps=1e-5,
            dynamic_img_size=False,  # positions are those of one grid
            block=lambda _: EvaBlock(dim, num_heads),
            **others,  # type: ignore[arg-type]
        )
        self.token_order = tuple(token_order)
        self.pos_embed.requires_grad_(True)
        self.rotation = rotation(self.grid, dim // num_heads)

    def _begin(self, x: Tensor) -> Tensor:
        cells: Tensor = self.patch_embed.proj(x)
        tokens = cells.permute(0, *(2 + axis for axis in self.token_order), 1).flatten(1, 3)
        return tokens + self.pos_embed

    def _as_map(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        grid = self.patch_embed.grid(shape)
        cells = x.reshape(len(x), *(grid[axis] for axis in self.token_order), -1)
        return cells.permute(0, 4, *(1 + self.token_order.index(axis) for axis in range(3)))
