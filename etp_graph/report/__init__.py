"""A compression as one HTML page."""

from __future__ import annotations

from ._page import page, write_report

__all__ = [
    "page",
    "write_report",
]
