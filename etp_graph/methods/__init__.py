"""Named pruning methods: presets are data, one file for each family. A new one is a file and its name in the table."""

from __future__ import annotations

from collections.abc import Mapping

from ..configured import require
from . import data, etp, greg, network_slimming, norms, relations, sfp, sparsity, torque
from .method import Method, Part, check_rounds, scales_only

__all__ = ["METHODS", "Method", "Part", "check_rounds", "get", "scales_only"]

_FAMILIES = (etp, torque, sparsity, network_slimming, greg, sfp, relations, data, norms)

METHODS: Mapping[str, Method] = {method.name: method for family in _FAMILIES for method in family.PRESETS}
"""Every preset of the library, by name."""


def get(name: str | Method) -> Method:
    """The preset of this name; a :class:`Method` is returned as it is.

    Raises:
        ForceError: there is no such method; the message lists all of them.
    """
    if isinstance(name, Method):
        return name
    require(
        isinstance(name, str) and name in METHODS,
        f"there is no method {name!r}; known are {', '.join(METHODS)}. Pass one of these names, or a methods.Method.",
    )
    return METHODS[name]
