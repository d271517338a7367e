"""A pretraining run by a recipe, from the manifest to a model's folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from brainfm.contract import InputSpec, Resize, Triple
from brainfm.errors import RecipeError
from brainfm.factory import create_model
from brainfm.files import held
from brainfm.hub import save_for_hub
from brainfm.manifest import ScanRecord, read_manifest
from brainfm.registry import get_pretrained_cfg
from brainfm.system import expanded
from brainfm.train.cache import key_of
from brainfm.train.data import PretrainingData, count_patients
from brainfm.train.distributed import process_group
from brainfm.train.method import METHODS, PretrainingMethod
from brainfm.train.recipe import Recipe
from brainfm.train.trainer import Trainer
from brainfm.weights import save_state
from brainfm.zoo.cards import Cohort


def pretrain(recipe: Recipe, *, progress: bool = False) -> Path:
    """Pretrain an encoder as a recipe says, or go on with the run in its folder.

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
        recipe = recipe.on(group.device)
        data = make_data(recipe, records, spec)
        method = make_method(recipe, spec)
        output = expanded(recipe.output)
        output.mkdir(parents=True, exist_ok=True)
        with held(output):  # which sweeps away what a killed run was writing
            trainer = Trainer(recipe, method, data, group, data_hash(records, data.root))
            trainer.train(progress and group.is_first)
            export = trainer.folder / "export"
            if group.is_first:
                _export(recipe, method, data, scans=len(records) - len(trainer.bad), world=group.world, folder=export)
        return export


def read_data(recipe: Recipe) -> tuple[list[ScanRecord], InputSpec]:
    """The scans and the input contract of a recipe. Raises RecipeError and ScanError."""
    if not recipe.manifest or not recipe.output:
        raise RecipeError("a run needs manifest=FILE.csv and output=FOLDER")
    spec = get_pretrained_cfg(recipe.model).input_spec
    if spec is None:
        raise RecipeError(f"{recipe.model} has no input contract; register it with one")
    return read_manifest(Path(recipe.manifest)), spec


def make_data(recipe: Recipe, records: Sequence[ScanRecord], spec: InputSpec) -> PretrainingData:
    """The recipe's views of the scans. Raises BrainfmError as `PretrainingData`."""
    return PretrainingData(
        records,
        spec,
        recipe.augmentation,
        views=METHODS[recipe.method].views,
        seed=recipe.seed,
        cache=recipe.cache,
        root=Path(recipe.manifest).parent,
        every_scan=recipe.every_scan,
        shape=recipe.input_size,
        on_device=recipe.augment_on == "device",
    )


def make_method(recipe: Recipe, spec: InputSpec) -> PretrainingMethod:
    """The recipe's encoder for the contract's channels, initial weights by its seed, in what it is trained with."""
    torch.manual_seed(recipe.seed)
    kwargs: dict[str, Any] = {"img_size": recipe.input_size} if recipe.method == "mae" and recipe.input_size else {}
    try:
        encoder = create_model(recipe.model, in_chans=len(spec.channels), **kwargs)
    except TypeError as error:
        raise RecipeError(f"an MAE needs a ViT, and {recipe.model} takes no img_size") from error
    return METHODS[recipe.method](recipe, encoder)


def data_hash(records: Sequence[ScanRecord], root: Any) -> str:
    """Says which scans of which patients a run is on."""
    rows = [f"{key_of(record, root)} {record.patient_id}" for record in records]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _export(
    recipe: Recipe, method: PretrainingMethod, data: PretrainingData, *, scans: int, world: int, folder: Path
) -> None:
    """Write the encoder as a model's folder, and what it was trained with beside it."""
    encoder = method.encoder.to("cpu", torch.float32).eval()
    encoder.requires_grad_(True)
    name, patients = Path(recipe.manifest).stem, count_patients(data.records)
    overlay = {
        "input_spec": _resized(data.spec, recipe.input_size),
        "ssl_method": method.name,
        "cohorts": (Cohort(name, patients, scans),),
        "recipe": json.dumps(recipe.to_dict() | {"manifest": name, "output": "", "cache": None}),
        "notes": f"{method.name} on {scans:,} scans of {patients:,} patients ({name}), "
        f"{recipe.epochs} epochs, joined batch {recipe.batch_size * world}.",
    }
    save_for_hub(encoder, folder, pretrained_cfg_overlay=overlay)
    what, prefixes = method.aside
    state = method.network.state_dict()
    aside = {k: v.cpu() for k, v in state.items() if k.startswith(prefixes)}
    save_state(aside, folder.parent / f"{what}.safetensors")


def _resized(spec: InputSpec, shape: Triple | None) -> InputSpec:
    """The contract of an encoder that was trained on views of another shape than its contract's."""
    size = None if shape is None else (len(spec.channels), *shape)
    if shape is None or spec.output_shape == size:
        return spec
    *before, zscore = spec.operations
    return replace(spec, operations=(*before, Resize(shape), zscore), output_shape=size)
