"""Compress a trained model. The user's own functions train and evaluate it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from etp_graph.budget import Budget, Targets, allocate, show_targets
from etp_graph.collect import watch
from etp_graph.criteria import magnitude
from etp_graph.errors import BudgetError, CheckpointError, PlanError
from etp_graph.graph import require_plan_alone, trace
from etp_graph.methods import Method, check_rounds, former_versions, get
from etp_graph.model import Outputs
from etp_graph.plan import CostModel, Plan
from etp_graph.schedules import Iterative, Schedule
from etp_graph.surgery import bare_copies, list_copies

from ._journal import METHOD, Journal, begun_with, check_dense, weights_digest
from ._progress import Bar
from ._result import CompressResult
from ._steps import Compression, Evaluate, Train, n_steps
from ._training_state import TrainingState, require_restorable, restore_training_state_

Check = bool | Literal["auto"]


@show_targets
def compress(
    model: nn.Module,
    example_inputs: Any,
    *,
    train: Train,
    evaluate: Evaluate,
    budget: Budget | None = None,
    method: str | Method = "etp",
    rounds: int | None = None,
    schedule: Schedule | None = None,
    prune: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] = (),
    plan: Plan | None = None,
    check: Check = "auto",
    outputs: Outputs = None,
    also: nn.Module | Iterable[nn.Module] = (),
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **targets: Unpack[Targets],
) -> CompressResult:
    """Prune a trained model in place until it fits the budget: sparse training, allocation, surgery, fine-tuning.

    Args:
        model: the trained model. Its ``nn.Parameter`` objects stay the same; its gradients are cleared.
        example_inputs: as for :func:`etp_graph.trace`. MACs are counted for one forward with these inputs.
        train: ``train(model, phase)`` trains the model with an optimizer that it creates. It must pass the optimizer to
            ``phase.attach(optimizer)`` before the first step. In each round it is called with
            ``phase.name == "sparse"`` (if the method has a sparse phase) and with ``"finetune"``; the model is then in
            training mode. If the criterion needs data, it is also called with ``"calibrate"`` before surgery. This call
            changes no weight. The model is then in eval mode, or in training mode if the criterion needs gradients.
        evaluate: ``evaluate(model)`` returns one finite number; the model is in eval mode.
        budget: the target with all its rules. If its ``scope`` or ``rank`` is ``None``, the method's is used. Of
            ``min_units`` and ``max_ratio``, the stricter of the budget's and the method's is used.
        method: a name of :data:`etp_graph.methods.METHODS`, or a :class:`etp_graph.methods.Method`.
        rounds: number of rounds of sparse training, surgery and fine-tuning. Default: the steps of an ``Iterative``
            ``schedule``, else the method's rounds.
        schedule: maps the fraction t of finished rounds to the fraction of the cost reduction reached then. Default:
            the method's.
        prune: kinds of units to prune, see :func:`etp_graph.trace`.
        ignore: names or patterns of modules whose units all stay.
        plan: the plan of this model, if it is traced already.
        check: as for :func:`etp_graph.trace`.
        outputs: what counts as an output of the model, as for :func:`etp_graph.trace`.
        also: other models that lose the same units in every round, such as a moving average that ``train`` updates;
            see :func:`etp_graph.prune_`. Not together with ``checkpoint``, which does not store them.
        checkpoint: a folder that stores every finished step. Call ``compress`` again with the same arguments and the
            same dense model to continue after the last finished step. A run that began with what a preset was in a
            former version goes on with that, and a warning says so. The states of the global random number
            generators are stored too. The result is that of an uninterrupted run if ``train`` is deterministic given
            these states.
        progress: show a progress bar if stdout is a terminal.
        targets: the target, ``speed_up=2`` for example, see :class:`etp_graph.Budget`. Give exactly one, or ``budget``.

    Returns:
        Metrics (the numbers that ``evaluate`` returned), costs, selections and seconds of every step.

    Raises:
        BudgetError: the target is malformed or out of reach. This is checked before training.
        ForceError: the method is unknown, or ``train`` did not attach its optimizer.
        PlanError: nothing can be pruned, the plan belongs to another model, or ``train`` replaced parameters.
        ScoreError: the method's criterion cannot be computed for this model.
        CheckpointError: the folder belongs to another run or is damaged.
        EtpError: ``evaluate`` did not return a finite number, or ``train`` left weights that are not finite.
        Exception: any exception of ``train`` or ``evaluate``. Steps finished before it stay in the folder.
    """
    if torch.is_inference_mode_enabled():
        raise PlanError("compress inside torch.inference_mode() can neither train nor prune; leave it first.")
    preset = get(method)
    former = None if checkpoint is None else begun_with(checkpoint, former_versions(preset))
    chosen = _method(former or preset, rounds, schedule)
    goal = budget_of(budget, chosen, targets)
    require_plan_alone(plan, prune=prune, ignore=ignore, outputs=outputs)
    copies = list_copies(also)
    if copies and checkpoint is not None:
        raise CheckpointError("also: a checkpoint stores the model alone. Leave out checkpoint, or also.")
    plan = plan or trace(model, example_inputs, prune=prune, ignore=ignore, check=check, outputs=outputs)
    bare_copies(model, plan, copies)
    counted = plan.outputs
    kinds = sorted({group.kind for group in plan.prunable})
    # A dry run of scoring and allocation: finds bad weights, criteria and budgets before hours of training.
    rehearsed = allocate(model, plan, _dry_run_scores(chosen, model, plan), budget=goal, example_inputs=example_inputs)
    journal = Journal(checkpoint, _arguments(model, plan, chosen, goal) if checkpoint is not None else {})
    if former is not None:
        _tell_former(former, preset)
    with _modes_kept(model), Bar(n_steps(chosen), show=progress) as bar:
        start, changed = TrainingState(model), journal.last_change
        require_restorable(changed and changed.get("training_state"))
        journal.restore_(model)
        if changed is not None:
            restore_training_state_(model, changed.get("training_state"), journal.tensors(changed))
        return Compression(
            model, plan, chosen, goal, example_inputs, journal=journal, bar=bar, train=train, evaluate=evaluate,
            start=start, expected=CostModel(plan).evaluate(rehearsed.flat(plan)), also=copies,
        ).compress(lambda: trace(model, example_inputs, prune=kinds, check=check, outputs=counted))  # fmt: skip


def _method(chosen: Method, rounds: int | None, schedule: Schedule | None) -> Method:
    """Return the method with the rounds and the schedule of this call."""
    if rounds is None:
        rounds = schedule.steps if isinstance(schedule, Iterative) else chosen.rounds
    if schedule is None:
        schedule = chosen.schedule
    check_rounds(rounds, schedule)
    return replace(chosen, rounds=rounds, schedule=schedule)


def _tell_former(former: Method, today: Method) -> None:
    """Warn that a run goes on with what its preset was in a former version."""
    before, now = former.to_dict(), today.to_dict()
    changed = [
        f"{name} is {before[name]!r}, today {now[name]!r}"
        for name in now if name != "source" and before[name] != now[name]
    ]  # fmt: skip
    warnings.warn(
        f"the run in this folder began with {today.name!r} of a former version and goes on with it: "
        f"{'; '.join(changed)}. To prune with the method of today, use another folder.",
        stacklevel=3,
    )


def _dry_run_scores(method: Method, model: nn.Module, plan: Plan) -> Tensor:
    """Return scores [n_units] of the dense model for the dry run.

    For a criterion that needs data, check that the data can be collected, and return magnitudes.
    """
    if not method.collected:
        return method.scores(model, plan)
    with watch(model, plan, method.criterion_name):
        return magnitude(model, plan)


def budget_of(budget: Budget | None, method: Method, targets: Mapping[str, object]) -> Budget:
    """Return the budget given as ``budget`` or as exactly one target, with the method's scope and rank.

    Raises:
        BudgetError: not exactly one target is given, or the method cannot use this budget.
    """
    goal = method.with_rules(Budget.of(budget, targets))
    if goal.max_ratio < 1 and method.rounds > 1:
        raise BudgetError(
            f"max_ratio={goal.max_ratio} with {method.rounds} rounds: the share is of what a round begins with, so it "
            "would not hold for the whole. Use min_units, or one round."
        )
    if goal.measured:
        _check_time(goal, method)
    return goal


def _check_time(budget: Budget, method: Method) -> None:
    """Raise :class:`BudgetError` if the method needs time measurements while it trains or between rounds."""
    if method.rounds > 1:
        raise BudgetError(
            f"{budget.as_given} with {method.rounds} rounds: shares of the way to a measured time are not known "
            "beforehand. Use one round, or a target in MACs or parameters."
        )
    if (method.acts_on == "losers" and not method.steered) or method.soft_every:
        raise BudgetError(
            f"{budget.as_given} with method {method.name!r}, which chooses units while it trains: no time can be "
            "measured there. Use another method, or a target in MACs or parameters."
        )


def _arguments(model: nn.Module, plan: Plan, method: Method, budget: Budget) -> dict[str, Any]:
    """Return the settings and digests that must be equal when a run continues from a checkpoint."""
    check_dense(model)
    return {
        **{METHOD + name: value for name, value in method.to_dict().items()},
        "budget": budget.to_json(),
        "plan": plan.fingerprint,
        "weights of the dense model": weights_digest(model),
    }


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    """Restore the training or eval mode of every module when the context ends."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
