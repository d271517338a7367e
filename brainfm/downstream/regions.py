"""Per-region features: the mean of an encoder's dense features over each label of an atlas in MNI152 space.

A label is looked up where a cell of the feature map looks, by nearest neighbour in world coordinates; a label that is
at no cell's place has the cell that is nearest to its centroid. A contract that lies in MNI152 is met whatever its
template, by the matrices that `brainfm prep` uses. Where a contract takes scans in their own space, a scan that
`brainfm prep` prepared gives the way there by its affine matrix; of others nobody knows it, and they are refused.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from brainfm.assets import SAMPLE_MASK
from brainfm.contract import InputSpec
from brainfm.dense import dense_affine
from brainfm.embed import origin_of
from brainfm.errors import BrainfmError, ScanError
from brainfm.factory import create_model
from brainfm.files import file_sha256, held, one_line, progress_bar, write_csv
from brainfm.inference import resolve_device
from brainfm.manifest import ScanRecord, ScansLike, list_scans
from brainfm.models.encoder import Encoder
from brainfm.readout import Reader
from brainfm.scan.layout import is_prepared
from brainfm.scan.load import image_of
from brainfm.scan.prepared import read_prepared
from brainfm.scan.read import read_image
from brainfm.scan.spaces import space_of
from brainfm.table import Embeddings, check_output, write
from brainfm.tabular import read_rows
from brainfm.transforms import InputTransform, create_transform

_Array: TypeAlias = NDArray[np.float64]
_Cells: TypeAlias = NDArray[np.float32]  # [C, d, h, w]

LEAST_INSIDE = 0.6  # of an atlas's voxels that lie in the template's brain: one of cortex and cerebellum has 0.8 (ours)
_SAME = 1e-3  # of a label, which is a whole number


@dataclass(frozen=True, eq=False)
class Atlas:
    """Labels in MNI152 space.

    Attributes:
        path: Of the file.
        labels: [i, j, k] whole numbers, 0 where there is none.
        affine: [4, 4] from voxel indices to RAS mm of its template.
        space: The template's name, such as "MNI152NLin2009cAsym".
        names: By label; the label itself where nobody says.
    """

    path: Path
    labels: NDArray[np.int64]
    affine: _Array
    space: str
    names: dict[int, str]

    @property
    def numbers(self) -> NDArray[np.int64]:
        """The labels that there are, 0 left out, from small to large."""
        found = np.unique(self.labels)
        numbers: NDArray[np.int64] = found[found != 0]
        return numbers

    def at(self, points: _Array) -> NDArray[np.int64]:
        """[...]: the labels at points [..., 3], mm of MNI152 2009c, by nearest neighbour; 0 beyond the file."""
        to_voxel = np.linalg.inv(self.affine) @ np.linalg.inv(space_of(self.space).to_2009c)
        voxels = np.rint(points @ to_voxel[:3, :3].T + to_voxel[:3, 3]).astype(np.int64)
        inside = np.asarray(((voxels >= 0) & (voxels < self.labels.shape)).all(axis=-1))
        i, j, k = np.moveaxis(np.where(inside[..., None], voxels, 0), -1, 0)
        found: NDArray[np.int64] = np.where(inside, self.labels[i, j, k], 0)
        return found

    def centroids(self) -> _Array:
        """[labels, 3]: the mean place of each label's voxels, mm of MNI152 2009c."""
        matrix = space_of(self.space).to_2009c @ self.affine
        places = [np.argwhere(self.labels == label).mean(axis=0) for label in self.numbers]
        return np.asarray(places) @ matrix[:3, :3].T + matrix[:3, 3]


