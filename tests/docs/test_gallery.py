"""The gallery: every example is a page and a notebook that runs from top to bottom."""

import re
import runpy
from pathlib import Path

import pytest

GALLERY = Path(__file__).parents[2] / "docs" / "gallery"
EXAMPLES = sorted(GALLERY.glob("plot_*.py"))
QUICKEST = "plot_01_three_lines"
MOST_LINES = 160  # of an example: more is two examples


def parts(path):
    """The page's title, its prose, and its code."""
    text = path.read_text(encoding="utf-8")
    heading = re.match(r'"""\n(?P<title>\S.*)\n(?P<line>=+)\n\n(?P<prose>.+?)\n"""\n', text, re.DOTALL)
    assert heading, f"{path.name}: begins with a title, underlined with =, and an empty line"
    return heading, text[heading.end() :]


def test_every_example_is_a_page_that_compiles_and_shows_a_figure():
    assert len(EXAMPLES) >= 12
    titles = set()
    for path in EXAMPLES:
        heading, code = parts(path)
        assert len(heading["line"]) == len(heading["title"]), path.name
        titles.add(heading["title"])
        assert len(code.splitlines()) <= MOST_LINES, f"{path.name}: two examples"
        compile(code, str(path), "exec")
        assert "plt.show()" in code, f"{path.name}: no figure"
        assert code.count("# %%") >= 3, f"{path.name}: code without prose"
        if "make_cohort" in code:  # what no person is, is said to be none
            assert "**phantoms**" in heading["prose"].lower(), f"{path.name}: does not say that its scans are phantoms"
    assert len(titles) == len(EXAMPLES)


def test_examples_take_no_name_of_weights_that_have_to_be_fetched():
    for path in EXAMPLES:
        named = re.findall(r"""(?:create_model|embed|BrainEncoder)\([^#\n]*["'](\w+_3d)["']""", parts(path)[1])
        assert set(named) <= {"test_resnet_3d", "test_vit_3d"}, path.name


def test_quickest_example_runs_and_says_what_its_page_says(monkeypatch, capsys):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    monkeypatch.setattr(plt, "show", lambda: None)
    runpy.run_path(str(GALLERY / f"{QUICKEST}.py"))
    plt.close("all")
    said = capsys.readouterr().out
    assert "torch.Size([1, 128])" in said
    assert "the brain does not lie where the template's does" in said


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_as_a_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as the site's build has it: see docs/conf.py
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = pytest.importorskip("sphinx_gallery.notebook")
    from sphinx_gallery.gen_gallery import DEFAULT_GALLERY_CONF
    from sphinx_gallery.py_source_parser import split_code_and_text_blocks

    _, blocks = split_code_and_text_blocks(str(path))
    made = notebook.jupyter_notebook(blocks, dict(DEFAULT_GALLERY_CONF), str(tmp_path))
    notebook.save_notebook(made, tmp_path / f"{path.stem}.ipynb")
    read = nbformat.read(tmp_path / f"{path.stem}.ipynb", as_version=4)
    nbclient.NotebookClient(
        read, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    outputs = [output for cell in read.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no figure"
