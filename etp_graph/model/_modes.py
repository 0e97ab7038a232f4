"""Contexts that change how a model runs (eval mode, no dropout, float64) and leave it as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Without Python's cyclic garbage collector, which looks at every object of every library again and again."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


@contextmanager
def eval_mode(model: nn.Module, *, containers: bool = False) -> Iterator[None]:
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
def without_attention_fast_path() -> Iterator[None]:
    """Inside, PyTorch's transformer layers run their Python code instead of one fused operator."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


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


def without_cudnn_recurrence(model: nn.Module) -> AbstractContextManager[None]:
    """Recurrent layers without cuDNN, which knows no backward pass through them in eval mode; PyTorch does."""
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        return torch.backends.cudnn.flags(enabled=False)
    return nullcontext()


class InFloat64(TorchFunctionMode):
    """Inside, code that casts to float32 gets float64: else its rounding hides what a comparison in float64 shows."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wider(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is Tensor.float:
            func = Tensor.double
        return func(*map(wider, args), **{key: wider(value) for key, value in (kwargs or {}).items()})
