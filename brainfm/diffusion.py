"""The U-Net of Pinaya et al. 2022's latent diffusion model: it says what of a latent is noise, told of four numbers.

MONAI's own `DiffusionModelUNet` computes the same and needs another package; names here are those of the published
file, which MONAI's GenerativeModels wrote. Levels of residual blocks, each told the moment of the diffusion, and where
the level has attention, a transformer that attends to its own cells and to the conditions.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LONGEST = 10_000  # period of the sines that write a moment: Ho et al. 2020, arXiv 2006.11239


class DiffusionUNet(nn.Module):
    """A latent and four channels of conditions → the noise in the latent.

    Args:
        in_channels: Of the latent and the conditions together.
        out_channels: Of the latent.
        channels: Of the levels; each but the first halves the latent before it.
        num_res_blocks: Of each level; the way up has one more.
        attention_levels: Which have a transformer.
        num_head_channels: Of one attention head, at each level.
        cross_attention_dim: How many conditions there are.
        norm_num_groups: Of the norms.
        norm_eps: Added to their variance.
        transformer_num_layers: Of each transformer.
        spatial_dims, resblock_updown, with_conditioning: 3, True and True; the published network's, and the only ones.
        upcast_attention, use_flash_attention: Of how MONAI computes; here attention is as exact as its input.

    Raises:
        ValueError: The arguments make no such network.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int],
        num_res_blocks: int,
        attention_levels: Sequence[bool],
        num_head_channels: Sequence[int],
        cross_attention_dim: int,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-6,
        transformer_num_layers: int = 1,
        spatial_dims: int = 3,
        resblock_updown: bool = True,
        with_conditioning: bool = True,
        upcast_attention: bool = True,  # noqa: ARG002
        use_flash_attention: bool = False,  # noqa: ARG002
    ) -> None:
        super().__init__()
        if (spatial_dims, resblock_updown, with_conditioning) != (3, True, True):
            raise ValueError("spatial_dims is 3, and resblock_updown and with_conditioning are true, in this network")
        if not len(channels) == len(attention_levels) == len(num_head_channels):
            raise ValueError("channels, attention_levels and num_head_channels say something of each level")
        norm = (norm_num_groups, norm_eps)
        self.width, moment, last = channels[0], 4 * channels[0], len(channels) - 1

        def block(before: int, width: int, resize: float = 1) -> _Residual:
            return _Residual(before, width, moment, norm, resize)

        def transformer(level: int) -> _Transformer:
            return _Transformer(
                channels[level], num_head_channels[level], cross_attention_dim, transformer_num_layers, norm
            )

        self.conv_in = _conv(in_channels, channels[0], 3)
        self.time_embed = nn.Sequential(nn.Linear(channels[0], moment), nn.SiLU(), nn.Linear(moment, moment))
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        kept, before = [channels[0]], channels[0]
        for level, width in enumerate(channels):
            blocks = [block(before if n == 0 else width, width) for n in range(num_res_blocks)]
            attend = [transformer(level) for _ in blocks] if attention_levels[level] else []
            down = block(width, width, 0.5) if level < last else None
            self.down_blocks.append(_Level(blocks, attend, downsampler=down))
            kept += [width] * (len(blocks) + (level < last))
            before = width
        self.middle_block = nn.ModuleDict(
            {"resnet_1": block(before, before), "attention": transformer(last), "resnet_2": block(before, before)}
        )
        for level in range(last, -1, -1):
            width, blocks = channels[level], []
            for _ in range(num_res_blocks + 1):
                blocks.append(block(before + kept.pop(), width))
                before = width
            attend = [transformer(level) for _ in blocks] if attention_levels[level] else []
            self.up_blocks.append(_Level(blocks, attend, upsampler=block(width, width, 2) if level else None))
        self.out = nn.Sequential(
            nn.GroupNorm(norm_num_groups, channels[0], norm_eps), nn.SiLU(), _conv(channels[0], out_channels, 3)
        )

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """[B, in_channels, x, y, z], moments [B], and conditions [B, 1, cross_attention_dim] → [B, out_channels, …]."""
        moment = self.time_embed(_sines(timesteps, self.width).to(x.dtype))
        x = self.conv_in(x)
        kept = [x]
        for level in self._levels(self.down_blocks):
            for number in range(len(level.resnets)):
                x = level.step(number, x, moment, context)
                kept.append(x)
            if level.downsampler is not None:
                x = level.downsampler(x, moment)
                kept.append(x)
        middle = self.middle_block
        x = middle["resnet_2"](middle["attention"](middle["resnet_1"](x, moment), context), moment)
        for level in self._levels(self.up_blocks):
            for number in range(len(level.resnets)):
                x = level.step(number, torch.cat([x, kept.pop()], 1), moment, context)
            if level.upsampler is not None:
                x = level.upsampler(x, moment)
        noise: Tensor = self.out(x)
        return noise

    @staticmethod
    def _levels(blocks: nn.ModuleList) -> Iterator[_Level]:
        return (level for level in blocks if isinstance(level, _Level))


