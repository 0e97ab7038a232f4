"""Weights that read the units of a watch point: what a change of an activation does to the next layer."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor, nn

from etp_graph.collect import PackedPoint, Statistic, WatchPoint, out_axis

_ROWS = 512
"""Positions whose weights are copied at once."""


class ReadingStatistic(Statistic):
    """Base class of statistics that join activations with the weights of the layer that reads them."""

    _module: nn.Module

    def begin(self, module: nn.Module) -> None:
        """See :class:`Statistic`."""
        self._module = module

    @property
    def columns(self) -> Tensor:
        """Weights that read each position, [positions, outputs]; kernel positions count as outputs.

        At the output of a layer, where no reader is known, it is 1 for each position. It is computed when it is read,
        because it may be as large as the weights.
        """
        return reading_columns(self.site, self._module)

    def column_sums(self, power: int) -> Tensor:
        """Return ``Σ_i |W_ij|^power`` over the outputs i, float64 [positions]."""
        parts = (part.double().abs().pow(power).sum(1) for part in self.columns.split(_ROWS))  # to save memory
        return torch.cat(list(parts))

    def summed(self, values: Tensor) -> Tensor:
        """Return the sum over the positions of each unit: [positions] -> [units]."""
        local = self.site.local.to(values.device)
        return values.new_zeros(len(self.site.units)).index_add(0, local, values)


@torch.no_grad()
def reading_columns(site: WatchPoint, module: nn.Module) -> Tensor:
    """Return the weights of a layer that read each position of a site, [positions, outputs]."""
    if isinstance(site, PackedPoint):  # one expert reads, so that squares are means over the experts
        packed: Tensor = getattr(module, site.parameter).detach()
        by_neuron: Tensor = packed.movedim(site.axis, 0).flatten(1)[site.index.to(packed.device)]
        return by_neuron / sqrt(len(packed))
    weight: Tensor | None = getattr(module, "weight", None)
    if site.side == "output" or not isinstance(weight, Tensor) or weight.ndim < 2:
        return torch.ones(len(site.index), 1, dtype=torch.float64, device="cpu")
    by_input = weight.detach().movedim(1 - out_axis(module), 0).flatten(1)
    if by_input.shape[0] <= int(site.index.max()):  # a grouped convolution; each group reads its own inputs
        return _grouped_columns(site, module, weight.detach())
    return by_input[site.index.to(weight.device)]


def _grouped_columns(site: WatchPoint, module: nn.Module, weight: Tensor) -> Tensor:
    groups = int(module.groups)  # type: ignore[arg-type]
    split = weight.unflatten(0, (groups, -1))  # [groups, outputs, inputs of a group, *kernel]
    by_input: Tensor = split.movedim(2, 1).flatten(0, 1).flatten(1)
    return by_input[site.index.to(weight.device)]
