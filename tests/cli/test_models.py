"""What the commands about models say and write: list, info, fetch, convert, push, verify."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

import brainfm
from brainfm import registry
from brainfm.assets import ASSETS
from brainfm.files import file_sha256
from brainfm.hub import Check
from brainfm.weights import save_state

SMALL = ("--model", "test_resnet_3d")


# --- list and info --------------------------------------------------------------------------------


def test_list_names_every_model_once(run):
    result = run("list")
    assert result.code == 0
    assert [line.split()[0] for line in result.out.splitlines()] == brainfm.list_models()


def test_list_filters_by_a_pattern(run):
    assert [line.split()[0] for line in run("list", "*vit*").out.splitlines()] == brainfm.list_models("*vit*")


def test_list_pretrained_gives_full_names_and_where_the_weights_are(run):
    lines = run("list", "--pretrained").out.splitlines()
    assert [line.split()[0] for line in lines] == brainfm.list_pretrained()
    assert all("no published weights" not in line for line in lines)
    assert any(line.startswith("test_resnet_3d.phantoms") and "in this package" in line for line in lines)


def test_list_of_nothing_is_an_error(run):
    result = run("list", "*alexnet*")
    assert result.code == 1
    assert result.err == ["ModelNameError: no model matches '*alexnet*'; 'brainfm list' names them all"]


def test_info_tells_the_contract_the_weights_and_the_cohorts(run):
    result = run("info", "simclr_resnet18_3d")
    assert result.code == 0
    for fact in (
        "512-d",
        "3D-Neuro-SimCLR/releases/download/v1.0.0",
        "f046dafe009de0cf",
        "MIT",
        "193×229×193 voxels of 1×1×1 mm",
        "crop the fixed box [10:160, 19:211, 1:193]",
        "[1, 150, 192, 192]",
        "18,759 patients, 44,958 scans",
        "ADNI",
        "0.904 ± 0.008",
        "@inproceedings",
    ):
        assert fact in result.out


def test_info_says_what_nobody_here_could_check(run, tmp_path):
    said = run("info", "simclr_resnet18_3d").out
    assert "nobody here has opened the published file; its digest and container are as others report them" in said
    assert "nobody here" not in run("info", "test_resnet_3d").out


@pytest.fixture
def lab_card(monkeypatch, tmp_path):
    """A card that a lab has registered, of gated weights of which little is stated."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    (tmp_path / "lab.yaml").write_text(LAB, encoding="utf-8")
    brainfm.register_card(tmp_path / "lab.yaml")


LAB = """
publication: {repository: https://lab.org/code}
licence: {gated: true, redistribute: false, terms: Sign first.}
models:
  lab_net:
    network: resnet
    args: {block: basic, layers: [1, 1, 1, 1], widths: [4, 8, 8, 16]}
    num_features: 16
    readout: {pool: avg, window: {shape: [32, 32, 32]}}
    weights:
      first:
        source: {hub: lab/net, revision: abc}
        digest: git-blob:0123456789012345678901234567890123456789
        container: a state dict
"""


def test_info_of_a_card_says_all_that_is_known_and_what_is_not(run, lab_card):
    said = run("info", "lab_net").out
    for label, value in {
        "model": "lab_net.first",
        "readout": "average over the last feature map, in windows of 32×32×32 voxels that overlap by 50%",
        "weights": "hf-hub:lab/net@abc",
        "digest": "git blob 0123456789012345678901234567890123456789",
        "container": "a state dict",
        "third-party facts": "nobody here",
        "pretraining": "not stated",
        "licence of the weights": "not stated",
        "licence of the code": "not stated",
        "access": "gated",
        "redistribution": "not allowed",
        "terms": "Sign first.",
        "code": "https://lab.org/code",
    }.items():
        assert re.search(rf"^{label} +{re.escape(value)}", said, flags=re.MULTILINE), label
    assert "Input contract\n  None was recorded." in said
    assert "Pretraining data\n  Not recorded" in said


def test_info_of_a_model_without_weights_says_nothing_of_them(run):
    said = run("info", "vit_tiny_3d").out
    assert "none published" in said
    for label in ("digest", "licence of the weights", "Pretraining data", "third-party"):
        assert label not in said


