"""Names in the authors' file: how a card's `keys` make them the network's, and its Git blob as a digest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from file_server import kept
from torch import nn
from weight_files import prefixed, same, saved

import brainfm
from brainfm import PretrainedCfg, WeightsError, create_model, registry
from brainfm.files import file_git_blob, file_sha256
from brainfm.hub import convert, save_for_hub
from brainfm.models import ResNet
from brainfm.names import resolve
from brainfm.weights import find_weights, load_checkpoint, read_checkpoint, save_state
from brainfm.weights.checkpoint import Checkpoint, renamed
from brainfm.zoo.cards import Keys

KEYS = Keys(
    take="teacher.ema", strip=("net.",), rename={r"^trunk\.": "", r"^block(\d)": r"layer\1"}, drop=(r"_head\.", "^fc")
)
HEADS = {"age_head.weight": torch.ones(40, 128), "sex_head.bias": torch.ones(1), "fc.weight": torch.ones(9, 128)}

CARD = """
licence: {{code: MIT, weights: CC-BY-4.0}}
cohorts: [{{name: Lab, patients: 3, scans: 4}}]
models:
  lab_3d:
    network: resnet
    args: {{layers: [1, 1, 1, 1], widths: [16, 32, 64, 128]}}
    num_features: 128
    readout: {{pool: avg}}
    weights:
      lab2025:
        source: {{{source}}}
        digest: "{digest}"
        keys:
          take: teacher.ema
          strip: [net.]
          rename: {{'^trunk\\.': '', '^block(\\d)': 'layer\\1'}}
          drop: ['_head\\.', '^fc']
"""


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})


def authors_names(state):
    """A state dict as `KEYS` expects it: of a network in DataParallel, with blocks and three heads."""
    trunk = {f"trunk.{key.replace('layer', 'block')}": value for key, value in state.items()}
    return prefixed("module.net.", trunk | HEADS)


def authors_checkpoint(state):
    student = prefixed("module.net.", {"trunk.conv1.weight": torch.zeros(1)})
    return {"epoch": 9, "teacher": {"ema": authors_names(state), "momentum": 0.9}, "student": student}


@pytest.fixture
def authors_file(tmp_path, small_model) -> Path:
    (tmp_path / "authors.pt").write_bytes(saved(authors_checkpoint(small_model.state_dict())))
    return tmp_path / "authors.pt"


def register(folder: Path, digest: str, source: str) -> str:
    """A model of a card in a folder; its name."""
    (folder / "lab.yaml").write_text(CARD.format(source=source, digest=digest))
    [name] = brainfm.register_card(folder / "lab.yaml")
    return name


@pytest.fixture
def carded(tmp_path, authors_file) -> str:
    """A model whose card says `KEYS`, and whose file, known by its Git blob, lies beside the card."""
    return register(tmp_path, f"git-blob:{file_git_blob(authors_file)}", "file: authors.pt")


# --- Renaming -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "names", "found", "dropped"),
    [
        (Keys(), ["a.b", "c"], {"a.b": 0, "c": 1}, ()),
        (Keys(strip=("a.",)), ["a.b", "a.c"], {"b": 0, "c": 1}, ()),
        (Keys(strip=("a.",)), ["a.b", "c"], {"a.b": 0, "c": 1}, ()),  # not every name has it
        (Keys(strip=("a.", "b.")), ["a.b.x", "a.b.y"], {"x": 0, "y": 1}, ()),
        (Keys(strip=("b.", "a.")), ["a.b.x", "a.b.y"], {"b.x": 0, "b.y": 1}, ()),
        (Keys(rename={"^a": "b", "^b": "c"}), ["a", "xa"], {"c": 0, "xa": 1}, ()),  # in order, and where they match
        (Keys(rename={r"^blocks\.(\d)\.": r"layer\1."}), ["blocks.3.w"], {"layer3.w": 0}, ()),
        (Keys(drop=("^head",)), ["head.w", "head.b", "x.head"], {"x.head": 2}, ("head",)),
        (Keys(rename={"^fc": "head"}, drop=("^head",)), ["fc.w", "x"], {"x": 1}, ("head",)),  # after renaming
        (Keys(drop=("x",)), ["x", "y.x"], {}, ("x", "y")),
    ],
)
def test_names_are_stripped_renamed_and_dropped_in_this_order(keys, names, found, dropped):
    state = {name: torch.tensor(n) for n, name in enumerate(names)}
    result = renamed(Checkpoint(state, ("epoch",), {"source": "a"}), keys)
    assert {name: value.item() for name, value in result.state.items()} == found
    assert (result.dropped, result.provenance) == ((*dropped, "epoch"), {"source": "a"})


def test_two_names_that_become_one_are_refused(tmp_path, small_model):
    state = small_model.state_dict()
    torch.save(prefixed("a.", state) | prefixed("b.", state), tmp_path / "two.pt")
    overlay = {"keys": {"rename": {"^[ab].": ""}}}
    with pytest.raises(WeightsError, match=r"two\.pt: by the keys of its card, two .* named conv1\.weight.*b\.conv1"):
        create_model("test_resnet_3d", pretrained_cfg_overlay=overlay, checkpoint_path=tmp_path / "two.pt")


@pytest.mark.parametrize(
    "keys", [{"rename": {"(": ""}}, {"drop": ["*"]}, {"rename": {"a": r"\1"}}, {"strip": "net."}, {"take": 3}]
)
def test_keys_that_mean_nothing_are_refused(keys):
    with pytest.raises(ValueError, match="Keys: "):
        Keys.from_dict(keys)


# --- Loading --------------------------------------------------------------------------------------


def test_authors_file_loads_strictly_through_checkpoint_path(carded, authors_file, small_model):
    model = create_model(carded, checkpoint_path=authors_file)
    assert same(model.state_dict(), small_model.state_dict())
    left_out = ("age_head", "fc", "sex_head", "epoch", "student", "momentum")
    assert sorted(model.weights_report.dropped) == sorted(left_out)


def test_authors_file_loads_through_the_file_of_its_card(carded, authors_file, small_model):
    model = create_model(carded, pretrained=True)
    assert same(model.state_dict(), small_model.state_dict())
    assert model.weights_report.file == model.weights_report.source == str(authors_file)
    assert model.pretrained_cfg.keys == KEYS


@pytest.mark.parametrize("write", [torch.save, save_state], ids=["torch", "safetensors"])
def test_state_dict_of_the_authors_names_at_the_top_is_found_too(write, carded, small_model, tmp_path):
    write(authors_names(small_model.state_dict()), tmp_path / "flat")
    model = create_model(carded, checkpoint_path=tmp_path / "flat")
    assert same(model.state_dict(), small_model.state_dict())


def test_name_that_the_keys_do_not_cover_is_refused(carded, small_model, tmp_path):
    state = authors_names(small_model.state_dict()) | {"module.net.strange.weight": torch.ones(1)}
    torch.save(state, tmp_path / "more.pt")
    with pytest.raises(WeightsError, match=r"1 unexpected: strange\.weight"):
        create_model(carded, checkpoint_path=tmp_path / "more.pt")
    state.pop("module.net.strange.weight")
    state.pop("module.net.trunk.bn1.bias")
    torch.save(state, tmp_path / "less.pt")
    with pytest.raises(WeightsError, match=r"1 missing: bn1\.bias"):
        create_model(carded, checkpoint_path=tmp_path / "less.pt")


def test_ones_own_checkpoint_of_the_network_is_loaded_as_it_is_with_its_classifier(carded, tmp_path):
    """The card drops the authors' "fc"; one that was trained since must not be lost in silence."""
    model = create_model(carded, pretrained=True, num_classes=3)
    nn.init.normal_(model.get_classifier().weight)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "mine.pt")
    again = create_model(carded, num_classes=3, checkpoint_path=tmp_path / "mine.pt")
    assert same(again.state_dict(), model.state_dict())


