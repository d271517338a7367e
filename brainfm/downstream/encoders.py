"""Every encoder of the registry on the same scans: what each costs, what it says of a label, and what is left out."""

from __future__ import annotations

import fnmatch
import json
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from brainfm.downstream.account import is_test_model
from brainfm.downstream.benchmark import as_planned, benchmark, check_earlier
from brainfm.downstream.features import read_features
from brainfm.downstream.outcome import write_left_out
from brainfm.downstream.plan import Plan
from brainfm.downstream.precomputed import label_scans
from brainfm.downstream.preflight import check_packages, refusal
from brainfm.downstream.results import Candidate, Reason
from brainfm.downstream.statistics import Kind
from brainfm.downstream.task import TaskData, kind_of, make_task, task_data
from brainfm.errors import BrainfmError, LicenceError, ModelNameError, TaskError, WeightsNotFoundError
from brainfm.factory import create_model
from brainfm.files import atomic_path, check_writable, held, one_line, progress_bar, write_csv
from brainfm.forks import WITHOUT_GUARD, end_without_guard, get_context, guard_is_missing, start_server
from brainfm.manifest import Listing, ScanRecord, ScansLike, check_found, list_scans
from brainfm.models.encoder import Encoder
from brainfm.names import resolve
from brainfm.overlap import overlap_of_scans
from brainfm.pretrained import PretrainedCfg
from brainfm.registry import additions, list_models, list_pretrained, register_additions
from brainfm.system import end_with_the_parent
from brainfm.transforms import check_channels, create_transform

logger = logging.getLogger("brainfm")

_LETTERS = 1000  # of a reason
_TRIED = 10  # scans, before a contract is said to be met by none
_NOTHING = np.empty((0, 0), np.float32)
_HEAD = ("model", "weights", "width", "scans", "failed", "seconds", "gigabytes", "device", "why")


