"""
Retrieval and outliers: what an embedding knows unasked
=======================================================

Before any label is predicted, an embedding can be asked three questions that need none. Does it recognise a person in a
second scan? Does it know where the scan was made, which it should not? And which scans are unlike all others?

The scans are **phantoms**, two of each, from four made-up sites.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import brainfm
from brainfm.downstream.corruptions import CORRUPTIONS, corrupted
from brainfm.downstream.knowledge import (
    OutOfDistribution,
    embedding_map,
    leakage_probe,
    retrieval,
    same_patient_similarity,
)
from brainfm.phantom import make_cohort

folder = tempfile.TemporaryDirectory()
manifest = make_cohort(24, Path(folder.name) / "phantoms", spacing=4.0, scans_per_patient=2)
table = brainfm.embed(manifest, "test_resnet_3d")
patients, sites = table.columns()["patient_id"], np.array(table.columns()["site"])

# %%
# **Retrieval.** For each scan, look for the nearest other scan: is it the same patient's?

found = retrieval(table.vectors, patients)
again = same_patient_similarity(table.vectors, patients)
print(f"the nearest scan is the same patient's in {found.fraction:.0%} of scans; by chance {found.chance:.0%}")
print(f"cosine similarity within patients {again.within:.3f}, between patients {again.between:.3f}")

# %%
# **Leakage.** A site that can be read from the embedding can be mistaken for the disease that its patients have.

leak = leakage_probe(table.vectors, sites, patients, folds=4)
print(f"the site is read at {leak.balanced_accuracy:.0%} balanced accuracy; chance is {leak.chance:.0%}")

# %%
# **Outliers.** First scans are the reference; second scans of the same people are new, and some of them are
# spoiled in the ways that scanners spoil scans, each at the highest level that the package tests with. How far from the
# reference is each, by the covariance of the reference itself?

first = np.array(table.columns()["scan_id"]) == "ses-1"
reference = OutOfDistribution().fit(table.vectors[first], np.array(patients)[first])
spec = brainfm.get_pretrained_cfg("test_resnet_3d").input_spec
second = [record for record, is_first in zip(table.records, first, strict=True) if not is_first][:12]
ways = ("noise", "blur", "ghosting", "bias_field")
spoiled = [
    brainfm.embed(corrupted(second, way, CORRUPTIONS[way].levels[-1], spec=spec), "test_resnet_3d") for way in ways
]
distances = [reference.distance(table.vectors[~first]), *(reference.distance(each.vectors) for each in spoiled)]

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
points = embedding_map(table.vectors)
looks = zip(np.unique(sites), ("#0072B2", "#E69F00", "#009E73", "#CC79A7"), "o^sD", strict=True)
for site, colour, marker in looks:
    left.scatter(*points[sites == site].T, color=colour, marker=marker, edgecolor="black", lw=0.4, label=site)
for patient in dict.fromkeys(patients):
    left.plot(*points[np.array(patients) == patient].T, color="0.6", lw=0.8, zorder=0)
left.legend(title="site", fontsize="small")
left.set(title="first two components; lines join a patient's scans", xticks=[], yticks=[])
right.boxplot(distances, tick_labels=["as scanned", *ways], medianprops={"color": "black"})
right.set(
    title="how unlike the reference a second scan is",
    ylabel="Mahalanobis distance",
)
plt.show()

# %%
# An outlier is seen as far as the encoder sees it. One that was trained to make little of noise or of a bias field
# keeps such scans where they were, and some come out *nearer* to the middle than before: no distance is a quality
# control, and ``brainfm prep`` has one that looks at the image.
#
# ``OutOfDistribution.score`` turns distances into percentiles of the reference's own held-out scans. They need a few
# hundred scans to mean much near 100, and they never say *what* is unusual: look at the scan.

folder.cleanup()
