"""Pull on each unit to zero, from its distance from the pivot, the force at that distance, and κ of its group."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from etp_graph.errors import ForceError
from etp_graph.forces import Force
from etp_graph.plan import Plan, numbers_per_unit
from etp_graph.units import Rankings, Units, at_least_float32

from ._binding import Binding
from ._settings import RegularizerSettings


class Pull:
    """Pull κ_g·F(d_u) on every unit.

    Only vectors that every step needs stay in memory, because in a model of small layers a vector [n_units] is not much
    smaller than the weights.

    Args:
        plan: the plan.
        settings: the settings, of which force, order, κ and seed are used.
        units: sums over the units of the model.
        binding: the parameters, and the units that a force may act on.

    Attributes:
        distance: distance of each unit from the pivot of its group (or block), in [0, 1], [n_units].
    """

    def __init__(self, plan: Plan, settings: RegularizerSettings, units: Units, binding: Binding) -> None:
        self.plan, self.settings = plan, settings
        self._units, self._binding = units, binding
        self._runs: Rankings | None = None
        self._kappa: Tensor | None = None
        self._pulled: Tensor | None = None
        self._pulled_where: Tensor | None = None
        if settings.kappa == "mean" and not self._plain:
            runs = Rankings.of(plan, units.device)
            self.set_kappa(runs.mean(self.norms()))
        self.rank()

    @torch.no_grad()
    def rank(self, norms: Tensor | None = None) -> None:
        """Rank the units of each group again, in the order of the settings. ``norms`` [n_units] save computing them."""
        n, device, order = self.plan.n_units, self._units.device, self.settings.order
        if order == "importance":
            key = -(self.norms() if norms is None else norms)
        elif order == "random":
            key = torch.rand(n, generator=torch.Generator().manual_seed(self.settings.seed), device="cpu").to(device)
        else:
            key = torch.arange(n, device=device)
        runs = self._get_runs()
        self.set_distance(runs.distance(runs.rank(key), self._units.dtype))

    def set_distance(self, distance: Tensor) -> None:
        """Set the distances [n_units]."""
        self.distance = distance
        self._pulled = None

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Return the group norm of every unit, [n_units]."""
        return self._units.squares(self._binding.tensors).sqrt()

    @torch.no_grad()
    def products(self, names: Iterable[str] | None = None) -> Tensor:
        """Compute ⟨∇_u L, w_u⟩ over the part of this process, [rows, n_units]; a missing gradient counts as zero.

        ``names`` restricts the sum to these parameters.
        """
        tensors = self._binding.tensors
        return self._units.partial((name, _product(tensors[name])) for name in (tensors if names is None else names))

    @torch.no_grad()
    def norms_beside(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return :meth:`norms` and the total of ``rows`` [rows, n_units] over all processes.

        On sharded parameters, both use the same all-reduce.
        """
        both = torch.cat([self._units.partial_squares(self._binding.tensors), rows], 1)
        squares, sums = self._units.total(both).chunk(2)
        return squares.sqrt(), sums

    @torch.no_grad()
    def half_relative(self, values: Tensor, *, floor: float) -> Tensor:
        """Divide ``values`` by the square root of their mean in the group (or block) of each unit, [n_units].

        This is a compromise between no division and division by the mean.

        Args:
            values: non-negative, [n_units].
            floor: values below this share of the mean are raised to it.
        """
        mean = self._get_runs().mean(values)
        return values.maximum(floor * mean) / mean.sqrt()

    @torch.no_grad()
    def force(self, norms: Tensor | None = None, *, force: Force | None = None) -> Tensor:
        """Return F(d_u) of every unit, [n_units], including units on which no force may act.

        ``force`` replaces the force of the settings.
        """
        runs, force = self._get_runs(), force or self.settings.force
        importance = runs.relative(self.norms() if norms is None else norms)
        return force(self.distance, size=runs.size, importance=importance)

    @torch.no_grad()
    def for_need(self, norms: Tensor) -> Tensor:
        """Return κ F(d_u) with the force that chooses the losers, [n_units], zero where no force acts."""
        if self.settings.need_force is None:
            return self(norms)
        return self.force(norms, force=self.settings.need_force) * self.kappa * self._binding.active

    @property
    def _plain(self) -> bool:
        """Return True if κ is 1. Forces on squared norms or on single elements always use 1."""
        return self.settings.kappa == "one" or self.settings.force.squared or self.settings.force.elementwise

    @property
    def kappa(self) -> Tensor:
        """Return κ of the group of each unit, [n_units]."""
        if self._kappa is not None:
            return self._kappa
        kappa = torch.ones_like(self.distance) if self._plain else numbers_per_unit(self.plan).to(self.distance).sqrt()
        self._kappa = kappa if self.settings.force.adaptive else None
        return kappa

    def set_kappa(self, kappa: Tensor) -> None:
        """Set κ of each unit [n_units]."""
        self._kappa, self._pulled = kappa, None

    @torch.no_grad()
    def __call__(self, norms: Tensor | None = None) -> Tensor:
        """Return κ F(d_u), [n_units], zero where no force acts.

        This is the norm of the penalty's gradient with respect to the unit, for β·s(t) = 1. For forces on squared norms
        it is that norm divided by ‖w_u‖; for elementwise forces it is the absolute gradient of each element.
        It is evaluated once per ranking, unless the force is adaptive.
        """
        active = self._binding.active
        if self._pulled is None or self._pulled_where is not active or self.settings.force.adaptive:
            self._pulled, self._pulled_where = self.force(norms) * self.kappa * active, active
        return self._pulled

    def check(self) -> None:
        """Raise :class:`ForceError` unless the force is a finite, non-negative number for each unit."""
        force = self.force()
        if tuple(force.shape) != (self.plan.n_units,) or not bool((force.isfinite() & (force >= 0)).all()):
            raise ForceError(
                f"{self.settings.force} gives forces that are not finite, not positive, or not one for each unit."
            )

    def _get_runs(self) -> Rankings:
        if self._runs is not None:
            return self._runs
        runs = Rankings.of(self.plan, self._units.device)
        self._runs = runs if self.settings.force.adaptive else None
        return runs


def _product(w: Tensor) -> Tensor:
    if w.grad is None:
        return torch.zeros_like(w)
    grad = w.grad.to_dense() if w.grad.is_sparse else w.grad
    return at_least_float32(w.detach()) * grad
