"""Raise an exception at any chosen line or operator of a call, and describe a model so that any change is seen."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import etp_graph

_HOME = str(Path(etp_graph.__file__).parent)

T = TypeVar("T")

Site = tuple[str, int]
"""File and line."""


def line_sites(call: Callable[[], object], *, home: str = _HOME, own_thread: bool = True) -> list[Site]:
    """Run a call and return the lines of the library that it executes, in order, with repetitions."""
    sites: list[Site] = []

    def note_lines() -> None:
        with _traced(home, lambda frame: sites.append((frame.f_code.co_filename, frame.f_lineno))):
            call()

    _run(note_lines, own_thread)
    return sites


def run_with_fault_at_line(
    call: Callable[[], object], at: int, error: type[BaseException], *, home: str = _HOME, own_thread: bool = True
) -> bool:
    """Run a call and raise ``error`` before its line number ``at``. Return whether the call raised it."""
    passed = 0

    def count(frame: FrameType) -> None:
        nonlocal passed
        passed += 1
        if passed == at + 1:
            raise error

    def raised() -> bool:
        try:
            with _traced(home, count):
                call()
        except error:
            return True
        return False

    return _run(raised, own_thread)


def _run(call: Callable[[], T], own_thread: bool) -> T:
    """Return what a call returns, in a new thread if ``own_thread``. Signals are handled by the main thread alone.

    An exception between two lines of a context of PyTorch leaves the context on. It belongs to the thread, so that it
    ends with the thread and no later test runs in it.
    """
    if not own_thread:
        return call()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


@contextmanager
def _traced(home: str, seen: Callable[[FrameType], object]) -> Iterator[None]:
    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(home):
            return None
        if event == "line":
            seen(frame)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


class FaultAtFunction(TorchFunctionMode):
    """Raise an exception at the n-th function of torch, and at all later ones if ``lasting``."""

    def __init__(self, at: int, error: type[BaseException], *, lasting: bool = False) -> None:
        super().__init__()
        self.at, self.error, self.lasting, self.passed = at, error, lasting, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.passed += 1
        if self.passed - 1 == self.at or (self.lasting and self.passed > self.at >= 0):
            raise self.error
        return func(*args, **(kwargs or {}))


class FaultAtOperator(TorchDispatchMode):
    """Raise an exception at the n-th operator, below autograd."""

    def __init__(self, at: int, error: type[BaseException], *, lasting: bool = False) -> None:
        super().__init__()
        self.at, self.error, self.lasting, self.passed = at, error, lasting, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.passed += 1
        if self.passed - 1 == self.at or (self.lasting and self.passed > self.at >= 0):
            raise self.error
        return func(*args, **(kwargs or {}))


def describe(value: Any) -> Any:
    """Return values, shapes, strides and objects of a module, an optimizer or any value, to be compared with ``==``."""
    if isinstance(value, Tensor):
        grad = describe(value.grad) if value.is_leaf and value.grad is not None else None
        dense = value.detach().to_dense()
        own = id(value) if isinstance(value, nn.Parameter) else None
        layout = (str(value.layout), str(value.dtype), tuple(dense.shape), dense.stride(), value.requires_grad)
        return own, type(value).__name__, layout, dense.numpy().tobytes(), grad
    if isinstance(value, nn.Module):
        return {name: (id(m), type(m), describe(vars(m))) for name, m in value.named_modules()}
    if isinstance(value, torch.optim.Optimizer):
        return describe([list(value.state.items()), value.param_groups, getattr(value, "_numel_cache", None)])
    if isinstance(value, dict):
        return type(value), [
            (describe(k), describe(v)) for k, v in value.items() if not str(k).endswith(("_modules", "_hooks"))
        ]
    if isinstance(value, (list, tuple, set)):
        return type(value), [describe(item) for item in value]
    return type(value), repr(value)


def without_objects(facts: Any) -> Any:
    """Return facts of two different copies so that they can be compared."""
    if isinstance(facts, (list, tuple)):
        return type(facts)(without_objects(part) for part in facts if not (isinstance(part, int) and part > 2**32))
    if isinstance(facts, type):
        return facts.__name__
    if isinstance(facts, dict):
        return {key: without_objects(part) for key, part in facts.items()}
    return facts
