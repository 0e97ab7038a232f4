"""The command line ``etp-graph``."""

from __future__ import annotations

from ._app import app

__all__ = [
    "app",
]
