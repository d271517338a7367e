"""Small volumes are read once, whatever looks at them, and again where a file has changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import pytest
import torch
from click.testing import CliRunner

import brainfm
from brainfm import ScanError, transforms
from brainfm.cli.main import main
from brainfm.downstream import volumes
from brainfm.manifest import ScanRecord, read_manifest
from brainfm.transforms import create_transform


@pytest.fixture
def reads(monkeypatch):
    """What is read, with nothing kept from before."""
    monkeypatch.setattr(volumes, "_kept", type(volumes._kept)())
    seen = []
    load = transforms.load_scan

    def counted(image, *arguments, **options):
        seen.append(str(image))
        return load(image, *arguments, **options)

    monkeypatch.setattr(transforms, "load_scan", counted)
    return seen


def test_runs_of_a_benchmark_read_each_scan_once(phantoms, tmp_path, reads):
    arguments = [
        "benchmark",
        "phantom_sex",
        "--manifest",
        phantoms,
        "--models",
        "test_resnet_3d",
        "--modes",
        "finetune",
    ]
    arguments += ["--seeds", 2, "--no-controls", "--epochs-scale", 0.02, "-o", tmp_path / "out"]
    arguments += ["--set", "workers=0", "device=cpu", "augment=false", "trained=head"]
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    assert len(reads) - len(set(reads)) <= 1  # the first was looked at before
    assert len(set(reads)) == 20


def test_changed_file_is_read_again_and_a_bad_one_each_time(phantoms, tmp_path, reads):
    record = read_manifest(phantoms)[0]
    for name in ("image", "mask"):
        shutil.copy(getattr(record, name), tmp_path / f"{name}.nii.gz")
    own = ScanRecord(tmp_path / "image.nii.gz", tmp_path / "mask.nii.gz", "p")
    transform = create_transform(brainfm.create_model("test_resnet_3d"))
    first = volumes.read_volume(transform, own)
    assert volumes.read_volume(transform, own) is first
    assert len(reads) == 1
    image = nib.load(own.image)
    brighter = image.get_fdata().astype("float32")
    brighter[20:30, 20:30, 20:30] += 50
    nib.Nifti1Image(brighter, image.affine).to_filename(own.image)
    assert not torch.equal(volumes.read_volume(transform, own), first)
    Path(own.image).unlink()
    for _ in range(2):
        with pytest.raises(ScanError, match=r"image\.nii\.gz"):
            volumes.read_volume(transform, own)


def test_augmented_views_and_large_volumes_are_not_kept(phantoms, reads, monkeypatch):
    record, spec = read_manifest(phantoms)[0], brainfm.get_pretrained_cfg("test_resnet_3d").input_spec
    augmented = create_transform(spec, is_training=True)
    assert not torch.equal(volumes.read_volume(augmented, record), volumes.read_volume(augmented, record))
    monkeypatch.setattr(volumes, "SMALL_BYTES", 1000)
    for _ in range(2):
        volumes.read_volume(create_transform(spec), record)
    assert not volumes._kept
