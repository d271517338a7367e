"""What an evaluation leaves: splits, tables, tests of rows against controls, and the page."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from brainfm.downstream.account import class_patients, few, unused
from brainfm.downstream.certainty import columns_of, write_certainty
from brainfm.downstream.fairness import metrics_by_group, write_fairness
from brainfm.downstream.grid import Job
from brainfm.downstream.plan import RESAMPLES, Plan
from brainfm.downstream.report import write_report
from brainfm.downstream.results import Candidate, Evaluation, PairedTest, Row, Unused
from brainfm.downstream.split import save_split
from brainfm.downstream.statistics import (
    PairedDifference,
    ResampledTest,
    corrected_resampled_t_test,
    holm,
    paired_bootstrap_over_runs,
    patients_needed,
)
from brainfm.downstream.task import Task, TaskData
from brainfm.downstream.wording import too_small
from brainfm.files import write_csv, write_json

logger = logging.getLogger("brainfm")

RESAMPLED = "corrected resampled t-test"

_SIZES = ("n_train", "n_test", "trained_parameters", "parameters")


def keep_splits(data: Sequence[TaskData], plan: Plan, output: Path) -> None:
    """Write each task's split, or that of each seed."""
    for one in data:
        for seed in range(1 if one.given_split is not None else plan.seeds):
            path = output / "splits" / f"{one.task.name}.{seed}.csv"
            if one.embeddings:  # which need not say where their scans are
                named = [
                    (r.patient_id, r.scan_id, r.name, s) for r, s in zip(one.records, one.split(seed), strict=True)
                ]
                write_csv(path, [("patient_id", "scan_id", "image_path", "split"), *named])
            else:
                save_split(path, one.records, one.split(seed))


def write_results(results: Mapping[Job, dict[str, Any]], evaluation: Evaluation, output: Path, plan: Plan) -> Path:
    """Everything but the runs themselves; gives the page."""
    _write_tables(results, output)
    _write_sites(results, output / "harmonisation.csv")
    write_certainty(output, results, RESAMPLES)
    write_fairness(output, list(metrics_by_group(results, plan.fairness, plan.least_group, RESAMPLES)))
    columns, left_out, warnings = [], list(evaluation.left_out), list(evaluation.warnings)
    for column in evaluation.tasks:
        mine = {job: result for job, result in results.items() if job.data.task.name == column.name}
        data = next(iter(mine)).data
        failed: dict[str, dict[int, str]] = {}
        for job, result in mine.items():
            if job.row.mode != "covariates":
                failed.setdefault(job.row.key, {}).update({int(n): why for n, why in result["left_out"].items()})
        of_this = list(unused(data, failed))
        if broken := list(dict.fromkeys(one.scan for one in of_this if one.failed)):
            asked = len(data.records) + sum(one.failed for one in data.left_out)
            warnings.append(
                f"{column.title}: {len(broken)} of {asked} scans were left out by some row or all, because they are "
                f"not there or cannot be read: {few(broken)}. See 'Left out'."
            )
        counts = [_test_patients(job, result) for job, result in mine.items() if job.fraction == 1]
        small = too_small(column, [min(each) for each in zip(*counts, strict=True)])
        if small:
            warnings.append(
                f"{column.title}: {small}. Intervals, standard deviations and tests of so few mean nothing: none is "
                "bold, and no gain is claimed."
            )
        columns.append(replace(column, too_small=small))
        left_out += of_this
    for text in warnings:
        logger.warning("%s", text)
    write_left_out(output, evaluation.candidates, left_out)
    tests = _adjusted(list(_tests(results, evaluation)))
    evaluation = replace(
        evaluation, tasks=tuple(columns), tests=tests, warnings=tuple(warnings), left_out=tuple(left_out)
    )
    write_json(output / "grid.json", evaluation.to_dict())
    return write_report(output)


def write_left_out(output: Path, candidates: Sequence[Candidate], scans: Sequence[Unused] = ()) -> None:
    """`left_out.csv`: encoders of a comparison that are left out (of no task and no scan), then scans."""
    rows = [("", one.model, "", f"{one.reason}: {one.why}", 0) for one in candidates if not one.weights]
    rows += [(one.task, one.row, one.scan, one.why, int(one.failed)) for one in scans]
    write_csv(output / "left_out.csv", [("task", "row", "scan", "why", "failed"), *rows])


def _test_patients(job: Job, result: Mapping[str, Any]) -> list[int]:
    """Patients of each class in the test part, or all of a regression's."""
    return class_patients(job.data, result["rows"]) or [len(set(result["patients"]))]


def _write_tables(results: Mapping[Job, dict[str, Any]], output: Path) -> None:
    scores, guesses = [], []
    for job, result in results.items():
        key = [job.data.task.name, job.row.model, job.row.mode, f"{job.fraction:g}", job.seed]
        for name, numbers in result["metrics"].items():
            sizes = [result[name] for name in _SIZES[:2]] + [result.get(name) for name in _SIZES[2:]]  # new ones
            scores.append([*key, name, *map(_text, numbers), *sizes, _positive(job.data)])
        cases = zip(result["patients"], result["labels"], result["predictions"], columns_of(job, result), strict=True)
        for patient, label, guess, sure in cases:
            shown = guess[int(label)] if isinstance(guess, list) else guess
            guesses.append([*key, patient, f"{label:.9g}", f"{shown:.9g}", _positive(job.data), *sure])
    key_names = ["task", "model", "mode", "fraction", "seed"]
    columns = [*key_names, "metric", "value", "ci_low", "ci_high", *_SIZES, "positive"]
    write_csv(output / "results.csv", [columns, *scores])
    head = [*key_names, "patient_id", "label", "prediction", "positive"]
    head += ["low", "high", "set", "unlike", "out_of_distribution"]
    write_csv(output / "predictions.csv", [head, *guesses])


