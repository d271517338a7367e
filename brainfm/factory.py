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

_SCHEMES = ("hf-hub", "local-dir")


@dataclass(frozen=True)
class Source:
    """What a model name stands for: the cfg, arguments of the constructor, and for a hub folder its weight file."""

    cfg: PretrainedCfg
    model_args: dict[str, Any] = field(default_factory=dict)
    weights: Path | None = None
    place: str = ""


def create_model(
    name: str,
    pretrained: bool = False,
    *,
    pretrained_cfg: str | Mapping[str, Any] | PretrainedCfg | None = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    checkpoint_path: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    num_classes: int = 0,
    in_chans: int = 1,
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
        in_chans: Input channels; pretrained weights are summed or repeated to fit, by timm's rule.
        global_pool: How features become a vector; "avg" for ResNets, "token" or "avg" for ViTs.
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
    source = resolve(name, pretrained_cfg, pretrained_cfg_overlay, cache_dir)
    cfg = source.cfg
    wanted: Path | None = None
    if checkpoint_path is not None:
        wanted = Path(checkpoint_path)
        source = replace(source, place=str(wanted))
    elif source.weights is not None:
        wanted = source.weights
    elif pretrained:
        wanted = weights.find_weights(cfg, cache_dir)

    args = {**source.model_args, **kwargs}
    entrypoint = model_entrypoint(cfg.architecture)
    # A trained head is loaded with the rest, and kept only where it is the head that was asked for.
    trained_classes = cfg.num_classes if wanted is not None else num_classes
    model: Encoder = entrypoint(
        num_classes=trained_classes, in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate, **args
    )
    features = getattr(model, "num_features", cfg.num_features)
    model.pretrained_cfg = replace(cfg, num_features=features)
    if wanted is not None:
        model.weights_report = weights.load_checkpoint(model, wanted, source.place or cfg.source)
    if trained_classes != num_classes:
        model.reset_classifier(num_classes)
    return model.eval()


def resolve(
    name: str,
    pretrained_cfg: str | Mapping[str, Any] | PretrainedCfg | None = None,
    overlay: Mapping[str, Any] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Source:
    """What a model name stands for; fetches a Hub repository's files. Raises as `create_model` does."""
    scheme, place = parse_name(name)
    if scheme == "local-dir":
        folder = Path(place).expanduser()
        source = _read_hub_folder(folder / weights.HUB_CONFIG, folder / weights.HUB_WEIGHTS, name)
    elif scheme == "hf-hub":
        repo, _, revision = place.partition("@")
        config, file = (
            weights.hub_file(repo, filename, revision or None, cache_dir)
            for filename in (weights.HUB_CONFIG, weights.HUB_WEIGHTS)
        )
        source = _read_hub_folder(config, file, name)
    else:
        source = Source(get_pretrained_cfg(name))
    if isinstance(pretrained_cfg, str):
        source = replace(source, cfg=get_pretrained_cfg(f"{source.cfg.architecture}.{pretrained_cfg}"))
    elif pretrained_cfg is not None:
        given = pretrained_cfg if isinstance(pretrained_cfg, PretrainedCfg) else PretrainedCfg.from_dict(pretrained_cfg)
        source = replace(source, cfg=replace(given, architecture=source.cfg.architecture))
    if overlay:
        source = replace(source, cfg=source.cfg.overlay(overlay))
    return source


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
    if any(sign in name for sign in "/\\~") or Path(name).suffix in (".safetensors", ".pt", ".pth", ".ckpt", ".tar"):
        raise ModelNameError(
            f"{name!r} looks like a path; write 'hf-hub:{name}' for a repository on the Hugging Face Hub or "
            f"'local-dir:{name}' for a folder (a bare weight file goes to checkpoint_path=)"
        )
    if colon:
        raise ModelNameError(f"unknown scheme {scheme!r} in {name!r}; use {' or '.join(s + ':' for s in _SCHEMES)}")
    return "", name


def _read_hub_folder(config: Path, file: Path, name: str) -> Source:
    """A cfg and its weights from the two files of a hub folder. The config is data: it names a registered model."""
    for path in (config, file):
        if not path.is_file():
            raise WeightsNotFoundError(
                f"{name}: {path} is not there; a model's folder holds config.json and model.safetensors"
            )
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        architecture = content["architecture"]
        model_args = dict(content.get("model_args", {}))
        cfg = PretrainedCfg.from_dict(content["pretrained_cfg"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{name}: {config.name} is not a brainfm config ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(architecture, str) or not is_model(architecture):
        raise WeightsError(
            f"{name}: {config.name} asks for the architecture {architecture!r}, which is not registered here; "
            "a config can only name a registered model"
        )
    return Source(replace(cfg, architecture=architecture), model_args, file, name)
