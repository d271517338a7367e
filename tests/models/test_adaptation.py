"""Parameter-efficient fine-tuning of an encoder: what is added, what it computes, what learns, and how it is kept."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import brainfm
from brainfm import BrainfmError
from brainfm.downstream.finetuning import Finetuning, count_parameters, put_head
from brainfm.errors import WeightsError
from brainfm.models.adaptation import Adapter, add_adapters, add_lora, merge_lora, norms_and_biases
from brainfm.models.encoder import Encoder, stage
from brainfm.models.resnet.network import ResNet
from brainfm.models.sfcn import SFCN
from brainfm.models.vit import VisionTransformer
from brainfm.train.mae import MaskedAutoencoder
from brainfm.train.optim import make_optimiser

WAYS = ("norm_bias", "adapter", "lora")


class Convolutions(Encoder):
    """Every kind of convolution, which no family here has."""

    classifier_name = "head"
    first_conv = "grouped"

    def __init__(self):
        super().__init__(0, 4, None, 0.0)
        self.num_features = 8
        self.grouped = nn.Conv3d(4, 8, 3, stride=2, groups=2, padding=1, bias=False)
        self.dilated = nn.Conv3d(8, 12, 3, dilation=2, padding=2, padding_mode="replicate")
        self.oblong = nn.Conv3d(12, 12, (1, 3, 5), stride=(1, 2, 1), groups=4, dilation=(1, 2, 1))
        self.pointwise = nn.Conv3d(12, 8, 1)
        self.feature_info = [
            stage(name, width, (2, 2, 2))
            for name, width in (("grouped", 8), ("dilated", 12), ("oblong", 12), ("pointwise", 8))
        ]
        self.reset_classifier(0)


FAMILIES = {
    "resnet": lambda: ResNet("basic", (1, 2, 1, 1), (4, 8, 8, 16)),
    "bottleneck": lambda: ResNet("bottleneck", (1, 1, 1, 1), (4, 8, 8, 16)),
    "vit": lambda: VisionTransformer(24, 2, 2, img_size=(16, 16, 16), patch_size=(8, 8, 8)),
    "sfcn": lambda: SFCN((4, 8, 8, 8, 6)),
    "another": Convolutions,
}


@pytest.fixture(params=FAMILIES)
def family(request):
    torch.manual_seed(0)
    encoder = FAMILIES[request.param]().eval()
    with torch.no_grad():  # new networks have norms that do nothing
        for module in encoder.modules():
            if isinstance(module, _BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return encoder, torch.randn(2, encoder.in_chans, 16, 16, 16)


def adapted(encoder, way, **fields):
    put_head(encoder, 2, Finetuning(trained=way, head_std=None, lora_rank=2, adapter_reduction=4, **fields))
    return encoder


def stir(encoder):
    """Give what was added other values, as training would."""
    with torch.no_grad():
        for module in encoder.modules():
            if hasattr(module, "lora_up"):
                module.lora_up.normal_(std=0.1)
            elif isinstance(module, Adapter):
                module.up.weight.normal_(std=0.3)


@pytest.mark.parametrize("way", WAYS)
def test_first_step_sees_what_the_frozen_encoder_computes(family, way):
    encoder, volumes = family
    before = encoder(volumes).detach()
    adapted(encoder, way).train()
    assert torch.equal(encoder.forward_head(encoder.forward_features(volumes), pre_logits=True), before)


@pytest.mark.parametrize("way", WAYS)
def test_only_what_is_named_and_the_head_change_in_a_step(family, way):
    encoder, volumes = family
    adapted(encoder, way).train()
    before = copy.deepcopy(encoder.state_dict())
    optimiser = make_optimiser(Finetuning(lr=0.01, optimiser="adamw", weight_decay=0.1), encoder)
    for _ in range(2):  # of a change of low rank, one factor is 0 at first and the other has no gradient
        optimiser.zero_grad()
        F.cross_entropy(encoder(volumes), torch.tensor([0, 1])).backward()
        optimiser.step()
    changed = {name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])}
    head = {name for name in before if name.startswith(f"{encoder.classifier_name}.")}
    norms = {name for name, m in encoder.named_modules() if isinstance(m, (_BatchNorm, nn.LayerNorm))}
    named = {
        "norm_bias": {name for name in before if name.endswith(".bias") or name.rpartition(".")[0] in norms}
        - {name for name in before if name.endswith(("running_mean", "running_var", "num_batches_tracked"))},
        "adapter": {name for name in before if name.startswith("adapters.")},
        "lora": {name for name in before if name.endswith((".lora_down", ".lora_up"))},
    }[way]
    assert named
    assert changed <= named | head
    learned = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert learned == named | head
    still = learned - changed  # ReLU may leave a narrow bottleneck without a gradient, and a key's bias never has one
    assert len(still) <= (len(named) / 3 if way == "adapter" else 0), still
    assert head <= changed


@pytest.mark.parametrize("way", WAYS)
def test_running_statistics_are_held_in_training_and_after_a_look_at_val(way):
    encoder = adapted(brainfm.create_model("test_resnet_3d", pretrained=True), way, batch_size=2)
    for mode in (True, False, True):
        encoder.train(mode)
        assert encoder.training is mode
        assert not any(module.training for module in encoder.modules() if isinstance(module, _BatchNorm))


def test_low_rank_change_is_that_of_lora_and_merges_exactly(family):
    encoder, volumes = family
    plain = copy.deepcopy(encoder)
    layers = {name: m for name, m in plain.named_modules() if isinstance(m, (nn.Conv3d, nn.Linear))}
    add_lora(encoder, rank=2, alpha=3)
    stir(encoder)
    with torch.no_grad():
        for name, layer in layers.items():
            change = encoder.get_submodule(name)
            assert len(change.lora_down) == min(2, min(layer.weight.flatten(1).shape) // 2)
            layer.weight += 3 / 2 * (change.lora_up @ change.lora_down).reshape(layer.weight.shape)
        unmerged, wanted = encoder(volumes), plain(volumes)
        merge_lora(encoder)
        assert (unmerged - wanted).norm() <= 1e-6 * wanted.norm()
        assert (encoder(volumes) - unmerged).norm() <= 1e-6 * unmerged.norm()
    encoder.load_state_dict(plain.state_dict())  # by the same names


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv3d(8, 12, 3, stride=2, bias=False),
        nn.Conv3d(8, 12, 3, dilation=2, padding=2),
        nn.Conv3d(8, 12, (1, 3, 5), stride=(1, 2, 1), groups=4),
        nn.Conv3d(8, 12, 1, groups=2),
        nn.Conv3d(8, 12, 1),
        nn.Linear(8, 12),
    ],
    ids=["strided", "dilated", "grouped", "pointwise in groups", "pointwise", "linear"],
)
def test_low_rank_change_is_a_narrow_layer_and_a_pointwise_one(layer):
    """As LoRA is drawn: x → the layer's output and, with its stride, dilation and groups, up(down(x))."""
    torch.manual_seed(0)
    x = torch.randn(2, *([8] * 4 if isinstance(layer, nn.Conv3d) else [8])).double()
    encoder = Convolutions()
    encoder.grouped = layer
    plain = copy.deepcopy(layer).double()
    add_lora(encoder.double(), rank=3, alpha=6)
    layer.lora_up.data.normal_()
    if isinstance(layer, nn.Linear):
        path = x @ layer.lora_down.T @ layer.lora_up.T
    else:
        how = {"stride": layer.stride, "dilation": layer.dilation, "padding": layer.padding}
        parts = []
        for part, up in zip(x.chunk(layer.groups, dim=1), layer.lora_up.chunk(layer.groups), strict=True):
            narrow = F.conv3d(part, layer.lora_down.view(-1, *plain.weight.shape[1:]), **how)
            parts.append(F.conv3d(narrow, up[:, :, None, None, None]))
        path = torch.cat(parts, dim=1)
    torch.testing.assert_close(layer(x), plain(x) + 2 * path)
    merge_lora(layer)
    assert type(layer) is type(plain)
    torch.testing.assert_close(layer(x), plain(x) + 2 * path)


