"""Sphinx: the Markdown pages of this folder, and a reference from the docstrings."""

import pkgutil
from importlib import import_module
from typing import Any

from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

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

# A reference that leads nowhere is a warning, and CI makes errors of warnings. Other libraries are the exception: the
# build reads no network, so it does not know their names. Nor does it know type variables, and annotations that
# dataclasses take as text.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(torch|torch_pruning|lightning|transformers|collections|contextlib|os|pathlib)\..*"),
    ("py:class", r"etp_graph\.(standins\._registry|model\._layer_table)\.M|BoolTensor"),
    ("py:class", r"etp_graph\.(criteria\._registry\.S|forces\.F|schedules\.S|budget\._register\.F|_config\.Registry)"),
    ("py:class", r"etp_graph\.(integrations\.transformers\.Model|recovery\._readers\.(Place|Reader))"),
    ("py:class", r"etp_graph\.(collect\._statistics\.Statistic|budget\._budget\.Targets|budget\._register\.F)"),
    ("py:class", r"etp_graph\.plan\._quantities\.Target|[A-Z][A-Za-z]+|tuple\[str"),
]


def take_constant_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Take the docstring of a constant from the private module that defines it; autodoc reads the face alone."""
    package, _, constant = name.rpartition(".")
    if what != "data":
        return
    for module in pkgutil.iter_modules(getattr(import_module(package), "__path__", []), f"{package}."):
        found = ModuleAnalyzer.for_module(module.name).find_attr_docs().get(("", constant))
        lines[:] = found or lines


def write_factory_defaults(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """Write ``...`` for the default of a dataclass field that a factory makes; Sphinx cannot parse ``<factory>``."""
    return signature and signature.replace("<factory>", "..."), returned


def setup(app: Sphinx) -> None:
    """Connect the functions above."""
    app.connect("autodoc-process-docstring", take_constant_docstring)
    app.connect("autodoc-process-signature", write_factory_defaults)
