"""One walk over the whole registry: what holds for every encoder. A new model gets these tests for free.

What a test needs of a model (size, channels, pools, readout) comes from its cfg and from the model itself. Three toys
are registered here beside the package's own models, and pass the same tests: one of three channels with max-pooling,
one without a fixed input shape, whose kernels are not padded, and one of a card.
"""

from __future__ import annotations

import copy
import functools
import itertools
import re

import numpy as np
import pytest
import torch
from small_encoders import build, created, distinct, narrow, outline, parameters, size_of, small_outline, volume
from torch import nn

import brainfm
from brainfm import get_pretrained_cfg, list_models, registry
from brainfm.contract import InputSpec, ZScore
from brainfm.models.encoder import Encoder, stage
from brainfm.train.optim import _depths
from brainfm.zoo.cards import Card

# --- Toys -------------------------------------------------------------------------------------------


def layers(inputs: int, outputs: int, *last: nn.Module, **arguments) -> nn.Sequential:
    """A stage: two convolutions, the second of which may be of another kernel, and what comes last."""
    first = nn.Conv3d(inputs, outputs, 3, padding=1)
    second = nn.Conv3d(outputs, outputs, **({"kernel_size": 3, "padding": 1} | arguments))
    return nn.Sequential(first, nn.BatchNorm3d(outputs), nn.ReLU(), second, nn.BatchNorm3d(outputs), nn.ReLU(), *last)


class Pooled(Encoder):
    """Of three channels; every stage ends in a max-pool, so that its cells look between voxels."""

    classifier_name = "fc"
    first_conv = "stages.0.0"

    def __init__(self, *, num_classes=0, in_chans=3, global_pool=None, drop_rate=0.0):
        super().__init__(num_classes, in_chans, global_pool, drop_rate)
        widths = (in_chans, 8, 12, 16)
        pairs = list(itertools.pairwise(widths))
        self.stages = nn.ModuleList(layers(*pair, nn.MaxPool3d(2)) for pair in pairs)
        self.feature_info = [
            stage(f"stages.{n}", width, (2 << n,) * 3, (((2 << n) - 1) / 2,) * 3) for n, (_, width) in enumerate(pairs)
        ]
        self.num_features = widths[-1]
        self.reset_classifier(num_classes)


class Unpadded(Encoder):
    """Of no fixed input shape; its strides differ by axis, and the last kernel is not padded. Its head lies deeper."""

    classifier_name = "head.linear"
    first_conv = "near.0"

    def __init__(self, *, num_classes=0, in_chans=1, global_pool=None, drop_rate=0.0):
        super().__init__(num_classes, in_chans, global_pool, drop_rate)
        self.near = layers(in_chans, 8, kernel_size=(3, 2, 2), stride=(1, 2, 2), padding=(1, 0, 0))
        self.far = layers(8, 20, kernel_size=3, stride=2, padding=0)
        self.head = nn.ModuleDict()
        self.feature_info = [
            stage("near", 8, (1, 2, 2), (0.0, 0.5, 0.5)),
            stage("far", 20, (2, 4, 4), (1.0, 2.5, 2.5)),
        ]
        self.num_features = 20
        self.reset_classifier(num_classes)


def toy_pooled_3d(**kwargs) -> Pooled:
    return Pooled(**kwargs)


def toy_unpadded_3d(**kwargs) -> Unpadded:
    return Unpadded(**kwargs)


CHANNELS = ("T1w", "T2w", "FLAIR")
CONTRASTS = InputSpec(channels=CHANNELS, operations=(ZScore(region="all"),), output_shape=(3, 16, 24, 32))
ANY_SHAPE = InputSpec(representation="any contrast", channels=("any",), operations=(ZScore(region="all"),))
CARD = {
    "inputs": {
        "box": InputSpec(operations=(ZScore(region="all"),), output_shape=(1, 16, 16, 24)).to_dict(),
        "any": ANY_SHAPE.to_dict(),
    },
    "models": {
        "toy_vit_3d": {
            "network": "vit",
            "args": {"dim": 24, "depth": 2, "num_heads": 2, "img_size": [16, 16, 24], "patch_size": [8, 4, 8]},
            "input": "box",
            "readout": {"pool": "avg"},
            "num_features": 24,
        },
        # Networks that are published too large to be run here.
        "toy_resenc_3d": {
            "network": "resenc",
            "args": {"widths": [8, 12, 16], "depths": [1, 2, 2]},
            "input": "any",
            "readout": {"pool": "avg"},
            "num_features": 16,
        },
        "toy_unet_3d": {
            "network": "unet",
            "args": {"width": 8, "levels": 2, "groups": 2, "unit_length": False},
            "input": "any",
            "readout": {"pool": "brain"},
            "num_features": 8,
        },
    },
}
TOYS = ["toy_pooled_3d", "toy_unpadded_3d", *CARD["models"]]


