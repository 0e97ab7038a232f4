"""Lock the groups whose sizes the configuration of a class cannot describe."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from etp_graph.errors import ExportError
from etp_graph.model import all_tensors, first_names
from etp_graph.plan import Group, Plan

from ._facts import Fact, fact_text
from ._fields import path_text
from ._solve import ConfigSearch, Field


def restrict_plan(model: nn.Module, plan: Plan) -> Plan:
    """Lock the groups that the configuration of the model's class cannot describe, each with the reason.

    What is allocated from the result with ``Budget(..., uniform=True)`` can be written by
    :func:`etp_graph.export.huggingface`, unless the class refuses single values (a hidden size that is no multiple of
    the number of heads). A group stays free if some fields decide its sizes and none but those of groups of its kind
    with equally many units.

    Args:
        model: the model of transformers that the plan was traced from, not yet pruned.
        plan: the plan.

    Raises:
        ExportError: the model is none of transformers, or its class builds other tensors than it has.
        PlanError: the plan is of another model.
    """
    plan.check(model)
    if not hasattr(model, "config"):
        raise ExportError(f"{type(model).__name__} has no config of transformers: every plan fits etp.save.")
    fields = ConfigSearch(model).probe_fields()
    tensors = all_tensors(model)
    first = first_names(tensors, tensors)
    decided = [(field, {(first[name], at) for name, at in field.slopes if name in first}) for field in fields]
    reasons = {}
    for group in plan.prunable:
        alike = {fact for other in plan.prunable if _alike(group, other) for fact in _places(other)}
        reason = _reason(_places(group), alike, decided, type(model).__name__)
        if reason is not None:
            reasons[group.name] = reason
    return plan.lock(reasons)


def _alike(group: Group, other: Group) -> bool:
    return (group.kind, group.n_units) == (other.kind, other.n_units)


def _places(group: Group) -> set[Fact]:
    return {(piece.tensor, piece.axis) for piece in group.slices}


def _reason(places: set[Fact], alike: set[Fact], fields: Iterable[tuple[Field, set[Fact]]], name: str) -> str | None:
    """Return why no fields of the configuration decide the sizes at ``places`` and no others than ``alike``.

    Each field comes with the axes of tensors that it decides. A tied tensor has one name in all of these.
    """
    said: set[Fact] = set()
    blamed: str | None = None
    for field, decided in fields:
        if decided <= alike:
            said |= decided
        elif decided & places:
            other = fact_text(min(decided - alike, key=str))
            blamed = f"{name} has one {path_text(field.path)} for these and for {other}"
    missing = sorted(places - said, key=str)
    if not missing:
        return None
    return blamed or f"no field of the configuration of {name} decides {fact_text(missing[0])}"
