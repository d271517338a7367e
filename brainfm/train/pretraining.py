"""A pretraining run by a recipe, from the manifest to a model's folder."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Sequence, Set
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from brainfm.contract import InputSpec, Readout, Resize, Triple
from brainfm.errors import BrainfmError, RecipeError
from brainfm.factory import create_model
from brainfm.files import file_sha256, held, one_line
from brainfm.hub import save_for_hub
from brainfm.manifest import ScanRecord
from brainfm.models.encoder import Encoder
from brainfm.names import hub_mirror, resolve
from brainfm.registry import get_pretrained_cfg, network, network_of
from brainfm.stage import Stage
from brainfm.system import expanded
from brainfm.train.cache import before_normalisation
from brainfm.train.checkpoint import read_newest
from brainfm.train.data import EpochSampler, PretrainingData, patients_by_source, take_patients
from brainfm.train.distill import teacher_of
from brainfm.train.distributed import process_group
from brainfm.train.mae import MAEMethod
from brainfm.train.method import METHODS
from brainfm.train.picture import Reconstructions
from brainfm.train.quarantine import FILE, Quarantine
from brainfm.train.recipe import Recipe
from brainfm.train.sources import Mixture, cohorts, in_words, read_sources
from brainfm.train.step import PretrainingMethod
from brainfm.train.trainer import Trainer
from brainfm.weights import HUB_CONFIG, find_weights, save_state

logger = logging.getLogger("brainfm")

# Arguments of `create_model` that are the recipe's own business.
_NOT_OF_A_NETWORK = {"name", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
_NOT_OF_A_NETWORK |= {"num_classes", "in_chans", "features_only", "out_indices"}


def pretrain(recipe: Recipe, *, progress: bool = False) -> Path:
    """Pretrain an encoder as a recipe says, or go on with the run in its folder; one that has ended is left as it is.

    A scan that cannot be read twice, as it is, is listed in the folder's `quarantine.csv`, and passed over until its
    file has changed or its line is taken out of there.

    Beside what `Trainer` writes, the folder has at the end `export/`, which `create_model("local-dir:…")` loads, and
    what the encoder was trained with: a projector, a decoder or heads.

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
        export = Path(recipe.output) / "export"
        digest = data_hash(records, recipe.targets)
        if group.gather(has_ended(recipe, digest, group.world))[0]:
            logger.info("%s: the run has ended, and is not run again", recipe.output)
            return export
        data = make_data(recipe, records, spec)
        EpochSampler(len(data), recipe.batch_size, world=group.world)  # refuses too few, before a folder is made
        method = make_method(recipe, spec, records)
        pictures = None
        if isinstance(method, MAEMethod) and recipe.picture_every:
            pictures = Reconstructions(method, data, Path(recipe.output))
        output = expanded(recipe.output)
        output.mkdir(parents=True, exist_ok=True)
        with held(output):  # which sweeps away what a killed run was writing
            data.quarantine = Quarantine(output / FILE, data.records)
            if listed := data.quarantine.listed():
                logger.warning(
                    "%s: %d scans that failed twice are passed over, until they change; take them out of %s there to "
                    "try them again",
                    *(output, len(listed), FILE),
                )
            trainer = Trainer(recipe, method, data, group, digest, pictures)
            trainer.train(progress and group.is_first)
            if group.is_first:
                _export(recipe, method, data, bad=trainer.bad.keys(), world=group.world, folder=export)
        return export


def read_data(recipe: Recipe) -> tuple[Mixture, InputSpec]:
    """The scans of a recipe's patients, and its input contract. Raises RecipeError and ScanError.

    What cannot be trained at all is refused before the list of scans is read.
    """
    fractions = recipe.sources or ({recipe.manifest: 1.0} if recipe.manifest else {})
    if not fractions or not recipe.output:
        raise RecipeError("a run needs manifest=FILE.csv (or sources={…}) and output=FOLDER")
    spec = contract_of(recipe)
    if network(network_of(recipe.model)[0]).__module__.startswith("brainfm.models."):  # others may not bear it
        _try_without_numbers(recipe, spec)
    take = partial(take_patients, fraction=recipe.patients, seed=recipe.seed)
    return read_sources(fractions, recipe.cache, lambda listed, root: take(listed, root=root)), spec


