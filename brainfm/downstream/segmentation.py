"""Linear probes on dense features: what a linear model segments from the maps of an encoder that stays as it is.

A voxel's features are the maps' numbers at its place, by linear interpolation between cells. A logistic regression
learns from voxels of some patients and labels those of the others; as it is linear, its logits are computed on the
cells and interpolated. Two controls say what the pretraining adds: the same network untrained, and the intensity alone
(a voxel's own, its square, and the mean of its neighbours).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from brainfm.contract import InputSpec, Volume
from brainfm.downstream.tissue import CLASSES, tissues
from brainfm.downstream.untrained import create_untrained
from brainfm.errors import BrainfmError, MissingExtraError, ScanError
from brainfm.factory import create_model
from brainfm.files import held, progress_bar, write_csv
from brainfm.inference import resolve_device
from brainfm.manifest import ScansLike, list_scans
from brainfm.models.encoder import Encoder
from brainfm.phantom import make_phantom
from brainfm.readout import Reader
from brainfm.scan.layout import is_prepared
from brainfm.scan.load import image_of, load_scan
from brainfm.scan.prepared import read_prepared
from brainfm.scan.read import read_image
from brainfm.system import tf32
from brainfm.transforms import create_transform

try:
    from scipy import ndimage
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold
    from sklearn.preprocessing import StandardScaler
except ModuleNotFoundError as error:
    raise MissingExtraError(error.name or "scikit-learn", "eval") from error

_Array: TypeAlias = NDArray[np.float64]
_Labels: TypeAlias = NDArray[np.int64]
Stages: TypeAlias = Literal["last", "all"]

VOXELS = 200  # of each class that are learned from a scan
LEAST_PATIENTS = 4
_FOLDS = 5
_RESAMPLES = 2000
TISSUE = dict(enumerate(CLASSES, start=1))


@dataclass(frozen=True)
class Dice:
    """How well one kind of features segments one class.

    Attributes:
        model: The encoder's name.
        features: "pretrained", "untrained" or "intensity".
        label: The class.
        dice: The mean over patients of the overlap 2|A∩B| / (|A|+|B|), of patients that were not learned from.
        low, high: Its 95 % interval, by bootstrap over patients; nan where it is of one patient.
        patients: That have the class, or were given it.
    """

    model: str
    features: str
    label: str
    dice: float
    low: float
    high: float
    patients: int


@dataclass(frozen=True, eq=False)
class _Case:
    """A scan as the probe takes it.

    Attributes:
        patient: Whose it is.
        volume: The contract's tensor, with its mask and affine.
        labels: [D, H, W] on the tensor's voxels.
    """

    patient: str
    volume: Volume
    labels: _Labels


def probe_segmentation(
    scans: ScansLike | None,
    models: Sequence[str],
    output: str | os.PathLike[str],
    *,
    phantoms: int = 0,
    labels: str = "",
    names: Mapping[int, str] | None = None,
    stages: Stages = "last",
    seed: int = 0,
    device: str = "auto",
    progress: bool = False,
) -> tuple[list[Dice], dict[str, str]]:
    """Segment each scan by a linear probe that learned from other patients' scans, and score it within the brain.

    Args:
        scans: As of `brainfm.embed`; None for phantoms, whose tissues are known.
        models: Names of `create_model`.
        output: A folder: `dice.csv`, a row a model, kind of features and class; `dice_scans.csv`, a row a scan too.
        phantoms: How many, instead of scans.
        labels: The manifest's column of label files, whole numbers in the scan's own space; empty: the classes of
            `tissues`, which are of intensities, so that the intensity alone is hard to beat.
        names: Of the classes by number; 0 is the rest. Without them, the numbers.
        stages: Features of the last map, or of all of them side by side.
        seed: Of the voxels that are learned from.
        device: See `brainfm.embed`.
        progress: Show a progress bar.

    Returns:
        The scores, and by its name why a scan was left out.

    Raises:
        BrainfmError: Too few patients are left, no class is in two patients, or another command is writing the output.
    """
    if (scans is None) == (phantoms == 0):
        raise BrainfmError("give scans, or a number of phantoms, and not both")
    names = names or (TISSUE if not labels else {})
    found: list[Dice] = []
    each: list[list[Any]] = []
    failed: dict[str, str] = {}
    output = Path(output)
    with held(output):
        for name in models:
            model = create_model(name, pretrained=True)
            spec = create_transform(model).spec
            cases = list(_cases(scans, phantoms, labels, spec, model, seed, failed, progress))
            if len({case.patient for case in cases}) < LEAST_PATIENTS:
                why = f"; the first that failed: {next(iter(failed.values()))}" if failed else ""
                raise BrainfmError(
                    f"{name}: {len(cases)} scans are too few, give {LEAST_PATIENTS} patients at least{why}"
                )
            torch.manual_seed(seed)
            kinds: dict[str, Callable[[_Case], list[tuple[Tensor, dict[str, Any]]]]] = {
                "pretrained": _maps(model, stages, device),
                "untrained": _maps(create_untrained(name), stages, device),
                "intensity": _intensity,
            }
            for kind, maps in kinds.items():
                scores = _cross_validated(cases, maps, seed)
                for label in sorted({int(label) for one in scores for label in one}):
                    title = names.get(label, str(label))
                    values = np.array([one.get(label, math.nan) for one in scores])
                    found.append(_summary(name, kind, title, values, [case.patient for case in cases]))
                    each += [
                        [name, kind, title, c.patient, f"{v:.4f}"] for c, v in zip(cases, values, strict=True) if v == v
                    ]
            write_csv(output / "dice_scans.csv", [("model", "features", "label", "patient_id", "dice"), *each])
            head = [field.name for field in fields(Dice)]
            write_csv(output / "dice.csv", [head, *([_cell(getattr(one, key)) for key in head] for one in found)])
    return found, failed


def _cell(value: Any) -> Any:
    return (f"{value:.4f}" if math.isfinite(value) else "") if isinstance(value, float) else value


# --- Scans and their labels -----------------------------------------------------------------------


def _cases(
    scans: ScansLike | None,
    phantoms: int,
    labels: str,
    spec: InputSpec,
    model: Encoder,
    seed: int,
    failed: dict[str, str],
    progress: bool,
) -> Iterator[_Case]:
    if scans is None:
        coarse = spec.grid is not None and min(spec.grid.spacing) >= 4
        for patient in range(phantoms):
            phantom = make_phantom(patient, spacing=4.0 if coarse else 1.0, seed=seed)
            volume = create_transform(model).volume((phantom.image, phantom.affine), phantom.mask)
            truth = at_voxels(phantom.tissue, np.linalg.inv(phantom.affine) @ volume.affine, volume.shape)
            yield _Case(f"sub-{patient + 1:04d}", volume, truth)
        return
    records = list_scans(scans)
    for record in progress_bar(records, total=len(records), unit="scan", doing="reading", shown=progress):
        try:
            volume = create_transform(model).volume(record.image, record.mask)
            if labels:
                path = record.extra.get(labels, "")
                if not path:
                    raise ScanError(f"{record.name}: no file in the column {labels!r}")
                truth = _read_labels(path, record.image, spec, volume)
            else:
                scan = load_scan(record.image, record.mask, spec=spec)
                if scan.mask is None:
                    raise ScanError(f"{record.name}: tissues are of a brain, and this contract takes no brain mask")
                classes = np.where(scan.mask, tissues(scan.image[0], scan.mask).argmax(axis=0) + 1, 0)
                truth = at_voxels(classes, np.linalg.inv(scan.affine) @ volume.affine, volume.shape)
        except (ScanError, OSError) as error:  # one bad scan never stops the rest
            failed[record.name or record.patient_id] = str(error)
            continue
        yield _Case(record.patient_id or record.name, volume, truth)


def _read_labels(path: str, image: Any, spec: InputSpec, volume: Volume) -> _Labels:
    """A file of labels on a tensor's voxels, through a prepared scan's matrix where the contract has a space."""
    stored = read_image(path, "mask")
    to_scan: _Array = np.eye(4)
    first: Any = image_of(image, spec)
    if is_prepared(first) and spec.space is not None:
        to_scan = read_prepared(first).from_space(spec)
    to_labels = np.linalg.inv(stored.affine) @ to_scan @ volume.affine
    found = at_voxels(np.rint(stored.array).astype(np.int64), to_labels, volume.shape)
    if not found.any():
        raise ScanError(f"{path}: no label lies where the scan does; give labels in the scan's own space")
    return found


def at_voxels(labels: NDArray[Any], to_labels: _Array, shape: Sequence[int]) -> _Labels:
    """[D, H, W]: labels [i, j, k] at the voxels of another grid, by nearest neighbour; 0 beyond them."""
    found = ndimage.affine_transform(labels.astype(np.int32), to_labels, output_shape=tuple(shape), order=0)
    return np.asarray(found, dtype=np.int64)


# --- Features -------------------------------------------------------------------------------------


def _maps(model: Encoder, stages: Stages, device: str) -> Callable[[_Case], list[tuple[Tensor, dict[str, Any]]]]:
    """The maps [C, d, h, w] of a scan, each with its entry of `feature_info`."""
    model = model.eval().to(resolve_device(device))
    reader = Reader(model, dense=True)
    if stages == "all" and reader.readout.window is not None:
        raise BrainfmError(
            f"{model.pretrained_cfg.name} is read in windows, of which the last map alone is put together"
        )

    def maps(case: _Case) -> list[tuple[Tensor, dict[str, Any]]]:
        x = torch.from_numpy(case.volume.image)[None].to(next(model.parameters()).device)
        with torch.inference_mode(), tf32(False):
            if stages == "all":
                found: Any = model.forward_intermediates(x, intermediates_only=True)
                return [(one[0].float().cpu(), info) for one, info in zip(found, model.feature_info, strict=True)]
            seen = reader(x, [case.volume.mask]).maps
        assert seen is not None
        return [(seen[0].cpu(), model.feature_info[-1])]

    return maps


def _intensity(case: _Case) -> list[tuple[Tensor, dict[str, Any]]]:
    image = case.volume.image[0]
    stacked = np.stack([image, image**2, ndimage.uniform_filter(image, 3)])
    return [(torch.from_numpy(stacked), {"reduction": (1, 1, 1), "offset": (0.0, 0.0, 0.0)})]


def _sampled(cells: Tensor, info: Mapping[str, Any], voxels: NDArray[np.intp]) -> Tensor:
    """[n, C]: a map [C, d, h, w] at voxels [n, 3] of the tensor, linear between cells; beyond them, the last."""
    places = (torch.from_numpy(voxels).float() - torch.tensor(info["offset"])) / torch.tensor(info["reduction"]).float()
    size = torch.tensor(cells.shape[1:]).float()
    where = (2 * places / (size - 1).clamp(min=1) - 1).flip(-1)  # PyTorch names the last axis first
    grid = where.view(1, 1, 1, -1, 3)
    found = F.grid_sample(cells[None].float(), grid, mode="bilinear", padding_mode="border", align_corners=True)
    return found[0, :, 0, 0].T


# --- The probe ------------------------------------------------------------------------------------


def _brain(case: _Case) -> NDArray[np.intp]:
    """[n, 3] the voxels that are scored: the brain's, or without a mask all that have a label or an intensity."""
    mask = case.volume.mask
    inside = mask if mask is not None else (case.labels > 0) | (case.volume.image[0] != case.volume.image[0].min())
    return np.argwhere(inside)


