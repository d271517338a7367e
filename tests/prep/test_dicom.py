"""DICOM: enhanced files of many frames, compressed files, and the T1w image among several."""

from __future__ import annotations

import logging
import struct

import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from test_source import AXIAL, NAME, SAGITTAL, brightest, write_series

from brainfm.errors import ScanError
from brainfm.prep.image import affine_of, sitk, to_array
from brainfm.prep.source import find_sources, read_source

SHAPE = (28, 30, 26)


@pytest.fixture
def array():
    """Voxels [columns, rows, slice] of 4 mm."""
    return np.random.default_rng(0).integers(0, 200, SHAPE).astype(np.uint16)


def item(**values):
    made = Dataset()
    for name, value in values.items():
        setattr(made, name, value)
    return made


def frame(
    pixels, z, *, along=AXIAL, step=4.0, off=0.0, kind="M", component="MAGNITUDE", echo=3.0, slope=1, inter=0, **content
):
    """Pixels [row, column] of a frame, and what its own functional groups say."""
    position = np.array((-80.0, -90, -70)) + z * step * np.cross(along[:3], along[3:]) + off * np.array(along[:3])
    groups = item(
        PlanePositionSequence=[item(ImagePositionPatient=[float(f"{mm:.6f}") for mm in position])],
        PlaneOrientationSequence=[item(ImageOrientationPatient=list(along))],
        PixelMeasuresSequence=[item(PixelSpacing=[4, 4], SliceThickness=4, SpacingBetweenSlices=-4)],
        PixelValueTransformationSequence=[item(RescaleSlope=slope, RescaleIntercept=inter, RescaleType="US")],
        MRImageFrameTypeSequence=[item(FrameType=["ORIGINAL", "PRIMARY", "T1", kind], ComplexImageComponent=component)],
        MREchoSequence=[item(EffectiveEchoTime=echo)],
        FrameContentSequence=[item(StackID="1", InStackPositionNumber=z + 1, **content)],
    )
    return pixels, groups


def stack(array, **said):
    return [frame(array[:, :, z].T, z, **said) for z in range(array.shape[2])]


