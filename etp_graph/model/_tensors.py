"""Names of parameters and buffers, tied names, persistent names."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping

import torch
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


def copy_model(model: nn.Module, *, share: bool = False) -> nn.Module:
    """Copy a model. Weights that each forward computes anew (by hooks) are copied without their graph.

    With ``share=True`` the parameters are new objects on the same memory, for a copy whose parameters get other values
    by ``.data = ...`` only, as surgery does it. Buffers are copied, because a forward may write them.

    ``copy.deepcopy`` refuses tensors with a graph. It calls itself about eight times for each level of nested modules,
    so inner modules are copied before those that hold them: models of many levels would exceed Python's stack.
    """
    values = [value for module in model.modules() for value in vars(module).values()]
    values += [item for value in values if isinstance(value, list) for item in value]
    computed = [value for value in values if isinstance(value, Tensor) and not value.is_leaf]
    memo: dict[int, object] = {id(tensor): tensor.detach().clone() for tensor in computed}
    if share:
        memo |= {id(p): _on_same_memory(p) for p in model.parameters() if type(p) is nn.Parameter}
    for module in reversed(list(model.modules())):
        _copy_module(module, memo)
    found = memo[id(model)]
    assert isinstance(found, nn.Module)
    return found


_OWN_WAYS = frozenset(
    "__deepcopy__ __getstate__ __setstate__ __reduce__ __reduce_ex__ __getnewargs__ __getnewargs_ex__ __slots__ "
    "__new__".split()
)
"""What a class defines if it is copied in a way of its own."""

_CONSTANT = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


def _copy_module(module: nn.Module, memo: dict[int, object]) -> None:
    """Copy a module whose submodules are copied already, as ``copy.deepcopy`` does but without its detours.

    Most attributes of a module are numbers and empty dictionaries of hooks. That makes a copy several times as fast.
    """
    if id(module) in memo:
        return
    if not _is_copied_as_usual(type(module)):
        copy.deepcopy(module, memo)
        return
    new = type(module).__new__(type(module))
    memo[id(module)] = new
    for name, value in vars(module).items():
        kind = type(value)
        if kind in _CONSTANT:
            held: object = value
        elif kind in (dict, OrderedDict, set, list) and not value:
            held = memo[id(value)] = kind()
        else:
            held = copy.deepcopy(value, memo)
        new.__dict__[name] = held
    memo.setdefault(id(memo), []).append(module)  # type: ignore[attr-defined]  # as deepcopy keeps it alive


def _is_copied_as_usual(cls: type[nn.Module]) -> bool:
    return all(_OWN_WAYS.isdisjoint(vars(base)) for base in cls.__mro__ if base not in (object, nn.Module))


def _on_same_memory(parameter: nn.Parameter) -> nn.Parameter:
    found = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    found.__dict__.update(parameter.__dict__)
    return found


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
