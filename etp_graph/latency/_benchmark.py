"""Measure the time, throughput and peak memory of forwards on this machine, for one model or for several in turns."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from etp_graph._config import require, require_count
from etp_graph._json import JsonReader
from etp_graph.errors import EtpError
from etp_graph.model import named_tensors

from ._clock import Work, device_of, forwards, peak_memory, seconds_in_turns, seconds_of, steady_conditions
from ._decoding import NextToken


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Time and memory of one forward of a model; made by :func:`benchmark`.

    Attributes:
        p50_ms: median milliseconds of a forward.
        p90_ms: 90th percentile of the milliseconds of a forward.
        throughput: items a second at the median; the first axis of the first input tensor counts the items.
        peak_memory: bytes. On CUDA: the most memory that PyTorch had allocated during a forward, weights included. On
            the CPU: the increase of the process's peak memory during the model's first forward; ``None`` if the peak
            did not increase, or if the system does not report it. ``None`` on other devices.
        threads: number of PyTorch threads during the measurement.
        repetitions: number of forwards that were timed, without the warm-up.
        device: device of the model, such as ``cpu`` or ``cuda:0``.
    """

    p50_ms: float
    p90_ms: float
    throughput: float
    peak_memory: int | None
    threads: int
    repetitions: int
    device: str

    def to_json(self) -> str:
        """Return the latency as JSON text; :meth:`from_json` reads it back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Latency:
        """Read the latency that :meth:`to_json` wrote. Raises :class:`EtpError` if the text is not a latency."""
        read, where = JsonReader(EtpError), "this text is not a latency"
        body = read.require_object(read.parse(text, where), where, [field.name for field in fields(cls)])
        peak = body["peak_memory"]
        return cls(
            p50_ms=read.require_number(body["p50_ms"], f"{where}: p50_ms", low=0),
            p90_ms=read.require_number(body["p90_ms"], f"{where}: p90_ms", low=0),
            throughput=read.require_number(body["throughput"], f"{where}: throughput", low=0),
            peak_memory=None if peak is None else read.require_integer(peak, f"{where}: peak_memory"),
            threads=read.require_integer(body["threads"], f"{where}: threads"),
            repetitions=read.require_integer(body["repetitions"], f"{where}: repetitions"),
            device=read.require_text(body["device"], f"{where}: device"),
        )

    def __str__(self) -> str:
        memory = "" if self.peak_memory is None else f", {self.peak_memory / 2**20:.1f} MiB"
        return (
            f"p50 {self.p50_ms:.3f} ms, p90 {self.p90_ms:.3f} ms, {self.throughput:.1f} items/s{memory} "
            f"({self.device}, {self.threads} threads, {self.repetitions} repetitions)"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """Time of a language model that generates; made by :func:`etp_graph.benchmark` with ``decode=True``.

    Attributes:
        prefill: one forward of the prompt.
        token: one more token, with the keys and values of the prompt in a cache. Its throughput is tokens a second.
    """

    prefill: Latency
    token: Latency

    def __str__(self) -> str:
        return f"prefill {self.prefill}\ntoken   {self.token}"


@overload
def benchmark(
    model: nn.Module,
    example_inputs: Any,
    *,
    repetitions: int = 30,
    warm_up: int = 3,
    threads: int | None = None,
    decode: Literal[False] = False,
) -> Latency: ...


@overload
def benchmark(
    model: Sequence[nn.Module],
    example_inputs: Any,
    *,
    repetitions: int = 30,
    warm_up: int = 3,
    threads: int | None = None,
    decode: Literal[False] = False,
) -> tuple[Latency, ...]: ...


@overload
def benchmark(
    model: nn.Module,
    example_inputs: Any,
    *,
    repetitions: int = 30,
    warm_up: int = 3,
    threads: int | None = None,
    decode: Literal[True],
) -> Decoding: ...


@overload
def benchmark(
    model: Sequence[nn.Module],
    example_inputs: Any,
    *,
    repetitions: int = 30,
    warm_up: int = 3,
    threads: int | None = None,
    decode: Literal[True],
) -> tuple[Decoding, ...]: ...


def benchmark(
    model: nn.Module | Sequence[nn.Module],
    example_inputs: Any,
    *,
    repetitions: int = 30,
    warm_up: int = 3,
    threads: int | None = None,
    decode: bool = False,
) -> Latency | Decoding | tuple[Latency, ...] | tuple[Decoding, ...]:
    """Measure a forward in eval mode, without gradients and without garbage collection.

    Several models take turns, so that other load on the machine slows all of them alike and their ratios stay
    meaningful. Training modes, number of threads, random states and garbage collection are restored at the end.

    Args:
        model: a model, or a list or tuple of models on one device.
        example_inputs: as for :func:`etp_graph.trace`; tensors are moved to each model's device and dtype. Or
            :class:`etp_graph.latency.NextToken`.
        repetitions: number of timed forwards of each model, at least 1.
        warm_up: number of forwards of each model before the timed ones, which fill caches; at least 0.
        threads: number of PyTorch threads during the measurement; default: the present number.
        decode: the example inputs are a prompt of a model of transformers that generates. Measure its forward, and one
            more token with a cache.

    Returns:
        One :class:`Latency`, with ``decode`` one :class:`Decoding`, or a tuple with one for each model.

    Raises:
        EtpError: a number is out of its range, there is no model, a model has tensors on the meta device, or, with
            ``decode``, returns no cache that can forget a token.
    """
    several = not isinstance(model, nn.Module)
    models = tuple(model) if isinstance(model, Sequence) else (model,)
    _check(models, repetitions=repetitions, warm_up=warm_up, threads=threads)

    def measure(inputs: Any) -> tuple[Latency, ...]:
        return _measured(models, inputs, repetitions=repetitions, warm_up=warm_up, threads=threads)

    if not decode:
        found = measure(example_inputs)
        return found if several else found[0]
    tokens = measure(NextToken(example_inputs))  # first, because it may refuse the prompt
    pairs = zip(measure(example_inputs), tokens, strict=True)
    both = tuple(Decoding(prefill=prefill, token=token) for prefill, token in pairs)
    return both if several else both[0]


def _measured(
    models: Sequence[nn.Module], example_inputs: Any, *, repetitions: int, warm_up: int, threads: int | None
) -> tuple[Latency, ...]:
    with ExitStack() as stack:
        stack.enter_context(steady_conditions(threads))
        calls = [stack.enter_context(forwards(each, example_inputs)) for each in models]
        devices = [device_of(each) for each in models]
        peaks = [peak_memory(call, device) for call, device in zip(calls, devices)]
        seconds = seconds_in_turns(calls, devices[0], repetitions=repetitions, warm_up=warm_up)
        used = torch.get_num_threads()
    items = _items(example_inputs)
    found = []
    for own, peak, device in zip(seconds, peaks, devices):
        p50, p90 = (float(np.quantile(own, q)) for q in (0.5, 0.9))
        found.append(
            Latency(
                p50_ms=1e3 * p50, p90_ms=1e3 * p90, throughput=items / p50, peak_memory=peak, threads=used,
                repetitions=repetitions, device=str(device),
            )
        )  # fmt: skip
    return tuple(found)


def _check(models: Sequence[nn.Module], **numbers: int | None) -> None:
    least = {"repetitions": 1, "warm_up": 0, "threads": 1}
    for name, value in numbers.items():
        if value is not None:
            require_count(name, value, least[name], EtpError)
    require(
        bool(models) and all(isinstance(model, nn.Module) for model in models),
        f"found {[type(model).__name__ for model in models]} to measure: give a model, or a list of them.",
        EtpError,
    )
    for model in models:
        require(
            not any(tensor.is_meta for _, tensor in named_tensors(model)),
            f"{type(model).__name__} has tensors on the meta device, which have no values and take no time: measure "
            "the model with its weights.",
            EtpError,
        )


def _items(example_inputs: Any) -> int:
    """Return the length of the first axis of the first input tensor; 1 if there is none."""
    given = example_inputs.prompt if isinstance(example_inputs, NextToken) else example_inputs
    tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
    return tensors[0].shape[0] if tensors and tensors[0].ndim else 1


class WallClock:
    """Timer that measures real time on this machine.

    Args:
        repetitions: timed forwards of each model; up to 10 times as many, so that fast models fill ``whole`` seconds.
        warm_up: number of forwards of each model before the timed ones.
        single: approximate seconds spent on each size of each layer.
        whole: approximate seconds spent on all models together.
    """

    def __init__(self, *, repetitions: int = 15, warm_up: int = 3, single: float = 0.01, whole: float = 1.0) -> None:
        self.repetitions, self.warm_up, self.single, self.whole = repetitions, warm_up, single, whole

    def models(self, models: Sequence[nn.Module], example_inputs: Any) -> list[float]:
        """Return the median seconds of a forward of each model; the models take turns."""
        first = benchmark(models, example_inputs, repetitions=1, warm_up=self.warm_up)
        fit = math.ceil(self.whole / max(sum(one.p50_ms for one in first) / 1e3, 1e-4))
        repetitions = max(self.repetitions, min(fit, 10 * self.repetitions))
        found = benchmark(models, example_inputs, repetitions=repetitions, warm_up=0)
        return [one.p50_ms / 1e3 for one in found]

    def layer(self, work: Work, sizes: tuple[int, ...]) -> float:
        """Return the minimum seconds of a layer at these sizes.

        Other load on the machine can only lengthen so short a time. Off the CPU, calls are timed in batches of ten.
        """
        device, call = work.device, work.call(sizes)
        several = 1 if device.type == "cpu" else 10

        def batch() -> None:
            for _ in range(several):
                call()

        with torch.no_grad():
            batch()
            once = seconds_of(batch, device)
            repetitions = min(max(3, math.ceil(self.single / max(once, 1e-7))), 100)
            return min(seconds_of(batch, device) for _ in range(repetitions)) / several
