"""Where the tests of this folder compute.

`pytest -m cuda -n 0 tests/cuda` runs them all on the first GPU, in minutes; where there is none they are skipped. With
BRAINFM_CUDA_TESTS_ON=cpu they run on the processor, which tries the tests themselves.
"""

import os

import pytest
import torch


@pytest.fixture(scope="session")
def gpu() -> str:
    device = os.environ.get("BRAINFM_CUDA_TESTS_ON", "cuda")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return device


@pytest.fixture
def plain_float32():
    """Without TF32, which keeps three digits."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield
    torch.backends.cuda.matmul.allow_tf32 = before
