"""Write pruned models so that other libraries load them."""

from __future__ import annotations

from ._folder import require_free, require_space
from ._huggingface import huggingface
from ._inputs import huggingface_inputs
from ._restrict import restrict_plan
from ._solve import find_config

__all__ = [
    "find_config",
    "huggingface",
    "huggingface_inputs",
    "require_free",
    "require_space",
    "restrict_plan",
]
