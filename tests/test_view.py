"""`brainfm view`: what the page holds, and what a browser makes of it."""

from __future__ import annotations

import base64
import gzip
import json
import re

import nibabel as nib
import numpy as np
import pytest
from browser import Browser
from click.testing import CliRunner
from seen import faults_of

from brainfm import view
from brainfm.assets import SAMPLE_MASK, SAMPLE_SCAN
from brainfm.cli import main
from brainfm.errors import ScanError
from brainfm.render import TEMPLATES

GL = ("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")


@pytest.fixture
def features(small_sample, tmp_path):
    """Dense features [x, y, z, C] of the scan at 32 mm, the first of which rises from left to right."""
    affine = nib.load(small_sample[0]).affine @ np.diag([8, 8, 8, 1])
    cells = np.random.default_rng(0).normal(0, 0.1, (6, 6, 5, 12)).astype(np.float32)
    cells[..., 0] += np.linspace(-3, 3, 6)[:, None, None]
    nib.Nifti1Image(cells, affine).to_filename(tmp_path / "dense.nii.gz")
    return tmp_path / "dense.nii.gz"


def run(*arguments):
    return CliRunner().invoke(main, ["view", *map(str, arguments)])


def held(page):
    """What a page holds: kind → image, and its JSON."""
    volumes = json.loads(re.search(r'id="volumes">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)[1])
    return {
        volume["kind"]: (nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(volume["data"]))), volume)
        for volume in volumes
    }


def test_page_holds_the_brain_alone_its_outline_and_where_they_lie(small_sample, tmp_path):
    scan, mask = map(nib.load, small_sample)
    head = np.asarray(scan.dataobj) + 50.0  # as if there were a skull around it
    nib.Nifti1Image(head, scan.affine).to_filename(tmp_path / "head.nii.gz")
    result = run(tmp_path / "head.nii.gz", "--mask", small_sample[1], "-o", tmp_path / "view.html")
    assert result.exit_code == 0, result.output
    assert "left out of this file" in result.output
    (grey, _), (outline, _) = held(tmp_path / "view.html").values()
    inside = np.asarray(mask.dataobj) > 0
    np.testing.assert_allclose(grey.affine, scan.affine, atol=1e-4)
    assert grey.get_data_dtype() == np.uint8
    assert not np.asarray(grey.dataobj)[~inside].any()
    assert np.corrcoef(np.asarray(grey.dataobj)[inside], head[inside])[0, 1] > 0.99
    edge = np.asarray(outline.dataobj) > 0
    assert not edge[~inside].any()
    assert 0.05 < edge.sum() / inside.sum() < 0.5


def test_page_of_a_head_says_that_a_face_can_be_seen(small_sample, tmp_path):
    for arguments, said in (
        ([], "No brain mask was given. If this is a whole head, a face can be drawn"),
        (["--mask", small_sample[1], "--head"], "This file holds a whole head, from which a face can be drawn"),
    ):
        output = run(small_sample[0], *arguments, "-o", tmp_path / "view.html").output
        page = (tmp_path / "view.html").read_text(encoding="utf-8")
        assert output.startswith(said)
        assert said in re.search('<p class="warnings" role="alert">(.*?)</p>', page)[1]
        assert 'value="render"' not in page  # no face drawn either
    run(small_sample[0], "--mask", small_sample[1], "-o", tmp_path / "view.html")
    assert "face" not in re.sub("<script.*?</script>", "", (tmp_path / "view.html").read_text(), flags=re.DOTALL)


