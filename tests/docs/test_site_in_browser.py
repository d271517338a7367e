"""The site as Chromium shows it: its main pages in light and in dark, on a phone and on a desk."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from seen import LOOK, looked_at, shots_of

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
    """The site, with the script in its main pages that says what is wrong with them; built here without its examples'
    figures where `.ci/run` has not built it."""
    folder = tmp_path_factory.mktemp("site") / "html"
    if is_new(BUILT):
        shutil.copytree(BUILT, folder)
    else:
        pytest.importorskip("furo")
        command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", "-D", "sphinx_gallery_conf.plot_gallery=0"]
        subprocess.run([*command, str(ROOT / "docs"), str(folder)], check=True, timeout=900)
    for page in PAGES:
        text = (folder / f"{page}.html").read_text(encoding="utf-8")
        before, end, after = text.rpartition("</body>")
        named = f'<script>document.body.dataset.page = "{page}"; {LOOK}</script>'
        (folder / f"{page}.html").write_text(before + named + end + after, encoding="utf-8")
    return folder


def test_main_pages_are_read_in_both_themes_on_a_phone_and_on_a_desk(site, chromium):
    seen = looked_at({page: f"{page}.html" for page in PAGES}, chromium, site, "--virtual-time-budget=20000")
    where = [f"{one['page']}, {one['theme']}, {one['width']} px: {fault}" for one in seen for fault in one["faults"]]
    assert where == []
    assert [one["scrolls"] for one in seen if one["page"] in UNSCROLLED and one["scrolls"]] == []


def test_pages_are_dark_for_whoever_wants_that(site, chromium):
    for name, picture in shots_of({"index": "index.html", "choose": "choose.html"}, chromium, site).items():
        grey = np.asarray(picture.convert("L"))
        assert grey.std() > 8, f"{name}: blank"
        assert (np.median(grey) < 80) == ("-dark-" in name), name
