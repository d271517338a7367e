"""Faults on the way to the Hub: those that pass are waited for, others are named in bounded time, and nothing stays."""

from __future__ import annotations

import json
import os
import pickle
import struct
from contextlib import suppress

import pytest
import torch
from hub_cases import blob, leftovers, repository_files
from loopback_hub import Fault
from weight_files import same, saved

from brainfm import WeightsError, WeightsNotFoundError, create_model
from brainfm.assets import ASSETS

NAME = "hf-hub:lab/tiny"
HEAD_CONFIG = "HEAD /lab/tiny/resolve/main/config.json"
GET_CONFIG = "GET /lab/tiny/resolve/main/config.json"
GET_WEIGHTS = "GET /cdn/lab/tiny/"
FOR_EVER = 10**6


def name_of(value):
    """A parameter in the name of its test; none for a pattern."""
    names = {HEAD_CONFIG: "asking", GET_CONFIG: "config", GET_WEIGHTS: "weights"}
    return names.get(value, str(value) if len(str(value)) < 10 else "")


@pytest.fixture
def repository(hub, hub_files, clock):
    """lab/tiny on the Hub, whose client does not wait."""
    hub.add("lab/tiny", hub_files)
    return hub


@pytest.fixture
def works(hub, small_model, tmp_path):
    """A function that loads the model, and finds its weights right and its cache clean."""

    def check(name=NAME):
        model = create_model(name, cache_dir=tmp_path)
        assert same(model.state_dict(), small_model.state_dict())
        assert leftovers(hub, tmp_path) == []
        return model

    return check


@pytest.fixture
def refused(hub, tmp_path):
    """A function that tries to load the model, and gives the refusal: one line that names the model."""

    def check(reason, error=WeightsNotFoundError, name=NAME):
        with pytest.raises(WeightsError, match=reason) as refusal:
            create_model(name, cache_dir=tmp_path)
        assert type(refusal.value) is error
        assert str(refusal.value).startswith(name) or error is WeightsError
        assert "\n" not in str(refusal.value)
        return str(refusal.value)

    return check


# --- Connections that fail ------------------------------------------------------------------------


PASSING = [500, 408, 429, "drop", "stall"]
PASSING_IN_A_BODY = ["truncate", "hang", "page"]  # a HEAD has none


@pytest.mark.parametrize(
    ("where", "kind"),
    [(where, kind) for where in (HEAD_CONFIG, GET_CONFIG, GET_WEIGHTS) for kind in PASSING]
    + [(where, kind) for where in (GET_CONFIG, GET_WEIGHTS) for kind in PASSING_IN_A_BODY],
    ids=name_of,
)
def test_fault_that_passes_is_not_noticed(where, kind, repository, works, clock, impatient):
    if kind in ("stall", "hang"):
        impatient()
    fault = Fault(where, kind, at=60 if kind == "stall" else 100)
    repository.faults.append(fault)
    works()
    assert fault.met.is_set()
    assert clock.now < 10


@pytest.mark.parametrize(
    ("where", "kind", "reason"),
    [
        (HEAD_CONFIG, 500, r"config\.json: \S+ answers 500"),
        (HEAD_CONFIG, 408, r"config\.json: \S+ answers 408"),
        (HEAD_CONFIG, 429, r"config\.json: \S+ answers 429"),
        (HEAD_CONFIG, 403, r"config\.json: the token was refused \(403\)"),
        (HEAD_CONFIG, 404, r"config\.json: \S+ answers 404"),
        (HEAD_CONFIG, "drop", r"config\.json: .*disconnected|config\.json: .*aborted"),
        (HEAD_CONFIG, "stall", r"config\.json: \S+ cannot be reached \(.*timed out.*local-dir:FOLDER"),
        (HEAD_CONFIG, "page", r"config\.json: .*(does not seem to be served by|Distant resource).*"),
        (GET_CONFIG, 500, r"config\.json: \S+ answers 500"),
        (GET_CONFIG, "truncate", r"config\.json: the download broke"),
        (GET_CONFIG, "page", r"config\.json: the download broke"),
        (GET_WEIGHTS, 500, r"model\.safetensors: \S+ answers 500"),
        (GET_WEIGHTS, 408, r"model\.safetensors: \S+ answers 408"),
        (GET_WEIGHTS, 429, r"model\.safetensors: \S+ answers 429"),
        (GET_WEIGHTS, 403, r"model\.safetensors: the token was refused \(403\)"),
        (GET_WEIGHTS, 404, r"model\.safetensors: \S+ answers 404"),
        (
            GET_WEIGHTS,
            "truncate",
            r"model\.safetensors: the download broke \(.*(peer closed|IncompleteRead|Consistency)",
        ),
        (GET_WEIGHTS, "hang", r"model\.safetensors: the download broke \(.*timed out"),
        (GET_WEIGHTS, "drop", r"model\.safetensors: the download broke"),
        (GET_WEIGHTS, "page", r"model\.safetensors: the download broke \(Consistency check failed"),
    ],
    ids=name_of,
)
def test_fault_that_stays_is_named_in_bounded_time_and_leaves_nothing(
    where, kind, reason, repository, works, refused, clock, impatient, tmp_path
):
    if kind in ("stall", "hang"):
        impatient()
    repository.faults.append(Fault(where, kind, FOR_EVER, at=60 if kind == "stall" else 100))
    said = refused(reason)
    assert said.startswith(NAME)
    assert clock.now <= 40  # seconds slept; beside them only the client's time-outs
    assert len(repository.asked) < 60
    assert leftovers(repository, tmp_path) == []
    repository.faults.clear()
    works()


