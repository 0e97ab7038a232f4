"""Control of the strength: β is computed from a budget and the number of steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from etp_graph.budget import under_way
from etp_graph.plan import Plan
from etp_graph.schedules import Cubic

from ._pull import Pull
from ._settings import RegularizerSettings

_SOONEST, _LATEST = 0.2, 0.8
"""Limits for the end of the default schedule, as progress: units need steps to reach zero, and the rest to train on."""

_LOOKS, _RAMP = 50, 5

_MEMORY, _FLOOR, _NEVER = 0.9, 1e-4, 1e30

_WEIGHT = {"need": 0.0, "need-taylor": 0.75, "taylor": 1.0}
"""Weight of the effect on the loss in its geometric mean with the need, by ``chosen_by``."""


def usual_path(share: float) -> Cubic:
    """Return the default schedule (Zhu & Gupta 2017, eq. 1) if a share ``share`` of the cost is to be removed.

    It ends when the same share of the phase is over, but not before 20 % or after 80 % of it. So the remaining network
    trains longer if less is removed.
    """
    return Cubic(end=min(_LATEST, max(_SOONEST, share)))


class Steering:
    """Controller that shrinks units to zero along a schedule; removing the units at zero then meets the budget.

    The *need* of a unit is the push η·β that takes it to zero, ‖w_u‖/(κ F(d_u)). If the force acts on all units, those
    with the smallest need reach zero first. The steps are divided into intervals. At the start of each interval,
    ``under_way`` in ``etp_graph.budget`` chooses the *losers*: the units that must be at zero at its end. The
    scores are the needs. Each step pushes as hard as the loser with the largest need requires::

        η β = max over the losers of ‖w_u‖ / (κ F(d_u)) / number of steps left in the interval

    Every step computes the needs again, so it corrects for losers that the gradient of the loss has enlarged. The
    learning rate has no influence.

    Norms are a poor measure of importance if weights were not trained from scratch with weight decay. Training computes
    gradients anyway, and they tell how much the loss would change. With ``chosen_by="need-taylor"`` the score is a
    geometric mean of the need (weight 1/4) and the effect (weight 3/4). The effect is the first-order change of the
    loss if the unit is removed (Molchanov et al. 2019, eq. 8), divided by the square root of its mean in the group.
    This is a compromise between importance within the layer and within the network. (With ``kappa="mean"``, needs are
    relative to their group.) With ``"taylor"`` the score is the effect alone.

    The change of the loss is the norm of the unit times the root mean square of the slope of the loss along the unit.
    The slope does not shrink with the unit, so the score of a unit falls as it shrinks. The mean is a running mean; it
    keeps a unit from being dropped from the losers because of a few noisy batches. About four observations of the
    gradients in an interval are enough.

    Args:
        model: the model.
        plan: its plan.
        settings: the settings; they must include a budget and a number of steps.
        pull: κ F(d_u) of every unit.

    Attributes:
        losers: units that must be at zero at the end of this interval, bool [n_units].
        push: η·β of the last step, a scalar.
        sensitivity: running mean of (⟨∇_u L, w_u⟩ / ‖w_u‖)², with the norm after the optimizer's step, up to a factor
            that is the same for all units, [n_units].

    Raises:
        BudgetError: the budget is out of reach.
    """

    def __init__(self, model: nn.Module, plan: Plan, settings: RegularizerSettings, pull: Pull) -> None:
        assert settings.budget is not None
        assert settings.steps is not None
        self.model, self.plan, self.settings, self._pull = model, plan, settings, pull
        self._budget = settings.budget
        dense = plan.amount(self._budget.quantity)
        self.path = settings.schedule or usual_path(1 - min(self._budget.largest_amount(dense), dense) / dense)
        self.steps: int = settings.steps
        # An interval has at least _RAMP steps (in all but short phases), so that the other weights can adapt. There are
        # at most about _LOOKS choices, because more would change little and cost time.
        self.interval = max(1, min(self.steps // 10, max(_RAMP, self.steps // _LOOKS)))
        self.losers = torch.zeros_like(pull.distance, dtype=torch.bool)
        self.push = pull.distance.new_zeros(())
        self.sensitivity = torch.zeros_like(pull.distance)
        self._weight = _WEIGHT[settings.chosen_by]
        self._products: Tensor | None = None
        with torch.no_grad():
            self._choose(pull.norms(), progress=1.0)  # raises BudgetError if the budget is out of reach

    def observes(self, done: int) -> bool:
        """Return True if the gradients of the step that follows ``done`` steps are observed."""
        return self._weight > 0 and done % max(1, self.interval // 4) == 0

    @torch.no_grad()
    def observe(self, optimizer: Optimizer) -> None:
        """Store ⟨∇_u L, w_u⟩ of every unit before the optimizer's step; :meth:`ratio` uses it after the step."""
        products, scale = self._pull.products(), getattr(optimizer, "grad_scale", None)
        self._products = (
            products if scale is None else products / scale.to(products)
        )  # a fused optimizer divides the gradients by GradScaler's factor later, in its own step

    @torch.no_grad()
    def ratio(self, done: int) -> Tensor:
        """Return the share of its norm that each unit loses in the step that follows ``done`` steps, [n_units]."""
        norms, passed = self._norms(), done % self.interval
        if passed == 0:
            if self.settings.order == "importance":
                self._pull.rank(norms)
            self.losers = self._choose(norms, progress=min(1.0, (done + self.interval) / self.steps))
        pull = self._pull(norms)
        needs = torch.where(pull > 0, norms / pull, 0.0)
        left = max(1, min(self.interval - passed, self.steps - done))  # the last interval may be shorter
        self.push = torch.where(self.losers, needs, 0.0).amax() / left
        who = self.losers if self.settings.acts_on == "losers" else torch.ones_like(self.losers)
        # Losers that reach zero in this step get exactly 1, because the quotient below could be rounded to less.
        end = self.losers & (needs <= self.push * (1 + 1e-6))
        ratio = torch.where(end, 1.0, pull * self.push / norms.clamp_min(1e-30))
        return torch.where(who, ratio.clamp_max(1.0), 0.0)

    def _norms(self) -> Tensor:
        if self._products is None:
            return self._pull.norms()
        norms, products = self._pull.norms_beside(self._products)
        self._products = None
        sound = products.isfinite().all()  # ignore gradients that overflowed
        slopes = products / torch.where(norms > 0, norms, 1.0)
        mean = _MEMORY * self.sensitivity + (1 - _MEMORY) * slopes.square()
        self.sensitivity = torch.where(sound, mean, self.sensitivity)
        return norms

    def _choose(self, norms: Tensor, *, progress: float) -> Tensor:
        """Return the units that must be at zero at this progress, bool [n_units]; only units on which a force acts."""
        pull = self._pull(norms)
        acts = pull > 0
        needs = (norms / torch.where(acts, pull, 1.0)).double()
        if self._weight:
            effects = self._pull.half_relative(norms * self.sensitivity.sqrt(), floor=_FLOOR).double()
            needs = torch.where(norms == 0, 0.0, needs ** (1 - self._weight) * effects**self._weight)
        # Units without force cannot be taken to zero. A very large score makes them the last ones to be removed.
        scores = torch.where(acts, needs, (needs.amax() + 1) * _NEVER)
        selection = under_way(self.model, self.plan, scores, budget=self._budget, share=self.path(progress))
        return ~selection.flat(self.plan).to(acts.device) & acts
