"""Prove that the pruned model computes what the masked model computes."""

from __future__ import annotations

from ._comparison import as_real, relative_error
from ._masked import Masked
from ._sampling import random_selection, randomize_
from ._trials import TOLERANCE
from ._verify import Verification, compare_outputs, lock_what_fails, lock_what_fails_in_blocks, verify

__all__ = [
    "TOLERANCE",
    "Masked",
    "Verification",
    "as_real",
    "compare_outputs",
    "lock_what_fails",
    "lock_what_fails_in_blocks",
    "random_selection",
    "randomize_",
    "relative_error",
    "verify",
]
