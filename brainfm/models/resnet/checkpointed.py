"""Training in little memory: the parts of a ResNet with their backward passes written out.

A stem (convolution, BatchNorm, ReLU, max-pool) goes by slabs, and its full-size activation never exists. A norm with a
scale above 0, as ReLU, keeps the order of voxels, so that max-pool may come before both: the largest voxel of a window
is the same one. One pass over slabs of the volume therefore gives the pooled convolution and the moments that BatchNorm
needs, and what is left is done at an eighth of the size. The backward pass computes each slab again.

A residual block keeps its input, and the moments of its norms. The backward pass computes the block's convolutions
again and writes gradients over them; what norms, ReLUs and a convolution's backward pass need beside is there by slabs.

Outputs, gradients and running statistics are those of the modules called in turn, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_weight, conv3d_input, conv3d_weight
from torch.nn.modules.batchnorm import _BatchNorm

_STEM_BYTES = 2**26  # of a slab of the stem's convolution; the backward pass has some three such tensors at a time
_SLAB_BYTES = 2**22  # of a slab of a block's maps: so little is at hand for the allocator, and in the cache
_SLAB_BYTES_GPU = 2**25  # where each slab costs launches instead
_SLAB_PLANES = 4  # of a convolution's output, at least, as what is under its kernel overlaps
_CHANNELS = (0, 2, 3, 4)  # all axes but that of the channels

_Slab = tuple[slice, slice, slice]  # some planes of a map, as its index


def pooled_stem(
    x: Tensor, conv: nn.Conv3d, norm: _BatchNorm, slab_bytes: int = _STEM_BYTES
) -> tuple[Tensor, Tensor, Tensor]:
    """What is left to do of `max_pool3d(relu(norm(conv(x))), 3, stride=2, padding=1)`: `relu(scale · pooled + shift)`.

    Where a scale of the norm is exactly 0, all voxels of a window tie: its gradient is that of the largest one, and
    not, as that of max-pool, of the first.

    Args:
        x: [B, in_chans, D, H, W].
        conv: Of stride 1 and odd kernel, padded to keep every voxel, without a bias.
        norm: BatchNorm3d or SyncBatchNorm, in training or eval mode; it counts the batch.
        slab_bytes: Of the convolution's output that is there at a time, at least.

    Returns:
        The pooled convolution [B, C, ⌈D/2⌉, ⌈H/2⌉, ⌈W/2⌉], in the memory format of the convolution's weight, and by
        channel [C] what it is to be multiplied by, and what is to be added.
    """
    # By its strides: a weight of one input channel is in both formats.
    layout = torch.channels_last_3d if conv.weight.stride(1) == 1 else torch.contiguous_format
    sign = torch.where(norm.weight < 0, -1.0, 1.0).to(norm.weight)
    weight = conv.weight * sign[:, None, None, None, None]  # the scale is above 0 now
    x = _as_autocast(x)
    with torch.autocast(x.device.type, enabled=False):
        pooled, mean, variance = _PooledConvolution.apply(  # type: ignore[no-untyped-call]
            x, weight.to(x.dtype), slab_bytes, layout
        )
        scale, shift = _scale_and_shift(norm, mean * sign, variance, x.numel() // x.shape[1])
        return pooled, scale * sign, shift


def residual_block(block: Any, x: Tensor, *scale_and_shift: Tensor) -> Tensor:
    """`block(x)` of a block of MONAI's, of which x alone is kept for the backward pass.

    Args:
        block: Its norms are BatchNorm3d or SyncBatchNorm, in training or eval mode; they count the batch.
        x: [B, C, D, H, W].
        scale_and_shift: With what `pooled_stem` gives, x is not yet scaled, shifted, and above 0.
    """
    numbers = [number for number in (1, 2, 3) if hasattr(block, f"conv{number}")]
    path = [(getattr(block, f"conv{number}"), getattr(block, f"bn{number}")) for number in numbers]
    shortcut = [] if block.downsample is None else [tuple(block.downsample)]
    weights = [w for conv, norm in path + shortcut for w in (conv.weight, conv.bias, norm.weight, norm.bias)]
    x = _as_autocast(x)
    with torch.autocast(x.device.type, enabled=False):
        return _ResidualBlock.apply(  # type: ignore[no-any-return, no-untyped-call]
            path, shortcut, x, *(scale_and_shift or (None, None)), *weights
        )


def _as_autocast(x: Tensor) -> Tensor:
    """A tensor in the type that a convolution takes under autocast, where that is on."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


