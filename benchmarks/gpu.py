"""What a GPU gives, in one command of under eight minutes: embedding, and SimCLR's training step at the paper's batch.

Embedding: volumes a second of `simclr_resnet18_3d` at full size, by batch, of MONAI's eager network, of this package's
eager one, of `brainfm.optimize`'s copy and of that compiled, in float32, TF32 and bfloat16; peak memory of the GPU; and
how far each is from float64 on the processor. Training: a step of SimCLR at batch 6 on phantoms in a cache, augmented
by the loader or on the device, and with batch_chunk; its time, the fraction of it that the GPU waited for data, memory.
Preparing: extraction and registration of the packaged head on the GPU and on the processor, once warm.

Every row stands by itself: one that fails (a compiler is missing, memory is too small) says why, and the others go on.

python benchmarks/gpu.py [--device cuda] [--only embed train prep] [--spacing 1.0] [--batches 1 4 8] [--json FILE]
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from _measure import machine, print_table
from monai.networks.nets import resnet18
from torch import nn

import brainfm
from brainfm.assets import SAMPLE_MASK, SAMPLE_SCAN
from brainfm.files import one_line, write_json
from brainfm.manifest import read_manifest
from brainfm.phantom import make_cohort
from brainfm.prep.image import like, template, to_array
from brainfm.system import available_cores
from brainfm.train.cache import build_cache
from brainfm.train.pretraining import pretrain
from brainfm.train.recipe import load_recipe

SECONDS = 2.0  # that each row of the embedding is measured for, at the most
PATIENTS, EPOCHS, WARM_UP = 12, 3, 2  # of a training; steps of the first epochs do not count
REPEATS = 3  # of a step of preparing
PARTS = ("embed", "train", "prep")
STEPS: tuple[tuple[str, list[str]], ...] = (
    ("loader", []),
    ("device", ["augment_on=device"]),
    ("device, channels-last", ["augment_on=device", "channels_last=true"]),
    ("device, batch_chunk=2", ["augment_on=device", "batch_chunk=2"]),
    ("device, checkpointed", ["augment_on=device", "grad_checkpointing=true"]),
)


def networks(model: nn.Module, device: str) -> dict[str, Callable[[], nn.Module]]:
    """The ways to run one network: its name → a function that builds it on the device."""

    def peer() -> nn.Module:
        made = resnet18(spatial_dims=3, n_input_channels=1, conv1_t_stride=1, feed_forward=False, bias_downsample=True)
        made.load_state_dict(model.state_dict())
        return made.eval().to(device)

    def plain() -> nn.Module:
        made = brainfm.create_model("simclr_resnet18_3d")
        made.load_state_dict(model.state_dict())
        return made.to(device)

    return {
        "MONAI, eager": peer,
        "brainfm, eager": plain,
        "optimize": lambda: brainfm.optimize(model).to(device),
        "optimize, bfloat16": lambda: brainfm.optimize(model, "bfloat16").to(device),
        "optimize, compiled": lambda: brainfm.optimize(model, compile=True).to(device),
        "optimize, bfloat16, compiled": lambda: brainfm.optimize(model, "bfloat16", compile=True).to(device),
    }


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def peak_gb(device: str) -> float:
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.startswith("cuda") else float("nan")


@torch.inference_mode()
def measured(network: nn.Module, batch: torch.Tensor, device: str) -> tuple[float, torch.Tensor]:
    """Volumes a second, by the median of passes of which the first does not count, and the first volume's vector."""
    vector = network(batch)[0].double().cpu()
    wait(device)
    seconds: list[float] = []
    while sum(seconds) < SECONDS and len(seconds) < 20:
        start = time.perf_counter()
        network(batch)
        wait(device)
        seconds.append(time.perf_counter() - start)
    return len(batch) / statistics.median(seconds), vector


def embedding(device: str, batches: list[int], spacing: float) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    name = "simclr_resnet18_3d"
    model = brainfm.create_model(name)
    volume = brainfm.create_transform(name)(SAMPLE_SCAN, SAMPLE_MASK)
    if spacing > 1:
        size = [round(side / spacing) for side in volume.shape[1:]]
        volume = nn.functional.interpolate(volume[None], size, mode="trilinear")[0]
    with torch.inference_mode():
        exact = brainfm.create_model(name).double()
        exact.load_state_dict({key: value.double() for key, value in model.state_dict().items()})
        wanted = exact(volume[None].double())[0]
    for tf32 in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        for way, make in networks(model, device).items():
            if tf32 and "bfloat16" in way:
                continue
            for many in batches:
                row = {"way": way + (", TF32" if tf32 else ""), "batch": many}
                try:
                    if device.startswith("cuda"):
                        torch.cuda.reset_peak_memory_stats(device)
                    rate, vector = measured(make(), volume.expand(many, -1, -1, -1, -1).to(device), device)
                    error = float((vector - wanted).norm() / wanted.norm())
                    cosine = float(torch.cosine_similarity(vector, wanted, dim=0))
                    row |= {"volumes_per_s": rate, "peak_gb": peak_gb(device), "error": error, "cosine": cosine}
                except Exception as failure:  # a row of its own
                    row["failed"] = one_line(failure, 100)
                yield row


