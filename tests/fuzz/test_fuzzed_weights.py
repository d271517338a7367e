"""Weight files that nobody wrote: the tensors that were saved, or a refusal; nothing in them is run."""

from __future__ import annotations

import bz2
import collections
import gzip
import io
import json
import lzma
import pickle
import pickletools
import struct
import tarfile
import zipfile

import pytest
import torch
from fuzzing import ODD, damaged, examples, outcome
from hypothesis import example, given
from hypothesis import strategies as st

import brainfm
from brainfm import BrainfmError
from brainfm.weights import load_checkpoint, read_checkpoint

STATE = {"conv.weight": torch.arange(24.0).reshape(2, 3, 4), "conv.bias": torch.ones(2), "n": torch.tensor(3)}


def same(state):
    return state.keys() == STATE.keys() and all(torch.equal(state[key], value) for key, value in STATE.items())


def load(path):
    """Read a file, and load it into a network that it does not fit: all of its tensors are looked at."""
    checkpoint = read_checkpoint(path)
    assert all(isinstance(value, torch.Tensor) for value in checkpoint.state.values())
    refused = outcome(load_checkpoint, torch.nn.Linear(2, 2), path)
    assert isinstance(refused, BrainfmError)
    return checkpoint.state


# --- safetensors ----------------------------------------------------------------------------------


