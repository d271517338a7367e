"""How small a change of a brain an encoder sees: atrophy, a lesion or a bias field, planted in scans in known sizes.

Of each scan a series is made that differs in the size of the change alone. A gate is passed where the embedding moves
further from the clean scan's the larger the change is, and, from some size on, further than by scanning the same head
again. That floor is, of phantoms, their other scans (other noise, bias field, gain and registration error); of other
scans, the same head turned a little. A probe that learned from other patients how large the change is says whether it
can be read off. A distance adds up all that a second scan changes, and is a hard gate; a probe of the differences from
the clean scan looks along the change alone, and has a floor of its own: what it reads off second scans. One that
learned a label from their clean scans says what the change does to that.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from brainfm.contract import InputSpec, Volume
from brainfm.contract.volume import not_zero
from brainfm.downstream.corruptions import CORRUPTIONS, Affine, Image, Mask
from brainfm.downstream.plots import Look, _style, save_figure
from brainfm.downstream.probe import RIDGE_ALPHA
from brainfm.downstream.tissue import lose, near_fluid, tissues
from brainfm.errors import BrainfmError, MissingExtraError, ScanError
from brainfm.factory import create_model
from brainfm.files import held, progress_bar, write_csv
from brainfm.inference import resolve_device
from brainfm.manifest import ScanRecord, ScansLike, list_scans
from brainfm.phantom import make_labels, make_phantom
from brainfm.readout import Reader
from brainfm.scan import Scan, load_scan
from brainfm.scan.layout import is_prepared
from brainfm.transforms import create_transform

try:
    from matplotlib.figure import Figure
    from scipy import ndimage
    from scipy.spatial.distance import pdist
    from scipy.stats import spearmanr
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
except ModuleNotFoundError as error:
    raise MissingExtraError(error.name or "scipy", "eval") from error

_Array: TypeAlias = NDArray[np.float64]

RETEST = "retest"  # what the rows of the floor are called
FLOOR = 95.0  # percentile of the distances between scans of one head, above which a change is seen
REPEATS = 4  # further scans of each head
TURN_DEGREES = 1.0  # of the same head, where there is no other scan: what registration leaves (as of phantoms, twice)
LEAST_PATIENTS = 4
_FOLDS = 5
_PHANTOM_LABELS = ("age", "sex", "disease", "severity")
_LESION_DEPTH = 75.0  # percentile of the depth in white matter, above which a lesion's centre lies
_EDGE = 0.05  # of the map of fluid, over which tissue becomes fluid
_EDGE_MM = 2.0  # of a lesion


# --- The changes ----------------------------------------------------------------------------------


Plant: TypeAlias = Callable[[float], Image]  # size of a change → the image with it


@dataclass(frozen=True)
class Change:
    """A change of a brain that is planted in a scan.

    Attributes:
        begin: (image, mask, affine, generator) → `Plant`; what it makes depends on nothing but the size then.
        sizes: Those of a series, the first of them 0.
        unit: What they measure.
        source: Where they are from.
    """

    begin: Callable[[Image, Mask, Affine, np.random.Generator], Plant]
    sizes: tuple[float, ...]
    unit: str
    source: str


def atrophy(image: Image, mask: Mask, affine: Affine, rng: np.random.Generator) -> Plant:
    """Per cent of the brain's tissue that becomes CSF, that next to CSF first: wider ventricles and sulci."""
    del rng  # nothing is left to chance
    fractions = tissues(image, mask)
    near, tissue = near_fluid(fractions, _spacing(affine)), float(fractions[1:].sum(dtype=np.float64))
    return lambda size: lose(image, fractions, near, _EDGE, size / 100 * tissue)


