"""The examples for clusters and containers, as far as a machine without these can run them.

`sbatch` and `srun` are stand-ins that run an array's tasks one after another with Slurm's variables. The Dockerfile and
the Apptainer definition are read, and held against what they copy, install and start.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from test_bids import MNI, dataset

from brainfm import table

ROOT = Path(__file__).parent.parent
HPC = ROOT / "examples" / "hpc"
SBATCH = """#!{python}
import os, subprocess, sys
options, words = dict(), sys.argv[1:]
while words and words[0].startswith("--"):
    name, _, value = words.pop(0).partition("=")
    options[name] = value
with open(os.environ["SBATCH_LOG"], "a") as log:
    log.write(repr((options, words)) + "\\n")
script = ["bash", "-c", options["--wrap"]] if "--wrap" in options else ["bash", *words]
first, last = (int(n) for n in options.get("--array", "0-0").split("-"))
for task in range(first, last + 1):
    slurm = {{"SLURM_CPUS_PER_TASK": "1"}}
    if "--array" in options:
        said = {{"ID": task, "COUNT": last - first + 1, "MIN": first, "MAX": last, "STEP": 1}}
        slurm |= {{f"SLURM_ARRAY_TASK_{{name}}": str(value) for name, value in said.items()}}
    subprocess.run(script, env=os.environ | slurm, stdout=sys.stderr)
print(42)
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A cluster's commands on PATH, and `brainfm`; what `sbatch` was given is in the file that is returned."""
    (tmp_path / "bin").mkdir()
    programs = {
        "sbatch": SBATCH.format(python=sys.executable),
        "srun": '#!/bin/sh\nexec "$@"\n',
        "brainfm": f'#!/bin/sh\nexec {sys.executable} -m brainfm "$@"\n',
    }
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("SBATCH_LOG", str(tmp_path / "sbatch.log"))
    monkeypatch.setenv("TASKS", "2")
    return tmp_path / "sbatch.log"


def submit(script, *arguments):
    command = ["bash", str(HPC / script), *map(str, arguments), "--model", "test_resnet_3d"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
def test_array_embeds_a_list_and_one_job_merges_it(slurm, small_sample, tmp_path):
    lines = [f"{path}/t1.nii.gz,{path}/m.nii.gz,p{n}" for n, path in enumerate(("a b", "c", "d"))]
    for line in lines:
        folder = tmp_path / line.split("/")[0]
        folder.mkdir()
        os.link(small_sample[0], folder / "t1.nii.gz")
        os.link(small_sample[1], folder / "m.nii.gz")
    (tmp_path / "my scans.csv").write_text("\n".join(["image_path,mask_path,patient_id", *lines, ""]))
    submit("embed.sh", tmp_path / "my scans.csv", tmp_path / "the table.csv")
    assert [record.patient_id for record in table.read(tmp_path / "the table.csv").records] == ["p0", "p1", "p2"]
    array, merge = slurm.read_text().splitlines()
    assert "'--array': '1-2'" in array
    assert "'--dependency': 'afterany:42'" in merge


@pytest.mark.slow
def test_array_runs_the_bids_app_and_one_job_the_group(slurm, small_sample, tmp_path):
    pytest.importorskip("bids2table", reason="needs the extra [bids], which needs Python 3.11")
    names = [f"sub-0{n}/anat/sub-0{n}" for n in range(3)]
    derivatives = dataset(tmp_path / "fmriprep")
    bids = dataset(tmp_path / "bids", *(f"{name}_T1w.nii.gz" for name in names))
    for name in names:
        (derivatives / name).parent.mkdir(parents=True)
        os.link(small_sample[0], derivatives / f"{name}{MNI}_T1w.nii.gz")
    said = submit("bids.sh", bids, tmp_path / "the out", "-d", f"fmriprep={derivatives}")
    assert len(re.findall(" scans? → ", said)) == 4  # of two tasks, and of the group's two tables
    assert len(table.read(tmp_path / "the out" / "group_desc-testresnet_embedding.parquet")) == 3


@pytest.mark.parametrize("script", ["bids.sh", "embed.sh", "task.sbatch"])
def test_script_is_a_script(script):
    subprocess.run(["bash", "-n", str(HPC / script)], check=True)


# --- Containers -----------------------------------------------------------------------------------

INSTRUCTIONS = {"FROM", "COPY", "RUN", "ENV", "ENTRYPOINT"}  # of Dockerfile's, those that are used


def instructions(name):
    """The instructions of a Dockerfile, with lines that go on joined."""
    text = re.sub(r"\\\n", " ", (HPC / name).read_text())
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line and not line.startswith("#")]


def sections():
    """The header and the sections of the Apptainer definition."""
    text = (HPC / "brainfm.def").read_text()
    head, *rest = re.split(r"^%(\w+)\n", text, flags=re.MULTILINE)
    header = dict(line.split(": ") for line in head.splitlines() if line and not line.startswith("#"))
    return header, dict(zip(rest[::2], rest[1::2], strict=True))


def installed(line):
    """What a line of pip's installs, as a requirement."""
    words = shlex.split(line)
    assert words[:2] == ["pip", "install"]
    return Requirement("brainfm" + words[-1].removeprefix("/src"))


def test_dockerfile_installs_extras_that_there_are_on_a_python_that_has_them():
    told = instructions("Dockerfile")
    assert {name for name, _ in told} <= INSTRUCTIONS
    assert told[0][0] == "FROM"
    assert told[0][1] == sections()[0]["From"] == "python:3.11-slim"  # bids2table's least
    runs = [step.strip() for name, text in told if name == "RUN" for step in text.split("&&")]
    for step in runs:
        subprocess.run(["bash", "-n", "-c", step], check=True)
    project = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in installed(runs[0]).extras)
    post = [line.strip() for line in sections()[1]["post"].splitlines() if line.strip()]
    assert installed(post[0]) == installed(runs[0])
    assert sorted(post) == sorted(runs)


def test_what_the_containers_copy_is_what_the_package_is_built_of(tmp_path):
    copied = [shlex.split(text) for name, text in instructions("Dockerfile") if name == "COPY"]
    there = {(source, Path(to) / source if to.endswith("/") else Path(to)) for *all_, to in copied for source in all_}
    lines = [line.split() for line in sections()[1]["files"].splitlines() if line.strip()]
    assert there == {(source, Path(to)) for source, to in lines}
    for source, to in there:
        place = tmp_path / to.relative_to("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, place)
    project = (ROOT / "pyproject.toml").read_text()
    needed = [*json.loads(re.search(r"license-files = (\[.*\])", project)[1])]
    needed += re.findall(r'^(?:readme|path) = "(.*)"', project, re.MULTILINE)
    needed += json.loads(re.search(r"\nwheel.*|\npackages = (\[.*\])", project)[1])
    assert len(needed) == 6
    assert all((tmp_path / "src" / name).exists() for name in needed)


@pytest.mark.parametrize("kind", ["docker", "apptainer"])
def test_container_starts_the_bids_app(kind, slurm):
    if kind == "docker":
        start = json.loads(dict(instructions("Dockerfile"))["ENTRYPOINT"])
        command = [*start, "--version"]
    else:
        command = ["sh", "-c", sections()[1]["runscript"], "run", "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith("brainfm, version")
