"""Count the multiply-adds of a network alike for all methods."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import etp_graph as etp
from benchmarks.tasks.base import Task
from etp_graph.model import run_model


def flops(model: nn.Module, example: Any) -> int:
    """Multiply-adds of all matrix products and convolutions, as PyTorch's own counter sees them."""
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run_model(model, example)
    return int(counter.get_total_flops()) // 2


class Counter:
    """Counts MACs. PyTorch's counter, which trusts neither library, where it counts all of the dense network.

    It knows no recurrent layers and no message passing. Where it disagrees with :func:`etp_graph.cost`
    on the dense network, all networks of the task are counted by the latter.
    """

    def __init__(self, task: Task, dense: nn.Module, plan: etp.Plan) -> None:
        self.task = task
        self.example = task.example()
        self.neutral = flops(dense, self.example) == etp.cost(dense, plan).macs

    @property
    def by(self) -> str:
        """What counts."""
        return "torch.utils.flop_counter" if self.neutral else "etp_graph.cost"

    def __call__(self, model: nn.Module) -> int:
        """MACs of one forward with the example inputs."""
        if self.neutral:
            return flops(model, self.example)
        model.eval()
        return etp.cost(model, etp.trace(model, self.example, prune="all", check=False)).macs
