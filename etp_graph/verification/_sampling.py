"""Random selections and random weights, for the check of surgery against masking."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

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


def randomize_(model: nn.Module, *, seed: int = 0) -> None:
    """Replace weights, biases, norm scales and running statistics by the values of :class:`RandomValues`, in place."""
    RandomValues(seed).write_(model)


_LARGE = 2**15
"""Number of elements from which a tensor gets its numbers from a store, because drawing them takes long."""

_STORED = 262_147
"""Number of stored numbers, a prime. In a tensor whose sizes are smaller, all slices along an axis therefore differ:
the distance of two of their elements is no multiple of it."""


_STEP = 104_729
"""How far apart the first numbers of two seeds lie in the store."""


class RandomValues:
    """Random values for the tensors of a model, with which activations keep a moderate scale.

    Matrices and kernels: normal with variance 1 / fan-in (with a larger variance, rounding errors would grow with the
    depth). Vectors named ``weight``, and tensors named ``running_var`` or ``original0``: uniform in [0.5, 1.5].
    Everything else: normal with standard deviation 0.2.

    Large tensors are filled from a store of normal numbers, one after the other, which begins anew at its end:
    numbers are copied faster than they are drawn.

    Args:
        seed: seed of the values, which are the same each time until it is set to another one. The store stays.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self._next = seed, 0
        self._stored: Tensor | None = None

    @torch.no_grad()
    def write_(self, model: nn.Module, *, parameters_only: bool = False) -> None:
        """Write the values into a model. With ``parameters_only`` its buffers stay as they are."""
        generator, self._next = torch.Generator().manual_seed(self.seed), self.seed * _STEP % _STORED
        for name, tensor in model.named_parameters() if parameters_only else named_tensors(model):
            if not tensor.is_floating_point():
                continue
            if not isinstance(tensor, nn.Parameter) and not name.endswith(("running_mean", "running_var")):
                if tensor.numel() == 1:  # a gate that is zero would hide errors behind it
                    tensor.copy_(torch.rand(tensor.shape, generator=generator, device="cpu") + 0.5)
                continue
            if name.endswith(("running_var", "original0")) or (tensor.ndim < 2 and name.endswith("weight")):
                tensor.copy_(torch.rand(tensor.shape, generator=generator, device="cpu") + 0.5)
                continue
            scaled = tensor.ndim >= 2 and name.endswith(("weight", "original1", "weight_v"))
            scale = (1.0 / max(prod(tensor.shape[1:]), 1)) ** 0.5 if scaled else 0.2
            if tensor.numel() >= _LARGE and max(tensor.shape) < _STORED:
                self._write_stored_(tensor, scale)
            else:
                tensor.copy_(torch.randn(tensor.shape, generator=generator, device="cpu").mul_(scale))

    def _write_stored_(self, tensor: Tensor, scale: float) -> None:
        if self._stored is None:
            self._stored = torch.randn(_STORED, generator=torch.Generator().manual_seed(0), device="cpu")
        in_place = tensor.is_contiguous() and tensor.device.type == "cpu"
        out = tensor.detach() if in_place else torch.empty(tensor.shape, device="cpu")
        flat, done = out.view(-1), 0
        while done < len(flat):
            length = min(len(flat) - done, _STORED - self._next)
            torch.mul(self._stored.narrow(0, self._next, length), scale, out=flat.narrow(0, done, length))
            done, self._next = done + length, (self._next + length) % _STORED
        if not in_place:
            tensor.copy_(out)
