"""Slow reference implementation of the force, slice by slice. Tests compare the fast implementation with it.

Penalty β Σ_g κ_g Σ_u F(d_u)·‖w_u‖ with ‖w_u‖² = Σ_s ‖w_s,u‖² over the slices of a unit (ETP: Modi et al. 2025, eq. 10).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby

import torch
from torch import Tensor, nn

from etp_graph.plan import Plan, Slice, as_tensor


def square_norms(model: nn.Module, plan: Plan) -> Tensor:
    """Return ‖w_u‖² of every unit that may be pruned, and zero for all others, [n_units]."""
    parameters = dict(model.named_parameters())
    total = torch.zeros(plan.n_units, dtype=next(iter(parameters.values())).dtype)
    for span, piece in _slices(plan):
        part = parameters[piece.tensor].detach().index_select(piece.axis, as_tensor(piece.index))
        others = [d for d in range(part.ndim) if d != piece.axis]
        squares = part.square().sum(others) if others else part.square()
        total[span].index_add_(0, as_tensor(piece.unit), squares)
    return total


@torch.no_grad()
def prox_(model: nn.Module, plan: Plan, pull: Tensor, step_sizes: Mapping[str, float]) -> None:
    """Apply the proximal step w_u <- w_u·max(0, 1 − η κ β F(d_u)/‖w_u‖) to the model, in place.

    Args:
        model: the model.
        plan: its plan.
        pull: β κ F(d_u) of every unit, [n_units].
        step_sizes: η of every parameter, by name.
    """
    parameters = dict(model.named_parameters())
    norms = square_norms(model, plan).sqrt()
    for span, piece in _by_axis(plan):
        ratio = pull[span] * step_sizes[piece.tensor] / norms[span].clamp_min(1e-30)
        factor = (1 - ratio).clamp_min(0)[as_tensor(piece.unit)]
        tensor, index = parameters[piece.tensor], as_tensor(piece.index)
        part = tensor.index_select(piece.axis, index)
        shape = [-1 if d == piece.axis else 1 for d in range(tensor.ndim)]
        tensor.index_copy_(piece.axis, index, part * factor.view(shape))


def _slices(plan: Plan) -> Iterator[tuple[slice, Slice]]:
    """Yield every slice that a force acts on, with the range of its group in the vectors [n_units]."""
    for group, span in plan.spans():
        for piece in group.slices:
            if group.locked is None and not piece.passive and piece.tensor in plan.parameters:
                yield span, piece


def _by_axis(plan: Plan) -> Iterator[tuple[slice, Slice]]:
    """Yield the same slices, ordered so that those of one axis of one tensor follow each other.

    A weight cut along two axes is multiplied by two factors, and rounding depends on their order.
    """
    order: dict[tuple[str, int], int] = {}
    for _, piece in _slices(plan):
        order.setdefault((piece.tensor, piece.axis), len(order))
    ranked = sorted(_slices(plan), key=lambda pair: order[pair[1].tensor, pair[1].axis])
    for _, pieces in groupby(ranked, key=lambda pair: (pair[1].tensor, pair[1].axis)):
        yield from pieces
