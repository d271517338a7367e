"""Run every benchmark that has a peer, and print what it says as one Markdown page.

A script that cannot run (timm is not installed, say) is named with the reason, and the others go on.
`embed_memory.py` and `embed_cohort_size.py` have no peer and go through 100,000 scans: they are run by themselves.

python benchmarks/run_all.py [--rounds N] [--only encoder read_scan …] > results.md
"""

import argparse
import subprocess
import sys
from pathlib import Path

from _measure import machine

SCRIPTS = ("start_up", "encoder", "read_scan", "embed_cohort", "loader", "training_memory", "mae_step", "zoo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, help="Of each; without it, what each script takes.")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS)
    arguments = parser.parse_args()
    print(f"# Benchmarks\n\n{machine()}\n", flush=True)
    for name in arguments.only:
        rounds = [] if arguments.rounds is None else ["--rounds", str(arguments.rounds)]
        print(f"## `{' '.join(['python', f'benchmarks/{name}.py', *rounds])}`\n", flush=True)
        done = subprocess.run(
            [sys.executable, Path(__file__).with_name(f"{name}.py"), *rounds], stdout=subprocess.PIPE, text=True
        )
        print(done.stdout if done.returncode == 0 else f"did not run: exit code {done.returncode}\n", flush=True)


if __name__ == "__main__":
    main()
