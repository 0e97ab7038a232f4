"""Sphinx: the Markdown pages of this folder, and a reference from the docstrings."""

import etp_graph

project = "etp_graph"
release = etp_graph.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 4  # headings get the anchors that GitHub gives them, so links work in both places

html_theme = "furo"
html_title = "etp_graph" if release.startswith("0+") else f"etp_graph {release}"  # 0+unknown: not installed

napoleon_attr_annotations = False  # the signature of a dataclass has its types already
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # `force=_EXPONENTIAL`, and not the repr of an object

# A reference that leads nowhere is a warning, and CI makes errors of warnings. Other libraries are the exception: the
# build reads no network, so it does not know their names. Nor does it know type variables, and annotations that
# dataclasses take as text.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(torch|torch_pruning|lightning|transformers|collections|contextlib|os|pathlib)\..*"),
    ("py:class", r"etp_graph\.(adapters|layers)\.M|etp_graph\.integrations\.transformers\.Model|BoolTensor"),
]
