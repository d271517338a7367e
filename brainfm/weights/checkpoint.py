"""Read a weight file of any kind as data, and load it into a model, strictly. Nothing in it is ever executed."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import logging
import lzma
import os
import pickle
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from brainfm.errors import WeightsError, WeightsNotFoundError
from brainfm.files import atomic_path, one_line
from brainfm.models.encoder import Encoder
from brainfm.pretrained import PretrainedCfg
from brainfm.weights import foreign, keras
from brainfm.zoo.cards import Keys

logger = logging.getLogger("brainfm")

_WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile
_COMPRESSIONS: dict[bytes, Any] = {b"\x1f\x8b": gzip, b"BZh": bz2, b"\xfd7zXZ\0": lzma, b"]\0\0\x80": lzma}
_BLOCK = 2**20
# Numbers of a network hardly shrink; those that do are zeros, of an optimiser that has not begun or in half of float32.
MAX_INFLATION, MAX_INFLATED = 20, 2**26  # times the file's size; bytes of a small one
_STATE_KEYS = ("model_state_dict", "state_dict", "model")  # where checkpoints keep the network


@dataclass(frozen=True)
class Checkpoint:
    """What a weight file holds, read and checked, nothing of it left out but what `dropped` names.

    Attributes:
        state: Tensors by name, the prefixes of DDP and torch.compile removed.
        dropped: What the file holds beside the network, such as "optimizer_state_dict".
        provenance: What a file that brainfm wrote says of itself: "source", its "source_sha256" (and "source_git_blob"
            where that is known), and what was "left_out" of it.
        prefix: What was taken off the names, see `unwrapped`.
    """

    state: dict[str, Tensor]
    dropped: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""


@dataclass(frozen=True)
class WeightsReport:
    """What `create_model` loaded: `model.weights_report`.

    Attributes:
        source: Where the weights came from.
        file: The local file that was read.
        dropped: What the file held that the encoder does not need: a projector, a decoder, an optimiser's state, and a
            classifier of other outputs than were asked for.
    """

    source: str
    file: str
    dropped: tuple[str, ...] = ()


# --- Reading --------------------------------------------------------------------------------------


def read_checkpoint(path: str | os.PathLike[str], take: str | None = None) -> Checkpoint:
    """Read a safetensors file, a `torch.save` checkpoint, Keras weights (.h5), or a tar archive with one checkpoint.

    Args:
        path: The file.
        take: Where a checkpoint keeps the network, see `brainfm.zoo.cards.Keys`; where there is nothing of that name,
            as without one, it is looked for in the usual places.

    Raises:
        WeightsNotFoundError: There is no such file.
        WeightsError: The file is none of these, is damaged, asks to run code, or holds something else than named
            tensors.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder; name the file in it, or use 'local-dir:'" if path.is_dir() else "no such weight file"
        raise WeightsNotFoundError(f"{path}: {what}")
    if _is_safetensors(path):
        return _read_safetensors(path)
    if _is_tar(path):  # before zip: a tar that ends with a zip looks like one
        return _read_tar(path, take)
    try:
        zipped = zipfile.is_zipfile(path)
    except zipfile.BadZipFile as error:  # of several disks, as damaged bytes may say
        raise WeightsError(f"{path}: a damaged checkpoint ({one_line(error)}); fetch or copy it again") from error
    if zipped:
        return _unwrap(_torch_load(path, str(path), _most_bytes(path)), str(path), take)
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(keras.MAGIC):
        return Checkpoint(keras.read_keras(path, _most_bytes(path)))
    if head[:1] == b"\x80":  # a pickle: torch.save's format before 1.6
        return _unwrap(_torch_load(path, str(path), _most_bytes(path)), str(path), take)
    if head.startswith(b"PK\x03\x04"):
        raise WeightsError(f"{path}: an incomplete PyTorch checkpoint: its end is missing; fetch or copy it again")
    found = "is empty" if not head else f"begins with {head[:16]!r}"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        found = "is a web page: the download went to a login or an error page"
    elif head.startswith(b"version https://git-lfs"):
        found = "is a Git LFS pointer; run 'git lfs pull'"
    raise WeightsError(
        f"{path}: not a weight file (safetensors, PyTorch checkpoint or a tar of one, Keras .h5): it {found}"
    )


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:9] == b"{"