@pytest.fixture(scope="module", autouse=True)
def toys():
    """The toys are registered while this file's tests run."""
    list_models()  # the package's own are read when they are first asked for
    before = dict(registry._registered)
    pooled = brainfm.PretrainedCfg(input_spec=CONTRASTS, num_features=16, in_chans=3)
    brainfm.register_model(cfgs={"": pooled})(toy_pooled_3d)
    unpadded = brainfm.PretrainedCfg(input_spec=ANY_SHAPE, num_features=20)
    brainfm.register_model(cfgs={"": unpadded})(toy_unpadded_3d)
    brainfm.register_card(Card.from_dict(CARD))
    yield
    registry._registered.clear()
    registry._registered.update(before)


# --- Which are run ----------------------------------------------------------------------------------

NAMES = [*list_models(), *TOYS]
NETWORKS = [*distinct(list_models()), *TOYS]
SWINS = {name for name in list_models() if registry.network_of(name)[0] == "swin"}
# The others only in outline: they are large, or cut into many windows, of which networks one is run.
RUN = [n for n in NETWORKS if n in TOYS or (parameters(n) < 60e6 and n not in SWINS - {"swin3d_t"})]
TINY = [name for name in NETWORKS if name in TOYS or parameters(name) < 5e6]


@functools.cache
def shared(name: str) -> Encoder:
    """With a head of three classes, built once: not to be changed, but copied."""
    return build(name, num_classes=3)


def trunk_names(model: Encoder) -> list[str]:
    return [name for name, _ in model.named_parameters() if not name.startswith(f"{model.classifier_name}.")]


# --- Shapes and names, on the meta device -----------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_is_built_in_eval_mode_with_its_cfg(name):
    model = small_outline(name)
    assert isinstance(model, Encoder)
    assert not any(module.training for module in model.modules())
    assert model.num_classes == 0
    assert model.weights_report is None
    assert model.pretrained_cfg.architecture == name
    cfg = get_pretrained_cfg(name)
    assert model.pretrained_cfg.num_features == model.num_features == cfg.num_features
    assert model.in_chans == cfg.in_chans == cfg.input_spec.tensor_channels
    assert model.global_pool == (cfg.readout.pool if cfg.readout.pool in model.pools else model.pools[0])


@pytest.mark.parametrize("name", NAMES)
def test_takes_the_tensor_of_its_contract(name):
    model = outline(name)
    cfg = get_pretrained_cfg(name)
    window = cfg.readout.window
    shape = cfg.input_spec.output_shape or (model.in_chans, *(window.shape if window else size_of(name)))
    assert model(torch.empty(1, *shape, device="meta")).shape == (1, model.num_features)


@pytest.mark.parametrize("name", NAMES)
def test_pools_in_each_way_that_it_names(name):
    for pool in outline(name).pools:
        model = small_outline(name, global_pool=pool)
        assert model.global_pool == model.pretrained_cfg.readout.pool == pool
        assert model(volume(name, device="meta")).shape == (2, model.num_features)


@pytest.mark.parametrize("name", NAMES)
def test_gives_an_embedding_as_wide_as_it_says(name):
    model = small_outline(name)
    assert model(volume(name, device="meta")).shape == (2, model.num_features)
    assert isinstance(model.get_classifier(), nn.Identity)


@pytest.mark.parametrize("name", NAMES)
def test_gives_logits_when_classes_are_asked_for(name):
    model = small_outline(name, num_classes=3)
    assert model(volume(name, device="meta")).shape == (2, 3)
    head = model.get_classifier()
    assert (head.in_features, head.out_features, model.num_classes) == (model.num_features, 3, 3)


@pytest.mark.parametrize("name", NAMES)
def test_takes_more_input_channels(name):
    x = volume(name, more_channels=2, device="meta")
    model = small_outline(name, in_chans=x.shape[1])
    assert model(x).shape == (2, model.num_features)
    assert model.in_chans == model.get_submodule(model.first_conv).in_channels == x.shape[1]