def test_info_tells_of_a_folder_and_of_a_repository_on_the_hub(run, hub, converted, tmp_path, monkeypatch):
    hub.add("lab/tiny", {path.name: path.read_bytes() for path in converted.iterdir()})
    digest = file_sha256(converted / "model.safetensors")
    for name in (f"local-dir:{converted}", "hf-hub:lab/tiny"):
        result = run("info", name)
        assert (result.code, result.err) == (0, [])
        assert f"sha256 {digest}" in result.out
        assert "Converted from mine.tar" in result.out
        assert "nobody here" not in result.out


# --- For a program to read ------------------------------------------------------------------------


def read_json(result):
    """What a command wrote on stdout, strictly JSON and nothing else."""
    return json.loads(result.out, parse_constant=pytest.fail)


@pytest.mark.parametrize("arguments", [(), ("*vit*",), ("--pretrained",)])
def test_list_as_json_has_every_listing_in_its_order(arguments, run):
    result = run("list", "--json", *arguments)
    assert (result.code, result.err) == (0, [])
    names = [line.split()[0] for line in run("list", *arguments).out.splitlines()]
    assert read_json(result) == [registry.listing(name).to_dict() for name in names]
    asked = {"name", "title", "modality", "contract", "licence", "gated", "accept", "num_features", "source", "facts"}
    for one in read_json(result):
        assert asked <= one.keys()
        assert one["modality"]
        assert one["contract"]
        assert one["num_features"] > 0


def test_info_as_json_is_the_cfg_and_where_its_weights_are(run):
    found = read_json(run("info", "test_resnet_3d", "--json"))
    cfg = brainfm.get_pretrained_cfg("test_resnet_3d")
    place = {key: found.pop(key) for key in ("name", "source", "cached_file")}
    assert place == {
        "name": "test_resnet_3d.phantoms",
        "source": "in this package",
        "cached_file": str(ASSETS / "test_resnet_3d.safetensors"),
    }
    assert found == cfg.to_dict()
    assert replace(brainfm.PretrainedCfg.from_dict(found), file=cfg.file) == cfg


@pytest.mark.parametrize(("name", "has_source"), [("simclr_resnet18_3d", True), ("vit_tiny_3d", False)])
def test_info_as_json_of_weights_that_are_not_here(name, has_source, run):
    found = read_json(run("info", name, "--json"))
    assert found["cached_file"] is None
    assert found["source"] == (found["url"] if has_source else None)


def test_overlap_as_json_names_cohorts_and_reasons(run):
    result = run("info", "simclr_resnet18_3d", "--json", "--overlap", "IXI", "OpenBHB")
    assert result.code == 0
    found = read_json(result)
    assert found["name"] == "simclr_resnet18_3d.kaczmarek2025"
    assert found["datasets"] == ["IXI", "OpenBHB"]
    assert "ADNI" in found["cohorts"]
    assert [(one["dataset"], one["cohort"]["name"]) for one in found["overlaps"]] == [
        ("OpenBHB", "CoRR"),
        ("OpenBHB", "GSP"),
    ]
    assert found["overlaps"][0]["why"] == "a collection that holds CoRR"
    assert read_json(run("info", "vit_tiny_3d", "--json", "--overlap", "ADNI"))["cohorts"] == []


def test_verify_as_json_has_the_errors_and_the_verdict(run):
    result = run("verify", "test_resnet_3d", "--json")
    assert (result.code, result.err) == (0, [])
    found = read_json(result)
    assert (found["model"], found["ok"]) == ("test_resnet_3d", True)
    assert [check["computation"] for check in found["checks"]] == [
        "float32",
        "float32, optimized",
        "bfloat16, optimized",
    ]
    assert all(check["ok"] and check["error"] <= check["tolerance"] for check in found["checks"])


@pytest.mark.parametrize("error", [0.5, float("nan"), float("inf")])
def test_verify_as_json_of_other_features_fails_as_without_it(error, run, monkeypatch):
    monkeypatch.setattr(brainfm, "verify", lambda *arguments: [Check("float32", error, 1e-4)])
    result = run("verify", "test_resnet_3d", "--json")
    assert result.code == 1
    assert len(result.err) == 1
    found = read_json(result)
    expected = {"computation": "float32", "error": 0.5 if error == 0.5 else None, "tolerance": 1e-4, "ok": False}
    assert found == {"model": "test_resnet_3d", "ok": False, "checks": [expected]}


