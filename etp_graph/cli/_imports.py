"""Import a user's module or file, so that what it registers is known by name to the commands."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

from etp_graph._config import require
from etp_graph.errors import EtpError

BROKEN = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
"""Exceptions that code of a user raises for wrong arguments."""

_FAILED = (ImportError, SyntaxError, NameError, OSError, ArithmeticError, *BROKEN)


class ExtensionError(EtpError):
    """A module or file to import does not exist, or fails while it is imported."""


def import_from(folder: Path, name: str) -> ModuleType:
    """Import a module from the folder or from the installed packages. Raises what the import raises."""
    sys.path.insert(0, str(folder))  # as `python -m` does; an installed script does not
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


def import_extension(text: str) -> ModuleType:
    """Import the module of this name, or the file of this path.

    Args:
        text: ``package.module``, or a path that ends in ``.py``. The module of a file has the name of the file, and
            may import other files in its folder.

    Raises:
        ExtensionError: it does not exist, it fails, or another module has the name of the file.
    """
    path = Path(text).expanduser().absolute()
    is_file = text.endswith(".py")
    require(not is_file or path.is_file(), f"--import {text}: there is no such file.", ExtensionError)
    folder, name = (path.parent, path.stem) if is_file else (Path.cwd(), text)
    try:
        module = import_from(folder, name)
    except EtpError:
        raise
    except _FAILED as error:
        raise ExtensionError(
            f"--import {text}: it cannot be imported ({type(error).__name__}: {error}). Name a module or a .py file "
            f"that runs by itself; modules are looked up in {folder} and among the installed packages."
        ) from error
    _check_file(text, path if is_file else None, module)
    return module


def _check_file(text: str, path: Path | None, module: ModuleType) -> None:
    """Raise :class:`ExtensionError` if the name of the file led to another module."""
    found = getattr(module, "__file__", None)
    same = path is None or (found is not None and Path(found).resolve() == path.resolve())
    require(
        same, f"--import {text}: the module name {module.__name__!r} is taken ({found}); rename it.", ExtensionError
    )
