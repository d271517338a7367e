"""One training step of a published recipe on two full-size scans: its time, the share spent waiting for data, memory.

The scans are phantoms of 193×229×193 voxels; each row is a run of its own, from the files and from a cache.

python benchmarks/full_size_step.py [--recipe simclr_resnet18_3d] [KEY=VALUE ...]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import brainfm
from brainfm.manifest import read_manifest
from brainfm.phantom import make_cohort
from brainfm.train.cache import build_cache

MEMORY = ["precision=bfloat16", "channels_last=true", "grad_checkpointing=true"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="simclr_resnet18_3d")
    parser.add_argument("overrides", nargs="*", default=MEMORY, metavar="KEY=VALUE", help=" ".join(MEMORY))
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        manifest = make_cohort(2, Path(folder, "phantoms"), spacing=1.0)
        spec = brainfm.get_pretrained_cfg(arguments.recipe).input_spec
        assert spec is not None
        build_cache(read_manifest(manifest), Path(folder, "cache"), spec, root=manifest.parent)
        print(f"{arguments.recipe} {' '.join(arguments.overrides)}, joined batch 2\n")
        print("| read from | step, s | waiting for data, % | peak memory, GB |")
        print("|---|---|---|---|")
        for source, cache in (("NIfTI", []), ("cache", [f"cache={folder}/cache"])):
            output = Path(folder, source)
            fixed = [f"manifest={manifest}", f"output={output}", "epochs=1", "batch_size=2", "warmup_epochs=0"]
            command = [sys.executable, "-m", "brainfm.train", arguments.recipe, *fixed, *cache, *arguments.overrides]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            step = json.loads((output / "log.jsonl").read_text())
            seconds = 2 / step["scans_per_s"]
            print(
                f"| {source} | {seconds:.1f} | {100 * step['data_fraction']:.1f} | {step['peak_memory_gb']:.1f} |",
                flush=True,
            )
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
