"""What training frameworks put around models and optimizers, and the plain objects inside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.optim import Optimizer

from .errors import ForceError, PlanError

_PARALLEL = ("DistributedDataParallel", "DataParallel")


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose ``step`` changes the weights, inside the wrappers of accelerate and Lightning.

    Those skip steps while gradients accumulate or overflow, and do not run hooks of their own.
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
    """The forward of the model's class inside, what accelerate put in its place again afterwards.

    For mixed precision accelerate gives the instance a ``forward`` that casts. Operators would then be seen, and
    compared, in the low precision; and a copy of the model would call the forward of the original.
    """
    wrapped = "_original_forward" in model.__dict__ and "forward" in model.__dict__
    kept = {name: model.__dict__.pop(name) for name in ("forward", "_original_forward")} if wrapped else {}
    try:
        yield
    finally:
        model.__dict__.update(kept)
