"""Scores that a collector has seen."""

from __future__ import annotations

from torch import Tensor, nn

from ..collect import Record
from ..errors import ScoreError
from ..plan import Plan
from .common import units_of


def recorded(what: str, model: nn.Module, plan: Plan, record: Record | None) -> Tensor:
    """The statistic of this name, float [plan.n_units], on the device of the model.

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
    return record.read(what, plan).to(units.device, units.dtype)
