"""Inner products of the units of a group over all their slices, and scores computed from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from etp_graph.plan import Plan, Slice, as_tensor

from ._common import Normalize, finite, normalized, units_of


@torch.no_grad()
def relation_scores(
    what: str, model: nn.Module, plan: Plan, normalize: Normalize, score: Callable[[Tensor], Tensor]
) -> Tensor:
    """Compute scores from the inner products of each group: float [plan.n_units].

    Needs memory for n² float64 numbers, n being the number of units of the largest group.

    Args:
        what: name of the criterion, for error messages.
        model: the model that the plan was traced from.
        plan: the plan.
        normalize: as for :func:`magnitude`.
        score: maps the inner products of one group, [n, n], to its scores, [n].

    Raises:
        PlanError: the plan is not of this model.
        ScoreError: a parameter is not finite, or ``normalize`` is unknown.
    """
    units = units_of(model, plan)
    scores = torch.zeros(plan.n_units, dtype=units.dtype, device=units.device)
    for span, products in grams(model, plan):
        scores[span] = score(products).to(scores)
    return normalized(what, finite(what, scores, units.tensors(model).items()), plan, normalize)


@torch.no_grad()
def grams(model: nn.Module, plan: Plan) -> Iterator[tuple[slice, Tensor]]:
    """Yield for each group its span in a flat vector and ⟨w_u, w_v⟩ = Σ_s ⟨w_s,u, w_s,v⟩, float64 [n, n].

    The products are float64 because distances are computed as differences of squared norms, which lose digits.
    """
    parameters = dict(model.named_parameters())
    for group, span in plan.spans():
        device = next(iter(parameters.values())).device
        products = torch.zeros(group.n_units, group.n_units, dtype=torch.float64, device=device)
        for piece in group.slices:
            if piece.tensor in parameters and not piece.passive:
                rows = _rows(parameters[piece.tensor], piece, group.n_units)
                products.addmm_(rows, rows.t())
        yield span, products


def _rows(tensor: Tensor, piece: Slice, n_units: int) -> Tensor:
    """Return the weights of each unit in one tensor as a row, its positions side by side: float64 [n_units, width]."""
    unit, order = as_tensor(piece.unit).sort(stable=True)
    place = torch.arange(len(unit), device="cpu") - torch.searchsorted(unit, unit)  # which of the unit's positions
    values = tensor.movedim(piece.axis, 0).flatten(1) if tensor.ndim > 1 else tensor.unsqueeze(1)
    width = int(place.max()) + 1 if len(place) else 0
    rows = torch.zeros(n_units, width, values.shape[1], dtype=torch.float64, device=tensor.device)
    index = as_tensor(piece.index)[order].to(tensor.device)
    rows[unit.to(tensor.device), place.to(tensor.device)] = values[index].double()
    return rows.flatten(1)
