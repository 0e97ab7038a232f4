"""Copy the parameters and buffers of a model, and compare two copies bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from etp_graph.model import named_tensors


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every parameter and buffer by name."""
    return {name: tensor.detach().clone() for name, tensor in named_tensors(model)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Return whether two states have the same names and equal values; values on the meta device are not compared."""
    return a.keys() == b.keys() and all(a[k].is_meta or torch.equal(a[k], b[k]) for k in a)
