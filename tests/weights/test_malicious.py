"""Attacks in every container that the zoo's authors used: nothing runs, nothing is left, the refusal is one line."""

from __future__ import annotations

import builtins
import functools
import importlib
import io
import json
import operator
import os
import pickle
import runpy
import shutil
import subprocess
import tarfile
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from weight_files import prefixed, same, saved

import brainfm
from brainfm import BrainfmError
from brainfm.registry import get_pretrained_cfg, list_pretrained
from brainfm.weights import read_checkpoint

STATE = {"conv.weight": torch.arange(6.0).reshape(2, 3), "conv.bias": torch.ones(2)}


class Call:
    """What a pickle calls where it is read without care."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Named:
    """A name in a pickle, whatever it is bound to, called with arguments and given a state."""

    def __init__(self, module, name, arguments=(), state=None):
        self.module, self.name, self.arguments, self.state = module, name, arguments, state


class Pickler(pickle._Pickler):
    """Writes the names of `Named` as they stand, whether there is such a thing or not."""

    def save(self, thing, save_persistent_id=True):
        if not isinstance(thing, Named):
            return super().save(thing, save_persistent_id)
        self.write(pickle.GLOBAL + f"{thing.module}\n{thing.name}\n".encode())
        super().save(thing.arguments)
        self.write(pickle.REDUCE)
        if thing.state is not None:
            super().save(thing.state)
            self.write(pickle.BUILD)
        return None


class Forging:
    """What `torch.save` is given as its pickle module."""

    Pickler = Pickler
    dumps, dump, load, loads, Unpickler = pickle.dumps, pickle.dump, pickle.load, pickle.loads, pickle.Unpickler


def code(trace):
    return f"__import__('os').mkdir({str(trace)!r})"


# Each makes the folder `trace` where it runs.
ATTACKS = {
    "reduce": lambda trace: Call(os.mkdir, str(trace)),
    "os.system": lambda trace: Call(os.system, f"mkdir {trace}"),
    "subprocess": lambda trace: Call(subprocess.Popen, ["mkdir", str(trace)]),
    "eval": lambda trace: Call(builtins.eval, code(trace)),
    "exec": lambda trace: Call(builtins.exec, code(trace)),
    "import": lambda trace: Call(importlib.import_module, "antigravity"),
    "runpy": lambda trace: Call(runpy.run_path, str(trace)),
    "rmtree": lambda trace: Call(shutil.rmtree, str(trace.parent)),
    "nested pickle": lambda trace: Call(pickle.loads, pickle.dumps(Call(os.mkdir, str(trace)))),
    "nested in lists": lambda trace: [{"a": ({"b": [Call(os.mkdir, str(trace))]},)}],
    "partial": lambda trace: functools.partial(os.mkdir, str(trace)),
    "methodcaller": lambda trace: Call(operator.methodcaller, "mkdir", str(trace)),
    "getattr": lambda trace: Named("builtins", "getattr", ("", "join")),
    "argument of a stand-in": lambda trace: Named("lab.code", "Net", (Call(os.mkdir, str(trace)),)),
    "state of a stand-in": lambda trace: Named("lab.code", "Net", (), {"x": Call(os.mkdir, str(trace))}),
    "stand-in by a dotted name": lambda trace: Named("collections", "abc.sys.modules", (str(trace),)),
    "python 2's name": lambda trace: Named("__builtin__", "eval", (code(trace),)),
    "python 2's commands": lambda trace: Named("commands", "getoutput", (f"mkdir {trace}",)),
    "ours": lambda trace: Named("brainfm.files", "write_text", (str(trace), "ran")),
    "torch's": lambda trace: Named("torch.storage", "_load_from_bytes", (pickle.dumps(Call(os.mkdir, str(trace))),)),
    "torch's hub": lambda trace: Named("torch.hub", "load", (str(trace.parent), "net")),
    "numpy's": lambda trace: Named("numpy", "load", (str(trace), None, True)),
    "memory": lambda trace: Named("builtins", "bytearray", (10**15,)),
}

# As each program writes its own: where in it the attack hides.
CONTAINERS = {
    "state dict": lambda state, bad: {**state, "extra": bad},
    "checkpoint": lambda state, bad: {"model_state_dict": state, "optimizer_state_dict": {"state": {0: bad}}},
    "DataParallel": lambda state, bad: {"state_dict": prefixed("module.", state), "args": bad},
    "Lightning": lambda state, bad: {
        "state_dict": prefixed("model.", state),
        "pytorch-lightning_version": "2.0.0",
        "hyper_parameters": {"net": bad},
        "callbacks": {"ModelCheckpoint": {"best": bad}},
    },
    "nnssl": lambda state, bad: {
        "network_weights": state,
        "trainer_name": "BaseMAETrainer",
        "init_args": {"plan": bad},
        "nnssl_adaptation_plan": {"architecture_plans": bad},
    },
    "MONAI": lambda state, bad: {"model": OrderedDict(state), "_meta_": {"bundle": bad}},
    "tensor's own attributes": lambda state, bad: {"model": {"w": Named("torch._utils", "_rebuild_tensor_v2", (bad,))}},
}


def pack(content, how):
    """The bytes of a file that `torch.save` would write, or one around it."""
    if how == "pickle":
        buffer = io.BytesIO()
        Pickler(buffer, 2).dump(content)
        return buffer.getvalue()
    plain = saved(content, pickle_module=Forging, _use_new_zipfile_serialization=how != "legacy")
    if how != "tar.gz":
        return plain
    buffer, info = io.BytesIO(), tarfile.TarInfo("bundle/models/model.pt")
    info.size = len(plain)
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.addfile(info, io.BytesIO(plain))
    return buffer.getvalue()


def outcome(path, trace, take=None):
    """The file's state dict, or the refusal; and that nothing ran and nothing is left."""
    before, where = sorted(path.parent.iterdir()), Path.cwd()
    try:
        found = read_checkpoint(path, take)
    except BrainfmError as error:
        found = error
    if isinstance(found, BrainfmError):
        assert str(path) in str(found)
        assert "\n" not in str(found)
        assert len(str(found)) < 1000
    assert not trace.exists()
    assert sorted(path.parent.iterdir()) == before
    assert Path.cwd() == where
    return found


