"""Write pruned models so that other libraries load them."""

from __future__ import annotations

from ._folder import require_free
from ._huggingface import huggingface
from ._inputs import huggingface_inputs
from ._restrict import restrict_plan

__all__ = ["huggingface", "huggingface_inputs", "require_free", "restrict_plan"]
