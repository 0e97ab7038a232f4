"""What the speed benchmark measures, each in a process of its own: a dict of numbers, in seconds and bytes."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import etp_graph as etp
from benchmarks.models import registry
from benchmarks.speed.models import CASES, Case, llama
from etp_graph.model import run_model

Timed = dict[str, list[float]]


def timed(actions: dict[str, Callable[[], object]], repetitions: int) -> Timed:
    """Seconds of every action, one after the other in every repetition; the first is thrown away."""
    found: Timed = {name: [] for name in actions}
    for repetition in range(repetitions + 1):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            if repetition:
                found[name].append(time.perf_counter() - start)
    return found


def memory(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (at most since :func:`reset_peak`) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def reset_peak() -> None:
    """Begin a new measurement of ``VmHWM``."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def tensor_bytes() -> int:
    """Bytes of the storages of all tensors that are alive."""
    gc.collect()
    alive = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and not o.is_meta]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}.values())


def force(name: str, repetitions: int) -> dict[str, Any]:
    """The force of one step, beside forward and backward, the physical limit, and Torch-Pruning's."""
    case = CASES[name]()
    model = case.model
    plan = etp.trace(model, case.example, check=False)
    before = tensor_bytes()
    reg = etp.Regularizer(model, plan, beta=1e-6)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    actions, held = _force_actions(case, reg, optimizer)
    with reg.attach(optimizer):
        found: dict[str, Any] = timed(actions, repetitions)
        found["transient"] = _peak_allocation(actions["force"])
    found["held"] = tensor_bytes() - before - sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    found["parameters"] = sum(p.nbytes for p in model.parameters())
    found["prunable"] = sum(t.nbytes for t in held)
    found |= _eighth(model, plan, optimizer, repetitions)
    return found


INTERVAL = 20
"""Steps between two choices of losers in a phase of 1,000."""


def steered(name: str, repetitions: int) -> dict[str, Any]:
    """What the method `etp` adds to a step, over the steps from one choice of losers to the next."""
    case = CASES[name]()
    model = case.model
    plan = etp.trace(model, case.example, check=False)
    method, budget = etp.methods.get("etp"), etp.Budget(speed_up=2.0)
    reg = method.regularizer(model, plan, steps=50 * INTERVAL, budget=budget)
    assert reg is not None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def forward_backward() -> None:
        optimizer.zero_grad(set_to_none=True)
        case.loss().backward()

    def plain() -> None:
        for _ in range(INTERVAL):
            optimizer.step()

    def forced() -> None:
        with reg.attach(optimizer):
            plain()

    found = timed({"forward_backward": forward_backward, "plain": plain, "forced": forced}, repetitions)
    pairs = zip(found["plain"], found["forced"], strict=True)
    return {
        "forward_backward": found["forward_backward"],
        "force": [(after - before) / INTERVAL for before, after in pairs],
    }


def _force_actions(
    case: Case, reg: etp.Regularizer, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Callable[[], object]], list[torch.Tensor]]:
    model = case.model
    wanted = {s.tensor for g in reg.plan.prunable for s in g.slices}
    held = [p.detach() for name, p in model.named_parameters() if name in wanted]

    def forward_backward() -> None:
        case.loss().backward()

    def clear() -> None:  # to free large tensors takes time of its own
        optimizer.zero_grad(set_to_none=True)

    def only_force() -> None:  # a step of SGD without gradients does nothing but run the hooks
        optimizer.step()

    def limit() -> None:
        torch._foreach_norm(held)
        torch._foreach_mul_(held, 1.0)

    return {"forward_backward": forward_backward, "clear": clear, "force": only_force, "limit": limit}, held


def _eighth(model: nn.Module, plan: etp.Plan, optimizer: torch.optim.Optimizer, repetitions: int) -> dict[str, Any]:
    """Mean seconds of a step with ``every=8``, over eight steps."""
    reg = etp.Regularizer(model, plan, beta=1e-6, every=8)

    def eight() -> None:
        for _ in range(8):
            optimizer.step()

    optimizer.zero_grad(set_to_none=True)
    with reg.attach(optimizer):
        return {"eighth": [seconds / 8 for seconds in timed({"eight": eight}, repetitions)["eight"]]}


def _peak_allocation(action: Callable[[], object]) -> int:
    """The most bytes that PyTorch has allocated at a time while the action runs, beyond what it found."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        action()
    now, most = 0, 0
    for event in trace.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def force_peer(name: str, repetitions: int) -> dict[str, Any]:
    """The same of Torch-Pruning's GroupNormPruner: seconds of ``regularize``, growth of the process."""
    import torch_pruning as tp

    case = CASES[name]()
    model = case.model
    before = memory("VmRSS")
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    pruner = tp.pruner.GroupNormPruner(
        model, case.example, importance=tp.importance.GroupMagnitudeImportance(), pruning_ratio=0.5,
        ignored_layers=[last], output_transform=lambda out: out if isinstance(out, torch.Tensor) else out.logits,
    )  # fmt: skip
    grown = memory("VmRSS") - before

    def forward_backward() -> None:
        model.zero_grad(set_to_none=True)
        case.loss().backward()

    pruner.update_regularizer()
    found: dict[str, Any] = timed(
        {"forward_backward": forward_backward, "force": lambda: pruner.regularize(model)}, repetitions
    )
    found["parameters"] = sum(p.nbytes for p in model.parameters())
    return found | {"held": grown}


