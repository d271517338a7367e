"""The participant level: prepare the scans that are asked for, or take derivatives of them, and embed each."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainfm.bids import DESCRIPTION
from brainfm.bidsapp.selection import RAW, Scan, Wanted, select
from brainfm.embed import Options, embed_files, origin_of
from brainfm.errors import BrainfmError, ScanError
from brainfm.factory import create_model
from brainfm.files import atomic_path, file_sha256, one_line, write_json, write_text
from brainfm.manifest import Listing, ScanRecord
from brainfm.prep.batch import Outcome, prepare_all
from brainfm.prep.source import find_sources
from brainfm.scan.layout import PICTURE, RECORD
from brainfm.scan.prepared import read_record
from brainfm.scan.verdict import verdict_of
from brainfm.shards import Shard
from brainfm.system import available_cores
from brainfm.table import Origin
from brainfm.version import __version__

PREPARED = "prepared"  # the folder of prepared scans, in the work dir or the output
BIDS_VERSION = "1.10.0"  # that the derivatives are written by
GB_A_SCAN = 1.5  # of memory that the preparation of one takes; benchmarks/README.md has 1.3
_AT_ONCE = 256  # scans are embedded, and their files written
_IGNORED = (f"{PREPARED}/", "group_*", "sub-*/figures/", "*_embedding.npy", "*_embedding.json")


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


@dataclass
class Done:
    """What became of the scans.

    Attributes:
        scans: How many were asked for, of the shard.
        failed: Name of each that failed → why.
        left_out: What of the data sets was passed over, and why.
    """

    scans: int
    failed: dict[str, str]
    left_out: dict[str, str]


def label_of(model: str) -> str:
    """What a model is called in names of files: `simclr_resnet18_3d` → `simclrresnet18`."""
    architecture, _, tag = model.partition(".")
    return "".join(letter for letter in f"{architecture.removesuffix('_3d')}{tag}" if letter.isalnum())


def run(call: Call) -> Done:
    """Prepare and embed the scans of a call; what is there already, made by the same, is left as it is.

    Of each scan the output gets `sub-…/anat/…_T1w.json` with its quality, or why it failed, and for each model
    `…_desc-<model>_embedding.npy`, a vector, with what made it in the `.json` beside it.

    Raises:
        ScanError: There is no such data set, participant, session or scan; or, with `stop_on_first_crash`, a scan.
        BrainfmError: The data set's description is not what BIDS says, or the output is in it.
    """
    if call.validate:
        check_description(call.bids_dir)
    chosen, left_out = select(call.bids_dir, call.derivatives, call.wanted)
    scans = [chosen[n] for n in call.shard.numbers(len(chosen))]
    call.output.mkdir(parents=True, exist_ok=True)
    _describe(call)
    encoders = {model: create_model(model, pretrained=True) for model in call.models}
    errors: dict[str, dict[str, str]] = {scan.name: {} for scan in scans}
    if not call.derivatives:
        scans = _prepared(call, chosen, scans, errors)
    with _threads(call.n_cpus):
        for model, encoder in encoders.items():
            _embed(call, model, encoder, [scan for scan in scans if scan.record is not None], errors)
    for scan in scans:
        _write_quality(call, scan, errors[scan.name])
    failed = {name: "; ".join(whys.values()) for name, whys in errors.items() if whys}
    return Done(len(scans), failed, left_out)


# --- One after another ----------------------------------------------------------------------------


def _prepared(call: Call, chosen: list[Scan], scans: list[Scan], errors: dict[str, dict[str, str]]) -> list[Scan]:
    """The scans with their prepared folders as records; those that could not be prepared are as they were."""
    paths = [scan.image.path for scan in chosen]
    names = {source.path: source.name for source in find_sources(paths)}

    def said(name: str, outcome: Outcome) -> None:
        if isinstance(outcome, str) and call.stop_on_first_crash:
            raise ScanError(f"{name}: {outcome}")

    jobs, threads = call.threads
    report = prepare_all(
        *(paths, call.prepared),
        jobs=jobs,
        threads=threads,
        shard=call.shard,
        device="cpu" if call.device == "auto" else call.device,
        said=said,
        progress=call.progress,
    )
    made = []
    for scan in scans:
        name = names[scan.image.path.absolute()]
        if name in report.failed:
            errors[scan.name]["preparation"] = report.failed[name]
        record = ScanRecord(call.prepared / name, None, *scan.image.ids)
        made.append(scan if name in report.failed else replace(scan, record=record))
    return made


def _embed(call: Call, model: str, encoder: Any, scans: list[Scan], errors: dict[str, dict[str, str]]) -> None:
    """Write the vector of each scan that a model has not embedded as it is now."""
    meant = origin_of(encoder).digest
    todo = [scan for scan in scans if not _is_embedded(call, scan, model, meant)]
    for first in range(0, len(todo), _AT_ONCE):
        part = {str(scan.record and scan.record.image): scan for scan in todo[first : first + _AT_ONCE]}
        options = Options(
            device=call.device,
            num_workers=min(2, (call.n_cpus or 3) - 1),
            on_error="raise" if call.stop_on_first_crash else "skip",
            progress=call.progress,
        )
        records = Listing(scan.record for scan in part.values() if scan.record is not None)
        table = embed_files(records, encoder, options, in_memory=True)[0]
        assert table.origin is not None
        for record, vector in zip(table.records, table.vectors, strict=True):
            _write_embedding(call, part[str(record.image)], model, vector, table.origin)
        for record, why in table.errors:
            errors[part[str(record.image)].name][model] = why


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Compute with so many threads of torch, or as many as it takes."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- Files ----------------------------------------------------------------------------------------


def embedding_path(output: Path, scan: Scan, model: str) -> Path:
    """Of a scan's vector."""
    return output / scan.place / f"{scan.name}_desc-{label_of(model)}_embedding.npy"


