"""Sphinx: `make docs`. Nothing is fetched, neither when the pages are built nor when they are read."""

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

import sharpkern

project = "sharpkern"
version = release = sharpkern.__version__
copyright = "the sharpkern authors, Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
smartquotes = False  # options have two dashes
html_theme = "furo"
html_title = f"sharpkern {release}"
html_static_path = ["_static"]
html_css_files = ["math.css"]
html_math_renderer = "mathml"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_mock_imports = ["accelerate", "ignite", "lightning", "skorch", "transformers"]  # the pages need no trainer
autodoc_preserve_defaults = True  # of functions, as they are written
autodoc_typehints = "none"  # the docstrings say what an argument is
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_param = False  # arguments that share a description share a line

# Every reference leads somewhere; those to other packages are names only.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(torch|math)\..*|\w+Error|\w+Warning")]


def add_mathml(translator, node: nodes.math | nodes.math_block, block: bool) -> None:
    """An equation as MathML, which browsers draw without a script. What docutils does not know is a warning."""
    tex = node.astext()
    if block and "&" in tex:
        tex = rf"\begin{{aligned}}{tex}\end{{aligned}}"
    try:
        translator.body.append(tex2mathml(tex, as_block=block))
    except MathError as error:
        logging.getLogger(__name__).warning("%s in %r", error, tex, location=node)
    raise nodes.SkipNode


def shorten_signature(app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, returns):
    """Classes among the defaults by the names that users know them by."""
    return (signature or "").replace("<class 'torch.optim.sgd.SGD'>", "torch.optim.SGD") or None, returns


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-signature", shorten_signature)
    app.add_html_math_renderer(
        "mathml",
        (lambda translator, node: add_mathml(translator, node, block=False), None),
        (lambda translator, node: add_mathml(translator, node, block=True), None),
    )
