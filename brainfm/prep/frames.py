"""What a DICOM file says of each of its frames, classic (one frame) or enhanced (many), and their stored numbers.

A header is read by pydicom, and none of it is shown or written but geometry and what words of the standard say. Numbers
that are compressed are decoded by GDCM, in ITK, from a file that holds them and nothing else of the header.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainfm.errors import MissingExtraError, ScanError
from brainfm.prep.image import locale_kept, sitk

try:
    import pydicom
except ModuleNotFoundError as error:
    raise MissingExtraError("pydicom", "prep") from error

from pydicom import config, uid
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels.utils import pixel_array

# What GDCM decodes.
_COMPRESSED = {
    *uid.JPEGTransferSyntaxes,
    *uid.JPEGLSTransferSyntaxes,
    *(uid.JPEG2000Lossless, uid.JPEG2000, uid.RLELossless),
}
# Files of an examination that hold no image though their modality is MR or missing.
_NO_IMAGE = {
    uid.MediaStorageDirectoryStorage,
    uid.RawDataStorage,
    uid.MRSpectroscopyStorage,
    "1.3.12.2.1107.5.9.1",  # Siemens' own
}
_FORM = ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation")


@dataclass(frozen=True)
class Kind:
    """What the frames of one image share: frames that differ in any of it belong to several images.

    Attributes:
        series: The UID of the series.
        modality: "MR" for magnetic resonance, and where the header does not say.
        types: The words of ImageType, or of an enhanced frame's FrameType and ComplexImageComponent.
        sequence: SE (spin echo), GR (gradient echo), IR (inversion recovery), EP (echo-planar), as ScanningSequence.
        contrast: AcquisitionContrast of an enhanced frame, a word of the standard, or "".
        angiography: Whether it was acquired to show vessels.
        echo_ms: Echo time.
        repetition_ms: Repetition time.
        inversion_ms: Inversion time.
        stack: Of an enhanced frame.
        time_point: TemporalPositionIndex of an enhanced frame, TemporalPositionIdentifier of another.
        grey: Whether there is one number a voxel.
        text: Descriptions of series and protocol. They may name a person: they are never shown.
    """

    series: str = field(repr=False)
    modality: str
    types: frozenset[str] = field(repr=False)
    sequence: frozenset[str] = field(repr=False)
    contrast: str = field(repr=False)
    angiography: bool
    echo_ms: float | None
    repetition_ms: float | None
    inversion_ms: float | None
    stack: str = field(repr=False)
    time_point: str = field(repr=False)
    grey: bool
    text: str = field(repr=False)


@dataclass(frozen=True, eq=False)
class Plane:
    """Where a frame lies.

    Attributes:
        position: Of its first voxel, LPS mm [3].
        along: Unit vectors along a row and down a column, LPS [2, 3].
        spacing: Between rows and between columns, mm [2].
        thickness: From a lone frame to where the next would be, mm.
    """

    position: NDArray[np.float64]
    along: NDArray[np.float64]
    spacing: NDArray[np.float64]
    thickness: float


@dataclass(frozen=True, eq=False)
class Frame:
    """One slice.

    Attributes:
        file: That holds it.
        number: Of the frame in the file, from 0.
        lone: Whether the file holds no other.
        size: Columns and rows.
        kind: What it shows.
        plane: Where it lies; None where the header does not say.
        slope: What its stored numbers are multiplied with.
        inter: What is added then.
    """

    file: Path
    number: int
    lone: bool
    size: tuple[int, int]
    kind: Kind
    plane: Plane | None
    slope: float
    inter: float

    @property
    def name(self) -> str:
        """Of its file, and which of its frames it is."""
        return self.file.name if self.lone else f"{self.file.name} (frame {self.number + 1})"


@contextmanager
def silence() -> Iterator[None]:
    """Keep pydicom from printing what it finds odd, which quotes headers, and ITK from changing the locale."""
    logger, mode = logging.getLogger("pydicom"), config.settings.reading_validation_mode
    before, logger.disabled, config.settings.reading_validation_mode = logger.disabled, True, config.IGNORE
    try:
        with warnings.catch_warnings(), locale_kept():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled, config.settings.reading_validation_mode = before, mode


def frames_of(file: Path) -> list[Frame]:
    """The frames of a DICOM file, with a preamble or without; none of a file that holds no image, as a report.

    Raises:
        ScanError: It is damaged, or encoded in a private way.
    """
    dataset = _opened(file)
    with _damage_named(file):
        return _frames(dataset, file)


def stored_numbers(file: Path, numbers: list[int]) -> list[NDArray[Any]]:
    """The stored numbers [row, column] of some of a file's frames.

    Raises:
        ScanError: They are fewer than the header says, or compressed in a way that is not known.
    """
    dataset = _opened(file)
    with _damage_named(file):
        syntax = dataset.file_meta.TransferSyntaxUID
        if not syntax.is_encapsulated:
            return [pixel_array(dataset, raw=True, index=number) for number in numbers]
        if syntax not in _COMPRESSED:
            raise ScanError(
                f"{file}: compressed as {syntax.name}, which is not read here; decompress it first, for example with "
                "dcm2niix"
            )
        return [_decompressed(dataset, number) for number in numbers]


@contextmanager
def _damage_named(file: Path) -> Iterator[None]:
    """Whatever pydicom or GDCM make of a damaged file, whose words may quote the header, is one refusal."""
    try:
        yield
    except (ScanError, OSError, MemoryError):
        raise
    except Exception:
        raise ScanError(f"{file}: a damaged DICOM file; export it again") from None


def _opened(file: Path) -> Dataset:
    """A file's elements. No more memory is taken than it has bytes, whatever it says of its lengths."""
    content = file.read_bytes()
    with _damage_named(file):
        dataset: Dataset = pydicom.dcmread(BytesIO(content), force=True)
        syntax = uid.UID(str(dataset.file_meta.get("TransferSyntaxUID", "")))
        if not syntax:
            implicit, little = dataset.original_encoding
            syntax = uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian
            dataset.file_meta.TransferSyntaxUID = syntax if little else uid.ExplicitVRBigEndian
        elif syntax.is_private or syntax.type != "Transfer Syntax":
            raise ScanError(
                f"{file}: encoded in a maker's own way (a private transfer syntax); export it again, uncompressed"
            )
        for tag in list(dataset.keys()):
            element: Any = dataset.get_item(tag)
            if isinstance(element, RawDataElement) and element.length not in (0xFFFFFFFF, len(element.value or b"")):
                raise ScanError(f"{file}: a damaged DICOM file: an element is longer than the file; export it again")
    return dataset


