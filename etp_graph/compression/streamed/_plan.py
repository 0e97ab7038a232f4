"""Plan of a model without weights: groups within one block, whose sizes the configuration of the class can say."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

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
            stack.callback(bare.get_submodule(name).register_forward_hook(_noter(blockwise, number)).remove)
        plan = trace(bare, shortened(batch), prune=prune, ignore=ignore, check=False)
    plan = plan.lock({group.name: _SPREAD for group in plan.prunable if not _block_of(group, blockwise.blocks)})
    return bare, _with_accepted_steps(bare, restrict_plan(bare, plan))


_SPREAD = "several blocks hold its units, and they are not in memory together"


def _noter(blockwise: BlockwiseModel, number: int) -> Any:
    return lambda module, args, output: blockwise.note_returns(number, output)


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
        steps = (step for step in range(1, n_units) if n_units % step == 0 and step % groups[0].multiple == 0)
        step = next((step for step in steps if _accepts(bare, plan, groups, n_units, step)), None)
        names = {group.name for group in groups}
        if step is None:
            plan = plan.lock(dict.fromkeys(names, f"{type(bare).__name__} accepts no smaller number of them"))
        else:
            changed = tuple(replace(g, multiple=step) if g.name in names else g for g in plan.groups)
            plan = replace(plan, groups=changed)
    return plan


def _accepts(bare: Any, plan: Plan, groups: Sequence[Group], n_units: int, step: int) -> bool:
    """Return True if the class accepts one and two steps less than all units."""
    for count in (n_units - step, n_units - 2 * step):
        if count > 0:
            keep = {group.name: torch.arange(n_units) < count for group in groups}
            try:
                pruned_config(bare, plan, Selection(keep))  # type: ignore[arg-type]
            except ExportError:
                return False
    return True


def pruned_config(bare: Any, plan: Plan, selection: Selection) -> Any:
    """Return the configuration of the pruned model. Raise :class:`ExportError` if the class has none."""
    pruned = copy.deepcopy(bare)
    prune_(pruned, plan, selection)
    return find_config(pruned)


def select(bare: nn.Module, plan: Plan, scores: Tensor, budgets: Sequence[Budget]) -> Iterator[tuple[Selection, Cost]]:
    """Yield the selection and the cost of each budget; each selection is a part of the one before.

    The units that two budgets keep are a prefix of one ranking in each group, so what both keep is such a prefix, too.

    Raises:
        BudgetError: a budget is out of reach, or keeps more than the one before.
    """
    before = torch.ones(plan.n_units, dtype=torch.bool)
    largest = None
    for budget in budgets:
        chosen = allocate(bare, plan, scores, budget=budget)
        alone = cost(bare, plan, chosen).params
        require(
            largest is None or alone < largest,
            f"budget: {budget.as_given} keeps as much as the one before: order them from large to small.",
            BudgetError,
        )
        largest, before = alone, before & chosen.flat(plan).cpu()
        nested = Selection.from_flat(plan, before)
        yield nested, cost(bare, plan, nested)