def _read_safetensors(path: Path) -> Checkpoint:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load

    try:
        try:
            with safe_open(path, framework="pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError, RuntimeError):  # a file system may map nothing
            state = load(path.read_bytes())
        provenance = _provenance(safetensors_header(path).get("__metadata__"))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{path}: damaged safetensors file ({error}); fetch or copy it again") from error
    return Checkpoint(_stripped(state), (), provenance)


def safetensors_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: its tensors by name, and its metadata.

    Raises OSError where there is none, and ValueError where it is no such file, or not as long as its header says.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        whole = path.stat().st_size
        header = json.loads(file.read(length)) if 8 + length <= whole else None
    if not isinstance(header, dict):
        raise ValueError("it begins with no header")
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if 8 + length + max(ends, default=0) != whole:
        raise ValueError(f"its header says {8 + length + max(ends, default=0)} bytes, and it has {whole}")
    return header


def _provenance(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """What `save_state` wrote, or nothing where somebody else wrote."""
    try:
        said = dict(json.loads((metadata or {}).get("provenance", "{}")))
    except (ValueError, TypeError):
        return {}
    texts = ("architecture", "source", "source_sha256", "source_git_blob")
    known = {key: said[key] for key in texts if isinstance(said.get(key), str)}
    left_out = said.get("left_out")
    if isinstance(left_out, list) and all(isinstance(item, str) for item in left_out):
        known["left_out"] = left_out
    return known


def _is_tar(path: Path) -> bool:
    try:
        with _inflated(path) as stream, tarfile.open(fileobj=stream, mode="r:"):
            return True
    except tarfile.TarError:
        return False
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise WeightsError(f"{path}: damaged compressed archive ({one_line(error)}); fetch it again") from error


@contextmanager
def _inflated(path: Path) -> Iterator[IO[bytes]]:
    """A tar, out of its compression, of which no more is given than `_most_bytes`."""
    with path.open("rb") as file:
        head = file.read(6)
    opener = next((module.open for magic, module in _COMPRESSIONS.items() if head.startswith(magic)), None)
    if opener is None:
        with path.open("rb") as file:
            yield file
    else:
        with opener(path) as packed, io.BufferedReader(_Bounded(packed, _most_bytes(path), str(path))) as stream:
            yield stream


class _Bounded(io.RawIOBase):
    """A stream that raises WeightsError where more than so many of its bytes are asked for and there."""

    def __init__(self, stream: IO[bytes], most: int, name: str) -> None:
        self._stream, self._most, self._name = stream, most, name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._stream.read(min(len(buffer), _BLOCK))
        if self._stream.tell() > self._most:
            raise _inflates(self._name, self._most)
        buffer[: len(content)] = content
        return len(content)

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_CUR:
            place += self.tell()
        if whence == os.SEEK_END or place > self._most:
            raise _inflates(self._name, self._most)
        return self._stream.seek(place)

    def tell(self) -> int:
        return self._stream.tell()


def _most_bytes(path: Path) -> int:
    return max(MAX_INFLATED, MAX_INFLATION * path.stat().st_size)


def _inflates(name: str, most: int) -> WeightsError:
    return WeightsError(
        f"{name}: inflates to more than {most} bytes, as no weights do; if you trust it, unpack it, and load that"
    )


def _read_tar(path: Path, take: str | None) -> Checkpoint:
    """Read the one weight file in a tar, without unpacking it."""
    most = _most_bytes(path)
    try:
        with _inflated(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            members = []
            for member in archive:
                if member.size > most:  # of a sparse one, too, whose zeros are in no stream
                    raise _inflates(f"{path}:{member.name}", most)
                if not member.isdir():
                    members.append(member)
            for member in members:
                if not member.isreg() or member.name.startswith("/") or ".." in Path(member.name).parts:
                    raise WeightsError(
                        f"{path}: refused: a tar archive with a link or an outside path, {member.name!r}"
                    )
            if len(members) != 1:
                names = ", ".join(m.name for m in members[:5]) or "none"
                raise WeightsError(
                    f"{path}: a tar archive with {len(members)} files ({names}); it must hold one weight file"
                )
            name = f"{path}:{members[0].name}"
            file = archive.extractfile(members[0])
            if file is None:
                raise WeightsError(f"{name}: cannot be read")
            head = file.read(9)
            file.seek(0)
            if head[8:9] != b"{":
                return _unwrap(_torch_load(file, name, most), name, take)
            from safetensors import SafetensorError
            from safetensors.torch import load

            try:
                return Checkpoint(_stripped(load(file.read())))
            except SafetensorError as error:
                raise WeightsError(f"{name}: damaged safetensors file ({error})") from error
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(f"{path}: damaged tar archive ({one_line(error)}); fetch it again") from error


def _torch_load(file: Path | IO[bytes], name: str, most: int) -> tuple[Any, tuple[str, ...]]:
    """`torch.load(weights_only=True)`, after the checksums that it does not look at, its long answers made one line.

    Returns:
        What it holds, and the names of other programs in it, which are bound to nothing.
    """
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                _check_inflation(archive, name, most)
                if (member := archive.testzip()) is not None:
                    raise WeightsError(f"{name}: damaged: {member} does not match its checksum; fetch or copy it again")
        if not isinstance(file, Path):
            file.seek(0)
        mmap = isinstance(file, Path) and zipfile.is_zipfile(file)
        with _named_otherwise(file) as (source, mappable):

            def read() -> Any:
                if mmap and mappable:
                    with suppress(RuntimeError, OSError):  # a file system may map nothing
                        return torch.load(source, map_location="cpu", weights_only=True, mmap=True)
                if not isinstance(source, Path):
                    source.seek(0)
                return torch.load(source, map_location="cpu", weights_only=True)

            return foreign.load(read)
    except WeightsError:
        raise
    except pickle.UnpicklingError as error:
        if wanted := foreign.asked_for(error):
            raise WeightsError(
                f"{name}: refused: beside tensors the file asks to run {wanted}; "
                "ask its authors for safetensors or a plain state dict"
            ) from error
        raise WeightsError(f"{name}: not a PyTorch checkpoint, or a damaged one; fetch or copy it again") from error
    except Exception as error:  # the bytes of a damaged file drive torch's and zipfile's readers into anything
        raise WeightsError(
            f"{name}: not a PyTorch checkpoint, or a damaged one ({one_line(error)}); fetch or copy it again"
        ) from error


def _check_inflation(archive: zipfile.ZipFile, name: str, most: int) -> None:
    """Raise WeightsError where the members of a zip take far more than the file, or are packed as torch reads none."""
    members = archive.infolist()
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise WeightsError(
            f"{name}: refused: a TorchScript program, which is not run; ask its authors for safetensors or a plain "
            "state dict"
        )
    for member in members:
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise WeightsError(
                f"{name}: not a PyTorch checkpoint: {member.filename} is compressed as torch.save does not"
            )
    if sum(member.file_size for member in members) > most:
        raise _inflates(name, most)


@contextmanager
def _named_otherwise(file: Path | IO[bytes]) -> Iterator[tuple[Path | IO[bytes], bool]]:
    """The same file, without a name that would make torch (2.13) take it for safetensors; and whether it has one."""
    if isinstance(file, Path) and file.suffix == ".safetensors":
        with file.open("rb") as opened:
            yield opened, False
    else:
        yield file, True


def _unwrap(loaded: tuple[Any, tuple[str, ...]], name: str, take: str | None) -> Checkpoint:
    """The network's tensors out of a checkpoint's dictionary; names of other programs are among what is dropped."""
    content, dropped = loaded
    for key in take.split(".") if take else ():
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            dropped += tuple(str(other) for other in content if other != key)
            content = content[key]
    if isinstance(content, Mapping):
        for key in _STATE_KEYS:
            if isinstance(content.get(key), Mapping):
                dropped += tuple(str(other) for other in content if other != key)
                content = content[key]
                break
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{name}: holds a {type(content).__name__}, not a dictionary of named tensors")
    strange = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if strange:
        raise WeightsError(
            f"{name}: no state dict found: {', '.join(strange[:5])} are not tensors; "
            f"brainfm looks at the top and under {', '.join(_STATE_KEYS)}"
        )
    if odd := [str(key) for key, value in content.items() if not _is_plain(value)]:
        raise WeightsError(
            f"{name}: {', '.join(odd[:5])} are no plain arrays of numbers (sparse, quantised, or without content); "
            "ask its authors for a plain state dict"
        )
    return Checkpoint(_stripped({str(key): value for key, value in content.items()}), dropped)


def _is_plain(value: Tensor) -> bool:
    return value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized


def _stripped(state: dict[str, Tensor], prefixes: Sequence[str] = _WRAPPER_PREFIXES * 2) -> dict[str, Tensor]:
    """A state dict without prefixes, each taken off where every name has it."""
    for prefix in prefixes:
        if all(key.startswith(prefix) for key in state):
            state = {key[len(prefix) :]: value for key, value in state.items()}
    return state


# --- Writing --------------------------------------------------------------------------------------


def save_state(
    state: Mapping[str, Tensor], path: str | os.PathLike[str], provenance: Mapping[str, Any] | None = None
) -> None:
    """Write tensors as safetensors, atomically. The same tensors and provenance give the same file, to the bit."""
    from safetensors.torch import save_file

    with atomic_path(Path(path)) as temporary:
        tensors = {key: value.contiguous().clone() for key, value in state.items()}
        # One entry, because safetensors writes several in an order that changes.
        save_file(tensors, temporary, metadata={"provenance": json.dumps(dict(provenance or {}), sort_keys=True)})


def weights_digest(model: nn.Module) -> str:
    """sha256 of the names and numbers of a module's state: which weights these are, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


# --- Loading --------------------------------------------------------------------------------------


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str], source: str = "") -> WeightsReport:
    """Load a weight file into a model, strictly, after the filter of the model's family (`filter_state_dict`).

    Raises:
        WeightsError: The file cannot be read, its names or shapes are not the model's (they are listed), or it holds
            values that are not finite.
    """
    checkpoint = read_for(model, path)
    state = fitted(model, checkpoint)
    _match_head(model, state)
    _check_fit(model, state, f"{path}, under {checkpoint.prefix!r}" if checkpoint.prefix else str(path))
    model.load_state_dict(state, strict=True)
    unused = sorted({key.split(".")[0] for key in checkpoint.state} - {key.split(".")[0] for key in state})
    report = WeightsReport(source or str(path), str(path), (*unused, *checkpoint.dropped))
    if report.dropped:
        logger.info("%s: left out %s", path, ", ".join(report.dropped))
    return report


def read_for(model: nn.Module, path: str | os.PathLike[str]) -> Checkpoint:
    """A weight file under the names of a model: in the authors' file, those that its cfg gives them (`Keys`).

    A file that has the model's own names, such as one that was trained further, is taken as it is, with its classifier;
    one of a module that the model was trained in, without the prefix, see `unwrapped`. Raises as `read_checkpoint`, and
    WeightsError where the names can be read in two ways.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    keys = cfg.keys if isinstance(cfg, PretrainedCfg) else Keys()
    checkpoint = read_checkpoint(path, keys.take)
    bare = {key.removeprefix(_common_prefix(checkpoint.state)) for key in checkpoint.state}
    try:
        if keys != Keys() and _trunk(model, bare) != _trunk(model, model.state_dict()):
            checkpoint = renamed(checkpoint, keys)
        return unwrapped(checkpoint, model)
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error


def _trunk(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Names without those of an encoder's classifier."""
    head = (f"{model.classifier_name}.",) if isinstance(model, Encoder) else ()
    return {name for name in names if not name.startswith(head)}


def _common_prefix(names: Iterable[str]) -> str:
    """The modules, "net." or "module.encoder.", that all names are in."""
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return "".join(f"{level[0]}." for level in takewhile(lambda level: len(set(level)) == 1, levels))


def unwrapped(checkpoint: Checkpoint, model: nn.Module) -> Checkpoint:
    """A model out of the module that it was trained in, such as `net.` of a LightningModule or `encoder.` of SimCLR.

    A prefix that all names have is taken off. Where the model is under `encoder.` beside other parts, these belong to
    its pretraining (a projector, a decoder), and are left out.

    Raises:
        ValueError: The model is under another prefix beside other parts, or under several.
    """
    state, wanted = checkpoint.state, _trunk(model, model.state_dict())
    common = _common_prefix(state)
    if wanted & state.keys() or any(name.startswith(common) for name in wanted if common):
        return checkpoint
    some = min(wanted, default="")
    ends = {key.removesuffix(some) for key in state if key.endswith(f".{some}")}
    fits = sorted(prefix for prefix in ends if all(prefix + name in state for name in wanted))
    prefix = fits[0] if fits else common
    beside = [key for key in state if not key.startswith(prefix)]
    parts = sorted({key.removeprefix(common).split(".")[0] for key in beside})
    if len(fits) > 1 or (beside and not f".{prefix}".endswith(".encoder.")):
        others = [f"^{re.escape(part)}" for part in sorted({_top(key) for key in beside})]
        keys = {"keys": {"rename": {f"^{re.escape(prefix)}": ""}, "drop": others}}
        places = " and under ".join(map(repr, fits))
        raise ValueError(
            f"the {type(model).__name__} is in it under {places}, beside {_some(parts)}; take one, and leave the rest "
            f"out, by pretrained_cfg_overlay={json.dumps(keys)}"
        )
    inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return replace(checkpoint, state=inside, dropped=(*parts, *checkpoint.dropped), prefix=prefix)


def _top(key: str) -> str:
    """The outermost module of a tensor's name, with its dot."""
    top, dot, _ = key.partition(".")
    return top + dot


def renamed(checkpoint: Checkpoint, keys: Keys) -> Checkpoint:
    """A checkpoint under the network's names, without what the encoder does not need.

    Raises:
        ValueError: Two names become one.
    """
    state: dict[str, Tensor] = {}
    dropped: set[str] = set()
    for key, value in _stripped(checkpoint.state, keys.strip).items():
        name = key
        for pattern, new in keys.rename.items():
            name = re.sub(pattern, new, name)
        if any(re.search(pattern, name) for pattern in keys.drop):
            dropped.add(name.split(".")[0])
        elif name in state:
            raise ValueError(f"by the keys of its card, two of its tensors are named {name}; one of them is {key}")
        else:
            state[name] = value
    return replace(checkpoint, state=state, dropped=(*sorted(dropped), *checkpoint.dropped))


def fitted(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """A checkpoint's tensors as a model's family makes of them what it loads, see `Encoder.filter_state_dict`."""
    family_filter = getattr(model, "filter_state_dict", None)
    return family_filter(checkpoint.state) if callable(family_filter) else dict(checkpoint.state)


def _match_head(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give an encoder the classifier that the file has, or none, so that the rest can be loaded strictly."""
    if not isinstance(model, Encoder):
        return
    weight = state.get(f"{model.classifier_name}.weight")
    classes = len(weight) if weight is not None and weight.ndim >= 2 else 0
    if classes != model.num_classes:
        model.reset_classifier(classes)


def _check_fit(model: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    wanted = model.state_dict()
    faults = [
        ("missing", [key for key in wanted if key not in state]),
        ("unexpected", [key for key in state if key not in wanted]),
        (
            "of another shape",
            [
                f"{key} {list(value.shape)} for {list(wanted[key].shape)}"
                for key, value in state.items()
                if key in wanted and value.shape != wanted[key].shape
            ],
        ),
        (
            "not finite",
            # Only what fits: a small file can hold one number that is expanded to more than memory holds.
            [k for k, v in state.items() if k in wanted and v.shape == wanted[k].shape and not _is_finite(v)],
        ),
    ]
    found = [f"{len(keys)} {what}: {_some(keys)}" for what, keys in faults if keys]
    if found:
        kind = type(model).__name__
        raise WeightsError(f"{name}: these weights do not fit this {kind}; " + "; ".join(found))


def _is_finite(value: Tensor) -> bool:
    if not value.is_floating_point() and not value.is_complex():
        return True
    wide = value.float() if value.element_size() == 1 else value  # torch asks it of no 8 bits
    return bool(wide.isfinite().all())


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
