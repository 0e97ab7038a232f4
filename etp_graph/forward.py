"""Run a model on example inputs, in a known mode, and leave it as it was."""

from __future__ import annotations

import dataclasses
import gc
import random
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle


def run(model: nn.Module, example_inputs: Any) -> Any:
    """The model's output: a mapping goes in as keyword arguments, a tuple or list as positional ones."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


def outputs(out: Any) -> list[Tensor]:
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


def convert(example_inputs: Any, *, like: Tensor) -> Any:
    """Floating-point tensors of the inputs in the dtype and on the device of ``like``."""

    def cast(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().to(like.device, like.dtype if value.is_floating_point() else value.dtype)

    return tree_map(cast, example_inputs)


@contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's cyclic garbage collector, which looks at every object of every library again and again."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


@contextmanager
def evaluating(model: nn.Module, *, containers: bool = False) -> Iterator[None]:
    """Eval mode inside, every module's own mode again afterwards.

    With ``containers`` those modules that have submodules are in training mode: auxiliary heads run, while norms
    (all that own buffers), dropout and stochastic depth, which are leaves, stay in eval mode.
    """
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = containers and any(True for _ in module.children()) and not module._buffers
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def preserved_rng(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """All random generators of PyTorch (CPU, the model's devices), NumPy and Python are afterwards what they were."""
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda), _others(seed):
        if seed is not None:
            # Not torch.manual_seed: it would reseed, or schedule the seed of, devices that are none of ours.
            torch.default_generator.manual_seed(seed)
            for index in cuda:
                torch.cuda.default_generators[index].manual_seed(seed)
        yield


@contextmanager
def slow_path() -> Iterator[None]:
    """Inside, PyTorch's transformer layers run their Python code instead of one fused operator."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _others(seed: int | None) -> Iterator[None]:
    numpy, python = np.random.get_state(), random.getstate()  # noqa: NPY002 - the global one is what models use
    try:
        if seed is not None:
            np.random.seed(seed)  # noqa: NPY002
            random.seed(seed)
        yield
    finally:
        np.random.set_state(numpy)  # noqa: NPY002
        random.setstate(python)


_DROPOUT = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}


class WithoutDropout(TorchFunctionMode):
    """Functional dropout is the identity: two networks of different widths cannot draw the same mask."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DROPOUT:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            args, kwargs = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args, dict(kwargs or {})
            kwargs.pop("dropout_p", None)
        return func(*args, **(kwargs or {}))


def native_recurrence(model: nn.Module) -> AbstractContextManager[None]:
    """Recurrent layers without cuDNN, which knows no backward pass through them in eval mode; PyTorch does."""
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        return torch.backends.cudnn.flags(enabled=False)
    return nullcontext()


class Wide(TorchFunctionMode):
    """Inside, code that casts to float32 gets float64: else its rounding hides what a comparison in float64 shows."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wider(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is Tensor.float:
            func = Tensor.double
        return func(*map(wider, args), **{key: wider(value) for key, value in (kwargs or {}).items()})


class Running:
    """Inside this context :attr:`modules` is the stack of modules whose forward is running, outermost first."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self._handles: tuple[RemovableHandle, ...] = ()

    def __enter__(self) -> Running:
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
