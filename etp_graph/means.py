"""A mean over units, as a function that the tracer and the masked reference know.

A hand-written norm that averages over channels cannot be followed through ``mean``: whether the average is to be taken
over the units that stay (a norm) or over the number there once was, only its author knows. Stand-ins say it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function


def unit_mean(x: Tensor, dim: int, weight: Tensor) -> Tensor:
    """Mean of ``x`` over ``dim``, kept as size 1; the only long axis of the parameter ``weight`` has the same units."""
    if has_torch_function((x, weight)):
        found: Any = handle_torch_function(unit_mean, (x, weight), x, dim, weight)
        return found  # type: ignore[no-any-return]
    return x.mean(dim, keepdim=True)


def long_axis(weight: Tensor) -> int:
    """The axis of a parameter that is longer than 1, else the last."""
    return next((d for d, size in enumerate(weight.shape) if size > 1), weight.ndim - 1)
