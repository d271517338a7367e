"""A model as a folder: weights, config, model card. Only of published weights is said what is published of them."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from brainfm.errors import BrainfmError, ScanError, WeightsError, WeightsNotFoundError
from brainfm.factory import build, create_model
from brainfm.files import file_git_blob, file_sha256, sync, temporary_path, write_json
from brainfm.hub import golden
from brainfm.hub.card import model_card
from brainfm.models.adaptation import merged
from brainfm.models.encoder import Encoder
from brainfm.names import CONFIG_FORMAT, hub_mirror, resolve
from brainfm.pretrained import PretrainedCfg, card_of
from brainfm.registry import get_pretrained_cfg
from brainfm.system import expanded
from brainfm.version import __version__
from brainfm.weights import (
    HUB_CONFIG,
    HUB_WEIGHTS,
    Checkpoint,
    WeightsReport,
    find_weights,
    fitted,
    hub_file,
    load_checkpoint,
    read_for,
    save_state,
    wrong_digest,
)
from brainfm.zoo.cards import Head

logger = logging.getLogger("brainfm")

CARD = "README.md"
HEAD_ARRAYS = "head.safetensors"  # of a model that predicts, beside its weights

_WEIGHT_FILES = (".safetensors", ".tar", ".pt", ".pth", ".ckpt", ".bin")


def save_for_hub(
    model: nn.Module, folder: str | os.PathLike[str], *, pretrained_cfg_overlay: Mapping[str, Any] | None = None
) -> Path:
    """Write a model as a folder that `local-dir:` reads and `push_to_hub` uploads.

    The folder is read back as a user would read it, and the embedding of the packaged sample scan is kept in its config
    as the golden one, for `verify`.

    Cohorts, scores, licence and citation of the model's cfg are written only for weights that are, to the bit, the ones
    the cfg describes. Weights trained further keep all but the scores, and say from what; others keep nothing. Say what
    you know of yours in `pretrained_cfg_overlay`.

    Args:
        model: An encoder of `create_model`; changes of low rank (`add_lora`) are merged in what is written.
        folder: A new or empty folder, or one that holds a model already, which is replaced.
        pretrained_cfg_overlay: Fields of the cfg to set, such as {"licence": "CC-BY-4.0", "notes": "…"}.

    Returns:
        The folder.

    Raises:
        BrainfmError: The model is not one of `create_model`, or the folder holds something else.
        ValueError: The overlay has a field that a cfg has not, or a value that it cannot have.
        WeightsError: The weights are not finite, or cannot be loaded back (those of `optimize` cannot).

    Example:
        >>> import brainfm
        >>> model = brainfm.create_model("test_resnet_3d", pretrained=True)
        >>> sorted(path.name for path in brainfm.save_for_hub(model, "saved").iterdir())
        ['README.md', 'config.json', 'model.safetensors']
    """
    return save_folder(model, folder, dict(pretrained_cfg_overlay or {}))


def save_folder(
    model: nn.Module,
    folder: str | os.PathLike[str],
    overlay: Mapping[str, Any],
    head: Head | None = None,
    arrays: Mapping[str, Tensor] | None = None,
) -> Path:
    """As `save_for_hub`, with what the model's classifier predicts, and the arrays that belong to that."""
    if not isinstance(model, Encoder) or not model.network:
        raise BrainfmError(
            f"a {type(model).__name__} cannot be saved for the Hub: it takes an encoder of brainfm.create_model, "
            "unwrapped (of DistributedDataParallel the .module, of SimCLR the .encoder)"
        )
    model = merged(model)
    _check_names(model)
    cfg, provenance = _described(model)
    if overlay.get("architecture", cfg.architecture) != cfg.architecture:
        raise ValueError(f"this model is a {cfg.architecture}; its architecture cannot be set")
    cfg = cfg.overlay(overlay)
    folder = expanded(folder)
    with _whole_folder(folder) as temporary:
        save_state(model.state_dict(), temporary / HUB_WEIGHTS, {"architecture": cfg.architecture} | provenance)
        cfg = replace(
            cfg.with_source_of(PretrainedCfg(hub_filename=HUB_WEIGHTS, sha256=file_sha256(temporary / HUB_WEIGHTS))),
            num_features=model.num_features,
            num_classes=model.num_classes,
            in_chans=model.in_chans,
            readout=cfg.readout if cfg.readout.pool == "brain" else replace(cfg.readout, pool=model.global_pool),
        )
        args = _json_ready(model.model_args | {"global_pool": model.global_pool}, cfg.architecture)
        config = {
            "library_name": "brainfm",
            "brainfm_version": __version__,
            "format": CONFIG_FORMAT,
            **card_of(cfg, model.network, args).to_dict(sparse=True),
            "provenance": provenance | {"brainfm_version": __version__, "torch_version": torch.__version__},
        }
        if head is not None:
            save_state(arrays or {}, temporary / HEAD_ARRAYS)
            config["head"] = replace(head, sha256=file_sha256(temporary / HEAD_ARRAYS)).to_dict()
        write_json(temporary / HUB_CONFIG, config, indent=2)
        again = create_model(f"local-dir:{temporary}")
        config["golden"] = _golden(again)
        write_json(temporary / HUB_CONFIG, config, indent=2)
        (temporary / CARD).write_text(model_card(again, config), encoding="utf-8")
    return folder


