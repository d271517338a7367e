"""Files: what is written is written whole or not at all; what is read is known by its digest or its state."""

from __future__ import annotations

import hashlib
import json
import os

import pytest

from brainfm.files import atomic_path, file_git_blob, file_sha256, file_state, one_line, write_json, write_text


@pytest.mark.parametrize("before", [None, "old"])
def test_atomic_write_that_fails_leaves_things_as_they_were(before, tmp_path):
    target = tmp_path / "table.csv"
    if before:
        target.write_text(before)

    def write():
        with atomic_path(target) as temporary:
            temporary.write_text("half of a tab")
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        write()
    assert [p.name for p in tmp_path.iterdir()] == (["table.csv"] if before else [])
    assert not before or target.read_text() == before


def test_atomic_write_replaces_the_file_when_it_is_done(tmp_path):
    target = tmp_path / "new" / "table.csv"
    for text in ("first", "second"):
        with atomic_path(target) as temporary:
            assert (temporary.parent, temporary.suffix) == (target.parent, ".csv")
            temporary.write_text(text)
            assert not target.exists() or target.read_text() == "first"
        assert target.read_text() == text
    assert [p.name for p in target.parent.iterdir()] == ["table.csv"]
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask


def test_text_and_json_are_written_in_utf8_and_whole(tmp_path, monkeypatch):
    write_text(tmp_path / "new" / "a.txt", "Gehirn – 脑")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "Gehirn – 脑".encode()
    write_json(tmp_path / "a.json", {"name": "脑", "values": [1, 2.5, None]})
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"name": "脑", "values": [1, 2.5, None]}
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"values": object()})
    assert json.loads((tmp_path / "a.json").read_bytes())["name"] == "脑"
    assert {path.name for path in tmp_path.iterdir()} == {"new", "a.json"}


@pytest.mark.parametrize("content", [b"", b"hello\n", b"x" * 3_000_000])
def test_digests_are_those_of_the_whole_content(content, tmp_path):
    (tmp_path / "a").write_bytes(content)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    blob = b"blob %d\0" % len(content) + content
    assert file_git_blob(tmp_path / "a") == hashlib.sha1(blob, usedforsecurity=False).hexdigest()


def test_git_blob_is_what_git_says(tmp_path):
    (tmp_path / "a").write_bytes(b"hello\n")
    assert file_git_blob(tmp_path / "a") == "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object


def test_state_of_a_file_changes_with_its_content_and_not_with_how_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("one")
    os.utime(tmp_path / "a", ns=(0, 10))
    before = file_state(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    assert file_state("a") == before == json.loads(json.dumps(before))
    (tmp_path / "a").write_text("two")
    os.utime(tmp_path / "a", ns=(0, 11))
    changed = file_state("a")
    (tmp_path / "a").write_text("three")
    os.utime(tmp_path / "a", ns=(0, 10))
    assert changed != before != file_state("a")
    with pytest.raises(FileNotFoundError):
        file_state("none")


@pytest.mark.parametrize(
    ("message", "line"), [("a\n  b\tc", "a b c"), ("", "ValueError"), ("x" * 500, "x" * 300), (" \n ", "ValueError")]
)
def test_message_becomes_one_line(message, line):
    assert one_line(ValueError(message)) == line
