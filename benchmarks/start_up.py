"""What is waited for before anything is done: whole commands in fresh interpreters, interleaved, medians.

python benchmarks/start_up.py [--rounds 11]

`import torch` is the measure: what needs no network must not cost it.
"""

import argparse
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": ("-c", "pass"),
    "import torch": ("-c", "import torch"),
    "import brainfm": ("-c", "import brainfm"),
    "import torch, brainfm": ("-c", "import torch, brainfm"),
    "brainfm --help": ("-m", "brainfm", "--help"),
    "brainfm list": ("-m", "brainfm", "list"),
    "brainfm info simclr_resnet18_3d": ("-m", "brainfm", "info", "simclr_resnet18_3d"),
}


def seconds(arguments: tuple[str, ...]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    for arguments in COMMANDS.values():
        seconds(arguments)
    runs = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, arguments in COMMANDS.items():
            runs[name].append(seconds(arguments))
    torch_alone = statistics.median(runs["import torch"])
    for name, found in runs.items():
        median = statistics.median(found)
        print(f"{name:34} {median:6.3f} s  {median / torch_alone:5.2f} × import torch  (least {min(found):.3f} s)")
    print(f"medians of {rounds} rounds; Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
