"""What the tests of the Hub share: the files of a repository, a clock that does not wait, and a look into the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
from loopback_hub import LoopbackHub
from model_folders import config_of

from brainfm import PretrainedCfg
from brainfm.registry import network_of


class Clock:
    """A clock that stands still but for who sleeps."""

    now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def repository_files(
    weights: bytes, cfg: PretrainedCfg, change: Callable[[dict[str, Any]], object] = lambda config: None
) -> dict[str, bytes]:
    """A model's files as they are on the Hub, after a change of its config."""
    cfg = cfg.overlay({"sha256": hashlib.sha256(weights).hexdigest()})
    config = config_of(cfg, *network_of(cfg.architecture))
    change(config)
    return {"config.json": json.dumps(config).encode(), "model.safetensors": weights}


def leftovers(hub: LoopbackHub, cache: Path) -> list[str]:
    """What is in a cache that should not be: a file that is not the Hub's to the byte, or a link to nowhere.

    An ".incomplete" file is the Hub's client's, which goes on with it (0.25) or never looks at it again (2.4).
    """
    commits = [commit for repository in hub.repositories.values() for commit in repository.commits.values()]
    known = {data for commit in commits for data in commit.values()}
    found = []
    for path in cache.rglob("*"):
        place = path.relative_to(cache)
        if path.suffix == ".incomplete":
            continue
        if path.is_symlink() and not path.exists():
            found.append(f"{place} → nowhere")
        elif path.is_file() and {"blobs", "snapshots"} & set(place.parts) and path.read_bytes() not in known:
            found.append(str(place))
    return found


def blob(cache: Path, data: bytes) -> Path:
    """The one file in a cache that holds these bytes."""
    [path] = [p for p in cache.rglob("blobs/*") if p.read_bytes() == data]
    return path


def forget_connections() -> None:
    """Make the Hub's client look at its settings anew."""
    forget = getattr(huggingface_hub.utils, "reset_sessions", None) or huggingface_hub.close_session
    forget()
