"""
Choosing between encoders, with controls
========================================

Which encoder is best for your label? The question has a companion that is easily forgotten: is any of them better than
no encoder at all? ``brainfm.downstream.benchmark`` runs the candidates on one set of splits and adds what they have to
beat: the same networks with random weights, and a few covariates without any image.

The scans are **phantoms**, and the two candidates tiny networks for tests. The point is how the table is read.
"""

import csv
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from brainfm.downstream.benchmark import benchmark
from brainfm.downstream.plan import Plan
from brainfm.downstream.task import load_task, read_task
from brainfm.phantom import make_cohort

folder = tempfile.TemporaryDirectory()
manifest = make_cohort(48, Path(folder.name) / "phantoms", spacing=4.0)

# %%
# A *task* says what is predicted, by which metric, and which covariates a control may use. ``phantom_disease`` comes
# with the package; your own is a YAML file of a few lines.

task = load_task("phantom_disease")
print(task.title, "·", task.kind, "·", task.metric, "· covariates:", ", ".join(task.covariates))

# %%
# The plan: linear probes on frozen encoders, three splits. Splits are by patient, and the test part is looked at once a
# run, after everything is chosen.

plan = Plan(models=("test_resnet_3d", "test_vit_3d"), modes=("probe",), seeds=3)
page = benchmark([read_task(task, manifest)], plan, Path(folder.name) / "results")
print(sorted(path.name for path in page.parent.iterdir()))

# %%
# ``index.html`` is the page to read and to pass on. Every number is also a row of ``results.csv``, so a figure of one's
# own takes few lines: a point a split, the controls below the line.

scores: dict[tuple[str, str], list[float]] = {}
with (page.parent / "results.csv").open() as file:
    for row in csv.DictReader(file):
        if row["metric"] == task.metric:
            scores.setdefault((row["model"], row["mode"]), []).append(float(row["value"]))
candidates = [key for key in scores if key[1] == "probe"]
controls = [key for key in scores if key[1] != "probe"]

figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
for place, key in enumerate([*candidates, *controls]):
    is_control = key in controls
    look = {"marker": "s", "color": "0.55"} if is_control else {"marker": "o", "color": "#0072B2"}
    axes.scatter(scores[key], [-place] * len(scores[key]), s=36, edgecolor="black", lw=0.5, **look)
    axes.plot([np.mean(scores[key])] * 2, [-place - 0.3, -place + 0.3], color="black", lw=2)
axes.axhline(0.5 - len(candidates), color="0.7", lw=1)
axes.axvline(0.5, color="0.4", lw=1, ls="--")
names = [
    model if model == mode else f"{model}, {'pretrained' if mode == 'probe' else mode}"
    for model, mode in (*candidates, *controls)
]
axes.set(yticks=range(0, -len(names), -1), yticklabels=names, xlabel=f"{task.metric.upper()} (dashed: chance)")
plt.show()

# %%
# Three splits of a handful of test patients scatter as you see. That is why the page claims a gain only where the
# interval of the difference from *every* control lies on the better side of 0, over all splits, and why it claims
# nothing at all of fewer than 10 test patients of a class:

gains = (page.parent / "table.md").read_text().partition("## Gains")[2].partition("\n## ")[0]
print(gains.strip())

# %%
# For every encoder of the registry whose contract your scans meet, what each costs and what is left out with its
# reason, there is one command: ``brainfm compare-encoders prep/ --label age -o results/``.

folder.cleanup()
