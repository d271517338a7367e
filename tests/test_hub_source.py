"""`hf-hub:` names with the real Hub client, against a small server on the loopback."""

import hashlib
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from brainfm.weights import save_state

COMMIT = "0123456789abcdef0123456789abcdef01234567"

SCRIPT = """
import sys, torch, brainfm
torch.manual_seed(0)
try:
    model = brainfm.create_model(sys.argv[1])
except brainfm.BrainfmError as error:
    sys.exit(f"{type(error).__name__}: {error}")
print(model(torch.randn(1, 1, 40, 48, 48)).sum().item(), model.pretrained_cfg.source)
"""


@pytest.fixture
def repository(tmp_path, small_model):
    """The files of a repository that holds the test model."""
    save_state(small_model.state_dict(), tmp_path / "model.safetensors")
    weights = (tmp_path / "model.safetensors").read_bytes()
    cfg = small_model.pretrained_cfg.to_dict() | {"sha256": hashlib.sha256(weights).hexdigest()}
    config = json.dumps({"architecture": "test_resnet_3d", "pretrained_cfg": cfg}).encode()
    return {"config.json": config, "model.safetensors": weights}


@pytest.fixture
def hub(repository):
    """A server that answers what the Hub's client asks for one file; `hub.asked` lists the requests."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            asked.append(f"{self.command} {self.path}")
            repo, _, rest = self.path.strip("/").partition("/resolve/")
            revision, _, name = rest.partition("/")
            if repo != "lab/tiny" or revision not in ("main", COMMIT) or name not in repository:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound" if repo != "lab/tiny" else "RevisionNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = repository[name]
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET = answer

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = asked
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def create(hub, tmp_path):
    """A function (model name, environment) → a fresh process that makes the model with the server as its Hub."""

    def run(name, **environment):
        hub_at = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-c", SCRIPT, name]
        return subprocess.run(
            command, env=os.environ | hub_at | environment, capture_output=True, text=True, timeout=90
        )

    return run


def test_model_comes_from_the_hub_and_then_from_its_cache(create, hub):
    first = create("hf-hub:lab/tiny")
    assert first.returncode == 0, first.stderr
    assert first.stdout.split()[1] == "hf-hub:lab/tiny"
    assert sum(request.startswith("GET") for request in hub.asked) == 2
    hub.asked.clear()
    offline = create("hf-hub:lab/tiny", HF_HUB_OFFLINE="1")
    assert offline.stdout == first.stdout, offline.stderr
    assert hub.asked == []


def test_revision_is_asked_for(create, hub):
    pinned = create(f"hf-hub:lab/tiny@{COMMIT}")
    assert pinned.returncode == 0, pinned.stderr
    assert all(f"/resolve/{COMMIT}/" in request for request in hub.asked)


@pytest.mark.parametrize("name", ["hf-hub:lab/other", "hf-hub:lab/tiny@no-such-revision"])
def test_repository_or_revision_that_is_not_there_is_said(create, name):
    refused = create(name)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"WeightsNotFoundError: {name}: cannot get config.json")


def test_weights_that_are_not_those_of_the_config_are_refused(create, repository):
    repository["model.safetensors"] = repository["model.safetensors"][:-4] + b"\0\0\0\0"
    refused = create("hf-hub:lab/tiny")
    assert refused.returncode == 1
    assert refused.stderr.startswith("WeightsError")
    assert "sha256" in refused.stderr
