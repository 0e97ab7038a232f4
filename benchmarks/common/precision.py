"""Choose the precision of training steps: bfloat16 only on a processor that computes in it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]

_EMULATED = ("DEFAULT", "AVX2")
"""Instruction sets of a CPU on which PyTorch emulates bfloat16, which is many times as slow as float32."""


def precision_here(wanted: Precision, device: str) -> Precision:
    """The precision in which a training step runs on this type of device: ``fp32`` where bfloat16 is emulated."""
    emulated = device == "cpu" and torch.backends.cpu.get_cpu_capability() in _EMULATED
    return "fp32" if emulated else wanted


def autocast(wanted: Precision, device: str) -> AbstractContextManager[object]:
    """The context of a forward pass in training; weights stay in float32."""
    half = precision_here(wanted, device) == "bf16"
    return torch.autocast(device, dtype=torch.bfloat16) if half else nullcontext()
