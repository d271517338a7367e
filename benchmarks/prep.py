"""`brainfm prep` on one head, moved in known ways: registration error, mask overlap, verdict, repeatability, time.

Each move turns the head by up to 20° about each axis and shifts it by up to 30 mm along each, puts it on voxels of
1×1×3 mm, dims one side, adds Rician noise of 3 % of white matter, and stores the axes in a random order and direction.

Printed are a line a move, what two moves of one head differ by when they are undone (mm, and the cosine of the
packaged test encoder's embeddings), seconds of the processor a head, and those of each step by the clock; with --steps
HEAD…, each step of these heads in this process, on one thread: seconds by the clock and of the processor.

HEAD is a T1w image with skull that lies in MNI152 space, and MASK its brain (on any grid). No head comes with brainfm.

python benchmarks/prep.py HEAD MASK [--moves 20] [--jobs 1] [--output FOLDER] [--steps HEAD…]
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

import brainfm
from brainfm.prep.batch import prepare_all
from brainfm.prep.image import affine_of, like, sitk, template, to_array, to_itk
from brainfm.prep.source import read_source
from brainfm.prep.steps import BIAS, EXTRACTION, REGISTRATION
from brainfm.scan.layout import BRAIN

MOVES = 20
DEGREES, MILLIMETRES = 20, 30
VOXEL, SIZE = (1.0, 1.0, 3.0), (256, 256, 86)
CENTRE = (0.0, 18.0, 8.0)  # of the brain, LPS mm


def read(path: Path) -> sitk.Image:
    image = nib.load(path)
    return to_itk(np.asanyarray(image.dataobj).astype(np.float32), image.affine)


def random_move(draw: np.random.Generator) -> sitk.Euler3DTransform:
    """A move from points of the scan to points of the head."""
    move = sitk.Euler3DTransform()
    move.SetCenter(CENTRE)
    move.SetRotation(*np.radians(draw.uniform(-DEGREES, DEGREES, 3)).tolist())
    move.SetTranslation(draw.uniform(-MILLIMETRES, MILLIMETRES, 3).tolist())
    return move


def moved(head: sitk.Image, seed: int, dimmed: bool = True) -> tuple[nib.Nifti1Image, sitk.Euler3DTransform]:
    """The head as a scanner might have seen it, and the move from the scan's points to the head's."""
    draw = np.random.default_rng(seed)
    move = random_move(draw)
    grid = sitk.Image(SIZE, sitk.sitkFloat32)
    grid.SetSpacing(VOXEL)
    grid.SetOrigin([c - (n - 1) * mm / 2 for c, n, mm in zip(CENTRE, SIZE, VOXEL, strict=True)])
    thick = sitk.DiscreteGaussian(head, [0.01, 0.01, 1.2**2])  # a slice of 3 mm holds more than a plane
    scan = sitk.Resample(thick, grid, move, sitk.sitkLinear, 0.0, sitk.sitkFloat32)
    array, affine = to_array(scan).copy(), affine_of(scan)
    field = _bias(array.shape, draw)
    array = _noisy(array * field if dimmed else array, draw)
    for axis in range(3):
        if draw.random() < 0.5:
            array = np.flip(array, axis)
            flip = np.eye(4)
            flip[axis, axis], flip[axis, 3] = -1, array.shape[axis] - 1
            affine = affine @ flip
    order = draw.permutation(3)
    return nib.Nifti1Image(array.transpose(order), affine[:, [*order, 3]]), move


def _bias(shape: tuple[int, ...], draw: np.random.Generator) -> NDArray[np.float64]:
    """A field of about 0.7 to 1.5, bright on one side."""
    places = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    direction = draw.normal(0, 1, 3)
    slope = np.tensordot(direction / np.linalg.norm(direction), places, 1)
    field: NDArray[np.float64] = np.exp(0.3 * slope + 0.15 * places[draw.integers(3)] ** 2)
    return field


def _noisy(array: NDArray[np.floating], draw: np.random.Generator) -> NDArray[np.float32]:
    spread = 0.03 * np.percentile(array[array > 20], 85)
    real, imaginary = (draw.normal(0, spread, array.shape) for _ in range(2))
    return np.hypot(array + real, imaginary).astype(np.float32)


def found_transform(folder: Path) -> sitk.AffineTransform:
    """From points of the template to points of the scan, both LPS mm: what prep.json says, or TurboPrep's file."""
    record = json.loads((folder / "prep.json").read_text(encoding="utf-8"))
    kind = record["settings"].get("registration", "rigid")
    if record.get(kind) is None:
        return sitk.AffineTransform(sitk.ReadTransform(str(folder / "affine_transf.mat")))
    lps = np.diag((-1.0, -1.0, 1.0, 1.0))
    matrix = lps @ np.linalg.inv(np.array(record[kind])) @ lps
    found = sitk.AffineTransform(3)
    found.SetMatrix(matrix[:3, :3].ravel().tolist())
    found.SetTranslation(matrix[:3, 3].tolist())
    return found


def brain_points() -> NDArray[np.float64]:
    """Points [n, 3] of the template's brain, LPS mm."""
    affine = np.diag((-1.0, -1.0, 1.0, 1.0)) @ affine_of(template())
    points: NDArray[np.float64] = np.argwhere(to_array(template()) > 0)[::997] @ affine[:3, :3].T + affine[:3, 3]
    return points


