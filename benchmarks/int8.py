"""A trial: ResNets in 8-bit integers on a processor. Seconds of a volume, and what embeddings and a probe become.

Convolutions, sums and pools are those of torch's quantized operators by oneDNN (VNNI where there is one): weights a
scale per channel, activations one per tensor, from histograms of the sample scan and of phantoms of another seed than
those that are read. Features are those of the packaged `test_resnet_3d`, which is trained; seconds those of
`simclr_resnet18_3d`, with random weights, in turns with `brainfm.optimize` of the same.

python benchmarks/int8.py [--patients 300] [--seeds 5] [--rounds 3]
"""

import argparse
import csv
import statistics
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from _measure import has_bfloat16, interleaved, machine, print_table
from phantom_probe import COHORT_SEED, LABELS, score
from torch import Tensor, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import brainfm
from brainfm.assets import SAMPLE_MASK, SAMPLE_SCAN
from brainfm.phantom import make_cohort

CALIBRATED_ON = 16  # phantoms, beside the sample scan
CALIBRATION_SEED = 2


def quantized(model: nn.Module, calibration: list[Tensor]) -> nn.Module:
    """A ResNet in integers; volumes [B, 1, D, H, W] → embeddings in float32."""
    parts = [getattr(model, name) for name in ("conv1", "bn1", "maxpool", "layer1", "layer2", "layer3", "layer4")]
    plain = nn.Sequential(*parts[:2], nn.ReLU(), *parts[2:], nn.AdaptiveAvgPool3d(1), nn.Flatten()).eval()
    torch.backends.quantized.engine = "onednn"
    observed = prepare_fx(plain, get_default_qconfig_mapping("onednn"), (calibration[0],))
    with torch.no_grad():
        for x in calibration:
            observed(x)
    return convert_fx(observed)


def cohort(patients: int, seed: int, folder: Path) -> tuple[list[dict[str, str]], list[Tensor]]:
    """Labels of phantoms, and their tensors [1, 1, D, H, W]."""
    manifest = make_cohort(patients, folder, spacing=4.0, seed=seed)
    with manifest.open() as file:
        rows = list(csv.DictReader(file))
    transform = brainfm.create_transform("test_resnet_3d")
    return rows, [transform(folder / row["image_path"], folder / row["mask_path"])[None] for row in rows]


def features(model: nn.Module, volumes: list[Tensor]) -> np.ndarray:
    with torch.inference_mode():
        return torch.cat([model(x) for x in volumes]).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patients", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    for says in ("torch.ao.quantization is deprecated", "torch.quantize_per_tensor"):
        warnings.filterwarnings("ignore", says)
    torch.manual_seed(0)

    with tempfile.TemporaryDirectory() as name:
        rows, volumes = cohort(arguments.patients, COHORT_SEED, Path(name) / "read")
        _, calibration = cohort(CALIBRATED_ON, CALIBRATION_SEED, Path(name) / "calibration")
    model = brainfm.create_model("test_resnet_3d", pretrained=True)
    calibration.append(brainfm.create_transform(model)(SAMPLE_SCAN, SAMPLE_MASK)[None])
    plain = features(model, volumes)
    cells = []
    for way, network in {
        "float32": brainfm.optimize(model),
        "bfloat16": brainfm.optimize(model, "bfloat16"),
        "int8": quantized(model, calibration),
    }.items():
        found = features(network, volumes)
        cosine = (found * plain).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(plain, axis=1)
        probes = [
            statistics.mean(
                score(found, np.array([float(row[label]) for row in rows]), metric, seed)
                for seed in range(arguments.seeds)
            )
            for label, metric in LABELS.items()
        ]
        cells.append((way, f"{np.median(cosine):.6f}", f"{cosine.min():.6f}", *(f"{probe:.3f}" for probe in probes)))
    print_table(
        ("`test_resnet_3d`", "cosine, median", "least", *(f"{name} ({metric})" for name, metric in LABELS.items())),
        cells,
    )

    model = brainfm.create_model("simclr_resnet18_3d")
    x = brainfm.create_transform(model)(SAMPLE_SCAN, SAMPLE_MASK)[None]
    networks: dict[str, nn.Module] = {"plain float32": model, "`brainfm.optimize`, float32": brainfm.optimize(model)}
    if has_bfloat16():
        networks["`brainfm.optimize`, bfloat16"] = brainfm.optimize(model, "bfloat16")
    networks["int8"] = quantized(model, [x])
    with torch.inference_mode():
        seconds = interleaved({way: lambda m=m: m(x) for way, m in networks.items()}, arguments.rounds)
    fast = seconds["`brainfm.optimize`, float32"]
    print()
    print_table(
        ("`simclr_resnet18_3d`, one volume", "s", "`optimize` in float32 / this"),
        [(way, f"{took:.2f}", f"{fast / took:.2f}×") for way, took in seconds.items()],
    )
    print(f"\n{arguments.patients} phantoms, {arguments.seeds} seeds, {arguments.rounds} rounds. {machine()}")


if __name__ == "__main__":
    main()
