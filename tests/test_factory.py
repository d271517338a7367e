"""`create_model`: what a name stands for, which weights it gets, and what is refused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loopback_hub import Fault

import brainfm
from brainfm import ModelNameError, PretrainedCfg, WeightsError, WeightsNotFoundError, create_model, registry, weights
from brainfm.assets import ASSETS
from brainfm.hub import convert

ASSET = ASSETS / "test_resnet_3d.safetensors"


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(2, 1, 40, 48, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def z(x, small_model) -> torch.Tensor:
    """The embeddings of the packaged test ResNet."""
    return embed(small_model, x)


def embed(model, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.forward_head(model.forward_features(x), pre_logits=True)


def write_folder(folder: Path, model, model_args: dict | None = None, **cfg) -> Path:
    """A model's folder as on the Hub: config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    weights.save_state(model.state_dict(), folder / "model.safetensors", {})
    fields = model.pretrained_cfg.overlay(cfg).to_dict()
    config = {"architecture": fields["architecture"], "model_args": model_args or {}, "pretrained_cfg": fields}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def folder(tmp_path, small_model) -> Path:
    return write_folder(tmp_path / "folder", small_model)


def content(folder: Path) -> dict[str, bytes]:
    """A folder's files, as they are put on the Hub."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def two_tags(monkeypatch) -> str:
    """A model registered for one test, with weights tagged "old" (the default) and "new"."""
    monkeypatch.setattr(registry, "_entrypoints", dict(registry._entrypoints))
    monkeypatch.setattr(registry, "_cfgs", dict(registry._cfgs))
    packaged = brainfm.get_pretrained_cfg("test_resnet_3d")
    changes = {"old": {"notes": "the old one"}, "new": {"notes": "the new one"}}

    @brainfm.register_model(cfgs={tag: packaged.overlay(change) for tag, change in changes.items()})
    def two_tags_3d(**kwargs):
        return registry.model_entrypoint("test_resnet_3d")(**kwargs)

    return "two_tags_3d"


# --- Names ------------------------------------------------------------------------------------------


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


def test_local_folder_gives_bit_equal_embeddings(folder, x, z):
    model = create_model(f"local-dir:{folder}")
    assert not model.training
    assert torch.equal(model(x), z)
    assert model.pretrained_cfg.architecture == "test_resnet_3d"
    assert model.pretrained_cfg.input_spec == brainfm.get_pretrained_cfg("test_resnet_3d").input_spec
    assert model.weights_report.file == str(folder / "model.safetensors")


def test_local_folder_may_begin_with_a_tilde(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert create_model("local-dir:~/folder").weights_report.file == str(folder / "model.safetensors")


def test_local_folder_says_how_the_model_is_built(tmp_path):
    model = create_model("test_vit_3d", img_size=(16, 24, 16), global_pool="avg")
    spec = replace(model.pretrained_cfg.input_spec, output_shape=(1, 16, 24, 16))
    made = write_folder(tmp_path / "vit", model, model_args={"img_size": [16, 24, 16]}, input_spec=spec)
    again = create_model(f"local-dir:{made}")
    assert again.grid == (2, 3, 2)
    assert again.pos_embed.shape == model.pos_embed.shape
    assert create_model(f"local-dir:{made}", img_size=(16, 16, 16)).grid == (2, 2, 2)  # the caller's word counts


@pytest.mark.parametrize("branch", ["main", "v1.0"])
def test_hub_repository_gives_bit_equal_embeddings(branch, hub, folder, tmp_path, x, z):
    commit = hub.add("lab/encoder", content(folder), branch)
    name = "hf-hub:lab/encoder" + ("" if branch == "main" else f"@{branch}")
    model = create_model(name, cache_dir=tmp_path / "cache")
    assert torch.equal(model(x), z)
    assert model.weights_report.source == f"hf-hub:lab/encoder@{commit}"
    assert Path(model.weights_report.file).is_relative_to(tmp_path / "cache")


@pytest.mark.parametrize("name", ["lab/encoder", "lab/encoder@v1"])
def test_hub_that_cannot_be_reached_is_refused_with_the_way_out(name, hub, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("brainfm.weights.fetch._PATIENCE_S", 0)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.25)
    monkeypatch.setattr("huggingface_hub.file_download._ETAG_RETRY_TIMEOUT", 0.25, raising=False)
    hub.faults.append(Fault("", "stall", times=100, at=60))
    with pytest.raises(WeightsNotFoundError, match=rf"hf-hub:{name}: .*config\.json.*local-dir:FOLDER"):
        create_model(f"hf-hub:{name}", cache_dir=tmp_path)


@pytest.mark.parametrize(
    "name", ["lab/encoder", "./folder", "/data/weights.pt", "~/folder", r"C:\weights", "model.safetensors", "w.tar"]
)
def test_path_without_a_scheme_is_refused_and_both_schemes_are_named(name):
    with pytest.raises(ModelNameError, match="looks like a path") as refusal:
        create_model(name)
    assert f"hf-hub:{name}" in str(refusal.value)
    assert f"local-dir:{name}" in str(refusal.value)
    assert isinstance(refusal.value, ValueError)


@pytest.mark.parametrize("name", ["timm:resnet18", "hub:encoder", "hf_hub:lab/encoder", "local_dir:/data/folder"])
def test_unknown_scheme_is_refused_and_the_known_ones_are_named(name):
    with pytest.raises(ModelNameError, match=r"unknown scheme .* use hf-hub: or local-dir:"):
        create_model(name)


@pytest.mark.parametrize("name", ["hf-hub:", "local-dir:"])
def test_scheme_without_a_place_is_refused(name):
    with pytest.raises(ModelNameError, match="no place"):
        create_model(name)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("simclr_resnet18", "simclr_resnet18_3d"),
        ("simclr_resnet_18_3d", "simclr_resnet18_3d"),
        ("mae_vit_small_3d", "mae_vit_tiny_3d|mae_vit_large_3d"),
        ("Resnet18_3D", "resnet18_3d"),
    ],
)
def test_near_miss_lists_what_may_be_meant(name, near):
    with pytest.raises(ModelNameError, match=f"unknown model '{name}'; did you mean .*({near})"):
        create_model(name)


@pytest.mark.parametrize("name", ["", "qqq"])
def test_name_like_no_other_points_to_the_list(name):
    with pytest.raises(ModelNameError, match="list_models"):
        create_model(name)


def test_unknown_tag_lists_the_known_ones():
    with pytest.raises(ModelNameError, match=r"'v2'; known: simclr_resnet18_3d\.kaczmarek2025"):
        create_model("simclr_resnet18_3d.v2")
    with pytest.raises(ModelNameError, match="known: none"):
        create_model("resnet18_3d.v2")


# --- Which weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["simclr_resnet50_3d", "mae_vit_tiny_3d", "resnet18_3d", "vit_tiny_3d"])
def test_pretrained_without_weights_is_an_error_that_lists_those_that_have_some(name):
    with pytest.raises(WeightsNotFoundError, match=f"no weights of {name} are published") as refusal:
        create_model(name, pretrained=True)
    known = brainfm.list_pretrained()
    assert known == ["simclr_resnet18_3d.kaczmarek2025", "test_resnet_3d.phantoms", "test_vit_3d.phantoms"]
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
    with pytest.raises(ValueError, match="no field 'fil'; did you mean 'file'"):
        create_model("test_resnet_3d", pretrained_cfg={"fil": "a"})
    with pytest.raises(ValueError, match="no field 'sha'"):
        create_model("test_resnet_3d", pretrained_cfg_overlay={"sha": None})


def test_overlay_replaces_one_field(folder, x, z):
    overlay = {"file": folder / "model.safetensors"}
    model = create_model("test_resnet_3d", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model(x), z)
    assert model.weights_report.file == str(folder / "model.safetensors")
    assert model.pretrained_cfg.licence == brainfm.get_pretrained_cfg("test_resnet_3d").licence


def test_overlay_of_a_new_source_gives_weights_to_a_model_without_any(folder, x, z, monkeypatch):
    monkeypatch.setattr(registry, "_cfgs", registry._cfgs | {"test_resnet_3d": {"": PretrainedCfg("test_resnet_3d")}})
    with pytest.raises(WeightsNotFoundError):
        create_model("test_resnet_3d", pretrained=True)
    overlay = {"file": folder / "model.safetensors"}
    assert torch.equal(create_model("test_resnet_3d", pretrained=True, pretrained_cfg_overlay=overlay)(x), z)


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


# --- A folder's config ------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_folder_without_one_of_its_files_is_refused_by_name(missing, folder):
    (folder / missing).unlink()
    with pytest.raises(WeightsNotFoundError, match=f"{missing} is not there"):
        create_model(f"local-dir:{folder}")


def test_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(WeightsNotFoundError, match="is not there"):
        create_model(f"local-dir:{tmp_path / 'nowhere'}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{broken", "JSONDecodeError"),
        ("[]", "not a brainfm config"),
        ('"text"', "not a brainfm config"),
        ("{}", "architecture"),
        ('{"architecture": "test_resnet_3d"}', "pretrained_cfg"),
        ('{"architecture": "test_resnet_3d", "pretrained_cfg": null}', "not a brainfm config"),
        ('{"architecture": "test_resnet_3d", "pretrained_cfg": {"colour": "red"}}', "no field 'colour'"),
        ('{"architecture": "test_resnet_3d", "pretrained_cfg": {"input_spec": {"axes": "RAS"}}}', "no field 'axes'"),
        ('{"architecture": "test_resnet_3d", "pretrained_cfg": {"input_spec": 3}}', "not a brainfm config"),
        ('{"architecture": "test_resnet_3d", "pretrained_cfg": {}, "model_args": "no"}', "not a brainfm config"),
        ('{"architecture": "resnet101_3d", "pretrained_cfg": {}}', "'resnet101_3d', which is not registered"),
        ('{"architecture": "os.system", "pretrained_cfg": {}}', "'os.system', which is not registered"),
        ('{"architecture": ["test_resnet_3d"], "pretrained_cfg": {}}', "not registered"),
    ],
)
def test_config_that_is_not_one_is_refused_with_the_reason(text, reason, folder):
    (folder / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=reason):
        create_model(f"local-dir:{folder}")


def test_config_that_is_not_text_is_refused(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(WeightsError, match="not a brainfm config"):
        create_model(f"local-dir:{folder}")


@pytest.mark.parametrize("model_args", [{"colour": "red"}, {"num_classes": 2}, {"layers": [1, 1, 1, 1]}])
def test_config_with_arguments_that_the_constructor_does_not_take_is_refused(model_args, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_args": model_args}))
    with pytest.raises(WeightsError, match=next(iter(model_args))):
        create_model(f"local-dir:{folder}")


# --- A mirror on the Hub ----------------------------------------------------------------------------

NOWHERE = "http://127.0.0.1:9/released.tar"  # nothing listens there


@pytest.fixture
def released(tmp_path, small_model, monkeypatch):
    """A model registered for one test, whose published file nobody serves: its name, and that file."""
    monkeypatch.setattr(registry, "_entrypoints", dict(registry._entrypoints))
    monkeypatch.setattr(registry, "_cfgs", dict(registry._cfgs))
    monkeypatch.setattr("brainfm.weights.url._TRIES", 1)
    state = {f"encoder.{key}": value for key, value in small_model.state_dict().items()}
    torch.save({"epoch": 3, "model_state_dict": state}, tmp_path / "released.tar")
    digest = hashlib.sha256((tmp_path / "released.tar").read_bytes()).hexdigest()
    spec = brainfm.get_pretrained_cfg("test_resnet_3d").input_spec

    @brainfm.register_model(cfgs={"first": PretrainedCfg(url=NOWHERE, sha256=digest, input_spec=spec)})
    def lab_mirrored_3d(**kwargs):
        return registry.model_entrypoint("test_resnet_3d")(**kwargs)

    return "lab_mirrored_3d", tmp_path / "released.tar"


@pytest.fixture
def mirror(hub, released, tmp_path, monkeypatch):
    """The Hub, with that model converted in the organisation "mirror", which the environment names."""
    name, file = released
    made = convert(file, tmp_path / "converted", f"{name}.first")
    hub.add(f"mirror/{name}.first", content(made))
    monkeypatch.setenv("BRAINFM_HUB_ORG", "mirror")
    return hub


def create(name, tmp_path, pretrained=True, **kwargs):
    return create_model(name, pretrained, cache_dir=tmp_path / "cache", **kwargs)


@pytest.mark.parametrize("tag", ["", ".first"])
def test_registered_model_is_taken_from_the_mirror(tag, mirror, released, tmp_path, x, z):
    commit = mirror.repositories["mirror/lab_mirrored_3d.first"].branches["main"]
    model = create(f"{released[0]}{tag}", tmp_path)
    assert torch.equal(model(x), z)
    assert model.weights_report.source == f"hf-hub:mirror/lab_mirrored_3d.first@{commit}"
    cfg = model.pretrained_cfg
    assert (cfg.name, cfg.hub_revision, cfg.url) == ("lab_mirrored_3d.first", commit, None)


@pytest.mark.parametrize("organisation", [None, ""])
def test_without_a_mirror_the_published_source_is_asked(organisation, mirror, released, tmp_path, monkeypatch):
    monkeypatch.delenv("BRAINFM_HUB_ORG")
    if organisation is not None:
        monkeypatch.setenv("BRAINFM_HUB_ORG", organisation)
    with pytest.raises(WeightsNotFoundError, match=f"cannot download {NOWHERE}"):
        create(released[0], tmp_path)
    assert mirror.asked == []


def test_model_that_is_not_asked_to_be_pretrained_asks_no_mirror(mirror, released, tmp_path):
    model = create(released[0], tmp_path, pretrained=False)
    assert model.pretrained_cfg.url == NOWHERE
    assert create(released[0], tmp_path, checkpoint_path=released[1]).weights_report.file == str(released[1])
    assert mirror.asked == []
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["test_resnet_3d", "test_resnet_3d.phantoms", "test_vit_3d"])
def test_packaged_weights_are_not_taken_from_a_mirror(name, mirror, tmp_path):
    assert create(name, tmp_path).weights_report.source == "in this package"
    assert mirror.asked == []


def test_place_in_a_name_comes_before_the_mirror(mirror, released, folder, tmp_path, x, z):
    mirror.add("lab/encoder", content(folder))
    assert create("hf-hub:lab/encoder", tmp_path).pretrained_cfg.hub_id == "lab/encoder"
    assert torch.equal(create(f"local-dir:{folder}", tmp_path)(x), z)
    assert not any("/mirror/" in request for request in mirror.asked)


@pytest.mark.parametrize("kind", ["file", "hub_id", "url", "cfg", "dict", "tag"])
def test_source_that_is_given_comes_before_the_mirror(kind, mirror, released, folder, tmp_path):
    mirror.add("lab/encoder", content(folder))
    given = {
        "file": {"pretrained_cfg_overlay": {"file": ASSET}},
        "hub_id": {"pretrained_cfg_overlay": {"hub_id": "lab/encoder"}},
        "url": {"pretrained_cfg_overlay": {"url": NOWHERE}},
        "cfg": {"pretrained_cfg": PretrainedCfg(file=str(ASSET))},
        "dict": {"pretrained_cfg": {"hub_id": "lab/encoder"}},
        "tag": {"pretrained_cfg": "first"},
    }[kind]
    if kind in ("url", "tag"):
        with pytest.raises(WeightsNotFoundError, match=f"cannot download {NOWHERE}"):
            create(released[0], tmp_path, **given)
    else:
        assert create(released[0], tmp_path, **given).weights_report.source in ("in this package", "hf-hub:lab/encoder")
    assert not any("/mirror/" in request for request in mirror.asked)


def test_overlay_that_names_no_source_keeps_the_mirror(mirror, released, tmp_path, x, z):
    model = create(released[0], tmp_path, pretrained_cfg_overlay={"notes": "mine"})
    assert torch.equal(model(x), z)
    assert (model.pretrained_cfg.notes, model.pretrained_cfg.hub_id) == ("mine", "mirror/lab_mirrored_3d.first")


def repository_with(mirror, **changes):
    """Push the mirror's config anew, with other fields."""
    repository = mirror.repositories["mirror/lab_mirrored_3d.first"]
    config = json.loads(repository.commits[repository.branches["main"]]["config.json"])
    for key, value in changes.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    repository.commit({"config.json": json.dumps(config).encode()})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"provenance": {"source_sha256": "0" * 64}}, "was converted from a file with sha256 0000"),
        ({"provenance": {"source_sha256": None}}, "was converted from a file with sha256 None"),
        ({"provenance": {"source_sha256": ["a"]}}, "was converted from a file with sha256"),
        ({"provenance": None}, "not a brainfm config|was converted"),
        ({"provenance": "trust me"}, "not a brainfm config"),
        ({"provenance": []}, "not a brainfm config|was converted"),
        ({"pretrained_cfg": {"tag": "second"}}, r"holds lab_mirrored_3d\.second, not lab_mirrored_3d\.first"),
        ({"architecture": "test_resnet_3d"}, r"holds test_resnet_3d\.first, not lab_mirrored_3d\.first"),
        ({"pretrained_cfg": {"sha256": "0" * 64}}, "sha256 is .* expects 0000"),
    ],
    ids=["other", "none", "list", "null", "text", "empty", "tag", "architecture", "weights"],
)
def test_mirror_of_something_else_is_refused(changes, reason, mirror, released, tmp_path):
    repository_with(mirror, **changes)
    with pytest.raises(WeightsError, match=reason) as refusal:
        create(released[0], tmp_path)
    assert "lab_mirrored_3d.first" in str(refusal.value)


