"""Synthetic T1w scans with known labels, called phantoms: to learn and to test with, never to be taken for data.

A phantom is the packaged template's tissue (the MNI152 average brain) bent by a smooth random deformation that is the
patient's own, coloured by a site's contrast and corrupted by a scan's noise, bias field and small registration error.
It comes as TurboPrep leaves a scan, on the contract's template grid, with its mask: skull-stripped, then shifted as by
WhiteStripe, so that the background is a negative constant. Its labels are drawn independently of one another and of
the site, and each moves tissue, so that no linear intensity map (and so no masked z-score) removes it:

- age: the lateral ventricles grow and the cortex thins (cerebrospinal fluid, CSF, fills the sulci);
- sex: the size of the head, and how long it is for its width;
- disease: the hippocampal region loses tissue to CSF;
- severity: 0 without a lesion, else a stroke-like dark lesion in one hemisphere that grows and darkens with it.

The effects are stronger than in people, and the numbers of this module that have no source beside them are ours. They
were set by these figures, at 4 mm, after the contract's masked z-score (tests/test_phantom.py holds them):

| what                                                                   | measured                          |
|------------------------------------------------------------------------|-----------------------------------|
| second scans whose nearest first scan is the same patient's, of 100    | 100 %                             |
| age and the fraction of dark voxels; and those about the ventricles    | r = 0.88 and 0.86                 |
| sex and the mask's volume                                              | r = 0.97                          |
| disease and the mean about the hippocampi                              | r = −0.87                         |
| severity and the dark voxels of one side over the other's; lesioned    | r = 0.93; 0.89                    |
| `test_resnet_3d` from scratch, 300 patients, 10 epochs; 100 held out   | sex, disease: AUC 1.0             |
|                                                                        | age R² 0.8, severity R² 0.9       |
| accepted by `brainfm.load_scan`                                        | 1000 of 1000; at 1 mm 64 of 64    |

A score on phantoms says that code works; it says nothing of patients.
"""

from __future__ import annotations

import gzip
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from brainfm.assets import SAMPLE_MASK, SAMPLE_SCAN
from brainfm.contract import Grid, InputSpec, Volume
from brainfm.errors import BrainfmError
from brainfm.files import atomic_path, progress_bar, write_csv, write_text
from brainfm.registry import get_pretrained_cfg
from brainfm.scan.grid import on_grid
from brainfm.scan.read import read_image
from brainfm.system import torch_threads

_Array: TypeAlias = NDArray[np.float32]
_Point: TypeAlias = "tuple[float, float, float] | _Array"

RECIPE = 2  # goes up whenever the same arguments would give other phantoms
SITES = ("north", "east", "south", "west")
MIN_SPACING_MM, MAX_SPACING_MM = 1.0, 8.0  # the template has no finer detail; coarser voxels show no hippocampus

YOUNGEST, OLDEST = 20.0, 90.0  # years
MAX_SEVERITY = 42  # the highest score of the NIH Stroke Scale

# Anatomy that is the patient's own.
DEFORMATION_MM, DEFORMATION_LENGTH_MM = 3.5, 10.0  # std along each axis, and of the Gaussian that smooths it
HEAD_SCALE_STD = 0.012  # along each axis
THINNING_STD, THINNING_LENGTH_MM = 0.2, 9.0  # cortex that is thinner here and thicker there
VENTRICLES_STD = 0.02

