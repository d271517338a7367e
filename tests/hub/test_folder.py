"""Folders of models: what is in them, what is said of the weights, and that nothing is left half written."""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import brainfm
from brainfm import (
    BrainfmError,
    Cohort,
    ModelNameError,
    PretrainedCfg,
    Score,
    WeightsError,
    WeightsNotFoundError,
    registry,
)
from brainfm.assets import ASSETS
from brainfm.contract import CropForeground, Resize, ZScore
from brainfm.hub import convert, fetch, save_for_hub
from brainfm.models import ResNet
from brainfm.names import CONFIG_FORMAT, resolve
from brainfm.train.simclr import SimCLR
from brainfm.weights import read_checkpoint, save_state

ASSET = ASSETS / "test_resnet_3d.safetensors"
FILES = ["README.md", "config.json", "model.safetensors"]


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """No golden embedding, which test_golden.py is about, and a registry to add to."""
    monkeypatch.setattr("brainfm.hub.golden.compute", lambda model: {"embedding": []})
    monkeypatch.setattr(registry, "_registered", {})


def embed(model, *shape):
    x = torch.randn(1, model.in_chans, *(shape or (40, 48, 48)), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model.eval()(x)


def load(folder, **options):
    return brainfm.create_model(f"local-dir:{folder}", **options)


def config(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def said(folder):
    """The cfg in a folder's config, without where the folder is."""
    return resolve(f"local-dir:{folder}").cfg.with_source_of(PretrainedCfg())


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def new(name="test_resnet_3d", seed=3, **options):
    torch.manual_seed(seed)
    return brainfm.create_model(name, **options)


# --- What is in a folder --------------------------------------------------------------------------


def test_folder_holds_weights_config_and_card(small_model, tmp_path):
    folder = save_for_hub(small_model, tmp_path / "new" / "folder")
    assert folder == tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]
    written = config(folder)
    assert written["format"] == CONFIG_FORMAT
    assert written["library_name"] == "brainfm"
    assert written["brainfm_version"] == brainfm.__version__
    assert list(written["models"]) == ["test_resnet_3d"]
    model = written["models"]["test_resnet_3d"]
    args = {"block": "basic", "layers": [1, 1, 1, 1], "widths": [16, 32, 64, 128], "global_pool": "avg"}
    assert (model["network"], model["args"]) == ("resnet", args)
    assert model["weights"]["phantoms"]["digest"] == f"sha256:{sha256(folder / 'model.safetensors')}"
    assert model["weights"]["phantoms"]["source"] == {"file": "model.safetensors"}
    state = read_checkpoint(folder / "model.safetensors").state
    assert state.keys() == small_model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in small_model.state_dict().items())


def test_cfg_goes_whole_into_the_config_and_back(small_model, tmp_path):
    folder = save_for_hub(small_model, tmp_path / "folder")
    assert said(folder) == small_model.pretrained_cfg.with_source_of(PretrainedCfg())
    again = load(folder).pretrained_cfg
    assert again.sha256 == sha256(folder / "model.safetensors")
    assert again.input_spec == small_model.pretrained_cfg.input_spec
    assert again.name == "test_resnet_3d.phantoms"


def test_weights_and_config_say_where_they_came_from(small_model, tmp_path):
    folder = save_for_hub(small_model, tmp_path / "folder")
    origin = {"source": ASSET.name, "source_sha256": sha256(ASSET), "left_out": []}
    inside = read_checkpoint(folder / "model.safetensors").provenance
    assert inside == origin | {"architecture": "test_resnet_3d"}
    versions = {"brainfm_version": brainfm.__version__, "torch_version": torch.__version__}
    assert config(folder)["provenance"] == origin | versions


def test_one_model_gives_one_weight_file_to_the_bit(small_model, tmp_path):
    folders = [save_for_hub(small_model, tmp_path / name) for name in "ab"]
    assert len({sha256(folder / "model.safetensors") for folder in folders}) == 1


def test_file_system_without_fsync_or_chmod_costs_no_folder(small_model, tmp_path, monkeypatch):
    def lacking(*arguments, **options):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    for call in ("fsync", "chmod"):
        monkeypatch.setattr(os, call, lacking)
    save_for_hub(small_model, tmp_path / "model")
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["model", *FILES])
    assert brainfm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).num_features


def test_files_are_readable_by_others_as_the_umask_says(small_model, tmp_path):
    old = os.umask(0o022)
    try:
        folder = save_for_hub(small_model, tmp_path / "folder")
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
    assert folder.stat().st_mode & 0o777 == 0o755


# --- The model that comes back --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("test_resnet_3d", {}, (40, 48, 48)),
        ("test_vit_3d", {}, (40, 48, 48)),
        ("test_resnet_3d", {"in_chans": 3}, (40, 48, 48)),
        ("test_vit_3d", {"in_chans": 2}, (40, 48, 48)),
        ("test_vit_3d", {"global_pool": "avg"}, (40, 48, 48)),
        ("test_vit_3d", {"img_size": (80, 96, 96)}, (80, 96, 96)),
        ("test_vit_3d", {"img_size": (32, 32, 32), "patch_size": (16, 16, 8)}, (32, 32, 32)),
        ("test_vit_3d", {"img_size": (48, 48, 40)}, (48, 48, 40)),  # as many patches as the contract's, in another grid
    ],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_model_comes_back_to_the_bit_without_being_told_how_it_was_built(name, options, shape, learned, tmp_path):
    model = new(name, **options)
    if learned and name == "test_vit_3d":
        with torch.no_grad():
            model.pos_embed.add_(torch.randn(model.pos_embed.shape, generator=torch.Generator().manual_seed(1)))
    elif learned:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.running_mean.add_(0.1)
    again = load(save_for_hub(model, tmp_path / "folder"))
    assert (again.in_chans, again.global_pool) == (model.in_chans, model.global_pool)
    for key, value in options.items():
        assert again.model_args.get(key, value) == value
    assert torch.equal(embed(again, *shape), embed(model, *shape))


