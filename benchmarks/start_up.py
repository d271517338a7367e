"""What is waited for before anything is done: whole commands in fresh interpreters, interleaved, medians.

python benchmarks/start_up.py [--rounds 11] [--only TEXT]

Processor seconds (user and system, of all threads), which do not count what other programs take of a shared machine;
beside them the least time on the clock. `import torch` is the measure: what needs no network must not cost it, and one
small scan should cost little more.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _measure import machine, print_table

EMBED = ("-m", "brainfm", "embed", "{scan}", "--mask", "{mask}", "-o", "{folder}/table.csv", "--model")
COMMANDS = {
    "python -c pass": ("-c", "pass"),
    "import torch": ("-c", "import torch"),
    "import brainfm": ("-c", "import brainfm"),
    "import torch, brainfm": ("-c", "import torch, brainfm"),
    "brainfm --help": ("-m", "brainfm", "--help"),
    "brainfm list": ("-m", "brainfm", "list"),
    "brainfm info simclr_resnet18_3d": ("-m", "brainfm", "info", "simclr_resnet18_3d"),
    "brainfm embed, ResNet, 4 mm": (*EMBED, "test_resnet_3d"),
    "brainfm embed, ViT, 4 mm": (*EMBED, "test_vit_3d"),
}


def cost(arguments: list[str]) -> tuple[float, float]:
    """Processor seconds of a command, and those on the clock."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, time.perf_counter() - start


def small_scan(folder: Path) -> dict[str, str]:
    """The packaged scan at 4 mm, and its mask."""
    import nibabel as nib
    import numpy as np

    import brainfm
    from brainfm.assets import SAMPLE_MASK, SAMPLE_SCAN

    spec = brainfm.get_pretrained_cfg("test_resnet_3d").input_spec
    scan = brainfm.load_scan(SAMPLE_SCAN, SAMPLE_MASK, spec=spec)
    nib.Nifti1Image(scan.image[0] * scan.mask, scan.affine).to_filename(folder / "scan.nii.gz")
    nib.Nifti1Image(scan.mask.astype(np.uint8), scan.affine).to_filename(folder / "mask.nii.gz")
    return {"scan": str(folder / "scan.nii.gz"), "mask": str(folder / "mask.nii.gz"), "folder": str(folder)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--only", default="", help="Commands in whose names this is, beside import torch.")
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that wait spin, and that is no start-up
    with tempfile.TemporaryDirectory() as folder:
        places = small_scan(Path(folder))
        commands = {
            name: [part.format(**places) for part in parts]
            for name, parts in COMMANDS.items()
            if asked.only in name or name == "import torch"
        }
        for arguments in commands.values():
            cost(arguments)
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(asked.rounds):
            for name, arguments in commands.items():
                runs[name].append(cost(arguments))
    medians = {name: statistics.median(used for used, _ in found) for name, found in runs.items()}
    rows = []
    for name, found in runs.items():
        used, least = medians[name], min(clock for _, clock in found)
        rows.append((f"`{name}`", f"{used:.3f}", f"{used / medians['import torch']:.2f}", f"{least:.3f}"))
    print_table(("command", "s of the processor", "of `import torch`", "s by the clock, at least"), rows)
    print(f"\n{asked.rounds} rounds. {machine()}")


if __name__ == "__main__":
    main()
