"""Read a stored image: a NIfTI or MGZ file, a nibabel image, or an array with its affine."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from brainfm.errors import ScanError

if TYPE_CHECKING:
    from gzip import GzipFile

    from nibabel.spatialimages import SpatialImage

# A path, a nibabel image, (array [x, y, z], affine [4, 4]), or a tensor that carries its affine (MONAI's MetaTensor).
ImageLike: TypeAlias = "str | os.PathLike[str] | SpatialImage | tuple[ArrayLike, ArrayLike] | Any"

_CONVERT = "convert it first, for example with dcm2niix"


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
            f"the {what} is a pair, but not of an array and an affine ({_one_line(error)}); pass such a pair"
        ) from error
    return _checked(array, affine, f"the {what} array")


def _from_file(path: Path, what: str) -> StoredImage:
    import nibabel as nib

    head = _first_bytes(path, what)
    try:
        if head[:2] == b"\x1f\x8b":
            return _from_bytes(_inflated(path), path)
        _image_class(head, path)
        image = nib.load(path)
    except ScanError:
        raise
    except Exception as error:  # nibabel lets errors of many kinds through where a header lies
        raise ScanError(
            f"{path}: the file is damaged or incomplete ({_one_line(error)}); copy or convert it again"
        ) from error
    return _from_nibabel(image, str(path))


def _inflated(path: Path) -> NDArray[np.uint8]:
    """What a gzip file holds.

    All of it is inflated, not only what the crop needs: that checks the stored CRC, and half a download is refused.
    It goes straight into an array: getting fresh memory can take a quarter of the time, and numpy asks for large pages.
    """
    with path.open("rb") as file:
        file.seek(-4, os.SEEK_END)
        size = int.from_bytes(file.read(), "little")  # of the last member, which is the only one in nearly all files
    content, filled = np.empty(size + 1, dtype=np.uint8), 0
    with _gzip_open()(path) as unzipped:
        # GzipFile.readinto would inflate into other memory and copy; the buffer behind it need not.
        reader: Any = getattr(unzipped, "_buffer", unzipped)
        while count := reader.readinto(content[filled:]):
            filled += count
            if filled == len(content):
                content, full = np.empty(2 * filled, dtype=np.uint8), content
                content[:filled] = full
    return content[:filled]


@cache
def _gzip_open() -> Callable[[Path], GzipFile]:
    """The fastest gzip there is: ISA-L's, zlib-ng's, or Python's."""
    for module in ("isal.igzip", "zlib_ng.gzip_ng", "gzip"):
        try:
            opener: Callable[[Path], GzipFile] = import_module(module).open
        except ImportError:
            continue
        return opener
    raise AssertionError("gzip is Python's own")


def _first_bytes(path: Path, what: str) -> bytes:
    if path.is_dir():
        if any(is_dicom(child) for child in sorted(path.iterdir())[:3]):
            raise ScanError(f"{path}: a folder of DICOM files; {_CONVERT}")
        raise ScanError(
            f"{path}: a folder, not a {what}; name the image in it, or embed the folder with 'brainfm embed'"
        )
    if not path.exists():
        hint = "; the link leads nowhere: with DataLad or git-annex, get its content first" if path.is_symlink() else ""
        raise ScanError(f"{path}: no such file{hint or '; check the path'}")
    try:
        with path.open("rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise ScanError(f"{path}: cannot be opened ({error.strerror})") from error
    if not head:
        raise ScanError(f"{path}: the file is empty; copy or convert it again")
    if head[128:132] == b"DICM":
        raise ScanError(f"{path}: a DICOM file; {_CONVERT}")
    if head.startswith(b"version https://git-lfs"):
        raise ScanError(f"{path}: a Git LFS pointer, not the image; run 'git lfs pull'")
    return head


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM files do."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _image_class(head: bytes, path: Path) -> Any:
    import nibabel as nib

    for cls in (nib.Nifti1Image, nib.Nifti2Image):
        if cls.header_class.may_contain_header(head):
            return cls
    if head[:4] == b"\x00\x00\x00\x01" and path.suffix.lower() in (".mgz", ".mgh"):
        return nib.MGHImage
    raise ScanError(f"{path}: neither NIfTI nor MGZ (it begins with {head[:12]!r}); {_CONVERT}")


def _from_bytes(content: NDArray[np.uint8], path: Path) -> StoredImage:
    """The image that a whole file in memory holds; its voxels are a view of the file."""
    kind = _image_class(content[:1024].tobytes(), path).header_class
    header = kind(content[: kind.template_dtype.itemsize].tobytes())
    _check_orientation(header, str(path))
    place = (header.get_data_shape(), header.get_data_dtype(), content, header.get_data_offset())
    slope, inter = header.get_slope_inter()
    return _checked(
        np.ndarray(*place, order="F"),
        header.get_best_affine(),
        str(path),
        1.0 if slope is None else float(slope),
        0.0 if inter is None else float(inter),
    )


def _from_nibabel(image: Any, source: str) -> StoredImage:
    from nibabel.arrayproxy import ArrayProxy

    _check_orientation(image.header, source)
    proxy = image.dataobj
    if not isinstance(proxy, ArrayProxy):
        return _checked(np.asanyarray(proxy), image.affine, source)
    if len([n for n in proxy.shape if n != 1]) > 3:
        return _checked(np.broadcast_to(np.uint8(0), proxy.shape), image.affine, source)  # refused by its shape, unread
    raw = ArrayProxy(proxy.file_like, (proxy.shape, proxy.dtype, proxy.offset), order=proxy.order)
    try:
        array = np.asanyarray(raw)
    except (Exception, MemoryError) as error:
        raise ScanError(
            f"{source}: the file is damaged or incomplete ({_one_line(error)}); copy or convert it again"
        ) from error
    return _checked(array, image.affine, source, float(proxy.slope), float(proxy.inter))


def _check_orientation(header: Any, source: str) -> None:
    """Refuse a header that does not say where left is, or says it twice and differently."""
    import nibabel as nib

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
    elif isinstance(header, nib.freesurfer.mghformat.MGHHeader) and not int(header["goodRASFlag"]):
        raise ScanError(f"{source}: the MGH header does not say how the image lies (goodRASFlag is 0)")


def _checked(
    array: NDArray[Any], affine: NDArray[np.float64], source: str, slope: float = 1.0, inter: float = 0.0
) -> StoredImage:
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 3:
        series = f" ({array.shape[-1]} volumes: a functional or diffusion series?)" if array.ndim == 4 else ""
        raise ScanError(f"{source}: the image is {array.ndim}-D, shape {array.shape}{series}; pass one 3-D volume")
    if 0 in array.shape:
        raise ScanError(f"{source}: the image has no voxels, shape {array.shape}")
    if array.dtype == np.bool_:
        array = array.view(np.uint8)
    if array.dtype.kind not in "iuf":
        raise ScanError(f"{source}: voxels of type {array.dtype} are not grey values; convert to one number a voxel")
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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
