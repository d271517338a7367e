"""Prepared scans to a table, against the encoder's own time on as many tensors: of each model, and of all in one pass.

A scan's folder is what `brainfm prep` wrote; each scan is a copy of it. Weights are random where they cannot be
fetched, which costs the same. The encoder is `brainfm.optimize` of the model, which `embed` takes too, on one such
scan's tensor, warmed up.

python benchmarks/embed_models.py PREPARED [--models sfcn_age …] [--scans 20] [--rounds 1]
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from _measure import interleaved, machine, print_table

import brainfm

MODELS = (
    "medicalnet_resnet10",
    "mae_vit_tiny_3d",
    "sfcn_age",
    "neurojepa_vitb",
    "densenet121_3d",
    "simclr_resnet18_3d",
)


def repeated(model: torch.nn.Module, tensor: torch.Tensor, times: int) -> None:
    """The encoder alone."""
    with torch.inference_mode():
        for _ in range(times):
            model(tensor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prepared", type=Path, help="A scan's folder, of 'brainfm prep'.")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--scans", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    models = {name: brainfm.create_model(name) for name in arguments.models}
    with tempfile.TemporaryDirectory() as name:
        folders = [shutil.copytree(arguments.prepared, Path(name) / f"{n:02}") for n in range(arguments.scans)]
        ways: dict[str, Callable[[], object]] = {}
        for title, model in models.items():
            tensor = brainfm.create_transform(title)(folders[0])[None]
            encoder = brainfm.optimize(model)
            repeated(encoder, tensor, 1)
            ways[f"{title}, encoder"] = partial(repeated, encoder, tensor, arguments.scans)
            ways[f"{title}, table"] = partial(brainfm.embed, folders, model)
        ways["all, table"] = partial(brainfm.embed, folders, list(models.values()))
        seconds = interleaved(ways, arguments.rounds, warm_up=0)
    seconds["all, encoder"] = sum(seconds[f"{title}, encoder"] for title in models)
    rows = [(title, seconds[f"{title}, encoder"], seconds[f"{title}, table"]) for title in (*models, "all")]
    print_table(
        (f"{arguments.scans} scans → table", "encoder alone, s", "table, s", "table / encoder"),
        [(f"`{title}`", f"{alone:.1f}", f"{whole:.1f}", f"{whole / alone:.2f}×") for title, alone, whole in rows],
    )
    print(f"\n{arguments.rounds} rounds. {machine()}")


if __name__ == "__main__":
    main()
