"""Read a stored image: a NIfTI or MGZ file, a nibabel image, or an array with its affine."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from brainfm.errors import ScanError
from brainfm.files import one_line
from brainfm.scan.kinds import first_bytes, refusal
from brainfm.scan.packed import compression, open_packed, read_voxels

if TYPE_CHECKING:
    from nibabel.spatialimages import SpatialImage

# A path, a nibabel or SimpleITK image, (array [x, y, z], affine [4, 4]), or a tensor that carries its affine (MONAI's
# MetaTensor, TorchIO's images).
ImageLike: TypeAlias = "str | os.PathLike[str] | SpatialImage | tuple[ArrayLike, ArrayLike] | Any"

# Eight times a whole head at 0.5 mm (256 MiB as float32), the finest that scanners are used for: 512 million voxels.
MAX_BYTES = 2**31

_MGH_FLAG = slice(28, 30)  # where a MGH header says whether it says how the image lies


@dataclass(frozen=True, eq=False)
class StoredImage:
    """A 3-D image as it is stored: voxels before scaling, and the affine to RAS millimetres."""

    array: NDArray[Any]
    affine: NDArray[np.float64]
    slope: float
    inter: float
    source: str


def read_image(image: ImageLike, what: str = "scan") -> StoredImage:
    """The stored voxels of an image, not scaled, not reoriented; on an uncompressed file they are mapped, not read.

    Args:
        image: See `ImageLike`.
        what: "scan" or "mask", for the messages.

    Raises:
        ScanError: The file is missing, damaged or no image, the image is not 3-D, or its orientation is not known.
    """
    if isinstance(image, str | os.PathLike):
        return _from_file(Path(image), what)
    if isinstance(image, tuple) and len(image) == 2:
        return _from_pair(image, what)
    if hasattr(image, "dataobj") and hasattr(image, "header"):
        name = image.get_filename() if hasattr(image, "get_filename") else None
        return _from_nibabel(image, name or f"the {what} image in memory")
    if hasattr(image, "affine") and hasattr(image, "numpy"):  # MONAI's MetaTensor, channel first or without channels
        array = np.asarray(image.detach().cpu().numpy())
        if array.ndim == 4 and len(array) == 1:
            array = array[0]
        name = getattr(image, "meta", {}).get("filename_or_obj") or f"the {what} tensor"
        return _checked(array, np.asarray(image.affine, dtype=np.float64), str(name))
    raise ScanError(
        f"cannot read a {what} from a {type(image).__name__}; pass a path, a nibabel image or a pair (array, affine)"
    )


def split_channels(image: ImageLike, count: int) -> list[ImageLike] | None:
    """The channels of a tensor [count, x, y, z] that carries its affine, such as MONAI's MetaTensor; None of others."""
    tensor: Any = image
    if not (hasattr(tensor, "affine") and hasattr(tensor, "numpy")) or tensor.ndim != 4 or len(tensor) != count:
        return None
    return list(tensor)


def _from_pair(pair: tuple[Any, Any], what: str) -> StoredImage:
    try:
        array, affine = (np.asarray(item.detach().cpu() if hasattr(item, "detach") else item) for item in pair)
        affine = affine.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ScanError(
            f"the {what} is a pair, but not of an array and an affine ({one_line(error, 160)}); pass such a pair"
        ) from error
    return _checked(array, affine, f"the {what} array")


def _from_file(path: Path, what: str) -> StoredImage:
    """The image in a file. What it says of its size is judged before anything of that size is read or inflated."""
    import nibabel as nib

    path = _header_of(path)
    head = first_bytes(path, what)
    magic = compression(head)
    try:
        with path.open("rb") if magic is None else open_packed(path, magic) as file:
            head = file.read(1024)
            if b"ni1" in head[344:347] or b"ni2" in head[4:7]:  # the voxels are in another file, beside it
                return _from_nibabel(nib.load(path), str(path))
            return _from_opened(file, head, path, mapped=magic is None)
    except ScanError:
        raise
    except (Exception, MemoryError) as error:  # nibabel lets errors of many kinds through where a header lies
        raise _damaged(str(path), error) from error


def _from_opened(file: Any, head: bytes, path: Path, mapped: bool) -> StoredImage:
    """The image in an opened file that begins with `head`; mapped, its voxels are read when they are needed."""
    kind = _image_class(head, path).header_class
    header = kind(head[: kind.template_dtype.itemsize])
    _check_orientation(header, str(path), head)
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    _check_voxels(shape, dtype, str(path))
    offset = header.get_data_offset() or getattr(header, "single_vox_offset", 0)
    array: NDArray[Any] | None = None
    if mapped:
        with suppress(OSError):  # a file system may map nothing
            array = np.memmap(path, dtype, "c", offset, shape, order="F")
    if array is None:
        voxels = read_voxels(file, offset, math.prod(shape) * dtype.itemsize)
        array = np.ndarray(shape, dtype, voxels, order="F")
    slope, inter = header.get_slope_inter()
    return _checked(
        array,
        header.get_best_affine(),
        str(path),
        1.0 if slope is None else float(slope),
        0.0 if inter is None else float(inter),
    )


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
    if head[:4] == b"\x00\x00\x00\x01" and path.name.lower().endswith((".mgz", ".mgh", ".mgh.gz")):
        return nib.MGHImage
    raise refusal(head, path)


