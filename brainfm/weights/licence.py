"""Licences that ask something: said at the first load, accepted once, and kept beside the cache."""

from __future__ import annotations

import datetime
import json
import logging
import os
from pathlib import Path
from typing import Any

from brainfm.errors import LicenceError
from brainfm.files import write_json
from brainfm.pretrained import PretrainedCfg

logger = logging.getLogger("brainfm")

ACCEPTED = "licences.json"
VARIABLE = "BRAINFM_ACCEPT_LICENCE"  # names of models with commas between them


def check_licence(cfg: PretrainedCfg, cache: Path, accept: bool = False) -> None:
    """Raise LicenceError where a weight's licence asks something that nobody has accepted here yet.

    An acceptance is kept in `licences.json` in the cache: of this model, these weights, this licence and its terms.

    Args:
        cfg: Of the weights.
        cache: The cache's folder.
        accept: Whether whoever calls accepts it.
    """
    if not (cfg.accept or cfg.gated):
        return
    asked = {"licence": cfg.licence or "not stated", "terms": cfg.terms}
    known = _accepted(cache / ACCEPTED)
    if {key: known.get(cfg.name, {}).get(key) for key in asked} == asked:
        return
    named = [name.strip() for name in os.environ.get(VARIABLE, "").split(",")]
    if not accept and not {cfg.name, cfg.architecture} & {*named}:
        terms = f": {cfg.terms.rstrip('.')}" if cfg.terms else ""
        raise LicenceError(
            f"{cfg.name}: the licence of its weights is {asked['licence']}{terms}; read "
            f"it ({cfg.repository or cfg.paper or cfg.source}), and to accept it once pass accept_licence=True, run "
            f"'brainfm fetch {cfg.name} --accept-licence', or set {VARIABLE}={cfg.architecture}"
        )
    logger.warning("%s: licence of the weights accepted: %s %s", cfg.name, asked["licence"], cfg.terms)
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    from filelock import FileLock

    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{ACCEPTED}.lock"):
        write_json(cache / ACCEPTED, _accepted(cache / ACCEPTED) | {cfg.name: asked | {"date": now}})


def check_passing_on(cfg: PretrainedCfg, what: str) -> None:
    """Raise LicenceError where a weight's licence does not let it be passed on; `what` is what would pass it on."""
    if not cfg.redistribute:
        terms = f": {cfg.terms.rstrip('.')}" if cfg.terms else ""
        raise LicenceError(
            f"{what}: the licence of the weights of {cfg.name} ({cfg.licence or 'not stated'}) does not let them be "
            f"passed on{terms}; let others take them from {cfg.source or 'their authors'}"
        )


def _accepted(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return known if isinstance(known, dict) else {}
    except (OSError, ValueError):
        return {}
