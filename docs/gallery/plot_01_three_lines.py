"""
Three lines
===========

An encoder of brain MRI is two things: a network with weights, and the exact input that these weights were trained on.
Three lines get both. The encoder here is a tiny one that was pretrained on phantoms (synthetic scans), so that this
page needs no download; ``simclr_resnet18_3d`` in its place is a real one.
"""

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import torch

import brainfm
from brainfm.assets import SAMPLE_MASK, SAMPLE_SCAN

# %%
# The scan is the average brain that comes with the package, with its brain mask.

model = brainfm.create_model("test_resnet_3d", pretrained=True)
transform = brainfm.create_transform(model)
with torch.inference_mode():
    z = model(transform(SAMPLE_SCAN, mask=SAMPLE_MASK)[None])

print(z.shape)

# %%
# The second line is the one that other libraries leave to you. The transform is made from the weight's own *input
# contract*, which is data that travels with the weights and can be read:

print(brainfm.describe(transform.spec))

# %%
# So this is what was in the file, and this is what the network saw: on another grid, the axes in another order,
# z-scored inside the mask and 0 outside. Both pictures are the same axial plane, with the front of the head at the top.

scan = nib.load(SAMPLE_SCAN)
tensor = transform(SAMPLE_SCAN, mask=SAMPLE_MASK)[0].numpy()  # [z, y, x]
millimetres = 10.0
plane = round((np.linalg.inv(scan.affine) @ [0, 0, millimetres, 1])[2])
row = round((millimetres - transform.spec.grid.origin[2]) / transform.spec.grid.spacing[2])

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
left.imshow(scan.get_fdata()[:, :, plane].T, cmap="gray", origin="lower")
left.set_title(f"the file: {' × '.join(map(str, scan.shape))} voxels")
shown = right.imshow(tensor[row], cmap="gray", origin="lower")
right.set_title(f"the tensor: {' × '.join(map(str, tensor.shape))}")
figure.colorbar(shown, ax=right, label="standard deviations from the brain's mean")
for axes in (left, right):
    axes.set_axis_off()
plt.show()

# %%
# A contract is more than a recipe: it is checked. Here is the same brain with a header that puts it 40 mm too far to
# the front. A network would take it without a word, and give numbers that mean nothing; the transform refuses it, and
# says why.

moved = scan.affine.copy()
moved[1, 3] += 40
try:
    transform(nib.Nifti1Image(scan.get_fdata(), moved), mask=nib.Nifti1Image(nib.load(SAMPLE_MASK).get_fdata(), moved))
except brainfm.ScanError as error:
    print(error)