def test_dense_features_are_shown_by_their_principal_components(small_sample, features, tmp_path):
    result = run(*small_sample[:1], "--mask", small_sample[1], "--overlay", features, "-o", tmp_path / "view.html")
    assert "the first 3 principal components of 12 features, 6 × 6 × 5 cells of 32 × 32 × 32 mm" in result.output
    image, volume = held(tmp_path / "view.html")["map"]
    assert image.shape == (6, 6, 5, 3)
    first = np.asarray(image.dataobj)[..., 0]
    assert abs(np.corrcoef(first.mean(axis=(1, 2)), np.arange(6))[0, 1]) > 0.99
    assert np.abs(np.asarray(image.dataobj)).max() == pytest.approx(1, abs=1e-3)
    assert [re.sub(r"\d+ %", "N %", name) for name in volume["components"]] == [
        f"component {n} (N % of the variance)" for n in (1, 2, 3)
    ]
    assert int(re.search(r"\((\d+) %", volume["components"][0])[1]) > 90


def test_saliency_keeps_its_sign_and_its_place(small_sample, tmp_path):
    scan = nib.load(small_sample[0])
    numbers = np.zeros(scan.shape, np.float32)
    numbers[10:20, 20:30, 15:25], numbers[30:35, 20:30, 15:25] = 0.4, -0.2
    flipped = nib.Nifti1Image(numbers, scan.affine).as_reoriented(np.array([[0, -1], [1, 1], [2, 1]]))
    flipped.to_filename(tmp_path / "saliency.nii.gz")
    result = run(small_sample[0], "--overlay", tmp_path / "saliency.nii.gz", "-o", tmp_path / "view.html")
    assert "from −0.4 (blue to green) to 0.4 (orange to yellow)" in result.output
    image, _ = held(tmp_path / "view.html")["map"]
    np.testing.assert_allclose(np.asarray(image.dataobj), numbers / 0.4, atol=1e-3)
    np.testing.assert_allclose(image.affine, scan.affine, atol=1e-3)


def test_large_scan_is_averaged_and_it_is_said(small_sample, tmp_path, monkeypatch):
    monkeypatch.setattr(view, "MAX_SCAN_VOXELS", 20_000)  # of 92,160
    scan = nib.load(small_sample[0])
    result = run(small_sample[0], "-o", tmp_path / "view.html")
    assert "24 × 24 × 20 voxels, averaged to 8 × 8 × 8 mm from 4 × 4 × 4 mm" in result.output
    image, _ = held(tmp_path / "view.html")["scan"]
    assert image.shape == (24, 24, 20)
    first = scan.affine[:3] @ [0.5, 0.5, 0.5, 1]  # the middle of the eight voxels that it is made of
    np.testing.assert_allclose(image.affine[:3, 3], first, atol=1e-3)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("mask of others", "not on the scan's voxels"),
        ("empty mask", "the brain mask is empty"),
        ("map elsewhere", "lies nowhere on the scan"),
        ("map of nothing", "cannot be read as a map"),
        ("map of nan", "finite numbers"),
    ],
)
def test_what_does_not_belong_to_the_scan_is_refused(what, reason, small_sample, tmp_path):
    scan = nib.load(small_sample[0])
    other = tmp_path / "other.nii.gz"
    array, affine = np.ones(scan.shape, np.float32), scan.affine.copy()
    if what == "mask of others":
        array = array[1:]
    if what == "empty mask":
        array[:] = 0
    if what == "map elsewhere":
        affine[0, 3] += 1000
    if what == "map of nan":
        array[0, 0, 0] = np.nan
    nib.Nifti1Image(array, affine).to_filename(other)
    if what == "map of nothing":
        other.write_bytes(b"nothing")
    result = run(small_sample[0], "--mask" if "mask" in what else "--overlay", other, "-o", tmp_path / "view.html")
    assert result.exit_code == 1
    assert reason in result.output
    assert not (tmp_path / "view.html").exists()


def test_page_is_one_html_file_that_asks_no_machine(small_sample, tmp_path):
    with pytest.raises(ScanError):
        view.write_view(tmp_path / "nothing.nii.gz", tmp_path / "view.html")
    assert "ends in .html" in run(small_sample[0], "-o", tmp_path / "view.png").output
    run(small_sample[0], "-o", tmp_path / "view.html")
    page = (tmp_path / "view.html").read_text(encoding="utf-8")
    assert not re.search(
        r'(src|href)="(?!data:)', page.replace((TEMPLATES / "vendor" / "niivue.umd.js").read_text(), "")
    )
    assert "default-src 'none'" in page


