"""Errors where people meet them: in a notebook one line, and a missing package with the command that brings it."""

from __future__ import annotations

import importlib.metadata
import logging
import subprocess
import sys

import pytest

import brainfm
from brainfm.errors import BrainfmError, MissingExtraError


def shown(cell: str) -> str:
    """What IPython shows of a cell's error."""
    pytest.importorskip("IPython")
    code = (
        "from IPython.core.interactiveshell import InteractiveShell\n"
        f"InteractiveShell.instance(colors='NoColor').run_cell({cell!r})"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900, check=True)
    return ended.stdout + ended.stderr


def test_refusal_is_one_line_in_a_notebook_and_other_errors_keep_their_traceback():
    assert shown("import brainfm; brainfm.get_pretrained_cfg('nothing')").splitlines() == [
        "ModelNameError: unknown model 'nothing'; brainfm.list_models() names them all."
    ]
    assert "Traceback" in shown("1 / 0")


def test_refusal_shows_its_traceback_where_debugging_is_on(monkeypatch):
    def lines() -> list[str]:
        with pytest.raises(brainfm.ScanError) as caught:
            raise brainfm.ScanError("a.nii:\n  no voxels")
        return caught.value._render_traceback_()

    assert lines() == ["ScanError: a.nii: no voxels"]
    monkeypatch.setattr(logging.getLogger("brainfm"), "level", logging.DEBUG)
    logging.getLogger("brainfm").manager._clear_cache()
    assert lines()[0].startswith("Traceback")
    logging.getLogger("brainfm").manager._clear_cache()


METADATA = [
    "numpy>=1.26",
    "deepbet<2,>=1.0.1; extra == 'prep'",
    "simpleitk>=2.3; extra == 'prep'",
    "torch>=99; extra == 'export'",
    "numpy>=1; extra == 'prep'",
]


@pytest.mark.parametrize(
    ("package", "extra", "command"),
    [
        ("SimpleITK", "prep", 'pip install SimpleITK "deepbet<2,>=1.0.1"'),
        ("deepbet", "prep", 'pip install "deepbet<2,>=1.0.1" simpleitk'),
        ("torch", "export", 'pip install "torch>=99"'),  # there, and too old
        ("umap", "none", "pip install umap"),
    ],
)
def test_missing_package_is_named_with_all_that_its_extra_lacks(package, extra, command, monkeypatch):
    here = importlib.metadata.version

    def version(name: str) -> str:
        if name.lower() in ("simpleitk", "deepbet"):
            raise importlib.metadata.PackageNotFoundError(name)
        return here(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: METADATA)
    assert str(MissingExtraError(package, extra)) == f"{package} is not installed; run: {command}"


def test_missing_package_is_named_where_brainfm_is_not_installed(monkeypatch):
    def nothing(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", nothing)
    assert str(MissingExtraError("isal", "fast")) == "isal is not installed; run: pip install isal"


def test_message_is_as_short_with_letters_that_cannot_be_printed():
    assert len(str(BrainfmError("\x01" + "x" * 5000))) == len(str(BrainfmError("x" * 5000))) == 4001


@pytest.mark.parametrize(("imported", "package"), [("sklearn", "scikit-learn"), ("yaml", "pyyaml")])
def test_missing_package_is_named_as_pip_knows_it(imported, package):
    said = str(MissingExtraError(imported, "eval"))
    assert said.startswith(f"{package} is not installed; run: pip install {package}")
    assert f" {imported}" not in f" {said}".replace(package, "")
