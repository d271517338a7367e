"""Each encoder of the zoo: a processor's time and memory for one volume, by upstream's eager forward and `optimize`.

Weights are random, and the volume has the shape of the model's contract: noise in an ellipsoid that fills a third of
it, 0 outside, as a brain without its skull. Upstream is the network of the package that the authors' is of, where that
is installed (`_upstream`), else the encoder as `create_model` makes it, which is written layer by layer as theirs is.
Both ways take turns in one process; times are those of the processor (all cores together) and of the clock. Memory is
the largest resident set of a process of its own less that after the imports, so that weights and input are in it.

python benchmarks/zoo.py [--models 'sfcn*' '*densenet*'] [--rounds 3] [--size 96 96 96] [--json FILE]
"""

import argparse
import contextlib
import fnmatch
import json
import statistics
import time
from pathlib import Path

import torch
from _measure import alone, machine, peak_memory, print_table
from _upstream import Upstream, upstream
from torch import Tensor, nn

import brainfm

UNBOUND = (96, 96, 96)  # of a model whose contract names no size, and of those that a whole volume takes minutes
SLOW = ("brain_ldm_autoencoder", "brainfm_unet3d")
Size = tuple[int, ...] | None  # another than that

LARGE = 20.0  # seconds of upstream's forward from which one round, after the one that warms up, is enough


def network(name: str, way: str, size: Size = None) -> nn.Module:
    """A model's network, in one of the two ways; for volumes of a size, where one is given and it must know."""
    torch.manual_seed(0)
    theirs = None
    if way == "upstream":
        with contextlib.suppress(ImportError):
            theirs = upstream(name)
    if theirs is not None:
        return theirs.eval()
    torch.manual_seed(0)  # again: what could not be built has drawn numbers
    model = plain(name, size)
    return model if way == "upstream" else brainfm.optimize(model)


def plain(name: str, size: Size) -> nn.Module:
    """The encoder as `create_model` makes it; for volumes of a size, where one is given and positions are of one."""
    model = brainfm.create_model(name)
    return brainfm.create_model(name, img_size=size) if size and hasattr(model, "img_size") else model


def volume(name: str, size: Size = None) -> Tensor:
    """Noise in an ellipsoid, and 0 around it, [1, C, D, H, W]."""
    cfg = brainfm.get_pretrained_cfg(name)
    spec, window = cfg.input_spec, cfg.readout.window
    assert spec is not None
    whole = spec.output_shape[1:] if spec.output_shape else window.shape if window else UNBOUND
    size = size or (UNBOUND if name in SLOW else whole)
    x = torch.randn(1, cfg.in_chans, *size, generator=torch.Generator().manual_seed(0))
    axes = [torch.linspace(-1, 1, n) for n in size]
    from_middle = sum((part**2 for part in torch.meshgrid(*axes, indexing="ij")), torch.tensor(0.0))
    return x * (from_middle < 0.86**2)


def timed(
    ways: dict[str, nn.Module], x: Tensor, rounds: int
) -> tuple[dict[str, Tensor], dict[str, tuple[float, float]]]:
    """Embeddings, and median seconds of the processor and of the clock, of ways that take turns; a round warms up."""
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    outputs: dict[str, Tensor] = {}
    count = 0
    while count <= rounds:
        for way, model in ways.items():
            clock, processor = time.perf_counter(), time.process_time()
            outputs[way] = model(x)
            found[way].append((time.process_time() - processor, time.perf_counter() - clock))
        count += 1
        if count > 1 and found["upstream"][0][1] > LARGE:
            break
    medians = {}
    for way, pairs in found.items():
        processor, clock = zip(*(pairs[1:] or pairs), strict=True)
        medians[way] = statistics.median(processor), statistics.median(clock)
    return outputs, medians


def measured(name: str, rounds: int, size: Size = None) -> dict[str, object]:
    """A row of the table."""
    x, ways = volume(name, size), {way: network(name, way, size) for way in ("upstream", "optimize")}
    with torch.inference_mode():
        found, seconds = timed(ways, x, rounds)
        if isinstance(ways["upstream"], Upstream):  # whose random weights are others
            torch.manual_seed(0)
            found["upstream"] = plain(name, size)(x)
    error = (found["optimize"] - found["upstream"]).norm() / found["upstream"].norm()
    package = getattr(ways["upstream"], "package", "plain")
    done = list(getattr(ways.pop("optimize"), "optimizations", ()))
    ways.clear()  # the largest need the memory
    sized = ["--size", *map(str, size)] if size else []
    threads = ["--threads", str(torch.get_num_threads())]
    memory = {way: alone(__file__, "--measure", way, "--models", name, *threads, *sized) for way in seconds}
    return {
        "model": name,
        "shape": list(x.shape[1:]),
        "upstream": package,
        "processor_s": {way: pair[0] for way, pair in seconds.items()},
        "clock_s": {way: pair[1] for way, pair in seconds.items()},
        "gb": memory,
        "error": float(error),
        "done": done,
    }


def cells(row: dict) -> tuple[str, ...]:
    """A row of the printed table."""
    (before, after), (clock, clock_after), (gb, gb_after) = (
        (row[key]["upstream"], row[key]["optimize"]) for key in ("processor_s", "clock_s", "gb")
    )
    return (
        f"`{row['model']}`",
        "×".join(map(str, row["shape"])),
        row["upstream"],
        f"{before:.2f}",
        f"{after:.2f}",
        f"{before / after:.2f}×",
        f"{clock / clock_after:.2f}×",
        f"{gb:.2f}",
        f"{gb_after:.2f}",
        f"{gb / gb_after:.1f}×",
        f"{row['error']:.0e}",
    )


HEADER = (
    "model",
    "input",
    "upstream",
    "processor s",
    "optimized",
    "ratio",
    "by the clock",
    "GB",
    "optimized",
    "ratio",
    "error",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", metavar="PATTERN", default=["*"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--size",
        type=int,
        nargs=3,
        metavar=("Z", "Y", "X"),
        help="Of the volume; else the contract's, and 96³ of two models.",
    )
    parser.add_argument("--threads", type=int, help="Cores that the networks use; one, where the machine is shared.")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--measure", choices=("upstream", "optimize"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size: Size = tuple(arguments.size) if arguments.size else None
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    names = [
        name for name in brainfm.list_models() if any(fnmatch.fnmatch(name, pattern) for pattern in arguments.models)
    ]
    if arguments.measure:
        with torch.device("meta"), contextlib.suppress(RuntimeError):  # for its imports; some read what they hold
            network(names[0], "upstream", size)
        before = peak_memory()
        x, model = volume(names[0], size), network(names[0], arguments.measure, size)
        with torch.inference_mode():
            model(x)
        print(json.dumps(peak_memory() - before))
        return
    rows = []
    for name in names:
        row = measured(name, arguments.rounds, size)
        rows.append(row)
        print(" | ".join(cells(row)), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    print()
    print_table(HEADER, [cells(row) for row in rows])
    print(f"\n{arguments.rounds} rounds, one of what takes {LARGE:.0f} s. {machine()}")


if __name__ == "__main__":
    main()
