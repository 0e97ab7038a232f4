"""Convert between parameters and flat [n_units] vectors.

A position of a tensor's axis belongs to at most one unit of a group. An axis may hold units of several groups
(concatenated streams). Where unit kinds overlap (heads and head dimensions), a position belongs to several units.
A :class:`etp_graph.plan.SlicedAxis` therefore holds one or more *maps* position -> flat unit number, where ``NO_UNIT``
means "no unit". Vectors get one more neutral entry for that number, so that no masks are needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from etp_graph.model import Shards, any_sharded
from etp_graph.plan import NO_UNIT, Plan, Positions, SlicedAxis

from ._kernels import Layout, axis_sums, scale_, square_sums


class Units:
    """Sums over the slices of each unit, and scaling of the slices, as flat ``[n_units]`` vectors of one model.

    Args:
        model: the model that the plan was traced from. The parameters themselves are not kept.
        plan: the plan.
        device: device of the index tensors and the vectors; default: the device of the model.
        locked: whether to include slices of locked groups. If False, sums over units of locked groups are 0.

    Attributes:
        axes: by name of each sliced parameter (not buffers), its sliced axes, each with its number of layers.
        dtype: of the vectors: float64 if a sliced parameter is float64, else float32 (also for bfloat16 weights).
        shards: how parameters that are DTensors are divided among processes; ``None`` if there are none. Each process
            then sums its own part, and an all-reduce adds the parts; all processes must make the same calls.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, *, device: torch.device | str | None = None, locked: bool = True
    ) -> None:
        parameters = dict(model.named_parameters())
        self.plan = plan
        self.n_units = plan.n_units
        if device is None:
            device = next(iter(parameters.values())).device if parameters else "cpu"
        self.device = torch.device(device)
        active = Positions(plan, passive=False, locked=locked).axes
        found = {name: parts for name, parts in active.items() if name in set(plan.parameters)}
        double = any(parameters[name].dtype == torch.float64 for name in found)
        self.dtype = torch.float64 if double else torch.float32
        self.axes = {name: tuple((part.axis, len(part.maps)) for part in parts) for name, parts in found.items()}
        held = {name: parameters[name] for name in found}
        self.shards = Shards(held) if any_sharded(held) else None
        layers: list[Tensor] = [layer for parts in found.values() for axis in parts for layer in self._local_maps(axis)]
        none = torch.zeros(0, dtype=torch.int64, device="cpu")
        # 32 bits, because this index is the only memory of a regularizer that grows with the width of the model
        index = torch.cat(layers) if layers else none
        # The kernels take no negative index: positions without a unit use the entry after the last unit
        self._index = torch.where(index == NO_UNIT, self.n_units, index).to(self.device, torch.int32)
        self._lengths = [len(layer) for layer in layers]
        self._rows = self._index if self.shards is None else self._index + self._row_offsets(self.shards)
        self._layouts: dict[str, Layout] = {}

    def _local_maps(self, axis: SlicedAxis) -> Iterable[Tensor]:
        """Return the layers of an axis, restricted to the positions that this process holds."""
        if self.shards is None:
            return axis.maps
        here = self.shards.held[axis.tensor][axis.axis]
        return [layer[here.start : here.stop] for layer in axis.maps]

    def _row_offsets(self, shards: Shards) -> Tensor:
        """Return for each position the offset of the row that its sum is added to, int32 [positions]."""
        counts = [sum(self._lengths[span]) for span in self._map_spans()]
        rows = torch.tensor([shards.row[name] * (self.n_units + 1) for name in self.axes], dtype=torch.int32)
        return rows.repeat_interleave(torch.tensor(counts, dtype=torch.int64)).to(self.device)

    def local_part(self, name: str, tensor: Tensor) -> Tensor:
        """Return the part of a parameter, or of a tensor of its shape, that this process holds; a view, not a copy."""
        return tensor if self.shards is None else self.shards.part(name, tensor)

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the sliced parameters of the model, by name."""
        parameters = dict(model.named_parameters())
        return {name: parameters[name] for name in self.axes}

    def reduce(
        self,
        values: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        *,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Sum elementwise ``values`` (name -> tensor shaped like the parameter) over each unit: [n_units].

        An element that belongs to two units (an entry of a weight between two groups) counts for both. Sums have
        at least the precision of float32, and of float64 for float64 values. Differentiable.

        Args:
            values: a mapping, or an iterator of (name, tensor), which can save memory by making one tensor at a time.
            transform: an elementwise function applied to the values before they are summed.
        """
        return self.total(self.partial(values, transform=transform))

    def total(self, rows: Tensor) -> Tensor:
        """Add ``rows`` [rows, n] of :meth:`partial` over all processes: [n]; an all-reduce if sharded."""
        return rows[0] if self.shards is None else self.shards.total(rows)

    def partial(
        self,
        values: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        *,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Sum as :meth:`reduce`, over the part of this process: [rows, n_units]; one row if nothing is sharded."""
        names: list[str] = []
        sums: list[Tensor] = []
        for name, value in values.items() if isinstance(values, Mapping) else values:
            names.append(name)
            found = axis_sums(self.local_part(name, value), [axis for axis, _ in self.axes[name]], transform)
            for (_, layers), total in zip(self.axes[name], found, strict=True):
                sums += [total.to(self.device)] * layers
        index = self._rows
        if names != list(self.axes):
            starts = dict(zip(self.axes, self._position_spans(), strict=True))
            index = torch.cat([self._rows[:0], *(self._rows[starts[name]] for name in names)])
        return self._sum_by_unit(sums, index)

    def _position_spans(self) -> list[slice]:
        """Return for each parameter the slice of its positions among all positions."""
        ends = list(itertools.accumulate(self._lengths, initial=0))
        return [slice(ends[piece.start], ends[piece.stop]) for piece in self._map_spans()]

    def _map_spans(self) -> list[slice]:
        """Return for each parameter the slice of its layers among all layers."""
        counts = itertools.accumulate((sum(n for _, n in parts) for parts in self.axes.values()), initial=0)
        return [slice(a, b) for a, b in itertools.pairwise(counts)]

    def _sum_by_unit(self, sums: list[Tensor], index: Tensor) -> Tensor:
        n_rows = 1 if self.shards is None else self.shards.n_rows
        if not sums:
            return torch.zeros(n_rows, self.n_units, dtype=self.dtype, device=self.device)
        flat = torch.cat(sums)
        rows = flat.new_zeros(n_rows * (self.n_units + 1)).index_add(0, index, flat)
        return rows.view(n_rows, -1)[:, :-1]

    @torch.no_grad()
    def squares(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the squared group norm of every unit, [n_units]. Faster than :meth:`square_norms`; no gradients.

        Args:
            tensors: every sliced parameter, by name, in the order of :attr:`axes`.
        """
        return self.total(self.partial_squares(tensors))

    @torch.no_grad()
    def partial_squares(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Compute :meth:`squares` over the part of this process: [rows, n_units]; see :meth:`partial`."""
        if self.shards is not None:
            tensors = {name: self.local_part(name, tensor) for name, tensor in tensors.items()}
        found = square_sums([(self._layout_of(name, tensor), tensor.detach()) for name, tensor in tensors.items()])
        sums: list[Tensor] = []
        for name, totals in zip(tensors, found, strict=True):
            for (_, layers), total in zip(self.axes[name], totals, strict=True):
                sums += [total] * layers
        return self._sum_by_unit(sums, self._rows)

    def _layout_of(self, name: str, tensor: Tensor) -> Layout:
        known = self._layouts.get(name)
        if known is None or known.strides != tensor.stride():
            known = self._layouts[name] = Layout(tensor, [axis for axis, _ in self.axes[name]])
        return known

    def square_norms(self, model: nn.Module) -> Tensor:
        """Return the squared group norm of every unit, [n_units]; differentiable."""
        return self.reduce(self.tensors(model), transform=torch.square)

    def positions(self, values: Tensor) -> dict[str, list[tuple[int, Tensor]]]:
        """Gather ``values`` [n_units + 1] at the positions of each layer: by tensor a list of (axis, values [size]).

        Positions that belong to no unit get the last entry of ``values``. One gather serves the whole model.
        """
        parts = iter(torch.split(values.index_select(0, self._index), self._lengths))
        return {
            name: [(axis, next(parts)) for axis, layers in sliced for _ in range(layers)]
            for name, sliced in self.axes.items()
        }

    @torch.no_grad()
    def scale_(self, tensors: Mapping[str, Tensor], factors: Tensor) -> None:
        """Multiply in place every slice of every unit by the unit's factor; ``factors`` [n_units + 1] end with 1."""
        parts = self.positions(factors)
        if self.shards is not None:
            tensors = {name: self.local_part(name, tensor) for name, tensor in tensors.items()}
        held = []
        for name, tensor in tensors.items():
            mine = parts[name]
            if tensor.dtype != factors.dtype:
                mine = [(axis, factor.to(tensor.dtype)) for axis, factor in mine]
            held.append((self._layout_of(name, tensor), tensor.detach(), mine))
        scale_(held)
