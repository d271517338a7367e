"""What a run will do, before it does it: `--dry-run`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from brainfm.contract import InputSpec
from brainfm.errors import RecipeError
from brainfm.train.data import count_patients
from brainfm.train.pretraining import make_method, read_data
from brainfm.train.recipe import Recipe


def summarise(recipe: Recipe, world: int = 1) -> str:
    """The resolved recipe, the data, the steps and the estimated memory of a run, as text. Reads no scan.

    Raises:
        RecipeError, ScanError: As `pretrain`, for what can be known without training.
    """
    import yaml

    records, spec = read_data(recipe)
    patients = count_patients(records)
    items, joined = len(records) if recipe.every_scan else patients, recipe.batch_size * world
    steps = items // joined
    if not steps:
        raise RecipeError(f"{items} patients do not fill one joined batch of {joined}; make batch_size smaller")
    files = [path for record in records for path in (*record.images.values(), record.mask) if path is not None]
    missing = [path for path in files if not Path(str(path)).exists()]
    lines = [
        yaml.safe_dump(recipe.to_dict(), sort_keys=False, default_flow_style=None).rstrip(),
        "",
        f"scans        {len(records):,} of {patients:,} patients ({recipe.manifest})",
        f"files        {len(missing):,} are not there" + (f", such as {missing[0]}" if missing else ""),
        f"steps        {steps:,} an epoch of {joined} (batch {recipe.batch_size} on {world} processes), "
        f"{steps * recipe.epochs:,} in all",
        f"memory       about {estimated_memory(recipe, spec) / 1e9:.1f} GB a process, without what the libraries take",
    ]
    return "\n".join(lines)


def estimated_memory(recipe: Recipe, spec: InputSpec) -> float:
    """Bytes of one process: weights, gradients, the optimiser's state, and the activations that a step keeps.

    Activations are counted on torch's meta device, as the outputs of all layers for one scan, times the scans that are
    in memory at a time. Gradient checkpointing is not counted: with it, it is less.
    """
    shape = recipe.input_size or spec.output_shape[1:]  # type: ignore[index]
    with torch.device("meta"):
        method = make_method(replace(recipe, batch_chunk=None), spec)
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
