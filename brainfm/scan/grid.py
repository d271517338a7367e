"""Bring a volume onto a template's grid: copied where the voxels coincide, averaged where they do not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from brainfm.contract.geometry import Reorient
from brainfm.contract.spec import Grid, InputSpec
from brainfm.contract.volume import Triple, Volume
from brainfm.errors import ScanError

TOLERANCE_MM = 1e-3


def is_axis_aligned(affine: NDArray[np.float64], shape: Triple) -> bool:
    """Whether the voxel axes run along the world's, to a thousandth of a millimetre over the whole volume."""
    direction = affine[:3, :3]
    main = np.abs(direction) == np.abs(direction).max(axis=0)
    stray = np.abs(np.where(main, 0.0, direction)) * np.asarray(shape)
    return bool((main.sum(axis=1) == 1).all() and stray.max() <= TOLERANCE_MM)


def on_grid(volume: Volume, spec: InputSpec, on_mismatch: str, source: str) -> tuple[Volume, str]:
    """The volume on the contract's grid and orientation, and in words what was done to bring it there.

    A scan that already lies there is returned as a view. One that is shifted by whole voxels is copied. One with
    another offset or finer voxels is averaged: each new voxel is the mean of the old ones, weighted by the fraction of
    it that they fill (linear interpolation where the spacing is the same). What lies outside the scan is 0.

    Raises:
        ScanError: The scan's axes are rotated, its voxels are coarser than the contract's, or `on_mismatch` is "raise"
            and the grids differ.
    """
    if spec.orientation is not None:
        volume = Reorient(spec.orientation)(volume)
    if spec.grid is None:
        return volume, ""
    target = spec.grid.affine(spec.orientation or "RAS")
    if volume.shape == spec.grid.shape and corner_distance(volume.affine, target, volume.shape) <= TOLERANCE_MM:
        return replace(volume, affine=target), ""
    if spec.space is not None and not spec.in_mni152:
        raise ScanError(
            f"{source}: not on the grid of the space {spec.space!r} ({spec.grid.shape} voxels of "
            f"{_mm(spec.grid.spacing)} mm from RAS {_mm(target[:3, 3])}), and nothing else shows it to be there; "
            "register it to that template, on its own grid"
        )
    _refuse_other_spaces(volume, spec.grid, target, on_mismatch, source)
    # Both grids are axis-aligned and turned the same way: one start and one step along each axis say it all.
    start = (np.linalg.inv(volume.affine) @ target)[:3, 3]
    step = np.asarray(spec.grid.spacing) / volume.spacing
    last = start + step * (np.asarray(spec.grid.shape) - 1)
    shift = np.rint(start)
    near = TOLERANCE_MM / np.asarray(spec.grid.spacing)
    if (np.abs(start - shift) <= near).all() and (np.abs(last - shift - np.asarray(spec.grid.shape) + 1) <= near).all():
        return _shifted(volume, shift.astype(int), spec.grid.shape, target), f"moved by {_signed(shift)} whole voxels"
    return _averaged(volume, start, step, spec.grid.shape, target), (
        f"resampled from {_mm(volume.spacing)} mm voxels to the contract's {_mm(spec.grid.spacing)} mm grid"
    )


def _refuse_other_spaces(
    volume: Volume, grid: Grid, target: NDArray[np.float64], on_mismatch: str, source: str
) -> None:
    if not is_axis_aligned(volume.affine, volume.shape):
        raise ScanError(
            f"{source}: the affine is rotated against the template's axes, so the scan is in scanner space; "
            "register it to the template first (brainfm prep, TurboPrep with -r r, or fMRIPrep's template-space output)"
        )
    coarser = volume.spacing > np.asarray(grid.spacing) * (1 + 1e-3)
    if coarser.any():
        raise ScanError(
            f"{source}: voxels of {_mm(volume.spacing)} mm are coarser than the contract's {_mm(grid.spacing)} mm; "
            "detail cannot be added: start again from the original scan"
        )
    if on_mismatch == "raise":
        raise ScanError(
            f"{source}: a grid of {volume.shape} voxels of {_mm(volume.spacing)} mm "
            f"from RAS {_mm(volume.affine[:3, 3])}, "
            f"not the contract's {grid.shape} voxels of {_mm(grid.spacing)} mm from RAS {_mm(target[:3, 3])}; "
            'pass on_mismatch="resample" to have it moved'
        )


