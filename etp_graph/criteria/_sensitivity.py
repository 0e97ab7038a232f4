"""Allocation across groups by measurement: how much the loss grows when a share of one group is removed.

Equation: with the units of group g ordered by their scores, D_g(k) = L(first k units masked) − L(dense), measured at a
few k. The lower convex hull of the points (k, D_g(k)) is a piecewise linear function; the new score of the k-th unit is
its slope there. Removing units by ascending score per cost then minimises Σ_g D_g at every cost that it passes.

Sources: Shoham & Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers" (convex hull and slopes);
sensitivity analysis per layer as in Li et al. 2017, "Pruning filters for efficient ConvNets", section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from etp_graph._config import require, require_number
from etp_graph.collect import loss_growth
from etp_graph.errors import ScoreError
from etp_graph.model import copy_model
from etp_graph.plan import Group, Plan
from etp_graph.standins import standing_in
from etp_graph.verification import Masked

Loss = Callable[[nn.Module, Any], Tensor]
"""Runs the model on a batch and returns the loss, a scalar."""


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    plan: Plan,
    scores: Tensor,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    shares: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    progress: bool = True,
) -> Tensor:
    """Measure how much the loss grows when shares of each group are removed, and return scores that say so.

    The order of the units inside a group stays that of ``scores``; how the groups compare is measured. Pass the result
    to :func:`etp_graph.allocate` with ``Budget(rank="score_per_mac")``. It costs one forward of the batches for each
    group and share, and memory for a copy of the model.

    Args:
        model: the dense model, which is not changed. It runs in eval mode.
        plan: its plan.
        scores: scores of a criterion, float [plan.n_units].
        batches: example inputs as :func:`etp_graph.trace` takes them; a few dozen samples.
        loss: function of (model, batch). Default: how far the outputs are from those of the dense model, which needs no
            labels (:func:`etp_graph.collect.loss_growth`).
        shares: shares of a group that are removed, each in (0, 1]. 1 keeps one unit.
        progress: show a progress bar if stdout is a terminal.

    Returns:
        The loss that each unit costs, float64 [plan.n_units].

    Raises:
        PlanError: the plan is not of this model.
        ScoreError: there are no batches, scores have another shape or are not finite, a share is out of range, the
            outputs cannot be compared and there is no loss, or a loss of the dense model is not finite.
    """
    plan.check(model)
    held = list(batches)
    require(bool(held), "batches is empty: pass at least one batch of example inputs.", ScoreError)
    require(
        scores.shape == (plan.n_units,) and bool(scores.isfinite().all()),
        f"scores: expected {plan.n_units} finite numbers, one for each unit; give what a criterion returned.",
        ScoreError,
    )
    require(bool(shares), "shares is empty: give at least one share in (0, 1].", ScoreError)
    for share in shares:
        require_number("shares", share, 0, 1, ScoreError)
        require(share > 0, "shares: 0 removes nothing; give shares in (0, 1].", ScoreError)
    measure = loss_growth(model, held, loss)
    found = torch.ones(plan.n_units, dtype=torch.float64)
    spans = {group.name: span for group, span in plan.spans()}
    groups = [group for group in plan.prunable if group.n_units > 1]
    console = Console()
    shown = progress and console.is_terminal
    for group in track(groups, description="sensitivity", console=console, disable=not shown, transient=True):
        span = spans[group.name]
        order = scores[span].cpu().argsort(stable=True)
        curve = _curve(model, plan, group, span, order, shares, measure)
        found[span][order] = torch.from_numpy(_slopes(curve, group.n_units))
    return found


def _curve(
    model: nn.Module,
    plan: Plan,
    group: Group,
    span: slice,
    order: Tensor,
    shares: Sequence[float],
    measure: Callable[[nn.Module], float],
) -> list[tuple[int, float]]:
    """Return numbers of removed units with the growth of the loss, from (0, 0) on."""
    counts = sorted({min(max(1, round(share * group.n_units)), group.n_units - 1) for share in shares})
    points = [(0, 0.0)]
    for count in counts:
        keep = torch.ones(plan.n_units, dtype=torch.bool)
        keep[span] = torch.ones(group.n_units, dtype=torch.bool).index_fill(0, order[:count], False)
        masked = copy_model(model)
        with Masked(masked, plan, keep), standing_in(masked, views_only=True):
            grown = measure(masked)
        points.append((count, max(grown, points[-1][1]) if np.isfinite(grown) else np.inf))
    return points


def _slopes(points: Sequence[tuple[int, float]], n_units: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the slope of the lower convex hull at each unit, [n_units], ascending; equal slopes keep their order.

    Units behind the last point have the slope before it. Where the loss is not finite, it is ten times the largest.
    """
    hull: list[tuple[int, float]] = []
    for point in points:
        while len(hull) > 1 and np.isfinite(point[1]) and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        if np.isfinite(point[1]):
            hull.append(point)
    largest = max(hull[-1][1], 1e-30)
    found = np.full(n_units, 10.0 * largest)
    for a, b in pairwise(hull):
        found[a[0] : b[0]] = _slope(a, b)
    if hull[-1] == points[-1]:
        found[hull[-1][0] :] = found[hull[-1][0] - 1]
    return (found + 1e-12 * largest / n_units) * (1 + 1e-6 * np.arange(n_units) / n_units)


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
