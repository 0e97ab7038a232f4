"""Reasons of locks, which end with the line of the model's code that they are about."""

from __future__ import annotations

import re

_LINE = re.compile(r" \([^()]*[^()\s]:\d+\)$")


def add_line(reason: str, line: str | None) -> str:
    """Append a line, such as ``net.py:12``, to a reason that names none: ``is taken from the end (net.py:12)``."""
    return reason if line is None or _LINE.search(reason) else f"{reason} ({line})"


def without_line(reason: str) -> str:
    """Return a reason without the line at its end.

    Lines move with every edit of a file, so that neither the groups nor the fingerprint of a plan depend on them.
    """
    return _LINE.sub("", reason)
