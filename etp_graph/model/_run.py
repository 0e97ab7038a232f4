"""Run a model on example inputs in a known mode, and restore its state afterwards."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from etp_graph.errors import PlanError

from ._undone import removing_hooks


def run_model(model: nn.Module, example_inputs: Any) -> Any:
    """Return the model's output. A mapping is passed as keyword arguments, a tuple or list as positional arguments.

    Raises:
        PlanError: the modules are nested too deeply for Python's stack. Hooks take one more call on each level, so
            that the model may run without them.
    """
    try:
        if isinstance(example_inputs, Mapping):
            return model(**example_inputs)
        if isinstance(example_inputs, (tuple, list)):
            return model(*example_inputs)
        return model(example_inputs)
    except RecursionError as error:
        depth = 1 + max(name.count(".") for name, _ in model.named_modules())
        raise PlanError(
            f"the forward calls itself or nests its modules too deeply ({depth} levels) for Python's limit of "
            f"{sys.getrecursionlimit()} calls: raise it before (sys.setrecursionlimit({10 * depth + 1000}))."
        ) from error


def tensors_of(out: Any) -> list[Tensor]:
    """Return all tensors in an output, also inside tuples, dicts, dataclasses and objects with attributes."""
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
    """Return the inputs with tensors on the device of ``like``, and floating-point tensors in its dtype."""

    def cast(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().to(like.device, like.dtype if value.is_floating_point() else value.dtype)

    return tree_map(cast, example_inputs)


class ModuleStack:
    """Stack of the modules whose forward is running, while a model is watched.

    Hooks are put on the modules of one model only: hooks on all modules of the process would also see the forwards of
    other threads. They run before the hooks of the user, whose order stays.

    Args:
        model: the model whose modules are seen.

    Attributes:
        modules: the modules, outermost first.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules: list[nn.Module] = []
        self._model = model

    @contextmanager
    def watching(self) -> Iterator[ModuleStack]:
        """Keep :attr:`modules` up to date inside this context."""
        self.modules.clear()
        with removing_hooks() as handles:
            for module in self._model.modules():
                handles.append(module.register_forward_pre_hook(self._enter_module, prepend=True))
                handles.append(module.register_forward_hook(self._leave_module, prepend=True, always_call=True))
            yield self

    def _enter_module(self, module: nn.Module, args: object) -> None:
        self.modules.append(module)

    def _leave_module(self, module: nn.Module, *rest: object) -> None:
        """Remove the module and what it called: the hook is not called for modules that are left by an exception."""
        if module in self.modules:
            while self.modules.pop() is not module:
                pass
