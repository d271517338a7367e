"""What a model name stands for: a registered model, a folder, a repository on the Hub, or a mirror of one."""

from __future__ import annotations

import hashlib
import json
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loopback_hub import Fault
from model_folders import content, write_folder

import brainfm
from brainfm import ModelNameError, PretrainedCfg, WeightsError, WeightsNotFoundError, create_model, registry
from brainfm.assets import ASSETS
from brainfm.files import file_git_blob
from brainfm.hub import convert

ASSET = ASSETS / "test_resnet_3d.safetensors"


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(2, 1, 40, 48, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def z(x, small_model) -> torch.Tensor:
    """The embeddings of the packaged test ResNet."""
    with torch.inference_mode():
        return small_model(x)


@pytest.fixture
def folder(tmp_path, small_model) -> Path:
    return write_folder(tmp_path / "folder", small_model)


# --- Names ------------------------------------------------------------------------------------------


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
    made = write_folder(tmp_path / "vit", model, input_spec=spec)
    again = create_model(f"local-dir:{made}")
    assert (again.grid, again.global_pool) == ((2, 3, 2), "avg")
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


# --- A folder's config ------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_folder_without_one_of_its_files_is_refused_by_name(missing, folder):
    (folder / missing).unlink()
    with pytest.raises(WeightsNotFoundError, match=f"{missing} is not there"):
        create_model(f"local-dir:{folder}")


def test_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(WeightsNotFoundError, match="is not there"):
        create_model(f"local-dir:{tmp_path / 'nowhere'}")


ONE = '{"architecture": "test_resnet_3d", "pretrained_cfg": {}}'  # of format 1, which no file names
NESTED = "[" * 50_000 + "]" * 50_000


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{broken", "JSONDecodeError"),
        (NESTED, "RecursionError"),
        ("[]", "not a brainfm config"),
        ('"text"', "not a brainfm config"),
        ("{}", "architecture"),
        ('{"format": null}', "not a brainfm config"),
        ('{"format": "2"}', "not a brainfm config"),
        ('{"format": 3, "brainfm_version": "7.1"}', "written by brainfm 7.1, in a format that is newer than this"),
        ('{"architecture": "test_resnet_3d"}', "pretrained_cfg"),
        (ONE.replace("{}", "null"), "not a brainfm config"),
        (ONE.replace("{}", '{"colour": "red"}'), "no field colour"),
        (ONE.replace("{}", '{"input_spec": {"axes": "RAS"}}'), "no field axes"),
        (ONE.replace("{}", '{"input_spec": 3}'), "not a brainfm config"),
        (ONE.replace("{}", f'{{"input_spec": {NESTED}}}'), "RecursionError"),
        (ONE.replace("{}", '{}, "model_args": "no"'), "not a brainfm config"),
        (ONE.replace("test_resnet_3d", "resnet101_3d"), "'resnet101_3d', which is not registered"),
        (ONE.replace("test_resnet_3d", "os.system"), "'os.system', which is not registered"),
        (ONE.replace('"test_resnet_3d"', '["test_resnet_3d"]'), "not registered"),
    ],
    ids=lambda text: text[:70],
)
def test_config_that_is_not_one_is_refused_with_the_reason(text, reason, folder):
    (folder / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=reason) as refusal:
        create_model(f"local-dir:{folder}")
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 600


