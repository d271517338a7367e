"""Whole runs on a small cohort: across processes, interrupted, resumed, refused."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from forked_ranks import run_ranks

import brainfm
from brainfm import BrainfmError, RecipeError, ScanError
from brainfm.cli.main import main
from brainfm.contract import Resize
from brainfm.errors import RunInterruptedError
from brainfm.files import held
from brainfm.hub import convert
from brainfm.train.data import Batch
from brainfm.train.method import METHODS
from brainfm.train.pretraining import pretrain
from brainfm.train.recipe import load_recipe, recipe_from_dict
from brainfm.train.summary import estimated_memory, summarise

SIMCLR = {
    "method": "simclr",
    "model": "test_resnet_3d",
    "epochs": 3,
    "batch_size": 4,
    "workers": 0,
    "lr": 1e-3,
    "augmentation": {"crop_min": [27, 32, 32]},
    "input_size": [24, 24, 24],
}
MAE = SIMCLR | {
    "method": "mae",
    "model": "test_vit_3d",
    "input_size": None,
    "optimiser": "adamw",
    "betas": [0.9, 0.95],
    "weight_decay": 0.05,
    "schedule": "cosine",
    "warmup_epochs": 1,
    "decoder_dim": 48,
    "decoder_depth": 1,
    "decoder_heads": 4,
}
LABELS = {"targets": ["age", "sex", "site"], "kinds": {"age": "regression"}}
SMALL = SIMCLR | {"input_size": [16, 16, 16]}
BASES = {
    "simclr": SIMCLR,
    "mae": MAE,
    "yaware": SMALL | {"method": "yaware", "targets": ["age"]},
    "simmim": SIMCLR | {"method": "simmim", "model": "test_vit_3d", "mask_unit": [8, 8, 16], "input_size": None},
    "supervised": SMALL | {"method": "supervised"} | LABELS,
    "distill": SMALL | {"method": "distill", "teacher": "of the fixture"},
}
LATER = ["yaware", "simmim", "supervised", "distill"]  # methods, tested by less: what is beside them is the same


@pytest.fixture(autouse=True, scope="module")
def teacher(tmp_path_factory, small_spec):
    """The packaged ResNet as if it had been trained on views of 16³ voxels."""
    folder = tmp_path_factory.mktemp("teacher")
    *before, zscore = small_spec.operations
    shape = (16, 16, 16)
    spec = replace(small_spec, operations=(*before, Resize(shape), zscore), output_shape=(1, *shape))
    model = brainfm.create_model("test_resnet_3d", pretrained=True)
    brainfm.save_for_hub(model, folder, pretrained_cfg_overlay={"input_spec": spec})
    BASES["distill"]["teacher"] = f"local-dir:{folder}"


@pytest.fixture
def recipe(cohort, tmp_path):
    """A function (fields) → a recipe on the cohort, that writes to a folder of the test."""

    def make(base=SIMCLR, **fields):
        return recipe_from_dict(base | {"manifest": str(cohort), "output": str(tmp_path / "run")} | fields)

    return make


def network(folder: Path, name: str = "last") -> dict[str, torch.Tensor]:
    content = torch.load(folder / "checkpoints" / f"{name}.pt", weights_only=True)
    return content["model_state_dict"]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


SAID = {
    "simclr": {"top1", "alignment", "uniformity"},
    "yaware": {"top1", "alignment", "uniformity"},
    "supervised": {"loss_age", "mae_age", "loss_sex", "accuracy_sex", "loss_site", "accuracy_site"},
}


@pytest.mark.parametrize("name", BASES)
def test_run_ends_in_a_folder_that_loads_with_what_is_known_of_it(name, recipe, tmp_path, cohort):
    base, method = BASES[name], METHODS[name]
    epochs = 1 if name in LATER else 3
    export = pretrain(recipe(base, epochs=epochs))
    lines = log(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 3 * epochs + 1))
    wanted = {"loss", "lr", "grad_norm", "scans_per_s", "data_fraction", "data_s", "step_s", "peak_memory_gb", "epoch"}
    wanted |= SAID.get(name, set())
    assert wanted < lines[0].keys()
    model = brainfm.create_model(f"local-dir:{export}")
    trained = network(tmp_path / "run")
    for key, value in model.state_dict().items():
        assert torch.equal(value, trained[key if name == "mae" else f"encoder.{key}"])
    cfg = model.pretrained_cfg
    assert (cfg.ssl_method, cfg.cohorts[-1].patients, cfg.cohorts[-1].scans) == (method.name, 12, 16)
    assert "16 scans of 12 patients (manifest)" in cfg.notes
    assert cfg.licence is None
    assert str(tmp_path) not in (export / "config.json").read_text() + (export / "README.md").read_text()
    aside = tmp_path / "run" / f"{method.aside[0]}.safetensors"
    assert len(brainfm.weights.read_checkpoint(aside).state) > 1
    again = convert(tmp_path / "run" / "checkpoints" / "last.pt", tmp_path / "again", base["model"])
    assert same(brainfm.create_model(f"local-dir:{again}").state_dict(), model.state_dict())


def test_views_made_on_the_device_give_the_same_run(recipe, tmp_path):
    for place in ("loader", "device"):
        pretrain(recipe(epochs=1, augment_on=place, output=str(tmp_path / place)))
    assert same(network(tmp_path / "loader"), network(tmp_path / "device"))


@pytest.mark.parametrize("base", [SIMCLR, MAE], ids=["simclr", "mae"])
def test_run_on_smaller_views_states_their_size_in_its_contract(base, recipe, small_sample):
    shape = (24, 24, 24) if base is SIMCLR else (16, 24, 24)
    model = brainfm.create_model(f"local-dir:{pretrain(recipe(base, epochs=1, input_size=shape))}")
    transform = brainfm.create_transform(model)
    volume = transform(*small_sample)
    assert volume.shape == model.pretrained_cfg.input_spec.output_shape == (1, *shape)
    assert Resize(shape) in model.pretrained_cfg.input_spec.operations
    inside = volume[volume != 0]
    assert (float(inside.mean()), float(inside.std())) == pytest.approx((0, 1), abs=1e-3)
    assert model(volume[None]).isfinite().all()


def test_mae_loss_falls_and_follows_its_schedule(recipe, tmp_path):
    pretrain(recipe(MAE, epochs=6, lr=5e-3, batch_size=6))
    lines = log(tmp_path / "run")
    rates = [line["lr"] for line in lines]
    assert rates[0] == 0
    assert max(rates) == pytest.approx(5e-3)
    assert rates.index(max(rates)) == 2
    assert rates[-1] < 2e-4
    assert sum(line["loss"] for line in lines[-2:]) < 0.9 * sum(line["loss"] for line in lines[:2])


STEPS = """
import sys, json, torch
from brainfm.train.recipe import recipe_from_dict
from brainfm.train.pretraining import pretrain