def _cross_validated(
    cases: Sequence[_Case], maps: Callable[[_Case], list[tuple[Tensor, dict[str, Any]]]], seed: int
) -> list[dict[int, float]]:
    """The Dice of each class of each scan, by a probe that learned from other patients."""
    draw = np.random.default_rng(seed)
    learned: list[tuple[NDArray[np.float32], _Labels]] = []
    shares: list[dict[int, float]] = []
    for case in cases:
        voxels = _brain(case)
        truth = case.labels[tuple(voxels.T)]
        rows = np.concatenate([_some(np.flatnonzero(truth == label), draw) for label in np.unique(truth)])
        seen = torch.cat([_sampled(cells, info, voxels[rows]) for cells, info in maps(case)], dim=1)
        learned.append((seen.numpy().astype(np.float32), truth[rows]))
        shares.append({int(label): float((truth == label).mean()) for label in np.unique(truth)})
    patients = np.unique([case.patient for case in cases], return_inverse=True)[1]
    found: list[dict[int, float]] = [{} for _ in cases]
    for learn, look in GroupKFold(min(_FOLDS, patients.max() + 1)).split(patients, groups=patients):
        probe = _Probe.fit([learned[n] for n in learn], [shares[n] for n in learn])
        for n in look:
            found[n] = _overlaps(cases[n], probe(maps(cases[n]), _brain(cases[n])))
    return found


