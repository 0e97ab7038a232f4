"""Access the plain models and optimizers inside the wrappers of training frameworks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from etp_graph.errors import ForceError, PlanError

from ._undone import undone

_PARALLEL = ("DistributedDataParallel", "DataParallel")


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer whose ``step`` changes the weights, inside the wrappers of accelerate and Lightning.

    Hooks must be registered on this one: the wrappers skip steps while gradients accumulate or overflow, and do not run
    hooks that are registered on them.

    Raises:
        ForceError: ``optimizer`` is not a PyTorch optimizer.
    """
    if not isinstance(optimizer, Optimizer):
        raise ForceError(f"attach needs a torch.optim.Optimizer, not {type(optimizer).__name__}; unwrap it first.")
    inner = getattr(optimizer, "optimizer", None)
    return inner_optimizer(inner) if isinstance(inner, Optimizer) and inner is not optimizer else optimizer


def require_bare(model: nn.Module) -> None:
    """Raise :class:`PlanError` if the model is a wrapper that prefixes the names of its parameters."""
    if type(model).__name__ in _PARALLEL:
        raise PlanError(
            f"the model is wrapped in {type(model).__name__}: pass the model inside (model.module), and after surgery "
            "wrap it anew (etp_graph.distributed.rewrap), because the wrapper keeps the shapes from before."
        )


@contextmanager
def plain_forward(model: nn.Module) -> Iterator[None]:
    """Use the forward of the model's class inside this context, and restore the forward of accelerate afterwards.

    For mixed precision, accelerate sets a ``forward`` on the instance that casts to low precision. The tracer and the
    check would then run in low precision, and a copy of the model would call the forward of the original.
    """
    wrapped = "_original_forward" in model.__dict__ and "forward" in model.__dict__
    kept = {name: model.__dict__[name] for name in ("forward", "_original_forward")} if wrapped else {}
    with undone(lambda: model.__dict__.update(kept)):
        for name in kept:
            del model.__dict__[name]
        yield


def after_gradients(
    act: Callable[[Optimizer], object], optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Call ``act`` in a step pre-hook once the step has its gradients: now, or after the closure that computes them.

    Args:
        act: function, called with the optimizer.
        optimizer: the optimizer that is about to step.
        args, kwargs: the arguments of the pre-hook.

    Returns:
        The value that the pre-hook must return: arguments with a new closure, or ``None`` if there is no closure.
    """
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        act(optimizer)
        return None

    def then_act() -> Any:
        with torch.enable_grad():
            loss = closure()
        act(optimizer)
        return loss

    return (args[0], then_act), {k: v for k, v in kwargs.items() if k != "closure"}
