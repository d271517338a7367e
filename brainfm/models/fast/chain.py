"""A chain of layers (convolutions, norms, activations, pools) computed together: the same numbers, in fewer passes.

A layer at a time, a map as wide as the volume goes through memory for each of them. Here, channels last,

- what is before a convolution, a norm and its activation, is done to each plane as the convolution reads it, and what
  is after, an activation or a pool, to a few planes as they come: the map between is never there;
- a norm over the volume has its moments from the planes as they are made;
- the convolution itself is Winograd's along z where that is faster, see `winograd`.

Wherever it is not so simple (another device or type, a gradient, a tracer), the layers are called one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainfm.models.fast.winograd import TILE, Winograd4

_SLAB = 1 << 20  # values of a slab, where nothing else says how many planes it has: about what a cache holds
_WINOGRAD_FROM = 3000  # voxels of a map: in a smaller one its kernels' transforms cost more than they save

_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.SiLU)
_NORMS = (nn.BatchNorm3d, nn.InstanceNorm3d, nn.GroupNorm)


class Chained(nn.Module):
    """A module whose forward, or some of it, is a chain of layers.

    Attributes:
        together: Whether the chain is computed together; `for_inference` says so of its copy's.
    """

    together = False

    def through(
        self, layers: Sequence[nn.Module], x: Tensor, added: Tensor | None = None, last: nn.Module | None = None
    ) -> Tensor:
        """`last(layers(x) + added)` of a map [B, C, D, H, W]; nothing of x or `added` is written to."""
        if self.together and is_plain(x):
            return _together([*_leaves(layers)], x, added, last)
        for layer in _leaves(layers):
            # torch's (2.13) GroupNorm of channels-last maps adds up in float32: on a head it is off by percents.
            x = layer(x.contiguous() if isinstance(layer, nn.GroupNorm) else x)
        if added is not None:
            x = x + added
        return x if last is None else cast(Tensor, last(x))


class Chain(Chained, nn.Sequential):
    """A sequence that is one chain."""

    def forward(self, x: Tensor) -> Tensor:
        return self.through([*self], x)


def is_traced() -> bool:
    """Whether torch writes down what is computed."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def is_plain(x: Tensor) -> bool:
    """Whether a map's layers can be computed together: in float32 on a processor, with nobody looking on."""
    wanted = torch.is_grad_enabled() and x.requires_grad
    return x.device.type == "cpu" and x.dtype == torch.float32 and not wanted and not is_traced()


def _leaves(layers: Sequence[nn.Module]) -> Iterator[nn.Module]:
    for layer in layers:
        if isinstance(layer, nn.Sequential):
            yield from _leaves([*layer])
        elif not isinstance(layer, (nn.Identity, nn.Dropout)):
            yield layer


# --- Norms ------------------------------------------------------------------------------------------


