"""The page as Chromium shows it."""

from pathlib import Path

import pytest
from seen import faults_of
from test_report import SCRIPT, TASKS, benchmark

from brainfm.downstream.report import write_report

pytestmark = pytest.mark.browser

# Waits for every image, then says how many have a size, and what a column holds once it is sorted by.
COUNT = """
Promise.all([...document.images].map((image) => image.decode().catch(() => 0))).then(() => {
  document.querySelector("thead tr:last-child th:nth-child(4) button").click();
  return {
    shown: [...document.images].filter((image) => image.naturalWidth > 0 && image.clientHeight > 100).length,
    sorted: [...document.querySelector("tbody").rows].map((row) => parseFloat(row.cells[3].textContent)),
    wide: document.documentElement.scrollWidth > window.innerWidth,
    body: document.body.cloneNode(false).outerHTML,
  };
});
"""


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Figures are tested here."""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The page of a benchmark of two tasks."""
    return write_report(benchmark(tmp_path_factory.mktemp("page"), TASKS[2:], patients=30, seeds=2))


def test_every_figure_is_shown_and_nothing_foreign_runs(page, browser):
    with browser.page(page, width=390) as shown:
        seen, dom = shown.run(COUNT), shown.html()
    assert seen["shown"] == len(list((page.parent / "figures").glob("*.svg"))) == 7
    assert len(seen["sorted"]) == 6
    assert seen["sorted"] == sorted(seen["sorted"])
    assert seen["wide"] is False  # on a phone, tables scroll by themselves
    assert seen["body"] == "<body></body>"  # nothing is set by the titles' script
    assert "<button>" in dom  # added by the page's script, under the page's own policy
    assert SCRIPT not in dom


def test_page_is_read_in_both_themes_on_a_phone_and_on_a_desk(page, browser):
    assert faults_of(page, browser) == []


def test_page_is_not_blank_in_light_and_in_dark(page, browser):
    means = []
    for dark in (False, True):
        with browser.page(page, width=1200, dark=dark) as shown:
            grey = shown.picture().convert("L")
        assert len(grey.getcolors()) > 50
        means.append(grey.resize((1, 1)).getpixel((0, 0)))
    assert means[0] > 200 > 80 > means[1]
