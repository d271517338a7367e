"""The pictures of "How it knows": drawn from what the package does to its own sample scan when the site is built."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import affine_transform, binary_erosion

mpl.use("agg")

import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap

import brainfm
from brainfm.assets import GOLDEN_EMBEDDINGS, SAMPLE_MASK, SAMPLE_SCAN
from brainfm.contract import InputSpec
from brainfm.errors import ScanError
from brainfm.overlap import pretraining_overlap
from brainfm.picture import TEMPLATE_COLOUR
from brainfm.zoo.cards import cohort_names

MODEL = "test_resnet_3d"
ONE_MM = "simclr_resnet18_3d"


@dataclass(frozen=True)
class Moved:
    """The packaged scan under a header that says that it lies elsewhere, and what is said of it."""

    what: str
    matrix: NDArray[np.float64]
    said: str


def placements(spec: InputSpec) -> list[Moved]:
    """The packaged scan as it is, and under four wrong headers."""
    image, mask = (nib.load(path) for path in (SAMPLE_SCAN, SAMPLE_MASK))
    found = []
    for what, move in (
        ("as it is", np.eye(4)),
        ("shifted by 20 mm", _shift(0, 20, 0)),
        ("turned by 15°", _turn(15)),
        ("front to back", np.diag([1.0, -1.0, 1.0, 1.0])),
        ("upside down", np.diag([1.0, 1.0, -1.0, 1.0])),
    ):
        affine = move @ image.affine
        scan = (np.asarray(image.dataobj), affine)
        try:
            brainfm.load_scan(scan, (np.asarray(mask.dataobj), affine), spec=spec)
            said = "taken"
        except ScanError as error:
            said = str(error)
        found.append(Moved(what, move, said))
    return found


def draw_placements(found: list[Moved], path: Path) -> None:
    """Each scan where its header says that it lies, the outline of the template's brain over it; from the side."""
    image = nib.load(SAMPLE_SCAN)
    voxels, brain = np.asarray(image.dataobj, np.float32), np.asarray(nib.load(SAMPLE_MASK).dataobj) > 0
    x = int(np.linalg.solve(image.affine, [3, 0, 0, 1])[0].round())
    outline = brain[x] & ~binary_erosion(brain[x], iterations=2)
    colour = ListedColormap([[part / 255 for part in TEMPLATE_COLOUR]])
    figure, axes = plt.subplots(2, 3, figsize=(6.6, 5.0))  # two rows: legible on a phone
    axes.flat[-1].axis("off")
    for axis, moved in zip(axes.flat, found, strict=False):
        back = np.linalg.inv(image.affine) @ np.linalg.inv(moved.matrix) @ image.affine
        shown = affine_transform(voxels, back[:3, :3], back[:3, 3], order=1)[x]
        axis.imshow(shown.T, cmap="gray", origin="lower")
        axis.imshow(np.ma.masked_equal(outline.T, False), cmap=colour, origin="lower", interpolation="nearest")
        axis.set_title(f"{moved.what}:\n{'taken' if moved.said == 'taken' else 'refused'}", fontsize=9)
        axis.axis("off")
    _save(figure, path)


def draw_steps(path: Path) -> list[str]:
    """A contract's steps on the packaged scan: the middle slice after each. Returns what each picture shows."""
    spec = brainfm.get_pretrained_cfg(ONE_MM).input_spec
    volume = brainfm.load_scan(SAMPLE_SCAN, SAMPLE_MASK, spec=spec)
    shown = [("the scan on the contract's grid", volume.image[0].transpose(2, 1, 0))]
    for number, operation in enumerate(spec.operations, start=1):
        volume = operation(volume)
        shown.append((f"after step {number}", volume.image[0]))
    figure, axes = plt.subplots(2, 2, figsize=(5.4, 6.6))
    for axis, (what, voxels) in zip(axes.flat, shown, strict=True):
        plane = voxels[voxels.shape[0] // 2]
        drawn = axis.imshow(plane, cmap="gray", origin="lower")
        axis.set_title(f"{what}\n{'×'.join(map(str, voxels.shape))}", fontsize=8)
        axis.set_xticks([]), axis.set_yticks([])
        bar = figure.colorbar(drawn, ax=axis, orientation="horizontal", fraction=0.05, pad=0.03)
        bar.ax.tick_params(labelsize=7)
    _save(figure, path)
    return [f"step {number}: {operation}" for number, operation in enumerate(spec.operations, start=1)]


def draw_overlap(path: Path) -> None:
    """Which data sets were in the pretraining data of which encoder, by the cards: a square where one was."""
    cfgs = [brainfm.get_pretrained_cfg(name) for name in brainfm.list_models()]
    known = {*cohort_names().names, *(cohort.name for cfg in cfgs for cohort in cfg.cohorts)}
    models = {}
    for name in brainfm.list_models():
        cfg = brainfm.get_pretrained_cfg(name)
        if cfg.cohorts and not name.startswith("test_"):
            models[name] = {overlap.dataset for overlap in pretraining_overlap(cfg, known)}
    seen = sorted({dataset for datasets in models.values() for dataset in datasets})
    models = {name: datasets for name, datasets in models.items() if datasets}
    figure, axis = plt.subplots(figsize=(0.26 * len(seen) + 2.6, 0.26 * len(models) + 1.6))
    points = [(seen.index(dataset), row) for row, datasets in enumerate(models.values()) for dataset in datasets]
    axis.scatter(*zip(*points, strict=True), marker="s", s=60, color="#30506f")
    axis.set_xticks(range(len(seen)), seen, rotation=90, fontsize=8)
    axis.set_yticks(range(len(models)), list(models), fontsize=8)
    axis.set_xlim(-0.6, len(seen) - 0.4), axis.set_ylim(len(models) - 0.4, -0.6)
    axis.grid(color="#dddddd", linewidth=0.6), axis.set_axisbelow(True)
    _save(figure, path)


def draw_golden(path: Path) -> float:
    """The stored embedding of the packaged scan, and that of this machine over it. Returns their relative distance."""
    model = brainfm.create_model(MODEL, pretrained=True)
    with torch.inference_mode():
        here = model(brainfm.create_transform(model)(SAMPLE_SCAN, SAMPLE_MASK)[None])[0].numpy()
    stored = json.loads(GOLDEN_EMBEDDINGS.read_text(encoding="utf-8"))[model.pretrained_cfg.name]["embedding"]
    golden = np.asarray(stored)
    figure, axis = plt.subplots(figsize=(7, 2.2))
    axis.bar(range(len(golden)), golden, color="#bbbbbb", label="stored with the weights")
    axis.plot(here, "k.", markersize=4, label="this machine")
    axis.set_xlabel("feature"), axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)
    return float(np.linalg.norm(here - golden) / np.linalg.norm(golden))


def _shift(*millimetres: float) -> NDArray[np.float64]:
    matrix = np.eye(4)
    matrix[:3, 3] = millimetres
    return matrix


def _turn(degrees: float) -> NDArray[np.float64]:
    """About the left-right axis, through the origin."""
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    matrix = np.eye(4)
    matrix[1:3, 1:3] = [[c, -s], [s, c]]
    return matrix


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=130, bbox_inches="tight", facecolor="white")
    plt.close(figure)
