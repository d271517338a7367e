"""The BIDS App: what its calls select, what it writes where, and what it leaves alone."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from prepared_folders import moved_head, write
from test_bids import MNI, anat, dataset

import brainfm
from brainfm import table
from brainfm.bidsapp import participant
from brainfm.cli import main
from brainfm.prep import batch
from brainfm.prep.pipeline import Settings
from brainfm.prep.quality import RANGES
from brainfm.prep.source import source_sha256
from brainfm.report import read_report

pytest.importorskip("bids2table", reason="needs the extra [bids], which needs Python 3.11")

MODEL = "test_resnet_3d"
SCANS = (
    "sub-01/ses-1/anat/sub-01_ses-1_run-1",
    "sub-01/ses-1/anat/sub-01_ses-1_run-2",
    "sub-01/ses-2/anat/sub-01_ses-2_acq-mprage",
    "sub-02/ses-1/anat/sub-02_ses-1",
    "sub-03/anat/sub-03",
)
NAMES = [scan.rpartition("/")[2] for scan in SCANS]


@pytest.fixture
def bids(tmp_path):
    """A data set whose images are no images: `prepare` of these tests does not read them."""
    folder = dataset(tmp_path / "bids", *(f"{scan}_T1w.nii.gz" for scan in SCANS), anat("_T2w.nii.gz", "sub-04"))
    for n, path in enumerate(folder.rglob("*_T1w.nii.gz")):
        path.write_bytes(bytes([n]))
    return folder


@pytest.fixture(scope="module")
def one_prepared(tmp_path_factory):
    """A prepared scan, with figures and a picture."""
    folder = tmp_path_factory.mktemp("prepared") / "one"
    quality = [{"name": name, "value": 1.5, "verdict": "pass", "reason": ""} for name in RANGES]
    write(folder, *moved_head(), field=np.zeros((28, 32, 22), np.float32), quality=quality)
    (folder / "qc.png").write_bytes(b"\x89PNG\r\n\x1a\n picture")
    return folder


@pytest.fixture
def prepared(one_prepared, monkeypatch):
    """`prepare` that makes that scan of all, but fails on sub-02; and what it was asked for."""
    asked = []

    def run(todo, output, jobs, threads, bar, ended):
        for task in todo:
            asked.append((task.name, jobs, threads))
            if task.name.startswith("sub-02"):
                ended(task.name, f"{task.path}: a slab: 9 slices")
                continue
            shutil.copytree(one_prepared, output / task.name, copy_function=os.link)
            (output / task.name / "prep.json").unlink()
            record = json.loads((one_prepared / "prep.json").read_text())
            record["settings"] = Settings().to_dict()
            record["input"] |= {"path": str(task.path), "sha256": source_sha256(task.path)}
            (output / task.name / "prep.json").write_text(json.dumps(record))
            ended(task.name, record)

    monkeypatch.setattr(batch, "_run", run)
    return asked


def call(*arguments):
    return CliRunner().invoke(main, ["bids", *map(str, arguments)])


# --- What is selected -----------------------------------------------------------------------------

CALLS = [
    # bids-apps/example: run.py BIDS OUT participant --participant_label 01
    ("--participant_label 01", [0, 1, 2]),
    ("--participant-label sub-01", [0, 1, 2]),
    ("--participant-label 01 03", [0, 1, 2, 4]),
    ("--participant-label 01 --participant-label sub-03", [0, 1, 2, 4]),
    ("--participant-label=03", [4]),
    ("--skip_bids_validation", [0, 1, 2, 3, 4]),
    ("--n_cpus 2 --mem_mb 4000", [0, 1, 2, 3, 4]),
    # fMRIPrep's users
    ("--session-label 1", [0, 1, 3]),
    ("--session_label ses-2 --participant-label 01", [2]),
    ("--participant-label 01 --session-label 1 2 --nprocs 8 --omp-nthreads 4 --mem 16GB -w WORK", [0, 1, 2]),
    (
        "--participant_label sub-01 sub-02 --skip-bids-validation --nthreads 2 --omp-nthreads 1 --mem-mb 8000",
        [0, 1, 2, 3],
    ),
    ("--participant_label=sub-03 --work-dir WORK --stop_on_first_crash --n-cpus=1", [4]),
    ("--shard 1/2", [0, 2, 4]),
    ("--shard 2/2 --stop-on-first-crash --participant-label 01", [1]),
]
FILTERS = [  # --bids-filter-file
    ({"t1w": {"session": "1"}, "bold": {"task": "rest"}}, [0, 1, 3]),
    ({"t1w": {"datatype": "anat", "session": ["1", "2"], "acquisition": None, "suffix": "T1w"}}, [0, 1, 3]),
    ({"t1w": {"acquisition": "mprage"}}, [2]),
    ({"t1w": {"acq": "*"}}, [2]),
    ({"t1w": {"session": "Query.NONE"}}, [4]),
    ({"t1w": {"run": 2}}, [1]),
    ({"t1w": {"extension": [".nii.gz"], "subject": "03"}}, [4]),
    ({"bold": {"task": "rest"}}, [0, 1, 2, 3, 4]),
]
CONFIGURED = [  # --config-file: a participant 01 is not the number 1, and what is said goes before
    ("participant-label: [01, 03]\nsession_label: 1\n", "", [0, 1]),
    ("participant-label: 01\nmem: 4GB\nskip-bids-validation: true\n", "", [0, 1, 2]),
    ("participant-label: 01\n", "--participant-label 03", [4]),
    ('{"nprocs": 2, "session-label": ["2"]}', "", [2]),
]


@pytest.fixture
def selected(bids, prepared, tmp_path, monkeypatch):
    """The numbers of the scans that a call is of."""
    monkeypatch.setattr(participant, "_embed", lambda *_: set())

    def of(arguments):
        words = arguments.replace("WORK", str(tmp_path / "work")).split()
        result = call(bids, tmp_path / "out", "participant", *words, "--model", MODEL)
        numbers = [NAMES.index(name) for name, *_ in prepared]
        assert result.exit_code == (1 if 3 in numbers else 0), result.output
        made = sorted(path.name for path in (tmp_path / "out").rglob("*_T1w.json"))
        assert made == sorted(f"{NAMES[n]}_T1w.json" for n in numbers)
        return numbers

    return of


@pytest.mark.parametrize(("arguments", "numbers"), CALLS, ids=[arguments for arguments, _ in CALLS])
def test_call_selects_these_scans(arguments, numbers, selected):
    assert selected(arguments) == numbers


@pytest.mark.parametrize(("filters", "numbers"), FILTERS, ids=[json.dumps(filters) for filters, _ in FILTERS])
def test_filter_file_selects_these_scans(filters, numbers, selected, tmp_path):
    (tmp_path / "filters.json").write_text(json.dumps(filters))
    assert selected(f"--bids-filter-file {tmp_path / 'filters.json'}") == numbers


@pytest.mark.parametrize(("content", "arguments", "numbers"), CONFIGURED)
def test_config_file_has_the_options_that_are_not_said(content, arguments, numbers, selected, tmp_path):
    (tmp_path / "config.yaml").write_text(content)
    assert selected(f"{arguments} --config-file {tmp_path / 'config.yaml'}") == numbers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--participant-label", "99"], "no participant 99 (a folder sub-99)"),
        (["--session-label", "7"], "no session 7 of the participants"),
        (["--participant-label", "04"], "without a T1w image"),
        (["--participant-label", "--model", MODEL], "--participant-label needs at least one value"),
        (["--mem", "much"], "no amount of memory"),
        (["-d", "raw=x"], "a name of letters and digits other than raw"),
        (["-d", "fmriprep=nowhere"], "nowhere: no such folder"),
        (["--bids-filter-file", "FILTER"], "the filter 'sesion' is no entity of BIDS"),
        (["--bids-filter-file", "none.json"], "no filters of BIDS entities"),
        (["--config-file", "FILTER"], "there is no option t1w"),
        (["--model", "test_resnet_3d", "--model", "test_resnet"], "two models would both be called testresnet"),
        (["-w", "WITHIN"], "in the data set, which is only read"),
    ],
)
def test_call_that_cannot_be_is_refused_before_any_work(arguments, message, bids, prepared, tmp_path):
    (tmp_path / "filter.json").write_text('{"t1w": {"sesion": "1"}}')
    places = {"FILTER": tmp_path / "filter.json", "WITHIN": bids / "work"}
    result = call(bids, tmp_path / "out", "participant", *(places.get(each, each) for each in arguments))
    assert result.exit_code != 0
    assert message in " ".join(result.output.split())
    assert prepared == []


def test_what_is_left_out_is_said_of_those_alone_that_are_wanted(bids, prepared, tmp_path):
    arguments = (bids, tmp_path / "out", "participant", "--model", MODEL)
    assert "left out" not in call(*arguments, "--participant-label", "03").output
    assert "left out" not in call(*arguments, "--session-label", "2").output
    assert f"left out: {bids / 'sub-04'}: no T1w" in call(*arguments, "--participant-label", "03", "04").output


def test_description_that_lacks_what_bids_requires_is_refused_unless_validation_is_skipped(bids, prepared, tmp_path):
    (bids / "dataset_description.json").write_text('{"Name": "x"}')
    arguments = (bids, tmp_path / "out", "participant", "--model", MODEL, "--participant-label", "03")
    assert "does not say BIDSVersion" in call(*arguments).output
    assert call(*arguments, "--skip-bids-validation").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "jobs", "threads"),
    [
        (("--n-cpus", 8, "--omp-nthreads", 2), 4, 2),
        (("--nprocs", 8, "--mem", "3GB"), 2, 4),
        (("--n-cpus", 8, "--omp-nthreads", 4, "--mem_mb", 1000), 1, 4),
    ],
)
def test_cores_and_memory_say_how_many_scans_are_prepared_at_once(arguments, jobs, threads, bids, prepared, tmp_path):
    call(bids, tmp_path / "out", "participant", "--model", MODEL, "--participant-label", "03", *arguments)
    assert prepared == [("sub-03", jobs, threads)]


def test_version_and_help():
    assert call("--version").output.startswith("brainfm, version")
    assert "BIDS_DIR OUT_DIR {participant|group}" in call("--help").output


# --- What is written ------------------------------------------------------------------------------


def listing(folder):
    """All that is in a folder, by content; and when each folder changed, which a file that came and went would show."""
    found = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        content = None if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        found[path.relative_to(folder)] = (path.lstat().st_mtime_ns, content)
    return found


def test_participants_and_group_of_a_data_set_that_is_left_as_it_is(bids, prepared, tmp_path):
    before = listing(bids)
    for path in bids.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    output = tmp_path / "out"
    result = call(bids, output, "participant", "--model", MODEL, "--model", "test_vit_3d")
    assert result.exit_code == 1
    assert "4 of 5 scans" in result.output
    assert "sub-02_ses-1: " in result.output
    assert f"left out: {bids / 'sub-04'}: no T1w image in it, but T2w" in result.output

    description = json.loads((output / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert description["GeneratedBy"][0] == {
        "Name": "brainfm",
        "Version": brainfm.__version__,
        "Description": "brainfm bids",
    }
    assert description["DatasetLinks"] == {"raw": bids.as_uri()}
    assert description["SourceDatasets"] == [{"URL": bids.as_uri()}]

    stem = output / "sub-01/ses-1/anat/sub-01_ses-1_run-1_desc-testresnet_embedding"
    sidecar = json.loads(stem.with_suffix(".json").read_text())
    assert sidecar["Sources"] == [
        "bids:raw:sub-01/ses-1/anat/sub-01_ses-1_run-1_T1w.nii.gz",
        "bids::prepared/sub-01_ses-1_run-1/head.nii.gz",
    ]
    assert (output / sidecar["Sources"][1].removeprefix("bids::")).is_file()
    vector = np.load(stem.with_suffix(".npy"))
    expected = brainfm.embed([output / "prepared" / "sub-01_ses-1_run-1"], MODEL)
    np.testing.assert_allclose(vector, expected.vectors[0], rtol=1e-5)
    assert (sidecar["Model"], sidecar["WeightsDigest"]) == (expected.origin.model, expected.origin.weights)
    assert sidecar["Contract"] == expected.origin.contract

    result = call(bids, output, "group")
    assert result.exit_code == 1  # sub-02 failed
    rows = pd.read_csv(output / "group_T1w.tsv", sep="\t", dtype={"subject_id": str, "session_id": str})
    assert list(rows["bids_name"]) == [f"{name}_T1w" for name in NAMES]
    assert list(rows["subject_id"]) == ["01", "01", "01", "02", "03"]
    assert list(rows["acq_id"].dropna()) == ["mprage"]
    assert list(rows["litres"].fillna(0)) == [1.5, 1.5, 1.5, 0, 1.5]
    assert "a slab: 9 slices" in rows["error"][3]
    made = table.read(output / "group_desc-testresnet_embedding.parquet")
    assert [(row.patient_id, row.scan_id) for row in made.records] == [
        ("sub-01", "ses-1_run-1"),
        ("sub-01", "ses-1_run-2"),
        ("sub-01", "ses-2_acq-mprage"),
        ("sub-03", ""),
    ]
    assert made.records[0].image == str(bids / f"{SCANS[0]}_T1w.nii.gz")
    assert made.origin.digest == expected.origin.digest
    np.testing.assert_array_equal(made.vectors[0], vector)
    assert len(table.read(output / "group_desc-testvit_embedding.parquet")) == 4
    page = (output / "group_T1w.html").read_text(encoding="utf-8")
    assert "a slab: 9 slices" in page
    assert '<tr><th scope="row">a slab: … slices</th><td>1</td></tr>' in page  # by kind
    assert '<tr><th scope="row">preparing: bias</th><td>6.0</td><td>1.50</td></tr>' in page  # of four scans
    assert "no T1w image in it, but T2w" in page
    assert page.count("data:image/png;base64,") == 4

    for path in bids.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    assert listing(bids) == before


def test_what_is_done_is_left_as_it_is_and_what_changed_is_done_again(bids, prepared, tmp_path):
    arguments = (bids, tmp_path / "out", "participant", "--model", MODEL, "--participant-label", "01")
    assert call(*arguments, "-w", tmp_path / "work").exit_code == 0
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*_embedding.npy")}
    assert len(made) == 3
    assert not (tmp_path / "out" / "prepared").exists()
    assert call(*arguments, "-w", tmp_path / "work").exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert len(prepared) == 3
    changed = next(path for path in made if "run-2" in path.name)
    changed.with_suffix(".json").unlink()
    assert call(*arguments, "-w", tmp_path / "work").exit_code == 0
    assert [path for path in made if path.stat().st_mtime_ns != made[path]] == [changed]


def test_each_call_leaves_its_report_and_the_page_says_what_all_of_them_took(bids, prepared, tmp_path, monkeypatch):
    arguments = (bids, tmp_path / "out", "participant", "--model", MODEL)
    for labels in (("01",), ("01", "02")):
        call(*arguments, "--participant-label", *labels, "--report", tmp_path / "run.json")
    reports = sorted(map(read_report, (tmp_path / "out" / "logs").iterdir()), key=lambda one: one.asked)
    said = [(one.command, one.state, one.asked, one.done, one.of_an_earlier_run) for one in reports]
    assert said == [("brainfm bids", "done", 3, 3, 0), ("brainfm bids", "done", 4, 3, 3)]
    assert reports[1].failures == {"a slab: … slices": 1}
    assert read_report(tmp_path / "run.json") == reports[1]

    def broken(*_):
        raise RuntimeError("stopped")

    monkeypatch.setattr(participant, "_embed", broken)
    assert call(*arguments, "--participant-label", "03").exit_code == 1
    (tmp_path / "out" / "logs" / "participant-0.json").write_text("{}")
    assert call(bids, tmp_path / "out", "group", "--report", tmp_path / "group.json").exit_code == 1
    group = read_report(tmp_path / "group.json")
    assert (group.asked, group.done, len(group.failed)) == (5, 3, 1)
    page = (tmp_path / "out" / "group_T1w.html").read_text(encoding="utf-8")
    assert page.count("<td>done</td>") == 2
    assert "<td>failed: RuntimeError: stopped</td>" in page


def test_first_crash_stops_where_that_is_wanted(bids, prepared, tmp_path):
    arguments = (bids, tmp_path / "out", "participant", "--model", MODEL)
    result = call(*arguments, "--stop-on-first-crash")
    assert result.exit_code == 1
    assert "a slab: 9 slices" in result.output
    assert [name for name, *_ in prepared] == NAMES[:4]


def test_shards_and_participants_share_an_output_and_group_says_what_is_not_run(bids, prepared, tmp_path):
    output = tmp_path / "out"
    arguments = (bids, output, "participant", "--model", MODEL)
    environment = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "1"}
    result = CliRunner().invoke(main, ["bids", *map(str, arguments), "--shard", "slurm"], env=environment)
    assert "3 of 3 scans" in result.output
    result = call(bids, output, "group")
    assert result.exit_code == 1
    assert "2 scans are not run yet, such as sub-01_ses-1_run-2" in result.output
    assert "sub-01_ses-1_run-2, sub-02_ses-1" in (output / "group_T1w.html").read_text(encoding="utf-8")
    call(*arguments, "--participant-label", "01")
    assert [name for name, *_ in prepared] == [NAMES[n] for n in (0, 2, 4, 1)]
    assert "1 scans are not run yet, such as sub-02_ses-1" in call(bids, output, "group").output


def test_group_before_any_participant_is_refused(bids, tmp_path):
    (tmp_path / "out").mkdir()
    assert "run first: brainfm bids" in call(bids, tmp_path / "out", "group").output


def test_group_makes_no_table_of_two_models_vectors(bids, prepared, tmp_path):
    call(bids, tmp_path / "out", "participant", "--model", MODEL, "--participant-label", "01", "03")
    path = tmp_path / "out/sub-03/anat/sub-03_desc-testresnet_embedding.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"WeightsDigest": "0"}))
    result = call(bids, tmp_path / "out", "group")
    assert result.exit_code == 1
    assert "made by another model than the others, which differ in weights" in result.output
    assert not list((tmp_path / "out").glob("*.parquet"))


# --- Derivatives ----------------------------------------------------------------------------------


def test_derivatives_are_embedded_as_they_are(bids, prepared, small_sample, tmp_path):
    names = ["sub-01/ses-1/anat/sub-01_ses-1", "sub-03/anat/sub-03"]
    derivatives = dataset(tmp_path / "fmriprep", *(f"{name}_desc-preproc_T1w.nii.gz" for name in names))
    for name in names:
        os.link(small_sample[0], derivatives / f"{name}{MNI}_T1w.nii.gz")
        os.link(small_sample[1], derivatives / f"{name}{MNI.replace('preproc', 'brain')}_mask.nii.gz")
    output = bids / "derivatives" / "brainfm"
    arguments = (bids, output, "participant", "--model", MODEL, "--derivatives", f"fmriprep={derivatives}")
    assert call(*arguments, "--participant-label", "03").exit_code == 0
    assert call(*arguments, "--session-label", "1").exit_code == 0
    assert prepared == []
    stem = output / "sub-03/anat/sub-03_space-MNI152NLin2009cAsym_res-1_desc-testresnet_embedding"
    sidecar = json.loads(stem.with_suffix(".json").read_text())
    assert sidecar["Sources"] == [f"bids:fmriprep:sub-03/anat/sub-03{MNI}_T1w.nii.gz"]
    links = json.loads((output / "dataset_description.json").read_text())["DatasetLinks"]
    assert links == {"raw": bids.as_uri(), "fmriprep": derivatives.as_uri()}
    np.testing.assert_allclose(
        np.load(stem.with_suffix(".npy")), brainfm.embed([small_sample], MODEL).vectors[0], rtol=1e-5
    )
    result = call(bids, output, "group")
    assert result.exit_code == 0, result.output
    assert len(table.read(output / "group_desc-testresnet_embedding.parquet")) == 2
    assert list(pd.read_csv(output / "group_T1w.tsv", sep="\t")["verdict"].isna()) == [True, True]


def test_scan_is_read_once_for_all_models_and_for_those_alone_that_lack_it(bids, small_sample, tmp_path, monkeypatch):
    from brainfm.scan import read as reading

    derivatives = dataset(tmp_path / "fmriprep")
    for name in ("sub-01/ses-1/anat/sub-01_ses-1", "sub-03/anat/sub-03"):
        (derivatives / name).parent.mkdir(parents=True)
        os.link(small_sample[0], derivatives / f"{name}{MNI}_T1w.nii.gz")
        os.link(small_sample[1], derivatives / f"{name}{MNI.replace('preproc', 'brain')}_mask.nii.gz")
    read, read_file = [], reading._read

    def counted(image, what):
        read.append(Path(image).name)
        return read_file(image, what)

    def run(*models):
        read.clear()
        options = [part for model in models for part in ("--model", model)]
        done = call(bids, tmp_path / "out", "participant", "-d", f"fmriprep={derivatives}", *options)
        assert done.exit_code == 0, done.output
        return sorted(name for name in read if name.endswith("_T1w.nii.gz"))

    monkeypatch.setattr(reading, "_read", counted)
    both = [f"{name}{MNI}_T1w.nii.gz" for name in ("sub-01_ses-1", "sub-03")]
    alone = {}
    for model in (MODEL, "test_vit_3d"):
        assert run(model) == both
        for path in (tmp_path / "out").rglob("*_embedding.npy"):
            alone[path] = path.read_bytes()
    assert len(alone) == 4
    first, *_ = sorted(path for path in alone if "testvit" in path.name)
    first.unlink()
    assert run(MODEL, "test_vit_3d") == both[:1]
    shutil.rmtree(tmp_path / "out")
    assert run(MODEL, "test_vit_3d") == both
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*_embedding.npy")} == alone
