"""What is wrong with a page as Chromium shows it, in light and in dark, on a phone and on a desk."""

from __future__ import annotations

from pathlib import Path

from browser import Browser

WIDTHS = (390, 1280)
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
  const faults = [], ratios = [];
  const reads = (element, style, what) => {
    const back = behind(element), front = over(parse(style.color), back);
    const [low, high] = [light(front), light(back)].sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05);
    ratios.push(ratio);
    if (ratio < CONTRAST) faults.push(`${ratio.toFixed(2)} of contrast: ${what}`);
  };
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width) faults.push(`${document.documentElement.scrollWidth} px wide`);
  for (const element of document.body.querySelectorAll("*:not(script, style, option)")) {
    const box = element.getBoundingClientRect(), style = getComputedStyle(element);
    if (!box.width || !box.height || style.visibility === "hidden") continue;
    const what = `${element.tagName}.${element.className} ${element.textContent.trim().slice(0, 40)}`;
    const scrolled = element.parentElement.closest(".wide");
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
    if (element.matches("th:not([scope])")) faults.push(`no scope: ${what}`);
  }
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  return { dark, width: innerWidth, texts: ratios.length, faults };
});
""".replace("CONTRAST", str(CONTRAST))


def faults_of(page: Path, browser: Browser, before: str = "") -> list[str]:
    """What is wrong with a page, in both themes and at both widths; `before` as of `Browser.page`."""
    faults = []
    for dark in (False, True):
        for width in WIDTHS:
            with browser.page(page, width=width, dark=dark, before=before) as shown:
                seen = shown.run(LOOK)
            assert (seen["dark"], seen["width"]) == (dark, width)
            assert seen["texts"] > 5
            faults += [f"{'dark' if dark else 'light'}, {width} px: {fault}" for fault in seen["faults"]]
    return faults
