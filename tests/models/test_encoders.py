"""One walk over the whole registry: what holds for every encoder. A new model gets these tests for free."""

from __future__ import annotations

import copy
import functools
import re

import pytest
import torch
from torch import nn

from brainfm import create_model, get_pretrained_cfg, list_models
from brainfm.models import Encoder
from brainfm.models.resnet import ResNet

NAMES = list_models()
RUN = [name for name in NAMES if name not in ("mae_vit_base_3d", "mae_vit_large_3d")]  # those two only in outline
TINY = ["test_resnet_3d", "test_vit_3d"]


@functools.cache
def size_of(name: str) -> tuple[int, int, int]:
    """A small input: two patches along each axis, or for a ResNet sizes that its strides do not all divide."""
    with torch.device("meta"):
        model = create_model(name)
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    return tuple(2 * size for size in patch) if patch else (24, 28, 28)


def build(name: str, seed: int = 0, **kwargs) -> Encoder:
    """An encoder for its small input, with seeded initial weights."""
    if name in list_models(module="vit"):
        kwargs["img_size"] = size_of(name)
    torch.manual_seed(seed)
    return create_model(name, **kwargs)


@functools.cache
def shared(name: str) -> Encoder:
    """The same with a head of three classes, built once: not to be changed, but copied."""
    return build(name, num_classes=3)


def outline(name: str, **kwargs) -> Encoder:
    """An encoder without numbers, on the meta device: shapes and names cost nothing there, whatever the size."""
    with torch.device("meta"):
        return build(name, **kwargs)


def volume(name: str, channels: int = 1, batch: int = 2, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, *size_of(name), generator=generator).to(device)


def trunk_names(model: Encoder) -> list[str]:
    return [name for name, _ in model.named_parameters() if not name.startswith(f"{model.classifier}.")]


# --- Shapes and names, on the meta device -----------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_is_built_in_eval_mode_with_its_cfg(name):
    model = outline(name)
    assert isinstance(model, Encoder)
    assert not any(module.training for module in model.modules())
    assert model.num_classes == 0
    assert model.weights_report is None
    assert model.pretrained_cfg.architecture == name
    assert model.pretrained_cfg.num_features == model.num_features == get_pretrained_cfg(name).num_features
    assert model.pretrained_cfg.input_spec.output_shape[0] == model.in_chans == 1


@pytest.mark.parametrize("name", NAMES)
def test_gives_an_embedding_as_wide_as_it_says(name):
    model = outline(name)
    assert model(volume(name, device="meta")).shape == (2, model.num_features)
    assert isinstance(model.get_classifier(), nn.Identity)


@pytest.mark.parametrize("name", NAMES)
def test_gives_logits_when_classes_are_asked_for(name):
    model = outline(name, num_classes=3)
    assert model(volume(name, device="meta")).shape == (2, 3)
    head = model.get_classifier()
    assert (head.in_features, head.out_features, model.num_classes) == (model.num_features, 3, 3)


@pytest.mark.parametrize("name", NAMES)
def test_takes_more_input_channels(name):
    model = outline(name, in_chans=3)
    assert model(volume(name, channels=3, device="meta")).shape == (2, model.num_features)
    assert model.in_chans == 3
    assert model.get_submodule(model.first_conv).in_channels == 3


