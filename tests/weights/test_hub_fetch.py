"""Models from the Hub: which commit of which repository, what is asked for, and what is kept."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hub_cases import leftovers, repository_files
from weight_files import same

import brainfm
from brainfm import PretrainedCfg, WeightsError, WeightsNotFoundError, create_model
from brainfm.weights import cached_weights, find_weights, save_state

NAME = "hf-hub:lab/tiny"


@pytest.fixture
def commit(hub, hub_files) -> str:
    """lab/tiny on the Hub; its commit."""
    return hub.add("lab/tiny", hub_files)


@pytest.fixture(scope="module")
def other_model():
    torch.manual_seed(1)
    return brainfm.create_model("test_resnet_3d")


@pytest.fixture(scope="module")
def other_files(tmp_path_factory, other_model) -> dict[str, bytes]:
    """The files of a second version, with other weights."""
    path = tmp_path_factory.mktemp("other") / "w.safetensors"
    save_state(other_model.state_dict(), path)
    return repository_files(path.read_bytes(), other_model.pretrained_cfg)


def holds(model, wanted) -> bool:
    return same(model.state_dict(), wanted.state_dict())


def test_model_comes_from_the_hub_and_then_from_its_cache(hub, commit, small_model, tmp_path):
    x = torch.randn(1, 1, 40, 48, 48)
    for _ in range(2):
        model = create_model(NAME, cache_dir=tmp_path)
        assert torch.equal(model(x), small_model(x))
        assert model.weights_report.source == model.pretrained_cfg.source == f"{NAME}@{commit}"
        assert model.weights_report.file.startswith(str(tmp_path))
    assert sum(request.startswith("GET") for request in hub.asked) == 2
    assert leftovers(hub, tmp_path) == []


@pytest.mark.parametrize("revision", ["main", "v1.0", "feature/a", "refs/pr/3"])
def test_branch_or_tag_is_asked_for_and_its_commit_kept_in_mind(
    revision, hub, commit, other_files, other_model, tmp_path
):
    wanted = hub.add("lab/tiny", other_files, branch=revision)
    model = create_model(f"{NAME}@{revision}", cache_dir=tmp_path)
    assert holds(model, other_model)
    assert model.pretrained_cfg.hub_revision == wanted
    hub.asked.clear()
    assert holds(create_model(f"{NAME}@{revision}", cache_dir=tmp_path), other_model)
    assert not any(request.startswith("GET") for request in hub.asked)


def test_commit_is_asked_for_and_afterwards_nothing(hub, commit, other_files, small_model, tmp_path):
    hub.add("lab/tiny", other_files)  # the branch has moved on
    model = create_model(f"{NAME}@{commit}", cache_dir=tmp_path)
    assert holds(model, small_model)
    assert model.pretrained_cfg.hub_revision == commit
    assert all(f"/{commit}/" in request for request in hub.asked)
    hub.asked.clear()
    create_model(f"{NAME}@{commit}", cache_dir=tmp_path)
    assert hub.asked == []


def test_config_and_weights_are_of_one_commit_whatever_is_pushed_in_between(
    hub, commit, other_files, small_model, other_model, tmp_path, monkeypatch
):
    def push_first(*args):
        hub.add("lab/tiny", other_files)
        return find_weights(*args)

    with monkeypatch.context() as patch:
        patch.setattr("brainfm.weights.find_weights", push_first)
        model = create_model(NAME, cache_dir=tmp_path)
    assert hub.repositories["lab/tiny"].branches["main"] != commit
    assert holds(model, small_model)
    assert model.pretrained_cfg.hub_revision == commit
    assert holds(create_model(NAME, cache_dir=tmp_path), other_model)


def test_branch_that_moves_on_and_back_is_noticed(
    hub, commit, hub_files, other_files, small_model, other_model, tmp_path
):
    found = [create_model(NAME, cache_dir=tmp_path)]
    moved = hub.add("lab/tiny", other_files)
    found.append(create_model(NAME, cache_dir=tmp_path))
    hub.repositories["lab/tiny"].branches["main"] = commit
    found.append(create_model(NAME, cache_dir=tmp_path))
    assert [model.pretrained_cfg.hub_revision for model in found] == [commit, moved, commit]
    assert [holds(model, small_model) for model in found] == [True, False, True]
    assert holds(found[1], other_model)
    assert hub.downloads == 2


def test_two_branches_share_what_they_have_in_common(hub, commit, hub_files, tmp_path):
    hub.add("lab/tiny", {"README.md": b"another commit"} | hub_files, branch="v2")
    models = [create_model(name, cache_dir=tmp_path) for name in (NAME, f"{NAME}@v2")]
    assert len({model.pretrained_cfg.hub_revision for model in models}) == 2
    assert hub.downloads == 1


@pytest.mark.parametrize("revision", ["", "commit", "v1"])
def test_weights_of_a_cfg_are_fetched_at_its_revision_and_checked(
    revision, hub, commit, small_model, tmp_path, hub_files
):
    hub.add("lab/tiny", hub_files, branch="v1")
    overlay = {"hub_id": "lab/tiny"} | ({"hub_revision": revision.replace("commit", commit)} if revision else {})
    given = {"pretrained": True, "cache_dir": tmp_path}
    model = create_model("test_resnet_3d", pretrained_cfg_overlay=overlay, **given)
    assert holds(model, small_model)
    asked_for = overlay.get("hub_revision")
    assert model.weights_report.source == (f"{NAME}@{asked_for}" if asked_for else NAME)
    with pytest.raises(WeightsError, match=r"sha256 is .* expects 0000"):
        create_model("test_resnet_3d", pretrained_cfg_overlay=overlay | {"sha256": "0" * 64}, **given)
    assert holds(create_model("test_resnet_3d", pretrained_cfg_overlay=overlay, **given), small_model)
    assert hub.downloads == 1


def test_weights_of_a_cfg_may_be_another_file_of_the_repository(hub, hub_files, small_model, tmp_path):
    hub.add("lab/tiny", {"sub/folder/weights.pt": hub_files["model.safetensors"]})
    overlay = {"hub_id": "lab/tiny", "hub_filename": "sub/folder/weights.pt"}
    model = create_model("test_resnet_3d", pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path)
    assert holds(model, small_model)


@pytest.mark.parametrize("filename", ["../outside", "/etc/passwd", "a/../../b", ""])
def test_file_outside_of_a_repository_is_refused(filename, hub, commit, tmp_path):
    overlay = {"hub_id": "lab/tiny", "hub_filename": filename}
    with pytest.raises(WeightsError):
        create_model("test_resnet_3d", pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path)
    named = [path for path in tmp_path.rglob("*") if path.is_file() and path.name in ("outside", "passwd", "b")]
    assert all("no_exist" in str(path) for path in named)  # the client notes what the repository lacks


def test_cached_weights_are_told_without_a_network(hub, commit, tmp_path):
    cfg = PretrainedCfg("test_resnet_3d", hub_id="lab/tiny")
    assert cached_weights(cfg, tmp_path) is None
    path = find_weights(cfg, tmp_path)
    hub.asked.clear()
    assert cached_weights(cfg, tmp_path) == path
    assert cached_weights(PretrainedCfg("test_resnet_3d", hub_id="lab/tiny", hub_revision=commit), tmp_path) == path
    assert cached_weights(PretrainedCfg("test_resnet_3d", hub_id="lab/tiny", hub_revision="v2"), tmp_path) is None
    assert cached_weights(PretrainedCfg("test_resnet_3d", hub_id="lab/other"), tmp_path) is None
    assert hub.asked == []


def test_file_that_the_repository_lacked_is_not_told_as_cached(hub, hub_files, tmp_path):
    hub.add("lab/tiny", {"config.json": hub_files["config.json"]})
    cfg = PretrainedCfg("test_resnet_3d", hub_id="lab/tiny")
    with pytest.raises(WeightsNotFoundError, match="has no such file"):
        find_weights(cfg, tmp_path)
    assert cached_weights(cfg, tmp_path) is None


def test_several_threads_at_once_download_once(hub, commit, small_model, tmp_path):
    together = threading.Barrier(4)

    def fetch(_):
        together.wait(30)
        return create_model(NAME, cache_dir=tmp_path)

    with ThreadPoolExecutor(4) as pool:
        assert all(holds(model, small_model) for model in pool.map(fetch, range(4)))
    assert hub.downloads == 1
    assert leftovers(hub, tmp_path) == []


def test_cache_may_be_named_by_text_with_a_tilde(hub, commit, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # where a folder "~" would be made
    file = create_model(NAME, cache_dir="~/models").weights_report.file
    assert file.startswith(str(tmp_path / "models"))
    assert str(cached_weights(PretrainedCfg("test_resnet_3d", hub_id="lab/tiny"), "~/models")) == file


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_hub_cache_that_takes_nothing_is_named_with_the_way_out(code, commit, monkeypatch):
    def refuses(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("huggingface_hub.file_download._download_to_tmp_and_move", refuses)
    with pytest.raises(WeightsNotFoundError, match=r"nothing can be written to the Hub's cache .* set HF_HOME"):
        create_model(NAME, pretrained=True)
