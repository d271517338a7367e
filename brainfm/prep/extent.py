"""How much of a head an image must cover, and how finely."""

from __future__ import annotations

from collections.abc import Sequence

MIN_EXTENT_MM = 100.0  # along every axis; adults' brains are 110 mm or more
MAX_VOXEL_MM = 6.0


def why_no_head(shape: Sequence[int], spacing: Sequence[float]) -> str:
    """Why an image of `shape` voxels of `spacing` mm cannot hold a brain that is to be prepared, or ""."""
    for size, mm in zip(shape, spacing, strict=True):
        if size * mm < MIN_EXTENT_MM:
            return (
                f"a slab: {size} slices of {mm:.3g} mm cover {size * mm:.0f} mm, and a brain needs "
                f"{MIN_EXTENT_MM:.0f} or more along each axis"
            )
    if max(spacing) > MAX_VOXEL_MM:
        return f"voxels of up to {max(spacing):.3g} mm, too coarse for a contract of 1 mm (at most {MAX_VOXEL_MM:g})"
    return ""
