"""`create_model`: which weights a model gets, its head and channels, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from model_folders import write_folder

import brainfm
from brainfm import ModelNameError, PretrainedCfg, WeightsError, WeightsNotFoundError, create_model, registry, weights
from brainfm.assets import ASSETS

ASSET = ASSETS / "test_resnet_3d.safetensors"


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(2, 1, 40, 48, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def z(x, small_model) -> torch.Tensor:
    """The embeddings of the packaged test ResNet."""
    return embed(small_model, x)


@pytest.fixture
def folder(tmp_path, small_model) -> Path:
    return write_folder(tmp_path / "folder", small_model)


def embed(model, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.forward_head(model.forward_features(x), pre_logits=True)


@pytest.fixture
def two_tags(monkeypatch) -> str:
    """A model registered for one test, with weights tagged "old" (the default) and "new"."""
    monkeypatch.setattr(registry, "_registered", {})
    packaged = brainfm.get_pretrained_cfg("test_resnet_3d")
    changes = {"old": {"notes": "the old one"}, "new": {"notes": "the new one"}}

    @brainfm.register_model(cfgs={tag: packaged.overlay(change) for tag, change in changes.items()})
    def two_tags_3d(**kwargs):
        return registry.model_entrypoint("test_resnet_3d")(**kwargs)

    return "two_tags_3d"


# --- Which weights ----------------------------------------------------------------------------------


def test_architecture_alone_has_initial_weights_and_its_default_cfg(x, z):
    model = create_model("test_resnet_3d")
    assert model.pretrained_cfg == brainfm.get_pretrained_cfg("test_resnet_3d.phantoms")
    assert model.weights_report is None
    assert not torch.equal(embed(model, x), z)


def test_architecture_with_tag_takes_the_weights_of_that_tag(two_tags, x, z):
    for name, tag in [(two_tags, "old"), (f"{two_tags}.old", "old"), (f"{two_tags}.new", "new")]:
        model = create_model(name, pretrained=True)
        assert (model.pretrained_cfg.tag, model.pretrained_cfg.notes) == (tag, f"the {tag} one")
        assert torch.equal(embed(model, x), z)


@pytest.mark.parametrize("name", ["simclr_resnet50_3d", "mae_vit_tiny_3d", "resnet18_3d", "vit_tiny_3d"])
def test_pretrained_without_weights_is_an_error_that_lists_those_that_have_some(name):
    with pytest.raises(WeightsNotFoundError, match=f"no weights of {name} are published") as refusal:
        create_model(name, pretrained=True)
    known = brainfm.list_pretrained()
    assert {"simclr_resnet18_3d.kaczmarek2025", "test_resnet_3d.phantoms", "test_vit_3d.phantoms"} <= set(known)
    assert ", ".join(known) in str(refusal.value)
    assert "checkpoint_path" in str(refusal.value)


def test_another_cfg_is_taken_by_tag(two_tags):
    assert create_model(two_tags, pretrained_cfg="new").pretrained_cfg.notes == "the new one"
    with pytest.raises(ModelNameError, match="newer"):
        create_model(two_tags, pretrained_cfg="newer")


@pytest.mark.parametrize("kind", ["dict", "json", "cfg"])
def test_another_cfg_is_taken_whole(kind, x, z):
    cfg = PretrainedCfg(file=str(ASSET), notes="mine")
    given = {"dict": {"file": str(ASSET), "notes": "mine"}, "cfg": cfg}
    given["json"] = json.loads(json.dumps(cfg.to_dict())) | {"file": str(ASSET)}
    model = create_model("test_resnet_3d", pretrained=True, pretrained_cfg=given[kind])
    assert torch.equal(model(x), z)
    assert model.pretrained_cfg == PretrainedCfg("test_resnet_3d", file=str(ASSET), notes="mine", num_features=128)


def test_unknown_field_of_a_cfg_is_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match="no field fil; did you mean file"):
        create_model("test_resnet_3d", pretrained_cfg={"fil": "a"})
    with pytest.raises(ValueError, match="no field sha;"):
        create_model("test_resnet_3d", pretrained_cfg_overlay={"sha": None})


def test_overlay_replaces_one_field(folder, x, z):
    overlay = {"file": folder / "model.safetensors"}
    model = create_model("test_resnet_3d", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model(x), z)
    assert model.weights_report.file == str(folder / "model.safetensors")
    assert model.pretrained_cfg.licence == brainfm.get_pretrained_cfg("test_resnet_3d").licence


def test_overlay_of_a_new_source_gives_weights_to_a_model_without_any(folder, x, z, monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})

    @brainfm.register_model
    def bare_3d(**kwargs):
        return registry.model_entrypoint("test_resnet_3d")(**kwargs)

    with pytest.raises(WeightsNotFoundError):
        create_model("bare_3d", pretrained=True)
    overlay = {"file": folder / "model.safetensors"}
    assert torch.equal(create_model("bare_3d", pretrained=True, pretrained_cfg_overlay=overlay)(x), z)


def test_overlay_file_replaces_the_weights_of_a_folder(folder, tmp_path, x):
    torch.manual_seed(5)
    other = create_model("test_resnet_3d")
    weights.save_state(other.state_dict(), tmp_path / "other.safetensors", {})
    model = create_model(f"local-dir:{folder}", pretrained_cfg_overlay={"file": tmp_path / "other.safetensors"})
    assert torch.equal(model(x), other(x))


def test_file_that_is_not_there_is_refused(tmp_path):
    overlay = {"file": tmp_path / "gone.safetensors"}
    with pytest.raises(WeightsNotFoundError, match=r"gone\.safetensors is not there"):
        create_model("test_resnet_3d", pretrained=True, pretrained_cfg_overlay=overlay)


def test_wrong_hash_is_refused_and_can_be_switched_off(x, z):
    right, wrong = hashlib.sha256(ASSET.read_bytes()).hexdigest(), "0" * 64
    for overlay in ({"sha256": wrong}, {"sha256": wrong, "file": ASSET}):
        with pytest.raises(WeightsError, match=f'{right}, and .* expects {wrong}.*"sha256": None'):
            create_model("test_resnet_3d", pretrained=True, pretrained_cfg_overlay=overlay)
    cfg = PretrainedCfg(file=str(ASSET), sha256=wrong)
    for cfg_hash in (None, right):
        overlay = {"sha256": cfg_hash}
        model = create_model("test_resnet_3d", pretrained=True, pretrained_cfg=cfg, pretrained_cfg_overlay=overlay)
        assert torch.equal(model(x), z)


def test_hash_may_be_written_in_capitals():
    overlay = {"sha256": hashlib.sha256(ASSET.read_bytes()).hexdigest().upper()}
    assert create_model("test_resnet_3d", pretrained=True, pretrained_cfg_overlay=overlay).weights_report is not None


def test_hash_given_for_a_folders_weights_is_checked(folder, x, z):
    right = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert torch.equal(create_model(f"local-dir:{folder}", pretrained_cfg_overlay={"sha256": right})(x), z)
    with pytest.raises(WeightsError, match="sha256"):
        create_model(f"local-dir:{folder}", pretrained_cfg_overlay={"sha256": "0" * 64})


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("pretrained", [False, True])
def test_checkpoint_path_comes_before_the_published_weights(as_text, pretrained, tmp_path, x):
    torch.manual_seed(5)
    other = create_model("test_resnet_3d")
    path = tmp_path / "mine.pt"
    torch.save({"state_dict": other.state_dict(), "epoch": 7}, path)
    model = create_model("test_resnet_3d", pretrained, checkpoint_path=str(path) if as_text else path)
    assert torch.equal(model(x), other(x))
    assert model.weights_report == weights.WeightsReport(str(path), str(path), ("epoch",))


def test_checkpoint_of_another_architecture_is_refused():
    with pytest.raises(WeightsError, match=r"do not fit this VisionTransformer; .* missing: .*; .* unexpected: "):
        create_model("test_vit_3d", checkpoint_path=ASSET)


# --- Heads and channels -----------------------------------------------------------------------------


def test_new_head_stands_on_the_pretrained_trunk(x, z):
    torch.manual_seed(0)
    model = create_model("test_resnet_3d", pretrained=True, num_classes=4)
    assert torch.equal(embed(model, x), z)
    assert model.num_classes == 4
    head = model.get_classifier()
    assert head.weight.shape == (4, 128)
    assert 0.005 < head.weight.std() < 0.02
    assert head.bias.abs().max() == 0


@pytest.fixture
def trained_head(tmp_path):
    """A folder with a model of three classes, and the model."""
    model = create_model("test_resnet_3d", pretrained=True, num_classes=3)
    torch.nn.init.normal_(model.get_classifier().weight)
    torch.nn.init.normal_(model.get_classifier().bias)
    return write_folder(tmp_path / "trained", model, num_classes=3), model


def test_trained_head_is_kept_where_it_is_asked_for(trained_head, x):
    folder, trained = trained_head
    with torch.inference_mode():
        assert torch.equal(create_model(f"local-dir:{folder}", num_classes=3)(x), trained(x))


def test_trained_head_is_replaced_where_another_is_asked_for(trained_head, x, z):
    folder, _ = trained_head
    embedding = create_model(f"local-dir:{folder}")
    assert torch.equal(embedding(x), z)
    assert embedding.num_classes == 0
    other = create_model(f"local-dir:{folder}", num_classes=2)
    assert torch.equal(embed(other, x), z)
    assert other(x).shape == (2, 2)


def test_trained_head_of_a_checkpoint_is_kept_where_it_is_asked_for(trained_head, x):
    folder, trained = trained_head
    model = create_model("test_resnet_3d", num_classes=3, checkpoint_path=folder / "model.safetensors")
    with torch.inference_mode():
        assert torch.equal(model(x), trained(x))


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", ["test_resnet_3d", "test_vit_3d"])
@pytest.mark.parametrize("channels", [2, 3])
def test_copies_of_one_image_in_every_channel_give_its_embedding(name, channels, x):
    one, more = (create_model(name, pretrained=True, in_chans=n) for n in (1, channels))
    with torch.inference_mode():
        assert relative(more(x.expand(-1, channels, -1, -1, -1)), one(x)) < 1e-5


def test_weights_of_three_channels_are_summed_for_one(tmp_path, x):
    three = create_model("test_resnet_3d", in_chans=3)
    folder = write_folder(tmp_path / "three", three, in_chans=3)
    one = create_model(f"local-dir:{folder}", in_chans=1)
    with torch.inference_mode():
        assert relative(one(x), three(x.expand(-1, 3, -1, -1, -1))) < 1e-5


def test_arguments_reach_the_constructor(x):
    model = create_model("test_vit_3d", pretrained=True, global_pool="avg", drop_rate=0.3)
    assert (model.global_pool, model.head_drop.p) == ("avg", 0.3)
    with torch.inference_mode():
        assert torch.equal(model(x), model.forward_features(x)[:, 1:].mean(dim=1))


def test_a_model_with_two_names_is_one_and_listed_once():
    with torch.device("meta"):
        model, other = brainfm.create_model("swin3d_t"), brainfm.create_model("swin_t_3d")
    assert other.pretrained_cfg == model.pretrained_cfg
    assert brainfm.is_model("swin_t_3d.kinetics400")
    assert brainfm.get_pretrained_cfg("swin_t_3d").name == "swin3d_t.kinetics400"
    assert [name for name in brainfm.list_models("*swin*t*") if name in ("swin3d_t", "swin_t_3d")] == ["swin3d_t"]

    def swin_t_3d(**kwargs):
        return kwargs

    with pytest.raises(ValueError, match="another name of swin3d_t"):
        brainfm.register_model(swin_t_3d)
