"""Between parameters and flat [n_units] vectors: the only index arithmetic of the library.

A position of a tensor's axis belongs to at most one unit of a group, but an axis may serve several groups
(concatenated streams) and, where unit kinds overlap (heads and head dimensions), several units at once.
An :class:`Axis` therefore holds one or more *layers*, each a map position -> flat unit number, with
``n_units`` standing for "no unit". Vectors are extended by one neutral entry, so nothing is ever masked.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from etp_graph.model import Shards, any_sharded
from etp_graph.plan import Plan, SlicedAxis, sliced_axes

from ._kernels import Layout, axis_sums, scale_, square_sums


class Units:
    """Gather from and scatter to the sliced parameters of one model, in flat ``[n_units]`` vectors.

    Args:
        model: the model that the plan was traced from; its tensors are looked up anew in every call.
        plan: the plan.
        device: where the index tensors and the vectors live; default: the device of the model.
        locked: also the slices of locked groups; without them their units count as empty.

    Attributes:
        axes: of every sliced parameter (buffers are not among them), by name, the sliced axes, each with the number
            of its layers.
        dtype: of the vectors: float64 if a sliced parameter is float64, else float32 (also for bfloat16 weights).
        shards: who holds what of parameters that are DTensors; ``None`` if there are none. Sums then take the part
            of this process, and are added up over all; every process has to call them.
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
        active = sliced_axes(plan, passive=False, locked=locked)
        found = {name: parts for name, parts in active.items() if name in set(plan.parameters)}
        double = any(parameters[name].dtype == torch.float64 for name in found)
        self.dtype = torch.float64 if double else torch.float32
        self.axes = {name: tuple((part.axis, len(part.maps)) for part in parts) for name, parts in found.items()}
        held = {name: parameters[name] for name in found}
        self.shards = Shards(held) if any_sharded(held) else None
        layers: list[Tensor] = [layer for parts in found.values() for axis in parts for layer in self._held(axis)]
        none = torch.zeros(0, dtype=torch.int64, device="cpu")
        # 32 bits, because this is all that a regularizer adds to the memory of a model that grows with its width
        self._index = (torch.cat(layers) if layers else none).to(self.device, torch.int32)
        self._lengths = [len(layer) for layer in layers]
        self._rows = self._index if self.shards is None else self._index + self._offsets(self.shards)
        self._layouts: dict[str, Layout] = {}

    def _held(self, axis: SlicedAxis) -> Iterable[Tensor]:
        """The layers of an axis, as far as this process holds the axis."""
        if self.shards is None:
            return axis.maps
        here = self.shards.held[axis.tensor][axis.axis]
        return [layer[here.start : here.stop] for layer in axis.maps]

    def _offsets(self, shards: Shards) -> Tensor:
        """Where the row of sums begins that each position goes to, int32 [positions]."""
        counts = [sum(self._lengths[span]) for span in self._pieces()]
        rows = torch.tensor([shards.row[name] * (self.n_units + 1) for name in self.axes], dtype=torch.int32)
        return rows.repeat_interleave(torch.tensor(counts, dtype=torch.int64)).to(self.device)

    def local_part(self, name: str, tensor: Tensor) -> Tensor:
        """What this process holds of a parameter or of a tensor of its shape, sharing memory: all, if not sharded."""
        return tensor if self.shards is None else self.shards.part(name, tensor)

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The sliced parameters of the model, by name."""
        parameters = dict(model.named_parameters())
        return {name: parameters[name] for name in self.axes}

    def reduce(
        self,
        values: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        *,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Sum elementwise ``values`` (name -> tensor shaped like the parameter) into their units: [n_units].

        An element that belongs to two units (an entry of a weight between two groups) counts for both. The sums
        are taken in float32 at least, and in float64 for float64 values; differentiable.

        Args:
            values: a mapping, or pairs that are made one at a time so that no copy of all weights ever exists.
            transform: an elementwise function applied to the values before they are summed.
        """
        return self.total(self.partial(values, transform=transform))

    def total(self, rows: Tensor) -> Tensor:
        """Add up what the processes hold, ``rows`` [rows, n] of :meth:`partial`: [n]; one all-reduce if sharded."""
        return rows[0] if self.shards is None else self.shards.total(rows)

    def partial(
        self,
        values: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        *,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """As :meth:`reduce`, the part of this process: [rows, n_units], one row unless parameters are sharded."""
        names: list[str] = []
        sums: list[Tensor] = []
        for name, value in values.items() if isinstance(values, Mapping) else values:
            names.append(name)
            found = axis_sums(self.local_part(name, value), [axis for axis, _ in self.axes[name]], transform)
            for (_, layers), total in zip(self.axes[name], found, strict=True):
                sums += [total.to(self.device)] * layers
        index = self._rows
        if names != list(self.axes):
            starts = dict(zip(self.axes, self._spans(), strict=True))
            index = torch.cat([self._rows[:0], *(self._rows[starts[name]] for name in names)])
        return self._collect(sums, index)

    def _spans(self) -> list[slice]:
        """Where the positions of each parameter stand among all positions."""
        ends = list(itertools.accumulate(self._lengths, initial=0))
        return [slice(ends[piece.start], ends[piece.stop]) for piece in self._pieces()]

    def _pieces(self) -> list[slice]:
        """Where the layers of each parameter stand among all layers."""
        counts = itertools.accumulate((sum(n for _, n in parts) for parts in self.axes.values()), initial=0)
        return [slice(a, b) for a, b in itertools.pairwise(counts)]

    def _collect(self, sums: list[Tensor], index: Tensor) -> Tensor:
        n_rows = 1 if self.shards is None else self.shards.n_rows
        if not sums:
            return torch.zeros(n_rows, self.n_units, dtype=self.dtype, device=self.device)
        flat = torch.cat(sums)
        rows = flat.new_zeros(n_rows * (self.n_units + 1)).index_add(0, index, flat)
        return rows.view(n_rows, -1)[:, :-1]

    @torch.no_grad()
    def squares(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Squared group norm of every unit, [n_units]; the fast way, without gradients.

        Args:
            tensors: every sliced parameter, by name, in the order of :attr:`axes`.
        """
        return self.total(self.partial_squares(tensors))

    @torch.no_grad()
    def partial_squares(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """As :meth:`squares`, the part of this process: [rows, n_units]; see :meth:`partial`."""
        if self.shards is not None:
            tensors = {name: self.local_part(name, tensor) for name, tensor in tensors.items()}
        found = square_sums([(self._layout(name, tensor), tensor.detach()) for name, tensor in tensors.items()])
        sums: list[Tensor] = []
        for name, totals in zip(tensors, found, strict=True):
            for (_, layers), total in zip(self.axes[name], totals, strict=True):
                sums += [total] * layers
        return self._collect(sums, self._rows)

    def _layout(self, name: str, tensor: Tensor) -> Layout:
        known = self._layouts.get(name)
        if known is None or known.strides != tensor.stride():
            known = self._layouts[name] = Layout(tensor, [axis for axis, _ in self.axes[name]])
        return known

    def square_norms(self, model: nn.Module) -> Tensor:
        """Squared group norm of every unit over all its slices, [n_units], differentiable."""
        return self.reduce(self.tensors(model), transform=torch.square)

    def positions(self, values: Tensor) -> dict[str, list[tuple[int, Tensor]]]:
        """``values`` [n_units + 1] at every position of every layer of every axis: by tensor its (axis, values [size]).

        One gather for the whole model; the last entry of ``values`` goes to positions that belong to no unit.
        """
        parts = iter(torch.split(values.index_select(0, self._index), self._lengths))
        return {
            name: [(axis, next(parts)) for axis, layers in sliced for _ in range(layers)]
            for name, sliced in self.axes.items()
        }

    @torch.no_grad()
    def scale_(self, tensors: Mapping[str, Tensor], factors: Tensor) -> None:
        """Multiply every slice of every unit in these tensors by its factor [n_units + 1]; the last entry is 1."""
        parts = self.positions(factors)
        if self.shards is not None:
            tensors = {name: self.local_part(name, tensor) for name, tensor in tensors.items()}
        held = []
        for name, tensor in tensors.items():
            mine = parts[name]
            if tensor.dtype != factors.dtype:
                mine = [(axis, factor.to(tensor.dtype)) for axis, factor in mine]
            held.append((self._layout(name, tensor), tensor.detach(), mine))
        scale_(held)
