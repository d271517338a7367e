"""Scans with headers and streams that nobody wrote: the tensor that nibabel's numbers give, or a refusal."""

from __future__ import annotations

import bz2
import gzip
import lzma
import warnings

import nibabel as nib
import numpy as np
import pytest
from fuzzing import File, bounded, damaged, examples, outcome
from hypothesis import given
from hypothesis import strategies as st

import brainfm
from brainfm import BrainfmError, ScanError

NUMBERS = st.sampled_from([0, 1, 2, 3, -1, 40, 255, 348, 352, 540, 1e-30, 1e30, np.inf, -np.inf, np.nan])
# Fields of a NIfTI header that say nothing of voxels and their place.
IDLE = {
    *("descrip", "aux_file", "intent_name", "intent_code", "intent_p1", "intent_p2", "intent_p3", "cal_max", "cal_min"),
    *("slice_start", "slice_end", "slice_duration", "slice_code", "toffset", "xyzt_units", "data_type", "db_name"),
    *("extents", "session_error", "regular", "dim_info", "glmax", "glmin", "unused_str"),
}


@pytest.fixture(scope="module")
def held(small_sample):
    """The small scan in memory: voxels, its mask as 0 and 1, affine."""
    image, mask = map(nib.load, small_sample)
    return np.asarray(image.dataobj), np.asarray(mask.dataobj), image.affine


@pytest.fixture(scope="module")
def load(held, small_spec):
    return lambda image: brainfm.load_scan(image, held[1], spec=small_spec)


@pytest.fixture(scope="module")
def files(held):
    """The small scan as a file of each kind."""
    image, _, affine = held
    made = {kind: kind(image, affine) for kind in (nib.Nifti1Image, nib.Nifti2Image, nib.MGHImage)}
    for nifti in list(made.values())[:2]:
        nifti.set_qform(affine, 1)
    return {kind: image.to_bytes() for kind, image in made.items()}


