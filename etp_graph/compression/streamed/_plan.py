"""Plan of a model without weights: groups within one block, whose sizes the configuration of the class can say."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import BoolTensor, Tensor, nn

from etp_graph._config import require
from etp_graph.budget import Budget, allocate
from etp_graph.errors import BudgetError, ExportError
from etp_graph.export import find_config, restrict_plan
from etp_graph.graph import trace
from etp_graph.plan import Cost, Group, Plan, Selection, cost
from etp_graph.surgery import prune_

from ._blocks import BlockwiseModel, build_without_weights
from ._inputs import Batch, shortened


def trace_blocks(
    blockwise: BlockwiseModel, batch: Batch, *, prune: str | Sequence[str] | None, ignore: str | Sequence[str]
) -> tuple[Any, Plan]:
    """Return a model without weights, and its plan; notes what the blocks return.

    Units that several blocks hold are locked, and so are those that the configuration of the class cannot describe.

    Raises:
        PlanError: as :func:`etp_graph.trace`.
    """
    bare = build_without_weights(blockwise.source.model_class, blockwise.model.config, blockwise.source.dtype)
    with ExitStack() as stack:
        for number, name in enumerate(blockwise.blocks):
            stack.callback(
                bare.get_submodule(name).register_forward_hook(_noter(blockwise, number), with_kwargs=True).remove
            )
        plan = trace(bare, shortened(batch), prune=prune, ignore=ignore, check=False)
    plan = plan.lock({group.name: _SPREAD for group in plan.prunable if not _block_of(group, blockwise.blocks)})
    return bare, _with_accepted_steps(bare, restrict_plan(bare, plan))


_SPREAD = "several blocks hold its units, and they are not in memory together"


def _noter(blockwise: BlockwiseModel, number: int) -> Any:
    return lambda module, args, kwargs, output: blockwise.note_returns(number, (args, kwargs), output)


def _block_of(group: Group, blocks: Sequence[str]) -> str | None:
    """Return the block that holds all units of a group, or ``None``."""
    starts = {next((name for name in blocks if piece.tensor.startswith(f"{name}.")), None) for piece in group.slices}
    return starts.pop() if len(starts) == 1 else None


def plan_of_block(plan: Plan, blocks: Sequence[str], number: int) -> Plan:
    """Return the plan in which all groups of other blocks are locked."""
    others = [group.name for group in plan.prunable if _block_of(group, blocks) != blocks[number]]
    return plan.lock(dict.fromkeys(others, "it is in another block"))


def _with_accepted_steps(bare: Any, plan: Plan) -> Plan:
    """Return the plan whose groups keep a multiple of units that the class accepts, or are locked.

    Some classes refuse a number of heads that does not divide the hidden size.
    """
    classes: dict[tuple[str, int], list[Group]] = {}
    for group in plan.prunable:
        classes.setdefault((group.kind, group.n_units), []).append(group)
    for (_, n_units), groups in classes.items():
        least = math.lcm(*(group.multiple for group in groups), *(group.blocks for group in groups))
        steps = (step for step in range(least, n_units, least) if n_units % step == 0)
        step = next((step for step in steps if _accepts(bare, plan, groups, step)), None)
        names = {group.name for group in groups}
        if step is None:
            plan = plan.lock(dict.fromkeys(names, f"{type(bare).__name__} accepts no smaller number of them"))
        else:
            changed = tuple(replace(g, multiple=step) if g.name in names else g for g in plan.groups)
            plan = replace(plan, groups=changed)
    return plan


def _accepts(bare: Any, plan: Plan, groups: Sequence[Group], step: int) -> bool:
    """Return True if the class accepts one and two steps less than all units, as far as the groups can lose them."""
    n_units, least = groups[0].n_units, max(group.min_units for group in groups)
    for count in (n_units - step, n_units - 2 * step):
        if count >= max(least, 1):
            keep = {group.name: _first_of_each_block(group, count) for group in groups}
            try:
                pruned_config(bare, plan, Selection(keep))
            except ExportError:
                return False
    return True


def _first_of_each_block(group: Group, count: int) -> BoolTensor:
    found = torch.arange(group.n_units // group.blocks) < count // group.blocks
    return found.repeat(group.blocks)  # type: ignore[return-value]


def pruned_config(bare: Any, plan: Plan, selection: Selection) -> Any:
    """Return the configuration of the pruned model. Raise :class:`ExportError` if the class has none."""
    pruned = copy.deepcopy(bare)
    prune_(pruned, plan, selection)
    return find_config(pruned)


def select(bare: nn.Module, plan: Plan, scores: Tensor, budgets: Sequence[Budget]) -> list[tuple[Selection, Cost]]:
    """Return the selection and the cost of each budget; each selection is a part of the one before.

    The smallest model is what its budget alone gives. The units that a budget keeps are the first of the ranking in
    each group, so that a larger model which keeps at least as many of each group keeps the same and more.

    Raises:
        BudgetError: a budget is out of reach, or keeps as much as the one before.
    """
    alone = [cost(bare, plan, allocate(bare, plan, scores, budget=budget)).params for budget in budgets]
    for before, after, budget in zip(alone, alone[1:], budgets[1:], strict=False):
        require(
            after < before,
            f"budget: {budget.as_given} keeps as much as the one before: order them from large to small.",
            BudgetError,
        )
    found: list[Selection] = []
    wider = plan
    for budget in reversed(budgets):
        chosen = allocate(bare, wider, scores, budget=budget)
        found.insert(0, Selection(chosen.keep))
        wider = _with_floors(plan, chosen)
    return [(selection, cost(bare, plan, selection)) for selection in found]


def _with_floors(plan: Plan, selection: Selection) -> Plan:
    """Return the plan whose groups keep at least as many units as a selection."""
    kept = {name: int(keep.sum()) for name, keep in selection.keep.items()}
    floors = tuple(replace(group, min_units=max(group.min_units, kept.get(group.name, 1))) for group in plan.groups)
    return replace(plan, groups=floors)
