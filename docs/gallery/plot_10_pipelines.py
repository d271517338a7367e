"""
In your own pipeline: MONAI, TorchIO, Lightning, scikit-learn
=============================================================

An encoder seldom comes alone. This page puts one, with its input contract, into four frameworks. The rule is the same
in all of them: **their** transforms may come before the contract, **nothing** may come between the contract and the
encoder that changes what the contract promises.

The scans are **phantoms**.
"""

import csv
import logging
import tempfile
import warnings
from pathlib import Path

import lightning
import matplotlib.pyplot as plt
import numpy as np
import torch
import torchio
from monai.data import DataLoader, Dataset
from monai.transforms import Compose, LoadImaged
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

import brainfm
from brainfm.phantom import make_cohort
from brainfm.sklearn import BrainEncoder
from brainfm.transforms import InputTransformd

folder = tempfile.TemporaryDirectory()
manifest = make_cohort(20, Path(folder.name) / "phantoms", spacing=4.0)
with manifest.open() as file:
    rows = list(csv.DictReader(file))
scans = [(str(manifest.parent / row["image_path"]), str(manifest.parent / row["mask_path"])) for row in rows]
sex = np.array([int(row["sex"]) for row in rows])
model = brainfm.create_model("test_resnet_3d", pretrained=True)
transform = brainfm.create_transform(model)

# %%
# MONAI
# -----
# ``InputTransformd`` is the contract as a dictionary transform. It stands last; the affine that ``LoadImaged`` read
# travels with the image, and is what the contract goes by.

pipeline = Compose([LoadImaged(["image", "mask"]), InputTransformd(transform.spec)])
items = [{"image": image, "mask": mask} for image, mask in scans[:4]]
with torch.inference_mode():
    batches = DataLoader(Dataset(items, pipeline), batch_size=2)
    of_monai = torch.cat([model(batch["image"].as_tensor()) for batch in batches])
print("MONAI:", list(of_monai.shape))

# %%
# TorchIO
# -------
# TorchIO's images are scans like any other, so its augmentations come first and the contract after them. Here ghosts,
# as of a patient who moved.

subject = torchio.Subject(image=torchio.ScalarImage(scans[0][0]), mask=torchio.LabelMap(scans[0][1]))
moved = torchio.RandomGhosting(num_ghosts=4, axes=(1,), intensity=(0.6, 0.6))(subject)
tensors = [transform(each.image, mask=each.mask) for each in (subject, moved)]

figure, panels = plt.subplots(1, 2, figsize=(7, 3.6), layout="constrained")
for axes, tensor, title in zip(panels, tensors, ("as scanned", "ghosts by TorchIO"), strict=True):
    axes.imshow(tensor[0, 20], cmap="gray", origin="lower", vmin=-3, vmax=3)
    axes.set_title(title)
    axes.set_axis_off()
plt.show()

# %%
# Lightning
# ---------
# A fine-tuning loop of one's own. Two things to know: ``create_model`` gives eval mode, and Lightning leaves a model in
# the mode it is in, so call ``train()``; and ``num_classes=`` puts the head on.


class Finetuned(lightning.LightningModule):
    """An encoder with a head of two classes, and its losses."""

    def __init__(self) -> None:
        super().__init__()
        self.net = brainfm.create_model("test_resnet_3d", pretrained=True, num_classes=2).train()
        self.losses: list[float] = []

    def training_step(self, batch: list[torch.Tensor], _number: int) -> torch.Tensor:
        """The loss of a batch of tensors and classes."""
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(float(loss))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, at a rate that suits so small a network."""
        return torch.optim.Adam(self.parameters(), lr=3e-4)


lightning.seed_everything(0, verbose=False)
volumes = torch.stack([transform(image, mask=mask) for image, mask in scans])
loader = torch.utils.data.DataLoader(
    torch.utils.data.TensorDataset(volumes, torch.from_numpy(sex)), batch_size=8, shuffle=True
)
logging.getLogger("lightning.pytorch").setLevel("ERROR")
tuned = Finetuned()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of few workers and few batches
    trainer = lightning.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder.name,
    )
    trainer.fit(tuned, loader)
trainer.save_checkpoint(Path(folder.name) / "last.ckpt")

# %%
# The checkpoint loads by its path, as it is, here with its head:

again = brainfm.create_model("test_resnet_3d", checkpoint_path=Path(folder.name) / "last.ckpt", num_classes=2)
print(
    "Lightning: loss",
    " ".join(f"{loss:.2f}" for loss in tuned.losses),
    "· head:",
    list(again.get_classifier().weight.shape),
)

# %%
# scikit-learn
# ------------
# ``BrainEncoder`` is a transformer from scans to features. It learns nothing, but what stands after it does, in each
# fold of the training scans alone; and the encoder becomes one more setting to search over. With ``cache=`` each scan
# is embedded once an encoder, and not once a fold.

search = GridSearchCV(
    Pipeline(
        [
            ("encoder", BrainEncoder(cache=Path(folder.name) / "cache")),
            ("scale", StandardScaler()),
            ("classifier", LogisticRegression(max_iter=1000)),
        ]
    ),
    {"encoder__model": ["test_resnet_3d", "test_vit_3d"], "classifier__C": [0.01, 1.0]},
    scoring="roc_auc",
    cv=4,
).fit(scans, sex)

results = search.cv_results_
figure, axes = plt.subplots(figsize=(6, 2.8), layout="constrained")
for encoder, colour, marker in (("test_resnet_3d", "#0072B2", "o"), ("test_vit_3d", "#E69F00", "^")):
    chosen = [n for n, each in enumerate(results["params"]) if each["encoder__model"] == encoder]
    strengths = [str(results["params"][n]["classifier__C"]) for n in chosen]
    means, stds = results["mean_test_score"][chosen], results["std_test_score"][chosen]
    axes.errorbar(strengths, means, yerr=stds, color=colour, marker=marker, ms=7, capsize=4, label=encoder)
axes.axhline(0.5, color="0.4", lw=1, ls="--")
axes.set(xlabel="C of the logistic regression", ylabel="ROC AUC, 4 folds")
axes.legend()
plt.show()

folder.cleanup()
