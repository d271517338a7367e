"""
Dense features over the scan
============================

An encoder knows more than the one vector a scan: its feature maps say something of every place. The difficulty is to
know *which* place. A cell of a map is no voxel, its first cell need not look at the first voxel's corner, and the
tensor's axes are not the scan's. ``embed(dense=…)`` writes maps as NIfTI whose affine settles all of it, so that any
viewer can lay them over the scan.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine
from nibabel.processing import resample_from_to

import brainfm
from brainfm.assets import SAMPLE_MASK, SAMPLE_SCAN

folder = tempfile.TemporaryDirectory()

# %%
# The scan is the packaged average brain at 1 mm; the encoder is a tiny vision transformer for tests, whose cells are
# patches of 8 × 8 × 8 voxels of 4 mm.

table = brainfm.embed([(SAMPLE_SCAN, SAMPLE_MASK)], "test_vit_3d", dense=folder.name)
cells = nib.load(table.columns()["dense_path"][0])
print("cells:", cells.shape[:3], "· features of each:", cells.shape[3], "· mm a cell:", cells.header.get_zooms()[:3])

# %%
# The affine does the work. Take the cell that is nearest to the origin of MNI space, the anterior commissure, and ask
# where its centre is:

index = np.rint(apply_affine(np.linalg.inv(cells.affine), (0, 0, 0))).astype(int)
print("cell", index.tolist(), "looks at", apply_affine(cells.affine, index).tolist(), "mm")

# %%
# Ninety-six features are too many to look at. The first principal component over the cells in the brain is what they
# differ by most.

scan, mask = nib.load(SAMPLE_SCAN), nib.load(SAMPLE_MASK)
inside = resample_from_to(mask, (cells.shape[:3], cells.affine), order=1).get_fdata() > 0.3
features = cells.get_fdata()[inside]
features = features - features.mean(axis=0)
component = np.zeros(cells.shape[:3])
component[inside] = features @ np.linalg.svd(features, full_matrices=False)[2][0]
overlay = nib.Nifti1Image(component, cells.affine)
nib.save(overlay, Path(folder.name) / "component.nii.gz")  # for a viewer

# %%
# Brought to the scan's own voxels it can be drawn over it; ``order=0`` keeps the cells visible, for a smooth map would
# promise a resolution that is not there.

on_scan = resample_from_to(overlay, scan, order=0, mode="nearest").get_fdata()
brain = mask.get_fdata() > 0
limit = np.abs(on_scan[brain]).max()
x, y, z = (np.rint(apply_affine(np.linalg.inv(scan.affine), (0, -20, 10)))).astype(int)
planes = {"sagittal": np.s_[x, :, :], "coronal": np.s_[:, y, :], "axial": np.s_[:, :, z]}

figure, panels = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained")
for axes, (name, plane) in zip(panels, planes.items(), strict=True):
    axes.imshow(scan.get_fdata()[plane].T, cmap="gray", origin="lower")
    shown = axes.imshow(
        np.ma.masked_where(~brain[plane], on_scan[plane]).T,
        cmap="cividis",
        alpha=0.6,
        origin="lower",
        vmin=-limit,
        vmax=limit,
    )
    axes.set_title(name)
    axes.set_axis_off()
figure.colorbar(shown, ax=panels, label="first component of the cells' features", shrink=0.8)
plt.show()

# %%
# In Python, without a file: ``model.dense(x)`` gives the maps [B, C, d, h, w], and ``model.feature_info`` says of each
# stage how many voxels a cell spans and where the first one looks.

folder.cleanup()
