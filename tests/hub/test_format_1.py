"""Folders that brainfm wrote before a config was a card: format 1 loads, is verified, and is read as it was meant."""

from __future__ import annotations

import json

import pytest
import torch

import brainfm
from brainfm import PretrainedCfg, WeightsError, create_model, registry
from brainfm.files import file_sha256
from brainfm.hub import convert, fetch, verify
from brainfm.models import ResNet
from brainfm.names import resolve
from brainfm.weights import save_state

# What `save_for_hub` of that brainfm wrote for the packaged test ViT, but for line breaks and the weights' own numbers,
# which were trained anew since.
CONFIG = """\
{"library_name": "brainfm", "brainfm_version": "0.1.0", "format": 1, "architecture": "test_vit_3d",
"model_args": {"global_pool": "token"}, "pretrained_cfg": {"architecture": "test_vit_3d", "tag": "phantoms",
"hub_id": null, "hub_revision": null, "hub_filename": "model.safetensors", "url": null,
"sha256": "f91245e9d063fce884acdf258fe3fc660c62362ae6a6cd78a4c6d830d49efb76", "input_spec": {"representation": "T1w",
"channels": ["T1w"], "missing_channel": "refuse", "space": "MNI152NLin2009cSym", "registration": "rigid",
"orientation": "RAS", "grid": {"shape": [48, 48, 40], "spacing": [4.0, 4.0, 4.0], "origin": [-93.5, -111.5, -71.5]},
"skull_strip": "required", "mask": "file or nonzero", "preparation": ["N4", "SynthStrip", "rigid registration",
"SynthSeg mask", "WhiteStripe (cancels in the z-score)", "averaged to 4 mm"], "operations": [{"op": "Transpose",
"axes": [2, 1, 0]}, {"op": "ZScore", "region": "mask", "eps": 1e-12, "eps_rule": "under_root", "ddof": 0,
"per_channel": true, "background": "zero", "method": "two_pass", "background_is": "outside"}], "output_shape": [1, 40,
48, 48]}, "num_features": 96, "num_classes": 0, "in_chans": 1, "ssl_method": "MAE",
"cohorts": [{"name": "brainfm phantoms of seed 0", "patients": 600, "scans": 1200, "conditions": []}],
"licence": "Apache-2.0", "paper": null, "repository": null, "citation": null, "recipe": "test_vit_3d",
"notes": "A tiny test model, pretrained on phantoms (synthetic scans), not on people: not a \
brain encoder. It shows that code works; what its embeddings say holds of phantoms only.",
"scores": []}, "provenance": {"source": "test_vit_3d.safetensors",
"source_sha256": "653425fdfed3bb5a5f6d87eb38ca16bebc688f5304019ad4f826deacd82a0d06", "left_out": [],
"brainfm_version": "0.1.0", "torch_version": "2.13.0+cpu"},
"fingerprint": {"scan_sha256": "2f0177999c6f6ded10ae4a4a0d94b7891011531d9adf034ee4b2a4a257a7548b",
"mask_sha256": "a6481e8a904df5aea4ed606a30fb409e2f1e2093326ef0b80ac3e4593d4720b3", "dtype": "float32",
"torch_version": "2.13.0+cpu", "embedding":
[-1.83879817, 0.129900813, 2.57191372, 0.231026828, 0.295561314, -1.28758514, -0.316611737, -0.898358107,
-0.329495966, -0.682470858, -0.626093984, -0.246626616, 1.70333564, -0.610516131, -0.385216027, -0.0925432891,
0.680969834, -0.271953702, 0.836082757, -0.887531579, 1.64496207, 0.566820502, -0.502778709, -0.230300933,
-1.68251383, 0.870260358, 1.09917271, -0.846601248, 0.379589468, 0.551996648, -0.225062862, 0.0951426774, 2.64965034,
0.463746279, 1.06298792, -0.244801313, 0.823950887, 0.299946487, -1.57808256, -0.284785718, -1.07234812, -0.941985548,
1.58737421, 0.347273141, 1.70208037, 0.372793019, 1.90127695, -0.121805713, -0.465750605, 1.38194561, 0.0130390227,
-1.47362423, 1.53209078, -1.58557069, 0.785790443, 0.753480673, 0.278921098, 0.585963547, -0.793007016, -0.266569465,
1.38201892, -0.225316718, -2.45334125, 0.381467015, -0.373730183, -1.57954109, -0.613983393, -0.139182344,
0.710573077, -0.497352183, 0.82643348, 0.147356495, -0.681157768, -2.21983862, -0.362122595, -0.063323468,
-1.16442871, -0.451998681, -0.595162034, 1.14421439, 0.803339124, 0.563070655, 0.59961307, 0.431872874, -1.23341382,
1.03621483, -0.185735196, 0.438976645, -0.549367547, 0.091778636, -1.01321959, -0.963252783, 1.14857483, -2.24766278,
-0.156654447, 0.653485715]}}
"""


@pytest.fixture(scope="module")
def packaged():
    """The packaged test ViT."""
    return create_model("test_vit_3d", pretrained=True)


def write(folder, model, config):
    """A folder with a model's weights and a config, which says their digest."""
    folder.mkdir()
    origin = {key: value for key, value in config["provenance"].items() if "version" not in key}
    save_state(model.state_dict(), folder / "model.safetensors", {"architecture": config["architecture"]} | origin)
    config["pretrained_cfg"]["sha256"] = file_sha256(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path, packaged):
    return write(tmp_path / "old", packaged, json.loads(CONFIG))