# What the labels do. Lengths along the axes are (x, y, z); places are template RAS mm.
HEAD_CENTRE = (0.0, -19.0, 8.0)  # about the centre of the template's brain
HEAD_HALF_MM = (68.0, 86.0, 66.0)  # from there to its surface
HEAD_SCALE = ((0.915, 0.905, 0.915), (0.975, 0.99, 0.975))  # of the template, for sex 0 and 1
VENTRICLES_CENTRE, VENTRICLES_SIZE_MM = (0.0, -11.0, 10.0), (34.0, 50.0, 21.0)  # the ellipsoid that holds them
VENTRICLES_BLUR_MM, VENTRICLES_EDGE = 4.0, 0.08  # they grow into where their blurred map exceeds a level
VENTRICLES_LEVEL = (0.36, 0.08)  # youngest and oldest: from the template's own volume, 25 ml, to about 90 ml
THINNING = (0.0, 1.0)  # from the tissue map of a thick cortex to that of a thin one, youngest and oldest
HIPPOCAMPUS_CENTRE, HIPPOCAMPUS_SIZE_MM = (27.0, -20.0, -15.0), (12.0, 20.0, 11.0)  # and its mirror image
ATROPHY = ((0.0, 0.1), (0.8, 1.0))  # fraction of its tissue that is lost, least and most, for disease 0 and 1
LESION_BOX = ((24.0, -55.0, 4.0), (40.0, 30.0, 36.0))  # holds the lesions' centres, or its mirror image does
LESION_ML = 2.0  # a point of severity
LESION_DARKNESS = (0.5, 1.0)  # fraction of a lesion's tissue that is lost, at severity 0 and the highest
LESION_ROUGHNESS = 0.15

# Intensities, as fractions of white matter's. The template's own: CSF below 130, grey about 170, white about 215.
THICK_CORTEX, THIN_CORTEX = (95.0, 125.0), (135.0, 170.0)  # template intensities between which CSF turns to grey
WHITE = (182.0, 205.0)  # and grey to white
WHITE_MATTER_LEVEL = 1000.0
SITE_CSF, SITE_GREY = (0.25, 0.35), (0.64, 0.72)  # lowest and highest of the sites
SITE_NOISE, SITE_BIAS = (0.02, 0.05), (0.03, 0.08)  # std of a voxel's noise, and of the logarithm of the bias field
BIAS_LENGTH_MM = 35.0
GAIN, CONTRAST_STD = (0.7, 1.4), 0.01
JITTER_MM, JITTER_DEG = 0.5, 0.5  # registration error along and about each axis

_KNOTS_MM = 8.0  # between the knots of the random fields
_FIELD_CORNERS = ((-112.0, -144.0, -96.0), (112.0, 112.0, 112.0))
_SLAB = 24  # planes computed at once: bounds the memory
_STREAMS = {"labels": 1, "anatomy": 2, "scan": 3, "site": 4}


@dataclass(frozen=True)
class Labels:
    """What is known of a patient.

    Attributes:
        site: Where all scans of the patient were made, one of `SITES`.
        age: In years, 20 to 90.
        sex: 0 or 1; 1 has the larger head.
        disease: 1 with medial temporal atrophy, else 0.
        severity: 0 without a lesion, else a whole number, 1 to 42.
    """

    site: str
    age: float
    sex: int
    disease: int
    severity: int


@dataclass(frozen=True, eq=False)
class Phantom:
    """One synthetic scan.

    Attributes:
        image: [x, y, z] float32, whole numbers: white matter is about 0, CSF and grey matter are below, and what is
            outside the brain is one value below all of them, as WhiteStripe leaves a skull-stripped scan.
        mask: [x, y, z] uint8, 1 in the brain and 0 outside it.
        affine: [4, 4] from voxel indices to RAS millimetres.
        labels: The patient's labels.
        tissue: [x, y, z] uint8, what a voxel of the mask is most of: 1 CSF, 2 grey and 3 white matter; else 0. A lesion
            is CSF.
    """

    image: _Array
    mask: NDArray[np.uint8]
    affine: NDArray[np.float64]
    labels: Labels
    tissue: NDArray[np.uint8]