def _shifted(volume: Volume, shift: NDArray[np.int_], shape: Triple, target: NDArray[np.float64]) -> Volume:
    have = np.asarray(volume.shape)
    low, high = np.clip(shift, 0, have), np.clip(shift + shape, 0, have)
    source = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    if (low == shift).all() and (high == shift + shape).all():  # the scan covers the grid: a view will do
        mask = None if volume.mask is None else volume.mask[source]
        return replace(volume, stored=volume.stored[(slice(None), *source)], mask=mask, affine=target)
    inside = tuple(slice(a, max(a, b)) for a, b in zip(low - shift, high - shift, strict=True))
    # Outside is 0 in real intensities, so scaled integers are unscaled first.
    plain = (volume.slope, volume.inter) == (1.0, 0.0)
    stored = volume.stored if plain else volume.image
    image = np.zeros((len(stored), *shape[::-1]), dtype=stored.dtype).transpose(
        0, 3, 2, 1
    )  # x fastest, as files have it
    image[(slice(None), *inside)] = stored[(slice(None), *source)]
    mask = None
    if volume.mask is not None:
        mask = np.zeros(shape[::-1], dtype=np.bool_).T
        mask[inside] = volume.mask[source]
    return replace(volume, stored=image, mask=mask, affine=target, slope=1.0, inter=0.0)


def _averaged(
    volume: Volume, start: NDArray[np.float64], step: NDArray[np.float64], shape: Triple, target: NDArray[np.float64]
) -> Volume:
    weights = [_overlap(a, d, n, have) for a, d, n, have in zip(start, step, shape, volume.shape, strict=True)]
    image = np.stack([_contract(channel, weights) for channel in volume.image])
    mask = None if volume.mask is None else _contract(volume.mask.astype(np.float32), weights) >= 0.5
    return replace(volume, stored=image, mask=mask, affine=target, slope=1.0, inter=0.0)


def _overlap(start: float, step: float, size: int, have: int) -> NDArray[np.float32]:
    """[size, have]: the fraction of each new voxel, `step` old voxels wide, that each old voxel fills."""
    centres = start + step * np.arange(size)[:, None]
    edges = np.arange(have)[None, :]
    covered = np.minimum(centres + step / 2, edges + 0.5) - np.maximum(centres - step / 2, edges - 0.5)
    weights: NDArray[np.float32] = (np.clip(covered, 0, None) / step).astype(np.float32)
    return weights


def _contract(image: NDArray[np.float32], weights: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Torch's products: the threads of NumPy's BLAS wait for the next one at full speed (`alignment.product_of`)."""
    import torch

    found = torch.from_numpy(image if min(image.strides) > 0 else image.copy())
    for matrix in weights:  # each product takes the first axis and leaves its result last: three bring the order back
        found = torch.tensordot(found, torch.from_numpy(matrix), dims=([0], [1]))
    averages: NDArray[np.float32] = found.numpy()
    return averages


def corner_distance(a: NDArray[np.float64], b: NDArray[np.float64], shape: tuple[int, ...]) -> float:
    """The largest distance in mm along an axis, at any corner of a volume, between two affines."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape], [1.0], indexing="ij")).reshape(4, -1)
    return float(np.abs((a - b) @ corners).max())


def _mm(values: NDArray[np.float64] | tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"


def _signed(values: NDArray[np.float64]) -> str:
    return "(" + ", ".join(f"{value:+.0f}" for value in values) + ")"
