"""Sections of a benchmark's page that other commands fill: planted changes, patients over time, segmentation."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from test_report import TASKS, benchmark, tables

from brainfm.downstream import progression, recovery, segmentation
from brainfm.manifest import ScanRecord
from brainfm.table import Embeddings


@pytest.fixture
def results(tmp_path, no_figures):
    """A folder of a benchmark."""
    return benchmark(tmp_path / "results", TASKS[3:], patients=12, seeds=2)


def rows(path):
    return list(csv.DictReader(path.open(encoding="utf-8")))


def table_of(results, first):
    """The table of the page in Markdown whose second head is this."""
    return next(one for one in tables((results / "table.md").read_text()) if one[0][1] == first)


def test_planted_changes_are_on_the_page_of_the_results_that_they_stand_in(run, results, monkeypatch):
    """Embeddings are drawn: along one direction as large as the change, and in every repeat noise in all of them."""
    draw = np.random.default_rng(0)
    clean = draw.standard_normal((6, 8))
    sizes = recovery.CHANGES["atrophy"].sizes
    grown = np.stack([clean + 0.03 * size * np.eye(8)[0] for size in sizes], axis=1)
    repeats = clean[:, None] + 0.1 * draw.standard_normal((6, 4, 8)) * (np.arange(8) > 0)
    series = recovery._Series([f"p{n}" for n in range(6)], clean[:, 0], clean, repeats, {"atrophy": grown})
    monkeypatch.setattr(recovery, "_embedded", lambda *_: series)
    given = ("--phantoms", 4, "--change", "atrophy", "--model", "test_resnet_3d")
    done = run("recovery", *given, "-o", results / "recovery")
    assert done.code == 0, done.said
    assert "on the page of these results too" in done.said
    [verdict] = rows(results / "recovery" / "verdicts.csv")
    assert verdict["seen_from"] == ""  # 0.03 · 8 is below √7 · 0.1, but
    assert float(verdict["read_from"]) <= 2  # a probe looks where nothing else moves
    [_, line] = table_of(results, "Change")
    assert line == [
        "test_resnet_3d",
        "atrophy (% of the tissue)",
        "100 % of 6",
        "1.00",
        "–",
        "1.00",
        verdict["read_from"],
    ]
    page = (results / "index.html").read_text()
    assert "<h2>Planted changes</h2>" in page
    assert 'alt="Distance from the clean scan by size of the change' in page
    run("recovery", *given, "-o", results.parent / "recovery")  # elsewhere: no page is there


def test_patients_over_time_are_on_the_page(run, results, tmp_path, monkeypatch):
    monkeypatch.setattr(progression, "DIVISIONS", 1)
    monkeypatch.setattr(progression, "_RESAMPLES", 20)
    draw, records, vectors, lines = np.random.default_rng(0), [], [], ["patient_id,scan_id,years,score"]
    for patient in range(20):
        own, slope = draw.standard_normal(3), draw.standard_normal()
        for scan, years in enumerate((0.0, 0.1, 2.0)):
            records.append(ScanRecord("", patient_id=f"p{patient}", scan_id=f"s{scan}"))
            vectors.append(own + [slope * years, 0, 0] + 0.1 * draw.standard_normal(3))
            lines.append(f"p{patient},s{scan},{years},{slope * years:.4f}")
    for name, noise in (("good", 0), ("worse", 1)):
        table = np.array(vectors) + noise * draw.standard_normal((60, 3))
        Embeddings(table.astype(np.float32), records).save(tmp_path / f"{name}.csv")
    (tmp_path / "visits.csv").write_text("\n".join(lines))
    given = ("--embeddings", tmp_path / "good.csv", tmp_path / "worse.csv", "--time", "years", "--slope", "score")
    done = run("longitudinal", tmp_path / "visits.csv", *given, "-o", results / "longitudinal")
    assert done.code == 0, done.said
    reliable = rows(results / "longitudinal" / "reliability.csv")
    shown = table_of(results, "Pairs")
    assert [line[:2] for line in shown[1:]] == [["good", "20"], ["worse", "20"]]
    for one, line in zip(reliable, shown[1:], strict=True):
        assert float(line[2]) == pytest.approx(float(one["icc_agreement"]), abs=6e-4)
    _, group, *foretold = table_of(results, "From")
    assert group[:2] == ["*slope of score*", ""]  # said once, over the lines
    assert {line[2] for line in foretold} == {"r2", "mae", "pearson"}
    assert "<h2>Patients over time</h2>" in (results / "index.html").read_text()
    assert len(table_of(results, "First")) == 5  # a line for each set of features of the two models


def test_segmentation_is_on_the_page_with_its_controls(run, results, monkeypatch):
    cases = [segmentation._Case(f"p{n}", None, None) for n in range(4)]
    monkeypatch.setattr(segmentation, "_cases", lambda *_: cases)
    monkeypatch.setattr(segmentation, "_cross_validated", lambda *_: [{1: 0.5, 2: 0.75}] * 4)
    done = run("segment", "--phantoms", 4, "--model", "test_resnet_3d", "-o", results / "segmentation")
    assert done.code == 0, done.said
    head, *lines = table_of(results, "CSF")
    assert head == ["Features", "CSF", "grey matter"]
    kinds = ("pretrained", "untrained", "intensity")
    assert [line[0] for line in lines] == [f"test_resnet_3d, {kind}" for kind in kinds]
    assert lines[0][1:] == ["0.500 [0.500, 0.500]", "0.750 [0.750, 0.750]"]


def test_table_that_is_none_is_named(run, results):
    (results / "segmentation").mkdir()
    (results / "segmentation" / "dice.csv").write_bytes(b"\xff\xfe\x00")
    from brainfm.downstream.report import write_report
    from brainfm.errors import BrainfmError

    with pytest.raises(BrainfmError, match=r"dice.csv: not a table that brainfm wrote"):
        write_report(results)