def convert(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    model_name: str,
    *,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
) -> Path:
    """Turn a checkpoint into a model's folder; see `save_for_hub`.

    Args:
        source: The authors' file, a checkpoint of SimCLR (its encoder is taken) or of an MAE (its decoder is left out),
            a state dict of the encoder, or a folder with one such file, or with a model already.
        folder: The folder to write, new or empty.
        model_name: The registered model it holds. With a tag, the file must be the published one, by its hash; without,
            it is recognised by that, and else nothing is claimed of it.
        pretrained_cfg_overlay: Fields of the cfg to set.

    Returns:
        The folder.

    Raises:
        ModelNameError: There is no such model.
        WeightsError: The file is not what it should be, or not the one the tag names.
        BrainfmError: The folder holds something else.

    Example:
        >>> import brainfm
        >>> from brainfm.assets import ASSETS
        >>> brainfm.hub.convert(ASSETS / "test_vit_3d.safetensors", "converted", "test_vit_3d").name
        'converted'
    """
    cfg = get_pretrained_cfg(model_name)
    if _holds_model(Path(source)):
        return _convert_folder(Path(source), folder, cfg, pretrained_cfg_overlay)
    path = _weight_file(Path(source))
    model = create_model(model_name)
    checkpoint = read_for(model, path)
    if "." in model_name and (wrong := wrong_digest(path, _with_digest(cfg))):
        kind, digest, published = wrong
        raise WeightsError(
            f"{path}: {kind} is {digest}, and that of {model_name} is {published}; the file is damaged or not the "
            f"published one. As {cfg.architecture}, without the tag, it is converted and nothing is claimed of it"
        )
    model = create_model(model_name, in_chans=_input_channels(model, checkpoint))
    model.weights_report = load_checkpoint(model, path, path.name)  # with its classifier, where it has one
    return save_for_hub(model, folder, pretrained_cfg_overlay=pretrained_cfg_overlay)


def _convert_folder(
    source: Path, folder: str | os.PathLike[str], wanted: PretrainedCfg, overlay: Mapping[str, Any] | None
) -> Path:
    """A model's folder written anew, with its own arguments and cfg, and its classifier."""
    cfg = resolve(f"local-dir:{source}").cfg
    if cfg.architecture != wanted.architecture:
        raise WeightsError(f"{source}: holds a {cfg.architecture}, not a {wanted.architecture}")
    model = create_model(f"local-dir:{source}", num_classes=cfg.num_classes)
    return save_for_hub(model, folder, pretrained_cfg_overlay=overlay)


