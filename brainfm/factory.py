"""`create_model`: parse the name, build, load."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from brainfm import weights
from brainfm.errors import ModelNameError, WeightsError, WeightsNotFoundError
from brainfm.models.encoder import Encoder
from brainfm.pretrained import PretrainedCfg
from brainfm.registry import get_pretrained_cfg, is_model, model_entrypoint

CONFIG_FORMAT = 1  # of the config.json beside a model's weights; a higher number is for a later brainfm to read

_SCHEMES = ("hf-hub", "local-dir")


@dataclass(frozen=True)
class Source:
    """What a model name stands for.

    Attributes:
        cfg: What the weights are and expect.
        model_args: Arguments of the constructor.
        is_place: Whether the name itself asks for weights: it says where a folder with a config.json is.
        config: The content of that config.json.
    """

    cfg: PretrainedCfg
    model_args: dict[str, Any] = field(default_factory=dict)
    is_place: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)


def create_model(
    name: str,
    pretrained: bool = False,
    *,
    pretrained_cfg: str | Mapping[str, Any] | PretrainedCfg | None = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    checkpoint_path: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    num_classes: int = 0,
    in_chans: int | None = None,
    global_pool: str | None = None,
    drop_rate: float = 0.0,
    **kwargs: Any,
) -> Encoder:
    """Build an encoder, with its weights where asked for, in eval mode.

    Args:
        name: `architecture` or `architecture.tag` of a registered model; `hf-hub:org/repo[@revision]`, a model on the
            Hugging Face Hub; `local-dir:path`, the same in a folder. The last two always come with their weights.
        pretrained: Load the published weights. Where there are none it is an error.
        pretrained_cfg: Another cfg: a tag of the architecture, a `PretrainedCfg`, or its fields.
        pretrained_cfg_overlay: Fields of the cfg to replace, such as {"file": "mine.safetensors"} or {"sha256": None}.
        checkpoint_path: A weight file to load instead of the published ones.
        cache_dir: Where fetched weights are kept; by default the Hub's cache, and `$BRAINFM_CACHE` for URLs.
        num_classes: Outputs of a new classifier; 0 gives the embedding.
        in_chans: Input channels; pretrained weights are summed or repeated to fit, by timm's rule. None is what the
            cfg says: 1 for every model of this package.
        global_pool: How features become a vector; "avg" for ResNets, "token" or "avg" for ViTs. None is what the
            model was saved with, else the family's first.
        drop_rate: Dropout before the classifier, in training.
        **kwargs: Passed to the constructor, such as `img_size` for a ViT.

    Returns:
        The encoder: [B, in_chans, D, H, W] → [B, num_features], or [B, num_classes].

    Raises:
        ModelNameError: The name is unknown or ambiguous (a ValueError).
        WeightsNotFoundError: The weights do not exist, or cannot be reached.
        WeightsError: They are not what they should be.

    Example:
        >>> model = brainfm.create_model("simclr_resnet18_3d", pretrained=True)
        >>> transform = brainfm.create_transform(model)
        >>> z = model(transform("normalized.nii.gz", mask="mask.nii.gz")[None])
        >>> z.shape
        torch.Size([1, 512])
    """
    fetch = pretrained and checkpoint_path is None
    source = resolve(name, pretrained_cfg, pretrained_cfg_overlay, cache_dir, mirror=hub_mirror() if fetch else None)
    cfg = source.cfg
    wanted: Path | None = None
    if checkpoint_path is not None:
        wanted = Path(checkpoint_path)
    elif pretrained or source.is_place:
        wanted = weights.find_weights(cfg, cache_dir)

    entrypoint = model_entrypoint(cfg.architecture)
    args = {**source.model_args, **kwargs}
    if global_pool is not None:
        args["global_pool"] = global_pool
    channels = cfg.in_chans if in_chans is None else in_chans
    try:
        model: Encoder = entrypoint(num_classes=num_classes, in_chans=channels, drop_rate=drop_rate, **args)
    except TypeError as error:
        if not source.model_args:
            raise
        raise WeightsError(f"{name}: its config's model_args do not fit {cfg.architecture}: {error}") from error
    model.pretrained_cfg = replace(cfg, num_features=getattr(model, "num_features", cfg.num_features))
    model.model_args, model.saved_args = args, source.model_args
    if wanted is not None:
        place = str(wanted) if checkpoint_path is not None else cfg.source
        model.weights_report = weights.load_checkpoint(model, wanted, place)
        if getattr(model, "num_classes", num_classes) != num_classes:  # the file's own head is not the one asked for
            model.reset_classifier(num_classes)
    return model.eval()


def resolve(
    name: str,
    pretrained_cfg: str | Mapping[str, Any] | PretrainedCfg | None = None,
    overlay: Mapping[str, Any] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    mirror: str | None = None,
) -> Source:
    """What a model name stands for; fetches the config of one on the Hub. Raises as `create_model` does.

    Where `mirror` is given, an organisation on the Hub that has the registered models under their full names, what it
    has is taken instead of the published source, unless the weights are in this package or the arguments name a source.
    """
    scheme, place = parse_name(name)
    if scheme == "local-dir":
        folder = Path(place).expanduser()
        source = _read_config(folder / weights.HUB_CONFIG, name, file=str(folder / weights.HUB_WEIGHTS))
    elif scheme == "hf-hub":
        source = _on_the_hub(place, name, cache_dir)
    else:
        source = Source(get_pretrained_cfg(name))
        if mirror and not source.cfg.file and pretrained_cfg is None and not _names_a_source(overlay or {}):
            source = _mirrored(source.cfg, mirror, cache_dir)
    if pretrained_cfg is not None:
        source = replace(source, cfg=_replaced(source.cfg, pretrained_cfg))
    return replace(source, cfg=source.cfg.overlay(overlay or {}))


def hub_mirror() -> str | None:
    """The organisation on the Hub that `$BRAINFM_HUB_ORG` names, to fetch registered models from."""
    return os.environ.get("BRAINFM_HUB_ORG") or None


def _on_the_hub(place: str, name: str, cache_dir: str | os.PathLike[str] | None) -> Source:
    """The cfg in a Hub repository. Its weights are taken at the same commit, whatever is pushed in between."""
    repo, _, revision = place.partition("@")
    config = weights.hub_file(repo, weights.HUB_CONFIG, revision or None, cache_dir)
    in_snapshot = config.parent.parent.name == "snapshots"
    return _read_config(config, name, hub_id=repo, hub_revision=config.parent.name if in_snapshot else revision or None)


def _mirrored(published: PretrainedCfg, organisation: str, cache_dir: str | os.PathLike[str] | None) -> Source:
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
    origin = str(dict(source.config.get("provenance", {})).get("source_sha256"))
    if published.sha256 and origin.lower() != published.sha256.lower():
        raise WeightsError(
            f"{name}: was converted from a file with sha256 {origin}, and the published one has {published.sha256}; "
            f"if you trust it, load it by its own name, hf-hub:{place}"
        )
    return replace(source, is_place=False)


def _names_a_source(changes: Mapping[str, Any]) -> bool:
    return any(changes.get(source) for source in ("file", "hub_id", "url"))


def _replaced(cfg: PretrainedCfg, given: str | Mapping[str, Any] | PretrainedCfg) -> PretrainedCfg:
    """Another cfg for the same architecture; one without a source of its own keeps that of the name."""
    if isinstance(given, str):
        return get_pretrained_cfg(f"{cfg.architecture}.{given}")
    other = given if isinstance(given, PretrainedCfg) else PretrainedCfg.from_dict(given)
    if not other.has_weights:
        sources = ("file", "hub_id", "hub_revision", "hub_filename", "url", "sha256")
        other = replace(other, **{source: getattr(cfg, source) for source in sources})
    return replace(other, architecture=cfg.architecture)


def parse_name(name: str) -> tuple[str, str]:
    """The scheme ("hf-hub", "local-dir" or "") and the rest of a model name.

    Raises:
        ModelNameError: A path without a scheme, which could mean either, or an unknown scheme.
    """
    scheme, colon, rest = name.partition(":")
    if colon and scheme in _SCHEMES:
        if not rest:
            raise ModelNameError(f"{name!r} names no place behind the colon")
        return scheme, rest
    if colon and len(scheme) > 1 and not set(scheme) & set("/\\~."):  # one letter is a drive of Windows
        raise ModelNameError(f"unknown scheme {scheme!r} in {name!r}; use {' or '.join(s + ':' for s in _SCHEMES)}")
    if any(sign in name for sign in "/\\~") or Path(name).suffix in (".safetensors", ".pt", ".pth", ".ckpt", ".tar"):
        raise ModelNameError(
            f"{name!r} looks like a path; write 'hf-hub:{name}' for a repository on the Hugging Face Hub or "
            f"'local-dir:{name}' for a folder (a bare weight file goes to checkpoint_path=)"
        )
    return "", name


def _read_config(path: Path, name: str, **place: str | None) -> Source:
    """The cfg in a hub folder's config.json, its weights where the folder is. Data: it names a registered model."""
    if not path.is_file():
        raise WeightsNotFoundError(
            f"{name}: {path} is not there; a model's folder holds config.json and model.safetensors"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("format", CONFIG_FORMAT) > CONFIG_FORMAT:
            raise WeightsError(
                f"{name}: written by brainfm {content.get('brainfm_version')}, in a format that is newer than this "
                "installation; update brainfm"
            )
        architecture = content["architecture"]
        model_args = {key: _tuples(value) for key, value in dict(content.get("model_args", {})).items()}
        cfg = PretrainedCfg.from_dict(content["pretrained_cfg"])
        dict(content.get("provenance", {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{name}: {path.name} is not a brainfm config ({type(error).__name__}: {error})") from error
    if not isinstance(architecture, str) or not is_model(architecture):
        raise WeightsError(
            f"{name}: {path.name} asks for the architecture {architecture!r}, which is not registered here; "
            "a config can only name a registered model"
        )
    # The hash in such a config is that of the model.safetensors beside it.
    cfg = replace(cfg, architecture=architecture).overlay({"sha256": cfg.sha256, **place})
    return Source(cfg, model_args, is_place=True, config=content)


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
