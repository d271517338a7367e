"""Known changes planted in phantoms and in prepared scans, and how embeddings follow them."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from click.testing import CliRunner

from brainfm.cli import main
from brainfm.downstream import recovery as job
from brainfm.downstream.recovery import CHANGES, recovery
from brainfm.downstream.tissue import lose, near_fluid, tissues
from brainfm.errors import BrainfmError
from brainfm.phantom import make_phantom


@pytest.fixture(scope="module")
def phantom():
    one = make_phantom(0, spacing=4.0)
    return one.image, one.mask > 0, one.affine


def rows(folder, name):
    return list(csv.DictReader((folder / name).open(encoding="utf-8")))


@pytest.mark.slow
def test_planted_atrophy_in_phantoms_moves_the_embedding_further_at_every_step(tmp_path):
    command = ["recovery", "--phantoms", "4", "--model", "test_resnet_3d", "--change", "atrophy", "-o", str(tmp_path)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    (verdict,) = rows(tmp_path, "verdicts.csv")
    assert (verdict["change"], verdict["patients"], verdict["rising"], verdict["distance_rank"]) == (
        *("atrophy", "4"),
        *("1", "1"),
    )
    for patient in {row["patient_id"] for row in rows(tmp_path, "recovery.csv")}:
        curve = [row for row in rows(tmp_path, "recovery.csv") if row["patient_id"] == patient]
        apart = [float(row["distance"]) for row in curve if row["change"] == "atrophy"]
        assert apart[0] == 0
        assert np.all(np.diff(apart) > 0)
        assert len([row for row in curve if row["change"] == "retest"]) == job.REPEATS
    floor = np.percentile(
        [float(row["distance"]) for row in rows(tmp_path, "recovery.csv") if row["change"] == "retest"], 95
    )
    assert float(verdict["floor"]) == pytest.approx(floor, rel=1e-4)
    assert "atrophy: rises at every step in 100% of 4 patients" in result.output
    assert (tmp_path / "recovery_test_resnet_3d.png").stat().st_size > 5000


def test_scans_of_a_manifest_are_turned_for_their_floor_and_a_bad_one_is_left_out(phantoms, tmp_path):
    lines = phantoms.read_text().splitlines()[:5]
    listed = phantoms.with_name("few.csv")
    bad = ["sub-bad/normalized.nii.gz", "sub-bad/mask.nii.gz", "sub-bad", *lines[1].split(",")[3:]]
    listed.write_text("\n".join([*lines, ",".join(bad)]) + "\n")
    try:
        verdicts, failed = recovery(listed, ["test_resnet_3d"], tmp_path, changes=["lesion"], label="severity")
    finally:
        listed.unlink()
    assert list(failed) == ["sub-bad"]
    assert (verdicts[0].patients, verdicts[0].label) == (4, "severity")
    assert verdicts[0].rising == 1
    assert verdicts[0].seen_from <= 50  # a large stroke is seen above a turn of one degree
    retest = [float(row["distance"]) for row in rows(tmp_path, "recovery.csv") if row["change"] == "retest"]
    assert min(retest) > 0


def test_atrophy_and_lesion_take_as_much_tissue_as_they_say(phantom):
    image, mask, affine = phantom
    fractions = tissues(image, mask)
    tissue, fluid = fractions[1:].sum(), np.average(image, weights=fractions[0])

    def lost(changed):
        with np.errstate(divide="ignore", invalid="ignore"):
            part = np.where(np.abs(fluid - image) > 1, (changed - image) / (fluid - image), 0)
        return part[mask].sum()

    for name, volume in (("atrophy", 0.04 * tissue), ("lesion", 20 / 0.064)):
        plant = CHANGES[name].begin(image, mask, affine, np.random.default_rng(3))
        assert lost(plant(4.0 if name == "atrophy" else 20.0)) == pytest.approx(volume, rel=0.02), name
        np.testing.assert_array_equal(plant(8.0)[~mask], image[~mask])
        smaller, larger = (np.abs(plant(size) - image) for size in (2.0, 8.0))
        assert (larger >= smaller - 1e-2).all()  # nested


def test_tissues_are_ordered_from_dark_to_bright_and_sum_to_one_in_the_brain(phantom):
    image, mask, _ = phantom
    fractions = tissues(image, mask)
    assert fractions[:, ~mask].max() == 0
    np.testing.assert_allclose(fractions[:, mask].sum(axis=0), 1, rtol=1e-4)
    means = [np.average(image, weights=one) for one in fractions]
    assert means == sorted(means)
    assert fractions[2, image == image[mask].max()].min() > 0.99  # the brightest is white matter
    near = near_fluid(fractions, np.full(3, 4.0))
    gone = lose(image, fractions, near, 0.05, 1e9)  # all there is
    assert np.ptp(gone[mask & (fractions[0] < 1e-3)]) < 0.02 * np.ptp(image[mask])


def test_a_change_that_is_never_above_the_floor_has_no_size_from_which_it_is_seen():
    rng = np.random.default_rng(0)
    clean = rng.standard_normal((6, 4))
    step = np.zeros(4)
    step[0] = 0.1
    grown = np.stack([clean + size * step for size in CHANGES["atrophy"].sizes], axis=1)

    def judged(noise):
        repeats = clean[:, None] + noise * rng.standard_normal((6, 50, 4))
        return job._judged("m", "atrophy", job._Series(["p"] * 6, np.zeros(6), clean, repeats, {"atrophy": grown}), "")

    assert np.isnan(judged(10.0)[0].seen_from)
    assert "never above" in str(judged(10.0)[0])
    assert judged(1e-6)[0].seen_from == 0.5
    assert judged(0.1)[0].seen_from in (4.0, 8.0)  # 0.1 · √(χ² of 4, 95 %) is 0.31: 4 × 0.1 is above it
    assert judged(1e-6)[0].probe_rank == 1
    assert judged(1e-6)[0].read_from == 0.5
    assert np.isnan(judged(10.0)[0].read_from)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "test_resnet_3d"], "give scans, or a number of phantoms"),
        (["--model", "test_resnet_3d", "--phantoms", "4", "--change", "growth"], "there are atrophy, lesion, bias"),
        (["--model", "test_resnet_3d", "--phantoms", "4", "--label", "iq"], "phantoms have no number 'iq'"),
    ],
)
def test_recovery_refuses_what_it_cannot_do(options, said, tmp_path):
    result = CliRunner().invoke(main, ["recovery", *options, "-o", str(tmp_path)])
    assert result.exit_code == 1
    assert said in result.output


def test_contracts_of_other_contrasts_are_refused(small_spec):
    from dataclasses import replace

    with pytest.raises(BrainfmError, match="takes T2w"):
        job._check_contrast("other", replace(small_spec, representation="T2w"))
