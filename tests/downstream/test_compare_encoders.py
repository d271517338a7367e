"""Every encoder on the same scans: one table with cost beside score, and what is left out with its reason."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from prepared_folders import moved_head, write

import brainfm
from brainfm.downstream import compare_encoders, encoders, plots, report
from brainfm.downstream.figures import drawings
from brainfm.downstream.results import read_evaluation
from brainfm.errors import BrainfmError, ModelNameError, TaskError
from brainfm.registry import _registered

# Encoders of a laboratory, in a module that each encoder's process imports: one was never published, one asks for other
# scans, one takes more memory than there is.
LAB = """
import os, signal
from dataclasses import replace
from pathlib import Path
import torch
import brainfm
from brainfm.pretrained import PretrainedCfg

contract = brainfm.get_pretrained_cfg("test_resnet_3d").input_spec
maps = replace(contract, representation="VBM grey matter", channels=("VBM grey matter",), preparation=("CAT12",))
page = {"page": "https://example.org/weights", "hub_filename": "w.pt", "num_features": 128}


class Counted(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.num_features, self.num_classes, self.in_chans = inner, inner.num_features, 0, 1

    def forward(self, x):
        with Path(__file__).with_name("forwards").open("a") as file:
            file.write("x" * len(x))
        return self.inner(x)


@brainfm.register_model(cfgs={"v1": PretrainedCfg(input_spec=contract, **page)})
def lab_unpublished(**kwargs):
    return Counted(brainfm.create_model("test_resnet_3d"))


@brainfm.register_model(cfgs={"v1": PretrainedCfg(input_spec=maps, **page)})
def lab_maps(**kwargs):
    raise AssertionError("its contract is not met, so it is not built")


@brainfm.register_model(cfgs={"v1": PretrainedCfg(input_spec=contract, **page)})
def lab_huge(**kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


@brainfm.register_model(cfgs={"v1": PretrainedCfg(input_spec=contract, **page)})
def lab_faulty(**kwargs):
    raise IndexError("a fault of its own")
"""
pytestmark = pytest.mark.usefixtures("few_strengths")
ASKED = {"label": "sex", "models": ("test_resnet_3d", "lab_*"), "controls": False, "seeds": 2}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    (folder / "lab_encoders.py").write_text(LAB)
    sys.path.insert(0, str(folder))
    import lab_encoders  # noqa: F401 - registers them

    yield folder
    sys.path.remove(str(folder))
    for name in [name for name in _registered if name.startswith("lab_")]:
        del _registered[name]


@pytest.fixture(scope="module")
def compared(phantoms, lab, tmp_path_factory):
    output = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "drawings", lambda run: [one for one in drawings(run) if one.name == "sex_cost"])
        return output, compare_encoders(phantoms, output, untrained=True, **ASKED)


def rows(path):
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_each_encoder_is_embedded_with_its_cost_or_left_out_with_its_reason(compared):
    output, found = compared
    by_name = {one.model.partition(".")[0]: one for one in found}
    trained, random = by_name["test_resnet_3d"], by_name["lab_unpublished"]
    assert (trained.weights, trained.width, trained.scans, trained.failed) == ("trained", 128, 20, 0)
    assert (random.weights, random.model, random.width) == ("random", "lab_unpublished", 128)
    assert "https://example.org/weights" in random.why
    for one in (trained, random):
        assert 0 < one.seconds < 60
        assert 0.05 < one.gigabytes < 20
        assert "cpu" in one.device
    reasons = {name: one.reason for name, one in by_name.items() if not one.weights}
    assert reasons == {"lab_maps": "contract", "lab_huge": "memory", "lab_faulty": "error"}
    assert "no fractions of grey matter" in by_name["lab_maps"].why
    assert "signal 9" in by_name["lab_huge"].why
    assert "IndexError: a fault of its own" in by_name["lab_faulty"].why
    assert [one["model"] for one in rows(output / "encoders.csv")] == [one.model for one in found]
    left_out = {one["row"]: one["why"] for one in rows(output / "left_out.csv")}
    assert left_out == {one.model: f"{one.reason}: {one.why}" for one in found if not one.weights}


def test_random_weights_are_called_so_in_every_output_and_never_compete(compared):
    output, _ = compared
    evaluation = read_evaluation(output / "grid.json")
    assert [row.key for row in evaluation.rows] == ["test_resnet_3d.phantoms/probe"]
    assert [(row.key, row.title) for row in evaluation.controls if row.mode == "untrained"] == [
        ("lab_unpublished/untrained", "lab_unpublished, random weights, linear probe")
    ]
    for name in ("results.csv", "predictions.csv"):
        assert {row["mode"] for row in rows(output / name) if row["model"] == "lab_unpublished"} == {"untrained"}
    assert (
        next(row for row in rows(output / "encoders.csv") if row["model"] == "lab_unpublished")["weights"] == "random"
    )
    page = (output / "index.html").read_text()
    assert "lab_unpublished: random weights, because the published ones cannot be had here" in page
    (table,) = (output / "embeddings").glob("lab_unpublished*.npz")
    assert brainfm.table.read(table).origin.model == "lab_unpublished.untrained"


def test_page_has_cost_beside_score_and_says_what_is_left_out(compared):
    output, found = compared
    markdown, page = (output / "table.md").read_text(), (output / "index.html").read_text()
    (line,) = [
        one for one in markdown.splitlines() if one.startswith("| test\\_resnet\\_3d.phantoms, linear probe | ")
    ][:1]
    score, width, seconds, memory = [cell.strip() for cell in line.split("|")[2:-1]]
    assert "±" in score
    assert width == "128"
    assert (float(seconds), float(memory)) == pytest.approx((found[-1].seconds, found[-1].gigabytes), rel=0.01)
    assert "Encoders left out: 3" in page
    assert "Score and cost: test_resnet_3d.phantoms, linear probe" in page
    assert (output / "figures" / "sex_cost.png").stat().st_size > 5000
    assert "a fault of its own" in page


def test_figure_of_cost_has_seconds_under_its_axis_and_controls_without_a_face():
    looks = plots.looks(["one"], ["control"])
    figure = plots.costs([(looks[0], 0.7, 1.0, 0.8), (looks[1], 31.0, 9.0, 0.6)], "sex", "AUC")
    figure.canvas.draw()
    (axes,) = figure.axes
    shown = {tick.get_text() for tick in axes.get_xticklabels()}
    assert {"1", "2", "5", "10", "20"} <= shown
    assert not any("$" in text for text in shown)
    one, control = axes.collections
    assert len(one.get_facecolor()) == 1
    assert len(control.get_facecolor()) == 0
    assert control.get_sizes()[0] > one.get_sizes()[0]


def test_same_call_goes_on_and_embeds_no_scan_again(compared, phantoms, lab, tmp_path):
    output, first = compared
    forwards, again = (lab / "forwards").stat().st_size, tmp_path / "again"
    shutil.copytree(output / "embeddings", again / "embeddings")
    (kept,) = (again / "embeddings").glob("lab_unpublished*.npz")
    kept.unlink()  # as where it was killed before this one
    asked = {**ASKED, "label": "", "untrained": True}
    found = compare_encoders(phantoms, again, **asked)
    assert (lab / "forwards").stat().st_size == forwards + 20
    assert [(one.model, one.weights, one.why) for one in found] == [(one.model, one.weights, one.why) for one in first]
    assert found[-1] == first[-1]  # its cost is that of when it was embedded
    assert compare_encoders(phantoms, again, **asked) == found
    assert (lab / "forwards").stat().st_size == forwards + 20


def test_without_untrained_unpublished_weights_are_left_out_by_their_reason(phantoms, lab, tmp_path):
    with pytest.raises(BrainfmError, match=r"none of 1 encoders takes these scans here; the first: .*example.org"):
        compare_encoders(phantoms, tmp_path, models=("lab_unpublished",), controls=False)
    (left_out,) = rows(tmp_path / "left_out.csv")
    assert left_out["why"].startswith("weights: ")


def test_scans_without_a_label_are_joined_with_a_table_by_patient(phantoms, tmp_path):
    labels = tmp_path / "labels.csv"
    patients = [row["patient_id"] for row in rows(phantoms)]
    labels.write_text("\n".join(["participant_id,group", *(f"{who},{'ab'[n % 2]}" for n, who in enumerate(patients))]))
    options = {"label": "group", "models": ("test_resnet_3d",), "seeds": 1, "controls": False}
    compare_encoders(phantoms, tmp_path / "out", labels=labels, **options)
    evaluation = json.loads((tmp_path / "out" / "grid.json").read_text())
    assert evaluation["tasks"][0]["classes"] == ["a", "b"]
    assert any("joined by patient and scan: 20 of 20 rows" in one for one in evaluation["statements"])


def test_another_comparison_is_not_replaced_and_that_is_said_before_any_work(compared, phantoms, lab):
    output, _ = compared
    forwards = (lab / "forwards").stat().st_size
    for other, words in (({"label": "disease"}, "of which sex would be lost"), ({"seeds": 1}, "of which seeds 1 to 1")):
        with pytest.raises(BrainfmError, match=words):
            compare_encoders(phantoms, output, **{**ASKED, "models": ("lab_unpublished",), "untrained": True, **other})
    assert (lab / "forwards").stat().st_size == forwards


def test_encoder_that_was_pretrained_on_the_scans_is_left_out_where_that_is_asked(small_sample, tmp_path):
    folder = tmp_path / "IXI" / "sub-01"
    folder.mkdir(parents=True)
    scans = [(shutil.copy(small_sample[0], folder), shutil.copy(small_sample[1], folder))]
    asked = {"models": ("test_resnet_3d", "yaware_densenet121"), "controls": False, "refuse_overlap": True}
    found = {one.model: one for one in compare_encoders(scans, tmp_path / "out", **asked)}
    assert found["yaware_densenet121.bhb10k"].reason == "overlap"
    assert "IXI" in found["yaware_densenet121.bhb10k"].why
    assert found["test_resnet_3d.phantoms"].weights == "trained"


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        ({"models": ("resnt_3d",)}, ModelNameError, "unknown model 'resnt_3d'"),
        ({"models": ("zzz*",)}, ModelNameError, "zzz"),
        ({"label": "height"}, TaskError, r"there is no column 'height'.*--labels TABLE"),
        ({"labels": "x.csv"}, TaskError, "--label COLUMN"),
        ({"folds": 5}, TaskError, "of which label"),
        ({"label": "sex", "harmonise": "combat"}, BrainfmError, "--site COLUMN"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(asked, error, words, phantoms, tmp_path):
    with pytest.raises(error, match=words):
        compare_encoders(phantoms, tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_registry_is_taken_whole_but_for_models_for_tests():
    everything = encoders._names(("*",), controls=True)
    assert {name.partition(".")[0] for name in everything} == {
        name for name in brainfm.list_models() if not name.startswith("test_")
    }
    assert everything[-2:] == ["uncnn_doubleconv.seed0", "uncnn_dwsep.seed0"]
    assert "test_resnet_3d.phantoms" in encoders._names(("*", "test_resnet_3d"), controls=False)
    assert "local-dir:mine" in encoders._names(("*", "local-dir:mine"), controls=False)


@pytest.mark.slow
def test_script_without_a_guard_is_told_so(small_sample, tmp_path):
    script = tmp_path / "script.py"
    asked = f"{str(small_sample[0])!r}, {str(tmp_path / 'out')!r}, models=('test_resnet_3d',), controls=False"
    script.write_text(f"from brainfm.downstream import compare_encoders\ncompare_encoders({asked})\n")
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=900, check=False)
    assert ended.returncode == 1
    assert 'if __name__ == "__main__":' in ended.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return write(tmp_path_factory.mktemp("prepared") / "sub-01", *moved_head())


def test_prepared_scan_goes_through_what_takes_it_and_the_rest_says_why_not(prepared, tmp_path):
    names = ("test_resnet_3d", "anatcl_resnet18", "brainsegfounder_swin", "swinbrain", "medicalnet_resnet10")
    found = compare_encoders(prepared, tmp_path, models=names, controls=False)
    said = {one.model: one for one in found}
    assert said["test_resnet_3d.phantoms"].scans == 1
    assert all(one.reason == "contract" and "CAT12" in one.why for one in found if one.model.startswith("anatcl"))
    assert "3 channels" in said["swinbrain.mai_lab"].why
    assert said["brainsegfounder_swin.ukb"].reason == "licence"
    assert "brainfm fetch brainsegfounder_swin.ukb --accept-licence" in said["brainsegfounder_swin.ukb"].why
    assert {one.reason for one in found if one.model.startswith("medicalnet")} == {"weights"}
    assert not (tmp_path / "index.html").exists()


def test_sites_groups_and_folds_are_asked_for_as_of_probe(phantoms, run, tmp_path, monkeypatch):
    """By the command; a column that is none is said before any scan is embedded."""
    lines = phantoms.read_text().splitlines()
    halves = phantoms.with_name("halves.csv")
    halves.write_text("\n".join([f"{lines[0]},half", *(f"{line},{'ab'[n % 2]}" for n, line in enumerate(lines[1:]))]))
    given = ("--label", "sex", "--models", "test_resnet_3d", "--no-controls", "--seeds", 1, "--folds", 4)
    more = ("--harmonise", "covbat", "--fairness", "half", "--least-group", 2, "-o", tmp_path / "out")
    try:
        wrong = run("compare-encoders", halves, *given, *more, "--site", "nowhere")
        assert (wrong.code, "there is no such column" in wrong.said) == (1, True)
        assert not list((tmp_path / "out" / "embeddings").glob("*.npz"))
        monkeypatch.setattr("brainfm.downstream.harmonisation.LEAST_OF_A_SITE", 2)
        done = run("compare-encoders", halves, *given, *more, "--site", "half")
    finally:
        halves.unlink()
    assert done.code == 0, done.said
    found = rows(tmp_path / "out" / "results.csv")
    assert {row["mode"] for row in found} == {"probe", "probe+covbat"}
    assert {row["seed"] for row in found} == {"0", "1", "2", "3"}
    assert {row["group"] for row in rows(tmp_path / "out" / "fairness.csv")} == {"a", "b"}
    assert len(rows(tmp_path / "out" / "harmonisation.csv")) == 4
