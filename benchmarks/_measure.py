"""What the benchmarks share: turns, medians, memory of a process of its own, and what machine this is."""

import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import monai
import torch


def interleaved(ways: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, float]:
    """Median seconds of each way, all taking turns; the first `warm_up` rounds do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(warm_up + rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found[warm_up:]) for name, found in seconds.items()}


def alone(script: str, *arguments: str) -> Any:
    """What a script, in a process of its own, prints as JSON on its last line."""
    done = subprocess.run([sys.executable, script, *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory() -> float:
    """The largest resident set of this process so far, in GB (Linux; `ru_maxrss` counts the parent's, too)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def matrix_rate(dtype: torch.dtype = torch.float32) -> float:
    """GFLOP/s of a large matrix product, the best of ten."""
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    best = min(interleaved({"product": lambda: a @ b}, 1, warm_up=0)["product"] for _ in range(10))
    return 2 * 2048**3 / best / 1e9


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 by itself."""
    flags = Path("/proc/cpuinfo")
    return flags.exists() and any(word in flags.read_text() for word in ("avx512_bf16", "amx_bf16"))


def machine() -> str:
    """Date, processor and versions, in a line."""
    found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    processor = found[0].split(":")[1].strip() if found else platform.processor()
    capability = torch.backends.cpu.get_cpu_capability() + (" and bfloat16" if has_bfloat16() else ", no bfloat16")
    return (
        f"{datetime.date.today()}: {processor} ({capability}), {torch.get_num_threads()} threads; "
        f"Python {platform.python_version()}, torch {torch.__version__}, MONAI {monai.__version__}"
    )


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A Markdown table."""
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def first_table(page: Path) -> str:
    """The first Markdown table of a page, such as `table.md` of `brainfm benchmark`: its scores."""
    lines = page.read_text(encoding="utf-8").splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("|"))
    return "\n".join(lines[first : lines.index("", first)])
