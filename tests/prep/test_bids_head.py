"""The BIDS App from a head's file to its embedding, with the real preparation."""

import json

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner

from brainfm.cli import main

pytest.importorskip("bids2table", reason="needs the extra [bids], which needs Python 3.11")


@pytest.mark.slow
def test_head_of_a_data_set_is_prepared_and_embedded(head_image, tmp_path):
    bids, output = tmp_path / "bids", tmp_path / "out"
    image = bids / "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz"
    image.parent.mkdir(parents=True)
    (bids / "dataset_description.json").write_text('{"Name": "one head", "BIDSVersion": "1.10.0"}')
    nib.Nifti1Image(head_image[0], head_image[1]).to_filename(image)
    for level in ("participant", "group"):
        arguments = [bids, output, level, "--model", "test_resnet_3d", "--n-cpus", "1"]
        result = CliRunner().invoke(main, ["bids", *map(str, arguments)])
        assert result.exit_code == 0, result.output
    quality = json.loads((output / "sub-01/ses-1/anat/sub-01_ses-1_T1w.json").read_text())
    assert quality["verdict"] in ("pass", "look")
    assert 1.0 < quality["figures"]["litres"] < 2.5
    vector = np.load(output / "sub-01/ses-1/anat/sub-01_ses-1_desc-testresnet_embedding.npy")
    assert np.isfinite(vector).all()
    assert vector.any()
    assert (output / quality["picture"]).read_bytes().startswith(b"\x89PNG")
    assert "sub-01_ses-1_T1w" in (output / "group_T1w.tsv").read_text()
