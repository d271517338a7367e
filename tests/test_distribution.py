"""What travels: one name, one version, the same dependencies wherever they are listed, and text that holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tomllib
import torch
import yaml
from click.testing import CliRunner
from jinja2 import Environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import brainfm
from brainfm.cli import main
from brainfm.render import TEMPLATES
from brainfm.version import DISTRIBUTION

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONDA = {"torch": "pytorch"}  # what conda-forge calls otherwise


@pytest.fixture(scope="module")
def recipe():
    text = (ROOT / "conda" / "meta.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(Environment(autoescape=True).from_string(text).render(PYTHON="python"))


def requirements(lines):
    """Name → bounds, of a recipe's lines such as "numpy >=1.26"."""
    split = [line.partition(" ") for line in lines]
    return {name: SpecifierSet(bounds) for name, _, bounds in split}


# --- The name and the version ---------------------------------------------------------------------


def test_distribution_has_one_name_which_extras_of_extras_use():
    assert PROJECT["name"] == DISTRIBUTION  # read by errors.py, to say what an extra lacks
    own = [
        requirement.name
        for lines in PROJECT["optional-dependencies"].values()
        for requirement in map(Requirement, lines)
        if set(requirement.extras) & set(PROJECT["optional-dependencies"])
    ]
    assert set(own) == {PROJECT["name"]}


def test_no_other_file_tells_pip_the_name():
    """On PyPI it is another package's today; README says so, and how to install from a checkout."""
    folders = ("brainfm", "docs", "examples", "benchmarks", ".ci", "conda")
    files = [
        path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".js"
    ]
    made = {ROOT / "docs" / name for name in ("_build", "generated", "examples")}  # by a build of the site
    files = [path for path in files if not made & set(path.parents)]
    files += [ROOT / name for name in ("README.md", "AGENTS.md", "hubconf.py")]
    told = re.compile(rf"pip3? install[^\n`]*?[\s\"'](?:{re.escape(DISTRIBUTION)}|brainfm)(?![\w/.-])")
    found = [
        (path.relative_to(ROOT).as_posix(), line.strip())
        for path in files
        for line in path.read_text(encoding="utf-8", errors="ignore").splitlines()
        for part in told.findall(line)
        if "gets an unrelated package" not in line and not re.search(r"install[^\n]*\s\.", part)
    ]
    assert found == []


def test_version_is_the_same_wherever_it_stands(recipe):
    assert str(recipe["package"]["version"]) == brainfm.__version__
    for command in (["--version"], ["bids", "--version"]):
        assert CliRunner().invoke(main, command).output == f"brainfm, version {brainfm.__version__}\n"


# --- Dependencies and files -----------------------------------------------------------------------


def test_recipe_for_conda_has_the_dependencies_and_bounds_of_pyproject(recipe):
    wanted = {CONDA.get(one.name, one.name): one.specifier for one in map(Requirement, PROJECT["dependencies"])}
    wanted["python"] = SpecifierSet(PROJECT["requires-python"])
    assert requirements(recipe["requirements"]["run"]) == wanted
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    host = requirements(recipe["requirements"]["host"])
    assert {one.name: one.specifier for one in map(Requirement, build)} | {"pip": SpecifierSet()} == {
        name: bounds for name, bounds in host.items() if name != "python"
    }
    assert host["python"] == wanted["python"]


def test_recipe_for_conda_says_what_pyproject_says(recipe):
    assert recipe["about"]["license"] == PROJECT["license"]
    assert recipe["about"]["summary"] == PROJECT["description"]
    assert recipe["about"]["license_file"] == PROJECT["license-files"]
    [(command, entry)] = PROJECT["scripts"].items()
    assert recipe["build"]["entry_points"] == [f"{command} = {entry}"]


def test_licences_of_what_is_packaged_are_packaged():
    files = [ROOT / name for name in PROJECT["license-files"]]
    assert all(path.stat().st_size > 500 for path in files)
    vendored = [path for path in (TEMPLATES / "vendor").iterdir() if path.name != "LICENSE"]
    text = (TEMPLATES / "vendor" / "LICENSE").read_text(encoding="utf-8")
    assert [path.name for path in vendored] == ["niivue.umd.js"]
    assert all(path.name in text for path in vendored)


# --- Texts ----------------------------------------------------------------------------------------


def test_lines_for_the_hubs_list_of_libraries_run(hub, small_sample, small_model, tmp_path, monkeypatch):
    text = (ROOT / "docs" / "hub_library_snippet.md").read_text(encoding="utf-8")
    lines = re.search(r"=> \[\n\t`(.*?)`,", text, re.DOTALL)[1].replace("${model.id}", "lab/tiny")
    monkeypatch.setattr("brainfm.hub.golden.compute", lambda model: None)
    brainfm.push_to_hub(small_model, "lab/tiny", token="write-token")
    monkeypatch.chdir(small_sample[0].parent)
    said = {}
    with torch.inference_mode():
        exec(lines, said)
    assert said["z"].shape == (1, 128)


def test_release_list_names_what_there_is():
    text = (ROOT / "docs" / "release.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:\.ci|tests|conda|examples|brainfm|docs)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
    for command in re.findall(r"`brainfm (\w+)", text):
        assert command in main.commands, command
