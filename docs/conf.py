"""The documentation site: `make docs` builds it into build/docs. Nothing is fetched: links to other sites are plain."""

import logging

for library in ("torchao", "bitsandbytes", "torch.utils._pytree"):  # what PEFT imports says what it misses
    logging.getLogger(library).setLevel(logging.ERROR)

from mos_ext import __version__  # noqa: E402

project = "mos_ext"
author = "the authors of mos_ext"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # reports that machines wrote begin at the third level
exclude_patterns = ["pictures/*.py"]

html_theme = "furo"
html_title = f"mos_ext {release}"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
copybutton_exclude = ".linenos, .gp, .go"

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say types and shapes, more exactly than annotations do
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True  # attributes are named once, in the docstring of their class
# Types of other libraries, which have sites of their own.
nitpick_ignore_regex = [("py:.*", r"(?!mos_ext).*")]
