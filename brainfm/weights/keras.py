"""Weights in Keras' HDF5 files, `.h5`, under torch's names and in its layout. Only arrays are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from brainfm.errors import MissingExtraError, WeightsError
from brainfm.files import one_line

MAGIC = b"\x89HDF\r\n\x1a\n"
_NAMES = {
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def read_keras(path: Path, most: int) -> dict[str, Tensor]:
    """The arrays of a Keras file: `layer/layer/kernel:0` becomes `layer.weight`, its input and output axes torch's.

    Args:
        path: The file.
        most: Bytes that its arrays may have in all, packed as they may be.

    Raises:
        MissingExtraError: h5py is not installed.
        WeightsError: It is no such file, or a damaged one, or two of its arrays get one name.
    """
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise MissingExtraError("h5py", "keras") from error
    state: dict[str, Tensor] = {}
    size = 0

    def keep(place: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset) or place.startswith("optimizer_weights"):
            return
        nonlocal size
        size += item.nbytes
        if size > most:
            raise WeightsError(f"{path}: inflates to more than {most} bytes, as no weights do")
        if item.external or item.is_virtual or item.dtype.kind not in "fiu":
            raise WeightsError(f"{path}: {place} is no plain array of numbers; ask its authors for a plain file")
        *_, layer, name = place.split("/")
        name = name.partition(":")[0]
        full = f"{layer}.{_NAMES.get(name, name)}"
        if full in state:
            raise WeightsError(f"{path}: two of its arrays are called {full}, such as {place}")
        array = np.asarray(item[()])
        # [*places, in, out] becomes [out, in, *places].
        array = np.moveaxis(array, (-1, -2), (0, 1)) if name == "kernel" and array.ndim >= 2 else array
        state[full] = torch.from_numpy(np.ascontiguousarray(array))

    def refuse_outside(place: str, link: Any) -> None:
        if isinstance(link, h5py.ExternalLink | h5py.SoftLink):
            raise WeightsError(
                f"{path}: {place} is a link to {link.path}, and no array; ask its authors for a plain file"
            )

    try:
        with h5py.File(path, "r") as file:
            file.visititems_links(refuse_outside)
            file.visititems(keep)
    except WeightsError:
        raise
    except Exception as error:  # the bytes of a damaged file drive HDF5's reader into anything
        raise WeightsError(f"{path}: damaged HDF5 file ({one_line(error)}); fetch or copy it again") from error
    if not state:
        raise WeightsError(f"{path}: an HDF5 file without arrays; is it a file of Keras weights?")
    return state
