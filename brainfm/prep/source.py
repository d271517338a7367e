"""What is to be prepared: files, folders, DICOM series, BIDS data sets, manifests; read, or refused by content.

Nothing of a DICOM header but geometry and words of the standard is ever written or shown; see `brainfm.prep.dicom`.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from brainfm.bids import DESCRIPTION, SUFFIXES, BidsDataset, BidsImage, Rightly, is_bids, read_bids
from brainfm.contract import Reorient, Volume
from brainfm.errors import ScanError
from brainfm.files import file_sha256
from brainfm.manifest import ScanRecord, list_scans
from brainfm.paths import walk_folder
from brainfm.prep.extent import why_no_head
from brainfm.prep.image import largest_part, sitk, to_array, to_itk
from brainfm.scan.kinds import first_bytes, is_dicom
from brainfm.scan.read import read_image
from brainfm.shards import Shard

logger = logging.getLogger("brainfm")

AIR_IN_HOUNSFIELD = -500.0  # below it there is nothing in an MR image
STRIPPED_LITRES = (0.6, 2.4)  # of voxels that are not background; a head has 3 or more

# What is taken from a folder; MINC, MetaImage and Analyze are taken to be refused by name.
_IMAGE = re.compile(r"\.((nii|mgz|mgh|hdr|mnc)(\.(gz|bz2|xz|zst))?|nrrd|nhdr|mha|mhd)$", re.IGNORECASE)
_MANIFEST = (".csv", ".tsv", ".txt", ".xlsx", ".parquet")
# How the names of scans of other contrasts end, and what a manifest's columns call them.
_ENDINGS = {
    "T2w": re.compile(r"(^|_)(T2w|T2)$", re.IGNORECASE),
    "FLAIR": re.compile(r"(^|_)(T2w?_?)?FLAIR$", re.IGNORECASE),
    "T1c": re.compile(r"(^|_)(T1c|T1ce|T1gd|T1post)$|(^|_)ce-[a-z0-9]+_(.*_)?T1w$", re.IGNORECASE),
}
_CHANNELS = {
    "T1w": ("t1w", "t1"),
    "T2w": ("t2w", "t2"),
    "FLAIR": ("flair",),
    "T1c": ("t1c", "t1ce", "t1gd", "t1post"),
}
# By BIDS' suffix, or a mask's usual name, no T1w scan of a head.
_OTHER = re.compile(
    r"(^|_)(T2w|T2star|T2starw|PDw|PDT2|FLAIR|bold|sbref|dwi|epi|asl|dseg|probseg|mask)$", re.IGNORECASE
)


Contrast: TypeAlias = Literal["T1w", "T2w", "FLAIR", "T1c"]  # T1c is T1w after contrast agent


@dataclass(frozen=True)
class Source:
    """One scan to be prepared.

    Attributes:
        path: Its image file, an enhanced DICOM file, or the folder of its DICOM files.
        name: Of its folder in the output; with a "/" where a patient has a folder for each scan.
    """

    path: Path
    name: str


class Sources(list[Source]):
    """Scans in their order, and what a folder holds that could not be looked into, or is left out.

    Attributes:
        left_out: Paths, and why.
    """

    def __init__(self, sources: Iterable[Source], left_out: dict[str, str]) -> None:
        super().__init__(sources)
        self.left_out = left_out

    def of(self, shard: Shard) -> Sources:
        """Those of one shard."""
        return Sources([self[n] for n in shard.numbers(len(self))], self.left_out)


@dataclass(frozen=True, eq=False)
class Head:
    """A scan as it was read.

    Attributes:
        image: float32, its axes turned nearly R, A, S; not resampled.
        stripped: Whether the skull was removed already.
        found: What the file holds, in words: size, voxels, and how it was chosen from several DICOM images.
    """

    image: sitk.Image
    stripped: bool
    found: str


def find_sources(inputs: Iterable[str | Path], contrast: Contrast = "T1w") -> Sources:
    """The scans of one contrast that paths name.

    A manifest stands for its images, a BIDS folder for its T1w images, another folder for every image and every folder
    of DICOM files in it, at any depth. Images whose names say another contrast, masks, and what is prepared already are
    not taken from folders; of another contrast than T1w those are taken whose names end as its do (`_T2w`, `_FLAIR`,
    `_T1c`, `ce-…_T1w`), and of a manifest its column. A scan is called by its file's or folder's name, and where two
    would have one name by the folders above it too; of a manifest by its patient and scan.

    Raises:
        ScanError: A BIDS folder without a T1w image, a folder of prepared scans only, a manifest that is wrong, or two
            inputs that cannot be told apart by name.
    """
    left_out: dict[str, str] = {}
    found: dict[Path, tuple[str, str]] = {}
    for item in inputs:
        for path, short, long in _expanded(Path(item).expanduser(), left_out, contrast):
            found.setdefault(path.absolute(), (short, long))  # a link keeps its name: DataLad's have none
    often = Counter(short for short, _ in found.values())
    names = {path: short if often[short] == 1 else long for path, (short, long) in found.items()}
    for name, count in Counter(name.casefold() for name in names.values()).items():
        if count > 1:
            same = [str(path) for path, other in names.items() if other.casefold() == name]
            raise ScanError(f"{same[0]} and {same[1]} would share the folder {name}; rename one, or use two outputs")
    return Sources((Source(path, name) for path, name in names.items()), left_out)


def source_sha256(path: Path) -> str:
    """The sha256 of a file, or of the hashes of the files in a folder. Raises ScanError where there is nothing."""
    if not path.exists():
        raise ScanError(f"{path}: no such file or folder; check the path")
    if not path.is_dir():
        first_bytes(path, "scan")  # refuses what would be waited for: a pipe, a device
        return file_sha256(path)
    hashes = sorted(file_sha256(file) for file in path.iterdir() if file.is_file())
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def read_source(path: Path, contrast: Contrast = "T1w") -> Head:
    """Read a scan and check that it can be an image of a head; DICOM is of T1w scans only.

    Raises:
        ScanError: It cannot be read, is 4-D, CT, a slab, coarse, constant or not finite, or DICOM of which no image or
            more than one can be T1w. The message says what was found.
    """
    array, affine, chosen = _read(path, contrast)
    _check(array, affine, str(path))
    volume = Reorient("RAS")(Volume(array[None], None, affine))
    spacing = "×".join(f"{mm:.3g}" for mm in volume.spacing)
    found = f"{'×'.join(map(str, volume.shape))} voxels of {spacing} mm (right, anterior, superior)"
    found += f"; {chosen}" if chosen else ""
    return Head(to_itk(volume.image[0], volume.affine), _is_stripped(volume), found)


_Named = tuple[Path, str, str]  # a scan's path, its name, and a longer one for where that is another's too


def _expanded(path: Path, left_out: dict[str, str], contrast: Contrast) -> Iterator[_Named]:
    if path.suffix.lower() in _MANIFEST and not path.is_dir():
        for record in list_scans(path):
            image = _image_of(record, contrast)
            if image is None:
                left_out[record.name] = f"no {contrast} image"
                continue
            inside = "/".join(_clean(part) for part in (record.patient_id, record.scan_id) if part)
            inside += "" if contrast == "T1w" else f"_{contrast}"
            short = inside if record.patient_id else _name(image)
            yield image, short, f"{short}/{_name(image)}" if record.patient_id else _longer(image)
    elif path.is_dir() and not _holds_dicom(path.iterdir()):
        yield from _in_folder(path, left_out, contrast)
    else:
        yield path, _name(path), _longer(path)


def _in_folder(folder: Path, left_out: dict[str, str], contrast: Contrast) -> Iterator[_Named]:
    """The images of a contrast in a BIDS data set, or in another folder every image and DICOM series; or a refusal.

    Of another contrast than T1w, all images whose names end as its do.
    """
    if is_bids(folder):
        for image in bids_heads(read_bids(folder), left_out, contrast):
            yield image.path, _name(image.path), _longer(image.path)
        return
    files, folders, closed = walk_folder(folder)
    left_out |= closed
    if closed:
        logger.warning("%s: %d left out, such as %s (%s)", folder, len(closed), *next(iter(closed.items())))
    files = [path for path in files if not path.name.startswith(".")]
    images = [path for path in files if _IMAGE.search(path.name)]
    if contrast != "T1w":
        named = [path for path in images if _ENDINGS[contrast].search(_stem(path))]
        if not named:
            raise ScanError(f"{folder}: no {contrast} image, by the ends of the names; name the files, or list them")
        yield from ((path, _name(path), _longer(path)) for path in named)
        return
    prepared = {path.parent for path in files if path.name == "prep.json"}
    described = folder / DESCRIPTION in files
    found = [] if described else _images_and_series(folder, files, folders, prepared)
    if not found and prepared:
        raise ScanError(f"{folder}: holds scans that are prepared already; embed them: brainfm embed {folder}")
    if not found and (described or any(place.parent == folder and place.name.startswith("sub-") for place in folders)):
        raise ScanError(f"{folder}: a BIDS data set without a T1w image (sub-*/…/anat/*_T1w.nii.gz)")
    if not found:
        raise ScanError(f"{folder}: a folder that holds neither a DICOM series nor a BIDS data set, nor an image")
    for path in found:
        inside = path.relative_to(folder)
        yield path, _name(path), _clean("_".join([*inside.parts[:-1], _name(path)]))


def bids_heads(dataset: BidsDataset, left_out: dict[str, str], contrast: Contrast = "T1w") -> list[BidsImage]:
    """The images of a contrast in a data set that are in the person's own space.

    What is left out, and why, is put into `left_out`. Raises ScanError where no image is left.
    """
    images, why = dataset.of_contrast(contrast)
    why |= {
        str(image.path): Rightly(
            f"space-{image.template}: resampled; 'brainfm embed' takes derivatives, where in MNI152 space"
        )
        for image in images
        if image.template
    }
    left_out |= why
    heads = [image for image in images if not image.template]
    if not heads:
        such = "".join(f"; {len(why)} left out, such as {path} ({reason})" for path, reason in [*why.items()][:1])
        raise ScanError(
            f"{dataset.root}: a BIDS data set without a {contrast} image of a head in its own space "
            f"(sub-*/…/anat/*_{SUFFIXES[contrast]}.nii.gz){such}"
        )
    return heads


def _images_and_series(folder: Path, files: list[Path], folders: list[Path], prepared: set[Path]) -> list[Path]:
    """Image files and folders of DICOM series, without what is prepared, and what is no T1w image by its name."""
    files = [path for path in files if path.parent not in prepared]
    images = [path for path in files if _IMAGE.search(path.name)]
    others = [path for path in images if _OTHER.search(_stem(path))]
    if others:
        logger.warning("%s: %d left out as no T1w images by name, such as %s", folder, len(others), others[0])
    first: dict[Path, list[Path]] = {}
    for path in files:
        if not _IMAGE.search(path.name) and len(first.setdefault(path.parent, [])) < 5:
            first[path.parent].append(path)
    series = [place for place in folders if _holds_dicom(first.get(place, []))]
    return sorted({*images} - {*others} | {*series})


def _holds_dicom(files: Iterable[Path]) -> bool:
    """Whether there is a DICOM file among a folder's, other than the table of contents of an exported examination."""
    return any(is_dicom(file) for file in files if file.name.upper() != "DICOMDIR")


