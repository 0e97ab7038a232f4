"""Keep the weights of a model unchanged while a training loop runs to collect data for a criterion."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class WeightsUnchanged:
    """Context in which training does not change the weights and buffers of a model.

    Each step of an optimizer given to :meth:`hold` is undone at once, so that all batches use the same weights. Steps
    of other optimizers and changes of buffers (running statistics) are undone when the context ends.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [(p, p.detach().clone()) for p in model.parameters()]
        self._buffers = [(b, b.detach().clone()) for b in model.buffers()]
        self._handles: list[Any] = []

    def hold(self, optimizer: Optimizer) -> None:
        """Undo every step of this optimizer right after it."""
        self._handles.append(optimizer.register_step_post_hook(lambda *args: _restore_(self._parameters)))

    def __enter__(self) -> WeightsUnchanged:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        _restore_([*self._parameters, *self._buffers])


@torch.no_grad()
def _restore_(kept: list[tuple[Any, Tensor]]) -> None:
    for tensor, value in kept:
        tensor.copy_(value)
