"""Scans and models that the tests share. No test needs a network, and caches are empty folders."""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import locale
import os
import signal
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from browser import Browser, find_chromium
from loopback_hub import LoopbackHub

# A shell has its jobs in the background ignore Ctrl-C, and so would the commands that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
if processes := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # before torch is imported: share the cores
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(processes)))
_CACHES = tempfile.TemporaryDirectory(prefix="brainfm-tests-")
_HUB = LoopbackHub()
LOCALE = locale.setlocale(locale.LC_ALL)  # of the process, before anything of ITK
os.environ |= {  # before huggingface_hub is imported: it reads them once
    "BRAINFM_CACHE": f"{_CACHES.name}/brainfm",
    "HF_HOME": f"{_CACHES.name}/huggingface",
    "HF_ENDPOINT": _HUB.url,
    "HF_HUB_ETAG_TIMEOUT": "2",
    "HF_HUB_DOWNLOAD_TIMEOUT": "2",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_XET": "1",  # the loopback Hub takes uploads the plain way
}

import nibabel as nib
import numpy as np
import pytest
import torch

import brainfm
from brainfm.assets import SAMPLE_MASK, SAMPLE_SCAN
from brainfm.scan import content


def _once_a_brain(measure):
    """`measure`, whose results are kept by what they depend on: most tests read the same few scans again and again."""
    found = {}

    @functools.wraps(measure)
    def kept(volume, brain):
        digest = hashlib.blake2b(repr((volume.slope, volume.inter, volume.stored.dtype, volume.shape)).encode())
        for array in (volume.stored, volume.affine, brain):
            digest.update(np.ascontiguousarray(array))
        key = digest.digest()
        if key not in found:
            found[key] = measure(volume, brain)
        return found[key]

    return kept


content.measure = _once_a_brain(content.measure)


def pytest_collection_finish() -> None:
    """Thousands of tests are no garbage: looking through them again and again took 8 % of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


@pytest.fixture(autouse=True)
def own_environment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test leaves in the cache or the environment, an accepted licence or --quiet, no other test finds."""
    before = dict(os.environ)
    name = hashlib.blake2b(request.node.nodeid.encode(), digest_size=8).hexdigest()
    monkeypatch.setenv("BRAINFM_CACHE", f"{_CACHES.name}/{name}")
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def spec() -> brainfm.InputSpec:
    """The published contract: 193×229×193 at 1 mm in, 150×192×192 out."""
    return brainfm.get_pretrained_cfg("simclr_resnet18_3d").input_spec


@pytest.fixture(scope="session")
def small_spec() -> brainfm.InputSpec:
    """The test models' contract: 4 mm, 40×48×48 out."""
    return brainfm.get_pretrained_cfg("test_resnet_3d").input_spec


@pytest.fixture(scope="session")
def sample() -> tuple[Path, Path]:
    """The packaged scan and its mask, on the contract's 1 mm grid."""
    return SAMPLE_SCAN, SAMPLE_MASK


