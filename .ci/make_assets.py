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
from brainfm.assets import (
    ASSETS,
    COARSE_BRAIN,
    COARSE_GREY_MATTER,
    GOLDEN_EMBEDDINGS,
    SAMPLE_MASK,
    SAMPLE_SCAN,
    TEMPLATE,
)
from brainfm.contract import Volume
from brainfm.hub.golden import compute
from brainfm.scan.grid import on_grid

SPEC = brainfm.get_pretrained_cfg("test_resnet_3d").input_spec  # at 4 mm


def make_scan_and_templates(data: Path) -> None:
    """Copy the sample scan, its mask and the registration's target; average brain and grey matter to 4 mm."""
    shutil.copy(data / "mni152_2009a_T1w_brain.nii.gz", SAMPLE_SCAN)
    shutil.copy(data / "mni152_2009a_brain_mask.nii.gz", SAMPLE_MASK)
    shutil.copy(data / "mni152_2009c_sym_T1w_brain.nii.gz", TEMPLATE)
    image, mask = nib.load(SAMPLE_SCAN), nib.load(SAMPLE_MASK)
    brain = np.asanyarray(mask.dataobj) > 0
    coarse = averaged(np.asanyarray(image.dataobj) * brain, brain, image.affine)
    fraction = averaged(brain.astype(np.float32), brain, image.affine)
    mean = np.where(coarse.mask, coarse.image[0] / np.maximum(fraction.image[0], 0.5), 0)
    save(np.where(coarse.mask, np.clip(np.rint(mean), 1, 255), 0), coarse.affine, COARSE_BRAIN)
    grey = nib.load(data / "mni152_2009a_gm_probability.nii.gz")
    coarse = averaged(np.asanyarray(grey.dataobj).astype(np.float32), None, grey.affine)
    save(np.rint(coarse.image[0]), coarse.affine, COARSE_GREY_MATTER)


def averaged(image: np.ndarray, mask: np.ndarray | None, affine: np.ndarray) -> Volume:
    """An image as the means of 4 mm voxels."""
    return on_grid(Volume(image[None], mask, affine), SPEC, "resample", "sample")[0]


def save(voxels: np.ndarray, affine: np.ndarray, path: Path) -> None:
    """Write voxels as uint8."""
    nib.Nifti1Image(voxels.astype(np.uint8), affine).to_filename(path)


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


def make_golden_embeddings() -> None:
    """Embed the sample scan with the packaged weights, for `brainfm verify`."""
    names = brainfm.list_pretrained("test_*")
    golden = {name: compute(brainfm.create_model(name, pretrained=True)) for name in names}
    GOLDEN_EMBEDDINGS.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    make_scan_and_templates(Path(sys.argv[1]))
    make_test_weights(Path(sys.argv[2]))
    make_golden_embeddings()