def test_download_that_broke_goes_on_where_it_stopped(repository, works, hub_files, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 16)  # what is written at a time
    repository.faults.append(Fault(GET_WEIGHTS, "truncate", at=1 << 20))
    works()
    first, second = repository.ranges
    assert first is None
    start = int(second.removeprefix("bytes=").removesuffix("-"))
    assert 1 << 19 < start <= 1 << 20


def test_second_of_two_faults_is_waited_for_too(repository, works):
    repository.faults += [Fault(GET_CONFIG, 500), Fault(GET_WEIGHTS, 503), Fault(GET_WEIGHTS, "truncate", at=9)]
    works()
    assert repository.downloads == 3


def test_hub_that_has_gone_is_named_with_the_way_out(repository, works, refused, gone, clock):
    come_back = gone()
    refused(r"config\.json: http://\S+ cannot be reached \(.*refused.*brainfm fetch NAME --to FOLDER.*local-dir:FOLDER")
    assert repository.asked == []
    assert clock.now <= 40
    come_back()
    works()


def test_cache_serves_when_the_hub_has_gone(repository, works, gone):
    works()
    repository.asked.clear()
    gone()
    works()
    assert repository.asked == []


@pytest.mark.parametrize("kind", [500, 403, "stall"], ids=str)
def test_cache_serves_when_the_hub_does_not_answer(kind, repository, works, impatient):
    works()
    impatient()
    repository.faults.append(Fault("", kind, FOR_EVER, at=60))
    works()


# --- Access ---------------------------------------------------------------------------------------


def test_repository_that_is_not_there_is_named(hub, refused, works, hub_files, tmp_path):
    refused(r"config\.json: no such repository, or a private one; check the name, .* HF_TOKEN")
    assert leftovers(hub, tmp_path) == []
    hub.add("lab/tiny", hub_files)
    works()


def test_revision_that_is_not_there_is_named(repository, refused, works, hub_files):
    for name in (f"{NAME}@gone", f"{NAME}@{'0' * 40}"):
        refused(r"config\.json: the repository has no such branch, tag or commit", name=name)
    repository.add("lab/tiny", hub_files, branch="gone")
    works(f"{NAME}@gone")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_file_that_is_not_there_is_named(missing, hub, refused, works, hub_files, tmp_path):
    hub.add("lab/tiny", {name: data for name, data in hub_files.items() if name != missing})
    refused(f"cannot get {missing}: the repository has no such file; 'brainfm convert' and 'brainfm push'")
    assert leftovers(hub, tmp_path) == []
    hub.add("lab/tiny", hub_files)
    works()


