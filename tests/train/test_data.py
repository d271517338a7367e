"""Which scans an epoch takes, their views, and the cache they may come from."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import shutil
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from monai.transforms import AdjustContrast, Resize, Rotate
from torch.utils.data import DataLoader

import brainfm
from brainfm import BrainfmError, ScanError
from brainfm.cli.main import main
from brainfm.files import held
from brainfm.manifest import ScanRecord, list_scans, read_manifest
from brainfm.phantom import make_cohort, make_phantom
from brainfm.shards import Shard
from brainfm.train.augment import Augmentation, View, draw_view
from brainfm.train.cache import ScanCache, build_cache, key_of, read_whole
from brainfm.train.data import _VIEW, EpochSampler, PretrainingData, collate, count_patients, stream

MILD = Augmentation(crop_min=(27, 32, 32))


@pytest.fixture
def records(cohort):
    return read_manifest(cohort)


@pytest.fixture
def data(records, small_spec):
    return PretrainingData(records, small_spec, MILD, seed=3)


@pytest.fixture(scope="module")
def cache(cohort, small_spec, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    report = build_cache(read_manifest(cohort), folder, small_spec, root=cohort.parent)
    assert (report.written, report.found, report.refused) == (16, 0, {})
    return folder


def test_an_epoch_takes_each_patient_once_with_one_of_its_scans(data):
    assert len(data) == 12
    chosen = [Counter(data[epoch, item].scan for item in range(12)) for epoch in range(3)]
    for scans in chosen:
        assert {scan % 12 for scan in scans} == set(range(12))
    assert len({scan for scans in chosen for scan in scans}) > 12  # not always the same one


def test_scan_without_a_patient_is_one_of_its_own():
    records = [ScanRecord("a.nii", patient_id=name) for name in ("1", "", "1", "")]
    assert count_patients(records) == 3


def test_every_scan_can_be_taken(records, small_spec):
    assert len(PretrainingData(records, small_spec, MILD, every_scan=True)) == 16


def test_views_are_a_function_of_seed_epoch_and_patient(records, small_spec, data):
    again = PretrainingData(records[::-1], small_spec, MILD, seed=3)  # another order of the list
    other_seed = PretrainingData(records, small_spec, MILD, seed=4)
    name = data.records[data.items[5][0]].patient_id
    item = next(n for n, scans in enumerate(again.items) if again.records[scans[0]].patient_id == name)
    first = data[1, 5].views
    assert torch.equal(first, again[1, item].views)
    assert not torch.equal(first, data[2, 5].views)
    assert not torch.equal(first, other_seed[1, 5].views)
    assert not torch.equal(first[0], first[1])


def test_workers_change_nothing(data):
    def batches(workers):
        sampler = EpochSampler(len(data), 4, seed=3)
        return list(DataLoader(data, 4, sampler=sampler, num_workers=workers, collate_fn=collate))

    for alone, shared in zip(batches(0), batches(2), strict=True):
        assert alone.scans == shared.scans
        assert torch.equal(alone.views, shared.views)
        assert alone.views.shape == (2, 4, 1, 40, 48, 48)


@pytest.mark.parametrize("smallest", [(27, 32, 32), (2, 2, 2)], ids=["crops", "crops_without_brain"])
def test_views_made_on_a_device_are_those_of_the_loader(records, small_spec, smallest):
    sampler, cpu = EpochSampler(12, 4, seed=3), torch.device("cpu")

    def batches(on_device):
        data = PretrainingData(records, small_spec, replace(MILD, crop_min=smallest), seed=3, on_device=on_device)
        loader = DataLoader(data, 4, sampler=sampler, num_workers=1, collate_fn=data.collate)
        return [data.batch(loaded, cpu) for loaded in loader]

    for made, wanted in zip(batches(True), batches(False), strict=True):
        assert (made.scans, made.failed) == (wanted.scans, wanted.failed)
        assert torch.equal(made.views, wanted.views)


def test_damaged_scan_found_out_on_the_device_is_replaced_and_named(records, small_spec, tmp_path):
    data = PretrainingData(records[:2], small_spec, MILD, seed=3)
    sample = data.crops((0, 0))
    broken = replace(sample, crops=tuple(replace(crop, image=crop.image / 0) for crop in sample.crops))
    assert torch.equal(data.make_views(broken, torch.device("cpu")).views, data[0, 0].views)


def test_processes_share_the_joined_batch_and_a_resumed_epoch_goes_on():
    joined = list(EpochSampler(23, 6, seed=1))
    assert len(joined) == 18
    parts = [list(EpochSampler(23, 2, rank=rank, world=3, seed=1)) for rank in range(3)]
    steps = [[item for part in parts for item in part[2 * step : 2 * step + 2]] for step in range(3)]
    assert [item for step in steps for item in step] == joined
    later = EpochSampler(23, 6, seed=1)
    later.first_step = 2
    assert list(later) == joined[12:]
    assert len(later) == 6
    later.epoch = 1
    assert list(later) != joined[12:]


def test_too_few_patients_for_a_batch_are_refused():
    with pytest.raises(BrainfmError, match="do not fill"):
        EpochSampler(5, 3, world=2)


def test_scan_that_cannot_be_read_is_replaced_and_named(records, small_spec, tmp_path):
    records[5] = ScanRecord(tmp_path / "gone.nii.gz", None, records[5].patient_id)
    data = PretrainingData(records, small_spec, MILD)
    item = next(n for n, scans in enumerate(data.items) if scans == [5])
    sample = data[0, item]
    assert sample.scan != 5
    assert sample.views.shape == (2, 1, 40, 48, 48)
    assert [scan for scan, _ in sample.failed] == [5]
    assert "gone.nii.gz" in sample.failed[0][1]
    assert collate([sample, data[0, 0]]).failed.keys() == {5}


def test_list_without_one_readable_scan_ends_in_an_error(small_spec, tmp_path):
    data = PretrainingData([ScanRecord(tmp_path / f"{n}.nii.gz") for n in range(3)], small_spec, MILD)
    with pytest.raises(ScanError, match="in a row cannot be read"):
        data[0, 0]


# --- The cache ------------------------------------------------------------------------------------


def test_cache_gives_the_scans_to_half_a_step_at_any_box(cache, records, cohort, small_spec):
    stored = ScanCache(cache, small_spec)
    for box in ((slice(0, 40), slice(0, 48), slice(0, 48)), (slice(3, 31), slice(7, 40), slice(5, 46))):
        for record in records[:3]:
            image, mask = read_whole(record, small_spec)
            found, brain = stored.read(key_of(record, cohort.parent), box)
            assert np.array_equal(brain.numpy(), mask[box])
            assert found.shape == (1, *mask[box].shape)
            assert np.abs(found.numpy() - image[(..., *box)]).max() <= 0.51 * np.ptp(image) / (2**16 - 1)


def test_views_from_the_cache_are_those_from_the_scans(cache, records, cohort, small_spec, data):
    cached = PretrainingData(records, small_spec, MILD, seed=3, cache=cache, root=cohort.parent)
    for item in range(4):
        plain, quick = data[0, item], cached[0, item]
        assert plain.scan == quick.scan
        assert (plain.views - quick.views).abs().max() < 1e-3


def test_second_build_writes_nothing_and_a_changed_scan_alone_is_written_again(records, small_spec, tmp_path):
    copies = []
    for n, record in enumerate(records[:3]):
        path = tmp_path / f"{n}.nii.gz"
        path.write_bytes(Path(record.image).read_bytes())
        copies.append(ScanRecord(path, record.mask))
    assert build_cache(copies, tmp_path / "cache", small_spec, root=tmp_path).written == 3
    assert build_cache(copies, tmp_path / "cache", small_spec, root=tmp_path).found == 3
    Path(copies[1].image).write_bytes(Path(records[7].image).read_bytes())
    again = build_cache(copies, tmp_path / "cache", small_spec, root=tmp_path)
    assert (again.written, again.found) == (1, 2)
    whole = (slice(0, 40), slice(0, 48), slice(0, 48))
    found = ScanCache(tmp_path / "cache", small_spec).read(key_of(copies[1], tmp_path), whole)[0]
    image = read_whole(records[7], small_spec)[0]
    assert np.abs(found.numpy() - image).max() < np.ptp(image) / (2**16 - 1)


def test_build_that_was_killed_goes_on(records, small_spec, tmp_path, cohort):
    build_cache(records[:2], tmp_path, small_spec, root=cohort.parent)
    with (tmp_path / "index.jsonl").open("a") as index:
        index.write('\n{"key": "half a li')
    report = build_cache(records[:4], tmp_path, small_spec, root=cohort.parent, workers=2)
    assert (report.written, report.found) == (2, 2)
    assert len((tmp_path / "index.jsonl").read_text().splitlines()) == 4


def test_shards_build_the_cache_of_one_build_side_by_side(cache, records, cohort, small_spec, tmp_path):
    for shard in ("2/3", "1/3", "3/3", "2/3"):
        report = build_cache(records, tmp_path, small_spec, root=cohort.parent, shard=Shard.of(shard))
        assert report.written + report.found == len(Shard.of(shard).numbers(len(records)))
    assert report.written == 0  # the second time
    whole, parts = (ScanCache(folder, small_spec) for folder in (cache, tmp_path))
    assert parts._levels == whole._levels
    for key in whole._levels:
        for name in ("image", "mask"):
            place = f"scans/{key}.{name}.npy"
            assert (tmp_path / place).read_bytes() == (cache / place).read_bytes()
    assert build_cache(records, tmp_path, small_spec, root=cohort.parent).found == len(records)


def test_second_build_of_a_cache_is_refused_while_the_first_lasts(records, small_spec, tmp_path):
    with held(tmp_path), pytest.raises(BrainfmError, match="is writing it"):
        build_cache(records[:2], tmp_path, small_spec)
    assert build_cache(records[:2], tmp_path, small_spec).written == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache.json", "index.jsonl", "scans"]


def test_bad_scan_is_listed_and_the_rest_is_built(records, small_spec, tmp_path):
    records[1] = ScanRecord(tmp_path / "gone.nii.gz", None, "x")
    report = build_cache(records[:3], tmp_path / "cache", small_spec)
    assert report.written == 2
    assert list(report.refused) == [str(tmp_path / "gone.nii.gz")]
    data = PretrainingData(records[:3], small_spec, MILD, cache=tmp_path / "cache")
    assert "gone.nii.gz" in data[0, 1].failed[0][1]


@pytest.mark.parametrize("shard", [None, "1/1"])
def test_scan_that_failed_twice_is_listed_and_passed_over_until_it_changes(
    shard, records, small_spec, tmp_path, caplog
):
    bad = tmp_path / "bad, as it is.nii.gz"
    bad.write_bytes(b"no image")
    scans, folder = [records[0], ScanRecord(bad, records[1].mask, "x")], tmp_path / "cache"
    listed = folder / ("quarantine.1-of-1.csv" if shard else "quarantine.csv")

    def build():
        return build_cache(scans, folder, small_spec, shard=Shard.of(shard) if shard else None)

    build()
    assert not listed.exists()
    assert list(build().refused) == [str(bad)]
    assert str(bad) in listed.read_text()
    bad.touch()
    bad.write_bytes(b"no image")  # as large as before, and of another time
    assert "passed over" not in caplog.text
    build()
    assert not listed.exists()
    build()
    report = build()
    assert (report.written, report.found, list(report.refused)) == (0, 1, [str(bad)])
    assert "1 scans that failed twice are passed over" in caplog.text
    shutil.copy(records[1].image, bad)
    assert (build().written, listed.exists()) == (1, False)


def test_cache_of_another_contract_no_cache_and_a_damaged_one_are_refused(cache, spec, small_spec, tmp_path, records):
    with pytest.raises(BrainfmError, match="another input contract"):
        ScanCache(cache, spec)
    with pytest.raises(BrainfmError, match="another input contract"):
        build_cache(records, cache, spec)
    with pytest.raises(BrainfmError, match="brainfm cache build"):
        ScanCache(tmp_path, small_spec)
    (tmp_path / "cache.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(BrainfmError, match="damaged"):
        ScanCache(tmp_path, small_spec)


def test_contract_that_does_not_end_in_a_masked_zscore_is_refused(records, small_spec):
    with pytest.raises(BrainfmError, match="z-score"):
        read_whole(records[0], replace(small_spec, operations=small_spec.operations[:-1]))


def test_cache_that_cannot_be_mapped_is_read(cache, records, cohort, small_spec, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.ENODEV, "No such device")

    box = (slice(3, 31), slice(7, 40), slice(5, 46))
    key = key_of(records[0], cohort.parent)
    wanted = ScanCache(cache, small_spec).read(key, box)
    monkeypatch.setattr(mmap, "mmap", refuse)
    found = ScanCache(cache, small_spec).read(key, box)
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("root", [".", "/data", "/data/", "data", "../data", "/data/a", "/"])
@pytest.mark.parametrize(
    "path", ["/data/a/b.nii", "data/a.nii", "a.nii", "../data/a.nii", "/data/../a.nii", "/database/a", "./a.nii"]
)
def test_key_is_of_the_path_as_the_system_has_it_relative_to_the_root(path, root):
    expected = hashlib.sha256(f"{os.path.relpath(path, root)}\0".encode()).hexdigest()[:20]
    assert key_of(ScanRecord(path), root) == expected


def test_build_by_the_wrong_contract_does_not_block_the_right_one(cohort, tmp_path):
    build = ["cache", "build", str(cohort), str(tmp_path / "cache")]
    wrong = CliRunner().invoke(main, build)  # the default model's contract has 1 mm
    assert wrong.exit_code == 1
    assert "0 scans written" in wrong.output
    right = CliRunner().invoke(main, [*build, "--model", "test_resnet_3d"])
    assert right.exit_code == 0, right.output
    assert "16 scans written" in right.output
    refused = CliRunner().invoke(main, build)
    assert refused.exit_code == 1
    assert "of 1 × 40 × 48 × 48 voxels where this model takes 1 × 150 × 192 × 192" in refused.output
    assert f"build MANIFEST {tmp_path / 'cache'}-" in refused.output
    assert ScanCache(tmp_path / "cache", brainfm.get_pretrained_cfg("test_resnet_3d").input_spec).errors == {}


def test_cache_of_an_earlier_version_which_masked_its_scans_is_refused(cache, small_spec, tmp_path, records):
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    content = json.loads((cache / "cache.json").read_text())
    (tmp_path / "cache.json").write_text(json.dumps(content | {"format": 1}))
    for use in (lambda: ScanCache(tmp_path, small_spec), lambda: build_cache(records, tmp_path, small_spec)):
        with pytest.raises(BrainfmError, match=r"earlier brainfm.*0 outside the brain.*build another"):
            use()


def test_cache_keeps_whole_numbers_as_they_are(small_spec, tmp_path):
    phantom = list_scans(make_cohort(1, tmp_path / "phantoms", spacing=4.0))
    build_cache(phantom, tmp_path / "cache", small_spec, root=tmp_path)
    image, _ = read_whole(phantom[0], small_spec)
    whole = (slice(0, 40), slice(0, 48), slice(0, 48))
    assert np.array_equal(ScanCache(tmp_path / "cache", small_spec).read(key_of(phantom[0], tmp_path), whole)[0], image)


# --- Views, from the file to what is trained on ---------------------------------------------------


@pytest.mark.parametrize(
    ("spacing", "model", "epochs"),
    [(4.0, "test_resnet_3d", 8), pytest.param(1.0, "simclr_resnet18_3d", 1, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("cached", [False, True], ids=["nifti", "cache"])
def test_views_are_those_of_the_released_pipeline(cached, spacing, model, epochs, tmp_path):
    """Which augments the image as stored, whose background WhiteStripe made a negative constant, and masks it last."""
    scan = _whitestriped(tmp_path, spacing)
    spec = brainfm.get_pretrained_cfg(model).input_spec
    if cached:
        build_cache([scan], tmp_path / "cache", spec, root=tmp_path)
    data = PretrainingData(
        [scan], spec, Augmentation(), seed=5, cache=tmp_path / "cache" if cached else None, root=tmp_path
    )
    for epoch in range(epochs):
        for crop, view in zip(data.crops((epoch, 0)).crops, data[epoch, 0].views, strict=True):
            wanted = _released_view(scan, crop.view, spec.output_shape[1:])
            assert torch.linalg.vector_norm(view - wanted) < 1e-4 * torch.linalg.vector_norm(wanted)
            masked = _released_view(scan, crop.view, spec.output_shape[1:], masked_first=True)
            assert torch.linalg.vector_norm(masked - wanted) > 1e-2 * torch.linalg.vector_norm(wanted)


def _whitestriped(folder: Path, spacing: float) -> ScanRecord:
    """A scan as TurboPrep writes it, in float32: the whole volume shifted and divided."""
    phantom = make_phantom(3, spacing=spacing)
    image = ((phantom.image + 11.5) / 173.3).astype(np.float32)
    nib.Nifti1Image(image, phantom.affine).to_filename(folder / "normalized.nii.gz")
    nib.Nifti1Image(phantom.mask, phantom.affine).to_filename(folder / "mask.nii.gz")
    return ScanRecord(folder / "normalized.nii.gz", folder / "mask.nii.gz", "1")


def _released_view(scan: ScanRecord, view: View, shape: tuple[int, ...], masked_first: bool = False) -> torch.Tensor:
    """A view by nibabel and MONAI's transforms in the released code's order (t1_datasets.py, main.py)."""
    image, mask = (
        torch.from_numpy(nib.load(path).get_fdata().astype(np.float32).transpose(2, 1, 0))[None]
        for path in (scan.image, scan.mask)
    )
    if image.shape[1:] == (193, 229, 193):
        image, mask = (volume[:, 10:160, 19:211, 1:] for volume in (image, mask))
    if masked_first:
        image = image * mask
    turn = {"angle": (view.angle or 0.0, 0, 0), "keep_size": True, "padding_mode": "border"}
    for change in (
        lambda volume, _: volume[(..., *view.box)],
        lambda volume, mode: Resize(shape, mode="trilinear" if mode == "bilinear" else mode)(volume),
        lambda volume, _: volume.flip(-1) if view.flip else volume,
        lambda volume, mode: Rotate(mode=mode, **turn)(volume) if view.angle is not None else volume,
    ):
        image, mask = change(image, "bilinear"), change(mask, "nearest")
    image = image + (view.shift or 0.0)
    if view.gamma is not None:
        image = AdjustContrast(view.gamma)(image)
    image, mask = (torch.as_tensor(volume).double() for volume in (image, mask))
    count, image = mask.sum(), image * mask
    mean = image.sum() / count
    return (image - mean) / torch.sqrt((image**2).sum() / count - mean**2 + 1e-12) * mask


def test_view_of_one_intensity_is_drawn_again(small_spec, tmp_path):
    """As in the released code; here the lower part of the image is flat."""
    phantom = make_phantom(3, spacing=4.0)
    image = phantom.image.copy()
    image[..., :14] = 7
    nib.Nifti1Image(image, phantom.affine).to_filename(tmp_path / "t1.nii.gz")
    nib.Nifti1Image(phantom.mask, phantom.affine).to_filename(tmp_path / "mask.nii.gz")
    scan = ScanRecord(tmp_path / "t1.nii.gz", tmp_path / "mask.nii.gz", "1")
    small = Augmentation(crop_min=(3, 4, 4))
    loader, device = (PretrainingData([scan], small_spec, small, seed=0, on_device=where) for where in (False, True))
    pixels, brain = read_whole(scan, small_spec)

    def is_flat(epoch):
        box = draw_view(stream(0, epoch, _VIEW, zlib.crc32(b"1"), 0), small_spec.output_shape[1:], small).box
        inside = pixels[0][box][brain[box]]
        return len(inside) > 0 and np.ptp(pixels[0][box]) == 0

    flat = [epoch for epoch in range(3000) if is_flat(epoch)][:3]
    assert flat
    for epoch in flat:
        views = loader[epoch, 0].views
        assert (views.flatten(2).std(dim=2) > 0).all()
        assert torch.equal(device.make_views(device[epoch, 0], torch.device("cpu")).views, views)


@pytest.mark.skipif(os.name == "nt", reason="forks")
def test_shards_that_overlap_and_run_at_once_build_the_cache_of_one_build(cache, cohort, small_spec, tmp_path):
    def build(*arguments):
        if (child := os.fork()) == 0:
            command = ["cache", "build", cohort, tmp_path / "parts", "--model", "test_resnet_3d", *arguments]
            os._exit(CliRunner().invoke(main, list(map(str, command))).exit_code)
        return child

    shards = [build("--workers", 1, "--shard", shard) for shard in ("1/2", "2/2", "2/2", "1/3")]
    assert [os.waitpid(child, 0)[1] for child in shards] == [0, 0, 0, 0]
    whole, parts = (ScanCache(folder, small_spec) for folder in (cache, tmp_path / "parts"))
    assert parts._levels == whole._levels
    for file in (cache / "scans").iterdir():
        assert (tmp_path / "parts" / "scans" / file.name).read_bytes() == file.read_bytes()
    assert not list((tmp_path / "parts").rglob(".*"))


@pytest.mark.parametrize("command", ["pretrain", "cache build"])
def test_disk_is_not_asked_of_any_row_before_the_first_scan_is_read(command, tmp_path, monkeypatch):
    pd = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    from brainfm.train import cache as reading

    class FirstScanError(Exception):
        pass

    def first(*_, **__):
        raise FirstScanError

    monkeypatch.setattr(reading, "state_of", first)  # of a scan that is written
    monkeypatch.setattr(reading, "load_scan", first)
    asked = []
    for name in ("stat", "lstat", "scandir"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, call=call, **kwargs: asked.append(args) or call(*args, **kwargs))

    def calls(rows):
        place = tmp_path / str(rows)
        place.mkdir()
        names = [f"sub-{n:05}/anat/sub-{n:05}" for n in range(rows)]
        frame = {"image_path": [f"{name}_T1w.nii.gz" for name in names], "patient_id": [name[:9] for name in names]}
        pd.DataFrame(frame | {"mask_path": [f"{name}_mask.nii.gz" for name in names]}).to_parquet(place / "m.parquet")
        asked.clear()
        fields = ["method=simclr", "augmentation.crop_min=[27,32,32]", "input_size=[16,16,16]", "workers=0"]
        arguments = {
            "pretrain": [*fields, "model=test_resnet_3d", f"manifest={place}/m.parquet", f"output={place}/run"],
            "cache build": [f"{place}/m.parquet", f"{place}/cache", "--model", "test_resnet_3d", "--workers", "1"],
        }
        done = CliRunner().invoke(main, [*command.split(), *arguments[command]])
        assert "FirstScanError" in f"{done.output} {done.exception!r}"
        return len(asked)

    calls(20)  # imports
    assert calls(1000) <= calls(100) + 5
