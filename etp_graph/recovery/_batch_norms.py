"""Measure the running statistics of batch norms anew, because surgery changes what the norms see."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from etp_graph._config import require
from etp_graph.errors import ScoreError
from etp_graph.model import eval_mode, run_model


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
        ScoreError: there are no batches. The model is unchanged.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    before = [(norm, norm.momentum) for norm in norms]
    kept = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    done = False
    try:
        with eval_mode(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
                norm.training = True
            for batch in batches:
                run_model(model, batch)
                done = True
    finally:
        for norm, momentum in before:
            norm.momentum = momentum
        if not done:
            for buffer, value in kept:
                buffer.copy_(value)
    require(done, "batches is empty: pass at least one batch of example inputs.", ScoreError)
    return len(norms)
