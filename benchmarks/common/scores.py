"""Scores of a criterion on batches, computed once and used for many sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.collect import OwnLabels, needs_backward, watch
from etp_graph.criteria import find_criterion
from etp_graph.model import run_model


def observed_scores(
    model: nn.Module,
    plan: etp.Plan,
    criterion: str,
    batches: Sequence[Any],
    *,
    data_losses: Iterable[Callable[[], Tensor]],
    seed: int,
) -> Tensor:
    """The scores of a criterion [n_units] with all that it needs.

    Args:
        model: the model, in eval mode.
        plan: its plan.
        criterion: name of the criterion.
        batches: inputs of the model.
        data_losses: losses on the labels of the data, for criteria of first order; those of second order draw labels
            from the predictions of the model.
        seed: of random numbers.
    """
    found = find_criterion(criterion)
    if found.observes is None:
        return found.score(model, plan, **({"seed": seed} if "seed" in found.options else {}))
    first_order, own = found.observes == "gradients", OwnLabels(seed=seed)
    losses = data_losses if first_order else (lambda batch=batch: own(model, batch) for batch in batches)
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(first_order)  # gradients of activations do not need those of weights
    with watch(model, plan, criterion) as record:
        if needs_backward(found.observes):
            for loss in losses:
                model.zero_grad()
                loss().backward()
        else:
            with torch.no_grad():
                for batch in batches:
                    run_model(model, batch)
    model.zero_grad()
    for parameter, before in trained:
        parameter.requires_grad_(before)
    return found.score(model, plan, record=record)


def given(scores: Tensor) -> Callable[[nn.Module, etp.Plan], Tensor]:
    """The criterion that returns these scores."""
    return lambda model, plan: scores