for fields in json.loads(sys.argv[1]):
    pretrain(recipe_from_dict(fields))
"""


def ranks(world, runs, tmp_path, code=STEPS, fails=False):
    (tmp_path / "steps.py").write_text(code)
    done = run_ranks(world, tmp_path / "steps.py", json.dumps(runs))
    assert (done.returncode != 0) == fails, done.stderr


OF_TWO = {name: (base, name == "simmim") for name, base in BASES.items()} | {"checkpointed": (SIMCLR, True)}


def of_one_epoch(cohort, base, folder, **fields):
    paths = {"manifest": str(cohort), "output": str(folder)}
    return base | paths | {"epochs": 1, "precision": "float64", "every_scan": False} | fields


@pytest.fixture(scope="module")
def of_two_processes(cohort, tmp_path_factory):
    """The folder of a run a way, by two processes that make one after the other."""
    folder = tmp_path_factory.mktemp("two")
    runs = [
        of_one_epoch(cohort, base, folder / name, batch_size=2, grad_checkpointing=checkpointed)
        for name, (base, checkpointed) in OF_TWO.items()
    ]
    ranks(2, runs, folder)
    return folder


@pytest.mark.parametrize("name", OF_TWO)
def test_two_processes_end_with_the_weights_of_one_with_the_joined_batch(name, of_two_processes, cohort, tmp_path):
    one, two = tmp_path / "one", of_two_processes / name
    pretrain(recipe_from_dict(of_one_epoch(cohort, OF_TWO[name][0], one, batch_size=4)))
    assert len(log(two)) == len(log(one)) == 3
    alone, shared = network(one), network(two)
    assert alone.keys() == shared.keys()
    for key, value in alone.items():
        assert (shared[key] - value).abs().max() <= 1e-9 * max(1, value.abs().max()), key
    for first, second in zip(log(one), log(two), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-9)


def test_batch_in_chunks_has_the_gradient_of_the_whole_batch(recipe):
    """Of the loss: with BatchNorm's statistics held still, nothing else differs."""
    from brainfm.train.simclr import SimCLRMethod

    def gradients(chunk):
        torch.manual_seed(0)
        encoder = brainfm.create_model("test_resnet_3d").double()
        method = SimCLRMethod(recipe(batch_size=7, batch_chunk=chunk), encoder)
        method.network.double().eval()
        views = torch.randn(2, 7, 1, 24, 24, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        metrics = method.backward(method.network, Batch(views, []), torch.Generator(), slice(0, 7))
        return metrics["loss"], [parameter.grad for parameter in method.network.parameters()]

    loss, whole = gradients(None)
    for chunk in (1, 3, 7):
        chunked_loss, chunked = gradients(chunk)
        assert chunked_loss == pytest.approx(loss, rel=1e-12)
        for found, wanted in zip(chunked, whole, strict=True):
            assert (found - wanted).abs().max() <= 1e-10 * wanted.abs().max()


@pytest.mark.parametrize(("views", "passes"), [("joint", 1), ("separate", 2)])
def test_chunks_count_each_scan_once_in_the_running_statistics(views, passes, recipe):
    from brainfm.train.simclr import SimCLRMethod

    settings = recipe(batch_size=6, batch_chunk=2, views=views)
    method = SimCLRMethod(settings, brainfm.create_model("test_resnet_3d"))
    method.network.train()
    method.backward(method.network, Batch(torch.randn(2, 6, 1, 24, 24, 24), []), torch.Generator(), slice(0, 6))
    assert method.encoder.bn1.num_batches_tracked == 3 * passes


# --- Interrupted and resumed ----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "started"), [("simclr", "now"), ("simclr", "before"), *((n, "now") for n in LATER)])
def test_signal_stops_after_a_step_and_the_same_command_ends_bit_identical(
    name, started, recipe, tmp_path, monkeypatch
):
    fields = BASES[name] | {"epochs": 3 if name == "simclr" else 2}
    pretrain(recipe(fields, output=str(tmp_path / "whole")))
    from brainfm.train import trainer

    step = trainer.Trainer._step

    def stopped(self, batch):
        metrics = step(self, batch)
        if self._step_of_run == 5:
            os.kill(os.getpid(), signal.SIGUSR1)
        return metrics

    monkeypatch.setattr(trainer.Trainer, "_step", stopped)
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(RunInterruptedError, match="epoch 2, step 2"):
        pretrain(recipe(fields))
    assert signal.getsignal(signal.SIGUSR1) is before
    monkeypatch.undo()
    if started == "before":
        _as_written_before(tmp_path / "run")
    pretrain(recipe(fields))
    assert same(network(tmp_path / "run"), network(tmp_path / "whole"))
    assert [line["step"] for line in log(tmp_path / "run")] == list(range(1, 3 * fields["epochs"] + 1))
    assert [line["loss"] for line in log(tmp_path / "run")] == [line["loss"] for line in log(tmp_path / "whole")]
    assert all("data_fraction" in line and "data_share" not in line for line in log(tmp_path / "run"))


def _as_written_before(folder: Path) -> None:
    """A run's folder as brainfm wrote it when two of its names were others, and some keys were not there."""
    path = folder / "checkpoints" / "last.pt"
    content = torch.load(path, weights_only=True)
    content["recipe"]["max_bad_share"] = content["recipe"].pop("max_bad_fraction")
    later = {"contract", "targets", "kinds", "kernel_sigma", "mask_unit", "teacher", "teacher_sha256", "distill_loss"}
    for key in ("patients", "model_args", "init", "init_sha256", "picture_every", *later):
        del content["recipe"][key]
    torch.save(content, path)
    lines = (folder / "log.jsonl").read_text()
    assert lines.count('"data_fraction"') == 5
    (folder / "log.jsonl").write_text(lines.replace("data_fraction", "data_share"))


# Imports all that a run needs, and then forks one after another; says the id of each and, at its end, its status.
RUNS = """
import json, os, sys, torch, traceback
import brainfm
from brainfm.train.recipe import recipe_from_dict
from brainfm.train.pretraining import pretrain

threads = torch.get_num_threads()
torch.set_num_threads(1)  # so that no thread is there to be lost by the forks
fields = json.loads(sys.argv[1])
brainfm.create_model(fields["model"])
while True:
    run = os.fork()
    if not run:
        try:
            torch.set_num_threads(threads)
            pretrain(recipe_from_dict(fields))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    print(run, flush=True)
    status = os.waitstatus_to_exitcode(os.waitpid(run, 0)[1])
    print(status, flush=True)
    if status != -9:
        break
"""


@pytest.mark.slow
def test_run_that_is_killed_five_times_ends_bit_identical(cohort, tmp_path):
    fields = SIMCLR | {"manifest": str(cohort), "epochs": 6}
    pretrain(recipe_from_dict(fields | {"output": str(tmp_path / "whole")}))
    path, statuses = tmp_path / "run" / "log.jsonl", []
    command = [sys.executable, "-c", RUNS, json.dumps(fields | {"output": str(tmp_path / "run")})]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as runs:
        for kill_at in (2, 5, 6, 10, 16):  # lines of the log, in the middle of epochs and at their ends
            run = int(runs.stdout.readline())
            until = time.monotonic() + 900
            while time.monotonic() < until and (not path.is_file() or len(path.read_text().splitlines()) < kill_at):
                time.sleep(0.005)
            os.kill(run, signal.SIGKILL)
            statuses.append(int(runs.stdout.readline()))
        runs.stdout.readline()
        statuses.append(int(runs.stdout.readline()))
    assert statuses == [-9, -9, -9, -9, -9, 0]
    assert same(network(tmp_path / "run"), network(tmp_path / "whole"))
    whole = [line["loss"] for line in log(tmp_path / "whole")]
    assert [line["loss"] for line in log(tmp_path / "run")] == whole


def test_run_that_has_ended_is_not_run_again(recipe, tmp_path):
    pretrain(recipe())
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    pretrain(recipe())
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lr": 2e-3}, "lr was 0.001"),
        ({"seed": 5}, "seed was 0"),
        ({"batch_size": 3}, "joined batch was 4 and is 3"),
        ({"augmentation": {"crop_min": [27, 32, 32], "flip": 0}}, "augmentation was"),
        ({"resume": False}, "resume is false"),
    ],
)
def test_folder_of_another_run_is_refused(changes, reason, recipe):
    pretrain(recipe(epochs=1))
    with pytest.raises(RecipeError, match=reason):
        pretrain(recipe(epochs=1, **changes))


