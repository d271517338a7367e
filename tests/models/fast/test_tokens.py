"""Patches and tokens in copies for inference: the same numbers from less work, and what is done is said."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import brainfm
from brainfm.models.fast.patches import embedded
from brainfm.models.minit import MiNiT
from brainfm.models.vit import Mlp, VisionTransformer

READS_FIRST = "last block for the token that is read (unless traced)"


def randomised(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return module.eval()


def volumes(*shape: int) -> torch.Tensor:
    """Noise, of which the first third along z is exactly 0, as beside a brain."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    x[:, :, : shape[2] // 3] = 0
    return x


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


ENCODERS = {
    "token": lambda: VisionTransformer(24, 3, 3, img_size=(12, 9, 8), patch_size=(4, 3, 4)),
    "without a bias, corner patch": lambda: VisionTransformer(
        24, 2, 2, img_size=(12, 8, 8), patch_size=(4, 4, 4), class_token=False, qkv_bias=False, num_classes=3
    ),
    "of two channels": lambda: VisionTransformer(12, 2, 3, img_size=(12, 8, 8), patch_size=(4, 4, 4), in_chans=2),
    "blocks": lambda: MiNiT(
        24, 4, 3, 19, (1,), img_size=(12, 8, 8), block_size=(4, 4, 4), patch_size=(2, 2, 2), num_classes=2
    ),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_last_block_is_computed_for_the_token_that_is_read(kind, monkeypatch):
    model = randomised(ENCODERS[kind]())
    x = volumes(2, model.in_chans, *model.img_size)
    fast = brainfm.optimize(model)
    assert READS_FIRST in fast.optimizations
    with torch.inference_mode():
        wanted = model(x)
        last = fast.get_submodule(fast.feature_info[-1]["module"])
        with monkeypatch.context() as patched:
            patched.setattr(last, "forward", None)  # it would make all tokens
            assert error(fast(x), wanted) < 1e-6
        assert error(fast.forward_features(x), model.forward_features(x)) < 1e-6
        assert error(fast.dense(x), model.dense(x)) < 1e-6


@pytest.mark.parametrize("pool", ["avg", "fc_norm"])
def test_pooling_over_tokens_needs_all_of_them(pool):
    model = randomised(VisionTransformer(24, 2, 3, img_size=(12, 9, 8), patch_size=(4, 3, 4), global_pool=pool))
    x, fast = volumes(1, 1, 12, 9, 8), brainfm.optimize(model)
    assert READS_FIRST not in fast.optimizations
    with torch.inference_mode():
        assert error(fast(x), model(x)) < 1e-6


def test_copy_with_adapters_or_another_pooling_gives_what_the_encoder_does():
    model = randomised(ENCODERS["token"]())
    x = volumes(1, 1, 12, 9, 8)
    from brainfm.models.adaptation import add_adapters

    add_adapters(model, 4)
    randomised(model)
    fast = brainfm.optimize(model)
    with torch.inference_mode():
        assert error(fast(x), model(x)) < 1e-6
        for each in (model, fast):
            each.reset_classifier(0, global_pool="avg")
        assert error(fast(x), model(x)) < 1e-6


@pytest.mark.parametrize(
    ("channels", "outputs", "patch", "bias"),
    [(1, 8, (4, 3, 2), True), (2, 40, (2, 2, 2), True), (1, 5, (3, 3, 3), False)],
)
def test_patches_by_a_matrix_product_are_those_of_the_convolution(channels, outputs, patch, bias):
    conv = randomised(nn.Conv3d(channels, outputs, patch, patch, bias=bias))
    x = volumes(2, channels, *(3 * n for n in patch))
    for inputs in (x, x.to(memory_format=torch.channels_last_3d), torch.zeros_like(x), x + 1):
        wanted = conv(inputs).movedim(1, -1)
        assert torch.allclose(embedded(inputs, conv), wanted, atol=1e-5)


def test_hidden_zeros_change_nothing_and_are_said():
    mlp = randomised(Mlp(10, 21))
    x = torch.randn(3, 7, 10)
    wanted = mlp(x)
    assert mlp.ready() == Mlp.faster
    assert (mlp.fc1.out_features, mlp.fc2.in_features, mlp.fc1.weight.shape[0]) == (32, 32, 32)
    assert torch.allclose(mlp(x), wanted, atol=1e-6)
    assert mlp.ready() == ""
