"""Find out before training whether surgery can cut the states that an optimizer will keep.

The states come with the first step. So a copy of the optimizer steps on a few parameters of its own.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from etp_graph.errors import PlanError
from etp_graph.model import is_sharded, preserved_rng

from ._optimizer_states import OnUncuttable, Optimizers, check_choice, find_uncuttable, list_optimizers, refusal

_TYPICAL = 4096
"""Optimizers of low precision keep smaller tensors in full precision, so they show nothing."""


def rehearse_cut(optimizers: Optimizers) -> list[str]:
    """Return for each optimizer whose states surgery cannot cut why that is, and what to do.

    An optimizer of which no copy can step says nothing; surgery looks at its states then.
    """
    found = []
    for optimizer in list_optimizers(optimizers):
        unknown = find_uncuttable(optimizer)
        if not unknown and not optimizer.state:
            unknown = _unknown_after_a_step(optimizer)
        if unknown:
            found.append(refusal(optimizer, unknown))
    return found


def require_cuttable(optimizers: Optimizers, on_uncuttable: OnUncuttable) -> None:
    """Raise :class:`PlanError` if surgery with these arguments would refuse the states of an optimizer."""
    check_choice(on_uncuttable)
    if on_uncuttable == "refuse" and (found := rehearse_cut(optimizers)):
        raise PlanError(found[0])


def _unknown_after_a_step(optimizer: Optimizer) -> str:
    try:
        twin = _twin(optimizer)
        if twin is None:
            return ""
        with preserved_rng(nn.ParameterList(p for group in twin.param_groups for p in group["params"])):
            _step(twin)
        return find_uncuttable(twin)
    except MemoryError:  # says nothing about the optimizer
        raise
    except Exception:  # noqa: BLE001 - the optimizer is the user's, and may need more than parameters with gradients
        return ""


def _twin(optimizer: Optimizer) -> Optimizer | None:
    """Return an optimizer with the same settings and some parameters of its own; ``None`` if there is nothing to do."""
    stand_ins = {id(p): _like(p) for group in optimizer.param_groups for p in _typical(group["params"])}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not stand_ins or any(is_sharded(p) for p in parameters):
        return None
    memo: dict[int, Any] = {id(p): stand_ins.get(id(p), p) for p in parameters}
    settings = {name: v for name, v in vars(optimizer).items() if name not in ("state", "step") and "hooks" not in name}
    twin = type(optimizer).__new__(type(optimizer))
    vars(twin).update(copy.deepcopy(settings, memo))
    vars(twin).update({name: OrderedDict() for name in vars(optimizer) if "hooks" in name})
    twin.state = defaultdict(dict)
    own = {id(p) for p in stand_ins.values()}
    for group in twin.param_groups:
        group["params"][:] = [p for p in group["params"] if id(p) in own]
    return twin


def _typical(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return for each number of dimensions a parameter of moderate size."""
    found: dict[int, Tensor] = {}
    for p in sorted((p for p in parameters if p.requires_grad), key=lambda p: p.numel()):
        if p.ndim not in found or found[p.ndim].numel() < _TYPICAL:
            found[p.ndim] = p
    return list(found.values())


def _like(parameter: Tensor) -> nn.Parameter:
    made = nn.Parameter(torch.ones_like(parameter, requires_grad=False))
    made.grad = torch.full_like(made, 1e-3, requires_grad=False)
    return made


def _step(optimizer: Optimizer) -> None:
    """Step without the hooks that are registered for all optimizers of the process."""
    step: Any = type(optimizer).step
    if getattr(step, "hooked", False):
        step = step.__wrapped__
    loss = torch.zeros((), device="cpu")
    try:
        step(optimizer, lambda: loss)
    except TypeError:  # it takes no closure
        step(optimizer)
