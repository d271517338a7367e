"""The page of prepared scans as Chromium shows it."""

import re
import shutil

import pytest
from click.testing import CliRunner
from seen import faults_of
from test_page import write_scan

from brainfm.cli import main
from brainfm.prep.report import write_page
from brainfm.scan.verdict import decision_of, verdict_of

pytestmark = pytest.mark.browser

# Sorts by the volume, then says what is shown.
LOOK = """
Promise.all([...document.images].map((image) => image.decode().catch(() => 0))).then(() => {
  const table = document.querySelector("table"), said = {};
  const heads = [...table.tHead.rows[0].cells];
  const column = heads.findIndex((head) => head.textContent === "litres");
  said.first = table.tBodies[0].rows[0].cells[0].textContent;
  heads[column].querySelector("button").click();
  said.litres = [...table.tBodies[0].rows].map((row) => row.cells[column].textContent);
  said.shown = [...document.images].filter((i) => i.naturalWidth > 0 && i.clientHeight > 50).length;
  said.small = document.images[0].clientWidth;
  document.images[0].focus();
  said.grows = document.images[0].clientWidth > 1.2 * said.small;
  document.activeElement.blur();
  const card = [...table.tBodies[0].rows].find((row) => row.cells[0].textContent === "z");
  const right = Math.max(...[...card.cells].map((cell) => cell.getBoundingClientRect().right));
  said.inside = right <= document.documentElement.clientWidth;
  const figures = [...card.querySelectorAll(".figure")].map((cell) => [cell.getBoundingClientRect(), cell]);
  figures.sort(([a], [b]) => a.top - b.top || a.left - b.left);
  said.worst = figures[0][1].dataset.name;
  said.wide = document.documentElement.scrollWidth > window.innerWidth;
  return said;
});
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of four scans, beside their folder; a test that changes these takes a copy."""
    folder = tmp_path_factory.mktemp("page")
    for name, litres in (("a", 1.5), ("b", 1.2), ("c", 1.9)):
        write_scan(folder / "prep" / name, litres=litres)
    write_scan(folder / "prep" / "z", "fail", turn=30, litres=0.4)
    write_page(folder / "prep", folder / "qc.html")
    return folder / "qc.html"


@pytest.mark.parametrize(("width", "picture"), [(1280, 600), (800, 700), (500, 400)])
def test_everything_is_shown_and_sorted_whatever_the_width(width, picture, page, browser):
    with browser.page(page, width=width) as shown:
        seen = shown.run(LOOK)
    assert seen.pop("small") >= picture
    assert seen == {
        "first": "z",
        "litres": ["0.4", "1.2", "1.5", "1.9"],
        "shown": 4,
        "grows": width > 1000,
        "inside": True,
        "worst": "litres",
        "wide": False,
    }


def test_page_is_read_in_both_themes_on_a_phone_and_on_a_desk(page, browser):
    assert faults_of(page, browser) == []


def test_page_is_not_blank(page, browser):
    with browser.page(page, width=1200) as shown:
        assert len(shown.picture().convert("L").getcolors()) > 50


# Decides, and says what is to be saved.
DECIDE = """
(async () => {
  const click = (group, value) => group.querySelector(`[value=${value}]`).click();
  const write = (input, text) => { input.value = text; input.dispatchEvent(new Event("input", { bubbles: true })); };
  const [first, second, third] = [...document.querySelectorAll(".decide")];
  const save = document.querySelector(".save"), said = { before: save.hidden };
  const saved = new Promise((done) => { URL.createObjectURL = (blob) => { blob.text().then(done); return "#"; }; });
  click(first, "accept");
  click(second, "accept");
  click(second, "reject");
  click(third, "reject");
  click(third, "reject");
  write(first.querySelector("input"), "seen, and it's whole");
  said.missing = save.textContent;
  write(second.querySelector("input"), "blurred");
  write(save.querySelector("input"), "Ann <a>");
  said.ready = !save.querySelector("button").disabled;
  save.querySelector("button").click();
  said.saved = await saved;
  return said;
})()
"""


def test_decisions_made_on_the_page_are_saved_and_taken(page, browser, tmp_path):
    shutil.copytree(page.parent / "prep", tmp_path / "prep")
    with browser.page(page) as shown:
        said = shown.run(DECIDE)
    assert (said["before"], said["ready"]) == (True, True)
    assert "2 decided; say why of " in said["missing"]
    (tmp_path / "decisions.json").write_text(said["saved"], encoding="utf-8")
    shown = re.findall(r'data-scan="(\w+)"', page.read_text(encoding="utf-8"))
    command = ["qc", str(tmp_path / "prep"), "--decisions", str(tmp_path / "decisions.json")]
    result = CliRunner().invoke(main, command)
    assert result.output == f"{shown[0]}: accepted by Ann <a>\n{shown[1]}: rejected by Ann <a>\n"
    assert [verdict_of(tmp_path / "prep" / name) for name in shown[:3]] == ["accepted", "rejected", "pass"]
    kept = decision_of(tmp_path / "prep" / shown[0])
    assert kept.why == "seen, and it's whole"
    assert kept.date.startswith("20")