def compare_encoders(
    scans: ScansLike,
    output: str | os.PathLike[str],
    *,
    label: str = "",
    labels: Any = None,
    kind: Kind | None = None,
    covariates: Sequence[str] = (),
    positive: str = "",
    models: Sequence[str] = ("*",),
    untrained: bool = False,
    controls: bool = True,
    seeds: int = 5,
    folds: int = 0,
    harmonise: str = "",
    site: str = "",
    fairness: Sequence[str] = (),
    least_group: int = 20,
    device: str = "auto",
    refuse_overlap: bool = False,
    replace_all: bool = False,
    progress: bool = False,
) -> list[Candidate]:
    """Embed scans once by every encoder whose contract they meet, and probe all of them alike.

    The encoders are taken one after the other, each in a process of its own: none finds memory that another held, and
    one that needs more than there is ends alone. What an earlier run embedded of the same files is kept, so the same
    call goes on with one that was killed. Each volume's seconds and memory are measured as it is embedded.

    Args:
        scans: What `brainfm.embed` takes, such as a manifest or a folder of `brainfm prep`.
        output: A folder for `encoders.csv` (a row an encoder: width, cost, or why it is left out), `left_out.csv` and
            `embeddings/`; with a label also for what `benchmark` writes: a page, tables and figures, cost beside score.
        label: The column to predict; without one the encoders are not probed.
        labels: A table with that column, joined with the scans by patient or path; without one, the scans' manifest.
        kind: What the label is; None where its values leave no doubt.
        covariates: Columns that a control predicts from without an image.
        positive: Of a binary label the word that is 1.
        models: Patterns of names such as "openmind*", and names of folders and repositories (local-dir:…, hf-hub:…).
            The packaged models for tests are taken where one of their names stands here.
        untrained: Take random weights where an encoder's cannot be had. Such rows are controls, and called random.
        controls: Add `uncnn_doubleconv` and `uncnn_dwsep`, which were never trained, and covariates alone.
        seeds: Splits, each with a probe of its own; with `folds`, divisions into them.
        folds: As `Plan.folds`, and so are harmonise, site, fairness and least_group; they need a label.
        harmonise: As of `Plan`.
        site: As of `Plan`.
        fairness: As of `Plan`.
        least_group: As of `Plan`.
        device: See `brainfm.embed`.
        refuse_overlap: Leave out encoders that were pretrained on these data, by the names of their cohorts; else their
            rows are marked.
        replace_all: Replace another comparison that the output holds.
        progress: Show a progress bar.

    Returns:
        What became of each encoder, those that are left out among them.

    Raises:
        ModelNameError: No encoder has such a name.
        ScanError: The list of scans is wrong.
        TaskError: The label cannot be used.
        BrainfmError: No encoder can be had; another command is writing the output; or as of `benchmark`.

    Example:
        >>> found = compare_encoders("manifest.csv", "compared/", label="sex", models=["openmind*"])
        >>> [candidate.name for candidate in found]
    """
    end_without_guard()
    if not label and (asked := folds or harmonise or site or fairness):
        raise TaskError(f"{asked}: of which label? Say label (--label COLUMN)")
    names = _names(models, controls)
    plan = Plan(
        models=tuple(names),
        modes=("probe",),
        seeds=seeds * (folds or 1),
        folds=folds,
        harmonise=harmonise,
        site=site,
        fairness=tuple(fairness),
        least_group=least_group,
        controls=controls,
    )
    records = list_scans(scans)
    check_found(records)
    data = _labelled(records, scans, labels, label, kind, covariates, positive) if label else None
    if labels is not None and not label:
        raise TaskError("labels: which column is to be predicted? Say label (--label COLUMN)")
    wanted = Listing(data.records) if data else records
    folder = Path(output)
    (folder / "embeddings").mkdir(parents=True, exist_ok=True)
    check_writable(folder)
    if data:
        check_packages()
        data = as_planned(data, plan)
        if not replace_all:
            check_earlier(folder, [data.task.name], plan.seeds)
    with held(folder / "embeddings"):
        vectors = dict(_each(names, wanted, folder / "embeddings", untrained, device, refuse_overlap, progress))
    found = list(vectors)
    embedded = [one for one in found if one.weights]
    _write(found, folder)
    if not embedded:
        raise BrainfmError(f"none of {len(found)} encoders takes these scans here; the first: {found[0].why}")
    if data:
        data = replace(
            data,
            embeddings={one.model: vectors[one] for one in embedded},
            made_by={one.model: one.model for one in embedded if one.weights == "trained"},
        )
        benchmark(
            [data],
            replace(plan, models=tuple(data.embeddings)),
            folder,
            candidates=found,
            replace_all=replace_all,
            progress=progress,
        )
    return found


def _labelled(
    records: Listing,
    scans: ScansLike,
    labels: Any,
    label: str,
    kind: Kind | None,
    covariates: Sequence[str],
    positive: str,
) -> TaskData:
    if labels is not None:
        return label_scans(labels, records, label=label, kind=kind, covariates=covariates, positive=positive)
    where = scans if isinstance(scans, str | os.PathLike) else "the scans"
    if label not in records[0].extra:
        raise TaskError(
            f"{where}: there is no column {label!r}; it has {', '.join(records[0].extra) or 'no labels'}. A table of "
            "labels beside the scans is given as labels (--labels TABLE)"
        )
    kind = kind or kind_of([record.extra.get(label, "") for record in records], label)
    return task_data(make_task(label, kind, covariates, positive), records, where)


def _names(patterns: Sequence[str], controls: bool) -> list[str]:
    """The encoders to look at: weights by their full names, and architectures without any; the controls last."""
    places = [name for name in patterns if ":" in name]
    wanted = [pattern for pattern in patterns if ":" not in pattern]
    published = list_pretrained()
    known = sorted({*published, *(set(list_models()) - {name.partition(".")[0] for name in published})})
    for pattern in wanted:
        if not any(_fits(name, pattern) for name in known):
            resolve(pattern)  # says which names are near
            raise ModelNameError(f"no model matches {pattern!r}; 'brainfm list' names them all")
    drawn = [name for name in known if resolve(name).cfg.is_drawn]
    chosen = [name for name in known if any(_fits(name, pattern) for pattern in wanted) and name not in drawn]
    chosen = [name for name in chosen if not is_test_model(resolve(name).cfg) or _is_named(name, wanted)]
    found = [*dict.fromkeys(places), *chosen, *(drawn if controls else [])]
    if not found:
        raise ModelNameError(f"{', '.join(patterns)}: untrained controls alone, and without controls nothing is left")
    return found