def _frames(dataset: Dataset, file: Path) -> list[Frame]:
    modality = str(dataset.get("Modality") or "MR")
    if "PixelData" not in dataset:
        if (
            modality != "MR"
            or dataset.get("SOPClassUID", dataset.file_meta.get("MediaStorageSOPClassUID")) in _NO_IMAGE
        ):
            return []
        raise ScanError(f"{file}: a damaged DICOM file: it ends before its image; export it again")
    count, own = int(dataset.get("NumberOfFrames") or 1), dataset.get("PerFrameFunctionalGroupsSequence") or []
    if count > 1 and count != len(own):
        raise ScanError(
            f"{file}: a DICOM file of {count} frames that does not say where each lies; export it again, as MR images"
        )
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    return [
        _frame(_Header(dataset, [group, shared]), file, number, count == 1)
        for number, group in enumerate(own or [Dataset()])
    ]


@dataclass(frozen=True, eq=False)
class _Header:
    """What a file says of one frame: of this one, of all its frames together, or of the file."""

    dataset: Dataset
    groups: list[Dataset]

    def value(self, sequence: str, name: str) -> Any:
        for group in self.groups:
            found = (group.get(sequence) or [Dataset()])[0].get(name)
            if found is not None:
                return found
        return self.dataset.get(name)

    def number(self, sequence: str, *names: str) -> float | None:
        """The first of some names that holds a number; of times to 0.01 ms."""
        for name in names:
            found = self.value(sequence, name)
            found = found[0] if isinstance(found, (list, pydicom.multival.MultiValue)) and found else found
            try:
                return round(float(found), 2)
            except (TypeError, ValueError):
                continue
        return None

    def vector(self, sequence: str, name: str, count: int) -> NDArray[np.float64]:
        values = np.array(self.value(sequence, name), dtype=np.float64)
        if values.shape != (count,) or not np.isfinite(values).all():
            raise ValueError(name)
        return values

    def words(self, sequence: str, name: str) -> frozenset[str]:
        found = self.value(sequence, name) or []
        return frozenset(str(word).upper() for word in ([found] if isinstance(found, str) else found))


