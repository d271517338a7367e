"""A scan to look at in a browser: one HTML file with the scan, its mask's outline, a map over it, and NiiVue.

The page works from a file, and asks no machine for anything. What it holds is for looking: 256 grey levels, on coarser
voxels where there are too many. It says so.
"""

from __future__ import annotations

import base64
import gzip
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainfm.contract.volume import Volume
from brainfm.errors import BrainfmError, ScanError
from brainfm.files import one_line, write_text
from brainfm.picture import MASK_COLOUR
from brainfm.render import render_page
from brainfm.scan.layout import is_prepared, turboprep_files
from brainfm.scan.prepared import read_prepared
from brainfm.scan.read import ImageLike, read_image

MAX_SCAN_VOXELS = 10_000_000  # a head of 215 mm at 1 mm: about 5 MB of page
MAX_MAP_VOXELS = 1_500_000  # of all components of a map together, of two bytes each
_MAX_FEATURES = 50_000_000  # numbers of dense features that components are computed of: 200 MB
_COMPONENTS = 3

_STRIPPED = "Only the brain is shown; what lies outside the mask was left out of this file."
_HEAD = (
    "This file holds a whole head, from which a face can be drawn and a person recognised. Treat it as the scan "
    "itself; without --head it holds the brain alone."
)
_UNKNOWN = (
    "No brain mask was given. If this is a whole head, a face can be drawn from this file and a person recognised: "
    "treat it as the scan itself, or give the mask with --mask."
)


@dataclass(frozen=True, eq=False)
class _Image:
    """Voxels [x, y, z] or [x, y, z, n], whose axes point right, forward and up, more or less, and their affine."""

    array: NDArray[Any]
    affine: NDArray[np.float64]

    @property
    def spacing(self) -> str:
        return " × ".join(f"{size:.3g}" for size in np.linalg.norm(self.affine[:3, :3], axis=0)) + " mm"


def write_view(
    scan: str | os.PathLike[str] | ImageLike,
    output: str | os.PathLike[str],
    *,
    mask: ImageLike | None = None,
    overlay: str | os.PathLike[str] | None = None,
    head: bool = False,
) -> list[str]:
    """Write a page that shows a scan in three planes, with its mask's outline and a map over it.

    Where there is a mask, voxels outside it are left out, unless `head` keeps them.

    Args:
        scan: The folder of a prepared scan, or an image of any kind that `load_scan` reads, of 3 dimensions.
        output: An .html file.
        mask: The brain mask, on the scan's voxels; a prepared scan has its own.
        overlay: A NIfTI file in the scan's space, on voxels of its own: a saliency map [x, y, z], or dense features
            [x, y, z, C], of which the first three principal components are shown.
        head: Show the whole head although there is a mask. A face can be drawn from it, and the page says so.

    Returns:
        What is shown, a sentence each, as on the page.

    Raises:
        ScanError: A file cannot be read, the mask is empty or not on the scan's voxels, or the map lies beside them.
        BrainfmError: `output` is no .html file.

    Example:
        >>> from brainfm.assets import SAMPLE_MASK, SAMPLE_SCAN
        >>> from brainfm.view import write_view
        >>> for sentence in write_view(SAMPLE_SCAN, "sample.html", mask=SAMPLE_MASK):
        ...     print(sentence)
        Only the brain is shown; what lies outside the mask was left out of this file.
        The scan: 193 × 229 × 193 voxels, 1 × 1 × 1 mm, in 256 grey levels from 0 to 234.
        The brain mask's outline is yellow.
    """
    output = Path(output)
    if output.suffix.lower() not in (".html", ".htm") or output.is_dir():
        raise BrainfmError(f"{output}: the page is an HTML file; give it a name that ends in .html")
    image, brain = _read(scan, mask)
    warning = (_HEAD if head else "") if brain is not None else _UNKNOWN
    shown = [] if warning else [_STRIPPED]
    if brain is not None and not head:
        image = _Image(np.where(brain.array, image.array, 0), image.affine)
    volumes = [_grey(image, brain if not head else None, shown)]
    if overlay is not None:
        volumes.append(_map(Path(overlay), image, shown))
    if brain is not None:
        volumes.append(_outline(brain))
        shown.append("The brain mask's outline is yellow.")
    title = Path(os.fspath(scan)).name if isinstance(scan, str | os.PathLike) else "scan"
    page = render_page(
        "view.html",
        scripts=["vendor/niivue.umd.js", "view.js"],
        title=title,
        warning=warning,
        shown=shown,
        volumes=volumes,
        outline=brain is not None,
        components=[name for volume in volumes for name in volume.get("components", ())],
        overlay=overlay is not None,
        rendering=not warning and overlay is None,
    )
    write_text(output, page)
    return [*([warning] if warning else []), *shown]


