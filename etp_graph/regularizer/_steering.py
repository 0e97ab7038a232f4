"""A strength that nobody has to choose: β follows from a budget and the number of steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from etp_graph.budget import under_way
from etp_graph.plan import CostModel, Plan
from etp_graph.schedules import Cubic

from ._pull import Pull
from ._settings import RegularizerSettings

_SOONEST, _LATEST = 0.2, 0.8
"""Units need some steps on their way, and those that stay need some after it."""

_LOOKS, _RAMP = 50, 5

_MEMORY, _FLOOR, _NEVER = 0.9, 1e-4, 1e30

_WEIGHT = {"need": 0.0, "need-taylor": 0.75, "taylor": 1.0}
"""Of the effect on the loss, in the geometric mean with the need."""


def usual_path(share: float) -> Cubic:
    """Zhu & Gupta 2017, eq. 1, where ``share`` of the cost has to go.

    It ends when this share of the phase is over, but within 20 and 80 %: the less has to go, the longer the network
    that is left may train.
    """
    return Cubic(end=min(_LATEST, max(_SOONEST, share)))


class Steering:
    """Takes units to zero along a schedule, so that removing those at zero meets the budget when it ends.

    The push η·β that takes a unit to zero is its *need*, ‖w_u‖/(κ F(d_u)): under a force on all, the units of least
    need are the first at zero. Every few steps it is chosen anew, with the needs as scores, which units have to be at
    zero a few steps later (``under_way`` in ``etp_graph/allocate.py``), and each step pushes as hard as the farthest of
    them needs::

        η β = max over those units of ‖w_u‖ / (κ F(d_u)) / steps that are left

    What the loss pulls back is made up for in the next step, and the learning rate has no influence.

    Norms say little where weights were not trained from scratch with weight decay, and the gradients that training
    computes anyway say what the loss would lose: with ``chosen_by="need-taylor"`` the scores are the geometric mean of
    the need and, with three times its weight, of the first-order change of the loss when the unit goes (Molchanov et
    al. 2019, eq. 8), over the square root of its mean in the group. With ``kappa="mean"`` needs are relative to their
    group, and changes are by half, between what matters in its layer and what matters in the network. With ``"taylor"``
    the changes alone count. What is remembered is the slope of the loss along each unit. It stays when the unit
    shrinks, so that one on its way to zero scores less and less, and hardly ever comes back for the noise of a few
    batches. Looking at gradients a few times between two choices is enough.

    Args:
        model: the model.
        plan: its plan.
        settings: with a budget and a number of steps.
        pull: κ F(d_u) of every unit.

    Attributes:
        losers: units that are to be at zero at the end of this interval, bool [n_units].
        push: η·β of the last step, a scalar.
        sensitivity: running mean of (⟨∇_u L, w_u⟩ / ‖w_u‖)², the norm being that after the optimizer's step, up to a
            factor that all units share, [n_units].

    Raises:
        BudgetError: the budget is out of reach.
    """

    def __init__(self, model: nn.Module, plan: Plan, settings: RegularizerSettings, pull: Pull) -> None:
        assert settings.budget is not None
        assert settings.steps is not None
        self.model, self.plan, self.settings, self._pull = model, plan, settings, pull
        self._budget = settings.budget
        costs = CostModel(plan).dense
        dense = getattr(costs, self._budget.quantity)
        self.path = settings.schedule or usual_path(1 - min(self._budget.target(costs), dense) / dense)
        self.steps: int = settings.steps
        # A ramp of a few steps lets the other weights follow; more looks than this change little and cost time.
        self.interval = max(1, min(self.steps // 10, max(_RAMP, self.steps // _LOOKS)))
        self.losers = torch.zeros_like(pull.distance, dtype=torch.bool)
        self.push = pull.distance.new_zeros(())
        self.sensitivity = torch.zeros_like(pull.distance)
        self._weight = _WEIGHT[settings.chosen_by]
        self._products: Tensor | None = None
        with torch.no_grad():
            self._choose(pull.norms(), progress=1.0)  # a budget out of reach is found out here

    def observes(self, done: int) -> bool:
        """Whether the gradients of the step after ``done`` others are looked at."""
        return self._weight > 0 and done % max(1, self.interval // 4) == 0

    @torch.no_grad()
    def observe(self, optimizer: Optimizer) -> None:
        """Look at the gradients, before the step; they count in :meth:`ratio`, after it."""
        products, scale = self._pull.products(), getattr(optimizer, "grad_scale", None)
        self._products = products if scale is None else products / scale.to(products)  # a fused optimizer divides

    @torch.no_grad()
    def ratio(self, done: int) -> Tensor:
        """The share of its norm that each unit loses in the step after ``done`` others, [n_units]."""
        norms, passed = self._norms(), done % self.interval
        if passed == 0:
            if self.settings.order == "importance":
                self._pull.rank(norms)
            self.losers = self._choose(norms, progress=min(1.0, (done + self.interval) / self.steps))
        pull = self._pull(norms)
        needs = torch.where(pull > 0, norms / pull, 0.0)
        left = max(1, min(self.interval - passed, self.steps - done))  # the last interval may be a short one
        self.push = torch.where(self.losers, needs, 0.0).amax() / left
        who = self.losers if self.settings.acts_on == "losers" else torch.ones_like(self.losers)
        # The last step of an interval ends at zero, whatever the rounding of a quotient of two quotients.
        end = self.losers & (needs <= self.push * (1 + 1e-6))
        ratio = torch.where(end, 1.0, pull * self.push / norms.clamp_min(1e-30))
        return torch.where(who, ratio.clamp_max(1.0), 0.0)

    def _norms(self) -> Tensor:
        if self._products is None:
            return self._pull.norms()
        norms, products = self._pull.norms_beside(self._products)
        self._products = None
        sound = products.isfinite().all()  # gradients that overflowed say nothing
        slopes = products / torch.where(norms > 0, norms, 1.0)
        mean = _MEMORY * self.sensitivity + (1 - _MEMORY) * slopes.square()
        self.sensitivity = torch.where(sound, mean, self.sensitivity)
        return norms

    def _choose(self, norms: Tensor, *, progress: float) -> Tensor:
        """The units that have to be at zero at this progress, bool [n_units]; none on which no force acts."""
        pull = self._pull(norms)
        acts = pull > 0
        needs = (norms / torch.where(acts, pull, 1.0)).double()
        if self._weight:
            effects = self._pull.half_relative(norms * self.sensitivity.sqrt(), floor=_FLOOR).double()
            needs = torch.where(norms == 0, 0.0, needs ** (1 - self._weight) * effects**self._weight)
        # Where no force acts, units can be removed, but not be taken to zero: more than any cost can outweigh.
        scores = torch.where(acts, needs, (needs.amax() + 1) * _NEVER)
        selection = under_way(self.model, self.plan, scores, budget=self._budget, share=self.path(progress))
        return ~selection.flat(self.plan).to(acts.device) & acts