def lesion(image: Image, mask: Mask, affine: Affine, rng: np.random.Generator) -> Plant:
    """Millilitres of tissue that become CSF, as of an old stroke: a ball about a random place in deep white matter."""
    fractions, spacing = tissues(image, mask), _spacing(affine)
    depth = ndimage.distance_transform_edt(mask, sampling=spacing) * (fractions[2] > 0.5)
    deep = np.argwhere(depth >= np.percentile(depth[depth > 0], _LESION_DEPTH))
    centre = deep[rng.integers(len(deep))]
    x, y, z = (((np.arange(n) - at) * mm) ** 2 for n, at, mm in zip(mask.shape, centre, spacing, strict=True))
    near = -np.sqrt(x[:, None, None] + y[:, None] + z).astype(np.float32)
    edge, voxel_ml = max(_EDGE_MM, *spacing), float(spacing.prod()) / 1000
    return lambda size: lose(image, fractions, near, edge, size / voxel_ml)


def bias(image: Image, mask: Mask, affine: Affine, rng: np.random.Generator) -> Plant:
    """As the corruption "bias_field", its range over the brain in per cent of the mean."""
    seed = int(rng.integers(2**31))
    field = CORRUPTIONS["bias_field"]
    return lambda size: field(image, mask, affine, size / 100, np.random.default_rng(seed))[0]


_AGEING = (
    "ours; 0.5 and 2 are of the order of a year of healthy old age and of Alzheimer's disease, as Fox & Schott 2004 "
    "are cited, whose text was not at hand"
)

CHANGES: dict[str, Change] = {
    "atrophy": Change(atrophy, (0.0, 0.5, 1.0, 2.0, 4.0, 8.0), "% of the tissue", _AGEING),
    "lesion": Change(lesion, (0.0, 0.5, 2.0, 8.0, 20.0, 50.0), "ml", "ours"),
    "bias": Change(bias, (0.0, 5.0, 10.0, 20.0, 40.0), "% of the mean", "20 and 40: BrainWeb's; the rest ours"),
}


def _spacing(affine: Affine) -> _Array:
    spacing: _Array = np.linalg.norm(affine[:3, :3], axis=0)
    return spacing


