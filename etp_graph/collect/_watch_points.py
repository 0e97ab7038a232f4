"""Find the modules where the units of a plan can be observed, and the weights that produce the units.

Units are observed at the input of the layer that reads them, after norm and nonlinearity. If that layer does not get
the feature maps (a linear layer after pooling), units are observed at the output of their batch norms, or else of the
layer that produces them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import LongTensor, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from etp_graph._config import quoted
from etp_graph.errors import ScoreError
from etp_graph.model import counting_attributes
from etp_graph.plan import ACTIVATION, Attribute, Group, Plan, Slice, as_tensor

Side = Literal["input", "output"]


@dataclass(frozen=True, slots=True, eq=False)
class WatchPoint:
    """Input or output of one module, whose channels are units.

    Attributes:
        module: name of the module.
        side: ``"input"`` or ``"output"``.
        dim: dimension of the channels: 1 for batch norms, negative (counted from the end) for all others.
        index: positions along ``dim``, int64 [p].
        units: flat numbers of the units at this site, int64 [u].
        local: for each position the index of its unit in ``units``, int64 [p].
    """

    module: str
    side: Side
    dim: int
    index: LongTensor
    units: Tensor
    local: Tensor

    def tensor(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Tensor:
        """Return the tensor of one call that holds the units."""
        candidates = (*args, *kwargs.values()) if self.side == "input" else (output,)
        tensors = (t for value in candidates for t in (value if isinstance(value, tuple) else (value,)))
        return next(t for t in tensors if isinstance(t, Tensor) and t.is_floating_point())

    def values(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Tensor:
        """Return the activations of one call, [samples, p, places], or [samples, p, H, W] for feature maps."""
        return self.arranged(self.tensor(args, kwargs, output))

    def arranged(self, x: Tensor) -> Tensor:
        """Return a copy of the units of a tensor of this site, in the order of :meth:`values`."""
        x = x.detach()
        x = x.unsqueeze(0) if x.ndim == -self.dim else x  # a single sample without a batch dimension
        x = x.movedim(self.dim, 1).index_select(1, self.index.to(x.device))
        x = x.unsqueeze(-1) if x.ndim == 2 else x
        return x.flatten(2, -2) if self.dim != -1 and x.ndim > 3 else x.flatten(2)

    def average(self, values: Tensor) -> Tensor:
        """Return the mean over the positions of each unit: [p] -> [u]."""
        local = self.local.to(values.device)
        total = values.new_zeros(len(self.units)).index_add(0, local, values)
        return total / torch.bincount(local, minlength=len(self.units)).to(total)

    def matrices(self, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield units of equal width, as indices [k] into ``units``, with their values [samples, k, width, places]."""
        for chosen, places in positions_by_width(self.local, len(self.units)):
            yield chosen, values[:, places.to(values.device)]


