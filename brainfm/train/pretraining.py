"""A pretraining run by a recipe, from the manifest to a model's folder."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Set
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from brainfm.contract import InputSpec, Resize, Triple
from brainfm.errors import BrainfmError, RecipeError
from brainfm.factory import create_model
from brainfm.files import file_sha256, held, one_line
from brainfm.hub import save_for_hub
from brainfm.models.encoder import Encoder
from brainfm.names import hub_mirror, resolve
from brainfm.registry import get_pretrained_cfg
from brainfm.system import expanded
from brainfm.train.checkpoint import read_newest
from brainfm.train.data import EpochSampler, PretrainingData, patients_by_source, take_patients
from brainfm.train.distributed import process_group
from brainfm.train.method import METHODS, MAEMethod, PretrainingMethod
from brainfm.train.picture import Reconstructions
from brainfm.train.recipe import Recipe
from brainfm.train.sources import Mixture, cohorts, in_words, read_sources
from brainfm.train.trainer import Trainer
from brainfm.weights import HUB_CONFIG, find_weights, save_state

logger = logging.getLogger("brainfm")

# Arguments of `create_model` that are the recipe's own business.
_NOT_OF_A_NETWORK = {"name", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
_NOT_OF_A_NETWORK |= {"num_classes", "in_chans", "features_only", "out_indices"}


def pretrain(recipe: Recipe, *, progress: bool = False) -> Path:
    """Pretrain an encoder as a recipe says, or go on with the run in its folder; one that has ended is left as it is.

    Beside what `Trainer` writes, the folder has at the end `export/`, which `create_model("local-dir:…")` loads, and
    the projector or decoder.

    Args:
        recipe: Of `load_recipe`, with its manifest and output.
        progress: Show a progress bar.

    Returns:
        The folder `export`.

    Raises:
        RecipeError: The recipe cannot be run, or the folder holds another run.
        ScanError: The manifest is not one.
        RunInterruptedError: SIGTERM or SIGUSR1 came; a checkpoint is written.
        BrainfmError: Too many scans cannot be read, or the loss is not finite; the message names the scans. Or another
            process is writing the folder.
    """
    records, spec = read_data(recipe)
    with process_group(recipe.device) as group:
        recipe = settled(recipe, group.device)
        export, digest = Path(recipe.output) / "export", data_hash(records)
        if group.gather(has_ended(recipe, digest, group.world))[0]:
            logger.info("%s: the run has ended, and is not run again", recipe.output)
            return export
        data = make_data(recipe, records, spec)
        EpochSampler(len(data), recipe.batch_size, world=group.world)  # refuses too few, before a folder is made
        method = make_method(recipe, spec)
        pictures = None
        if isinstance(method, MAEMethod) and recipe.picture_every:
            pictures = Reconstructions(method, data, Path(recipe.output))
        output = expanded(recipe.output)
        output.mkdir(parents=True, exist_ok=True)
        with held(output):  # which sweeps away what a killed run was writing
            trainer = Trainer(recipe, method, data, group, digest, pictures)
            trainer.train(progress and group.is_first)
            if group.is_first:
                _export(recipe, method, data, bad=trainer.bad.keys(), world=group.world, folder=export)
        return export


def read_data(recipe: Recipe) -> tuple[Mixture, InputSpec]:
    """The scans of a recipe's patients, and its input contract. Raises RecipeError and ScanError."""
    fractions = recipe.sources or ({recipe.manifest: 1.0} if recipe.manifest else {})
    if not fractions or not recipe.output:
        raise RecipeError("a run needs manifest=FILE.csv (or sources={…}) and output=FOLDER")
    spec = get_pretrained_cfg(recipe.model).input_spec
    if spec is None:
        raise RecipeError(f"{recipe.model} has no input contract; register it with one")
    take = partial(take_patients, fraction=recipe.patients, seed=recipe.seed)
    return read_sources(fractions, recipe.cache, lambda listed, root: take(listed, root=root)), spec


def settled(recipe: Recipe, device: torch.device) -> Recipe:
    """The recipe with what "auto" means on a device, and which weights `init` names. Raises BrainfmError."""
    recipe = recipe.on(device)
    if recipe.init is None:
        return recipe
    cfg, wanted = resolve(recipe.init, mirror=hub_mirror()).cfg, get_pretrained_cfg(recipe.model).architecture
    if cfg.architecture != wanted:
        raise RecipeError(f"init={recipe.init} is a {cfg.architecture}, and the recipe's model a {wanted}: name one")
    digest = file_sha256(find_weights(cfg))
    if recipe.init_sha256 not in (None, digest):
        raise RecipeError(
            f"init={recipe.init} has other weights than the recipe's: their sha256 is {digest}, and init_sha256 "
            f"{recipe.init_sha256}; give the file that is meant, or leave init_sha256 out"
        )
    return replace(recipe, init_sha256=digest)


def has_ended(recipe: Recipe, data: str, world: int) -> bool:
    """Whether a run is done to its end and what it makes is there. Raises BrainfmError as `read_newest`."""
    folder = Path(recipe.output)
    made = (folder / "export" / HUB_CONFIG, folder / f"{METHODS[recipe.method].aside[0]}.safetensors")
    if not recipe.resume or not all(path.is_file() for path in made):
        return False
    found = read_newest(folder / "checkpoints", recipe, data, recipe.batch_size * world)
    return found is not None and found[1]["progress"].epoch >= recipe.epochs


