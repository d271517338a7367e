"""
Harmonisation inside a cross-validation
=======================================

Scans of several sites differ by site. ComBat (Johnson et al. 2007; Fortin et al. 2018 for MRI) takes from each feature
the shift and the scale of its site. It *learns* these from data, and so it belongs inside the cross-validation, fitted
on training scans alone; fitted once on everything, it has seen the test scans. In a scikit-learn ``Pipeline`` that
comes by itself.

The scans are **phantoms** of four made-up sites; ComBat is that of ``combatlearn``.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from combatlearn import ComBat
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from brainfm.phantom import make_cohort
from brainfm.sklearn import BrainEncoder

folder = tempfile.TemporaryDirectory()
manifest = make_cohort(64, Path(folder.name) / "phantoms", spacing=4.0)
cohort = pd.read_csv(manifest).set_index("patient_id", drop=False)
for column in ("image_path", "mask_path"):
    cohort[column] = [str(manifest.parent / path) for path in cohort[column]]

# %%
# The rows of the manifest are the samples. ``BrainEncoder`` makes features of them and, asked for pandas, keeps the
# rows' index, by which ComBat finds each row's site. Its cache embeds each scan once for all that follows.

encoder = BrainEncoder("test_resnet_3d", cache=Path(folder.name) / "cache").set_output(transform="pandas")
plain = Pipeline(
    [("encoder", encoder), ("scale", StandardScaler()), ("classifier", LogisticRegression(C=0.01, max_iter=1000))]
)
harmonised = Pipeline([plain.steps[0], ("combat", ComBat(batch=cohort["site"])), *plain.steps[1:]])

# %%
# Two questions, each with and without: how well is the site read (which should become hard), and how well the sex
# (which should not). A site that is read at chance after ComBat by a *linear* model may still be read by another.

folds = StratifiedKFold(5, shuffle=True, random_state=0)
splits = list(folds.split(cohort, cohort["site"]))  # ComBat needs each site in each training part
scores = {
    (label, name): cross_val_score(pipeline, cohort, cohort[label], cv=splits, scoring="balanced_accuracy")
    for label in ("site", "sex")
    for name, pipeline in (("as embedded", plain), ("ComBat", harmonised))
}
for (label, name), values in scores.items():
    print(f"{label}, {name}: {values.mean():.2f} ± {values.std():.2f}")

# %%
# The dashed lines are chance: one in four sites, one in two sexes.

figure, axes = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
for place, ((_, name), values) in enumerate(scores.items()):
    look = {"color": "#0072B2", "hatch": ""} if name == "as embedded" else {"color": "#E69F00", "hatch": "//"}
    label = name if place < 2 else None
    axes.bar(
        place + place // 2 * 0.5, values.mean(), yerr=values.std(), capsize=4, edgecolor="black", label=label, **look
    )
for start, chance in ((-0.5, 0.25), (2.0, 0.5)):
    axes.plot([start, start + 2], [chance, chance], color="black", lw=1, ls="--")
axes.set(xticks=[0.5, 3.0], xticklabels=["site", "sex"], ylabel="balanced accuracy, 5 folds", ylim=(0, 1))
axes.legend(loc="upper left")
plt.show()

# %%
# The bars' whiskers are the folds' standard deviation, and they are wide: 64 scans, 16 a site, are few. A score *below*
# chance is no mistake of the plot: with each site's mean gone from the training scans, the little that chance left of
# it in them points away from where the held-out scans of that site lie.
#
# Three things that no harmonisation mends. A site that is not among the training scans has no shift that could be
# learned, and ``ComBat`` refuses it. Where one site has most of the patients and another most of the controls, the
# difference between sites *is* that between groups, and is removed with it, or kept, by choice and not by evidence. And
# in a study of few scans a site, what is estimated is mostly noise.
#
# Balance in the plan of a study is worth more than any correction after it.

folder.cleanup()
