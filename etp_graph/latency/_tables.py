"""Tables of layer times at several sizes, and the predicted time of a selection as a cost.

Times between the sizes of a table are interpolated. Tables are made monotone: fewer channels never take longer. The sum
over the layers therefore never rises when a unit is removed, and the search for a target in MACs also works for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from etp_graph.plan import CostModel, Ints, Op, Plan

from ._clock import Timer
from ._layers import TimedLayer, TimedProducts

Floats = npt.NDArray[np.float64]

SHARES = (0.25, 0.5, 0.75)
"""Shares of the dense size at which an axis is timed, besides size 1 and the dense size."""

STEPS = (32, 16, 8)
"""Multiples to which a kernel may round up its number of channels internally."""

_UNIT = 1e9  # times are integer nanoseconds, because the search works with integers

_PACE = 1e-9  # seconds for a MAC if no layer could be timed; only the order of selections depends on it

_HEAVIEST = 8


def measured_sizes(size: int, *, varies: bool) -> tuple[int, ...]:
    """Return the five sizes at which an axis is timed, ascending; all equal if the axis does not vary."""
    if not varies:
        return (size,) * (len(SHARES) + 2)
    return (1, *(max(1, round(share * size)) for share in SHARES), size)


def monotone_fit(seconds: Floats) -> Floats:
    """Make times monotone: never falling along any axis.

    Each time becomes the mean of the highest time at sizes up to its own and the lowest time at sizes from its own on.
    """
    low, high = seconds, seconds
    for axis in range(seconds.ndim):
        low = np.maximum.accumulate(low, axis)
        high = np.flip(np.minimum.accumulate(np.flip(high, axis), axis), axis)
    return np.asarray((low + high) / 2)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LatencyTable:
    """Measured seconds of one layer at all pairs of sizes of its two axes.

    Attributes:
        work: the layer, or the products, that were timed.
        grids: sizes of the two axes, each int [5], ascending.
        seconds: float64 [5, 5], never falling along an axis.
    """

    work: TimedLayer | TimedProducts
    grids: tuple[tuple[int, ...], tuple[int, ...]]
    seconds: Floats

    @classmethod
    def of(cls, work: TimedLayer | TimedProducts, varies: tuple[bool, bool], timer: Timer) -> LatencyTable:
        """Time a layer at all pairs of sizes. An axis that holds no units has only its dense size."""
        sizes = work.sizes if isinstance(work, TimedLayer) else (work.size, 1)
        grids = measured_sizes(sizes[0], varies=varies[0]), measured_sizes(sizes[1], varies=varies[1])
        once = {pair: timer.layer(work, pair) for pair in sorted({(a, b) for a in grids[0] for b in grids[1]})}
        seconds = np.array([[once[a, b] for b in grids[1]] for a in grids[0]], dtype=np.float64)
        return cls(work=work, grids=grids, seconds=monotone_fit(seconds))


class _TableStack:
    """Many tables, interpolated together in one vectorised call."""

    def __init__(self, tables: Sequence[LatencyTable]) -> None:
        self._grids = np.array([table.grids for table in tables], dtype=np.float64)  # [n_tables, 2, 5]
        self._seconds = np.stack([table.seconds for table in tables])
        self._rows = np.arange(len(tables))

    def __call__(self, sizes: Floats) -> Floats:
        """Interpolate every table at its ``sizes`` [n, n_tables, 2]; return seconds, float64 [n, n_tables]."""
        at = (sizes[..., None] >= self._grids[None, :, :, 1:-1]).sum(-1)
        low, high = (np.take_along_axis(self._grids[None], (at + i)[..., None], -1)[..., 0] for i in (0, 1))
        wide = high - low
        share = np.clip(np.divide(sizes - low, wide, out=np.zeros_like(sizes), where=wide > 0), 0, 1)
        found = np.zeros(sizes.shape[:2])
        for i in (0, 1):
            for j in (0, 1):
                a = share[..., 0] if i else 1 - share[..., 0]
                b = share[..., 1] if j else 1 - share[..., 1]
                found += a * b * self._seconds[self._rows, at[..., 0] + i, at[..., 1] + j]
        return found


class TimedCosts(CostModel):
    """Cost of a plan in MACs, parameters, and nanoseconds predicted from the tables of its layers.

    Products are looked up at their number of heads times the share of their MACs that is left. Operators without a
    table count by their MACs, at the mean seconds per MAC of those with one.

    Args:
        plan: the plan.
        layers: the layers among the plan's cost terms, one entry per call; see :func:`etp_graph.layer_times.record`.
        products: the products among the plan's cost terms; see there.
        timer: times the layers and products.

    Attributes:
        pairs: for each layer the dimensions of its weight's two axes; ``None`` for an axis that holds no units.
        tables: tables of the layers, then of the products. Layers that take the same time share one object.
        names: names of the modules, in the same order.
    """

    def __init__(
        self, plan: Plan, layers: Sequence[TimedLayer], products: Sequence[TimedProducts], timer: Timer
    ) -> None:
        super().__init__(plan)
        self.pairs = [tuple(self._number.get((layer.weight, axis)) for axis in (0, 1)) for layer in layers]
        varies = [(a is not None, b is not None) for a, b in self.pairs]
        self.names = [*(layer.name for layer in layers), *(one.name for one in products)]
        known: dict[Any, LatencyTable] = {}
        self.tables: list[LatencyTable] = []
        works: list[tuple[TimedLayer | TimedProducts, tuple[bool, bool]]] = [*zip(layers, varies)]
        for work, which in [*works, *((one, (True, False)) for one in products)]:
            key = work.key, which
            if key not in known:
                known[key] = LatencyTable.of(work, which, timer)
            self.tables.append(known[key])
        self._stack = _TableStack(self.tables) if self.tables else None
        self._dense = np.array([[points[-1] for points in table.grids] for table in self.tables], dtype=np.float64)
        moving = [
            (i, axis, dim) for i, pair in enumerate(self.pairs) for axis, dim in enumerate(pair) if dim is not None
        ]
        self._moving = np.array(moving, dtype=np.int64).reshape(-1, 3).T
        self._set_terms_of(layers, products)

    def _set_terms_of(self, layers: Sequence[TimedLayer], products: Sequence[TimedProducts]) -> None:
        """Assign the plan's cost terms to products and to untimed operators, and compute the seconds per MAC."""
        names, shared = {layer.name for layer in layers}, {one.name for one in products}
        # terms without axes are no products of tensors, such as a module's multiplications by its own weights
        of: dict[str, list[Op]] = {}
        others: list[Op] = []
        for op in self.plan.ops:
            mine = op.name in names or (op.name in shared and op.axes)
            (of.setdefault(op.name, []) if mine else others).append(op)
        self._products = [self._terms(of.get(one.name, [])) for one in products]
        self._others = self._terms(others)
        macs = float(sum(_evaluate(self._terms(ops), self.sizes[None])[0] for ops in of.values()))
        seconds = sum(float(table.seconds[-1, -1]) for table in self.tables)
        self._pace = seconds / macs if macs and seconds else _PACE

    def _terms(self, ops: Sequence[Op]) -> list[tuple[float, list[int]]]:
        """Return each operator's MACs as a constant factor and the dimensions to multiply it with."""
        found = []
        for op in ops:
            dims = [self._number[pair] for pair in op.axes if pair in self._number]
            rest = [pair for pair in op.axes if pair not in self._number]
            fixed = prod(
                self.plan.tensors[t][axis] if t in self.plan.tensors else self.plan.activations[t] for t, axis in rest
            )
            found.append((float(op.coefficient * fixed), dims))
        return found

    def totals(self, counts: Ints) -> dict[str, Ints]:
        """Return the amounts of the counted quantities, and ``latency`` in nanoseconds, as :class:`CostModel` does."""
        found = self._pace * _evaluate(self._others, counts)
        if self._stack is not None:
            found = found + self._stack(self._sizes(counts)).sum(1)
        return {**super().totals(counts), "latency": np.rint(_UNIT * found).astype(np.int64)}

    def by_layer(self, counts: Ints) -> dict[str, float]:
        """Return the seconds of each timed module at ``counts`` [1, n_dims], in the order of its first call."""
        found: dict[str, float] = {}
        if self._stack is not None:
            for name, seconds in zip(self.names, self._stack(self._sizes(counts))[0].tolist(), strict=True):
                found[name] = found.get(name, 0.0) + seconds
        return found

    def _sizes(self, counts: Ints) -> Floats:
        """Return the sizes of every table's axes, [n, n_tables, 2], at the kept sizes ``counts`` [n, n_dims]."""
        found = np.repeat(self._dense[None], len(counts), 0)
        table, axis, dim = self._moving
        found[:, table, axis] = counts[:, dim]
        for i, terms in enumerate(self._products, len(self.pairs)):
            dense = float(_evaluate(terms, self.sizes[None])[0])
            found[:, i, 0] *= _evaluate(terms, counts) / dense if dense else 1.0  # products that hold no units stay
        return found


