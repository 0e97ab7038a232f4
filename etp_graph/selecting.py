"""What methods do while training to the units that are about to go: push only those, or silence them now and then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .allocate import allocate
from .budget import Budget
from .errors import ForceError
from .methods import Method
from .plan import Plan
from .regularizer import Regularizer
from .sites import silence_

Losers = Callable[[], Tensor]
"""The units that would go now, bool [n_units] on the CPU."""


def losers(model: nn.Module, plan: Plan, method: Method, budget: Budget) -> Losers:
    """By the method's criterion and the budget, asked anew in every call."""

    def found() -> Tensor:
        scores = method.scores(model, plan)
        return ~allocate(model, plan, scores, budget=budget).flat(plan)

    return found


class Chosen:
    """The force acts on the losers only, from the step on at which they are chosen; before it acts on all units.

    GReg: Wang et al. 2021. With ``at`` = 0 (GReg-1) the losers are those of the pretrained network. Later (GReg-2) a
    force that grows for all has made the units that the loss holds on to stand out from the others.

    Args:
        regularizer: with a force that is zero at distance 0 and not at distance 1.
        losers: who goes.
        at: after how many steps they are chosen.
    """

    def __init__(self, regularizer: Regularizer, losers: Losers, *, at: int) -> None:
        self.regularizer = regularizer
        self.at = at
        self._losers = losers
        self._handles: list[Any] = []

    @property
    def steps_done(self) -> int:
        """Number of optimizer steps so far."""
        return self.regularizer.steps_done

    def attach(self, optimizer: Optimizer) -> None:
        """Choose before the first step, or in a later one."""
        if self.at == 0:
            self._push(self._losers())
            return
        self._push(torch.ones(self.regularizer.plan.n_units, device="cpu"))
        self._handles = [optimizer.register_step_post_hook(self._after)]

    def detach(self) -> None:
        """Leave the optimizer as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.steps_done == self.at:
            self._push(self._losers())

    def _push(self, which: Tensor) -> None:
        """The units to push lie at distance 1, all others at 0."""
        state = self.regularizer.state_dict()
        self.regularizer.load_state_dict({**state, "distance": which.to(state["distance"])})


class Soft:
    """Soft filter pruning (He et al. 2018, algorithm 1): every so many steps the losers' filters are set to zero.

    Only the weights that produce a unit become zero, not its bias, so that gradients can bring it back, and another
    may lose the next time. When the phase ends, the losers of that moment are silenced: surgery removes those.

    Args:
        model: the model.
        plan: its plan.
        losers: who goes.
        every: number of steps, of an epoch in the paper.
    """

    def __init__(self, model: nn.Module, plan: Plan, losers: Losers, *, every: int) -> None:
        self.steps_done = 0
        self.every = every
        self._model, self._plan, self._losers = model, plan, losers
        self._handles: list[Any] = []

    def attach(self, optimizer: Optimizer) -> None:
        """Act after steps of this optimizer from now on."""
        self._handles = [optimizer.register_step_post_hook(self._after)]

    def detach(self) -> None:
        """Silence the losers of this moment, and leave the optimizer as it was."""
        for handle in self._handles:
            handle.remove()
        if self._handles and self.steps_done % self.every:
            silence_(self._model, self._plan, self._losers())
        self._handles = []

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.steps_done += 1
        if self.steps_done % self.every == 0:
            silence_(self._model, self._plan, self._losers())


def action(
    method: Method, regularizer: Regularizer | None, who: Losers, *, model: nn.Module, plan: Plan, steps: int | None
) -> Chosen | Soft | None:
    """What the method does besides its force; ``None``: nothing.

    Raises:
        ForceError: the method chooses in the middle of a phase whose ``steps`` nobody told.
    """
    if method.soft_every:
        return Soft(model, plan, who, every=method.soft_every)
    if regularizer is None or method.acts_on != "losers" or method.steered:
        return None
    if method.select_at and steps is None:
        raise ForceError(
            f"method {method.name!r} chooses its units after a share of the phase: call "
            "phase.attach(optimizer, steps=n), n being the number of optimizer steps of the phase."
        )
    return Chosen(regularizer, who, at=round(method.select_at * (steps or 0)))
