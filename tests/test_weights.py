"""Reading and fetching weights: what is read, what is refused, and what a download leaves behind."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import struct
import tarfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import brainfm
from brainfm import PretrainedCfg, WeightsError, WeightsNotFoundError
from brainfm.weights import (
    atomic_path,
    cached_weights,
    default_cache_dir,
    find_weights,
    load_checkpoint,
    read_checkpoint,
    save_state,
)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "conv.weight": torch.randn(8, 4, 3, 3, 3, generator=generator),
        "bn.running_var": torch.rand(8, generator=generator),
        "bn.num_batches_tracked": torch.tensor(7),
    }


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[key], value) for key, value in wanted.items())


def prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{key}": value for key, value in state.items()}


def upstream_checkpoint(state: dict[str, torch.Tensor]) -> dict:
    """A checkpoint laid out as the released one: a DDP network and its optimiser's state."""
    projector = {"module.projector.0.weight": torch.ones(2, 2), "module.projector.2.weight": torch.ones(1, 2)}
    moments = {"step": torch.tensor(9.0), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    return {
        "epoch": 150,
        "model_state_dict": prefixed("module.encoder.", state) | projector,
        "optimizer_state_dict": {"state": {0: moments}, "param_groups": [{"lr": 3e-4, "params": [0]}]},
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


def saved(content: object, **kwargs) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **kwargs)
    return buffer.getvalue()


# --- Files that are read ----------------------------------------------------------------------------


def test_safetensors_file_is_read_with_its_metadata(state, tmp_path):
    save_file(state, tmp_path / "w.safetensors", metadata={"made_by": "a test"})
    checkpoint = read_checkpoint(tmp_path / "w.safetensors")
    assert same(checkpoint.state, state)
    assert checkpoint.metadata == {"made_by": "a test"}
    assert checkpoint.dropped == ()


@pytest.mark.parametrize("as_text", [False, True])
def test_name_of_the_file_does_not_matter(as_text, state, tmp_path):
    for name, content in [("weights.tar", saved(state)), ("weights.bin", saved(state))]:
        (tmp_path / name).write_bytes(content)
        assert same(read_checkpoint(str(tmp_path / name) if as_text else tmp_path / name).state, state)
    save_file(state, tmp_path / "weights.pt")
    assert same(read_checkpoint(tmp_path / "weights.pt").state, state)


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
        (gzip.compress(b"a scan, perhaps" * 100), "not a weight file"),
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
        brainfm.weights._check_fit(linear(), state, "w.pt")


def test_half_precision_weights_are_loaded_as_the_model_computes(tmp_path):
    model = linear()
    report = load(model, {key: value.half() for key, value in linear().state_dict().items()}, tmp_path)
    assert model.weight.dtype == torch.float32
    assert torch.equal(model.weight.half(), linear().weight.half())
    assert report.source == report.file == str(tmp_path / "w.safetensors")


# --- Atomic writes ----------------------------------------------------------------------------------


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


# --- Fetching from a URL ----------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append((self.path, wanted))
        content = self.server.files.get(self.path)
        if self.server.refuses:
            self.close_connection = True
        elif content is None:
            self.send_error(404)
        else:
            start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted and self.server.knows_ranges else 0
            self.answer(content, start)

    def answer(self, content: bytes, start: int) -> None:
        part, whole = content[start:], len(content)
        self.send_response((206 if part else 416) if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}" if part else f"bytes */{whole}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.server.drops:
            self.server.drops -= 1
            self.close_connection = True
            part = part[: len(part) // 2]
        self.wfile.write(part)

    def log_message(self, *args) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    """A web server on this machine. It notes requests, and can drop a connection midway or refuse to answer."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None]] = []  # path and Range
        self.drops = 0  # answers to be cut in half
        self.refuses = False
        self.knows_ranges = True


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the attempts of a download
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)  # what is written before the next read
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def released(small_model) -> bytes:
    """A file laid out as the released one, with the packaged test ResNet's weights."""
    return saved(upstream_checkpoint(small_model.state_dict()))


@pytest.fixture
def cfg(server, released) -> PretrainedCfg:
    server.files["/releases/v1/simclr.tar"] = released
    digest = hashlib.sha256(released).hexdigest()
    url = f"{server.url}/releases/v1/simclr.tar"
    return PretrainedCfg(architecture="test_resnet_3d", tag="released", url=url, sha256=digest)


def kept(cache: Path) -> list[str]:
    """What a cache holds beside its locks."""
    return sorted(p.name for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock")


def overlaid(cfg: PretrainedCfg, **changes) -> PretrainedCfg:
    return cfg.overlay({"url": cfg.url, "sha256": cfg.sha256} | changes)


def place_by_hand(server: Server, cfg: PretrainedCfg, cache: Path) -> Path:
    """Where the refusal of an unreachable server says that the file should be put."""
    server.refuses = True
    with pytest.raises(WeightsNotFoundError) as refusal:
        find_weights(cfg, cache)
    server.refuses, server.requests = False, []
    for partial in cache.rglob("*.part"):
        partial.unlink()
    return Path(re.search(r"put the file at (.+?), or", str(refusal.value)).group(1))


def break_off(server: Server, cfg: PretrainedCfg, cache: Path, monkeypatch) -> Path:
    """Start a download whose connection drops midway for good; what came of it."""
    server.drops = 1
    with monkeypatch.context() as patch:
        patch.setattr("time.sleep", lambda seconds: setattr(server, "refuses", True))
        with pytest.raises(WeightsNotFoundError, match="cannot download"):
            find_weights(cfg, cache)
    server.refuses, server.requests = False, []
    [partial] = [p for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock"]
    return partial


def test_url_is_downloaded_once_checked_and_kept_as_safetensors(server, cfg, small_model, tmp_path):
    assert cached_weights(cfg, tmp_path) is None
    path = find_weights(cfg, tmp_path)
    assert path.suffix == ".safetensors"
    assert kept(tmp_path) == [path.name]  # neither the download nor its optimiser's state
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["source"] == cfg.url
    assert metadata["source_sha256"] == cfg.sha256
    assert json.loads(metadata["left_out"]) == ["epoch", "optimizer_state_dict"]
    state = read_checkpoint(path).state
    assert same({k.removeprefix("encoder."): v for k, v in state.items() if "encoder." in k}, small_model.state_dict())
    assert "projector.2.weight" in state

    assert find_weights(cfg, tmp_path) == cached_weights(cfg, tmp_path) == path
    assert len(server.requests) == 1


def test_model_from_a_url_gives_the_embeddings_of_its_weights(server, cfg, small_model, tmp_path):
    x = torch.randn(1, 1, 40, 48, 48)
    for _ in range(2):
        model = brainfm.create_model("test_resnet_3d", pretrained=True, pretrained_cfg=cfg, cache_dir=tmp_path)
        assert torch.equal(model(x), small_model(x))
        assert model.weights_report.source == cfg.url
        assert model.weights_report.dropped == ("projector",)
    assert len(server.requests) == 1


def test_cache_is_where_the_environment_says(server, cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("BRAINFM_CACHE", str(tmp_path / "one"))
    assert find_weights(cfg).parent.parent == tmp_path / "one"
    monkeypatch.delenv("BRAINFM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    assert default_cache_dir() == tmp_path / "two" / "brainfm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "brainfm"


def test_several_callers_at_once_download_once(server, cfg, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: find_weights(cfg, tmp_path), range(4)))
    assert len(paths) == len(server.requests) == 1


def test_wrong_hash_is_refused_and_nothing_is_kept(server, cfg, tmp_path):
    with pytest.raises(WeightsError, match=f"sha256 is {cfg.sha256}, and .* expects {'0' * 64}"):
        find_weights(overlaid(cfg, sha256="0" * 64), tmp_path)
    assert kept(tmp_path) == []
    assert find_weights(overlaid(cfg, sha256=None), tmp_path).is_file()
    assert find_weights(cfg, tmp_path).is_file()


def test_download_that_is_no_checkpoint_is_refused_and_nothing_is_kept(server, cfg, tmp_path):
    server.files["/login"] = b"<!doctype html><html>Sign in</html>"
    with pytest.raises(WeightsError, match="is a web page"):
        find_weights(overlaid(cfg, url=f"{server.url}/login", sha256=None), tmp_path)
    assert kept(tmp_path) == []


def test_url_that_is_not_there_is_refused_and_nothing_is_kept(server, cfg, tmp_path):
    with pytest.raises(WeightsNotFoundError, match=r"\b404\b"):
        find_weights(overlaid(cfg, url=f"{server.url}/gone.tar"), tmp_path)
    assert kept(tmp_path) == []


def test_refused_connection_says_what_to_do_by_hand(cfg, tmp_path, server):
    server.shutdown()
    server.server_close()
    with pytest.raises(WeightsNotFoundError, match="checkpoint_path=") as refusal:
        find_weights(cfg, tmp_path)
    assert f"curl -LO {cfg.url} " in str(refusal.value)
    assert f"put the file at {tmp_path}" in str(refusal.value)


def test_file_put_where_the_refusal_says_is_used(server, cfg, released, tmp_path):
    target = place_by_hand(server, cfg, tmp_path)
    assert target.is_relative_to(tmp_path)
    target.write_bytes(released)
    assert cached_weights(cfg, tmp_path) == target
    path = find_weights(cfg, tmp_path)
    assert path.suffix == ".safetensors"
    assert cached_weights(cfg, tmp_path) == path
    assert target.read_bytes() == released  # it is theirs
    assert server.requests == []


def test_wrong_file_put_there_is_refused_and_left_alone(server, cfg, tmp_path):
    target = place_by_hand(server, cfg, tmp_path)
    target.write_bytes(b"another file")
    with pytest.raises(WeightsError, match=r"simclr\.tar: sha256 is"):
        find_weights(cfg, tmp_path)
    assert kept(tmp_path) == [target.name]
    assert server.requests == []


def test_file_put_there_for_one_url_is_not_taken_for_another(server, cfg, tmp_path):
    places = {place_by_hand(server, overlaid(cfg, url=f"{server.url}/{n}/simclr.tar"), tmp_path) for n in (1, 2)}
    assert len(places) == 2


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_dropped_connection_is_taken_up_again(knows_ranges, server, cfg, tmp_path):
    server.drops, server.knows_ranges = 1, knows_ranges
    path = find_weights(cfg, tmp_path)  # the hash is checked
    assert kept(tmp_path) == [path.name]
    assert [bool(wanted) for _, wanted in server.requests] == [False, True]


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_interrupted_download_goes_on_at_the_next_call(knows_ranges, server, cfg, released, tmp_path, monkeypatch):
    server.knows_ranges = knows_ranges
    size = break_off(server, cfg, tmp_path, monkeypatch).stat().st_size
    assert 0 < size < len(released)
    path = find_weights(cfg, tmp_path)
    assert server.requests == [("/releases/v1/simclr.tar", f"bytes={size}-")]
    assert kept(tmp_path) == [path.name]


def test_complete_leftover_does_not_stay_in_the_way(server, cfg, released, tmp_path, monkeypatch):
    break_off(server, cfg, tmp_path, monkeypatch).write_bytes(released)
    path = find_weights(cfg, tmp_path)
    assert kept(tmp_path) == [path.name]


def test_leftover_longer_than_the_file_does_not_stay_in_the_way(server, cfg, released, tmp_path, monkeypatch):
    break_off(server, cfg, tmp_path, monkeypatch).write_bytes(released + b"and more")
    with contextlib.suppress(WeightsError):  # the first call may refuse it
        find_weights(cfg, tmp_path)
    path = find_weights(cfg, tmp_path)
    assert kept(tmp_path) == [path.name]


def test_leftover_of_another_file_does_not_stay_in_the_way(server, cfg, released, tmp_path, monkeypatch):
    partial = break_off(server, cfg, tmp_path, monkeypatch)
    partial.write_bytes(bytes(partial.stat().st_size))
    with pytest.raises(WeightsError, match="sha256"):
        find_weights(cfg, tmp_path)
    path = find_weights(cfg, tmp_path)
    assert kept(tmp_path) == [path.name]


def test_two_urls_that_end_alike_do_not_share_a_download(server, cfg, tmp_path, monkeypatch):
    torch.manual_seed(1)
    other = brainfm.create_model("test_resnet_3d").state_dict()
    server.files["/elsewhere/simclr.tar"] = saved(upstream_checkpoint(other))
    break_off(server, cfg, tmp_path, monkeypatch)
    elsewhere = overlaid(cfg, url=f"{server.url}/elsewhere/simclr.tar", sha256=None)
    state = read_checkpoint(find_weights(elsewhere, tmp_path)).state
    assert same({k.removeprefix("encoder."): v for k, v in state.items() if "encoder." in k}, other)


def test_two_weights_of_one_architecture_are_kept_apart(server, cfg, tmp_path):
    other = saved({"weight": torch.zeros(100)})
    server.files["/v2/simclr.tar"] = other
    digest = hashlib.sha256(other).hexdigest()
    paths = [find_weights(c, tmp_path) for c in (cfg, overlaid(cfg, url=f"{server.url}/v2/simclr.tar", sha256=digest))]
    assert len({*paths}) == 2
    assert kept(tmp_path) == sorted(p.name for p in paths)


def test_conversion_that_fails_leaves_nothing(server, cfg, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            find_weights(cfg, tmp_path)
    assert kept(tmp_path) == []
    assert find_weights(cfg, tmp_path).is_file()