def _try_without_numbers(recipe: Recipe, spec: InputSpec) -> None:
    """Raise RecipeError where the network, the method, the contract and the size of the views do not go together."""
    with torch.device("meta"), torch.no_grad():
        encoder = _checked_encoder(replace(recipe, init=None, init_sha256=None), spec).eval()
        size = _resized(spec, recipe.input_size).output_shape
        assert size is not None
        try:
            encoder(torch.empty(1, *size))
        except (ValueError, RuntimeError) as error:
            shape = "×".join(map(str, size[1:]))
            raise RecipeError(
                f"{recipe.model} takes no views of {shape} voxels ({one_line(error)}); give another input_size"
            ) from error


def contract_of(recipe: Recipe) -> InputSpec:
    """The input contract that a recipe brings its scans to. Raises RecipeError."""
    name = recipe.contract or recipe.model
    spec = get_pretrained_cfg(name).input_spec
    if spec is None:
        raise RecipeError(f"{name} has no input contract; register it with one, or name a model that has: contract=…")
    try:
        before_normalisation(spec)
    except BrainfmError as error:
        raise RecipeError(
            f"{name}: {error}; name a model that has such a one, contract=simclr_resnet18_3d (or another)"
        ) from error
    return spec


def settled(recipe: Recipe, device: torch.device) -> Recipe:
    """The recipe with what "auto" means on a device, and which weights `init` and `teacher` name.

    Raises:
        BrainfmError: They cannot be had, or are others than the recipe's.
    """
    recipe = recipe.on(device)
    if recipe.init is not None:
        cfg, wanted = resolve(recipe.init, mirror=hub_mirror()).cfg, get_pretrained_cfg(recipe.model).architecture
        if cfg.architecture != wanted:
            raise RecipeError(
                f"init={recipe.init} is a {cfg.architecture}, and the recipe's model a {wanted}: name one"
            )
    for key in ("init", "teacher"):
        name, known = getattr(recipe, key), getattr(recipe, f"{key}_sha256")
        if name is None:
            continue
        digest = file_sha256(find_weights(resolve(name, mirror=hub_mirror()).cfg))
        if known not in (None, digest):
            raise RecipeError(
                f"{key}={name} has other weights than the recipe's: their sha256 is {digest}, and {key}_sha256 "
                f"{known}; give the file that is meant, or leave {key}_sha256 out"
            )
        found: dict[str, Any] = {f"{key}_sha256": digest}
        recipe = replace(recipe, **found)
    return recipe


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
        stage=None if recipe.stage is None else Stage(recipe.stage, recipe.stage_size),
    )


def make_method(recipe: Recipe, spec: InputSpec, records: Sequence[ScanRecord] = ()) -> PretrainingMethod:
    """The recipe's encoder in what it is trained with, its initial weights by the seed or those of `init`.

    Args:
        recipe: The recipe.
        spec: Its input contract.
        records: Its scans, of whose labels some methods learn.

    Raises:
        RecipeError: The method does not take the network or the labels, the network does not take the recipe's
            arguments, or the weights are another network's.
        BrainfmError: As `create_model`.
    """
    torch.manual_seed(recipe.seed)
    encoder = _checked_encoder(recipe, spec)
    if recipe.init is not None:
        begun = _encoder(recipe.init, recipe, spec)
        _check_same(begun, encoder, recipe, spec)
        encoder = begun
    return METHODS[recipe.method](recipe, encoder, records)


def _checked_encoder(recipe: Recipe, spec: InputSpec) -> Encoder:
    """The recipe's network with initial weights, which its method takes. Raises RecipeError and BrainfmError."""
    encoder = _encoder(recipe.model, recipe, spec)
    METHODS[recipe.method].check(recipe, encoder, _resized(spec, recipe.input_size))
    return encoder


def _encoder(name: str, recipe: Recipe, spec: InputSpec) -> Encoder:
    """The network of a name for the recipe's views, with the recipe's arguments; with weights if it is `init`."""
    if ours := sorted(recipe.model_args.keys() & _NOT_OF_A_NETWORK):
        raise RecipeError(f"model_args: {', '.join(ours)} is no argument of a network that a recipe sets; leave it out")
    args = _size_of(recipe, spec) | recipe.model_args
    try:
        encoder: Encoder = create_model(name, name == recipe.init, in_chans=len(spec.channels), **args)
        return encoder
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, BrainfmError) or not args:
            raise
        said = ", ".join(f"{key}={value}" for key, value in args.items())
        raise RecipeError(f"{name} cannot be built with {said}: {one_line(error)}") from error


def _size_of(recipe: Recipe, spec: InputSpec) -> dict[str, Any]:
    """The size of the views, for a network that is built for one, where it is another than its card's."""
    shape = recipe.input_size or (spec.output_shape[1:] if recipe.contract and spec.output_shape else None)
    sized = "img_size" in inspect.signature(network(network_of(recipe.model)[0])).parameters
    return {"img_size": shape} if shape and sized else {}