def _some(rows: NDArray[np.intp], draw: np.random.Generator) -> NDArray[np.intp]:
    return rows if len(rows) <= VOXELS else draw.choice(rows, VOXELS, replace=False)


@dataclass(frozen=True, eq=False)
class _Probe:
    """A linear map from features to logits: [classes, features] weights and [classes] biases."""

    classes: _Labels
    weights: Tensor
    biases: Tensor

    @classmethod
    def fit(cls, parts: Sequence[tuple[NDArray[np.float32], _Labels]], shares: Sequence[dict[int, float]]) -> _Probe:
        """Learn from voxels of each class in like numbers, and put back by the biases how frequent each class is."""
        features, truth = (np.concatenate([part[n] for part in parts]) for n in (0, 1))
        features = features.astype(np.float64)  # in float32 it ends early, by rounding in one place or another
        scale = StandardScaler().fit(features)
        model = LogisticRegression(max_iter=1000, tol=1e-6).fit(scale.transform(features), truth)
        classes = np.asarray(model.classes_)
        if len(classes) < 2:
            raise BrainfmError("one class alone is in the scans; a segmentation needs two")
        coefficients, biases = model.coef_, model.intercept_
        if len(classes) == 2:  # scikit-learn has the logit of the second alone
            coefficients, biases = np.stack([0 * coefficients[0], coefficients[0]]), np.array([0.0, biases[0]])
        whole = np.array([np.mean([share.get(int(label), 0.0) for share in shares]) for label in classes])
        taken = np.array([(truth == label).mean() for label in classes])
        weights = coefficients / scale.scale_
        biases = biases - weights @ scale.mean_ + np.log(whole / taken)
        return cls(classes, torch.from_numpy(weights).float(), torch.from_numpy(biases).float())

    def __call__(self, maps: Sequence[tuple[Tensor, dict[str, Any]]], voxels: NDArray[np.intp]) -> _Labels:
        """[n]: the likeliest class of voxels [n, 3]."""
        logits, start = self.biases.clone().expand(len(voxels), -1), 0
        for cells, info in maps:
            part = self.weights[:, start : start + len(cells)]
            logits = logits + _sampled(torch.einsum("kc,cdhw->kdhw", part, cells.float()), info, voxels)
            start += len(cells)
        likeliest: _Labels = self.classes[logits.argmax(dim=1).numpy()]
        return likeliest


