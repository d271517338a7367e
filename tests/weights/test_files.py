"""What is written: whole or not at all."""

from __future__ import annotations

import os

import pytest
import torch
from weight_files import same

from brainfm.files import atomic_path
from brainfm.weights import read_checkpoint, save_state


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


def test_tensors_that_share_memory_are_saved(tmp_path):
    weight = torch.arange(12.0).reshape(3, 4)
    state = {"a": weight, "b": weight, "c": weight.T}
    save_state(state, tmp_path / "w.safetensors", {})
    assert same(read_checkpoint(tmp_path / "w.safetensors").state, state)