def _fits(name: str, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(one, pattern) for one in (name, name.partition(".")[0]))


def _is_named(name: str, patterns: Sequence[str]) -> bool:
    return any(_fits(name, pattern) for pattern in patterns if pattern.startswith("test_"))


# --- One after the other --------------------------------------------------------------------------


def _each(
    names: Sequence[str],
    records: Listing,
    folder: Path,
    untrained: bool,
    device: str,
    refuse_overlap: bool,
    progress: bool,
) -> Iterator[tuple[Candidate, NDArray[np.float32]]]:
    """What becomes of each encoder, with its embeddings. A contract that the scans do not meet is tried once."""
    unmet: dict[Any, Candidate] = {}
    random = set[str]()
    with progress_bar(total=len(names), unit="encoder", doing="comparing", shown=progress) as bar:
        for name in names:
            bar.set_postfix_str(name)
            cfg = resolve(name).cfg
            contract = json.dumps(cfg.input_spec.to_dict() if cfg.input_spec else None)
            if refuse_overlap and (overlaps := overlap_of_scans(cfg, records)):
                found, vectors = _left_out(name, "overlap", str(overlaps[0])), _NOTHING
            elif contract in unmet:
                found, vectors = replace(unmet[contract], model=name), _NOTHING
            else:
                may_be_random = untrained and cfg.architecture not in random
                found, vectors = _alone(name, records, folder, may_be_random, device)
            if found.reason == "contract":
                unmet[contract] = found
            if found.weights == "random":
                random.add(cfg.architecture)
            bar.update()
            logger.debug("%s: %s", name, found.why or f"{found.seconds} s, {found.gigabytes} GB")
            yield found, vectors


def _alone(
    name: str, records: Listing, folder: Path, untrained: bool, device: str
) -> tuple[Candidate, NDArray[np.float32]]:
    """What becomes of an encoder in a process of its own."""
    answer = folder / f"{_plain(name)}.answer.npz"
    answer.unlink(missing_ok=True)
    start_server([__name__])
    work = (name, list(records), folder, untrained, device, additions(), torch.get_num_threads(), answer)
    process = get_context().Process(target=_work, args=(*work, dict(os.environ)), daemon=True)
    process.start()
    try:
        process.join()
    finally:
        process.kill()
        process.join()
    try:
        with np.load(answer, allow_pickle=False) as said:
            return Candidate.from_dict(json.loads(str(said["found"]))), said["vectors"]
    except FileNotFoundError:
        if process.exitcode == WITHOUT_GUARD:
            raise BrainfmError(guard_is_missing("compare_encoders", "encoder")) from None
        return _left_out(name, *_death(process.exitcode)), _NOTHING
    finally:
        answer.unlink(missing_ok=True)


def _death(code: int) -> tuple[Reason, str]:
    """Why a process that gave no answer ended, and what to do."""
    if code == -9:
        return (
            "memory",
            "its process was killed (signal 9), as systems do that run out of memory: compare it on a machine with "
            "more, or leave it out (--models)",
        )
    if code < 0:
        return "error", f"its process crashed ({signal.strsignal(-code) or -code}); run it again"
    return "error", f"its process ended with exit code {code} and said no more; 'brainfm embed --model' shows why"


