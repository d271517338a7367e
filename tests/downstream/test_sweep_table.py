"""A sweep's variants beside their scores and controls, by the command line."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from click.testing import CliRunner

from brainfm.cli.main import main
from brainfm.downstream.sweep import read_evaluated
from brainfm.errors import TaskError

pytestmark = pytest.mark.usefixtures("few_strengths")
FIELDS = ["epochs=1", "batch_size=5", "workers=0", "precision=float32", "device=cpu", "input_size=[16,16,16]"]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def pretrain(phantoms, output, *arguments):
    named = [f"manifest={phantoms}", f"output={output}"]
    done = CliRunner().invoke(main, ["pretrain", "test_resnet_3d", *named, *FIELDS, *arguments])
    return done.exit_code, done.output


@pytest.fixture(scope="module")
def swept(phantoms, tmp_path_factory):
    """The folder of a sweep over two fractions of the patients, evaluated."""
    output = tmp_path_factory.mktemp("sweep") / "out"
    code, said = pretrain(phantoms, output, "patients=0.25,1.0", f"evaluate=phantom_sex:{phantoms}", "--seeds", "1")
    assert code == 0, said
    return output


def test_table_joins_every_variant_with_its_scores_and_the_controls(swept):
    rows = rows_of(swept / "sweep.csv")
    assert [row["variant"] for row in rows[:2]] == ["patients=0.25", "patients=1.0"]
    assert [row["n_patients"] for row in rows[:2]] == ["5", "20"]
    assert rows[2]["variant"] == "test_resnet_3d as in patients=0.25, untrained, linear probe"  # on views of its size
    assert all(row["steps"] == "" for row in rows[2:])
    scores = [one for one in rows_of(swept / "evaluation" / "results.csv") if one["metric"] == "auc"]
    for row in rows[:2]:
        own = [float(one["value"]) for one in scores if f"{row['variant']}/export" in one["model"]]
        assert float(row["phantom_sex auc"]) == pytest.approx(*own)
        assert row["phantom_sex auc sd"] == "nan"  # of one seed
        assert float(row["phantom_sex auc low"]) <= float(row["phantom_sex auc"]) <= float(row["phantom_sex auc high"])
    untrained = [float(one["value"]) for one in scores if one["mode"] == "untrained"]
    assert float(rows[2]["phantom_sex auc"]) == pytest.approx(*untrained)


def test_figure_of_the_scores_is_written(swept):
    assert (swept / "sweep_phantom_sex.png").stat().st_size > 5000
    assert b"<svg" in (swept / "sweep_phantom_sex.svg").read_bytes()


def test_same_command_does_nothing_twice(swept, phantoms):
    kept = [*swept.rglob("log.jsonl"), *swept.rglob("config.json"), *(swept / "evaluation" / "runs").iterdir()]
    before = [path.stat().st_mtime_ns for path in kept]
    table = (swept / "sweep.csv").read_bytes()
    assert len(kept) > 6
    code, _ = pretrain(phantoms, swept, "patients=0.25,1.0", f"evaluate=phantom_sex:{phantoms}", "--seeds", "1")
    assert code == 0
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert (swept / "sweep.csv").read_bytes() == table


def test_task_is_read_before_anything_is_trained(phantoms, tmp_path):
    code, said = pretrain(phantoms, tmp_path / "out", "sweep=seed:0,1", "evaluate=phantom_sexes")
    assert code == 1
    assert "did you mean 'phantom_sex'" in said
    assert not (tmp_path / "out").exists()


def test_tasks_manifest_is_given_or_beside_its_file(phantoms, tmp_path):
    task = phantoms.parent / "own.yaml"
    task.write_text(f"name: own\nlabel: age\nkind: regression\nmanifest: {phantoms.name}\n")
    assert len(read_evaluated(str(task)).records) == len(read_evaluated(f"phantom_age:{phantoms}").records) == 20
    with pytest.raises(TaskError):
        read_evaluated("phantom_age")
