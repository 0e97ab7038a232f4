"""The table of named methods. A preset of the library and a method of a user register in the same way."""

from __future__ import annotations

from etp_graph._config import Registry
from etp_graph.errors import ForceError

from ._method import Method

METHODS: Registry[Method] = Registry("method", error=ForceError, remedy="Pass one of these names, or a methods.Method.")
"""Every registered method, by name."""


def register(method: Method) -> Method:
    """Add a method to the table, so that the command line, :func:`get` and the reports know its name.

    Raises:
        ForceError: another method has this name.
    """
    return METHODS.register(method.name, method)


def get(name: str | Method) -> Method:
    """Return the method of this name; a :class:`Method` is returned as it is.

    Raises:
        ForceError: there is no such method; the message lists all of them.
    """
    return name if isinstance(name, Method) else METHODS.find(name)
