"""Run every benchmark that has a peer, and print what it says as one Markdown page.

A script that cannot run (timm is not installed, say) is named with the reason, and the others go on.
`embed_memory.py` and `embed_cohort_size.py` have no peer and go through 100,000 scans, `embed_models.py` needs a
prepared scan, and `int8.py` is a trial: they are run by themselves.

With `--json benchmarks/results` each script's machine and tables are kept there as well, from which the site's page of
costs is made; `zoo.py` writes its own, with every digit.

python benchmarks/run_all.py [--rounds N] [--only encoder read_scan …] [--json FOLDER] > results.md
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from _measure import machine

SCRIPTS = ("start_up", "encoder", "read_scan", "embed_cohort", "loader", "training_memory", "mae_step", "zoo")


def tables_of(page: str) -> list[dict[str, list]]:
    """The Markdown tables of a page, as the cells of their header and rows."""
    found = []
    for lines in re.findall(r"(?:^\|.*\n?)+", page, flags=re.MULTILINE):
        header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()]
        found.append({"header": header, "rows": rows})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, help="Of each; without it, what each script takes.")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS)
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="Where to keep what each script found.")
    arguments = parser.parse_args()
    print(f"# Benchmarks\n\n{machine()}\n", flush=True)
    for name in arguments.only:
        rounds = [] if arguments.rounds is None else ["--rounds", str(arguments.rounds)]
        command = " ".join(["python", f"benchmarks/{name}.py", *rounds])
        print(f"## `{command}`\n", flush=True)
        own = ["--json", str(arguments.json / "zoo.json")] if arguments.json and name == "zoo" else []
        done = subprocess.run(
            [sys.executable, Path(__file__).with_name(f"{name}.py"), *rounds, *own], capture_output=True, text=True
        )
        print(done.stderr, file=sys.stderr, end="", flush=True)
        why = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
        print(done.stdout if done.returncode == 0 else f"did not run: {why}\n", flush=True)
        if arguments.json and not own and done.returncode == 0:
            found = {"machine": machine(), "command": command, "tables": tables_of(done.stdout)}
            text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
            (arguments.json / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
