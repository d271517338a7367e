"""A file server, a released checkpoint on it, and its cfg."""

from __future__ import annotations

import hashlib
import threading

import pytest
from file_server import Server
from weight_files import saved, upstream_checkpoint

from brainfm import PretrainedCfg


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the attempts of a download
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)  # what is written before the next read
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def released(small_model) -> bytes:
    """A file laid out as the released one, with the packaged test ResNet's weights."""
    return saved(upstream_checkpoint(small_model.state_dict()))


@pytest.fixture
def cfg(server, released) -> PretrainedCfg:
    server.files["/releases/v1/simclr.tar"] = released
    digest = hashlib.sha256(released).hexdigest()
    url = f"{server.url}/releases/v1/simclr.tar"
    return PretrainedCfg(architecture="test_resnet_3d", tag="released", url=url, sha256=digest)
