"""probe, finetune, benchmark: what they say, how they end, and one at a time on an output."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from brainfm.downstream import finetuning
from brainfm.downstream.plan import MODES
from brainfm.files import held
from brainfm.manifest import ScanRecord
from brainfm.phantom import make_cohort
from brainfm.report import read_report
from brainfm.table import Embeddings, Origin

PEOPLE = 24
ORIGIN = Origin(model="test_resnet_3d.phantoms", weights="0", contract=None, readout={}, dtype="float32")


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """A manifest of 12 phantoms at 4 mm."""
    return make_cohort(12, tmp_path_factory.mktemp("scans"), spacing=4.0, seed=3)


@pytest.fixture
def table(tmp_path):
    """Labels of 24 patients, and embeddings that say the label, of all of them but one."""
    with (tmp_path / "participants.tsv").open("w", newline="") as file:
        rows = [[f"sub-{n:02}", "MF"[n % 2], 20 + n] for n in range(PEOPLE)]
        csv.writer(file, delimiter="\t").writerows([["participant_id", "sex", "age"], *rows])
    vectors = np.random.default_rng(0).standard_normal((PEOPLE - 1, 4)).astype(np.float32)
    vectors[:, 0] = 3 * (np.arange(PEOPLE - 1) % 2)
    records = [ScanRecord(f"{n}.nii.gz", None, f"sub-{n:02}") for n in range(PEOPLE - 1)]
    Embeddings(vectors, records, origin=ORIGIN).save(tmp_path / "embeddings.csv")
    return tmp_path


def of_table(folder, *more):
    fixed = ("--label", "sex", "--embeddings", folder / "embeddings.csv", "-o", folder / "out")
    return ("probe", folder / "participants.tsv", *fixed, *more)


def test_probe_takes_embeddings_without_a_model_and_says_what_it_did(run, table):
    result = run(*of_table(table, "--seeds", 2))
    assert result.code == 0, result.err
    whole = (table / "out" / "table.md").read_text()
    for text in (
        "the positive class, 1, is 'M' (12 scans), and 0 is 'F' (11 scans)",
        "no embedding of 1 rows: sub-23",
        "| training | ",
        "| 1.000 ± 0.000 |",  # and not in bold
    ):
        assert text in whole, text
    said = "\n".join(result.err)
    assert said.count("test patients of class F, fewer than 10") == said.count("no brain encoder") == 1
    progress, _, head, _, under, row, *_, last = result.out.splitlines()
    assert progress == "All 2 runs are in."
    assert row.split("  ")[0] == "embeddings.csv (test_resnet_3d.phantoms), linear probe"  # as no Markdown has it
    places = [head.index("sex: AUC ↑"), row.index("1.000 ± 0.000"), under.index("  ") + 2]
    assert len(set(places)) == 1  # columns stand under their titles
    assert last == f"{table / 'out' / 'index.html'}: the page with all tables and figures"
    assert "\\" not in result.out
    assert "##" not in result.out
    with (table / "out" / "results.csv").open(newline="") as file:
        assert {row["positive"] for row in csv.DictReader(file)} == {"M"}


def test_probe_takes_a_tasks_file_and_a_positive_class(run, table):
    (table / "mine.yaml").write_text("label: sex\nkind: binary\npositive: F\nmanifest: participants.tsv\n")
    fixed = ("--embeddings", table / "embeddings.csv", "-o", table / "out", "--seeds", 1)
    result = run("probe", table / "mine.yaml", *fixed)
    assert result.code == 0, result.err
    assert "1, is 'F' (11 scans)" in (table / "out" / "table.md").read_text()
    assert run("probe", table / "mine.yaml", *fixed, "--label", "age").code == 1


def test_probe_needs_embeddings_or_models_and_a_label(run, table):
    neither = run("probe", table / "participants.tsv", "--label", "sex", "-o", table / "out")
    assert (neither.code, neither.err[-1][:40]) == (1, "BrainfmError: give --embeddings TABLE, w")
    fixed = ("--embeddings", table / "embeddings.csv", "-o", table / "out")
    unlabelled = run("probe", table / "participants.tsv", *fixed)
    assert "Say --label COLUMN; it has participant_id, sex, age" in unlabelled.err[-1]
    assert not (table / "out").exists()


def test_second_evaluation_in_an_output_is_refused_or_replaces_all(run, table):
    assert run(*of_table(table, "--seeds", 1)).code == 0
    age = [str(part) if part != "sex" else "age" for part in of_table(table, "--seeds", 1)]
    refused = run(*age)
    assert refused.code == 1
    assert "out holds another evaluation, of which sex would be lost; name another output" in refused.err[-1]
    replaced = run(*age, "--replace")
    assert replaced.code == 0
    assert any("the evaluation in it is replaced, all of it" in line for line in replaced.err)
    assert not list((table / "out" / "figures").glob("sex_*"))


def test_scans_that_are_not_there_are_named_and_the_exit_code_is_1(run, phantoms, tmp_path):
    lines = phantoms.read_text().splitlines()
    head, rows = (
        lines[0],
        [f"{phantoms.parent}/{line}".replace(",sub-", f",{phantoms.parent}/sub-", 1) for line in lines[1:]],
    )
    gone = "/nowhere/a.nii.gz,," + rows[0].split(",", 2)[2]
    (tmp_path / "mine.csv").write_text("\n".join([head, gone, *rows[1:]]))
    fixed = ("--models", "test_vit_3d", "--seeds", 1, "--no-controls", "-o", tmp_path / "out")
    result = run("probe", tmp_path / "mine.csv", "--label", "age", "--kind", "regression", *fixed)
    assert result.code == 1
    assert "1 scans were left out; see" in result.err[-1]
    whole = (tmp_path / "out" / "table.md").read_text()
    assert "1 of 12 scans were left out" in whole
    assert "/nowhere/a.nii.gz" in (tmp_path / "out" / "left_out.csv").read_text()
    assert "11 scans of 11 patients" in whole


def commands(manifest, output):
    own = ("--label", "sex", "--models", "test_vit_3d", "-o", output)
    grid = ("--manifest", manifest, "--models", "test_vit_3d", "-o", output)
    return {
        "probe": ("probe", manifest, *own),
        "finetune": ("finetune", manifest, *own, "--no-controls", "--epochs-scale", "0.02", "--set", "workers=0"),
        "benchmark": ("benchmark", "phantom_sex", *grid),
    }


@pytest.mark.parametrize("name", ["probe", "finetune", "benchmark"])
def test_second_command_on_an_output_is_refused_at_once(name, run, phantoms, tmp_path, monkeypatch):
    monkeypatch.setattr("brainfm.downstream.benchmark.run_job", lambda *_: pytest.fail("it ran"))
    (tmp_path / "out").mkdir()
    with held(tmp_path / "out"):
        result = run(*commands(phantoms, tmp_path / "out")[name])
    assert result.code == 1
    assert f"process {os.getpid()} on" in result.err[-1]
    assert "is writing it; wait until that has ended, or name another output" in result.err[-1]
    assert list((tmp_path / "out").iterdir()) == []


def test_second_probe_of_embeddings_on_an_output_is_refused_at_once(run, table):
    (table / "out").mkdir()
    with held(table / "out"):
        result = run(*of_table(table))
    assert result.code == 1
    assert f"process {os.getpid()} on" in result.err[-1]


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is another thing there")
def test_ctrl_c_in_a_probe_is_one_line_and_the_same_command_goes_on(run, table):
    command = of_table(table, "--seeds", 6)
    line = [sys.executable, "-m", "brainfm", *map(str, command)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 900
    while not list((table / "out").glob("runs/[!.]*.json")) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=900)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("interrupted; what is finished is kept, and the same command goes on")
    ended = run(*command)
    assert ended.code == 0, ended.err
    assert any("of 6 runs are there from before and are kept" in line for line in ended.err)
    assert "All 6 runs are in." in ended.out


@pytest.mark.parametrize("name", ["finetune", "benchmark"])
def test_ctrl_c_in_a_training_is_exit_code_130_and_the_same_command_goes_on(name, run, phantoms, tmp_path, monkeypatch):
    real = finetuning._Supervised.end_epoch
    epochs = []

    def interrupted(self, group):
        epochs.append(1)
        if len(epochs) == 1:
            signal.raise_signal(signal.SIGINT)
        return real(self, group)

    monkeypatch.setattr(finetuning._Supervised, "end_epoch", interrupted)
    scaled = ("--seeds", 1, "--epochs-scale", "0.02", "--no-controls", "--set", "workers=0", "device=cpu")
    command = commands(phantoms, tmp_path / "out")[name]
    command = (*command[: command.index("-o") + 2], *scaled, *(("--modes", "finetune") if name == "benchmark" else ()))
    command += ("--report", tmp_path / "run.json")
    stopped = run(*command)
    assert stopped.code == 130
    said = read_report(tmp_path / "run.json")
    assert (said.command, said.state, said.unit, said.asked, said.done) == (
        *(f"brainfm {name}", "interrupted", "run", 1, 0),
    )
    assert stopped.err[-1].startswith("interrupted; what is finished is kept")
    done = run(*command)
    assert done.code == 0, done.err
    said = read_report(tmp_path / "run.json")
    assert (said.state, said.exit_code, said.asked, said.done) == ("done", 0, 1, 1)
    assert {"benchmark", "training"} <= said.steps.keys()
    assert len(epochs) <= 3  # two epochs, of which the first may be ended twice


def test_help_of_a_benchmark_names_every_mode(run):
    said = " ".join(run("benchmark", "--help").out.split())
    assert f"Of {', '.join(MODES)}." in said


def test_compare_encoders_prints_scores_beside_cost_and_names_what_is_left_out(run, phantoms, tmp_path, monkeypatch):
    monkeypatch.setattr("brainfm.downstream.report.drawings", lambda run: [])
    out = tmp_path / "out"
    asked = ("--models", "test_resnet_3d", "swinbrain", "--no-controls", "-o", out)
    result = run("compare-encoders", phantoms, "--label", "sex", "--seeds", 1, *asked)
    assert result.code == 0, result.err
    assert re.search(r"^Model +sex: AUC ↑ +Width +Seconds a +GB$", result.out, re.MULTILINE)
    assert "\ntest_resnet_3d.phantoms, linear probe  " in result.out
    assert f"1 encoders were left out; see {out / 'left_out.csv'}" in result.err
    assert "swinbrain.mai_lab" in (out / "left_out.csv").read_text()
    assert "Encoders left out: 1" in (out / "index.html").read_text()
    result = run("compare-encoders", phantoms, *asked[:-1], tmp_path / "cost", "--report", tmp_path / "run.json")
    assert result.code == 0, result.err
    said = read_report(tmp_path / "run.json")
    assert (said.state, said.unit, said.asked, said.done) == ("done", "encoder", 2, 1)
    assert list(said.left_out) == ["swinbrain.mai_lab"]
    assert len(said.details["encoders"]) == 2
    named, weights, width, seconds, memory = result.out.splitlines()[1].split()
    assert (named, weights, width) == ("test_resnet_3d.phantoms", "trained", "128")
    assert float(seconds) > 0
    assert float(memory) > 0
    assert not (tmp_path / "cost" / "index.html").exists()


def test_compare_encoders_without_such_a_column_ends_before_any_work(run, phantoms, tmp_path):
    result = run("compare-encoders", phantoms, "--label", "height", "-o", tmp_path / "out")
    assert result.code == 1
    assert "there is no column 'height'" in result.err[-1]
    assert not (tmp_path / "out").exists()
