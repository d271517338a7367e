"""How the site is built: sphinx-build -W --keep-going -b html docs docs/_build/html. No network is needed."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: threads that wait for a core cost ten times their work

import brainfm

HERE = Path(__file__).parent
GALLERY = HERE / "gallery"
sys.path.insert(0, str(HERE / "_ext"))

warnings.filterwarnings("ignore", "NvImgCodecPydicomReader")  # MONAI's, of a decoder that no example needs

project = "brainfm"
author = "the authors of brainfm"
copyright = "the authors of brainfm; Apache-2.0"
release = brainfm.__version__
exclude_patterns = ["_build", "_ext", "gallery", "generated/*.md"]  # what is included in other pages is no page

extensions = [
    *("myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click", "sphinx_copybutton"),
    *("sphinx_gallery.gen_gallery", "generate", "offline"),  # the last two are in _ext
]

html_theme = "furo"
html_title = "brainfm"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False

smartquotes = False  # the two hyphens of an option are no dash
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

autodoc_typehints = "signature"
default_role = "code"  # docstrings have `one` backtick around code
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# Each file of docs/gallery is run at build, in the order of its name; GALLERY_HEADER.rst is the gallery's own heading.
sphinx_gallery_conf = {
    "examples_dirs": str(GALLERY),
    "gallery_dirs": "examples",
    "filename_pattern": r"\.py$",
    "within_subsection_order": "FileNameSortKey",
    "min_reported_time": 1,
    "copyfile_regex": r".*\.rst",
    "remove_config_comments": True,
    "write_computation_times": False,  # its page asks for scripts from elsewhere
    "show_memory": False,
    "show_signature": False,
    "plot_gallery": True,
    "abort_on_example_error": False,
    "download_all_examples": False,
}
