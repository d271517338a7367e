"""Finding the file of a cfg: at a URL, in the cache, or where the user put it."""

from __future__ import annotations

import contextlib
import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from file_server import Server, break_off, kept, overlaid
from weight_files import same, saved, upstream_checkpoint

import brainfm
from brainfm import PretrainedCfg, WeightsError, WeightsNotFoundError
from brainfm.weights import cached_weights, default_cache_dir, find_weights, read_checkpoint


def place_by_hand(server: Server, cfg: PretrainedCfg, cache: Path) -> Path:
    """Where the refusal of an unreachable server says that the file should be put."""
    server.refuses = True
    with pytest.raises(WeightsNotFoundError) as refusal:
        find_weights(cfg, cache)
    server.refuses, server.requests = False, []
    for partial in cache.rglob("*.part"):
        partial.unlink()
    return Path(re.search(r"put the file at (.+?), or", str(refusal.value)).group(1))


def test_weights_that_are_drawn_by_a_seed_are_no_file(tmp_path):
    cfg = PretrainedCfg(architecture="my_net", seed=0)
    assert cfg.has_weights
    assert cfg.source == "drawn by seed 0"
    with pytest.raises(WeightsNotFoundError, match=r"my_net are no file, .*create_model draws them"):
        find_weights(cfg, tmp_path)
    file = PretrainedCfg.overlay(cfg, {"file": "a.pt"})
    assert not file.is_drawn


def test_url_is_downloaded_once_checked_and_kept_as_safetensors(server, cfg, small_model, tmp_path):
    assert cached_weights(cfg, tmp_path) is None
    path = find_weights(cfg, tmp_path)
    assert path.suffix == ".safetensors"
    assert kept(tmp_path) == [path.name]  # neither the download nor its optimiser's state
    checkpoint = read_checkpoint(path)
    assert checkpoint.provenance == {
        "source": cfg.url,
        "source_sha256": cfg.sha256,
        "left_out": ["epoch", "optimizer_state_dict"],
    }
    state = checkpoint.state
    assert same({k.removeprefix("encoder."): v for k, v in state.items() if "encoder." in k}, small_model.state_dict())
    assert "projector.2.weight" in state

    assert find_weights(cfg, tmp_path) == cached_weights(cfg, tmp_path) == path
    assert len(server.requests) == 1


def test_model_from_a_url_gives_the_embeddings_of_its_weights(server, cfg, small_model, tmp_path):
    x = torch.randn(1, 1, 40, 48, 48)
    for _ in range(2):
        model = brainfm.create_model("test_resnet_3d", pretrained=True, pretrained_cfg=cfg, cache_dir=tmp_path)
        assert torch.equal(model(x), small_model(x))
        assert model.weights_report.source == cfg.url
        assert model.weights_report.dropped == ("projector",)
    assert len(server.requests) == 1


