"""Named pruning methods. A preset is one entry in ``_presets.py``; :func:`register` adds a method of your own."""

from __future__ import annotations

from ._method import Method, Part, check_rounds, scales_only
from ._presets import former_versions
from ._registry import METHODS, get, register

__all__ = [
    "METHODS",
    "Method",
    "Part",
    "check_rounds",
    "former_versions",
    "get",
    "register",
    "scales_only",
]
