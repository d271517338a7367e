"""What a model name stands for: a registered model, a folder, or a repository on the Hugging Face Hub.

Nothing here needs a network's code: `brainfm info` waits for no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from brainfm.errors import ModelNameError, WeightsError, WeightsNotFoundError
from brainfm.files import one_line
from brainfm.pretrained import PretrainedCfg, cfg_of, names_a_source
from brainfm.registry import get_pretrained_cfg, has_network, is_model, network_of
from brainfm.schema import as_tuples
from brainfm.system import expanded
from brainfm.weights.fetch import HUB_CONFIG, HUB_WEIGHTS, hub_file, is_digest
from brainfm.zoo.cards import Card

CONFIG_FORMAT = 2  # of the config.json beside a model's weights, a card; a higher number is for a later brainfm to read
MAX_CONFIG_BYTES = 2**24  # a thousand times as long as those of this package

_SCHEMES = ("hf-hub", "local-dir")
CARD_FIELDS = {item.name for item in fields(Card)}  # what of a config.json is a card


@dataclass(frozen=True)
class ResolvedModel:
    """What a model name stands for.

    Attributes:
        cfg: What the weights are and expect.
        network: The constructor's name, see `brainfm.registry.network`.
        args: Of the constructor.
        is_place: Whether the name itself asks for weights: it says where a folder with a config.json is.
        config: The content of that config.json.
    """

    cfg: PretrainedCfg
    network: str
    args: dict[str, Any] = field(default_factory=dict)
    is_place: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)


def resolve(
    name: str,
    pretrained_cfg: str | Mapping[str, Any] | PretrainedCfg | None = None,
    overlay: Mapping[str, Any] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    mirror: str | None = None,
) -> ResolvedModel:
    """What a model name stands for; fetches the config of one on the Hub. Raises as `create_model` does.

    Where `mirror` is given, an organisation on the Hub that has the registered models under their full names, what it
    has is taken instead of the published source, unless the weights are in this package or the arguments name a source.
    """
    scheme, place = parse_name(name)
    if scheme == "local-dir":
        folder = expanded(place)
        source = _read_config(folder / HUB_CONFIG, name, file=str(folder / HUB_WEIGHTS))
    elif scheme == "hf-hub":
        source = _on_the_hub(place, name, cache_dir)
    else:
        source = _registered(name)
        if mirror and not source.cfg.file and pretrained_cfg is None and not names_a_source(overlay or {}):
            source = _mirrored(source.cfg, mirror, cache_dir)
    if pretrained_cfg is not None:
        source = replace(source, cfg=_replaced(source.cfg, pretrained_cfg))
    return replace(source, cfg=source.cfg.overlay(overlay or {}))


def _registered(name: str) -> ResolvedModel:
    """A registered model, by its name with or without a tag."""
    return ResolvedModel(get_pretrained_cfg(name), *network_of(name))


def hub_mirror() -> str | None:
    """The organisation on the Hub that `$BRAINFM_HUB_ORG` names, to fetch registered models from."""
    return os.environ.get("BRAINFM_HUB_ORG") or None


def _on_the_hub(place: str, name: str, cache_dir: str | os.PathLike[str] | None) -> ResolvedModel:
    """The cfg in a Hub repository. Its weights are taken at the same commit, whatever is pushed in between."""
    repo, _, revision = place.partition("@")
    config = hub_file(repo, HUB_CONFIG, revision or None, cache_dir)
    in_snapshot = config.parent.parent.name == "snapshots"
    return _read_config(config, name, hub_id=repo, hub_revision=config.parent.name if in_snapshot else revision or None)


def _mirrored(published: PretrainedCfg, organisation: str, cache_dir: str | os.PathLike[str] | None) -> ResolvedModel:
    """A registered model as an organisation on the Hub has it, converted from what was published."""
    place = f"{organisation}/{published.name}"
    name = f"hf-hub:{place} (by BRAINFM_HUB_ORG)"
    try:
        source = _on_the_hub(place, name, cache_dir)
    except WeightsNotFoundError as error:
        raise WeightsNotFoundError(f"BRAINFM_HUB_ORG is {organisation}, and {error}") from error
    if source.cfg.name != published.name:
        raise WeightsError(
            f"{name}: holds {source.cfg.name}, not {published.name}; load it by its own name, hf-hub:{place}"
        )
    provenance = dict(source.config.get("provenance", {}))
    for kind, wanted in (("sha256", published.sha256), ("git_blob", published.git_blob)):
        origin = str(provenance.get(f"source_{kind}"))
        if wanted and not is_digest(origin, wanted):
            raise WeightsError(
                f"{name}: was converted from a file with {kind} {origin}, and the published one has {wanted}; "
                f"if you trust it, load it by its own name, hf-hub:{place}"
            )
    return replace(source, is_place=False)


def _replaced(cfg: PretrainedCfg, given: str | Mapping[str, Any] | PretrainedCfg) -> PretrainedCfg:
    """Another cfg for the same architecture; one without a source of its own keeps that of the name."""
    if isinstance(given, str):
        return get_pretrained_cfg(f"{cfg.architecture}.{given}")
    other = given if isinstance(given, PretrainedCfg) else PretrainedCfg.from_dict(given)
    return replace(other if other.has_weights else other.with_source_of(cfg), architecture=cfg.architecture)


def parse_name(name: str) -> tuple[str, str]:
    """The scheme ("hf-hub", "local-dir" or "") and the rest of a model name.

    Raises:
        ModelNameError: A path without a scheme, which could mean either, or an unknown scheme.
    """
    scheme, colon, rest = name.partition(":")
    if colon and scheme in _SCHEMES:
        if not rest:
            raise ModelNameError(f"{name!r} names no place after the colon")
        return scheme, rest
    if colon and len(scheme) > 1 and not set(scheme) & set("/\\~."):  # one letter is a drive of Windows
        raise ModelNameError(f"unknown scheme {scheme!r} in {name!r}; use {' or '.join(s + ':' for s in _SCHEMES)}")
    if any(sign in name for sign in "/\\~") or Path(name).suffix in (".safetensors", ".pt", ".pth", ".ckpt", ".tar"):
        raise ModelNameError(
            f"{name!r} looks like a path; write 'hf-hub:{name}' for a repository on the Hugging Face Hub or "
            f"'local-dir:{name}' for a folder (a bare weight file goes to checkpoint_path=)"
        )
    return "", name


def _read_config(path: Path, name: str, **place: str | None) -> ResolvedModel:
    """The cfg in a hub folder's config.json, its weights where the folder is. Data: it names what is registered."""
    if not path.is_file():
        raise WeightsNotFoundError(
            f"{name}: {path} is not there; a model's folder holds config.json and model.safetensors"
        )
    try:
        if (size := path.stat().st_size) > MAX_CONFIG_BYTES:
            raise ValueError(f"it is {size} bytes long")
        content = json.loads(path.read_text(encoding="utf-8"))
        written = content.get("format", 1)
        if written > CONFIG_FORMAT:
            raise WeightsError(
                f"written by brainfm {content.get('brainfm_version')}, in a format that is newer than this "
                "installation; update brainfm"
            )
        resolved = _of_card(content) if written > 1 else _of_format_1(content)
        _check_channels(resolved.cfg)
        dict(content.get("provenance", {}))
    except ModelNameError as error:
        raise WeightsError(f"{name}: {path.name} asks for {error}; import what registers it first") from error
    except WeightsError as error:
        raise WeightsError(f"{name}: {path.name}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise WeightsError(f"{name}: {path.name} is not a brainfm config ({reason})") from error
    # The digest in such a config is that of the model.safetensors beside it.
    kept = {"sha256": resolved.cfg.sha256, "git_blob": resolved.cfg.git_blob}
    return replace(resolved, cfg=resolved.cfg.overlay({**kept, **place}), is_place=True, config=content)


def _check_channels(cfg: PretrainedCfg) -> None:
    """Raise WeightsError where a network can take no copies of the contract's channels, a copy or several of each."""
    channels = cfg.input_spec.channels if cfg.input_spec else ()
    if channels and cfg.in_chans % len(channels):
        raise WeightsError(
            f"its network takes {cfg.in_chans} channel{'s' * (cfg.in_chans > 1)}, and its input contract gives "
            f"{len(channels)} ({', '.join(channels)}); mend in_chans or the contract's channels"
        )


def _of_card(content: Mapping[str, Any]) -> ResolvedModel:
    """The one model of a config that is a card."""
    card = Card.from_dict({key: value for key, value in content.items() if key in CARD_FIELDS})
    if len(card.models) != 1:
        raise ValueError(f"it has {len(card.models)} models, and a folder holds one")
    [(architecture, model)] = card.models.items()
    if not has_network(model.network):
        raise ModelNameError(f"the network {model.network!r}, which is not registered here")
    return ResolvedModel(cfg_of(card, architecture), model.network, dict(model.args))


def _of_format_1(content: Mapping[str, Any]) -> ResolvedModel:
    """A config of before cards: a registered architecture, arguments beside its own, and a `PretrainedCfg`."""
    architecture = content["architecture"]
    if not isinstance(architecture, str) or not is_model(architecture):
        raise ModelNameError(f"the architecture {architecture!r}, which is not registered here")
    registered = _registered(architecture)
    cfg = PretrainedCfg.from_dict(_of_what_is_seen(content["pretrained_cfg"]))
    args = {key: as_tuples(value) for key, value in dict(content.get("model_args", {})).items()}
    return ResolvedModel(replace(cfg, architecture=architecture), registered.network, registered.args | args)


def _of_what_is_seen(cfg: Mapping[str, Any]) -> Mapping[str, Any]:
    """A cfg of before contracts were held against scans: what no scan can show moves to its contract's preparation."""
    spec = cfg.get("input_spec")
    if not isinstance(spec, Mapping):
        return cfg
    space, registration = spec.get("space"), spec.get("registration", "none")
    if space is not None and (spec.get("grid") or str(space).startswith("MNI152")):
        return cfg
    unseen = [f"{registration} registration"] if registration != "none" else []
    unseen += [f"in the space of {space}"] if space is not None else []
    preparation = [*spec.get("preparation", ()), *unseen]
    return {**cfg, "input_spec": {**spec, "space": None, "registration": "none", "preparation": preparation}}