# --- What is found --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """How one encoder follows one change.

    Attributes:
        model: The encoder's name.
        change: A key of `CHANGES`.
        unit: What sizes are measured in.
        patients: How many had the whole series.
        floor: The 95th percentile of the distances between scans of one head; 1 is the median distance between two
            patients, as in all distances.
        seen_from: The smallest size from which on the median distance is above the floor; nan where none is.
        rising: The fraction of patients whose distance rises with every step.
        distance_rank: The median over patients of Spearman's correlation of distance and size.
        probe_rank: The same of the size that a probe reads off, which learned from other patients.
        probe_floor: Of a probe that learned from what scans of other patients differ by from the clean one: the 95th
            percentile of what it reads off another scan of a head, in the change's unit.
        read_from: The smallest size from which on the median of what that probe reads is above its floor; nan is none.
        label: What the label's probe predicts, or empty.
        label_rank: The median over patients of Spearman's correlation of its prediction and size.
    """

    model: str
    change: str
    unit: str
    patients: int
    floor: float
    seen_from: float
    rising: float
    distance_rank: float
    probe_rank: float
    probe_floor: float
    read_from: float
    label: str = ""
    label_rank: float = math.nan

    def __str__(self) -> str:
        seen, read = (
            f"above the test–retest floor from {size:g} {self.unit} on"
            if math.isfinite(size)
            else "never above the test–retest floor"
            for size in (self.seen_from, self.read_from)
        )
        label = f"; its {self.label} moves with it (ρ {self.label_rank:+.2f})" if self.label else ""
        return (
            f"{self.model}: {self.change}: rises at every step in {self.rising:.0%} of {self.patients} patients "
            f"(ρ {self.distance_rank:+.2f}), {seen}; a probe of others reads its size (ρ {self.probe_rank:+.2f}); "
            f"one of differences is {read}{label}"
        )


@dataclass(frozen=True, eq=False)
class _Head:
    """One patient: the scan that is changed, and the same head again.

    Attributes:
        patient: Whose it is.
        label: Of the label's probe; nan without one.
        read: number → image and mask; 0 is the scan that is changed, the others are further scans of the head.
        repeats: How many others there are; without any, the first is turned.
    """

    patient: str
    label: float
    read: Callable[[int], tuple[Any, Any]]
    repeats: int = 0


@dataclass(eq=False)
class _Series:
    """Embeddings: of clean scans [n, d], of their repeats [n, r, d], and of each change [n, sizes, d], clean first."""

    patients: list[str]
    labels: _Array
    clean: _Array
    repeats: _Array
    changed: dict[str, _Array]


def recovery(
    scans: ScansLike | None,
    models: Sequence[str],
    output: str | os.PathLike[str],
    *,
    phantoms: int = 0,
    changes: Sequence[str] = tuple(CHANGES),
    label: str = "",
    seed: int = 0,
    device: str = "auto",
    progress: bool = False,
) -> tuple[list[Verdict], dict[str, str]]:
    """Plant changes in scans, and see how the embeddings of each model follow them.

    A change is made on the contract's grid, before the contract's operations, from intensities: of T1w scans. Each scan
    is read once a model. Of a patient the first scan is used.

    Args:
        scans: As `brainfm.embed` takes them; None for phantoms.
        models: Names of `create_model`.
        output: A folder: `recovery.csv`, a row a patient and size (`distance` from the clean scan; `probe`, the size
            that is read off; `label_shift`); `verdicts.csv`, a row a model and change (see `Verdict`); and a figure
            a model.
        phantoms: How many, instead of scans.
        changes: Of `CHANGES`.
        label: A column of numbers, for a probe; of phantoms by default their age.
        seed: Of places, shapes, turns and phantoms.
        device: See `brainfm.embed`.
        progress: Show a progress bar.

    Returns:
        The verdicts, and by its name why a scan was left out.

    Raises:
        BrainfmError: Too few patients are left, a contract takes other than T1w scans, or another command is writing
            the output.
    """
    if unknown := [name for name in changes if name not in CHANGES]:
        raise BrainfmError(f"no change is called {unknown[0]!r}; there are {', '.join(CHANGES)}")
    if (scans is None) == (phantoms == 0):
        raise BrainfmError("give scans, or a number of phantoms, and not both")
    output = Path(output)
    rows: list[list[Any]] = []
    verdicts: list[Verdict] = []
    failed: dict[str, str] = {}
    label = label or ("age" if scans is None else "")
    with held(output):
        for name in models:
            model = create_model(name, pretrained=True).eval().to(resolve_device(device))
            spec = create_transform(model).spec
            _check_contrast(name, spec)
            heads = _phantoms(phantoms, spec, label, seed) if scans is None else _heads(list_scans(scans), label)
            series = _embedded(name, model, heads, changes, seed, failed, progress)
            found = [_judged(name, change, series, label) for change in changes]
            verdicts += [verdict for verdict, _ in found]
            rows += [row for _, some in found for row in some] + _retest_rows(name, series)
            write_csv(output / "recovery.csv", [_COLUMNS, *rows])
            write_csv(output / "verdicts.csv", [[f.name for f in fields(Verdict)], *(_row(v) for v in verdicts)])
            save_figure(_figure(name, series, {v.change: v for v, _ in found}), output / f"recovery_{_plain(name)}")
    return verdicts, failed


_COLUMNS = ("model", "change", "unit", "size", "patient_id", "distance", "probe", "label_shift")


def _check_contrast(name: str, spec: InputSpec) -> None:
    kinds = spec.channels if len(spec.channels) > 1 else (spec.representation,)
    if other := [kind for kind in kinds if not kind.casefold().startswith(("t1", "any"))]:
        raise BrainfmError(f"{name} takes {', '.join(other)}; changes are planted in T1w scans, where CSF is dark")


# --- Heads ----------------------------------------------------------------------------------------


def _phantoms(count: int, spec: InputSpec, label: str, seed: int) -> list[_Head]:
    coarse = spec.grid is not None and min(spec.grid.spacing) >= 4
    spacing = 4.0 if coarse else 1.0

    def head(patient: int) -> _Head:
        def read(scan: int) -> tuple[Any, Any]:
            phantom = make_phantom(patient, scan, spacing=spacing, seed=seed)
            return (phantom.image, phantom.affine), phantom.mask

        return _Head(f"sub-{patient + 1:04d}", float(getattr(make_labels(patient, seed=seed), label)), read, REPEATS)

    if label not in _PHANTOM_LABELS:
        raise BrainfmError(f"phantoms have no number {label!r}; they have {', '.join(_PHANTOM_LABELS)}")
    return [head(patient) for patient in range(count)]


def _heads(records: Sequence[ScanRecord], label: str) -> list[_Head]:
    """A patient's first scan each."""
    found: dict[str, _Head] = {}
    for number, record in enumerate(records):
        patient = record.patient_id or record.name or f"scan {number}"
        if patient not in found:
            found[patient] = _Head(patient, _number(record, label), _reads(record))
    return list(found.values())


