"""From files to a table of embeddings, against a straightforward loop: read, prepare, forward, one scan after another.

The loop is the upstream preparation (see read_scan.py) and MONAI's eager network in float32, on all cores. Ours is
`brainfm.embed` with its defaults, and in bfloat16 where the processor has it. All write a CSV.

python benchmarks/embed_cohort.py [--scans 20] [--rounds 3]
"""

import argparse
import csv
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from _measure import has_bfloat16, interleaved, machine, print_table
from encoder import network
from read_scan import upstream, write_scan

import brainfm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scans", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model, peer = brainfm.create_model("simclr_resnet18_3d"), network("MONAI")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = write_scan(folder)
        pairs = []
        for n in range(arguments.scans):
            (folder / str(n)).mkdir()
            pairs.append(tuple(shutil.copy(path, folder / str(n) / path.name) for path in first))
        found: dict[str, np.ndarray] = {}

        def loop() -> None:
            with torch.inference_mode(), (folder / "loop.csv").open("w", newline="") as file:
                vectors = [peer(upstream(*map(Path, pair))[None])[0].tolist() for pair in pairs]
                csv.writer(file).writerows(vectors)
            found["loop"] = np.array(vectors)

        def ours(dtype: str) -> None:
            found[dtype] = brainfm.embed(pairs, model, output=folder / f"{dtype}.csv", dtype=dtype).vectors

        ways = {
            "a loop of `get_fdata`, z-score and MONAI's `resnet18`": loop,
            "brainfm, float32": lambda: ours("float32"),
        }
        if has_bfloat16():
            ways["brainfm, bfloat16"] = lambda: ours("bfloat16")
        seconds = interleaved(ways, arguments.rounds, warm_up=0)
    reference = next(iter(seconds.values()))
    print_table(
        (f"{arguments.scans} scans, files → table", "s", "loop / this"),
        [(name, f"{value:.1f}", f"{reference / value:.2f}×") for name, value in seconds.items()],
    )
    error = np.linalg.norm(found["float32"] - found["loop"]) / np.linalg.norm(found["loop"])
    print(f"\nfloat32 differs from the loop by {error:.1e}. {arguments.rounds} rounds. {machine()}")
    if not has_bfloat16():
        print("bfloat16 left out: this processor has no instructions for it.")


if __name__ == "__main__":
    main()
