"""The streamed forward: what the plain one gives, whatever the size, and wherever the volume is empty."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import brainfm
from brainfm.models.fast.winograd import Direct
from brainfm.models.resnet import ResNet, streamed


def scrambled(model: nn.Module) -> nn.Module:
    """With BatchNorm statistics, scales and biases of either sign, so that an empty volume's map is not 0."""
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.ndim == 1:
                value.copy_(torch.rand(value.shape, generator=draws) + (0.5 if "var" in name else -0.3))
    return model


def small(block: str, **arguments) -> nn.Module:
    torch.manual_seed(0)
    return scrambled(ResNet(block, (2, 2, 1, 1), (8, 16, 24, 32), **arguments)).eval()


def head(shape: tuple[int, int, int], channels: int = 1, batch: int = 1) -> torch.Tensor:
    """Noise in a ball that leaves some of the volume empty."""
    places = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    inside = torch.from_numpy(sum(place**2 for place in places) < 0.5)
    return torch.randn(batch, channels, *shape, generator=torch.Generator().manual_seed(1)) * inside


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def convolve_directly(monkeypatch, planes: int) -> None:
    """As on a GPU: convolutions of torch's own, so many planes at a time."""
    monkeypatch.setattr(streamed, "fastest", Direct)
    monkeypatch.setattr(streamed, "_planes_at_a_time", lambda x, values: planes)


@pytest.mark.parametrize("shape", [(40, 48, 48), (41, 33, 45), (9, 8, 10), (5, 60, 61), (1, 1, 1)])
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("planes", ["of a processor", 4, 8, 1000])
def test_streamed_map_is_the_plain_one(monkeypatch, block, shape, planes):
    model = small(block)
    fast = brainfm.optimize(model)
    if planes != "of a processor":
        convolve_directly(monkeypatch, planes)
    with torch.inference_mode():
        features = fast.forward_features(head(shape))
        assert relative(features, model.forward_features(head(shape))) < 1e-5
        assert torch.equal(features, streamed.streamed_features(fast, head(shape)))  # which is how it was computed
        stem_alone = streamed._streamed(fast, head(shape), streams=0)  # as on a GPU
        assert relative(stem_alone, model.forward_features(head(shape))) < 1e-5


@pytest.mark.parametrize("depth", range(1, 14))
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("sizes", [4, 3, 1])
def test_each_output_gets_the_planes_under_it(depth, stride, kernel, sizes):
    """Planes that hold their own number, in slabs of some size → windows of the right numbers, in order."""
    conv = nn.Conv3d(1, 1, kernel, stride=stride, padding=kernel // 2)
    numbers = torch.arange(1.0, depth + 1)[None, :, None, None, None]
    stream = streamed._Stream(iter(numbers.split(sizes, dim=1)), depth, count=4)
    found = []
    for window in streamed._Windows(stream, conv):
        values = [int(plane) for plane in window]
        outputs = (len(values) - kernel) // stride + 1
        assert 1 <= outputs <= 4
        found += [values[n * stride :][:kernel] for n in range(outputs)]
    padded = [0] * (kernel // 2) + list(range(1, depth + 1)) + [0] * (kernel // 2)
    assert found == [padded[n * stride :][:kernel] for n in range((depth - 1) // stride + 1)]


EMPTY = {
    "nothing": lambda x: x.zero_(),
    "one voxel": lambda x: x.zero_().index_put_(tuple(torch.tensor(n) for n in (0, 0, 20, 30, 11)), torch.tensor(9.0)),
    "one voxel in a corner": lambda x: x.zero_().index_put_(
        tuple(torch.tensor(n) for n in (0, 0, 39, 0, 47)), torch.tensor(9.0)
    ),
    "all but a plane": lambda x: x.mul_(torch.arange(40)[:, None, None] == 17),
    "planes in the middle": lambda x: x.mul_(((torch.arange(40) < 6) | (torch.arange(40) > 33))[:, None, None]),
    "half of it": lambda x: x.mul_(torch.arange(48) < 20),
}


@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("batch", [1, 2])
def test_what_is_known_of_empty_space_is_exact(monkeypatch, empty, batch):
    model = small("basic")
    x = torch.randn(batch, 1, 40, 48, 48, generator=torch.Generator().manual_seed(1))
    EMPTY[empty](x[-1:])  # the other scan of a batch stays full
    fast = brainfm.optimize(model)
    with torch.inference_mode():
        wanted = model.forward_features(x)
        assert relative(fast.forward_features(x), wanted) < 1e-5
        convolve_directly(monkeypatch, 8)
        assert relative(streamed._streamed(fast, x), wanted) < 1e-5  # all of a batch at once, as on a GPU


def test_several_channels_and_a_head():
    model = small("basic", in_chans=3, num_classes=4)
    x = head((40, 48, 48), channels=3)
    with torch.inference_mode():
        assert relative(brainfm.optimize(model)(x), model(x)) < 1e-5


def test_only_what_the_brain_reaches_is_computed(monkeypatch):
    computed = []
    plain = torch.nn.functional.conv2d

    def counting(x, *rest):
        computed.append(x.numel())
        return plain(x, *rest)

    model, full, part = small("basic"), head((64, 64, 64)) + 1, head((64, 64, 64))
    part[..., 24:] = 0
    counts = []
    for x in (full, part):
        computed.clear()
        with torch.inference_mode(), monkeypatch.context() as patched:
            fast = brainfm.optimize(model)
            patched.setattr(torch.nn.functional, "conv2d", counting)
            fast.forward_features(x)
        counts.append(sum(computed))
    assert counts[1] < 0.75 * counts[0]


def test_gradients_of_the_input_take_the_plain_way():
    model, x = small("basic"), head((16, 24, 24)).requires_grad_()
    (wanted,) = torch.autograd.grad(model(x).sum(), x)
    (found,) = torch.autograd.grad(brainfm.optimize(model)(x).sum(), x)
    assert relative(found, wanted) < 1e-4


def test_network_of_ones_own_keeps_its_own_forward():
    class Mine(ResNet):
        def _stage(self, number, x, needed):
            return super()._stage(number, x, needed) if number < 2 else super()._stage(number, x * 2, needed)

    model = scrambled(Mine("basic", (1, 1, 1, 1), (4, 4, 4, 4))).eval()
    fast = brainfm.optimize(model)
    with torch.inference_mode():
        assert relative(fast(head((16, 16, 16))), model(head((16, 16, 16)))) < 1e-5
    assert "BatchNorm folded" in fast.optimizations
    assert not any("slabs" in done for done in fast.optimizations)


def test_gradients_and_intermediates_of_a_traced_copy_take_the_plain_way():
    fast, x = brainfm.optimize(small("basic")), head((16, 24, 24))
    with torch.inference_mode():
        program = torch.export.export(fast, (x,)).module()
        assert relative(program(x), fast(x)) < 1e-5
        final, maps = fast.forward_intermediates(x)
        assert relative(final, fast.forward_features(x)) < 1e-5
        assert torch.equal(maps[-1], final)


def test_bfloat16_is_close_and_no_worse_by_fewer_multiplications(monkeypatch):
    model, x = small("basic"), head((40, 48, 48))
    fast = brainfm.optimize(model, "bfloat16")
    with torch.inference_mode():
        wanted = model(x)
        found = fast(x)
        convolve_directly(monkeypatch, 4)
        direct = fast(x)
    assert torch.cosine_similarity(found, wanted).min() >= 0.9999
    assert relative(found, wanted) < 1.5 * relative(direct, wanted)