def test_changes_are_never_more_than_the_weights(family):
    encoder, _ = family
    weights = {name: value.numel() for name, value in encoder.named_parameters()}
    add_lora(encoder, rank=1000)
    for name, layer in encoder.named_modules():
        if hasattr(layer, "lora_up") and len(layer.lora_down) > 1:
            assert layer.lora_down.numel() + layer.lora_up.numel() <= weights[f"{name}.weight"]


@pytest.mark.parametrize("add", [add_adapters, add_lora])
def test_adapted_encoder_is_optimized_embedded_and_copied(family, add):
    encoder, volumes = family
    frozen = encoder(volumes).detach()
    add(encoder)
    stir(encoder)
    with torch.no_grad():
        wanted = encoder(volumes)
        assert (wanted - frozen).norm() > 1e-3 * frozen.norm()
        for copied in (brainfm.optimize(encoder), copy.deepcopy(encoder)):
            assert (copied(volumes) - wanted).norm() <= 1e-5 * wanted.norm()
        maps = encoder.forward_intermediates(volumes, intermediates_only=True)
        assert torch.equal(encoder.pool(encoder.forward_features(volumes)), wanted)
        if not isinstance(encoder, VisionTransformer):
            assert torch.equal(maps[-1], encoder.dense(volumes))