def write_enhanced(path, frames, syntax=uid.ExplicitVRLittleEndian, **said):
    """An enhanced MR file of frames, with a patient's name."""
    made = item(
        SOPClassUID=uid.EnhancedMRImageStorage,
        SOPInstanceUID=uid.generate_uid(entropy_srcs=[path.name]),
        SeriesInstanceUID="1.2.3.4",
        PatientName=NAME,
        SeriesDescription=f"T1 of {NAME}",
        Modality="MR",
        ImageType=["ORIGINAL", "PRIMARY", "T1", "MIXED"],
        EchoPulseSequence="GRADIENT",
        NumberOfFrames=len(frames),
        Rows=frames[0][0].shape[0],
        Columns=frames[0][0].shape[1],
        **{"SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16, "BitsStored": 12},
        **{"HighBit": 11, "PixelRepresentation": 0},
        SharedFunctionalGroupsSequence=[item(MRTimingAndRelatedParametersSequence=[item(RepetitionTime=8)])],
        PerFrameFunctionalGroupsSequence=[groups for _, groups in frames],
        PixelData=np.stack([pixels for pixels, _ in frames])
        .astype("<u2" if syntax.is_little_endian else ">u2")
        .tobytes(),
    )
    for name, value in said.items():
        setattr(made, name, value)
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = syntax
    path.parent.mkdir(exist_ok=True)
    made.save_as(path, enforce_file_format=True)
    return path


def refused(path):
    with pytest.raises(ScanError) as refusal:
        read_source(path)
    assert NAME not in str(refusal.value)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


# --- Enhanced files -------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [4.0, -4.0])
@pytest.mark.parametrize("along", [AXIAL, SAGITTAL, (0.6, 0.8, 0, 0, 0, -1)])
def test_enhanced_file_lies_where_each_frame_says_in_whatever_order(along, step, array, tmp_path):
    column, row, z = 7, 11, 19
    array[column, row, z] = 1000
    frames = stack(array, along=along, step=step)
    order = np.random.default_rng(1).permutation(len(frames))
    head = read_source(write_enhanced(tmp_path / "scan.dcm", [frames[n] for n in order]))
    lps = np.array((-80, -90, -70)) + z * step * np.cross(along[:3], along[3:])
    lps = lps + 4 * column * np.array(along[:3]) + 4 * row * np.array(along[3:])
    assert np.allclose(brightest(head), lps * (-1, -1, 1), atol=1e-3)
    assert np.sort(to_array(head.image), axis=None).tolist() == np.sort(array, axis=None).tolist()


def test_enhanced_file_is_the_same_head_by_name_in_its_folder_and_as_a_classic_series(array, tmp_path, capfd):
    file = write_enhanced(tmp_path / "enhanced" / "T1.dcm", stack(array))
    heads = [read_source(path) for path in (file, file.parent, write_series(tmp_path / "classic", array))]
    for head in heads:
        assert np.array_equal(to_array(head.image), to_array(heads[0].image))
        assert np.allclose(affine_of(head.image), affine_of(heads[0].image), atol=1e-6)
        assert "DICOM" not in head.found
    assert [source.name for source in find_sources([file])] == ["T1"]
    assert NAME not in "".join(capfd.readouterr())


# What each maker writes in an enhanced T1w file, without private elements: the grid [columns, rows, frames]; mm along a
# row, down a column, from slice to slice; its axes; what all frames share and what each says of itself.
MAKERS = {
    "Hyperfine: thick axial slices, all but their positions shared": (
        (112, 136, 36),
        (1.6, 1.6, 5.0),
        (0.9925, 0.0872, 0.0861, -0.1045, 0.9703, 0.2181),
        {
            "PixelMeasuresSequence": {"PixelSpacing": [1.6, 1.6], "SliceThickness": 5, "SpacingBetweenSlices": 5},
            "MRImageFrameTypeSequence": {"FrameType": ["ORIGINAL", "PRIMARY", "T1", "NONE"]},
            "MRTimingAndRelatedParametersSequence": {"RepetitionTime": 1500, "EchoTrainLength": 24},
            "MREchoSequence": {"EffectiveEchoTime": 6.2},
            "MRModifierSequence": {"InversionRecovery": "YES", "InversionTimes": 300},
        },
        {},
        {"Manufacturer": "Hyperfine", "EchoPulseSequence": "SPIN", "MagneticFieldStrength": 0.064},
    ),
    "Siemens XA: sagittal, no distance between slices": (
        (48, 64, 44),
        (3.9, 3.9, 4.1),
        (0.0349, 0.9992, 0.0199, -0.0122, 0.0203, -0.9997),
        {
            "MRTimingAndRelatedParametersSequence": {"RepetitionTime": 2300, "FlipAngle": 9},
            "MRModifierSequence": {"InversionRecovery": "YES"},
        },
        {
            "PixelMeasuresSequence": {"PixelSpacing": [3.9, 3.9], "SliceThickness": 4.1},
            "MREchoSequence": {"EffectiveEchoTime": 2.98},
            "MRImageFrameTypeSequence": {
                "FrameType": ["ORIGINAL", "PRIMARY", "M", "NONE"],
                "ComplexImageComponent": "MAGNITUDE",
            },
        },
        {"Manufacturer": "Siemens Healthineers", "EchoPulseSequence": "GRADIENT", "AcquisitionContrast": "T1"},
    ),
    "Philips: coronal, slices that overlap": (
        (60, 56, 50),
        (3.5, 3.75, 3.2),
        (0.9986, 0.0523, 0, 0.0261, -0.4993, -0.866),
        {"MRTimingAndRelatedParametersSequence": {"RepetitionTime": 8.1}},
        {
            "PixelMeasuresSequence": {"PixelSpacing": [3.75, 3.5], "SliceThickness": 6.4, "SpacingBetweenSlices": 3.2},
            "MREchoSequence": {"EffectiveEchoTime": 3.7},
            "PixelValueTransformationSequence": {"RescaleSlope": 1, "RescaleIntercept": 0},
            "MRImageFrameTypeSequence": {
                "FrameType": ["ORIGINAL", "PRIMARY", "M_FFE", "M"],
                "ComplexImageComponent": "MAGNITUDE",
                "AcquisitionContrast": "T1",
            },
        },
        {"Manufacturer": "Philips", "EchoPulseSequence": "GRADIENT"},
    ),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_enhanced_file_of_each_maker_lies_where_its_frames_say_to_a_thousandth_of_a_millimetre(maker, tmp_path):
    shape, mm, axes, shared, own, said = MAKERS[maker]
    along = np.linalg.qr(np.reshape(axes, (2, 3)).T)[0].T
    along *= np.sign((along * np.reshape(axes, (2, 3))).sum(axis=1))[:, None]  # right angles to the last digit
    step, start = mm[2] * np.cross(*along), np.array((-83.217, -101.46, -64.875))
    array = np.random.default_rng(0).integers(0, 200, shape).astype(np.uint16)
    marked = [(3, 5, 2), (shape[0] - 4, 9, 4), (6, shape[1] - 3, 7), (10, 12, shape[2] - 2)]
    for number, voxel in enumerate(marked):
        array[voxel] = 1000 + number

    def groups(said):
        return item(**{name: [item(**values)] for name, values in said.items()})

    orientation = {"PlaneOrientationSequence": {"ImageOrientationPatient": [f"{x:.9f}" for x in along.ravel()]}}
    shared, own = (shared | orientation, own) if not own else (shared, own | orientation)
    frames = []
    for z in range(shape[2])[::-1]:
        place = {"ImagePositionPatient": [f"{x:.6f}" for x in start + z * step]}
        counted = {"StackID": "1", "InStackPositionNumber": z + 1, "DimensionIndexValues": [1, z + 1]}
        of_this = {"PlanePositionSequence": place, "FrameContentSequence": counted}
        frames.append((array[:, :, z].T, groups(own | of_this)))
    said = said | {"ImageType": ["ORIGINAL", "PRIMARY", "T1", "NONE"]}
    file = write_enhanced(tmp_path / "T1.dcm", frames, SharedFunctionalGroupsSequence=[groups(shared)], **said)
    head = read_source(file)
    voxels, affine = to_array(head.image), affine_of(head.image)
    for number, (column, row, z) in enumerate(marked):
        lps = start + along[0] * mm[0] * column + along[1] * mm[1] * row + z * step
        (place,) = np.argwhere(voxels == 1000 + number)
        np.testing.assert_allclose(affine[:3, :3] @ place + affine[:3, 3], lps * (-1, -1, 1), atol=1e-3)


def test_each_frame_is_scaled_as_it_says(array, tmp_path):
    frames = [frame(array[:, :, z].T, z, slope=0.5 + z, inter=-z) for z in range(SHAPE[2])]
    head = read_source(write_enhanced(tmp_path / "scan.dcm", frames))
    expected = array * (0.5 + np.arange(SHAPE[2])) - np.arange(SHAPE[2])
    assert np.allclose(to_array(head.image), expected[::-1, ::-1])


PARTS = {
    "phase": {"kind": "P", "component": "PHASE"},
    "real part": {"kind": "R", "component": "REAL"},
    "field map": {"kind": "FIELD_MAP", "component": "REAL"},
    "an echo time of 40 ms": {"echo": 40.0},
}


@pytest.mark.parametrize("what", PARTS)
def test_magnitude_is_taken_of_an_enhanced_file_and_what_else_it_holds_is_not(what, array, tmp_path, caplog):
    other = stack(array + 1000, **PARTS[what])
    file = write_enhanced(
        tmp_path / "scan.dcm", [each for two in zip(other, stack(array), strict=True) for each in two]
    )
    with caplog.at_level(logging.WARNING, "brainfm"):
        head = read_source(file)
    assert np.array_equal(to_array(head.image), array[::-1, ::-1])
    chosen = "1 file of 28×30×26 voxels of 4×4×4 mm, the only one of 2 DICOM images that can be T1w"
    assert chosen in caplog.text
    assert head.found.endswith("; the only one of 2 DICOM images that can be T1w")
    assert what.split(" of ")[0] in refused(write_enhanced(tmp_path / "alone.dcm", other))


@pytest.mark.parametrize("said", [{"echo": 5.0}, {"TemporalPositionIndex": 2}])
def test_enhanced_file_of_several_magnitudes_is_refused_with_each(said, array, tmp_path):
    message = refused(write_enhanced(tmp_path / "scan.dcm", stack(array) + stack(array[:, :, 1:], **said)))
    assert "2 DICOM images, of which 2 can be the T1w one" in message
    assert "1 file of 28×30×26 voxels of 4×4×4 mm; 1 file of 28×30×25 voxels of 4×4×4 mm" in message


MISPLACED = {
    "is missing": (lambda frames: frames[:9] + frames[10:], r"from 4.00 to 8.00 mm, as between scan.dcm (frame 9) and"),
    "is twice": (lambda frames: [*frames, frames[3]], "lie at the same place"),
    "is beside": (
        lambda frames: [*frames[:9], frame(frames[9][0], 9, off=9), *frames[10:]],
        "(frame 10) lies 9.00 mm from",
    ),
    "is turned": (lambda frames: [*frames[:9], frame(frames[9][0], 9, along=SAGITTAL), *frames[10:]], "not parallel"),
    "lies nowhere": (lambda frames: [*frames[:9], (frames[9][0], Dataset()), *frames[10:]], "does not say where"),
}


@pytest.mark.parametrize("name", MISPLACED)
def test_enhanced_file_whose_frame_is_refused_by_its_number(name, array, tmp_path):
    change, words = MISPLACED[name]
    frames = change(stack(array))
    if name == "lies nowhere":  # of the same kind, and without a place
        frames[9] = frame(frames[9][0], 9)
        del frames[9][1].PlanePositionSequence
    assert words in refused(write_enhanced(tmp_path / "scan.dcm", frames))


def test_frames_that_do_not_say_where_they_lie_are_refused(array, tmp_path):
    file = write_enhanced(tmp_path / "scan.dcm", stack(array), PerFrameFunctionalGroupsSequence=[])
    assert "26 frames that does not say where each lies" in refused(file)


# --- Compressed and otherwise encoded -------------------------------------------------------------


@pytest.mark.parametrize("compressor", ["JPEG", "JPEG2000", "RLE"])
def test_compressed_series_is_read_as_the_stored_one(compressor, array, tmp_path):
    usual = read_source(write_series(tmp_path / "usual", array))
    folder = write_series(tmp_path / "compressed", array, compressor=compressor)
    syntaxes = {pydicom.dcmread(file, stop_before_pixels=True).file_meta.TransferSyntaxUID for file in folder.iterdir()}
    assert all(syntax.is_compressed for syntax in syntaxes)
    assert np.array_equal(to_array(read_source(folder).image), to_array(usual.image))


@pytest.mark.parametrize("syntax", [uid.RLELossless, uid.JPEGLSLossless], ids=["RLE", "JPEG-LS"])
def test_compressed_enhanced_file_is_read_frame_by_frame(syntax, array, tmp_path):
    frames = stack(array)[::-1]
    file = write_enhanced(tmp_path / "scan.dcm", frames)
    usual = to_array(read_source(file).image)
    made = pydicom.dcmread(file)
    made.compress(syntax)
    made.save_as(file)
    assert np.array_equal(to_array(read_source(file).image), usual)


@pytest.mark.parametrize(
    "syntax", [uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian, uid.DeflatedExplicitVRLittleEndian]
)
def test_every_uncompressed_encoding_is_read_as_the_usual_one(syntax, array, tmp_path):
    usual = read_source(write_enhanced(tmp_path / "usual.dcm", stack(array)))
    again = read_source(write_enhanced(tmp_path / "scan.dcm", stack(array), syntax))
    assert np.array_equal(to_array(again.image), to_array(usual.image))
    assert np.array_equal(affine_of(again.image), affine_of(usual.image))


@pytest.mark.parametrize(
    ("syntax", "words"),
    [("1.2.840.113619.5.2", "a private transfer syntax"), (uid.HTJ2KLossless, "High-Throughput JPEG 2000")],
)
def test_unknown_encoding_is_refused_by_name(syntax, words, array, tmp_path):
    file = write_enhanced(tmp_path / "scan.dcm", stack(array))
    made = pydicom.dcmread(file)
    made.compress(uid.RLELossless)
    made.file_meta.TransferSyntaxUID = uid.UID(syntax)
    made.save_as(file, implicit_vr=False, little_endian=True)
    assert words in refused(file)


# --- Damaged --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0.02, 0.3, 0.7, 0.999])
def test_cut_enhanced_file_is_refused(kept, array, tmp_path):
    file = write_enhanced(tmp_path / "scan.dcm", stack(array))
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    assert "damaged DICOM file" in refused(file)


def test_length_that_the_file_does_not_have_takes_no_memory(array, tmp_path):
    file = write_enhanced(tmp_path / "scan.dcm", stack(array))
    content = file.read_bytes()
    at = content.index(b"\xe0\x7f\x10\x00OW\0\0") + 8
    file.write_bytes(content[:at] + struct.pack("<I", 2**32 - 16) + content[at + 4 :])
    assert "an element is longer than the file" in refused(file)


def test_image_of_another_size_than_its_header_is_refused(array, tmp_path):
    assert "damaged" in refused(write_enhanced(tmp_path / "scan.dcm", stack(array), Rows=60000, Columns=60000))


# --- Several images in a folder -------------------------------------------------------------------


def with_tags(shape, **tags):
    """The same tags for each slice, as `write_series` takes them."""
    return {f"n{z}": tags for z in range(shape[2])}


OTHERS = {
    "a localizer": {"0008|0008": "ORIGINAL\\PRIMARY\\LOCALIZER"},
    "phase": {"0008|0008": "ORIGINAL\\PRIMARY\\P\\ND"},
    "diffusion": {"0008|0008": "DERIVED\\PRIMARY\\DIFFUSION\\ADC\\ND"},
    "reformatted": {"0008|0008": "DERIVED\\SECONDARY\\MPR"},
    "echo time of 90 ms": {"0018|0081": "90", "0018|0020": "SE"},
    "echo time of 20 ms": {"0018|0081": "20", "0018|0020": "GR"},
    "repetition time 3000 ms": {"0018|0081": "12", "0018|0080": "3000", "0018|0020": "SE"},
    "echo-planar": {"0018|0020": "EP\\GR"},
    "vessels": {"0018|0025": "Y"},
    "CT": {"0008|0060": "CT"},
    "another by its description": {"0008|103e": f"Ax T2 of {NAME}"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_t1w_series_is_taken_where_it_alone_can_be_it(name, array, tmp_path, caplog):
    mprage = {"0008|0008": "ORIGINAL\\PRIMARY\\M\\ND", "0018|0081": "3", "0018|0080": "2300", "0018|0020": "GR\\IR"}
    folder = write_series(tmp_path / "all", array + 1000, series="1", **with_tags(SHAPE, **OTHERS[name]))
    write_series(folder, array, series="2", **with_tags(SHAPE, **mprage))
    (folder / "notes.txt").write_text("nothing")
    with caplog.at_level(logging.WARNING, "brainfm"):
        head = read_source(folder)
    assert np.array_equal(to_array(head.image), array[::-1, ::-1])
    assert "26 files of 28×30×26 voxels of 4×4×4 mm, the only one of 2 DICOM images that can be T1w" in caplog.text
    assert NAME not in caplog.text + head.found


def test_slab_and_what_is_not_parallel_are_no_candidates(array, tmp_path):
    folder = write_series(tmp_path / "all", array[:, :, :10], series="1")
    write_series(folder, array, series="2")
    write_series(folder, array, series="3", n4={"0020|0037": "\\".join(map(str, SAGITTAL))})
    assert np.array_equal(to_array(read_source(folder).image), array[::-1, ::-1])


def test_folder_where_none_can_be_the_t1w_image_is_refused_with_each_reason(array, tmp_path):
    folder = write_series(tmp_path / "all", array[:, :, :10], series="1")
    write_series(folder, array, series="2", **with_tags(SHAPE, **OTHERS["echo time of 90 ms"]))
    message = refused(folder)
    assert "2 DICOM images, of which none can be the T1w one: 10 files of 28×30×10 voxels" in message
    assert "(a slab: 10 slices of 4 mm cover 40 mm" in message
    assert "(an echo time of 90 ms, too long for T1w); put the T1w one's files" in message


def test_two_that_can_both_be_the_t1w_image_are_refused_whatever_their_descriptions(array, tmp_path):
    folder = write_series(tmp_path / "all", array, series="1")
    write_series(folder, array, series="2", **with_tags(SHAPE, **{"0008|103e": "MPRAGE Gd"}))
    assert "of which 2 can be the T1w one" in refused(folder)


def test_files_without_an_image_are_no_part_of_a_series(array, tmp_path):
    folder = write_series(tmp_path / "all", array)
    usual = read_source(folder)
    for name, said in {
        "report": {"Modality": "SR", "SOPClassUID": uid.BasicTextSRStorage},
        "raw": {"Modality": "MR", "SOPClassUID": uid.RawDataStorage},
    }.items():
        made = item(**said, SOPInstanceUID="1.2.3", PatientName=NAME)
        made.file_meta = FileMetaDataset()
        made.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
        made.save_as(folder / name, enforce_file_format=True)
        made.save_as(tmp_path / name, enforce_file_format=True)
        assert "DICOM without an image" in refused(tmp_path / name)
    assert np.array_equal(to_array(read_source(folder).image), to_array(usual.image))
    assert sitk.Hash(read_source(folder).image) == sitk.Hash(usual.image)
