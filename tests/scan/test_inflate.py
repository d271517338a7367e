"""Any gzip that is installed reads a compressed scan, and checks it."""

from __future__ import annotations

import gzip
import sys

import pytest

from brainfm import ScanError
from brainfm.scan import packed, read

GZIP = b"\x1f\x8b"
MODULES = ("isal.igzip", "zlib_ng.gzip_ng", "gzip")


@pytest.fixture(params=MODULES)
def inflater(request, monkeypatch):
    """One of the three, as if the faster ones were not installed."""
    pytest.importorskip(request.param)
    for faster in MODULES[: MODULES.index(request.param)]:
        monkeypatch.setitem(sys.modules, faster, None)
    packed.fastest.cache_clear()
    yield request.param
    packed.fastest.cache_clear()


def test_fastest_gzip_that_is_installed_is_taken(inflater):
    assert packed.fastest(GZIP).__module__.startswith(inflater.split(".")[0])


@pytest.mark.parametrize("members", [1, 2, 30])
@pytest.mark.parametrize("padding", [0, 512])
def test_scan_is_the_same(inflater, small_sample, tmp_path, members, padding):
    plain = read.read_image(small_sample[0])
    content = (gzip.decompress if str(small_sample[0]).endswith(".gz") else bytes)(small_sample[0].read_bytes())
    path = tmp_path / "scan.nii.gz"
    step = -(-len(content) // members)
    parts = [gzip.compress(content[at : at + step]) for at in range(0, len(content), step)]
    path.write_bytes(b"".join(parts) + bytes(padding))
    assert (read.read_image(path).array == plain.array).all()


@pytest.mark.parametrize("fault", ["half", "flipped bit", "another length", "nothing after the header"])
def test_damaged_file_is_refused(inflater, small_sample, tmp_path, fault):
    content = (gzip.decompress if str(small_sample[0]).endswith(".gz") else bytes)(small_sample[0].read_bytes())
    changed = bytearray(gzip.compress(content))
    if fault == "flipped bit":
        changed[-5] ^= 1
    elif fault == "another length":
        changed[-2] ^= 1
    else:
        del changed[len(changed) // 2 if fault == "half" else 10 :]
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(changed)
    with pytest.raises(ScanError, match="damaged or incomplete"):
        read.read_image(path)