def _evaluate(terms: Sequence[tuple[float, list[int]]], counts: Ints) -> Floats:
    """Return the sum of the terms, [n], at the kept sizes ``counts`` [n, n_dims]."""
    found = np.zeros(len(counts))
    for factor, dims in terms:
        found += factor * counts[:, dims].astype(np.float64).prod(1)
    return found


def preferred_multiple(costs: TimedCosts, timer: Timer) -> int:
    """Return the largest of :data:`STEPS` at whose multiples the times of the slowest layers step; 1 if none does.

    Times step at a multiple if removing half as many channels saves hardly any time.
    """
    heavy: dict[int, LatencyTable] = {}
    for table, pair in zip(costs.tables, costs.pairs, strict=False):
        if pair[0] is not None and isinstance(table.work, TimedLayer) and table.work.sizes[0] >= 2 * STEPS[0]:
            heavy[id(table)] = table
    chosen = sorted(heavy.values(), key=lambda table: -float(table.seconds[-1, -1]))[:_HEAVIEST]
    return next((multiple for multiple in STEPS if chosen and _steps(chosen, multiple, timer)), 1)


def _steps(tables: Sequence[LatencyTable], multiple: int, timer: Timer) -> bool:
    """Return True if half a step saves less than a quarter of the time that a whole step saves, over all tables."""
    whole = half = 0.0
    for table in tables:
        work = table.work
        assert isinstance(work, TimedLayer)
        top = work.sizes[0] // 2 // STEPS[0] * STEPS[0]
        # the size between is odd, because some kernels are slow at odd sizes
        full, between, below = (
            timer.layer(work, (at, work.sizes[1])) for at in (top, top - multiple // 2 - 1, max(top - multiple, 1))
        )
        whole, half = whole + full - below, half + full - between
    return whole > 0 and half < whole / 4
