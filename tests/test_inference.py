"""`optimize`: the same embeddings from a faster copy."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import brainfm
from brainfm.models.encoder import Encoder, stage

SIZES = {"simclr_resnet18_3d": (32, 40, 40), "simclr_resnet50_3d": (32, 40, 40)}


def build(name: str) -> nn.Module:
    """An encoder whose BatchNorm statistics and scales, and every bias, show when they are lost or misplaced."""
    torch.manual_seed(0)
    model = brainfm.create_model(name)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.ndim == 1:
                value.copy_(torch.rand_like(value) + 0.5)
    return model


def volume(name: str) -> torch.Tensor:
    return torch.randn(2, 1, *SIZES.get(name, (40, 48, 48)), generator=torch.Generator().manual_seed(0))


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("test_resnet_3d", "auto"),
        ("test_resnet_3d", "float32"),
        ("test_resnet_3d", torch.float32),
        ("simclr_resnet18_3d", "auto"),
        ("simclr_resnet50_3d", "auto"),
    ],
)
def test_resnet_gives_the_same_embeddings_without_batch_norm(name, dtype):
    model, x = build(name), volume(name)
    fast = brainfm.optimize(model, dtype)
    assert not any(isinstance(module, nn.BatchNorm3d) for module in fast.modules())
    with torch.inference_mode():
        assert relative(fast(x), model(x)) < 1e-5


def test_resnet_keeps_what_is_done_with_an_encoder():
    model, x = build("test_resnet_3d"), volume("test_resnet_3d")
    fast = brainfm.optimize(model)
    assert fast.pretrained_cfg == model.pretrained_cfg
    assert fast.num_features == model.num_features
    with torch.inference_mode():
        for found, wanted in zip(fast.forward_intermediates(x)[1], model.forward_intermediates(x)[1], strict=True):
            assert relative(found, wanted) < 1e-5


def test_vit_is_unchanged():
    model, x = build("test_vit_3d"), volume("test_vit_3d")
    fast = brainfm.optimize(model)
    assert fast.state_dict().keys() == model.state_dict().keys()
    with torch.inference_mode():
        assert relative(fast(x), model(x)) < 1e-5


@pytest.mark.parametrize("name", ["test_resnet_3d", "test_vit_3d"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_original_is_not_changed(name, dtype):
    model, x = build(name).train(), volume(name)
    before = copy.deepcopy(model.state_dict())
    needed_gradients = {key: p.requires_grad for key, p in model.named_parameters()}
    brainfm.optimize(model, dtype)
    assert model.training
    assert {key: p.requires_grad for key, p in model.named_parameters()} == needed_gradients
    assert model.state_dict().keys() == before.keys()
    for key, value in model.state_dict().items():
        assert value.dtype == before[key].dtype
        assert value.stride() == before[key].stride()
        assert torch.equal(value, before[key]), key
    assert model(x).requires_grad


@pytest.mark.parametrize("name", ["test_resnet_3d", "test_vit_3d"])
@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "float16"])
def test_half_precision_speaks_float32_and_stays_close(name, dtype):
    model, x = build(name), volume(name)
    fast = brainfm.optimize(model, dtype)
    with torch.inference_mode():
        z, wanted = fast(x), model(x)
    assert z.dtype == torch.float32
    assert {p.dtype for p in fast.parameters()} == {brainfm.inference.resolve_dtype(dtype)}
    assert torch.cosine_similarity(z, wanted).min() >= 0.9999


def test_half_precision_keeps_what_is_done_with_an_encoder():
    model = build("test_resnet_3d")
    fast = brainfm.optimize(model, "bfloat16")
    assert fast.pretrained_cfg == model.pretrained_cfg
    assert fast.num_features == model.num_features


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_copy_is_for_inference_only(dtype):
    fast = brainfm.optimize(build("test_resnet_3d").train(), dtype)
    assert not any(module.training for module in fast.modules())
    assert not any(p.requires_grad for p in fast.parameters())


def test_logits_are_the_same_too():
    model = brainfm.create_model("test_resnet_3d", pretrained=True, num_classes=3)
    x = volume("test_resnet_3d")
    with torch.inference_mode():
        assert relative(brainfm.optimize(model)(x), model(x)) < 1e-5


@pytest.mark.parametrize("dtype", ["int8", "bf16", "", torch.int8, torch.complex64])
def test_type_that_no_encoder_computes_in_is_refused(dtype):
    with pytest.raises(ValueError, match="dtype"):
        brainfm.optimize(build("test_resnet_3d"), dtype)


def test_what_was_done_is_said():
    assert "BatchNorm folded" in brainfm.optimize(build("test_resnet_3d")).optimizations
    *ways, memory, kind = brainfm.optimize(build("test_vit_3d"), "bfloat16").optimizations
    assert (memory, kind) == ("channels-last memory", "bfloat16")
    assert all("unless traced" in way for way in ways)


@pytest.mark.parametrize("name", ["test_resnet_3d", "test_vit_3d"])
def test_copy_of_a_copy_computes_in_the_type_that_was_asked_for_last(name):
    model, x = build(name), volume(name)
    once = brainfm.optimize(model)
    again = brainfm.optimize(brainfm.optimize(model, "bfloat16"))
    assert again.optimizations == once.optimizations
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    with torch.inference_mode():
        assert torch.equal(brainfm.optimize(once)(x), once(x))
        z = again(x)
        assert 1e-7 < relative(z, model(x)) < 2e-2  # its weights were rounded, and what it computes is not
        assert torch.equal(again.float()(x), z)


# --- Networks that say nothing of themselves ------------------------------------------------------


class Toy(Encoder):
    """A family without a `for_inference` of its own."""

    classifier_name = "head"
    first_conv = "body.0"

    def __init__(self):
        super().__init__(0, 1, None, 0.0)
        self.body = nn.Sequential(
            nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 6, 3, padding=1)
        )
        self.num_features, self.feature_info = 6, [stage("body", 6, (1, 1, 1))]
        self.reset_classifier(0)


@pytest.fixture(params=["encoder", "module"])
def toy(request):
    """A toy encoder, or a module that is no encoder, in training mode."""
    torch.manual_seed(0)
    encoder = Toy()
    encoder.body[1].running_mean.uniform_()
    encoder.set_grad_checkpointing()
    if request.param == "encoder":
        return encoder
    return nn.Sequential(encoder.body, nn.AdaptiveAvgPool3d(1), nn.Flatten())


@pytest.mark.parametrize(("dtype", "most"), [("auto", 1e-6), ("bfloat16", 2e-2), ("float16", 5e-3)])
def test_toy_gets_channels_last_memory_and_the_type_alone(toy, dtype, most):
    fast, x = brainfm.optimize(toy, dtype), torch.randn(2, 1, 9, 10, 11)
    kind = brainfm.inference.resolve_dtype(dtype)
    assert type(fast) is type(toy)
    assert fast.optimizations == ("channels-last memory", str(kind).removeprefix("torch."))
    assert [type(module) for module in fast.modules()] == [type(module) for module in toy.modules()]
    convolutions = [module for module in fast.modules() if isinstance(module, nn.Conv3d)]
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last_3d) for conv in convolutions)
    assert {p.dtype for p in fast.parameters()} == {kind}
    assert not any(module.training for module in fast.modules())
    assert all(module.training for module in toy.modules())  # the original is not changed
    assert all(p.requires_grad and p.dtype == torch.float32 for p in toy.parameters())
    with torch.inference_mode():
        z, wanted = fast(x), toy.eval()(x)
    assert z.dtype == torch.float32
    assert relative(z, wanted) < most


def test_family_is_asked_for_its_own_copy(monkeypatch):
    def for_inference(self, dtype):
        fast = copy.deepcopy(self).eval()
        fast.body[0].bias.data += 1
        fast.optimizations = (f"its own way, in {dtype}",)
        return fast

    toy, x = Toy().eval(), torch.randn(1, 1, 9, 10, 11)
    monkeypatch.setattr(Toy, "for_inference", for_inference)
    fast = brainfm.optimize(toy, "bfloat16")
    assert fast.optimizations == ("its own way, in torch.bfloat16",)
    with torch.inference_mode():
        assert relative(fast(x), toy(x)) > 1e-3


def test_module_without_parameters_is_made_ready_too():
    x = torch.randn(2, 1, 4, 4, 4)
    for dtype in ("auto", "bfloat16"):
        assert torch.equal(brainfm.optimize(nn.Flatten(), dtype)(x), x.flatten(1))


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_compiled_copy_casts_what_it_is_given(toy, dtype):
    fast, x = brainfm.optimize(toy, dtype, compile="eager"), torch.randn(2, 1, 9, 10, 11)
    with torch.inference_mode():
        z = fast(x)
        assert z.dtype == torch.float32
        assert relative(z, brainfm.optimize(toy, dtype)(x)) < 1e-6


@pytest.mark.parametrize("name", ["test_resnet_3d", "test_vit_3d"])
def test_compiled_network_gives_the_same_embeddings(name):
    model, x = build(name), volume(name)
    fast = brainfm.optimize(model, compile="eager")  # dynamo's tracing without a compiler
    with torch.inference_mode():
        assert relative(fast(x), model(x)) < 1e-5
    assert fast.optimizations == (*brainfm.optimize(model).optimizations, "torch.compile")


@pytest.mark.parametrize("name", ["test_resnet_3d", "test_vit_3d"])
def test_checkpointing_is_switched_off_in_the_copy(name):
    model, x = build(name), volume(name)
    model.set_grad_checkpointing()
    fast = brainfm.optimize(model)
    assert model.grad_checkpointing
    with torch.inference_mode():
        assert relative(fast(x), model(x)) < 1e-5
