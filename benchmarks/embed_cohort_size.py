"""A cohort as large as a biobank's: how long until it is listed, until the first row, after a kill; and the memory.

The cohort is a BIDS derivatives folder of phantoms at 4 mm with their masks, a few files under many names (hard links).
The encoder has the test model's input contract and next to no forward pass, so that what is measured is all else: the
listing, reading, checks, the contract, the parts and the table. Every run is a process of its own:

- one to Parquet that kills itself (SIGKILL) after 80 % of the scans, and the same one again;
- one to a CSV, of the first `--others`;
- eight shards of these, one after the other, merged to an .npz.

All three must be the same table to the bit, with each scan once. `first row` is counted from the call of `embed`.

With `--read-once` a file is read and checked at the first of its names alone, and the others take what that gave: the
listing, the parts, the table and their memory are of all scans, and the time of a scan is without its reading.

python benchmarks/embed_cohort_size.py [--scans 100000] [--others 100000] [--read-once] [--folder DIR]
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from _measure import machine, print_table
from torch import nn

import brainfm
from brainfm import parts, table
from brainfm.manifest import list_scans
from brainfm.phantom import make_phantom
from brainfm.transforms import InputTransform

FILES, SHARDS, EARLY, KILLED_AFTER = 10, 8, 1_000, 0.8  # EARLY: scans after which memory is looked at first
SPACE = "space-MNI152NLin2009cAsym"
SECONDS_LISTING, SECONDS_FIRST, MB_MORE, SECONDS_AGAIN = 10, 20, 300, 20  # what it should keep below at 100,000


class Probe(nn.Module):
    """An encoder that averages, and notes when each scan came; `kill_at` ends its process at that scan."""

    num_features = 64

    def __init__(self, kill_at: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(1, 2, self.num_features))
        spec = brainfm.get_pretrained_cfg("test_resnet_3d").input_spec
        self.pretrained_cfg = brainfm.PretrainedCfg(architecture="probe", input_spec=spec)
        self.seen, self.kill_at = [0], kill_at
        self.start, self.processor = time.monotonic(), time.process_time()
        self.first, self.early = [0.0], [0.0]  # lists: `optimize` copies the encoder, and they are shared

    def __deepcopy__(self, memo: dict[int, Any]) -> "Probe":
        return self

    def found(self) -> dict[str, float]:
        """What was seen since the start: scans, seconds and memory."""
        return {
            "done": self.seen[0],
            "first": self.first[0] - self.start,
            "early": self.early[0],
            "end": resident(),
            "s": time.monotonic() - self.start,
            "cpu": time.process_time() - self.processor,
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The mean of the bright voxels of each image, many times."""
        if self.seen[0] == 0:
            self.first[0] = time.monotonic()
        if self.seen[0] >= self.kill_at:
            print(json.dumps(self.found()), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen[0] += len(x)
        if self.seen[0] == EARLY:
            self.early[0] = resident()
        return x.square().mean(dim=(1, 2, 3, 4))[:, None] * self.weight


def resident() -> float:
    """The resident memory of this process, in MB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def write_cohort(folder: Path, scans: int) -> None:
    """The derivatives folder of `scans` subjects, of which FILES have files of their own."""
    pool = folder.with_name("files")
    pool.mkdir()
    for n in range(FILES):
        phantom = make_phantom(n, spacing=4.0)
        for name, voxels in (("T1w", phantom.image.astype(np.int16)), ("mask", phantom.mask)):
            nib.Nifti1Image(voxels, phantom.affine).to_filename(pool / f"{n}_{name}.nii.gz")
    folder.mkdir()
    (folder / "dataset_description.json").write_text('{"Name": "phantoms", "BIDSVersion": "1.10.0"}')
    for n in range(scans):
        place = folder / f"sub-{n:06}" / "anat"
        place.mkdir(parents=True)
        for name in ("preproc_T1w", "brain_mask"):
            file = pool / f"{n % FILES}_{name.partition('_')[2]}.nii.gz"
            os.link(file, place / f"sub-{n:06}_{SPACE}_desc-{name}.nii.gz")


# --- In processes of their own ---------------------------------------------------------------------


def listing(folder: Path) -> dict[str, float]:
    """Seconds of the listing, by the clock and of the processor."""
    clock, processor = time.monotonic(), time.process_time()
    found = list_scans(folder)
    return {"scans": len(found), "s": time.monotonic() - clock, "cpu": time.process_time() - processor}


def embed(folder: Path, output: Path, kill_at: int, scans: int) -> dict[str, float]:
    """Embed the first scans of the folder; what that took."""
    torch.set_num_threads(1)
    probe = Probe(kill_at)
    brainfm.embed(folder if scans == sys.maxsize else list_scans(folder)[:scans], probe, output=output)
    return probe.found()


def shards(folder: Path, output: Path, scans: int) -> dict[str, float]:
    """Embed the first scans of the folder in shards, and merge their parts."""
    torch.set_num_threads(1)
    records, start = list_scans(folder)[:scans], time.monotonic()
    for n in range(SHARDS):
        brainfm.embed(records, Probe(sys.maxsize), output=output.with_suffix(""), shard=f"{n + 1}/{SHARDS}")
    embedded = time.monotonic()
    merged = parts.merge([output.with_suffix("")])
    table.write(merged.table, output)
    return {"missing": merged.missing, "s": embedded - start, "merging": time.monotonic() - embedded}


def read_each_file_once() -> None:
    """From here on, a file of many names is read and checked once."""
    made: dict[int, Any] = {}
    volume = InputTransform.volume

    def once(self: InputTransform, image: Any, mask: Any = None) -> Any:
        number = Path(image).stat().st_ino
        if number not in made:
            made[number] = volume(self, image, mask)
        return made[number]

    InputTransform.volume = once  # type: ignore[method-assign]


def alone(*arguments: object, read_once: bool = False) -> dict[str, float]:
    """What a step in a process of its own prints at its end, or before it kills itself."""
    command = [sys.executable, __file__, *(["--read-once"] if read_once else []), "--step", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, -signal.SIGKILL):
        sys.exit(f"{arguments}: exit code {done.returncode}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{arguments[0]}: {found}", file=sys.stderr, flush=True)
    return found


def same(tables: list[table.Embeddings], scans: int) -> bool:
    """Whether the first scans of tables are the same to the bit, row by row."""
    first = tables[0]
    rows = [record.columns() for record in first.records[:scans]]
    return all(
        np.array_equal(first.vectors[:scans], other.vectors[:scans])
        and rows == [record.columns() for record in other.records[:scans]]
        for other in tables[1:]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=int, default=100_000)
    parser.add_argument("--others", type=int, help="Scans of the CSV and of the shards; all, by default.")
    parser.add_argument("--read-once", action="store_true", help="Read each file at the first of its names alone.")
    parser.add_argument("--folder", help="Where to work; by default where the system has its temporary files.")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        if arguments.read_once:
            read_each_file_once()
        step, folder, *rest = arguments.step
        if step == "listing":
            made = listing(Path(folder))
        elif step == "shards":
            made = shards(Path(folder), Path(rest[0]), int(rest[1]))
        else:
            made = embed(Path(folder), Path(rest[0]), int(rest[1]), int(rest[2]))
        print(json.dumps(made))
        return
    if arguments.folder:
        Path(arguments.folder).mkdir(parents=True, exist_ok=True)
    top = Path(tempfile.mkdtemp(dir=arguments.folder))
    scans, once = arguments.scans, arguments.read_once
    others = min(arguments.others or scans, scans)
    try:
        bids = top / "bids"
        write_cohort(bids, scans)
        kill_at, never = int(KILLED_AFTER * scans), sys.maxsize
        listed = alone("listing", bids)
        killed = alone("embed", bids, top / "killed.parquet", kill_at, never, read_once=once)
        again = alone("embed", bids, top / "killed.parquet", never, never, read_once=once)
        whole = alone("embed", bids, top / "whole.csv", never, others, read_once=once)
        sharded = alone("shards", bids, top / "shards.npz", others, read_once=once)
        tables = [table.read(top / name) for name in ("killed.parquet", "whole.csv", "shards.npz")]
        alike = same(tables, others)
        lost = scans + 2 * others - sum(map(len, tables)) + sharded["missing"]
        per_scan, end = 1e3 * killed["cpu"] / kill_at, max(killed["end"], again["end"])
        without = " (each file read once)" if once else ""
        rows = [
            ("listing", f"{listed['s']:.1f} s, {listed['cpu']:.1f} s of the processor", f"{SECONDS_LISTING} s"),
            ("first row after", f"{killed['first']:.1f} s", f"{SECONDS_FIRST} s"),
            (f"to 80 %{without}", f"{killed['s']:.0f} s, {per_scan:.2f} ms of the processor a scan", ""),
            ("memory at 80 % or the end, above 1,000", f"{end - killed['early']:+.0f} MB", f"{MB_MORE} MB"),
            ("after SIGKILL at 80 %, first new row after", f"{again['first']:.1f} s", f"{SECONDS_AGAIN} s"),
            ("scans that were done again", f"{kill_at + again['done'] - scans:.0f}", "a second's"),
            ("scans lost", f"{lost:.0f}", "0"),
            (f"CSV of {others:,}", f"{whole['s']:.0f} s", ""),
            (
                f"{SHARDS} shards of {others:,}, and merging them",
                f"{sharded['s']:.0f} s and {sharded['merging']:.1f} s",
                "",
            ),
            (f"Parquet, CSV and .npz are the same to the bit, of {others:,}", str(alike), "True"),
        ]
        print_table((f"{scans:,} scans of 4 mm", "found", "goal at 100,000"), rows)
        print(f"\n{machine()}")
    finally:
        shutil.rmtree(top, ignore_errors=True)
    if not alike or lost:
        sys.exit("the tables differ, or scans are lost")


if __name__ == "__main__":
    main()
