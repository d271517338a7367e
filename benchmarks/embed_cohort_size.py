"""A cohort as large as a biobank's: how long until it is listed, until the first row, after a kill; and the memory.

The cohort is a BIDS derivatives folder of phantoms at 4 mm with their masks, a few files under many names (hard links).
The encoder has the test model's input contract and next to no forward pass, so that what is measured is all else: the
listing, reading, checks, the contract, the parts and the table. Every run is a process of its own:

- one from the folder to a CSV;
- one to Parquet that kills itself (SIGKILL) after 80 % of the scans, and the same one again;
- eight shards, one after the other, merged to an .npz.

All three must be the same table to the bit, with each scan once. `first row` is counted from the call of `embed`.

python benchmarks/embed_cohort_size.py [--scans 100000] [--folder DIR]
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
        self.first, self.early = [0.0], [0.0]  # lists: `optimize` copies the encoder, and they are shared

    def __deepcopy__(self, memo: dict[int, Any]) -> "Probe":
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The mean of the bright voxels of each image, many times."""
        if self.seen[0] == 0:
            self.first[0] = time.monotonic()
        if self.seen[0] >= self.kill_at:
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


def embed(folder: Path, output: Path, kill_at: int) -> dict[str, float]:
    """Embed the folder; what that took."""
    torch.set_num_threads(1)
    probe, start, processor = Probe(kill_at), time.monotonic(), time.process_time()
    brainfm.embed(folder, probe, output=output)
    return {
        "done": probe.seen[0],
        "first": probe.first[0] - start,
        "early": probe.early[0],
        "end": resident(),
        "s": time.monotonic() - start,
        "cpu": time.process_time() - processor,
    }


def shards(folder: Path, output: Path) -> dict[str, float]:
    """Embed the folder in shards, and merge their parts."""
    torch.set_num_threads(1)
    records, start = list_scans(folder), time.monotonic()
    for n in range(SHARDS):
        brainfm.embed(records, Probe(sys.maxsize), output=output.with_suffix(""), shard=f"{n + 1}/{SHARDS}")
    embedded = time.monotonic()
    merged = parts.merge([output.with_suffix("")])
    table.write(merged.table, output)
    return {"missing": merged.missing, "s": embedded - start, "merging": time.monotonic() - embedded}


def alone(*arguments: object) -> dict[str, float]:
    """What a step in a process of its own prints; nothing where that was killed."""
    command = [sys.executable, __file__, "--step", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, -signal.SIGKILL):
        sys.exit(f"{arguments}: exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}


def same(tables: list[table.Embeddings]) -> bool:
    """Whether tables are the same to the bit, row by row."""
    first = tables[0]
    rows = [record.columns() for record in first.records]
    return all(
        np.array_equal(first.vectors, other.vectors) and rows == [record.columns() for record in other.records]
        for other in tables[1:]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scans", type=int, default=100_000)
    parser.add_argument("--folder", help="Where to work; by default where the system has its temporary files.")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        step, folder, *rest = arguments.step
        made = {"listing": listing, "shards": lambda *given: shards(given[0], Path(given[1]))}.get(
            step, lambda *given: embed(given[0], Path(given[1]), int(given[2]))
        )(Path(folder), *rest)
        print(json.dumps(made))
        return
    if arguments.folder:
        Path(arguments.folder).mkdir(parents=True, exist_ok=True)
    top = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        bids, scans = top / "bids", arguments.scans
        write_cohort(bids, scans)
        kill_at = int(KILLED_AFTER * scans)
        listed = alone("listing", bids)
        whole = alone("embed", bids, top / "whole.csv", sys.maxsize)
        alone("embed", bids, top / "killed.parquet", kill_at)
        again = alone("embed", bids, top / "killed.parquet", sys.maxsize)
        sharded = alone("shards", bids, top / "shards.npz")
        tables = [table.read(top / name) for name in ("whole.csv", "killed.parquet", "shards.npz")]
        rows = [
            ("listing", f"{listed['s']:.1f} s, {listed['cpu']:.1f} s of the processor", f"{SECONDS_LISTING} s"),
            ("first row after", f"{whole['first']:.1f} s", f"{SECONDS_FIRST} s"),
            ("whole run", f"{whole['s']:.0f} s, {1e3 * whole['cpu'] / scans:.2f} ms of the processor a scan", ""),
            ("memory at the end, above that at 1,000", f"{whole['end'] - whole['early']:+.0f} MB", f"{MB_MORE} MB"),
            ("after SIGKILL at 80 %, first new row after", f"{again['first']:.1f} s", f"{SECONDS_AGAIN} s"),
            ("scans that were done again", f"{kill_at + again['done'] - scans:.0f}", "a second's"),
            ("scans lost", f"{3 * scans - sum(map(len, tables)):.0f}", "0"),
            ("8 shards, and merging them", f"{sharded['s']:.0f} s and {sharded['merging']:.1f} s", ""),
            ("the three tables are the same to the bit", str(same(tables)), "True"),
        ]
        print_table((f"{scans:,} scans of 4 mm", "found", "goal at 100,000"), rows)
        print(f"\n{machine()}")
    finally:
        shutil.rmtree(top, ignore_errors=True)
    if not same(tables) or sum(map(len, tables)) != 3 * scans:
        sys.exit("the tables differ, or scans are lost")


if __name__ == "__main__":
    main()
