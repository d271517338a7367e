"""A file server with a released checkpoint, the files of a Hub repository, and the ways a network fails."""

from __future__ import annotations

import hashlib
import socket
import threading
from types import SimpleNamespace

import pytest
from file_server import Server
from hub_cases import Clock, forget_connections, repository_files
from weight_files import saved, upstream_checkpoint

from brainfm import PretrainedCfg
from brainfm.weights import save_state

URL = "/{repo_id}/resolve/{revision}/{filename}"  # of the Hub's client


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the attempts of a download
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.closed.set()
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


@pytest.fixture(scope="session")
def hub_files(tmp_path_factory, small_model) -> dict[str, bytes]:
    """What a repository with the packaged test ResNet holds."""
    path = tmp_path_factory.mktemp("hub_files") / "model.safetensors"
    save_state(small_model.state_dict(), path)
    return repository_files(path.read_bytes(), small_model.pretrained_cfg)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """Time passes only where the code sleeps."""
    clock = Clock()
    monkeypatch.setattr("time.sleep", clock.sleep)
    monkeypatch.setattr("brainfm.weights.fetch.time", SimpleNamespace(sleep=clock.sleep, monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def impatient(monkeypatch):
    """A function that makes the Hub's client give up a server that is silent for a quarter of a second."""

    def hurry():
        for constant in ("constants.HF_HUB_DOWNLOAD_TIMEOUT", "constants.HF_HUB_ETAG_TIMEOUT"):
            monkeypatch.setattr(f"huggingface_hub.{constant}", 0.25)
        monkeypatch.setattr("huggingface_hub.file_download._ETAG_RETRY_TIMEOUT", 0.25, raising=False)

    return hurry


@pytest.fixture
def offline(monkeypatch):
    """A function that makes the rest of the test run as with HF_HUB_OFFLINE=1."""

    def go():
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        forget_connections()

    yield go
    monkeypatch.undo()
    forget_connections()


@pytest.fixture
def gone(request):
    """A function that makes the Hub refuse connections, and gives one that brings it back."""

    def go():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
        with_hub = pytest.MonkeyPatch()
        request.addfinalizer(with_hub.undo)
        for module in ("constants", "file_download"):
            for name, value in (("ENDPOINT", nowhere), ("HUGGINGFACE_CO_URL_TEMPLATE", nowhere + URL)):
                with_hub.setattr(f"huggingface_hub.{module}.{name}", value, raising=False)
        return with_hub.undo

    return go
