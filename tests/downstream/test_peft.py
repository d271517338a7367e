"""Parameter-efficient fine-tuning: from scans to a model, to a row of a table."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import brainfm
from brainfm.cli import main
from brainfm.downstream.finetuning import Finetuning, Labelled, count_parameters, finetune, put_head
from brainfm.downstream.report import write_report
from brainfm.downstream.task import load_task, read_task
from brainfm.downstream.wording import parameters_text
from brainfm.errors import RecipeError, RunInterruptedError
from brainfm.train import trainer

pytestmark = pytest.mark.usefixtures("few_strengths")
WAYS = ("norm_bias", "adapter", "lora")
QUICK = {"epochs": 2, "lr": 1e-2, "workers": 0, "device": "cpu", "batch_size": 4, "lora_rank": 2}


@pytest.fixture(scope="module")
def parts(phantoms):
    data = read_task(load_task("phantom_sex"), phantoms)
    rows = np.arange(12)
    return [Labelled([data.records[n] for n in some], data.labels[some]) for some in (rows[:8], rows[8:])]


def train(parts, folder, model, **fields):
    encoder = brainfm.create_model(model, pretrained=True)
    return finetune(encoder, *parts, "binary", Finetuning(**QUICK | {"output": str(folder)} | fields))


@pytest.mark.parametrize("model", ["test_resnet_3d", "test_vit_3d"])
@pytest.mark.parametrize("way", WAYS)
def test_fine_tuned_encoder_differs_where_it_was_trained_and_nowhere_else(model, way, parts, tmp_path):
    original = brainfm.create_model(model, pretrained=True)
    before = original.state_dict()
    found = train(parts, tmp_path / "run", model, trained=way)
    after = found.encoder.state_dict()
    head = {name for name in after if name.startswith(f"{original.classifier_name}.")}
    adapters = {name for name in after if name.startswith("adapters.")}
    assert after.keys() - head - adapters == before.keys()  # what is of low rank is merged
    assert bool(adapters) is (way == "adapter")
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    layers = {f"{n}.weight" for n, m in original.named_modules() if isinstance(m, (nn.Conv3d, nn.Linear))}
    norms = {n for n, m in original.named_modules() if isinstance(m, (_BatchNorm, nn.LayerNorm))}
    affine = {name for name in before if name.endswith(".bias") or f"{name.rpartition('.')[0]}" in norms}
    statistics = {name for name in before if "running_" in name or "num_batches" in name}
    assert changed == {"norm_bias": affine - statistics, "adapter": set(), "lora": layers}[way]
    total = sum(p.numel() for p in found.encoder.parameters())
    assert 0 < found.trained_parameters < found.parameters
    assert found.parameters >= total
    if way == "lora":
        change = (after["blocks.0.mlp.fc1.weight" if "vit" in model else "layer2.0.conv1.weight"]).flatten(1)
        change = change - before["blocks.0.mlp.fc1.weight" if "vit" in model else "layer2.0.conv1.weight"].flatten(1)
        assert torch.linalg.matrix_rank(change.double(), atol=1e-6) == 2
    wanted, _ = found.predict(parts[1].records)
    volumes = torch.stack([found.transform(one.image, one.mask) for one in parts[1].records])
    with torch.no_grad():
        fast = found.head.predictions(brainfm.optimize(found.encoder)(volumes))
    np.testing.assert_allclose(fast, wanted, atol=1e-5)


def test_whole_training_counts_all_and_a_head_itself(parts, tmp_path):
    width = brainfm.create_model("test_resnet_3d").num_features
    found = train(parts, tmp_path / "all", "test_resnet_3d", epochs=1)
    assert found.trained_parameters == found.parameters == sum(p.numel() for p in found.encoder.parameters())
    found = train(parts, tmp_path / "head", "test_resnet_3d", epochs=1, trained="head")
    assert found.trained_parameters == width + 1


@pytest.mark.slow
@pytest.mark.parametrize("way", ["adapter", "lora"])
def test_run_that_was_interrupted_ends_the_same(way, parts, tmp_path, monkeypatch):
    whole = train(parts, tmp_path / "whole", "test_resnet_3d", trained=way).encoder.state_dict()
    step, steps = trainer.Trainer._step, []

    def interrupted(self, batch):
        steps.append(1)
        if len(steps) == 3:
            self.stopped_by = 15
        return step(self, batch)

    monkeypatch.setattr(trainer.Trainer, "_step", interrupted)
    with pytest.raises(RunInterruptedError):
        train(parts, tmp_path / "cut", "test_resnet_3d", trained=way)
    monkeypatch.undo()
    resumed = train(parts, tmp_path / "cut", "test_resnet_3d", trained=way).encoder.state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_run_whose_network_had_other_tensors_is_not_resumed(parts, tmp_path):
    """Such as LoRA's of before it changed more than attention."""
    train(parts, tmp_path / "run", "test_resnet_3d", trained="lora", epochs=1)
    path = tmp_path / "run" / "checkpoints" / "last.pt"
    content = torch.load(path, weights_only=True)
    state = content["model_state_dict"]
    content["model_state_dict"] = {name: value for name, value in state.items() if "layer1.0.conv1.lora" not in name}
    torch.save(content, path)
    with pytest.raises(
        RecipeError, match="begun by an earlier brainfm, whose network had other tensors; finish it with"
    ):
        train(parts, tmp_path / "run", "test_resnet_3d", trained="lora", epochs=1)


