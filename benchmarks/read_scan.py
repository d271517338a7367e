"""From a scan and mask on disk to the encoder's tensor, on one core: ours against the upstream way.

The files are 193×229×193 float32 and uint8, .nii.gz, as TurboPrep writes them. The upstream way is nibabel's
`get_fdata` of both, the crop, and the masked z-score. What the inflating alone takes, by Python's zlib, by ISA-L where
it is installed, and by our reader with the file's reading in it, says how far one could get.

python benchmarks/read_scan.py [--rounds 15]
"""

import argparse
import gzip
import importlib
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from _measure import interleaved, machine, print_table

import brainfm
from brainfm.assets import SAMPLE_MASK, SAMPLE_SCAN
from brainfm.scan.packed import fastest, open_packed, read_voxels

GZIP = b"\x1f\x8b"


def write_scan(folder: Path) -> tuple[Path, Path]:
    """The packaged scan with the noise and the float32 voxels of a real one, and its mask."""
    scan, mask = nib.load(SAMPLE_SCAN), nib.load(SAMPLE_MASK)
    brain = np.asanyarray(mask.dataobj) > 0
    noise = np.random.default_rng(0).normal(0, 3, scan.shape)
    paths = folder / "normalized.nii.gz", folder / "mask.nii.gz"
    nib.save(nib.Nifti1Image(((scan.get_fdata() + noise) * brain).astype(np.float32), scan.affine), paths[0])
    nib.save(nib.Nifti1Image(brain.astype(np.uint8), scan.affine), paths[1])
    return paths


def inflated(path: Path) -> np.ndarray:
    """The voxels of a compressed scan of 193×229×193."""
    header = nib.load(path).header
    with open_packed(path, GZIP) as file:
        return read_voxels(file, header.get_data_offset(), 193 * 229 * 193 * header.get_data_dtype().itemsize)


def upstream(image: Path, mask: Path) -> torch.Tensor:
    """The tensor as the released code of Kaczmarek et al. 2025 makes it."""
    voxels, inside = (
        torch.from_numpy(nib.load(path).get_fdata().transpose(2, 1, 0)[10:160, 19:211, 1:193].astype(np.float32))
        for path in (image, mask)
    )
    voxels = voxels * inside
    mean = voxels.sum() / inside.sum()
    variance = (voxels**2).sum() / inside.sum() - mean**2
    return (((voxels - mean) / torch.sqrt(variance + 1e-12)) * inside)[None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transform = brainfm.create_transform("simclr_resnet18_3d")
    with tempfile.TemporaryDirectory() as folder:
        image, mask = write_scan(Path(folder))
        stored = [path.read_bytes() for path in (image, mask)]
        gzip_module = importlib.import_module(fastest(GZIP).__module__)
        assert torch.allclose(transform(image, mask), upstream(image, mask), atol=1e-4)
        ways = {
            "upstream: `get_fdata`, crop, z-score": lambda: upstream(image, mask),
            "brainfm": lambda: transform(image, mask),
            "Python's inflate alone": lambda: [gzip.decompress(content) for content in stored],
            f"{gzip_module.__name__}'s inflate alone": lambda: [gzip_module.decompress(content) for content in stored],
            "brainfm's read and inflate alone": lambda: [inflated(path) for path in (image, mask)],
        }
        seconds = interleaved(ways, arguments.rounds, warm_up=2)
    reference = next(iter(seconds.values()))
    print_table(
        ("file → tensor, one core", "s", "upstream / this"),
        [(name, f"{value:.3f}", f"{reference / value:.1f}×") for name, value in seconds.items()],
    )
    print(f"\n{arguments.rounds} rounds. {machine()}")


if __name__ == "__main__":
    main()
