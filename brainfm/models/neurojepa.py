"""Neuro-JEPA's vision transformer, written after github NYUMedML/Neuro-JEPA (MIT), which goes back to V-JEPA 2 (MIT).

Rotary positions, attention whose heads are gated, and mixtures of experts in every second block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainfm.contract import Triple
from brainfm.models.fast.chain import Together, is_plain
from brainfm.models.vit import Attention, Block, Mlp, VisionTransformer, rotated


def rotation(grid: Triple, width: int) -> Tensor:
    """Sines and cosines of rotary positions for a grid of patches and heads of a width, [2, patches, width].

    As released, where two things are not as one would do them anew, and the weights are used to them: a pair of
    neighbouring channels has two frequencies, since V-JEPA repeats their list and not each; and patches are counted as
    if a layer of them held first × second and a row second, though a layer holds second × third and a row third. What
    is left of a head after three equal parts is not turned.
    """
    part = 2 * (width // 3 // 2)
    frequencies = 10000.0 ** (-torch.arange(part // 2, dtype=torch.float32) / (part / 2))
    a, b, c = grid
    place = torch.arange(a * b * c)
    layer, inside = place // (a * b), place % (a * b)
    angles = [(axis[:, None] * frequencies).repeat(1, 2) for axis in (layer, inside // b, inside % b)]
    turned = F.pad(torch.cat(angles, dim=1), (0, width - 3 * part))
    return torch.stack([turned.sin(), turned.cos()])


class GatedAttention(Attention):
    """Self-attention, each of whose heads is weighed, token by token, by a sigmoid."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads)
        self.proj_attn_gate = nn.Linear(dim, num_heads)

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if rotation is not None:
            q, k = rotated(q, rotation), rotated(k, rotation)
        found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        found = found * self.proj_attn_gate(x).sigmoid()[..., None]
        return self.proj(found.reshape(batch, tokens, dim))  # type: ignore[no-any-return]


class Gate(nn.Module):
    """How much each expert counts for a token: [B, N, dim] → [B, N, experts], 0 of all but the `active` chosen.

    A softmax, of which the experts that are chosen keep their part, times `scale`. `bias`, which kept the experts
    evenly used in training, bears on the choice alone.
    """

    bias: Tensor

    def __init__(self, dim: int, experts: int, active: int, scale: float) -> None:
        super().__init__()
        self.active, self.scale = active, scale
        self.gate = nn.Linear(dim, experts, bias=False)
        self.register_buffer("bias", torch.zeros(experts))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).softmax(dim=-1, dtype=torch.float32)
        chosen = (scores + self.bias).topk(self.active, dim=-1).indices
        kept = torch.zeros_like(scores).scatter(-1, chosen, 1.0)
        return (scores * kept * self.scale).to(x.dtype)  # type: ignore[no-any-return]


class Mixture(Together):
    """Experts, of whose outputs a gate makes a sum, beside one for all tokens: [B, N, dim] → the same.

    In training, and where the program is written down, every expert sees every token, so that shapes do not depend on
    numbers: twice the work of a common MLP, as the experts are small. In a copy for inference it sees its own tokens.
    `counts`, of how often each was chosen in training, is the file's.
    """

    counts: Tensor
    faster = "experts see their own tokens (unless traced)"

    def __init__(self, dim: int, hidden: int, experts: int, shared: int, active: int, scale: float) -> None:
        super().__init__()
        self.gate = Gate(dim, experts, active, scale)
        self.experts = nn.ModuleList(Mlp(dim, hidden) for _ in range(experts))
        self.shared_experts = Mlp(dim, shared * hidden)
        self.register_buffer("counts", torch.zeros(experts, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x)
        routed = torch.zeros_like(x)
        if self.together and is_plain(x):
            tokens, flat, to = x.flatten(0, 1), weights.flatten(0, 1), routed.flatten(0, 1)
            for number, expert in enumerate(self.experts):
                (own,) = flat[:, number].nonzero(as_tuple=True)
                to.index_add_(0, own, expert(tokens[own]).mul_(flat[own, number, None]))
            return routed.add_(self.shared_experts(x))
        for number, expert in enumerate(self.experts):
            routed = routed + expert(x) * weights[..., number, None]
        return routed + self.shared_experts(x)  # type: ignore[no-any-return]


class NeuroJEPA(VisionTransformer):
    """`VisionTransformer` without a CLS token and with rotary positions, whose odd blocks are mixtures of experts.

    Args:
        dim: Width of the tokens, and of the embedding.
        depth: Blocks.
        num_heads: Attention heads.
        img_size: Voxels of the volumes.
        patch_size: Voxels of a patch.
        expert_dim: Width of an expert's MLP.
        experts: In a mixture.
        shared: Width of the MLP beside them, in experts.
        active: Experts that count for a token.
        scale: Of what they give.
        **others: As of `VisionTransformer`; `global_pool` is "avg".
    """

    pools = ("avg",)

    def __init__(
        self,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        *,
        img_size: Triple = (96, 108, 96),
        patch_size: Triple = (12, 12, 12),
        expert_dim: int = 384,
        experts: int = 16,
        shared: int = 2,
        active: int = 6,
        scale: float = 4.0,
        **others: object,
    ) -> None:
        def block(number: int) -> Block:
            made = Block(dim, num_heads)
            made.attn = GatedAttention(dim, num_heads)
            if number % 2:
                made.mlp = Mixture(dim, expert_dim, experts, shared, active, scale)  # type: ignore[assignment]
            return made

        super().__init__(
            dim,
            depth,
            num_heads,
            img_size=img_size,
            patch_size=patch_size,
            class_token=False,
            dynamic_img_size=False,  # positions are those of one grid
            block=block,
            **others,  # type: ignore[arg-type]
        )
        del self.pos_embed  # its positions are rotary alone
        self.rotation = rotation(self.grid, dim // num_heads)

    def _begin(self, x: Tensor) -> Tensor:
        return self.patch_embed(x)  # type: ignore[no-any-return]

    def no_weight_decay(self) -> set[str]:
        return set()
