"""Fine-tuning: what is trained and what stays, resuming, selection."""

from __future__ import annotations

import copy
import csv
import json
import sys

import numpy as np
import pytest
import torch
from forked_ranks import run_ranks
from sklearn.metrics import roc_auc_score

import brainfm
from brainfm import BrainfmError
from brainfm.downstream import finetuning
from brainfm.downstream.benchmark import benchmark
from brainfm.downstream.finetuning import Finetuning, Labelled, finetune, put_head, read_recipe
from brainfm.downstream.plan import Plan
from brainfm.downstream.task import load_task, read_task
from brainfm.errors import RecipeError, RunInterruptedError
from brainfm.train import trainer
from brainfm.train.data import EpochSampler
from brainfm.train.optim import make_optimiser

QUICK = {"epochs": 2, "lr": 1e-3, "batch_size": 4, "workers": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def parts(phantoms):
    data = read_task(load_task("phantom_sex"), phantoms)
    return [Labelled(data.records[some], data.labels[some]) for some in (slice(8), slice(8, 12))]


def train(parts, folder, model="test_vit_3d", **fields):
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
    after = train(parts, tmp_path / "run", "test_resnet_3d", trained="head", drifting=True).encoder.state_dict()
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}


def released_loop(data, x, rows, seed, epochs, drifting=True):
    """`main_eval.py` of the released code with finetune=False, written out: predictions of the test scans in x.

    Its order of scans, which is torch's shuffling, is that of the seed here.
    """
    encoder = brainfm.create_model("test_resnet_3d", pretrained=True).requires_grad_(False)
    y = torch.from_numpy(data.labels).float().unsqueeze(1)
    torch.manual_seed(seed)
    model = torch.nn.Sequential(encoder, torch.nn.Linear(128, 1))
    classes = data.task.kind == "binary"
    criterion = torch.nn.BCEWithLogitsLoss() if classes else torch.nn.MSELoss()
    optimizer = torch.optim.Adam(model[1].parameters(), lr=1e-4)
    sampler, best = EpochSampler(len(rows["train"]), 6, seed=seed), float("inf")
    for epoch in range(epochs):
        sampler.epoch = epoch
        model.train(drifting)
        for batch in torch.tensor(rows["train"])[[item for _, item in sampler]].split(6):
            optimizer.zero_grad(set_to_none=True)
            criterion(model(x[batch]), y[batch]).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            out = [model(x[batch]) for batch in torch.tensor(rows["val"]).split(6)]
        losses = [criterion(*pair).item() for pair in zip(out, y[rows["val"]].split(6), strict=True)]
        score = -roc_auc_score(y[rows["val"]], torch.cat(out)) if classes else sum(losses) / len(losses)
        if score < best:
            best, kept = score, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    with torch.no_grad():
        found = model(x[rows["test"]])[:, 0].double()
    return (found.sigmoid() if classes else found).numpy()


@pytest.mark.parametrize("name", ["phantom_sex", "phantom_age"])
def test_papers_probe_is_the_released_loop_written_out(name, phantoms, tmp_path):
    data = read_task(load_task(name), phantoms)
    plan = Plan(
        models=("test_resnet_3d",),
        modes=("probe_paper",),
        seeds=1,
        epochs_scale=0.02,
        settings={"workers": 0, "device": "cpu"},
        controls=False,
    )
    benchmark([data], plan, tmp_path)
    with (tmp_path / "predictions.csv").open(newline="") as file:
        found = [float(row["prediction"]) for row in csv.DictReader(file)]
    splits = data.split(0)
    rows = {part: [n for n, split in enumerate(splits) if split == part] for part in ("train", "val", "test")}
    transform = brainfm.create_transform("test_resnet_3d")
    x = torch.stack([transform(record.image, record.mask) for record in data.records])
    np.testing.assert_allclose(found, released_loop(data, x, rows, 0, epochs=2), rtol=1e-6, atol=1e-6)
    if name == "phantom_age":  # the drift of BatchNorm is part of the method
        assert np.abs(released_loop(data, x, rows, 0, epochs=2, drifting=False) - found).max() > 1e-4
    assert ("raw labels" in (tmp_path / "table.md").read_text()) == (name == "phantom_age")


def test_probe_on_kept_embeddings_is_the_papers_where_there_is_no_batchnorm(phantoms, tmp_path):
    data = read_task(load_task("phantom_age"), phantoms)
    plan = Plan(
        models=("test_vit_3d",),
        modes=("probe_paper", "probe_adam"),
        seeds=1,
        epochs_scale=0.02,
        settings={"workers": 0, "device": "cpu"},
        controls=False,
    )
    benchmark([data], plan, tmp_path)
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = [[float(r["prediction"]) for r in rows if r["mode"] == mode] for mode in plan.modes]
    assert len(found[0]) == 4
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-4)


def test_run_that_an_earlier_version_began_is_not_gone_on_with(parts, tmp_path):
    train(parts, tmp_path / "run", epochs=1, trained="head")
    for path in (tmp_path / "run" / "checkpoints").glob("*.pt"):
        content = torch.load(path, weights_only=True)
        torch.save(content | {"format": 1}, path)
    with pytest.raises(RecipeError, match=r"begun by an earlier brainfm.*fine-tuning.*give another output="):
        train(parts, tmp_path / "run", trained="head")


def test_run_with_another_target_is_not_gone_on_with(parts, tmp_path):
    train(parts, tmp_path / "run", epochs=1, trained="head")
    with pytest.raises(RecipeError, match="target was standardised"):
        train(parts, tmp_path / "run", epochs=1, trained="head", target="raw")


