"""Mean over units, as a function that the tracer and the masked reference recognise.

If a hand-written norm averages over channels with ``mean``, the tracer cannot know whether to divide by the number of
kept units (a norm) or by the number of units before surgery. Stand-ins therefore call :func:`unit_mean`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function


def routed(x: Tensor, weight: Tensor, vectors: Sequence[Tensor], top_k: int, run: Callable[[], Any]) -> Any:
    """Return what ``run`` returns: a router's choice of ``top_k`` experts for the tokens ``x`` [..., d].

    ``weight`` [experts, d] gives the logits; ``vectors`` are other tensors [experts] of the router.
    """
    if has_torch_function((x, weight)):
        return handle_torch_function(routed, (x, weight), x, weight, vectors, top_k, run)
    return run()


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """Parameters of experts in one tensor each.

    Attributes:
        gate_up: [experts, 2 * neurons, d], or [experts, d, 2 * neurons] if ``transposed``.
        down: [experts, d, neurons], or [experts, neurons, d] if ``transposed``.
        biases: [experts, 2 * neurons] and [experts, d], or none.
        transposed: whether the inputs lie on the second axis.
        interleaved: whether gates and inputs of the neurons take turns; else all gates come first.
    """

    gate_up: Tensor
    down: Tensor
    biases: tuple[Tensor, Tensor] | None
    transposed: bool
    interleaved: bool


def mixture(x: Tensor, experts: PackedExperts, index: Tensor, run: Callable[[], Tensor]) -> Tensor:
    """Return what ``run`` returns: the sum of the chosen experts' outputs.

    ``x`` [tokens, d]; ``index`` [tokens, top_k].
    """
    if has_torch_function((x, experts.gate_up)):
        found: Tensor = handle_torch_function(mixture, (x, experts.gate_up), x, experts, index, run)
        return found
    return run()


class ClosedExperts(TorchFunctionMode):
    """Mode in which the router with this weight gives removed experts a logit of minus infinity."""

    def __init__(self, weight: Tensor, kept: Tensor) -> None:
        super().__init__()
        self.weight, self.gone = weight, ~kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.linear and args[1] is self.weight:
            out = out.masked_fill(self.gone.to(out.device), float("-inf"))
        return out


def run_with_closed_experts(weight: Tensor, kept: Tensor | None, run: Callable[[], Any]) -> Any:
    """Run a router with logits of minus infinity for the experts that ``kept`` marks False."""
    if kept is None:
        return run()
    with ClosedExperts(weight, kept):
        return run()


def unit_mean(x: Tensor, dim: int, weight: Tensor) -> Tensor:
    """Return the mean of ``x`` over ``dim``, which keeps size 1.

    The units along ``dim`` are those of the parameter ``weight``, which has only one axis longer than 1.
    """
    if has_torch_function((x, weight)):
        found: Any = handle_torch_function(unit_mean, (x, weight), x, dim, weight)
        return found  # type: ignore[no-any-return]
    return x.mean(dim, keepdim=True)


def long_axis(weight: Tensor) -> int:
    """Return the first axis of a parameter that is longer than 1, or the last axis if there is none."""
    return next((d for d, size in enumerate(weight.shape) if size > 1), weight.ndim - 1)


def norm_over_units(
    x: Tensor, dim: int, tensors: Sequence[Tensor], run: Callable[[Tensor, Sequence[Tensor]], Tensor]
) -> Tensor:
    """Return ``run(x, tensors)``: what a hand-written norm makes of ``x``, in the same shape.

    The norm reduces over the units along ``dim``, and a pruned model reduces over those that are left. ``tensors`` are
    its parameters; each holds the units along its only axis that is longer than 1.
    """
    if has_torch_function((x, *tensors)):
        found: Any = handle_torch_function(norm_over_units, (x, *tensors), x, dim, tensors, run)
        return found  # type: ignore[no-any-return]
    return run(x, tensors)
