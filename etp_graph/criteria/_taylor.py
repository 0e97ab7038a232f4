"""First-order change of the loss when a unit is removed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from etp_graph._config import quoted
from etp_graph.collect import Observations
from etp_graph.errors import ScoreError
from etp_graph.plan import Plan
from etp_graph.units import at_least_float32

from ._common import finite, units_of
from ._registry import register_criterion


@register_criterion("taylor", observes="gradients")
def taylor(model: nn.Module, plan: Plan, *, record: Observations | None = None) -> Tensor:
    """Return sqrt(mean_b (Σ_s ⟨∇_s L_b, w_s,u⟩)²), the first-order change of the loss when u is set to zero.

    Source: Molchanov et al. 2019, eq. 8 (the squared sum, averaged over batches b), with the sum over all slices s of a
    unit. The square root does not change the order of the units. For one batch the score is the absolute first-order
    change of the loss.

    Args:
        model: the model that the plan was traced from.
        plan: the plan.
        record: the record of :func:`etp_graph.collect.gradients`. Without it, the gradients in ``.grad`` count as one
            batch; call ``loss.backward()`` first.

    Returns:
        Scores, float [plan.n_units].

    Raises:
        PlanError: the plan is not of this model.
        ScoreError: a sliced parameter has no gradient, or a parameter or gradient is not finite.
    """
    units = units_of(model, plan)
    parameters = units.tensors(model)
    if record is not None:
        return record.read("taylor", plan).to(units.device, units.dtype)
    needed = {s.tensor for group in plan.prunable for s in group.slices}
    missing = [name for name, w in parameters.items() if w.grad is None and name in needed]
    if missing:
        frozen = [name for name in missing if not parameters[name].requires_grad]
        remedy = f"set requires_grad on {quoted(frozen)} and run" if frozen else "run"
        raise ScoreError(
            f"taylor: {quoted(missing)} ha{'s' if len(missing) == 1 else 've'} no gradient: {remedy} "
            "loss.backward() before scoring (and score before optimizer.zero_grad())."
        )
    held = {name: (w, w.grad) for name, w in parameters.items() if w.grad is not None}
    with torch.no_grad():
        scores = units.reduce(
            (name, at_least_float32(w) * at_least_float32(grad)) for name, (w, grad) in held.items()
        ).abs()
    gradients = [(f"the gradient of {name}", grad) for name, (_, grad) in held.items()]
    return finite("taylor", scores, [*((name, w) for name, (w, _) in held.items()), *gradients])
