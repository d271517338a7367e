"""`brainfm doctor`: each thing that can be wrong is put wrong, and named with what to do."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from brainfm import doctor
from brainfm.cli.main import main
from brainfm.registry import get_pretrained_cfg
from brainfm.weights.fetch import _cache_paths


@pytest.fixture
def examined(hub, tmp_path, monkeypatch):
    """A function → the findings by subject, and the exit code, on a machine whose cache is empty."""
    monkeypatch.setenv("BRAINFM_CACHE", str(tmp_path / "cache"))

    def examine():
        result = CliRunner().invoke(main, ["doctor", "--json"])
        return {one["subject"]: one for one in json.loads(result.stdout)}, result.exit_code

    return examine


def test_machine_of_these_tests_is_sound(examined, hub):
    found, code = examined()
    assert code == 0
    assert "problem" not in {one["state"] for one in found.values()}
    assert torch.__version__ in found["torch"]["said"]
    assert found["Hub"] == {"subject": "Hub", "state": "ok", "said": f"{hub.url} answers", "advice": ""}
    assert found["token"]["state"] == "note"
    assert found["weights test_resnet_3d.phantoms"]["state"] == "ok"


def test_screen_says_the_same(examined):
    lines = CliRunner().invoke(main, ["doctor"]).stdout.splitlines()
    assert any(line.startswith("ok      Python") for line in lines)
    assert any(line.startswith("note    token") for line in lines)


def test_package_that_is_missing_is_a_problem_and_of_an_extra_a_note(examined, monkeypatch):
    asked = {"": {"tqdm": "tqdm"}, "prep": {"simpleitk": "SimpleITK"}}
    monkeypatch.setattr(doctor, "lacking", lambda extra="": asked.get(extra, {}))
    found, code = examined()
    assert code == 1
    assert (found["packages"]["state"], found["packages"]["advice"]) == ("problem", "pip install tqdm")
    assert (found["extra prep"]["state"], found["extra prep"]["advice"]) == ("note", "pip install SimpleITK")


def test_cache_that_cannot_be_written_is_a_problem(examined, monkeypatch, tmp_path):
    def refuse(*, dir):
        if tmp_path in (dir, *dir.parents):
            raise OSError(30, "Read-only file system")
        return (tmp_path.parent / "scratch").open("w")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    found, code = examined()
    assert code == 1
    assert "nothing can be written there (Read-only file system)" in found["cache"]["said"]
    assert found["cache"]["advice"] == "set BRAINFM_CACHE to a folder of your own"


def test_little_room_and_shared_memory_are_noted(examined, monkeypatch):
    monkeypatch.setattr(doctor, "_LEAST_FREE_GB", 1e9)
    monkeypatch.setattr(doctor, "free_shared_memory", lambda: 64e6)
    found, code = examined()
    assert code == 0
    assert found["cache"]["state"] == found["shared memory"]["state"] == "note"
    assert found["shared memory"]["said"].startswith("0.06 GB")


def test_hub_that_does_not_answer_and_offline_are_noted(examined, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "does not answer" in examined()[0]["Hub"]["said"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in examined()[0]["Hub"]["said"]


def test_token_is_never_printed(examined, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found, _ = examined()
    assert found["token"]["state"] == "ok"
    assert "hf_secret" not in json.dumps(found)


@pytest.mark.parametrize("damage", ["truncated", "another", "by hand"])
def test_weights_that_are_not_the_published_ones_are_a_problem(damage, examined):
    cfg = get_pretrained_cfg("simclr_resnet18_3d")
    converted, by_hand = _cache_paths(cfg, None)
    converted.parent.mkdir(parents=True)
    if damage == "truncated":
        converted.write_bytes(b"\x10")
    elif damage == "another":
        save_file({"a": torch.ones(1)}, converted, {"provenance": json.dumps({"source_sha256": "0" * 64})})
    else:
        by_hand.write_bytes(b"not it")
    found, code = examined()
    assert code == 1
    assert found[f"weights {cfg.name}"]["state"] == "problem"
    assert found[f"weights {cfg.name}"]["advice"] == "delete the file: it is fetched again"


def test_weights_made_of_the_published_file_are_sound(examined):
    cfg = get_pretrained_cfg("simclr_resnet18_3d")
    converted, _ = _cache_paths(cfg, None)
    converted.parent.mkdir(parents=True)
    said = {"source_sha256": cfg.sha256, "source_git_blob": cfg.git_blob}
    save_file({"a": torch.ones(1)}, converted, {"provenance": json.dumps({k: v for k, v in said.items() if v})})
    found, code = examined()
    assert code == 0
    assert found[f"weights {cfg.name}"]["said"].endswith("the digest is the published one")
