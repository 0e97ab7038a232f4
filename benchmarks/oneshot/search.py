"""Search for the widths of all groups, as a baseline of allocation: AMC's question, asked by optuna's sampler.

Each trial draws a weight for each group. Units keep the order of their scores inside their group, so a weight says how
much of its group goes. The budget is met in every trial. What is minimised is the divergence of the predictions from
those of the dense network on the calibration batches.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.collect import Divergence

TRIALS = 100

SPREAD = 3.0
"""Weights are exp(w), with w from -SPREAD to SPREAD."""


def searched_scores(
    model: nn.Module, plan: etp.Plan, scores: Tensor, batches: Sequence[Any], speed_up: float, seed: int
) -> Tensor:
    """Scores [n_units] whose global order has the best widths that were found."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    ranks, divergence = _ranks(plan, scores), Divergence(model, batches)
    groups = plan.prunable

    def weighted(weights: dict[str, float]) -> Tensor:
        found = ranks.clone()
        for group, place in plan.spans():
            if group.name in weights:
                found[place] *= math.exp(weights[group.name])
        return found

    def measured(trial: Any) -> float:
        weights = {group.name: trial.suggest_float(group.name, -SPREAD, SPREAD) for group in groups}
        small = copy.deepcopy(model)
        selection = etp.allocate(small, plan, weighted(weights), budget=etp.Budget(speed_up=speed_up, scope="global"))
        etp.prune_(small, plan, selection)
        return divergence(small)

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    study.enqueue_trial({group.name: 0.0 for group in groups})  # the same share of every group
    study.optimize(measured, n_trials=TRIALS)
    return weighted(study.best_params)


def _ranks(plan: etp.Plan, scores: Tensor) -> Tensor:
    """The rank of each unit within its group, in (0, 1]."""
    found = torch.zeros(plan.n_units, dtype=torch.float64)
    for _, place in plan.spans():
        order = scores[place].argsort().argsort().double()
        found[place] = (order + 1) / max(len(order), 1)
    return found
