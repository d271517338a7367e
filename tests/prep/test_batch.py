"""Many scans at once: what ends one, what interrupts all, and what the command says in the end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from click.testing import CliRunner
from test_page import DOUBTFUL_TURN, write_scan

from brainfm.assets import SAMPLE_SCAN
from brainfm.cli import main
from brainfm.errors import BrainfmError
from brainfm.prep import batch
from brainfm.prep.batch import prepare_all
from brainfm.prep.pipeline import Settings
from brainfm.prep.report import decide_all
from brainfm.shards import Shard
from brainfm.system import available_cores

TURBOPREP = Settings(backend="turboprep")
COMMAND = [sys.executable, "-m", "brainfm", "prep", "-o", "out", "--backend", "turboprep"]


@pytest.fixture
def two(tmp_path):
    """Two scans, a and b, in a folder."""
    for name in ("a", "b"):
        shutil.copy(SAMPLE_SCAN, tmp_path / f"{name}.nii.gz")
    return tmp_path


@pytest.fixture
def scans():
    """What `begun` prepares."""
    return "ab"


@pytest.fixture
def begun(scans, two, stand_in):
    """A command that prepares scans, of which b takes for ever: its process, and that of the program that does b."""
    if scans == "b":
        (two / "second").touch()
    stand_in(f"if [ -e {two / 'second'} ]; then echo $$ > {two / 'pid'}; sleep 300; fi; touch {two / 'second'}")
    heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # a background job's tests ignore it
    command = COMMAND + [f"{name}.nii.gz" for name in scans]
    process = subprocess.Popen(command, cwd=two, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    deadline = time.monotonic() + 900
    while not (two / "pid").exists() or not (two / "pid").read_text().strip():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.2)
    yield process, int((two / "pid").read_text())
    process.kill()
    process.communicate()


def has_ended(pid):
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def leftovers(folder):
    return [path.name for path in folder.rglob(".*")]


def test_interrupted_run_keeps_what_is_finished_and_ends_its_processes(begun, two, stand_in):
    process, program = begun
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 130
    assert "interrupted; what is finished is kept" in errors
    assert has_ended(program)
    assert [path.parent.name for path in (two / "out").glob("*/prep.json")] == ["a"]
    assert json.loads((two / "out" / "a" / "prep.json").read_text(encoding="utf-8"))["verdict"] == "pass"
    assert not leftovers(two / "out")
    stand_in()
    report = prepare_all([two / "a.nii.gz", two / "b.nii.gz"], two / "out", TURBOPREP)
    assert report.found == 1
    assert [*report.records] == ["a", "b"]


@pytest.mark.parametrize("scans", ["b"])
def test_second_command_on_an_output_is_refused_and_a_killed_one_makes_way(begun, two, stand_in):
    process, program = begun
    with pytest.raises(BrainfmError, match=f"process {process.pid} on .* is writing it"):
        prepare_all([two / "a.nii.gz"], two / "out", TURBOPREP)
    process.kill()
    process.wait()
    assert has_ended(program)
    stand_in()
    assert prepare_all([two / "b.nii.gz"], two / "out", TURBOPREP).records["b"]["verdict"] == "pass"
    assert not leftovers(two / "out")


@pytest.mark.slow
def test_shards_prepare_everything_once_side_by_side_and_again_nothing(two, stand_in):
    shutil.copy(SAMPLE_SCAN, two / "c.nii.gz")
    stand_in("")
    scans = [str(two / f"{name}.nii.gz") for name in "abc"]
    three = [subprocess.Popen([*COMMAND, *scans, "--shard", f"{n}/2"], cwd=two) for n in (1, 2, 2)]  # one twice at once
    assert [one.wait(timeout=900) for one in three] == [0, 0, 0]
    assert sorted(path.parent.name for path in (two / "out").glob("*/prep.json")) == list("abc")
    times = {path: path.stat().st_mtime_ns for path in (two / "out").rglob("*")}
    report = prepare_all(scans, two / "out", TURBOPREP, shard=Shard.of("2/2"))
    assert (sorted(report.records), report.found) == (["b"], 1)
    assert prepare_all(scans, two / "out", TURBOPREP).found == 3
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert not leftovers(two)


def test_visits_are_not_brought_together_by_a_shard(two):
    with pytest.raises(BrainfmError, match="may be in different shards"):
        prepare_all([two], two / "out", Settings(longitudinal=True), shard=Shard.of("1/2"))


def test_killed_process_fails_its_scan_by_name_and_others_go_on(two, stand_in):
    stand_in(f"[ -e {two / 'second'} ] || {{ touch {two / 'second'}; kill -9 $PPID; }}")
    report = prepare_all([two / "a.nii.gz", two / "b.nii.gz"], two / "out", TURBOPREP)
    assert [*report.failed] == ["a"]
    assert str(two / "a.nii.gz") in report.failed["a"]
    assert "run out of memory; run it again with fewer scans at once (--jobs, jobs=)" in report.failed["a"]
    assert report.records["b"]["verdict"] == "pass"


def test_process_that_starts_the_scans_does_not_import_torch(two, stand_in):
    stand_in()
    lines = [
        "import sys",
        "from brainfm.prep.batch import prepare_all",
        "from brainfm.prep.pipeline import Settings",
        "if __name__ == '__main__':",
        "    report = prepare_all(['a.nii.gz', 'b.nii.gz'], 'out', Settings(backend='turboprep'))",
        "    print(len(report.records), 'torch' in sys.modules)",
    ]
    (two / "script.py").write_text("\n".join(lines))
    done = subprocess.run([sys.executable, "script.py"], cwd=two, capture_output=True, text=True, timeout=900)
    assert done.stdout.split() == ["2", "False"], done.stderr


def test_scans_have_the_environment_of_their_own_call(two, stand_in, monkeypatch):
    """Also where the processes of an earlier call were forked from the same server."""
    stand_in(f'echo "$COLOUR $OMP_NUM_THREADS" >> {two / "colours"}')
    for name, colour in (("a", "red"), ("b", "blue")):
        monkeypatch.setenv("COLOUR", colour)
        before = {**os.environ}
        assert not prepare_all([two / f"{name}.nii.gz"], two / "out", TURBOPREP).failed
    assert (two / "colours").read_text().splitlines() == [f"{c} {available_cores()}" for c in ("red", "blue")]
    assert {**os.environ} == before  # ours is as it was


def test_script_without_a_guard_is_told_so(two, stand_in):
    stand_in()
    lines = [
        "from brainfm.prep.batch import prepare_all",
        "from brainfm.prep.pipeline import Settings",
        "prepare_all(['a.nii.gz', 'b.nii.gz'], 'out', Settings(backend='turboprep'))",
    ]
    (two / "script.py").write_text("\n".join(lines))
    done = subprocess.run([sys.executable, "script.py"], cwd=two, capture_output=True, text=True, timeout=900)
    assert done.returncode == 1
    assert 'put the call below if __name__ == "__main__":' in done.stderr.splitlines()[-1]
    assert "bootstrapping" not in done.stderr
    assert not (two / "out" / "a").exists()


def test_bar_has_steps_and_an_estimate_for_one_scan_too(two, stand_in, capsys, monkeypatch):
    monkeypatch.setattr("brainfm.files._terminal_size", lambda: os.terminal_size((120, 24)))
    stand_in("sleep 1.5")
    prepare_all([two / "a.nii.gz"], two / "out", TURBOPREP, progress=True)
    shown = capsys.readouterr().err.split("\r")
    assert any("0 of 1 scans, a: turboprep" in line for line in shown)
    at = [line for line in shown if "a: write" in line]
    assert at
    assert "95%" in at[-1]
    assert "<?" not in at[-1]


# --- What the command says ------------------------------------------------------------------------


@pytest.fixture
def prepared_as(two, monkeypatch):
    """A function (verdict of a scan by name) → the command's result; its scans are prepared in no time."""

    def run(**verdicts):
        def prepared(todo, output, jobs, threads, bar, ended):
            for source in todo:
                shutil.rmtree(output / source.name, ignore_errors=True)
                changed = {"fail": {"litres": 0.4}, "look": {"turn": DOUBTFUL_TURN}, "pass": {}}[verdicts[source.name]]
                write_scan(output / source.name, verdicts[source.name], **changed)
                ended(source.name, json.loads((output / source.name / "prep.json").read_text()))

        monkeypatch.setattr(batch, "_run", prepared)
        monkeypatch.setattr(batch, "is_done", lambda source, folder, settings, onto: (folder / "prep.json").exists())
        return CliRunner().invoke(
            main, ["prep", *(str(two / f"{name}.nii.gz") for name in verdicts), "-o", str(two / "o")]
        )

    return run