@pytest.mark.parametrize("name", NAMES)
def test_intermediates_have_the_shapes_of_feature_info(name):
    model, x = small_outline(name), volume(name, device="meta")
    final, maps = model.forward_intermediates(x)
    assert final.shape == model.forward_features(x).shape
    assert len(maps) == len(model.feature_info)
    assert model.dense(x).shape == maps[-1].shape
    for found, info in zip(maps, model.feature_info, strict=True):
        assert found.shape[:2] == (2, info["num_chs"])
        for n, cells, step, margin in zip(
            size_of(name), found.shape[2:], info["reduction"], info["offset"], strict=True
        ):
            beyond = n - 1 - (margin + step * (cells - 1))  # the last cell's centre, and the end of the volume
            # It begins in the volume, which may end before its centre where a network pads; and no further cell would.
            assert -margin <= beyond < margin + step, info


@pytest.mark.parametrize("name", NAMES)
def test_intermediates_refuse_a_stage_that_does_not_exist(name):
    model, x = small_outline(name), volume(name, device="meta")
    for indices in ([], 0, 99, [99], [-99]):
        with pytest.raises(ValueError, match="indices"):
            model.forward_intermediates(x, indices)


@pytest.mark.parametrize("name", NAMES)
def test_impossible_heads_are_refused(name):
    model = small_outline(name)
    with pytest.raises(ValueError, match="-1"):
        model.reset_classifier(-1)
    with pytest.raises(ValueError, match="'of its own'"):
        model.reset_classifier(2, global_pool="of its own")
    with pytest.raises(ValueError, match="'of its own'"):
        small_outline(name, global_pool="of its own")
    assert model.num_classes == 0


@pytest.mark.parametrize("name", NAMES)
def test_input_of_another_rank_or_with_other_channels_is_refused(name):
    model, x = small_outline(name), volume(name, device="meta")
    for forward in (model, model.forward_features, model.forward_intermediates, model.dense):
        with pytest.raises(ValueError, match="batch axis"):
            forward(x[0])
        with pytest.raises(ValueError, match="expected volumes"):
            forward(x[None])
        with pytest.raises(ValueError, match=re.escape(f"[B, {model.in_chans}, D, H, W]")):
            forward(volume(name, more_channels=1, device="meta"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("coarse", [False, True])
def test_group_matcher_sorts_every_parameter_of_the_trunk(name, coarse):
    model = small_outline(name, num_classes=2)
    groups = {}
    for kind, patterns in model.group_matcher(coarse=coarse).items():
        groups[kind] = [(patterns, None)] if isinstance(patterns, str) else patterns
    assert set(groups) == {"stem", "blocks"}
    for key in trunk_names(model):
        kinds = [kind for kind, patterns in groups.items() if any(re.match(p, key) for p, _ in patterns)]
        assert len(kinds) == 1, (key, kinds)
    for key in {key for key, _ in model.named_parameters()} - set(trunk_names(model)):
        assert not any(re.match(p, key) for patterns in groups.values() for p, _ in patterns), key


@pytest.mark.parametrize("name", NAMES)
def test_layers_are_ordered_by_depth_from_the_stem_to_the_head(name):
    model = small_outline(name, num_classes=2)
    depths = _depths(model)
    trunk = [depths[key] for key in trunk_names(model)]
    stages = [
        min(depths[key] for key in trunk_names(model) if key.startswith(f"{info['module']}."))
        for info in model.feature_info
        if any(True for _ in model.get_submodule(info["module"]).parameters())
    ]
    assert trunk == sorted(trunk)
    assert stages == sorted(set(stages))  # each above the one before
    assert len({depths[key] for key in trunk_names(model)}) > 1
    head = {depth for key, depth in depths.items() if key.startswith(f"{model.classifier_name}.")}
    assert head == {max(depths.values())}
    assert max([*stages, min(trunk)]) < max(depths.values())


@pytest.mark.parametrize("name", NAMES)
def test_no_weight_decay_names_exist(name):
    model = small_outline(name)
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
    assert not any(key.startswith(f"{model.classifier_name}.") for key in model.state_dict())


@pytest.mark.parametrize("name", TINY)
def test_new_classifier_takes_the_type_and_mode_of_the_trunk(name):
    model = build(name).to(torch.bfloat16).train()
    model.reset_classifier(2)
    assert model.get_classifier().weight.dtype == torch.bfloat16
    assert model.get_classifier().training


@pytest.mark.parametrize("name", TINY)
def test_dropout_acts_on_the_embedding_in_training_only(name):
    model, x = build(name, drop_rate=0.5), volume(name)
    with torch.no_grad():
        features = model.forward_features(x)
        pooled = model.pool(features)
        assert torch.equal(model.forward_head(features), pooled)
        dropped = model.train().forward_head(features)[pooled != 0] == 0
    assert 0.25 < dropped.float().mean() < 0.75


@pytest.mark.parametrize("name", RUN)
def test_intermediates_are_chosen_by_index(name):
    model, x = shared(name), volume(name, batch=1)
    last = len(model.feature_info) - 1
    with torch.inference_mode():
        features, maps = model.forward_intermediates(x)
        assert torch.equal(features, model.forward_features(x))
        for indices, stages in [(2, {last - 1, last}), ([0, -1], {0, last}), ([-2, 1], {1, last - 1})]:
            final, found = model.forward_intermediates(x, indices)
            assert torch.equal(final, features)
            assert len(found) == len(stages)
            assert all(torch.equal(one, maps[stage]) for one, stage in zip(found, sorted(stages), strict=True))


@pytest.mark.parametrize("name", RUN)
def test_intermediates_only_computes_nothing_after_the_last_stage(name):
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
    learning = [key for key, module in model.named_modules() if module.training]
    assert set(learning) <= {"", "head_drop", model.classifier_name}
    trainable = [key for key, p in model.named_parameters() if p.requires_grad]
    assert trainable == [f"{model.classifier_name}.weight", f"{model.classifier_name}.bias"]

    optimiser = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1)
    model(x).square().mean().backward()
    optimiser.step()

    parameters = dict(model.named_parameters())
    assert all(parameters[key].grad is None for key in trunk_names(model))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) != key.startswith(f"{model.classifier_name}."), key
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
    other = small_outline(name, num_classes=3, **narrow(name)).to_empty(device="cpu")
    other.load_state_dict(model.state_dict(), strict=True)
    with torch.inference_mode():
        assert torch.equal(other(volume(name, batch=1)), model(volume(name, batch=1)))