def make_data(recipe: Recipe, records: Mixture, spec: InputSpec) -> PretrainingData:
    """The recipe's views of the scans. Raises BrainfmError as `PretrainingData`."""
    return PretrainingData(
        records,
        spec,
        recipe.augmentation,
        views=METHODS[recipe.method].views,
        seed=recipe.seed,
        every_scan=recipe.every_scan,
        shape=recipe.input_size,
        on_device=recipe.augment_on == "device",
    )


def make_method(recipe: Recipe, spec: InputSpec) -> PretrainingMethod:
    """The recipe's encoder in what it is trained with, its initial weights by the seed or those of `init`.

    Raises:
        RecipeError: The network does not take the recipe's arguments, or the weights are another network's.
        BrainfmError: As `create_model`.
    """
    torch.manual_seed(recipe.seed)
    encoder = _encoder(recipe.model, recipe, spec)
    if recipe.init is not None:
        begun = _encoder(recipe.init, recipe, spec)
        _check_same(begun, encoder, recipe, spec)
        encoder = begun
    return METHODS[recipe.method](recipe, encoder)


def _encoder(name: str, recipe: Recipe, spec: InputSpec) -> Encoder:
    """The network of a name for the contract's channels, with the recipe's arguments; with weights if it is `init`."""
    sized = {"img_size": recipe.input_size} if recipe.method == "mae" and recipe.input_size else {}
    args = sized | recipe.model_args
    if ours := sorted(recipe.model_args.keys() & _NOT_OF_A_NETWORK):
        raise RecipeError(f"model_args: {', '.join(ours)} is no argument of a network that a recipe sets; leave it out")
    try:
        return create_model(name, name == recipe.init, in_chans=len(spec.channels), **args)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, BrainfmError) or not args:
            raise
        if isinstance(error, TypeError) and not recipe.model_args:
            raise RecipeError(f"an MAE needs a ViT, and {name} takes no img_size") from error
        said = ", ".join(f"{key}={value}" for key, value in args.items())
        raise RecipeError(f"{name} cannot be built with {said}: {one_line(error)}") from error


def _check_same(begun: Encoder, wanted: Encoder, recipe: Recipe, spec: InputSpec) -> None:
    """Raise RecipeError where the weights to begin with are of another network or of other input than the recipe's."""
    theirs = begun.pretrained_cfg.input_spec
    if theirs is not None:
        for name in ("channels", "representation", "space"):
            if getattr(theirs, name) != getattr(spec, name):
                raise RecipeError(
                    f"init={recipe.init} was trained on other scans than {recipe.model} takes: {name} "
                    f"{getattr(theirs, name)}, not {getattr(spec, name)}"
                )
    shapes = [{key: tuple(value.shape) for key, value in one.state_dict().items()} for one in (begun, wanted)]
    if shapes[0] != shapes[1]:
        odd = min(key for key in {**shapes[0], **shapes[1]} if shapes[0].get(key) != shapes[1].get(key))
        raise RecipeError(
            f"init={recipe.init} is another network than the recipe's: {odd} is {shapes[0].get(odd)}, not "
            f"{shapes[1].get(odd)}; give model_args as it was made with"
        )


def data_hash(records: Mixture) -> str:
    """Says which scans of which patients a run is on, and of several sources in which fractions."""
    rows = [f"{records.key_of(n)} {record.patient_id}" for n, record in enumerate(records)]
    if len(records.sources) > 1:
        rows += [f"{len(source.records)} {source.fraction}" for source in records.sources]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _export(
    recipe: Recipe, method: PretrainingMethod, data: PretrainingData, *, bad: Set[int], world: int, folder: Path
) -> None:
    """Write the encoder as a model's folder, and what it was trained with beside it."""
    encoder = method.encoder.to("cpu", torch.float32).eval()
    encoder.requires_grad_(True)
    name, patients = Path(recipe.manifest).stem, patients_by_source(data.records)
    shares = {source.name: source.fraction for source in data.records.sources} if recipe.sources else {}
    begun, earlier = _begun_with(recipe), encoder.pretrained_cfg.cohorts if recipe.init else ()
    overlay = {
        "input_spec": _resized(data.spec, recipe.input_size),
        "ssl_method": method.name,
        "cohorts": tuple(dict.fromkeys((*earlier, *cohorts(data.records, patients, bad)))),
        "recipe": json.dumps(
            recipe.to_dict() | {"manifest": name, "sources": shares, "output": "", "cache": None, "init": begun}
        ),
        "notes": f"{method.name} on {in_words(data.records, patients, bad)}, "
        f"{recipe.epochs} epochs, joined batch {recipe.batch_size * world}."
        + (f" Pretrained from {begun} (sha256 {recipe.init_sha256})." if begun else ""),
    }
    save_for_hub(encoder, folder, pretrained_cfg_overlay=overlay)
    what, prefixes = method.aside
    state = method.network.state_dict()
    aside = {k: v.cpu() for k, v in state.items() if k.startswith(prefixes)}
    save_state(aside, folder.parent / f"{what}.safetensors")


def _begun_with(recipe: Recipe) -> str | None:
    """What `init` names, of a folder on this machine its own name alone."""
    scheme, colon, place = (recipe.init or "").partition("local-dir:")
    if not colon or scheme:
        return recipe.init
    return "local-dir:" + next((part for part in reversed(Path(place).parts) if part not in ("export", ".")), "")


def _resized(spec: InputSpec, shape: Triple | None) -> InputSpec:
    """The contract of an encoder that was trained on views of another shape than its contract's."""
    size = None if shape is None else (len(spec.channels), *shape)
    if shape is None or spec.output_shape == size:
        return spec
    *before, zscore = spec.operations
    return replace(spec, operations=(*before, Resize(shape), zscore), output_shape=size)