class Moments:
    """Mean and squared distance from it of each channel, gathered slab by slab."""

    def __init__(self, batch: int, channels: int) -> None:
        self.count = [0] * batch
        self.mean = torch.zeros(batch, channels, dtype=torch.float64)
        self.squares = torch.zeros(batch, channels, dtype=torch.float64)

    def add(self, volume: int, slab: Tensor) -> None:
        """Values [..., C] of a volume of the batch."""
        values = slab.reshape(-1, slab.shape[-1])
        mean = values.mean(dim=0)
        squares = (values - mean).square_().sum(dim=0)
        have, more = self.count[volume], len(values)
        self.count[volume] = total = have + more
        apart = mean.double() - self.mean[volume]
        self.mean[volume] += apart * (more / total)
        self.squares[volume] += squares.double() + apart**2 * (have * more / total)

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Of maps [B, D, H, W, C]."""
        found = cls(len(x), x.shape[-1])
        for volume, planes in enumerate(x):
            for slab in planes.split(_planes(planes[0])):
                found.add(volume, slab)
        return found


@dataclass
class _Scaling:
    """A norm as each channel's scale and shift, [B, 1, 1, 1, C], and the activation after it."""

    scale: Tensor
    shift: Tensor
    act: nn.Module | None = None

    @classmethod
    def of(cls, norm: Any, batch: int, moments: Moments | None) -> _Scaling:
        if isinstance(norm, nn.BatchNorm3d):
            mean, variance = norm.running_mean.double().expand(batch, -1), norm.running_var.double().expand(batch, -1)
        else:
            assert moments is not None
            groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else moments.mean.shape[1]
            means = moments.mean.unflatten(1, (groups, -1))
            mean = means.mean(dim=2, keepdim=True)
            count = torch.tensor(moments.count, dtype=torch.float64)[:, None, None]
            variance = (moments.squares.unflatten(1, (groups, -1)) / count + (means - mean) ** 2).mean(2, keepdim=True)
            mean, variance = mean.expand_as(means).flatten(1), variance.expand_as(means).flatten(1)
        scale = (variance + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = -mean * scale
        if norm.bias is not None:
            shift = shift + norm.bias
        return cls(*(part.float()[:, None, None, None] for part in (scale, shift)))

    def __call__(self, values: Tensor, volumes: slice, out: Tensor) -> Tensor:
        """Write the values [b, ..., C] of some volumes, as they are after norm and activation, to `out`."""
        torch.addcmul(self.shift[volumes], values, self.scale[volumes], out=out)
        return out if self.act is None else _act(self.act, out)


def _act(layer: nn.Module, x: Tensor) -> Tensor:
    """In place."""
    if isinstance(layer, nn.LeakyReLU):
        return F.leaky_relu_(x, layer.negative_slope)
    return F.silu(x, inplace=True) if isinstance(layer, nn.SiLU) else x.relu_()


def _halves(layer: nn.Module) -> bool:
    """Whether it is a pool of 2×2×2 voxels, which an even number of planes needs no others for."""
    pools = isinstance(layer, (nn.MaxPool3d, nn.AvgPool3d))
    return pools and all(_triple(size) == wanted for size, wanted in
        ((layer.kernel_size, (2, 2, 2)), (layer.stride, (2, 2, 2)), (layer.padding, (0, 0, 0))))


def _triple(size: Any) -> tuple[int, ...]:
    return (size,) * 3 if isinstance(size, int) else tuple(size)


# --- The chain --------------------------------------------------------------------------------------


@dataclass
class _After:
    """What is done to the planes that a convolution makes: activations and pools, a sum, and taking their moments."""

    layers: list[nn.Module] = field(default_factory=list)
    added: Tensor | None = None  # [B, D, H, W, C]
    last: nn.Module | None = None
    moments: Moments | None = None

    def __call__(self, slab: Tensor, volume: int, first: int) -> Tensor:
        """Planes of a volume, [D, H, W, C], the first of which is the `first` of the convolution's."""
        for layer in self.layers:
            if isinstance(layer, _ACTIVATIONS):
                _act(layer, slab)
            elif len(slab) < 2:  # the last plane of an odd number
                return slab[:0]
            else:
                slab = layer(slab.permute(3, 0, 1, 2)[None])[0].permute(1, 2, 3, 0)
        if self.added is not None:
            slab += self.added[volume, first : first + len(slab)]
        if self.last is not None:
            _act(self.last, slab)
        if self.moments is not None:
            self.moments.add(volume, slab)
        return slab

    @property
    def is_idle(self) -> bool:
        return not self.layers and self.added is None and self.last is None and self.moments is None


def _together(layers: list[nn.Module], x: Tensor, added: Tensor | None, last: nn.Module | None) -> Tensor:
    """The chain of a map; between a convolution and the next it is as its norm will scale it."""
    maps = x.permute(0, 2, 3, 4, 1)
    ours, scaling, moments = False, None, None  # whether the map may be written to; what is still to be done to it
    if added is not None:
        added = added.permute(0, 2, 3, 4, 1)
    while layers:
        layer = layers.pop(0)
        if isinstance(layer, _NORMS):
            maps, ours = _finished(maps, scaling, ours)
            if moments is None and not isinstance(layer, nn.BatchNorm3d):
                moments = Moments.of(maps)
            scaling = _Scaling.of(layer, len(maps), moments)
            if layers and isinstance(layers[0], _ACTIVATIONS):
                scaling.act = layers.pop(0)
        elif isinstance(layer, nn.Conv3d):
            after = _After()
            while layers and (isinstance(layers[0], _ACTIVATIONS) or _halves(layers[0])):
                after.layers.append(layers.pop(0))
            if not layers:
                after.added, after.last, added, last = added, last, None, None
            elif isinstance(layers[0], (nn.InstanceNorm3d, nn.GroupNorm)):
                after.moments = Moments(len(maps), layer.out_channels)
            maps = _convolved(maps, layer, scaling, after)
            ours, scaling, moments = True, None, after.moments
        else:
            maps, ours = _finished(maps, scaling, ours)
            if isinstance(layer, _ACTIVATIONS):
                maps = _act(layer, maps if ours else maps.clone())
            else:
                maps = layer(maps.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
            ours, scaling, moments = True, None, None
    if scaling is not None or added is not None or last is not None:
        maps = _ended(maps, scaling, ours, added, last)
    return maps.permute(0, 4, 1, 2, 3)


def _finished(maps: Tensor, scaling: _Scaling | None, ours: bool) -> tuple[Tensor, bool]:
    """The map after its norm, and whether it may be written to."""
    return (maps, ours) if scaling is None else (_ended(maps, scaling, ours), True)


def _ended(
    maps: Tensor, scaling: _Scaling | None, ours: bool, added: Tensor | None = None, last: nn.Module | None = None
) -> Tensor:
    """The map after its norm, a sum, and a last activation, in place where it may be."""
    out = maps if ours else torch.empty_like(maps, memory_format=torch.contiguous_format)
    for volume in range(len(maps)):
        for some in torch.arange(maps.shape[1]).split(_planes(maps[0, 0])):
            place = slice(volume, volume + 1), slice(int(some[0]), int(some[-1]) + 1)
            values = out[place]
            if scaling is not None:
                scaling(maps[place], place[0], values)
            elif not ours:
                values.copy_(maps[place])
            if added is not None:
                values += added[place]
            if last is not None:
                _act(last, values)
    return out


def _planes(plane: Tensor) -> int:
    """How many planes make a slab, an even number."""
    return max(2, _SLAB // max(1, plane.numel()) // 2 * 2)


# --- Convolutions -----------------------------------------------------------------------------------


def _convolved(maps: Tensor, conv: nn.Conv3d, before: _Scaling | None, after: _After) -> Tensor:
    """A convolution [B, D, H, W, C] → the same of its outputs, with what is before and after it."""
    slabs = None
    if conv.groups == 1 and set(conv.dilation) == {1} and conv.padding_mode == "zeros":
        if set(conv.kernel_size) == set(conv.stride) == {1}:
            slabs = _pointwise
        elif len(set(conv.kernel_size)) == 1 and conv.in_channels <= 3 and conv.kernel_size[0] <= 7:
            slabs = _of_few_channels
        elif set(conv.kernel_size) == {3} and set(conv.stride) == set(conv.padding) == {1}:
            slabs = _winograd if math.prod(maps.shape[1:4]) >= _WINOGRAD_FROM else None
    if slabs is None:
        if before is not None:
            maps = _ended(maps, before, ours=False)
        made = F.conv3d(
            maps.permute(0, 4, 1, 2, 3), conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
        ).permute(0, 2, 3, 4, 1)
        if after.is_idle:
            return made
        return torch.stack([after(planes, volume, 0) for volume, planes in enumerate(made)])
    out: Tensor | None = None
    for volume in range(len(maps)):
        done = first = 0
        for slab in slabs(maps, volume, conv, before):
            planes = len(slab)
            slab = after(slab, volume, first)
            if not len(slab):
                break
            if out is None:
                size = _size_after(conv, after, maps.shape[1:4])
                out = maps.new_empty(len(maps), *size, slab.shape[-1])
            out[volume, done : done + len(slab)] = slab
            first, done = first + planes, done + len(slab)
    assert out is not None
    return out


def _size_after(conv: nn.Conv3d, after: _After, size: Sequence[int]) -> tuple[int, ...]:
    x = torch.empty(1, conv.in_channels, *size, device="meta")
    weight = torch.empty(conv.weight.shape, device="meta")
    x = F.conv3d(x, weight, None, conv.stride, conv.padding)
    for layer in after.layers:
        x = layer(x) if _halves(layer) else x
    return tuple(x.shape[2:])


def _pointwise(maps: Tensor, volume: int, conv: nn.Conv3d, before: _Scaling | None) -> Iterator[Tensor]:
    weight = conv.weight.flatten(1)
    for slab in maps[volume].split(_planes(maps[0, 0])):
        if before is not None:
            slab = before(slab[None], slice(volume, volume + 1), torch.empty_like(slab[None]))[0]
        yield F.linear(slab, weight, conv.bias)


def _of_few_channels(maps: Tensor, volume: int, conv: nn.Conv3d, before: _Scaling | None) -> Iterator[Tensor]:
    """As a convolution of planes, whose channels are the planes under the kernel."""
    x = maps[volume : volume + 1]
    if before is not None:
        x = before(x, slice(volume, volume + 1), torch.empty_like(x))
    kernel, stride, margin = conv.kernel_size[0], conv.stride[0], conv.padding
    assert not isinstance(margin, str)
    x = F.pad(x[0].permute(0, 3, 1, 2), (0, 0) * 3 + (margin[0],) * 2)  # [D, C, H, W]
    weight = conv.weight.transpose(1, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)
    windows = x.unfold(0, kernel, stride).permute(0, 4, 1, 2, 3)  # [outputs, kernel, C, H, W]
    for some in windows.split(TILE):
        yield F.conv2d(some.flatten(1, 2), weight, conv.bias, conv.stride[1:], margin[1:]).permute(0, 2, 3, 1)


def _winograd(maps: Tensor, volume: int, conv: nn.Conv3d, before: _Scaling | None) -> Iterator[Tensor]:
    _, depth, rows, columns, channels = maps.shape
    way, volumes = Winograd4(conv), slice(volume, volume + 1)
    # Each plane with a border of 0, which saves the convolution its own; of the 6 two stay for the next slab.
    ring = maps.new_zeros(TILE + 2, 1, rows + 2, columns + 2, channels).unbind()
    nothing = torch.zeros_like(ring[0])

    def bordered(z: int) -> Tensor:
        if not 0 <= z < depth:
            return nothing
        plane = ring[z % len(ring)]
        inside = plane[:, 1:-1, 1:-1]
        if before is None:
            inside.copy_(maps[volumes, z])
        else:
            before(maps[volumes, z : z + 1], volumes, inside[:, None])
        return plane

    held = [bordered(z) for z in (-1, 0)]
    for first in range(0, depth, TILE):
        count = min(TILE, depth - first)
        held += [bordered(z) for z in range(first + 1, first + count + 1)]
        slab = maps.new_empty(1, count, rows, columns, conv.out_channels)
        way(held, slab)
        yield slab[0]
        held = held[-2:]
