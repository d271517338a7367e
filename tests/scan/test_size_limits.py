"""What a file says of its size is judged before it is read: a refusal takes no memory and waits for nothing."""

from __future__ import annotations

import gzip
import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import brainfm
from brainfm import ScanError

BLOCK = 2**24
ZEROS = gzip.compress(bytes(BLOCK), 9)  # 16 kB
SIX_GB = 6 * 2**30

# Reads every file that it is given after a small one, and says what was refused, and the memory that took, in MB.
READ = """
import json, resource, sys
import nibabel as nib
import brainfm
transform = brainfm.create_transform("test_resnet_3d")
taken = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
transform(sys.argv[1], sys.argv[2])
before, said = taken(), []
for path in sys.argv[3:]:
    for image in (path, nib.load(path)) if ".nii" in path else (path,):
        for arguments in ((image,), (sys.argv[1], image)):
            try:
                transform(*arguments)
                said.append("")
            except brainfm.BrainfmError as error:
                said.append(str(error))
print(json.dumps([taken() - before, said]))
"""


def nifti_header(shape, dtype=np.float32, offset=352):
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(dtype)
    header.set_sform(np.diag([1.0, 1, 1, 1]), 1)
    header["vox_offset"], header["magic"] = offset, b"n+1"
    return header.binaryblock + bytes(4)


def mgh_header(shape):
    header = nib.MGHImage(np.zeros((2, 2, 2), np.float32), np.eye(4)).header
    block = bytearray(header.binaryblock[:90]) + bytes(194)
    struct.pack_into(">3i", block, 4, *shape)
    return bytes(block)


def packed(path: Path, header: bytes, size: int) -> Path:
    """A gzip file of a header and `size` zeros, which takes a thousandth of them."""
    with path.open("wb") as file:
        file.write(gzip.compress(header))
        for _ in range(size // BLOCK):
            file.write(ZEROS)
    return path


def refused(small_sample, *paths):
    """What a process says that reads each of the files, by path and by nibabel, as scan and as mask; its memory."""
    done = subprocess.run(
        [sys.executable, "-c", READ, *map(str, (*small_sample, *paths))],
        capture_output=True,
        text=True,
        timeout=900,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return json.loads(done.stdout)


def test_scans_that_are_too_large_are_refused_before_they_are_read(tmp_path, small_sample):
    sparse = tmp_path / "sparse.nii"
    with sparse.open("wb") as file:
        file.write(nifti_header((1100, 1100, 1100)))
        file.truncate(352 + 4 * 1100**3)
    paths = [
        sparse,
        packed(tmp_path / "bomb.nii.gz", nifti_header((1200, 1200, 1200)), SIX_GB),
        packed(tmp_path / "bomb.mgz", mgh_header((1200, 1200, 1200)), SIX_GB),
    ]
    assert paths[1].stat().st_size < 8e6
    grown, said = refused(small_sample, *paths)
    assert len(said) == 10
    for message in said:
        assert "GiB, and a scan of a head at most 2" in message
        assert "\n" not in message
    assert grown < 100


@pytest.mark.parametrize("ending", [".nii.gz", ".mgz"])
def test_file_that_inflates_to_more_than_its_header_says_is_refused_without_memory(ending, tmp_path, small_sample):
    header = nifti_header((40, 40, 40)) if ending == ".nii.gz" else mgh_header((40, 40, 40))
    path = packed(tmp_path / f"scan{ending}", header, SIX_GB)
    grown, (said, *_) = refused(small_sample, path)
    assert said == f"{path}: the file is damaged or incomplete (the file holds far more than its header says); " + (
        "copy or convert it again"
    )
    assert grown < 100


def test_voxels_that_begin_gigabytes_into_the_file_are_refused(tmp_path):
    path = packed(tmp_path / "scan.nii.gz", nifti_header((40, 40, 40), offset=2**31), BLOCK)
    with pytest.raises(ScanError, match="voxels begin at byte 2147483648"):
        brainfm.create_transform("test_resnet_3d")(path)


def test_length_at_the_end_of_a_gzip_is_not_believed(tmp_path, small_sample):
    content = bytearray(gzip.compress(nifti_header((40, 40, 40)) + bytes(4 * 40**3)))
    content[-4:] = b"\xff\xff\xff\xff"
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(content)
    grown, (said, *_) = refused(small_sample, path)
    assert "damaged or incomplete" in said
    assert grown < 100


def test_long_series_is_refused_by_its_header(tmp_path, small_sample):
    path = packed(tmp_path / "bold.nii.gz", nifti_header((128, 128, 64, 1500)), SIX_GB)
    grown, said = refused(small_sample, path)
    assert all("4-D" in message and "a functional or diffusion series" in message for message in said)
    assert grown < 100


def test_whole_head_at_half_a_millimetre_is_not_too_large(tmp_path):
    path = packed(tmp_path / "scan.nii.gz", nifti_header((400, 400, 400), np.uint8), 4 * BLOCK)
    with pytest.raises(ScanError, match="same value"):
        brainfm.create_transform("mae_vit_base_3d")(path)


@pytest.mark.parametrize("role", ["scan", "mask"])
@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "folder"])
def test_what_is_no_file_is_refused_by_its_kind_and_not_waited_for(kind, role, tmp_path, small_sample, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    path = Path("scan.nii.gz")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    scan, mask = (path, None) if role == "scan" else (small_sample[0], path)
    said = {"fifo": "a named pipe", "socket": "a socket", "device": "a device", "folder": f"a folder, not a {role}"}
    with pytest.raises(ScanError, match=f"scan.nii.gz: {said[kind]}"):
        brainfm.create_transform("test_resnet_3d")(scan, mask)


def test_pipe_in_the_place_of_a_pairs_voxels_is_not_waited_for(tmp_path):
    nib.Nifti1Pair(np.ones((4, 4, 4), np.float32), np.eye(4)).to_filename(tmp_path / "scan.hdr")
    (tmp_path / "scan.img").unlink()
    os.mkfifo(tmp_path / "scan.img")
    with pytest.raises(ScanError, match=r"scan.img: a named pipe"):
        brainfm.create_transform("test_resnet_3d")(tmp_path / "scan.hdr")


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_preparation_waits_for_no_pipe(kind, tmp_path):
    source = pytest.importorskip("brainfm.prep.source", exc_type=ImportError)
    path = tmp_path / "scan.nii.gz"
    os.mkfifo(path) if kind == "fifo" else path.symlink_to("/dev/zero")
    with pytest.raises(ScanError, match=f"a {'named pipe' if kind == 'fifo' else 'device'}"):
        source.source_sha256(path)


def test_command_line_waits_for_no_pipe(tmp_path):
    os.mkfifo(tmp_path / "scan.nii.gz")
    command = [sys.executable, "-m", "brainfm", "embed", "scan.nii.gz", "--model", "test_resnet_3d", "-o", "out.csv"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=900, check=False)
    assert done.returncode == 1
    assert "ScanError: scan.nii.gz: a named pipe (FIFO), not a file; write the scan to a file" in done.stderr
    assert "Traceback" not in done.stderr