def _from_nibabel(image: Any, source: str) -> StoredImage:
    from nibabel.arrayproxy import ArrayProxy

    _check_orientation(image.header, source, _head_of(image))
    proxy = image.dataobj
    _check_voxels(proxy.shape, getattr(proxy, "dtype", np.dtype(np.float64)), source)
    try:
        if not isinstance(proxy, ArrayProxy):
            return _checked(np.asanyarray(proxy), image.affine, source)
        raw = ArrayProxy(proxy.file_like, (proxy.shape, proxy.dtype, proxy.offset), order=proxy.order)
        return _checked(np.asanyarray(raw), image.affine, source, float(proxy.slope), float(proxy.inter))
    except ScanError:
        raise
    except (Exception, MemoryError) as error:
        raise _damaged(source, error) from error


def _damaged(source: str, error: BaseException) -> ScanError:
    return ScanError(f"{source}: the file is damaged or incomplete ({one_line(error, 160)}); copy or convert it again")


def _head_of(image: Any) -> bytes:
    """How the file begins that a nibabel image of FreeSurfer's format was read from; empty of every other image."""
    import nibabel as nib

    if not isinstance(image, nib.MGHImage):
        return b""
    try:
        with image.file_map["image"].get_prepare_fileobj("rb") as file:
            file.seek(0)
            return bytes(file.read(_MGH_FLAG.stop))
    except (OSError, EOFError, nib.fileholders.FileHolderError):  # made in memory, or its file is gone
        return b""


def _check_orientation(header: Any, source: str, head: bytes = b"") -> None:
    """Refuse a header that does not say where left is, or says it twice and differently.

    Args:
        header: nibabel's.
        source: What the image is called.
        head: How the file begins, where it is FreeSurfer's: in the header nibabel has set the flag that counts.
    """
    import nibabel as nib
    from nibabel.analyze import AnalyzeHeader
    from nibabel.ecat import EcatHeader

    if isinstance(header, nib.Nifti1Header):
        sform = header.get_sform(coded=True)
        try:
            qform = header.get_qform(coded=True)
        except ValueError:  # an impossible quaternion; the sform is the one that counts where both are set
            qform = (None, 0)
        if not (sform[1] or qform[1]):
            raise ScanError(
                f"{source}: the header does not say how the image lies (qform and sform codes are 0); "
                "left and right would be a guess: convert it again from DICOM, or set the affine yourself"
            )
        if sform[1] and qform[1] and np.isfinite(sform[0]).all() and np.isfinite(qform[0]).all():
            handed = [np.sign(np.linalg.det(form[0][:3, :3])) for form in (sform, qform)]
            if handed[0] * handed[1] < 0:
                raise ScanError(
                    f"{source}: sform and qform of the header disagree on left and right; "
                    "find out which is true, and write one of them over the other"
                )
    elif isinstance(header, nib.freesurfer.mghformat.MGHHeader):
        if head and not any(head[_MGH_FLAG]):
            raise ScanError(
                f"{source}: the MGH header does not say how the image lies (goodRASFlag is 0); left and right would be "
                "a guess: convert it again from DICOM, or pass (array, affine) if you know it"
            )
    elif isinstance(header, AnalyzeHeader | EcatHeader):
        kind = "Analyze or SPM" if isinstance(header, AnalyzeHeader) else "ECAT"
        raise ScanError(
            f"{source}: an {kind} header does not say where left is; convert the scan again from DICOM, or pass "
            "(array, affine) if you know it"
        )


def _check_voxels(shape: Sequence[int], dtype: np.dtype[Any], source: str) -> None:
    """Refuse what is no 3-D image of numbers that a scan of a head can be, by what a header says of it."""
    shape = tuple(map(int, shape))
    if min(shape, default=0) < 0:
        raise ScanError(f"{source}: the file is damaged: a shape of {shape}; copy or convert it again")
    spatial = shape
    while len(spatial) > 3 and spatial[-1] == 1:
        spatial = spatial[:-1]
    if len(spatial) != 3:
        series = f" ({spatial[-1]} volumes: a functional or diffusion series?)" if len(spatial) == 4 else ""
        raise ScanError(f"{source}: the image is {len(spatial)}-D, shape {spatial}{series}; pass one 3-D volume")
    if 0 in spatial:
        raise ScanError(f"{source}: the image has no voxels, shape {spatial}")
    if dtype.kind not in "iufb":
        raise ScanError(f"{source}: voxels of type {dtype} are not grey values; convert to one number a voxel")
    size = math.prod(spatial) * max(dtype.itemsize, 4)  # they are computed with in 4 bytes
    if size > MAX_BYTES:
        raise ScanError(
            f"{source}: {' × '.join(map(str, spatial))} voxels of {dtype} take {size / 2**30:.3g} GiB, and a scan of a "
            f"head at most {MAX_BYTES / 2**30:g}: the header is damaged, or it is no scan of a head; check it, or "
            "resample it to coarser voxels"
        )


def _checked(
    array: NDArray[Any], affine: NDArray[np.float64], source: str, slope: float = 1.0, inter: float = 0.0
) -> StoredImage:
    _check_voxels(array.shape, array.dtype, source)
    while array.ndim > 3:
        array = array[..., 0]
    if array.dtype == np.bool_:
        array = array.view(np.uint8)
    affine = np.array(affine, dtype=np.float64)
    well_formed = affine.shape == (4, 4) and np.isfinite(affine).all() and (affine[3] == (0, 0, 0, 1)).all()
    if not well_formed or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ScanError(
            f"{source}: the affine is not an invertible 4×4 matrix of finite numbers that ends in 0 0 0 1; "
            "convert the scan again, or pass (array, affine) with the right one"
        )
    if not (np.isfinite(slope) and np.isfinite(inter)) or slope == 0:
        slope, inter = 1.0, 0.0
    return StoredImage(array, affine, slope, inter, source)
