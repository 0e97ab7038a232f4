"""Helpers of all criteria: access to the units, checks for finite scores, and normalization."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from etp_graph._config import quoted
from etp_graph.collect import Observations
from etp_graph.errors import ScoreError
from etp_graph.plan import Plan
from etp_graph.units import Units

Normalize = Literal["mean", "max", "sum", "none"]

_MEASURES: dict[str, Callable[[Tensor], Tensor]] = {"mean": Tensor.mean, "max": Tensor.max, "sum": Tensor.sum}


def units_of(model: nn.Module, plan: Plan) -> Units:
    """Return the units of the model. Raise :class:`PlanError` if the plan is not of this model."""
    plan.check(model)
    return Units(model, plan)


def finite(what: str, scores: Tensor, inputs: Iterable[tuple[str, Tensor]]) -> Tensor:
    """Return the scores, detached. Raise :class:`ScoreError` if one is not finite, naming the inputs that are not."""
    scores = scores.detach()
    if bool(scores.isfinite().all()):
        return scores
    bad = [name for name, value in inputs if not bool(value.isfinite().all())]
    if bad:
        raise ScoreError(
            f"{what}: {quoted(bad)} contain{'s' if len(bad) == 1 else ''} NaN or infinite values: repair them."
        )
    raise ScoreError(
        f"{what}: the scores overflow {scores.dtype}, though every weight is finite: scale the weights down."
    )


def normalized(what: str, scores: Tensor, plan: Plan, how: Normalize) -> Tensor:
    """Divide the scores [n_units] of each group by their mean, maximum or sum; a group of zeros stays zero.

    Raises:
        ScoreError: ``how`` is unknown.
    """
    if how == "none":
        return scores
    if how not in _MEASURES:
        raise ScoreError(f"{what}: normalize={how!r}; choose 'mean', 'max', 'sum' or 'none'.")
    parts = [scores[span] for _, span in plan.spans()]
    parts = [part for part in parts if part.numel()]
    totals = [_MEASURES[how](part) for part in parts]
    divisors = torch.stack(totals) if totals else scores.new_zeros(0)
    per_unit = divisors.repeat_interleave(torch.tensor([len(part) for part in parts], device=scores.device))
    return scores / per_unit.clamp_min(torch.finfo(scores.dtype).tiny)


def recorded(what: str, model: nn.Module, plan: Plan, record: Observations | None) -> Tensor:
    """Return the recorded statistic of the criterion ``what``, float [plan.n_units], on the device of the model.

    Raises:
        PlanError: the plan is not of this model.
        ScoreError: there is no record, or it lacks groups.
    """
    units = units_of(model, plan)
    if record is None:
        raise ScoreError(
            f"{what} reads activations, which weights do not tell: run batches inside of "
            f'"with collect.activations(model, plan, {what!r}) as record:", then pass record=record. '
            "In compress, train does so in the phase 'calibrate'."
        )
    scores = record.read(what, plan).to(units.device, units.dtype)
    return _ranked_by_weights(units, model, scores, record.unwatched) if record.unwatched else scores


def _ranked_by_weights(units: Units, model: nn.Module, scores: Tensor, groups: Collection[str]) -> Tensor:
    """Return the scores with those of some groups in proportion to the norms of their units; their means stay."""
    with torch.no_grad():
        norms = normalized("norm", units.square_norms(model).sqrt(), units.plan, "mean").to(scores)
    for group, span in units.plan.spans():
        if group.name in groups and bool((norms[span] > 0).any()):
            scores[span] *= norms[span]
    return scores
