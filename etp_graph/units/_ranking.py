"""Runs of consecutive units that are ranked together, and statistics within each run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etp_graph.plan import Plan


@dataclass(frozen=True, slots=True, eq=False)
class Rankings:
    """Runs of consecutive units that are ranked together.

    A run is a group or, in a group whose blocks must keep equal numbers of units, one block.

    Attributes:
        number: number of the run of each unit, int64 [n_units].
        start: flat number of the first unit of that run, int64 [n_units].
        size: number of units in that run, int64 [n_units].
    """

    number: Tensor
    start: Tensor
    size: Tensor

    @classmethod
    def of(cls, plan: Plan, device: torch.device | str = "cpu") -> Rankings:
        """Return the runs of a plan, with their tensors on ``device``."""
        sizes = torch.tensor(
            [g.n_units // g.blocks for g in plan.groups for _ in range(g.blocks)], dtype=torch.int64, device="cpu"
        )
        starts = sizes.cumsum(0) - sizes
        number = torch.arange(len(sizes), device="cpu").repeat_interleave(sizes)
        return cls(number.to(device), starts[number].to(device), sizes[number].to(device))

    def rank(self, key: Tensor) -> Tensor:
        """Rank the units of each run by ascending ``key`` [n_units], equal keys by position: int64 [n_units]."""
        order = key.argsort(stable=True)
        order = order[self.number[order].argsort(stable=True)]
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device)
        return rank - self.start

    def distance(self, rank: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the distance from the pivot (the unit of rank 0): |ρ_u − ρ_p| / max distance, in [0, 1], [n_units]."""
        return rank.to(dtype) / (self.size - 1).clamp_min(1).to(dtype)

    def relative(self, values: Tensor) -> Tensor:
        """Return (I_u − I_min)/(I_max − I_min) within each run, [n_units]; 1 if all values of a run are equal."""
        low, high = self._extreme_of_run(values, "amin"), self._extreme_of_run(values, "amax")
        spread = high - low
        return torch.where(spread > 0, (values - low) / spread.clamp_min(torch.finfo(values.dtype).tiny), 1.0)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of ``values`` [n_units] over the run of each unit, [n_units]; 1 if the mean is zero."""
        found = torch.zeros_like(values).scatter_reduce_(0, self.number, values, reduce="mean", include_self=False)
        return torch.where(found > 0, found, 1.0)[self.number]

    def raise_zeros(self, values: Tensor) -> Tensor:
        """Replace zeros in ``values`` [n_units] by the smallest positive value of their run, or 1 if there is none."""
        low = self._extreme_of_run(values.masked_fill(values <= 0, float("inf")), "amin")
        return torch.where(values > 0, values, torch.where(low.isinf(), 1.0, low))

    def _extreme_of_run(self, values: Tensor, reduce: str) -> Tensor:
        found = torch.zeros_like(values)
        found.scatter_reduce_(0, self.number, values, reduce=reduce, include_self=False)
        return found[self.number]