def test_manifest_that_lists_other_scans_is_refused_and_one_that_moved_with_them_is_not(recipe, cohort, tmp_path):
    pretrain(recipe(epochs=1))
    shorter = cohort.with_name("shorter.csv")
    shorter.write_text("\n".join(cohort.read_text().splitlines()[:-1]))
    with pytest.raises(RecipeError, match="other scans or patients"):
        pretrain(recipe(epochs=1, manifest=str(shorter)))
    (tmp_path / "moved").symlink_to(cohort.parent)
    pretrain(recipe(epochs=1, manifest=str(tmp_path / "moved" / cohort.name)))


@pytest.mark.parametrize("lost", ["truncated", "gone"])
def test_run_whose_last_checkpoint_is_lost_goes_on_from_the_newest_whole_one(lost, recipe, tmp_path, caplog):
    pretrain(recipe(save_every=2))
    whole, losses = network(tmp_path / "run"), [line["loss"] for line in log(tmp_path / "run")]
    folder = tmp_path / "run" / "checkpoints"
    last, newest = folder / "last.pt", folder / "epoch0002.pt"
    last.write_bytes(last.read_bytes()[:10_000])
    (folder / "best.pt").write_bytes(b"")
    if lost == "gone":
        last.unlink()
    with caplog.at_level("INFO", "brainfm"):
        pretrain(recipe(save_every=2))
    assert f"going on from {newest.name} instead (last.pt" in caplog.text
    assert "going on from epoch 3, step 0" in caplog.text
    assert same(network(tmp_path / "run"), whole)
    assert [line["loss"] for line in log(tmp_path / "run")] == losses


