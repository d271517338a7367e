"""A comparison as one file: what is pretrained, what is left out and why, how it goes on, and what the page says."""

from __future__ import annotations

import csv
import json
import os
import signal

import pytest
from click.testing import CliRunner

import brainfm
from brainfm.cli.main import main
from brainfm.downstream.experiment import list_cells, load_experiment
from brainfm.downstream.results import read_evaluation
from brainfm.errors import BrainfmError
from brainfm.phantom import make_cohort
from brainfm.train.simclr import SimCLRMethod
from brainfm.train.simmim import SimMIMMethod

pytestmark = pytest.mark.usefixtures("few_strengths")

SMALL = """
networks:
  cnn: {model: test_resnet_3d, model_args: {widths: [8, 8, 8, 8]}}
  vit: {model: test_vit_3d, model_args: {dim: 24, depth: 1}, mask_unit: [8, 8, 8]}
sources:
  others: {manifest: pretrain/manifest.csv}
  drawn: drawn/manifest.csv
methods:
  contrastive: {method: simclr, projection_dim: 8}
  masked: {method: simmim, mask_ratio: 0.5}
tasks: {phantom_sex: target/manifest.csv, phantom_age: nowhere.csv}
pretraining: {epochs: 2, batch_size: 4, workers: 0, device: cpu, precision: float32, input_size: [16, 16, 16]}
modes: [probe, finetune, scratch]
seeds: 1
epochs: 1
settings: {device: cpu, workers: 0}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The experiment's file beside twelve phantoms to learn from, and twelve others to be tested on."""
    folder = tmp_path_factory.mktemp("experiment")
    make_cohort(12, folder / "pretrain", spacing=4.0, seed=1)
    make_cohort(12, folder / "target", spacing=4.0, seed=2)
    (folder / "small.yaml").write_text(SMALL)
    return folder


def run(place, output, *arguments, file="small.yaml"):
    done = CliRunner().invoke(main, ["benchmark", str(place / file), "-o", str(output), *map(str, arguments)])
    return done.exit_code, done.output


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def steps():
    """The method of every step that was taken; the sixth is ended by SIGTERM, as by a cluster."""
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        for method in (SimCLRMethod, SimMIMMethod):

            def counted(self, *arguments, _backward=method.backward):
                taken.append(self.recipe.output)
                if len(taken) == 8:
                    os.kill(os.getpid(), signal.SIGTERM)
                return _backward(self, *arguments)

            patch.setattr(method, "backward", counted)
        yield taken


@pytest.fixture(scope="module")
def finished(place, steps, tmp_path_factory):
    """The output of a comparison that was stopped in its second run, and went on."""
    output = tmp_path_factory.mktemp("finished") / "out"
    code, said = run(place, output)
    assert code == 75, said
    assert not (output / "results.csv").exists()
    code, said = run(place, output)
    assert code == 0, said
    return output, said


def test_stopped_comparison_goes_on_and_no_step_is_taken_twice(finished, steps):
    output, _ = finished
    cells = ("cnn/others/contrastive", "vit/others/contrastive", "vit/others/masked")
    assert {path: steps.count(path) for path in steps} == {str(output / "pretrain" / cell): 6 for cell in cells}


def test_all_that_can_be_run_is_one_table_whose_rows_say_what_they_learned_from(finished):
    output, _ = finished
    evaluation = read_evaluation(output / "grid.json")
    assert [row.title for row in evaluation.rows] == [
        f"{cell} on others (phantoms), {mode}"
        for cell in ("cnn, contrastive", "vit, contrastive", "vit, masked")
        for mode in ("linear probe", "fine-tuned")
    ] + ["cnn, from scratch", "vit, from scratch"]
    assert [row.title for row in evaluation.controls] == [
        "cnn, untrained, linear probe",
        "vit, untrained, linear probe",
        "covariates alone, no image",
    ]
    assert [task.title for task in evaluation.tasks] == ["Sex (phantoms)"]
    results = rows_of(output / "results.csv")
    assert len({(row["model"], row["mode"], row["seed"]) for row in results}) == 11 == evaluation.runs
    assert any("by seed 0. Standard deviations are of splits" in text for text in evaluation.statements)
    assert any("Epochs are 1 alike" in text for text in evaluation.statements)
    assert any("phantoms, not people" in text for text in evaluation.warnings)
    for name in ("table.md", "table.tex", "index.html"):
        assert "on others (phantoms)" in (output / name).read_text()


def test_networks_from_scratch_are_those_that_are_pretrained(finished):
    output, _ = finished
    results = rows_of(output / "results.csv")
    for network in ("cnn", "vit"):
        sizes = {
            mode: {row["parameters"] for row in results if f"/{network}/" in row["model"] and row["mode"] == mode}
            for mode in ("finetune", "scratch", "probe", "untrained")
        }
        assert sizes["finetune"] == sizes["scratch"]
        assert sizes["probe"] == sizes["untrained"]
    begun = brainfm.create_model(f"local-dir:{output / 'pretrain/vit/none/export'}")
    learned = brainfm.create_model(f"local-dir:{output / 'pretrain/vit/others/masked/export'}")
    assert begun.pretrained_cfg.input_spec == learned.pretrained_cfg.input_spec
    assert begun.pretrained_cfg.ssl_method is None