def undone(folder: Path, move: sitk.Transform) -> NDArray[np.float64]:
    """Where the template's points lie in the head before it was moved, by the registration [n, 3], LPS mm."""
    found = found_transform(folder)
    return np.array([move.TransformPoint(found.TransformPoint(point)) for point in brain_points().tolist()])


def error_mm(folder: Path, move: sitk.Transform) -> float:
    """Mean distance over the template's brain between where a point is found and where it is."""
    return float(np.linalg.norm(undone(folder, move) - brain_points(), axis=1).mean())


def mask_dice(folder: Path, true: sitk.Image, move: sitk.Transform) -> float:
    """Overlap of the mask with the true one, where the registration has put the brain."""
    found = found_transform(folder)
    there = sitk.Resample(true, template(), sitk.CompositeTransform([move, found]), sitk.sitkLinear, 0.0)
    image = sitk.Resample(read(folder / BRAIN), template(), found, sitk.sitkLinear, 0.0)
    truth, mask = to_array(there) > 0.5, to_array(image) > 0.5
    return float(2 * (mask & truth).sum() / (mask.sum() + truth.sum()))


def repeatability(moves: dict[str, tuple[Path, sitk.Transform]], output: Path) -> str:
    """What two moves of one head differ by: mm over the brain, and the cosine of their embeddings."""
    places = {name: undone(output / name, move) for name, (_, move) in moves.items()}
    table = brainfm.embed(output, "test_resnet_3d")
    vectors = dict(zip([record.patient_id for record in table.records], table.vectors, strict=True))
    distances, cosines = [], []
    for one, other in itertools.combinations(places, 2):
        distances.append(float(np.linalg.norm(places[one] - places[other], axis=1).mean()))
        a, b = (np.asarray(vectors[name], dtype=float) for name in (one, other))
        cosines.append(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))
    return (
        f"two moves of one head: {statistics.mean(distances):.2f} mm apart, {max(distances):.2f} at most; cosine of "
        f"the embeddings {statistics.mean(cosines):.5f}, {min(cosines):.5f} at least"
    )


def step_times(path: Path) -> dict[str, tuple[float, float]]:
    """Seconds by the clock and of the processor of each step on a head, on one thread, without the imports."""
    import torch

    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    seconds: dict[str, tuple[float, float]] = {}

    def timed(step: str, work: Any) -> Any:
        wall, processor = time.perf_counter(), time.process_time()
        made = work()
        seconds[step] = (time.perf_counter() - wall, time.process_time() - processor)
        return made

    head = timed("read", lambda: read_source(path))
    corrected, _ = timed("bias", lambda: BIAS["n4"].run(head.image))
    probability = timed("extraction", lambda: EXTRACTION["deepbet"].run(corrected, "cpu"))
    brain = corrected * like((to_array(probability) > 0.5).astype(np.float32), corrected)
    timed("registration", lambda: REGISTRATION["torch"].run(brain, "cpu"))
    return seconds


def line(record: dict[str, Any], error: float, dice: float) -> str:
    doubts = ", ".join(figure["name"] for figure in record["quality"] if figure["reason"])
    seconds = sum(record["seconds"].values())
    return (
        f"{error:.2f} | {dice:.3f} | {record['verdict']} | {doubts} | {seconds:.0f} | {record['peak_memory_gb']:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("head", type=Path)
    parser.add_argument("mask", type=Path)
    parser.add_argument("--moves", type=int, default=MOVES)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--output", type=Path, help="kept; scans that are in it already are not done again")
    parser.add_argument("--steps", type=Path, nargs="+", default=[], help="heads whose steps are timed")
    arguments = parser.parse_args()
    for path in arguments.steps:
        times = step_times(path)
        print(f"{path.name}: " + ", ".join(f"{step} {wall:.1f} ({cpu:.1f})" for step, (wall, cpu) in times.items()))
    with tempfile.TemporaryDirectory() as temporary:
        output = arguments.output or Path(temporary, "prep")
        head = read(arguments.head)
        true = sitk.Resample(read(arguments.mask), head, sitk.Transform(), sitk.sitkNearestNeighbor, 0.0)
        moves = {}
        for seed in range(arguments.moves):
            scan, move = moved(head, seed)
            path = output.parent / "scans" / f"move{seed:02}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                scan.to_filename(path)
            moves[path.name.removesuffix(".nii.gz")] = (path, move)
        report = prepare_all([path for path, _ in moves.values()], output, jobs=arguments.jobs)
        print("| move | error, mm | Dice | verdict | by | s | GB |\n|---|---|---|---|---|---|---|")
        for name, (_, move) in moves.items():
            if name in report.failed:
                print(f"| {name} | – | – | refused | {report.failed[name]} | | |")
                continue
            folder = output / name
            print(f"| {name} | {line(report.records[name], error_mm(folder, move), mask_dice(folder, true, move))}")
        done = {name: moves[name] for name in report.records}
        if len(done) > 1:
            print(repeatability(done, output))
        if report.records:
            seconds = [record["processor_seconds"] for record in report.records.values()]
            print(
                f"processor: {statistics.mean(seconds):.1f} s a head on average, {max(seconds):.1f} at most; "
                f"{arguments.jobs} at once"
            )
        for step in next(iter(report.records.values()), {"seconds": {}})["seconds"]:
            seconds = [record["seconds"][step] for record in report.records.values()]
            print(f"{step}: {statistics.median(seconds):.2f} s, {max(seconds):.2f} at most")


if __name__ == "__main__":
    main()
