"""Programs that are no Python packages: SynthStrip, SynthSeg and TurboPrep, through their command lines.

They are FreeSurfer's and ANTs', of gigabytes, and are used where they are installed. What is written here follows their
documentation; the tests run stand-ins that take the same arguments.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from brainfm.errors import BrainfmError, ScanError
from brainfm.prep.image import TEMPLATE, sitk, template
from brainfm.prep.registration import TransformType

INSTALL = {
    "mri_synthstrip": "install FreeSurfer 7.3 or later, or SynthStrip by itself",
    "mri_synthseg": "install FreeSurfer 7.3.2 or later",
    "turboprep": "install TurboPrep (github.com/LemuelPuglisi/turboprep), with FreeSurfer and ANTs",
}


def where(program: str) -> str:
    """The path of a program. Raises BrainfmError where there is none, and says what to install."""
    path = shutil.which(program)
    if path is None:
        raise BrainfmError(f"{program} is not on PATH; {INSTALL[program]}, or leave this option at its default")
    return path


def synthstrip(head: sitk.Image, _device: str) -> sitk.Image:
    """The brain of a head by SynthStrip (Hoopes et al. 2022), 0 or 1."""
    with tempfile.TemporaryDirectory(prefix="brainfm-prep-") as folder:
        image, mask = Path(folder, "head.nii.gz"), Path(folder, "mask.nii.gz")
        sitk.WriteImage(head, str(image))
        _run("mri_synthstrip", "-i", str(image), "-m", str(mask))
        brain = sitk.ReadImage(str(mask), sitk.sitkFloat32)
        return sitk.Resample(brain > 0.5, head, sitk.Transform(), sitk.sitkNearestNeighbor, 0, sitk.sitkFloat32)


def synthseg(scan: sitk.Image, threads: int) -> sitk.Image:
    """The brain of a scan, on its own voxels, by SynthSeg (Billot et al. 2023): whatever is segmented, 0 or 1."""
    with tempfile.TemporaryDirectory(prefix="brainfm-prep-") as folder:
        image, labels = Path(folder, "scan.nii.gz"), Path(folder, "segm.nii.gz")
        sitk.WriteImage(scan, str(image))
        _run("mri_synthseg", "--i", str(image), "--o", str(labels), "--fast", "--threads", str(threads), "--cpu")
        brain = sitk.ReadImage(str(labels), sitk.sitkFloat32) > 0.5
        return sitk.Resample(brain, scan, sitk.Transform(), sitk.sitkNearestNeighbor, 0, sitk.sitkFloat32)


def turboprep(
    head: sitk.Image, transform_type: TransformType, threads: int, target: Path = TEMPLATE
) -> tuple[sitk.Image, sitk.Image, sitk.Transform]:
    """TurboPrep's normalized image, mask and transform of a scan that it registers to `target`."""
    with tempfile.TemporaryDirectory(prefix="brainfm-prep-") as folder:
        image, out = Path(folder, "head.nii.gz"), Path(folder, "out")
        out.mkdir()
        sitk.WriteImage(head, str(image))
        _run("turboprep", str(image), str(out), str(target), "-r", transform_type[0], "-t", str(threads))
        made = [out / name for name in ("normalized.nii.gz", "mask.nii.gz", "affine_transf.mat")]
        for path in made:
            if not path.exists():
                raise ScanError(
                    f"turboprep ended without an error and without {path.name}; run it by itself to see why"
                )
        normalized, mask = (sitk.ReadImage(str(path), sitk.sitkFloat32) for path in made[:2])
        for one, path in ((normalized, made[0]), (mask, made[1])):
            if one.GetSize() != template().GetSize():
                raise ScanError(f"turboprep's {path.name} has {one.GetSize()} voxels, not {template().GetSize()}")
        return normalized, mask, sitk.ReadTransform(str(made[2]))


def _run(program: str, *arguments: str) -> None:
    done = subprocess.run([where(program), *arguments], capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise ScanError(
            f"{program} failed with exit code {done.returncode}: {lines[-1] if lines else 'it said nothing'}"
        )