def read_atlas(
    path: str | os.PathLike[str],
    *,
    space: str = "MNI152NLin2009cAsym",
    names: str | os.PathLike[str] | None = None,
) -> Atlas:
    """An atlas of whole numbers in MNI152 space.

    Args:
        path: A NIfTI file [i, j, k].
        space: Its template, one of MNI152.
        names: A table with columns label (or index) and name.

    Raises:
        BrainfmError: It holds fractions, no label, or does not lie where MNI152's brain does; or the space is another.
    """
    path = Path(path)
    if not space.startswith("MNI152"):
        raise BrainfmError(f"--space {space}: atlases are taken in MNI152, such as MNI152NLin2009cAsym")
    stored = read_image(path)
    values = stored.array.astype(np.float64) * stored.slope + stored.inter
    labels = np.rint(values).astype(np.int64)
    if np.abs(values - labels).max(initial=0) > _SAME:
        raise BrainfmError(f"{path}: holds fractions; an atlas is of whole numbers, one a region")
    if labels.min() < 0 or not labels.any():
        raise BrainfmError(f"{path}: an atlas has 0 outside its regions and whole numbers above 0 in them")
    atlas = Atlas(path, labels, np.asarray(stored.affine, dtype=np.float64), space, {})
    inside = _inside_brain(atlas)
    if inside < LEAST_INSIDE:
        raise BrainfmError(
            f"{path}: {inside:.0%} of its regions lie in the brain of MNI152, of which it is said to be; give an atlas "
            "in that space, or resample this one to it"
        )
    known = _names(names) if names is not None else {}
    return replace(atlas, names={int(n): known.get(int(n), str(n)) for n in atlas.numbers})


def _inside_brain(atlas: Atlas) -> float:
    brain = read_image(SAMPLE_MASK, "mask")
    matrix = np.linalg.inv(brain.affine) @ space_of(atlas.space).to_2009c @ atlas.affine
    voxels = np.rint(np.argwhere(atlas.labels > 0) @ matrix[:3, :3].T + matrix[:3, 3]).astype(np.int64)
    there = voxels[((voxels >= 0) & (voxels < brain.array.shape)).all(axis=1)]
    return float((brain.array[tuple(there.T)] > 0).sum() / len(voxels))


def _names(path: str | os.PathLike[str]) -> dict[int, str]:
    rows = read_rows(Path(path)).to_dict("records")
    keys = [key for key in ("label", "index") if rows and key in rows[0]]
    if not keys or "name" not in rows[0]:
        raise BrainfmError(f"{path}: a table of regions has the columns label (or index) and name")
    try:
        return {int(row[keys[0]]): row["name"] for row in rows}
    except ValueError as error:
        raise BrainfmError(f"{path}: a label is a whole number ({one_line(error)})") from error


def to_mni(record: ScanRecord, spec: InputSpec) -> _Array:
    """[4, 4] from the world of a contract's tensors, mm, to MNI152 2009c.

    Raises:
        ScanError: The contract takes scans in their own space, and this one was not prepared by `brainfm prep`, or it
            lies in the space of another template.
    """
    if spec.in_mni152:
        assert spec.space is not None
        return space_of(spec.space).to_2009c
    if spec.space is not None:
        raise ScanError(f"this contract lies in the space {spec.space!r}, from which no way to MNI152 is known")
    first: Any = image_of(record.image, spec)
    if not is_prepared(first):
        raise ScanError(
            f"{record.name}: this contract takes scans in their own space, and nothing says where that lies in MNI152; "
            "give the folder that 'brainfm prep' makes of the scan"
        )
    return np.asarray(np.linalg.inv(read_prepared(first).matrix("affine")), dtype=np.float64)


def cells_of(record: ScanRecord, reader: Reader, transform: InputTransform) -> tuple[_Cells, _Array]:
    """The dense features [C, d, h, w] of a scan, and [4, 4] from cells to the tensor's world, mm."""
    volume = transform.volume(record.image, record.mask)
    device = next(reader.model.parameters()).device
    maps = reader(torch.from_numpy(volume.image)[None].to(device), [volume.mask]).maps
    assert maps is not None
    return maps[0].cpu().numpy(), dense_affine(volume.affine, reader.model.feature_info[-1])


