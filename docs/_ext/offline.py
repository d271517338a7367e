"""A Sphinx extension that warns of every page that would load a script, style, font or picture from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_HTML = re.compile(
    r"<(?:script|img|iframe|source|link)\b[^>]*?(?:src|href)=[\"']?((?:https?:)?//[^\"' >]+)", re.IGNORECASE
)
_CSS = re.compile(r"(?:@import\s+(?:url\()?|url\()[\"']?((?:https?:)?//[^\"')]+)", re.IGNORECASE)


def outside(folder: Path) -> list[tuple[Path, str]]:
    """What the pages and styles in a folder would load from elsewhere: the file, and the address."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".html", ".css"):
            text = path.read_text(encoding="utf-8", errors="replace")
            patterns = (_HTML, _CSS) if path.suffix == ".html" else (_CSS,)
            found += [(path, address) for pattern in patterns for address in pattern.findall(text)]
    return found


def check(app: Any, error: Exception | None) -> None:
    """Warn of each, once the pages are written."""
    from sphinx.util import logging  # not at the top: tests use `outside` where Sphinx is not installed

    logger = logging.getLogger(__name__)
    if error is None:
        for path, address in outside(Path(app.outdir)):
            logger.warning("%s: %s would be loaded from elsewhere; ship it with the site", path, address)


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("build-finished", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
