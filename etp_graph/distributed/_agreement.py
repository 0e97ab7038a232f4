"""Agreement among processes. An error on one rank is raised on all, because the others would wait forever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn

from etp_graph.errors import EtpError, PlanError, SelectionError
from etp_graph.plan import Plan, Selection

Group = dist.ProcessGroup

_LONGEST = 1000
"""Number of characters of a foreign error message that are passed on."""


def agree_on_selection(model: nn.Module, plan: Plan, selection: Selection | None, group: Group | None) -> Selection:
    """Return rank 0's selection on every rank, after a check that plans fit the models and are equal on all ranks.

    Raises:
        PlanError: there is no process group, a plan does not fit its model, plans differ, or rank 0 has no selection;
            raised on all ranks.
        SelectionError: the selection violates a constraint of the plan; raised on all ranks.
    """
    require_group()
    mine: list[str] = ["", ""]

    def read() -> None:
        plan.check(model)
        mine[0] = plan.fingerprint
        if dist.get_rank(group) == 0 and selection is not None:
            mine[1] = selection.to_json()

    raise_everywhere(read, "No model was changed.", group, PlanError)
    found = [fingerprint for (fingerprint,) in gather_strings((mine[0],), group)]
    if odd := [rank for rank, fingerprint in enumerate(found) if fingerprint != found[0]]:
        raise PlanError(
            f"the plan of rank {', '.join(map(str, odd))} is another than rank 0's: trace the same model with the same "
            "example inputs and options on every rank, or send rank 0's plan (plan.to_json())."
        )
    text = _from_first(mine[1], group)
    chosen: list[Selection] = []

    def parse() -> None:
        chosen.append(Selection.from_json(text))
        chosen[0].check(plan)

    raise_everywhere(parse, "No model was changed.", group, SelectionError)
    return chosen[0]


def require_group() -> None:
    """Raise :class:`PlanError` unless there is a process group."""
    if not dist.is_available() or not dist.is_initialized():
        raise PlanError("there is no process group: call init_process_group first, or use etp_graph.prune_.")


def error_text(error: BaseException | None) -> str:
    """Return what an exception says, for the other ranks; an empty text for ``None``."""
    if error is None:
        return ""
    said = " ".join(str(error).split())
    kind = type(error).__name__
    text = said or kind if isinstance(error, EtpError) else f"{kind}: {said}" if said else kind
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def raise_everywhere(action: Callable[[], object], consequence: str, group: Group | None, kind: type[EtpError]) -> None:
    """Run an action on every rank. If it fails on one, for any reason, raise ``kind`` on all.

    The action must not wait for other ranks. An exception is not raised before all ranks have answered, because the
    others would wait for this one. A rank that was interrupted (``KeyboardInterrupt``) raises that.
    """
    failure: BaseException | None = None
    try:
        action()
    except BaseException as error:  # noqa: BLE001 - raised below, after the others have heard of it
        failure = error
    reasons = [text for (text,) in gather_strings((error_text(failure),), group)]
    if failure is not None and not isinstance(failure, Exception):
        raise failure
    raise_first(reasons, consequence, kind, cause=failure)


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


def raise_first(
    reasons: list[str], consequence: str, kind: type[EtpError] = PlanError, *, cause: BaseException | None = None
) -> None:
    """Raise ``kind`` with the first reason that is not empty, and the ranks that failed. All ranks pass all reasons."""
    bad = [rank for rank, reason in enumerate(reasons) if reason]
    if bad:
        raise kind(f"rank {', '.join(map(str, bad))}: {reasons[bad[0]]} {consequence}") from cause


def first_rank(group: Group | None) -> int:
    """Return the global rank of the first rank of a group."""
    return dist.get_global_rank(group, 0) if group is not None else 0


def _from_first(text: str, group: Group | None) -> str:
    """Return the text of the group's first rank, or raise :class:`PlanError` on all ranks if it is empty."""
    held = [text]
    dist.broadcast_object_list(held, src=first_rank(group), group=group)
    if not held[0]:
        raise PlanError("rank 0 has no selection: allocate there, and pass it.")
    return held[0]
