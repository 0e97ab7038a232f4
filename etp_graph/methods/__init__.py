"""Named pruning methods. A preset is one entry in ``_presets.py``; :func:`register` adds a method of your own."""

from __future__ import annotations

from ._method import Method, Part, check_rounds, scales_only
from ._presets import PRESETS
from ._registry import METHODS, get, register

__all__ = [
    "METHODS",
    "PRESETS",
    "Method",
    "Part",
    "check_rounds",
    "get",
    "register",
    "scales_only",
]
