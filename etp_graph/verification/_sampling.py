"""Random selections and random weights, for the check of surgery against masking."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import nn

from etp_graph.model import named_tensors
from etp_graph.plan import Group, Plan, Selection


def random_selection(plan: Plan, groups: Sequence[Group], ratio: float, generator: torch.Generator) -> Selection:
    """Choose random units of each group to remove, within its constraints; return the selection.

    On average a share ``ratio`` is removed; at 1, all units that may be removed. Each group gets its own random share,
    so that counts that must be equal across groups are not equal by accident.
    """
    keep = {}
    for group in groups:
        own = ratio * (0.5 + float(torch.rand((), generator=generator, device="cpu")))
        share = 1.0 if ratio >= 1 else min(own, 0.95)
        per_block = group.n_units // group.blocks
        step = group.multiple if group.blocks == 1 else max(group.multiple // group.blocks, 1)
        floor = -(-max(group.min_units, 1) // group.blocks)
        kept = max(per_block - max(round(per_block * share), 1), floor)
        kept = -(-kept // step) * step
        mask = torch.ones(group.blocks, per_block, dtype=torch.bool, device="cpu")
        for block in range(group.blocks):
            drop = torch.randperm(per_block, generator=generator, device="cpu")[: max(per_block - kept, 0)]
            mask[block, drop] = False
        keep[group.name] = mask.flatten()
    return Selection(keep)  # type: ignore[arg-type]


@torch.no_grad()
def randomize_(model: nn.Module, *, seed: int = 0) -> None:
    """Replace weights, biases, norm scales and running statistics by random values, in place.

    Activations keep a moderate scale. Matrices and kernels: normal with variance 1 / fan-in (with a larger variance,
    rounding errors would grow with the depth). Vectors named ``weight``, and tensors named ``running_var`` or
    ``original0``: uniform in [0.5, 1.5]. Everything else: normal with standard deviation 0.2.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in named_tensors(model):
        if not tensor.is_floating_point():
            continue
        if not isinstance(tensor, nn.Parameter) and not name.endswith(("running_mean", "running_var")):
            if tensor.numel() == 1:  # a gate that is zero would hide errors behind it
                tensor.copy_(torch.rand(tensor.shape, generator=generator, device="cpu") + 0.5)
            continue
        if name.endswith(("running_var", "original0")) or (tensor.ndim < 2 and name.endswith("weight")):
            value = torch.rand(tensor.shape, generator=generator, device="cpu") + 0.5
        elif tensor.ndim >= 2 and name.endswith(("weight", "original1", "weight_v")):
            fan_in = max(prod(tensor.shape[1:]), 1)
            value = torch.randn(tensor.shape, generator=generator, device="cpu").mul_((1.0 / fan_in) ** 0.5)
        else:
            value = torch.randn(tensor.shape, generator=generator, device="cpu") * 0.2
        tensor.copy_(value.to(tensor.dtype))
