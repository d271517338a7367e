"""DICOM files, classic or enhanced: the images that they hold, which of them is the T1w one, its voxels and affine.

The affine comes from the frames' own positions and directions, and each of them is held against it: what a header says
besides of the order of slices and the distance between them mirrors heads.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from brainfm.errors import ScanError
from brainfm.prep.extent import why_no_head
from brainfm.prep.frames import Frame, Kind, frames_of, silence, stored_numbers
from brainfm.scan.kinds import is_dicom
from brainfm.scan.stored import check_voxels

logger = logging.getLogger("brainfm")

_FROM_LPS = np.diag((-1.0, -1.0, 1.0, 1.0))
_UNEVEN = 0.1  # of the distance between slices: what one may be off
_MOST_LISTED = 8

# Words of ImageType and FrameType (PS3.3 C.8.3.1, C.8.13.3, and as the makers have them) of what is no magnitude image
# of a head, and what it is instead.
_COMPONENTS = {"P": "phase", "PHASE": "phase", "PHASE MAP": "phase", "R": "real part", "REAL": "real part"}
_COMPONENTS |= {"I": "imaginary part", "IMAGINARY": "imaginary part", "FIELD_MAP": "field map", "VELOCITY": "velocity"}
_OTHERS = {"LOCALIZER": "a localizer", "MOSAIC": "a mosaic of slices", "PROJECTION IMAGE": "a projection"}
_OTHERS |= dict.fromkeys(("MIP", "MNIP", "MINIP", "MAXIMUM_IP", "MINIMUM_IP"), "a projection")
_OTHERS |= dict.fromkeys(("DIFFUSION", "ADC", "FA", "TRACEW", "TRACE", "TENSOR", "DIFFUSION_ANISO"), "diffusion")
_OTHERS |= dict.fromkeys(("FMRI", "PERFUSION", "ASL", "CBF", "CBV", "MTT", "TTP"), "a functional or perfusion image")
_OTHERS |= dict.fromkeys(
    ("T1 MAP", "T2 MAP", "T2STAR MAP", "T1_MAP", "T2_MAP", "T2_STAR_MAP", "B0 MAP", "B1 MAP"), "a map"
)
_OTHERS |= dict.fromkeys(("SUB", "SUBTRACTION", "SUBTRACT"), "a difference of images")
_CONTRASTS = {"", "T1", "UNKNOWN", "MIXED"}
# Set here, beyond what T1w protocols have: an echo time of all, of gradient echoes (longer: T2*, susceptibility), and
# of spin echoes that nothing inverts a repetition time (longer: proton density, T2).
MAX_ECHO_MS, MAX_GRADIENT_ECHO_MS, MAX_REPETITION_MS = 35.0, 15.0, 1800.0
# Words of descriptions.
_T1 = re.compile(r"t1|mp.?2?.?rage|spgr|bravo")
_NOT_T1 = re.compile(
    r"(?<![a-z])(t2\w*|pd\w?|\w*flair|stir|dwi|dti|adc|bold|fmri|epi|ep2d\w*|perfusion|asl|swi|swan|tof|mra|angio\w*|"
    r"phase|field.?map\w*|locali[sz]er|loc|scout|survey|mip|ciss|fiesta\w*|trufi\w*|calibration|asset|ref)(?![a-z])"
)


class DicomImage(NamedTuple):
    """What was read.

    Attributes:
        array: Voxels [x, y, z], scaled as each frame's header has it.
        affine: From them to RAS mm [4, 4].
        chosen: How it was chosen, in words; "" where it was the only one.
    """

    array: NDArray[np.float32]
    affine: NDArray[np.float64]
    chosen: str


class _Fault(NamedTuple):
    """Why an image cannot be taken, and what to do."""

    what: str
    advice: str


def read_dicom(path: Path) -> DicomImage:
    """The T1w image in a folder of DICOM files, or in an enhanced file, which holds many frames.

    It is the only image that there is (of one series, one magnitude, one echo and so on), or the only one that can be
    a T1w image of a head by its geometry and what the header says of its type, contrast and times; which a line of the
    log says then. Descriptions in free text are looked at last, and only to leave out images that name other contrasts.

    Raises:
        ScanError: No image or more than one can be it, a file is damaged, or the slices do not follow each other at one
            distance. Files are named and images described; nothing else of a header is quoted.
    """
    files = sorted(filter(is_dicom, path.iterdir())) if path.is_dir() else [path]
    with silence():
        frames = [frame for file in files for frame in frames_of(file)]
        if not frames:
            raise ScanError(f"{path}: DICOM without an image (a report, a DICOMDIR?); give the files of the T1w series")
        if path.is_file() and len(frames) == 1:
            raise ScanError(f"{path}: a file of a DICOM series; name the folder that holds the series")
        image, chosen = _the_t1w(_images(frames), path)
        assert image.affine is not None
        return DicomImage(_voxels(image, path), image.affine, chosen)


# --- Images of frames -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Image:
    """Frames of one kind, in the order of their positions.

    Attributes:
        frames: The frames, in any order where there is a fault.
        affine: From voxels [column, row, frame] to RAS mm [4, 4]; None where there is none.
        fault: Why it cannot be a T1w image, by its kind or by how its frames lie.
    """

    frames: list[Frame]
    affine: NDArray[np.float64] | None
    fault: _Fault | None

    @property
    def kind(self) -> Kind:
        return self.frames[0].kind

    @property
    def shape(self) -> tuple[int, int, int]:
        return (*self.frames[0].size, len(self.frames))

    def __str__(self) -> str:
        files = len({frame.file for frame in self.frames})
        text = f"{files} file{'s' * (files != 1)} of {'×'.join(map(str, self.shape))} voxels"
        if self.affine is not None:
            text += f" of {'×'.join(f'{mm:.3g}' for mm in _spacing(self.affine))} mm"
        return text


def _spacing(affine: NDArray[np.float64]) -> list[float]:
    return [float(mm) for mm in np.linalg.norm(affine[:3, :3], axis=0)]


def _images(frames: list[Frame]) -> list[_Image]:
    kinds: dict[Kind, list[Frame]] = defaultdict(list)
    for frame in frames:
        kinds[frame.kind].append(frame)
    return [_image(members) for members in kinds.values()]


def _image(frames: list[Frame]) -> _Image:
    other = _why_not_t1w(frames[0].kind)
    try:
        ordered, affine = _stacked(frames)
    except _MisplacedError as error:
        return _Image(frames, None, other or error.fault)
    return _Image(ordered, affine, other)


class _MisplacedError(Exception):
    """Frames that are no stack: `fault` says which."""

    def __init__(self, what: str, advice: str) -> None:
        self.fault = _Fault(what, advice)


def _stacked(frames: list[Frame]) -> tuple[list[Frame], NDArray[np.float64]]:
    """Frames in the order of their positions, and the affine to RAS mm, which each of them agrees with."""
    placed = [(frame, frame.plane) for frame in frames if frame.plane is not None]
    for frame in frames:
        if frame.plane is None:
            raise _MisplacedError(
                f"{frame.name} does not say where its slice lies (position, orientation or spacing of the voxels)",
                "export the series again",
            )
    first, plane = placed[0]
    for frame, other in placed:
        if not np.allclose(other.along @ other.along.T, np.eye(2), atol=1e-3) or other.spacing.min() <= 0:
            raise _MisplacedError(
                f"the header of {frame.name} is damaged: its axes are no right angle", "export it again"
            )
        if not np.allclose(other.along, plane.along, atol=1e-3):
            raise _MisplacedError(
                f"the slices {first.name} and {frame.name} are not parallel (a localizer?)", "give the T1w series"
            )
        if frame.size != first.size or not np.allclose(other.spacing, plane.spacing, rtol=1e-3):
            raise _MisplacedError(f"the slices {first.name} and {frame.name} have other voxels", "export it again")
    normal = np.cross(*plane.along)
    placed.sort(key=lambda one: float(one[1].position @ normal))
    ordered = [frame for frame, _ in placed]
    positions = np.array([other.position for _, other in placed])
    if len(ordered) > 2:
        _check_distances(ordered, np.diff(positions @ normal))
    many = len(ordered) - 1
    between = (positions[-1] - positions[0]) / many if many else plane.thickness * normal
    off = np.linalg.norm(positions - positions[0] - np.arange(len(ordered))[:, None] * between, axis=1)
    if off.max() > max(_UNEVEN * float(np.linalg.norm(between)), 0.01):
        name = ordered[int(off.argmax())].name
        raise _MisplacedError(
            f"the slice {name} lies {off.max():.2f} mm from where the others put it", "export it again"
        )
    lps = np.eye(4)
    lps[:3, 0] = plane.along[0] * plane.spacing[1]
    lps[:3, 1] = plane.along[1] * plane.spacing[0]
    lps[:3, 2] = between
    lps[:3, 3] = positions[0]
    affine: NDArray[np.float64] = _FROM_LPS @ lps
    return ordered, affine


def _check_distances(frames: list[Frame], steps: NDArray[np.float64]) -> None:
    """Refuse slices that do not follow each other at one distance."""
    usual = float(np.median(steps))
    if steps.min() < 0.01:
        n = int(steps.argmin())
        raise _MisplacedError(
            f"{frames[n].name} and {frames[n + 1].name} lie at the same place: there is more than one image in the "
            "series (averages, time points?)",
            "export the T1w image by itself",
        )
    if steps.max() - steps.min() > _UNEVEN * usual:
        n = int(np.abs(steps - usual).argmax())
        raise _MisplacedError(
            f"the distances between its {len(frames)} slices go from {steps.min():.2f} to {steps.max():.2f} mm, as "
            f"between {frames[n].name} and {frames[n + 1].name}: slices are missing, or there is more than one image",
            "export the series again",
        )


def _voxels(image: _Image, path: Path) -> NDArray[np.float32]:
    check_voxels(image.shape, np.dtype(np.float32), str(path))
    columns, rows, count = image.shape
    array = np.empty((count, rows, columns), np.float32)
    places: dict[Path, list[int]] = defaultdict(list)
    for place, frame in enumerate(image.frames):
        places[frame.file].append(place)
    for file, inside in places.items():
        stored = stored_numbers(file, [image.frames[place].number for place in inside])
        for place, numbers in zip(inside, stored, strict=True):
            if numbers.shape != (rows, columns):
                raise ScanError(f"{file}: its image is not of the size that its header says; export it again")
            array[place] = numbers * image.frames[place].slope + image.frames[place].inter
    return array.transpose(2, 1, 0)


# --- Which of them is the T1w image ---------------------------------------------------------------


def _the_t1w(images: list[_Image], path: Path) -> tuple[_Image, str]:
    """The only image, or the only one that can be it, and in words how it was chosen."""
    if len(images) == 1:
        if images[0].fault:
            raise ScanError(f"{path}: {images[0].fault.what}; {images[0].fault.advice}")
        return images[0], ""
    why = {image: _why_not_taken(image) for image in images}
    left = [image for image in images if not why[image]]
    # What was computed from another image, as a reformatted one, gives way to it.
    left = [image for image in left if "SECONDARY" not in image.kind.types] or left
    for image in left:
        if _NOT_T1.search(image.kind.text) and not _T1.search(image.kind.text):
            why[image] = "another contrast by its description"
    left = [image for image in left if not why[image]]
    if len(left) == 1:
        chosen = f"the only one of {len(images)} DICOM images that can be T1w"
        logger.warning("%s: taken is the image of %s, %s", path, left[0], chosen)
        return left[0], chosen
    listed = [f"{image}{f' ({why[image]})' if why[image] else ''}" for image in images[:_MOST_LISTED]]
    more = len(images) - len(listed)
    raise ScanError(
        f"{path}: {len(images)} DICOM images, of which {len(left) or 'none'} can be the T1w one: {'; '.join(listed)}"
        f"{f'; and {more} more' if more else ''}; put the T1w one's files into a folder of their own"
    )


def _why_not_taken(image: _Image) -> str:
    if image.fault or image.affine is None:
        return image.fault.what if image.fault else ""
    return why_no_head(image.shape, _spacing(image.affine))


def _why_not_t1w(kind: Kind) -> _Fault | None:
    """Why what the header says of a kind rules out a T1w magnitude image."""
    echo, repetition = kind.echo_ms or 0, kind.repetition_ms or 0
    parts = sorted(_COMPONENTS[word] for word in kind.types & _COMPONENTS.keys())
    others = sorted(_OTHERS[word] for word in kind.types & _OTHERS.keys())
    what = ""
    if kind.modality != "MR":
        what = f"a DICOM image of modality {kind.modality[:2]}, not MR"
    elif not kind.grey:
        what = "a DICOM image in colour"
    elif parts:
        what = f"no magnitude image but {parts[0]}, by its header"
    elif others:
        what = f"{others[0]} by its header"
    elif kind.angiography or kind.contrast not in _CONTRASTS:
        what = "another contrast than T1w by its header"
    elif "EP" in kind.sequence:
        what = "echo-planar by its header"
    elif echo > (MAX_GRADIENT_ECHO_MS if kind.sequence & {"GR", "SE"} == {"GR"} else MAX_ECHO_MS):
        what = f"an echo time of {echo:g} ms, too long for T1w"
    elif kind.sequence & {"SE", "GR", "IR"} == {"SE"} and not kind.inversion_ms and repetition > MAX_REPETITION_MS:
        what = f"a spin echo of repetition time {repetition:g} ms, too long for T1w"
    return _Fault(what, "give the T1w series") if what else None