def make_cohort(
    patients: int,
    folder: str | os.PathLike[str],
    *,
    spacing: float = 1.0,
    scans_per_patient: int = 1,
    seed: int = 0,
    workers: int = 2,
    progress: bool = False,
) -> Path:
    """Write phantoms where TurboPrep would leave scans: `sub-0001/ses-1/normalized.nii.gz` and `mask.nii.gz`.

    `manifest.csv` lists them with their labels, `README.txt` says what they are. On one machine the same arguments give
    the same files, to the bit. A run that was interrupted goes on where it stopped, and a cohort can be given more
    patients or scans later: what is there is kept, and the manifest lists what the last run asked for.

    Args:
        patients: How many.
        folder: Where to: a new or empty folder, or one that holds phantoms of the same seed and spacing.
        spacing: See `make_phantom`.
        scans_per_patient: How many scans of each.
        seed: See `make_phantom`.
        workers: Threads.
        progress: Show a progress bar.

    Returns:
        The manifest: image_path and mask_path relative to it, patient_id, scan_id, the labels, and `source`, which is
        "phantom" and is kept in every table.

    Raises:
        ValueError: An argument is out of range.
        BrainfmError: The folder holds something else.

    Example:
        >>> manifest = make_cohort(100, "phantoms", spacing=4.0, scans_per_patient=2)
        >>> table = brainfm.embed(manifest, "test_resnet_3d")
    """
    if patients < 1 or scans_per_patient < 1 or workers < 1:
        raise ValueError(
            "patients, scans_per_patient and workers must be at least 1, "
            f"not {patients}, {scans_per_patient} and {workers}"
        )
    _check(0, 0, spacing, seed)
    folder, spacing = Path(folder), float(spacing)
    _claim(folder, spacing, seed)
    _template(spacing)  # once, before the threads ask for it
    scans = [(patient, scan) for patient in range(patients) for scan in range(scans_per_patient)]
    with ThreadPoolExecutor(workers, thread_name_prefix="brainfm-phantom") as pool:
        try:
            written = pool.map(lambda ids: _write(folder, ids[0], ids[1], spacing, seed), scans)
            for _ in progress_bar(written, total=len(scans), unit="scan", doing="phantoms", shown=progress):
                pass
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return _write_manifest(folder, scans, seed)


def make_phantom(patient: int, scan: int = 0, *, spacing: float = 1.0, seed: int = 0) -> Phantom:
    """One scan of one patient: the same for the same arguments, whatever else is made.

    Scans of a patient have the labels, the anatomy and the site in common; noise, bias field, gain and registration
    error are each scan's own. At another spacing the same patient has the same anatomy and other noise.

    Args:
        patient: Which patient, from 0 (`sub-0001` in a cohort).
        scan: Which scan of the patient, from 0 (`ses-1`).
        spacing: Millimetres a voxel, 1 to 8. At 1 the grid is that of `simclr_resnet18_3d`, at 4 that of
            `test_resnet_3d`, and else it covers the latter's field of view.
        seed: Which world of patients, 0 or more.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> phantom = make_phantom(0, spacing=4.0)
        >>> phantom.image.shape, phantom.labels.sex
        ((48, 48, 40), 1)
    """
    _check(patient, scan, spacing, seed)
    labels = make_labels(patient, seed=seed)
    with torch_threads(1):  # so that no sum depends on their number, and a cohort's do not fight for the cores
        anatomy = _Anatomy.draw(labels, _random(seed, "anatomy", patient))
        acquisition = _Acquisition.draw(labels.site, seed, _random(seed, "scan", patient, scan))
        image, mask, tissue = _scanned(anatomy, acquisition, spacing)
    return Phantom(image, mask, _grid(spacing).affine("RAS"), labels, tissue)