def safetensors(header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", (len(text) if length is None else length) % 2**64) + text + data


@st.composite
def headers(draw):
    """A safetensors header of which a few numbers are others, and its data."""
    numbers = st.sampled_from([0, 1, 4, 8, 24, 2**31, 2**63, 2**64, -1, 1.5, None, "4"])
    header = {}
    for name in draw(st.lists(st.sampled_from(["a", "b", "a.weight", "__metadata__", "", "\0"]), max_size=3)):
        begin = draw(st.integers(0, 16))
        entry = {
            "dtype": draw(st.sampled_from(["F32", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "C64", "F4", "U16", "x", 1]))
        }
        entry["shape"] = draw(st.lists(st.integers(0, 4) | numbers, max_size=4))
        entry["data_offsets"] = draw(st.just([begin, begin + 16]) | st.lists(numbers, max_size=3))
        header[name] = draw(st.just(entry) | ODD)
    return safetensors(header, bytes(32), draw(st.none() | numbers.filter(lambda n: isinstance(n, int))))


def test_safetensors_of_any_header_are_tensors_or_a_refusal(tmp_path):
    from safetensors.torch import save

    path = tmp_path / "model.safetensors"
    whole = save(STATE, {"provenance": "{}"})
    twice = (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
    )

    @examples(150)
    @given(headers() | damaged(whole, where=300))
    @example(safetensors(twice, bytes(8)))
    @example(safetensors(b"{" + b" " * 1000, b""))
    @example(safetensors(b'{"a":' * 5000, b""))
    @example(safetensors({"a": {"dtype": "F32", "shape": [2**40, 0], "data_offsets": [0, 0]}}, b""))
    def fuzz(content):
        path.write_bytes(content)
        outcome(load, path)

    fuzz()
    path.write_bytes(whole)
    assert same(load(path))


# --- Checkpoints of PyTorch -----------------------------------------------------------------------


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def rezipped(content, changed, compression=zipfile.ZIP_STORED):
    """A checkpoint whose members are others; checksums are right."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", compression, compresslevel=1) as new:
        for name in old.namelist():
            new.writestr(name, changed(name, old.read(name)))
    return file.getvalue()


ODD_CHECKPOINTS = {
    "expanded to a terabyte": {"a": torch.zeros(1).expand(2**20, 2**20)},
    "sparse": {"a": torch.eye(3).to_sparse()},
    "sparse, a terabyte": {
        "a": torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.int64), torch.ones(1), (2**20, 2**20))
    },
    "compressed rows": {"a": torch.eye(3).to_sparse_csr()},
    "quantised": {"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)},
    "on no device": {"a": torch.empty(3, device="meta")},
    "on no device, a terabyte": {"a": torch.empty(2**40, device="meta")},
    "complex": {"a": torch.ones(3, dtype=torch.complex64)},
    "eight bits": {"a": torch.ones(3).to(torch.float8_e4m3fn)},
    "nested": {"a": {"b": torch.ones(1)}},
    "no names": [torch.ones(1)],
    "numbers for names": {1: torch.ones(1), None: torch.ones(1)},
    "one name twice": {1: torch.ones(1), "1": torch.zeros(1)},
    "a set": {"state_dict": {1, 2}},
    "ordered": collections.OrderedDict(a=torch.ones(1)),
    "a network": torch.nn.Linear(2, 2),
    "wrapped a hundred times": {"module." * 100 + "a": torch.ones(1)},
    "holds itself": (lambda d: d.update(state_dict=d) or d)({}),
    "parameter": {"a": torch.nn.Parameter(torch.ones(1))},
    "no axes": {"a": torch.tensor(1.0)},
    "nothing in it": {"a": torch.empty(0, 3)},
}


@pytest.mark.parametrize("kind", ODD_CHECKPOINTS)
@pytest.mark.filterwarnings("ignore")
def test_odd_checkpoint_is_tensors_or_a_refusal(kind, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(ODD_CHECKPOINTS[kind], path)
    outcome(load, path)
    for name in ("test_resnet_3d", "test_vit_3d"):
        refused = outcome(brainfm.create_model, name, checkpoint_path=path)
        assert isinstance(refused, BrainfmError)


class Runs:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return eval, (self.command,)


@pytest.mark.filterwarnings("ignore")
def test_checkpoint_of_any_bytes_is_tensors_or_a_refusal(tmp_path):
    path, ran = tmp_path / "model.pt", tmp_path / "ran"
    whole = saved(STATE)
    opcodes = st.sampled_from([opcode.code.encode("latin-1") for opcode in pickletools.opcodes])
    code = f"open({str(ran)!r}, 'w')"

    def with_pickle(changed):
        return rezipped(whole, lambda name, old: changed(old) if name.endswith("data.pkl") else old)

    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        original = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    streams = damaged(original) | st.lists(opcodes | st.binary(max_size=3), max_size=20).map(b"".join).map(
        lambda b: b"\x80\x02" + b + b"."
    )
    legacy = io.BytesIO()
    torch.save(STATE, legacy, _use_new_zipfile_serialization=False)

    @examples(150)
    @given(
        damaged(whole)
        | streams.map(lambda stream: with_pickle(lambda _: stream))
        | streams
        | damaged(legacy.getvalue())
        | st.sampled_from(["version", "byteorder", ".format_version"]).flatmap(
            lambda member: st.binary(max_size=6).map(
                lambda value: rezipped(whole, lambda name, old: value if name.endswith(member) else old)
            )
        )
    )
    @example(with_pickle(lambda _: pickle.dumps(Runs(code), 2)))
    @example(pickle.dumps(Runs(code), 2))
    @example(with_pickle(lambda _: b"\x80\x02" + b"(" * 100_000 + b"."))
    @example(with_pickle(lambda _: b"\x80\x02X\xff\xff\xff\x7f."))
    @example(with_pickle(lambda _: b"\x80\x02]" + b"2a" * 50_000 + b"."))
    @example(with_pickle(lambda _: b"\x80\x02X."))  # struct.error
    @example(whole[:-22] + b"PK\x06\x07" + struct.pack("<LQL", 0, 0, 2) + whole[-22:])  # a zip of two disks
    def fuzz(content):
        path.write_bytes(content)
        outcome(load, path)
        assert not ran.exists()

    fuzz()
    path.write_bytes(whole)
    assert same(load(path))


@pytest.mark.filterwarnings("ignore")
def test_archive_of_any_bytes_is_tensors_or_a_refusal(tmp_path):
    path = tmp_path / "model.tar"
    archives = {}
    for mode in ("w", "w:gz", "w:bz2", "w:xz"):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode=mode) as archive:
            member = tarfile.TarInfo("model.pt")
            content = saved(STATE)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        archives[mode] = file.getvalue()

    @examples(60)
    @given(st.sampled_from(list(archives.values())).flatmap(damaged))
    def fuzz(content):
        path.write_bytes(content)
        outcome(load, path)

    fuzz()
    for content in archives.values():
        path.write_bytes(content)
        assert same(load(path))


# --- Archives that inflate ------------------------------------------------------------------------

BLOCK = bytes(2**24)
MANY = 48  # blocks: 768 MB


def header(name, size, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def zeros(size):
    """A safetensors file of zeros, without the zeros."""
    return safetensors({"a": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}, b"")


def bomb(kind):
    """A small file that says it is a weight file of 768 MB, or of a terabyte, and holds zeros."""
    size = MANY * len(BLOCK)
    if kind == "deflated checkpoint":
        changed = lambda name, old: bytes(size) if name.endswith("data/0") else old  # noqa: E731
        return rezipped(saved(STATE), changed, zipfile.ZIP_DEFLATED)
    if kind == "sparse tar":
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
            info = tarfile.TarInfo("w.safetensors")
            content = b"1\n0\n512\n".ljust(512, b"\0") + zeros(size).ljust(512, b" ")
            said = {"major": 1, "minor": 0, "name": "w.safetensors", "realsize": len(zeros(size)) + size}
            info.pax_headers = {f"GNU.sparse.{key}": str(value) for key, value in said.items()}
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        return file.getvalue()
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[kind.split()[-1]]
    first = zeros(size)
    begin = {
        "member": header("w.safetensors", len(first) + size) + first,
        "second": header("a.pt", 512) + bytes(512) + header("b.pt", 2**40),
        "header": header("././@PaxHeader", size, tarfile.XHDTYPE),
        "nested": header("w.pt", size),
    }[kind.split()[0]]
    return pack(begin) + pack(BLOCK) * MANY * (6 if kind.startswith("second") else 1) + pack(bytes(20480))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind",
    [
        "deflated checkpoint",
        "sparse tar",
        "member gz",
        "member xz",
        "second bz2",
        "header gz",
        "header bz2",
        "nested gz",
    ],
)
def test_small_archive_that_inflates_to_much_is_refused_in_little_memory(kind, tmp_path):
    path = tmp_path / "model.tar"
    path.write_bytes(bomb(kind))
    refused = outcome(brainfm.create_model, "test_resnet_3d", checkpoint_path=path)
    assert isinstance(refused, BrainfmError)
    assert "inflates to more than" in str(refused)


def test_archive_of_many_zeros_is_read_where_it_is_small(tmp_path):
    state = {"a": torch.zeros(2**22), "b": torch.arange(4)}
    path = tmp_path / "model.tar"
    packed = rezipped(saved(state), lambda name, old: old, zipfile.ZIP_DEFLATED)
    for content in (saved(state), packed):
        with tarfile.open(path, "w:gz") as archive:
            info = tarfile.TarInfo("model.pt")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        assert torch.equal(read_checkpoint(path).state["b"], torch.arange(4))
        path.write_bytes(content)
        assert torch.equal(read_checkpoint(path).state["a"], state["a"])
