"""Visits of one person meet halfway, whatever their order, and go to the template together."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from prepared_folders import moved_head, write
from scipy.spatial.transform import Rotation

from brainfm.cli import main
from brainfm.files import file_sha256
from brainfm.prep.longitudinal import is_aligned, mean_rigid, to_midpoint
from brainfm.prep.pipeline import Settings
from brainfm.scan.prepared import read_prepared

SHAPE, OWN = (66, 78, 66), np.diag([3.0, 3.0, 3.0, 1.0]) + np.pad([[-98.0], [-130.0], [-88.0], [0.0]], ((0, 0), (3, 0)))


def rigid(degrees, shift):
    """[4, 4], turned about the three axes and shifted by mm."""
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    matrix[:3, 3] = shift
    return matrix


TRUE = (rigid((6, -4, 3), (5, 0, -4)), rigid((-5, 3, 8), (-7, 6, 2)), rigid((0, 8, -2), (0, -5, 6)))


def brain_points():
    return np.c_[np.random.default_rng(0).uniform((-60, -95, -40), (60, 60, 70), (200, 3)), np.ones(200)].T


@pytest.fixture(scope="module")
def visits(tmp_path_factory):
    """Three scans of one head, each turned otherwise, with noise of its own; none yet registered well."""
    folder = tmp_path_factory.mktemp("visits")
    draw = np.random.default_rng(4)
    folders = []
    for number, true in enumerate(TRUE):
        head, brain = moved_head(true, OWN, SHAPE)
        head = np.maximum(head + draw.normal(0, 4, head.shape), 0)
        where = write(folder / f"ses-{number}", head, brain, affine_of_voxels=OWN, rigid=true.tolist())
        record = json.loads((where / "prep.json").read_text())
        record["input"]["sha256"] = str(number)
        (where / "prep.json").write_text(json.dumps(record))
        folders.append(where)
    return folders


@pytest.mark.slow
def test_visits_meet_halfway_and_in_any_order(visits):
    scans = [read_prepared(folder) for folder in visits[:2]]
    to_mean = to_midpoint(scans)
    between = np.linalg.inv(TRUE[1]) @ TRUE[0]  # from points of the first to points of the second
    points = np.linalg.inv(TRUE[0]) @ brain_points()
    first, second = to_mean[0] @ points, to_mean[1] @ between @ points
    assert np.linalg.norm((first - second)[:3], axis=0).max() < 0.3
    # each is turned by half of what lies between them
    turns = [Rotation.from_matrix(matrix[:3, :3]).magnitude() for matrix in (*to_mean, between)]
    assert turns[0] == pytest.approx(turns[1], rel=0.02)
    assert turns[0] == pytest.approx(turns[2] / 2, rel=0.02)
    other_way = to_midpoint(scans[::-1])
    assert np.linalg.norm((other_way[1] @ points - first)[:3], axis=0).max() < 0.01


@pytest.mark.slow
def test_visits_go_to_the_template_together_by_the_command(visits, tmp_path):
    """Both are prepared already: what is left to do is to bring them together."""
    output, command = tmp_path / "prep", ["prep", "-o", str(tmp_path / "prep"), "--bias", "none", "--longitudinal"]
    settings = Settings(bias="none", longitudinal=True)
    for number in (0, 1):
        name = f"sub-1_ses-{number}"
        (tmp_path / f"{name}_T1w.nii").write_bytes(b"visit %d" % number)
        shutil.copytree(visits[number], output / name)
        (output / name / "qc.png").touch()
        record = json.loads((output / name / "prep.json").read_text())
        record["input"] |= {"sha256": file_sha256(tmp_path / f"{name}_T1w.nii")}
        (output / name / "prep.json").write_text(json.dumps(record | {"settings": settings.to_dict()}))
        command.append(str(tmp_path / f"{name}_T1w.nii"))
    folders = [output / f"sub-1_ses-{number}" for number in (0, 1)]
    assert not is_aligned(folders)
    result = CliRunner().invoke(main, command)
    assert "2 scans prepared" in result.output
    records = [json.loads((folder / "prep.json").read_text()) for folder in folders]
    places = [
        np.array(record["rigid"]) @ np.linalg.inv(true) @ brain_points()
        for record, true in zip(records, TRUE[:2], strict=True)
    ]
    assert np.linalg.norm((places[1] - places[0])[:3], axis=0).max() < 0.4
    assert np.linalg.norm((places[0] - brain_points())[:3], axis=0).max() < 2.5  # where the template has the brain
    assert all(record["quality"] for record in records)
    assert all((folder / "qc.png").stat().st_size > 1000 for folder in folders)
    assert is_aligned(folders)
    assert not is_aligned([*folders, visits[2]])  # a visit has come
    before = [(folder / "prep.json").read_bytes() for folder in folders]
    CliRunner().invoke(main, command)
    assert [(folder / "prep.json").read_bytes() for folder in folders] == before


def test_mean_of_rigid_matrices_turns_with_them():
    draw = np.random.default_rng(1)
    matrices = [rigid(draw.uniform(-20, 20, 3), draw.uniform(-9, 9, 3)) for _ in range(4)]
    centre = np.array([10.0, -20.0, 5.0, 1.0])
    mean = mean_rigid(matrices, centre)
    scipys = Rotation.from_matrix([matrix[:3, :3] for matrix in matrices]).mean().as_matrix()
    assert np.allclose(mean[:3, :3], scipys, atol=1e-6)
    other = rigid((30, 10, -5), (3, 2, 1))
    turned = mean_rigid([matrix @ other for matrix in matrices], np.linalg.inv(other) @ centre)
    assert np.allclose(turned, mean @ other, atol=1e-9)
    assert np.allclose(mean_rigid([matrices[0]], centre), matrices[0])
