"""What is wrong with a page as Chromium shows it, in light and in dark, on a phone and on a desk."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from pathlib import Path

from PIL import Image

WIDTHS = (390, 1280)
THEMES = {"light": (), "dark": ("--blink-settings=preferredColorScheme=0",)}
HEIGHT = 1600  # of a screenshot
MOST = 2500  # elements that are looked at: the reference has tens of thousands, all of a few kinds
AT_ONCE = 4  # pages that one browser opens
CONTRAST = 4.5  # of WCAG 2.2, level AA, whatever the size of the letters

# Says to the page around it what reaches beyond the right edge, what can hardly be read, and what has no name.
LOOK = """
Promise.all([...document.images].map((image) => image.decode().catch(() => 0))).then(() => {
  const parse = (text) => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
  const mix = (a, b, part) => a * part + b * (1 - part);
  const over = (front, back) => [0, 1, 2].map((n) => mix(front[n], back[n], front[3])).concat(1);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (element) => {
    const colour = parse(getComputedStyle(element).backgroundColor);
    if (colour[3] === 1) return colour;
    if (!element.parentElement) return over(colour, [255, 255, 255, 1]);
    return over(colour, behind(element.parentElement));
  };
  const faults = [], ratios = [], scrolls = [];
  const reads = (element, style, what) => {
    const back = behind(element), front = over(parse(style.color), back);
    const [low, high] = [light(front), light(back)].sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05);
    ratios.push(ratio);
    if (ratio < CONTRAST) faults.push(`${ratio.toFixed(2)} of contrast: ${what}`);
  };
  const root = document.querySelector("article[role=main]") ?? document.body;  // of the site, what is not its frame
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width) faults.push(`${document.documentElement.scrollWidth} px wide`);
  for (const element of [...root.querySelectorAll("*:not(script, style, option)")].slice(0, MOST)) {
    const box = element.getBoundingClientRect(), style = getComputedStyle(element);
    if (!box.width || !box.height || style.visibility === "hidden") continue;
    const what = `${element.tagName}.${element.className} ${element.textContent.trim().slice(0, 40)}`;
    const scrolled = element.parentElement.closest(".wide, .table-wrapper, pre, mjx-container");
    const inside = scrolled || (box.left > -0.5 && box.right < width + 0.5);
    if (!inside) faults.push(`${box.left} to ${box.right} of ${width}: ${what}`);
    const speaks = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
    if (speaks && !element.matches(":disabled")) reads(element, style, what);
    for (const pseudo of ["::before", "::after"]) {
      const own = getComputedStyle(element, pseudo);
      if (!["none", "normal", '""'].includes(own.content)) reads(element, own, `${pseudo} ${what}`);
    }
    const name = element.ariaLabel || element.labels?.length || element.textContent.trim();
    if (element.matches("button, input, select, [role=region], canvas") && !name) faults.push(`no name: ${what}`);
    if (element.matches("img:not([alt])")) faults.push("a picture without a text");
    if (element.matches("table:not(:has(th))")) faults.push(`no headers: ${what}`);
    if (element.matches("img") && !element.naturalWidth) faults.push(`a picture that is not there: ${element.src}`);
    if (element.matches(".table-wrapper") && element.scrollWidth > element.clientWidth + 1) scrolls.push(what);
    if (element.matches("th:not([scope], thead th)")) faults.push(`no scope: ${what}`);
  }
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const theme = dark ? "dark" : "light", page = document.body.dataset.page;
  parent.postMessage({ page, theme, width: innerWidth, texts: ratios.length, scrolls, faults }, "*");
});
""".replace("CONTRAST", str(CONTRAST)).replace("MOST", str(MOST))


def with_script(page: str, script: str) -> str:
    """A page whose policy lets one more script in: this one, at its end."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "script-src " in page
    page = page.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    before, end, after = page.rpartition("</body>")  # a script of the page's own may speak of it as well
    return f"{before}<script>{script}</script>{end}{after}"


def faults_of(page: Path, chromium, folder: Path, *arguments: str) -> list[str]:
    """What is wrong with a page, in both themes and at both widths. It was looked at four times, or this fails."""
    (folder / "copy.html").write_text(with_script(page.read_text(encoding="utf-8"), LOOK), encoding="utf-8")
    seen = looked_at({"": "copy.html"}, chromium, folder, *arguments)
    return [f"{one['theme']}, {one['width']} px: {fault}" for one in seen for fault in one["faults"]]


def looked_at(pages: dict[str, str], chromium, folder: Path, *arguments: str) -> list[dict]:
    """What LOOK says of each page, in both themes and widths; `pages` has each one's name and its file in the folder.

    With BRAINFM_SCREENSHOTS in the environment the pictures of `shots_of` are left in the folder of that name.
    """
    files = list(pages.values())
    seen = []
    for few in (files[n : n + AT_ONCE] for n in range(0, len(files), AT_ONCE)):
        frames = _frames(folder, [(file, width) for file in few for width in WIDTHS], "all.html")
        for theme in THEMES.values():
            dom = chromium(*theme, *arguments, "--window-size=1400,2000", "--dump-dom", f"file://{frames}")
            seen += json.loads(html.unescape(re.search('data-seen="(.*?)"', dom, re.DOTALL)[1]))
    looked = sorted((one.get("page", ""), one["theme"], one["width"]) for one in seen)
    assert looked == sorted((page, theme, width) for page in pages for theme in THEMES for width in WIDTHS)
    assert all(one["texts"] > 5 for one in seen)
    if "BRAINFM_SCREENSHOTS" in os.environ:
        for name, picture in shots_of(pages, chromium, folder, *arguments).items():
            picture.save(Path(os.environ["BRAINFM_SCREENSHOTS"]) / f"{folder.name}{name}.png".replace("/", "_"))
    return seen


def shots_of(pages: dict[str, str], chromium, folder: Path, *arguments: str) -> dict[str, Image.Image]:
    """A picture of the top of each page in each theme and width, by "page-theme-width"."""
    found = {}
    for width in WIDTHS:
        frames = _frames(folder, [(file, width) for file in pages.values()], f"all_{width}.html")
        size = f"--window-size={width * len(pages)},{HEIGHT}"
        for theme, chosen in THEMES.items():
            chromium(*chosen, *arguments, size, f"--screenshot={folder / 'shot.png'}", f"file://{frames}")
            shot = Image.open(folder / "shot.png").convert("RGB")
            for n, page in enumerate(pages):
                found[f"{page}-{theme}-{width}"] = shot.crop((n * width, 0, (n + 1) * width, shot.height))
    return found


def _frames(folder: Path, framed: list[tuple[str, int]], name: str) -> Path:
    """A page that shows others side by side, and keeps what they say of themselves."""
    frames = "".join(f'<iframe width="{width}" height="{HEIGHT}" src="{file}"></iframe>' for file, width in framed)
    (folder / name).write_text(
        "<!doctype html><style>:root { color-scheme: light dark } body { margin: 0; white-space: nowrap; font-size: 0 }"
        f"iframe {{ border: 0 }}</style><body>{frames}<script>const all = []; onmessage = (event) => "
        "{ all.push(event.data); document.body.dataset.seen = JSON.stringify(all); }</script></body>"
    )
    return folder / name
