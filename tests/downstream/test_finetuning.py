"""Fine-tuning: what is trained and what stays, resuming, selection."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

import brainfm
from brainfm import BrainfmError
from brainfm.downstream import finetuning
from brainfm.downstream.finetuning import Finetuning, Labelled, finetune
from brainfm.downstream.lora import add_lora
from brainfm.downstream.task import load_task, read_task
from brainfm.errors import RunInterruptedError
from brainfm.train import trainer
from brainfm.train.optim import make_optimiser

QUICK = {"epochs": 2, "lr": 1e-3, "workers": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def parts(phantoms):
    data = read_task(load_task("phantom_sex"), phantoms)
    rows = np.arange(18)
    return [Labelled([data.records[n] for n in some], data.labels[some]) for some in (rows[:12], rows[12:])]


def train(parts, folder, model="test_resnet_3d", **fields):
    encoder = brainfm.create_model(model, pretrained=True)
    return finetune(encoder, *parts, "binary", Finetuning(**QUICK | {"output": str(folder)} | fields))


def state_of(module):
    return copy.deepcopy(module.state_dict())


@pytest.mark.parametrize("model", ["test_resnet_3d", "test_vit_3d"])
def test_head_alone_leaves_the_encoder_to_the_bit(model, parts, tmp_path):
    before = brainfm.create_model(model, pretrained=True).state_dict()
    encoder = train(parts, tmp_path / "run", model, trained="head").encoder
    head = encoder.classifier_name
    for name, value in encoder.state_dict().items():
        if not name.startswith(f"{head}."):
            assert torch.equal(value, before[name]), name
    assert encoder.get_classifier().weight.abs().sum() > 0


def test_drifting_probe_changes_statistics_and_no_weight(parts, tmp_path):
    before = brainfm.create_model("test_resnet_3d", pretrained=True).state_dict()
    after = train(parts, tmp_path / "run", trained="head", drifting=True).encoder.state_dict()
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}


def test_run_learns_and_its_best_epoch_by_val_is_kept(parts, tmp_path):
    model = train(parts, tmp_path / "run", epochs=4, augment=True, selection="auc")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    scores = [line["score"] for line in lines if "score" in line]
    assert len(scores) == 4
    assert model.epoch == 1 + int(np.argmin(scores))
    predictions, failed = model.predict(parts[1].records)
    assert not failed
    best = next(line for line in lines if line.get("score") == min(scores))
    assert best["val_auc"] == pytest.approx(-min(scores))
    again, _ = model.predict(parts[1].records, batch_size=4)
    np.testing.assert_allclose(predictions, again, atol=1e-5)


def test_score_that_is_undefined_is_never_the_best_where_another_is_known(parts, tmp_path, monkeypatch):
    for name, scores, best in (("some", [np.nan, 0.5, np.nan], 2), ("none", [np.nan] * 3, 1)):
        left = list(scores)
        monkeypatch.setattr(finetuning._Supervised, "end_epoch", lambda *_, left=left: {"score": left.pop(0)})
        assert train(parts, tmp_path / name, epochs=3, trained="head").epoch == best


def test_run_that_was_interrupted_ends_the_same(parts, tmp_path, monkeypatch):
    whole = train(parts, tmp_path / "whole", augment=True, trained="all").encoder.state_dict()
    step, steps = trainer.Trainer._step, []

    def interrupted(self, batch):
        steps.append(1)
        if len(steps) == 4:
            self.stopped_by = 15
        return step(self, batch)

    monkeypatch.setattr(trainer.Trainer, "_step", interrupted)
    with pytest.raises(RunInterruptedError):
        train(parts, tmp_path / "cut", augment=True)
    monkeypatch.undo()
    resumed = train(parts, tmp_path / "cut", augment=True).encoder.state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_bad_scan_is_left_out_of_predictions_and_named(parts, tmp_path):
    model = train(parts, tmp_path / "run", epochs=1, trained="head")
    records = [*parts[1].records[:2], brainfm.manifest.ScanRecord(tmp_path / "gone.nii.gz")]
    predictions, failed = model.predict(records)
    assert len(predictions) == 2
    assert "gone.nii.gz: no such file" in failed[2]
    with pytest.raises(BrainfmError, match="none of 1 scans can be read"):
        model.predict(records[2:])


def test_bad_training_scan_is_replaced_and_listed(parts, tmp_path):
    gone = brainfm.manifest.ScanRecord(tmp_path / "gone.nii.gz")
    learned = Labelled([gone, *parts[0].records[1:]], parts[0].labels)
    train([learned, parts[1]], tmp_path / "run", epochs=1, trained="head")
    assert "gone.nii.gz: no such file" in (tmp_path / "run" / "bad_scans.csv").read_text()


def test_lora_starts_as_the_encoder_and_trains_little(parts, tmp_path):
    encoder = brainfm.create_model("test_vit_3d", pretrained=True)
    volume = torch.randn(1, 1, 40, 48, 48)
    with torch.no_grad():
        before = encoder(volume)
        encoder.reset_classifier(1)
        add_lora(encoder, rank=4)
        encoder.reset_classifier(0)
        assert torch.equal(encoder(volume), before)
    trained = train(parts, tmp_path / "run", "test_vit_3d", trained="lora", lora_rank=4).encoder
    original = brainfm.create_model("test_vit_3d", pretrained=True).state_dict()
    after = trained.state_dict()
    assert all(torch.equal(after[name], value) for name, value in original.items())
    ups = [value for name, value in after.items() if name.endswith("lora_up")]
    assert len(ups) == 8
    assert all(value.abs().sum() > 0 for value in ups)
    with pytest.raises(BrainfmError, match="ResNet has none"):
        add_lora(brainfm.create_model("test_resnet_3d"))


@pytest.mark.parametrize("name", ["test_resnet_3d", "test_vit_3d"])
def test_layer_decay_slows_the_layers_far_from_the_head(name):
    encoder = brainfm.create_model(name, num_classes=1)
    groups = make_optimiser(Finetuning(**QUICK), encoder, layer_decay=0.5).param_groups
    names = {id(parameter): key for key, parameter in encoder.named_parameters()}
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert scale.keys() == {key for key, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert scale[f"{encoder.classifier_name}.weight"] == 1
    assert min(scale.values()) == 0.5**5  # the stem, below four blocks and the head
    last, first = (
        ("layer4.0.conv1.weight", "layer1.0.conv1.weight")
        if "resnet" in name
        else ("blocks.3.norm1.weight", "blocks.0.norm1.weight")
    )
    assert (scale[last], scale[first]) == (0.5, 0.5**4)


def test_former_name_of_a_setting_is_refused_with_the_new_one():
    with pytest.raises(ValueError, match="max_bad_share is called max_bad_fraction now"):
        Finetuning.from_dict({"max_bad_share": 0.1})


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"layer_decay": 0}, "layer_decay"), ({"drifting": True}, "'head'"), ({"lr": -1}, "lr is -1")],
)
def test_settings_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Finetuning(**fields)