def _image_of(record: ScanRecord, contrast: Contrast) -> Path | None:
    """The image of a contrast in a manifest's row, by its channel's name; of T1w also the only one that there is."""
    images = {channel.casefold(): image for channel, image in record.images.items()}
    named = [images[channel] for channel in _CHANNELS[contrast] if images.get(channel) is not None]
    if named or contrast != "T1w":
        only = [images[""]] if set(images) == {""} else []
        return next((Path(str(image)) for image in named or only), None)
    if len(images) > 1:
        raise ScanError(f"{record.name}: none of the channels {', '.join(images)} is called t1w; name it t1w_path")
    return Path(str(next(iter(images.values()))))


def _stem(path: Path) -> str:
    return re.sub(r"\.(img(\.gz)?|dcm|ima)$", "", _IMAGE.sub("", path.name), flags=re.IGNORECASE)


def _name(path: Path) -> str:
    return _clean(re.sub(r"_T1w$", "", _stem(path)))


def _longer(path: Path) -> str:
    return _clean(f"{path.absolute().parent.name}_{_name(path)}")


def _clean(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "scan"


def _read(path: Path, contrast: Contrast) -> tuple[NDArray[np.float32], NDArray[np.float64], str]:
    """Voxels [x, y, z], scaled, their affine to RAS mm, and how they were chosen, where there was a choice."""
    if path.is_dir() and not _holds_dicom(path.iterdir()):
        raise ScanError(f"{path}: a folder that holds neither a DICOM series nor a BIDS data set")
    if path.is_dir() or is_dicom(path):
        if contrast != "T1w":
            raise ScanError(f"{path}: DICOM, which is read of T1w scans only; convert it first, such as with dcm2niix")
        from brainfm.prep.dicom import read_dicom  # imports pydicom, which takes long and is needed here alone

        return read_dicom(path)
    stored = read_image(path)
    image = Volume(stored.array[None], None, stored.affine, stored.slope, stored.inter).image[0]
    return image, stored.affine, ""


# --- What it holds --------------------------------------------------------------------------------


def _check(array: NDArray[np.float32], affine: NDArray[np.float64], source: str) -> None:
    if not np.isfinite(array).all():
        raise ScanError(f"{source}: the image holds NaN or infinite values; replace them (0 outside the head)")
    if array.min() == array.max():
        raise ScanError(f"{source}: every voxel has the same value: there is no image; check the file")
    why = why_no_head(array.shape, np.linalg.norm(affine[:3, :3], axis=0).tolist())
    if why:
        raise ScanError(f"{source}: {why}; give the T1w scan of the whole head with the thinnest slices")
    air = float((array < AIR_IN_HOUNSFIELD).mean())
    if air > 0.05:
        raise ScanError(
            f"{source}: {air:.0%} of the voxels are below {AIR_IN_HOUNSFIELD:.0f}, down to {array.min():.0f}: "
            "Hounsfield units of CT, not MR; give the T1w scan"
        )


def _is_stripped(volume: Volume) -> bool:
    """Whether what is not background is one piece of a brain's size."""
    background = volume.stored.min()
    outside = volume.stored[0] == background
    litres = float((~outside).sum()) * abs(float(np.linalg.det(volume.affine[:3, :3]))) / 1e6
    if not STRIPPED_LITRES[0] <= litres <= STRIPPED_LITRES[1]:
        return False
    piece = largest_part(to_itk((~outside).astype(np.uint8), volume.affine))
    return float(to_array(piece)[~outside].mean()) > 0.95
