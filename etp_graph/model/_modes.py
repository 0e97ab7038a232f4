"""Contexts that change how a model runs (eval mode, no dropout, float64) and leave it as it was."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode, TorchFunctionMode

from ._undone import undone


class _Collector:
    """Python's cyclic garbage collector, switched off while any thread needs it off.

    It belongs to the process. Each thread on its own would see it switched off by another one, and leave it off.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = set[object]()
        self._was_on = False

    def switch_off(self, user: object) -> None:
        """Switch the collector off, and note whether it was on before the first user came."""
        with self._lock:
            if not self._users:
                self._was_on = gc.isenabled()
            self._users.add(user)
            gc.disable()

    def release(self, user: object) -> None:
        """Switch the collector on again if this was the last user. A second call does nothing new."""
        with self._lock:
            if self._users == {user} and self._was_on:
                gc.enable()
            self._users.discard(user)


_COLLECTOR = _Collector()


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Disable Python's cyclic garbage collector until the last thread has left this context.

    Each collection scans the objects of all imported libraries. Without it a trace of ResNet-50 takes about 20 % less
    time. Memory is freed as before by counting references; only circles wait until the collector is on again.
    """
    user = object()
    with undone(lambda: _COLLECTOR.release(user)):
        _COLLECTOR.switch_off(user)
        yield


@contextmanager
def eval_mode(model: nn.Module, *, containers: bool = False) -> Iterator[None]:
    """Set eval mode inside this context, and restore the mode of each module afterwards.

    If ``containers`` is True, modules with submodules and without buffers are in training mode, so that auxiliary heads
    run. Norms, dropout and stochastic depth stay in eval mode.
    """
    before = [(module, module.training) for module in model.modules()]

    def restore() -> None:
        for module, training in before:
            if module.training is not training:
                module.training = training

    with undone(restore):
        for module, training in before:
            wanted = containers and any(True for _ in module.children()) and not module._buffers
            if training is not wanted:
                module.training = wanted
        yield


def without_attention_fast_path() -> TorchFunctionMode:
    """Return a context in which PyTorch's transformer layers run their Python code instead of one fused operator.

    They do so under any function mode. The mode belongs to its thread; the flag in ``torch.backends.mha`` belongs to
    the process, and stays off for good if the contexts of two threads overlap.
    """
    return BaseTorchFunctionMode()


@contextmanager
def without_autocast() -> Iterator[None]:
    """Turn off autocast inside: it changes dtypes, and keeps the casts of weights that were made without gradients."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda", "xpu", "mps"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


_DROPOUT = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}

_VF: Any = torch._C._VariableFunctions

_RECURRENT = {_VF.lstm, _VF.gru, _VF.rnn_tanh, _VF.rnn_relu}


class WithoutDropout(TorchFunctionMode):
    """Mode in which functional dropout is the identity. Networks of different widths cannot draw the same mask."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DROPOUT:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            args, kwargs = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args, dict(kwargs or {})
            kwargs.pop("dropout_p", None)
        if func in _RECURRENT:
            args = without_recurrent_dropout(args)
        return func(*args, **(kwargs or {}))


def without_recurrent_dropout(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of a recurrent function with dropout 0 and, on CUDA, in training mode.

    Args:
        args: input, states, weights, has_biases, num_layers, dropout, train, bidirectional; further ones before or
            after these, for packed sequences or batch_first.
    """
    at = next(i for i, value in enumerate(args) if isinstance(value, bool)) + 2
    return (*args[:at], 0.0, args[at + 1] or args[0].device.type == "cuda", *args[at + 2 :])


_NUMBERS = {torch.tensor, torch.full, torch.zeros, torch.ones, torch.arange, torch.linspace, torch.eye}
"""Functions that make float32 from numbers of Python, if no dtype is given."""


class InFloat64(TorchFunctionMode):
    """Mode in which casts to float32 give float64, because rounding to float32 would spoil a comparison in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.float:
            func = Tensor.double
        if getattr(func, "__name__", "") in ("grouped_mm", "_grouped_mm"):
            return _grouped_product(func, args, kwargs)
        if func in _NUMBERS and kwargs.get("dtype") is None:
            return self._numbers(func, args, kwargs)
        own = str(getattr(func, "__module__", "")).startswith("etp_graph.")  # it calls code of the model
        args = [self._wider(value, own) for value in args]
        return func(*args, **{key: self._wider(value, own) for key, value in kwargs.items()})

    @staticmethod
    def _wider(value: Any, own: bool) -> Any:
        if own and isinstance(value, FunctionType | MethodType):
            return lambda *args, **kwargs: _run_inside(InFloat64(), value, args, kwargs)
        return torch.float64 if value is torch.float32 else value

    @staticmethod
    def _numbers(func: Any, args: Any, kwargs: Any) -> Tensor:
        try:
            found: Tensor = func(*args, **kwargs)
        except RuntimeError:  # the smallest number of float64, as a mask
            return func(*args, **{**kwargs, "dtype": torch.float64})  # type: ignore[no-any-return]
        if found.dtype is not torch.float32 or any(isinstance(value, Tensor) for value in args):
            return found
        return func(*args, **{**kwargs, "dtype": torch.float64})  # type: ignore[no-any-return]


def _run_inside(mode: TorchFunctionMode, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a function inside a mode, which is off while a call that it handles runs."""
    with mode:
        return func(*args, **kwargs)


def _grouped_product(func: Any, args: Any, kwargs: Any) -> Any:
    """Return the matrix products of groups of rows, whose kernels take no float64."""
    x: Tensor = args[0] if args else kwargs["mat_a"]
    weights: Tensor = args[1] if len(args) > 1 else kwargs["mat_b"]
    ends, bias = kwargs.get("offs"), kwargs.get("bias")
    if x.dtype is not torch.float64 or x.ndim != 2 or weights.ndim != 3 or ends is None:
        return func(*args, **kwargs)
    starts = [0, *ends.tolist()]
    rows = [x[start:end] @ weight for start, end, weight in zip(starts[:-1], starts[1:], weights, strict=True)]
    rows.append(x.new_zeros(len(x) - starts[-1], weights.shape[-1]))  # rows of no group
    out = torch.cat(rows)
    return out if bias is None else out + bias
