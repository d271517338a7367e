"""Folders of DICOM files that no scanner wrote: the head that they hold, or a refusal without a word of the header."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from fuzzing import damaged, examples, outcome
from hypothesis import given
from hypothesis import strategies as st

from brainfm import BrainfmError

sitk = pytest.importorskip("SimpleITK")

NAME = "DOE^JANE"
SLICES = 26


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """The files of a series of axial slices of 4 mm, by name."""
    folder = tmp_path_factory.mktemp("series")
    array = np.random.default_rng(0).integers(1, 200, (26, 26, SLICES)).astype(np.int16)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for z in range(SLICES):
        image = sitk.GetImageFromArray(array[:, :, z].T[None])
        image.SetSpacing((4.0, 4.0, 4.0))
        tags = {"0010|0010": NAME, "0008|0060": "MR", "0020|000d": "1.2.3", "0020|000e": "1.2.3.4"}
        tags |= {"0008|0018": f"1.2.3.4.{z + 1}", "0020|0013": str(z + 1)}
        tags |= {"0020|0032": f"-50\\-50\\{-50 + 4 * z}", "0020|0037": "1\\0\\0\\0\\1\\0"}
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{z:03}.dcm"))
        writer.Execute(image)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@st.composite
def with_values(draw, content):
    """A file some of whose values have other text in their place, of the same length."""
    for old in draw(
        st.lists(
            st.sampled_from([b"-50\\-50", b"1\\0\\0\\0\\1\\0", b"MR", b"1.2.3.4", b"4\\4", b"1.2.840"]), max_size=2
        )
    ):
        new = draw(st.sampled_from([b"nan", b"1e9", b"\\", b"0", b"-1", b"99999", b"\0", b"x", b"CT"]))
        content = content.replace(old, (new * len(old))[: len(old)])
    return content


def test_series_with_damaged_files_is_a_head_or_a_refusal(series, tmp_path, capfd):
    from brainfm.prep.source import read_source, source_sha256

    def written(files):
        folder = tmp_path / "scan"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return folder

    whole = outcome(read_source, written(series)).image
    expected = sitk.GetArrayFromImage(whole)

    @examples(40)
    @given(st.data())
    def fuzz(data):
        files = dict(series)
        for name in data.draw(st.lists(st.sampled_from(list(series)), min_size=1, max_size=3, unique=True)):
            kind = data.draw(st.sampled_from(["damaged", "damaged", "values", "values", "gone", "twice", "another"]))
            if kind == "damaged":
                files[name] = data.draw(damaged(files[name], where=700))
            elif kind == "values":
                files[name] = data.draw(with_values(files[name]))
            elif kind == "gone":
                del files[name]
            elif kind == "twice":
                files[f"copy-{name}"] = files[name]
            else:
                files[f"note-{name}.txt"] = data.draw(st.binary(max_size=200))
        folder = written(files)
        head = outcome(read_source, folder)
        assert not isinstance(outcome(source_sha256, folder), BrainfmError)
        if isinstance(head, BrainfmError):
            assert NAME not in str(head)
        elif all(files.get(name) == content for name, content in series.items()):
            pixels = sitk.GetArrayFromImage(head.image)
            assert pixels.shape == expected.shape
            assert np.array_equal(pixels, expected)

    fuzz()
    said = capfd.readouterr()
    assert NAME not in said.out + said.err


def test_all_slices_with_other_values_are_a_head_or_a_refusal(series, tmp_path):
    from brainfm.prep.source import read_source

    @examples(20)
    @given(st.data())
    def fuzz(data):
        folder = tmp_path / "scan"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        place, value = data.draw(st.integers(0, 700)), data.draw(st.integers(0, 255))
        for name, content in series.items():
            changed = bytearray(data.draw(st.just(content)))
            changed[place] = value
            (folder / name).write_bytes(changed)
        outcome(read_source, folder)

    fuzz()