def test_module_without_a_cfg_has_no_keys(tmp_path):
    save_state(nn.Linear(3, 2).state_dict(), tmp_path / "w.safetensors")
    assert load_checkpoint(nn.Linear(3, 2), tmp_path / "w.safetensors").dropped == ()


# --- The Git blob ---------------------------------------------------------------------------------


def test_wrong_git_blob_is_refused_by_its_kind_and_can_be_switched_off(tmp_path, authors_file, small_model):
    name = register(tmp_path, f"git-blob:{'0' * 40}", "file: authors.pt")
    right = file_git_blob(authors_file)
    with pytest.raises(
        WeightsError,
        match=rf'authors\.pt: git_blob is {right}, and lab_3d\.lab2025 expects {"0" * 40}.*"git_blob": None',
    ):
        create_model(name, pretrained=True)
    model = create_model(name, pretrained=True, pretrained_cfg_overlay={"git_blob": None})
    assert same(model.state_dict(), small_model.state_dict())


def test_git_blob_in_capitals_is_the_same(tmp_path, authors_file):
    name = register(tmp_path, f"git-blob:{file_git_blob(authors_file).upper()}", "file: authors.pt")
    assert create_model(name, pretrained=True).weights_report is not None


def test_new_source_clears_the_git_blob(carded):
    cfg = brainfm.get_pretrained_cfg(carded)
    assert cfg.git_blob
    assert cfg.overlay({"file": "other.pt"}).git_blob is None


def serve(server, tmp_path, authors_file, digest):
    server.files["/authors.pt"] = authors_file.read_bytes()
    return register(tmp_path, digest, f"url: {server.url}/authors.pt")


