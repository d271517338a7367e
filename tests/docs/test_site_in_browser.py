"""The site as Chromium shows it: its main pages in light and in dark, on a phone and on a desk."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from seen import looked_at

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "docs" / "_build" / "html"
PAGES = (
    *("index", "start", "choose", "generated/encoders/simclr_resnet18_3d"),
    *("costs", "refused", "formats", "examples/index"),
)
UNSCROLLED = ("choose", "formats")  # whose tables are there to be compared

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def is_new(site: Path) -> bool:
    """Whether a built site is newer than everything that it is made of."""
    made = ("_build", "generated", "examples")
    sources = [path for path in (ROOT / "docs").rglob("*") if path.relative_to(ROOT / "docs").parts[0] not in made]
    sources += [*(ROOT / "brainfm").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.json")]
    last = max(path.stat().st_mtime for path in sources if path.is_file())
    return (site / "index.html").exists() and (site / "index.html").stat().st_mtime > last


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site; built here without its examples' figures where `.ci/run` has not built it."""
    folder = tmp_path_factory.mktemp("site") / "html"
    if is_new(BUILT):
        shutil.copytree(BUILT, folder)
    else:
        pytest.importorskip("furo")
        command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", "-D", "sphinx_gallery_conf.plot_gallery=0"]
        subprocess.run([*command, str(ROOT / "docs"), str(folder)], check=True, timeout=900)
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_main_pages_are_read_in_both_themes_on_a_phone_and_on_a_desk(page, site, browser):
    seen = looked_at(site / f"{page}.html", browser)
    assert {where: one["faults"] for where, one in seen.items() if one["faults"]} == {}
    assert page not in UNSCROLLED or not any(one["scrolls"] for one in seen.values())


@pytest.mark.parametrize("page", ["index", "choose"])
def test_pages_are_dark_for_whoever_wants_that(page, site, browser):
    for dark in (False, True):
        with browser.page(site / f"{page}.html", dark=dark) as shown:
            grey = np.asarray(shown.picture().convert("L"))
        assert grey.std() > 8, "blank"
        assert (np.median(grey) < 80) == dark


def test_commands_are_on_their_page_as_they_are_typed(site):
    assert "--from RESULTS/run.json does again" in " ".join((site / "cli.html").read_text(encoding="utf-8").split())


def test_no_example_prints_a_warning_of_another_library(site):
    pages = {page.name: page.read_text("utf-8") for page in (site / "examples").glob("*.html")}
    assert pages
    assert [name for name, text in pages.items() if "/site-packages/" in text] == []