def test_run_without_a_whole_checkpoint_is_refused(recipe, tmp_path):
    pretrain(recipe(epochs=1))
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.write_bytes(b"PK\x03\x04 half")
    with pytest.raises(brainfm.WeightsError, match=r"last\.pt.*best\.pt.*put a copy of one in place, or remove .*run "):
        pretrain(recipe(epochs=1))


def test_second_run_into_a_folder_is_refused_while_the_first_lasts(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    with held(tmp_path / "run"), pytest.raises(BrainfmError, match="is writing it"):
        pretrain(recipe(epochs=1))
    pretrain(recipe(epochs=1))
    assert not list((tmp_path / "run").rglob(".*"))


STOPS = f"""
import os, signal
from brainfm.train.trainer import Trainer
step = Trainer._step

def stopped(self, batch):
    metrics = step(self, batch)
    if self._step_of_run == 4:
        os.kill(os.getpid(), signal.SIGTERM)
    return metrics

Trainer._step = stopped
{STEPS}
"""


@pytest.mark.slow
def test_run_goes_on_with_another_number_of_processes_of_the_same_joined_batch(cohort, tmp_path, caplog):
    fields = SIMCLR | {"manifest": str(cohort), "epochs": 2, "precision": "float64"}
    broken = fields | {"output": str(tmp_path / "run")}
    ranks(2, [broken | {"batch_size": 2}], tmp_path, code=STOPS, fails=True)
    assert len(log(tmp_path / "run")) == 4
    with caplog.at_level("INFO", "brainfm"):
        pretrain(recipe_from_dict(broken | {"batch_size": 4}))
    assert "joined batch of 4 is 1 × 4 now (processes × batch_size) and was 2 × 2; steps are the same" in caplog.text
    pretrain(recipe_from_dict(fields | {"batch_size": 4, "output": str(tmp_path / "whole")}))
    losses, wanted = ([line["loss"] for line in log(tmp_path / name)] for name in ("run", "whole"))
    assert losses == pytest.approx(wanted, rel=1e-9)
    resumed = network(tmp_path / "run")
    for key, value in network(tmp_path / "whole").items():
        assert (resumed[key] - value).abs().max() <= 1e-9 * max(1, value.abs().max()), key


def test_gradient_that_depends_on_the_processes_does_not_go_on_with_others(recipe):
    pretrain(recipe(epochs=1, gradient="upstream", batch_size=4))
    from brainfm.train.checkpoint import read_newest

    settings = recipe(epochs=1, gradient="upstream", batch_size=2)
    data = torch.load(Path(settings.output) / "checkpoints" / "last.pt", weights_only=True)["data"]
    with pytest.raises(RecipeError, match="batch_size was 4"):
        read_newest(Path(settings.output) / "checkpoints", settings, data, joined_batch=4)


# --- What goes wrong ------------------------------------------------------------------------------


def test_loss_that_is_not_finite_stops_with_the_scans_of_the_batch(recipe, monkeypatch):
    from brainfm.train import simclr

    monkeypatch.setattr(simclr, "nt_xent_loss", lambda z_i, z_j, *rest: (z_i - z_i.detach()).sum() * float("nan"))
    with pytest.raises(BrainfmError, match=r"the loss is nan .* epoch 1, step 1.*t1\.nii\.gz"):
        pretrain(recipe())


def test_too_many_bad_scans_stop_the_run_with_their_list(recipe, cohort, tmp_path):
    rows = cohort.read_text().splitlines()
    lines = [rows[0], *(f"{cohort.parent / row}" if n > 4 else row for n, row in enumerate(rows[1:]))]
    lines = [line.replace(",sub-", f",{cohort.parent}/sub-", 1) if n > 5 else line for n, line in enumerate(lines)]
    (tmp_path / "bad.csv").write_text("\n".join(lines))  # the first five are not there
    with pytest.raises(
        BrainfmError, match=r"of 16 scans cannot be read, more than max_bad_fraction=0.01.*bad_scans\.csv"
    ):
        pretrain(recipe(manifest=str(tmp_path / "bad.csv")))
    assert "no such file" in (tmp_path / "run" / "bad_scans.csv").read_text()
    pretrain(recipe(manifest=str(tmp_path / "bad.csv"), output=str(tmp_path / "other"), max_bad_fraction=0.5))


def test_run_without_a_readable_scan_says_why_in_one_line_though_a_worker_read_it(recipe, tmp_path):
    """As of scans that are coarser than the contract: before, the line was a traceback of the worker."""
    rows = "".join(f"{tmp_path / str(n)}.nii.gz,{n}\n" for n in range(4))
    (tmp_path / "gone.csv").write_text(f"image_path,patient_id\n{rows}")
    with pytest.raises(ScanError) as refusal:
        pretrain(recipe(manifest=str(tmp_path / "gone.csv"), workers=1))
    assert re.fullmatch(
        r"11 scans in a row cannot be read; the last: .+\.nii\.gz: no such file; check the path", str(refusal.value)
    )


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model": "resnet_3d"}, "unknown model"),
        ({"method": "mae", "batch_chunk": None}, "needs a ViT"),
        ({"manifest": ""}, "manifest="),
        ({"manifest": "nowhere.csv"}, "no such manifest"),
        ({"batch_size": 13}, "do not fill"),
        ({"cache": "nowhere"}, "no cache of scans"),
        ({"device": "quantum"}, "device 'quantum'"),
    ],
)
def test_run_that_cannot_be_is_refused_before_it_starts(fields, reason, recipe, tmp_path):
    with pytest.raises(BrainfmError, match=reason):
        pretrain(recipe(**fields))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["simclr_resnet18_3d", "mae_vit_tiny_3d", "mae_vit_base_3d"])
