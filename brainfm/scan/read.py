"""Read a stored image: a NIfTI, MGZ or NRRD file, a nibabel image, or what others hold in memory."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from brainfm.errors import ScanError
from brainfm.scan.kinds import first_bytes, is_analyze, is_mgh, is_nifti, refusal
from brainfm.scan.layout import HEAD, is_prepared
from brainfm.scan.memory import file_of, from_itk, from_pair, from_tensor, is_itk, is_tensor, split_channels
from brainfm.scan.nrrd import is_nrrd, read_nrrd
from brainfm.scan.packed import compression, open_packed, read_voxels
from brainfm.scan.stored import MGH_FLAG, StoredImage, check_orientation, check_voxels, checked, damaged, space_code

__all__ = ["ImageLike", "StoredImage", "read_image", "split_channels"]

if TYPE_CHECKING:
    from nibabel.spatialimages import SpatialImage

# A path, the bytes of a NIfTI file, a nibabel or SimpleITK image, (array [x, y, z], affine [4, 4]), or a tensor that
# carries its affine (MONAI's MetaTensor, TorchIO's images).
ImageLike: TypeAlias = "str | os.PathLike[str] | SpatialImage | tuple[ArrayLike, ArrayLike] | Any"


# What was read in a block of `each_file_once`, with what was asked for: an id may be another's once that is gone.
_kept: ContextVar[dict[Any, tuple[Any, StoredImage | ScanError]] | None] = ContextVar("kept", default=None)


@contextmanager
def each_file_once() -> Iterator[None]:
    """Within the block `read_image` reads and inflates an image once, however often: for several contracts of a scan.

    Its memory is given back at the end. It holds for this thread alone.
    """
    kept: dict[Any, tuple[Any, StoredImage | ScanError]] = {}
    token = _kept.set(kept)
    try:
        yield
    finally:
        _kept.reset(token)
        kept.clear()  # the traceback of an error in it leads back to it


def read_image(image: ImageLike, what: str = "scan") -> StoredImage:
    """The stored voxels of an image, not scaled, not reoriented; on an uncompressed file they are mapped, not read.

    Args:
        image: See `ImageLike`; the folder of a prepared scan stands for its head.
        what: "scan" or "mask", for the messages.

    Raises:
        ScanError: The file is missing, damaged or no image, the image is not 3-D, or its orientation is not known.
    """
    kept = _kept.get()
    if kept is None:
        return _read(image, what)
    key = (os.fspath(image) if isinstance(image, str | os.PathLike) else id(image), what)
    if key not in kept:
        try:
            kept[key] = image, _read(image, what)
        except ScanError as error:
            kept[key] = image, error
    found = kept[key][1]
    if isinstance(found, ScanError):
        raise found
    return found


def _read(image: ImageLike, what: str) -> StoredImage:
    if isinstance(image, str | os.PathLike):
        return _from_file(Path(image), what)
    if isinstance(image, bytes | bytearray):
        return _from_bytes(bytes(image), what)
    if isinstance(image, tuple) and len(image) == 2:
        return from_pair(image, what)
    if hasattr(image, "dataobj") and hasattr(image, "header"):
        name = image.get_filename() if hasattr(image, "get_filename") else None
        return _from_nibabel(image, name or f"the {what} image in memory")
    if is_tensor(image):
        if (path := file_of(image)) is not None:
            _check_file(path)
        return from_tensor(image, what)
    if is_itk(image):
        return from_itk(image, what)
    raise ScanError(
        f"cannot read a {what} from a {type(image).__name__}; pass a path, a nibabel or SimpleITK image, "
        "or a pair (array, affine)"
    )


def _from_file(path: Path, what: str) -> StoredImage:
    """The image in a file. What it says of its size is judged before anything of that size is read or inflated."""
    import nibabel as nib

    path = path / HEAD if is_prepared(path) else _header_of(path)
    head = first_bytes(path, what)
    if is_nrrd(head):
        return read_nrrd(path)
    magic = compression(head)
    try:
        with path.open("rb") if magic is None else open_packed(path, magic) as file:
            head = file.read(1024)
            if is_nifti(head) and b"ni" in (head[344:346], head[4:6]):  # the voxels are in another file, beside it
                pair = nib.load(path)
                first_bytes(Path(pair.file_map["image"].filename), what)  # refuses what would be waited for
                return _from_nibabel(pair, str(path))
            return _from_opened(file, head, path, mapped=magic is None)
    except ScanError:
        raise
    except (Exception, MemoryError) as error:  # nibabel lets errors of many kinds through where a header lies
        raise damaged(str(path), error) from error


def _from_bytes(content: bytes, what: str) -> StoredImage:
    """The image in the bytes of a NIfTI file, compressed or not."""
    name = Path(f"the bytes of the {what}")
    if (magic := compression(content)) is None and not is_nifti(content):
        raise refusal(content[:1024], name)
    try:
        plain = io.BytesIO(content)
        with plain if magic is None else open_packed(name, magic, plain) as file:
            return _from_opened(file, file.read(1024), name, mapped=False)
    except ScanError:
        raise
    except (Exception, MemoryError) as error:
        raise damaged(str(name), error) from error


def _from_opened(file: Any, head: bytes, path: Path, mapped: bool) -> StoredImage:
    """The image in an opened file that begins with `head`; mapped, its voxels are read when they are needed."""
    header = _header(head, path)
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    check_voxels(shape, dtype, str(path))
    offset = header.get_data_offset() or getattr(header, "single_vox_offset", 0)
    array: NDArray[Any] | None = None
    if mapped:
        with suppress(OSError):  # a file system may map nothing
            array = np.memmap(path, dtype, "c", offset, shape, order="F")
    if array is None:
        voxels = read_voxels(file, offset, math.prod(shape) * dtype.itemsize)
        array = np.ndarray(shape, dtype, voxels, order="F")
    slope, inter = header.get_slope_inter()
    return checked(
        array,
        header.get_best_affine(),
        str(path),
        1.0 if slope is None else float(slope),
        0.0 if inter is None else float(inter),
        space_code(header),
    )


def _header(head: bytes, path: Path) -> Any:
    """Nibabel's header of a file that begins with `head`; refused where it does not say where left is."""
    kind = _image_class(head, path).header_class
    header = kind(head[: kind.template_dtype.itemsize])
    check_orientation(header, str(path), head)
    return header


