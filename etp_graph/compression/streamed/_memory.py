"""Give memory back to the system between the steps of a run."""

from __future__ import annotations

import ctypes


def return_memory() -> None:
    """Let the C library give freed memory back.

    Without it glibc keeps what lies between pieces in use, and the process grows from block to block.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library
        return
    trim(0)
