"""Processes that are killed at any moment, and many at once: the next call finds a cache that it can use."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
from file_server import kept
from hub_cases import leftovers
from loopback_hub import Fault
from weight_files import same

import brainfm

# Imports brainfm once, then makes a process for each call; says their ids, and at the end what became of them.
PROCESSES = """
import json, os, signal, sys, traceback
import safetensors.torch, torch, tqdm, brainfm
from huggingface_hub import hf_hub_download

def say(word):
    os.write(1, (json.dumps(word) + "\\n").encode())

def half(tensors, path, metadata=None):
    open(path, "wb").write(b"half of a file")
    say("half")
    signal.pause()

torch.set_num_threads(1)
brainfm.create_model("test_resnet_3d", pretrained=True)  # imports what it needs
if sys.argv[2] == "stop at half":
    safetensors.torch.save_file = half
started = []
for call in json.loads(sys.argv[1]):
    started.append(os.fork())
    if not started[-1]:
        try:
            brainfm.create_model(**call)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
say(started)
say([os.waitpid(process, 0)[1] for process in started])
"""


@contextmanager
def processes(*calls, how=""):
    """Processes that each load a model; a function for the next thing that they say."""
    command = [sys.executable, "-c", PROCESSES, json.dumps(calls), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as started:
        yield lambda: json.loads(started.stdout.readline())


def from_url(cfg, cache):
    given = {"url": cfg.url, "sha256": cfg.sha256}
    return {"name": "test_resnet_3d", "pretrained": True, "pretrained_cfg": given, "cache_dir": str(cache)}


def kill(process):
    os.kill(process, signal.SIGKILL)


def test_hub_downloads_that_are_killed_are_repaired_by_the_next_call(hub, hub_files, small_model, tmp_path):
    moments = {
        "asking": ("HEAD /lab/asking/resolve/main/config.json", "stall", 60),
        "config": ("GET /lab/config/resolve/main/config.json", "hang", 100),
        "pinned": ("HEAD /lab/pinned/resolve/{commit}/model.safetensors", "stall", 60),
        "start": ("GET /cdn/lab/start/", "hang", 0),
        "middle": ("GET /cdn/lab/middle/", "hang", 2_000_000),
        "end": ("GET /cdn/lab/end/", "hang", len(hub_files["model.safetensors"]) - 1),
    }
    for name, (where, kind, at) in moments.items():
        commit = hub.add(f"lab/{name}", hub_files)
        hub.faults.append(Fault(where.format(commit=commit), kind, times=100, at=at))
    calls = [{"name": f"hf-hub:lab/{name}", "cache_dir": str(tmp_path)} for name in moments]
    with processes(*calls) as said:
        for process, fault in zip(said(), hub.faults, strict=True):
            assert fault.met.wait(900)
            kill(process)
        assert said() == [signal.SIGKILL] * len(moments)
    hub.faults.clear()
    hub.asked.clear()
    for name in moments:
        model = brainfm.create_model(f"hf-hub:lab/{name}", cache_dir=tmp_path)
        assert same(model.state_dict(), small_model.state_dict())
    assert hub.downloads == len(moments)
    assert leftovers(hub, tmp_path) == []


def test_url_download_that_is_killed_goes_on_at_the_next_call(server, cfg, small_model, tmp_path):
    server.hangs = 1
    with processes(from_url(cfg, tmp_path)) as said:
        [process] = said()
        assert server.hung.wait(900)
        kill(process)
        assert said() == [signal.SIGKILL]
    have = sum(path.stat().st_size for path in tmp_path.rglob("*.part"))
    model = brainfm.create_model(**from_url(cfg, tmp_path))
    assert same(model.state_dict(), small_model.state_dict())
    assert [wanted for _, wanted in server.requests] == [None, f"bytes={have}-" if have else None]
    assert kept(tmp_path) == ["model.safetensors"]


def test_conversion_that_is_killed_is_done_again_at_the_next_call(server, cfg, small_model, tmp_path):
    with processes(from_url(cfg, tmp_path), how="stop at half") as said:
        words = [said(), said()]  # in any order
        words.remove("half")
        [[process]] = words
        kill(process)
        assert said() == [signal.SIGKILL]
    assert "model.safetensors" not in kept(tmp_path)
    model = brainfm.create_model(**from_url(cfg, tmp_path))
    assert same(model.state_dict(), small_model.state_dict())
    assert kept(tmp_path) == ["model.safetensors"]


def test_four_processes_on_a_cold_cache_make_one_download(server, cfg, small_model, tmp_path):
    with processes(*[from_url(cfg, tmp_path)] * 4) as said:
        assert len(set(said())) == 4
        assert said() == [0] * 4
    assert len(server.requests) == 1
    assert kept(tmp_path) == ["model.safetensors"]
    model = brainfm.create_model(**from_url(cfg, tmp_path))
    assert same(model.state_dict(), small_model.state_dict())


@pytest.mark.slow
def test_four_processes_on_a_hub_whose_first_answer_is_damaged_all_get_the_model(hub, hub_files, tmp_path):
    hub.add("lab/tiny", hub_files)
    hub.faults.append(Fault("GET /cdn/", "corrupt"))
    with processes(*[{"name": "hf-hub:lab/tiny", "cache_dir": str(tmp_path)}] * 4) as said:
        said()
        assert said() == [0] * 4
    assert leftovers(hub, tmp_path) == []
