"""The participant level: prepare the scans that are asked for, or take derivatives of them, and embed each."""

from __future__ import annotations

import datetime
import json
import platform
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from brainfm.bids import DESCRIPTION
from brainfm.bidsapp.call import LOGS, PREPARED, Call, check_description, label_of
from brainfm.bidsapp.selection import RAW, Scan, select
from brainfm.embed import Options, embed_files, origin_of
from brainfm.errors import BrainfmError, ScanError
from brainfm.factory import create_model
from brainfm.files import atomic_path, file_sha256, write_json, write_text
from brainfm.manifest import Listing, ScanRecord
from brainfm.prep.batch import Outcome, prepare_all
from brainfm.prep.source import find_sources
from brainfm.report import current
from brainfm.scan.layout import PICTURE, RECORD
from brainfm.scan.prepared import read_record
from brainfm.scan.verdict import verdict_of
from brainfm.system import torch_threads
from brainfm.table import Origin
from brainfm.version import __version__

BIDS_VERSION = "1.10.0"  # that the derivatives are written by
_AT_ONCE = 256  # scans are embedded, and their files written
_IGNORED = (f"{PREPARED}/", f"{LOGS}/", "group_*", "sub-*/figures/", "*_embedding.npy", "*_embedding.json")


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


def run(call: Call) -> Done:
    """Prepare and embed the scans of a call; what is there already, made by the same, is left as it is.

    Of each scan the output gets `sub-…/anat/…_T1w.json` with its quality, or why it failed, and for each model
    `…_desc-<model>_embedding.npy`, a vector, with what made it in the `.json` beside it. A run that is reported has its
    report in `logs/` too, from which the group level says what all calls cost.

    Raises:
        ScanError: There is no such data set, participant, session or scan; or, with `stop_on_first_crash`, a scan.
        BrainfmError: The data set's description is not what BIDS says, or the output is in it.
    """
    if call.validate:
        check_description(call.bids_dir)
    reported = current()
    with reported.step("listing"):
        chosen, left_out = select(call.bids_dir, call.derivatives, call.wanted)
    scans = [chosen[n] for n in call.shard.numbers(len(chosen))]
    call.output.mkdir(parents=True, exist_ok=True)
    _describe(call)
    reported.also(_report_path(call.output))
    reported.left_out = left_out
    with reported.step("loading the models"):
        encoders = {model: create_model(model, pretrained=True) for model in call.models}
    errors: dict[str, dict[str, str]] = {scan.name: {} for scan in scans}
    if not call.derivatives:
        scans = _prepared(call, chosen, scans, errors)
    with torch_threads(call.n_cpus):
        there = _embed(call, encoders, [scan for scan in scans if scan.record is not None], errors)
    for scan in scans:
        _write_quality(call, scan, errors[scan.name])
    failed = {name: "; ".join(whys.values()) for name, whys in errors.items() if whys}
    for name, why in failed.items():
        reported.fail(name, why)
    reported.asked, reported.done, reported.of_an_earlier_run = len(scans), len(scans) - len(failed), len(there)
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


def _embed(call: Call, encoders: Mapping[str, Any], scans: list[Scan], errors: dict[str, dict[str, str]]) -> set[str]:
    """Write the vectors that scans have not as they are now; returns the names of those that had one of each model.

    A scan is read once for all models that have not embedded it.
    """
    meant = {model: origin_of(encoder).digest for model, encoder in encoders.items()}
    digest_of = cache(file_sha256)
    todo: dict[tuple[str, ...], list[Scan]] = {}
    for scan in scans:
        lacking = tuple(model for model in encoders if not _is_embedded(call, scan, model, meant[model], digest_of))
        todo.setdefault(lacking, []).append(scan)
    had = {scan.name for scan in todo.pop((), [])}
    options = Options(
        device=call.device,
        num_workers=min(2, (call.n_cpus or 3) - 1),
        on_error="raise" if call.stop_on_first_crash else "skip",
        progress=call.progress,
    )
    for models, theirs in todo.items():
        for first in range(0, len(theirs), _AT_ONCE):
            part = {str(scan.record and scan.record.image): scan for scan in theirs[first : first + _AT_ONCE]}
            records = Listing(scan.record for scan in part.values() if scan.record is not None)
            tables = embed_files(records, [encoders[model] for model in models], options, in_memory=True)
            for model, table in zip(models, tables, strict=True):
                assert table.origin is not None
                for record, vector in zip(table.records, table.vectors, strict=True):
                    _write_embedding(call, part[str(record.image)], model, vector, table.origin, digest_of)
                for record, why in table.errors:
                    errors[part[str(record.image)].name][model] = why
    return had


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


def _is_embedded(call: Call, scan: Scan, model: str, meant: str, digest_of: Callable[[Path], str]) -> bool:
    path = embedding_path(call.output, scan, model)
    try:
        said = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return path.is_file() and (said["Meaning"], said["InputSHA256"]) == (meant, digest_of(_input(scan)))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_embedding(
    call: Call, scan: Scan, model: str, vector: Any, origin: Origin, digest_of: Callable[[Path], str]
) -> None:
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
            "InputSHA256": digest_of(source),
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


def _report_path(output: Path) -> Path:
    """Of the report of this call, beside those of others, on other machines too."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return output / LOGS / f"participant-{now:%Y%m%dT%H%M%S}-{secrets.token_hex(3)}.json"


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