def test_dry_run_of_a_published_recipe_says_what_it_would_do(name, tmp_path):
    rows = [f"{n}/t1.nii.gz,{n}/mask.nii.gz,p{n % 400}" for n in range(1000)]
    (tmp_path / "many.csv").write_text("\n".join(["image_path,mask_path,patient_id", *rows]))
    recipe = load_recipe(name, [f"manifest={tmp_path / 'many.csv'}", "output=x"])
    text = summarise(recipe, world=4)
    assert f"model: {name}" in text
    assert "1,000 scans of 400 patients (many)" in text
    assert "2,000 are not there, such as" in text
    joined = recipe.batch_size * 4
    assert f"{400 // joined:,} an epoch of {joined}" in text
    assert f"{400 // joined * 150:,} in all" in text


def test_estimated_memory_is_near_what_was_measured(spec):
    """REFERENCE of the project: forward and backward of one volume in float32 takes 5.9 GB."""
    recipe = load_recipe("simclr_resnet18_3d", ["batch_size=2", "batch_chunk=1"])
    assert 0.7 < estimated_memory(recipe, spec) / (2 * 5.9e9) < 1.5
    chunked = replace(recipe, batch_size=72)
    assert estimated_memory(chunked, spec) == estimated_memory(recipe, spec)


def dry_run(recipe, *arguments):
    """The exit code and output of `brainfm pretrain … --dry-run`."""
    settings = ["model=test_resnet_3d", "batch_size=2", "input_size=[24,24,24]", "augmentation.crop_min=[27,32,32]"]
    named = [f"manifest={recipe.manifest}", f"output={recipe.output}"]
    done = CliRunner().invoke(main, ["pretrain", "test_resnet_3d", *named, *settings, *arguments, "--dry-run"])
    return done.exit_code, done.output


