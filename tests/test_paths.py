"""Names of files as tables write them and disks spell them, and what a walk through a folder passes over."""

import os
import sys
import unicodedata
from pathlib import Path

import pytest

from brainfm import ScanError
from brainfm.manifest import list_scans
from brainfm.paths import path_of, printable, walk_folder

NFC, NFD = (unicodedata.normalize(form, "Zoë/Ärzte é.nii") for form in ("NFC", "NFD"))
posix = pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux alone")


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.mark.parametrize(
    "text",
    ["a/b c.nii", "'a/b c.nii'", '"a/b c.nii"', "./a/b c.nii", "{folder}/a/b c.nii", "file://{folder}/a/b%20c.nii"],
)
def test_field_names_the_file_in_every_way_people_write_it(text, tmp_path):
    path = touch(tmp_path / "a" / "b c.nii")
    assert path_of(text.format(folder=tmp_path), tmp_path) == path


@posix
def test_backslashes_of_a_relative_path_are_taken_for_what_they_mean(tmp_path):
    path = touch(tmp_path / "sub-01" / "anat" / "a.nii")
    assert path_of("sub-01\\anat\\a.nii", tmp_path) == path


@posix
@pytest.mark.parametrize("text", ["C:\\data\\a.nii", "d:/data/a.nii", "\\\\server\\share\\a.nii"])
def test_path_of_windows_is_named_as_one_with_its_row(text, tmp_path):
    (tmp_path / "scans.csv").write_text(f"image_path\na.nii\n{text}\n")
    with pytest.raises(
        ScanError, match=r"scans\.csv, row 3: .*a path of Windows, and this is another system"
    ) as caught:
        list_scans(tmp_path / "scans.csv")
    assert text in str(caught.value)


@posix
@pytest.mark.parametrize(("listed", "stored"), [(NFC, NFD), (NFD, NFC)], ids=["NFC for NFD", "NFD for NFC"])
def test_accents_are_found_however_the_disk_spells_them(listed, stored, tmp_path):
    path = touch(tmp_path / stored)
    (tmp_path / "scans.csv").write_text(f"image_path\n{listed}\n")
    assert [record.image for record in list_scans(tmp_path / "scans.csv")] == [str(path)]
    assert [record.image for record in list_scans([str(tmp_path / listed)])] == [str(path)]
    assert [record.image for record in list_scans(str(tmp_path / listed))] == [str(path)]


@posix
@pytest.mark.parametrize("content", ["é.nii".encode("latin-1"), "é.nii".encode("latin-1") + "\nü.nii".encode()])
def test_name_in_latin_1_is_found_by_a_table_of_such_names(content, tmp_path):
    names = [os.fsdecode("é.nii".encode("latin-1")), "ü.nii"][: 1 + content.count(b"\n")]
    for name in names:
        touch(tmp_path / name)
    (tmp_path / "scans.csv").write_bytes(b"image_path\n" + content)
    assert [record.image for record in list_scans(tmp_path / "scans.csv")] == [str(tmp_path / name) for name in names]


def test_name_that_is_not_utf_8_is_written_so_that_it_reads_back():
    name = os.fsdecode(b"caf\xe9.nii")
    assert printable(name) == "caf\\udce9.nii"
    assert path_of(printable(name), Path("data")) == Path("data") / name
    assert printable("café.nii") == "café.nii"
    assert printable("a\0b") == "a\ufffdb"


def test_walk_passes_over_what_systems_keep_for_themselves(tmp_path):
    kept = touch(tmp_path / "p1" / "A.NII.GZ")
    for name in (
        ".DS_Store",
        "p1/._A.NII.GZ",
        ".git/annex/b.nii",
        "__MACOSX/p1/a.nii",
        ".Trashes/c.nii",
        "@eaDir/d.nii",
    ):
        touch(tmp_path / name)
    files, folders, closed = walk_folder(tmp_path)
    assert (files, folders, closed) == ([kept], [tmp_path, tmp_path / "p1"], {})


@posix
def test_walk_is_in_the_order_of_paths_and_has_what_links_lead_to_once(tmp_path):
    names = ("b/z.nii", "b-1/a.nii", "b.nii", "b/c/y.nii", "b c/x.nii", "a/x.nii")
    made = [touch(tmp_path / name) for name in names]
    for link, place in (("0", "b"), ("b/back", "."), ("b/gone", "nothing"), ("b/itself", "b/itself")):
        (tmp_path / link).symlink_to(tmp_path / place)
    files, folders, closed = walk_folder(tmp_path)
    assert files == sorted(made)
    assert folders == sorted({tmp_path, *(path.parent for path in made)})
    assert closed == {str(tmp_path / "b" / name): "a link that leads nowhere" for name in ("gone", "itself")}