def fetch(
    name: str,
    to: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    accept_licence: bool = False,
) -> Path:
    """Bring a model's weights to this machine ahead of time, to the cache or to a folder that `local-dir:` reads.

    Args:
        name: A model with weights, by any name that `create_model` takes.
        to: A folder to write, for a machine without a network; see `save_for_hub`. None fills the cache.
        cache_dir: As for `create_model`.
        accept_licence: Likewise.

    Returns:
        The weight file in the cache, or the folder.

    Raises:
        ModelNameError, WeightsNotFoundError, WeightsError: As `create_model`.

    Example:
        >>> import brainfm
        >>> brainfm.hub.fetch("test_vit_3d").name  # in this package
        'test_vit_3d.safetensors'
    """
    source = resolve(name, cache_dir=cache_dir, mirror=hub_mirror())
    weights = find_weights(source.cfg, cache_dir, accept_licence)
    if to is None:
        return weights
    if not source.config:  # no folder yet: a file in this package or at a URL
        return save_for_hub(create_model(name, pretrained=True, cache_dir=cache_dir), to)
    folder = expanded(to)
    with _whole_folder(folder) as temporary:
        shutil.copyfile(weights, temporary / HUB_WEIGHTS)
        write_json(temporary / HUB_CONFIG, source.config, indent=2)
        if "head" in source.config:
            shutil.copyfile(_beside(source.cfg, HEAD_ARRAYS, cache_dir), temporary / HEAD_ARRAYS)
        try:
            shutil.copyfile(_beside(source.cfg, CARD, cache_dir), temporary / CARD)
        except (WeightsNotFoundError, FileNotFoundError):
            logger.info("%s: has no model card", name)
    return folder


def _check_names(model: Encoder) -> None:
    """Refuse what `optimize` made: without its BatchNorms it is no longer the network that a name stands for."""
    args = model.model_args | {"global_pool": model.global_pool}  # as it is now: one that is new may have a norm
    with torch.device("meta"):
        fresh = build(model.network, num_classes=model.num_classes, in_chans=model.in_chans, **args)
    if fresh.state_dict().keys() != model.state_dict().keys():
        raise WeightsError(
            f"this {type(model).__name__} has other tensors than a {model.pretrained_cfg.architecture}: save the model "
            "that create_model gave, not a copy of brainfm.optimize"
        )


# --- What may be said of weights ------------------------------------------------------------------


def _described(model: Encoder) -> tuple[PretrainedCfg, dict[str, Any]]:
    """The cfg of a model's weights as they are now, and where they came from."""
    cfg, report = model.pretrained_cfg, model.weights_report
    if not isinstance(report, WeightsReport):
        notes = "From no weight file: initial values, or trained by whoever saved them."
        return replace(_unclaimed(cfg, notes), ssl_method=None), {}
    file = Path(report.file)
    checkpoint = read_for(model, file)
    origin = {"source": file.name, "source_sha256": file_sha256(file), "left_out": list(report.dropped)}
    # A file that brainfm wrote says where it came from.
    said = checkpoint.provenance
    origin |= {key: said[key] for key in origin if said.get(key)}
    if blob := said.get("source_git_blob") if said.get("source") else cfg.git_blob and file_git_blob(file):
        origin["source_git_blob"] = blob
    is_published = _is_published(cfg, report)
    if not _holds(model, checkpoint):
        notes = f"Trained further from {cfg.name if is_published else origin['source']}."
        if is_published:
            return replace(cfg, tag="", scores=(), notes=notes), origin
        return _unclaimed(cfg, notes), origin
    if is_published:
        return cfg, origin
    notes = f"Converted from {origin['source']} (sha256 {origin['source_sha256']}), of which nothing else was said."
    return _unclaimed(cfg, notes), origin


def _is_published(cfg: PretrainedCfg, report: WeightsReport) -> bool:
    """Whether a file is the one its cfg describes: by its digest, which was checked if it came from the URL."""
    known = _with_digest(cfg)
    if not (known.sha256 or known.git_blob):
        return False
    return report.source == cfg.url or wrong_digest(Path(report.file), known) is None


