"""`create_model`: parse the name, build, load."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from brainfm import weights
from brainfm.errors import WeightsError
from brainfm.files import one_line
from brainfm.models.encoder import Encoder
from brainfm.models.features import FeatureMaps
from brainfm.names import hub_mirror, resolve
from brainfm.pretrained import PretrainedCfg
from brainfm.registry import network

logger = logging.getLogger("brainfm")

MAX_TENSORS = 10_000  # in a network that a config describes; the largest ViTs have some hundreds


@overload
def create_model(
    name: str, pretrained: bool = ..., *, features_only: Literal[False] = ..., **kwargs: Any
) -> Encoder: ...


@overload
def create_model(name: str, pretrained: bool = ..., *, features_only: Literal[True], **kwargs: Any) -> FeatureMaps: ...


def create_model(
    name: str,
    pretrained: bool = False,
    *,
    pretrained_cfg: str | Mapping[str, Any] | PretrainedCfg | None = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    checkpoint_path: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    accept_licence: bool = False,
    num_classes: int = 0,
    in_chans: int | None = None,
    global_pool: str | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    **kwargs: Any,
) -> Encoder | FeatureMaps:
    """Build an encoder, with its weights where asked for, in eval mode.

    To train it, call `.train()`: in eval mode BatchNorm keeps its statistics, and nothing is dropped. Lightning
    (2.2 and later) leaves a model in the mode it is in, and fine-tunes it with both held still unless that is called.
    `.freeze()` holds the trunk still even under `.train()`.

    Args:
        name: `architecture` or `architecture.tag` of a registered model; `hf-hub:org/repo[@revision]`, a model on the
            Hugging Face Hub; `local-dir:path`, the same in a folder. The last two always come with their weights.
        pretrained: Load the published weights. Where there are none it is an error. Those of an untrained control, such
            as `uncnn_doubleconv`, are drawn by their seed, with or without this.
        pretrained_cfg: Another cfg: a tag of the architecture, a `PretrainedCfg`, or its fields.
        pretrained_cfg_overlay: Fields of the cfg to replace, such as {"file": "mine.safetensors"} or {"sha256": None}.
        checkpoint_path: A weight file to load instead of the published ones.
        cache_dir: The folder where fetched weights are kept; by default the Hub's cache, and `$BRAINFM_CACHE` for URLs.
        accept_licence: Accept the licence of weights that ask for it, once: it is kept in the cache.
        num_classes: Outputs of a new classifier; 0 gives the embedding.
        in_chans: Input channels; pretrained weights are summed or repeated to fit, by timm's rule. None is what the
            cfg says: 1 for every model of this package.
        global_pool: How features become a vector; "avg" for ResNets; "token", "avg" or "fc_norm" for ViTs. None is what
            the model was saved with, else the family's first.
        drop_rate: The probability of dropout before the classifier, in training.
        drop_path_rate: Stochastic depth, in training: the probability that the last block is skipped; of ViTs.
        features_only: Build a backbone that gives a list of feature maps instead, see `brainfm.models.FeatureMaps`.
        out_indices: Which maps: stages of `feature_info` (negative counts from the end), the last n, or None for all.
        **kwargs: Passed to the constructor, such as `img_size` for a ViT; with `adapter_reduction` the encoder has
            adapters, whose weights must be in the file too (new ones are added by `models.adaptation.add_adapters`).

    Returns:
        The encoder: [B, in_chans, D, H, W] → [B, num_features], or [B, num_classes].

    Raises:
        ModelNameError: The name is unknown or ambiguous (a ValueError).
        WeightsNotFoundError: The weights do not exist, or cannot be reached.
        LicenceError: Their licence asks something that nobody has accepted yet.
        WeightsError: They are not what they should be.
        ValueError: An argument is none that the network takes, such as a `global_pool` of "".

    Example:
        >>> import brainfm
        >>> model = brainfm.create_model("test_resnet_3d", pretrained=True)
        >>> transform = brainfm.create_transform(model)
        >>> z = model(transform("normalized.nii.gz", mask="mask.nii.gz")[None])
        >>> z.shape
        torch.Size([1, 128])
    """
    if out_indices is not None and not features_only:
        raise ValueError("out_indices goes with features_only=True; else ask model.forward_intermediates(x, indices)")
    fetch = pretrained and checkpoint_path is None
    resolved = resolve(name, pretrained_cfg, pretrained_cfg_overlay, cache_dir, mirror=hub_mirror() if fetch else None)
    cfg = resolved.cfg
    wanted: Path | None = None
    if checkpoint_path is not None:
        wanted = Path(checkpoint_path)
    elif (pretrained or resolved.is_place) and not cfg.is_drawn:
        wanted = weights.find_weights(cfg, cache_dir, accept_licence)

    args = {**resolved.args, **kwargs}
    if global_pool is not None:
        args["global_pool"] = global_pool
        cfg = replace(cfg, readout=replace(cfg.readout, pool=global_pool))
    elif cfg.readout.pool not in (None, "brain"):
        args.setdefault("global_pool", cfg.readout.pool)
    channels = cfg.in_chans if in_chans is None else in_chans
    in_training: dict[str, Any] = {"drop_rate": drop_rate} | (
        {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
    )
    try:
        if resolved.config and wanted is not None:
            _check_size(resolved.network, {"in_chans": resolved.cfg.in_chans} | resolved.args, wanted)
        make = build if cfg.seed is None else partial(_drawn, cfg.seed)
        model = make(resolved.network, num_classes=num_classes, in_chans=channels, **in_training, **args)
    except Exception as error:  # a config is somebody's word: its arguments may be anything
        if not resolved.config:
            raise
        if wanted is not None:
            weights.read_checkpoint(wanted)  # a file that is no weight file says so itself
        raise WeightsError(
            f"{name}: its config's arguments do not fit {cfg.architecture}: {one_line(error)}"
        ) from error
    pool, pools = cfg.readout.pool, getattr(model, "pools", None)
    if pools and pool not in (None, "brain", *pools):
        raise WeightsError(
            f"{name}: its readout pools by {pool!r:.100}, and {cfg.architecture} by {' or '.join(pools)}"
        )
    model.pretrained_cfg = replace(cfg, num_features=getattr(model, "num_features", cfg.num_features))
    model.network, model.model_args, model.saved_args = resolved.network, args, resolved.args
    if wanted is not None:
        place = str(wanted) if checkpoint_path is not None else cfg.source
        model.weights_report = weights.load_checkpoint(model, wanted, place)
        if (
            held := getattr(model, "num_classes", num_classes)
        ) != num_classes:  # the file's own is not the one asked for
            if held:
                report, head = model.weights_report, model.classifier_name
                logger.info("%s: left out %s, its classifier of %d outputs", place, head, held)
                model.weights_report = replace(report, dropped=(head, *report.dropped))
            model.reset_classifier(num_classes)
    return (FeatureMaps(model, out_indices) if features_only else model).eval()


def build(name: str, /, *, adapter_reduction: int | None = None, **args: Any) -> Encoder:
    """An encoder of a network by its name, with adapters where a reduction is given (`adaptation.add_adapters`).

    Raises:
        ModelNameError: There is no such network.
        ValueError, TypeError, BrainfmError: The arguments are none that it takes.
    """
    model: Encoder = network(name)(**args)
    if adapter_reduction is not None:
        from brainfm.models.adaptation import add_adapters

        add_adapters(model, adapter_reduction)
    return model


def _drawn(seed: int, name: str, **args: Any) -> Encoder:
    """An encoder whose initial weights are drawn by a seed: on the processor, whatever the default device."""
    place = torch.empty(0).device
    if place.type == "meta":
        return build(name, **args)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return build(name, **args).to(place)


def _check_size(name: str, args: Mapping[str, Any], file: Path) -> None:
    """Raise ValueError where a config's network is larger than its weight file, before memory is taken for it.

    It is built on the device that keeps nothing, which networks of other packages may not bear, and given up at the
    first parameter that is too much: a config may ask for a billion layers. No bounds on each argument say the same,
    since what takes memory are products of them.
    """
    if not network(name).__module__.startswith("brainfm.models."):
        return
    if negative := [key for key, value in args.items() if _is_negative(value)]:
        raise ValueError(f"{', '.join(negative)} below 0")
    thread, size, values, tensors = threading.get_ident(), file.stat().st_size, 0, 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:  # noqa: ARG001 - torch's
        nonlocal values, tensors
        if parameter is None or threading.get_ident() != thread:  # the hook is that of all modules
            return
        values, tensors = values + parameter.numel(), tensors + 1
        if values > size or tensors > MAX_TENSORS:
            raise ValueError(f"they make a network that is larger than its weight file, {file.name} of {size} bytes")

    with torch.device("meta"), register_module_parameter_registration_hook(count):
        build(name, **args)


def _is_negative(value: Any) -> bool:
    return any(map(_is_negative, value)) if isinstance(value, tuple) else isinstance(value, int) and value < 0