FILES = ("zip", "legacy", "pickle", "tar.gz")


@pytest.mark.parametrize(
    ("attack", "container", "how"),
    [
        (attack, container, FILES[(n + m) % len(FILES)])  # each attack in each kind of file, each container too
        for n, attack in enumerate(ATTACKS)
        for m, container in enumerate(CONTAINERS)
    ],
)
def test_attack_in_a_container_does_not_run(attack, container, how, tmp_path):
    trace, path = tmp_path / "ran", tmp_path / "w.ckpt"
    path.write_bytes(pack(CONTAINERS[container](STATE, ATTACKS[attack](trace)), how))
    found = outcome(path, trace, "network_weights" if container == "nnssl" else None)
    inert = ("stand-in by a dotted name", "ours", "numpy's")  # names that are bound to nothing, and left out
    if attack not in inert:
        assert isinstance(found, BrainfmError), found
    elif not isinstance(found, BrainfmError):
        assert same({key.removeprefix("model."): value for key, value in found.state.items()}, STATE)


def test_traces_are_left_where_files_are_read_without_care(tmp_path):
    """The attacks are real ones."""
    for n, attack in enumerate(("reduce", "os.system", "eval", "nested pickle", "python 2's name", "torch's")):
        trace = tmp_path / f"ran{n}"
        content = pack(CONTAINERS["state dict"](STATE, ATTACKS[attack](trace)), "zip")
        with suppress(RuntimeError):  # what it unpickled is no checkpoint, and has run
            torch.load(io.BytesIO(content), weights_only=False)
        assert trace.exists(), attack


TAKEN = sorted({get_pretrained_cfg(name).keys.take or "" for name in list_pretrained()})


@pytest.mark.parametrize("take", TAKEN)
def test_attack_beside_what_a_card_takes_does_not_run(take, tmp_path):
    """Each place where a card says that its authors keep the network, with the attack beside it at every level."""
    trace, path = tmp_path / "ran", tmp_path / "w.pt"
    content = STATE
    for key in reversed(take.split(".")) if take else ():
        content = {key: content, "config": Call(os.mkdir, str(trace))}
    torch.save(content if take else {"model": STATE, "config": Call(os.mkdir, str(trace))}, path)
    assert isinstance(outcome(path, trace, take or None), BrainfmError)