def _work(
    name: str,
    records: list[ScanRecord],
    folder: Path,
    untrained: bool,
    device: str,
    added: Any,
    threads: int,
    answer: Path,
    environment: dict[str, str],
) -> None:
    """The process of an encoder."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    end_with_the_parent()
    os.environ.clear()  # that of the process that forks is from when it was started
    os.environ |= environment
    torch.set_num_threads(threads)
    vectors = _NOTHING
    try:
        register_additions(added)
        found, vectors = _embedded(name, Listing(records), folder, untrained, device)
    except _LeftOutError as error:
        found = _left_out(name, error.reason, str(error))
    except MemoryError:
        found = _left_out(name, "memory", "there is too little memory here; compare it on a machine with more")
    except BrainfmError as error:
        found = _left_out(name, "error", one_line(error, _LETTERS))
    except Exception as error:  # one encoder never stops the rest
        memory = "memory" in str(error) and isinstance(error, RuntimeError)
        found = _left_out(name, "memory" if memory else "error", f"{type(error).__name__}: {one_line(error)}")
    with atomic_path(answer) as temporary, temporary.open("wb") as file:
        np.savez(file, found=json.dumps(found.to_dict()), vectors=vectors)


class _LeftOutError(Exception):
    """Why an encoder cannot be had here."""

    def __init__(self, reason: Reason, why: object) -> None:
        super().__init__(one_line(why, _LETTERS) if isinstance(why, Exception) else why)
        self.reason = reason


def _left_out(name: str, reason: Reason, why: str) -> Candidate:
    return Candidate(model=name, reason=reason, why=why)


def _embedded(
    name: str, records: Listing, folder: Path, untrained: bool, device: str
) -> tuple[Candidate, NDArray[np.float32]]:
    """An encoder's embeddings of the scans; its contract is tried before its weights are fetched."""
    cfg = resolve(name).cfg
    _check_contract(cfg, records)
    model, why = _model(name, cfg, untrained)
    if why:
        name = cfg.architecture
    seen = f"{name}.untrained0" if why else name  # a benchmark's name for it
    cost = folder / f"{_plain(seen)}.cost.json"
    features = read_features(records, model, folder, seen, device=device, report=cost)
    if len(features.failed) == len(records):
        raise _LeftOutError("error", f"no scan can be embedded; the first: {next(iter(features.failed.values()))}")
    said = json.loads(cost.read_text(encoding="utf-8")) if cost.is_file() else {}
    memory = said.get("peak_gpu_memory") or said.get("peak_memory")
    found = Candidate(
        model=name,
        weights="random" if why else "control" if cfg.is_drawn else "trained",
        width=model.num_features,
        scans=len(records) - len(features.failed),
        failed=len(features.failed),
        seconds=said.get("seconds_per_scan"),
        gigabytes=memory and memory / 1e9,
        device=said.get("device", ""),
        why=why,
    )
    return found, features.vectors


def _check_contract(cfg: PretrainedCfg, records: Listing) -> None:
    if cfg.input_spec is None:
        raise _LeftOutError("contract", "nothing is known of its input, so no scan can be prepared for it")
    try:
        transform = create_transform(cfg)
        check_channels(cfg, transform.spec)
    except ModelNameError as error:
        raise _LeftOutError("contract", error) from error
    if reason := refusal(records[:_TRIED], transform):
        raise _LeftOutError("contract", reason)


def _model(name: str, cfg: PretrainedCfg, untrained: bool) -> tuple[Encoder, str]:
    """An encoder with its weights and "", or with random ones and why its own cannot be had."""
    try:
        return create_model(name, pretrained=True), ""
    except (WeightsNotFoundError, LicenceError) as error:
        if not untrained:
            raise _LeftOutError("licence" if isinstance(error, LicenceError) else "weights", error) from error
        torch.manual_seed(0)  # as a benchmark's untrained control has them by the first seed
        model = create_model(cfg.architecture)
        model.pretrained_cfg = replace(cfg, tag="untrained", cohorts=())  # in the table of its embeddings too
        return model, one_line(error, _LETTERS)


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "_-." else "-" for letter in name)


# --- What is written ------------------------------------------------------------------------------


def _write(found: Sequence[Candidate], folder: Path) -> None:
    """`encoders.csv`, and `left_out.csv` as an evaluation has it, which adds the scans."""
    rows = [[_cell(getattr(one, name)) for name in _HEAD] for one in found]
    write_csv(folder / "encoders.csv", [_HEAD, *rows])
    write_left_out(folder, found)


def _cell(value: Any) -> Any:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else value
