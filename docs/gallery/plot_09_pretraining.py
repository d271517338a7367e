"""
Pretraining in miniature
========================

Pretraining takes days; its parts take seconds. This page runs SimCLR (two views of a scan are to be more alike than
views of two scans) for a few epochs on **phantoms**, and shows what a run needs, what it writes, and how to look
whether anything was learned.
"""

import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import brainfm
from brainfm.downstream.knowledge import retrieval
from brainfm.phantom import make_cohort
from brainfm.train.pretraining import pretrain
from brainfm.train.recipe import load_recipe

folder = tempfile.TemporaryDirectory()
here = Path(folder.name)
manifest = make_cohort(32, here / "phantoms", spacing=4.0)

# %%
# Everything that a run depends on is one *recipe*: a YAML file that comes with the package, and ``key=value`` for what
# is to be different. This one made the packaged weights in 15 epochs on 600 phantoms.

recipe = load_recipe(
    "test_resnet_3d",
    [f"manifest={manifest}", f"output={here / 'run'}", "epochs=4", "batch_size=16", "workers=0", "device=cpu"],
)
print(recipe.method, recipe.model, f"· {recipe.epochs} epochs of batches of {recipe.batch_size} · lr {recipe.lr}")

# %%
# The same call goes on with a run that was interrupted. On the command line: ``brainfm pretrain test_resnet_3d
# manifest=… output=…``, and ``torchrun -m brainfm.train …`` on several GPUs.

export = pretrain(recipe)
print(sorted(path.name for path in export.parent.iterdir()))

# %%
# ``log.jsonl`` has a line a step.

steps = [json.loads(line) for line in (export.parent / "log.jsonl").read_text().splitlines()]
losses = [step["loss"] for step in steps if "loss" in step]

# %%
# A falling loss says that the views are told apart, not that the encoder is of use. A question closer to that: does it
# recognise a phantom in a second scan? The encoder goes by the name of its folder; its rivals are the same network as
# it was drawn, and the packaged weights, which saw more.

twice = make_cohort(16, here / "twice", spacing=4.0, scans_per_patient=2, seed=1)
torch.manual_seed(0)
encoders = {
    "as drawn": brainfm.create_model("test_resnet_3d"),
    f"{recipe.epochs} epochs of 32": brainfm.create_model(f"local-dir:{export}", pretrained=True),
    "15 epochs of 600": brainfm.create_model("test_resnet_3d", pretrained=True),
}
tables = {name: brainfm.embed(twice, encoder) for name, encoder in encoders.items()}
found = {name: retrieval(each.vectors, each.columns()["patient_id"]) for name, each in tables.items()}

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", width_ratios=(3, 2))
left.plot(range(1, len(losses) + 1), losses, color="#0072B2", marker="o", ms=4)
left.set(xlabel="step", ylabel="NT-Xent loss", title="two views of a scan against all others")
bars = right.barh(list(found), [each.fraction for each in found.values()], color=["0.7", "#E69F00", "#0072B2"])
for bar, hatch in zip(bars, ("", "//", ""), strict=True):
    bar.set(hatch=hatch, edgecolor="black")
right.axvline(next(iter(found.values())).chance, color="black", lw=1, ls="--")
right.set(xlim=(0, 1), xlabel="nearest scan is the same phantom's (dashed: chance)", title="on phantoms not trained on")
right.invert_yaxis()
plt.show()

# %%
# Whatever the bars say here, they say it of 16 phantoms. The control is what matters: a network as it was drawn is a
# better encoder of 3D scans than one would think, and pretraining has to beat it.

folder.cleanup()
