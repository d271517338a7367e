"""Make the files of brainfm/assets from the folder of sample data.

python .ci/make_assets.py DATA_FOLDER RUNS_FOLDER

RUNS_FOLDER holds the runs `test_resnet_3d` and `test_vit_3d`, made as the heads of their recipes say.
"""

import json
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from safetensors.torch import load_file, save_file

import brainfm
from brainfm.hub.fingerprint import compute
from brainfm.models.contracts import ASSETS, TURBOPREP_4MM
from brainfm.operations import Volume
from brainfm.scan.grid import on_grid


def make_scan_and_template(data: Path) -> None:
    """Copy the sample scan, its mask and the registration's target; average the sample to the 4 mm template."""
    shutil.copy(data / "mni152_2009a_T1w_brain.nii.gz", ASSETS / "sample_T1w_brain.nii.gz")
    shutil.copy(data / "mni152_2009a_brain_mask.nii.gz", ASSETS / "sample_brain_mask.nii.gz")
    shutil.copy(data / "mni152_2009c_sym_T1w_brain.nii.gz", ASSETS / "mni152_2009c_sym_T1w_brain.nii.gz")
    image, mask = (nib.load(ASSETS / f"sample_{name}.nii.gz") for name in ("T1w_brain", "brain_mask"))
    brain = np.asanyarray(mask.dataobj) > 0
    masked = np.asanyarray(image.dataobj)[None] * brain
    coarse = on_grid(Volume(masked, brain, image.affine), TURBOPREP_4MM, "resample", "sample")[0]
    share = on_grid(Volume(brain[None].astype(np.float32), brain, image.affine), TURBOPREP_4MM, "resample", "sample")[0]
    mean = np.where(coarse.mask, coarse.image[0] / np.maximum(share.image[0], 0.5), 0)
    template = np.where(coarse.mask, np.clip(np.rint(mean), 1, 255), 0).astype(np.uint8)
    nib.Nifti1Image(template, coarse.affine).to_filename(ASSETS / "mni152_brain_4mm.nii.gz")


def make_test_weights(runs: Path) -> None:
    """Halve the weights of the tiny test models to float16, and keep the logs of their runs."""
    for name in ("test_resnet_3d", "test_vit_3d"):
        state = load_file(runs / name / "export" / "model.safetensors")
        half = {k: v.half() if v.is_floating_point() and k != "pos_embed" else v for k, v in state.items()}
        made_by = f"brainfm {brainfm.__version__}, recipe {name}, on phantoms"
        save_file(half, ASSETS / f"{name}.safetensors", metadata={"made_by": made_by})
        lines = (runs / name / "log.jsonl").read_text().splitlines()
        short = [{k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in json.loads(x).items()} for x in lines]
        (ASSETS / f"{name}.log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in short))


def make_fingerprints() -> None:
    """Embed the sample scan with the packaged weights, for `brainfm verify`."""
    names = brainfm.list_pretrained("test_*")
    prints = {name: compute(brainfm.create_model(name, pretrained=True)) for name in names}
    (ASSETS / "fingerprints.json").write_text(json.dumps(prints, indent=1) + "\n")


if __name__ == "__main__":
    make_scan_and_template(Path(sys.argv[1]))
    make_test_weights(Path(sys.argv[2]))
    make_fingerprints()
