"""Check that a pruned model computes the same outputs and gradients as the masked model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from etp_graph.errors import EquivalenceError
from etp_graph.model import (
    Outputs,
    WithoutDropout,
    check_outputs,
    convert_inputs,
    eval_mode,
    named_tensors,
    private_random,
    run_outputs,
    without_autocast,
    without_garbage_collection,
)
from etp_graph.plan import Plan, Selection
from etp_graph.standins import standing_in

from ._comparison import as_real, relative_error
from ._masked import Masked
from ._memory import available_memory, real_inputs
from ._repeats import copy_with_shared_blocks, count_numbers, find_repeated_blocks
from ._trials import SCREENED, TOGETHER, TOLERANCE, Trial, Trials


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Measurements of :func:`verify`.

    Attributes:
        error: largest relative error of an output, over all trials.
        gradient_error: the same for gradients; ``None`` if they were not compared.
        effect: largest relative change of an output by removing the units; never zero if any were removed.
        units: number of units removed, summed over all trials.
        n_units: number of units of the plan.
        dtype: ``float64``, or ``float32`` if an operator of the model does not support float64, or gives NaN in it.
        note: why gradients were not compared although they were asked for, or an empty text.
    """

    error: float
    gradient_error: float | None
    effect: float
    units: int
    n_units: int
    dtype: str
    note: str = ""

    def __str__(self) -> str:
        gradient = "" if self.gradient_error is None else f", gradients {self.gradient_error:.1e}"
        note = f" ({self.note})" if self.note else ""
        return f"pruned == masked in {self.dtype}: outputs {self.error:.1e}{gradient}, {self.units} units removed{note}"


def verify(
    model: nn.Module,
    plan: Plan,
    example_inputs: Any,
    *,
    ratio: float | Sequence[float] = (0.0, 0.3, 0.7, 1.0),
    gradients: bool = True,
    randomize: bool = True,
    seed: int = 0,
    outputs: Outputs = None,
) -> Verification:
    """Check on copies of the model that removing units and masking them give the same results.

    Random units of every group are chosen. In one copy they are set to zero in every slice, and norms are reduced over
    the kept entries. In another copy they are removed. Outputs, and gradients of the parameters, must agree to 1e-6
    (relative) in float64, or to 1e-4 in float32 if an operator does not support float64. The model itself does not
    change.

    Args:
        ratio: share of the units to remove, one trial for each value. 0 removes one unit (of each block) of every
            group, and 1 removes all units that may be removed. For values in between, each group gets a random share
            around the value.
        gradients: compare gradients too.
        randomize: replace weights, biases, norms and running statistics in the copies by random values, because the
            defaults of a fresh model (zero biases, unit norms) hide errors.
        seed: seed of the choice and of the random values.
        outputs: what is compared, as of :func:`etp_graph.trace`. Default: what counted as an output when the plan was
            traced.

    Outputs are compared in every trial, gradients in the first one that removes a part of the units (in all, if none
    does): there every tensor has kept and removed entries. The other trials find operators that accept some sizes only.

    Gradients are not compared if those of the unpruned or of the pruned model itself differ from finite differences (a
    cache that was filled without gradients, an operator with a wrong derivative), or if the unpruned model has none in
    eval mode. The result then has a note.

    Raises:
        EquivalenceError: outputs or gradients differ, and the error names the first group that fails; or removing the
            units changes no output, which proves nothing.
        PlanError: the plan does not fit the model.
    """
    plan.check(model)
    if outputs is not None:
        plan = replace(plan, outputs=check_outputs(outputs))
    with without_garbage_collection():
        judge = Trials(model, plan, example_inputs, gradients=gradients, randomize=randomize, seed=seed)
        ratios = [ratio] if isinstance(ratio, float) else list(ratio)
        judge.ratios_of_gradients = frozenset([r for r in ratios if 0 < r < 1][:1] or ratios)
        trials = [_verified(judge, each) for each in ratios]
    if (units := sum(t.units for t in trials)) and not any(t.effect for t in trials):
        raise judge.no_effect_error(units)
    return Verification(
        error=max(t.error for t in trials),
        gradient_error=max(t.gradient_error for t in trials) if judge.gradients else None,
        note=judge.note,
        effect=max(t.effect for t in trials),
        units=units,
        n_units=plan.n_units,
        dtype=str(judge.dtype).removeprefix("torch."),
    )


def _verified(judge: Trials, ratio: float) -> Trial:
    """Return a trial of all groups.

    Raises:
        EquivalenceError: it fails.
    """
    groups = judge.plan.prunable
    trial = judge.trial(groups, ratio)
    if not trial.good and judge.distrust_gradients(trial, groups, ratio):
        trial = judge.trial(groups, ratio)
    if not trial.good:
        raise judge.equivalence_error(groups, ratio)
    return trial


_RATIOS = {0.5: 0, 0.0: 1, 1.0: 2}
"""Shares of the units that the check of a trace removes -> seed of the random weights. 0 and 1 find operators that only
accept some sizes."""


