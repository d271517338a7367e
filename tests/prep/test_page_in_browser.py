"""The page of prepared scans as Chromium shows it."""

import html
import re

import pytest
from click.testing import CliRunner
from PIL import Image
from seen import faults_of, with_script
from test_page import write_scan

from brainfm.cli import main
from brainfm.prep.report import write_page
from brainfm.scan.verdict import decision_of, verdict_of

pytestmark = pytest.mark.browser

# Sorts by the volume, then notes on <body> what is shown.
LOOK = """
Promise.all([...document.images].map((image) => image.decode().catch(() => 0))).then(() => {
  const table = document.querySelector("table");
  const heads = [...table.tHead.rows[0].cells];
  const column = heads.findIndex((head) => head.textContent === "litres");
  document.body.dataset.first = table.tBodies[0].rows[0].cells[0].textContent;
  heads[column].querySelector("button").click();
  document.body.dataset.litres = [...table.tBodies[0].rows].map((row) => row.cells[column].textContent).join(" ");
  document.body.dataset.shown = [...document.images].filter((i) => i.naturalWidth > 0 && i.clientHeight > 50).length;
  const small = document.images[0].clientWidth;
  document.images[0].focus();
  document.body.dataset.grows = document.images[0].clientWidth > 1.2 * small;
  document.activeElement.blur();
  document.body.dataset.small = small;
  const card = [...table.tBodies[0].rows].find((row) => row.cells[0].textContent === "z");
  const right = Math.max(...[...card.cells].map((cell) => cell.getBoundingClientRect().right));
  document.body.dataset.inside = right <= document.documentElement.clientWidth;
  const figures = [...card.querySelectorAll(".figure")].map((cell) => [cell.getBoundingClientRect(), cell]);
  figures.sort(([a], [b]) => a.top - b.top || a.left - b.left);
  document.body.dataset.worst = figures[0][1].dataset.name;
  document.body.dataset.wide = document.documentElement.scrollWidth > window.innerWidth;
});
"""


@pytest.fixture
def page(tmp_path):
    for name, litres in (("a", 1.5), ("b", 1.2), ("c", 1.9)):
        write_scan(tmp_path / "prep" / name, litres=litres)
    write_scan(tmp_path / "prep" / "z", "fail", turn=30, litres=0.4)
    write_page(tmp_path / "prep", tmp_path / "qc.html")
    return tmp_path / "qc.html"


@pytest.mark.parametrize(("width", "picture"), [(1280, 600), (800, 700), (500, 400)])
def test_everything_is_shown_and_sorted_whatever_the_width(width, picture, page, chromium, tmp_path):
    """In a copy whose policy lets one more script in: the one that looks. Chromium's windows have 500 px or more."""
    (tmp_path / "copy.html").write_text(with_script(page.read_text(encoding="utf-8"), LOOK), encoding="utf-8")
    body = re.search("<body.*?>", chromium(f"--window-size={width},900", "--dump-dom", f"file://{tmp_path}/copy.html"))[
        0
    ]
    assert 'data-first="z"' in body
    assert 'data-litres="0.4 1.2 1.5 1.9"' in body
    assert 'data-shown="4"' in body
    assert ('data-grows="true"' in body) == (width > 1000)
    assert int(re.search(r'data-small="(\d+)"', body)[1]) >= picture
    assert 'data-inside="true"' in body
    assert 'data-worst="litres"' in body
    assert 'data-wide="false"' in body


def test_page_is_read_in_both_themes_on_a_phone_and_on_a_desk(page, chromium, tmp_path):
    assert faults_of(page, chromium, tmp_path) == []


def test_page_is_not_blank(page, chromium, tmp_path):
    chromium("--window-size=1200,900", f"--screenshot={tmp_path / 'page.png'}", f"file://{page}")
    with Image.open(tmp_path / "page.png") as image:
        assert len(image.convert("L").getcolors()) > 50


DECIDE = """
{
  const click = (group, value) => group.querySelector(`[value=${value}]`).click();
  const write = (input, text) => { input.value = text; input.dispatchEvent(new Event("input", { bubbles: true })); };
  const [first, second, third] = [...document.querySelectorAll(".decide")];
  const save = document.querySelector(".save");
  document.body.dataset.before = save.hidden;
  URL.createObjectURL = (blob) => { blob.text().then((text) => { document.body.dataset.saved = text; }); return "#"; };
  click(first, "accept");
  click(second, "accept");
  click(second, "reject");
  click(third, "reject");
  click(third, "reject");
  write(first.querySelector("input"), "seen, and it's whole");
  document.body.dataset.missing = save.textContent;
  write(second.querySelector("input"), "blurred");
  write(save.querySelector("input"), "Ann <a>");
  document.body.dataset.ready = !save.querySelector("button").disabled;
  save.querySelector("button").click();
}
"""


def test_decisions_made_on_the_page_are_saved_and_taken(page, chromium, tmp_path):
    (tmp_path / "copy.html").write_text(with_script(page.read_text(encoding="utf-8"), DECIDE), encoding="utf-8")
    body = re.search("<body.*?>", chromium("--dump-dom", f"file://{tmp_path}/copy.html"), re.DOTALL)[0]
    said = {name: html.unescape(value) for name, value in re.findall(r'data-(\w+)="(.*?)"', body, re.DOTALL)}
    assert (said["before"], said["ready"]) == ("true", "true")
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