def positions_by_width(unit: Tensor, n_units: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield units with equally many positions, int64 [k], and their positions, int64 [k, width].

    Args:
        unit: the unit of each position, int64 [positions].
        n_units: number of units.
    """
    order, widths = unit.argsort(stable=True), torch.bincount(unit, minlength=n_units)
    starts = widths.cumsum(0) - widths
    for width in widths.unique().tolist():
        chosen = (widths == width).nonzero().flatten()
        yield chosen, order[starts[chosen].unsqueeze(1) + torch.arange(width, device=unit.device)]


def watch_points(
    model: nn.Module, plan: Plan, *, packed: Callable[[nn.Module, Group, int], Sequence[WatchPoint]] | None = None
) -> tuple[WatchPoint, ...]:
    """Return the sites where the units of groups that are not locked can be observed.

    Args:
        model: the model.
        plan: its plan.
        packed: returns the sites of a group that is at no input or output of a module.

    Raises:
        ScoreError: no module reads or writes the units of any group; the message names the groups.
    """
    spans = [(group, span) for group, span in plan.spans() if group.locked is None]
    found: list[WatchPoint] = []
    for group, span in spans:
        sites = _sites_of(model, group, span.start)
        found += sites if sites or packed is None else packed(model, group, span.start)
    if spans and not found:
        other = "'reap', or one" if all(group.kind == "experts" for group, _ in spans) else "one"
        raise ScoreError(
            f"units of {quoted(group.name for group, _ in spans)} are at no input or output of a module that could be "
            f"watched. Use another criterion: {other} that reads weights, such as 'magnitude'."
        )
    return tuple(found)


def unwatched_groups(plan: Plan, values: Tensor) -> set[str]:
    """Return the names of the groups that can lose units, and lack values of a statistic [n_units]."""
    spans = [(group.name, span) for group, span in plan.spans() if group.locked is None]
    return {name for name, span in spans if bool(values[span].isnan().any())}


def _sites_of(model: nn.Module, group: Group, start: int) -> list[WatchPoint]:
    rows = [(a, model.get_submodule(a.module)) for a in group.attributes if a.module != ACTIVATION]
    written = [(a, m) for a, m in rows if a.name == counting_attributes(m).out]
    read = [(a, m) for a, m in rows if a.name == counting_attributes(m).into and counting_attributes(m).out is not None]
    read += _readers_by_weight(model, group, {a.module for a, _ in rows})
    if any(isinstance(m, _ConvNd) for _, m in written):
        read = [(a, m) for a, m in read if isinstance(m, _ConvNd)]
    if read:
        return [_site(a, m, "input", start) for a, m in read]
    normed = [(a, m) for a, m in rows if isinstance(m, _BatchNorm)]
    return [_site(a, m, "output", start) for a, m in normed or written]


def _readers_by_weight(model: nn.Module, group: Group, known: set[str]) -> list[tuple[Attribute, nn.Module]]:
    """Return the layers that read units, but have no attribute in the plan (Conv1D of transformers does not use it)."""
    found = []
    for piece in group.slices:
        home, _, name = piece.tensor.rpartition(".")
        if name == "weight" and home not in known:
            module = model.get_submodule(home)
            row = counting_attributes(module)
            if row.out == "nf" and row.into is not None and piece.axis != out_axis(module):
                attribute = Attribute(module=home, name=row.into, item=None, index=piece.index, unit=piece.unit)
                found.append((attribute, module))
    return found


def _site(attribute: Attribute, module: nn.Module, side: Side, start: int) -> WatchPoint:
    units, local = (as_tensor(attribute.unit) + start).unique(return_inverse=True)
    spatial = len(module.kernel_size) if isinstance(module, _ConvNd) else 0
    dim = 1 if isinstance(module, _BatchNorm) else -1 - spatial
    return WatchPoint(attribute.module, side, dim, as_tensor(attribute.index), units, local)


@torch.no_grad()
def silence_(model: nn.Module, plan: Plan, gone: Tensor) -> None:
    """Set the filters that produce the units in ``gone`` (bool [n_units]) to zero, and nothing else.

    Biases, norms and the weights that read a unit stay, so that the unit gets gradients and can grow again. A ReLU
    passes no gradient to an input of exactly zero.
    """
    parameters = dict(model.named_parameters())
    for group, span in plan.spans():
        lost = gone[span].cpu()
        if group.locked is not None or not bool(lost.any()):
            continue
        for piece in _producing_slices(model, group):
            if piece.tensor in parameters and parameters[piece.tensor].ndim > 1:
                positions = as_tensor(piece.index)[lost[as_tensor(piece.unit)]]
                parameters[piece.tensor].index_fill_(piece.axis, positions.to(parameters[piece.tensor].device), 0)


def _producing_slices(model: nn.Module, group: Group) -> list[Slice]:
    """Return each slice that produces units of a group: the filters of the units, and their biases."""
    rows = [(a, model.get_submodule(a.module)) for a in group.attributes if a.module != ACTIVATION]
    axes = {a.module: out_axis(m) for a, m in rows if a.name == counting_attributes(m).out}
    found: list[Slice] = []
    for piece in group.slices:
        home = piece.tensor.rpartition(".")[0].removesuffix(".parametrizations.weight")
        # Without such modules, the units are rows of the packed projections of a composite layer.
        if piece.axis == axes.get(home, 0) and (home in axes or not axes):
            found.append(piece)
    return found


def filters_only(model: nn.Module, plan: Plan) -> Plan:
    """Return the plan with every slice passive except the weights that produce a unit: its filters.

    Biases, norms and the weights that read a unit are passive. Papers on filters count and push only these weights.
    """

    def with_filters(group: Group) -> Group:
        filters = {id(s) for s in _producing_slices(model, group) if len(plan.tensors[s.tensor]) > 1}
        return replace(group, slices=tuple(replace(s, passive=s.passive or id(s) not in filters) for s in group.slices))

    return replace(plan, groups=tuple(map(with_filters, plan.groups)))


def out_axis(module: nn.Module) -> int:
    """Return the axis of a layer's weight that belongs to its output."""
    return int(isinstance(module, _ConvTransposeNd | nn.Embedding) or counting_attributes(module).out == "nf")
