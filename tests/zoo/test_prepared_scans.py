"""A folder of `brainfm prep` through the zoo's contracts: the right tensor, or a refusal that says what to give."""

from __future__ import annotations

import numpy as np
import pytest
from prepared_folders import AFFINE, moved_head, write
from scipy import ndimage

import brainfm
from brainfm.errors import ScanError


@pytest.fixture(scope="module")
def head_and_brain():
    return moved_head()


@pytest.fixture(scope="module")
def prepared(head_and_brain, tmp_path_factory):
    """With a bias field that was taken away, of no strength."""
    head, brain = head_and_brain
    field = np.zeros([-(-n // 4) for n in head.shape], np.float32)
    return write(tmp_path_factory.mktemp("prepared") / "sub-01", head, brain, field=field)


def litres(brain):
    """Of a brain mask on the prepared folder's voxels of 2×2×2.5 mm."""
    return float(brain.sum()) * 10 / 1e6


# name → which registration its contract starts from
BRAINS = {
    "simclr_resnet18_3d": "rigid",
    "sfcn_age": "affine",
    "pyment_sfcn_reg": "rigid",
    "synthba_densenet201": "affine",
    "brainsegfounder_swin": "none",
    "swin3d_t": "none",
}


@pytest.mark.parametrize("name", BRAINS)
def test_contract_of_a_brain_gets_all_of_it_in_the_size_of_its_registration(name, prepared, head_and_brain):
    transform = brainfm.create_transform(name)
    volume = transform.volume(prepared)
    image = volume.image[0]
    assert volume.image.shape == transform.spec.output_shape
    assert np.isfinite(image).all()
    inside = image != image[0, 0, 0]
    wanted = litres(head_and_brain[1]) * (np.linalg.det(AFFINE) if BRAINS[name] == "affine" else 1.0)
    # Voxels of the rim that are brain in part count whole; some contracts crop the brain stem's end.
    assert inside.sum() * abs(np.linalg.det(volume.affine[:3, :3])) / 1e6 == pytest.approx(wanted, rel=0.1)
    middle = np.argwhere(inside).mean(axis=0) / inside.shape
    assert np.all(np.abs(middle - 0.5) < 0.08), middle


# name → lowest and highest value where the contract's operations say so, or over which voxels it scores
HEADS = {
    "medicalnet_resnet10": "nonzero",
    "openmind_resencl": "all",
    "fomo26_resenc_b": "all",
    "brain_ldm_autoencoder": (0, 1),
    "uncnn_dwsep": (0, 1),
}


@pytest.mark.parametrize("name", HEADS)
def test_contract_of_a_whole_head_gets_one(name, prepared):
    transform = brainfm.create_transform(name)
    image = transform.volume(prepared).image
    assert transform.spec.output_shape in (None, image.shape)
    wanted = HEADS[name]
    if isinstance(wanted, tuple):
        assert (float(image.min()), float(image.max())) == pytest.approx(wanted)
    else:
        values = image[image != 0] if wanted == "nonzero" else image
        assert values.mean(dtype=np.float64) == pytest.approx(0, abs=0.02)
        assert values.std(dtype=np.float64) == pytest.approx(1, abs=0.04)  # before it was resampled


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("anatcl_resnet18", r"a prepared T1w scan, and .* VBM grey matter here; give it that, made by CAT12.*mwp1"),
        ("yaware_densenet121", r"a prepared T1w scan, and .* VBM grey matter here; give it that, made by CAT12.*mwp1"),
        ("swinbrain", r"takes 3 channels; pass \{'T1w': …, 'T2w': …, 'FLAIR': …\}, or a column a channel"),
        ("brainiac_vit", r"the space 'BrainIAC head template', whose template is not at hand; register the scan"),
    ],
)
def test_contract_that_starts_elsewhere_refuses_and_says_what_to_give(name, words, prepared):
    with pytest.raises(ScanError, match=words) as refusal:
        brainfm.create_transform(name)(prepared)
    assert str(prepared) in str(refusal.value)


def test_three_contrasts_of_one_person_are_the_three_channels(prepared, head_and_brain, tmp_path):
    head, brain = head_and_brain
    others = {name: write(tmp_path / name, head.max() - head, brain, contrast=name) for name in ("T2w", "FLAIR")}
    transform = brainfm.create_transform("swinbrain")
    image = transform({"T1w": prepared, **others}).numpy()
    assert image.shape == transform.spec.output_shape
    assert np.array_equal(image[1], image[2])
    inside = ndimage.binary_erosion(image[0] > image[0].min(), iterations=5)
    assert np.corrcoef(image[0][inside], image[1][inside])[0, 1] < -0.9
    with pytest.raises(ScanError, match=r"takes T2w here; give it that, made by brainfm prep --contrast T2w"):
        transform({"T1w": prepared, "T2w": prepared, "FLAIR": others["FLAIR"]})


@pytest.mark.parametrize("times", [20.0, 0.001])
def test_intensities_beyond_a_contracts_range_are_refused_with_who_makes_them(times, head_and_brain, tmp_path):
    head, brain = head_and_brain
    field = np.zeros([-(-n // 4) for n in head.shape], np.float32)
    folder = write(tmp_path / "sub-01", head * times, brain, field=field)
    with pytest.raises(ScanError, match=r"takes 0 to 255 \(prepared by FreeSurfer.*give it an image so prepared"):
        brainfm.create_transform("pyment_sfcn_reg")(folder)


def test_scan_without_bias_correction_is_refused_where_a_contract_takes_it_away(head_and_brain, tmp_path):
    folder = write(tmp_path / "sub-01", *head_and_brain)
    with pytest.raises(ScanError, match=r"prepared without bias correction.* --bias n4"):
        brainfm.create_transform("pyment_sfcn_reg")(folder)