@pytest.mark.parametrize("name", NAMES)
def test_intermediates_have_the_shapes_of_feature_info(name):
    model, x = outline(name), volume(name, device="meta")
    final, maps = model.forward_intermediates(x)
    assert final.shape == model.forward_features(x).shape
    assert len(maps) == len(model.feature_info)
    for found, info in zip(maps, model.feature_info, strict=True):
        sizes = [-(-size // step) for size, step in zip(size_of(name), info["reduction"], strict=True)]
        assert found.shape == (2, info["num_chs"], *sizes)


@pytest.mark.parametrize("name", NAMES)
def test_intermediates_refuse_a_stage_that_does_not_exist(name):
    model, x = outline(name), volume(name, device="meta")
    for indices in ([], 0, 99, [99], [-99]):
        with pytest.raises(ValueError, match="indices"):
            model.forward_intermediates(x, indices)


@pytest.mark.parametrize("name", NAMES)
def test_impossible_heads_are_refused(name):
    model = outline(name)
    with pytest.raises(ValueError, match="-1"):
        model.reset_classifier(-1)
    with pytest.raises(ValueError, match="'max'"):
        model.reset_classifier(2, global_pool="max")
    with pytest.raises(ValueError, match="'max'"):
        outline(name, global_pool="max")
    assert model.num_classes == 0


@pytest.mark.parametrize("name", NAMES)
def test_input_of_another_rank_or_with_other_channels_is_refused(name):
    model, x = outline(name), volume(name, device="meta")
    for forward in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match="batch axis"):
            forward(x[0])
        with pytest.raises(ValueError, match="expected volumes"):
            forward(x[None])
        with pytest.raises(ValueError, match=re.escape("[B, 1, D, H, W]")):
            forward(volume(name, channels=2, device="meta"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("coarse", [False, True])
def test_group_matcher_sorts_every_parameter_of_the_trunk(name, coarse):
    model = outline(name, num_classes=2)
    groups = {}
    for kind, patterns in model.group_matcher(coarse=coarse).items():
        groups[kind] = [(patterns, None)] if isinstance(patterns, str) else patterns
    assert set(groups) == {"stem", "blocks"}
    for key in trunk_names(model):
        kinds = [kind for kind, patterns in groups.items() if any(re.match(p, key) for p, _ in patterns)]
        assert len(kinds) == 1, (key, kinds)


@pytest.mark.parametrize("name", NAMES)
def test_group_matcher_orders_the_blocks_by_depth(name):
    model = outline(name)
    patterns = model.group_matcher()["blocks"]
    patterns = [(patterns, None)] if isinstance(patterns, str) else patterns
    depths = []
    for key in trunk_names(model):
        for pattern, depth in patterns:
            if found := re.match(pattern, key):
                depths.append(depth or tuple(map(int, found.groups())))
                break
    assert len(set(depths)) > 1
    assert depths == sorted(depths)


@pytest.mark.parametrize("name", NAMES)
def test_no_weight_decay_names_exist(name):
    model = outline(name)
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


# --- Numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUN)
def test_forward_is_features_then_head(name):
    model, x = shared(name), volume(name)
    with torch.inference_mode():
        logits = model(x)
        features = model.forward_features(x)
        embedding = model.forward_head(features, pre_logits=True)
        assert torch.equal(model.forward_head(features), logits)
        assert torch.equal(model.get_classifier()(embedding), logits)
        torch.testing.assert_close(model(x[1:]), logits[1:], rtol=1e-4, atol=1e-5)  # volumes of a batch do not mix


@pytest.mark.parametrize("name", RUN)
def test_classifier_is_swapped_and_removed(name):
    model = copy.deepcopy(shared(name))
    with torch.inference_mode():
        features = model.forward_features(volume(name, batch=1))
        embedding = model.forward_head(features, pre_logits=True)
        model.reset_classifier(5)
        assert model.forward_head(features).shape == (1, 5)
        assert model.num_classes == model.get_classifier().out_features == 5
        model.reset_classifier(0)
        assert torch.equal(model.forward_head(features), embedding)
    assert model.num_classes == 0
    assert not any(key.startswith(f"{model.classifier}.") for key in model.state_dict())


def test_new_classifier_takes_the_type_and_mode_of_the_trunk():
    model = build("test_resnet_3d").to(torch.bfloat16).train()
    model.reset_classifier(2)
    assert model.get_classifier().weight.dtype == torch.bfloat16
    assert model.get_classifier().training


@pytest.mark.parametrize("name", TINY)
def test_dropout_acts_on_the_embedding_in_training_only(name):
    model, x = build(name, drop_rate=0.5), volume(name)
    with torch.no_grad():
        features = model.forward_features(x)
        assert torch.equal(model.forward_head(features), model.pool(features))
        dropped = model.train().forward_head(features) == 0
    assert 0.25 < dropped.float().mean() < 0.75


@pytest.mark.parametrize("name", RUN)
def test_intermediates_are_chosen_by_index(name):
    model, x = shared(name), volume(name, batch=1)
    last = len(model.feature_info) - 1
    with torch.inference_mode():
        features, maps = model.forward_intermediates(x)
        assert torch.equal(features, model.forward_features(x))
        for indices, stages in [(2, [last - 1, last]), ([0, -1], [0, last]), ([-2, 1], sorted([1, last - 1]))]:
            final, found = model.forward_intermediates(x, indices)
            assert torch.equal(final, features)
            assert [torch.equal(one, maps[stage]) for one, stage in zip(found, stages, strict=True)] == [True, True]


@pytest.mark.parametrize("name", RUN)
def test_intermediates_only_computes_nothing_behind_the_last_stage(name):
    model, x = copy.deepcopy(shared(name)), volume(name, batch=1)
    with torch.inference_mode():
        wanted = model.forward_intermediates(x, [0, 1])[1]
        ran = []
        for info in model.feature_info:
            model.get_submodule(info["module"]).register_forward_pre_hook(lambda *_, at=info["module"]: ran.append(at))
            for module in model.get_submodule(info["module"]).children():
                module.register_forward_pre_hook(lambda *_, at=info["module"]: ran.append(at))
        found = model.forward_intermediates(x, [0, 1], intermediates_only=True)
    assert [torch.equal(one, other) for one, other in zip(found, wanted, strict=True)] == [True, True]
    assert set(ran) == {info["module"] for info in model.feature_info[:2]}


def _gradients(model: Encoder, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model(x).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _kept(model: Encoder, x: torch.Tensor) -> int:
    """Bytes of activations that a forward pass keeps for the backward pass."""
    weights, kept = {p.data_ptr() for p in model.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model(x)
    del y
    return sum(kept.values())


@pytest.mark.parametrize("name", RUN)
def test_gradient_checkpointing_gives_the_same_gradients(name):
    model, x = copy.deepcopy(shared(name)).double().train(), volume(name, batch=1).double()
    plain, kept = _gradients(model, x), _kept(model, x)
    model.set_grad_checkpointing()
    recomputed = _gradients(model, x)
    assert _kept(model, x) < kept / 2  # for the backward pass: checkpointing is on
    assert plain.keys() == recomputed.keys()
    largest = max(gradient.abs().max() for gradient in plain.values())
    for key, gradient in plain.items():
        assert (recomputed[key] - gradient).abs().max() <= 1e-10 * largest, key
    model.set_grad_checkpointing(False)
    model(x)
    assert not model.grad_checkpointing


@pytest.mark.parametrize("name", TINY)
def test_gradient_checkpointing_leaves_the_buffers_as_training_without_it(name):
    plain = build(name).double().train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    for model in (plain, checkpointed):
        _gradients(model, volume(name, batch=1).double())
    buffers = dict(checkpointed.named_buffers())
    for key, buffer in plain.named_buffers():
        torch.testing.assert_close(buffers[key], buffer, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", RUN)
def test_frozen_trunk_stays_as_it_is_while_the_head_learns(name):
    model, x = copy.deepcopy(shared(name)), volume(name, batch=1)
    head = model.get_classifier()
    with torch.no_grad():
        features = model.forward_features(x)
    before = copy.deepcopy(model.state_dict())

    assert model.freeze() is model
    model.train()
    assert head.training
    for child_name, child in model.named_children():
        if child_name not in (model.classifier, "head_drop"):
            assert not any(module.training for module in child.modules()), child_name
    trainable = [key for key, p in model.named_parameters() if p.requires_grad]
    assert trainable == [f"{model.classifier}.weight", f"{model.classifier}.bias"]

    optimiser = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1)
    model(x).square().mean().backward()
    optimiser.step()

    parameters = dict(model.named_parameters())
    assert all(parameters[key].grad is None for key in trunk_names(model))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) != key.startswith(f"{model.classifier}."), key
    with torch.no_grad():
        assert torch.equal(model.forward_features(x), features)


@pytest.mark.parametrize("name", TINY)
def test_frozen_trunk_takes_a_new_trainable_head(name):
    model = build(name).freeze().train()
    model.reset_classifier(2)
    model(volume(name, batch=1)).sum().backward()
    assert model.get_classifier().weight.grad is not None
    assert all(p.grad is None for key, p in model.named_parameters() if key in trunk_names(model))


@pytest.mark.parametrize("name", RUN)
def test_state_dict_goes_round_strictly(name):
    model = shared(name)
    other = outline(name, num_classes=3).to_empty(device="cpu")
    other.load_state_dict(model.state_dict(), strict=True)
    with torch.inference_mode():
        assert torch.equal(other(volume(name, batch=1)), model(volume(name, batch=1)))


@pytest.mark.parametrize("name", RUN)
def test_computes_in_bfloat16_on_the_cpu(name):
    model, x = copy.deepcopy(shared(name)), volume(name, batch=1)
    if isinstance(model, ResNet):
        x = x[..., :16, :16, :16]  # without bfloat16 instructions, more takes half a minute
    model.reset_classifier(0)
    with torch.inference_mode():
        wanted = model(x)
        z = model.bfloat16()(x.bfloat16())
    assert z.dtype == torch.bfloat16
    assert torch.cosine_similarity(z.float(), wanted).min() > 0.999


@pytest.mark.parametrize("name", TINY)
def test_exported_program_gives_the_same_embedding_at_any_batch_size(name):
    model = build(name)
    batch = torch.export.Dim("batch", min=1, max=16)
    program = torch.export.export(model, (volume(name),), dynamic_shapes={"x": {0: batch}}).module()
    with torch.no_grad():
        for x in (volume(name), volume(name, batch=3)):
            torch.testing.assert_close(program(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TINY)
def test_copies_and_pickles(name, tmp_path):
    model, x = build(name), volume(name, batch=1)
    torch.save(model, tmp_path / "whole.pt")
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(model)(x), model(x))
        assert torch.equal(torch.load(tmp_path / "whole.pt", weights_only=False)(x), model(x))
