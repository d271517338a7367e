"""What a user of timm expects of an encoder, by timm's words; and of pretrained weights that are shown another grid."""

from __future__ import annotations

import logging

import pytest
import torch

import brainfm
from brainfm import create_model
from brainfm.models import FeatureMaps

X = torch.randn(2, 1, 40, 48, 48, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "indices"), [("test_resnet_3d", (1, -1)), ("test_vit_3d", (0, -1))])
def test_features_only_gives_the_chosen_maps_of_the_pretrained_encoder(name, indices):
    encoder = create_model(name, pretrained=True)
    backbone = create_model(name, pretrained=True, features_only=True, out_indices=indices)
    assert isinstance(backbone, FeatureMaps)
    assert not backbone.training
    with torch.inference_mode():
        found, wanted = backbone(X), encoder.forward_intermediates(X, indices, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert backbone.feature_info.channels() == [cells.shape[1] for cells in found]
    assert backbone.default_cfg == encoder.pretrained_cfg
    assert brainfm.create_transform(backbone).spec == encoder.pretrained_cfg.input_spec


def test_features_only_gives_all_maps_by_default_and_refuses_what_is_not_there():
    assert len(create_model("test_resnet_3d", features_only=True)(X)) == 5
    with pytest.raises(ValueError, match="name no stage"):
        create_model("test_resnet_3d", features_only=True, out_indices=(7,))
    with pytest.raises(ValueError, match="features_only=True"):
        create_model("test_resnet_3d", out_indices=(0,))


def test_embed_refuses_a_backbone_of_maps(sample):
    with pytest.raises(ValueError, match="features_only gives maps"):
        brainfm.embed([sample], create_model("test_resnet_3d", pretrained=True, features_only=True))


def test_feature_info_answers_in_timms_words():
    info = create_model("test_resnet_3d").feature_info
    assert info.channels() == [stage["num_chs"] for stage in info]
    assert info.reduction()[-1] == info.reduction(-1) == (16, 16, 16)
    assert info.module_name([0, -1]) == ["act", "layer4"]


def test_default_cfg_is_the_pretrained_cfg():
    model = create_model("test_vit_3d", pretrained=True)
    assert model.default_cfg is model.pretrained_cfg


@pytest.mark.parametrize("name", ["test_resnet_3d", "test_vit_3d"])
def test_intermediates_come_as_maps_or_as_rows_of_cells(name):
    model = create_model(name, pretrained=True)
    with torch.inference_mode():
        (maps,) = model.forward_intermediates(X, 1, intermediates_only=True)
        (rows,) = model.forward_intermediates(X, 1, intermediates_only=True, output_fmt="NLC")
    assert torch.equal(rows, maps.flatten(2).transpose(1, 2))
    with pytest.raises(ValueError, match="output_fmt must be 'NCDHW'"):
        model.forward_intermediates(X, output_fmt="NCHW")


@pytest.mark.parametrize("name", ["test_resnet_3d", "test_vit_3d", "sfcn_age"])
def test_no_pooling_is_refused_by_every_call_with_what_gives_the_map(name):
    model = create_model(name)
    with pytest.raises(ValueError, match=r"not ''; what is not pooled is model\.forward_features"):
        model.reset_classifier(0, global_pool="")
    with pytest.raises(ValueError, match=r"not ''; what is not pooled is model\.forward_features"):
        create_model(name, global_pool="")


def test_encoder_comes_in_eval_mode_with_gradients_and_trains_when_told():
    model = create_model("test_resnet_3d", pretrained=True)
    before = model.bn1.running_mean.clone()
    assert all(parameter.requires_grad for parameter in model.parameters())
    model(X)
    assert torch.equal(model.bn1.running_mean, before)
    model.train()(X)
    assert not torch.equal(model.bn1.running_mean, before)


# --- Another grid -----------------------------------------------------------------------------------


def grids_said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "expects volumes" in record.getMessage()]


def test_pretrained_encoder_says_once_that_a_volume_is_on_another_grid(caplog):
    model = create_model("test_resnet_3d", pretrained=True)
    with caplog.at_level(logging.WARNING, "brainfm"), torch.inference_mode():
        model(X)
        assert grids_said(caplog) == []
        model(X[..., :32])
        model(X[..., :32])
    (line,) = grids_said(caplog)
    assert "test_resnet_3d.phantoms expects volumes of 40×48×48 voxels, and was given 40×48×32" in line


def test_untrained_encoder_takes_any_grid_without_a_word(caplog):
    with caplog.at_level(logging.WARNING, "brainfm"), torch.inference_mode():
        create_model("test_resnet_3d")(X[..., :32])
        create_model("test_vit_3d", dynamic_img_size=True)(X[..., :32])
    assert grids_said(caplog) == []