@pytest.mark.parametrize("command", [("list", "*alexnet*"), ("info", "unet"), ("verify", "unet")])
def test_an_error_writes_no_json(command, run):
    result = run(*command, "--json")
    assert (result.code, result.out, len(result.err)) == (1, "", 1)


def test_info_of_an_unknown_model_suggests_the_nearest(run):
    result = run("info", "simclr_resnet18")
    assert result.code == 1
    assert result.out == ""
    assert len(result.err) == 1
    assert result.err[0].startswith("ModelNameError: unknown model 'simclr_resnet18'; did you mean ")
    assert "simclr_resnet18_3d" in result.err[0]


@pytest.mark.parametrize("name", ["some/folder", "weights.safetensors", "s3:bucket"])
def test_info_of_a_place_without_a_scheme_names_the_schemes(name, run):
    result = run("info", name)
    assert result.code == 1
    assert "hf-hub:" in result.err[0]
    assert "local-dir:" in result.err[0]


# --- fetch, convert, push, verify, info --overlap -------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of pretraining, as SimCLR leaves it."""
    torch.manual_seed(3)
    state = brainfm.create_model("test_resnet_3d").state_dict()
    network = {f"module.encoder.{key}": value for key, value in state.items()} | {"module.projector.0.weight": state}
    network["module.projector.0.weight"] = torch.ones(2, 2)
    torch.save({"epoch": 7, "model_state_dict": network, "optimizer_state_dict": {}}, tmp_path / "mine.tar")
    return tmp_path / "mine.tar"


@pytest.fixture
def converted(run, checkpoint, tmp_path):
    """A folder of the test model, as the command line makes it."""
    assert run("convert", checkpoint, tmp_path / "folder", *SMALL).code == 0
    return tmp_path / "folder"


def test_fetch_says_where_the_weights_are(run):
    result = run("fetch", "test_resnet_3d")
    assert (result.code, result.err) == (0, [])
    assert result.out == f"test_resnet_3d → {ASSETS / 'test_resnet_3d.safetensors'}\n"


def test_fetch_to_a_folder_says_how_it_is_loaded(run, tmp_path, small_model):
    result = run("fetch", "test_resnet_3d", "--to", tmp_path / "folder")
    assert (result.code, result.err) == (0, [])
    name = re.search(r"\(load it as (local-dir:.*)\)", result.out).group(1)
    state = brainfm.create_model(name).state_dict()
    assert all(torch.equal(state[key], value) for key, value in small_model.state_dict().items())


def test_fetch_from_the_hub_to_a_cache_and_again_without_a_network(run, hub, converted, tmp_path):
    hub.add("lab/tiny", {path.name: path.read_bytes() for path in converted.iterdir()})
    results = [run("fetch", "hf-hub:lab/tiny", "--cache-dir", tmp_path / "cache") for _ in range(2)]
    assert [result.code for result in results] == [0, 0]
    assert f"hf-hub:lab/tiny → {tmp_path / 'cache'}" in results[0].out
    assert hub.downloads == 1


def test_convert_says_what_it_made_and_what_is_not_said_of_it(run, checkpoint, tmp_path):
    result = run("convert", checkpoint, tmp_path / "folder", *SMALL)
    assert result.code == 0
    first, notes, unstated = result.out.splitlines()
    assert re.fullmatch(rf"{tmp_path / 'folder'}: test_resnet_3d, 128 numbers; sha256 [0-9a-f]{{64}}", first)
    assert notes.startswith("Converted from mine.tar (sha256 ")
    assert "cohorts, licence" in unstated
    assert "--cfg" in unstated