class _Level(nn.Module):
    """Residual blocks, with or without a transformer after each, and what halves or doubles the latent at the end."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        attend: Sequence[nn.Module],
        downsampler: nn.Module | None = None,
        upsampler: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(attend)
        self.downsampler, self.upsampler = downsampler, upsampler

    def step(self, number: int, x: Tensor, moment: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[number](x, moment)
        if len(self.attentions):
            x = self.attentions[number](x, context)
        return x


class _Residual(nn.Module):
    """x + two convolutions of it, each after a norm and SiLU, told the moment between them; resized before both."""

    def __init__(self, before: int, width: int, moment: int, norm: tuple[int, float], resize: float) -> None:
        super().__init__()
        self.resize = resize
        self.norm1, self.conv1 = nn.GroupNorm(norm[0], before, norm[1]), _conv(before, width, 3)
        self.time_emb_proj = nn.Linear(moment, width)
        self.norm2, self.conv2 = nn.GroupNorm(norm[0], width, norm[1]), _conv(width, width, 3)
        self.skip_connection = nn.Identity() if before == width else _conv(before, width, 1)

    def forward(self, x: Tensor, moment: Tensor) -> Tensor:
        y = self._resized(F.silu(self.norm1(x)))
        y = self.conv1(y) + self.time_emb_proj(F.silu(moment))[..., None, None, None]
        y = self.conv2(F.silu(self.norm2(y)))
        total: Tensor = self.skip_connection(self._resized(x)) + y
        return total

    def _resized(self, x: Tensor) -> Tensor:
        if self.resize == 1:
            return x
        return F.avg_pool3d(x, 2) if self.resize < 1 else F.interpolate(x, scale_factor=2.0, mode="nearest")


class _Transformer(nn.Module):
    """Cells that attend to one another and to the conditions."""

    def __init__(self, width: int, head: int, context: int, layers: int, norm: tuple[int, float]) -> None:
        super().__init__()
        if not head or width % head:
            raise ValueError(f"a level of {width} channels has no heads of {head}")
        self.norm = nn.GroupNorm(norm[0], width, norm[1])
        self.proj_in, self.proj_out = _conv(width, width, 1), _conv(width, width, 1)
        self.transformer_blocks = nn.ModuleList(_Layer(width, width // head, context) for _ in range(layers))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        y = self.proj_in(self.norm(x))
        cells = y.flatten(2).transpose(1, 2)
        for layer in self.transformer_blocks:
            cells = layer(cells, context)
        total: Tensor = x + self.proj_out(cells.transpose(1, 2).reshape(y.shape))
        return total


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.attn1, self.attn2 = _Attention(width, heads, width), _Attention(width, heads, context)
        self.ff = nn.ModuleDict({"linear1": nn.Linear(width, 8 * width), "linear2": nn.Linear(4 * width, width)})
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context)
        value, gate = self.ff["linear1"](self.norm3(x)).chunk(2, dim=-1)
        total: Tensor = x + self.ff["linear2"](value * F.gelu(gate))
        return total


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = nn.Linear(context, width, bias=False), nn.Linear(context, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            one.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for one in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        attended: Tensor = self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return attended


def _sines(moments: Tensor, width: int) -> Tensor:
    """[B] → [B, width]: cosines and sines of the moment, of periods from 2π to 2π · 10,000."""
    half = width // 2
    rates = torch.exp(-math.log(_LONGEST) * torch.arange(half, dtype=torch.float32, device=moments.device) / half)
    angles = moments[:, None].float() * rates
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, width % 2))


def _conv(before: int, width: int, kernel: int) -> nn.Sequential:
    """A convolution that keeps the size, under the name that MONAI's `Convolution` gives it."""
    return nn.Sequential(OrderedDict(conv=nn.Conv3d(before, width, kernel, padding=kernel // 2)))
