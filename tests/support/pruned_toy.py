"""Networks cut by hand, and what must be equal after they were saved and loaded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from etp_graph.surgery import Edit, SurgeryRecord, get_record, set_record, write_attribute
from tests.support.models.toy import Toy

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def cut_(model: nn.Module, sizes: dict[str, tuple[int, ...]], edits: dict[str, int]) -> nn.Module:
    """Surgery by hand: keep the first entries of the named tensors, write the named integers, extend the record."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, size in sizes.items():
        tensors[name].data = tensors[name].data[tuple(slice(n) for n in size)].clone()
    old = get_record(model)
    written = {(e.module, e.name, e.item): e for e in old.edits}
    for path, value in edits.items():
        module, _, name = path.rpartition(".")
        edit = Edit(module=module, name=name, item=None, value=value)
        write_attribute(model, edit)
        written[module, name, None] = edit
    fingerprint = hashlib.sha256(str(sizes).encode()).hexdigest()
    record = SurgeryRecord(
        fingerprints=(*old.fingerprints, fingerprint),
        selections=(*old.selections, json.dumps({"conv1": [8, [1, 7]], "conv2": [6, [5]]})),
        edits=tuple(written.values()),
        tensors=tuple(dict.fromkeys((*old.tensors, *sizes))),
    )
    set_record(model, record)
    return model


def cut_toy_(model: nn.Module, first: int, second: int) -> nn.Module:
    """One round: keep ``first`` channels of conv1 and ``second`` of conv2."""
    norm = {f"norm.{n}": (first,) for n in ("weight", "bias", "running_mean", "running_var")}
    return cut_(
        model,
        {"conv1.weight": (first,), **norm, "conv2.weight": (second, first), "conv2.bias": (second,),
         "linear.weight": (5, 4 * second)},
        {"conv1.out_channels": first, "norm.num_features": first, "conv2.in_channels": first,
         "conv2.out_channels": second, "linear.in_features": 4 * second},
    )  # fmt: skip


def trained_toy(rounds: int = 1) -> nn.Module:
    """A Toy with random weights and running statistics after so many rounds of surgery."""
    torch.manual_seed(rounds)
    model = Toy()
    for i in range(rounds):
        model(X)
        cut_toy_(model, 7 - i, 5 - i)
    model(X)
    return model.eval()


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def state(model: nn.Module) -> dict[str, Any]:
    """All that a load may change: tensors with their objects and layout, integers of modules, the record."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    found: dict[str, Any] = {n: (id(t), tuple(t.shape), t.stride(), t.dtype, bits(t)) for n, t in tensors.items()}
    for name, module in model.named_modules():
        found |= {f"{name}:{k}": v for k, v in vars(module).items() if isinstance(v, int | tuple | SurgeryRecord)}
    return found


def values(model: nn.Module) -> dict[str, Any]:
    """:func:`state` without what a copy of a model cannot share."""
    return {k: (v[1], v[3], v[4]) if ":" not in k else v for k, v in state(model).items() if k != ":training"}


def assert_same(loaded: nn.Module, saved: nn.Module) -> None:
    have, want = values(loaded), values(saved)
    assert {k: v for k, v in have.items() if not k.endswith(":training")} == {
        k: v for k, v in want.items() if not k.endswith(":training")
    }
    assert get_record(loaded) == get_record(saved)


def names(folder: Path) -> list[str]:
    """What a folder holds."""
    return sorted(file.name for file in folder.iterdir())