def test_private_repository_needs_a_token(hub, refused, works, hub_files, monkeypatch):
    hub.add("lab/tiny", hub_files, private=True)
    refused("no such repository, or a private one; check the name, and for a private one set HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "read-token")
    works()


def test_gated_repository_needs_a_token(hub, refused, works, hub_files, monkeypatch):
    hub.add("lab/tiny", hub_files, gated=True)
    refused(r"the repository is gated; ask for access at http\S+, then set HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "read-token")
    works()


def test_token_of_an_account_without_access_to_a_gated_repository_is_named(repository, refused, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "read-token")
    repository.faults.append(Fault("HEAD", 403, FOR_EVER, code="GatedRepo"))
    refused("the repository is gated; ask for access")
    assert len(repository.asked) == 1


def test_wrong_token_is_named_even_where_none_is_needed(repository, refused, works, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "wrong-token")
    refused(r"the token was refused \(401\); check HF_TOKEN")
    assert len(repository.asked) == 1
    monkeypatch.delenv("HF_TOKEN")
    works()


@pytest.mark.parametrize("place", ["a/b/c", "lab/ti ny", "-lab/tiny", "lab/..", "lab/tiny.git", "../tiny", "lab//tiny"])
def test_name_that_is_no_repositorys_is_refused_and_not_asked_for(place, hub, refused):
    refused("config.json: not a repository's name", name=f"hf-hub:{place}")
    assert hub.asked == []


# --- Damage ---------------------------------------------------------------------------------------


def test_weights_damaged_on_the_way_are_fetched_again_once(repository, works):
    repository.faults.append(Fault(GET_WEIGHTS, "corrupt"))
    works()
    assert repository.downloads == 2


def test_weights_damaged_on_the_way_twice_are_refused_and_not_kept(repository, refused, works, tmp_path):
    repository.faults.append(Fault(GET_WEIGHTS, "corrupt", times=2))
    said = refused(r"model\.safetensors does not arrive as the Hub announces it", WeightsError)
    assert NAME in said
    assert repository.downloads == 2
    assert [path for path in leftovers(repository, tmp_path) if "nowhere" not in path] == []
    works()
    assert repository.downloads == 3


def test_config_damaged_on_the_way_does_not_stay_in_the_way(repository, works, tmp_path):
    repository.faults.append(Fault(GET_CONFIG, "corrupt"))
    with suppress(WeightsError):  # it may be refused, but not kept
        create_model(NAME, cache_dir=tmp_path)
    works()


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "longer", "deleted"])
@pytest.mark.parametrize("name", [NAME, "pinned"], ids=["branch", "commit"])
def test_weights_damaged_in_the_cache_are_fetched_again(name, damage, repository, works, hub_files, tmp_path, caplog):
    name = name.replace("pinned", f"{NAME}@{repository.repositories['lab/tiny'].branches['main']}")
    works(name)
    data = hub_files["model.safetensors"]
    path = blob(tmp_path, data)
    if damage == "deleted":
        path.unlink()
    else:
        path.write_bytes(
            {"flipped": data[:-1] + bytes([data[-1] ^ 1]), "cut": data[:-1], "empty": b"", "longer": data + b"?"}[
                damage
            ]
        )
    works(name)
    assert repository.downloads == 2
    assert ("damaged in the cache; fetching it again" in caplog.text) == (damage != "deleted")
    works(name)
    assert repository.downloads == 2


def test_config_damaged_in_the_cache_does_not_stay_in_the_way(repository, works, hub_files, tmp_path):
    works()
    blob(tmp_path, hub_files["config.json"]).write_bytes(b"")
    works()


@pytest.mark.parametrize("way", ["offline", "gone"])
def test_damaged_weights_without_a_network_are_said_to_be_damaged(
    way, repository, works, refused, hub_files, tmp_path, request
):
    works()
    blob(tmp_path, hub_files["model.safetensors"]).write_bytes(b"damaged")
    request.getfixturevalue(way)()
    said = refused("damaged" if way == "gone" else "damaged.*HF_HUB_OFFLINE|HF_HUB_OFFLINE.*damaged", WeightsError)
    assert "force" not in said  # an argument that the caller does not have


def test_cache_without_links_is_repaired_too(repository, works, refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda *args: False)
    repository.faults.append(Fault(GET_WEIGHTS, "corrupt", times=2))
    refused("sha256|does not arrive", WeightsError)
    works()


# --- Content that is wrong --------------------------------------------------------------------------


def test_weights_that_are_not_those_of_the_config_are_refused(hub, refused, works, hub_files):
    hub.add("lab/tiny", hub_files | {"model.safetensors": hub_files["model.safetensors"][:-4] + bytes(4)})
    refused(
        r"model\.safetensors: sha256 is .* and test_resnet_3d\.phantoms expects .*not the published one", WeightsError
    )
    assert hub.downloads == 1
    hub.add("lab/tiny", hub_files)
    works()


VIT = {"dim": 96, "depth": 4, "num_heads": 3}