# --- In a browser ---------------------------------------------------------------------------------


@pytest.fixture
def page(small_sample, features, tmp_path):
    view.write_view(small_sample[0], tmp_path / "view.html", mask=small_sample[1], overlay=features)
    return tmp_path / "view.html"


# As of a browser that has none.
NO_WEBGL = """
const context = HTMLCanvasElement.prototype.getContext;
HTMLCanvasElement.prototype.getContext = function (kind, ...rest) {
  return kind.startsWith("webgl") ? null : context.call(this, kind, ...rest);
};
"""

# How much of each canvas is not black, after the components were gone through.
DRAWN = """
(() => {
  const component = document.querySelector("#component");
  component.value = "1";
  component.dispatchEvent(new Event("input", { bubbles: true }));
  return [...document.querySelectorAll(".slices canvas")].map((canvas) => {
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    let [bright, coloured, yellow] = [0, 0, 0];
    for (let n = 0; n < data.length; n += 4) {
      const [r, g, b] = data.slice(n, n + 3);
      bright += r + g + b > 60;
      coloured += Math.abs(r - b) > 20;
      yellow += r === 240 && g === 228 && b === 66;
    }
    return [canvas.width, canvas.height, bright, coloured, yellow];
  });
})()
"""


@pytest.mark.browser
def test_without_webgl_slices_are_shown_and_it_is_said(page, browser):
    with browser.page(page, before=NO_WEBGL) as shown:
        shown.wait_for("document.body.dataset.shown === 'slices'")
        drawn, dom = shown.run(DRAWN), shown.html()
    assert "this browser has no WebGL 2): slices instead" in dom
    assert [one[:2] for one in drawn] == [[48, 48], [48, 40], [48, 40]]
    assert all(bright > 400 and coloured > 100 and yellow > 40 for *_, bright, coloured, yellow in drawn)


@pytest.mark.browser
def test_page_is_read_in_both_themes_on_a_phone_and_on_a_desk(page, browser):
    assert faults_of(page, browser, NO_WEBGL) == []


# How many pictures NiiVue has drawn that differ, as the choices change.
SHOWN = """
(() => {
  const canvas = document.querySelector("#viewer");
  const picture = () => { viewer.drawScene(); return canvas.toDataURL(); };
  const choose = (id, change) => {
    const one = document.querySelector(id);
    change(one);
    one.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const seen = [picture()];
  choose("#component", (one) => { one.value = "1"; });
  seen.push(picture());
  choose("#outline", (one) => { one.checked = false; });
  seen.push(picture());
  choose("#opacity", (one) => { one.value = "0"; });
  seen.push(picture());
  choose("#planes", (one) => { one.value = "axial"; });
  seen.push(picture());
  return new Set(seen).size;
})()
"""


@pytest.fixture
def drawing(browser, tmp_path):
    """Chromium whose processor draws as a graphics card would, which takes a while; skipped as `browser` is."""
    running = Browser(tmp_path / "profile", *GL)
    yield running
    running.close()


@pytest.mark.browser
@pytest.mark.slow
def test_niivue_shows_the_scan_the_outline_and_the_features_from_a_file(page, drawing):
    with drawing.page(page, width=500, height=700) as shown:
        shown.wait_for("document.body.dataset.shown === 'niivue'")
        assert shown.run(SHOWN) == 5


@pytest.mark.browser
@pytest.mark.slow
def test_a_scan_at_1_mm_is_shown_at_once_where_no_graphics_card_draws(drawing, tmp_path):
    """As slices: NiiVue took more than five minutes to draw these 8.5 million voxels by the processor."""
    view.write_view(SAMPLE_SCAN, tmp_path / "view.html", mask=SAMPLE_MASK)
    with drawing.page(tmp_path / "view.html") as shown:
        shown.wait_for("document.body.dataset.shown === 'slices'")
        assert "no graphics card draws for this browser" in shown.html()
