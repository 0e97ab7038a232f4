"""Take memory only where it is used, and give it back between the steps of a run."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor


def return_memory() -> None:
    """Let the C library give freed memory back.

    Without it glibc keeps what lies between pieces in use, and the process grows from block to block.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library
        return
    trim(0)


def untouched(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return zeros whose pages take memory only when something is written to them."""
    pages = mmap.mmap(-1, max(shape.numel(), 1) * dtype.itemsize)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)  # a huge page would be taken for each row
    return torch.frombuffer(pages, dtype=dtype, count=shape.numel()).view(shape)