def _write_sites(results: Mapping[Job, dict[str, Any]], path: Path) -> None:
    """How well sites are told apart in embeddings, as they are and harmonised; no file where none were."""
    path.unlink(missing_ok=True)
    rows = []
    for job, result in results.items():
        if found := result.get("sites"):
            probes = [number for when in ("before", "after") for number in found[when] or (None,) * 3]
            key = (job.data.task.name, job.row.model, job.row.mode, f"{job.fraction:g}", job.seed)
            left = [found["left"][part] for part in ("train", "test")]
            rows.append([*key, found["sites"], *map(_text, [found["chance"], *probes]), *left, result["n_test"]])
    if rows:
        probes = [f"site_{when}{end}" for when in ("before", "after") for end in ("", "_ci_low", "_ci_high")]
        left = ["left_as_they_are_train", "left_as_they_are_test", "n_test"]
        write_csv(path, [["task", "model", "mode", "fraction", "seed", "sites", "chance", *probes, *left], *rows])


def _positive(data: TaskData) -> str:
    """The word of the class that is 1 in a binary task."""
    return data.classes[1] if data.task.kind == "binary" else ""


def _tests(results: Mapping[Job, dict[str, Any]], evaluation: Evaluation) -> Iterator[PairedTest]:
    """Each row against each control and each trained from scratch, and a harmonised one against the plain one."""
    found: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for job, result in results.items():
        if job.fraction == 1:
            found.setdefault((job.data.task.name, job.row.key), {})[job.seed] = result
    baselines = [row for row in evaluation.rows if row.mode == "scratch"]
    for task in {job.data.task.name: job.data.task for job in results}.values():
        for one in evaluation.rows:
            plain = [row for row in evaluation.rows if one.harmonised and row.key == f"{one.model}/{one.base}"]
            for other in [*plain, *([] if one.mode == "scratch" else baselines), *evaluation.controls]:
                if (task.name, one.key) in found and (task.name, other.key) in found:
                    pair = found[task.name, one.key], found[task.name, other.key]
                    yield _paired(task, one, other, *pair)
                    if (split := _resampled(task, one, other, *pair)) is not None:
                        yield split


def _adjusted(tests: Sequence[PairedTest]) -> tuple[PairedTest, ...]:
    """The tests with p-values that are adjusted over all of the same name."""
    adjusted: dict[int, float | None] = {}
    for name in dict.fromkeys(test.test for test in tests):
        own = [n for n, test in enumerate(tests) if test.test == name]
        adjusted.update(zip(own, holm([tests[n].p_value for n in own]), strict=True))
    return tuple(replace(test, p_holm=adjusted[n]) for n, test in enumerate(tests))


def _resampled(
    task: Task, one: Row, other: Row, first: Mapping[int, Mapping[str, Any]], second: Mapping[int, Mapping[str, Any]]
) -> PairedTest | None:
    """The corrected resampled t-test over the seeds; None where there are no two, or they share one split."""
    seeds = sorted(first.keys() & second.keys())
    if len(seeds) < 2 or len({tuple(first[seed]["rows"]) for seed in seeds}) < 2:
        return None
    values = np.array(
        [[result[seed]["metrics"][task.metric][0] for seed in seeds] for result in (first, second)], dtype=np.float64
    )
    if not np.isfinite(values).all():
        return None
    ratio = float(np.mean([first[seed]["n_test"] / first[seed]["n_train"] for seed in seeds]))
    found = corrected_resampled_t_test(values[0] - values[1], ratio)
    return _tested(task, one, other, RESAMPLED, found)


def _tested(task: Task, one: Row, other: Row, name: str, found: PairedDifference | ResampledTest) -> PairedTest:
    difference, low, high, p = map(_finite, (found.difference, found.ci_low, found.ci_high, found.p_value))
    return PairedTest(task.name, one.key, other.key, name, difference, low, high, p)


def _paired(
    task: Task, one: Row, other: Row, first: Mapping[int, Mapping[str, Any]], second: Mapping[int, Mapping[str, Any]]
) -> PairedTest:
    runs = []
    for seed in sorted(first.keys() & second.keys()):
        pair = first[seed], second[seed]
        both = set(pair[0]["rows"]) & set(pair[1]["rows"])  # a scan that one could not read is left out
        places = [[n for n, row in enumerate(result["rows"]) if row in both] for result in pair]
        labels, patients = (np.array(pair[0][name])[places[0]] for name in ("labels", "patients"))
        ours, theirs = (np.array(r["predictions"])[place] for r, place in zip(pair, places, strict=True))
        runs.append((labels, ours, theirs, patients))
    found = paired_bootstrap_over_runs(runs, task.kind, task.metric, n=RESAMPLES)
    people = len({patient for *_, patients in runs for patient in patients.tolist()})
    needed = patients_needed(found.difference, found.standard_error, people)
    return replace(_tested(task, one, other, "paired bootstrap", found), patients=people, patients_needed=needed)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _text(value: float | None) -> str:
    return "" if value is None or not np.isfinite(value) else f"{value:.9g}"
