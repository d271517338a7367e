"""Reading and loading weight files: what is read, what is refused, and what must fit."""

from __future__ import annotations

import argparse
import datetime
import gzip
import importlib
import io
import json
import os
import pickle
import struct
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from weight_files import prefixed, same, saved, upstream_checkpoint

import brainfm
from brainfm import WeightsError, WeightsNotFoundError
from brainfm.weights import load_checkpoint, read_checkpoint, save_state


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "conv.weight": torch.randn(8, 4, 3, 3, 3, generator=generator),
        "bn.running_var": torch.rand(8, generator=generator),
        "bn.num_batches_tracked": torch.tensor(7),
    }


def write_tar(path: Path, files: dict[str, bytes | tarfile.TarInfo], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


# --- Files that are read ----------------------------------------------------------------------------


def test_safetensors_file_is_read_with_its_provenance(state, tmp_path):
    save_state(state, tmp_path / "w.safetensors", {"source": "a test", "left_out": ["epoch"]})
    checkpoint = read_checkpoint(tmp_path / "w.safetensors")
    assert same(checkpoint.state, state)
    assert checkpoint.provenance == {"source": "a test", "left_out": ["epoch"]}
    assert checkpoint.dropped == ()


@pytest.mark.parametrize("text", ["", "{broken", "null", "[1, 2]", "3"])
def test_metadata_that_somebody_else_wrote_is_no_provenance(text, state, tmp_path):
    save_file(state, tmp_path / "w.safetensors", metadata={"made_by": "a test", "provenance": text})
    checkpoint = read_checkpoint(tmp_path / "w.safetensors")
    assert same(checkpoint.state, state)
    assert checkpoint.provenance == {}


@pytest.mark.parametrize("as_text", [False, True])
def test_name_of_the_file_does_not_matter(as_text, state, tmp_path):
    for name, content in [(name, saved(state)) for name in ("weights.tar", "weights.bin", "weights.safetensors")]:
        (tmp_path / name).write_bytes(content)
        assert same(read_checkpoint(str(tmp_path / name) if as_text else tmp_path / name).state, state)
    save_file(state, tmp_path / "weights.pt")
    assert same(read_checkpoint(tmp_path / "weights.pt").state, state)


def test_tensors_that_share_memory_are_saved(tmp_path):
    weight = torch.arange(12.0).reshape(3, 4)
    state = {"a": weight, "b": weight, "c": weight.T}
    save_state(state, tmp_path / "w.safetensors", {})
    assert same(read_checkpoint(tmp_path / "w.safetensors").state, state)


def test_upstream_checkpoint_is_read_without_its_optimiser(state, tmp_path):
    torch.save(upstream_checkpoint(state), tmp_path / "simclr.tar")
    checkpoint = read_checkpoint(tmp_path / "simclr.tar")
    encoder = {k.removeprefix("encoder."): v for k, v in checkpoint.state.items() if k.startswith("encoder.")}
    assert same(encoder, state)
    assert checkpoint.state.keys() - prefixed("encoder.", state).keys() == {
        "projector.0.weight",
        "projector.2.weight",
    }
    assert set(checkpoint.dropped) == {"epoch", "optimizer_state_dict"}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("key", [None, "model_state_dict", "state_dict", "model"])
def test_state_dict_is_found_at_the_top_or_under_the_usual_keys(key, legacy, state, tmp_path):
    content = state if key is None else {key: state, "epoch": 3, "loss": 0.5}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    checkpoint = read_checkpoint(tmp_path / "w.pt")
    assert same(checkpoint.state, state)
    assert checkpoint.dropped == (() if key is None else ("epoch", "loss"))


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "upstream"])
def test_real_tar_that_holds_one_weight_file_is_read(kind, mode, state, tmp_path):
    save_file(state, tmp_path / "w.safetensors")
    content = {
        "zip": saved(state),
        "legacy": saved(state, _use_new_zipfile_serialization=False),
        "safetensors": (tmp_path / "w.safetensors").read_bytes(),
        "upstream": saved({"epoch": 1, "model_state_dict": prefixed("module.", state)}),
    }[kind]
    folder = tarfile.TarInfo("release")
    folder.type = tarfile.DIRTYPE
    path = write_tar(tmp_path / "w.archive", {"release": folder, "release/weights": content}, mode)
    checkpoint = read_checkpoint(path)
    assert same(checkpoint.state, state)
    assert checkpoint.dropped == (("epoch",) if kind == "upstream" else ())
    assert {p.name for p in tmp_path.iterdir()} == {"w.safetensors", "w.archive"}  # nothing was unpacked


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_ddp_and_compile_are_removed(prefix, state, tmp_path):
    torch.save(prefixed(prefix, state), tmp_path / "w.pt")
    save_file(prefixed(prefix, state), tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        assert same(read_checkpoint(tmp_path / name).state, state)


def test_prefix_that_only_some_names_have_is_kept(tmp_path):
    state = {"module.weight": torch.ones(1), "bias": torch.ones(1)}
    torch.save(state, tmp_path / "w.pt")
    assert same(read_checkpoint(tmp_path / "w.pt").state, state)


# --- Files that are refused -------------------------------------------------------------------------


def test_missing_file_and_folder_are_told_apart(tmp_path):
    with pytest.raises(WeightsNotFoundError, match="no such weight file"):
        read_checkpoint(tmp_path / "gone.pt")
    with pytest.raises(WeightsNotFoundError, match="is a folder"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"epoch,loss\n1,0.5\n", "begins with b'epoch,loss"),
        (b"\n  <!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
        (b"<html><head><title>404</title></head></html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n", "git lfs pull"),
        (gzip.compress(b"a scan, perhaps" * 100, mtime=0), "not a weight file"),
        (b"\x80\x02", "damaged"),
        (bytes(2048), "0 files"),
    ],
)
def test_file_that_holds_no_weights_is_refused_with_what_it_is(content, reason, tmp_path):
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(WeightsError, match=reason) as refusal:
        read_checkpoint(tmp_path / "w.pt")
    assert str(tmp_path / "w.pt") in str(refusal.value)
    assert "\n" not in str(refusal.value)


