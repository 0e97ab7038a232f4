"""The whole way from a trained model to a small one, around the user's own training and evaluation."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .allocate import allocate
from .budget import Budget
from .collect import watch
from .costs import CostModel
from .criteria import magnitude
from .errors import BudgetError, PlanError
from .journal import Journal, check_dense, weights_digest
from .methods import Method, check_rounds, get
from .outcome import CompressResult, Round
from .phases import Bar, Phase
from .plan import Plan
from .run import Evaluate, Run, Train, n_steps
from .schedules import Iterative, Schedule
from .tracing import trace

__all__ = ["CompressResult", "Evaluate", "Phase", "Round", "Train", "compress"]

Check = bool | Literal["auto"]


def compress(
    model: nn.Module,
    example_inputs: Any,
    *,
    train: Train,
    evaluate: Evaluate,
    speed_up: float | None = None,
    macs: int | None = None,
    params: int | None = None,
    latency_ms: float | None = None,
    speed_up_latency: float | None = None,
    budget: Budget | None = None,
    method: str | Method = "etp",
    rounds: int | None = None,
    schedule: Schedule | None = None,
    prune: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] = (),
    plan: Plan | None = None,
    check: Check = "auto",
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> CompressResult:
    """Sparse training, allocation, surgery and fine-tuning, in place: a trained model becomes one that fits the budget.

    Args:
        model: the trained model. Its ``nn.Parameter`` objects stay the same; its gradients are cleared.
        example_inputs: as for :func:`etp_graph.trace`; the MACs are those of one forward with them.
        train: ``train(model, phase)`` trains the model with an optimizer of its own, which it hands to
            ``phase.attach(optimizer)`` before the first step. It is called once with ``phase.name == "sparse"`` (unless
            the method has no force) and once with ``"finetune"`` in each round; the model is in training mode. Criteria
            that need data see it in a call with ``"calibrate"`` before surgery, which changes no weight; the model is
            in eval mode then, unless gradients are recorded.
        evaluate: ``evaluate(model)`` gives one finite number; the model is in eval mode.
        speed_up, macs, params, latency_ms, speed_up_latency: the target, see :class:`etp_graph.Budget`; or
        budget: the target with all its rules; the method says ``scope`` and ``rank`` where it does not.
        method: a name of :data:`etp_graph.methods.METHODS`, or a :class:`etp_graph.methods.Method`.
        rounds: how often all of it is repeated; default: the method's, or the steps of an iterative ``schedule``.
        schedule: share of the way to the budget that is done after the share t of the rounds; default: the method's.
        prune: kinds of units, see :func:`etp_graph.trace`.
        ignore: names or patterns of modules whose units all stay.
        plan: the plan of this model, if it was traced before.
        check: of :func:`etp_graph.trace`.
        checkpoint: a folder. Every finished step is kept there; called again with the same arguments and the same
            dense model, the run continues after the last one, equal to a run without interruption if
            ``train`` is deterministic given the states of the global random number generators, which are kept, too.
        progress: show a progress bar where stdout is a terminal.

    Returns:
        Metrics, costs, selections and seconds of every step. Metrics are those that ``evaluate`` gave.

    Raises:
        BudgetError: the target is malformed or out of reach (found out before anything is trained).
        ForceError: the method is unknown, or ``train`` did not attach its optimizer.
        PlanError: nothing can be pruned, the plan is of another model, or ``train`` replaced parameters.
        ScoreError: the method's criterion cannot be computed for this model.
        CheckpointError: the folder belongs to another run or is damaged.
        EtpError: ``evaluate`` gave something else than a finite number, or ``train`` left weights that are not finite.
        Exception: whatever ``train`` and ``evaluate`` raise. The steps finished before stay in the folder.
    """
    if torch.is_inference_mode_enabled():
        raise PlanError("compress inside torch.inference_mode() can neither train nor prune; leave it first.")
    chosen = _method(method, rounds, schedule)
    times = {"latency_ms": latency_ms, "speed_up_latency": speed_up_latency}
    goal = budget_of(budget, chosen, speed_up=speed_up, macs=macs, params=params, **times)
    if plan is not None and (ignore or prune is not None):
        raise PlanError("ignore and prune have no effect on a plan that is given: pass them to trace(model, ...).")
    plan = plan or trace(model, example_inputs, prune=prune, ignore=ignore, check=check)
    kinds = sorted({group.kind for group in plan.prunable})
    # Whatever the end would stumble over is found before hours of training: weights, criterion, reach of the budget.
    rehearsed = allocate(model, plan, _rehearsed(chosen, model, plan), budget=goal, example_inputs=example_inputs)
    journal = Journal(checkpoint, _arguments(model, plan, chosen, goal) if checkpoint is not None else {})
    with _modes_kept(model), Bar(n_steps(chosen), show=progress) as bar:
        journal.restore_(model)
        return Run(
            model, plan, chosen, goal, example_inputs, journal=journal, bar=bar, train=train, evaluate=evaluate,
            expected=CostModel(plan).evaluate(rehearsed.flat(plan)),
        ).compress(lambda: trace(model, example_inputs, prune=kinds, check=check))  # fmt: skip


def _method(method: str | Method, rounds: int | None, schedule: Schedule | None) -> Method:
    """The method, with the rounds and the schedule of this call."""
    chosen = get(method)
    if rounds is None:
        rounds = schedule.steps if isinstance(schedule, Iterative) else chosen.rounds
    if schedule is None:
        schedule = chosen.schedule
    check_rounds(rounds, schedule)
    return replace(chosen, rounds=rounds, schedule=schedule)


def _rehearsed(method: Method, model: nn.Module, plan: Plan) -> Tensor:
    """The scores of the dense model; magnitudes in place of what only data tells, once it is sure that it can."""
    if not method.collected:
        return method.scores(model, plan)
    with watch(model, plan, method.criterion):
        return magnitude(model, plan)


def budget_of(budget: Budget | None, method: Method, **targets: Any) -> Budget:
    """The budget, of which exactly one target is given."""
    given = [name for name, value in targets.items() if value is not None]
    if budget is None:
        goal = method.aim(Budget(**targets))
    elif given:
        raise BudgetError(f"found budget= and {' and '.join(f'{name}=' for name in given)}: give one of them.")
    else:
        goal = method.aim(budget)
    if goal.max_ratio < 1 and method.rounds > 1:
        raise BudgetError(
            f"max_ratio={goal.max_ratio} with {method.rounds} rounds: the share is of what a round begins with, so it "
            "would not hold for the whole. Use min_units, or one round."
        )
    if goal.quantity == "latency":
        _check_time(goal, method)
    return goal


def _check_time(budget: Budget, method: Method) -> None:
    """Raise :class:`BudgetError` if the method would have to measure while it trains, or between rounds."""
    if method.rounds > 1:
        raise BudgetError(
            f"{budget.words} with {method.rounds} rounds: shares of the way to a measured time are not known "
            "beforehand. Use one round, or a target in MACs or parameters."
        )
    if (method.acts_on == "losers" and not method.steered) or method.soft_every:
        raise BudgetError(
            f"{budget.words} with method {method.name!r}, which chooses units while it trains: no time can be measured "
            "there. Use another method, or a target in MACs or parameters."
        )


def _arguments(model: nn.Module, plan: Plan, method: Method, budget: Budget) -> dict[str, Any]:
    """Everything that a run depends on and that can be compared."""
    check_dense(model)
    return {
        **{f"method.{name}": value for name, value in method.to_dict().items()},
        "budget": budget.to_json(),
        "plan": plan.fingerprint,
        "weights of the dense model": weights_digest(model),
    }


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    """Every module has its own mode again afterwards."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
