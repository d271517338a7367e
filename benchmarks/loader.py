"""Views of full-size scans for SimCLR, a core: ours from a cache and from NIfTI, against the upstream way.

The upstream way, as the released code of Kaczmarek et al. 2025 does it: nibabel's get_fdata of image and mask, the
crop, MONAI's dictionary transforms twice, and a z-score inside each view's mask. All run in turn in one process on one
thread, scan by scan; medians over the scans.

python benchmarks/loader.py [--scans 8] [--rounds 3]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import monai
import nibabel as nib
import numpy as np
import torch
from monai.transforms import (
    Compose,
    RandAdjustContrastd,
    RandFlipd,
    RandRotated,
    RandShiftIntensityd,
    RandSpatialCropd,
    Resized,
)

import brainfm
from brainfm.manifest import ScanRecord, read_manifest
from brainfm.phantom import make_cohort
from brainfm.train.augment import Augmentation
from brainfm.train.cache import build_cache
from brainfm.train.data import PretrainingData

KEYS = ("image", "mask")
SHAPE = (150, 192, 192)


def upstream() -> Callable[[ScanRecord], torch.Tensor]:
    """Two views of a scan by nibabel and MONAI."""
    augment = Compose(
        [
            RandSpatialCropd(KEYS, roi_size=(30, 40, 40), max_roi_size=SHAPE, random_center=True, random_size=True),
            Resized(KEYS, SHAPE, mode=("trilinear", "nearest")),
            RandFlipd(KEYS, prob=0.5, spatial_axis=2),
            RandRotated(KEYS, range_x=0.785, prob=0.5, mode=("bilinear", "nearest")),
            RandShiftIntensityd("image", offsets=0.5, prob=0.8),
            RandAdjustContrastd("image", gamma=(0.5, 1.5), prob=0.8),
        ]
    )
    augment.set_random_state(0)

    def zscored(image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        values = image[mask > 0]
        mean = values.mean()
        return (image - mean) / torch.sqrt((values**2).mean() - mean**2 + 1e-12) * mask  # which comes last

    def views(record: ScanRecord) -> torch.Tensor:
        arrays = [nib.load(path).get_fdata() for path in (record.image, record.mask)]
        image, mask = (
            torch.from_numpy(array.transpose(2, 1, 0)[10:160, 19:211, 1:193].astype(np.float32))[None]
            for array in arrays
        )
        made = []
        while len(made) < 2:
            view = augment({"image": image, "mask": mask})
            if view["mask"].any():
                made.append(zscored(view["image"], view["mask"]))
        return torch.stack(made)

    return views


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scans", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as folder:
        manifest = make_cohort(arguments.scans, Path(folder, "phantoms"), spacing=1.0)
        records = read_manifest(manifest)
        spec = brainfm.get_pretrained_cfg("simclr_resnet18_3d").input_spec
        assert spec is not None
        cache = Path(folder, "cache")
        build_cache(records, cache, spec, root=manifest.parent, workers=2)
        from_files = PretrainingData(records, spec, Augmentation())
        from_cache = PretrainingData(records, spec, Augmentation(), cache=cache, root=manifest.parent)
        peer = upstream()
        ways: dict[str, Callable[[int, int], object]] = {
            "upstream": lambda _, n: peer(records[n]),
            "brainfm, NIfTI": lambda epoch, n: from_files[epoch, n],
            "brainfm, cache": lambda epoch, n: from_cache[epoch, n],
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for epoch in range(arguments.rounds):
            for n in range(len(records)):
                for name, way in ways.items():
                    start = time.perf_counter()
                    way(epoch, n)
                    seconds[name].append(time.perf_counter() - start)

    print("| two views of a scan, one core | median s | upstream / this |")
    print("|---|---|---|")
    reference = statistics.median(seconds["upstream"])
    for name, values in seconds.items():
        print(f"| {name} | {statistics.median(values):.3f} | {reference / statistics.median(values):.1f}× |")
    print(f"\n{len(seconds['upstream'])} items each, interleaved; torch {torch.__version__}, monai {monai.__version__}")


if __name__ == "__main__":
    main()
