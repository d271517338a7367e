"""
Where a prediction comes from
=============================

A saliency map says which places of a scan speak for a prediction. It is easily believed, so it is worth looking at one
where the truth is known. In these **phantoms** (synthetic scans) the label ``sex`` is the size and shape of the head,
and nothing else: what there is to see, is at the brain's rim.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy.ndimage import binary_erosion
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import brainfm
from brainfm.downstream.saliency import grad_cam, occlusion
from brainfm.phantom import make_cohort

folder = tempfile.TemporaryDirectory()
model = brainfm.create_model("test_resnet_3d", pretrained=True)
table = brainfm.embed(make_cohort(32, Path(folder.name) / "phantoms", spacing=4.0), model)
sex = np.array(table.columns()["sex"], dtype=int)

# %%
# First a linear probe, and how good it is: a map of a prediction that is wrong explains nothing.

probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
print(f"ROC AUC {cross_val_score(probe, table.vectors, sex, cv=4, scoring='roc_auc').mean():.2f}, cross-validated")
probe.fit(table.vectors, sex)

# %%
# A linear model is a direction in the space of embeddings. Given that direction, both methods explain the probe without
# a classifier in the network. *Occlusion* hides a box at each place and looks how far the score falls; *Grad-CAM*
# weighs the network's own feature maps by their gradient.

direction = probe[-1].coef_ / probe[0].scale_
chosen = table.records[int(np.flatnonzero(sex)[0])]
maps = [
    occlusion(model, chosen.image, chosen.mask, direction=direction, window=8),
    grad_cam(model, chosen.image, chosen.mask, direction=direction, layer="layer3"),
]

# %%
# Each map comes on the scan's own voxels. The dashed line is 8 mm inside the brain's surface: the rim, where the truth
# lies, is outside of it.

scan = brainfm.load_scan(chosen.image, chosen.mask, spec=model.pretrained_cfg.input_spec)
core = binary_erosion(scan.mask, iterations=2)
rim = scan.mask & ~core
row = scan.mask.shape[1] // 2
low, high = np.percentile(scan.image[0][scan.mask], (1, 99))

figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
for axes, found in zip(panels, maps, strict=True):
    speaks_for = np.clip(found.on_scan(), 0, None) * scan.mask
    axes.imshow(scan.image[0, :, row].T, cmap="gray", origin="lower", vmin=low, vmax=high)
    values = np.ma.masked_where(~scan.mask[:, row], speaks_for[:, row])
    shown = axes.imshow(values.T, cmap="cividis", alpha=0.6, origin="lower")
    axes.contour(core[:, row].T, levels=[0.5], colors="white", linestyles="--")
    fraction = speaks_for[rim].sum() / speaks_for.sum()
    axes.set_title(f"{found.method}: {fraction:.0%} in the rim")
    axes.set_axis_off()
    figure.colorbar(shown, ax=axes, shrink=0.8, label="speaks for sex 1")
plt.show()

print(f"the rim is {rim.sum() / scan.mask.sum():.0%} of the brain")

# %%
# That last number is what the titles are to be compared with: a map that has no more in the rim than the rim has of the
# brain points nowhere, however vivid its colours. Two limits are seen as well. A box of 8 voxels is 32 mm wide, a cell
# of the network's map as much, and neither can point to anything smaller; and a map is of the *probe*, which may use
# what only happens to go with the label.
#
# ``map.save("why.nii.gz")`` writes either as NIfTI with the scan's affine.

folder.cleanup()