def test_batch_that_processes_cannot_share_is_refused():
    assert Finetuning(batch_size=6).shared_by(3).batch_size == 2
    with pytest.raises(BrainfmError, match="batch_size is 6, of all processes together, and cannot be shared by 4"):
        Finetuning(batch_size=6).shared_by(4)


SHARED = """
import sys
import torch
import brainfm
from brainfm.downstream.finetuning import Finetuning, Labelled, finetune
from brainfm.downstream.task import load_task, read_task

manifest, folder = sys.argv[1:]
data = read_task(load_task("phantom_sex"), manifest)
parts = [Labelled(data.records[some], data.labels[some]) for some in (slice(4), slice(4, 6))]
fields = dict(epochs=2, lr=1e-3, batch_size=2, workers=0, device="cpu", precision="float64", augment=True)
torch.manual_seed(0)
encoder = brainfm.create_model("test_resnet_3d", widths=[4, 4, 8, 8])  # a convolution in float64 is slow
model = finetune(encoder, *parts, "binary", Finetuning(output=folder + "/run", **fields))
torch.save(model.encoder.state_dict(), folder + f"/{brainfm.system.launched().rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_share_the_batch_and_give_the_weights_of_one(phantoms, tmp_path, monkeypatch):
    (tmp_path / "run.py").write_text(SHARED)
    one, two = (tmp_path / name for name in ("one", "two"))
    for folder in (one, two):
        folder.mkdir()
    done = run_ranks(2, tmp_path / "run.py", phantoms, two)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(sys, "argv", ["run.py", str(phantoms), str(one)])
    exec(SHARED, {})
    states = [torch.load(folder / "0.pt", weights_only=True) for folder in (one, two)]
    for folder in (one, two):
        assert len((folder / "run" / "log.jsonl").read_text().splitlines()) == 2 * (2 + 1)  # two steps an epoch
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-9, atol=1e-9, msg=name)


def test_vit_is_fine_tuned_as_by_the_authors_of_the_mae(parts, tmp_path):
    """By the recipe: positions and a new norm after the pooling are trained, with drop path and layer decay."""
    recipe = dict(read_recipe("finetune_mae")) | {"epochs": 2, "warmup_epochs": 1, "lr": 0.1, "batch_size": 4}
    settings = Finetuning.from_dict(recipe | {"output": str(tmp_path / "run"), "workers": 0, "device": "cpu"})
    encoder = brainfm.create_model("test_vit_3d", pretrained=True)
    before = state_of(encoder)
    put_head(encoder, 1, settings)
    assert float(encoder.head.weight.detach().abs().max()) < 1e-4
    assert [block.drop_path.rate for block in encoder.blocks] == pytest.approx([0, 0.1 / 3, 0.2 / 3, 0.1])
    groups = make_optimiser(settings, encoder, settings.layer_decay).param_groups
    names = {id(parameter): key for key, parameter in encoder.named_parameters()}
    told = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert told["pos_embed"] == told["cls_token"] == (0.75**5, 0)
    assert told["patch_embed.proj.weight"] == (0.75**5, 0.05)
    assert told["blocks.3.mlp.fc1.weight"] == (0.75, 0.05)
    assert (told["fc_norm.weight"], told["head.weight"], told["head.bias"]) == ((1, 0), (1, 0.05), (1, 0))
    assert not {"norm.weight", "norm.bias"} & told.keys()
    fresh = brainfm.create_model("test_vit_3d", pretrained=True)
    after = finetune(fresh, *parts, "binary", settings).encoder.state_dict()
    assert not torch.equal(after["pos_embed"], before["pos_embed"])
    assert not torch.equal(after["fc_norm.weight"], torch.ones(96))
    assert torch.equal(after["norm.weight"], before["norm.weight"])


@pytest.mark.parametrize("trained", ["head", "norm_bias", "adapter", "lora"])
def test_positions_stay_where_not_all_is_trained(trained):
    encoder = brainfm.create_model("test_vit_3d", pretrained=True)
    put_head(encoder, 1, Finetuning.from_dict(dict(read_recipe("finetune_mae")) | {"trained": trained}))
    learned = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert {"head.weight", "head.bias"} <= learned
    assert not learned & {"pos_embed", "cls_token", "norm.weight"}
    assert ("fc_norm.weight" in learned) is (trained == "norm_bias")


def test_what_only_a_vit_has_is_refused_of_a_resnet(parts, tmp_path):
    for fields in ({"drop_path": 0.1}, {"trained_positions": True}):
        with pytest.raises(BrainfmError, match="are of a ViT, and ResNet is none; leave them out"):
            train(parts, tmp_path / "run", "test_resnet_3d", **fields)


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
    whole = train(parts, tmp_path / "whole", "test_resnet_3d", augment=True, trained="all").encoder.state_dict()
    step, steps = trainer.Trainer._step, []

    def interrupted(self, batch):
        steps.append(1)
        if len(steps) == 4:
            self.stopped_by = 15
        return step(self, batch)

    monkeypatch.setattr(trainer.Trainer, "_step", interrupted)
    with pytest.raises(RunInterruptedError):
        train(parts, tmp_path / "cut", "test_resnet_3d", augment=True)
    monkeypatch.undo()
    resumed = train(parts, tmp_path / "cut", "test_resnet_3d", augment=True).encoder.state_dict()
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
    [
        ({"layer_decay": 0}, "layer_decay"),
        ({"drifting": True}, "'head'"),
        ({"lr": -1}, "lr is -1"),
        ({"drop_path": 1}, "drop_path is 1"),
        ({"head_std": -1}, "head_std is -1"),
        ({"target": "log"}, "target is 'log'"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Finetuning(**fields)
