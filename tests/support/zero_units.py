"""Set the units that a selection removes to zero, for tests of what surgery of zero units changes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from etp_graph.model import named_tensors
from etp_graph.plan import Plan, Positions, with_no_unit


@torch.no_grad()
def zero_units_(model: nn.Module, plan: Plan, keep: Tensor) -> None:
    """Set every slice of every unit that is not kept to zero, buffers included; ``keep`` bool [n_units]."""
    tensors = dict(named_tensors(model))
    full = with_no_unit(keep.cpu(), True)
    for name, parts in Positions(plan).axes.items():
        tensor = tensors[name]
        for axis in parts:
            gone = (~axis.kept_positions(full)).nonzero().flatten().to(tensor.device)
            tensor.index_fill_(axis.axis, gone, 0)
