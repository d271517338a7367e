"""NiT, a vision transformer on 3D patches, as the weights of MINIT (github singlaayush/MINIT) were trained.

Written from facts of its outputs and its tensors' names: a CLS token, learned positions, no bias before attention, no
norm after the last block. The norm that its classifier begins with is the classifier's.
"""

from __future__ import annotations

from torch import Tensor, nn

from brainfm.contract import Triple
from brainfm.models.vit import Block, VisionTransformer


class NormedHead(nn.Linear):
    """A norm, then a linear layer: [B, C] → [B, outputs]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.norm = nn.LayerNorm(in_features)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class NiT(VisionTransformer):
    """`VisionTransformer` with a CLS token, whose tokens are those after the last block, without a norm.

    Args:
        dim: Width of the tokens, and of the embedding.
        depth: Blocks.
        num_heads: Attention heads.
        mlp_dim: Width of the blocks' MLPs.
        classes: Outputs of the authors' classifier: with so many, the head is theirs, a norm and a linear layer; with
            another number it is linear.
        img_size: Voxels of the volumes.
        patch_size: Voxels of a patch.
        **others: As of `VisionTransformer`; `global_pool` is "token" or "avg".
    """

    pools = ("token", "avg")

    def __init__(
        self,
        dim: int = 256,
        depth: int = 4,
        num_heads: int = 8,
        mlp_dim: int = 234,
        classes: int = 2,
        *,
        img_size: Triple = (64, 64, 64),
        patch_size: Triple = (8, 8, 8),
        **others: object,
    ) -> None:
        self.classes = classes
        super().__init__(
            dim,
            depth,
            num_heads,
            img_size=img_size,
            patch_size=patch_size,
            block=lambda _: Block(dim, num_heads, mlp_dim / dim, qkv_bias=False, norm_eps=1e-5),
            **others,  # type: ignore[arg-type]
        )
        self.norm = nn.Identity()  # type: ignore[assignment]

    def _new_head(self, num_classes: int) -> nn.Module:
        return (
            NormedHead(self.num_features, num_classes)
            if num_classes == self.classes
            else super()._new_head(num_classes)
        )

    def filter_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The authors' patches are flattened, and weighed by a matrix; then as `VisionTransformer` does."""
        return super().filter_state_dict(as_kernel(state, self.first_conv, self.patch_embed.patch_size))


def as_kernel(state: dict[str, Tensor], name: str, patch_size: Triple) -> dict[str, Tensor]:
    """A state dict whose matrix of flattened patches [dim, p·p·p·C], channels last, is a kernel [dim, C, p, p, p]."""
    weight = state.get(f"{name}.weight")
    if weight is None or weight.ndim != 2:
        return state
    return state | {f"{name}.weight": weight.reshape(len(weight), *patch_size, -1).movedim(-1, 1)}