# --- What is shown --------------------------------------------------------------------------------


def _read(scan: Any, mask: ImageLike | None) -> tuple[_Image, _Image | None]:
    """The scan's intensities and its mask, as booleans."""
    own: NDArray[np.bool_] | None = None
    if is_prepared(scan):
        prepared = read_prepared(scan)
        image, affine, own = prepared.image(), prepared.head.affine, prepared.brain
    else:
        scan, mask = turboprep_files(scan, mask)
        stored = read_image(scan)
        affine = stored.affine
        image = Volume(stored.array[None], None, affine, stored.slope, stored.inter).intensities[0]
    brain = own
    if mask is not None:
        given = read_image(mask, "mask")
        if given.array.shape != image.shape or not np.allclose(given.affine, affine, atol=1e-2):
            raise ScanError(
                f"{given.source}: not on the scan's voxels ({_size(given.array)}, and the scan has {_size(image)}); "
                "give the mask that was made of this scan"
            )
        brain = given.array > 0
    if brain is not None and not brain.any():
        raise ScanError(f"{mask if mask is not None else scan}: the brain mask is empty; prepare the scan again")
    return _upright(image, affine), None if brain is None else _upright(brain, affine)


def _upright(array: NDArray[Any], affine: NDArray[np.float64]) -> _Image:
    import nibabel as nib

    turn = nib.orientations.io_orientation(affine)
    turned = nib.orientations.apply_orientation(array, turn)
    return _Image(turned, affine @ nib.orientations.inv_ornt_aff(turn, array.shape[:3]))


def _size(array: NDArray[Any]) -> str:
    return " × ".join(map(str, array.shape))


