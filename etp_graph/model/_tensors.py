"""Names of parameters and buffers, tied names, persistent names."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable, Iterator, Mapping

from torch import Tensor, nn

from ._shards import is_sharded


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer once, with its first name; parameters come first."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name. A tied tensor appears under each of its names."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return found | dict(model.named_buffers(remove_duplicate=False))


def copy_model(model: nn.Module) -> nn.Module:
    """Copy a model. Weights that each forward computes anew (by hooks) are copied without their graph.

    ``copy.deepcopy`` refuses tensors with a graph. It calls itself about eight times for each level of nested modules,
    so inner modules are copied before those that hold them: models of many levels would exceed Python's stack.
    """
    values = [value for module in model.modules() for value in vars(module).values()]
    values += [item for value in values if isinstance(value, list) for item in value]
    computed = [value for value in values if isinstance(value, Tensor) and not value.is_leaf]
    memo: dict[int, object] = {id(tensor): tensor.detach().clone() for tensor in computed}
    for module in reversed(list(model.modules())):
        copy.deepcopy(module, memo)
    return copy.deepcopy(model, memo)


def persistent_names(model: nn.Module) -> set[str]:
    """Return the names of all parameters and persistent buffers."""
    volatile = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }
    return all_tensors(model).keys() - volatile


def first_names(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, str]:
    """Map each name to the first name of the same tensor: the same object, or one with the same memory and layout."""
    first: dict[Hashable, str] = {}
    return {name: first.setdefault(_identity(tensors[name]), name) for name in names}


def _identity(tensor: Tensor) -> Hashable:
    if is_sharded(tensor) or tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()
