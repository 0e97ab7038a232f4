"""The one training loop of all methods, and the checkpoints that they begin with."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from math import isfinite
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from benchmarks.common.machine import sources_digest
from benchmarks.common.precision import autocast
from benchmarks.contest.training_state import RunStates, folder_of, keeping_states, next_training
from benchmarks.tasks.base import Task

Attach = Callable[[Optimizer], object]
WARMUP = 0.1
_DENSE = ("dense_steps", "dense_rate", "batch_size", "optimizer", "weight_decay", "clip")
"""The settings of a recipe that a checkpoint depends on."""


def rate(share: float, peak: float) -> float:
    """Learning rate at the share of a phase: one cycle (Smith & Topin 2018), linearly up to the peak, then down to 1 %.

    The optimizer of a phase is new, and the weights may just have lost units: so every phase begins with a low rate.
    """
    if share < WARMUP:
        return peak * (0.1 + 0.9 * share / WARMUP)
    return peak * (1 - 0.99 * (share - WARMUP) / (1 - WARMUP))


def total_rate(steps: int, peak: float) -> float:
    """The learning rates of all steps of a phase, summed."""
    return sum(rate(step / max(steps - 1, 1), peak) for step in range(steps))


def make_optimizer(task: Task, model: nn.Module, *, weight_decay: float | None = None) -> Optimizer:
    """The task's optimizer over all parameters that learn."""
    recipe = task.recipe
    decay = recipe.weight_decay if weight_decay is None else weight_decay
    parameters = [p for p in model.parameters() if p.requires_grad]
    if recipe.optimizer == "sgd":
        return SGD(parameters, lr=recipe.sparse_rate, momentum=0.9, nesterov=True, weight_decay=decay)
    return AdamW(parameters, lr=recipe.sparse_rate, weight_decay=decay)


def train(
    task: Task,
    model: nn.Module,
    *,
    steps: int,
    peak: float,
    seed: int,
    start: int,
    attach: Attach = lambda optimizer: None,
    penalty: Callable[[], Tensor] | None = None,
    after_step: Callable[[int], object] = lambda step: None,
    weight_decay: float | None = None,
) -> None:
    """Take ``steps`` optimizer steps on the batches from number ``start`` on, in place.

    Args:
        task: whose loss, data and optimizer.
        model: trained in place.
        steps: optimizer steps; the learning rate rises to ``peak`` and falls once.
        seed: of the data order, the augmentation and the model's own random numbers (dropout).
        start: number of the first batch: two phases see the data in the order of one long phase.
        attach: is given the optimizer before the first step; what it returns is the force whose state is kept.
        penalty: is added to the loss.
        after_step: is told the number of steps done.
        weight_decay: in place of the recipe's.

    Inside of :func:`~benchmarks.contest.training_state.keeping_states` a training that was interrupted continues.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    optimizer = make_optimizer(task, model, weight_decay=weight_decay)
    attached = attach(optimizer)
    torch.manual_seed(10_007 * seed + start)
    generator = torch.Generator().manual_seed(10_007 * seed + start)
    state, done = next_training(), 0
    if state is not None:
        done = state.restore_(model, optimizer, attached, generator, steps=steps)
    model.train()
    for step, chosen in enumerate(task.batches(seed=seed, start=start + done, steps=steps - done), start=done):
        for group in optimizer.param_groups:
            group["lr"] = rate(step / max(steps - 1, 1), peak)
        optimizer.zero_grad(set_to_none=True)
        with autocast(task.recipe.precision, task.device.type):
            loss = task.loss(model, chosen, generator)
        _step(task, model, optimizer, loss if penalty is None else loss + penalty())
        after_step(step + 1)
        if state is not None:
            ends = (start + step + 1) % task.steps_per_pass == 0
            state.keep(model, optimizer, attached, generator, done=step + 1, steps=steps, pass_ends=ends)


def _step(task: Task, model: nn.Module, optimizer: Optimizer, loss: Tensor) -> None:
    if not isfinite(float(loss.detach())):
        raise FloatingPointError(f"training diverged: the loss is {float(loss.detach())}")
    torch.autograd.backward(loss)
    if task.recipe.clip:
        nn.utils.clip_grad_norm_(model.parameters(), task.recipe.clip)
    optimizer.step()


def cache_root() -> Path:
    """Where checkpoints are kept: ``$ETP_GRAPH_CACHE``, else ``etp_graph/benchmarks`` in the user's cache folder."""
    chosen = os.environ.get("ETP_GRAPH_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "etp_graph" / "benchmarks"


def checkpoint(task: Task, seed: int = 0) -> nn.Module:
    """The trained network that every method begins with; trained once with the seed, then read from the cache.

    It is trained in fp32, whatever the precision of the phases that follow.
    """
    recipe = task.recipe
    torch.manual_seed(seed)
    model = task.start().to(task.device)
    if not recipe.dense_steps:
        return model.eval()
    settings = {name: value for name, value in asdict(recipe).items() if name in _DENSE}
    key = {"recipe": settings, "task": task.name, "scale": task.scale, "model": _shapes(model)}
    if task.data:
        key["data"] = task.data
    if seed:
        key["seed"] = seed
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    path = cache_root() / f"{task.name}-{task.scale}-{digest}.safetensors"
    if path.is_file():
        load_model(model, path)
        return model.eval()
    states = RunStates(folder_of(cache_root() / "states", path.stem, {**key, "sources": sources_digest()}))
    exact = copy.copy(task)
    exact.recipe = replace(recipe, precision="fp32")
    with keeping_states(states):
        train(exact, model, steps=recipe.dense_steps, peak=recipe.dense_rate, seed=seed, start=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    save_model(model, str(partial))
    partial.replace(path)  # so that an interrupted run leaves no half file under the final name
    states.clear()
    return model.eval()


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(p.shape) for name, p in model.named_parameters()}
