"""Methods that choose the units to be removed during the sparse phase: GReg and soft filter pruning.

"Losers" are the units that would be removed if surgery took place now. GReg applies its force to them only. Soft filter
pruning sets their filters to zero at intervals.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from etp_graph.budget import Budget, allocate
from etp_graph.collect import silence_
from etp_graph.errors import ForceError
from etp_graph.methods import Method
from etp_graph.plan import Plan
from etp_graph.regularizer import JointSteps, Optimizers, Regularizer, inner_optimizers

Losers = Callable[[], Tensor]
"""Function that returns the losers, bool [n_units] on the CPU."""


def find_losers(model: nn.Module, plan: Plan, method: Method, budget: Budget) -> Losers:
    """Return a function that finds the losers by the method's criterion and the budget, anew in every call."""

    def found() -> Tensor:
        scores = method.scores(model, plan)
        return ~allocate(model, plan, scores, budget=budget).flat(plan)

    return found


class PushLosers:
    """Apply the force to the losers only, from the step at which they are chosen; before it, to all units.

    Source: GReg, Wang et al. 2021. With ``at`` = 0 (GReg-1) the losers are chosen in the pretrained network. With
    ``at`` > 0 (GReg-2) the force first grows on all units. Units that the loss needs then shrink less than the others,
    which makes the choice clearer.

    Args:
        regularizer: a regularizer whose force is zero at distance 0 and positive at distance 1.
        losers: function that returns the losers.
        at: number of optimizer steps after which the losers are chosen.
    """

    def __init__(self, regularizer: Regularizer, losers: Losers, *, at: int) -> None:
        self.regularizer = regularizer
        self.at = at
        self._losers = losers
        self._steps: JointSteps | None = None

    @property
    def steps_done(self) -> int:
        """Number of optimizer steps so far."""
        return self.regularizer.steps_done

    def attach(self, optimizer: Optimizers) -> None:
        """Choose the losers now if ``at`` is 0; else apply the force to all units and choose after step ``at``."""
        if self.at == 0:
            self._push(self._losers())
            return
        self._push(torch.ones(self.regularizer.plan.n_units, device="cpu"))
        self._steps = JointSteps(inner_optimizers(optimizer), end=self._after)

    def detach(self) -> None:
        """Remove the hook from the optimizer."""
        if self._steps is not None:
            self._steps.remove()
        self._steps = None

    def _after(self) -> None:
        if self.steps_done == self.at:
            self._push(self._losers())

    def _push(self, which: Tensor) -> None:
        """Set the distance of the units in ``which`` to 1 and of all others to 0: the force acts on ``which`` only."""
        self.regularizer.set_distances(which)


class SilenceLosers:
    """Soft filter pruning (He et al. 2018, algorithm 1): set the losers' filters to zero every ``every`` steps.

    Only the weights that produce a unit become zero. Its bias stays, so that the unit still gets gradients and can grow
    again; other units may then be chosen the next time. The filters of the losers at the end of the phase are set to
    zero too, so that surgery removes these units.

    Args:
        model: the model.
        plan: its plan.
        losers: function that returns the losers.
        every: number of steps between two choices; the paper takes one epoch.
    """

    def __init__(self, model: nn.Module, plan: Plan, losers: Losers, *, every: int) -> None:
        self.steps_done = 0
        self.every = every
        self._model, self._plan, self._losers = model, plan, losers
        self._steps: JointSteps | None = None

    def attach(self, optimizer: Optimizers) -> None:
        """Count the steps of this optimizer, and set filters to zero after every ``every`` of them."""
        self._steps = JointSteps(inner_optimizers(optimizer), end=self._after)

    def detach(self) -> None:
        """Set the filters of the losers to zero, unless the last step did so, and remove the hook."""
        if self._steps is None:
            return
        self._steps.remove()
        if self.steps_done % self.every:
            silence_(self._model, self._plan, self._losers())
        self._steps = None

    def _after(self) -> None:
        self.steps_done += 1
        if self.steps_done % self.every == 0:
            silence_(self._model, self._plan, self._losers())


def acts_besides_force(
    method: Method, regularizer: Regularizer | None, who: Losers, *, model: nn.Module, plan: Plan, steps: int | None
) -> PushLosers | SilenceLosers | None:
    """Return the object that chooses losers during the phase; ``None`` if the method chooses none.

    Raises:
        ForceError: the method chooses after a share of the phase, and ``steps`` is ``None``.
    """
    if method.soft_every:
        return SilenceLosers(model, plan, who, every=method.soft_every)
    if regularizer is None or method.acts_on != "losers" or method.steered:
        return None
    if method.select_at and steps is None:
        raise ForceError(
            f"method {method.name!r} chooses its units after a share of the phase: call "
            "phase.attach(optimizer, steps=n), n being the number of optimizer steps of the phase."
        )
    return PushLosers(regularizer, who, at=round(method.select_at * (steps or 0)))