def _check_same(begun: Encoder, wanted: Encoder, recipe: Recipe, spec: InputSpec) -> None:
    """Raise RecipeError where the weights to begin with are of another network or of other input than the recipe's.

    With a `contract` that is not the model's own, weights of the model's own input will do.
    """
    theirs = begun.pretrained_cfg.input_spec
    if theirs is not None and (recipe.contract is None or theirs != get_pretrained_cfg(recipe.model).input_spec):
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


def data_hash(records: Mixture, targets: Sequence[str] = ()) -> str:
    """Says which scans of which patients a run is on, which labels it learns, and of several sources the fractions."""
    labels = [" ".join(["", *(record.extra.get(name, "") for name in targets)]) for record in records]
    rows = [f"{records.key_of(n)} {record.patient_id}{labels[n]}" for n, record in enumerate(records)]
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
    begun, teacher = _public(recipe.init), _public(recipe.teacher)
    earlier = encoder.pretrained_cfg.cohorts if recipe.init else ()
    if recipe.teacher is not None:  # what it has seen is in what is learned of it
        earlier = (*earlier, *teacher_of(recipe).cohorts)
    own = {
        "manifest": name,
        "sources": shares,
        "output": "",
        "cache": None,
        "stage": None,
        "init": begun,
        "teacher": teacher,
    }
    overlay = {
        "input_spec": _resized(data.spec, recipe.input_size),
        "ssl_method": method.name,
        "cohorts": tuple(dict.fromkeys((*earlier, *cohorts(data.records, patients, bad)))),
        "recipe": json.dumps(recipe.to_dict() | own),
        "notes": f"{method.name} on {in_words(data.records, patients, bad)}, "
        f"{recipe.epochs} epochs, joined batch {recipe.batch_size * world}."
        + (f" Labels: {', '.join(recipe.targets)}." if recipe.targets else "")
        + (f" Its teacher is {teacher} (sha256 {recipe.teacher_sha256})." if teacher else "")
        + (f" Pretrained from {begun} (sha256 {recipe.init_sha256})." if begun else ""),
    }
    if recipe.contract is not None:  # as it was trained: by its own pooling, of all of a view
        overlay["readout"] = Readout(encoder.global_pool)
    save_for_hub(encoder, folder, pretrained_cfg_overlay=overlay)
    what, prefixes = method.aside
    state = method.network.state_dict()
    aside = {k: v.cpu() for k, v in state.items() if k.startswith(prefixes)}
    save_state(aside, folder.parent / f"{what}.safetensors", method.said())


def save_initial(recipe: Recipe, folder: Path) -> Path:
    """Write a recipe's network with the initial weights of its seed, for its input, as a model's folder.

    It is what no pretraining leaves of the recipe. A folder that was made of the same is left as it is.

    Returns:
        The folder, `export` in this one.

    Raises:
        RecipeError: The network does not take the recipe's arguments or size.
        BrainfmError: As `contract_of` and `save_for_hub`.
    """
    spec, export = contract_of(recipe), folder / "export"
    made = json.dumps(recipe.to_dict() | {"method": "", "output": ""})
    if (export / HUB_CONFIG).is_file() and resolve(f"local-dir:{export}").cfg.recipe == made:
        return export
    torch.manual_seed(recipe.seed)
    encoder = _encoder(recipe.model, recipe, spec)
    overlay: dict[str, Any] = {"input_spec": _resized(spec, recipe.input_size), "recipe": made}
    overlay |= {"ssl_method": None, "notes": f"Initial weights, drawn by seed {recipe.seed}: never trained."}
    if recipe.contract is not None:
        overlay["readout"] = Readout(encoder.global_pool)
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder):
        save_for_hub(encoder, export, pretrained_cfg_overlay=overlay)
    return export


def _public(model: str | None) -> str | None:
    """A model's name, of a folder on this machine its own alone."""
    scheme, colon, place = (model or "").partition("local-dir:")
    if not colon or scheme:
        return model
    return "local-dir:" + next((part for part in reversed(Path(place).parts) if part not in ("export", ".")), "")


def _resized(spec: InputSpec, shape: Triple | None) -> InputSpec:
    """The contract of an encoder that was trained on views of another shape than its contract's."""
    size = None if shape is None else (len(spec.channels), *shape)
    if shape is None or spec.output_shape == size:
        return spec
    *before, zscore = spec.operations
    return replace(spec, operations=(*before, Resize(shape), zscore), output_shape=size)
