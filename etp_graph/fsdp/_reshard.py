"""Rebuild sharded models: first the architecture on the meta device, then its values, one tensor at a time.

With these functions, a process holds at most its shards and one whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from etp_graph.checkpoint import DTYPES, Manifest, restore_
from etp_graph.errors import PlanError
from etp_graph.model import all_tensors, is_sharded, local_part, local_ranges, persistent_names
from etp_graph.surgery import Cut

Build = Callable[[], nn.Module]


def on_meta(build: Build) -> nn.Module:
    """Build the architecture on the meta device, without any values.

    Raises:
        PlanError: ``build`` put a parameter on another device.
    """
    with torch.device("meta"):
        model = build()
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            raise PlanError(
                f"build() made {name} on {parameter.device} inside torch.device('meta'): build the architecture from "
                "its configuration, without weights and without naming a device."
            )
    for name, buffer in list(model.named_buffers()):
        _place(model, name, buffer.to("meta"))
    return model


def skeleton(build: Build, manifest: Manifest) -> nn.Module:
    """Build a pruned architecture on the meta device, with the shapes, attributes and record of the manifest."""
    model = on_meta(build)
    shapes = {
        name: torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta")
        for name, info in manifest.tensors.items()
    }
    restore_(model, manifest, shapes)
    return model


@torch.no_grad()
def fill_(model: nn.Module, value: Callable[[str, Tensor], Tensor]) -> None:
    """Give every parameter and buffer of a model on the meta device its value. Tied tensors stay tied.

    Args:
        model: after ``fully_shard``, or before.
        value: called with the name and the tensor on the meta device; returns a tensor of that shape and placement.
    """
    made: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, old in all_tensors(model).items():
        if id(old) not in made:
            new = value(name, old)
            made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        state[name] = made[id(old)]
    stored = persistent_names(model)
    model.load_state_dict({name: state[name] for name in state if name in stored}, assign=True)
    for name in state.keys() - stored:
        _place(model, name, state[name])


def shard_of(whole: Tensor, like: Tensor) -> Tensor:
    """Return a copy of ``whole``, which every process holds as a whole, with the placement of ``like``."""
    if not is_sharded(like):
        return whole.clone()
    assert isinstance(like, DTensor)
    mine = local_part(whole, local_ranges("a tensor", like))
    return _shared(mine.clone(memory_format=torch.contiguous_format), like, whole.shape)


@torch.no_grad()
def cut_shard(old: Tensor, kept: Mapping[int, Tensor], like: Tensor) -> Tensor:
    """Return the kept part of a tensor, with the placement of ``like``. Every process of the mesh must call this.

    The result has its own memory. Each process cuts undivided axes of its own shard. The whole tensor is gathered only
    if a divided axis is cut, or if the placements differ.

    Args:
        old: a DTensor, or a tensor that every process holds as a whole.
        kept: the positions that stay, by axis.
        like: a tensor with the placement of the result.
    """
    old = old.detach()
    if not isinstance(old, DTensor):
        return shard_of(_cut(old, kept), like)
    mesh = old.device_mesh
    divided = {p.dim % old.ndim for d, p in enumerate(old.placements) if p.is_shard() and mesh.size(d) > 1}  # type: ignore
    mine = _cut(local_part(old, local_ranges("a tensor", old)), {a: i for a, i in kept.items() if a not in divided})
    shape = torch.Size(len(kept[a]) if a in kept and a not in divided else n for a, n in enumerate(old.shape))
    outer = {axis: index for axis, index in kept.items() if axis in divided}
    alike = isinstance(like, DTensor) and like.device_mesh == mesh and like.placements == old.placements
    if alike and not outer:
        return _shared(mine if mine.is_contiguous() else mine.contiguous(), old, shape)
    whole = _shared(mine.to(mesh.device_type), old, shape).full_tensor()
    outer = {axis: index.to(whole.device) for axis, index in outer.items()}
    return shard_of(_cut(whole, outer).to(mine.device), like)


def follow(optimizer: Optimizer, old: Mapping[str, Tensor], new: Mapping[str, Tensor], kept: Any) -> dict[str, Any]:
    """Return the optimizer's state for the new parameters, by name. Every process must call this.

    The optimizer is not changed yet.
    """
    found = {}
    for name, parameter in old.items():
        state = optimizer.state.get(parameter)
        if state is not None:
            found[name] = {
                key: cut_shard(value, kept.get(name, {}), new[name])
                if isinstance(value, Tensor) and value.ndim and value.shape == parameter.shape else value
                for key, value in state.items()
            }  # fmt: skip
    return found


def hand_over_(
    optimizer: Optimizer, old: Mapping[str, Tensor], new: Mapping[str, Tensor], states: Mapping[str, Any]
) -> None:
    """Replace the old parameters of the optimizer, and their state, by the new ones."""
    name_of = {id(parameter): name for name, parameter in old.items()}
    for group in optimizer.param_groups:
        group["params"] = [new[name_of[id(p)]] if id(p) in name_of else p for p in group["params"]]
    for name, parameter in old.items():
        optimizer.state.pop(parameter, None)
        if name in states:
            optimizer.state[new[name]] = states[name]


def empty_(model: nn.Module) -> None:
    """Remove the parameters from a model that must not be used any more, so that its use raises an error."""
    for name, _ in list(model.named_parameters(remove_duplicate=False)):
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, None)


def device_of(model: nn.Module) -> torch.device:
    """Return the device on which this process keeps its shards of a model; raise if no parameter is sharded."""
    meshes: list[Any] = [p for p in model.parameters() if is_sharded(p)]
    if not meshes:
        raise PlanError("shard(model) left no parameter sharded: call fully_shard on the model in it.")
    kind = meshes[0].device_mesh.device_type
    return torch.device(kind, torch.accelerator.current_device_index()) if kind != "cpu" else torch.device("cpu")


def _cut(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    return Cut(tensor, dict(kept)).apply(tensor) if kept else tensor.clone()


def _shared(mine: Tensor, like: DTensor, shape: torch.Size) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(mine, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


def _place(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, tensor)
