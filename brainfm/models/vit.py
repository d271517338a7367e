"""3D vision transformers with the parameter names of `facebookresearch/mae`, so that its family's checkpoints load.

Kaczmarek et al. 2025 (arXiv 2509.10620) compare SimCLR with an MAE on patches of 25×16×16 voxels: 864 of them, and a
CLS token. Nothing 3D was released; the rule for the 3D sin-cos positions is ours (`sincos_positions`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainfm.contract import Triple
from brainfm.models.encoder import stage
from brainfm.models.fast.chain import Together, is_plain
from brainfm.models.fast.first import FirstTokenReader
from brainfm.models.fast.patches import embedded

_EVEN = 16  # of whose multiples matrix products are fastest


def sincos_positions(dim: int, grid: Triple) -> Tensor:
    """The fixed position embedding of a `grid` of patches, [1, 1 + patches, dim] in float32, the CLS token's row zero.

    Each axis, in (z, y, x) order, gets w = 2·⌊dim/6⌋ channels: the sines, then the cosines, of
    position × 10000^(−i/(w/2)), i = 0 … w/2 − 1, for positions 0, 1, 2 … along it. Channels left over are zero.
    """
    half = dim // 6
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in axes]
    parts = [part for angle in angles for part in (angle.sin(), angle.cos())]
    patches = F.pad(torch.cat(parts, dim=1), (0, dim - 6 * half))
    return F.pad(patches, (0, 0, 1, 0))[None].float()


def interpolate_positions(positions: Tensor, old: Triple, new: Triple) -> Tensor:
    """A learned position embedding moved from one grid of patches to another, trilinearly.

    Args:
        positions: [1, rows before + patches, dim]; those before the patches', such as a CLS token's, stay as they are.
        old: The grid that they are of.
        new: The grid to move them to.
    """
    if old == new:
        return positions
    before = positions.shape[1] - math.prod(old)
    first_rows, patches = positions[:, :before], positions[:, before:]
    volume = patches.reshape(1, *old, -1).permute(0, 4, 1, 2, 3)
    moved = F.interpolate(volume.float(), size=new, mode="trilinear", align_corners=False)
    return torch.cat([first_rows, moved.flatten(2).transpose(1, 2).to(positions.dtype)], dim=1)


class PatchEmbed(Together):
    """Non-overlapping patches → tokens: [B, C, D, H, W] → [B, d·h·w, dim], z slowest."""

    faster = "patches by one matrix product, without those that are empty (unless traced)"

    def __init__(self, patch_size: Triple, in_chans: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv3d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def grid(self, shape: Sequence[int]) -> Triple:
        """Patches along each axis of a volume of `shape` voxels. Raises ValueError where they do not divide it."""
        if any(size % patch for size, patch in zip(shape, self.patch_size, strict=True)):
            raise ValueError(f"patches of {self.patch_size} voxels do not divide a volume of {tuple(shape)}")
        z, y, x = (size // patch for size, patch in zip(shape, self.patch_size, strict=True))
        return z, y, x

    def forward(self, x: Tensor) -> Tensor:
        if self.together and is_plain(x):
            return embedded(x, self.proj).flatten(1, 3)
        return self.proj(x).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Queries or keys [B, heads, N, C], whose neighbouring channels are pairs, turned by angles: rotary positions.

    Args:
        x: What is turned.
        rotation: The angles' sines and cosines, [2, N, C].
    """
    sine, cosine = rotation
    across = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * cosine + across * sine  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"a width of {dim} cannot be divided among {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if rotation is not None:
            q, k = rotated(q, rotation), rotated(k, rotation)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, dim))  # type: ignore[no-any-return]

    def of_first(self, x: Tensor) -> Tensor:
        """What `forward` gives the first token, [B, N, dim] → [B, 1, dim], without any other's key or value.

        A query's product with a key is that of the query, through the keys' weights, with the token; and the mean of
        values is the values' weights times the mean of tokens. What the keys' bias adds is the same for all tokens.
        """
        query, key, value = self.qkv.weight.unflatten(0, (3, self.num_heads, -1))  # type: ignore[no-untyped-call]
        q = torch.einsum("bd,hcd->bhc", x[:, 0], query)
        bias = None if self.qkv.bias is None else self.qkv.bias.unflatten(0, (3, self.num_heads, -1))  # type: ignore[no-untyped-call]
        if bias is not None:
            q = q + bias[0]
        asked = torch.einsum("bhc,hcd->bhd", q * q.shape[-1] ** -0.5, key)
        seen = (asked @ x.transpose(1, 2)).softmax(dim=-1) @ x
        found = torch.einsum("bhd,hcd->bhc", seen, value)
        if bias is not None:
            found = found + bias[2]
        return self.proj(found.flatten(1)[:, None])  # type: ignore[no-any-return]


