"""The page as Chromium shows it."""

import re
from pathlib import Path

import pytest
from PIL import Image
from seen import faults_of, with_script
from test_report import SCRIPT, TASKS, benchmark

from brainfm.downstream.report import write_report

pytestmark = pytest.mark.browser

# Waits for every image, then notes on <body> how many have a size and how many columns were sorted by.
COUNT = """
Promise.all([...document.images].map((image) => image.decode().catch(() => 0))).then(() => {
  const shown = [...document.images].filter((image) => image.naturalWidth > 0 && image.clientHeight > 100);
  document.body.dataset.shown = shown.length;
  const button = document.querySelector("thead tr:last-child th:nth-child(4) button");
  button.click();
  const rows = [...document.querySelector("tbody").rows].map((row) => row.cells[3].textContent);
  document.body.dataset.sorted = rows.map((text) => parseFloat(text)).join(" ");
  document.body.dataset.wide = document.documentElement.scrollWidth > window.innerWidth;
});
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The page of a benchmark of two tasks."""
    return write_report(benchmark(tmp_path_factory.mktemp("page"), TASKS[2:], patients=30, seeds=2))


def test_every_figure_is_shown_and_nothing_foreign_runs(page, chromium, tmp_path):
    """In a copy whose policy lets one more script in: the one that counts."""
    (tmp_path / "copy.html").write_text(with_script(page.read_text(), COUNT))
    body = re.search("<body.*?>", chromium("--window-size=400,800", "--dump-dom", f"file://{tmp_path}/copy.html"))[0]
    figures = list((page.parent / "figures").glob("*.svg"))
    assert f'data-shown="{len(figures)}"' in body
    assert len(figures) == 7
    values = [float(value) for value in re.search('data-sorted="(.*?)"', body)[1].split()]
    assert len(values) == 6
    assert values == sorted(values)
    assert 'data-wide="false"' in body  # on a phone, tables scroll by themselves
    assert "id=" not in body  # set by the titles' script


def test_page_is_read_in_both_themes_on_a_phone_and_on_a_desk(page, chromium, tmp_path):
    assert faults_of(page, chromium, tmp_path) == []


def test_page_runs_under_its_own_policy(page, chromium):
    dom = chromium("--dump-dom", f"file://{page}")
    assert "<button>" in dom  # added by the page's script
    assert SCRIPT not in dom
    assert re.search("<body.*?>", dom)[0] == "<body>"


def test_page_is_not_blank_in_light_and_in_dark(page, chromium, tmp_path):
    means = []
    for scheme in ("light", "dark"):
        picture = tmp_path / f"{scheme}.png"
        dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
        chromium(*dark, "--window-size=1200,900", f"--screenshot={picture}", f"file://{page}")
        with Image.open(picture) as image:
            grey = image.convert("L")
            assert len(grey.getcolors()) > 50
            means.append(grey.resize((1, 1)).getpixel((0, 0)))
    assert means[0] > 200 > 80 > means[1]