@pytest.mark.parametrize("name", ["sfcn_age", "pyment_sfcn_reg", "uncnn_dwsep", "anatcl_resnet18", "nit_3d"])
def test_create_model_and_convert_refuse_an_attack_in_one_line_and_leave_nothing(name, tmp_path):
    from brainfm.hub import convert

    trace, path = tmp_path / "ran", tmp_path / "w.pth"
    path.write_bytes(pack(CONTAINERS["Lightning"](STATE, ATTACKS["os.system"](trace)), "zip"))
    for act in (
        lambda: brainfm.create_model(name, checkpoint_path=path),
        lambda: convert(path, tmp_path / "out", name),
    ):
        with pytest.raises(BrainfmError, match="asks to run") as refusal:
            act()
        assert "\n" not in str(refusal.value)
        assert sorted(tmp_path.iterdir()) == [path]


# --- Bombs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.xz", "zip in tar.gz"])
def test_bomb_is_refused_before_it_takes_memory(kind, tmp_path):
    path, huge = tmp_path / "w.pt", bytes(2**27)
    if kind.startswith("zip"):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
            archive.writestr("archive/data/0", huge)
        content = packed.getvalue()
    else:
        content = huge
    if "tar" in kind:
        info = tarfile.TarInfo("w.pt")
        info.size = len(content)
        with tarfile.open(path, f"w:{kind[-2:]}") as archive:
            archive.addfile(info, io.BytesIO(content))
    else:
        path.write_bytes(content)
    found = outcome(path, tmp_path / "ran")
    assert isinstance(found, BrainfmError)
    assert "inflates to more than" in str(found)


def test_pickle_of_endless_depth_and_one_that_names_thousands_are_refused(tmp_path):
    path = tmp_path / "w.pt"
    for content in (
        b"\x80\x02" + b"(" * 10**6,
        b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
        b"\x80\x02}" + b"".join(b"cm%d\nA\n0" % n for n in range(5000)) + b".",
    ):
        path.write_bytes(content)
        assert isinstance(outcome(path, tmp_path / "ran"), BrainfmError)


# --- Files that are no pickles --------------------------------------------------------------------


def test_program_in_the_metadata_of_safetensors_is_text(tmp_path):
    trace, path = tmp_path / "ran", tmp_path / "w.safetensors"
    save_file(STATE, path, metadata={"provenance": json.dumps({"source": code(trace)}), "pickle": "cos\nsystem\n"})
    assert same(outcome(path, trace).state, STATE)


def test_torchscript_program_of_a_bundle_is_refused(tmp_path):
    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    path = tmp_path / "model.ts"
    torch.jit.script(Net()).save(str(path))
    assert "a TorchScript program" in str(outcome(path, tmp_path / "ran"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", ["lambda", "external link", "soft link to an outside file", "opaque", "object", "keras"]
)
def test_keras_file_with_a_program_or_a_way_out_of_it_runs_and_reads_nothing_else(kind, tmp_path):
    h5py = pytest.importorskip("h5py")
    trace, path, secret = tmp_path / "ran", tmp_path / "w.h5", tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["kernel:0"] = np.full((2, 3), 42.0)
    with h5py.File(path, "w") as file:
        file["dense/dense/bias:0"] = np.ones(2, np.float32)
        if kind == "lambda":
            program = {"class_name": "Lambda", "config": {"function": [code(trace), None, None]}}
            file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": {"layers": [program]}})
            file.attrs["training_config"] = np.void(pickle.dumps(Call(os.mkdir, str(trace))))
        elif kind == "external link":
            file["dense/dense/kernel:0"] = h5py.ExternalLink(str(secret), "kernel:0")
        elif kind == "soft link to an outside file":
            file["way"] = h5py.ExternalLink(str(secret), "/")
            file["dense/dense/kernel:0"] = h5py.SoftLink("/way/kernel:0")
        elif kind == "opaque":
            file["dense/dense/kernel:0"] = np.void(pickle.dumps(Call(os.mkdir, str(trace))))
        elif kind == "object":
            file.create_dataset("dense/dense/kernel:0", data=["x"], dtype=h5py.string_dtype())
    if kind == "keras":  # Keras 3's archive: weights beside a configuration that may name programs
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("config.json", json.dumps({"class_name": "Lambda", "config": {"function": code(trace)}}))
            archive.writestr("model.weights.h5", secret.read_bytes())
    found = outcome(path, trace)
    if kind == "lambda":
        assert found.state.keys() == {"dense.bias"}
    else:
        assert isinstance(found, BrainfmError), found
