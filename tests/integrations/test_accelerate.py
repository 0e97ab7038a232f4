"""accelerate: a loop with its wrappers does what the plain loop does, whichever is first, prepare or attach."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import etp_graph as etp
from tests.support.models.integration_models import (
    METHOD,
    MODELS,
    build,
    by_hand,
    collate,
    example,
    optimizer_of,
    same,
    schedule_of,
)

accelerate = pytest.importorskip("accelerate")

STEPS, PRUNE, PARTS = 6, 3, 2


@pytest.fixture(autouse=True)
def _state() -> Iterator[None]:
    """accelerate keeps its settings for the whole process."""
    yield
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()


def batches(name: str) -> list[Any]:
    items = MODELS[name][1](4 * PARTS * STEPS)
    return [collate(items[i : i + 4]) for i in range(0, len(items), 4)]


def by_accelerate(name: str, *, attach_first: bool, precision: str = "no") -> tuple[nn.Module, etp.Plan, list[float]]:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=PARTS, mixed_precision=precision)
    model = build(name)
    optimizer: Any = optimizer_of(model)
    scheduler = schedule_of(optimizer)
    if not attach_first:
        model, optimizer = accelerator.prepare(model, optimizer)
    bare = accelerator.unwrap_model(model)
    plan = etp.trace(bare, example(name))
    force = METHOD.regularizer(bare, plan, steps=PRUNE, budget=etp.Budget(speed_up=1.5))
    assert force is not None
    force.attach(optimizer)
    if attach_first:
        model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    steps = 0
    for batch in batches(name):
        with accelerator.accumulate(model):
            loss = model(**batch)["loss"]
            accelerator.backward(loss)
            losses.append(float(loss.detach()) / PARTS)
            optimizer.step()
            if accelerator.sync_gradients:
                scheduler.step()
                steps += 1
                assert force.steps_done == min(steps, PRUNE)  # not on the steps that only accumulate
            optimizer.zero_grad()
        if steps == PRUNE and accelerator.sync_gradients:
            scores = METHOD.scores(bare, plan, regularizer=force)
            selection = etp.allocate(bare, plan, scores, budget=etp.Budget(speed_up=1.5))
            force.detach()
            etp.prune_(bare, plan, selection, optimizer=optimizer)
    return bare, plan, losses


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attach_first", [False, True])
def test_a_prepared_loop_does_what_a_plain_one_does(name: str, attach_first: bool) -> None:
    model, _, losses = by_accelerate(name, attach_first=attach_first)
    parts = batches(name)
    steps = [parts[i * PARTS : (i + 1) * PARTS] for i in range(STEPS)]
    other = build(name)  # it seeds, so dropout is the same
    expected = by_hand(other, steps, example_inputs=example(name), prune_step=PRUNE,
                       loss_of=lambda model, parts, part: model(**part)["loss"] / len(parts))  # fmt: skip
    assert losses == expected
    assert same(model, other)


@pytest.mark.parametrize("attach_first", [False, True])
def test_under_autocast_the_plan_is_that_of_full_precision(attach_first: bool) -> None:
    model, plan, _ = by_accelerate("bert", attach_first=attach_first, precision="bf16")
    assert plan == etp.trace(build("bert"), example("bert"))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert etp.verify(model, etp.trace(model, example("bert")), example("bert")).dtype == "float64"


def test_the_force_is_kept_in_the_states_of_the_accelerator(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)

    def begin() -> Any:
        model, optimizer = accelerator.prepare(built := build("cnn"), optimizer_of(built))
        force = METHOD.regularizer(model, etp.trace(model, example("cnn")), steps=8, budget=etp.Budget(speed_up=1.5))
        assert force is not None
        accelerator.register_for_checkpointing(force.attach(optimizer))
        return model, optimizer, force

    def step(model: nn.Module, optimizer: Any, batch: Any) -> None:
        accelerator.backward(model(**batch)["loss"])
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer, force = begin()
    for batch in batches("cnn")[:3]:
        step(model, optimizer, batch)
    accelerator.save_state(tmp_path)
    step(model, optimizer, batches("cnn")[3])
    accelerator.free_memory()
    accelerator._custom_objects.clear()
    again, held, second = begin()
    accelerator.load_state(tmp_path)
    step(again, held, batches("cnn")[3])
    assert same(model, again)
    assert second.steps_done == force.steps_done == 4
    assert torch.equal(second.distances(), force.distances())


def test_what_is_no_optimizer_is_refused() -> None:
    model = build("cnn")
    force = METHOD.regularizer(model, etp.trace(model, example("cnn")), steps=8, budget=etp.Budget(speed_up=1.5))
    assert force is not None
    with pytest.raises(etp.ForceError, match=r"torch\.optim\.Optimizer"):
        force.attach(model)  # type: ignore[arg-type]