def damaged(content: bytes, how: str) -> bytes:
    """The content cut short, or with 16 bytes in its middle overwritten."""
    if how == "flipped":
        middle = len(content) // 2
        return content[:middle] + b"\xff" * 16 + content[middle + 16 :]
    return content[: {"head": 20, "half": len(content) // 2, "tail": len(content) - 30}[how]]


@pytest.mark.parametrize("how", ["head", "half", "tail", "flipped"])
def test_damaged_zip_checkpoint_is_refused(how, tmp_path):
    content = saved({"weight": torch.randn(5000)})
    assert zipfile.is_zipfile(io.BytesIO(content))
    (tmp_path / "w.pt").write_bytes(damaged(content, how))
    with pytest.raises(WeightsError):
        read_checkpoint(tmp_path / "w.pt")


@pytest.mark.parametrize("how", ["head", "half", "tail"])
def test_zip_that_ends_too_soon_is_told_from_a_file_of_another_kind(how, tmp_path):
    (tmp_path / "w.pt").write_bytes(damaged(saved({"weight": torch.randn(5000)}), how))
    with pytest.raises(WeightsError, match=r"damaged|truncated|incomplete"):
        read_checkpoint(tmp_path / "w.pt")


@pytest.mark.parametrize("how", ["head", "half", "tail"])
def test_truncated_legacy_checkpoint_is_refused(how, tmp_path):
    content = saved({"weight": torch.randn(5000)}, _use_new_zipfile_serialization=False)
    (tmp_path / "w.pt").write_bytes(damaged(content, how))
    with pytest.raises(WeightsError, match="damaged"):
        read_checkpoint(tmp_path / "w.pt")


@pytest.mark.parametrize("how", ["head", "half", "tail"])
def test_truncated_safetensors_file_is_refused(how, state, tmp_path):
    save_file(state, tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(damaged((tmp_path / "w.safetensors").read_bytes(), how))
    with pytest.raises(WeightsError, match="damaged safetensors"):
        read_checkpoint(tmp_path / "w.safetensors")


@pytest.mark.parametrize("compression", ["", "gz", "xz", "bz2"])
@pytest.mark.parametrize("how", ["head", "half", "flipped"])
def test_damaged_tar_archive_is_refused(how, compression, tmp_path):
    path = write_tar(tmp_path / "w.tar", {"w.pt": saved({"weight": torch.arange(20000.0)})}, f"w:{compression}")
    path.write_bytes(damaged(path.read_bytes(), how))
    with pytest.raises(WeightsError):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 400]},  # beyond the end of the file
        {"dtype": "F32", "shape": [400], "data_offsets": [0, 16]},  # larger than its bytes
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},  # backwards
        {"dtype": "X99", "shape": [4], "data_offsets": [0, 16]},  # no such type
    ],
)
def test_safetensors_header_that_lies_is_refused(entry, tmp_path):
    header = json.dumps({"weight": entry}).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(WeightsError, match="damaged safetensors"):
        read_checkpoint(tmp_path / "w.safetensors")