def test_convert_takes_what_is_known_from_a_json_file(run, checkpoint, tmp_path):
    cfg = {"licence": "CC-BY-4.0", "notes": "Unsere ä.", "cohorts": [{"name": "Lab", "patients": 2, "scans": 3}]}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg, ensure_ascii=False), encoding="utf-8")
    result = run("convert", checkpoint, tmp_path / "folder", *SMALL, "--cfg", tmp_path / "cfg.json")
    assert result.code == 0
    assert "Unsere ä." in result.out
    assert "Not stated" not in result.out
    said = run("info", f"local-dir:{tmp_path / 'folder'}").out
    assert "CC-BY-4.0" in said
    assert "Pretrained on 2 patients, 3 scans" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"license": "MIT"}', "has no field license; did you mean licence?"),
        ('{"licence": "MIT"', "cfg.json: "),
        ("[1]", "cfg.json: "),
        ("3", "cfg.json: "),
        ('{"licence": 3}', "licence is 3, and must be"),
        ('{"cohorts": 3}', "cfg.json: "),
    ],
)
def test_convert_with_a_cfg_that_means_nothing_is_one_line(text, message, run, checkpoint, tmp_path):
    (tmp_path / "cfg.json").write_text(text)
    result = run("convert", checkpoint, tmp_path / "folder", *SMALL, "--cfg", tmp_path / "cfg.json")
    assert result.code == 1
    (line,) = [line for line in result.err if "left out" not in line]
    assert message in line
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("convert", "none.pt", "folder", *SMALL), "WeightsNotFoundError: none.pt: no such weight file"),
        (("convert", "mine.tar", "folder", "--model", "resnet"), "ModelNameError: unknown model 'resnet'"),
        (("convert", "mine.tar", "folder", "--model", "test_resnet_3d.phantoms"), "WeightsError: mine.tar: sha256 is"),
        (("convert", "mine.tar", "folder", "--model", "test_vit_3d"), "do not fit this VisionTransformer"),
        (("convert", "mine.tar", "mine.tar", *SMALL), "BrainfmError: mine.tar: a file; name a folder"),
        (("convert", "mine.tar", ".", *SMALL), "BrainfmError: .: not empty, and no model's folder"),
        (("fetch", "vit_tiny_3d"), "WeightsNotFoundError: no weights of vit_tiny_3d"),
        (("fetch", "test_resnet"), "ModelNameError: unknown model 'test_resnet'"),
        (("fetch", "hf-hub:lab/none"), "no such repository, or a private one"),
        (("fetch", "local-dir:none", "--to", "folder"), "WeightsNotFoundError: local-dir:none"),
        (("fetch", "test_resnet_3d", "--to", "mine.tar"), "BrainfmError: mine.tar: a file; name a folder"),
        (("push", "none", "lab/tiny"), "WeightsNotFoundError: local-dir:none"),
        (("push", ".", "lab/tiny"), "config.json is not there"),
        (("push", ".", "tiny"), "BrainfmError: 'tiny' is not the name of a repository"),
        (("verify", "vit_tiny_3d"), "WeightsNotFoundError: no weights of vit_tiny_3d"),
        (("verify", "local-dir:none"), "WeightsNotFoundError: local-dir:none"),
        (("verify", "test_resnet_3d", "--device", "nonsense"), "BrainfmError: device 'nonsense' cannot be used here"),
        (("verify", "test_resnet_3d", "--device", "cuda:99"), "BrainfmError: device 'cuda:99' cannot be used here"),
        (("info", "test_resnet", "--overlap", "ADNI"), "ModelNameError: unknown model 'test_resnet'"),
    ],
)
def test_command_with_a_wrong_argument_is_one_line_and_writes_nothing(
    arguments, message, run, hub, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.code == 1
    (line,) = [line for line in result.err if "left out" not in line]
    assert message in line
    assert result.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["mine.tar"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("fetch",),
        ("convert", "a.tar", "folder"),
        ("convert", "a.tar", *SMALL),
        ("convert", "a.tar", "folder", *SMALL, "--cfg", "missing.json"),
        ("push", "folder"),
        ("verify",),
        ("verify", "test_resnet_3d", "--dtype", "float64"),
        ("info", "test_resnet_3d", "--overlap"),
        ("info", "test_resnet_3d", "ADNI"),
    ],
)
def test_command_without_what_it_needs_is_a_usage_error(arguments, run):
    result = run(*arguments)
    assert result.code == 2
    assert "Usage:" in result.err[0]


