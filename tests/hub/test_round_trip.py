"""convert → push → an empty cache elsewhere → `create_model`: the same embedding to the bit, by every way in."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import brainfm
from brainfm import BrainfmError, WeightsError, WeightsNotFoundError, push_to_hub
from brainfm.cli.main import main
from brainfm.hub import convert

ROOT = Path(__file__).parents[2]

EMBED = """
import sys, torch

def load(name, **cache):
    if name == "torch.hub":
        return torch.hub.load(sys.argv[1], "test_resnet_3d", source="local", pretrained=True, pretrained_cfg_overlay={
            "hub_id": "lab/tiny"}, **cache)
    import brainfm
    return brainfm.create_model(name, pretrained=True, **cache)

for argument in sys.argv[2:]:
    name, _, cache = argument.partition("=")
    model = load(name, **({"cache_dir": cache} if cache else {}))
    torch.manual_seed(0)
    with torch.inference_mode():
        print([value.hex() for value in model(torch.randn(1, 1, 40, 48, 48))[0].tolist()])
"""

# Processes that import all first and begin at one moment; each says what it got.
FOUR = """
import os, sys
import torch, brainfm, brainfm.weights, huggingface_hub, safetensors.torch

torch.set_num_threads(1)
go, ready = os.pipe()
children = []
for n in range(4):
    children.append(os.fork())
    if not children[-1]:
        os.close(ready)
        os.read(go, 1)  # ends when the parent closes its side
        model = brainfm.create_model(sys.argv[1], pretrained=True)
        torch.manual_seed(0)
        with torch.inference_mode():
            found = [value.hex() for value in model(torch.randn(1, 1, 40, 48, 48))[0].tolist()]
        os.write(1, (str(found) + "\\n").encode())
        os._exit(0)
os.close(ready)
assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
"""


@pytest.fixture
def checkpoint(tmp_path, small_model):
    """A pretraining checkpoint as the released one is: a DDP network with its projector, and an optimiser's state."""
    torch.manual_seed(3)
    encoder = brainfm.create_model("test_resnet_3d")
    state = {f"module.encoder.{key}": value for key, value in encoder.state_dict().items()}
    state |= {"module.projector.0.weight": torch.ones(2, 2)}
    torch.save({"epoch": 7, "model_state_dict": state, "optimizer_state_dict": {}}, tmp_path / "released.tar")
    return tmp_path / "released.tar", encoder


@pytest.fixture
def folder(tmp_path, checkpoint):
    return convert(checkpoint[0], tmp_path / "folder", "test_resnet_3d")


def bits(process):
    assert process.returncode == 0, process.stderr
    return [line for line in process.stdout.splitlines() if line.startswith("[")]


@pytest.fixture
def wanted(checkpoint):
    return hexadecimal(checkpoint[1])


def hexadecimal(model):
    torch.manual_seed(0)
    with torch.inference_mode():
        return str([value.hex() for value in model(torch.randn(1, 1, 40, 48, 48))[0].tolist()])


def test_round_trip_gives_the_same_embedding_to_the_bit_by_every_way_in(elsewhere, hub, folder, wanted, tmp_path):
    pushed = CliRunner().invoke(main, ["push", str(folder), "lab/tiny"], env={"HF_TOKEN": "write-token"})
    assert pushed.exit_code == 0, pushed.output
    name = next(word for word in pushed.stdout.split() if "@" in word)  # before click 8.2 with bars among them
    commit = hub.repositories["lab/tiny"].branches["main"]
    assert name == f"hf-hub:lab/tiny@{commit}"
    embed = ["-c", EMBED, str(ROOT)]
    ways = [f"torch.hub={tmp_path / 'cold'}", "hf-hub:lab/tiny", f"{name}={tmp_path / 'colder'}", f"local-dir:{folder}"]
    assert bits(elsewhere(*embed, *ways)) == [wanted] * 4
    hub.asked.clear()
    assert bits(elsewhere(*embed, "hf-hub:lab/tiny", HF_HUB_OFFLINE="1")) == [wanted]
    assert hub.asked == []