def _reads(record: ScanRecord) -> Callable[[int], tuple[Any, Any]]:
    return lambda _: (record.image, record.mask)


def _number(record: ScanRecord, label: str) -> float:
    if not label:
        return math.nan
    if label not in record.extra:
        raise BrainfmError(f"{record.name or 'the scan'}: no column {label!r} in the list of scans")
    try:
        return float(record.extra[label] or "nan")
    except ValueError as error:
        raise BrainfmError(
            f"{record.name}: {label} is {record.extra[label]!r}, and a probe of it needs numbers"
        ) from error


# --- Embeddings -----------------------------------------------------------------------------------


def _embedded(
    name: str,
    model: nn.Module,
    heads: Sequence[_Head],
    changes: Sequence[str],
    seed: int,
    failed: dict[str, str],
    progress: bool,
) -> _Series:
    reader, transform = Reader(model), create_transform(model)
    device = next(model.parameters()).device

    def vector(scan: Scan) -> _Array:
        volume: Volume = transform.apply(scan if transform.spec.mask != "none" else replace(scan, mask=None))
        tensor = torch.from_numpy(volume.image)[None].to(device)
        found: _Array = reader(tensor, [volume.mask]).vectors[0].cpu().numpy().astype(np.float64)
        return found

    kept, found = [], []
    for number, head in enumerate(progress_bar(heads, total=len(heads), unit="patient", doing=name, shown=progress)):
        try:
            one = list(_of_head(head, transform.spec, changes, (seed, number), vector))
        except (ScanError, OSError) as error:  # one bad scan never stops the rest
            failed[head.patient] = str(error)
            continue
        kept.append(head)
        found.append(one)
    if len(kept) < LEAST_PATIENTS:
        why = f"; the first that failed: {next(iter(failed.values()))}" if failed else ""
        raise BrainfmError(f"{name}: {len(kept)} patients are too few, give {LEAST_PATIENTS} at least{why}")
    clean, repeats, *changed = (np.stack(part) for part in zip(*found, strict=True))
    series = dict(zip(changes, changed, strict=True))
    return _Series([h.patient for h in kept], np.array([h.label for h in kept]), clean, repeats, series)


def _of_head(
    head: _Head,
    spec: InputSpec,
    changes: Sequence[str],
    seed: tuple[int, int],
    vector: Callable[[Scan], _Array],
) -> Iterator[_Array]:
    """The vector of the clean scan, those of its repeats, and of each change those of its sizes."""
    scan = _read(*head.read(0), spec)
    clean = vector(scan)
    yield clean
    if head.repeats:
        yield np.stack([vector(_read(*head.read(n + 1), spec)) for n in range(head.repeats)])
    else:
        yield np.stack([vector(_turned(scan, (*seed, n))) for n in range(REPEATS)])
    mask = scan.mask
    if mask is None:
        mask = np.logical_or.reduce(not_zero(scan.stored, scan.slope, scan.inter))
    for change in (CHANGES[name] for name in changes):
        plants = [change.begin(channel, mask, scan.affine, np.random.default_rng(seed)) for channel in scan.image]
        series = [np.stack([plant(size) for plant in plants]) for size in change.sizes[1:]]
        yield np.stack([clean, *(vector(replace(scan, stored=image, slope=1.0, inter=0.0)) for image in series)])