def test_pooling_that_was_changed_later_is_kept(tmp_path):
    model = new("test_vit_3d")
    model.reset_classifier(0, global_pool="avg")
    again = load(save_for_hub(model, tmp_path / "folder"))
    assert again.global_pool == "avg"
    assert torch.equal(embed(again), embed(model))
    assert load(tmp_path / "folder", global_pool="token").global_pool == "token"


@pytest.mark.parametrize("name", ["test_resnet_3d", "test_vit_3d"])
def test_classifier_is_kept_where_it_is_asked_for(name, tmp_path):
    model = new(name, num_classes=3)
    folder = save_for_hub(model, tmp_path / "folder")
    assert said(folder).num_classes == 3
    assert torch.equal(embed(load(folder, num_classes=3)), embed(model))
    model.reset_classifier(0)
    assert torch.equal(embed(load(folder)), embed(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["test_resnet_3d", "test_vit_3d"])
def test_weights_packaged_in_half_precision_come_back_to_the_bit(name, dtype, tmp_path):
    state = {key: v.to(dtype) if v.is_floating_point() else v for key, v in new(name).state_dict().items()}
    save_state(state, tmp_path / "half.safetensors")
    model = brainfm.create_model(name, checkpoint_path=tmp_path / "half.safetensors")
    folder = save_for_hub(model, tmp_path / "folder")
    assert torch.equal(embed(load(folder)), embed(model))
    assert said(folder).notes.startswith("Converted from half.safetensors")


def test_mode_gradients_and_device_of_a_model_in_training_do_not_matter_and_do_not_change(tmp_path):
    model = new().train().freeze()
    folder = save_for_hub(model, tmp_path / "folder")
    assert model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(embed(load(folder)), embed(model))


@pytest.fixture
def own_model():
    """A third party's model, with another contract and arguments of its own."""
    spec = brainfm.InputSpec(
        space="MNI152NLin2009cAsym",
        registration="affine",
        orientation="RAS",
        skull_strip="required",
        mask="file or nonzero",
        operations=(CropForeground(region="mask"), Resize((32, 40, 32), mode="trilinear"), ZScore(region="nonzero")),
        output_shape=(1, 32, 40, 32),
    )

    @brainfm.register_model(cfgs={"my_lab": PretrainedCfg(input_spec=spec, licence="MIT", ssl_method="SimCLR")})
    def own_resnet(widths=(8, 16, 32, 64), **kwargs):
        return ResNet("basic", (1, 1, 1, 1), tuple(widths), **kwargs)

    return "own_resnet.my_lab"


def test_registered_model_of_others_comes_back_with_its_contract_and_arguments(own_model, tmp_path):
    model = new(own_model, widths=(4, 8, 16, 32))
    folder = save_for_hub(model, tmp_path / "folder", pretrained_cfg_overlay={"tag": "mine"})
    again = load(folder)
    assert again.num_features == 32
    assert again.pretrained_cfg.name == "own_resnet.mine"
    assert again.pretrained_cfg.input_spec == model.pretrained_cfg.input_spec
    assert torch.equal(embed(again, 32, 40, 32), embed(model, 32, 40, 32))


def test_folder_of_a_model_that_is_not_registered_here_is_refused(own_model, tmp_path):
    folder = save_for_hub(new(own_model), tmp_path / "folder")
    del registry._registered["own_resnet"]
    with pytest.raises(WeightsError, match="'own_resnet', which is not registered here"):
        load(folder)


def test_arguments_that_are_no_json_are_refused_and_nothing_is_written(tmp_path):
    @brainfm.register_model
    def with_function(widths=None, **kwargs):
        return ResNet("basic", (1, 1, 1, 1), (4, 8, 16, 32), **kwargs)

    with pytest.raises(BrainfmError, match="with_function: its arguments cannot be written as JSON"):
        save_for_hub(brainfm.create_model("with_function", widths={4, 8}), tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


# --- What is refused ------------------------------------------------------------------------------


def test_simclr_network_is_refused_with_what_to_pass(tmp_path):
    with pytest.raises(BrainfmError, match=r"a SimCLR cannot .* of SimCLR the \.encoder"):
        save_for_hub(SimCLR(new()), tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_distributed_wrapper_is_refused_with_what_to_pass(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(new())
        with pytest.raises(BrainfmError, match=r"a DistributedDataParallel cannot .*\.module"):
            save_for_hub(wrapped, tmp_path / "folder")
    finally:
        torch.distributed.destroy_process_group()
    assert not (tmp_path / "folder").exists()
    save_for_hub(wrapped.module, tmp_path / "folder")


@pytest.mark.parametrize(
    "network", [nn.Linear(2, 2), ResNet("basic", (1, 1, 1, 1), (4, 8, 16, 32)), nn.Sequential()], ids=lambda n: type(n)
)
def test_network_that_create_model_did_not_make_is_refused(network, tmp_path):
    with pytest.raises(BrainfmError, match=f"a {type(network).__name__} cannot be saved .*brainfm.create_model"):
        save_for_hub(network, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_optimized_copy_is_refused_with_what_to_pass(small_model, tmp_path):
    with pytest.raises(BrainfmError, match=r"optimize\b"):  # the folder's name has "optimized"
        save_for_hub(brainfm.optimize(small_model), tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_refused_and_nothing_is_written(tmp_path):
    model = new()
    model.bn1.bias.data[0] = float("nan")
    with pytest.raises(WeightsError, match=r"not finite: bn1\.bias"):
        save_for_hub(model, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_weight_file_that_is_gone_is_said_by_name(tmp_path):
    torch.save(new().state_dict(), tmp_path / "mine.pt")
    model = brainfm.create_model("test_resnet_3d", checkpoint_path=tmp_path / "mine.pt")
    (tmp_path / "mine.pt").unlink()
    with pytest.raises(BrainfmError, match=r"mine\.pt"):
        save_for_hub(model, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


# --- Sources of convert ---------------------------------------------------------------------------


def upstream(path, state):
    network = {f"module.encoder.{key}": value for key, value in state.items()}
    network |= {"module.projector.0.weight": torch.ones(2, 2), "module.projector.2.weight": torch.ones(2, 2)}
    torch.save({"epoch": 7, "model_state_dict": network, "optimizer_state_dict": {"lr": 1}}, path)
    return path


def mae(path, state):
    decoder = {"decoder_embed.weight": torch.ones(4, 4), "mask_token": torch.ones(1, 1, 4), "decoder_pred.bias": state}
    decoder["decoder_pred.bias"] = torch.ones(4)
    torch.save({"model": state | decoder, "args": argparse.Namespace(lr=0.1, model="mae"), "epoch": 3}, path)
    return path


def plain(path, state):
    torch.save(state, path)
    return path


def safetensors(path, state):
    save_state(state, path)
    return path


def archive(path, state):
    inner = plain(path.with_suffix(".inner.pt"), state)
    with tarfile.open(path, "w") as file:
        file.add(inner, "weights.pt")
    inner.unlink()
    return path


def in_a_folder(path, state):
    path.mkdir()
    plain(path / "weights.pth", state)
    (path / "notes.txt").write_text("not a weight file")
    return path


@pytest.mark.parametrize(
    ("write", "file", "name", "left_out"),
    [
        (upstream, "released.tar", "test_resnet_3d", ["projector", "epoch", "optimizer_state_dict"]),
        (mae, "checkpoint-799.pth", "test_vit_3d", ["decoder_embed", "decoder_pred", "mask_token", "args", "epoch"]),
        (plain, "mine.pt", "test_resnet_3d", []),
        (plain, "without_ending", "test_vit_3d", []),
        (safetensors, "mine.safetensors", "test_resnet_3d", []),
        (archive, "mine.tar", "test_resnet_3d", []),
        (in_a_folder, "run7", "test_resnet_3d", []),
    ],
)
def test_checkpoint_of_every_kind_is_converted_to_the_bit(write, file, name, left_out, tmp_path):
    model = new(name)
    source = write(tmp_path / file, model.state_dict())
    folder = convert(source, tmp_path / "folder", name)
    assert torch.equal(embed(load(folder)), embed(model))
    assert sorted(path.name for path in folder.iterdir()) == FILES
    read = source / "weights.pth" if source.is_dir() else source
    provenance = config(folder)["provenance"]
    assert provenance["source"] == read.name
    assert provenance["source_sha256"] == sha256(read)
    assert sorted(provenance["left_out"]) == sorted(left_out)
    for part in left_out:
        assert part in (folder / "README.md").read_text(encoding="utf-8")


def test_model_folder_may_be_converted_again(tmp_path):
    model = new()
    first = convert(upstream(tmp_path / "released.tar", model.state_dict()), tmp_path / "first", "test_resnet_3d")
    second = convert(first, tmp_path / "second", "test_resnet_3d")
    assert torch.equal(embed(load(second)), embed(model))
    assert config(second)["provenance"]["source"] == "released.tar"


def test_model_folder_that_is_converted_again_stays_the_model_it_is(tmp_path):
    model = new("test_vit_3d", global_pool="avg")
    first = save_for_hub(model, tmp_path / "first")
    assert torch.equal(embed(load(convert(first, tmp_path / "second", "test_vit_3d"))), embed(model))


def test_channels_of_the_file_are_kept(tmp_path):
    model = new(in_chans=3)
    folder = convert(upstream(tmp_path / "a.tar", model.state_dict()), tmp_path / "folder", "test_resnet_3d")
    again = load(folder)
    assert (again.in_chans, again.pretrained_cfg.in_chans) == (3, 3)
    assert torch.equal(embed(again), embed(model))


def test_order_of_the_names_in_the_file_does_not_matter(tmp_path):
    model = new()
    source = plain(tmp_path / "mine.pt", dict(reversed(model.state_dict().items())))
    again = load(convert(source, tmp_path / "folder", "test_resnet_3d"))
    assert again.in_chans == 1
    assert torch.equal(embed(again), embed(model))


def test_classifier_of_the_file_is_kept(tmp_path):
    model = new(num_classes=3)
    folder = convert(plain(tmp_path / "mine.pt", model.state_dict()), tmp_path / "folder", "test_resnet_3d")
    assert said(folder).num_classes == 3
    assert torch.equal(embed(load(folder, num_classes=3)), embed(model))


@pytest.mark.parametrize(("count", "found"), [(0, "none found"), (2, "w0.pt, w1.pt found")])
def test_folder_without_exactly_one_weight_file_is_refused(count, found, tmp_path):
    source = tmp_path / "run"
    source.mkdir()
    for n in range(count):
        plain(source / f"w{n}.pt", new().state_dict())
    with pytest.raises(WeightsNotFoundError, match=f"one weight file .{found}"):
        convert(source, tmp_path / "folder", "test_resnet_3d")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def _nan():
    state = {key: value.clone() for key, value in new().state_dict().items()}
    state["bn1.bias"][0] = float("nan")
    return state


@pytest.mark.parametrize(
    ("state", "name", "error", "reason"),
    [
        (lambda: new().state_dict(), "test_resnet_3d.phantoms", WeightsError, "sha256 is [0-9a-f]{64}, and that of"),
        (lambda: new().state_dict(), "test_resnet", ModelNameError, "did you mean test_resnet_3d"),
        (lambda: new().state_dict(), "test_resnet_3d.v2", ModelNameError, "'v2'; known: test_resnet_3d.phantoms"),
        (lambda: new("test_vit_3d").state_dict(), "test_resnet_3d", WeightsError, "do not fit this ResNet"),
        (lambda: new().state_dict(), "test_vit_3d", WeightsError, "do not fit this VisionTransformer"),
        (lambda: new().state_dict(), "resnet18_3d", WeightsError, "of another shape"),
        (_nan, "test_resnet_3d", WeightsError, "1 not finite: bn1.bias"),
        (lambda: {}, "test_resnet_3d", WeightsError, "not a dictionary of named tensors"),
    ],
)
def test_source_that_is_not_what_it_should_be_is_refused_and_nothing_is_written(state, name, error, reason, tmp_path):
    source = plain(tmp_path / "mine.pt", state())
    with pytest.raises(error, match=reason):
        convert(source, tmp_path / "deep" / "folder", name)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.pt"]


def test_source_that_is_not_there_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(WeightsNotFoundError, match=r"missing\.pt: no such weight file"):
        convert(tmp_path / "missing.pt", tmp_path / "folder", "test_resnet_3d")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "provenance",
    ["[", "[1]", "null", '{"left_out": 5}', '{"left_out": [1, 2]}', '{"source": {"a": 1}, "source_sha256": 7}'],
)
def test_file_whose_provenance_somebody_else_wrote_is_converted(provenance, tmp_path):
    state = {key: value.clone() for key, value in new().state_dict().items()}
    save_file(state, tmp_path / "mine.safetensors", metadata={"provenance": provenance})
    assert torch.equal(
        embed(load(convert(tmp_path / "mine.safetensors", tmp_path / "folder", "test_resnet_3d"))), embed(new())
    )


def test_packaged_file_is_the_published_one_of_its_tag(small_model, tmp_path):
    folder = convert(ASSET, tmp_path / "folder", "test_resnet_3d.phantoms")
    assert said(folder).name == "test_resnet_3d.phantoms"
    assert torch.equal(embed(load(folder)), embed(small_model))


# --- What is said of the weights ------------------------------------------------------------------


COHORTS = (Cohort("ADNI", 10, 20, ("H", "AD")), Cohort("Lab", 3, 3))
SCORES = (Score("sex (IXI)", "ROC AUC", "linear probe", 0.9, 0.01, "https://example.org"),)
CLAIMS = {
    "licence": "MIT",
    "code_licence": "Apache-2.0",
    "terms": "Ask.",
    "gated": True,
    "redistribute": False,
    "title": "A paper",
    "paper": "https://a",
    "repository": "https://b",
    "citation": "@misc{a}",
    "cohorts": COHORTS,
}


@pytest.fixture
def released(tmp_path):
    return upstream(tmp_path / "released.tar", new(seed=5).state_dict())


@pytest.fixture
def lab(released):
    """A registered model with published weights, of which much is said; the file is not packaged."""
    cfg = brainfm.get_pretrained_cfg("test_resnet_3d").overlay(
        CLAIMS
        | {"url": "http://127.0.0.1:9/released.tar", "sha256": sha256(released).upper(), "scores": SCORES}
        | {"ssl_method": "SimCLR", "notes": "The release."}
    )

    @brainfm.register_model(cfgs={"lab2025": cfg, "other": PretrainedCfg(input_spec=cfg.input_spec)})
    def lab_resnet_3d(**kwargs):
        return ResNet("basic", (1, 1, 1, 1), (16, 32, 64, 128), **kwargs)

    return cfg


def assert_claims(cfg, claims=True, scores=True):
    for key, value in CLAIMS.items():
        assert getattr(cfg, key) == (value if claims else PretrainedCfg.__dataclass_fields__[key].default), key
    assert cfg.scores == (SCORES if scores else ())


def test_of_published_weights_is_said_what_is_published(lab, released, tmp_path):
    model = brainfm.create_model("lab_resnet_3d", checkpoint_path=released)
    cfg = said(save_for_hub(model, tmp_path / "folder"))
    assert_claims(cfg)
    assert (cfg.name, cfg.notes, cfg.ssl_method) == ("lab_resnet_3d.lab2025", "The release.", "SimCLR")
    assert (cfg.url, cfg.hub_id) == (None, None)


@pytest.mark.parametrize("name", ["lab_resnet_3d", "lab_resnet_3d.lab2025"])
def test_published_file_is_recognised_when_it_is_converted(name, lab, released, tmp_path):
    renamed = released.rename(tmp_path / "download.bin")
    folder = convert(renamed, tmp_path / "folder", name)
    assert_claims(said(folder))
    assert said(folder).tag == "lab2025"
    assert config(folder)["provenance"]["source_sha256"] == lab.sha256.lower()


def test_of_weights_trained_one_step_further_the_pretraining_is_kept_and_the_scores_are_gone(lab, released, tmp_path):
    model = brainfm.create_model("lab_resnet_3d", checkpoint_path=released)
    model.layer4[0].conv1.weight.data[0, 0, 0, 0, 0] += 1e-6
    folder = save_for_hub(model, tmp_path / "folder")
    cfg = said(folder)
    assert cfg.cohorts == COHORTS
    assert (cfg.scores, cfg.tag) == ((), "")
    assert cfg.notes == "Trained further from lab_resnet_3d.lab2025."
    assert config(folder)["provenance"]["source"] == "released.tar"


@pytest.mark.parametrize("buffer", ["bn1.running_mean", "bn1.num_batches_tracked"])
def test_statistics_of_a_batch_seen_in_training_are_training_too(buffer, lab, released, tmp_path):
    model = brainfm.create_model("lab_resnet_3d", checkpoint_path=released)
    model.get_buffer(buffer).add_(1)
    assert_claims(said(save_for_hub(model, tmp_path / "folder")).overlay({"scores": ()}), scores=False)
    assert said(tmp_path / "folder").notes.startswith("Trained further")


def test_new_classifier_is_training_but_one_that_was_left_out_is_not(lab, released, tmp_path):
    model = brainfm.create_model("lab_resnet_3d", checkpoint_path=released, num_classes=2)
    cfg = said(save_for_hub(model, tmp_path / "folder"))
    assert (cfg.scores, cfg.cohorts, cfg.num_classes) == ((), COHORTS, 2)
    model.reset_classifier(0)
    assert_claims(said(save_for_hub(model, tmp_path / "folder")))


@pytest.mark.parametrize("name", ["lab_resnet_3d", "lab_resnet_3d.lab2025", "lab_resnet_3d.other"])
def test_of_weights_that_were_never_loaded_nothing_is_said(name, lab, tmp_path):
    folder = save_for_hub(new(name), tmp_path / "folder")
    cfg = said(folder)
    assert_claims(cfg, claims=False, scores=False)
    assert (cfg.tag, cfg.ssl_method) == ("", None)
    assert cfg.notes == "From no weight file: initial values, or trained by whoever saved them."
    assert cfg.input_spec == lab.input_spec
    assert "source" not in config(folder)["provenance"]


def test_of_weights_that_were_loaded_by_hand_nothing_is_said(lab, released, tmp_path):
    model = new("lab_resnet_3d")
    model.load_state_dict({k[8:]: v for k, v in read_checkpoint(released).state.items() if k.startswith("encoder.")})
    assert_claims(said(save_for_hub(model, tmp_path / "folder")), claims=False, scores=False)


def test_of_an_unknown_file_nothing_is_said_but_its_name_and_hash(lab, tmp_path):
    source = upstream(tmp_path / "mine.tar", new(seed=9).state_dict())
    folder = convert(source, tmp_path / "folder", "lab_resnet_3d")
    assert_claims(said(folder), claims=False, scores=False)
    assert said(folder).notes == f"Converted from mine.tar (sha256 {sha256(source)}), of which nothing else was said."
    assert said(folder).tag == ""


def test_of_a_file_behind_another_tag_nothing_is_said_that_is_of_the_first(lab, released, tmp_path):
    folder = convert(released, tmp_path / "folder", "lab_resnet_3d.other")
    assert_claims(said(folder), claims=False, scores=False)


@pytest.mark.parametrize("round_it", [nn.Module.bfloat16, nn.Module.half], ids=["bfloat16", "float16"])
def test_published_weights_that_were_rounded_are_not_the_published_ones(round_it, lab, released, tmp_path):
    model = round_it(brainfm.create_model("lab_resnet_3d", checkpoint_path=released))
    assert said(save_for_hub(model, tmp_path / "folder")).scores == ()


def test_optimized_vit_that_was_rounded_is_not_the_published_one(tmp_path):
    fast = brainfm.optimize(brainfm.create_model("test_vit_3d", pretrained=True), "bfloat16")
    try:
        folder = save_for_hub(fast, tmp_path / "folder")
    except BrainfmError:
        return
    assert said(folder).tag == ""


def test_claims_and_provenance_survive_saving_again(lab, released, tmp_path):
    first = convert(released, tmp_path / "first", "lab_resnet_3d.lab2025")
    second = save_for_hub(load(first), tmp_path / "second")
    assert_claims(said(second))
    assert said(second) == said(first)
    assert config(second)["provenance"] == config(first)["provenance"]
    assert sha256(second / "model.safetensors") == sha256(first / "model.safetensors")


def test_model_may_be_saved_into_the_folder_it_came_from(lab, released, tmp_path):
    folder = convert(released, tmp_path / "folder", "lab_resnet_3d.lab2025")
    before = content(folder)
    save_for_hub(load(folder), folder)
    assert content(folder) == before


def test_training_twice_keeps_the_pretraining_and_its_source(lab, released, tmp_path):
    folder = convert(released, tmp_path / "folder", "lab_resnet_3d.lab2025")
    for _ in range(2):
        model = load(folder)
        model.bn1.bias.data += 1
        save_for_hub(model, folder)
    cfg = said(folder)
    assert (cfg.cohorts, cfg.scores, cfg.tag) == (COHORTS, (), "")
    assert config(folder)["provenance"]["source_sha256"] == lab.sha256.lower()


def test_what_was_said_of_a_folder_is_not_said_of_other_weights_put_in_it(lab, released, tmp_path):
    folder = convert(released, tmp_path / "folder", "lab_resnet_3d.lab2025")
    other = plain(tmp_path / "other.pt", new(seed=11).state_dict())
    cfg = said(save_for_hub(load(folder, checkpoint_path=other), tmp_path / "second"))
    assert_claims(cfg, claims=False, scores=False)
    assert "other.pt" in cfg.notes


def test_hash_in_the_notes_is_that_of_the_file_they_name(lab, tmp_path):
    """A file that brainfm wrote names its source; the note must not give the source the hash of the copy."""
    source = upstream(tmp_path / "mine.tar", new(seed=9).state_dict())
    folder = convert(source, tmp_path / "folder", "lab_resnet_3d")
    again = convert(folder / "model.safetensors", tmp_path / "again", "lab_resnet_3d")
    hashes = {"mine.tar": sha256(source), "model.safetensors": sha256(folder / "model.safetensors")}
    named = [name for name in hashes if f"Converted from {name}" in said(again).notes]
    assert len(named) == 1
    assert hashes[named[0]] in said(again).notes


def test_overlay_says_what_the_user_knows(lab, tmp_path):
    overlay = {
        "licence": "CC-BY-4.0",
        "notes": "Ours.",
        "tag": "v1",
        "cohorts": [{"name": "MyCohort", "patients": 5, "scans": 7, "conditions": ["H"]}],
        "scores": [{"task": "sex", "metric": "AUC", "mode": "probe", "value": 0.5}],
    }
    source = upstream(tmp_path / "mine.tar", new(seed=9).state_dict())
    cfg = load(convert(source, tmp_path / "folder", "lab_resnet_3d", pretrained_cfg_overlay=overlay)).pretrained_cfg
    assert (cfg.licence, cfg.notes, cfg.name) == ("CC-BY-4.0", "Ours.", "lab_resnet_3d.v1")
    assert cfg.cohorts == (Cohort("MyCohort", 5, 7, ("H",)),)
    assert cfg.scores == (Score("sex", "AUC", "probe", 0.5),)
    assert cfg.citation is None


@pytest.mark.parametrize(
    "sources",
    [
        {"file": "/etc/passwd"},
        {"url": "https://example.org/other.bin"},
        {"hub_id": "lab/other", "hub_revision": "abc", "hub_filename": "other.bin"},
        {"sha256": None},
        {"sha256": "0" * 64},
        {"num_features": 7, "num_classes": 9, "in_chans": 5},
    ],
    ids=lambda sources: next(iter(sources)),
)
def test_overlay_cannot_put_another_source_or_shape_into_the_config(sources, lab, released, tmp_path):
    model = brainfm.create_model("lab_resnet_3d", checkpoint_path=released)
    folder = save_for_hub(model, tmp_path / "folder", pretrained_cfg_overlay=sources)
    written = config(folder)["models"]["lab_resnet_3d"]["weights"]["lab2025"]
    assert written["source"] == {"file": "model.safetensors"}
    assert written["digest"] == f"sha256:{sha256(folder / 'model.safetensors')}"
    cfg = resolve(f"local-dir:{folder}").cfg
    assert (cfg.file, cfg.url, cfg.hub_id, cfg.hub_revision) == (str(folder / "model.safetensors"), None, None, None)
    assert (cfg.hub_filename, cfg.sha256) == ("model.safetensors", sha256(folder / "model.safetensors"))
    assert (cfg.num_features, cfg.num_classes, cfg.in_chans) == (128, 0, 1)
    assert "/etc/passwd" not in (folder / "config.json").read_text()
    assert torch.equal(embed(load(folder)), embed(model))


@pytest.mark.parametrize(
    "overlay", [{"license": "MIT"}, {"cohorts": [{"nam": "ADNI"}]}, {"licence": 3}, {"architecture": "test_vit_3d"}]
)
def test_overlay_that_means_nothing_is_refused_and_nothing_is_written(overlay, small_model, tmp_path):
    with pytest.raises((ValueError, BrainfmError, TypeError)):
        save_for_hub(small_model, tmp_path / "folder", pretrained_cfg_overlay=overlay)
    assert list(tmp_path.iterdir()) == []


# --- Safety ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("found", ["notes.txt", "config.json", "model.safetensors", ".hidden"])
def test_folder_with_something_else_is_refused_and_left_alone(found, small_model, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / found).write_text('{"architectures": ["BertModel"]}')
    for write in (
        lambda: save_for_hub(small_model, folder),
        lambda: convert(ASSET, folder, "test_resnet_3d"),
        lambda: fetch("test_resnet_3d", folder),
    ):
        with pytest.raises(BrainfmError, match=r"folder: not empty, and no model's folder; name a new one"):
            write()
    assert content(folder) == {found: b'{"architectures": ["BertModel"]}'}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_file_in_place_of_a_folder_is_refused_and_left_alone(small_model, tmp_path):
    (tmp_path / "folder").write_text("mine")
    with pytest.raises(BrainfmError, match="folder: a file; name a folder"):
        save_for_hub(small_model, tmp_path / "folder")
    assert (tmp_path / "folder").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_empty_folder_is_filled(small_model, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    save_for_hub(small_model, ".")
    assert sorted(path.name for path in Path.cwd().iterdir()) == FILES
    save_for_hub(small_model, "")
    assert sorted(path.name for path in Path.cwd().iterdir()) == FILES


def test_folder_in_the_home_folder_is_written_where_local_dir_reads_it(small_model, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    save_for_hub(small_model, "~/folder")
    assert torch.equal(embed(load("~/folder")), embed(small_model))


def test_model_in_a_folder_is_replaced_and_other_files_stay(small_model, tmp_path):
    folder = save_for_hub(new("test_vit_3d"), tmp_path / "folder")
    (folder / "training_log.txt").write_text("mine")
    save_for_hub(small_model, folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, "training_log.txt"])
    assert list(config(folder)["models"]) == ["test_resnet_3d"]
    assert "test_vit_3d" not in (folder / "README.md").read_text()
    assert torch.equal(embed(load(folder)), embed(small_model))


@pytest.mark.parametrize("what", ["model_card", "write_json", "create_model"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk full", "interrupted"])
def test_failure_while_writing_leaves_the_old_folder_whole(what, error, small_model, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise error

    folder = save_for_hub(new("test_vit_3d"), tmp_path / "folder")
    before = content(folder)
    monkeypatch.setattr(f"brainfm.hub.folder.{what}", fail)
    with pytest.raises(type(error)):
        save_for_hub(small_model, folder)
    with pytest.raises(type(error)):
        save_for_hub(small_model, tmp_path / "new")
    assert content(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def moves(folder, monkeypatch, at, act):
    """Lets `at` files move into a folder, then acts instead of moving the next."""
    replace, seen = Path.replace, []

    def counted(self, target):
        if Path(target).parent == folder:
            if len(seen) == at:
                act()
            seen.append(target)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", counted)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_interruption_between_the_files_leaves_the_old_model_or_a_folder_that_is_refused(
    at, small_model, tmp_path, monkeypatch
):
    def interrupt():
        raise KeyboardInterrupt

    old = new("test_resnet_3d")
    folder = save_for_hub(old, tmp_path / "folder")
    moves(folder, monkeypatch, at, interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_for_hub(small_model, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    if at == 1:  # new weights beside the old config
        with pytest.raises(WeightsError, match="sha256"):
            load(folder)
    else:
        assert torch.equal(embed(load(folder)), embed(small_model if at == 2 else old))
    monkeypatch.undo()
    save_for_hub(small_model, folder)
    assert torch.equal(embed(load(folder)), embed(small_model))


KILLED = """
import os, signal, sys
from pathlib import Path
from brainfm.hub.folder import _whole_folder

folder, replace = Path(sys.argv[1]), Path.replace

def killed_before_the_config(self, target):
    if Path(target) == folder / "config.json":
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)

Path.replace = killed_before_the_config
with _whole_folder(folder) as temporary:
    for name in ("README.md", "model.safetensors", "config.json"):
        (temporary / name).write_text("new")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_process_leaves_a_folder_that_is_refused_and_can_be_written_again(small_model, tmp_path):
    folder = save_for_hub(new("test_resnet_3d"), tmp_path / "folder")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder)], timeout=900, check=False)
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(WeightsError, match="sha256"):
        load(folder)
    save_for_hub(small_model, folder)
    assert torch.equal(embed(load(folder)), embed(small_model))


# --- fetch ----------------------------------------------------------------------------------------


@pytest.fixture
def repository(small_model, tmp_path_factory):
    """The files of a repository with the test model."""
    return content(save_for_hub(small_model, tmp_path_factory.mktemp("repository") / "tiny"))


def test_fetch_of_a_packaged_model_gives_its_file_or_a_folder(small_model, tmp_path):
    assert fetch("test_resnet_3d") == ASSET
    folder = fetch("test_resnet_3d", tmp_path / "folder")
    assert folder == tmp_path / "folder"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert said(folder).name == "test_resnet_3d.phantoms"
    assert torch.equal(embed(load(folder)), embed(small_model))


def test_fetch_of_a_folder_copies_it_to_the_bit(repository, tmp_path):
    (tmp_path / "folder").mkdir()
    for name, data in repository.items():
        (tmp_path / "folder" / name).write_bytes(data)
    assert fetch(f"local-dir:{tmp_path}/folder") == tmp_path / "folder" / "model.safetensors"
    assert content(fetch(f"local-dir:{tmp_path}/folder", tmp_path / "copy")) == repository
    assert content(fetch(f"local-dir:{tmp_path}/folder", tmp_path / "folder")) == repository


def test_fetch_from_the_hub_fills_the_cache_or_a_folder(hub, repository, tmp_path):
    commit = hub.add("lab/tiny", repository)
    path = fetch("hf-hub:lab/tiny", cache_dir=tmp_path / "cache")
    assert (tmp_path / "cache") in path.parents
    assert path.read_bytes() == repository["model.safetensors"]
    assert content(fetch(f"hf-hub:lab/tiny@{commit}", tmp_path / "folder", tmp_path / "cache")) == repository
    assert hub.downloads == 1


def test_fetch_from_the_hub_works_without_a_card(hub, repository, tmp_path, caplog):
    hub.add("lab/tiny", {name: data for name, data in repository.items() if name != "README.md"})
    folder = fetch("hf-hub:lab/tiny", tmp_path / "folder", tmp_path / "cache")
    assert sorted(path.name for path in folder.iterdir()) == FILES[1:]
    assert load(folder).pretrained_cfg.name == "test_resnet_3d.phantoms"


def test_fetch_without_a_card_does_not_leave_the_card_of_another_model(hub, repository, tmp_path):
    folder = save_for_hub(new("test_vit_3d"), tmp_path / "folder")
    hub.add("lab/tiny", {name: data for name, data in repository.items() if name != "README.md"})
    fetch("hf-hub:lab/tiny", folder, tmp_path / "cache")
    card = folder / "README.md"
    assert not card.is_file() or "test_vit_3d" not in card.read_text()


def test_fetch_that_fails_leaves_nothing(hub, repository, tmp_path):
    hub.add("lab/tiny", repository | {"model.safetensors": b"other weights"})
    with pytest.raises(WeightsError, match="sha256"):
        fetch("hf-hub:lab/tiny", tmp_path / "folder", tmp_path / "cache")
    with pytest.raises(WeightsNotFoundError, match="no such repository"):
        fetch("hf-hub:lab/none", tmp_path / "folder", tmp_path / "cache")
    with pytest.raises(WeightsNotFoundError, match="no weights of vit_tiny_3d"):
        fetch("vit_tiny_3d", tmp_path / "folder")
    with pytest.raises(WeightsNotFoundError, match=r"config\.json is not there"):
        fetch(f"local-dir:{tmp_path}/none", tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []


def test_fetch_that_breaks_while_writing_leaves_nothing(repository, tmp_path, monkeypatch, hub):
    def full(*arguments):
        raise OSError("disk full")

    hub.add("lab/tiny", repository)
    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(OSError, match="disk full"):
        fetch("hf-hub:lab/tiny", tmp_path / "folder", tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_fetched_folder_keeps_what_a_newer_brainfm_wrote_in_its_config(hub, repository, tmp_path):
    more = json.loads(repository["config.json"]) | {"later": {"naïve": [1, 2]}}
    hub.add("lab/tiny", repository | {"config.json": json.dumps(more).encode()})
    assert config(fetch("hf-hub:lab/tiny", tmp_path / "folder", tmp_path / "cache"))["later"] == {"naïve": [1, 2]}


# --- A mirror on the Hub --------------------------------------------------------------------------


def test_converted_release_is_taken_from_the_mirror_that_the_environment_names(
    hub, lab, released, tmp_path, monkeypatch
):
    folder = convert(released, tmp_path / "folder", "lab_resnet_3d.lab2025")
    hub.add("mirror/lab_resnet_3d.lab2025", content(folder))
    monkeypatch.setenv("BRAINFM_HUB_ORG", "mirror")
    model = brainfm.create_model("lab_resnet_3d", pretrained=True, cache_dir=tmp_path / "cache", accept_licence=True)
    assert torch.equal(embed(model), embed(load(folder)))
    assert_claims(model.pretrained_cfg)
    assert content(fetch("lab_resnet_3d", tmp_path / "copy", tmp_path / "cache")) == content(folder)


def test_mirror_with_other_weights_is_refused(hub, lab, tmp_path, monkeypatch):
    source = upstream(tmp_path / "mine.tar", new(seed=9).state_dict())
    overlay = {"tag": "lab2025"}
    folder = convert(source, tmp_path / "folder", "lab_resnet_3d", pretrained_cfg_overlay=overlay)
    hub.add("mirror/lab_resnet_3d.lab2025", content(folder))
    monkeypatch.setenv("BRAINFM_HUB_ORG", "mirror")
    with pytest.raises(WeightsError, match=f"was converted from a file with sha256 {sha256(source)}"):
        brainfm.create_model("lab_resnet_3d", pretrained=True, cache_dir=tmp_path / "cache")


def test_mirror_with_weights_trained_further_is_refused(hub, lab, released, tmp_path, monkeypatch):
    model = brainfm.create_model("lab_resnet_3d", checkpoint_path=released)
    model.bn1.bias.data += 1
    folder = save_for_hub(model, tmp_path / "folder")
    hub.add("mirror/lab_resnet_3d.lab2025", content(folder))
    monkeypatch.setenv("BRAINFM_HUB_ORG", "mirror")
    with pytest.raises(WeightsError, match="holds lab_resnet_3d, not"):
        brainfm.create_model("lab_resnet_3d", pretrained=True, cache_dir=tmp_path / "cache")
