"""Scans of two channels, from files to results: cache, views, pretraining, embeddings, fine-tuning, a probe."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import brainfm
from brainfm import BrainfmError, ScanError, registry
from brainfm.downstream.corruptions import CORRUPTIONS
from brainfm.downstream.features import read_features
from brainfm.downstream.finetuning import Finetuning, Labelled, finetune
from brainfm.downstream.probe import fit_probe, predict_probe
from brainfm.downstream.robustness import robustness
from brainfm.downstream.task import load_task, read_task
from brainfm.manifest import ScanRecord, read_manifest
from brainfm.phantom import make_cohort
from brainfm.train.augment import Augmentation
from brainfm.train.cache import ScanCache, build_cache, key_of, read_whole
from brainfm.train.data import PretrainingData
from brainfm.train.pretraining import pretrain
from brainfm.train.recipe import recipe_from_dict
from brainfm.train.summary import summarise
from brainfm.zoo.cards import Card

MILD = Augmentation(crop_min=(27, 32, 32))
NETWORKS = {
    "simclr": {"network": "resnet", "args": {"block": "basic", "layers": [1] * 4, "widths": [8, 16, 16, 32]}},
    "mae": {
        "network": "vit",
        "args": {"dim": 48, "depth": 2, "num_heads": 3, "img_size": [40, 48, 48], "patch_size": [8, 8, 8]},
    },
}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    """Twelve patients whose T1w image is a phantom, and whose FLAIR image that with its intensities upside down."""
    folder = tmp_path_factory.mktemp("two_channels")
    with make_cohort(12, folder, spacing=4.0, seed=5).open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        t1w, brain = (nib.load(folder / row[name]) for name in ("image_path", "mask_path"))
        voxels = t1w.get_fdata(dtype=np.float32)
        flair = (voxels.max() + 100 - voxels) * (np.asanyarray(brain.dataobj) > 0)
        row["t1w_path"] = row.pop("image_path")
        row["flair_path"] = row["t1w_path"].replace("normalized", "flair")
        nib.Nifti1Image(flair, t1w.affine).to_filename(folder / row["flair_path"])
    with (folder / "two.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder / "two.csv"


@pytest.fixture(scope="module")
def models(small_spec):
    """Networks of two channels, registered for this module: their names, by how they are pretrained."""
    contract = small_spec.to_dict() | {"channels": ["T1w", "FLAIR"], "output_shape": [2, 40, 48, 48]}
    described = {
        f"two_channels_{method}_3d": network | {"input": "two", "num_features": 48 if method == "mae" else 32}
        for method, network in NETWORKS.items()
    }
    card = Card.from_dict({"inputs": {"two": contract}, "models": described})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_registered", dict(registry._registered))
        yield dict(zip(NETWORKS, registry.register_card(card), strict=True))


@pytest.fixture(scope="module")
def spec(models):
    return brainfm.get_pretrained_cfg(models["simclr"]).input_spec


@pytest.fixture(scope="module")
def records(manifest):
    return read_manifest(manifest)


@pytest.fixture(scope="module")
def cache(manifest, records, spec, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    assert build_cache(records, folder, spec, root=manifest.parent, workers=2).written == 12
    return folder


# --- Scans ----------------------------------------------------------------------------------------


def test_a_scan_is_read_with_its_channels_in_the_contracts_order(records, spec):
    image, mask = read_whole(records[0], spec)
    assert (image.shape, mask.shape) == ((2, 40, 48, 48), (40, 48, 48))
    sums = (image[0] + image[1])[mask]
    assert np.ptp(sums) < 1e-3 * sums.mean()
    swapped = ScanRecord(dict(reversed(records[0].images.items())), records[0].mask)
    assert np.array_equal(read_whole(swapped, spec)[0], image)


def test_cache_holds_each_channel_in_steps_of_its_own_range(cache, manifest, records, spec):
    stored = ScanCache(cache, spec)
    box = (slice(3, 31), slice(7, 40), slice(5, 46))
    for record in records[:3]:
        image, mask = read_whole(record, spec)
        found, brain = stored.read(key_of(record, manifest.parent), box)
        ranges = np.ptp(image, axis=(1, 2, 3))
        assert ranges[0] != ranges[1]
        assert np.array_equal(brain.numpy(), mask[box])
        errors = np.abs(found.numpy() - image[(..., *box)]).max(axis=(1, 2, 3))
        assert (errors <= 0.51 * ranges / (2**16 - 1)).all()


def test_views_from_the_cache_are_those_from_the_scans(cache, manifest, records, spec):
    plain = PretrainingData(records, spec, MILD, seed=3)
    quick = PretrainingData(records, spec, MILD, seed=3, cache=cache, root=manifest.parent)
    made = PretrainingData(records, spec, MILD, seed=3, cache=cache, root=manifest.parent, on_device=True)
    for item in range(3):
        views = quick[0, item].views
        assert views.shape == (2, 2, 40, 48, 48)
        assert (plain[0, item].views - views).abs().max() < 1e-3
        assert torch.equal(made.make_views(made[0, item], torch.device("cpu")).views, views)


@pytest.mark.parametrize(("number", "channel"), [(0, "T1w"), (1, "FLAIR")])
def test_each_channel_has_the_views_that_it_has_alone(number, channel, records, spec):
    alone = replace(spec, channels=(channel,), representation=channel, output_shape=(1, 40, 48, 48))
    images = [replace(record, image=record.images[channel.lower()]) for record in records]
    one, both = PretrainingData(images, alone, MILD, seed=3), PretrainingData(records, spec, MILD, seed=3)
    for item in range(3):
        assert torch.equal(one[0, item].views[:, 0], both[0, item].views[:, number])


def test_a_change_in_any_channel_is_seen_and_a_lost_one_named(records, spec, tmp_path):
    copies = []
    for n, record in enumerate(records[:3]):
        flair = tmp_path / f"flair{n}.nii.gz"
        flair.write_bytes(Path(record.images["flair"]).read_bytes())
        copies.append(ScanRecord({"t1w": record.images["t1w"], "flair": flair}, record.mask))
    assert build_cache(copies, tmp_path / "cache", spec, root=tmp_path).written == 3
    Path(copies[0].images["flair"]).write_bytes(Path(records[5].images["flair"]).read_bytes())
    Path(copies[1].images["flair"]).unlink()
    report = build_cache(copies, tmp_path / "cache", spec, root=tmp_path)
    assert (report.written, report.found) == (1, 1)
    assert list(report.refused) == [copies[1].name]
    assert "flair1.nii.gz: no such file" in report.refused[copies[1].name]


def test_key_tells_channels_apart_and_not_the_order_of_the_columns():
    a, b = Path("a.nii"), Path("b.nii")
    key = key_of(ScanRecord({"t1w": a, "flair": b}), ".")
    assert key == key_of(ScanRecord({"FLAIR": b, "T1w": a}), ".")
    others = [ScanRecord({"t1w": b, "flair": a}), ScanRecord({"t1w": a, "t2w": b}), ScanRecord(a, b), ScanRecord(a)]
    assert len({key, *(key_of(record, ".") for record in others)}) == 5


def test_missing_channel_is_refused_or_0_as_the_contract_says(records, spec, tmp_path):
    alone = ScanRecord({"t1w": records[0].images["t1w"]}, records[0].mask)
    with pytest.raises(ScanError, match="FLAIR is missing"):
        read_whole(alone, spec)
    lenient = replace(spec, missing_channel="zeros")
    build_cache([alone], tmp_path, lenient)
    for folder in (None, tmp_path):
        views = PretrainingData([alone], lenient, MILD, cache=folder)[0, 0].views
        assert views[:, 0].any()
        assert not views[:, 1].any()


def test_contract_that_standardises_all_channels_together_is_refused(records, spec):
    *before, zscore = spec.operations
    joint = replace(spec, operations=(*before, replace(zscore, per_channel=False)))
    with pytest.raises(BrainfmError, match="per_channel=True"):
        read_whole(records[0], joint)


# --- Runs -----------------------------------------------------------------------------------------


def recipe(method, models, manifest, folder, **fields):
    settings = {"epochs": 1, "batch_size": 4, "workers": 0, "device": "cpu", "augmentation": {"crop_min": [27, 32, 32]}}
    decoder = {"decoder_dim": 24, "decoder_depth": 1, "decoder_heads": 2} if method == "mae" else {}
    paths = {"manifest": str(manifest), "output": str(folder)}
    return recipe_from_dict({"method": method, "model": models[method]} | settings | decoder | paths | fields)


def test_dry_run_counts_the_missing_files_of_every_channel(models, manifest, tmp_path):
    moved = tmp_path / "elsewhere.csv"  # where none of its relative paths leads
    moved.write_bytes(manifest.read_bytes())
    text = summarise(recipe("simclr", models, moved, tmp_path / "run"))
    assert "36 are not there" in text


@pytest.mark.slow
@pytest.mark.parametrize("method", ["simclr", "mae"])
def test_pretrained_encoder_of_two_channels_is_exported_and_embeds_them(
    method, models, manifest, records, cache, tmp_path
):
    export = pretrain(recipe(method, models, manifest, tmp_path / "run", cache=str(cache)))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    model = brainfm.create_model(f"local-dir:{export}")
    assert (model.in_chans, model.pretrained_cfg.in_chans) == (2, 2)
    assert model.pretrained_cfg.input_spec.channels == ("T1w", "FLAIR")
    table = brainfm.embed(manifest, f"local-dir:{export}", device="cpu")
    assert not table.errors
    assert table.vectors.shape == (12, model.num_features)
    mixed = {"t1w": records[0].images["t1w"], "flair": records[1].images["flair"]}
    other = brainfm.embed([ScanRecord(mixed, records[0].mask)], model, device="cpu").vectors[0]
    assert not np.allclose(other, table.vectors[0], atol=1e-4)


def test_run_on_smaller_views_states_their_size_and_channels(models, manifest, tmp_path):
    export = pretrain(recipe("simclr", models, manifest, tmp_path / "run", input_size=[24, 24, 24]))
    assert brainfm.create_model(f"local-dir:{export}").pretrained_cfg.input_spec.output_shape == (2, 24, 24, 24)


@pytest.mark.slow
def test_exported_encoder_is_fine_tuned_probed_and_tested_on_corrupted_scans(models, manifest, tmp_path):
    export = pretrain(recipe("simclr", models, manifest, tmp_path / "run"))
    data = read_task(load_task("phantom_sex"), manifest)
    parts = [Labelled([data.records[n] for n in rows], data.labels[rows]) for rows in np.split(np.arange(12), [8])]
    settings = Finetuning(
        epochs=1, batch_size=4, workers=0, device="cpu", augment=True, output=str(tmp_path / "finetuned")
    )
    model = finetune(brainfm.create_model(f"local-dir:{export}"), *parts, data.task.kind, settings)
    lost = ScanRecord({"t1w": data.records[0].images["t1w"]}, data.records[0].mask)
    predictions, failed = model.predict([*parts[1].records, lost], batch_size=2)
    assert predictions.shape == (4,)
    assert ((predictions > 0) & (predictions < 1)).all()
    assert "FLAIR is missing" in failed[4]

    encoder = brainfm.create_model(f"local-dir:{export}")
    features = read_features(data.records, encoder, tmp_path, "two", device="cpu").vectors
    assert features.shape == (12, 32)
    probe = fit_probe(features, data.labels, data.task.kind, patients=data.patients)
    assert predict_probe(probe, features, data.task.kind).shape == (12,)
    again = read_features(data.records, encoder, tmp_path, "two", device="cpu").vectors
    assert np.array_equal(again, features)

    age = read_task(load_task("phantom_age"), manifest)
    curve = robustness([age], [f"local-dir:{export}"], tmp_path / "results", names=["noise"], device="cpu")
    with curve.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["strength"]) for row in rows] == list(CORRUPTIONS["noise"].levels)
    assert len({row["value"] for row in rows}) == len(rows)