def training(device: str, spacing: float) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        manifest = make_cohort(PATIENTS, Path(folder, "phantoms"), spacing=1.0 if spacing == 1 else 4.0)
        name = "simclr_resnet18_3d" if spacing == 1 else "test_resnet_3d"
        spec = brainfm.get_pretrained_cfg(name).input_spec
        assert spec is not None
        cache = Path(folder, "cache")
        build_cache(read_manifest(manifest), cache, spec, root=manifest.parent, workers=min(8, available_cores()))
        for where, overrides in STEPS:
            for precision in ("float32", "bfloat16"):
                output = Path(folder, f"{precision} {where}")
                fixed = [f"manifest={manifest}", f"output={output}", f"cache={cache}", f"device={device}"]
                fixed += [
                    f"epochs={EPOCHS}",
                    "batch_size=6",
                    f"workers={min(8, available_cores())}",
                    f"precision={precision}",
                    "save_every=1000",
                ]
                row: dict[str, Any] = {"augment_on": where, "precision": precision}
                if device.startswith("cuda"):
                    torch.cuda.reset_peak_memory_stats(device)
                try:
                    pretrain(load_recipe(name, [*fixed, *overrides]))
                    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
                    steps = [line for line in lines if "step_s" in line][WARM_UP:]
                    took = statistics.median(step["data_s"] + step["step_s"] for step in steps)
                    waited = statistics.median(step["data_s"] for step in steps)
                    row |= {"step_s": took, "scans_per_s": 6 / took, "waiting": waited / took}
                    row["peak_gb"] = max(step["peak_memory_gb"] for step in steps)
                except Exception as failure:
                    row["failed"] = one_line(failure, 100)
                yield row


def preparing(device: str) -> Iterator[dict[str, Any]]:
    """Medians of passes after one that does not count, and how far the two devices' results are apart."""
    from brainfm.prep.registration import register
    from brainfm.prep.steps import EXTRACTION

    image, mask = nib.load(SAMPLE_SCAN), nib.load(SAMPLE_MASK)
    brain = like(np.asanyarray(image.dataobj).astype(np.float32) * (np.asanyarray(mask.dataobj) > 0), template())
    corners = [[x, y, z] for x in (-60.0, 60.0) for y in (-60.0, 60.0) for z in (-60.0, 60.0)]
    steps: dict[str, tuple[Callable[[str], Any], str]] = {
        "extraction (deepbet)": (lambda place: to_array(EXTRACTION["deepbet"].run(brain, place)), "of a probability"),
        "registration": (lambda place: register(brain, place).wanted("affine"), "mm"),
    }
    for step, (run, unit) in steps.items():
        row: dict[str, Any] = {"step": step, "unit": unit}
        try:
            results: list[Any] = []
            for key, place in (("here_s", device), ("processor_s", "cpu")):
                results.append(run(place))
                seconds = []
                for _ in range(REPEATS):
                    start = time.perf_counter()
                    run(place)
                    seconds.append(time.perf_counter() - start)
                row[key] = statistics.median(seconds)
            if unit == "mm":
                results = [np.array([one.TransformPoint(corner) for corner in corners]) for one in results]
            row["differ"] = float(np.abs(results[0] - results[1]).max())
        except Exception as failure:
            row["failed"] = one_line(failure, 100)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--spacing", type=float, default=1.0, help="mm; above 1 small volumes, to try this script.")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = arguments.device
    if device.startswith("cuda") and not torch.cuda.is_available():
        parser.exit(1, "no CUDA device here; --device cpu --spacing 4 tries the script\n")
    card = torch.cuda.get_device_name(device) if device.startswith("cuda") else "the processor"
    print(f"{card}; {machine()}\n")
    found: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
    if "embed" in arguments.only:
        columns: tuple[str, ...] = ("embedding", "batch", "volumes / s", "this / MONAI's", "GB", "error", "cosine")
        rows = kept(embedding(device, arguments.batches, arguments.spacing), found["embed"])
        print_table(columns, (_embedded(row, found["embed"]) for row in rows))
    if "train" in arguments.only:
        columns = ("SimCLR, batch 6, views on the", "precision", "step, s", "scans / s", "waiting for data, %", "GB")
        print()
        print_table(columns, (_trained(row) for row in kept(training(device, arguments.spacing), found["train"])))
    if "prep" in arguments.only:
        print()
        columns = ("preparing a head", "here, s", "on the processor, s", "results differ by")
        print_table(columns, (_prepared(row) for row in kept(preparing(device), found["prep"])))
    if arguments.json:
        write_json(arguments.json, {"card": card, "machine": machine()} | found)


def kept(rows: Iterator[dict[str, Any]], into: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows as they come, each kept too."""
    for row in rows:
        into.append(row)
        yield row


def _embedded(row: dict[str, Any], before: list[dict[str, Any]]) -> tuple[str, ...]:
    first = (one for one in before if (one["way"], one["batch"]) == ("MONAI, eager", row["batch"]))
    peer = next(first, {}).get("volumes_per_s")
    if "failed" in row:
        return (row["way"], str(row["batch"]), f"failed: {row['failed']}", "", "", "", "")
    ratio = f"{row['volumes_per_s'] / peer:.2f}×" if peer else ""
    figures = (
        f"{row['volumes_per_s']:.2f}",
        ratio,
        f"{row['peak_gb']:.2f}",
        f"{row['error']:.1e}",
        f"{row['cosine']:.6f}",
    )
    return (row["way"], str(row["batch"]), *figures)


def _trained(row: dict[str, Any]) -> tuple[str, ...]:
    if "failed" in row:
        return (row["augment_on"], row["precision"], f"failed: {row['failed']}", "", "", "")
    figures = (
        f"{row['step_s']:.3f}",
        f"{row['scans_per_s']:.1f}",
        f"{100 * row['waiting']:.0f}",
        f"{row['peak_gb']:.1f}",
    )
    return (row["augment_on"], row["precision"], *figures)


def _prepared(row: dict[str, Any]) -> tuple[str, ...]:
    if "failed" in row:
        return (row["step"], f"failed: {row['failed']}", "", "")
    return (row["step"], f"{row['here_s']:.2f}", f"{row['processor_s']:.2f}", f"{row['differ']:.1e} {row['unit']}")


if __name__ == "__main__":
    main()
