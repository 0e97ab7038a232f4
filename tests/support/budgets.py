"""Draw scores, and spell out the rules that every selection within a budget obeys."""

from __future__ import annotations

import torch
from torch import Tensor

from etp_graph.budget import Budget
from etp_graph.plan import Cost, Group, Plan

SCOPES = ("global", "local", "isomorphic", "balanced")
RANKS = ("score", "score_per_sqrt_cost", "score_per_mac")


def draw_scores(plan: Plan, seed: int) -> Tensor:
    """Scores as real ones are: other scales in every group."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(plan.n_units, generator=generator)
    for _, span in plan.spans():
        scores[span] *= 0.2 + float(torch.rand((), generator=generator))
    return scores


def quantity(cost: Cost, budget: Budget) -> int:
    return cost.macs if budget.params is None else cost.params


def admissible(group: Group, budget: Budget, kept: int) -> bool:
    """Whether the group may keep this many units: the rules, spelled out."""
    if kept == group.n_units:
        return True
    floor = max(group.min_units, budget.min_units, (1 - budget.max_ratio) * group.n_units - 1e-6)
    return (
        group.locked is None and kept >= floor
        and kept * head_size(group) % budget.round_to == kept % group.multiple == kept % group.blocks == 0
    )  # fmt: skip


def head_size(group: Group) -> int:
    """How many channels a unit fills: the whole of a head, one channel of anything else."""
    return len(group.slices[0].index) // group.n_units if group.kind == "heads" else 1


def assert_lawful(plan: Plan, keep: Tensor, scores: Tensor, budget: Budget) -> None:
    for group, span in plan.spans():
        mask = keep[span]
        assert admissible(group, budget, int(mask.sum())), group.name
        for kept, values in zip(mask.view(group.blocks, -1), scores[span].view(group.blocks, -1), strict=True):
            if bool(kept.any()) and not bool(kept.all()):
                assert values[kept].min() >= values[~kept].max()