@dataclass(frozen=True, eq=False)
class _Norm:
    """A norm as it is applied to one batch.

    Attributes:
        scale: [C], as the others.
        shift: To be added.
        mean: Of its input.
        rstd: 1 / the standard deviation.
        voxels: The moments were taken over, on all processes; None where they are not those of the input.
        group: The processes, where there are several.
    """

    scale: Tensor
    shift: Tensor
    mean: Tensor
    rstd: Tensor
    voxels: Tensor | None = None
    group: Any = None

    def __call__(self, x: Tensor) -> Tensor:
        """The output, computed in the widest of the types, in that of x."""
        factor = self.scale * self.rstd
        shift = self.shift - self.mean * factor
        return torch.addcmul(_by_channel(shift), x.to(factor.dtype), _by_channel(factor)).to(x.dtype)

    def backward(self, gradient: Tensor, x: Tensor, out: Tensor, shown: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The gradient of the output, where it is `shown`, → that of x, in `out`, and those of scale and shift.

        `out` may be x or the gradient.
        """
        mean, rstd, factor = map(_by_channel, (self.mean, self.rstd, self.scale * self.rstd))
        of_scale, of_shift = torch.zeros_like(self.mean), torch.zeros_like(self.mean)
        for slab in _slabs(x):
            g = _at(gradient, slab, shown)
            of_shift += g.sum(dim=_CHANNELS, dtype=of_shift.dtype)
            of_scale += (x[slab] - mean).mul_(g).sum(dim=_CHANNELS)
        of_scale *= self.rstd
        if self.voxels is None:
            for slab in _slabs(x):
                out[slab] = _at(gradient, slab, shown) * factor
            return of_scale, of_shift
        sums = torch.stack([of_scale, of_shift])
        if self.group is not None:
            dist.all_reduce(sums, group=self.group)
        along, level = map(_by_channel, sums / self.voxels)
        # factor · (g - level - along · rstd · (x - mean)), in as few passes as can be
        slope, level = factor * along * rstd, factor * (level - along * rstd * mean)
        for slab in _slabs(x):
            out[slab] = (_at(gradient, slab, shown) * factor).sub_(x[slab] * slope).sub_(level)
        return of_scale, of_shift


@dataclass(frozen=True, eq=False)
class _Map:
    """A tensor, and what is still to be done to it."""

    z: Tensor
    norm: _Norm | None = None
    relu: bool = True

    def __getitem__(self, slab: _Slab) -> Tensor:
        """Some planes, of z itself where there is no norm."""
        if self.norm is None:
            return self.z[slab]
        done = self.norm(self.z[slab])
        return done.relu_() if self.relu else done


_Layers = Sequence[tuple[nn.Conv3d, _BatchNorm | _Norm]]


class _Moments:
    """Mean and biased variance by channel, [C] in float32 or wider, of voxels that come in parts."""

    def __init__(self, channels: int, like: Tensor) -> None:
        self.count = 0
        self.mean = like.new_zeros(channels, dtype=torch.promote_types(like.dtype, torch.float32))
        self._squares = torch.zeros_like(self.mean)

    def add(self, x: Tensor) -> None:
        """Chan, Golub and LeVeque 1983: the moments of two sets of voxels together."""
        for slab in _slabs(x):
            part = x[slab]
            more = part.numel() // x.shape[1]
            centre = part.sum(dim=_CHANNELS, dtype=self.mean.dtype) / more
            squares = (part - _by_channel(centre)).square_().sum(dim=_CHANNELS)
            away, fraction = centre - self.mean, more / (self.count + more)
            self.mean = self.mean + away * fraction
            self._squares += squares + away.square() * (self.count * fraction)
            self.count += more

    @property
    def variance(self) -> Tensor:
        return self._squares / self.count


@torch.no_grad()
def _norm_of(x: Tensor, norm: _BatchNorm) -> _Norm:
    """A norm as it is applied to x; in training it counts the batch."""
    if not _takes_moments(norm):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        return _Norm(norm.weight, norm.bias, norm.running_mean, (norm.running_var + norm.eps).rsqrt())
    moments = _Moments(x.shape[1], x)
    moments.add(x)
    mean, variance, voxels = _joined(norm, moments.mean, moments.variance, moments.count)
    return _Norm(norm.weight, norm.bias, mean, (variance + norm.eps).rsqrt(), voxels, _group(norm))


def _takes_moments(norm: _BatchNorm) -> bool:
    return norm.training or norm.running_mean is None or norm.running_var is None


def _scale_and_shift(norm: _BatchNorm, mean: Tensor, variance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What a BatchNorm multiplies each channel by, and adds to it; gradients pass to the moments of its input."""
    if _takes_moments(norm):
        mean, variance, _ = _joined(norm, mean, variance, count)
    else:
        mean, variance = norm.running_mean, norm.running_var  # type: ignore[assignment]
    scale = norm.weight * (variance + norm.eps).rsqrt()
    return scale, norm.bias - mean * scale


def _joined(norm: _BatchNorm, mean: Tensor, variance: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of `count` voxels → those of all processes, where the norm is a SyncBatchNorm, and of how many voxels.

    The norm's running statistics count the batch.
    """
    voxels, group = mean.new_tensor(count), _group(norm)
    if group is not None:
        mean, variance, voxels = _over_processes(mean, variance, voxels, group)
    if norm.training and norm.running_mean is not None:
        count_batch(norm, mean, variance * (voxels / (voxels - 1)))
    return mean, variance, voxels


def _group(norm: _BatchNorm) -> Any:
    """The processes over which a norm takes its statistics; None where it is this one alone."""
    if not hasattr(norm, "process_group") or not dist.is_initialized():
        return None
    group: Any = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


@torch.no_grad()
def count_batch(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Add a batch's mean and unbiased variance [C] to the running statistics of a norm."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked += 1
    factor = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean), factor)
    norm.running_var.lerp_(variance.to(norm.running_var), factor)


def _over_processes(mean: Tensor, variance: Tensor, voxels: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The moments of all processes' voxels together, and how many those are; gradients pass between processes."""
    from torch.distributed.nn.functional import all_reduce

    total = voxels.clone()
    dist.all_reduce(total, group=group)
    fraction = voxels / total
    joined: Tensor = all_reduce(mean * fraction, group=group)  # type: ignore[no-untyped-call]
    pooled: Tensor = all_reduce((variance + (mean - joined).square()) * fraction, group=group)  # type: ignore[no-untyped-call]
    return joined, pooled, total


class _PooledConvolution(torch.autograd.Function):
    """x, weight → max_pool3d(conv3d(x, weight), 3, stride=2, padding=1), and by channel the moments before it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, slab_bytes: int, layout: torch.memory_format
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        size = [(n + 1) // 2 for n in x.shape[2:]]
        pooled = torch.empty(len(x), len(weight), *size, dtype=x.dtype, device=x.device, memory_format=layout)
        x, moments = F.pad(x, _sides(weight)), _Moments(len(weight), x)
        for first, last in _windows(x, weight, slab_bytes):
            seen, new = _seen(x, weight, first, last)
            z = _convolved_planes(planes_under(x[seen], weight.shape[2]), weight, len(x))
            pooled[:, :, first:last] = _pooled(z, new, last - first)
            moments.add(z[:, :, new:])
        ctx.slab_bytes, ctx.count, ctx.mean = slab_bytes, moments.count, moments.mean
        return pooled, moments.mean, moments.variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_pooled, of_mean, of_variance = gradients
        x, weight = ctx.saved_tensors
        x, mean = F.pad(x, _sides(weight)), ctx.mean
        of_x = torch.zeros_like(x, dtype=mean.dtype) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight, dtype=mean.dtype)
        through_moments = bool(of_mean.any() or of_variance.any())  # not where the norm is in eval mode
        mean, level, slope = map(_by_channel, (mean, of_mean / ctx.count, of_variance * 2 / ctx.count))
        for first, last in _windows(x, weight, ctx.slab_bytes):
            seen, new = _seen(x, weight, first, last)
            under = planes_under(x[seen], weight.shape[2])
            z = _convolved_planes(under, weight, len(x)).requires_grad_()
            with torch.enable_grad():
                pooled = _pooled(z, new, last - first)
            (of_z,) = torch.autograd.grad(pooled, z, of_pooled[:, :, first:last])
            if through_moments:
                z, of_new = z.detach()[:, :, new:], of_z[:, :, new:]
                for slab in _slabs(z):
                    of_new[slab] += (z[slab] - mean).mul_(slope).add_(level)
            if of_x is not None:
                of_x[seen] += conv3d_input(x[seen].shape, weight, of_z)  # type: ignore[no-untyped-call]
            of_z = of_z.transpose(1, 2).flatten(0, 1)
            of_weight += conv2d_weight(under, weight.flatten(1, 2).shape, of_z).view_as(weight)  # type: ignore[no-untyped-call]
        if of_x is not None:
            of_x = F.pad(of_x, [-side for side in _sides(weight)]).to(x.dtype)
        return of_x, of_weight.to(weight.dtype), None, None


def _sides(weight: Tensor) -> list[int]:
    """What `F.pad` is to add for a convolution that keeps every voxel."""
    return [side for kernel in reversed(weight.shape[2:]) for side in 2 * [kernel // 2]]


def _windows(x: Tensor, weight: Tensor, slab_bytes: int) -> Iterator[tuple[int, int]]:
    """First window and the one after the last, along z, of the max-pool's windows of each slab."""
    depth, height, width = (n - kernel + 1 for n, kernel in zip(x.shape[2:], weight.shape[2:], strict=True))
    windows = (depth + 1) // 2
    step = max(1, slab_bytes // (2 * len(x) * len(weight) * height * width * x.element_size()))
    return ((first, min(first + step, windows)) for first in range(0, windows, step))


def _seen(x: Tensor, weight: Tensor, first: int, last: int) -> tuple[_Slab, int]:
    """The planes of padded x that windows `first` … `last` − 1 of the max-pool see.

    Window n sees planes 2n − 1 … 2n + 1 of the convolution, as far as they are there. The second value is how many of
    all these windows' planes the window before sees too.
    """
    reach = weight.shape[2] - 1
    low, high = max(2 * first - 1, 0), min(2 * last, x.shape[2] - reach)
    return _planes(low, high + reach), 2 * first - low


def planes_under(x: Tensor, kernel: int) -> Tensor:
    """Padded planes [B, C, D, H, W] → [B · outputs along z, C · planes under the kernel, H, W], channels last.

    A convolution of these planes, by `weight.flatten(1, 2)`, is that of the volume; with few input channels it is the
    faster way to compute the same.
    """
    under = x.unfold(2, kernel, 1).permute(0, 2, 3, 4, 1, 5)
    return under.flatten(4).flatten(0, 1).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def _convolved_planes(under: Tensor, weight: Tensor, batch: int) -> Tensor:
    """[B, C, D, H, W], the convolution of what `planes_under` gives."""
    z = F.conv2d(under, weight.flatten(1, 2))
    return z.view(batch, -1, *z.shape[1:]).transpose(1, 2)


def _pooled(z: Tensor, new: int, windows: int) -> Tensor:
    """The largest voxels of windows; before the first plane of the volume, and after an odd last one, is nothing."""
    ends = 1 - new, 2 * windows + new - z.shape[2]
    if any(ends):
        z = F.pad(z, (0, 0, 0, 0, *ends), value=float("-inf"))
    return F.max_pool3d(z, 3, 2, (0, 1, 1))


class _ResidualBlock(torch.autograd.Function):
    """Layers of the path and of the shortcut, x, what scales and shifts it, the layers' weights → a block's output.

    The weights are given so that autograd knows of them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        path: _Layers,
        shortcut: _Layers,
        x: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        *weights: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, shift, *weights)
        start = _start(x, scale, shift)
        maps, beside = _maps(start, path), _maps(start, shortcut)
        ctx.path, ctx.shortcut = _as_applied(path, maps), _as_applied(shortcut, beside)
        y = maps[-1].z
        for slab in _slabs(y):
            y[slab] = maps[-1][slab].add_(beside[-1][slab]).relu_()
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (gradient,), (x, scale, shift, *_) = gradients, ctx.saved_tensors
        start = _start(x, scale, shift)
        maps, beside = _maps(start, ctx.path), _maps(start, ctx.shortcut)
        shown = torch.empty_like(maps[-1].z, dtype=torch.bool)
        for slab in _slabs(maps[-1].z):
            shown[slab] = maps[-1][slab].add_(beside[-1][slab]) > 0
        wanted = ctx.needs_input_grad[5::4]  # of the layers' convolutions; frozen ones are spared the work
        of_x, of_weights = _through_layers(gradient, shown, maps, ctx.path, wanted)
        if ctx.shortcut:
            of_weights += _through_layers(gradient, shown, beside, ctx.shortcut, wanted[len(ctx.path) :], of_x)[1]
        else:
            for slab in _slabs(x):
                g = _at(gradient, slab, shown)
                of_x[slab] += g if start.norm is None else g * (start[slab] > 0)
        of_start = (None, None) if start.norm is None else start.norm.backward(of_x, x, of_x)
        return None, None, of_x, *of_start, *of_weights


def _start(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> _Map:
    """What a block takes."""
    if scale is None or shift is None:
        return _Map(x)
    return _Map(x, _Norm(scale, shift, torch.zeros_like(scale), torch.ones_like(scale)))


def _maps(start: _Map, layers: _Layers) -> list[_Map]:
    """What the first layer takes, and what each gives; after the last there is no ReLU."""
    maps = [start]
    for conv, norm in layers:
        z = _convolved(maps[-1], conv)
        maps.append(_Map(z, norm if isinstance(norm, _Norm) else _norm_of(z, norm), relu=len(maps) < len(layers)))
    return maps


def _as_applied(layers: _Layers, maps: Sequence[_Map]) -> list[tuple[nn.Conv3d, _Norm | None]]:
    """Layers, with their norms as they were applied to a batch."""
    return [(conv, after.norm) for (conv, _), after in zip(layers, maps[1:], strict=True)]


def _through_layers(
    gradient: Tensor,
    shown: Tensor,
    maps: list[_Map],
    layers: _Layers,
    wanted: Sequence[bool],
    onto: Tensor | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """The gradient of what layers give, where it is `shown` → that of what they take, and those of their weights.

    Those of convolutions are computed where they are wanted. The first is added to `onto`, where that is given. The
    maps are used up, and written over.
    """
    found: list[Tensor | None] = []
    after = maps.pop()
    of_z = after.z
    of_norm = _known(after.norm).backward(gradient, of_z, of_z, shown)
    for number, (conv, _) in reversed(list(enumerate(layers))):
        before = maps.pop()
        into = of_z if of_z.shape == before.z.shape else torch.empty_like(before.z)
        if onto is not None and not maps:
            into = onto
        of_conv = _through_convolution(of_z, before, conv, into, wanted[number], add=into is onto)
        found[:0] = [*of_conv, *of_norm]
        if maps:
            of_norm = _known(before.norm).backward(into, before.z, into)
        of_z = into
    return of_z, found


def _convolved(x: _Map, conv: nn.Conv3d) -> Tensor:
    """`conv(x)`, in the memory format of x."""
    weight, bias = conv.weight.to(x.z.dtype), None if conv.bias is None else conv.bias.to(x.z.dtype)
    last = x.z.is_contiguous(memory_format=torch.channels_last_3d)
    layout = torch.channels_last_3d if last else torch.contiguous_format
    shape = (len(x.z), conv.out_channels, *_size(x.z, conv))
    z = torch.empty(shape, dtype=x.z.dtype, device=x.z.device, memory_format=layout)
    for planes, _, y in _inputs(x, conv):
        z[:, :, planes] = F.conv3d(y, weight, bias, conv.stride, (0, *conv.padding[1:]))
    return z


def _through_convolution(
    gradient: Tensor, x: _Map, conv: nn.Conv3d, of_x: Tensor, wanted: bool, add: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of `conv(x)` → those of its weight, where it is wanted, and bias.

    That of x before a ReLU is written to `of_x`, or added to it. `of_x` may be the gradient: planes are written when no
    later slab needs those of the gradient.
    """
    weight = conv.weight.to(gradient.dtype)
    wide = torch.promote_types(weight.dtype, torch.float32)
    of_weight = torch.zeros_like(weight, dtype=wide)
    of_bias = None if conv.bias is None else gradient.sum(dim=_CHANNELS, dtype=wide).to(conv.bias.dtype)
    geometry = conv.stride, (0, *conv.padding[1:])
    shared = max(conv.kernel_size[0] - conv.stride[0], 0)  # planes under the kernel that the next slab sees too
    held: Tensor | float = 0
    for planes, low, y in _inputs(x, conv):
        g = gradient[:, :, planes]
        if wanted:
            of_weight += _weight_gradient(y, weight.shape, g, *geometry)
        of_y = conv3d_input(y.shape, weight, g, *geometry)  # type: ignore[no-untyped-call]
        of_y[:, :, :shared] += held
        ready = y.shape[2] - shared
        held = of_y[:, :, ready:].clone()
        if planes.stop == gradient.shape[2]:
            ready = y.shape[2]
        if x.norm is not None:
            of_y *= y > 0
        into = slice(max(low, 0), min(low + ready, of_x.shape[2]))
        done = of_y[:, :, into.start - low : into.stop - low]
        of_x[:, :, into] = done.add_(of_x[:, :, into]) if add else done
    return of_weight.to(conv.weight.dtype) if wanted else None, of_bias


def _size(x: Tensor, conv: nn.Conv3d) -> list[int]:
    """Depth, height and width of a convolution's output."""
    sizes = zip(x.shape[2:], map(int, conv.padding), conv.kernel_size, conv.stride, strict=True)
    return [(n + 2 * padding - kernel) // stride + 1 for n, padding, kernel, stride in sizes]


def _inputs(x: _Map, conv: nn.Conv3d) -> Iterator[tuple[slice, int, Tensor]]:
    """By slabs: planes of a convolution's output; the first plane under its kernel; and those planes, padded."""
    (kernel, *_), (stride, *_), padding, depth = conv.kernel_size, conv.stride, int(conv.padding[0]), x.z.shape[2]
    count, step = _size(x.z, conv)[0], max(_SLAB_PLANES, _slab_planes(x.z) // stride)
    for first in range(0, count, step):
        last = min(first + step, count)
        low, high = first * stride - padding, last * stride - padding + max(kernel - stride, 0)
        y = x[_planes(max(low, 0), min(high, depth))]
        ends = max(-low, 0), max(high - depth, 0)
        yield slice(first, last), low, F.pad(y, (0, 0, 0, 0, *ends)) if any(ends) else y


def _weight_gradient(x: Tensor, shape: torch.Size, gradient: Tensor, stride: Any, padding: Any) -> Tensor:
    """Of a convolution's weight."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        x, gradient = x.contiguous(), gradient.contiguous()  # for channels last oneDNN takes twice as long, and more
    return conv3d_weight(x, shape, gradient, stride, padding)  # type: ignore[no-any-return, no-untyped-call]


def _by_channel(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _planes(first: int, last: int) -> _Slab:
    return slice(None), slice(None), slice(first, last)


def _slab_planes(x: Tensor) -> int:
    slab_bytes = _SLAB_BYTES if x.device.type == "cpu" else _SLAB_BYTES_GPU
    return max(1, slab_bytes * x.shape[2] // (x.numel() * x.element_size()))


def _slabs(x: Tensor) -> Iterator[_Slab]:
    """Some planes at a time, so that what is computed in between is small."""
    step = _slab_planes(x)
    return (_planes(first, first + step) for first in range(0, x.shape[2], step))


def _at(gradient: Tensor, slab: _Slab, shown: Tensor | None) -> Tensor:
    """Some planes of a gradient, where it is shown."""
    return gradient[slab] if shown is None else gradient[slab] * shown[slab]


def _known(norm: _Norm | None) -> _Norm:
    assert norm is not None
    return norm
