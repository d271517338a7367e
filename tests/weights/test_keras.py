"""Keras' HDF5 files are read as arrays, in torch's layout and names."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from brainfm import WeightsError
from brainfm.weights import read_checkpoint

h5py = pytest.importorskip("h5py")


def write(path, arrays):
    """As Keras writes weights: layer/layer/name:0, and an optimiser's beside them."""
    with h5py.File(path, "w") as file:
        for place, array in arrays.items():
            layer, name = place.split(".")
            file[f"{layer}/{layer}/{name}:0"] = array
    return path


def test_convolution_and_norm_compute_what_keras_layout_says(tmp_path):
    draw = np.random.default_rng(0)
    kernel, x = draw.normal(size=(3, 3, 3, 2, 4)).astype(np.float32), draw.normal(size=(5, 6, 7, 2)).astype(np.float32)
    arrays = {"conv.kernel": kernel, "conv.bias": draw.normal(size=4).astype(np.float32)}
    norm = {"norm.gamma": 2, "norm.beta": 3, "norm.moving_mean": 0.5, "norm.moving_variance": 4}
    arrays |= {name: np.full(4, value, np.float32) for name, value in norm.items()}
    arrays["dense.kernel"] = draw.normal(size=(4, 1)).astype(np.float32)
    state = read_checkpoint(write(tmp_path / "w.hdf5", arrays)).state
    conv, bn = nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4, eps=0)
    conv.load_state_dict({"weight": state["conv.weight"], "bias": state["conv.bias"]})
    names = ("weight", "bias", "running_mean", "running_var")
    bn.load_state_dict({name: state[f"norm.{name}"] for name in names}, strict=False)
    out = bn.eval()(conv(torch.from_numpy(x.transpose(3, 0, 1, 2))[None]))[0].detach().numpy()
    # a place at a time, channels last, as Keras defines it
    naive = np.einsum("dhwi,dhwio->o", x[1:4, 2:5, 3:6].astype(np.float64), kernel) + arrays["conv.bias"]
    assert np.allclose(out[:, 1, 2, 3], 2 * (naive - 0.5) / 2 + 3, atol=1e-5)
    assert state["dense.weight"].shape == (1, 4)


def test_optimiser_is_passed_over(tmp_path):
    path = write(tmp_path / "w.h5", {"conv.bias": np.ones(2, np.float32)})
    with h5py.File(path, "a") as file:
        file["optimizer_weights/Adam/conv/bias:0"] = np.ones(2)
    assert read_checkpoint(path).state.keys() == {"conv.bias"}


@pytest.mark.parametrize("fault", ["cut", "external", "text", "empty", "twice", "bomb"])
def test_file_that_is_no_plain_arrays_is_refused_in_one_line(fault, tmp_path):
    path = write(tmp_path / "w.h5", {"conv.bias": np.ones(2, np.float32)})
    with h5py.File(path, "a") as file:
        if fault == "external":
            (tmp_path / "secret").write_bytes(bytes(64))
            file.create_dataset("conv/conv/kernel:0", (8,), "f8", external=[(str(tmp_path / "secret"), 0, 64)])
        elif fault == "text":
            file["conv/conv/config:0"] = "import os"
        elif fault == "empty":
            del file["conv"]
        elif fault == "bomb":
            file.create_dataset("conv/conv/kernel:0", (2**30,), "f8", chunks=(2**20,), compression="gzip")
        elif fault == "twice":
            file["other/conv/bias:0"] = np.ones(2)
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(WeightsError, match=r"w\.h5: "):
        read_checkpoint(path)
