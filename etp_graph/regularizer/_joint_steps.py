"""Steps of several optimizers that train one model (Muon for matrices, AdamW for the rest), counted as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch.optim import Optimizer

from etp_graph.errors import ForceError
from etp_graph.model import inner_optimizer

Optimizers = Optimizer | Iterable[Optimizer]

Before = Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], Any]


def inner_optimizers(optimizers: Optimizers) -> tuple[Optimizer, ...]:
    """Return the optimizers inside of their wrappers, each once.

    Raises:
        ForceError: one is not a PyTorch optimizer, or there is none.
    """
    given: Any = optimizers
    several = isinstance(given, Iterable) and not isinstance(given, (Optimizer, str, bytes, Mapping))
    found = [inner_optimizer(one) for one in (given if several else [given])]
    if not found:
        raise ForceError("attach got no optimizer: pass the one that trains the model, or all of them as a list.")
    return tuple({id(one): one for one in found}.values())


class JointSteps:
    """Hooks for the steps of all optimizers of a model.

    A joint step begins before the first of them steps, and ends after all have stepped. If one steps again before that,
    another was left out (a scaler of gradients found an overflow), and the joint step ends there.

    Args:
        optimizers: the optimizers; usually one.
        begin: called when a joint step begins.
        before: called before each optimizer steps, as a step pre-hook of PyTorch.
        end: called when a joint step ends.
    """

    def __init__(
        self,
        optimizers: tuple[Optimizer, ...],
        *,
        end: Callable[[], object],
        begin: Callable[[], object] | None = None,
        before: Before | None = None,
    ) -> None:
        self.optimizers = optimizers
        self._begin, self._before, self._end = begin, before, end
        self._done: set[int] = set()
        self._handles = [handle for one in optimizers for handle in self._hook(one)]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, optimizer: Optimizer) -> Iterable[Any]:
        return (
            optimizer.register_step_pre_hook(self._on_begin),
            optimizer.register_step_post_hook(self._on_end),
        )

    def _on_begin(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if id(optimizer) in self._done:
            self._finish()
        if not self._done and self._begin is not None:
            self._begin()
        return None if self._before is None else self._before(optimizer, args, kwargs)

    def _on_end(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._done.add(id(optimizer))
        if len(self._done) == len(self.optimizers):
            self._finish()

    def _finish(self) -> None:
        self._done.clear()
        self._end()