def _with_digest(cfg: PretrainedCfg) -> PretrainedCfg:
    """A cfg with the digest of its file where none is said, as of weights in this package."""
    if cfg.sha256 or cfg.git_blob or not cfg.file or not Path(cfg.file).is_file():
        return cfg
    return replace(cfg, sha256=file_sha256(Path(cfg.file)))


def _holds(model: Encoder, checkpoint: Checkpoint) -> bool:
    """Whether a model's values are those of the checkpoint, a classifier that one of them lacks aside."""
    state, now = fitted(model, checkpoint), model.state_dict()
    head = (f"{model.classifier_name}.weight", f"{model.classifier_name}.bias")
    return all(
        key in state and torch.equal(value.cpu().double(), state[key].double())
        for key, value in now.items()
        if key not in head or model.num_classes
    )


def _unclaimed(cfg: PretrainedCfg, notes: str) -> PretrainedCfg:
    """What of a cfg holds of other weights too."""
    return PretrainedCfg(
        architecture=cfg.architecture,
        input_spec=cfg.input_spec,
        readout=cfg.readout,
        ssl_method=cfg.ssl_method,
        notes=notes,
    )


def _golden(model: Encoder) -> dict[str, Any] | None:
    try:
        return golden.compute(model)
    except (ScanError, ValueError, RuntimeError) as error:  # another contract than a T1w brain in MNI152 space
        logger.warning("no golden embedding: the packaged sample scan is no input of this model (%s)", error)
        return None


# --- Files ----------------------------------------------------------------------------------------


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder, whose files are moved to `folder` when the block ends without an error.

    The weights come first: until their config is there, they do not have the hash of an old one, and are refused.
    """
    if folder.exists() and not folder.is_dir():
        raise BrainfmError(f"{folder}: a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not _holds_model(folder):
        raise BrainfmError(f"{folder}: not empty, and no model's folder; name a new one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(folder.parent / (folder.name or "here"))
    temporary.mkdir()
    try:
        yield temporary
        folder.mkdir(exist_ok=True)
        for name in (HUB_WEIGHTS, HEAD_ARRAYS, HUB_CONFIG, CARD):
            if (temporary / name).is_file():
                sync(temporary / name)
                (temporary / name).replace(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _holds_model(folder: Path) -> bool:
    try:
        config = json.loads((folder / HUB_CONFIG).read_text(encoding="utf-8"))
        return "models" in config or "pretrained_cfg" in config
    except (OSError, ValueError, TypeError):
        return False


def _weight_file(source: Path) -> Path:
    """The one weight file that a path names."""
    if not source.is_dir():
        return source
    found = sorted(path for path in source.iterdir() if path.suffix in _WEIGHT_FILES and path.is_file())
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise WeightsNotFoundError(f"{source}: a folder must hold one weight file ({names} found); name the file in it")
    return found[0]


def _beside(cfg: PretrainedCfg, filename: str, cache_dir: str | os.PathLike[str] | None) -> Path:
    """Another file of the folder or repository that a cfg's weights are in."""
    if cfg.hub_id:
        return hub_file(cfg.hub_id, filename, cfg.hub_revision, cache_dir)
    return Path(str(cfg.file)).with_name(filename)


def _input_channels(model: Encoder, checkpoint: Checkpoint) -> int:
    for prefix in ("", "encoder."):
        weight = checkpoint.state.get(f"{prefix}{model.first_conv}.weight")
        if weight is not None and weight.ndim == 5 and weight.shape[1] > 0:
            return weight.shape[1]
    return model.in_chans


def _json_ready(args: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    try:
        ready: dict[str, Any] = json.loads(json.dumps(dict(args)))
    except TypeError as error:
        raise BrainfmError(f"{architecture}: its arguments cannot be written as JSON ({error})") from error
    return ready