def test_cache_is_where_the_environment_says(server, cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("BRAINFM_CACHE", str(tmp_path / "one"))
    assert find_weights(cfg).parent.parent == tmp_path / "one"
    monkeypatch.delenv("BRAINFM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    assert default_cache_dir() == tmp_path / "two" / "brainfm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "brainfm"


def test_several_callers_at_once_download_once(server, cfg, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: find_weights(cfg, tmp_path), range(4)))
    assert len(paths) == len(server.requests) == 1


def test_wrong_hash_is_refused_and_nothing_is_kept(server, cfg, tmp_path):
    with pytest.raises(WeightsError, match=f"sha256 is {cfg.sha256}, and .* expects {'0' * 64}"):
        find_weights(overlaid(cfg, sha256="0" * 64), tmp_path)
    assert kept(tmp_path) == []
    assert find_weights(overlaid(cfg, sha256=None), tmp_path).is_file()
    assert find_weights(cfg, tmp_path).is_file()


def test_download_that_is_no_checkpoint_is_refused_and_nothing_is_kept(server, cfg, tmp_path):
    server.files["/login"] = b"<!doctype html><html>Sign in</html>"
    with pytest.raises(WeightsError, match="is a web page"):
        find_weights(overlaid(cfg, url=f"{server.url}/login", sha256=None), tmp_path)
    assert kept(tmp_path) == []


def test_file_put_where_the_refusal_says_is_used(server, cfg, released, tmp_path):
    target = place_by_hand(server, cfg, tmp_path)
    assert target.is_relative_to(tmp_path)
    target.write_bytes(released)
    assert cached_weights(cfg, tmp_path) == target
    path = find_weights(cfg, tmp_path)
    assert path.suffix == ".safetensors"
    assert cached_weights(cfg, tmp_path) == path
    assert target.read_bytes() == released  # it is theirs
    assert server.requests == []


def test_wrong_file_put_there_is_refused_and_left_alone(server, cfg, tmp_path):
    target = place_by_hand(server, cfg, tmp_path)
    target.write_bytes(b"another file")
    with pytest.raises(WeightsError, match=r"simclr\.tar: sha256 is"):
        find_weights(cfg, tmp_path)
    assert kept(tmp_path) == [target.name]
    assert server.requests == []


def test_file_put_there_for_one_url_is_not_taken_for_another(server, cfg, tmp_path):
    places = {place_by_hand(server, overlaid(cfg, url=f"{server.url}/{n}/simclr.tar"), tmp_path) for n in (1, 2)}
    assert len(places) == 2


def test_two_urls_that_end_alike_do_not_share_a_download(server, cfg, tmp_path, monkeypatch):
    torch.manual_seed(1)
    other = brainfm.create_model("test_resnet_3d").state_dict()
    server.files["/elsewhere/simclr.tar"] = saved(upstream_checkpoint(other))
    break_off(server, cfg, tmp_path, monkeypatch)
    elsewhere = overlaid(cfg, url=f"{server.url}/elsewhere/simclr.tar", sha256=None)
    state = read_checkpoint(find_weights(elsewhere, tmp_path)).state
    assert same({k.removeprefix("encoder."): v for k, v in state.items() if "encoder." in k}, other)


def test_two_weights_of_one_architecture_are_kept_apart(server, cfg, tmp_path):
    other = saved({"weight": torch.zeros(100)})
    server.files["/v2/simclr.tar"] = other
    digest = hashlib.sha256(other).hexdigest()
    paths = [find_weights(c, tmp_path) for c in (cfg, overlaid(cfg, url=f"{server.url}/v2/simclr.tar", sha256=digest))]
    assert len({*paths}) == 2
    assert kept(tmp_path) == sorted(p.name for p in paths)


def test_conversion_that_fails_leaves_nothing(server, cfg, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            find_weights(cfg, tmp_path)
    assert kept(tmp_path) == []
    assert find_weights(cfg, tmp_path).is_file()


# --- Offline --------------------------------------------------------------------------------------


def test_offline_a_url_is_not_asked_and_the_refusal_says_what_to_do_by_hand(server, cfg, released, tmp_path, offline):
    offline()
    with pytest.raises(WeightsNotFoundError, match="is not in the cache, and HF_HUB_OFFLINE forbids") as refusal:
        find_weights(cfg, tmp_path)
    assert f"curl -LO {cfg.url} ;" in str(refusal.value)
    assert "checkpoint_path=" in str(refusal.value)
    assert server.requests == []
    assert kept(tmp_path) == []
    target = Path(re.search(r"put the file at (.+?), or", str(refusal.value)).group(1))
    target.write_bytes(released)
    assert find_weights(cfg, tmp_path).is_file()
    assert server.requests == []


def test_offline_the_cache_of_a_url_serves(server, cfg, small_model, tmp_path, offline):
    path = find_weights(cfg, tmp_path)
    server.requests.clear()
    offline()
    assert cached_weights(cfg, tmp_path) == find_weights(cfg, tmp_path) == path
    model = brainfm.create_model("test_resnet_3d", pretrained=True, pretrained_cfg=cfg, cache_dir=tmp_path)
    assert same(model.state_dict(), small_model.state_dict())
    assert server.requests == []


def test_offline_a_half_done_download_waits_for_the_network(server, cfg, tmp_path, monkeypatch):
    partial = break_off(server, cfg, tmp_path, monkeypatch)
    size = partial.stat().st_size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(WeightsNotFoundError, match="HF_HUB_OFFLINE"):
            find_weights(cfg, tmp_path)
    assert partial.stat().st_size == size
    assert find_weights(cfg, tmp_path).is_file()
    assert server.requests == [("/releases/v1/simclr.tar", f"bytes={size}-")]


def test_converted_copy_that_is_damaged_is_refused_or_repaired_and_does_not_stay_in_the_way(
    server, cfg, small_model, tmp_path
):
    find_weights(cfg, tmp_path).write_bytes(b"")
    with contextlib.suppress(WeightsError):
        brainfm.create_model("test_resnet_3d", pretrained=True, pretrained_cfg=cfg, cache_dir=tmp_path)
    model = brainfm.create_model("test_resnet_3d", pretrained=True, pretrained_cfg=cfg, cache_dir=tmp_path)
    assert same(model.state_dict(), small_model.state_dict())
