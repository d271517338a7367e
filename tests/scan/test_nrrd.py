"""NRRD files, which SimpleITK reads."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import brainfm
from brainfm.errors import ScanError
from brainfm.scan.read import read_image

sitk = pytest.importorskip("SimpleITK")

SHAPE = (40, 48, 40)


@pytest.fixture
def nrrd(tmp_path):
    """An NRRD file, its voxels [x, y, z], and its affine to RAS mm."""
    array = np.random.default_rng(0).integers(0, 200, SHAPE).astype(np.int16)
    image = sitk.GetImageFromArray(array.T)
    image.SetSpacing((4, 4, 4))
    image.SetOrigin((-80, -90, -70))
    sitk.WriteImage(image, str(tmp_path / "scan.nrrd"))
    affine = np.diag((-4.0, -4.0, 4.0, 1.0))
    affine[:3, 3] = 80, 90, -70
    return tmp_path / "scan.nrrd", array, affine


def said_otherwise(path, old, new):
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


def test_voxels_and_affine_are_read(nrrd):
    path, array, affine = nrrd
    stored = read_image(path)
    assert np.array_equal(stored.array, array)
    assert np.allclose(stored.affine, affine)
    assert stored.source == str(path)


def test_spaces_that_say_where_left_is_are_converted(nrrd):
    path, _, affine = nrrd
    said_otherwise(path, b"space: left-posterior-superior", b"space: right-anterior-superior")
    assert np.allclose(read_image(path).affine, np.diag((-1, -1, 1, 1)) @ affine)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"space: left-posterior-superior", b"space: scanner-xyz"),
        (b"space: left-posterior-superior", b"space dimension: 3"),
        (b"space directions: (4,0,0) (0,4,0) (0,0,4)\n", b""),
    ],
)
def test_header_that_does_not_say_where_left_is_is_refused(nrrd, old, new):
    said_otherwise(nrrd[0], old, new)
    with pytest.raises(ScanError, match=r"does not say (how the image lies|where left is)"):
        read_image(nrrd[0])


def test_size_is_judged_before_anything_of_it_is_read(nrrd):
    said_otherwise(nrrd[0], b"sizes: 40 48 40", b"sizes: 4000 4800 4000")
    with pytest.raises(ScanError, match="GiB"):
        read_image(nrrd[0])


def test_damaged_file_is_refused(nrrd):
    nrrd[0].write_bytes(nrrd[0].read_bytes()[:-1000])
    with pytest.raises(ScanError, match="damaged or incomplete"):
        read_image(nrrd[0])


def test_voxels_in_several_files_are_refused(nrrd):
    said_otherwise(nrrd[0], b"encoding: raw", b"encoding: raw\ndata file: slice%03d.raw 1 40 1")
    with pytest.raises(ScanError, match="several files"):
        read_image(nrrd[0])


def test_without_simpleitk_it_is_named(nrrd, monkeypatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(ScanError, match="an NRRD file; convert it first"):
        read_image(nrrd[0])


def test_load_scan_takes_it(small_sample, small_spec, tmp_path):
    paths = []
    for path in small_sample:
        image = sitk.ReadImage(str(path))
        paths.append(tmp_path / path.name.replace(".nii.gz", ".nrrd"))
        sitk.WriteImage(image, str(paths[-1]))
    scan, usual = (brainfm.load_scan(*both, spec=small_spec) for both in (paths, small_sample))
    assert np.allclose(scan.image, usual.image)
    assert np.array_equal(scan.mask, usual.mask)
