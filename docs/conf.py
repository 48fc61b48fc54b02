"""
How Sphinx makes the site of these pages: `bin/docs`.

A page is named in prose by its path (``docs/spec.rst``), which can be found in a checkout, on PyPI
and in a man page alike. The site turns such a name into a link.
"""

import os
import re
import sys

from docutils import nodes
from sphinx import addnodes

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import chaperone  # noqa: E402

project = "chaperone"
author = "The chaperone authors"
copyright = author
version = release = chaperone.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["examples"]
highlight_language = "text"
default_role = "literal"  # in docstrings a single backtick marks a name
smartquotes = False  # an option such as --detach keeps its two hyphens

html_theme = "furo"
html_title = f"chaperone {version}"
html_copy_source = False
html_show_sphinx = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_numpy_docstring = False
# A type from outside the package has no page here.
nitpick_ignore_regex = [("py:.*", r"(?!chaperone\b).*")]


def link_pages(app, doctree):
    """Make a link of each literal that is the path of one of these pages."""
    for literal in [*doctree.findall(nodes.literal)]:
        page = re.fullmatch(r"docs/([\w-]+)\.rst", literal.astext())
        if page and page[1] in app.env.found_docs:
            target = addnodes.pending_xref(
                "",
                refdomain="std",
                reftype="doc",
                refdoc=app.env.docname,
                reftarget=page[1],
                refexplicit=False,
                refwarn=True,
            )
            target += nodes.inline("", page[1])
            literal.replace_self(target)


def setup(app):
    app.connect("doctree-read", link_pages)