def embed(model, *shape):
    x = torch.randn(2, model.in_chans, *(shape or (40, 48, 48)), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model(x)


def test_old_folder_gives_the_embedding_to_the_bit(folder, packaged):
    model = create_model(f"local-dir:{folder}")
    assert torch.equal(embed(model), embed(packaged))
    assert model.weights_report.file == str(folder / "model.safetensors")


def test_old_folder_is_the_model_it_was(folder, packaged):
    cfg = create_model(f"local-dir:{folder}").pretrained_cfg
    said, today = (c.with_source_of(PretrainedCfg()).to_dict() for c in (cfg, packaged.pretrained_cfg))
    known_today_only = {"title": "", "code_licence": None, "readout": {"pool": None, "window": None}}
    assert said == today | known_today_only
    assert (cfg.name, cfg.sha256) == ("test_vit_3d.phantoms", file_sha256(folder / "model.safetensors"))


def test_old_fingerprint_is_verified_as_the_golden_embedding(folder):
    checks = verify(f"local-dir:{folder}")
    assert all(check.ok for check in checks)
    assert checks[0].error < 1e-6


def test_old_fingerprint_of_other_weights_is_off(folder):
    config = json.loads((folder / "config.json").read_text())
    config["fingerprint"]["embedding"].reverse()
    (folder / "config.json").write_text(json.dumps(config))
    assert not verify(f"local-dir:{folder}", ())[0].ok


def test_old_folder_is_fetched_as_it_is_and_converted_to_a_card(folder, packaged, tmp_path):
    copy = fetch(f"local-dir:{folder}", tmp_path / "copy")
    assert json.loads((copy / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    new = convert(folder, tmp_path / "new", "test_vit_3d")
    config = json.loads((new / "config.json").read_text())
    assert (config["format"], list(config["models"])) == (2, ["test_vit_3d"])
    assert torch.equal(embed(create_model(f"local-dir:{new}")), embed(packaged))
    assert resolve(f"local-dir:{new}").cfg.cohorts == packaged.pretrained_cfg.cohorts
    assert config["golden"]["embedding"] == pytest.approx(json.loads(CONFIG)["fingerprint"]["embedding"], abs=1e-5)


def test_weights_beside_an_old_config_that_are_not_its_are_refused(folder):
    (folder / "model.safetensors").write_bytes(b"other")
    with pytest.raises(WeightsError, match="sha256"):
        create_model(f"local-dir:{folder}")


@pytest.mark.parametrize(
    ("args", "shape", "cfg"),
    [
        ({"global_pool": "avg"}, (), {}),
        ({"global_pool": "token", "img_size": [80, 96, 96]}, (80, 96, 96), {}),
        ({"img_size": [32, 32, 32], "patch_size": [16, 16, 8]}, (32, 32, 32), {}),
        ({"global_pool": "token"}, (), {"in_chans": 3}),
    ],
    ids=["pool", "size", "patches", "channels"],
)
def test_old_arguments_build_the_model_again(args, shape, cfg, tmp_path):
    torch.manual_seed(3)
    model = create_model("test_vit_3d", **args, **cfg)
    config = json.loads(CONFIG) | {"model_args": args}
    config["pretrained_cfg"] |= cfg
    again = create_model(f"local-dir:{write(tmp_path / 'old', model, config)}")
    assert (again.in_chans, again.global_pool) == (model.in_chans, model.global_pool)
    assert torch.equal(embed(again, *shape), embed(model, *shape))


def test_old_folder_of_a_third_partys_model_loads_where_that_is_registered(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})

    @brainfm.register_model
    def own_resnet(widths=(8, 16, 32, 64), **kwargs):
        return ResNet("basic", (1, 1, 1, 1), tuple(widths), **kwargs)

    model = create_model("own_resnet", widths=(4, 8, 16, 32))
    config = json.loads(CONFIG) | {"architecture": "own_resnet", "model_args": {"widths": [4, 8, 16, 32]}}
    folder = write(tmp_path / "old", model, config)
    assert torch.equal(embed(create_model(f"local-dir:{folder}")), embed(model))
    registry._registered.clear()
    with pytest.raises(WeightsError, match="'own_resnet', which is not registered here; import what registers it"):
        create_model(f"local-dir:{folder}")


@pytest.mark.parametrize(
    ("identity", "moved"),
    [
        ({"space": "UKB"}, ("rigid registration", "in the space of UKB")),
        ({"space": "UKB", "registration": "none"}, ("in the space of UKB",)),
        ({"space": None}, ("rigid registration",)),
        ({"space": None, "registration": "none"}, ()),
    ],
)
def test_space_and_registration_that_no_scan_can_show_move_to_the_preparation(identity, moved, tmp_path, packaged):
    """A contract may no longer ask for them: such a folder must load all the same."""
    config = json.loads(CONFIG)
    config["pretrained_cfg"]["input_spec"] |= {"grid": None, "preparation": ["N4"]} | identity
    spec = create_model(f"local-dir:{write(tmp_path / 'old', packaged, config)}").pretrained_cfg.input_spec
    assert (spec.space, spec.registration, spec.preparation) == (None, "none", ("N4", *moved))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"operations": [{"op": "Blur"}]}, "unknown operation 'Blur'"),
        ({"orientaton": "RAS"}, "did you mean orientation"),
        ({"mask": "yes"}, "mask is 'yes'"),
    ],
)
def test_old_contract_that_is_not_one_is_refused_in_one_line(change, reason, folder):
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["input_spec"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=f"not a brainfm config .*{reason}") as refusal:
        create_model(f"local-dir:{folder}")
    assert "\n" not in str(refusal.value)
