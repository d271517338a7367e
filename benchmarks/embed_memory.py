"""What `embed` keeps of each scan: the peak memory of a run over many tiny images, against one over 1,000.

Each run is a process of its own. Images are a few files of 12×12×12 voxels under many names (hard links), vectors have
512 numbers, and the table is written as CSV, from its parts. `--interrupted` measures the run that goes on from the
parts of nearly all scans.

python benchmarks/embed_memory.py [--scans 100000] [--interrupted]
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from _measure import alone, machine, peak_memory, print_table
from torch import nn

import brainfm
from brainfm.contract import InputSpec

FEW, FILES, WIDTH, SIDE = 1_000, 50, 512, 12
ALLOWED = 0.3  # GB above the run over FEW scans


class Wide(nn.Module):
    """An encoder that costs nothing and gives as many numbers as the published ResNets; `stop_at` interrupts it."""

    num_features = WIDTH

    def __init__(self, stop_at: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.left = torch.tensor(stop_at)
        spec = InputSpec(representation="any contrast", channels=("any",))
        self.pretrained_cfg = brainfm.PretrainedCfg(architecture="wide", input_spec=spec)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The mean of each image, many times."""
        self.left -= len(x)
        if self.left < 0:
            raise KeyboardInterrupt
        return x.mean(dim=(1, 2, 3, 4))[:, None] * self.weight


def write_scans(folder: Path, scans: int) -> None:
    """A manifest of tiny images, of which FILES are files of their own."""
    generator = np.random.default_rng(0)
    for n in range(FILES):
        voxels = generator.random((SIDE, SIDE, SIDE), dtype=np.float32)
        nib.Nifti1Image(voxels, np.eye(4)).to_filename(folder / f"{n}.nii")
    lines = ["image_path,patient_id,scan_id,age"]
    for n in range(scans):
        os.link(folder / f"{n % FILES}.nii", folder / f"sub-{n:06}_T1w.nii")
        lines.append(f"sub-{n:06}_T1w.nii,sub-{n:06},ses-1,{n % 80}")
    (folder / "scans.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(folder: Path, stop_at: int) -> None:
    """Embed the folder's manifest; prints the peak memory in GB."""
    torch.set_num_threads(1)
    with contextlib.suppress(KeyboardInterrupt):
        brainfm.embed(folder / "scans.csv", Wide(stop_at), batch_size=8, output=folder / "out.csv")
    print(json.dumps(peak_memory()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scans", type=int, default=100_000)
    parser.add_argument("--interrupted", action="store_true")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)  # folder and stop_at, in a process of its own
    arguments = parser.parse_args()
    if arguments.run:
        run(Path(arguments.run[0]), int(arguments.run[1]))
        return
    found = {}
    for scans in (FEW, arguments.scans):
        with tempfile.TemporaryDirectory() as folder:
            write_scans(Path(folder), scans)
            if arguments.interrupted:
                alone(__file__, "--run", folder, str(scans - 100))
            found[scans] = alone(__file__, "--run", folder, str(scans))
    few = found[FEW]
    rows = [(f"{scans:,}", f"{gb:.3f}", f"{gb - few:+.3f}") for scans, gb in found.items()]
    print_table(("scans", "peak memory, GB", f"above {FEW:,} scans"), rows)
    print(f"\n{machine()}")
    if max(found.values()) - few > ALLOWED:
        sys.exit(f"more than {ALLOWED} GB above the run over {FEW:,} scans")


if __name__ == "__main__":
    main()
