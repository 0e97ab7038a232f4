"""How much of the new weights a pruned model gets: the blend whose pruned model is closest to the dense one.

Compensation fits each layer on its own, and all outputs of a layer count alike. Where a layer keeps few units, this can
make the model worse as a whole. The parameters become old + blend * (new - old), and the blend is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any

import numpy as np
from torch import nn

from etp_graph._config import require, require_number
from etp_graph.collect import IncomparableOutputsError, OwnLabels, loss_growth
from etp_graph.errors import ScoreError
from etp_graph.model import undone
from etp_graph.plan import Plan, Selection
from etp_graph.recovery import NewWeights
from etp_graph.surgery import prepare_surgery

Distance = Callable[[nn.Module], float]
"""How far the outputs of a model are from those of the dense one."""

BLENDS = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Blends that are tried by default."""


def checked_blends(blend: float | Sequence[float]) -> tuple[float, ...]:
    """Return the blends from large to small.

    Raises:
        ScoreError: there is none, or one is not in [0, 1].
    """
    given: Any = [blend] if isinstance(blend, Real) else blend
    if not isinstance(given, list | tuple):
        raise ScoreError(f"blend is {blend!r}: give a number, or several in a list.")
    several = [float(one) if isinstance(one, Real) else one for one in given]  # numbers of NumPy, too
    require(bool(several), "blend is empty: give at least one number in [0, 1].", ScoreError)
    for one in several:
        require_number("blend", one, 0, 1, ScoreError)
    return tuple(sorted(set(several), reverse=True))


def distance_from(model: nn.Module, batches: Iterable[Any], loss: Any = None) -> Distance | None:
    """Return what measures how far a model's outputs are from those of the dense one; ``None`` if nothing can.

    Args:
        model: the dense model, which may be changed afterwards.
        batches: example inputs.
        loss: only the dimension of the classes is read, if it is :class:`etp_graph.collect.OwnLabels`. A loss on labels
            may fall by chance where the outputs change.
    """
    try:
        return loss_growth(model, list(batches), loss if isinstance(loss, OwnLabels) else None)
    except IncomparableOutputsError:  # infinite values may be meant so
        return None


def choose_blend(
    model: nn.Module,
    plan: Plan,
    selection: Selection,
    weights: NewWeights,
    distance: Distance | None,
    blends: Sequence[float] = BLENDS,
) -> tuple[float, dict[float, float]]:
    """Return the best blend, and how far the outputs with each blend that was tried are from those of the dense model.

    The blends are tried in their order. It ends where one is worse than the one before. Nothing is tried if there is
    one blend alone, or if the outputs cannot be compared: the first is then returned. The model is as before
    afterwards.

    Args:
        model: the model, not pruned yet.
        plan: its plan.
        selection: the units that stay.
        weights: the new weights.
        distance: measures a model, see :func:`distance_from`.
        blends: from large to small.
    """
    found: dict[float, float] = {}
    if len(blends) == 1 or not weights.new or distance is None:
        return blends[0], found
    for blend in blends:
        try:
            value = _distance_with(blend, model, plan, selection, weights, distance)
        except IncomparableOutputsError:  # as many boxes as the model finds
            return blends[0], {}
        best = min(found.values(), default=np.inf)
        found[blend] = value if np.isfinite(value) else np.inf
        if found[blend] > best:
            break
    return min(found, key=found.__getitem__), found


def _distance_with(
    blend: float, model: nn.Module, plan: Plan, selection: Selection, weights: NewWeights, distance: Distance
) -> float:
    """Return the distance of the pruned model with a blend. The model is as before afterwards."""
    changes = weights.changes(blend)
    with undone(changes.undo):
        changes.commit()
        surgery = prepare_surgery(model, plan, selection)
        with undone(surgery.undo):
            surgery.commit()
            return distance(model)
