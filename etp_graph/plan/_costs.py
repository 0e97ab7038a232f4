"""Count the MACs and parameters of a model for any selection, exactly and without changing the model.

One MAC is one multiply-add, as in fvcore and DepGraph; ``torch.utils.flop_counter`` counts it as two operations.
Element-wise operators, norms and pooling are not counted, as is usual in the pruning literature. Operators that
multiply but that the library cannot count are listed in :attr:`Cost.uncounted`.

Both counts are polynomials in the sizes of the sliced axes. A term is ``coefficient * product of kept sizes``. Axes of
the same units (a convolution's output, its norm, the next convolution's input) are one variable, a *dimension*.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ._cost import Cost
from ._plan import Plan
from ._plan_json import ACTIVATION
from ._positions import NO_UNIT, Positions, SlicedAxis
from ._quantities import counted_quantities, find_quantity
from ._selection import Selection

Ints = npt.NDArray[np.int64]
"""Array of int64, or of Python integers if a count does not fit into 64 bits."""


def cost(model: nn.Module, plan: Plan, selection: Selection | None = None) -> Cost:
    """Count the MACs and parameters of ``model`` with only the units of ``selection``, as exact integers.

    Args:
        model: the model that the plan was traced from. Only its names and shapes are read, to check the plan.
        plan: the plan.
        selection: which units stay; ``None`` for the dense model.

    Raises:
        PlanError: the model is not the one that the plan describes.
        SelectionError: the selection violates a constraint of the plan.
    """
    plan.check(model)
    if selection is None:
        return CostModel(plan).dense
    selection.check(plan)
    return CostModel(plan).evaluate(selection.flat(plan))


class CostModel:
    """Counts of a plan as polynomials, which are evaluated quickly for many selections.

    Args:
        plan: the plan.
        quantities: names of the quantities to count; default: all that are registered.

    Attributes:
        plan: the plan.
        quantities: names of the quantities.
        sizes: dense size of every dimension, int64 [n_dims].
        maps: for every dimension its layers of flat unit numbers, each int64 [size]; ``plan.n_units`` is no unit, or
            one of a locked group, which stays.

    Raises:
        PlanError: a term names an axis that the plan does not have.
        BudgetError: a quantity is unknown or measured, or its function did not return terms.
    """

    def __init__(self, plan: Plan, quantities: Iterable[str] | None = None) -> None:
        self.plan = plan
        self.quantities = tuple(q.name for q in counted_quantities()) if quantities is None else tuple(quantities)
        self.maps: list[tuple[Ints, ...]] = []
        self._number: dict[tuple[str, int], int] = {}
        known: dict[tuple[bytes, ...], int] = {}
        for name, parts in (Positions(plan, locked=False).axes | _activation_axes(plan)).items():
            for part in parts:
                layers = tuple(layer.numpy() for layer in part.maps)
                number = known.setdefault(tuple(sorted(layer.tobytes() for layer in layers)), len(known))
                if number == len(self.maps):
                    self.maps.append(layers)
                self._number[name, part.axis] = number
        self.sizes: Ints = np.array([len(layers[0]) for layers in self.maps], dtype=np.int64)
        self._set_terms()

    @property
    def dense(self) -> Cost:
        """The cost with all units."""
        return self._cost(self.sizes[None])

    def _set_terms(self) -> None:
        """Collect like terms: one row of dimensions with its coefficient in each quantity."""
        terms: dict[tuple[int, ...], list[int]] = {}
        for column, quantity in enumerate(self.quantities):
            for coefficient, axes in find_quantity(quantity).list_terms(self.plan):
                self._add_term(terms, column, coefficient, axes)
        width = max((len(dims) for dims in terms), default=0)
        one = len(self.maps)  # a dimension of size 1, so that all rows have one length
        self._dims: Ints = np.array([(*dims, *[one] * (width - len(dims))) for dims in terms], dtype=np.int64)
        self._dims = self._dims.reshape(len(terms), width)
        sizes = [*self.sizes.tolist(), 1]
        dense = [[c * prod(sizes[d] for d in dims) for c in row] for dims, row in terms.items()]
        exact = max((sum(column) for column in zip(*dense, strict=True)), default=0) < 2**62
        self._coefficients: Any = np.array(list(terms.values()), dtype=np.int64 if exact else object)
        self._coefficients = self._coefficients.reshape(len(terms), len(self.quantities))

    def _add_term(
        self, terms: dict[tuple[int, ...], list[int]], column: int, coefficient: int, pairs: Iterable[tuple[str, int]]
    ) -> None:
        dims = []
        for tensor, axis in pairs:
            if (tensor, axis) in self._number:
                dims.append(self._number[tensor, axis])
                continue
            coefficient *= self.plan.axis_size(tensor, axis, quantity=self.quantities[column])
        terms.setdefault(tuple(sorted(dims)), [0] * len(self.quantities))[column] += coefficient

    def evaluate(self, keep: Tensor) -> Cost:
        """Return the cost with only the units that ``keep`` (bool [n_units]) names; counts MACs and parameters."""
        return self._cost(self.counts(keep))

    def _cost(self, counts: Ints) -> Cost:
        amounts = {name: int(totals[0]) for name, totals in CostModel.totals(self, counts).items()}
        return Cost.of(amounts, self.plan.uncounted)

    def counts(self, keep: Tensor) -> Ints:
        """Return the kept size of each dimension, int64 [1, n_dims], for ``keep`` (bool [n_units])."""
        flags = np.append(keep.detach().cpu().numpy().astype(np.bool_), True)
        counts = [int(np.logical_and.reduce([flags[layer] for layer in layers]).sum()) for layers in self.maps]
        return np.array([counts], dtype=np.int64)

    def totals(self, counts: Ints) -> dict[str, Ints]:
        """Return the amount of each quantity, [n], of n models given their kept sizes ``counts`` int64 [n, n_dims]."""
        counts = np.concatenate([counts, np.ones((len(counts), 1), dtype=np.int64)], axis=1)
        products = counts[:, self._dims].astype(self._coefficients.dtype, copy=False).prod(axis=2)
        return dict(zip(self.quantities, (products @ self._coefficients).T, strict=True))

    def marginal(self, quantity: str) -> Tensor:
        """Return what removing one unit alone from the dense model saves of a quantity, float64 [n_units]."""
        n_units, column = self.plan.n_units, self.quantities.index(quantity)
        owned = [np.unique(np.concatenate(layers), return_counts=True) for layers in self.maps]
        saved, gone = np.zeros(n_units + 1), np.zeros(n_units + 1)
        sizes = np.append(self.sizes, 1).astype(np.float64)
        for dims, coefficient in zip(self._dims, self._coefficients[:, column].astype(np.float64), strict=True):
            real = [d for d in dims.tolist() if d < len(self.maps)]
            if not real or not coefficient:
                continue
            units = np.unique(np.concatenate([owned[d][0] for d in real]))
            left = np.ones(len(units))
            for d in real:
                gone[owned[d][0]] = owned[d][1]
                left *= sizes[d] - gone[units]
                gone[owned[d][0]] = 0.0
            saved[units] += coefficient * (sizes[dims].prod() - left)
        return torch.from_numpy(saved[:n_units])


def _activation_axes(plan: Plan) -> dict[str, tuple[SlicedAxis, ...]]:
    """Return the axes of activations in the cost that hold units."""
    found: dict[str, list[torch.LongTensor]] = {}
    for (module, name, _), layers in Positions(plan, locked=False).attributes.items():
        if module == ACTIVATION and name in plan.activations:
            for layer in layers:
                whole = torch.full((plan.activations[name],), NO_UNIT, device="cpu")
                whole[: len(layer)] = layer
                found.setdefault(name, []).append(whole)  # type: ignore[arg-type]
    return {name: (SlicedAxis(name, 0, tuple(layers)),) for name, layers in found.items()}