@pytest.mark.parametrize("name", RUN)
def test_computes_in_bfloat16_on_the_cpu(name):
    model, x = copy.deepcopy(shared(name)), volume(name, batch=1, cells=fewest_cells(name))
    model.reset_classifier(0)
    with torch.inference_mode():
        wanted = model(x)
        z = model.bfloat16()(x.bfloat16())
    assert z.dtype == torch.bfloat16
    assert torch.cosine_similarity(z.float(), wanted).min() > 0.999


def fewest_cells(name: str) -> int:
    """Along an axis, of a volume that the encoder takes: a processor without bfloat16 is slow with it.

    A norm over the volume wants several.
    """
    model = shared(name)
    over_volume = any(isinstance(module, nn.InstanceNorm3d) for module in model.modules())
    return 1 if getattr(model, "dynamic_img_size", True) and not over_volume else 2


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


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_copy_for_inference_gives_the_same_embedding_and_map(name, dtype):
    model, x = build(name), volume(name, cells=2 if dtype == "float32" else fewest_cells(name))
    fast = brainfm.optimize(model, dtype)
    assert fast.pretrained_cfg == model.pretrained_cfg
    with torch.inference_mode():
        for found, wanted in [(fast(x), model(x)), (fast.dense(x), model.dense(x))]:
            assert found.dtype == torch.float32
            assert (found - wanted).norm() < (1e-5 if dtype == "float32" else 2e-2) * wanted.norm()


@pytest.mark.parametrize("name", RUN)
def test_copy_for_inference_gives_the_same_numbers(name):
    model, x = copy.deepcopy(shared(name)).requires_grad_(False), volume(name)
    draws = torch.Generator().manual_seed(2)
    for key, value in model.state_dict().items():  # which show when they are lost
        if value.ndim == 1 and value.is_floating_point():
            spread = torch.rand(value.shape, generator=draws)
            value.copy_(0.5 + spread if key.endswith(("weight", "running_var", "gamma_1", "gamma_2")) else spread / 4)
    fast = brainfm.optimize(model)
    over_volume = any(isinstance(module, nn.InstanceNorm3d) for module in model.modules())
    with torch.inference_mode():
        for volumes in (x, torch.zeros_like(x)):
            if over_volume and not volumes.any():  # which torch's norm in float32 has wrong by 2e-5
                model, volumes = model.double(), volumes.double()
            wanted = [model(volumes), *model.forward_intermediates(volumes)[1]]
            found = [fast(volumes.float()), *fast.forward_intermediates(volumes.float())[1]]
            for other, one in zip(found, wanted, strict=True):
                assert other.shape == one.shape
                assert (other - one).norm() <= 1e-5 * one.norm()


