"""Masks on single weights, as in Zhu & Gupta 2017, through :mod:`torch.nn.utils.prune`."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import prune


class Masks:
    """Masks of :mod:`torch.nn.utils.prune` on every weight matrix, each with the same share of zeros.

    Biases stay whole. A weight that is masked stays masked.
    """

    def __init__(self, model: nn.Module) -> None:
        self.weights = [
            (module, name)
            for module in model.modules()
            for name, parameter in list(module.named_parameters(recurse=False))
            if parameter.dim() > 1
        ]
        for module, name in self.weights:
            prune.identity(module, name)  # the optimizer has to be made for the parameters behind the masks

    def raise_to(self, share: float) -> None:
        """Mask the smallest weights until ``share`` of each matrix is zero."""
        for module, name in self.weights:
            mask = getattr(module, f"{name}_mask")
            more = round(share * mask.numel()) - int((mask == 0).sum())
            if more > 0:
                # The attribute without a suffix is that of the last forward: the optimizer has taken a step since.
                now = getattr(module, f"{name}_orig").detach()
                prune.l1_unstructured(module, name, amount=more, importance_scores=now)

    def remove(self) -> None:
        """Write the zeros into the weights, and leave an ordinary network."""
        for module, name in self.weights:
            prune.remove(module, name)


def target(model: nn.Module, sparsity: float) -> int:
    """Nonzero parameters of the network with masks; the others are cut to the same number."""
    return sum(p.numel() - (round(sparsity * p.numel()) if p.dim() > 1 else 0) for p in model.parameters())
