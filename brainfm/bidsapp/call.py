"""What a call of the BIDS App says, and what can be said of it before anything is computed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from brainfm.bids import DESCRIPTION
from brainfm.bidsapp.selection import Wanted
from brainfm.errors import BrainfmError
from brainfm.files import one_line
from brainfm.shards import Shard
from brainfm.system import available_cores

PREPARED = "prepared"  # the folder of prepared scans, in the work dir or the output
LOGS = "logs"  # of the calls' reports, in the output
GB_A_SCAN = 1.5  # of memory that the preparation of one takes; benchmarks/README.md has 1.3


@dataclass(frozen=True)
class Call:
    """What a call of the BIDS App says.

    Attributes:
        bids_dir: The data set; it is only read.
        output: The derivatives' folder.
        wanted: Which scans.
        derivatives: Name → folder of data sets with T1w images in MNI152 space, which are then taken as they are.
        work_dir: Where prepared scans are kept, in `prepared`; None is the output.
        models: Names of encoders.
        n_cpus: Cores to use in all; None is all that there are.
        omp_nthreads: Of them for one scan; None divides them among as many scans as the memory holds.
        mem_gb: Memory to keep below, roughly; None is no limit.
        stop_on_first_crash: Whether the first scan that fails ends it.
        shard: Which of several equal parts of the scans.
        device: Of torch.
        validate: Whether `dataset_description.json` has to be what BIDS says.
        progress: Show bars.
    """

    bids_dir: Path
    output: Path
    wanted: Wanted = field(default_factory=Wanted)
    derivatives: Mapping[str, Path] = field(default_factory=dict)
    work_dir: Path | None = None
    models: Sequence[str] = ("simclr_resnet18_3d",)
    n_cpus: int | None = None
    omp_nthreads: int | None = None
    mem_gb: float | None = None
    stop_on_first_crash: bool = False
    shard: Shard = field(default_factory=Shard)
    device: str = "auto"
    validate: bool = True
    progress: bool = False

    def __post_init__(self) -> None:
        labels = [label_of(model) for model in self.models]
        if twice := {label for label in labels if labels.count(label) > 1}:
            raise BrainfmError(f"two models would both be called {twice.pop()}: {', '.join(self.models)}; name one")
        root = self.bids_dir.resolve()
        for path in filter(None, (self.output, self.work_dir)):
            inside = path.resolve()
            if (root == inside or root in inside.parents) and root / "derivatives" not in inside.parents:
                raise BrainfmError(f"{path}: in the data set, which is only read; name a folder elsewhere")

    @property
    def prepared(self) -> Path:
        """The folder of prepared scans."""
        return (self.work_dir or self.output) / PREPARED

    @property
    def threads(self) -> tuple[int, int]:
        """How many scans are prepared at once, and with how many threads each."""
        cores = self.n_cpus or available_cores()
        most = cores if self.mem_gb is None else max(1, int(self.mem_gb / GB_A_SCAN))
        jobs = max(1, min(most, cores // (self.omp_nthreads or 1)))
        return jobs, self.omp_nthreads or max(1, cores // jobs)


def label_of(model: str) -> str:
    """What a model is called in names of files: `simclr_resnet18_3d` → `simclrresnet18`."""
    architecture, _, tag = model.partition(".")
    return "".join(letter for letter in f"{architecture.removesuffix('_3d')}{tag}" if letter.isalnum())


def check_description(folder: Path) -> dict[str, Any]:
    """A data set's description. Raises BrainfmError for one that lacks what BIDS requires."""
    path = folder / DESCRIPTION
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        missing = [name for name in ("Name", "BIDSVersion") if not content.get(name)]
    except (OSError, ValueError, AttributeError) as error:
        raise BrainfmError(f"{path}: {one_line(error)}; write it, or give --skip-bids-validation") from error
    if missing:
        raise BrainfmError(f"{path}: does not say {' and '.join(missing)}; write it, or give --skip-bids-validation")
    return dict(content)
