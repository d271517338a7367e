"""What a run will do, before it does it: `--dry-run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from brainfm.contract import InputSpec
from brainfm.errors import RecipeError, ScanError
from brainfm.files import one_line
from brainfm.inference import resolve_device
from brainfm.manifest import ScanRecord
from brainfm.train.checkpoint import read_newest
from brainfm.train.data import patients_by_source
from brainfm.train.loader import affordable_workers
from brainfm.train.pretraining import data_hash, make_data, make_method, read_data, settled
from brainfm.train.recipe import Recipe, methods_of
from brainfm.train.sources import in_words

_TRIED = 16  # scans that a dry run reads


def summarise(recipe: Recipe, world: int = 1) -> str:
    """The resolved recipe, the data, the steps and the estimated memory of a run, as text. Reads no scan.

    Raises:
        RecipeError, ScanError: As `pretrain`, for what can be known without training.
    """
    import yaml

    records, spec = read_data(recipe)
    device = resolve_device(recipe.device)
    recipe, data = settled(recipe, device), make_data(recipe, records, spec)
    if recipe.init is not None:
        make_method(recipe, spec, records)  # refuses weights of another network
    items, joined = len(data), recipe.batch_size * world
    steps = items // joined
    if not steps:
        raise RecipeError(f"{items} patients do not fill one joined batch of {joined}; make batch_size smaller")
    files = [path for record in records for path in (*record.images.values(), record.mask) if path is not None]
    missing = [path for path in files if not Path(str(path)).exists()]
    lines = [
        yaml.safe_dump(_used(recipe), sort_keys=False, default_flow_style=None).rstrip(),
        "",
        f"scans        {in_words(records, patients_by_source(records))}",
        f"files        {len(missing):,} are not there" + (f", such as {missing[0]}" if missing else ""),
        f"steps        {steps:,} an epoch of {joined} (batch {recipe.batch_size} on {world} processes), "
        f"{steps * recipe.epochs:,} in all",
        f"memory       about {estimated_memory(recipe, spec, records) / 1e9:.1f} GB a process, "
        "without what the libraries take",
    ]
    batch = recipe.batch_size * data.item_bytes
    workers = affordable_workers(recipe.workers, batch)
    lines.append(f"workers      {workers}, each with {batch / 1e9:.2g} GB a batch")
    found = read_newest(Path(recipe.output) / "checkpoints", recipe, data_hash(records, recipe.targets), joined)
    if found is not None and not recipe.resume:
        raise RecipeError(f"{recipe.output}: holds a run, and resume is false; give another output=, or remove it")
    if found is not None:
        progress = found[1]["progress"]
        lines.append(f"goes on      from {found[0].name}: epoch {progress.epoch + 1}, step {progress.step}")
    return "\n".join(lines)


def try_scans(recipe: Recipe) -> tuple[int, dict[str, str]]:
    """Read some scans of a run as it would, or all where they are few.

    Returns:
        How many were tried, and the reason for each that the run refuses, by its name.
    """
    records, spec = read_data(recipe)
    data = make_data(recipe, records, spec)
    chosen = sorted({round(n * (len(records) - 1) / max(1, _TRIED - 1)) for n in range(_TRIED)})
    refused: dict[str, str] = {}
    for n in chosen:
        try:
            data.read(n)
        except (ScanError, OSError, ValueError) as error:
            refused[records[n].name or f"scan {n}"] = one_line(error)
    return len(chosen), refused


def _used(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, without the fields of other methods."""
    others = {item.name for item in fields(recipe) if recipe.method not in (methods_of(item) or (recipe.method,))}
    return {key: value for key, value in recipe.to_dict().items() if key not in others}


def estimated_memory(recipe: Recipe, spec: InputSpec, records: Sequence[ScanRecord] = ()) -> float:
    """Bytes of one process: weights, gradients, the optimiser's state, and the activations that a step keeps.

    Activations are counted on torch's meta device, as the outputs of all layers for one scan, times the scans that are
    in memory at a time. Gradient checkpointing is not counted: with it, it is less.
    """
    shape = recipe.input_size or spec.output_shape[1:]  # type: ignore[index]
    with torch.device("meta"):
        method = make_method(replace(recipe, batch_chunk=None, init=None, init_sha256=None), spec, records)
    outputs = 0

    def count(_: nn.Module, __: Any, output: Any) -> None:
        nonlocal outputs
        outputs += output.numel() if isinstance(output, Tensor) else 0

    for module in method.network.modules():
        if not list(module.children()) and not getattr(module, "inplace", False):
            module.register_forward_hook(count)
    volumes = torch.empty(method.views, len(spec.channels), *shape, device="meta")
    with torch.no_grad():
        method.network.train()(volumes)
    trained = sum(parameter.numel() for parameter in method.network.parameters() if parameter.requires_grad)
    states = {"adam": 2, "adamw": 2, "lars": 1}[recipe.optimiser]
    width = {"float32": 4, "bfloat16": 2, "float64": 8}[recipe.precision]
    scans = recipe.batch_chunk or recipe.batch_size
    return trained * (2 + states) * max(4, width) + outputs * width * scans
