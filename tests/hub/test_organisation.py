"""`brainfm publish`: every weight that may be passed on and is here goes to the Hub; what is there is left alone."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
import yaml
from click.testing import CliRunner
from loopback_hub import Fault

import brainfm
from brainfm import BrainfmError, ModelNameError, registry
from brainfm.assets import ASSETS
from brainfm.cli.main import main
from brainfm.files import file_sha256
from brainfm.hub import publish_all
from brainfm.zoo.cards import zoo_cards

CONTRACT = yaml.safe_load(next(p for p in zoo_cards() if p.stem == "phantoms").read_text())["inputs"]
ARGS = {"dim": 96, "depth": 4, "num_heads": 3, "img_size": [40, 48, 48], "patch_size": [8, 8, 8]}


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})


@pytest.fixture
def weights(tmp_path):
    return shutil.copy(ASSETS / "test_vit_3d.safetensors", tmp_path / "authors.safetensors")


def register(folder, licence, **sources):
    """A card of one ViT a source: name → the fields of its weights."""
    models = {
        f"lab_{name}": {
            **{"network": "vit", "args": ARGS, "input": "turboprep_4mm", "readout": {"pool": "token"}},
            **{"num_features": 96, "weights": {"v1": {"facts": "seen", **source}}},
        }
        for name, source in sources.items()
    }
    path = folder / f"{'_'.join(sources)}.yaml"
    path.write_text(yaml.safe_dump({"licence": licence, "inputs": CONTRACT, "models": models}))
    return brainfm.register_card(path)


def publish(*arguments):
    return CliRunner().invoke(main, ["publish", *map(str, arguments)], env={"HF_TOKEN": "write-token"})


def states(output):
    return {
        name: state for state, name in re.findall(r"^(pushed|there|ready|left out|failed) +(lab_\w+)", output, re.M)
    }


def pins(output):
    return yaml.safe_load(output.partition("cards:\n")[2])


MIT = {"code": "MIT", "weights": "MIT"}


def test_dry_run_says_what_would_go_and_why_the_rest_is_left_out(hub, weights, tmp_path):
    digest = f"sha256:{file_sha256(weights)}"
    register(tmp_path, MIT, open={"source": {"file": str(weights)}, "digest": digest})
    register(tmp_path, MIT, url={"source": {"url": "https://x.org/a.pt"}}, drawn={"source": {"seed": 0}})
    register(tmp_path, MIT, page={"source": {"page": "https://x.org/form"}, "digest": digest})
    register(tmp_path, {**MIT, "redistribute": False}, closed={"source": {"file": str(weights)}})
    register(tmp_path, {"code": "MIT"}, unstated={"source": {"file": str(weights)}})
    result = publish("lab", "lab_*", "--dry-run")
    assert result.exit_code == 0
    lines = {line.split(".")[0].split()[-1]: line for line in result.stdout.splitlines()}
    assert states(result.stdout) == {"lab_open": "ready"} | dict.fromkeys(set(lines) - {"lab_open"}, "left out")
    assert lines["lab_open"] == f"ready     lab_open.v1 → hf-hub:lab/lab_open.v1: {weights}"
    assert "brainfm fetch lab_url.v1" in lines["lab_url"]
    assert "https://x.org/form, or give the file: --file lab_page.v1=FILE" in lines["lab_page"]
    assert "its licence (MIT) does not let it be passed on" in lines["lab_closed"]
    assert "no licence of its weights is stated" in lines["lab_unstated"]
    assert "drawn by seed 0" in lines["lab_drawn"]
    assert hub.asked == []
    given = publish("lab", "lab_page", "--dry-run", "--file", f"lab_page={weights}")
    assert states(given.stdout) == {"lab_page": "ready"}


def test_every_weight_is_pushed_with_its_card_and_the_pins_load_it(hub, weights, tmp_path):
    digest = f"sha256:{file_sha256(weights)}"
    register(tmp_path, MIT, open={"source": {"file": str(weights)}, "digest": digest})
    register(tmp_path, MIT, page={"source": {"page": "https://x.org/form"}, "digest": digest})
    result = publish("lab", "lab_*", "--file", f"lab_page.v1={weights}")
    assert result.exit_code == 0, result.stdout
    assert states(result.stdout) == {"lab_open": "pushed", "lab_page": "pushed"}
    for name in ("lab_open.v1", "lab_page.v1"):
        repository = hub.repositories[f"lab/{name}"]
        commit = repository.branches["main"]
        files = repository.commits[commit]
        assert {"README.md", "config.json", "model.safetensors"} < set(files)
        config = yaml.safe_load(files["config.json"])
        assert len(config["golden"]["embedding"]) == 96
        assert config["inputs"]["input"]["grid"]["shape"] == [48, 48, 40]
        assert b"license: mit" in files["README.md"]
        assert pins(result.stdout)[name]["source"] == {"hub": f"lab/{name}", "revision": commit}
    # The pins in a card of the same model, on a machine that has nothing else.
    registry._registered.clear()
    register(tmp_path, MIT, open=pins(result.stdout)["lab_open.v1"])
    pinned = brainfm.create_model("lab_open", pretrained=True, cache_dir=tmp_path / "cache")
    x = torch.randn(1, 1, 40, 48, 48)
    with torch.inference_mode():
        assert torch.equal(pinned(x), brainfm.create_model("test_vit_3d", pretrained=True)(x))
    wrong = {"sha256": "0" * 64, "hub_id": "lab/lab_open.v1", "hub_revision": pinned.pretrained_cfg.hub_revision}
    with pytest.raises(brainfm.WeightsError, match="sha256"):
        brainfm.create_model("lab_open", pretrained=True, pretrained_cfg_overlay=wrong, cache_dir=tmp_path / "cache")


@pytest.fixture
def no_golden(monkeypatch):
    """For what it takes a second to compute."""
    monkeypatch.setattr("brainfm.hub.golden.compute", lambda model: None)


def test_one_failure_stops_no_other_and_the_same_command_goes_on(hub, weights, no_golden, tmp_path):
    digest = f"sha256:{file_sha256(weights)}"
    same = {"source": {"file": str(weights)}, "digest": digest}
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"not the published file")
    register(tmp_path, MIT, a=same, b=same, c={"source": {"file": str(other)}, "digest": digest})
    hub.faults = [Fault("/api/models/lab/lab_a.v1/commit", 403, times=9)]
    first = publish("lab", "lab_*")
    assert first.exit_code == 1
    assert states(first.stdout) == {"lab_a": "failed", "lab_b": "pushed", "lab_c": "failed"}
    assert "hf-hub:lab/lab_a.v1: not uploaded" in first.stdout
    assert re.search("lab_c.*sha256 is", first.stdout)
    hub.faults, hub.asked = [], []
    shutil.copy(weights, other)
    second = publish("lab", "lab_*")
    assert second.exit_code == 0, second.stdout
    assert states(second.stdout) == {"lab_a": "pushed", "lab_b": "there", "lab_c": "pushed"}
    assert not any("lab_b" in request and request.startswith("POST") for request in hub.asked)
    assert pins(second.stdout)["lab_b.v1"] == pins(first.stdout)["lab_b.v1"]
    assert len(pins(second.stdout)) == 3


def test_another_card_of_the_same_weights_is_pushed_and_its_weights_are_not_sent_again(
    hub, weights, no_golden, tmp_path
):
    same = {"source": {"file": str(weights)}, "digest": f"sha256:{file_sha256(weights)}"}
    register(tmp_path, MIT, a=same)
    before = pins(publish("lab", "lab_*").stdout)["lab_a.v1"]
    registry._registered.clear()
    register(tmp_path, MIT, a=same | {"notes": "Read the erratum."})
    hub.asked = []
    after = publish("lab", "lab_*")
    assert states(after.stdout) == {"lab_a": "pushed"}
    assert not any(request.startswith("PUT") for request in hub.asked)
    after = pins(after.stdout)["lab_a.v1"]
    assert after["digest"] == before["digest"]
    assert after["source"]["revision"] != before["source"]["revision"]


def test_file_that_is_not_the_published_one_is_not_pushed_under_its_name(hub, weights, no_golden, tmp_path):
    register(tmp_path, MIT, a={"source": {"file": str(weights)}, "digest": "git-blob:" + "0" * 40})
    assert "git_blob is" in publish("lab", "lab_*", "--file", f"lab_a={weights}").output
    register(tmp_path, MIT, b={"source": {"page": "https://x.org/form"}})  # no digest: nobody can tell
    result = publish("lab", "lab_b", "--file", f"lab_b={weights}")
    assert result.exit_code == 1
    assert "cannot be told to be the published file of lab_b.v1" in result.stdout
    assert hub.repositories == {}


def test_names_that_are_none_are_refused_before_anything_is_done(hub, weights, tmp_path):
    for organisation in ("", "lab/x"):
        with pytest.raises(BrainfmError, match="organisation"):
            publish_all(organisation)
    register(tmp_path, MIT, a={"source": {"file": str(weights)}})
    with pytest.raises(ModelNameError, match="no_such"):
        publish_all("lab", files={"no_such": weights})
    with pytest.raises(BrainfmError, match=r"lab_a\.v1, which is not among"):
        publish_all("lab", "test_*", files={"lab_a": weights})
    with pytest.raises(ModelNameError, match="nothing_like"):
        publish_all("lab", "nothing_like_it*")
    assert publish("lab", "--file", "lab_a").exit_code == 2
    assert hub.asked == []
