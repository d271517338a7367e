"""Published input contracts as data: what the authors' code does to a scan, read in it or run."""

from __future__ import annotations

from dataclasses import replace

import brainfm
from brainfm import Grid, InputSpec
from brainfm.contract import (
    Clip,
    CropBox,
    CropCenter,
    CropForeground,
    CropToMultiple,
    DivideByMean,
    MinMax,
    Pad,
    Resample,
    Resize,
    Standardize,
    Transpose,
    ZScore,
)

SIMCLR = brainfm.get_pretrained_cfg("simclr_resnet18_3d").input_spec
SFCN = InputSpec(
    space="MNI152NLin6Asym",
    registration="linear",
    orientation="LAS",
    grid=Grid((182, 218, 182), (1.0, 1.0, 1.0), (90.0, -126.0, -72.0)),
    skull_strip="required",
    intensities="raw",
    operations=(DivideByMean("all"), CropBox((11, 13, 11), (171, 205, 171))),
    output_shape=(1, 160, 192, 160),
)
BRAINIAC = InputSpec(
    space="BrainIAC head template",
    registration="rigid",
    orientation="LAS",
    grid=Grid((170, 206, 162), (1.0, 1.0, 1.0), (84.0, -119.0, -69.0)),
    skull_strip="required",
    preparation=("N4", "rigid registration", "HD-BET"),
    operations=(Resize((96, 96, 96), "trilinear"), ZScore("nonzero", eps_rule="one_if_zero", background="zero")),
    output_shape=(1, 96, 96, 96),
)
OPENMIND = InputSpec(
    representation="any contrast",
    channels=("any contrast",),
    skull_strip="forbidden",
    operations=(
        Transpose((2, 1, 0)),
        CropForeground("nonzero"),
        ZScore("all", eps=1e-8, eps_rule="floor"),
        Resample((1.0, 1.0, 1.0), order=3, clip=True),
        CropCenter((160, 160, 160)),
    ),
)
MEDICALNET = InputSpec(
    representation="CT or MR",
    channels=("CT or MR",),
    operations=(
        Resize((56, 112, 112), "nearest_corners"),
        ZScore("positive", background="noise", background_is="zero"),
    ),
    output_shape=(1, 56, 112, 112),
)
SYNTHBA = InputSpec(
    representation="any contrast",
    channels=("any contrast",),
    space="MNI152NLin6Asym",
    registration="affine",
    skull_strip="required",
    preparation=("SynthStrip", "affine registration to the brain"),
    operations=(
        Resample((1.4, 1.4, 1.4), order=1, keep="first_voxel"),  # MONAI's Spacing
        Pad((130, 130, 130), "minimum"),
        CropCenter((130, 130, 130)),
        MinMax("all"),
    ),
    output_shape=(1, 130, 130, 130),
)
SWINBRAIN_PRETRAINING = InputSpec(
    representation="T1w, T2w and FLAIR",
    channels=("T1w", "T2w", "FLAIR"),
    skull_strip="required",
    mask="file",
    preparation=("HD-BET on T1w", "T2w and FLAIR registered rigidly to it"),
    operations=(CropForeground("mask"), Resize((128, 128, 64), "area"), MinMax("all", per_channel=True)),
    output_shape=(3, 128, 128, 64),
)
SWINBRAIN_FINE_TUNING = replace(
    SWINBRAIN_PRETRAINING,
    operations=(CropForeground("mask"), MinMax("all", per_channel=False), Resize((128, 128, 64), "area")),
)
NEUROVFM = InputSpec(  # its tokens and their policy come after the tensor
    representation="any MR",
    channels=("any MR",),
    orientation="RPI",
    operations=(
        Resample((1.0, 1.0, 4.0), order=3),
        Transpose((2, 1, 0)),
        CropToMultiple((4, 16, 16)),
        Clip(0.5, 99.5, percentiles=True),
        MinMax("all"),
        Standardize(0.3141, 0.2623),
    ),
)
CONTRACTS = {
    "simclr": SIMCLR,
    "sfcn": SFCN,
    "brainiac": BRAINIAC,
    "openmind": OPENMIND,
    "medicalnet": MEDICALNET,
    "synthba": SYNTHBA,
    "swinbrain-pretraining": SWINBRAIN_PRETRAINING,
    "swinbrain-fine-tuning": SWINBRAIN_FINE_TUNING,
    "neurovfm": NEUROVFM,
}
