"""Seconds of a call, in turns; timer protocol."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import nn

from etp_graph.model import convert_inputs, eval_mode, named_tensors, preserved_rng, run_model

from ._decoding import NextToken, next_token_call

Call = Callable[[], object]


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer; the CPU for a model without any."""
    return next((tensor.device for _, tensor in named_tensors(model)), torch.device("cpu"))


@contextmanager
def steady_conditions(threads: int | None = None) -> Iterator[None]:
    """Disable gradients and garbage collection inside the context, and set the number of threads if given."""
    collecting, before = gc.isenabled(), torch.get_num_threads()
    gc.collect()
    gc.disable()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            yield
    finally:
        if threads is not None:
            torch.set_num_threads(before)
        if collecting:
            gc.enable()


@contextmanager
def forwards(model: nn.Module, example_inputs: Any) -> Iterator[Call]:
    """Set the model to eval mode inside the context; yield a function that runs one forward.

    Args:
        model: the model.
        example_inputs: its inputs, or :class:`NextToken`.
    """
    if isinstance(example_inputs, NextToken):
        with eval_mode(model), preserved_rng(model):
            yield next_token_call(model, example_inputs.prompt)
        return
    like = next((tensor for _, tensor in named_tensors(model) if tensor.is_floating_point()), None)
    inputs = example_inputs if like is None else convert_inputs(example_inputs, like=like)
    with eval_mode(model), preserved_rng(model):
        yield lambda: run_model(model, inputs)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all work submitted to it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds_of(call: Call, device: torch.device) -> float:
    """Return the seconds of one call. The device is idle before and after it."""
    synchronize(device)
    start = perf_counter()
    call()
    synchronize(device)
    return perf_counter() - start


def seconds_in_turns(
    calls: Sequence[Call], device: torch.device, *, repetitions: int, warm_up: int
) -> tuple[tuple[float, ...], ...]:
    """Time several calls in turns. Return for each call its ``repetitions`` times in seconds."""
    found: list[list[float]] = [[] for _ in calls]
    for number in range(warm_up + repetitions):
        for call, own in zip(calls, found):
            seconds = seconds_of(call, device)
            if number >= warm_up:
                own.append(seconds)
    return tuple(map(tuple, found))


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Return the peak memory of one call in bytes; see :class:`Latency`."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    before = _process_peak()
    call()
    after = _process_peak()
    return (
        after - before if device.type == "cpu" and before is not None and after is not None and after > before else None
    )


def _process_peak() -> int | None:
    """Return the peak memory of this process in bytes; ``None`` on systems that do not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Work(Protocol):
    """Part of a model that can be run at other sizes."""

    @property
    def device(self) -> torch.device:
        """Return the device that it runs on."""

    def call(self, sizes: tuple[int, ...]) -> Call:
        """Return a function that runs it once at these sizes."""


class Timer(Protocol):
    """Interface for timing: real time (:class:`WallClock`), or a formula in tests."""

    def models(self, models: Sequence[nn.Module], example_inputs: Any) -> list[float]:
        """Return the seconds of a forward of each model."""

    def layer(self, work: Any, sizes: tuple[int, ...]) -> float:
        """Return the seconds of one layer at these sizes."""
