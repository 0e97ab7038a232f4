"""Agreement among processes. An error on one rank is raised on all, because the others would wait forever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn

from etp_graph.errors import EtpError, PlanError
from etp_graph.plan import Plan, Selection

Group = dist.ProcessGroup


def agree_on_selection(model: nn.Module, plan: Plan, selection: Selection | None, group: Group | None) -> Selection:
    """Return rank 0's selection on every rank, after a check that plans fit the models and are equal on all ranks.

    Raises:
        PlanError: there is no process group, a plan does not fit its model, plans differ, or rank 0 has no selection;
            raised on all ranks.
        SelectionError: the selection violates a constraint of the plan; raised on all ranks.
    """
    require_group()
    reason = error_text(lambda: plan.check(model))
    found = gather_strings((reason, plan.fingerprint), group)
    raise_first([reason for reason, _ in found], "No model was changed.")
    odd = [rank for rank, (_, fingerprint) in enumerate(found) if fingerprint != found[0][1]]
    if odd:
        raise PlanError(
            f"the plan of rank {', '.join(map(str, odd))} is another than rank 0's: trace the same model with the same "
            "example inputs and options on every rank, or send rank 0's plan (plan.to_json())."
        )
    chosen = _from_first(selection, group)
    chosen.check(plan)
    return chosen


def require_group() -> None:
    """Raise :class:`PlanError` unless there is a process group."""
    if not dist.is_available() or not dist.is_initialized():
        raise PlanError("there is no process group: call init_process_group first, or use etp_graph.prune_.")


def error_text(action: Callable[[], object]) -> str:
    """Run an action. Return the message of its error, or an empty string.

    The error is not raised here, because an exception on one rank would leave the others waiting.
    """
    try:
        action()
    except EtpError as error:
        return str(error) or type(error).__name__
    return ""


def raise_everywhere(action: Callable[[], object], consequence: str, group: Group | None, kind: type[EtpError]) -> None:
    """Run an action on every rank; if it fails on one, raise ``kind`` on all. It must not wait for other ranks."""
    raise_first([text for (text,) in gather_strings((error_text(action),), group)], consequence, kind)


def gather_strings(value: tuple[str, ...], group: Group | None) -> list[tuple[str, ...]]:
    """Return the values of all ranks.

    Raises:
        PlanError: a process does not answer.
    """
    found: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(found, value, group=group)
    except RuntimeError as error:
        raise PlanError(
            f"a process does not answer ({error}): it died, or did not call this. Start all of them anew from the last "
            "checkpoint."
        ) from error
    return found


def raise_first(reasons: list[str], consequence: str, kind: type[EtpError] = PlanError) -> None:
    """Raise ``kind`` with the first reason that is not empty, and the ranks that failed. All ranks pass all reasons."""
    bad = [rank for rank, reason in enumerate(reasons) if reason]
    if bad:
        raise kind(f"rank {', '.join(map(str, bad))}: {reasons[bad[0]]} {consequence}")


def first_rank(group: Group | None) -> int:
    """Return the global rank of the first rank of a group."""
    return dist.get_global_rank(group, 0) if group is not None else 0


def _from_first(selection: Selection | None, group: Group | None) -> Selection:
    """Return the selection of the group's first rank."""
    mine = dist.get_rank(group) == 0
    text = [selection.to_json() if mine and selection is not None else None]
    dist.broadcast_object_list(text, src=first_rank(group), group=group)
    if text[0] is None:
        raise PlanError("rank 0 has no selection: allocate there, and pass it.")
    return Selection.from_json(text[0])
