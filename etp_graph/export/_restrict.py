"""Lock the groups whose sizes the configuration of a class cannot describe."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

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
    :func:`etp_graph.export.huggingface`, unless the class derives other numbers from a size (Gemma scales embeddings by
    the root of the hidden size) or refuses a pair of sizes. A group stays free if some fields decide its sizes and none
    but those of groups of its kind with equally many units. Where the class accepts only multiples of a number (Llama:
    hidden sizes that are multiples of the number of heads), the group keeps a multiple of it.

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
    search = ConfigSearch(model)
    fields = search.probe_fields()
    tensors = all_tensors(model)
    first = first_names(tensors, tensors)
    decided = [(field, {(first[name], at) for name, at in field.slopes if name in first}) for field in fields]
    reasons = {}
    for group in plan.prunable:
        alike = {fact for other in plan.prunable if _alike(group, other) for fact in _places(other)}
        reason = _reason(_places(group), alike, decided, type(model).__name__)
        if reason is not None:
            reasons[group.name] = reason
    return _with_multiples(plan.lock(reasons), search, decided)


def _with_multiples(plan: Plan, search: ConfigSearch, decided: list[tuple[Field, set[Fact]]]) -> Plan:
    """Return the plan whose free groups keep a number of units that the class accepts as the value of their field."""
    steps: dict[str, int] = {}
    groups = []
    for group in plan.groups:
        for field, facts in decided if group.locked is None else ():
            if field.value == group.n_units and facts & _places(group):
                step = steps.setdefault(path_text(field.path), search.accepted_step(field))
                group = replace(group, multiple=math.lcm(group.multiple, step))  # noqa: PLW2901  # the same group
        groups.append(group)
    return replace(plan, groups=tuple(groups))


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