def test_mirror_that_lacks_the_model_is_refused_and_the_variable_named(mirror, released, tmp_path, monkeypatch):
    monkeypatch.setenv("BRAINFM_HUB_ORG", "empty")
    with pytest.raises(WeightsNotFoundError, match=r"empty/lab_mirrored_3d\.first.*no such repository") as refusal:
        create(released[0], tmp_path)
    assert "BRAINFM_HUB_ORG" in str(refusal.value)


@pytest.mark.parametrize("organisation", ["a/b", "hf-hub:mirror", "mirror/", "mir ror", "../mirror"])
def test_mirror_whose_name_is_none_is_refused_and_not_asked_for(organisation, mirror, released, tmp_path, monkeypatch):
    monkeypatch.setenv("BRAINFM_HUB_ORG", organisation)
    with pytest.raises(WeightsError, match="not a repository's name"):
        create(released[0], tmp_path)
    assert mirror.asked == []


def test_published_hash_in_capitals_is_that_of_the_mirror(mirror, released, tmp_path, monkeypatch, x, z):
    name, _ = released
    cfg = registry._cfgs[name]["first"]
    monkeypatch.setitem(registry._cfgs, name, {"first": replace(cfg, sha256=cfg.sha256.upper())})
    assert torch.equal(create(name, tmp_path)(x), z)