# --- Where the cells of a map look ------------------------------------------------------------------

TOLERANCE = 0.1  # of a cell; all that was seen is below 0.04


def smoothed(model: Encoder) -> Encoder:
    """With kernels that are means about their middles, and max-pools that are means: no cell looks to one side.

    Norms over the volume, which look everywhere, are left out, as are those of a cell's channels.
    Where a kernel looks does not depend on its weights; they stay random, but do not cancel each other.
    """
    if hasattr(model, "unit_length"):
        model.unit_length = False
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv3d):
            weight = module.weight.detach().abs()
            for axis, (size, step) in enumerate(zip(module.kernel_size, module.stride, strict=True)):
                from_middle = (torch.arange(size) - (size - 1) / 2) / step
                weight *= torch.exp(-4 * from_middle**2).view(-1, *[1] * (2 - axis))
            module.weight.data = weight / weight.sum(dim=(1, 2, 3, 4), keepdim=True)
        elif isinstance(module, nn.MaxPool3d):
            mean = nn.AvgPool3d(module.kernel_size, module.stride, module.padding, module.ceil_mode)
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, mean)
        elif isinstance(module, (nn.InstanceNorm3d, nn.GroupNorm)):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, nn.Identity())
    return model


def misplaced(model: Encoder, size: tuple[int, ...]) -> np.ndarray:
    """How far each map's cells look from where `feature_info` says, [stages, 3] in cells; the last map is `dense`'s.

    The gradient of the middle cells with respect to the input says where they look.
    """
    draws = torch.Generator().manual_seed(0)
    x = torch.rand(1, model.in_chans, *size, generator=draws).requires_grad_()
    _, maps = model.forward_intermediates(x)
    found = []
    maps[-1] = model.dense(x)  # made of the last stage's
    for cells, info in zip(maps, model.feature_info, strict=True):
        middle = [slice(n // 3, n - n // 3) for n in cells.shape[2:]]
        shown = torch.rand(cells.shape[1], generator=draws) @ cells[(0, slice(None), *middle)].flatten(1).sum(dim=1)
        (gradient,) = torch.autograd.grad(shown, x, retain_graph=True)
        looks = gradient.double().abs().sum(dim=(0, 1)).numpy()
        steps = np.array(info["reduction"])
        said = info["offset"] + steps * [(s.start + s.stop - 1) / 2 for s in middle]
        seen = [(place * looks).sum() / looks.sum() for place in np.indices(looks.shape)]
        found.append(np.abs(seen - said) / steps)
    return np.array(found)


LARGE = {  # or of many parameters and wide cells, so that an input of three of them is large too
    name
    for name in NETWORKS
    if name not in TOYS
    and parameters(name) > (2e8 if max(map(max, outline(name).feature_info.reduction())) < 32 else 6e7)
}


@pytest.mark.parametrize(
    "name",  # of a Swin, whose merges are no convolutions that can be made smooth, test_swin.py says so exactly
    [pytest.param(n, marks=[pytest.mark.slow] * (n in LARGE)) for n in NETWORKS if n not in SWINS],
)
def test_cells_look_where_feature_info_says(name):
    size = size_of(name, cells=3)
    model = smoothed(created(name, size, **narrow(name))).requires_grad_(False)
    assert misplaced(model, size).max() < TOLERANCE


@pytest.mark.parametrize("name", TINY)
def test_offset_that_is_wrong_by_half_a_cell_is_found_out(name):
    size = size_of(name, cells=3)
    model = smoothed(created(name, size, **narrow(name))).requires_grad_(False)
    for info in model.feature_info:
        info["offset"] = tuple(at + step / 2 for at, step in zip(info["offset"], info["reduction"], strict=True))
    assert misplaced(model, size).min() > 0.5 - TOLERANCE
