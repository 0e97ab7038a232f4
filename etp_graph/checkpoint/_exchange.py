"""Exchange two folders in one step, where the system can (``renameat2`` of Linux with ``RENAME_EXCHANGE``)."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

_HERE = -100  # AT_FDCWD: paths are those of the process

_EXCHANGE = 2  # RENAME_EXCHANGE

_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)
"""What systems and file systems that cannot exchange answer."""


def exchange(one: Path, other: Path) -> bool:
    """Exchange two files or folders of one file system, so that nobody sees a moment without either.

    Returns:
        False if the system cannot do it; nothing has changed then.

    Raises:
        OSError: it can, and failed.
    """
    rename = _renameat2()
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(other))


@cache
def _renameat2() -> Callable[..., int] | None:
    """Return the function of the C library; ``None`` if it has none, as on other systems than Linux."""
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    found: Callable[..., int] = function
    return found