def make_labels(patient: int, *, seed: int = 0) -> Labels:
    """The labels of a patient, from 0.

    Patients come in blocks of eight that hold every combination of sex, disease and lesion (yes or no), an age in
    every eighth of the range, and every site twice, each shuffled by itself: small cohorts are balanced too.
    """
    block, place = divmod(patient, 8)
    draw = _random(seed, "labels", block)
    combination, eighth, site = (int(draw.permutation(8)[place]) for _ in range(3))
    age = YOUNGEST + (OLDEST - YOUNGEST) * (eighth + draw.random(8)[place]) / 8
    severity = int(draw.integers(1, MAX_SEVERITY + 1, 8)[place])
    return Labels(
        site=SITES[site % len(SITES)],
        age=round(float(age), 1),
        sex=combination & 1,
        disease=combination >> 1 & 1,
        severity=severity if combination >> 2 else 0,
    )


# --- Anatomy --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Anatomy:
    """A patient's head: where each of its points lies in the template, and what tissue is lost there.

    Attributes:
        scale: Of the head against the template, along (x, y, z).
        ventricles: How far they reach, see `VENTRICLES_LEVEL`.
        thinning: Of the cortex, see `THINNING`.
        atrophy: Of the hippocampal region, see `ATROPHY`.
        lesion_centre: Template RAS mm.
        lesion_radius: Millimetres; 0 for none.
        lesion_darkness: See `LESION_DARKNESS`.
        deformation: [3, knots] millimetres along (x, y, z).
        texture: [2, knots] of std 1: local thinning, and roughness of the lesion's edge.
    """

    scale: _Array
    ventricles: float
    thinning: float
    atrophy: float
    lesion_centre: _Array
    lesion_radius: float
    lesion_darkness: float
    deformation: torch.Tensor
    texture: torch.Tensor

    @classmethod
    def draw(cls, labels: Labels, draw: np.random.Generator) -> _Anatomy:
        aged = (labels.age - YOUNGEST) / (OLDEST - YOUNGEST)
        severe = labels.severity / MAX_SEVERITY
        side = draw.choice((-1.0, 1.0))
        return cls(
            scale=_array(HEAD_SCALE[labels.sex] + HEAD_SCALE_STD * draw.standard_normal(3)),
            ventricles=_between(VENTRICLES_LEVEL, aged) + VENTRICLES_STD * draw.standard_normal(),
            thinning=_between(THINNING, aged),
            atrophy=_between(ATROPHY[labels.disease], draw.random()),
            lesion_centre=_array(draw.uniform(*LESION_BOX) * (side, 1, 1)),
            lesion_radius=float(np.cbrt(3 / (4 * np.pi) * 1000 * LESION_ML * labels.severity)),
            lesion_darkness=_between(LESION_DARKNESS, severe),
            deformation=DEFORMATION_MM * _not_affine(_random_fields(3, DEFORMATION_LENGTH_MM, draw)),
            texture=_random_fields(2, THINNING_LENGTH_MM, draw),
        )

    def tissue(self, points: _Array, spacing: float) -> tuple[_Array, _Array, _Array]:
        """[...] each: fractions of CSF and white matter, and of brain as against background, at [..., 3] head mm."""
        places = self.to_template(points)
        thick, thin, white, ventricles, brain = _sampled(_template(spacing), _grid(spacing), places, outside="zeros")
        local, rough = _sampled(self.texture, _field_grid(), points)
        csf = thick + np.clip(self.thinning + THINNING_STD * local, 0, 1.5) * (thin - thick)
        lost = self.atrophy * _hippocampus(places)
        if self.lesion_radius:
            depth = 1 - _distance(places, self.lesion_centre) / self.lesion_radius + LESION_ROUGHNESS * rough
            edge = max(spacing, 2.0) / self.lesion_radius  # a voxel wide, so that small lesions do not jump
            lost = np.maximum(lost, self.lesion_darkness * np.clip(depth / edge + 0.5, 0, 1))
        whole = 1 / np.maximum(brain, 1e-3)  # the maps are of brain only; what is outside does not darken the rim
        csf = np.maximum(csf * whole, (ventricles - self.ventricles) / VENTRICLES_EDGE + 0.5)
        csf = 1 - (1 - np.clip(csf, 0, 1)) * (1 - lost)
        return csf, np.minimum(white * whole * (1 - lost), 1 - csf), brain

    def to_template(self, points: _Array) -> _Array:
        """Where the points, [..., 3] mm of the head, lie in the template."""
        bent = points + np.stack(list(_sampled(self.deformation, _field_grid(), points)), axis=-1)
        centre = _array(HEAD_CENTRE)
        places: _Array = (bent - centre) / self.scale + centre
        return places


