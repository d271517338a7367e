"""SFCN's contract on the packaged scan, against what the authors' own preprocessing makes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from published_contracts import SFCN

import brainfm


@pytest.fixture(scope="module")
def upstream():
    """The authors' numbers; `tests/data/README.md` says how they were made."""
    return json.loads((Path(__file__).parents[1] / "data" / "sfcn_input.json").read_text())


@pytest.fixture(scope="module")
def scan(sample):
    """The packaged scan, which lies on another grid, brought to SFCN's."""
    return brainfm.load_scan(sample[0], spec=SFCN)


def held(image, numbers):
    assert list(image.shape) == numbers["shape"]
    assert np.count_nonzero(image) == numbers["nonzero"]
    exact = image.astype(np.float64)
    for figure in ("mean", "std", "min", "max"):
        assert getattr(exact, figure)() == pytest.approx(numbers[figure], rel=1e-5), figure
    for index, value in numbers["voxels"].items():
        assert image[tuple(map(int, index.split(",")))] == pytest.approx(value, rel=1e-5), index


def test_scan_on_another_grid_is_moved_to_the_array_the_authors_start_from(scan, upstream):
    held(scan.image[0], upstream["full_grid"])


def test_tensor_is_the_authors(scan, upstream):
    held(SFCN.apply(scan).image, upstream["tensor"])


def test_other_order_gives_the_authors_other_numbers(scan, upstream):
    image = replace(SFCN, operations=SFCN.operations[::-1]).apply(scan).image
    assert image.mean(dtype=np.float64) == pytest.approx(upstream["cropped_first"]["mean"], rel=1e-5)
    assert image.max() == pytest.approx(upstream["cropped_first"]["max"], rel=1e-5)