def trace(name: str, repetitions: int) -> dict[str, Any]:
    """Graph and groups, without the check; and one forward of the model."""
    case = CASES[name]()
    model = case.model.eval()
    with torch.no_grad():
        forward = timed({"forward": lambda: _run(model, case.example)}, 1)
    gc.collect()
    found = timed({"trace": lambda: etp.trace(model, case.example, check=False)}, repetitions)
    return {**forward, **found}


LARGEST = 1.5e9
"""Bytes of parameters up to which a model of the registry is measured: verify holds several copies in float64."""

_SHORTEST = 0.05
"""Seconds that a measurement takes at least; a shorter action is repeated."""


def check(name: str, repetitions: int) -> dict[str, Any]:
    """A model of the registry: a forward, a trace without and with its check, and verify, in processor time."""
    entry = registry()[name]
    model, x = entry.build(), entry.inputs()
    if sum(p.nbytes for p in model.parameters()) > LARGEST:
        return {"verdict": f"has more than {LARGEST / 1e9} GB of parameters"}
    plan = etp.trace(model, x)

    def forward() -> None:
        with torch.no_grad():
            run_model(model, x)

    forward()
    actions: dict[str, Callable[[], object]] = {
        "forward": forward,
        "unchecked": lambda: etp.trace(model, x, check=False),
        "trace": lambda: etp.trace(model, x),
    }
    found: dict[str, Any] = {what: [] for what in actions}
    for _ in range(repetitions):
        for what, action in actions.items():
            found[what].append(_processor_seconds(action))
    found["verify"] = [_processor_seconds(lambda: etp.verify(model, plan, x))]
    return {**found, "repetitions": repetitions, "parameters": sum(p.nbytes for p in model.parameters())}


def _processor_seconds(action: Callable[[], object]) -> float:
    """Return the seconds of an action, as a mean over as many repetitions as take long enough to be measured."""
    gc.collect()
    start, times = time.process_time(), 0
    while not times or time.process_time() - start < _SHORTEST:
        action()
        times += 1
    return (time.process_time() - start) / times


def trace_peer(name: str, repetitions: int) -> dict[str, Any]:
    """Torch-Pruning's graph, and all of its groups."""
    import torch_pruning as tp

    case = CASES[name]()
    model = case.model.eval()

    def build() -> None:
        graph = tp.DependencyGraph().build_dependency(model, case.example)
        list(graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]))

    start = time.perf_counter()
    build()
    return {"trace": [time.perf_counter() - start]}


def _run(model: nn.Module, x: Any) -> Any:
    return model(**x) if isinstance(x, dict) else model(x)


def surgery(name: str, repetitions: int) -> dict[str, Any]:
    """Scores, allocation and surgery to half the MACs, each; and the memory of surgery."""
    found: dict[str, Any] = {"scores": [], "allocate": [], "prune_": []}
    budget = etp.Budget(speed_up=2)
    for _ in range(repetitions):
        case = CASES[name]()
        plan = etp.trace(case.model, case.example, check=False)
        gc.collect()
        marks = [time.perf_counter()]
        scores = etp.criteria.etp(case.model, plan)
        marks.append(time.perf_counter())
        selection = etp.allocate(case.model, plan, scores, budget=budget)
        marks.append(time.perf_counter())
        shapes = {name: p.shape for name, p in case.model.named_parameters()}
        reset_peak()
        before = memory("VmRSS")
        start = time.perf_counter()
        etp.prune_(case.model, plan, selection)
        found["prune_"].append(time.perf_counter() - start)
        found["peak"] = memory("VmHWM") - before
        found["made"] = sum(p.nbytes for name, p in case.model.named_parameters() if p.shape != shapes[name])
        found["scores"].append(marks[1] - marks[0])
        found["allocate"].append(marks[2] - marks[1])
    return found


def surgery_peer(name: str, repetitions: int) -> dict[str, Any]:
    """Torch-Pruning: iterative steps with global magnitude ranking until half of the MACs are gone."""
    import torch_pruning as tp

    case = CASES[name]()
    model = case.model.eval()
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    start = time.perf_counter()
    pruner = tp.pruner.MetaPruner(
        model, case.example, importance=tp.importance.GroupMagnitudeImportance(), pruning_ratio=0.3,
        ignored_layers=[last],
    )  # fmt: skip
    pruner.step()
    return {"prune_": [time.perf_counter() - start]}


def meta(name: str, repetitions: int) -> dict[str, Any]:
    """Plan and budget of a Llama of 6.7 billion parameters on the meta device."""
    with torch.device("meta"):
        case = llama(32, width=4096, heads=32, vocabulary=32_000, inner=11_008)
    start = time.perf_counter()
    plan = etp.trace(case.model, case.example)
    scores = torch.rand(plan.n_units)
    etp.allocate(case.model, plan, scores, budget=etp.Budget(speed_up=2))
    seconds = time.perf_counter() - start
    allocated = any(not p.is_meta for p in case.model.parameters())
    return {"plan": [seconds], "peak": memory("VmHWM"), "allocated": allocated}


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}
