"""Prune without training: score on a few batches, choose the units, compensate, cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, Literal, TypeVar, Unpack, get_args

import torch
from torch import Tensor, nn

from etp_graph._config import require, require_choice
from etp_graph.budget import Budget, Rank, Targets, allocate, show_targets
from etp_graph.collect import (
    Observations,
    OwnLabels,
    naming_batch,
    needs_backward,
    returns_logits,
    watch,
)
from etp_graph.criteria import Score, find_criterion, sensitivity
from etp_graph.errors import BudgetError, PlanError, ScoreError
from etp_graph.graph import require_plan_alone, trace
from etp_graph.methods import Method
from etp_graph.model import Outputs, eval_mode, run_model, undone
from etp_graph.plan import Cost, Plan, Selection, cost
from etp_graph.recovery import Compensation, InputMoments, prepare_batch_norms, prepare_compensation
from etp_graph.surgery import PreparedChanges, prepare_block_removal, prepare_surgery

from ._blend import BLENDS, Distance, checked_blends, choose_blend, distance_from
from ._compress import budget_of
from ._depth import Depth
from ._progress import Bar

T = TypeVar("T")

Loss = Callable[[nn.Module, Any], Tensor]
"""Runs the model on a batch and returns the loss, a scalar with a graph."""

_ESTIMATES_OF_LOSS = ("fisher", "kron_obs")
"""Criteria that estimate how much the loss grows with each unit, so that their scores can be divided by a saving."""

Allocation = Literal["scores", "sensitivity"]

_STEPS = ("trace", "calibrate", "allocate", "compensate", "blend", "prune", "batch norms")


@dataclass(frozen=True, slots=True, kw_only=True)
class OneShotResult:
    """What :func:`oneshot_` did.

    Attributes:
        plan: the plan that was used.
        selection: the units that stay.
        dense, pruned: cost before and after.
        compensation: the fit of each layer to its new weights, or ``None`` if nothing was compensated.
        blend: how much of the new weights was taken, in [0, 1].
        norms: number of batch norms that were measured anew.
        seconds: time of each step, by its name.
        removed_blocks: names of the blocks that were removed, as they were called before.
        divergences: for each number of blocks that was tried, how much worse a copy pruned to it was
            (:func:`etp_graph.collect.loss_growth`).
        blends: for each blend that was tried, how far the outputs were from those of the dense model.
    """

    plan: Plan
    selection: Selection
    dense: Cost
    pruned: Cost
    norms: int
    seconds: dict[str, float]
    compensation: Compensation | None = None
    removed_blocks: tuple[str, ...] = ()
    divergences: dict[int, float] = field(default_factory=dict)
    blend: float = 0.0
    blends: dict[float, float] = field(default_factory=dict)


@show_targets
def oneshot_(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    budget: Budget | None = None,
    criterion: str | Score | None = None,
    compensate: bool | InputMoments = True,
    ridge: float = 1e-3,
    blend: float | Sequence[float] = BLENDS,
    batch_norms: bool = False,
    loss: Loss | None = None,
    allocation: Allocation = "scores",
    blocks: int | Sequence[int] = 0,
    plan: Plan | None = None,
    prune: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] = (),
    outputs: Outputs = None,
    progress: bool = True,
    **targets: Unpack[Targets],
) -> OneShotResult:
    """Prune a model to a budget without training it, in place.

    The steps are those of :func:`etp_graph.trace`, :func:`etp_graph.collect.watch` (if the criterion needs data),
    :func:`etp_graph.allocate`, :func:`etp_graph.recovery.compensate_` and :func:`etp_graph.prune_`. If a step raises an
    exception, the model is unchanged.

    Args:
        model: the dense model. It runs in eval mode.
        batches: example inputs as :func:`etp_graph.trace` takes them, a few hundred samples. An iterator is kept in
            memory as a list, because several steps read it; a list or a ``DataLoader`` is read again each time.
        budget: the target with all its rules.
        criterion: a name of :data:`etp_graph.criteria.CRITERIA`, or a function of (model, plan). ``None``: ``fisher``
            if there is a loss, or the model returns a field ``logits`` (models of transformers), else ``magnitude``.
        compensate: change the weights that read removed units by least squares. Give what
            :func:`etp_graph.recovery.input_moments` recorded to prune copies of one model to several sizes.
        ridge: as for :func:`etp_graph.recovery.compensate_`.
        blend: how much of the new weights the model gets: its weights become ``old + blend * (new - old)``. All outputs
            of a layer count alike in the fit, so new weights may hurt where a criterion keeps few units of a layer. Of
            several numbers the one is taken whose outputs are closest to those of the dense model on the batches, by
            :func:`etp_graph.collect.loss_growth` without a loss. They are tried from large to small, until one is worse
            than the one before. Each costs a forward of the batches, which are kept in memory as a list. If the outputs
            cannot be compared, the largest is taken. A matrix of outputs counts as logits.
        batch_norms: measure the statistics of batch norms anew after surgery
            (:func:`etp_graph.recovery.reestimate_batch_norms_`); for use without compensation.
        loss: function of (model, batch) that returns the loss, for criteria that read gradients. Without it a model
            that returns a field ``logits`` gets labels of its own (:class:`etp_graph.collect.OwnLabels`).
        allocation: how groups compare: by their ``scores`` under the rules of the budget, or by their ``sensitivity``,
            the measured growth of the loss when a share of each is removed (:func:`etp_graph.criteria.sensitivity`).
        blocks: number of residual blocks (layers of a transformer) that are removed before units, see
            :func:`etp_graph.depth.shorten_`. Of several numbers the one is kept whose pruned model is closest to the
            dense one on the batches. The budget is that of the dense model.
        plan: a plan of this model. By default it is traced on the first batch.
        prune, ignore, outputs: as for :func:`etp_graph.trace`.
        progress: show a progress bar if stdout is a terminal.
        targets: the target, ``speed_up=2`` for example, see :class:`etp_graph.Budget`. Give exactly one, or ``budget``.

    Raises:
        PlanError, BudgetError: as the functions above. Also, if blocks are removed: a plan or recorded moments are
            given, which are those of the whole model, or the target is measured.
        ScoreError: there are no batches, the criterion cannot be computed, it needs a loss that is not given, or a
            blend is not in [0, 1].
    """
    blends = checked_blends(blend)
    require_plan_alone(plan, prune=prune, ignore=ignore, outputs=outputs)
    repeatable = _repeatable(batches)
    first = next(iter(repeatable), None)
    require(first is not None, "batches is empty: pass at least one batch of example inputs.", ScoreError)
    with eval_mode(model), torch.no_grad(), naming_batch(1):
        has_logits = returns_logits(run_model(model, first))
    if loss is None and has_logits and (criterion is None or needs_backward(find_criterion(criterion).observes)):
        loss = OwnLabels()
    method = scoring_method(criterion, loss)
    require_loss(method, loss)
    require_choice("allocation", allocation, get_args(Allocation), BudgetError)
    goal = budget_of(budget, method, targets)
    if allocation == "sensitivity" and goal.rank is None:
        goal = replace(goal, rank="score_per_mac")
    depth = Depth(model, repeatable, blocks, loss, goal)
    require(
        not depth.asked or (plan is None and isinstance(compensate, bool)),
        "blocks= changes the model before it is traced: leave out plan=, and give compensate=True or False.",
        PlanError,
    )
    pending: list[PreparedChanges] = []
    n_steps = len(_STEPS) + depth.n_steps + (allocation == "sensitivity")
    with Bar(n_steps, show=progress) as bar, undone(lambda: _undo_all(pending)):
        run = _Steps(bar)
        measured = compensate is not False and len(blends) > 1
        work = _Work(
            method=method, batches=repeatable, example=first, loss=loss, compensate=compensate, ridge=ridge,
            blends=blends, batch_norms=batch_norms,
            distance=distance_from(model, repeatable, loss) if measured else None,
            by_sensitivity=allocation == "sensitivity",
            trace=lambda one: plan or trace(one, first, prune=prune, ignore=ignore, outputs=outputs),
        )  # fmt: skip
        dense = None
        if depth.asked:
            whole = run.step("trace", lambda: work.trace(model))
            dense = cost(model, whole)
            goal = depth.absolute(goal, dense)
        names = depth.choose(lambda copied, tried: _prune(copied, tried, goal, work, _Steps(None), []), run.step)
        found = _prune(model, names, goal, work, run, pending)
        pending = []
    return replace(
        found, dense=dense or found.dense, seconds=run.seconds, removed_blocks=names, divergences=depth.found
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """What is done to a model, whatever its depth.

    Attributes:
        trace: returns the plan of a model.
        example: the first batch.
        blends: how much of the new weights is tried, from large to small.
        distance: measures how far a model is from the dense one, whatever its depth; ``None`` if that is not known.
        by_sensitivity: compare groups by the measured growth of the loss.

    The others are those of :func:`oneshot_`.
    """

    trace: Callable[[nn.Module], Plan]
    method: Method
    batches: Iterable[Any]
    example: Any
    loss: Loss | None
    compensate: bool | InputMoments
    ridge: float
    blends: tuple[float, ...]
    distance: Distance | None
    batch_norms: bool
    by_sensitivity: bool


def _prune(
    model: nn.Module, blocks: Sequence[str], goal: Budget, work: _Work, run: _Steps, pending: list[PreparedChanges]
) -> OneShotResult:
    """Remove blocks and units of a model in place. What was changed is in ``pending``, which can undo it."""
    if blocks:
        removal = run.step("blocks", lambda: prepare_block_removal(model, blocks))
        pending.append(removal)
        removal.commit()
    used = run.step("trace", lambda: work.trace(model))
    record = run.step("calibrate", lambda: _calibrate(model, used, work.method, work.batches, work.loss))
    scores = work.method.scores(model, used, record=record)
    if work.by_sensitivity:
        order = scores
        scores = run.step(
            "sensitivity", lambda: sensitivity(model, used, order, work.batches, loss=work.loss, progress=False)
        )
    chosen = run.step("allocate", lambda: allocate(model, used, scores, budget=goal, example_inputs=work.example))
    dense, pruned = cost(model, used), cost(model, used, chosen)
    done = _compensate(model, used, chosen, work, run, pending) if work.compensate is not False else {}
    norms = 0
    surgery = run.step("prune", lambda: prepare_surgery(model, used, chosen))
    pending.append(surgery)
    surgery.commit()
    if work.batch_norms:
        norms, changes = run.step("batch norms", lambda: prepare_batch_norms(model, work.batches))
        pending.append(changes)
        changes.commit()
    return OneShotResult(
        plan=used, selection=chosen, dense=dense, pruned=pruned, norms=norms, seconds=run.seconds, **done
    )


def _compensate(
    model: nn.Module, plan: Plan, selection: Selection, work: _Work, run: _Steps, pending: list[PreparedChanges]
) -> dict[str, Any]:
    """Write the best blend of old and new weights in place, and return what is said of it in the result."""
    data = work.batches if work.compensate is True else work.compensate
    assert not isinstance(data, bool)
    weights = run.step("compensate", lambda: prepare_compensation(model, plan, selection, data, ridge=work.ridge))
    blend, blends = run.step("blend", lambda: choose_blend(model, plan, selection, weights, work.distance, work.blends))
    changes = weights.changes(blend)
    pending.append(changes)
    changes.commit()
    return {"compensation": weights.fits, "blend": blend, "blends": blends}


def _undo_all(pending: Sequence[PreparedChanges]) -> None:
    for changes in reversed(pending):
        changes.undo()


class _Steps:
    """Steps of a run, timed and shown in a progress bar, if there is one."""

    def __init__(self, bar: Bar | None) -> None:
        self.seconds: dict[str, float] = {}
        self._bar = bar

    def step(self, name: str, action: Callable[[], T]) -> T:
        """Run a step and return its result."""
        if self._bar is not None:
            self._bar.begin(name)
        begin = perf_counter()
        found = action()
        self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - begin
        if self._bar is not None:
            self._bar.end()
        return found


def scoring_method(criterion: str | Score | None, loss: Loss | None) -> Method:
    """Return the method that scores with a criterion. Estimates of the loss are divided by what a unit saves."""
    chosen = criterion if criterion is not None else "magnitude" if loss is None else "fisher"
    rank: Rank = "score_per_mac" if chosen in _ESTIMATES_OF_LOSS else "score"
    return Method(name="one-shot", force=None, criterion=chosen, rank=rank)


def require_loss(method: Method, loss: Loss | None) -> None:
    """Raise :class:`ScoreError` if the criterion reads gradients and there is no loss."""
    if needs_backward(method.observes) and loss is None:
        raise ScoreError(
            f"criterion {method.criterion_name!r} reads gradients: pass loss=, a function of (model, batch) that "
            "returns the loss, or loss=etp_graph.collect.OwnLabels() if the model returns logits."
        )


def _repeatable(batches: Iterable[Any]) -> Iterable[Any]:
    return list(batches) if isinstance(batches, Iterator) else batches


def _calibrate(
    model: nn.Module, plan: Plan, method: Method, batches: Iterable[Any], loss: Loss | None
) -> Observations | None:
    """Return what the criterion observes on the batches, or ``None`` if it needs no data."""
    if not method.collected:
        return None
    gradients = needs_backward(method.observes)
    before = [(p, p.grad, p.requires_grad) for p in model.parameters()]

    def restore() -> None:
        for parameter, gradient, trained in before:
            parameter.requires_grad_(trained)
            parameter.grad = gradient

    with undone(restore):
        if method.observes != "gradients":  # gradients of activations do not need those of weights
            model.requires_grad_(False)
        with eval_mode(model), torch.set_grad_enabled(gradients), watch(model, plan, method.criterion_name) as record:
            for number, batch in enumerate(batches, start=1):
                model.zero_grad(set_to_none=True)
                with nullcontext() if loss is not None and not isinstance(loss, OwnLabels) else naming_batch(number):
                    found = run_model(model, batch) if loss is None or not gradients else loss(model, batch)
                if gradients:
                    torch.autograd.backward(found)
    record.read(method.criterion_name, plan)
    return record
