"""Forces: functions from the distance of a unit from the pivot to the strength of its push to zero.

The body of ``__call__`` is the equation of the paper. A force is called for units that are ranked together (a group, or
one of its blocks), or for all units of a plan at once. In the second case, ``size`` and ``importance`` are tensors with
one value for each unit::

    force = exponential(rate=5.0)
    force(distance)                                      # distance [n] in [0, 1] -> force [n] >= 0
    force(distance, size=size, importance=importance)    # for `linear` and `growing`
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from etp_graph._config import (
    LATER,
    Configured,
    Registry,
    build_named,
    register_class,
    require,
    require_choice,
    require_number,
)
from etp_graph.errors import ForceError

FORCES: Registry[type[Force]] = Registry(
    "force", error=ForceError, remedy="One of your own is known once the module that registers it is imported."
)
"""Every registered force, by name."""


class Force(Configured, ABC):
    """Function from distance to force.

    A force of your own is a frozen dataclass that derives from this class. ``register`` lets it go to JSON.

    Attributes:
        squared: the force acts on squared norms: the penalty is F/2·‖w‖² instead of F·‖w‖. It multiplies weights by a
            factor, so it does not reach exact zeros by itself.
        elementwise: the force acts on every element by itself: the penalty is F·‖w‖₁ instead of F·‖w‖, with the
            gradient F·sign(w).
        adaptive: the force depends on the importance of the units, and is therefore evaluated in every step.
    """

    __slots__ = ()
    registry: ClassVar[Registry[type[Any]]] = FORCES
    squared: ClassVar[bool] = False
    elementwise: ClassVar[bool] = False
    adaptive: ClassVar[bool] = False

    @abstractmethod
    def __call__(
        self, distance: Tensor, *, size: int | Tensor | None = None, importance: Tensor | None = None
    ) -> Tensor:
        """Return the force on each unit.

        Args:
            distance: |ρ_u − ρ_p| / max distance, in [0, 1], shape [n].
            size: number of units that are ranked together, one for all or one for each unit [n]; default: n.
            importance: importance of each unit relative to its group, (I_u − I_min)/(I_max − I_min), shape [n].

        Returns:
            The force, non-negative, shape [n].
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear(Force):
    """F(d) = (N − 1)·d, which is F = n for the unit at index n (Torque: Gupta et al. 2024, eq. 9)."""

    name: ClassVar[str] = "linear"

    def __call__(
        self, distance: Tensor, *, size: int | Tensor | None = None, importance: Tensor | None = None
    ) -> Tensor:
        """See :class:`Force`."""
        return distance * ((distance.numel() if size is None else size) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearL1(Linear):
    """F(d) = (N − 1)·d on every element by itself (Torque: Gupta et al. 2024, eq. 13, the L1 version)."""

    name: ClassVar[str] = "linear_l1"
    elementwise: ClassVar[bool] = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Heaviside(Force):
    """F(d) = ε·1[d ≥ d_h] (ETP: Modi et al. 2025, eq. 6).

    Attributes:
        epsilon: ε, the force beyond the threshold.
        threshold: d_h, in [0, 1].
    """

    name: ClassVar[str] = "heaviside"
    epsilon: float = 1.0
    threshold: float = 0.5

    def __post_init__(self) -> None:
        require_number("heaviside: epsilon", self.epsilon, 0, excluded=(0,))
        require_number("heaviside: threshold", self.threshold, 0, 1, why="as distances do")

    def __call__(
        self, distance: Tensor, *, size: int | Tensor | None = None, importance: Tensor | None = None
    ) -> Tensor:
        """See :class:`Force`."""
        return self.epsilon * (distance >= self.threshold).to(distance.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exponential(Force):
    """F(d) = exp(r·d), which is λ^i with λ = exp(r/(N − 1)) for the unit at index i (ETP: Modi et al. 2025, eq. 8).

    A rate per unit of distance has the same effect on layers of any width. Equation 8 has one λ for all layers, and the
    authors' code has λ = exp(5/N) in a layer of N units; ``base`` and ``divided_by`` give these.

    Attributes:
        rate: r, in [0, 80]. The force of the farthest unit is exp(r) times the force at the pivot.
        base: λ ≥ 1, the same for all layers: F = λ^i. It replaces ``rate``. It overflows float32 in layers that are too
            wide for it, which is an error. ``None``: by ``rate``.
        divided_by: ``"n_units"``: λ = exp(r/N), so that the farthest unit has exp(r·(N − 1)/N). ``None``: by N − 1.
    """

    name: ClassVar[str] = "exponential"
    rate: float = 5.0
    base: float | None = field(default=None, metadata=LATER)
    divided_by: Literal["n_units"] | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        require_number("exponential: rate", self.rate, 0, 80, why="beyond which exp overflows float32")
        if self.base is not None:
            require_number("exponential: base", self.base, 1)
        if self.divided_by is not None:
            require_choice("exponential: divided_by", self.divided_by, ("n_units",))
        require(
            self.base is None or self.divided_by is None,
            "exponential: base and divided_by; base is λ itself, so no rate is divided. Give one of them.",
        )

    def __call__(
        self, distance: Tensor, *, size: int | Tensor | None = None, importance: Tensor | None = None
    ) -> Tensor:
        """See :class:`Force`. Raises :class:`ForceError` if λ^(N − 1) of a layer overflows float32."""
        n = torch.as_tensor(distance.numel() if size is None else size, device=distance.device)
        if self.base is not None:
            return torch.exp(distance * (n - 1) * self._log_base(int(n.max()) if n.numel() else 1))
        if self.divided_by == "n_units":
            distance = distance * (n - 1) / n.clamp_min(1)
        return torch.exp(self.rate * distance)

    def _log_base(self, widest: int) -> float:
        """Return log λ, or raise :class:`ForceError` if λ^(widest − 1) overflows float32."""
        assert self.base is not None
        found = math.log(self.base)
        limit = 80 / max(widest - 1, 1)
        require(
            found <= limit,
            f"exponential: base={self.base:g} overflows float32 in a group of {widest} units, whose farthest has the "
            f"force base^{widest - 1}: take base <= {math.floor(math.exp(limit) * 1e4) / 1e4:.4f}, or rate=, which "
            "does not depend on the width.",
        )
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform(Force):
    """F(d) = 1: the group lasso (Yuan & Lin 2006)."""

    name: ClassVar[str] = "uniform"

    def __call__(
        self, distance: Tensor, *, size: int | Tensor | None = None, importance: Tensor | None = None
    ) -> Tensor:
        """See :class:`Force`."""
        return torch.ones_like(distance)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lasso(Uniform):
    """F(d) = 1 on every element by itself: the lasso (Tibshirani 1996)."""

    name: ClassVar[str] = "lasso"
    elementwise: ClassVar[bool] = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Ridge(Force):
    """F(d) = 1[d ≥ d_h] on squared norms: weight decay beyond the threshold (GReg: Wang et al. 2021).

    Attributes:
        threshold: d_h, in [0, 1].
    """

    name: ClassVar[str] = "ridge"
    squared: ClassVar[bool] = True
    threshold: float = 0.5

    def __post_init__(self) -> None:
        require_number("ridge: threshold", self.threshold, 0, 1, why="as distances do")

    def __call__(
        self, distance: Tensor, *, size: int | Tensor | None = None, importance: Tensor | None = None
    ) -> Tensor:
        """See :class:`Force`."""
        return (distance >= self.threshold).to(distance.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Growing(Force):
    """F = 2^(a·(I_max − I_u)/(I_max − I_min)) on squared norms (DepGraph: Fang et al. 2023, eq. 5, a = 4).

    Attributes:
        alpha: a, the exponent for the least important unit of a group; in [0, 100].
    """

    name: ClassVar[str] = "growing"
    squared: ClassVar[bool] = True
    adaptive: ClassVar[bool] = True
    alpha: float = 4.0

    def __post_init__(self) -> None:
        require_number("growing: alpha", self.alpha, 0, 100, why="beyond which 2^alpha nears float32's limit")

    def __call__(
        self, distance: Tensor, *, size: int | Tensor | None = None, importance: Tensor | None = None
    ) -> Tensor:
        """See :class:`Force`. Raises :class:`ForceError` without ``importance``."""
        if importance is None:
            raise ForceError(
                "growing: the force depends on the importance of the units; pass importance=[n] in [0, 1]."
            )
        return torch.exp2(self.alpha * (1 - importance))


linear = Linear

linear_l1 = LinearL1

heaviside = Heaviside

exponential = Exponential

uniform = Uniform

lasso = Lasso

ridge = Ridge

growing = Growing

F = TypeVar("F", bound=Force)


def register(force: type[F]) -> type[F]:
    """Add a force class to :data:`FORCES`, so that it goes to JSON and back; use it as a decorator or call it.

    Its name in JSON is its class attribute ``name``, or else its import path ``module:qualname``.

    Args:
        force: a frozen dataclass that derives from :class:`Force`.

    Returns:
        The class.

    Raises:
        ForceError: this is no such class, or another force has its name.
    """
    return register_class(force, Force)


for _force in (Linear, LinearL1, Heaviside, Exponential, Uniform, Lasso, Ridge, Growing):
    register(_force)


def from_json(source: str | Mapping[str, Any]) -> Force:
    """Return the force that ``to_json`` or ``to_dict`` wrote.

    Raises:
        ForceError: this is no force, or its class is not registered.
    """
    found: Force = build_named(FORCES, source)
    return found
