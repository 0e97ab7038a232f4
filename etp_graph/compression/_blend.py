"""How much of the new weights a pruned model gets: the blend whose pruned model is closest to the dense one.

Compensation fits each layer on its own, and all outputs of a layer count alike. Where a layer keeps few units, this can
make the model worse as a whole. The parameters become old + blend * (new - old), and the blend is measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import nn

from etp_graph._config import require, require_number
from etp_graph.collect import IncomparableOutputsError, loss_growth
from etp_graph.errors import ScoreError
from etp_graph.model import undone
from etp_graph.plan import Plan, Selection
from etp_graph.recovery import NewWeights
from etp_graph.surgery import prepare_surgery

BLENDS = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Blends that are tried by default."""


def checked_blends(blend: float | Sequence[float]) -> tuple[float, ...]:
    """Return the blends from large to small.

    Raises:
        ScoreError: there is none, or one is not in [0, 1].
    """
    several = [blend] if isinstance(blend, int | float) else list(blend)
    require(bool(several), "blend is empty: give at least one number in [0, 1].", ScoreError)
    for one in several:
        require_number("blend", one, 0, 1, ScoreError)
    return tuple(sorted({float(one) for one in several}, reverse=True))


def choose_blend(
    model: nn.Module,
    plan: Plan,
    selection: Selection,
    weights: NewWeights,
    batches: Iterable[Any],
    blends: Sequence[float] = BLENDS,
) -> tuple[float, dict[float, float]]:
    """Return the best blend, and how far the outputs with each blend that was tried are from those of the dense model.

    The blends are tried in their order. It ends where one is worse than the one before. Nothing is tried if there is
    one blend alone, or if the outputs cannot be compared: the first is then returned. The model is as before
    afterwards.

    Args:
        model: the dense model.
        plan: its plan.
        selection: the units that stay.
        weights: the new weights.
        batches: example inputs.
        blends: from large to small.
    """
    if len(blends) == 1 or not weights.new:
        return blends[0], {}
    try:
        distance = loss_growth(model, list(batches), None)  # a loss may fall by chance where the outputs change
    except IncomparableOutputsError:  # infinite values may be meant so
        return blends[0], {}
    found: dict[float, float] = {}
    for blend in blends:
        changes = weights.changes(blend)
        with undone(changes.undo):
            changes.commit()
            surgery = prepare_surgery(model, plan, selection)
            with undone(surgery.undo):
                surgery.commit()
                value = distance(model)
        best = min(found.values(), default=np.inf)
        found[blend] = value if np.isfinite(value) else np.inf
        if found[blend] > best:
            break
    return min(found, key=found.__getitem__), found
