"""The version of the installed package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("etp-graph")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"