def _hippocampus(places: _Array) -> _Array:
    """[...] from 0 to 1: how much of each place, [..., 3] template mm, belongs to either hippocampal region."""
    folded = places.copy()
    folded[..., 0] = np.abs(folded[..., 0])
    inside: _Array = np.exp(-(_distance(folded, HIPPOCAMPUS_CENTRE, HIPPOCAMPUS_SIZE_MM) ** 4))
    return inside  # flat in the middle, 0.37 at the given size


def _distance(points: _Array, centre: _Point, size: _Point = (1.0, 1.0, 1.0)) -> _Array:
    """[...] of points [..., 3] from an ellipsoid's centre: 1 on its surface, or in mm for the size 1."""
    distance: _Array = np.sqrt((((points - _array(centre)) / _array(size)) ** 2).sum(axis=-1))
    return distance


# --- Acquisition ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Acquisition:
    """How one scan shows a head: the site's contrast, noise and bias, and the scan's own chance."""

    csf: float
    grey: float
    gain: float
    noise_std: float
    rotation: _Array
    shift: _Array
    bias: torch.Tensor
    noise_seed: int

    @classmethod
    def draw(cls, site: str, seed: int, draw: np.random.Generator) -> _Acquisition:
        where = _random(seed, "site", SITES.index(site))
        csf, grey, noise, bias = (where.uniform(*r) for r in (SITE_CSF, SITE_GREY, SITE_NOISE, SITE_BIAS))
        csf, grey = (level + CONTRAST_STD * draw.standard_normal() for level in (csf, grey))
        turn = np.radians(JITTER_DEG) * draw.standard_normal(3)
        return cls(
            csf=float(csf),
            grey=float(grey),
            gain=float(np.exp(draw.uniform(*np.log(GAIN)))),
            noise_std=float(noise),
            rotation=_array(torch.linalg.matrix_exp(torch.from_numpy(np.cross(np.eye(3), turn))).numpy()),
            shift=_array(JITTER_MM * draw.standard_normal(3)),
            bias=bias * _random_fields(1, BIAS_LENGTH_MM, draw),
            noise_seed=int(draw.integers(2**63)),
        )

    def to_head(self, points: _Array) -> _Array:
        """Where the points, [..., 3] mm of the scan, lie in the head."""
        centre = _array(HEAD_CENTRE)
        moved: _Array = np.einsum("...j,ij->...i", points - centre, self.rotation) + centre + self.shift
        return moved

    def intensities(self, csf: _Array, white: _Array, points: _Array) -> _Array:
        """[...] intensities without noise, white matter being about 1."""
        grey = 1 - csf - white
        (bias,) = _sampled(self.bias, _field_grid(), points)
        image: _Array = (self.csf * csf + self.grey * grey + white) * np.exp(bias)
        return image

    def noise(self, grid: Grid) -> _Array:
        """White noise on the grid, of the same std a voxel at any spacing."""
        noise: _Array = np.random.default_rng(self.noise_seed).standard_normal(grid.shape, dtype=np.float32)
        return noise * np.float32(self.noise_std)