def test_safetensors_header_longer_than_the_file_is_refused(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b'{"weight": {}}')
    with pytest.raises(WeightsError, match="damaged safetensors"):
        read_checkpoint(tmp_path / "w.safetensors")


class Trap:
    """Unpickled carelessly, it makes a folder."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return os.mkdir, (str(self.sentinel),)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "tar"])
def test_pickle_that_would_run_code_is_refused_and_does_not_run(kind, state, tmp_path):
    sentinel = tmp_path / "ran"
    content = {"model": state, "epoch": Trap(sentinel)}
    path = tmp_path / "w.pt"
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"epoch": Trap(sentinel)}, protocol=2))
    elif kind == "tar":
        write_tar(path, {"w.pt": saved(content)})
    else:
        path.write_bytes(saved(content, _use_new_zipfile_serialization=kind == "zip"))
    with pytest.raises(WeightsError):
        read_checkpoint(path)
    assert not sentinel.exists()


@pytest.mark.parametrize("kind", ["trap", "module"])
def test_refusal_of_code_names_what_the_file_asked_for(kind, state, tmp_path):
    content, name = {"trap": (Trap(tmp_path / "ran"), r"\w+\.mkdir"), "module": (nn.Linear(2, 2), r"\w*Linear")}[kind]
    torch.save({"model": state, "other": content}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=rf"refused: .* asks to run [\w.]*{name};.*safetensors"):
        read_checkpoint(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2], "holds a list"),
        (torch.ones(3), "holds a Tensor"),
        ({}, "holds a dict"),
        ({"model": {}}, "holds a dict"),
        ({"epoch": 3, "loss": 0.1}, "epoch, loss are not tensors"),
        ({"weights": {"a": torch.ones(1)}}, r"weights are not tensors; .* model_state_dict, state_dict, model"),
        ({"model": {"a": torch.ones(1), "b": "text"}}, "b are not tensors"),
    ],
)
def test_checkpoint_of_something_else_than_tensors_is_refused(content, reason, tmp_path):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=reason):
        read_checkpoint(tmp_path / "w.pt")


def link(kind: bytes, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo("w.pt")
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "0 files"),
        ({"a.pt": b"1", "b.pt": b"2"}, r"2 files \(a\.pt, b\.pt\)"),
        ({"w.pt": link(tarfile.SYMTYPE, "/etc/passwd")}, "refused: .* link"),
        ({"w.pt": link(tarfile.LNKTYPE, "other.pt")}, "refused: .* link"),
        ({"w.pt": link(tarfile.FIFOTYPE, "")}, "refused"),
        ({"../w.pt": b"1"}, r"refused: .* outside path, '\.\./w\.pt'"),
        ({"a/../../w.pt": b"1"}, "refused: .* outside path"),
        ({"/etc/w.pt": b"1"}, "refused: .* outside path"),
        ({"w.txt": b"some text, and not a checkpoint"}, r"w\.tar:w\.txt: not a PyTorch checkpoint"),
        ({"w.pt": b""}, r"w\.tar:w\.pt"),
    ],
)
def test_tar_that_is_not_one_plain_weight_file_is_refused(files, reason, tmp_path):
    path = write_tar(tmp_path / "w.tar", files)
    with pytest.raises(WeightsError, match=reason):
        read_checkpoint(path)


# --- Loading into a model ---------------------------------------------------------------------------


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def load(model: nn.Module, state: dict[str, torch.Tensor], folder: Path):
    save_file(state, folder / "w.safetensors")
    return load_checkpoint(model, folder / "w.safetensors")


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"weight": torch.ones(2, 3)}, "1 missing: bias$"),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(2), "scale": torch.ones(1)}, "1 unexpected: scale$"),
        ({"weight": torch.ones(2, 4), "bias": torch.ones(2)}, r"1 of another shape: weight \[2, 4\] for \[2, 3\]$"),
        ({"weight": torch.full((2, 3), torch.nan), "bias": torch.ones(2)}, "1 not finite: weight$"),
        ({"weight": torch.ones(2, 3), "bias": torch.tensor([1.0, torch.inf])}, "1 not finite: bias$"),
        (
            {"kernel": torch.ones(2, 3)},
            "this Linear; 2 missing: weight, bias; 1 unexpected: kernel$",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_their_names_and_nothing_is_loaded(state, reason, tmp_path):
    model = linear()
    with pytest.raises(WeightsError, match=reason):
        load(model, state, tmp_path)
    assert same(model.state_dict(), linear().state_dict())


def test_long_lists_of_names_are_cut():
    state = {f"layer{n}": torch.ones(1) for n in range(40)} | linear().state_dict()
    with pytest.raises(WeightsError, match=r"40 unexpected: layer0, layer1, layer2, layer3, …$"):
        brainfm.weights.checkpoint._check_fit(linear(), state, "w.pt")


def test_half_precision_weights_are_loaded_as_the_model_computes(tmp_path):
    model = linear()
    report = load(model, {key: value.half() for key, value in linear().state_dict().items()}, tmp_path)
    assert model.weight.dtype == torch.float32
    assert torch.equal(model.weight.half(), linear().weight.half())
    assert report.source == report.file == str(tmp_path / "w.safetensors")


# --- Names of other programs ----------------------------------------------------------------------


class Options:
    """What a program keeps its options in. Its methods must not run."""

    ran: ClassVar[list[str]] = []

    def __init__(self, **values):
        self.__dict__.update(values)

    def __setstate__(self, state):
        Options.ran.append("setstate")

    def __reduce__(self):
        return make_options, (), {"lr": 0.1}


def make_options():
    Options.ran.append("made")
    return Options()


class Bag(dict):
    """A dictionary of another program's kind."""


