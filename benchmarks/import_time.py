"""What `import brainfm` costs above `import torch`: paired runs in fresh interpreters, medians.

python benchmarks/import_time.py [--rounds 11]
"""

import argparse
import statistics
import subprocess
import sys
import time


def seconds(statement: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    runs = parser.parse_args().rounds

    statements = ("import torch", "import torch, brainfm")
    for statement in statements:
        seconds(statement)
    pairs = [tuple(seconds(statement) for statement in statements) for _ in range(runs)]
    torch_alone, both = (statistics.median(column) for column in zip(*pairs, strict=True))
    above = statistics.median(b - a for a, b in pairs)
    print(f"import torch {torch_alone:.2f} s, with brainfm {both:.2f} s: {above:+.2f} s, {both / torch_alone:.2f}×")
    print(f"medians of {runs} pairs; Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
