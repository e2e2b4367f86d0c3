"""How Sphinx makes the documentation site of these pages: `python -m sphinx -W -b html docs docs/_build`. Needs no network."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from vitq import __version__  # noqa: E402

project = "vitq"
version = release = __version__
copyright = "the vitq authors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "generated_pages"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
smartquotes_action = "D"  # dashes alone
highlight_language = "text"  # of the indented blocks: formulas and diagrams
default_role = "code"  # docstrings write `name`, as Markdown does

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["pictures.css"]
html_title = f"vitq {version}"
html_show_sphinx = False
html_copy_source = False
