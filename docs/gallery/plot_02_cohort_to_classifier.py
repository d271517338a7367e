"""
From a cohort to a classifier
=============================

Most studies need no training of networks: embed every scan once, then fit a linear model on the table of embeddings.
What has to be right is the rest: that all scans of a patient are on one side of each split, and that the score comes
from patients whom the classifier has not seen.

The scans are **phantoms**: synthetic brains with known labels. They show that code works and say nothing of patients.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import brainfm
from brainfm.phantom import make_cohort

folder = tempfile.TemporaryDirectory()

# %%
# A cohort is a manifest: a table with a row a scan, here written with the phantoms themselves. Your own needs a column
# ``image_path``; ``mask_path``, ``patient_id`` and labels are taken where they are there.

manifest = make_cohort(32, Path(folder.name) / "phantoms", spacing=4.0, scans_per_patient=2)
print("".join(manifest.read_text().splitlines(keepends=True)[:3]))

# %%
# One call embeds it. With ``output=`` the table is a file, and a run that was interrupted goes on where it stopped; a
# scan that fails is a row of ``table.errors`` and stops nobody.

table = brainfm.embed(manifest, "test_resnet_3d", output=Path(folder.name) / "embeddings.parquet")
print(table)

# %%
# The vectors are an array, the manifest's columns stand beside them. Two scans of a patient are nearly the same brain:
# were one learned from and the other tested, the classifier could recognise the patient instead of the label. Groups
# prevent that.

columns = table.columns()
sex, patients = np.array(columns["sex"], dtype=int), np.array(columns["patient_id"])
classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
folds = StratifiedGroupKFold(n_splits=5, shuffle=True, random_state=0)
probability = cross_val_predict(classifier, table.vectors, sex, groups=patients, cv=folds, method="predict_proba")[:, 1]
print(f"ROC AUC {roc_auc_score(sex, probability):.3f} over {len(set(patients))} phantoms")

# %%
# A single number hides how it came about. The probabilities themselves, one point a scan:

figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
jitter = np.random.default_rng(0).uniform(-0.18, 0.18, len(sex))
for label, colour, marker in ((0, "#0072B2", "o"), (1, "#E69F00", "^")):
    rows = sex == label
    axes.scatter(probability[rows], label + jitter[rows], color=colour, marker=marker, s=26, edgecolor="black", lw=0.4)
axes.axvline(0.5, color="0.4", lw=1, ls="--")
axes.set(yticks=[0, 1], yticklabels=["sex 0", "sex 1"], xlabel="predicted probability of sex 1 (held-out patients)")
plt.show()

# %%
# In these phantoms, sex is the size and shape of the head. Whether an encoder brings more than a tape measure would is
# asked by controls: see the next page.

folder.cleanup()