def test_dry_run_reads_scans_as_the_run_does_and_refuses_what_it_refuses(recipe, cohort, tmp_path):
    code, said = dry_run(recipe())
    assert code == 0, said
    assert "tried        16 scans as the run reads them: 0 refused" in said
    rows = cohort.read_text().splitlines()
    damaged = tmp_path / "damaged.nii.gz"
    damaged.write_bytes((cohort.parent / rows[3].split(",")[0]).read_bytes()[:-900])
    rows[1:] = [f"{cohort.parent}/{row}".replace(",", f",{cohort.parent}/", 1) for row in rows[1:]]
    rows[3] = ",".join([str(damaged), *rows[3].split(",")[1:]])
    (tmp_path / "bad.csv").write_text("\n".join(rows))
    code, said = dry_run(recipe(manifest=str(tmp_path / "bad.csv")))
    assert code == 1
    assert "tried        16 scans as the run reads them: 1 refused" in said
    assert "damaged.nii.gz: the file is damaged" in said
    assert not (tmp_path / "run").exists()


def test_dry_run_refuses_a_folder_of_another_run_and_says_where_the_run_goes_on(recipe, tmp_path):
    pretrain(recipe(epochs=1))
    with pytest.raises(RecipeError, match=r"lr was 0\.001"):
        summarise(recipe(epochs=1, lr=2e-3))
    assert "goes on      from last.pt: epoch 2, step 0" in summarise(recipe(epochs=1))


