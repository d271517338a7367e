"""The examples run as they stand, on the packaged scan and the test model."""

import csv
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import brainfm
from brainfm.phantom import make_cohort

EXAMPLES = Path(__file__).parent.parent / "examples"


def load_example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def expected(small_sample, small_model):
    transform = brainfm.create_transform(small_model)
    with torch.inference_mode():
        return small_model(transform(*small_sample)[None])


@pytest.fixture
def two_groups(tmp_path, small_sample):
    """A manifest of 18 made-up patients: in half of them a part of the brain is dimmed."""
    image = nib.load(small_sample[0])
    voxels = image.get_fdata(dtype=np.float32)
    draw = np.random.default_rng(0)
    rows = []
    for number in range(18):
        changed = voxels * (1 + 0.02 * draw.standard_normal(voxels.shape))
        if number % 2:
            changed[10:20, 15:30, 10:25] *= 0.5
        name = f"patient{number}.nii.gz"
        nib.Nifti1Image(changed.astype(np.float32), image.affine).to_filename(tmp_path / name)
        rows.append([name, str(small_sample[1]), f"p{number}", number % 2])
    with (tmp_path / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image_path", "mask_path", "patient_id", "label"], *rows])
    return tmp_path / "manifest.csv"


def test_embed_and_classify_tells_two_groups_apart(two_groups, tmp_path):
    output = tmp_path / "embeddings.csv"
    score = load_example("embed_and_classify").main(
        [str(two_groups), "--model", "test_resnet_3d", "--output", str(output)]
    )
    assert output.exists()
    assert score > 0.9


def test_monai_pipeline_gives_the_embedding_of_the_three_lines(small_sample, expected):
    vector = load_example("monai_pipeline").main([*map(str, small_sample), "--model", "test_resnet_3d"])
    torch.testing.assert_close(vector, expected, rtol=1e-5, atol=1e-6)


def test_torch_hub_gives_the_embedding_of_the_three_lines(small_sample, expected):
    vector = load_example("torch_hub").main([*map(str, small_sample), "--model", "test_resnet_3d"])
    torch.testing.assert_close(vector, expected, rtol=0, atol=0)


def test_own_model_is_registered_saved_and_loaded_again(sample, tmp_path, monkeypatch):
    from brainfm import registry
    from brainfm.contract import operation

    monkeypatch.setattr(registry, "_registered", dict(registry._models()))
    monkeypatch.setattr(operation, "_operations", dict(operation._operations))
    example = load_example("register_own_model")
    arguments = [*map(str, sample), str(tmp_path / "weights.safetensors")]
    first, second = example.main(arguments), example.main(arguments)
    assert [vector.shape for vector in first] == [(1, 64), (1, 16)]
    assert all(map(torch.equal, first, second))


FAKE_SLURM = {
    "srun": '#!/bin/bash\nexec "$@"\n',
    "scontrol": '#!/bin/bash\nif [ "$1" = show ]; then echo localhost; else echo "$@" > "$REQUEUED"; fi\n',
}


@pytest.mark.slow
def test_slurm_job_that_is_stopped_saves_itself_and_goes_back_to_the_queue(two_groups, tmp_path):
    for name, text in FAKE_SLURM.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    text = (EXAMPLES / "pretrain.slurm").read_text().replace(":29500", ":0")  # any free port
    (tmp_path / "job.sh").write_text(text)
    requeued, run = tmp_path / "requeued", tmp_path / "run"
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost", "PROCESSES_PER_NODE": "2"}
    fields = ["test_vit_3d", f"manifest={two_groups}", f"output={run}", "batch_size=4", "epochs=1000", "device=cpu"]
    with (tmp_path / "job.log").open("w") as log:
        job = subprocess.Popen(
            ["bash", str(tmp_path / "job.sh"), *fields, "precision=float32"],
            env=os.environ | slurm | {"PATH": path, "REQUEUED": str(requeued)},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 900
            while not (run / "log.jsonl").is_file() or (run / "log.jsonl").read_text().count("\n") < 3:
                assert job.poll() is None, (tmp_path / "job.log").read_text()
                assert time.monotonic() < deadline, (tmp_path / "job.log").read_text()
                time.sleep(0.1)
            job.send_signal(signal.SIGUSR1)  # as --signal=B:USR1 does, to the shell alone
            assert job.wait(900) == 0
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
    assert requeued.read_text().split() == ["requeue", "7"]
    last = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    assert last["progress"]["epoch"] * 2 + last["progress"]["step"] == (run / "log.jsonl").read_text().count("\n")


@pytest.mark.slow
def test_what_the_embedding_knows_tells_patients_apart(tmp_path):
    manifest = make_cohort(16, tmp_path / "phantoms", spacing=4.0, scans_per_patient=2)
    picture = tmp_path / "map.png"
    example = load_example("what_the_embedding_knows")
    found, again, leak = example.main([str(manifest), "--model", "test_resnet_3d", "--map", str(picture)])
    assert found.fraction > 3 * found.chance
    assert again.within > again.between
    assert leak.chance == 0.25
    assert picture.stat().st_size > 5000


# --- Comparisons as files ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["phantoms", "video_synthetic"])
def test_every_cell_of_the_packaged_comparisons_can_be_built_but_those_that_are_said(name, tmp_path, monkeypatch):
    """On the device that keeps nothing, of an empty source: networks, contract, method and size go together."""
    from brainfm.downstream.experiment import list_cells, load_experiment
    from brainfm.downstream.task import load_task
    from brainfm.errors import RecipeError
    from brainfm.train import pretraining
    from brainfm.train.sources import Mixture

    monkeypatch.setattr(pretraining, "read_sources", lambda *_: Mixture([]))
    experiment = load_experiment(EXAMPLES / "experiments" / f"{name}.yaml")
    cells = list(list_cells(experiment))
    assert len(cells) == 4 * 3 * 3
    refused = {}
    for cell in cells:
        if cell.source != cells[0].source:
            continue
        try:
            pretraining.read_data(cell.recipe(tmp_path))
        except RecipeError as error:
            refused[cell.network, cell.method] = str(error)
    assert list(refused) == [("densenet", "masked")]
    assert "simmim needs a patch embedding" in refused["densenet", "masked"]
    assert all(load_task(task).metric for task in experiment.tasks)
    assert experiment.plan((), (), {}).modes[0] == "probe"


def test_moving_shapes_are_clips_with_a_class(tmp_path):
    pytest.importorskip("av")
    from brainfm.train.sources import read_source

    load_example("experiments/make_clips").main([str(tmp_path / "clips"), "--clips", "4"])
    clips, _ = read_source(tmp_path / "clips")
    assert sorted(clip.extra["label"] for clip in clips) == ["bounces", "circles", "grows", "slides"]
    assert {clip.extra["source"] for clip in clips} == {"video"}


def test_fitted_bundle_is_one_that_synthesize_takes(tmp_path):
    from brainfm.synthesis import synthesize

    arguments = ["--phantoms", "2", "--autoencoder", "2", "--diffusion", "2"]
    load_example("experiments/fit_bundle").main([str(tmp_path / "bundle"), *arguments])
    table = synthesize(1, tmp_path / "drawn", bundle=tmp_path / "bundle", device="cpu")
    with table.open() as file:
        (row,) = csv.DictReader(file)
    volume = nib.load(table.parent / row["image_path"])
    assert volume.shape == (40, 56, 40)
    assert volume.header.get_zooms() == (4, 4, 4)
