"""Names of parameters and buffers, tied names, persistent names."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

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
    modules = list(model.modules())
    values = [value for module in modules for value in vars(module).values()]
    values += [item for value in values if isinstance(value, list) for item in value]
    computed = [value for value in values if isinstance(value, Tensor) and not value.is_leaf]
    memo: dict[int, object] = {id(tensor): tensor.detach().clone() for tensor in computed}
    tensors = [tensor for _, tensor in named_tensors(model)]
    memo |= {id(buffer): buffer.clone() for buffer in _plain_buffers(tensors, values)}
    if share:
        memo |= {id(p): _on_same_memory(p) for p in tensors if type(p) is nn.Parameter}
    for module in reversed(modules):
        _copy_module(module, memo)
    found = memo[id(model)]
    assert isinstance(found, nn.Module)
    return found


_OWN_WAYS = frozenset(
    "__deepcopy__ __getstate__ __setstate__ __reduce__ __reduce_ex__ __getnewargs__ __getnewargs_ex__ __slots__ "
    "__new__".split()
)
"""What a class defines if it is copied in a way of its own."""

_CONSTANT = frozenset((type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size))


_USUAL = (object, nn.Module, nn.modules.conv._ConvNd)
"""Classes whose own ways come to the same. That of convolutions adds an attribute that old files lack."""

_HELD = frozenset(("_parameters", "_buffers", "_modules"))
"""Attributes in which a module holds its tensors and submodules by name."""


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
        elif name in _HELD and all(inner is None or id(inner) in memo for inner in value.values()):
            held = memo[id(value)] = kind((key, memo.get(id(inner))) for key, inner in value.items())
        else:
            held = copy.deepcopy(value, memo)
        new.__dict__[name] = held
    memo.setdefault(id(memo), []).append(module)  # type: ignore[attr-defined]  # as deepcopy keeps it alive


def _plain_buffers(tensors: Sequence[Tensor], others: Iterable[object]) -> Iterator[Tensor]:
    """Yield the buffers that a clone copies as ``copy.deepcopy`` does, but faster.

    They share their memory with no other tensor of the model, fill it, and have no attributes.

    Args:
        tensors: parameters and buffers of the model.
        others: values that its modules hold as plain attributes.
    """
    known = [*tensors, *(value for value in others if isinstance(value, Tensor))]
    plain = [tensor for tensor in known if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided]
    holders = Counter(tensor.untyped_storage()._cdata for tensor in plain)
    for tensor in tensors:
        if type(tensor) is not Tensor or tensor.layout != torch.strided:
            continue
        storage = tensor.untyped_storage()
        alone = holders[storage._cdata] == 1 and storage.nbytes() == tensor.nbytes
        if alone and not (tensor.requires_grad or tensor.is_inference() or tensor.__dict__):
            yield tensor


def _is_copied_as_usual(cls: type[nn.Module]) -> bool:
    return all(_OWN_WAYS.isdisjoint(vars(base)) for base in cls.__mro__ if base not in _USUAL)


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
