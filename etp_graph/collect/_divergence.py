"""How far the predictions of a changed model are from those of the model itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from etp_graph._config import require
from etp_graph.errors import ScoreError
from etp_graph.model import eval_mode, private_random, run_model, without_autocast

from ._batches import naming_batch
from ._own_labels import OwnLabels, logits_of

_KEPT = 2**28
"""Largest number of values of the dense model that is kept; of more, predictions are drawn at random."""


class IncomparableOutputsError(ScoreError):
    """Outputs hold no numbers that could be compared with those of the dense model, or infinite ones."""


@contextmanager
def _same_conditions(model: nn.Module) -> Iterator[None]:
    """Run the model in eval mode, with the same random numbers each time, without autocast and gradients."""
    with eval_mode(model), private_random(model, 0), without_autocast(), torch.no_grad():
        yield


class _Distance(ABC):
    """Distance of the outputs of a model from those of the dense model, a function of the model.

    What it needs of the dense model is kept, so that the model itself may be changed and measured. If that would be
    more than 2^28 values, predictions are drawn at random, the same ones for all models. Positions whose
    ``attention_mask`` is zero are left out.

    Args:
        model: the dense model, which is not changed.
        batches: example inputs as :func:`etp_graph.trace` takes them.

    Raises:
        IncomparableOutputsError: the model does not return what is compared, or it is not finite.
    """

    _what = "the outputs"

    def __init__(self, model: nn.Module, batches: Sequence[Any]) -> None:
        self._batches = batches
        self._one_of = 1
        self._dense: list[Tensor] = []
        for part in self._parts(model):
            finite = bool(part.isfinite().all())
            require(finite, f"{self._what} of the dense model are NaN or infinite.", IncomparableOutputsError)
            self._dense.append(part)

    @abstractmethod
    def _rows(self, output: Any) -> Tensor:
        """Return what is compared, [predictions, values], of the output of a model."""

    def _parts(self, model: nn.Module) -> Iterator[Tensor]:
        """Yield the compared rows of each batch."""
        for number, batch in enumerate(self._batches, start=1):
            with _same_conditions(model), naming_batch(number):
                rows = self._rows(run_model(model, batch))
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            if isinstance(mask, Tensor) and mask.numel() == len(rows):
                rows = rows[mask.flatten() > 0]
            if number == 1 and not self._dense:
                self._one_of = ceil(rows.numel() * len(self._batches) / _KEPT) or 1
            if self._one_of > 1:
                order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(number))
                rows = rows[order[: ceil(len(rows) / self._one_of)].to(rows.device)]
            yield rows

    def _pairs(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the rows of the dense model and of another one, batch by batch."""
        for dense, found in zip(self._dense, self._parts(model), strict=True):
            if dense.shape != found.shape:
                raise IncomparableOutputsError(
                    f"{self._what} of the changed model have another shape than those of the dense one, "
                    f"{list(found.shape)} in place of {list(dense.shape)}: pass loss=, a function of (model, batch)."
                )
            yield dense, found


class Divergence(_Distance):
    """Kullback-Leibler divergence of a model's predictions from those of the dense model, a function of the model.

    It needs no labels. It is the mean over all predictions: positions whose ``attention_mask`` is zero are left out.
    What it needs of the dense model is kept, so that the model itself may be changed and measured. If that would be
    more than 2^28 values, predictions are drawn at random, the same ones for all models.

    Args:
        model: the dense model, which is not changed.
        batches: example inputs as :func:`etp_graph.trace` takes them.
        dim: dimension of the classes in the logits.

    Raises:
        ScoreError: the model returns no logits, or they are not finite.
    """

    _what = "the logits"

    def __init__(self, model: nn.Module, batches: Sequence[Any], *, dim: int = -1) -> None:
        self._dim = dim
        super().__init__(model, batches)

    def __call__(self, model: nn.Module) -> float:
        """Return the divergence of a model, in nats; infinite or NaN if its logits are."""
        total, count = 0.0, 0
        for a, b in self._pairs(model):
            total += float(F.kl_div(b, a, log_target=True, reduction="sum").double())
            count += len(a)
        return total / max(count, 1)

    def _rows(self, output: Any) -> Tensor:
        logits = logits_of(output).movedim(self._dim, -1)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.log_softmax(logits, -1).flatten(0, -2)


class OutputError(_Distance):
    """Square error of the first output tensor relative to that of the dense model, a function of the model.

    For models without logits: encoders, regression, segmentation. It is the sum of the squared differences over the sum
    of the squared outputs. The arguments, and what is kept, are as for :class:`Divergence`.

    Raises:
        IncomparableOutputsError: the model returns no floating-point tensor, or it is not finite.
    """

    def __call__(self, model: nn.Module) -> float:
        """Return the error of a model; infinite or NaN if its outputs are."""
        total, size = 0.0, 0.0
        for a, b in self._pairs(model):
            total += float((a - b).double().square().sum())
            size += float(a.double().square().sum())
        return total / size if size else total

    def _rows(self, output: Any) -> Tensor:
        tensors = (leaf for leaf in _leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())
        found = next(tensors, None)
        if found is None or not found.ndim:
            raise IncomparableOutputsError(
                f"the model returns {type(output).__name__} without a floating-point tensor to compare: pass loss=, a "
                "function of (model, batch) that returns the loss."
            )
        found = found if found.dtype == torch.float64 else found.float()
        return found.flatten(0, -2) if found.ndim > 1 else found[:, None]


def _leaves(output: Any) -> list[Any]:
    """Return the tensors in outputs; those of transformers are mappings of another class than ``dict``."""
    return tree_leaves(dict(output) if isinstance(output, Mapping) else output)


def loss_growth(
    model: nn.Module, batches: Sequence[Any], loss: Callable[[nn.Module, Any], Tensor] | None
) -> Callable[[nn.Module], float]:
    """Return a function that says how much worse a changed model is on the batches than the dense one.

    The dense model may be changed itself, and measured.

    Args:
        model: the dense model.
        batches: example inputs as :func:`etp_graph.trace` takes them, at least one.
        loss: function of (model, batch) whose mean is compared. For labels of the model's own the :class:`Divergence`
            is compared, which is what the loss on such labels estimates. ``None``: the :class:`Divergence` if the model
            returns a field ``logits`` with several classes, or a matrix, which counts as logits [samples, classes].
            Else the :class:`OutputError`.

    Raises:
        ScoreError: as :class:`Divergence` and :class:`OutputError`, or the loss of the dense model is not finite.
    """
    if isinstance(loss, OwnLabels):
        return Divergence(model, batches, dim=loss.dim)
    if loss is None:
        return (Divergence if _is_classifier(model, batches[0]) else OutputError)(model, batches)

    def mean(one: nn.Module) -> float:
        with _same_conditions(one):
            return float(np.mean([float(loss(one, batch)) for batch in batches]))

    dense = mean(model)
    require(
        np.isfinite(dense), "the loss of the dense model is not finite: check the batches and the loss.", ScoreError
    )
    return lambda one: mean(one) - dense


def returns_logits(output: Any) -> bool:
    """Return True if the output of a model has a field ``logits``, as classifiers and language models have."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return isinstance(found, Tensor)


def _is_classifier(model: nn.Module, batch: Any) -> bool:
    """Return True if a model returns a field ``logits``, or a matrix, with at least two columns."""
    with _same_conditions(model), naming_batch(1):
        output = run_model(model, batch)
    is_matrix = isinstance(output, Tensor) and output.ndim == 2
    return (is_matrix or returns_logits(output)) and logits_of(output).shape[-1] > 1
