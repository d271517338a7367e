"""Templates: text is text in HTML, Markdown and LaTeX, and a page names its own style and script, and no other."""

import base64
import hashlib
import html
import re

import jinja2
import pytest

from brainfm.render import content_hash, latex, markdown, render, render_page

QC = {"all_pass": True, "summary": "", "scans": [], "ranges": {}, "making": {}, "folder": "prep"}


def test_html_is_escaped_wherever_a_value_stands():
    title = "<script>a & \"b\" 'c'</script>"
    page = render_page("qc.html", title=title, **QC)
    assert title not in page
    assert [html.unescape(found) for found in re.findall("<(?:title|h1)>(.*?)</", page)] == [title, title]


@pytest.mark.parametrize(
    ("text", "in_markdown", "in_latex"),
    [
        ("a_b | 50 %", r"a\_b \| 50 %", r"a\_b \textbar{} 50 \%"),
        ("R² [x] & <y>", r"R² \[x\] &amp; \<y\>", r"R\textsuperscript{2} {[}x{]} \& \textless{}y\textgreater{}"),
        (
            "−1 ± 2\n  ↓ C:\\~*",
            r"−1 ± 2 ↓ C:\\\~\*",
            r"$-$1 $\pm$ 2 $\downarrow$ C:\textbackslash{}\textasciitilde{}{*}",
        ),
    ],
)
def test_markdown_and_latex_print_text_as_it_is_in_one_line(text, in_markdown, in_latex):
    assert markdown(text) == in_markdown
    assert latex(text) == in_latex


def test_policy_of_a_page_lets_in_its_own_style_and_script_alone():
    page = render_page("qc.html", title="", **QC)
    for what in ("style", "script"):
        (content,) = re.findall(f"<{what}>(.*?)</{what}>", page, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{what}-src 'sha256-{digest}'" in page
        assert content_hash(content) == f"sha256-{digest}"
    assert "default-src 'none'" in page


def test_value_that_a_template_is_not_given_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="title"):
        render("table.md")