def test_what_cannot_be_run_is_left_out_with_its_reason_on_the_page_and_in_the_list(finished, place):
    output, said = finished
    left_out = {row["scan"]: row["why"] for row in rows_of(output / "left_out.csv")}
    assert left_out.pop("phantom_age").startswith(
        f"no such file: {place / 'nowhere.csv'}; give --manifest phantom_age="
    )
    assert left_out.pop("cnn, masked on others").startswith("simmim needs a patch embedding")
    assert {name: why.split(";")[0] for name, why in left_out.items()} == {
        f"{network}, {method} on drawn": f"no such file or folder: {place / 'drawn/manifest.csv'}"
        for network in ("cnn", "vit")
        for method in ("contrastive", "masked")
    }
    assert "6 parts were left out, such as phantom_age" in said
    page = (output / "index.html").read_text()
    assert "cnn, masked on others" in page
    assert "simmim needs a patch embedding" in page


def test_source_that_comes_later_is_added_and_nothing_else_is_done_again(finished, place, steps):
    output, _ = finished
    before, rows = len(steps), {path: path.stat().st_mtime_ns for path in (output / "runs").glob("*.json")}
    code, said = run(place, output, "--manifest", f"drawn={place / 'pretrain' / 'manifest.csv'}")
    assert code == 0, said
    assert {path.split("/out/")[1].split("/")[2] for path in steps[before:]} == {"drawn"}
    assert {path: path.stat().st_mtime_ns for path in rows} == rows
    assert len(list((output / "runs").glob("*.json"))) == len(rows) + 3 * 2


def test_cell_has_its_methods_fields_first_and_none_of_other_methods(place):
    cells = {cell.title: cell for cell in list_cells(load_experiment(place / "small.yaml", epochs=3))}
    assert "mask_unit" not in cells["vit, contrastive on others"].values
    masked = cells["vit, masked on others"].values
    assert (masked["mask_unit"], masked["method"], masked["epochs"]) == ((8, 8, 8), "simmim", 2)
    assert masked["manifest"] == str(place / "pretrain/manifest.csv")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "projection_dim: 8",
            "projection_dims: 8",
            "methods: contrastive: Recipe has no field projection_dims; did you",
        ),
        ("epochs: 2", "output: there", "pretraining: output is not set here"),
        ("others: {", "none: {", "'none' stands for no pretraining"),
        ("seeds: 1", "seed: 1", "Experiment has no field seed; did you mean seeds?"),
        ("drawn: drawn/manifest.csv", "drawn: {patients: 0.5}", "drawn needs manifest"),
        ("  cnn: {", "  c/n: {", "'c/n' is the name of a folder"),
        ("methods:\n", "methods: {}\nmore:\n", "Experiment has no field more"),
        ("target/manifest.csv", "gone.csv", "no task can be run: no such file"),
    ],
)
def test_faults_of_the_file_are_said_before_anything_is_run(place, tmp_path, old, new, said):
    (place / "wrong.yaml").write_text(SMALL.replace(old, new, 1))
    code, output = run(place, tmp_path / "out", file="wrong.yaml")
    assert code == 1
    assert said in output
    assert not (tmp_path / "out").exists()


def test_names_that_are_in_no_file_and_options_of_other_evaluations_are_refused(place, tmp_path):
    for arguments, said in (
        (("--manifest", "drwan=x.csv"), "has phantom_sex, phantom_age, others, drawn"),
        (("--manifest", "x.csv"), "--manifest as NAME=PLACE"),
        (("--models", "test_resnet_3d"), "give it alone, without --models"),
        (("--keep-models",), "--keep-models is not of a comparison's file"),
    ):
        code, output = run(place, tmp_path / "out", *arguments)
        assert code == 1
        assert said in output


def test_changed_pretraining_in_the_same_output_is_refused(finished, place):
    output, _ = finished
    (place / "changed.yaml").write_text(SMALL.replace("projection_dim: 8", "projection_dim: 16"))
    code, said = run(place, output, file="changed.yaml")
    assert code == 1
    assert "cnn, contrastive on others" in said


def test_options_of_the_command_replace_the_files_own(place):
    changed = load_experiment(place / "small.yaml", modes=("probe",), seeds=1)
    assert (changed.modes, changed.seeds) == (("probe",), 1)
    with pytest.raises(BrainfmError, match=r"phantom_sex, phantom_age$"):
        load_experiment(place / "small.yaml", tested={"others": "x.csv"})


def test_untrained_control_of_a_model_is_its_own_network(place, tmp_path):
    """Of a folder whose network has other arguments than the registered one: before, that one stood for it."""
    small = brainfm.create_model("test_resnet_3d", widths=(8, 8, 8, 8))
    brainfm.save_for_hub(small, tmp_path / "small")
    table = place / "target/manifest.csv"
    arguments = ["phantom_sex", "--manifest", table, "--models", f"local-dir:{tmp_path / 'small'}", "--modes", "probe"]
    done = CliRunner().invoke(main, ["benchmark", *map(str, arguments), "--seeds", "1", "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    sizes = {row["mode"]: row["parameters"] for row in rows_of(tmp_path / "out/results.csv")}
    assert sizes["probe"] == sizes["untrained"]
    titles = [row["title"] for row in json.loads((tmp_path / "out/grid.json").read_text())["controls"]]
    assert titles[0] == "test_resnet_3d as in small, untrained, linear probe"
