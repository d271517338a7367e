"""A run's report: of each command that takes long, of what fails in it, and of a run that does not come to its end."""

import importlib
import json
import signal
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from test_synthesis import write_bundle

import brainfm
from brainfm import report
from brainfm.cli import main
from brainfm.errors import BrainfmError
from brainfm.manifest import ScanRecord
from brainfm.prep import batch
from brainfm.report import RunReport, current, kind_of, read_report, reporting
from brainfm.table import Embeddings, Origin

embed_module = importlib.import_module("brainfm.embed")
MODEL = ("--model", "test_resnet_3d")


def run(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.output


@pytest.fixture
def cohort(small_sample, tmp_path):
    """A manifest of seven scans at 4 mm: the second and fifth are text, and the last is not there."""
    lines = ["image_path,mask_path,patient_id,sex"]
    for n in range(7):
        if n < 6:
            (tmp_path / f"{n}.nii.gz").write_bytes(b"no" if n in (1, 4) else small_sample[0].read_bytes())
        lines.append(f"{n}.nii.gz,{small_sample[1]},p{n},{'MF'[n % 2]}")
    (tmp_path / "scans.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "scans.csv"


@pytest.fixture
def good(cohort):
    """The same without the bad ones."""
    lines = cohort.read_text().splitlines()
    (cohort.parent / "good.csv").write_text("\n".join(lines[n] for n in (0, 1, 3, 4, 6)) + "\n")
    return cohort.parent / "good.csv"


# --- Each command ---------------------------------------------------------------------------------


def _embed(scans, folder, _):
    return ("embed", scans, *MODEL, "-o", folder / "t.csv"), "scan", (7, 4), {"listing", "embedding", "writing"}


def _merge(scans, folder, _):
    run("embed", scans, *MODEL, "-o", folder / "parts", "--shard", "1/2")
    details = {"shards_to_run_again": ["2/2"], "missing": 3}
    return ("merge", folder / "parts", "-o", folder / "t.csv"), "scan", (7, 2), {"reading the parts", *details}


def _prep(scans, folder, monkeypatch):
    record = {"seconds": {"read": 0.5, "bias": 2.0}, "peak_memory_gb": 9000.0, "verdict": "pass", "quality": []}

    def prepared(todo, output, jobs, threads, bar, ended):
        for task in todo:
            if task.name in ("p1", "p4", "p6"):
                ended(task.name, f"{task.path}: cannot be read: byte {len(task.name) + 7}; look at it")
                continue
            (output / task.name).mkdir()
            (output / task.name / "prep.json").write_text(json.dumps(record))
            ended(task.name, record)

    monkeypatch.setattr(batch, "_run", prepared)
    return ("prep", scans, "-o", folder / "prep"), "scan", (7, 4), {"preparing: bias", "preparing", "verdicts"}


def _cache(scans, folder, _):
    return ("cache", "build", scans, folder / "cache", *MODEL, "--workers", 1), "scan", (7, 4), {"listing", "caching"}


def _pretrain(scans, folder, _):
    lines = scans.read_text().splitlines()
    few = scans.with_name("few.csv")
    few.write_text("\n".join(lines[n] for n in (0, 1, 2, 3, 4)))
    fields = (f"manifest={few}", f"output={folder / 'run'}", "epochs=1", "batch_size=2", "workers=0")
    small = ("input_size=[16,16,16]", "augmentation.crop_min=[27,32,32]", "max_bad_fraction=0.5")
    return ("pretrain", "test_resnet_3d", *fields, *small), "step", (2, 2), {"training"}


def _probe(scans, folder, _):
    people = [f"sub-{n:02}" for n in range(24)]
    labels = folder / "labels.csv"
    labels.write_text("\n".join(["patient_id,sex", *(f"{name},{'MF'[n % 2]}" for n, name in enumerate(people))]))
    origin = Origin(model="test_resnet_3d.phantoms", weights="0", contract=None, readout={}, dtype="float32")
    vectors = np.random.default_rng(0).standard_normal((24, 4)).astype(np.float32)
    Embeddings(vectors, [ScanRecord(f"{name}.nii", None, name) for name in people], origin=origin).save(
        folder / "e.csv"
    )
    own = ("--label", "sex", "--embeddings", folder / "e.csv", "--seeds", 2, "--no-controls")
    return ("probe", labels, *own, "-o", folder / "out"), "run", (2, 2), {"benchmark"}


def _synthesize(scans, folder, _):
    bundle = write_bundle(folder / "bundle")
    run("synthesize", "--n", 1, "--out", folder / "out", "--bundle", bundle)
    return ("synthesize", "--n", 2, "--out", folder / "out", "--bundle", bundle), "volume", (2, 2), {"drawing"}


@pytest.mark.parametrize(
    "command", [_embed, _merge, _prep, _cache, _pretrain, _probe, _synthesize], ids=lambda each: each.__name__[1:]
)
def test_command_reports_what_it_was_given_what_it_did_and_what_that_cost(command, cohort, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    arguments, unit, counts, said = command(cohort, tmp_path / "work", monkeypatch)
    code, output = run(*arguments, "--report", tmp_path / "run.json")
    found = read_report(tmp_path / "run.json")
    assert (found.state, found.error, found.exit_code) == ("done", "", code), output
    assert found.command == " ".join(["brainfm", *(arguments[:2] if arguments[0] == "cache" else arguments[:1])])
    assert (found.unit, found.asked, found.done) == (unit, *counts), output
    assert said <= {*found.steps, *found.details}
    assert found.inputs
    assert str(tmp_path / "work") in str(found.output)
    assert found.arguments
    assert found.versions["brainfm"] == brainfm.__version__
    assert {"python", "torch", "numpy", "monai"} <= found.versions.keys()
    assert {"name", "system", "processor", "cores", "process"} == found.machine.keys()
    assert found.started <= found.ended
    assert max(step.seconds for step in found.steps.values()) > 0
    assert found.peak_memory > 1e7
    assert sum(found.failures.values()) == len(found.failed)
    assert bool(found.failed) == (unit == "scan" or arguments[0] == "pretrain")


def test_what_failed_is_counted_by_kind(cohort, tmp_path):
    assert run("embed", cohort, *MODEL, "-o", tmp_path / "t.csv", "--report", tmp_path / "run.json")[0] == 1
    found = read_report(tmp_path / "run.json")
    assert [Path(failure.scan).name for failure in found.failed] == ["1.nii.gz", "4.nii.gz", "6.nii.gz"]
    assert sorted(found.failures.values()) == [1, 2]
    (kind,) = (kind for kind, many in found.failures.items() if many == 2)
    assert found.failed[0].kind == found.failed[1].kind == kind
    assert str(tmp_path) not in kind
    assert found.steps["embedding"].done == 7


def test_run_that_goes_on_says_what_was_there(good, tmp_path):
    cache = ("cache", "build", good, tmp_path / "cache", *MODEL, "--workers", 1)
    assert run(*cache)[0] == 0
    assert run(*cache, "--report", tmp_path / "run.json")[0] == 0
    found = read_report(tmp_path / "run.json")
    assert (found.asked, found.done, found.of_an_earlier_run) == (4, 4, 4)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("/a b/sub-01_T1w.nii.gz: a slab: 9 slices; give the whole head", "a slab: … slices"),
        ("sub-01_ses-1: /x/y.nii: a slab: 12 slices", "a slab: … slices"),
        ("7.nii.gz: no such file", "no such file"),
        ("a.nii: the mask /x/m.nii.gz has 40×48×48 voxels", "the mask … has … voxels"),
        ("its process was killed (signal 9)", "its process was killed (signal …)"),
    ],
)
def test_kind_is_the_failure_without_the_scan(error, kind):
    assert kind_of(error) == kind


# --- Runs that do not come to their end -----------------------------------------------------------


def stopping(monkeypatch, after, stop):
    """`embed` that calls `stop` when so many scans are done."""
    real, left = embed_module._outcomes, [after]

    def outcomes(*arguments):
        left[0] -= 1
        if left[0] < 0:
            stop()
        return real(*arguments)

    monkeypatch.setattr(embed_module, "_outcomes", outcomes)


def _ctrl_c():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("stop", "code"), [(_ctrl_c, 130), (lambda: signal.raise_signal(signal.SIGTERM), 143)], ids=["Ctrl-C", "SIGTERM"]
)
def test_interrupted_run_says_so_and_how_far_it_was(stop, code, good, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    command = ("embed", good, *MODEL, "-o", tmp_path / "t.csv", "--report", tmp_path / "run.json")
    with monkeypatch.context() as patched:
        stopping(patched, 3, stop)
        assert run(*command)[0] == code
    found = read_report(tmp_path / "run.json")
    assert (found.state, found.exit_code, found.asked, found.done) == ("interrupted", code, 4, 3)
    assert signal.getsignal(signal.SIGTERM) == before
    assert run(*command)[0] == 0
    found = read_report(tmp_path / "run.json")
    assert (found.state, found.done, found.of_an_earlier_run) == ("done", 4, 3)


def test_file_says_running_while_it_runs_as_it_will_when_the_run_is_killed(good, tmp_path, monkeypatch):
    said = []
    stopping(monkeypatch, 0, lambda: said.append(read_report(tmp_path / "run.json")))
    run("embed", good, *MODEL, "-o", tmp_path / "t.csv", "--report", tmp_path / "run.json")
    assert (said[0].state, said[0].ended, said[0].exit_code) == ("running", None, None)


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (("embed", "missing.csv", "-o", "t.csv"), 1, "ScanError: missing.csv: no such manifest"),
        (("pretrain", "nonsense", "manifest=x.csv", "output=o"), 1, "RecipeError"),
        (
            ("compare-encoders", "a.nii", "--labels", "x.csv", "-o", "o", "--models", "test_vit_3d"),
            1,
            "ScanError: a.nii",
        ),
        (("benchmark", "phantom_sex", "-o", "o"), 2, "UsageError: Missing option '--models'"),
        (("bids", "nowhere", "out", "participant"), 1, "BrainfmError: nowhere"),
        (("bids", "nowhere", "out", "group"), 1, "ScanError: out: no scan in it"),
    ],
)
def test_run_that_fails_says_why(arguments, code, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exit_code, said = run(*arguments, "--report", "run.json")
    found = read_report(tmp_path / "run.json")
    assert (found.exit_code, exit_code) == (code, code), said
    assert found.state == "failed"
    assert found.error.startswith(error)


# --- The file -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "content"), [("scans.csv", "image_path\na.nii\n"), ("note.json", '{"Name": "x"}')])
def test_report_takes_the_place_of_nothing_else(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    code, said = run("embed", "a.nii", *MODEL, "-o", tmp_path / "t.csv", "--report", tmp_path / name)
    assert code == 1
    assert "give the report another name" in said
    assert (tmp_path / name).read_text() == content


def test_report_that_cannot_be_written_is_an_error_before_any_work(tmp_path, small_sample):
    (tmp_path / "file").touch()
    code, _ = run(
        "embed", small_sample[0], *MODEL, "-o", tmp_path / "t.csv", "--report", tmp_path / "file" / "run.json"
    )
    assert code == 1
    assert not (tmp_path / "t.csv").exists()


def test_damaged_report_is_no_report(tmp_path):
    with reporting(tmp_path / "run.json", "x"):
        pass
    content = json.loads((tmp_path / "run.json").read_text())
    for change in ({"state": "well"}, {"failed": [{"scan": "a"}]}, {"steps": {"a": 1}}):
        (tmp_path / "run.json").write_text(json.dumps(content | change))
        with pytest.raises(BrainfmError, match="no report of a run"):
            read_report(tmp_path / "run.json")


def test_steps_that_come_again_go_on_and_outside_of_a_run_nobody_hears():
    current().step("alone").update()
    assert not report.current().report("running").steps
    with reporting(None, "x", unit="scan") as told:
        for _ in range(2):
            step = current().step("going", "scan", 3, 1)
            assert list(step.through("ab")) == ["a", "b"]
        found = told.report("done")
    assert isinstance(found, RunReport)
    assert (found.steps["going"].of, found.steps["going"].done, found.steps["going"].earlier) == (6, 6, 2)
    assert (found.asked, found.done, found.of_an_earlier_run) == (6, 6, 2)