def quality_path(output: Path, scan: Scan) -> Path:
    """Of what is known of a scan, called as MRIQC calls it."""
    return output / scan.place / f"{scan.name}_T1w.json"


def _input(scan: Scan) -> Path:
    """The file that says whether a scan is what it was: of a prepared one its record."""
    assert scan.record is not None
    path = Path(str(scan.record.image))
    return path / RECORD if path.is_dir() else path


def _is_embedded(call: Call, scan: Scan, model: str, meant: str) -> bool:
    path = embedding_path(call.output, scan, model)
    try:
        said = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return path.is_file() and (said["Meaning"], said["InputSHA256"]) == (meant, file_sha256(_input(scan)))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_embedding(call: Call, scan: Scan, model: str, vector: Any, origin: Origin) -> None:
    path = embedding_path(call.output, scan, model)
    source = _input(scan)
    sources = [scan.uri]
    if scan.dataset == RAW and call.prepared.is_relative_to(call.output):
        sources.append(f"bids::{source.parent.relative_to(call.output).as_posix()}/head.nii.gz")
    path.with_suffix(".json").unlink(missing_ok=True)  # it is written last: without it there is no vector
    with atomic_path(path) as temporary:
        np.save(temporary, np.asarray(vector, dtype=np.float32))
    write_json(
        path.with_suffix(".json"),
        {
            "Description": f"Embedding of a T1w image by {origin.model}: a vector of {len(vector)} numbers, float32",
            "Sources": sources,
            "Model": origin.model,
            "WeightsDigest": origin.weights,
            "Contract": origin.contract,
            "Readout": origin.readout,
            "DType": origin.dtype,
            "Meaning": origin.digest,
            "InputSHA256": file_sha256(source),
            "SoftwareVersions": {"brainfm": origin.brainfm, "torch": origin.torch, "python": platform.python_version()},
        },
    )


def _write_quality(call: Call, scan: Scan, errors: dict[str, str]) -> None:
    """Write what is known of a scan; what other models failed of it is kept."""
    path = quality_path(call.output, scan)
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["errors"]
        before = {name: why for name, why in before.items() if name not in ("preparation", *call.models)}
    except (OSError, ValueError, KeyError, AttributeError):
        before = {}
    keys = {"sub": "subject_id", "ses": "session_id"}
    entities = {name: value for name, value in scan.image.entities.items() if name not in ("suffix", "ext", "datatype")}
    content: dict[str, Any] = {
        "bids_name": f"{scan.name}_T1w",
        "bids_meta": {keys.get(name, f"{name}_id"): value for name, value in entities.items()},
        "patient_id": scan.image.ids[0],
        "scan_id": scan.image.ids[1],
        "Sources": [scan.uri],
        "verdict": "",
        "figures": {},
        "reasons": [],
        "errors": before | errors,
    }
    folder = Path(str(scan.record.image)) if scan.record is not None else None
    if folder is not None and (record := read_record(folder) if folder.is_dir() else None):
        content |= {
            "verdict": verdict_of(folder),
            "figures": {one["name"]: one["value"] for one in record["quality"]},
            "reasons": [f"{one['verdict']}: {one['reason']}" for one in record["quality"] if one.get("reason")],
            "SourceSHA256": record["input"]["sha256"],
            "settings": record["settings"],
            "tools": record.get("tools", {}),
        }
        if (folder / PICTURE).is_file():
            picture = picture_path(call.output, scan)
            with atomic_path(picture) as temporary:
                shutil.copyfile(folder / PICTURE, temporary)
            content["picture"] = picture.relative_to(call.output).as_posix()
    write_json(path, content)


def picture_path(output: Path, scan: Scan) -> Path:
    """Of the picture of a prepared scan, where fMRIPrep has its own."""
    return output / scan.place.parts[0] / "figures" / f"{scan.name}_desc-qc_T1w.png"


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


def _describe(call: Call) -> None:
    """Write the derivatives' own description, with the data sets of earlier calls, and what a validator passes over."""
    path = call.output / DESCRIPTION
    links = {RAW: call.bids_dir, **call.derivatives}
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["DatasetLinks"]
    except (OSError, ValueError, KeyError, TypeError):
        before = {}
    try:
        doi = check_description(call.bids_dir).get("DatasetDOI")
    except BrainfmError:
        doi = None
    sources = [{"URL": folder.absolute().as_uri()} for folder in links.values()]
    if doi:
        sources[0]["DOI"] = doi
    content = {
        "Name": "brainfm: embeddings of T1w images",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "brainfm", "Version": __version__, "Description": "brainfm bids"}],
        "SourceDatasets": sources,
        "DatasetLinks": before | {name: folder.absolute().as_uri() for name, folder in links.items()},
    }
    write_json(path, content)
    ignore = call.output / ".bidsignore"
    if not ignore.exists():
        write_text(ignore, "\n".join((*_IGNORED, "")))