def lock_what_fails(model: nn.Module, plan: Plan, example_inputs: Any) -> Plan:
    """Return the plan with every group locked that fails the check of :func:`verify`; the reason is its error.

    A trial runs in float32 first. It counts as passed if the outputs differ by less than :data:`SCREENED`, which
    rounding explains. Any larger difference, and outputs that are NaN, are judged in float64, as by :func:`verify`.
    """
    with without_garbage_collection():
        return _lock_failing(
            lambda plan: Trials(model, plan, example_inputs, gradients=False, randomize=True, seed=0, seeds=_RATIOS),
            plan,
            _screen(model, plan, example_inputs),
        )


def _screen(model: nn.Module, plan: Plan, example_inputs: Any) -> Trials | None:
    """Return trials in float32, or ``None`` if the model cannot be copied in float32."""
    try:
        return Trials(
            model, plan, example_inputs, gradients=False, randomize=True, seed=0, dtypes=(torch.float32,), effect=False,
            seeds=_RATIOS,
        )  # fmt: skip
    except RuntimeError:
        return None


def _passes(screen: Trials, plan: Plan, ratio: float) -> bool:
    """Return True if rounding explains the difference that a trial in float32 finds."""
    screen.plan = plan
    try:
        trial = screen.trial(plan.prunable, ratio)
    except RuntimeError:  # of an operator that does not support float32
        return False
    return trial.error <= SCREENED and not trial.unusable


def lock_what_fails_in_blocks(model: nn.Module, plan: Plan, example_inputs: Any) -> Plan:
    """Return the plan with the groups locked that fail in a copy whose repeated blocks share their tensors.

    It is the check of :func:`lock_what_fails` for models that are too large to be copied, or are on the meta device.

    Raises:
        MemoryError: such a copy does not fit into memory, either.
    """
    repeated = find_repeated_blocks(model, plan)
    numbers, available = count_numbers(model, repeated), available_memory(plan.device)
    dtypes = [dtype for dtype in TOLERANCE if available is None or 4 * dtype.itemsize * numbers <= available]
    if not dtypes:
        needed = 4 * torch.float32.itemsize * numbers / 2**30
        raise MemoryError(f"a copy with one block of each kind needs {needed:.0f} GiB")
    judge = Trials(
        model, plan, real_inputs(example_inputs), gradients=False, randomize=True, seed=0, dtypes=dtypes, seeds=_RATIOS,
        copied=lambda dtype: copy_with_shared_blocks(model, repeated, dtype),
    )  # fmt: skip
    names = [name for name, _ in named_tensors(judge.model)]
    reduced = repeated.reduce_plan(plan, names, next(judge.model.parameters()).device.type)
    judge.plan = reduced
    checked = _lock_failing(lambda _: judge, reduced)
    locks = {group.name: group.locked for group in checked.groups if reduced[group.name].locked is None}
    return plan.lock(repeated.repeat_locks({name: why for name, why in locks.items() if why is not None}))


def _lock_failing(make: Callable[[Plan], Trials], plan: Plan, screen: Trials | None = None) -> Plan:
    """Lock the groups that fail.

    Args:
        make: makes the trials that judge, once they are needed.
        plan: the plan.
        screen: faster trials, after which a judgement may not be needed.
    """
    judge: Trials | None = None
    for ratio in _RATIOS:
        if screen is not None and (not plan.prunable or _passes(screen, plan, ratio)):
            continue
        judge, together = judge or make(plan), 1
        while plan.prunable and not (trial := judge.trial(plan.prunable, ratio)).good:
            failing = judge.groups_that_fail(plan.prunable, ratio, trial, together=together)
            if any(why.startswith(TOGETHER) for _, why in failing):
                together *= 2  # what fails together again may have one cause for all
            plan = plan.lock({group.name: f"check failed: {why}" for group, why in failing})
            judge.plan = plan
    return plan


@torch.no_grad()
def compare_outputs(
    pruned: nn.Module, dense: nn.Module, plan: Plan, selection: Selection, example_inputs: Any, *, seed: int = 0
) -> float:
    """Return the largest relative error of an output of a pruned model against the masked dense model.

    Unlike :func:`verify`, this compares two given models with their own weights, in their own precision.

    Args:
        pruned: the model after surgery.
        dense: the model before surgery, or a copy of it.
        plan: the plan of the dense model.
        selection: the units that stayed.
        example_inputs: as for :func:`etp_graph.trace`.
        seed: seed of the random generators in every forward.

    Raises:
        EquivalenceError: the outputs differ.
    """
    like = next(dense.parameters())
    inputs = convert_inputs(example_inputs, like=like)
    got = _eval_outputs(pruned, inputs, plan, seed)
    with Masked(dense, plan, selection.flat(plan)), standing_in(dense, views_only=True):
        want = _eval_outputs(dense, inputs, plan, seed)
    error = relative_error(got, want)
    if not error <= TOLERANCE.get(like.dtype, TOLERANCE[torch.float32]):
        raise EquivalenceError(
            f"the pruned model differs from the masked one by {error:.1e}: run verify(model, plan, example_inputs), "
            "which names the group that is wrong.",
            error=error,
        )
    return error


def _eval_outputs(model: nn.Module, inputs: Any, plan: Plan, seed: int) -> list[Tensor]:
    with eval_mode(model), private_random(model, seed), WithoutDropout(), without_autocast():
        return [as_real(tensor) for tensor in run_outputs(model, inputs, plan.outputs).tensors.values()]
