"""What a weight expects: an input contract, as data that acts.

An `InputSpec` holds what a scan must be, and an ordered tuple of `Operation`s, each called with a `Volume` and giving
another. A `Readout` says how the encoder's features become one vector.
"""

from brainfm.contract.filters import AddFiltered
from brainfm.contract.geometry import (
    CropBox,
    CropCenter,
    CropForeground,
    CropToMultiple,
    Pad,
    Reorient,
    Resample,
    Resize,
    Transpose,
)
from brainfm.contract.intensity import Clip, DivideByMean, MinMax, Standardize, ZScore
from brainfm.contract.operation import Operation, register_operation
from brainfm.contract.spec import Grid, InputSpec, Readout, Window, describe
from brainfm.contract.volume import Triple, Volume, with_image

__all__ = [
    "AddFiltered",
    "Clip",
    "CropBox",
    "CropCenter",
    "CropForeground",
    "CropToMultiple",
    "DivideByMean",
    "Grid",
    "InputSpec",
    "MinMax",
    "Operation",
    "Pad",
    "Readout",
    "Reorient",
    "Resample",
    "Resize",
    "Standardize",
    "Transpose",
    "Triple",
    "Volume",
    "Window",
    "ZScore",
    "describe",
    "register_operation",
    "with_image",
]
