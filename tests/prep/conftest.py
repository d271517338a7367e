"""A head made around the packaged brain: no person's, and nobody's face."""

from __future__ import annotations

import os

import nibabel as nib
import numpy as np
import pytest

from brainfm.assets import SAMPLE_MASK, SAMPLE_SCAN
from brainfm.prep.image import like, sitk, template, to_array
from brainfm.prep.quality import Prepared


def wrapped(brain: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The brain [x, y, z] in fluid, a dark skull and a bright scalp."""

    def grown(mm: int) -> np.ndarray:
        return to_array(sitk.BinaryDilate(like(mask.astype(np.uint8), template()), [mm] * 3)) > 0

    fluid, skull, fat, skin = (grown(mm) for mm in (2, 7, 11, 13))
    head = np.where(fluid, 45, np.where(skull, 25, np.where(fat, 320, np.where(skin, 130, 2))))
    return np.where(mask, brain, head).astype(np.float32)


@pytest.fixture(scope="session")
def head_image() -> tuple[np.ndarray, np.ndarray]:
    """The made-up head [x, y, z] on the contract's grid, with a little noise, and its affine."""
    image, mask = nib.load(SAMPLE_SCAN), np.asanyarray(nib.load(SAMPLE_MASK).dataobj) > 0
    head = wrapped(np.asanyarray(image.dataobj).astype(np.float32), mask)
    head += np.random.default_rng(0).normal(0, 2, head.shape).astype(np.float32)
    return np.maximum(head, 0), image.affine


@pytest.fixture(scope="session")
def prepared(head_image) -> Prepared:
    """The made-up head as a good preparation leaves it. Read-only."""
    mask = np.asanyarray(nib.load(SAMPLE_MASK).dataobj) > 0
    made = Prepared(head_image[0], mask, np.ones(mask.shape, dtype=bool))
    for array in (made.image, made.brain, made.seen):
        array.setflags(write=False)
    return made


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A function (name, lines of sh) that puts a stand-in on PATH; it notes its arguments in `said`."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "bin").mkdir()

    def put(name, lines):
        path = tmp_path / "bin" / name
        path.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "said"}\n{lines}\n')
        path.chmod(0o755)

    return put


@pytest.fixture
def stand_in(program, tmp_path):
    """A function (lines of sh to begin with) that puts a TurboPrep on PATH which gives the packaged scan for any."""
    sitk.WriteTransform(sitk.AffineTransform(3), str(tmp_path / "affine.mat"))
    gives = (
        f'cp {SAMPLE_SCAN} "$2/normalized.nii.gz"; cp {SAMPLE_MASK} "$2/mask.nii.gz"; '
        f'cp {tmp_path / "affine.mat"} "$2/affine_transf.mat"'
    )
    return lambda lines="": program("turboprep", f"{lines}\n{gives}")