def nested(depth: int) -> list:
    return [nested(depth - 1)] if depth else []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda card, model: card.update(models={}), "it has 0 models, and a folder holds one"),
        (lambda card, model: card["models"].update(other=model), "it has 2 models, and a folder holds one"),
        (lambda card, model: card.update(models=[model]), "Card: models is .* must be a mapping of ModelCards"),
        (lambda card, model: model.update(network="os.system"), "the network 'os.system', which is not registered"),
        (lambda card, model: model.update(network="encoder"), "the network 'encoder', which is not registered"),
        (lambda card, model: model.update(network=["resnet"]), "network is .* must be str"),
        (lambda card, model: model.pop("network"), "ModelCard lacks network"),
        (lambda card, model: model.update(colour="red"), "ModelCard has no field colour"),
        (lambda card, model: model.update(input="no"), "its input 'no' is none of the card's: input"),
        (lambda card, model: model.update(args="no"), "args is 'no', and must be a mapping"),
        (lambda card, model: model.update(args=nested(100)), "args is .* must be a mapping"),
        (lambda card, model: model.update(readout={"pol": "avg"}), "Readout has no field pol; did you mean pool"),
        (lambda card, model: model.update(in_chans=0), "in_chans 0; both are 1 or more"),
        (
            lambda card, model: card["inputs"]["input"].update(channels=["T1w", "T2w"]),
            r"its network takes 1 channel, and its input contract gives 2 \(T1w, T2w\); mend in_chans or",
        ),
        (lambda card, model: model.update(in_chans=True), "in_chans is True, and must be int"),
        (lambda card, model: model.update(in_chans=10**15), "its config's arguments do not fit test_resnet_3d"),
        (lambda card, model: model.update(num_features=1.5), "num_features is 1.5, and must be int"),
        (
            lambda card, model: model["weights"]["phantoms"].update(digest="md5:1"),
            "digest is 'md5:1', and must be sha256",
        ),
        (lambda card, model: card["inputs"]["input"].update(operations=[{"op": "Blur"}]), "unknown operation 'Blur'"),
        (lambda card, model: card["inputs"]["input"].update(operations=nested(100)), "the card of test_resnet_3d: "),
        (lambda card, model: card["inputs"]["input"].update(grid={"shape": [1, 1]}), "Grid lacks spacing, origin"),
        (
            lambda card, model: card.update(cohorts=[{"name": "IXI", "patients": "many", "scans": 1}]),
            "patients is 'many'",
        ),
        (lambda card, model: card.update(provenance="trust me"), "not a brainfm config"),
    ],
)
def test_config_whose_card_is_not_one_is_refused_with_the_reason_in_one_line(change, reason, folder):
    config = json.loads((folder / "config.json").read_text())
    change(config, config["models"]["test_resnet_3d"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=reason) as refusal:
        create_model(f"local-dir:{folder}")
    assert str(refusal.value).startswith(f"local-dir:{folder}: ")
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 600


def test_config_that_is_not_text_is_refused(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(WeightsError, match="not a brainfm config"):
        create_model(f"local-dir:{folder}")


@pytest.mark.parametrize(
    "args",
    [{"colour": "red"}, {"num_classes": 2}, {"layers": [1]}, {"widths": "abcd"}, {"widths": [16, 32, 64, 2**60]}],
)
def test_config_with_arguments_that_the_constructor_does_not_take_is_refused(args, folder):
    config = json.loads((folder / "config.json").read_text())
    config["models"]["test_resnet_3d"]["args"] |= args
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="its config's arguments do not fit test_resnet_3d: "):
        create_model(f"local-dir:{folder}")


def deep(depth: int) -> list:
    made: list = []
    for _ in range(depth):
        made = [made]
    return made


LARGER = "they make a network that is larger than its weight file"


@pytest.mark.parametrize(
    ("network", "change", "reason"),
    [
        ("resnet", {"in_chans": 10**9}, LARGER),
        ("resnet", {"in_chans": 10**4}, LARGER),
        ("resnet", {"in_chans": 1e9}, "in_chans is 1000000000.0, and must be int"),
        ("resnet", {"args": {"widths": [10**5] * 4}}, LARGER),
        ("resnet", {"args": {"layers": [10**9, 1, 1, 1]}}, LARGER),
        ("resnet", {"args": {"layers": [-1, 1, 1, 1]}}, "layers below 0"),
        ("resnet", {"args": {"global_pool": "__class__"}}, "pools by 'avg', not '__class__'"),
        ("resnet", {"readout": {"pool": "__class__"}}, "its readout pools by '__class__'"),
        ("resnet", {"args": {"widths": deep(200)}}, "do not fit"),
        ("resnet", {"args": deep(200)}, "args is .* must be a mapping"),
        ("vit", {"args": {"img_size": [10**6] * 3}}, LARGER),
        ("vit", {"args": {"img_size": [2000] * 3}}, LARGER),
        ("vit", {"args": {"dim": 10**6}}, LARGER),
        ("vit", {"args": {"depth": 10**9}}, LARGER),
        ("vit", {"args": {"depth": -1}}, "depth below 0"),
        ("vit", {"args": {"num_heads": 0}}, "cannot be divided among 0 heads"),
        ("vit", {"args": {"num_heads": 10**9}}, "cannot be divided among 1000000000 heads"),
        ("vit", {"args": {"global_pool": "__class__"}}, "pools by 'token' or 'avg' or 'fc_norm', not '__class__'"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_config_of_a_network_that_cannot_be_its_files_is_refused_before_memory_is_taken(
    network, change, reason, tmp_path
):
    name = f"test_{network}_3d"
    folder = write_folder(tmp_path / "folder", create_model(name, pretrained=True))
    create_model(f"local-dir:{folder}")  # what it imports is not counted
    config = json.loads((folder / "config.json").read_text())
    model = config["models"][name]
    args = change.get("args", {})
    model |= change | ({"args": model["args"] | args} if isinstance(args, dict) else {})
    (folder / "config.json").write_text(json.dumps(config))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WeightsError, match=reason) as refusal:
        create_model(f"local-dir:{folder}")
    assert str(refusal.value).startswith(f"local-dir:{folder}: ")
    assert "\n" not in str(refusal.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50e3  # kB


@pytest.mark.parametrize("text", ["[" * 10**6, '{"models": ' * 10**5, '{"format": ' + "9" * 10**5 + "}", " " * 2**25])
def test_config_nested_or_long_beyond_reason_is_refused_in_one_line(text, folder):
    (folder / "config.json").write_text(text)
    with pytest.raises(WeightsError, match="is not a brainfm config") as refusal:
        create_model(f"local-dir:{folder}")
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 600


def test_arguments_of_ones_own_may_make_a_network_larger_than_the_file(folder):
    """A config is somebody's word; what the caller asks for is not held against it."""
    model = create_model(f"local-dir:{folder}", in_chans=300, num_classes=10**6)
    assert sum(parameter.numel() for parameter in model.parameters()) > (folder / "model.safetensors").stat().st_size


def test_config_says_all_of_its_model_whose_name_need_not_be_registered(folder, x, z):
    config = json.loads((folder / "config.json").read_text())
    config["models"] = {"somebodys_3d": config["models"]["test_resnet_3d"]}
    (folder / "config.json").write_text(json.dumps(config))
    model = create_model(f"local-dir:{folder}")
    assert model.pretrained_cfg.name == "somebodys_3d.phantoms"
    assert torch.equal(model(x), z)


@pytest.mark.parametrize(
    "source",
    [
        {"file": "/etc/passwd"},
        {"file": "../../other.safetensors"},
        {"url": "http://127.0.0.1:9/other.bin"},
        {"hub": "lab/other", "filename": "other.bin"},
        {},
    ],
)
def test_config_cannot_send_for_weights_elsewhere(source, folder, x, z):
    config = json.loads((folder / "config.json").read_text())
    config["models"]["test_resnet_3d"]["weights"]["phantoms"]["source"] = source
    (folder / "config.json").write_text(json.dumps(config))
    model = create_model(f"local-dir:{folder}")
    assert model.weights_report.file == str(folder / "model.safetensors")
    assert torch.equal(model(x), z)


# --- A mirror on the Hub ----------------------------------------------------------------------------

NOWHERE = "http://127.0.0.1:9/released.tar"  # nothing listens there


@pytest.fixture
def released(tmp_path, small_model, monkeypatch):
    """A model registered for one test, whose published file nobody serves: its name, and that file."""
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr("brainfm.weights.url._TRIES", 1)
    monkeypatch.setattr("brainfm.hub.golden.compute", lambda model: None)  # which test_golden.py is about
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


def model_of(config):
    return config["models"]["lab_mirrored_3d"]


def retagged(config):
    model_of(config).update(weights={"second": model_of(config)["weights"]["first"]})


def renamed(config):
    config.update(models={"test_resnet_3d": model_of(config)})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c["provenance"].update(source_sha256="0" * 64), "was converted from a file with sha256 0000"),
        (lambda c: c["provenance"].update(source_sha256=None), "was converted from a file with sha256 None"),
        (lambda c: c["provenance"].update(source_sha256=["a"]), "was converted from a file with sha256"),
        (lambda c: c.update(provenance=None), "not a brainfm config"),
        (lambda c: c.update(provenance="trust me"), "not a brainfm config"),
        (lambda c: c.update(provenance=[]), "was converted from a file with sha256 None"),
        (retagged, r"holds lab_mirrored_3d\.second, not lab_mirrored_3d\.first"),
        (renamed, r"holds test_resnet_3d\.first, not lab_mirrored_3d\.first"),
        (lambda c: model_of(c)["weights"]["first"].update(digest=f"sha256:{'0' * 64}"), "sha256 is .* expects 0000"),
    ],
    ids=["other", "none", "list", "null", "text", "empty", "tag", "architecture", "weights"],
)
def test_mirror_of_something_else_is_refused(change, reason, mirror, released, tmp_path):
    repository = mirror.repositories["mirror/lab_mirrored_3d.first"]
    config = json.loads(repository.commits[repository.branches["main"]]["config.json"])
    change(config)
    repository.commit({"config.json": json.dumps(config).encode()})
    with pytest.raises(WeightsError, match=reason) as refusal:
        create(released[0], tmp_path)
    assert "lab_mirrored_3d.first" in str(refusal.value)


def test_mirror_whose_arguments_do_not_fit_is_refused(mirror, released, tmp_path):
    repository = mirror.repositories["mirror/lab_mirrored_3d.first"]
    config = json.loads(repository.commits[repository.branches["main"]]["config.json"])
    config["models"]["lab_mirrored_3d"]["args"]["colour"] = "red"
    repository.commit({"config.json": json.dumps(config).encode()})
    with pytest.raises(WeightsError, match=r"its config's arguments do not fit lab_mirrored_3d: .*'colour'"):
        create(released[0], tmp_path)


@pytest.mark.parametrize("right", [True, False])
def test_mirror_of_a_file_that_is_known_by_its_git_blob_is_held_to_that(
    right, hub, released, tmp_path, monkeypatch, x, z
):
    name, file = released
    blob = {"sha256": None, "git_blob": file_git_blob(file).upper()}
    build, published = brainfm.model_entrypoint(name), brainfm.get_pretrained_cfg(name)
    brainfm.register_model(cfgs={"first": replace(published, **blob)})(build)
    hub.add(f"mirror/{name}.first", content(convert(file, tmp_path / "converted", f"{name}.first")))
    monkeypatch.setenv("BRAINFM_HUB_ORG", "mirror")
    if right:
        assert torch.equal(create(name, tmp_path)(x), z)
    else:
        brainfm.register_model(cfgs={"first": replace(published, sha256=None, git_blob="0" * 40)})(build)
        with pytest.raises(WeightsError, match=r"converted from a file with git_blob .*, and the published one has 0"):
            create(name, tmp_path)


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
    cfg = brainfm.get_pretrained_cfg(name)
    brainfm.register_model(cfgs={"first": replace(cfg, sha256=cfg.sha256.upper())})(brainfm.model_entrypoint(name))
    assert torch.equal(create(name, tmp_path)(x), z)
