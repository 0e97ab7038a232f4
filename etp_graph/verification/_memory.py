"""Memory that a check may use, and inputs with values for models without."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


def available_memory(device: str) -> int | None:
    """Return the bytes that are free on a type of device; ``None`` if the system does not tell."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    try:
        with Path("/proc/meminfo").open() as lines:
            found = next((line for line in lines if line.startswith("MemAvailable")), None)
        if found is not None:
            return int(found.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def real_inputs(example_inputs: Any) -> Any:
    """Return the inputs, with values for tensors on the meta device: random numbers, and 1 for integers."""

    def fill(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_meta:
            return value
        if value.is_floating_point():
            generator = torch.Generator().manual_seed(0)
            return torch.randn(value.shape, generator=generator, dtype=value.dtype, device="cpu")
        return torch.ones(value.shape, dtype=value.dtype, device="cpu")

    return tree_map(fill, example_inputs)
