"""What parameter-efficient fine-tuning of the tiny models learns of phantoms they never saw, by its trained parameters.

`brainfm benchmark` on one task: a linear probe, norms and biases, adapters, LoRA, and all of the encoder. All train as
long; each seed is another split.

python benchmarks/peft_phantoms.py [--patients 50] [--epochs 4] [--seeds 3] [--output FOLDER] [KEY=VALUE ...]
"""

import argparse
import tempfile
import time
from pathlib import Path

from _measure import first_table

from brainfm.downstream.benchmark import benchmark
from brainfm.downstream.plan import Plan, read_settings
from brainfm.downstream.task import load_task, read_task
from brainfm.phantom import make_cohort

COHORT_SEED = 1  # the packaged weights saw seed 0
MODES = ("probe", "norm_bias", "adapter", "lora", "finetune")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="phantom_age")
    parser.add_argument("--models", nargs="+", default=["test_resnet_3d", "test_vit_3d"])
    parser.add_argument("--patients", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--output", help="keep everything here; an interrupted run goes on")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="in place of the recipes'")
    arguments = parser.parse_args()
    plan = Plan(
        models=tuple(arguments.models),
        modes=MODES,
        seeds=arguments.seeds,
        epochs_scale=arguments.epochs / 100,
        settings=read_settings(["workers=0", "device=cpu", *arguments.settings]),
    )
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.output or temporary)
        manifest = make_cohort(arguments.patients, folder / "phantoms", spacing=4.0, seed=COHORT_SEED)
        page = benchmark([read_task(load_task(arguments.task), manifest)], plan, folder / "results", progress=True)
        scores = first_table(page.with_name("table.md"))
    print(f"{arguments.patients} phantoms at 4 mm, {arguments.epochs} epochs, {time.perf_counter() - started:.0f} s\n")
    print(scores)


if __name__ == "__main__":
    main()