def test_settings_that_cannot_be_are_refused():
    for wrong in ({"lora_rank": 0}, {"adapter_reduction": -1}):
        with pytest.raises(ValueError, match="lora_rank and adapter_reduction must be 1 or more"):
            Finetuning(trained="lora", **wrong)


@pytest.fixture(scope="module")
def results(phantoms, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid") / "results"
    fixed = "benchmark phantom_sex --models test_vit_3d --modes lora finetune norm_bias probe adapter --seeds 1"
    quick = "--epochs-scale 0.01 --set workers=0 device=cpu lora_rank=2 trained=head adapter_reduction=8 --manifest"
    result = CliRunner().invoke(main, [*fixed.split(), *quick.split(), str(phantoms), "-o", str(folder)])
    assert result.exit_code == 0, result.output
    return folder


def parameters(way):
    encoder = brainfm.create_model("test_vit_3d", pretrained=True)
    settings = {"trained": way, "lora_rank": 2, "adapter_reduction": 8}
    put_head(encoder, 1, Finetuning(**settings))
    return count_parameters(encoder)


def test_results_and_runs_say_how_many_parameters_each_row_trains(results):
    with (results / "results.csv").open(newline="") as file:
        found = {row["mode"]: (row["trained_parameters"], row["parameters"]) for row in csv.DictReader(file)}
    for way in WAYS:
        assert found[way] == tuple(map(str, parameters(way)))
    width, encoder = 96, parameters("head")[1] - 97
    for mode in ("probe", "untrained", "finetune"):  # the last with trained=head
        assert found[mode][0] == str(width + 1)
    assert found["probe"][1] == str(encoder + width + 1)
    assert found["covariates"] == ("3", "")  # age, head size, and a constant
    for path in (results / "runs").glob("*.json"):
        content = json.loads(path.read_text())
        mode = path.name.split(".")[2]
        assert str(content["trained_parameters"]) == found[mode][0]
        assert str(content["parameters"] or "") == found[mode][1]


def test_every_table_of_scores_says_how_many_parameters_each_trains(results):
    trained, total = parameters("adapter")
    text = (results / "table.md").read_text()
    wanted = f" {trained:,} ({100 * trained / total:.2g} %) |"
    lines = [line for line in text.splitlines() if line.startswith("| test\\_vit\\_3d, fine-tuned by adapters |")]
    assert sum(line.endswith(wanted) for line in lines) == 2  # the main table and the other metrics
    assert text.count("| Trained parameters |") == 2
    assert (results / "index.html").read_text().count('<th scope="col">Trained parameters</th>') == 2
    head = next(line for line in (results / "table.tex").read_text().splitlines() if "Trained parameters" in line)
    assert head.count("&") == 2
    assert head.endswith(r"Trained parameters \\")


def test_page_of_results_of_before_has_no_such_column(results, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(results, folder)
    table = pd.read_csv(folder / "results.csv")
    table.drop(columns=["trained_parameters", "parameters"]).to_csv(folder / "results.csv", index=False)
    write_report(folder)
    assert "Trained parameters" not in (folder / "table.md").read_text() + (folder / "index.html").read_text()


def test_settings_of_what_is_trained_do_not_make_another_mode_of_one(results):
    text = (results / "table.md").read_text()
    for title in ("by LoRA", "by adapters", "in norms and biases"):
        assert f"What is fine-tuned {title} is so, without trained." in text


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ([], "–"),
        ([(97, 514369)], "97 (0.019 %)"),
        ([(902769, 902769)], "902,769 (100 %)"),
        ([(513, 1e6), (1026, 1e6)], "513–1,026 (0.051–0.1 %)"),
        ([(3, float("nan"))], "3"),
    ],
)
def test_number_of_parameters_is_said_with_its_percentage(sizes, text):
    assert parameters_text(sizes) == text
