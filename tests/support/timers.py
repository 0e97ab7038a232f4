"""Clocks that are formulas, for tests of everything that is decided by time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from etp_graph.model import eval_mode, run_model


def macs_of(model: nn.Module, inputs: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad(), eval_mode(model):
        run_model(model, inputs)
    return counter.get_total_flops() // 2


@dataclass
class Formula:
    """A layer takes ``layer_seconds(sizes)``, a model ``model_seconds(its MACs)``; notes what it was asked."""

    model_seconds: Callable[[float], float] = lambda macs: 1e-9 * macs
    layer_seconds: Callable[[tuple[int, ...]], float] = lambda sizes: 1e-6 * sizes[0] * sizes[1]
    asked: list[tuple[int, ...]] = field(default_factory=list)
    measured: list[list[float]] = field(default_factory=list)

    def models(self, models: Sequence[nn.Module], example_inputs: Any) -> list[float]:
        self.measured.append([self.model_seconds(macs_of(model, example_inputs)) for model in models])
        return self.measured[-1]

    def layer(self, work: Any, sizes: tuple[int, ...]) -> float:
        self.asked.append(sizes)
        return self.layer_seconds(sizes)
