"""Preparation with extraction and registration on a GPU: within hundredths of a millimetre of the processor's."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest

from brainfm.assets import SAMPLE_MASK, SAMPLE_SCAN
from brainfm.prep.batch import prepare_all
from brainfm.prep.image import like, template
from brainfm.prep.registration import register
from brainfm.prep.steps import EXTRACTION

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module")
def brain():
    image = nib.load(SAMPLE_SCAN)
    return like(
        np.asanyarray(image.dataobj).astype(np.float32) * (np.asanyarray(nib.load(SAMPLE_MASK).dataobj) > 0), template()
    )


def test_registration_ends_where_the_processors_does(brain, gpu):
    found, wanted = register(brain, gpu), register(brain)
    for kind in ("rigid", "affine"):
        for corner in np.ndindex(2, 2, 2):
            point = (np.array(corner) * 120.0 - 60).tolist()
            places = [np.array(one.wanted(kind).TransformPoint(point)) for one in (found, wanted)]
            assert np.linalg.norm(places[0] - places[1]) < 0.1, kind


def test_extraction_gives_the_processors_probability(brain, gpu):
    from brainfm.prep.image import to_array

    found, wanted = (to_array(EXTRACTION["deepbet"].run(brain, device)) for device in (gpu, "cpu"))
    assert np.mean(np.abs(found - wanted) > 1e-2) < 1e-4


def test_scan_is_prepared_and_its_record_says_on_what(gpu, tmp_path):
    report = prepare_all([SAMPLE_SCAN], tmp_path / "prep", device=gpu)
    assert not report.failed
    (folder,) = (path for path in (tmp_path / "prep").iterdir() if path.is_dir())
    assert json.loads((folder / "prep.json").read_text())["device"].startswith(gpu)