def region_means(cells: _Cells, to_2009c: _Array, atlas: Atlas) -> tuple[_Cells, NDArray[np.int64]]:
    """[labels, C] means of cells [C, d, h, w], and [labels] how many cells each is of; 0 is the nearest one alone."""
    channels, *shape = cells.shape
    points = (
        np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1) @ to_2009c[:3, :3].T + to_2009c[:3, 3]
    )
    labels, flat = atlas.at(points).ravel(), cells.reshape(channels, -1)
    means, counts = np.empty((len(atlas.numbers), channels), np.float32), np.zeros(len(atlas.numbers), np.int64)
    for row, (label, centroid) in enumerate(zip(atlas.numbers, atlas.centroids(), strict=True)):
        own = labels == label
        counts[row] = own.sum()
        if not counts[row]:
            own = np.arange(len(labels)) == np.linalg.norm(points.reshape(-1, 3) - centroid, axis=1).argmin()
        means[row] = flat[:, own].mean(axis=1)
    return means, counts


def embed_regions(
    scans: ScansLike,
    model: str | Encoder,
    atlas: Atlas,
    output: str | os.PathLike[str],
    *,
    device: str = "auto",
    progress: bool = False,
) -> Embeddings:
    """A table of per-region features, a row a scan and a block of columns a region, in the order of the labels.

    `<output>.regions.csv` beside it names the regions: label, name, the first and last column, and the median of the
    cells over scans; of 0 the region is smaller than the encoder's cells, and has the nearest one.

    Args:
        scans: As of `brainfm.embed`.
        model: An encoder, or its name.
        atlas: Of `read_atlas`.
        output: The table: .csv, .parquet or .npz.
        device: See `brainfm.embed`.
        progress: Show a progress bar.

    Returns:
        The table; scans that failed are in its `errors`.

    Raises:
        BrainfmError: The contract lies in the space of another template, or no scan could be embedded.
    """
    output = Path(output)
    check_output(output)
    encoder = create_model(model, pretrained=True) if isinstance(model, str) else model
    encoder = encoder.eval().to(resolve_device(device))
    reader, transform = Reader(encoder, dense=True), create_transform(encoder)
    records = list_scans(scans)
    rows: list[NDArray[np.float32]] = []
    counts: list[NDArray[np.int64]] = []
    kept: list[ScanRecord] = []
    failed: list[tuple[ScanRecord, str]] = []
    for record in progress_bar(records, total=len(records), unit="scan", doing="regions", shown=progress):
        try:
            way = to_mni(record, transform.spec)
            cells, affine = cells_of(record, reader, transform)
        except (ScanError, OSError) as error:  # one bad scan never stops the rest
            failed.append((record, str(error)))
            continue
        means, count = region_means(cells, way @ affine, atlas)
        kept.append(record)
        rows.append(means.ravel())
        counts.append(count)
    if not rows:
        raise BrainfmError(f"no scan could be embedded; the first: {failed[0][1]}")
    origin = origin_of(encoder)
    said = {"atlas": file_sha256(atlas.path), "space": atlas.space, "regions": len(atlas.numbers)}
    origin = replace(origin, readout={**origin.readout, **said}, scans=len(records), failed=len(failed))
    table = Embeddings(np.stack(rows), kept, failed, origin)
    with held(output):
        write(table, output)
        write_csv(regions_path(output), _listed(atlas, np.stack(counts), len(rows[0]) // len(atlas.numbers)))
    return table


def regions_path(output: Path) -> Path:
    """Where the regions of a table are named."""
    return output.with_name(output.stem + ".regions.csv")


def _listed(atlas: Atlas, counts: NDArray[np.int64], channels: int) -> Sequence[Sequence[Any]]:
    rows = [
        [label, atlas.names[int(label)], f"e{n * channels}", f"e{(n + 1) * channels - 1}", f"{np.median(count):g}"]
        for n, (label, count) in enumerate(zip(atlas.numbers, counts.T, strict=True))
    ]
    return [["label", "name", "first", "last", "cells"], *rows]
