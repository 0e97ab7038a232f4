"""Loss without labels: the labels are drawn from what the model predicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etp_graph._config import require, require_count
from etp_graph.errors import ScoreError
from etp_graph.model import run_model


class OwnLabels:
    """Loss of a model on labels that are drawn from its own predictions, a function of (model, batch).

    The mean square of its gradients is the Fisher information, which is the curvature of the Kullback-Leibler
    divergence of a changed model from this one. The first derivative of this divergence is zero, so a first-order
    criterion on the divergence itself would tell nothing.

    Source: Martens 2020, "New insights and perspectives on the natural gradient method", section 5.

    Args:
        seed: of the draws. Each call continues them.
        dim: dimension of the classes in the logits.
    """

    def __init__(self, *, seed: int = 0, dim: int = -1) -> None:
        require_count("seed", seed, 0)
        self.dim = dim
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Run the model and return the sum of ``−log p(y)`` over all drawn labels y; padded tokens are left out.

        Raises:
            ScoreError: the model returns no logits, or they are not finite.
        """
        logits = logits_of(run_model(model, batch)).movedim(self.dim, -1)
        scores = F.log_softmax(logits.float() if logits.dtype != torch.float64 else logits, -1).flatten(0, -2)
        chances = scores.detach().exp().cpu()
        require(
            bool(chances.isfinite().all()),
            "the logits of the model are NaN or infinite: check the model and the batches.",
            ScoreError,
        )
        labels = torch.multinomial(chances, 1, generator=self._generator).to(scores.device)
        losses = -scores.gather(1, labels).squeeze(1)
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if isinstance(mask, Tensor) and mask.numel() == len(losses):
            losses = losses * (mask.flatten() > 0).to(losses)
        return losses.sum()


def logits_of(output: Any) -> Tensor:
    """Return the logits among the outputs of a model: the field ``logits``, a tensor, or the first of a tuple.

    Raises:
        ScoreError: there are none.
    """
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    found = found[0] if isinstance(found, tuple | list) and found else found
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.ndim < 2:
        raise ScoreError(
            f"the model returns {type(output).__name__} without logits [samples, ..., classes]: pass loss=, a function "
            "of (model, batch) that returns the loss."
        )
    return found
