"""
A contract of one's own
=======================

You trained a network in your lab, and its preprocessing is a script that only you have. As an *input contract* it is
data: it can be read, checked, saved beside the weights, and it refuses scans that the network was not made for. Most
contracts are built of operations that are there already; this page also adds one that is not.
"""

import tempfile
from dataclasses import dataclass

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import torch

import brainfm
from brainfm.assets import SAMPLE_MASK, SAMPLE_SCAN
from brainfm.contract import Operation, Volume, ZScore
from brainfm.contract.geometry import Transpose
from brainfm.contract.volume import with_image

# %%
# An operation is a frozen dataclass from volume to volume. Registered, it has a name that a file can hold.


@brainfm.register_operation
@dataclass(frozen=True)
class SquareRoot(Operation):
    """Take the square root of all intensities, which evens out bright vessels and fat."""

    def __call__(self, volume: Volume) -> Volume:
        """The volume, its intensities replaced."""
        return with_image(volume, np.sqrt(np.clip(volume.image, 0, None)))

    def __str__(self) -> str:
        return "take the square root"


# %%
# A contract says what comes in and what is done, in order. This one wants a skull-stripped T1w scan in MNI space with
# raw intensities, on a grid of 3 mm.

spec = brainfm.InputSpec(
    representation="T1w",
    space="MNI152NLin2009cSym",
    registration="rigid",
    orientation="RAS",
    grid=brainfm.Grid(shape=(64, 76, 64), spacing=(3.0, 3.0, 3.0), origin=(-95.0, -131.0, -77.0)),
    skull_strip="required",
    mask="file or nonzero",
    intensities="raw",
    operations=(Transpose((2, 1, 0)), SquareRoot(), ZScore(region="mask")),
    output_shape=(1, 64, 76, 64),
)
print(brainfm.describe(spec))

# %%
# As data it is what stands in a model's ``config.json``, and comes back the same:

assert brainfm.InputSpec.from_dict(spec.to_dict()) == spec

# %%
# A network with that contract is used like any other, here with weights as they were drawn. ``save_for_hub`` writes
# weights, contract and a model card into one folder.

torch.manual_seed(0)
cfg = brainfm.PretrainedCfg(input_spec=spec, licence="MIT", num_features=128)
model = brainfm.create_model("test_resnet_3d", pretrained_cfg=cfg)
transform = brainfm.create_transform(model)
with torch.inference_mode():
    print("embedding", list(model(transform(SAMPLE_SCAN, mask=SAMPLE_MASK)[None]).shape))
with tempfile.TemporaryDirectory() as folder:
    brainfm.save_for_hub(model, folder)
    assert brainfm.create_transform(brainfm.create_model(f"local-dir:{folder}", pretrained=True)).spec == spec

# %%
# The same scan as two contracts have it, side by side: that of the packaged test model, and this one.

theirs = brainfm.create_transform(brainfm.get_pretrained_cfg("test_resnet_3d").input_spec)
figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
for axes, each, title in zip(panels, (theirs, transform), ("test_resnet_3d", "our own"), strict=True):
    tensor = each(SAMPLE_SCAN, mask=SAMPLE_MASK)[0].numpy()
    shown = axes.imshow(tensor[tensor.shape[0] // 2], cmap="gray", origin="lower")
    axes.set_title(f"{title}: {each.spec.grid.spacing[0]:g} mm, values {tensor.min():.1f} to {tensor.max():.1f}")
    axes.set_axis_off()
    figure.colorbar(shown, ax=axes, shrink=0.8)
plt.show()

# %%
# And what the script in the drawer never did: it refuses. ``intensities="raw"`` is held against the scan, so that one
# which somebody z-scored before is not z-scored again behind a square root.

scan = nib.load(SAMPLE_SCAN)
scored = (scan.get_fdata() - 120) / 40
try:
    transform(nib.Nifti1Image(scored, scan.affine), mask=SAMPLE_MASK)
except brainfm.ScanError as error:
    print(error)
