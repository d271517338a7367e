"""Models' folders, as on the Hub, for the tests of who reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from brainfm.files import file_sha256
from brainfm.models import Encoder
from brainfm.names import CONFIG_FORMAT
from brainfm.pretrained import PretrainedCfg, card_of
from brainfm.weights import HUB_CONFIG, HUB_WEIGHTS, save_state


def write_folder(folder: Path, model: Encoder, args: dict[str, Any] | None = None, **cfg: Any) -> Path:
    """A model's folder: its weights, and a config with its arguments and some fields of its cfg replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    save_state(model.state_dict(), folder / HUB_WEIGHTS)
    described = model.pretrained_cfg.overlay({"sha256": file_sha256(folder / HUB_WEIGHTS)} | cfg)
    (folder / HUB_CONFIG).write_text(json.dumps(config_of(described, model.network, model.model_args | (args or {}))))
    return folder


def config_of(cfg: PretrainedCfg, network: str, args: dict[str, Any]) -> dict[str, Any]:
    """What a model's config.json holds, beside where its weights came from."""
    return {"format": CONFIG_FORMAT, **card_of(cfg, network, args).to_dict(sparse=True)}


def content(folder: Path) -> dict[str, bytes]:
    """A folder's files, as they are put on the Hub."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
