"""3D Swin transformers (Liu et al. 2021, arXiv 2103.14030; of video 2106.13230): torchvision's, MONAI's old and new.

They differ in what a stage merges, and where. MONAI up to 1.4 merged eight slices of which two are there twice and two
are missing; since 1.5 its Swin computes something else with the same weights, which still load strictly. Weights
trained before need `merge="legacy"`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainfm.contract import Triple
from brainfm.models.encoder import Encoder, stage
from brainfm.models.fast.chain import Together, is_plain
from brainfm.models.fast.patches import embedded
from brainfm.models.vit import Mlp

# Which voxels of a cell of 2×2×2 (1×2×2 of "plane") a merge joins, in the order of its weights.
MERGES: dict[str, list[Triple]] = {
    "plane": [(0, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)],
    "legacy": [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1)],
    "fixed": [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)],
    "v2": [(a, b, c) for a, b, c in product((0, 1), repeat=3)],
}


def _padded(x: Tensor, multiples: Sequence[int], first: int) -> Tensor:
    """A tensor with zeros after the end of its axes `first`, `first` + 1 and + 2, so that `multiples` divide them."""
    extra = [-size % multiple for size, multiple in zip(x.shape[first : first + 3], multiples, strict=True)]
    if not any(extra):
        return x
    after = [0, 0] * (x.ndim - first - 3)
    return F.pad(x, (*after, 0, extra[2], 0, extra[1], 0, extra[0]))


class PatchEmbed(Together):
    """Patches → cells: [B, C, D, H, W], zeros after its end where patches do not divide it → [B, dim, d, h, w]."""

    faster = "patches by one matrix product, without those that are empty (unless traced)"

    def __init__(self, patch_size: Triple, in_chans: int, dim: int, norm: bool) -> None:
        super().__init__()
        self.proj = nn.Conv3d(in_chans, dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = _padded(x, self.proj.kernel_size, 2)
        if self.together and is_plain(x):
            return self.norm(embedded(x, self.proj)).movedim(-1, 1)  # type: ignore[no-any-return]
        x = self.proj(x)
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)  # type: ignore[no-any-return]


class WindowAttention(nn.Module):
    """Self-attention in windows of cells [B, d, h, w, C], moved by `shift`, with a bias by relative position.

    Where a window is longer than the volume it is cut to that, and not moved; its biases are then those that the whole
    window has between its first cells, as in torchvision and MONAI, though they are those of other distances.
    """

    relative_position_index: Tensor

    def __init__(self, dim: int, num_heads: int, window: Triple, shift: Triple) -> None:
        super().__init__()
        self.num_heads, self.window, self.shift = num_heads, window, shift
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        distances = [2 * n - 1 for n in window]
        self.relative_position_bias_table = nn.Parameter(torch.zeros(math.prod(distances), num_heads))
        places = torch.stack(torch.meshgrid(*(torch.arange(n) for n in window), indexing="ij")).flatten(1)
        apart = places[:, :, None] - places[:, None, :] + torch.tensor(window).view(3, 1, 1) - 1
        index = (apart[0] * distances[1] + apart[1]) * distances[2] + apart[2]
        self.register_buffer("relative_position_index", index)

    def forward(self, x: Tensor) -> Tensor:
        sizes = x.shape[1:4]
        fits = [size > n for size, n in zip(sizes, self.window, strict=True)]
        window = [n if fit else size for n, size, fit in zip(self.window, sizes, fits, strict=True)]
        shift = [n if fit else 0 for n, fit in zip(self.shift, fits, strict=True)]
        moved = any(shift)
        x = _padded(x, window, 1)
        if moved:
            x = x.roll([-n for n in shift], dims=(1, 2, 3))
        counts = [size // n for size, n in zip(x.shape[1:4], window, strict=True)]
        cells, (*_, dim) = math.prod(window), x.shape
        bias = self.relative_position_bias_table[self.relative_position_index[:cells, :cells].flatten()]
        bias = bias.view(cells, cells, -1).permute(2, 0, 1)
        tokens, found = _in_windows(self.qkv(x), window), torch.empty_like(x, memory_format=torch.contiguous_format)
        into = _in_windows(found, window)
        # Windows at the end of an axis that was moved hold strangers; all others have the same biases.
        ends = [[slice(n - 1), slice(n - 1, n)] if step else [slice(n)] for n, step in zip(counts, shift, strict=True)]
        for places in product(*ends):
            part = tokens[(slice(None), *places)]
            if not part.numel():
                continue
            q, k, v = part.reshape(-1, cells, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
            at_end = [place.start is not None for place in places]
            mask = bias + _strangers(at_end, window, shift, x.device).to(bias.dtype) if any(at_end) else bias
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None].to(q.dtype))  # four axes are fast
            into[(slice(None), *places)] = attended.transpose(1, 2).reshape(*part.shape[:-1], dim)
        x = self.proj(found)
        if moved:
            x = x.roll(shift, dims=(1, 2, 3))
        return x[:, : sizes[0], : sizes[1], : sizes[2]]


def _in_windows(x: Tensor, window: Sequence[int]) -> Tensor:
    """A view of cells [B, d, h, w, C] by their windows: [B, windows along each axis, cells along each axis, C]."""
    for axis, n in zip((3, 2, 1), reversed(window), strict=True):
        x = x.unflatten(axis, (-1, n))  # type: ignore[no-untyped-call]
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7)


def _strangers(at_end: Sequence[bool], window: Sequence[int], shift: Sequence[int], device: torch.device) -> Tensor:
    """−100 between cells that only the shift brought into a window, which is the last of some axes; else 0."""
    region = torch.zeros(1, 1, 1, device=device)
    for axis, (ends, n, step) in enumerate(zip(at_end, window, shift, strict=True)):
        label = (torch.arange(n, device=device) >= n - step).float() * float(ends)
        region = 2 * region + label.view([-1 if other == axis else 1 for other in range(3)])
    cells = region.flatten()
    return (cells[None, :] != cells[:, None]).float() * -100


class Block(nn.Module):
    """A pre-norm transformer block of cells [B, d, h, w, C]."""

    def __init__(self, dim: int, num_heads: int, window: Triple, shift: Triple, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window, shift)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Merge(nn.Module):
    """Neighbouring cells become one of twice the channels: [B, d, h, w, C] → [B, ⌈d/2⌉ or d, ⌈h/2⌉, ⌈w/2⌉, 2C]."""

    def __init__(self, dim: int, kind: str) -> None:
        super().__init__()
        self.kind, self.steps = kind, (1 if kind == "plane" else 2, 2, 2)
        inputs = len(MERGES[kind]) * dim
        self.norm = nn.LayerNorm(inputs)
        self.reduction = nn.Linear(inputs, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = _padded(x, self.steps, 1)
        a, b, c = self.steps
        x = torch.cat([x[:, i::a, j::b, k::c] for i, j, k in MERGES[self.kind]], dim=-1)
        return self.reduction(self.norm(x))  # type: ignore[no-any-return]


class Stage(nn.Module):
    """Blocks whose windows are moved by half in every second one, and a merge before or after them."""

    def __init__(self, blocks: Sequence[Block], merge: Merge | None, merge_first: bool) -> None:
        super().__init__()
        self.merge_first = merge_first
        if merge is not None and merge_first:
            self.merge = merge
        self.blocks = nn.Sequential(*blocks)
        if merge is not None and not merge_first:
            self.merge = merge

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1)
        merge = getattr(self, "merge", nn.Identity())
        x = self.blocks(merge(x)) if self.merge_first else merge(self.blocks(x))
        return x.movedim(-1, 1)


class Bottleneck(nn.Module):
    """Two 3×3×3 convolutions with instance norms and a shortcut: what MONAI's SwinUNETR calls `encoder10`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(dim, dim, 3, padding=1, bias=False)
        self.conv2 = nn.Conv3d(dim, dim, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(F.instance_norm(self.conv1(x)), 0.01)
        return F.leaky_relu(F.instance_norm(self.conv2(y)) + x, 0.01)


class SwinTransformer(Encoder):
    """A 3D Swin transformer: volumes of any size → a map, whose mean is the embedding.

    Volumes that patches, windows or merges do not divide get zeros after their end; the last cells may look there.

    Args:
        dim: Channels of the first stage; they double by each merge.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        patch_size: Voxels of a patch.
        window: Cells of a window.
        merge: "plane", of 1×2×2 cells, as in torchvision's video Swin; "legacy", of 2×2×2 as MONAI up to 1.4 took them;
            "fixed" or "v2", of all eight in the orders of MONAI's `PatchMerging` (since 1.5) and `PatchMergingV2`.
        merges: "between" the stages, as in torchvision, or "after" each, as in MONAI.
        norm: "affine", a norm of the patches and one of the last map (torchvision); "plain", every map given out is
            normalised over its channels without weights, though the next stage takes it as it was (MONAI).
        bottleneck: Whether the `encoder10` of MONAI's SwinUNETR follows, whose map is then the last.
        mlp_ratio: Width of the blocks' MLPs by that of their cells.
        num_classes: Outputs of the classifier `head`; 0 for none.
        in_chans: Input channels.
        global_pool: "avg".
        drop_rate: Dropout on the pooled embedding, in training.
    """

    classifier_name = "head"
    first_conv = "patch_embed.proj"

    def __init__(
        self,
        dim: int,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        *,
        patch_size: Triple = (2, 2, 2),
        window: Triple = (7, 7, 7),
        merge: Literal["plane", "legacy", "fixed", "v2"] = "fixed",
        merges: Literal["between", "after"] = "after",
        norm: Literal["affine", "plain"] = "plain",
        bottleneck: bool = False,
        mlp_ratio: float = 4.0,
        num_classes: int = 0,
        in_chans: int = 1,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_chans, global_pool, drop_rate)
        if merge not in MERGES or merges not in ("between", "after") or norm not in ("affine", "plain"):
            raise ValueError(
                f"merge is one of {', '.join(MERGES)}, merges 'between' or 'after', norm 'affine' or 'plain'; not "
                f"{merge!r}, {merges!r} and {norm!r}"
            )
        if len(depths) != len(num_heads):
            raise ValueError(f"depths are of {len(depths)} stages, and num_heads of {len(num_heads)}")
        patch_size, window = (*patch_size,), (*window,)
        self.patch_embed = PatchEmbed(patch_size, in_chans, dim, norm == "affine")
        self.stages = nn.ModuleList()
        width, reduction = dim, list(patch_size)
        self.merges = merges
        self.feature_info = [] if merges == "between" else [self._described("patch_embed", dim, reduction)]
        for number, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            joined = Merge(width, merge) if merges == "after" or number else None
            inside = 2 * width if joined and merges == "between" else width
            half = (window[0] // 2, window[1] // 2, window[2] // 2)
            shifts = [half if n % 2 else (0, 0, 0) for n in range(depth)]
            blocks = [Block(inside, heads, window, shift, mlp_ratio) for shift in shifts]
            self.stages.append(Stage(blocks, joined, merges == "between"))
            if joined:
                width *= 2
                reduction = [step * more for step, more in zip(reduction, joined.steps, strict=True)]
            self.feature_info.append(self._described(f"stages.{number}", width, reduction))
        self.num_features = width
        self.norm = nn.LayerNorm(width) if norm == "affine" else None
        self.bottleneck = Bottleneck(width) if bottleneck else None
        self.apply(_init_weights)
        self.reset_classifier(num_classes)

    @staticmethod
    def _described(module: str, width: int, reduction: Sequence[int]) -> dict[str, Any]:
        a, b, c = reduction
        return stage(module, width, (a, b, c), ((a - 1) / 2, (b - 1) / 2, (c - 1) / 2))

    def _begin(self, x: Tensor) -> Tensor:
        return self.patch_embed(x) if self.merges == "between" else x  # else a stage of its own

    def _finish(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            return self.norm(x.movedim(1, -1)).movedim(-1, 1)  # type: ignore[no-any-return]
        x = self._as_map(x, ())
        return x if self.bottleneck is None else self.bottleneck(x)

    def _as_map(self, x: Tensor, shape: Sequence[int]) -> Tensor:  # noqa: ARG002 - the contract's
        """A stage's map, as it is given out."""
        return x if self.norm is not None else F.layer_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1)

    def dense(self, x: Tensor) -> Tensor:
        """As `Encoder.dense`: the final features, which are a map already."""
        return self.forward_features(x.to(self.patch_embed.proj.weight.dtype)).to(x.dtype)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:  # noqa: ARG002 - the contract's
        return {
            "stem": r"^patch_embed",
            "blocks": [(r"^stages\.(\d+)", None), (r"^(norm|bottleneck)\.", (math.inf,))],
        }

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, WindowAttention):
        nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)
