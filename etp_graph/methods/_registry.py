"""The table of named methods. A preset of the library and a method of a user register in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from etp_graph._config import require

from ._method import Method

_methods: dict[str, Method] = {}
METHODS: Mapping[str, Method] = MappingProxyType(_methods)
"""Every registered method, by name."""


def register(method: Method) -> Method:
    """Add a method to the table, so that the command line, :func:`get` and the reports know its name.

    Raises:
        ForceError: another method has this name.
    """
    require(
        _methods.setdefault(method.name, method) == method,
        f"there is already another method named {method.name!r}; choose another name.",
    )
    return method


def get(name: str | Method) -> Method:
    """Return the method of this name; a :class:`Method` is returned as it is.

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