@st.composite
def with_fields(draw, content, kind):
    """A file some of whose header fields hold other numbers; and which."""
    dtype = kind.header_class.template_dtype.newbyteorder(">" if kind is nib.MGHImage else "<")
    changed = bytearray(content)
    names = draw(st.lists(st.sampled_from(dtype.names), min_size=1, max_size=3, unique=True))
    for name in names:
        field, offset = dtype.fields[name]
        if draw(st.booleans()) or field.base.kind == "S":
            changed[offset : offset + field.itemsize] = draw(
                st.binary(min_size=field.itemsize, max_size=field.itemsize)
            )
        else:
            base = field.base
            place = offset + base.itemsize * draw(st.integers(0, field.itemsize // base.itemsize - 1))
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = np.array(draw(NUMBERS), np.float64).astype(base)
            changed[place : place + base.itemsize] = value.tobytes()
    return File(changed), set(names)


def agrees_with_nibabel(load, path, scan):
    """Whether a scan is what nibabel's own voxels and affine give."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        image = nib.load(path)
        proxy = image.dataobj
        if not proxy.offset:  # of a file without one, nibabel takes the header for voxels
            spec = (proxy.shape, proxy.dtype, image.header.single_vox_offset, proxy.slope, proxy.inter)
            proxy = nib.arrayproxy.ArrayProxy(path, spec)
        voxels = np.asanyarray(proxy).astype(np.float32)
    while voxels.ndim > 3:
        voxels = voxels[..., 0]
    other = load((voxels, image.affine))
    np.testing.assert_allclose(scan.image, other.image, rtol=1e-5, atol=1e-5 * float(np.abs(other.image).max()))
    assert np.array_equal(scan.mask, other.mask)


@pytest.mark.parametrize(
    ("kind", "name"), [(nib.Nifti1Image, "a.nii"), (nib.Nifti2Image, "a.nii"), (nib.MGHImage, "a.mgh")]
)
def test_header_with_other_numbers_gives_what_nibabel_reads_or_a_refusal(kind, name, files, held, load, tmp_path):
    path = tmp_path / name
    path.write_bytes(files[kind])
    expected = load(path)

    @examples(120)
    @given(st.data())
    def fuzz(data):
        content, names = data.draw(with_fields(files[kind], kind))
        path.write_bytes(content)
        scan = outcome(load, path)
        if names <= IDLE:
            assert np.array_equal(scan.image, expected.image)
        if not isinstance(scan, ScanError):
            agrees_with_nibabel(load, path, scan)

    fuzz()


@pytest.mark.parametrize(
    ("kind", "name"), [(nib.Nifti1Image, "a.nii"), (nib.Nifti2Image, "a.nii"), (nib.MGHImage, "a.mgh")]
)
def test_file_with_damaged_bytes_gives_what_nibabel_reads_or_a_refusal(kind, name, files, load, tmp_path):
    path = tmp_path / name

    @examples(80)
    @given(st.data())
    def fuzz(data):
        path.write_bytes(data.draw(damaged(files[kind], where=600)))
        scan = outcome(load, path)
        if not isinstance(scan, ScanError):
            agrees_with_nibabel(load, path, scan)

    fuzz()


def test_consistent_header_of_any_type_scaling_and_axes_gives_the_same_tensor(held, load, small_spec, tmp_path):
    image, mask, affine = held
    expected = load((image, affine)).image
    top = float(expected.max())

    @examples(60)
    @given(st.data())
    def fuzz(data):
        order = data.draw(st.permutations([0, 1, 2]))
        flips = data.draw(st.tuples(*[st.sampled_from([1, -1])] * 3))
        dtype = data.draw(st.sampled_from(["u1", "i2", "i4", "f4", "f8", "u2", "i8"]))
        kind = data.draw(st.sampled_from([nib.Nifti1Image, nib.Nifti2Image]))
        code = data.draw(st.sampled_from([1, 2, 4, 5]))  # 3, Talairach, is refused
        forms = data.draw(st.sampled_from(["sform", "qform", "both"]))
        turn = np.zeros((4, 4))
        turn[3, 3] = 1
        for new, (old, flip) in enumerate(zip(order, flips, strict=True)):
            turn[old, new] = flip
            turn[old, 3] = image.shape[old] - 1 if flip < 0 else 0
        voxels = image.transpose(order)[tuple(slice(None, None, flip) for flip in flips)]
        brain = mask.transpose(order)[tuple(slice(None, None, flip) for flip in flips)]
        slope = 1.0
        if dtype[0] in "ui":
            slope = top / (200 if dtype == "u1" else 20000)
            voxels = np.round(voxels / slope)
        if data.draw(st.booleans()):
            voxels = voxels[..., None]
        order_of_bytes = data.draw(st.sampled_from("<>"))
        header = kind.header_class(endianness=order_of_bytes)
        header.set_data_shape(voxels.shape)
        header.set_data_dtype(dtype)
        header.set_sform(affine @ turn, code if forms != "qform" else 0)
        header.set_qform(affine @ turn, code if forms != "sform" else 0)
        header["scl_slope"], header["scl_inter"] = slope, 0
        least = kind.header_class.single_vox_offset
        header["vox_offset"] = offset = data.draw(st.sampled_from([least, least + 16, 4000]))
        content = header.binaryblock.ljust(offset, b"\0") + voxels.astype(
            np.dtype(dtype).newbyteorder(order_of_bytes)
        ).tobytes(order="F")
        pack = data.draw(st.sampled_from([bytes, gzip.compress, bz2.compress]))
        path = tmp_path / "scan.nii.gz"
        path.write_bytes(pack(content))
        with bounded():
            scan = brainfm.load_scan(path, (brain, affine @ turn), spec=small_spec)
        step = {"u": slope, "i": slope, "f": 1e-6 * top}[dtype[0]]
        assert np.abs(scan.image - expected).max() <= step

    fuzz()


PACKS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("ending", PACKS)
def test_stream_that_is_damaged_gives_the_scan_or_a_refusal(ending, files, load, tmp_path):
    path = tmp_path / f"scan.nii.{ending}"
    content = files[nib.Nifti1Image]
    packed = PACKS[ending](content)
    path.write_bytes(packed)
    expected = load(path).image

    @examples(40)
    @given(st.data())
    def fuzz(data):
        path.write_bytes(data.draw(damaged(packed)))
        scan = outcome(load, path)
        if not isinstance(scan, ScanError):  # all three kinds have checksums
            assert np.array_equal(scan.image, expected)

    fuzz()


@pytest.mark.parametrize("ending", PACKS)
def test_stream_in_several_parts_is_one_scan(ending, files, load, tmp_path):
    path = tmp_path / f"scan.nii.{ending}"
    content = files[nib.Nifti1Image]
    expected = load((path.with_suffix("")).write_bytes(content) and path.with_suffix("")).image

    @examples(15)
    @given(st.data())
    def fuzz(data):
        cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=4)))
        parts = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]
        path.write_bytes(b"".join(map(PACKS[ending], parts)))
        with bounded():
            assert np.array_equal(load(path).image, expected)

    fuzz()


@pytest.mark.parametrize("ending", PACKS)
@pytest.mark.parametrize("where", ["after the voxels", "before them", "as voxels"])
def test_stream_that_inflates_to_gigabytes_is_refused_in_little_memory(ending, where, files, load, tmp_path):
    block = PACKS[ending](bytes(2**24))
    header = bytearray(files[nib.Nifti1Image][:352])
    if where == "before them":
        header[108:112] = np.float32(2**31).tobytes()
    elif where == "as voxels":
        header[42:48] = np.array([600, 600, 600], "<i2").tobytes()  # 864 MB
    path = tmp_path / f"bomb.nii.{ending}"
    content = files[nib.Nifti1Image][352:] if where == "after the voxels" else b""
    path.write_bytes(PACKS[ending](bytes(header) + content) + block * (12 if where == "as voxels" else 400))
    error = outcome(load, path)
    assert isinstance(error, BrainfmError)
    assert "damaged or incomplete" in str(error)