def _check_file(path: Path) -> None:
    """Refuse a tensor that was read from a NIfTI, MGH or Analyze file which does not say where left is: a guess."""
    head = first_bytes(path, "scan")
    try:
        if (magic := compression(head)) is not None:
            with open_packed(path, magic) as file:
                head = file.read(1024)
        if is_nifti(head) or is_mgh(head, path) or is_analyze(head):
            _header(head, path)
    except ScanError:
        raise
    except Exception as error:
        raise damaged(str(path), error) from error


def _header_of(path: Path) -> Path:
    """The header's file of a pair whose voxels' file (.img) was named; of every other file, itself."""
    found = re.fullmatch(r"(.*)\.img(\.gz)?", path.name, re.IGNORECASE)
    if not found:
        return path
    beside = [path.with_name(f"{found[1]}{ending}{found[2] or ''}") for ending in (".hdr", ".HDR")]
    return next(filter(Path.is_file, beside), path)


def _image_class(head: bytes, path: Path) -> Any:
    import nibabel as nib

    for cls in (nib.Nifti1Image, nib.Nifti2Image):
        if cls.header_class.may_contain_header(head):
            return cls
    if is_mgh(head, path):
        return nib.MGHImage
    raise refusal(head, path)


def _from_nibabel(image: Any, source: str) -> StoredImage:
    from nibabel.arrayproxy import ArrayProxy

    check_orientation(image.header, source, _head_of(image))
    proxy, code = image.dataobj, space_code(image.header)
    if hasattr(proxy, "shape"):  # what is no array yet, and does not say its shape, is judged when it is one
        check_voxels(proxy.shape, getattr(proxy, "dtype", np.dtype(np.float64)), source)
    try:
        if not isinstance(proxy, ArrayProxy):
            return checked(np.asanyarray(proxy), image.affine, source, code=code)
        # Of a NIfTI file whose header leaves it out, nibabel would take the header for voxels.
        start = proxy.offset or (image.header.single_vox_offset if getattr(image.header, "is_single", False) else 0)
        stored = (proxy.shape, proxy.dtype, start)
        try:
            array = np.asanyarray(ArrayProxy(proxy.file_like, stored, order=proxy.order))
        except OSError:  # a file system may map nothing
            array = np.asanyarray(ArrayProxy(proxy.file_like, stored, order=proxy.order, mmap=False))
        return checked(array, image.affine, source, float(proxy.slope), float(proxy.inter), code)
    except ScanError:
        raise
    except (Exception, MemoryError) as error:
        raise damaged(source, error) from error


def _head_of(image: Any) -> bytes:
    """How the file begins that a nibabel image of FreeSurfer's format was read from; empty of every other image."""
    import nibabel as nib

    if not isinstance(image, nib.MGHImage):
        return b""
    try:
        with image.file_map["image"].get_prepare_fileobj("rb") as file:
            file.seek(0)
            return bytes(file.read(MGH_FLAG.stop))
    except (OSError, EOFError, nib.fileholders.FileHolderError):  # made in memory, or its file is gone
        return b""