class Mlp(Together):
    """Two layers with a GELU between them."""

    faster = "MLPs with hidden zeros, of a width that matrix products like"

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]

    def ready(self) -> str:
        """As `Together.ready`: hidden channels that are always 0 are added, which change nothing."""
        extra = -self.fc1.out_features % _EVEN
        if not extra:
            return ""
        self.fc1.weight, self.fc1.bias, self.fc2.weight = (
            nn.Parameter(F.pad(old, pad), requires_grad=False)
            for old, pad in (
                (self.fc1.weight, (0, 0, 0, extra)),
                (self.fc1.bias, (0, extra)),
                (self.fc2.weight, (0, extra)),
            )
        )
        self.fc1.out_features = self.fc2.in_features = self.fc1.out_features + extra
        return super().ready()


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, each sample's branch is left out with this probability.

    What is kept is divided by the probability of being kept, so that the mean stays.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop_path_rate must be at least 0 and below 1, not {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return x
        kept = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * kept / (1 - self.rate)


class Block(nn.Module):
    """A pre-norm transformer block, each of whose two branches may be left out in training (`DropPath`)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        qkv_bias: bool = True,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), rotation))
        return x + self.drop_path(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]

    def of_first(self, x: Tensor) -> Tensor:
        """What `forward` gives the first token in eval mode, [B, N, dim] → [B, 1, dim]."""
        first = x[:, :1] + self.attn.of_first(self.norm1(x))
        return first + self.mlp(self.norm2(first))  # type: ignore[no-any-return]


class VisionTransformer(FirstTokenReader):
    """A ViT on 3D patches. It takes volumes of `img_size`; with `dynamic_img_size` any that the patch divides.

    `forward_features` gives all tokens after the final norm, the CLS token first where there is one; before the norm
    where the pooling is "fc_norm". The position embedding is fixed sin-cos, computed anew for another input size; one
    that was learned, or loaded with other values, is interpolated.

    Args:
        dim: Width of the tokens, and of the embedding.
        depth: Blocks.
        num_heads: Attention heads.
        img_size: Voxels of the volumes, and of what the position embedding is stored for.
        patch_size: Voxels of a patch.
        num_classes: Outputs of the classifier `head`; 0 for none.
        in_chans: Input channels.
        global_pool: "token" (the first token: the CLS token, as linear probing in `facebookresearch/mae`, or without
            one that of the corner patch, as BrainIAC reads its ViT), "avg" (the patch tokens' mean after the norm), or
            "fc_norm" (their mean before it, then a norm of its own, as fine-tuning in `mae`).
        drop_rate: The probability of dropout on the pooled embedding, in training.
        drop_path_rate: Stochastic depth, in training: the last block's; it rises evenly from 0 in the first.
        dynamic_img_size: Take volumes of other sizes too.
        class_token: Have a CLS token before those of the patches.
        qkv_bias: Whether the projection to queries, keys and values has a bias; MONAI's ViT has none.
        norm_eps: Of the norms; 1e-5 in MONAI's ViT.
        block: Makes a block of another kind by its number, for networks that are built on this one.
    """

    pools: ClassVar[tuple[str, ...]] = ("token", "avg", "fc_norm")
    classifier_name = "head"
    first_conv = "patch_embed.proj"

    rotation: Tensor | None  # of rotary positions, see `rotated`, for networks that are built on this one

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        *,
        img_size: Triple = (150, 192, 192),
        patch_size: Triple = (25, 16, 16),
        num_classes: int = 0,
        in_chans: int = 1,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
        class_token: bool = True,
        qkv_bias: bool = True,
        norm_eps: float = 1e-6,
        block: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__(num_classes, in_chans, global_pool, drop_rate)
        self.num_features = dim
        self.img_size, self.dynamic_img_size = tuple(img_size), dynamic_img_size
        self.patch_embed = PatchEmbed(patch_size, in_chans, dim)
        self.grid = self.patch_embed.grid(img_size)
        self.register_buffer("rotation", None, persistent=False)
        self.prefix = int(class_token)  # tokens before those of the patches
        if class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(self._sincos(self.grid), requires_grad=False)
        self.blocks = nn.ModuleList(  # a config may ask for a billion
            block(n) if block else Block(dim, num_heads, qkv_bias=qkv_bias, norm_eps=norm_eps) for n in range(depth)
        )
        self.set_drop_path(drop_path_rate)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        z, y, x = ((size - 1) / 2 for size in patch_size)
        self.feature_info = [stage(f"blocks.{n}", dim, patch_size, (z, y, x)) for n in range(depth)]
        self.cam_layer = f"blocks.{depth - 1}.norm1"  # after the block, the CLS token may be all that counts
        self.apply(init_linear)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        if class_token:
            nn.init.normal_(self.cls_token, std=0.02)
        self.reset_classifier(num_classes)

    @property
    def _reads_first(self) -> bool:
        return self.global_pool == "token"

    def set_drop_path(self, rate: float) -> None:
        """Set the last block's probability of being skipped in training; it rises evenly from 0. Raises ValueError."""
        for n, block in enumerate(self.blocks):
            block.drop_path = DropPath(rate * n / max(1, len(self.blocks) - 1))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """As `Encoder` has it; of the norms before and after the pooling the one that is not used does not learn.

        A pooling by "fc_norm" that is new begins with a new norm, as the MAE's fine-tuning does.
        """
        super().reset_classifier(num_classes, global_pool)
        wanted, there = self.global_pool == "fc_norm", hasattr(self, "fc_norm")
        if wanted and not there:
            self.fc_norm = copy.deepcopy(self.norm)
            self.fc_norm.reset_parameters()
            self.norm.requires_grad_(False)
        elif there and not wanted:
            del self.fc_norm
            self.norm.requires_grad_(not self._frozen)

    def positions(self, grid: Triple) -> Tensor:
        """The position embedding [1, prefix + patches, dim] for a grid of patches."""
        if grid == self.grid:
            return self.pos_embed
        if self._is_sincos(self.pos_embed, self.grid):
            return self._sincos(grid).to(self.pos_embed)
        return interpolate_positions(self.pos_embed, self.grid, grid)

    def _is_sincos(self, positions: Tensor, grid: Triple) -> bool:
        """Whether positions are the fixed ones, as closely as bfloat16 can hold them."""
        return torch.allclose(positions.float().cpu(), self._sincos(grid), atol=2.5e-3)

    def _sincos(self, grid: Triple) -> Tensor:
        return sincos_positions(self.num_features, grid)[:, 1 - self.prefix :]

    def _begin(self, x: Tensor) -> Tensor:
        positions = self.positions(self.patch_embed.grid(x.shape[2:]))
        patches = self.patch_embed(x) + positions[:, self.prefix :]
        if not self.prefix:
            return patches  # type: ignore[no-any-return]
        cls_token = (self.cls_token + positions[:, :1]).expand(x.shape[0], -1, -1)
        return torch.cat([cls_token, patches], dim=1)

    def _stage(self, number: int, x: Tensor, needed: bool) -> Tensor:
        if self.rotation is None:
            return super()._stage(number, x, needed)  # type: ignore[no-any-return]
        return self._run(lambda tokens: self.blocks[number](tokens, self.rotation), x)

    def _finish(self, x: Tensor) -> Tensor:
        return x if self.global_pool == "fc_norm" else self.norm(x)

    def _as_map(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        return x[:, self.prefix :].transpose(1, 2).reshape(len(x), -1, *self.patch_embed.grid(shape))

    def _check_size(self, size: tuple[int, ...]) -> None:
        if size != self.img_size and not self.dynamic_img_size:
            raise ValueError(
                f"this ViT takes volumes of {self.img_size} voxels, not {size}; for others, build it by "
                "create_model(…, img_size=…), or with dynamic_img_size=True for any that its patch divides"
            )
        super()._check_size(size)

    def pool(self, features: Tensor) -> Tensor:
        if self.global_pool == "token":
            return features[:, 0]
        mean = features[:, self.prefix :].mean(dim=1)
        return self.fc_norm(mean) if self.global_pool == "fc_norm" else mean

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:  # noqa: ARG002 - the contract's
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^(fc_)?norm", (math.inf,))],
        }

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"} if self.prefix else {"pos_embed"}

    def filter_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Drop an MAE's decoder, move positions stored for another input size, then as every family does.

        Where the pooling is "fc_norm", the norm that a file lacks is a new one: a pretraining has no `fc_norm`, and an
        MAE's fine-tuning no `norm`.

        The stored grid of patches is that of the model that was saved, where that is known, else that of the cfg's
        input contract. Fixed sin-cos positions are computed anew, others interpolated.
        """
        state = {key: value for key, value in state.items() if not key.startswith(("decoder_", "mask_token"))}
        if self.global_pool == "fc_norm":
            norms = {key: value for key, value in self.state_dict().items() if key.startswith(("norm.", "fc_norm."))}
            state = norms | state
        stored, grid = state.get("pos_embed"), self._stored_grid()
        tokens = self.prefix + math.prod(grid or self.grid)
        if grid is not None and grid != self.grid and stored is not None and stored.shape[:2] == (1, tokens):
            fixed = self._is_sincos(stored, grid)
            moved = self.pos_embed.data if fixed else interpolate_positions(stored, grid, self.grid)
            state = state | {"pos_embed": moved}
        return super().filter_state_dict(state)

    def _stored_grid(self) -> Triple | None:
        spec = self.pretrained_cfg.input_spec
        contract = spec.output_shape[1:] if spec is not None and spec.output_shape is not None else None
        shape = self.saved_args.get("img_size", contract)
        if shape is None:
            return None
        z, y, x = (size // patch for size, patch in zip(shape, self.patch_embed.patch_size, strict=True))
        return z, y, x


def init_linear(module: nn.Module) -> None:
    """Xavier's uniform weights and no bias, as `facebookresearch/mae` begins, where a module is a linear layer."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