@pytest.fixture(scope="session")
def brain() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The packaged scan in memory, read-only: voxels [x, y, z] uint8, mask [x, y, z] uint8, affine [4, 4]."""
    image, mask = nib.load(SAMPLE_SCAN), nib.load(SAMPLE_MASK)
    arrays = np.asarray(image.dataobj), np.asarray(mask.dataobj), image.affine
    for array in arrays:
        array.setflags(write=False)
    return arrays


@pytest.fixture(scope="session")
def small_sample(tmp_path_factory, small_spec) -> tuple[Path, Path]:
    """The packaged scan averaged to 4 mm, and its mask: cheap to read and to embed."""
    folder = tmp_path_factory.mktemp("small")
    scan = brainfm.load_scan(SAMPLE_SCAN, SAMPLE_MASK, spec=small_spec)
    image, mask = scan.image[0] * scan.mask, scan.mask.astype(np.uint8)
    nib.Nifti1Image(image, scan.affine).to_filename(folder / "normalized.nii.gz")
    nib.Nifti1Image(mask, scan.affine).to_filename(folder / "mask.nii.gz")
    return folder / "normalized.nii.gz", folder / "mask.nii.gz"


@pytest.fixture(scope="session")
def small_model() -> torch.nn.Module:
    """The packaged test ResNet. Shared: make another one to change it."""
    return brainfm.create_model("test_resnet_3d", pretrained=True)


@pytest.fixture
def hub(monkeypatch) -> LoopbackHub:
    """The Hugging Face Hub of all tests: on the loopback, empty, without faults. Give cache_dir=tmp_path."""
    for variable in ("HF_TOKEN", "BRAINFM_HUB_ORG"):
        monkeypatch.delenv(variable, raising=False)
    _HUB.reset()
    return _HUB


@pytest.fixture
def elsewhere(hub, tmp_path):
    """A function (arguments of python, environment) → a finished process, on a machine whose caches are empty."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        machine = {"HF_HOME": str(tmp_path / "huggingface"), "BRAINFM_CACHE": str(tmp_path / "brainfm")}
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, env=os.environ | machine | environment, capture_output=True, text=True, timeout=900
        )

    return run


@pytest.fixture(autouse=True)
def same_threads():
    """A test, or what it calls, that leaves torch another number of threads would round those after it otherwise."""
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before, "torch is left with another number of threads"


@pytest.fixture(autouse=True)
def same_locale():
    """ITK sets the locale of the process to C when it reads or writes, as some tests and fixtures do themselves."""
    locale.setlocale(locale.LC_ALL, LOCALE)
    yield
    locale.setlocale(locale.LC_ALL, LOCALE)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Chromium, to open pages in."""
    if find_chromium() is None:
        pytest.skip("no chromium or google-chrome on PATH")
    running = Browser(tmp_path_factory.mktemp("profile"))
    yield running
    running.close()


@pytest.fixture(scope="session")
def parity() -> dict[str, Any]:
    """Outputs of the released upstream code; `tests/data/README.md` says how they were made."""
    return json.loads((Path(__file__).parent / "data" / "parity.json").read_text())


@pytest.fixture(scope="session")
def recipe_state():
    """A function (key → shape, salt) → a state dict with the numbers of the recipe in `tests/data/README.md`."""

    def make(keys: dict[str, list[int]], salt: int) -> dict[str, torch.Tensor]:
        return {key: torch.from_numpy(np.asarray(_filled(key, shape, salt))) for key, shape in keys.items()}

    return make


@pytest.fixture(scope="session")
def upstream_state(parity, recipe_state):
    """A function (model name) → the state dict whose outputs `parity` holds."""
    return lambda name: recipe_state(parity["models"][name]["keys"], parity["salt"])


# He's scaling makes tables of positions so small that a wrong order of tokens goes unnoticed.
POSITIONS = {
    *("pos_embed", "pos_embedding", "position_embeddings", "block_embeddings"),
    *("cls_token", "distill_token", "mask_token"),
}


def _filled(key: str, shape: list[int], salt: int) -> np.ndarray:
    draw = np.random.RandomState((zlib.crc32(key.encode()) ^ salt) & 0xFFFFFFFF)
    if key.endswith(("num_batches_tracked", "counts")):
        return np.zeros(shape, dtype=np.int64)
    if key.rpartition(".")[2] in POSITIONS:
        values = 0.5 * draw.standard_normal(shape)
    elif len(shape) >= 2:
        values = draw.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    elif key.endswith("running_var"):
        values = 1 + 0.1 * draw.random_sample(shape)
    elif key.endswith(("running_mean", "bias")):
        values = 0.1 * draw.standard_normal(shape)
    else:
        values = 1 + 0.1 * draw.standard_normal(shape)
    return values.astype(np.float32)
