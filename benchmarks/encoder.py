"""The embedding of one preprocessed volume: time and memory against MONAI's eager network, and how far the two differ.

The peer is the `resnet18` of MONAI that the weights were trained in, in eval mode and float32. Times are taken in turns
in one process; memory is the largest resident set of a process of its own less that after the imports, so that weights
and input are in it.

python benchmarks/encoder.py [--rounds 5]
"""

import argparse
import json

import torch
from _measure import alone, has_bfloat16, interleaved, machine, matrix_rate, peak_memory, print_table
from monai.networks.nets import resnet18

import brainfm
from brainfm.assets import SAMPLE_MASK, SAMPLE_SCAN

GFLOP = 1332  # of a volume, two for each of the 666 G multiply-adds of its convolutions
WAYS = ("MONAI", "float32", "bfloat16")


def network(way: str) -> torch.nn.Module:
    """The network of a way, all with the same weights."""
    torch.manual_seed(0)
    model = brainfm.create_model("simclr_resnet18_3d")
    if way != "MONAI":
        return brainfm.optimize(model, way)
    peer = resnet18(spatial_dims=3, n_input_channels=1, conv1_t_stride=1, feed_forward=False, bias_downsample=True)
    peer.load_state_dict(model.state_dict())
    return peer.eval()


def volume() -> torch.Tensor:
    return brainfm.create_transform("simclr_resnet18_3d")(SAMPLE_SCAN, SAMPLE_MASK)[None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        before = peak_memory()
        x, model = volume(), network(arguments.measure)
        with torch.inference_mode():
            model(x)
        print(json.dumps(peak_memory() - before))
        return

    ways = WAYS if has_bfloat16() else WAYS[:2]
    x, networks = volume(), {way: network(way) for way in ways}
    with torch.inference_mode():
        outputs = {way: model(x)[0] for way, model in networks.items()}
        seconds = interleaved({way: lambda m=model: m(x) for way, model in networks.items()}, arguments.rounds, 0)
    rates = {way: matrix_rate(torch.bfloat16 if way == "bfloat16" else torch.float32) for way in ways}
    memory = {way: alone(__file__, "--measure", way) for way in ways}
    rows = []
    for way in ways:
        error = (outputs[way] - outputs["MONAI"]).norm() / outputs["MONAI"].norm()
        cosine = torch.cosine_similarity(outputs[way].double(), outputs["MONAI"].double(), dim=0)
        rows.append(
            (
                "MONAI's `resnet18`, eager" if way == "MONAI" else f"`brainfm.optimize`, {way}",
                f"{seconds[way]:.2f}",
                f"{seconds['MONAI'] / seconds[way]:.2f}×",
                f"{memory[way]:.2f}",
                f"{memory['MONAI'] / memory[way]:.1f}×",
                f"{error:.1e}",
                f"{cosine:.6f}",
                f"{100 * GFLOP / seconds[way] / rates[way]:.0f} %",
            )
        )
    print_table(
        ("one volume", "s", "peer / this", "GB", "peer / this", "error", "cosine", "of the matrix-product rate*"), rows
    )
    print(f"\n\\* as if all {GFLOP} GFLOP were computed. {arguments.rounds} rounds. {machine()}")
    if "bfloat16" not in ways:
        print("bfloat16 left out: this processor has no instructions for it.")


if __name__ == "__main__":
    main()
