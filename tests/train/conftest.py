"""A small cohort on disk: the sample scan at 4 mm, bent differently for each patient."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest


@pytest.fixture(scope="session")
def cohort(small_sample, tmp_path_factory) -> Path:
    """A manifest of 12 patients, the first four with two scans each, and labels, of which some are missing."""
    image, mask = (nib.load(path) for path in small_sample)
    values, brain = image.get_fdata(), np.asanyarray(mask.dataobj)
    folder = tmp_path_factory.mktemp("cohort")
    rows = []
    for n in range(16):
        patient, draw = n % 12, np.random.default_rng(n)
        axes = np.meshgrid(*(np.linspace(0, np.pi, size) for size in values.shape), indexing="ij")
        bump = sum(np.sin((k + 1) * axis + patient * k) for k, axis in enumerate(axes, start=patient % 3))
        changed = values * (1 + 0.15 * bump) + brain * draw.normal(0, 0.02 * values.max(), values.shape)
        place = folder / f"sub-{patient:02}" / f"ses-{n // 12}"
        place.mkdir(parents=True)
        shifted = changed.clip(1) * brain - 0.6 * values.max()  # as by WhiteStripe: the background is no longer 0
        nib.Nifti1Image(shifted.astype(np.float32), image.affine).to_filename(place / "t1.nii.gz")
        nib.Nifti1Image(brain, image.affine).to_filename(place / "mask.nii.gz")
        labels = [40 + 3 * patient if patient % 5 else "n/a", "MF"[patient % 2] if patient != 3 else "", "NSW"[n % 3]]
        rows.append([place / "t1.nii.gz", place / "mask.nii.gz", f"sub-{patient:02}", *labels])
    with (folder / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [
                ["image_path", "mask_path", "patient_id", "age", "sex", "site"],
                *([p.relative_to(folder), m.relative_to(folder), *rest] for p, m, *rest in rows),
            ]
        )
    return folder / "manifest.csv"