def test_little_shared_memory_costs_workers_and_not_the_run(recipe, tmp_path, monkeypatch, caplog):
    from brainfm.train import loader

    views = 2 * 4 * 24**3 * 4  # bytes of a batch
    monkeypatch.setattr(loader, "free_shared_memory", lambda: 3.5 * views)
    assert loader.affordable_workers(4, views) == 1
    monkeypatch.setattr(loader, "free_shared_memory", lambda: 2.5 * views)
    text = summarise(recipe(workers=2))
    assert "workers      0" in text
    pretrain(recipe(epochs=1, workers=2))
    assert caplog.text.count("reading with 0 workers, which is slower; make it larger (docker run --shm-size=") == 2
    assert len(log(tmp_path / "run")) == 3


@pytest.mark.parametrize("has", [True, False])
def test_automatic_precision_of_a_processor_is_float32_and_bfloat16_is_warned_of(
    has, recipe, tmp_path, monkeypatch, caplog
):
    from brainfm.train import recipe as module

    monkeypatch.setattr(module, "computes_in_bfloat16", lambda _: has)
    with caplog.at_level("INFO", "brainfm"):
        pretrain(recipe(epochs=1, precision="auto"))
    assert "precision auto is float32 on this cpu" in caplog.text
    kept = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)["recipe"]
    assert kept["precision"] == "float32"
    caplog.clear()
    summarise(recipe(precision="bfloat16", output="other"))
    assert "gradients on small maps can be wrong in bfloat16 on a processor" in caplog.text
    assert ("is slow in it" in caplog.text) is not has


@pytest.mark.parametrize(("has", "precision"), [(True, "bfloat16"), (False, "float32")])
def test_automatic_precision_of_a_gpu_is_its_own(has, precision, recipe, monkeypatch):
    from brainfm.train import recipe as module

    monkeypatch.setattr(module, "computes_in_bfloat16", lambda _: has)
    assert recipe(precision="auto").on(torch.device("cuda")).precision == precision


def test_run_on_a_system_that_says_no_memory_goes_without(recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    pretrain(recipe(epochs=1))
    assert "peak_memory_gb" not in log(tmp_path / "run")[0]


def test_run_on_a_system_without_sigusr1_is_stopped_by_the_other_signals(monkeypatch):
    monkeypatch.delattr(signal, "SIGUSR1")  # as on Windows
    assert runpy.run_module("brainfm.train.loader")["STOPPING"] == [signal.SIGTERM, signal.SIGINT]


SPAWN = """
import multiprocessing
from brainfm.cli.main import main

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    main()
"""


@pytest.mark.slow
def test_cache_and_run_on_a_system_that_spawns_its_processes(cohort, tmp_path):
    (tmp_path / "spawn.py").write_text(SPAWN)
    cache = ["cache", "build", str(cohort), str(tmp_path / "cache"), "--model", "test_resnet_3d"]
    fields = ["epochs=1", "batch_size=6", "workers=1", "input_size=[16,16,16]", "augmentation.crop_min=[27,32,32]"]
    named = [f"manifest={cohort}", f"output={tmp_path / 'run'}", f"cache={tmp_path / 'cache'}"]
    for arguments in (cache, ["pretrain", "test_resnet_3d", *fields, *named]):
        done = subprocess.run(
            [sys.executable, str(tmp_path / "spawn.py"), *arguments], capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stderr
    assert len(log(tmp_path / "run")) == 2


RANK_FAILS = """
import os
from brainfm.train.trainer import Trainer
from brainfm.cli.training import pretrain_command
step = Trainer._step

def fails(self, batch):
    if os.environ["RANK"] == "1" and self._step_of_run == 1:
        raise RuntimeError("of a step")
    return step(self, batch)

Trainer._step = fails
pretrain_command()
"""


@pytest.mark.slow
def test_error_of_any_rank_is_on_the_console_once(cohort, tmp_path):
    (tmp_path / "fails.py").write_text(RANK_FAILS)
    fields = ["batch_size=4", "workers=0", "input_size=[16,16,16]", "augmentation.crop_min=[27,32,32]"]

    def said(manifest):
        named = [f"manifest={manifest}", f"output={tmp_path / 'run'}"]
        done = run_ranks(2, tmp_path / "fails.py", "test_resnet_3d", *fields, *named)
        assert done.returncode == 1
        return done.stderr

    of_one = said(cohort)
    assert of_one.count("rank 1: RuntimeError: of a step (--debug shows where)") == 1
    assert of_one.count("RuntimeError: of a step") == 1
    of_all = said("nowhere.csv")
    assert len(re.findall("^rank [01]: ScanError: .*no such manifest", of_all, re.MULTILINE)) == 1