def _frame(header: _Header, file: Path, number: int, lone: bool) -> Frame:
    dataset = header.dataset
    scaling = [header.value("PixelValueTransformationSequence", name) for name in ("RescaleSlope", "RescaleIntercept")]
    slope, inter = (float(default if value is None else value) for value, default in zip(scaling, (1, 0), strict=True))
    size = int(dataset.Columns), int(dataset.Rows)
    return Frame(file, number, lone, size, _kind(header), _plane(header), slope, inter)


def _kind(header: _Header) -> Kind:
    dataset = header.dataset
    frame_type = "MRImageFrameTypeSequence"
    types = header.words(frame_type, "FrameType") | header.words(frame_type, "ComplexImageComponent")
    sequence = header.words("", "ScanningSequence")
    said = {
        "SE": dataset.get("EchoPulseSequence") in ("SPIN", "BOTH"),
        "GR": dataset.get("EchoPulseSequence") in ("GRADIENT", "BOTH"),
        "EP": dataset.get("EchoPlanarPulseSequence") == "YES",
        "IR": header.value("MRModifierSequence", "InversionRecovery") == "YES",
    }
    timing = "MRTimingAndRelatedParametersSequence"
    time_point = header.value("FrameContentSequence", "TemporalPositionIndex")
    return Kind(
        series=str(dataset.get("SeriesInstanceUID", "")),
        modality=str(dataset.get("Modality") or "MR"),
        types=types or header.words("", "ImageType"),
        sequence=sequence | {word for word, is_so in said.items() if is_so},
        contrast=str(header.value(frame_type, "AcquisitionContrast") or "").upper(),
        angiography=dataset.get("AngioFlag") == "Y",
        echo_ms=header.number("MREchoSequence", "EffectiveEchoTime", "EchoTime"),
        repetition_ms=header.number(timing, "RepetitionTime"),
        inversion_ms=header.number("MRModifierSequence", "InversionTimes", "InversionTime"),
        stack=str(header.value("FrameContentSequence", "StackID") or ""),
        time_point=str(dataset.get("TemporalPositionIdentifier", "") if time_point is None else time_point),
        grey=int(dataset.get("SamplesPerPixel", 1)) == 1
        and dataset.get("PhotometricInterpretation") != "PALETTE COLOR",
        text=f"{dataset.get('SeriesDescription', '')} {dataset.get('ProtocolName', '')}".casefold(),
    )


def _plane(header: _Header) -> Plane | None:
    measures = "PixelMeasuresSequence"
    try:
        thickness = header.number(measures, "SliceThickness") or 1.0
        return Plane(
            header.vector("PlanePositionSequence", "ImagePositionPatient", 3),
            header.vector("PlaneOrientationSequence", "ImageOrientationPatient", 6).reshape(2, 3),
            header.vector(measures, "PixelSpacing", 2),
            abs(header.number(measures, "SpacingBetweenSlices") or thickness),
        )
    except (TypeError, ValueError):
        return None


def _decompressed(dataset: Dataset, number: int) -> NDArray[Any]:
    """A frame as GDCM decodes it: of a file made of nothing but its numbers and their form."""
    bare, syntax = Dataset(), dataset.file_meta.TransferSyntaxUID
    for name in _FORM:
        setattr(bare, name, dataset[name].value)
    bare.SamplesPerPixel, bare.PhotometricInterpretation = 1, "MONOCHROME2"
    bare.SOPClassUID, bare.SOPInstanceUID = uid.MRImageStorage, uid.generate_uid()
    frame = get_frame(dataset.PixelData, number, number_of_frames=int(dataset.get("NumberOfFrames") or 1))
    bare.PixelData = encapsulate([frame])
    bare["PixelData"].VR = "OB"
    bare["PixelData"].is_undefined_length = True
    bare.file_meta = FileMetaDataset()
    bare.file_meta.TransferSyntaxUID = syntax
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "frame.dcm")
        bare.save_as(path, enforce_file_format=True)
        stored: NDArray[Any] = sitk.GetArrayFromImage(sitk.ReadImage(str(path), imageIO="GDCMImageIO"))
    return stored.reshape(stored.shape[-2:])
