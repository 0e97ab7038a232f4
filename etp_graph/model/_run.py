"""Run a model on example inputs, in a known mode, and leave it as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle


def run_model(model: nn.Module, example_inputs: Any) -> Any:
    """The model's output: a mapping goes in as keyword arguments, a tuple or list as positional ones."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


def tensors_of(out: Any) -> list[Tensor]:
    """All tensors in an output, whatever holds them: tuples, dicts, dataclasses, objects with attributes."""
    found: list[Tensor] = []
    waiting, seen = [out], {id(out)}
    while waiting:
        inside: list[Any] = []
        for leaf in tree_leaves(waiting.pop(0)):
            if isinstance(leaf, Tensor):
                found.append(leaf)
            elif isinstance(leaf, Mapping):
                inside += leaf.values()
            elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
                inside += [getattr(leaf, f.name) for f in dataclasses.fields(leaf)]
            elif not isinstance(leaf, (type, nn.Module)):
                inside += getattr(leaf, "__dict__", {}).values()
        waiting += [value for value in inside if id(value) not in seen]
        seen |= {id(value) for value in inside}
    return found


def convert_inputs(example_inputs: Any, *, like: Tensor) -> Any:
    """Floating-point tensors of the inputs in the dtype and on the device of ``like``."""

    def cast(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().to(like.device, like.dtype if value.is_floating_point() else value.dtype)

    return tree_map(cast, example_inputs)


class ModuleStack:
    """Inside this context :attr:`modules` is the stack of modules whose forward is running, outermost first."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self._handles: tuple[RemovableHandle, ...] = ()

    def __enter__(self) -> ModuleStack:
        self._handles = (
            register_module_forward_pre_hook(lambda module, _: self.modules.append(module)),
            register_module_forward_hook(lambda *_: self._leave(), always_call=True),
        )
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self.modules.clear()

    def _leave(self) -> None:
        if self.modules:
            self.modules.pop()
