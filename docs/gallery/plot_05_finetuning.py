"""
Fine-tuning, and predicting new scans
=====================================

When a linear model on frozen embeddings is not enough, the encoder itself is trained further. What comes of it should
outlive the script: a folder with the weights, the head, what its outputs mean, and what is needed to say *how sure* a
prediction is. ``predict`` applies that folder to scans of next year.

The scans are **phantoms**, few and small, and training lasts five epochs. A real run has more of everything.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

from brainfm import get_pretrained_cfg
from brainfm.downstream import predict
from brainfm.downstream.benchmark import benchmark
from brainfm.downstream.corruptions import corrupted
from brainfm.downstream.plan import Plan
from brainfm.downstream.task import load_task, read_task
from brainfm.phantom import make_cohort

folder = tempfile.TemporaryDirectory()
here = Path(folder.name)

# %%
# The task is age. Training, validation and test parts are split by patient; the best epoch is chosen on validation.

manifest = make_cohort(48, here / "phantoms", spacing=4.0)
plan = Plan(
    models=("test_resnet_3d",),
    modes=("finetune",),
    seeds=1,
    epochs_of_all=5,
    settings={"lr": 1e-3, "target": "standardised", "workers": 0},
    controls=False,  # for the sake of this page's time; leave them in
    keep_models=True,
)
benchmark([read_task(load_task("phantom_age"), manifest)], plan, here / "results")
(kept,) = (here / "results" / "models").iterdir()
print(kept.name, "holds", sorted(path.name for path in kept.iterdir()))

# %%
# New scans come from other patients. And what if something happened
# that happens in scanners: the patient moved, and the image has ghosts?

new = make_cohort(16, here / "new", spacing=4.0, seed=1)
clean = predict(kept, new, coverage=0.9).table
spec = get_pretrained_cfg("test_resnet_3d").input_spec
ghosts = predict(kept, corrupted(new, "ghosting", 0.75, spec=spec), coverage=0.9).table
print(clean[["patient_id", "prediction", "low", "high", "unlike"]].head(3).round(1).to_string(index=False))

# %%
# ``low`` and ``high`` hold the truth in nine of ten cases, for new scans *like those of the validation part*: that is
# split-conformal prediction, and it needs no belief in the network. ``unlike`` says whether the condition is met: how
# many percent of the validation scans had an embedding nearer to the training part's.

ages = [float(row.split(",")[5]) for row in new.read_text().splitlines()[1:]]
figure, panels = plt.subplots(1, 2, figsize=(9, 4), sharex=True, sharey=True, layout="constrained")
for axes, table, title in zip(panels, (clean, ghosts), ("as scanned", "with ghosts"), strict=True):
    spans = [table["prediction"] - table["low"], table["high"] - table["prediction"]]
    axes.errorbar(ages, table["prediction"], yerr=spans, fmt="none", ecolor="0.75", lw=1)
    shades = axes.scatter(ages, table["prediction"], c=table["unlike"], cmap="cividis_r", vmin=0, vmax=100, ec="black")
    axes.plot([20, 90], [20, 90], color="black", lw=1, ls="--")
    held = ((table["low"] <= ages) & (ages <= table["high"])).mean()
    axes.set(title=f"{title}: {held:.0%} of intervals hold the truth", xlabel="age of the phantom (years)")
panels[0].set_ylabel("predicted (years)")
figure.colorbar(shades, ax=panels, label="unlike the training part (percentile)")
plt.show()

# %%
# Look at the shades before the numbers: where they are dark, the interval's promise is not about this scan.

folder.cleanup()
