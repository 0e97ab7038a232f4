"""Give memory back to the system between the steps of a run."""

from __future__ import annotations

import ctypes
import gc


def return_memory() -> None:
    """Free cycles of objects, and let the C library give freed memory back.

    Without it glibc keeps what lies between pieces in use, and the process grows from block to block.
    """
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library
        return
    trim(0)