def test_url_whose_file_is_known_by_its_git_blob_is_downloaded_once(server, tmp_path, authors_file, small_model):
    blob = file_git_blob(authors_file)
    name = serve(server, tmp_path, authors_file, f"git-blob:{blob}")
    for _ in range(2):
        model = create_model(name, pretrained=True, cache_dir=tmp_path / "cache")
        assert same(model.state_dict(), small_model.state_dict())
        assert model.weights_report.source == f"{server.url}/authors.pt"
    assert len(server.requests) == 1
    path = find_weights(model.pretrained_cfg, tmp_path / "cache")
    assert read_checkpoint(path).provenance == {
        "source": f"{server.url}/authors.pt",
        "source_sha256": file_sha256(authors_file),
        "source_git_blob": blob,
        "left_out": ["epoch", "student", "momentum"],
    }


def test_download_with_another_git_blob_is_refused_and_not_kept(server, tmp_path, authors_file):
    name = serve(server, tmp_path, authors_file, f"git-blob:{'0' * 40}")
    with pytest.raises(WeightsError, match=f"git_blob is {file_git_blob(authors_file)}"):
        create_model(name, pretrained=True, cache_dir=tmp_path / "cache")
    assert kept(tmp_path / "cache") == []


def test_files_of_one_url_with_other_digests_or_other_parts_taken_are_kept_apart(server, tmp_path, authors_file):
    server.files["/authors.pt"] = authors_file.read_bytes()
    url = f"{server.url}/authors.pt"
    digests = [{}, {"git_blob": file_git_blob(authors_file)}, {"sha256": file_sha256(authors_file)}]
    cfgs = [PretrainedCfg("lab_3d", url=url, keys=Keys(take="teacher.ema"), **digest) for digest in digests]
    cfgs += [PretrainedCfg("lab_3d", url=url, keys=Keys(take="student"))]
    paths = [find_weights(cfg, tmp_path / "cache") for cfg in cfgs]
    assert len({*paths}) == 4
    assert read_checkpoint(paths[3]).state.keys() == {"net.trunk.conv1.weight"}


# --- Converted and saved --------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("brainfm.hub.golden.compute", lambda model: None)  # which test_golden.py is about


@pytest.mark.parametrize("by", ["file", "url", "convert"])
def test_saved_folder_has_the_networks_names_and_is_the_published_weights(
    by, quick, server, tmp_path, authors_file, small_model
):
    blob = f"git-blob:{file_git_blob(authors_file)}"
    name = serve(server, tmp_path, authors_file, blob) if by == "url" else register(tmp_path, blob, "file: authors.pt")
    if by == "convert":
        folder = convert(authors_file, tmp_path / "folder", f"{name}.lab2025")
    else:
        model = create_model(name, pretrained=True, cache_dir=tmp_path / "cache")
        folder = save_for_hub(model, tmp_path / "folder")
    cfg = resolve(f"local-dir:{folder}").cfg
    assert (cfg.name, cfg.licence, [cohort.name for cohort in cfg.cohorts]) == ("lab_3d.lab2025", "CC-BY-4.0", ["Lab"])
    assert (cfg.keys, cfg.git_blob, cfg.sha256) == (Keys(), None, file_sha256(folder / "model.safetensors"))
    assert same(read_checkpoint(folder / "model.safetensors").state, small_model.state_dict())
    assert same(create_model(f"local-dir:{folder}").state_dict(), small_model.state_dict())
    provenance = json.loads((folder / "config.json").read_text())["provenance"]
    assert provenance["source_git_blob"] == file_git_blob(authors_file)
    assert provenance["source_sha256"] == file_sha256(authors_file)


def test_other_file_is_not_converted_as_the_one_of_the_tag(quick, carded, tmp_path, small_model):
    torch.save(authors_names(small_model.state_dict()), tmp_path / "other.pt")
    with pytest.raises(WeightsError, match=r"other\.pt: git_blob is .*, and that of lab_3d\.lab2025 is"):
        convert(tmp_path / "other.pt", tmp_path / "folder", "lab_3d.lab2025")
    folder = convert(tmp_path / "other.pt", tmp_path / "folder", "lab_3d")
    cfg = resolve(f"local-dir:{folder}").cfg
    assert (cfg.tag, cfg.licence, cfg.cohorts) == ("", None, ())
    assert same(create_model(f"local-dir:{folder}").state_dict(), small_model.state_dict())


def test_channels_of_the_authors_file_are_kept(quick, carded, tmp_path):
    model = ResNet("basic", (1, 1, 1, 1), (16, 32, 64, 128), in_chans=2)
    torch.save(authors_names(model.state_dict()), tmp_path / "two_channels.pt")
    folder = convert(tmp_path / "two_channels.pt", tmp_path / "folder", "lab_3d")
    assert create_model(f"local-dir:{folder}").in_chans == 2