def _overlaps(case: _Case, guess: _Labels) -> dict[int, float]:
    """The Dice of each class above 0 that the scan has, or is given."""
    truth = case.labels[tuple(_brain(case).T)]
    found: dict[int, float] = {}
    for label in np.unique(np.concatenate([truth, guess])):
        if label > 0:
            both = np.count_nonzero((truth == label) & (guess == label))
            found[int(label)] = float(2 * both / (np.count_nonzero(truth == label) + np.count_nonzero(guess == label)))
    return found


def _summary(model: str, kind: str, label: str, values: _Array, patients: Sequence[str]) -> Dice:
    """The mean over patients, of each the mean over their scans, and its bootstrap interval."""
    known = [n for n, value in enumerate(values) if math.isfinite(value)]
    own: dict[str, list[float]] = {}
    for n in known:
        own.setdefault(patients[n], []).append(float(values[n]))
    means = np.array([np.mean(scores) for scores in own.values()])
    low = high = math.nan
    if len(means) > 1:
        draws = np.random.default_rng(0).integers(len(means), size=(_RESAMPLES, len(means)))
        low, high = (float(edge) for edge in np.percentile(means[draws].mean(axis=1), (2.5, 97.5)))
    return Dice(model, kind, label, float(means.mean()), low, high, len(means))
