"""Layers computed together: what they give one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from brainfm.models.encoder import Halved
from brainfm.models.fast.chain import Chain, JoiningChain, Moments
from brainfm.models.fast.winograd import Winograd


def conv(before: int, width: int, kernel: int = 3, stride: int = 1, **arguments) -> nn.Conv3d:
    return nn.Conv3d(before, width, kernel, stride, arguments.pop("padding", kernel // 2), **arguments)


def relu() -> nn.Module:
    return nn.ReLU(inplace=True)


CHAINS = {
    "SFCN": lambda: [conv(1, 32), nn.MaxPool3d(2), relu(), conv(32, 24), nn.MaxPool3d(2), relu(), conv(24, 8, 1)],
    "stem of stride 2": lambda: [conv(1, 16, 7, 2), relu(), nn.MaxPool3d(3, 2, 1)],
    "instance norms": lambda: [
        *[conv(2, 32), nn.InstanceNorm3d(32, affine=True), nn.LeakyReLU(inplace=True)],
        *[conv(32, 16), nn.InstanceNorm3d(16, affine=True)],
    ],
    "strided, then an instance norm": lambda: [conv(2, 16, 3, 2), nn.InstanceNorm3d(16), nn.LeakyReLU(0.2)],
    "pooled shortcut": lambda: [Halved(), conv(2, 16, 1, bias=False), nn.InstanceNorm3d(16, affine=True)],
    "group norms first": lambda: [
        *[nn.GroupNorm(1, 2), conv(2, 32, bias=False), nn.LeakyReLU(inplace=True)],
        *[nn.GroupNorm(8, 32), conv(32, 16), nn.SiLU(), nn.GroupNorm(4, 16), nn.SiLU(), conv(16, 8)],
    ],
    "separable": lambda: [
        *[conv(2, 2, groups=2), conv(2, 32, 1), nn.GroupNorm(8, 32), relu()],
        *[conv(32, 32, groups=32), conv(32, 48, 1), nn.GroupNorm(8, 48), relu(), Halved()],
    ],
    "dense layer": lambda: [nn.BatchNorm3d(2), relu(), conv(2, 64, 1), relu(), conv(64, 16)],
    "transition": lambda: [conv(2, 16), nn.BatchNorm3d(16), nn.ReLU(), conv(16, 8, 1), Halved()],
    "dilated": lambda: [conv(2, 16), relu(), conv(16, 16, dilation=2, padding=2), relu()],
    "no convolution": lambda: [nn.GroupNorm(1, 2), nn.SiLU(), nn.MaxPool3d(2)],
    "an activation alone": lambda: [relu()],
    "nothing": list,
}
SIZES = [(2, 17, 22, 19), (1, 16, 16, 16), (2, 5, 4, 7), (1, 23, 40, 6)]


def pair(kind: str) -> tuple[Chain, Chain]:
    """The chain, with numbers that show when they are lost, and a copy that is computed together."""
    torch.manual_seed(0)
    plain = Chain(*CHAINS[kind]()).eval().requires_grad_(False)
    for value in plain.state_dict().values():
        if value.ndim == 1:
            value.copy_(torch.rand_like(value) + 0.5)
    together = Chain(*CHAINS[kind]()).eval().requires_grad_(False)
    together.load_state_dict(plain.state_dict())
    together.to(memory_format=torch.channels_last_3d).together = True
    return plain, together


def volume(kind: str, batch: int, *size: int) -> torch.Tensor:
    """Noise, but for a margin of 0 that is another on each side."""
    first = next((m for m in CHAINS[kind]() if isinstance(m, (nn.Conv3d, nn.BatchNorm3d))), None)
    channels = getattr(first, "in_channels", 2)
    x = torch.zeros(batch, channels, *size)
    inside = x[:, :, 1:-1, 2:, : -(size[2] // 3)]
    inside.copy_(torch.randn(inside.shape, generator=torch.Generator().manual_seed(0)) + 3)
    return x


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.double().norm().clip(1e-6))


@pytest.mark.parametrize("kind", CHAINS)
@pytest.mark.parametrize("size", SIZES)
def test_gives_what_the_layers_give(kind, size):
    plain, together = pair(kind)
    x = volume(kind, *size)
    before = x.clone()
    with torch.inference_mode():
        wanted, found = plain.double()(x.double()), together(x)
        also = together(x.to(memory_format=torch.channels_last_3d))
    assert found.shape == wanted.shape
    assert relative(found, wanted) < 5e-6
    assert relative(also, wanted) < 5e-6
    assert torch.equal(x, before)


@pytest.mark.parametrize("tiles_of_a_slab", [1, 2, 3, 7])
@pytest.mark.parametrize("depth", [29, 31, 32])
def test_slabs_take_no_more_tiles_than_the_map_has(monkeypatch, depth, tiles_of_a_slab):
    """At most so many tiles of 4 planes at a time, the last of which may have fewer planes."""
    taken = []

    class Counted(Winograd):
        def __call__(self, planes, out):
            taken.append(len(out))
            super().__call__(planes, out)

    torch.manual_seed(0)
    layers = [conv(16, 16), nn.InstanceNorm3d(16), nn.LeakyReLU(inplace=True), conv(16, 16)]
    together, x = Chain(*layers).eval().requires_grad_(False), torch.randn(2, 16, depth, 11, 13)
    with torch.inference_mode():
        wanted = together.double()(x.double())
        together.float().ready()
        monkeypatch.setattr("brainfm.models.fast.chain.Winograd", Counted)
        monkeypatch.setattr("brainfm.models.fast.chain._SLAB", tiles_of_a_slab * 4 * 11 * 13 * 16 // 2)
        assert relative(together(x), wanted) < 5e-6
    assert max(taken) <= tiles_of_a_slab
    assert sum(taken) == 2 * len(x) * 8  # of two convolutions


@pytest.mark.parametrize("kind", ["instance norms", "group norms first", "dense layer", "separable", "SFCN", "dilated"])
def test_sum_and_last_activation_come_after_all(kind):
    plain, together = pair(kind)
    x, last = volume(kind, 2, 17, 22, 19), nn.LeakyReLU(0.1, inplace=True)
    with torch.inference_mode():
        added = -plain(x).roll(1, 0)
        kept = added.clone()
        wanted, found = plain.through([*plain], x, added, last), together.through([*together], x, added, last)
    assert relative(found, wanted) < 1e-5
    assert torch.equal(added, kept)


@pytest.mark.parametrize("below", [(2, 8, 11, 9), (2, 9, 11, 10), (2, 3, 2, 19)])
def test_joined_maps_give_what_the_joined_map_gives(below):
    """As in a U-Net: a map, and the one of the level below enlarged to it."""
    _, *size = below
    torch.manual_seed(0)
    layers = nn.GroupNorm(3, 24), conv(24, 16, bias=False), relu(), nn.GroupNorm(8, 16), conv(16, 8), relu()
    plain, together = (JoiningChain(*layers).eval().requires_grad_(False) for _ in range(2))
    together.together = True
    beside = torch.randn(2, 8, 17, 22, 19)
    deep = (torch.randn(2, 16, *size) + 2).to(memory_format=torch.channels_last_3d)
    with torch.inference_mode():
        found = together(deep, beside)
        joined = torch.cat((beside, nn.Upsample(beside.shape[2:])(deep)), dim=1)
        wanted = nn.Sequential(*layers).double()(joined.double())
        assert relative(found, wanted) < 5e-6
        for layer in layers:
            layer.float()
        assert relative(plain(deep, beside), wanted) < 5e-6


@pytest.mark.parametrize("kind", CHAINS)
def test_empty_volume(kind):
    plain, together = pair(kind)
    x = torch.zeros_like(volume(kind, 2, 17, 22, 19))
    with torch.inference_mode():
        wanted, found = plain.double()(x.double()), together(x)
    assert relative(found, wanted) < 5e-6


@pytest.mark.parametrize("kind", CHAINS)
def test_gradient_passes_through_as_it_does_layer_by_layer(kind):
    plain, together = pair(kind)
    found = []
    for chain in (plain, together):
        x = volume(kind, 1, 9, 10, 11).requires_grad_()
        (gradient,) = torch.autograd.grad(chain(x * 1.0).square().sum(), x)
        found.append(gradient)
    assert relative(found[1], found[0]) < 1e-4


def test_half_precision_is_computed_layer_by_layer():
    plain, together = pair("group norms first")
    x = volume("group norms first", 1, 9, 10, 11).bfloat16()
    with torch.inference_mode():
        assert relative(together.bfloat16()(x), plain(x.float())) < 5e-2


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_traced_chain_takes_other_sizes():
    plain, together = pair("SFCN")
    traced = torch.jit.trace(together, volume("SFCN", 1, 9, 10, 11))
    x = volume("SFCN", 2, 17, 22, 19)
    with torch.inference_mode():
        assert relative(traced(x), plain(x)) < 1e-5


def test_moments_are_those_of_all_slabs():
    x = torch.randn(2, 9, 11, 13, 5) * 0.1 + torch.tensor([0.0, 1, 10, 100, -1000])
    moments = Moments(2, 5)
    for volume_number, planes in enumerate(x):
        for slab in planes.split(2):
            moments.add(volume_number, slab)
    wide = x.double().flatten(1, 3)
    torch.testing.assert_close(moments.mean, wide.mean(dim=1), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(moments.squares, ((wide - wide.mean(1, keepdim=True)) ** 2).sum(1), rtol=1e-4, atol=0)
    assert moments.count == [9 * 11 * 13] * 2


def test_layers_of_a_plain_network_are_called_as_modules():
    """So that hooks on any of them are called, in a chain within a chain too."""
    chain, called = Chain(Chain(conv(2, 4), relu()), nn.Sequential(conv(4, 2))).eval(), []
    for name, module in chain.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    chain(torch.randn(1, 2, 5, 5, 5))
    assert called == ["0.0", "0.1", "0", "1.0", "1", ""]
