"""Pretraining and evaluation on a GPU: steps as on the processor, resumed to the bit, NCCL, and what is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import brainfm
from brainfm.cli.main import main
from brainfm.errors import RunInterruptedError
from brainfm.phantom import make_cohort
from brainfm.train.pretraining import pretrain
from brainfm.train.recipe import recipe_from_dict
from brainfm.train.trainer import Trainer

pytestmark = pytest.mark.cuda

SIMCLR = {
    **{"method": "simclr", "model": "test_resnet_3d", "epochs": 2, "batch_size": 4, "workers": 0, "lr": 1e-3},
    **{"augmentation": {"crop_min": [27, 32, 32]}, "input_size": [24, 24, 24]},
}
MAE = {
    **{"method": "mae", "model": "test_vit_3d", "epochs": 2, "batch_size": 4, "workers": 0, "lr": 1e-3},
    **{"augmentation": {"crop_min": [27, 32, 32]}, "decoder_dim": 48, "decoder_depth": 1, "decoder_heads": 4},
}
SMALL = SIMCLR | {"input_size": [16, 16, 16]}
BASES = {
    "simclr": SIMCLR,
    "mae": MAE,
    "yaware": SMALL | {"method": "yaware", "targets": ["age"]},
    "simmim": MAE | {"method": "simmim", "mask_unit": [8, 8, 16]},
    "supervised": SMALL | {"method": "supervised", "targets": ["age", "sex"], "kinds": {"age": "regression"}},
    "distill": SIMCLR | {"method": "distill", "teacher": "test_resnet_3d", "input_size": None},
}
for field in ("decoder_dim", "decoder_depth", "decoder_heads"):
    del BASES["simmim"][field]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    return make_cohort(20, tmp_path_factory.mktemp("phantoms"), spacing=4)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    content = torch.load(folder / "checkpoints" / "last.pt", weights_only=True, map_location="cpu")
    return content["model_state_dict"]


def run(base, manifest, output, device, **fields) -> dict[str, torch.Tensor]:
    pretrain(recipe_from_dict(base | {"manifest": str(manifest), "output": str(output), "device": device} | fields))
    return weights(output)


@pytest.mark.parametrize("method", BASES)
def test_steps_are_those_of_the_processor(method, manifest, gpu, tmp_path):
    """In float64, where the order of sums does not show."""
    base = BASES[method]
    fields = {"precision": "float64", "epochs": 1}
    found = run(base, manifest, tmp_path / "gpu", gpu, **fields)
    wanted = run(base, manifest, tmp_path / "cpu", "cpu", **fields)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.allclose(found[key].double(), value.double(), rtol=1e-6, atol=1e-8), key


@pytest.mark.parametrize("augment_on", ["loader", "device"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_run_ends_in_a_model_that_loads(precision, augment_on, manifest, gpu, tmp_path):
    fields = {"precision": precision, "augment_on": augment_on, "workers": 2, "channels_last": True}
    run(SIMCLR, manifest, tmp_path / "run", gpu, **fields)
    model = brainfm.create_model(f"local-dir:{tmp_path / 'run' / 'export'}", pretrained=True)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert {value.device.type for value in model.state_dict().values()} == {"cpu"}


def test_run_that_was_stopped_goes_on(manifest, gpu, tmp_path, monkeypatch):
    step = Trainer._step

    def stopped(self, batch):
        metrics = step(self, batch)
        if self._step_of_run == 7:
            os.kill(os.getpid(), signal.SIGUSR1)
        return metrics

    monkeypatch.setattr(Trainer, "_step", stopped)
    fields = {"epochs": 3, "precision": "float64"}  # cuDNN adds up in any order
    with pytest.raises(RunInterruptedError):
        run(SIMCLR, manifest, tmp_path / "run", gpu, **fields)
    monkeypatch.undo()
    found = run(SIMCLR, manifest, tmp_path / "run", gpu, **fields)
    wanted = run(SIMCLR, manifest, tmp_path / "whole", gpu, **fields)
    for key, value in wanted.items():
        assert torch.allclose(found[key], value, rtol=1e-6, atol=1e-8), key


def test_batch_in_chunks_and_recomputed_activations_fit(manifest, gpu, tmp_path):
    run(SIMCLR, manifest, tmp_path / "run", gpu, batch_chunk=2, grad_checkpointing=True)


def test_one_process_under_torchrun_uses_nccl(manifest, gpu, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m"]
    command += ["brainfm.train", "test_resnet_3d", f"manifest={manifest}", f"output={tmp_path / 'run'}"]
    command += ["epochs=1", "batch_size=4", "workers=0", f"device={gpu}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()


def test_evaluation_ends_in_a_page(manifest, gpu, tmp_path):
    command = ["benchmark", "phantom_age", "--manifest", str(manifest), "--models", "test_resnet_3d", "--seeds", "1"]
    command += [*("--modes", "probe", "--modes", "finetune", "--modes", "lora"), "--epochs-scale", "0.02"]
    command += ["--no-controls", "--set", f"device={gpu}", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "index.html").exists()
