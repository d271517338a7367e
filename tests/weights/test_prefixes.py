"""An encoder's weights out of the module that it was trained in: a LightningModule, SimCLR, DDP, torch.compile."""

from __future__ import annotations

import ast
import re

import pytest
import torch
from weight_files import prefixed, same

from brainfm import WeightsError, create_model

NAMES = ["test_resnet_3d", "test_vit_3d"]


def trained(name: str) -> dict[str, torch.Tensor]:
    return create_model(name, pretrained=True).state_dict()


def loaded(name: str, state: dict[str, torch.Tensor], folder, **kwargs):
    torch.save({"epoch": 3, "state_dict": state}, folder / "last.ckpt")
    return create_model(name, checkpoint_path=folder / "last.ckpt", **kwargs)


@pytest.mark.parametrize("prefix", ["net.", "model.", "encoder.", "module.", "_orig_mod.", "model._orig_mod.", "a.b."])
@pytest.mark.parametrize("name", NAMES)
def test_prefix_that_every_name_has_is_taken_off(name, prefix, tmp_path):
    state = trained(name)
    model = loaded(name, prefixed(prefix, state), tmp_path)
    assert same(model.state_dict(), state)
    assert model.weights_report.dropped == ("epoch",)


def test_classifier_under_the_prefix_is_kept(tmp_path):
    head = {"fc.weight": torch.ones(3, 128), "fc.bias": torch.zeros(3)}
    model = loaded("test_resnet_3d", prefixed("net.", trained("test_resnet_3d") | head), tmp_path, num_classes=3)
    assert torch.equal(model.fc.weight, head["fc.weight"])


@pytest.mark.parametrize("outer", ["", "module.", "model."])
@pytest.mark.parametrize("name", NAMES)
def test_encoder_is_taken_from_beside_its_projector_with_notice(name, outer, tmp_path):
    state = trained(name)
    model = loaded(name, prefixed(outer, prefixed("encoder.", state) | {"projector.0.weight": torch.ones(2)}), tmp_path)
    assert same(model.state_dict(), state)
    assert model.weights_report.dropped == ("projector", "epoch")


@pytest.mark.parametrize(
    "beside", [{"criterion.weight": torch.ones(2)}, {"queue": torch.ones(2)}, {"ema.conv1.weight": torch.ones(2)}]
)
def test_prefix_beside_other_parts_is_refused_with_what_takes_it(beside, tmp_path):
    state = trained("test_resnet_3d")
    with pytest.raises(WeightsError, match=r"is in it under 'net\.', beside") as refused:
        loaded("test_resnet_3d", prefixed("net.", state) | beside, tmp_path)
    overlay = ast.literal_eval(re.search(r"pretrained_cfg_overlay=(.*)$", str(refused.value))[1])
    model = create_model("test_resnet_3d", checkpoint_path=tmp_path / "last.ckpt", pretrained_cfg_overlay=overlay)
    assert same(model.state_dict(), state)


def test_two_copies_of_the_encoder_are_refused_with_what_takes_one(tmp_path):
    state = trained("test_resnet_3d")
    other = {key: torch.zeros_like(value) for key, value in state.items()}
    both = prefixed("encoder.", state) | prefixed("momentum_encoder.", other)
    with pytest.raises(WeightsError, match=r"under 'encoder\.' and under 'momentum_encoder\.'") as refused:
        loaded("test_resnet_3d", both, tmp_path)
    overlay = ast.literal_eval(re.search(r"pretrained_cfg_overlay=(.*)$", str(refused.value))[1])
    model = create_model("test_resnet_3d", checkpoint_path=tmp_path / "last.ckpt", pretrained_cfg_overlay=overlay)
    assert same(model.state_dict(), state)


def test_misfit_under_a_prefix_names_the_prefix_and_the_tensors(tmp_path):
    state = trained("test_resnet_3d")
    state.pop("layer1.0.bn1.bias")
    with pytest.raises(WeightsError, match=r"last\.ckpt, under 'net\.': .*1 missing: layer1\.0\.bn1\.bias$"):
        loaded("test_resnet_3d", prefixed("net.", state), tmp_path)