def test_failed_quality_is_exit_code_1_with_the_reason(prepared_as):
    result = prepared_as(a="fail", b="pass")
    assert result.exit_code == 1
    assert "1 of 2 scans failed:" in result.output
    assert "  a: fail: brain volume, litres: 0.4 is below 0.6; brain is missing from the mask" in result.output
    assert "embed them:" in result.output
    assert "--strict-qc" in result.output


@pytest.mark.parametrize(("verdict", "code"), [("fail", 1), ("look", 0)])
def test_nothing_is_to_be_embedded_unless_something_passed(prepared_as, verdict, code):
    result = prepared_as(a=verdict)
    assert result.exit_code == code
    assert "look at them:" in result.output
    assert "embed them" not in result.output


def test_failed_scan_that_a_person_accepted_is_no_failure(prepared_as, two):
    assert prepared_as(a="fail").exit_code == 1
    decide_all(two / "o", ["a"], [], "Ann", "an infant")
    result = prepared_as(a="fail")
    assert result.exit_code == 0
    assert "1 scan prepared (1 accepted); 1 were there already" in result.output
    assert "embed them:" in result.output


def test_output_that_is_a_file_is_refused(two):
    result = CliRunner().invoke(main, ["prep", str(two / "a.nii.gz"), "-o", str(two / "b.nii.gz")])
    assert result.exit_code == 1
    assert "a file, and the scans' folders are written to a folder" in result.output


def test_path_that_is_not_there_leaves_no_folder_and_an_empty_one_of_ones_own_stays(tmp_path):
    (tmp_path / "own").mkdir()
    for output in (tmp_path / "new", tmp_path / "own"):
        report = prepare_all([tmp_path / "gone.nii.gz"], output)
        assert list(report.failed) == ["gone"]
    assert [path.name for path in tmp_path.iterdir()] == ["own"]
