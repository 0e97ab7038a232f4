"""Measure the running statistics of batch norms anew, because surgery changes what the norms see."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from etp_graph._config import require
from etp_graph.collect import naming_batch
from etp_graph.errors import ScoreError
from etp_graph.model import eval_mode, run_model, undone
from etp_graph.surgery import PreparedChanges, writing


@torch.no_grad()
def reestimate_batch_norms_(model: nn.Module, batches: Iterable[Any]) -> int:
    """Replace the running mean and variance of each batch norm by those over the batches, in place.

    All other modules stay in eval mode, so that dropout draws nothing. The mean over batches is taken, each with the
    same weight (``momentum=None``).

    Args:
        model: the pruned model.
        batches: example inputs as :func:`etp_graph.trace` takes them, of several samples each.

    Returns:
        The number of batch norms that were measured.

    Raises:
        ScoreError: there are no batches, the model does not run on one, or activations are not finite. The model is
            unchanged, as after any other exception.
    """
    n_norms, changes = prepare_batch_norms(model, batches)
    changes.commit()
    return n_norms


@torch.no_grad()
def prepare_batch_norms(model: nn.Module, batches: Iterable[Any]) -> tuple[int, PreparedChanges]:
    """Do all of :func:`reestimate_batch_norms_` that can fail, and leave the model as it is.

    Raises:
        ScoreError: as :func:`reestimate_batch_norms_`.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    before = [(norm, norm.momentum) for norm in norms]
    kept = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]

    def restore() -> None:
        for norm, momentum in before:
            norm.momentum = momentum
        for buffer, value in kept:
            buffer.copy_(value)

    with undone(restore):
        if norms:
            _measure(model, norms, batches)
        found = [buffer.clone() for buffer, _ in kept]
    changes = [writing(buffer, new) for (buffer, _), new in zip(kept, found, strict=True)]
    return len(norms), PreparedChanges(changes)


def _measure(model: nn.Module, norms: Sequence[_BatchNorm], batches: Iterable[Any]) -> None:
    number = 0
    with eval_mode(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.training = True
        for number, batch in enumerate(batches, start=1):
            with naming_batch(number):
                run_model(model, batch)
    require(number > 0, "batches is empty: pass at least one batch of example inputs.", ScoreError)
    names = {id(module): name for name, module in model.named_modules()}
    for norm in norms:
        require(
            all(bool(buffer.isfinite().all()) for buffer in norm.buffers(recurse=False)),
            f"the inputs of {names[id(norm)]} hold NaN or infinite values: check the model and the batches.",
            ScoreError,
        )