def _scanned(
    anatomy: _Anatomy, acquisition: _Acquisition, spacing: float
) -> tuple[_Array, NDArray[np.uint8], NDArray[np.uint8]]:
    """The image, mask and tissue, all [x, y, z]."""
    grid, near = _grid(spacing), _near_brain(anatomy, acquisition, spacing)
    image, mask = np.zeros(grid.shape, np.float32), np.zeros(grid.shape, np.uint8)
    tissue = np.zeros_like(mask)
    for first in range(0, grid.shape[0], _SLAB):
        slab = slice(first, first + _SLAB)
        points = acquisition.to_head(_voxel_centres(grid, slab)[near[slab]])
        csf, white, brain = anatomy.tissue(points, spacing)
        image[slab][near[slab]] = acquisition.intensities(csf, white, points)
        mask[slab][near[slab]] = brain > 0.5
        tissue[slab][near[slab]] = (1 + np.argmax([csf, 1 - csf - white, white], axis=0)) * (brain > 0.5)
    image += acquisition.noise(grid)
    image *= np.float32(WHITE_MATTER_LEVEL * acquisition.gain)
    np.rint(image.clip(1), out=image)
    image *= mask
    image -= np.rint(np.float32(WHITE_MATTER_LEVEL * acquisition.gain))  # outside the brain too, as WhiteStripe does
    return image, mask, tissue


def _near_brain(anatomy: _Anatomy, acquisition: _Acquisition, spacing: float) -> NDArray[np.bool_]:
    """[x, y, z] whether a voxel may be brain: all that are 8 mm from it or nearer, and some further off."""
    grid, coarse = _grid(spacing), _grid(MAX_SPACING_MM)
    places = anatomy.to_template(acquisition.to_head(_voxel_centres(coarse, slice(None))))
    (brain,) = _sampled(_template(spacing)[-1:], grid, places, outside="zeros")
    near = torch.nn.functional.max_pool3d(torch.from_numpy(brain)[None], kernel_size=3, stride=1, padding=1)[0] > 0
    nearest = [
        np.clip(np.rint((start + step * np.arange(size) - first) / MAX_SPACING_MM).astype(int), 0, last - 1)
        for start, step, size, first, last in zip(
            grid.origin, grid.spacing, grid.shape, coarse.origin, coarse.shape, strict=True
        )
    ]
    chosen: NDArray[np.bool_] = near.numpy()[np.ix_(*nearest)]
    return chosen


# --- Grids, fields and the template ---------------------------------------------------------------


def _grid_of(model: str) -> Grid:
    spec = get_pretrained_cfg(model).input_spec
    assert spec is not None
    assert spec.grid is not None
    return spec.grid


@lru_cache
def _grid(spacing: float) -> Grid:
    """The contract's grid at 1 mm; else voxels that fill the field of view of the contract at 4 mm, at 4 mm its own."""
    full, view = _grid_of("simclr_resnet18_3d"), _grid_of("test_resnet_3d")
    if spacing == full.spacing[0]:
        return full
    corner = [origin - size / 2 for origin, size in zip(view.origin, view.spacing, strict=True)]
    shape = [int(np.ceil(n * size / spacing - 1e-6)) for n, size in zip(view.shape, view.spacing, strict=True)]
    x, y, z = (edge + spacing / 2 for edge in corner)
    return Grid((shape[0], shape[1], shape[2]), (spacing, spacing, spacing), (x, y, z))


@lru_cache(maxsize=2)
def _template(spacing: float) -> torch.Tensor:
    """[5, x, y, z] fractions: CSF (cortex thick), CSF (cortex thin), white matter, blurred ventricles, brain."""
    intensity, stored = read_image(SAMPLE_SCAN).array, read_image(SAMPLE_MASK)
    brain = stored.array > 0
    places = _voxel_centres(_grid(MIN_SPACING_MM), slice(None))
    ventricles = brain & (intensity < THICK_CORTEX[1]) & (_distance(places, VENTRICLES_CENTRE, VENTRICLES_SIZE_MM) < 1)

    def above(limits: tuple[float, float]) -> _Array:
        steps = np.clip((np.arange(256) - limits[0]) / (limits[1] - limits[0]), 0, 1).astype(np.float32)
        fractions: _Array = steps[intensity]
        return fractions

    maps = np.stack([1 - above(THICK_CORTEX), 1 - above(THIN_CORTEX), above(WHITE), ventricles, brain])
    maps = _array(maps * brain)
    maps[3] = _blurred(torch.from_numpy(maps[3:4]).double(), 1.0, VENTRICLES_BLUR_MM, keep="mean")[0].numpy()
    volume, _ = on_grid(
        Volume(maps, None, stored.affine), InputSpec(orientation="RAS", grid=_grid(spacing)), "resample", "template"
    )
    return torch.from_numpy(np.ascontiguousarray(volume.stored))