def model_of(config):
    return config["models"]["test_resnet_3d"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (b"{broken", "not a brainfm config .*JSONDecodeError"),
        (b"<!DOCTYPE html>", "not a brainfm config"),
        (b"", "not a brainfm config"),
        (
            lambda c: c.update(format=3, brainfm_version="9.1"),
            r"written by brainfm 9\.1, in a format that is newer.*update brainfm",
        ),
        (lambda c: c.update(format="two"), "not a brainfm config"),
        (lambda c: model_of(c).update(network="os.system"), "'os.system', which is not registered"),
        (lambda c: model_of(c).update(network="builtins.eval"), "not registered"),
        (lambda c: model_of(c).update(network="hf-hub:lab/other"), "not registered"),
        (lambda c: model_of(c).update(network="local-dir:/etc"), "not registered"),
        (lambda c: model_of(c).update(colour="red"), "no field colour"),
        (lambda c: c["inputs"]["input"].update(operations=[{"kind": "os.system"}]), "unknown operation"),
        (lambda c: model_of(c)["weights"]["phantoms"].update(digest=12), "digest is 12"),
        (lambda c: model_of(c).update(network="vit", args=VIT), "do not fit this VisionTransformer"),
        (lambda c: model_of(c)["args"].update(colour="red"), "colour"),
        (lambda c: model_of(c)["args"].update(block="os.system"), "its config's arguments do not fit"),
    ],
)
def test_config_that_is_not_one_is_refused(change, reason, hub, refused, works, hub_files, small_model):
    weights = hub_files["model.safetensors"]
    files = (
        hub_files | {"config.json": change}
        if isinstance(change, bytes)
        else repository_files(weights, small_model.pretrained_cfg, change)
    )
    hub.add("lab/tiny", files)
    refused(reason, WeightsError)
    hub.add("lab/tiny", hub_files)
    works()


def test_config_cannot_name_another_place_for_its_weights(hub, works, hub_files, small_model):
    elsewhere = {"file": "/etc/passwd", "url": "http://127.0.0.1:9/", "hub": "lab/other", "filename": "../x"}
    files = repository_files(
        hub_files["model.safetensors"],
        small_model.pretrained_cfg,
        lambda config: model_of(config)["weights"]["phantoms"].update(source=elsewhere),
    )
    hub.add("lab/tiny", files)
    cfg = works().pretrained_cfg
    assert (cfg.file, cfg.url, cfg.hub_id, cfg.hub_filename) == (None, None, "lab/tiny", "model.safetensors")
    assert not any("other" in request for request in hub.asked)


class Trap:
    """Unpickled carelessly, it makes a folder."""

    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.mkdir, (self.sentinel,)


def lying_header() -> bytes:
    header = json.dumps({"weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 16]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(16)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n", "Git LFS pointer"),
        (b"<!doctype html><title>Log in</title>", "is a web page"),
        (lying_header(), "damaged safetensors"),
        (saved({"weight": torch.ones(3)}), "larger than its weight file"),
        ("vit", "do not fit this ResNet"),
        ("pickle", "damaged|refused"),
        ("checkpoint", r"refused: .* asks to run \w+\.mkdir"),
    ],
    ids=["empty", "pointer", "page", "lying", "strange", "vit", "pickle", "checkpoint"],
)
def test_weights_that_are_none_are_refused(content, reason, hub, refused, works, hub_files, small_model, tmp_path):
    sentinel = str(tmp_path.parent / f"{tmp_path.name}-ran")
    if content == "vit":
        content = (ASSETS / "test_vit_3d.safetensors").read_bytes()
    elif content == "pickle":
        content = pickle.dumps({"epoch": Trap(sentinel)}, protocol=2)
    elif content == "checkpoint":
        content = saved(small_model.state_dict() | {"epoch": Trap(sentinel)})
    hub.add("lab/tiny", repository_files(content, small_model.pretrained_cfg))
    refused(reason, WeightsError)
    assert not os.path.exists(sentinel)  # noqa: PTH110
    hub.add("lab/tiny", hub_files)
    works()


# --- Offline --------------------------------------------------------------------------------------


def test_offline_without_a_cache_is_refused_at_once_with_the_way_out(repository, refused, offline, clock):
    offline()
    refused("it is not in the cache, and HF_HUB_OFFLINE forbids to fetch it; .*brainfm fetch NAME --to FOLDER")
    assert repository.asked == []
    assert clock.now == 0


def test_offline_with_only_the_config_in_the_cache_is_refused(repository, refused, works, offline, hub_files, tmp_path):
    works()
    blob(tmp_path, hub_files["model.safetensors"]).unlink()
    offline()
    refused(r"cannot get model\.safetensors: it is not in the cache, and HF_HUB_OFFLINE")


def test_offline_the_cache_serves(repository, works, offline):
    online = works()
    repository.asked.clear()
    offline()
    assert works().pretrained_cfg == online.pretrained_cfg
    works(online.pretrained_cfg.source)
    assert repository.asked == []