def _read(image: Any, mask: Any, spec: InputSpec) -> Scan:
    """A scan on the contract's grid, with its brain mask even where the contract needs none."""
    if mask is None and not is_prepared(image) and spec.skull_strip != "required":
        raise ScanError("a change is planted in the brain, and there is no brain mask: give mask_path in a manifest")
    return load_scan(image, mask, spec=replace(spec, mask="file or nonzero") if spec.mask == "none" else spec)


def _turned(scan: Scan, seed: tuple[int, ...]) -> Scan:
    images, mask = CORRUPTIONS["rotation"].each_channel(scan, TURN_DEGREES, seed)
    return replace(scan, stored=np.stack(images), mask=mask, slope=1.0, inter=0.0)


# --- Judgement ------------------------------------------------------------------------------------


def _distances(series: _Series, change: str = "") -> _Array:
    """[n, sizes or repeats] from the clean scan, in units of the median distance between two patients."""
    others = series.changed[change] if change else series.repeats
    apart: _Array = np.linalg.norm(others - series.clean[:, None], axis=2) / np.median(pdist(series.clean))
    return apart


def _judged(name: str, change: str, series: _Series, label: str) -> tuple[Verdict, list[list[Any]]]:
    sizes, unit = np.array(CHANGES[change].sizes), CHANGES[change].unit
    vectors, apart = series.changed[change], _distances(series, change)
    floor = float(np.percentile(_distances(series), FLOOR))
    probe, _ = _read_off(vectors, series.repeats, sizes)
    clean = series.clean[:, None]
    read, again = _read_off(vectors - clean, series.repeats - clean, sizes)
    read_floor = float(np.percentile(np.abs(again - read[:, :1]), FLOOR))
    shift = _label_shift(vectors, series.labels) if label else np.full(apart.shape, math.nan)
    verdict = Verdict(
        model=name,
        change=change,
        unit=unit,
        patients=len(vectors),
        floor=floor,
        seen_from=_seen_from(sizes, apart, floor),
        rising=float((np.diff(apart, axis=1) > 0).all(axis=1).mean()),
        distance_rank=_rank(apart, sizes),
        probe_rank=_rank(probe, sizes),
        probe_floor=read_floor,
        read_from=_seen_from(sizes, read - read[:, :1], read_floor),
        label=label,
        label_rank=_rank(shift, sizes) if label else math.nan,
    )
    rows = [
        [name, change, unit, f"{size:g}", patient, *(_cell(values[n, s]) for values in (apart, probe, shift))]
        for n, patient in enumerate(series.patients)
        for s, size in enumerate(sizes)
    ]
    return verdict, rows


def _seen_from(sizes: _Array, values: _Array, floor: float) -> float:
    """The smallest size from which on the median over patients, of values [n, sizes], is above a floor; nan is none."""
    below = np.flatnonzero(np.median(values, axis=0) <= floor)
    after = int(below.max()) + 1 if len(below) else 0
    return float(sizes[after]) if after < len(sizes) else math.nan


def _retest_rows(name: str, series: _Series) -> list[list[Any]]:
    return [
        [name, RETEST, "scan", f"{number + 1}", patient, _cell(value), "", ""]
        for patient, values in zip(series.patients, _distances(series), strict=True)
        for number, value in enumerate(values)
    ]


