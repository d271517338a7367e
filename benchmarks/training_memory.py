"""Forward and backward of the encoder on one full-size volume: peak memory and time, against MONAI's own network.

The peer is the eager `resnet18` of MONAI that the weights were trained in. Every run is a process of its own, and its
memory the largest resident set less that after the imports: weights and their gradients are in it. `checkpointed` is
`set_grad_checkpointing()`, in the memory format of the name. Both compute in bfloat16 where the processor has it.

python benchmarks/training_memory.py [--rounds 3] [--dtype float32|bfloat16]
"""

import argparse
import json
import statistics
import sys
import time

import torch
from _measure import alone, has_bfloat16, machine, peak_memory
from monai.networks import nets

import brainfm

WAYS = ("MONAI", "brainfm", "brainfm, checkpointed", "brainfm, checkpointed, channels last")


def measure(way: str, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of one forward and backward pass in this process, and GB above the imports."""
    before = peak_memory()
    torch.manual_seed(0)
    if way == "MONAI":
        model = nets.resnet18(
            spatial_dims=3, n_input_channels=1, conv1_t_stride=1, feed_forward=False, bias_downsample=True
        )
    else:
        model = brainfm.create_model("simclr_resnet18_3d")
        model.set_grad_checkpointing("checkpointed" in way)
    layout = torch.channels_last_3d if "channels last" in way else torch.contiguous_format
    model = model.train().to(memory_format=layout)  # type: ignore[call-overload]
    volume = torch.randn(1, 1, 150, 192, 192)
    start, busy = time.perf_counter(), time.process_time()
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        embedding = model(volume)
    embedding.float().square().mean().backward()
    wall, processor = time.perf_counter() - start, time.process_time() - busy
    return {"memory": peak_memory() - before, "wall": wall, "processor": processor}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    dtype = "bfloat16" if has_bfloat16() else "float32"
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=dtype)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["MONAI", "brainfm, checkpointed, channels last"])
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, getattr(torch, arguments.dtype))))
        return

    runs: dict[str, list[dict[str, float]]] = {way: [] for way in arguments.ways}
    for _ in range(arguments.rounds):
        for way in runs:
            runs[way].append(alone(__file__, "--measure", way, "--dtype", arguments.dtype))
            print(f"{way}: {runs[way][-1]}", file=sys.stderr)
    median = {
        way: {name: statistics.median(run[name] for run in found) for name in found[0]} for way, found in runs.items()
    }
    first = median[arguments.ways[0]]
    print(f"| one volume, {arguments.dtype} | peak, GB | peer / this | s | of processor time | this / peer |")
    print("|---|---|---|---|---|---|")
    for way, found in median.items():
        print(
            f"| {way} | {found['memory']:.2f} | {first['memory'] / found['memory']:.1f}× | {found['wall']:.1f} | "
            f"{found['processor']:.1f} | {found['processor'] / first['processor']:.2f}× |"
        )
    print(f"\n{arguments.rounds} rounds, interleaved. {machine()}")


if __name__ == "__main__":
    main()
