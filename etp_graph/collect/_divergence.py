"""How far the predictions of a changed model are from those of the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etp_graph._config import require
from etp_graph.errors import ScoreError
from etp_graph.model import eval_mode, private_random, run_model, without_autocast

from ._batches import naming_batch
from ._own_labels import OwnLabels, logits_of

_KEPT = 2**28
"""Largest number of logits of the dense model that is kept; more of them are computed anew each time."""


@contextmanager
def _same_conditions(model: nn.Module) -> Iterator[None]:
    """Run the model in eval mode, with the same random numbers each time, without autocast and gradients."""
    with eval_mode(model), private_random(model, 0), without_autocast(), torch.no_grad():
        yield


class Divergence:
    """Kullback-Leibler divergence of a model's predictions from those of the dense model, a function of the model.

    It needs no labels. It is the mean over all predictions: positions whose ``attention_mask`` is zero are left out.

    Args:
        model: the dense model, which is not changed. If it has very many logits, it must still be the dense one when
            other models are measured.
        batches: example inputs as :func:`etp_graph.trace` takes them.

    Raises:
        ScoreError: the model returns no logits, or they are not finite.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any]) -> None:
        self._model, self._batches = model, batches
        self._kept: list[Tensor] | None = []
        size = 0
        for part in self._log_chances(model):
            require(bool(part.isfinite().all()), "the logits of the dense model are NaN or infinite.", ScoreError)
            size += part.numel()
            if self._kept is not None:
                self._kept.append(part)
            if size > _KEPT:
                self._kept = None

    def __call__(self, model: nn.Module) -> float:
        """Return the divergence of a model, in nats; infinite or NaN if its logits are."""
        dense = iter(self._kept) if self._kept is not None else self._log_chances(self._model)
        total, count = 0.0, 0
        for a, b in zip(dense, self._log_chances(model), strict=True):
            total += float(F.kl_div(b, a, log_target=True, reduction="sum").double())
            count += len(a)
        return total / max(count, 1)

    def _log_chances(self, model: nn.Module) -> Iterator[Tensor]:
        """Yield the logarithms of the predicted probabilities of each batch, [predictions, classes]."""
        for number, batch in enumerate(self._batches, start=1):
            with _same_conditions(model), naming_batch(number):
                logits = logits_of(run_model(model, batch))
                logits = logits if logits.dtype == torch.float64 else logits.float()
                found = F.log_softmax(logits, -1).flatten(0, -2)
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            counted = isinstance(mask, Tensor) and mask.numel() == len(found)
            yield found[mask.flatten() > 0] if isinstance(mask, Tensor) and counted else found


def loss_growth(
    model: nn.Module, batches: Sequence[Any], loss: Callable[[nn.Module, Any], Tensor] | None
) -> Callable[[nn.Module], float]:
    """Return a function that says how much worse a changed model is on the batches than the dense one.

    Args:
        model: the dense model.
        batches: example inputs as :func:`etp_graph.trace` takes them.
        loss: function of (model, batch) whose mean is compared. ``None``, or labels of the model's own: the
            :class:`Divergence`, which is what the loss on such labels estimates.

    Raises:
        ScoreError: as :class:`Divergence`, or the loss of the dense model is not finite.
    """
    if loss is None or isinstance(loss, OwnLabels):
        return Divergence(model, batches)

    def mean(one: nn.Module) -> float:
        with _same_conditions(one):
            return float(np.mean([float(loss(one, batch)) for batch in batches]))

    dense = mean(model)
    require(
        np.isfinite(dense), "the loss of the dense model is not finite: check the batches and the loss.", ScoreError
    )
    return lambda one: mean(one) - dense