def _rank(values: _Array, sizes: _Array) -> float:
    """The median over patients of Spearman's correlation; a series that does not move has 0."""
    ranks = [0.0 if np.ptp(row) == 0 else float(spearmanr(row, sizes).statistic) for row in values]
    return float(np.median(ranks))


def _folds(patients: int) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    numbers = np.arange(patients)
    yield from GroupKFold(min(_FOLDS, patients)).split(numbers, groups=numbers)


def _ridge() -> Any:
    """A ridge regression on standardised features, its strength by leaving one out."""
    return make_pipeline(StandardScaler(), RidgeCV(RIDGE_ALPHA))


def _read_off(vectors: _Array, repeats: _Array, sizes: _Array) -> tuple[_Array, _Array]:
    """How large the change is in each scan of the series, [n, sizes], and in each repeat, [n, r], which has none.

    By a probe that learned from other patients, from their repeats too: so it knows what a scanner changes.
    """
    found, again = np.empty(vectors.shape[:2]), np.empty(repeats.shape[:2])
    for learn, look in _folds(len(vectors)):
        scans = np.concatenate([*vectors[learn], *repeats[learn]])
        truth = np.concatenate([np.tile(sizes, len(learn)), np.zeros(len(learn) * repeats.shape[1])])
        probe = _ridge().fit(scans, truth)
        for values, of in ((found, vectors), (again, repeats)):
            values[look] = probe.predict(np.concatenate(of[look])).reshape(len(look), -1)
    return found, again


def _label_shift(vectors: _Array, labels: _Array) -> _Array:
    """[n, sizes]: what the change adds to a label, by a probe that learned it from other patients' clean scans."""
    known = np.isfinite(labels)
    if known.sum() < LEAST_PATIENTS:
        raise BrainfmError(f"{known.sum()} patients have the label; a probe needs {LEAST_PATIENTS} at least")
    found = np.empty(vectors.shape[:2])
    for learn, look in _folds(len(vectors)):
        others = learn[known[learn]]
        probe = _ridge().fit(vectors[others, 0], labels[others])
        predicted = probe.predict(np.concatenate(vectors[look])).reshape(len(look), -1)
        found[look] = predicted - predicted[:, :1]
    return found


# --- What is written ------------------------------------------------------------------------------


def _cell(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else ""


def _row(verdict: Verdict) -> list[Any]:
    values = [getattr(verdict, f.name) for f in fields(verdict)]
    return [_cell(value) if isinstance(value, float) else value for value in values]


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "_-." else "-" for letter in name)[-60:]


@_style()
def _figure(name: str, series: _Series, verdicts: dict[str, Verdict]) -> Figure:
    """A panel a change: the median distance with its middle half of patients, and the floor."""
    look = Look(name, "#0072B2", "o", "solid")
    figure = Figure(figsize=(2.4 * max(len(verdicts), 1.5), 3), layout="constrained")
    figure.suptitle(f"{name}: distance from the clean scan")
    for place, (change, verdict) in enumerate(verdicts.items(), start=1):
        sizes, apart = np.array(CHANGES[change].sizes), _distances(series, change)
        low, middle, high = np.percentile(apart, (25, 50, 75), axis=0)
        axes = figure.add_subplot(1, len(verdicts), place)
        axes.fill_between(sizes, low, high, color=look.colour, alpha=0.15, linewidth=0)
        axes.plot(sizes, middle, color=look.colour, marker=look.marker, ms=4)
        axes.axhline(verdict.floor, color="#555555", linestyle="dashed", linewidth=1)
        if math.isfinite(verdict.seen_from):
            axes.axvline(verdict.seen_from, color="#D55E00", linestyle="dotted", linewidth=1.2)
        axes.set_xscale("symlog", linthresh=float(sizes[1]))
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.minorticks_off()
        axes.set_title(change, fontsize="medium")
        axes.set(xlabel=verdict.unit, ylabel="1 = between two patients" if place == 1 else "", ylim=(0, None))
    return figure