def test_push_says_the_commit_and_the_hash_to_pin(run, hub, converted, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "write-token")
    result = run("push", converted, "lab/tiny", "--private")
    assert result.code == 0
    repository = hub.repositories["lab/tiny"]
    assert repository.private
    name, pinned = result.out.splitlines()
    assert name == f"hf-hub:lab/tiny@{repository.branches['main']}"
    assert pinned.split()[1].rstrip(":") == brainfm.create_model(f"local-dir:{converted}").pretrained_cfg.sha256


def test_push_without_a_token_is_one_line(run, hub, converted):
    result = run("push", converted, "lab/tiny")
    assert result.code == 1
    assert len(result.err) == 1
    assert result.err[0].startswith("BrainfmError: hf-hub:lab/tiny: not uploaded: the token was refused (401)")


@pytest.mark.parametrize("name", ["test_resnet_3d", "test_vit_3d"])
def test_verify_of_a_packaged_model_is_ok_in_every_dtype(name, run):
    dtypes = ("--dtype", "float32", "--dtype", "bfloat16", "--dtype", "float16")
    result = run("verify", name, *dtypes)
    assert (result.code, result.err) == (0, [])
    lines = result.out.splitlines()
    assert [re.split(r"\s{2,}", line)[0].split(" relative")[0].strip() for line in lines] == [
        "float32",
        "float32, optimized",
        "bfloat16, optimized",
        "float16, optimized",
    ]
    assert all(re.search(r"relative error \d\.\de[-+]\d\d   ok \(at most [\d.e-]+\)$", line) for line in lines)


def test_verify_of_a_converted_folder_is_ok_and_of_other_weights_is_off(run, converted):
    result = run("verify", f"local-dir:{converted}")
    assert result.code == 0
    assert result.out.count(" ok ") == 3
    model = brainfm.create_model(f"local-dir:{converted}")
    for value in model.state_dict().values():
        value.mul_(1.05) if value.is_floating_point() else None
    save_state(model.state_dict(), converted / "model.safetensors")
    config = json.loads((converted / "config.json").read_text())
    (weights,) = config["models"]["test_resnet_3d"]["weights"].values()
    weights["digest"] = f"sha256:{file_sha256(converted / 'model.safetensors')}"
    (converted / "config.json").write_text(json.dumps(config))
    result = run("verify", f"local-dir:{converted}")
    assert result.code == 1
    assert result.out.count(" OFF ") == 3
    assert result.err == [
        f"these are not the features of local-dir:{converted}; the input, the weights or the arithmetic differ"
    ]


def test_verify_without_a_golden_embedding_is_one_line(run, converted):
    config = json.loads((converted / "config.json").read_text())
    del config["golden"]
    (converted / "config.json").write_text(json.dumps(config))
    result = run("verify", f"local-dir:{converted}")
    assert (result.code, result.out) == (1, "")
    assert len(result.err) == 1
    assert "no golden embedding is known for these weights" in result.err[0]


def test_overlap_is_said_of_every_data_set_in_its_order(run):
    result = run("info", "simclr_resnet18_3d", "--overlap", "IXI", "ADNI", "my_study", "OpenBHB")
    assert (result.code, result.err) == (0, [])
    unknown = "not among the pretraining cohorts by any name known here"
    assert result.out.splitlines() == [
        f"IXI: {unknown}",
        "ADNI: in the pretraining data (the same: ADNI, 3,028 patients, 21,778 scans)",
        f"my_study: {unknown}",
        "OpenBHB: in the pretraining data (a collection that holds CoRR: CoRR, 1,416 patients, 1,416 scans)",
        "OpenBHB: in the pretraining data (a collection that holds GSP: GSP, 1,569 patients, 1,569 scans)",
    ]


def test_overlap_may_be_asked_for_in_front_and_of_a_name_with_spaces(run):
    result = run("info", "--overlap", "simclr_resnet18_3d", "Dallas Lifespan Brain Study")
    assert result.code == 0
    assert result.out.startswith("Dallas Lifespan Brain Study: in the pretraining data (the name in full: DLBS")


def test_overlap_of_a_model_without_recorded_cohorts_says_that_instead(run):
    result = run("info", "vit_tiny_3d", "--overlap", "ADNI")
    assert result.code == 0
    assert result.out == "ADNI: vit_tiny_3d records no pretraining cohorts\n"
