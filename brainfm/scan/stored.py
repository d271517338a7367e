"""An image as it is stored, and what has to be true of it: its size, its voxels, and that it says where left is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainfm.errors import ScanError
from brainfm.files import one_line

# Eight times a whole head at 0.5 mm (256 MiB as float32), the finest that scanners are used for: 512 million voxels.
MAX_BYTES = 2**31

MGH_FLAG = slice(28, 30)  # where a MGH header says whether it says how the image lies

_GUESS = "left and right would be a guess: convert it again from DICOM, or pass (array, affine) if you know it"


@dataclass(frozen=True, eq=False)
class StoredImage:
    """A 3-D image as it is stored: voxels before scaling, and the affine to RAS millimetres.

    `code` is NIfTI-1's of the space that the affine leads to: 1 the scanner's, 2 another image's, 3 Talairach,
    4 MNI152; 0 where nothing says it.
    """

    array: NDArray[Any]
    affine: NDArray[np.float64]
    slope: float
    inter: float
    source: str
    code: int = 0


def check_orientation(header: Any, source: str, head: bytes = b"") -> None:
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
                f"{source}: the header does not say how the image lies (qform and sform codes are 0); {_GUESS}"
            )
        if sform[1] and qform[1] and np.isfinite(sform[0]).all() and np.isfinite(qform[0]).all():
            handed = [np.sign(np.linalg.det(form[0][:3, :3])) for form in (sform, qform)]
            if handed[0] * handed[1] < 0:
                raise ScanError(
                    f"{source}: sform and qform of the header disagree on left and right; "
                    "find out which is true, and write one of them over the other"
                )
    elif isinstance(header, nib.freesurfer.mghformat.MGHHeader):
        if head and not any(head[MGH_FLAG]):
            raise ScanError(f"{source}: the MGH header does not say how the image lies (goodRASFlag is 0); {_GUESS}")
    elif isinstance(header, AnalyzeHeader | EcatHeader):
        kind = "Analyze or SPM" if isinstance(header, AnalyzeHeader) else "ECAT"
        raise ScanError(f"{source}: an {kind} header does not say where left is; {_GUESS}")


def check_codes(said: Mapping[str, Any], source: str) -> None:
    """Refuse what was read from a NIfTI whose codes are 0, by the fields of that header which MONAI and ITK keep."""
    codes = [said.get(f"{form}_code") for form in ("sform", "qform")]
    if None not in codes and not any(map(int, codes)):  # type: ignore[arg-type]
        raise ScanError(f"{source}: the header does not say how the image lies (qform and sform codes are 0); {_GUESS}")


def space_code(said: Any) -> int:
    """NIfTI-1's code of the space that a header's affine leads to: the sform's or, where it is 0, the qform's."""
    try:
        return int(said["sform_code"]) or int(said["qform_code"])
    except (KeyError, ValueError, TypeError):  # a header of another format
        return 0


def check_voxels(shape: Sequence[int], dtype: np.dtype[Any], source: str) -> None:
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


def checked(
    array: NDArray[Any],
    affine: NDArray[np.float64],
    source: str,
    slope: float = 1.0,
    inter: float = 0.0,
    code: int = 0,
) -> StoredImage:
    """A stored image that can be one of a scan; what cannot is refused as a ScanError."""
    check_voxels(array.shape, array.dtype, source)
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
    return StoredImage(array, affine, slope, inter, source, code)


def damaged(source: str, error: BaseException) -> ScanError:
    """What to say of a file that cannot be read though it begins well."""
    return ScanError(f"{source}: the file is damaged or incomplete ({one_line(error, 160)}); copy or convert it again")