@lru_cache
def _field_grid() -> Grid:
    low, high = _FIELD_CORNERS
    nx, ny, nz = (round((b - a) / _KNOTS_MM) + 1 for a, b in zip(low, high, strict=True))
    return Grid((nx, ny, nz), (_KNOTS_MM,) * 3, low)


def _random_fields(count: int, length: float, draw: np.random.Generator) -> torch.Tensor:
    """[count, knots] of mean 0 and std 1, smoothed by a Gaussian of `length` mm."""
    noise = torch.from_numpy(draw.standard_normal((count, *_field_grid().shape)))
    return _blurred(noise, _KNOTS_MM, length, keep="std").float()


def _blurred(volume: torch.Tensor, spacing: float, length: float, keep: Literal["mean", "std"]) -> torch.Tensor:
    """[channels, x, y, z] float64, smoothed by a Gaussian of `length` mm; the mean, or white noise's std, stays."""
    for size in volume.shape[1:]:
        places = torch.arange(size, dtype=torch.float64) * spacing
        weights = torch.exp(-((places[:, None] - places) ** 2) / (2 * length**2))
        total = weights.sum(dim=1) if keep == "mean" else weights.square().sum(dim=1).sqrt()
        # Each product takes the first axis of the three and leaves its result last: three bring the order back.
        volume = torch.tensordot(volume, weights / total[:, None], dims=([1], [1]))
    return volume


def _not_affine(deformation: torch.Tensor) -> torch.Tensor:
    """[3, knots] without what it does to the brain as a whole: the shift, turn, stretch and shear.

    Registration would undo the first two, and the size is left to `HEAD_SCALE`.
    """
    terms, inverse = _affine_terms()
    values = deformation.reshape(3, -1).double()
    return (values - (values @ inverse.T) @ terms.T).reshape(deformation.shape).float()


@lru_cache
def _affine_terms() -> tuple[torch.Tensor, torch.Tensor]:
    """[knots, 4] (1, x, y, z) at the knots, and [4, knots] what fits them to values, by least squares in the brain."""
    knots = _voxel_centres(_field_grid(), slice(None)).reshape(-1, 3).astype(np.float64) - HEAD_CENTRE
    terms = np.concatenate([np.ones((len(knots), 1)), knots], axis=1)
    inside = ((knots / HEAD_HALF_MM) ** 2).sum(axis=1) < 1
    inverse = np.zeros((4, len(knots)))
    inverse[:, inside] = np.linalg.pinv(terms[inside])
    return torch.from_numpy(terms), torch.from_numpy(inverse)


def _voxel_centres(grid: Grid, slab: slice) -> _Array:
    """[x, y, z, 3] RAS mm of the centres of the voxels in a slab across the first axis."""
    axes = [
        _array(origin + step * np.arange(size))
        for origin, step, size in zip(grid.origin, grid.spacing, grid.shape, strict=True)
    ]
    return np.stack(np.meshgrid(axes[0][slab], axes[1], axes[2], indexing="ij"), axis=-1)


def _sampled(volume: torch.Tensor, grid: Grid, points: _Array, outside: str = "border") -> _Array:
    """[channels, ...]: a volume [channels, x, y, z] on a grid, by trilinear interpolation at [..., 3] mm."""
    size = _array(grid.spacing) * (_array(grid.shape) - 1)
    relative = torch.from_numpy((points - _array(grid.origin)) * (2 / size) - 1)
    where = relative.flip(-1).reshape(1, 1, 1, -1, 3)  # PyTorch names the last axis first
    values = torch.nn.functional.grid_sample(
        volume[None], where, mode="bilinear", padding_mode=outside, align_corners=True
    )
    sampled: _Array = values.numpy().reshape(len(volume), *points.shape[:-1])
    return sampled


