"""Loading needs memory for one copy of the weights."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import etp_graph as etp
from etp_graph.checkpoint import WEIGHTS_FILE, read_manifest, read_weights
from tests.support.pruned_toy import trained_toy


class Allocated(TorchDispatchMode):
    """Sum the bytes of all tensors with memory of their own that operators return."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.n_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not out.is_meta and not any(a.alias_info for a in func._schema.returns):
            self.n_bytes += out.untyped_storage().nbytes()
        return out


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 512))


def hollow() -> nn.Module:
    with torch.device("meta"):
        return net()


@pytest.mark.parametrize("build", [net, hollow], ids=["a model with weights", "an architecture without"])
def test_one_copy_of_the_weights_is_made(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = net()
    folder, architecture = etp.save(model, tmp_path / "m"), build()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with Allocated() as allocated:  # the modules that this imports late take memory, too
        loaded = etp.load(folder, build=architecture)
    assert weights <= allocated.n_bytes < 1.05 * weights
    again = build()
    tracemalloc.start()
    etp.load(folder, build=again)
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert python < 0.1 * weights
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_every_tensor_has_memory_of_its_own(tmp_path: Path) -> None:
    """So that a layer that is cut later frees its memory."""
    folder = etp.save(trained_toy(1), tmp_path / "m")
    manifest = read_manifest(folder)
    loaded = read_weights(folder / WEIGHTS_FILE, manifest)
    assert list(loaded) == list(manifest.tensors)
    for tensor in loaded.values():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        assert tensor.is_contiguous()


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.complex64, torch.bool, torch.int8, torch.float8_e4m3fn, torch.uint16]
)
def test_every_element_type_is_read_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).mul(9).abs().to(dtype)
    for name, value in {"some": values, "none": values[:0], "one": values[0, 0].clone()}.items():
        model.register_buffer(name, value)
    other = nn.Linear(2, 2)
    for name, value in model.named_buffers():
        other.register_buffer(name, torch.zeros_like(value))
    etp.load(etp.save(model, tmp_path / "m"), build=other)
    for name, value in model.named_buffers():
        got = other.get_buffer(name)
        assert got.dtype == dtype and got.shape == value.shape
        assert torch.equal(got.contiguous().view(-1).view(torch.uint8), value.contiguous().view(-1).view(torch.uint8))