@pytest.mark.parametrize("kind", ["zip", "legacy", "tar"])
@pytest.mark.parametrize(
    "foreign",
    [
        Options(lr=0.1),
        Bag(lr=0.1, nested=Bag(a=1)),
        argparse.Namespace(lr=0.1),
        np.float64(0.5),
        Path("x"),
        datetime.datetime(2026, 1, 1),
        [Options(), np.arange(3), {Options: 1}],
    ],
    ids=["object", "mapping", "namespace", "numpy", "path", "date", "list"],
)
def test_options_of_another_program_are_left_out_and_do_not_run(foreign, kind, state, tmp_path):
    content = saved({"state_dict": state, "opts": foreign}, _use_new_zipfile_serialization=kind != "legacy")
    Options.ran.clear()
    path = tmp_path / "w.pt"
    if kind == "tar":
        write_tar(path, {"w.pt": content})
    else:
        path.write_bytes(content)
    found = read_checkpoint(path)
    assert found.state.keys() == state.keys()
    assert all(torch.equal(found.state[name], state[name]) for name in state)
    assert "opts" in found.dropped
    assert Options.ran == []
    if isinstance(foreign, Options | Bag):
        assert any(name.endswith((".make_options", ".Bag")) for name in found.dropped)


@pytest.mark.parametrize(
    "call",
    [
        (eval, ("1",)),
        (os.getcwd, ()),
        (getattr, ({}, "keys")),
        (subprocess.run, (["true"],)),
        (importlib.import_module, ("this",)),
        (pickle.loads, (b"",)),
        (nn.Linear, (2, 2)),
    ],
    ids=lambda call: getattr(call[0], "__name__", ""),
)
def test_what_acts_is_refused_by_name_and_not_bound(call, state, tmp_path):
    class Acts:
        def __reduce__(self):
            return call

    torch.save({"state_dict": state, "opts": Acts()}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"refused: beside tensors the file asks to run"):
        read_checkpoint(tmp_path / "w.pt")