def _array(values: ArrayLike) -> _Array:
    return np.asarray(values, dtype=np.float32)


def _between(limits: tuple[float, float], fraction: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * fraction


def _random(seed: int, stream: str, *numbers: int) -> np.random.Generator:
    return np.random.default_rng([seed, _STREAMS[stream], *numbers])


# --- Files ----------------------------------------------------------------------------------------


def _check(patient: int, scan: int, spacing: float, seed: int) -> None:
    if patient < 0 or scan < 0 or seed < 0:
        raise ValueError(f"patient, scan and seed must be 0 or more, not {patient}, {scan} and {seed}")
    if not MIN_SPACING_MM <= spacing <= MAX_SPACING_MM:
        raise ValueError(f"spacing must be {MIN_SPACING_MM:g} to {MAX_SPACING_MM:g} mm, not {spacing:g}")


def _claim(folder: Path, spacing: float, seed: int) -> None:
    """Write the README, or see that the one in a folder in use is that of the same phantoms."""
    readme = folder / "README.txt"
    text = (
        "These are phantoms, not people: synthetic brain scans made by brainfm from the MNI152 average brain, with\n"
        "made-up labels. They are for trying and testing software. Nothing that is found in them holds of patients.\n"
        "\n"
        f"spacing {spacing:.9g} mm, seed {seed}, recipe {RECIPE}\n"
    )
    if readme.is_file():
        if readme.read_text(encoding="utf-8", errors="replace") != text:
            raise BrainfmError(
                f"{folder}: its {readme.name} is not that of phantoms of spacing {spacing:.9g} mm, seed {seed} and "
                f"recipe {RECIPE}; give another folder"
            )
        return
    if folder.exists() and (not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir())):
        raise BrainfmError(f"{folder}: not an empty folder; phantoms are not mixed with other files, give a new one")
    write_text(readme, text)


def _paths(patient: int, scan: int) -> tuple[Path, Path]:
    folder = Path(f"sub-{patient + 1:04d}", f"ses-{scan + 1}")
    return folder / "normalized.nii.gz", folder / "mask.nii.gz"


def _write(folder: Path, patient: int, scan: int, spacing: float, seed: int) -> None:
    """Make one scan and write its two files, unless they are there."""
    image, mask = (folder / path for path in _paths(patient, scan))
    if image.exists() and mask.exists():
        return
    phantom = make_phantom(patient, scan, spacing=spacing, seed=seed)
    _write_nifti(phantom.mask, phantom.affine, mask)
    _write_nifti(phantom.image.astype(np.int16), phantom.affine, image)


def _write_nifti(array: NDArray[np.int16] | NDArray[np.uint8], affine: NDArray[np.float64], path: Path) -> None:
    import nibabel as nib

    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, "mni")
    image.set_qform(affine, "mni")
    image.header["descrip"] = b"brainfm phantom"
    with atomic_path(path) as temporary:
        temporary.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def _write_manifest(folder: Path, scans: list[tuple[int, int]], seed: int) -> Path:
    manifest = folder / "manifest.csv"
    rows: list[list[Any]] = [
        ["image_path", "mask_path", "patient_id", "scan_id", *(f.name for f in fields(Labels)), "source"]
    ]
    for patient, scan in scans:
        image, mask = _paths(patient, scan)
        labels = asdict(make_labels(patient, seed=seed)).values()
        rows.append([image.as_posix(), mask.as_posix(), *image.parent.parts, *labels, "phantom"])
    write_csv(manifest, rows, line_end="\n")
    return manifest