def embedded(name, cache):
    return hexadecimal(brainfm.create_model(name, pretrained=True, cache_dir=cache))


def test_everything_is_uploaded_in_one_commit_and_the_card_names_the_repository(hub, folder):
    push_to_hub(folder, "lab/tiny", token="write-token")
    repository = hub.repositories["lab/tiny"]
    assert len(repository.commits) == 2  # the one that made it, and ours
    files = repository.commits[repository.branches["main"]]
    assert {"README.md", "config.json", "model.safetensors"} < set(files)
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert b'create_model("hf-hub:lab/tiny")' in files["README.md"]


def test_private_repository_is_for_those_with_a_token(hub, folder, wanted, tmp_path, monkeypatch):
    push_to_hub(folder, "lab/tiny", private=True, token="write-token")
    assert hub.repositories["lab/tiny"].private
    with pytest.raises(WeightsNotFoundError, match=r"no such repository, or a private one.*HF_TOKEN"):
        brainfm.create_model("hf-hub:lab/tiny", cache_dir=tmp_path / "cache")
    monkeypatch.setenv("HF_TOKEN", "read-token")
    assert embedded("hf-hub:lab/tiny", tmp_path / "cache") == wanted


def test_revision_is_a_branch_of_its_own(hub, folder, wanted, tmp_path):
    push_to_hub(folder, "lab/tiny", revision="v1", token="write-token")
    assert embedded("hf-hub:lab/tiny@v1", tmp_path) == wanted
    with pytest.raises(WeightsNotFoundError, match="the repository has no such file"):
        brainfm.create_model("hf-hub:lab/tiny", cache_dir=tmp_path)


def test_model_can_be_pushed_without_a_folder(hub, tmp_path, small_model):
    name = push_to_hub(small_model, "lab/direct", token="write-token")
    assert embedded(name, tmp_path) == embedded("test_resnet_3d", tmp_path)


@pytest.mark.parametrize(
    ("token", "reason"), [("read-token", r"refused \(403\)"), ("", r"refused \(401\)"), ("bad", r"refused \(401\)")]
)
def test_push_without_the_right_to_write_is_refused(token, reason, hub, folder):
    with pytest.raises(BrainfmError, match=f"hf-hub:lab/tiny: not uploaded: the token was {reason}"):
        push_to_hub(folder, "lab/tiny", token=token or False)
    assert hub.repositories == {}


def test_weights_whose_licence_does_not_let_them_be_passed_on_are_not_uploaded(hub, small_model, tmp_path, monkeypatch):
    monkeypatch.setattr("brainfm.hub.golden.compute", lambda model: None)
    overlay = {"redistribute": False, "terms": "ask the authors"}
    folder = brainfm.save_for_hub(small_model, tmp_path / "closed", pretrained_cfg_overlay=overlay)
    with pytest.raises(BrainfmError, match=r"closed: not uploaded: the licence .* passed on: ask the authors"):
        push_to_hub(folder, "lab/tiny", private=True, token="write-token")
    assert hub.asked == []


def test_folder_that_does_not_load_is_not_uploaded(hub, folder):
    (folder / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(WeightsError, match="sha256"):
        push_to_hub(folder, "lab/tiny", token="write-token")
    assert hub.asked == []


@pytest.mark.parametrize("name", ["tiny", "lab/", "a/b/c", "lab/ti ny", "/tiny"])
def test_name_that_is_none_is_refused(name, hub, folder):
    with pytest.raises(BrainfmError, match=f"'{name}'"):
        push_to_hub(folder, name, token="write-token")
    assert hub.repositories == {}


@pytest.mark.slow
def test_four_processes_on_a_cold_cache_make_one_download(elsewhere, hub, tmp_path):
    model = brainfm.create_model("test_vit_3d", pretrained=True)  # the quicker one to import
    folder = brainfm.save_for_hub(model, tmp_path / "folder")
    hub.add("lab/tiny", {path.name: path.read_bytes() for path in folder.iterdir()})
    done = elsewhere("-c", FOUR, "hf-hub:lab/tiny")
    assert bits(done) == [hexadecimal(model)] * 4
    assert hub.downloads == 1
