"""Templates of `templates/`, filled in: HTML is escaped by itself, Markdown and LaTeX by the filters `md` and `tex`.

A page of HTML is one file. Its policy forbids requests, and scripts and styles other than its own.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

TEMPLATES = Path(__file__).parent / "templates"

_MARKDOWN = str.maketrans({letter: "\\" + letter for letter in "\\`*_[]<>|~$"} | {"&": "&amp;"})
_LATEX = str.maketrans(
    {letter: f"\\{letter}" for letter in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "[": "{[}", "]": "{]}", "*": "{*}"}
    | {"±": r"$\pm$", "−": "$-$", "–": "--", "×": r"$\times$", "↑": r"$\uparrow$", "↓": r"$\downarrow$"}
    | {"²": r"\textsuperscript{2}", "ρ": r"$\rho$"}
)
_LATEX_MARKS: dict[str, Any] = {  # braces are LaTeX's own
    **{"variable_start_string": "<<", "variable_end_string": ">>"},
    **{"block_start_string": "<%", "block_end_string": "%>"},
    **{"comment_start_string": "<#", "comment_end_string": "#>"},
}


def render(template: str, **values: Any) -> str:
    """A template with values in it. What a template asks for and is not given is an error of jinja2's.

    Args:
        template: Its name: a text of .html is escaped; in .tex, << … >> and <% … %> stand for {{ … }} and {% … %}.
        values: By the names that the template has for them.
    """
    return _environment(Path(template).suffix == ".tex").get_template(template).render(values)


def render_page(template: str, scripts: Sequence[str] = (), **values: Any) -> str:
    """A page of HTML, from a template that extends page.html.

    Args:
        template: Its name.
        scripts: Names of scripts to put after page.js.
        values: As of `render`; page.html asks for `title`.
    """
    style = _text("page.css")
    script = "".join(map(_text, ["page.js", *scripts]))
    return render(template, style=style, script=script, **values)


def markdown(text: str) -> str:
    """Text that Markdown prints as it is, in one line."""
    return " ".join(text.split()).translate(_MARKDOWN)


def latex(text: str) -> str:
    """Text that LaTeX prints as it is; brackets and stars in braces, for after a line's end they would be arguments."""
    return " ".join(text.split()).translate(_LATEX)


def content_hash(text: str) -> str:
    """The source expression of an inline script or style in a Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _text(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


@cache
def _environment(of_latex: bool) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **(_LATEX_MARKS if of_latex else {}),
    )
    environment.filters |= {"md": markdown, "tex": latex, "content_hash": content_hash, "base64": _base64}
    return environment