@pytest.mark.parametrize("way", WAYS)
def test_gradient_checkpointing_gives_the_same_gradients(family, way):
    encoder, volumes = family
    adapted(encoder, way).train().double()
    stir(encoder)
    found = []
    for checkpointing in (False, True):
        encoder.set_grad_checkpointing(checkpointing)
        encoder.zero_grad()
        F.cross_entropy(encoder(volumes.double()), torch.tensor([0, 1])).backward()
        found.append({name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", ["test_resnet_3d", "test_vit_3d"])
def test_number_of_parameters_is_that_of_the_norms_the_adapters_or_the_changes(name):
    def counted(way):
        return count_parameters(adapted(brainfm.create_model(name, pretrained=True), way))

    encoder = brainfm.create_model(name, pretrained=True)
    everything, width = sum(p.numel() for p in encoder.parameters()), encoder.num_features
    head = 2 * width + 2
    assert counted("head") == (head, everything + head)
    channels = [one["num_chs"] for one in encoder.feature_info if one["module"] != "act"]
    adapters = sum(2 * c * (c // 4) + c // 4 + c for c in channels)
    assert counted("adapter") == (head + adapters, everything + head + adapters)
    layers = [m.weight.flatten(1).shape for m in encoder.modules() if isinstance(m, (nn.Conv3d, nn.Linear))]
    changes = sum(2 * sum(shape) for shape in layers)
    assert counted("lora") == (head + changes, everything + head + changes)
    norms = sum(
        p.numel() for m in encoder.modules() if isinstance(m, (_BatchNorm, nn.LayerNorm)) for p in m.parameters()
    )
    biases = sum(
        m.bias.numel() for m in encoder.modules() if isinstance(m, (nn.Conv3d, nn.Linear)) and m.bias is not None
    )
    assert counted("norm_bias") == (head + norms + biases, everything + head)


@pytest.mark.parametrize("name", ["test_resnet_3d", "test_vit_3d"])
@pytest.mark.parametrize("add", [add_adapters, add_lora])
def test_adapted_encoder_is_kept_in_a_folder(name, add, tmp_path):
    encoder = brainfm.create_model(name, pretrained=True, num_classes=2)
    add(encoder, 4)
    stir(encoder)
    volumes = torch.randn(1, 1, 40, 48, 48)
    folder = brainfm.save_for_hub(encoder, tmp_path / "model")
    with torch.no_grad():
        again = brainfm.create_model(f"local-dir:{folder}", num_classes=2)
        assert (again(volumes) - encoder(volumes)).norm() <= 1e-6 * encoder(volumes).norm()
    assert len(again.adapters) == (4 if add is add_adapters else 0)
    assert again.model_args.get("adapter_reduction") == (4 if add is add_adapters else None)
    assert "Trained further from" in again.pretrained_cfg.notes
    twice = brainfm.save_for_hub(again, tmp_path / "again")
    assert torch.equal(brainfm.create_model(f"local-dir:{twice}", num_classes=2)(volumes), again(volumes))


def test_adapters_without_their_weights_are_refused():
    with pytest.raises(WeightsError, match=r"adapters\."):
        brainfm.create_model("test_resnet_3d", pretrained=True, adapter_reduction=4)


def test_config_of_adapters_that_cannot_be_is_refused(tmp_path):
    encoder = brainfm.create_model("test_resnet_3d", pretrained=True)
    add_adapters(encoder)
    folder = brainfm.save_for_hub(encoder, tmp_path / "model")
    config = (folder / "config.json").read_text()
    for wrong in ("0", "-3", "1.5", '"16"', "true"):
        (folder / "config.json").write_text(config.replace('"adapter_reduction": 16', f'"adapter_reduction": {wrong}'))
        with pytest.raises(WeightsError, match=r"reduction|below 0"):
            brainfm.create_model(f"local-dir:{folder}")


def test_nothing_is_added_twice_or_where_it_would_be_lost():
    encoder = brainfm.create_model("test_vit_3d", pretrained=True)
    add_lora(encoder)
    with pytest.raises(BrainfmError, match=r"has changes of low rank already; merge them first, by merge_lora"):
        add_lora(encoder)
    merge_lora(encoder)
    add_adapters(encoder)
    with pytest.raises(BrainfmError, match="has adapters already"):
        add_adapters(encoder)
    with pytest.raises(ValueError, match="without adapters: they would be left out"):
        MaskedAutoencoder(encoder)
    with pytest.raises(BrainfmError, match="rank of a change of low rank is 0"):
        add_lora(encoder, 0)
    with pytest.raises(BrainfmError, match="reduction is 0, and must be a whole number"):
        add_adapters(brainfm.create_model("test_vit_3d"), 0)


def test_norms_that_the_pooling_left_out_stay():
    encoder = brainfm.create_model("test_vit_3d", pretrained=True)
    encoder.reset_classifier(2, "fc_norm")
    learned = {id(parameter) for parameter in norms_and_biases(encoder)}
    assert id(encoder.fc_norm.weight) in learned
    assert not {id(encoder.norm.weight), id(encoder.head.bias), id(encoder.pos_embed)} & learned
