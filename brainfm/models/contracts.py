"""Input contracts, cohorts and citations that several registered encoders share."""

from __future__ import annotations

from pathlib import Path

from brainfm.operations import CropBox, Transpose, ZScore
from brainfm.pretrained import Cohort, Grid, InputSpec

ASSETS = Path(__file__).parent.parent / "assets"
SAMPLE_SCAN = ASSETS / "sample_T1w_brain.nii.gz"
SAMPLE_MASK = ASSETS / "sample_brain_mask.nii.gz"

_PREPARATION = ("N4", "SynthStrip", "rigid registration", "SynthSeg mask", "WhiteStripe (cancels in the z-score)")

# The released 3D-Neuro-SimCLR code: TurboPrep's grid, reversed axes, a fixed crop that is not the centre one, and a
# masked z-score with 1e-12 under the root. Repository emilykaczmarek/3D-Neuro-SimCLR, commit e061f3a.
TURBOPREP_1MM = InputSpec(
    representation="T1w",
    space="MNI152NLin2009cSym",
    registration="rigid",
    orientation="RAS",
    grid=Grid(shape=(193, 229, 193), spacing=(1.0, 1.0, 1.0), origin=(-96.0, -132.0, -78.0)),
    skull_strip="required",
    mask="file or nonzero",
    preparation=_PREPARATION,
    operations=(
        Transpose((2, 1, 0)),
        CropBox((10, 19, 1), (160, 211, 193)),
        ZScore(region="mask", eps=1e-12, eps_rule="under_root", background="zero"),
    ),
    output_shape=(1, 150, 192, 192),
)

# The same field of view at 4 mm, for the tiny test models: each voxel is the mean of 4×4×4 of the crop above, which is
# 5 mm longer at either end of the z axis so that 4 mm divide it.
TURBOPREP_4MM = InputSpec(
    representation="T1w",
    space="MNI152NLin2009cSym",
    registration="rigid",
    orientation="RAS",
    grid=Grid(shape=(48, 48, 40), spacing=(4.0, 4.0, 4.0), origin=(-93.5, -111.5, -71.5)),
    skull_strip="required",
    mask="file or nonzero",
    preparation=(*_PREPARATION, "averaged to 4 mm"),
    operations=(
        Transpose((2, 1, 0)),
        ZScore(region="mask", eps=1e-12, eps_rule="under_root", background="zero"),
    ),
    output_shape=(1, 40, 48, 48),
)

# Kaczmarek et al. 2025, arXiv 2509.10620, the table of pretraining data sets: 18,759 patients, 44,958 scans.
# H healthy, MCI mild cognitive impairment, AD Alzheimer's, FTD frontotemporal dementia, PD Parkinson's, S stroke.
NEURO_SIMCLR_COHORTS = (
    Cohort("ADNI", 3028, 21778, ("H", "MCI", "AD")),
    Cohort("AOMIC", 1368, 1368, ("H",)),
    Cohort("CoRR", 1416, 1416, ("H",)),
    Cohort("DLBS", 315, 315, ("H",)),
    Cohort("GSP", 1569, 1569, ("H",)),
    Cohort("HABS-HD", 4231, 6429, ("H", "MCI", "AD")),
    Cohort("MCSA", 1802, 3090, ("H", "MCI", "AD")),
    Cohort("NIFD", 346, 1815, ("H", "FTD")),
    Cohort("PPMI", 3124, 5618, ("H", "PD")),
    Cohort("SALD", 458, 458, ("H",)),
    Cohort("SOOP", 1102, 1102, ("H", "S")),
)

# What the tiny test models were pretrained on: synthetic scans, see brainfm.phantom.
PHANTOMS = Cohort("brainfm phantoms of seed 0", 600, 1200)
PHANTOMS_NOTE = (
    "A tiny test model, pretrained on phantoms (synthetic scans), not on people: not a brain encoder. "
    "It shows that code works; what its embeddings say holds of phantoms only."
)

PAPER = "https://arxiv.org/abs/2509.10620"
REPOSITORY = "https://github.com/emilykaczmarek/3D-Neuro-SimCLR"
CITATION = """\
@inproceedings{kaczmarek2025building,
  title     = {Building a General SimCLR Self-Supervised Foundation Model Across Neurological Diseases
               to Advance {3D} Brain {MRI} Diagnoses},
  author    = {Kaczmarek, Emily and Szeto, Justin and Nichyporuk, Brennan and Arbel, Tal},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision Workshops},
  year      = {2025},
  note      = {arXiv:2509.10620}
}"""