def _coarser(image: _Image, most: float) -> _Image:
    """An image of not more than so many voxels: each the mean of as many as it takes along every axis."""
    step = 1
    while np.prod([-(-size // step) for size in image.array.shape[:3]]) > most:
        step += 1
    if step == 1:
        return image
    rest = [(0, -size % step) for size in image.array.shape[:3]] + [(0, 0)] * (image.array.ndim - 3)
    array = np.pad(image.array.astype(np.float32), rest, mode="edge")
    x, y, z = (size // step for size in array.shape[:3])
    blocks = array.reshape(x, step, y, step, z, step, *array.shape[3:])
    affine = image.affine @ np.diag([step, step, step, 1.0])
    affine[:3, 3] = image.affine[:3, 3] + image.affine[:3, :3] @ np.full(3, (step - 1) / 2)
    return _Image(blocks.mean(axis=(1, 3, 5)), affine)


def _grey(image: _Image, brain: _Image | None, shown: list[str]) -> dict[str, Any]:
    """The scan in 256 grey levels."""
    seen = image.array[brain.array] if brain is not None else image.array[image.array != 0]
    low, high = np.percentile(seen, (0.5, 99.5)) if seen.size else (0.0, 1.0)
    if brain is not None or not (image.array < 0).any():
        low = min(float(low), 0.0)  # what is left out is 0, and darkest
    coarse = _coarser(image, MAX_SCAN_VOXELS)
    grey = np.clip((coarse.array - low) / max(float(high - low), 1e-9), 0, 1) * 255
    scaled = f"averaged to {coarse.spacing} from {image.spacing}" if coarse is not image else image.spacing
    shown.append(f"The scan: {_size(coarse.array)} voxels, {scaled}, in 256 grey levels from {low:.3g} to {high:.3g}.")
    return _volume("scan", _Image(grey.round().astype(np.uint8), coarse.affine), most=255)


def _outline(brain: _Image) -> dict[str, Any]:
    """The voxels of the mask that have a neighbour outside it."""
    coarse = _coarser(brain, MAX_SCAN_VOXELS)
    mask = np.pad(coarse.array >= 0.5, 1)
    inner = mask.copy()
    for axis in range(3):
        for step in (-1, 1):
            inner &= np.roll(mask, step, axis)
    edge = (mask & ~inner)[1:-1, 1:-1, 1:-1]
    return _volume("outline", _Image(edge.astype(np.uint8), coarse.affine), most=1, colour=MASK_COLOUR)


def _map(path: Path, scan: _Image, shown: list[str]) -> dict[str, Any]:
    """A saliency map, or the principal components of dense features."""
    import nibabel as nib
    from nibabel.filebasedimages import ImageFileError

    try:
        stored: Any = nib.load(path)
        array, affine = np.asarray(stored.dataobj, dtype=np.float32), np.asarray(stored.affine, dtype=np.float64)
    except (OSError, ValueError, TypeError, EOFError, MemoryError, ImageFileError) as error:
        raise ScanError(f"{path}: cannot be read as a map ({one_line(error)}); give a NIfTI file") from error
    if array.ndim not in (3, 4) or 0 in array.shape or not np.isfinite(array).all():
        raise ScanError(f"{path}: a map is [x, y, z] or [x, y, z, C] finite numbers, and this is {_size(array)}")
    image = _upright(array, affine)
    if not _meet(image, scan):
        raise ScanError(f"{path}: lies nowhere on the scan; give a map of this scan, in the space it is shown in")
    if array.ndim == 4 and array.shape[3] > 1:
        return _components(image, path, shown)
    image = _coarser(_Image(image.array.reshape(image.array.shape[:3]), image.affine), MAX_MAP_VOXELS)
    most = float(np.abs(image.array).max()) or 1.0
    size, ends = f"{_size(image.array)} voxels of {image.spacing}", ("blue to green", "orange to yellow")
    shown.append(f"{path.name}: {size}, from −{most:.3g} ({ends[0]}) to {most:.3g} ({ends[1]}).")
    return _volume("map", _signed(image), most=1.0)


def _components(image: _Image, path: Path, shown: list[str]) -> dict[str, Any]:
    channels = image.array.shape[3]
    image = _coarser(image, min(MAX_MAP_VOXELS / _COMPONENTS, _MAX_FEATURES / channels))
    cells = image.array.reshape(-1, channels).astype(np.float64)
    there = cells.any(axis=1)  # where the model did not look is 0
    centred = cells[there] - cells[there].mean(axis=0) if there.any() else cells
    values, vectors = np.linalg.eigh(centred.T @ centred)
    values, vectors = values[::-1][:_COMPONENTS], vectors[:, ::-1][:, :_COMPONENTS]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(axis=0), range(vectors.shape[1])])
    found = np.zeros((len(cells), vectors.shape[1]), dtype=np.float32)
    found[there] = centred @ vectors if there.any() else 0
    total = float((centred**2).sum()) or 1.0
    names = [f"component {n} ({100 * max(float(v), 0) / total:.0f} % of the variance)" for n, v in enumerate(values, 1)]
    cells_of = f"{_size(image.array[..., 0])} cells of {image.spacing}"
    shown.append(
        f"{path.name}: the first {len(names)} principal components of {channels} features, {cells_of}, each from minus "
        "(blue to green) to plus (orange to yellow) its own largest number."
    )
    components = _Image(found.reshape(*image.array.shape[:3], -1), image.affine)
    return _volume("map", _signed(components), most=1.0) | {"components": names}


def _meet(one: _Image, other: _Image) -> bool:
    """Whether the boxes of two images share a place, mm."""

    def box(image: _Image) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        sizes = np.array(image.array.shape[:3]) - 0.5
        corners = np.array(np.meshgrid(*[(-0.5, size) for size in sizes])).reshape(3, -1)
        places = image.affine[:3, :3] @ corners + image.affine[:3, 3:]
        return places.min(axis=1), places.max(axis=1)

    (low, high), (other_low, other_high) = box(one), box(other)
    return bool((low < other_high).all() and (other_low < high).all())


# --- As the page has it ---------------------------------------------------------------------------


def _signed(image: _Image) -> _Image:
    """Numbers from -1 to 1: parts of the largest, of components each of its own."""
    most = np.abs(image.array).max(axis=(0, 1, 2), keepdims=True)
    return _Image((image.array / np.where(most > 0, most, 1)).astype(np.float32), image.affine)


def _volume(kind: str, image: _Image, most: float, colour: Sequence[int] = ()) -> dict[str, Any]:
    """A volume as JSON: a NIfTI file in base64, of one byte a voxel or of two, and how it is shown."""
    import nibabel as nib

    nifti = nib.Nifti1Image(image.array, image.affine)
    nifti.header.set_xyzt_units("mm")
    if image.array.dtype == np.float32:
        nifti.header.set_data_dtype(np.int16)  # scaled to it by nibabel
    content = gzip.compress(nifti.to_bytes(), compresslevel=6, mtime=0)
    data = base64.b64encode(content).decode()
    return {"kind": kind, "data": data, "shape": image.array.shape, "most": most, "colour": list(colour)}
