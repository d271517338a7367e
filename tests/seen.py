"""What is wrong with a page as Chromium shows it, in light and in dark, on a phone and on a desk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from browser import Browser

WIDTHS = (390, 1280)
THEMES = {"light": False, "dark": True}
HEIGHT = 1600  # of a screenshot
MOST = 2500  # elements that are looked at: the reference has tens of thousands, all of a few kinds
CONTRAST = 4.5  # of WCAG 2.2, level AA, whatever the size of the letters

# Says what reaches beyond the right edge, what can hardly be read, and what has no name.
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
  return { dark, width: innerWidth, texts: ratios.length, scrolls, faults };
});
""".replace("CONTRAST", str(CONTRAST)).replace("MOST", str(MOST))


def faults_of(page: Path, browser: Browser, before: str = "") -> list[str]:
    """What is wrong with a page, in both themes and at both widths; `before` as of `Browser.page`."""
    return [f"{where}: {fault}" for where, seen in looked_at(page, browser, before).items() for fault in seen["faults"]]


def looked_at(page: Path, browser: Browser, before: str = "") -> dict[str, dict[str, Any]]:
    """What LOOK says of a page, by theme and width.

    With BRAINFM_SCREENSHOTS in the environment a picture of each is left in the folder of that name.
    """
    found = {}
    for theme, dark in THEMES.items():
        for width in WIDTHS:
            with browser.page(page, width=width, height=HEIGHT, dark=dark, before=before) as shown:
                seen = shown.run(LOOK)
                if folder := os.environ.get("BRAINFM_SCREENSHOTS"):
                    shown.picture().save(Path(folder) / f"{page.parent.name}-{page.stem}-{theme}-{width}.png")
            assert (seen["dark"], seen["width"]) == (dark, width)
            assert seen["texts"] > 5
            found[f"{theme}, {width} px"] = seen
    return found
