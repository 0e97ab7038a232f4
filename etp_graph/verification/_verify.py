"""Check that a pruned model computes the same outputs and gradients as the masked model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from etp_graph.errors import EquivalenceError
from etp_graph.model import (
    SEEDED,
    InFloat64,
    WithoutDropout,
    convert_inputs,
    copy_model,
    eval_mode,
    named_tensors,
    plain_forward,
    private_random,
    run_model,
    tensors_of,
    without_autocast,
)
from etp_graph.plan import Group, Plan, Positions, Selection, with_no_unit
from etp_graph.standins import standing_in
from etp_graph.surgery import prune_

from ._masked import Masked
from ._memory import available_memory, real_inputs
from ._repeats import copy_with_shared_blocks, count_numbers, find_repeated_blocks
from ._sampling import random_selection, randomize_

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Measurements of :func:`verify`.

    Attributes:
        error: largest relative error of an output, over all trials.
        gradient_error: the same for gradients; ``None`` if they were not compared.
        effect: largest relative change of an output by removing the units; never zero if any were removed.
        units: number of units removed, summed over all trials.
        n_units: number of units of the plan.
        dtype: ``float64``, or ``float32`` if an operator of the model does not support float64.
    """

    error: float
    gradient_error: float | None
    effect: float
    units: int
    n_units: int
    dtype: str

    def __str__(self) -> str:
        gradient = "" if self.gradient_error is None else f", gradients {self.gradient_error:.1e}"
        return f"pruned == masked in {self.dtype}: outputs {self.error:.1e}{gradient}, {self.units} units removed"


def verify(
    model: nn.Module,
    plan: Plan,
    example_inputs: Any,
    *,
    ratio: float | Sequence[float] = (0.0, 0.3, 0.7, 1.0),
    gradients: bool = True,
    randomize: bool = True,
    seed: int = 0,
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

    Raises:
        EquivalenceError: outputs or gradients differ, and the error names the first group that fails; or removing the
            units changes no output, which proves nothing.
        PlanError: the plan does not fit the model.
    """
    plan.check(model)
    judge = _Trials(model, plan, example_inputs, gradients=gradients, randomize=randomize, seed=seed)
    trials = []
    for ratio_ in [ratio] if isinstance(ratio, float) else ratio:
        trial = judge.trial(plan.prunable, ratio_)
        if not trial.good:
            raise judge.equivalence_error(plan.prunable, ratio_)
        trials.append(trial)
    if (units := sum(t.units for t in trials)) and not any(t.effect for t in trials):
        raise judge.no_effect_error(units)
    return Verification(
        error=max(t.error for t in trials),
        gradient_error=max(t.gradient_error for t in trials) if gradients else None,
        effect=max(t.effect for t in trials),
        units=units,
        n_units=plan.n_units,
        dtype=str(judge.dtype).removeprefix("torch."),
    )


def lock_what_fails(model: nn.Module, plan: Plan, example_inputs: Any) -> Plan:
    """Return the plan with every group locked that fails the check of :func:`verify`; the reason is its error."""
    judge = _Trials(model, plan, example_inputs, gradients=False, randomize=True, seed=0)
    return _lock_failing(judge)


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
    judge = _Trials(
        model, plan, real_inputs(example_inputs), gradients=False, randomize=True, seed=0, dtypes=dtypes,
        copied=lambda dtype: copy_with_shared_blocks(model, repeated, dtype),
    )  # fmt: skip
    names = [name for name, _ in named_tensors(judge.model)]
    reduced = repeated.reduce_plan(plan, names, next(judge.model.parameters()).device.type)
    judge.plan = reduced
    checked = _lock_failing(judge)
    locks = {group.name: group.locked for group in checked.groups if reduced[group.name].locked is None}
    return plan.lock(repeated.repeat_locks({name: why for name, why in locks.items() if why is not None}))


def _lock_failing(judge: _Trials) -> Plan:
    plan = judge.plan
    for ratio in (0.5, 0.0, 1.0):  # 0 and 1 find operators that only accept some sizes
        while plan.prunable and not (trial := judge.trial(plan.prunable, ratio)).good:
            plan = plan.lock(
                {g.name: f"check failed: {why}" for g, why in judge.groups_that_fail(plan.prunable, ratio, trial)}
            )
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
    got = _eval_outputs(pruned, inputs, seed)
    with Masked(dense, plan, selection.flat(plan)), standing_in(dense, views_only=True):
        want = _eval_outputs(dense, inputs, seed)
    error = _relative_error(got, want)
    if not error <= TOLERANCE.get(like.dtype, TOLERANCE[torch.float32]):
        raise EquivalenceError(
            f"the pruned model differs from the masked one by {error:.1e}: run verify(model, plan, example_inputs), "
            "which names the group that is wrong.",
            error=error,
        )
    return error


def _eval_outputs(model: nn.Module, inputs: Any, seed: int) -> list[Tensor]:
    with eval_mode(model), private_random(model, seed), WithoutDropout(), without_autocast():
        return [_as_real(tensor) for tensor in tensors_of(run_model(model, inputs))]


@dataclass(frozen=True, slots=True)
class _Trial:
    error: float
    gradient_error: float
    effect: float
    units: int
    good: bool
    why: str = ""


class _Trials:
    """Trials on copies of one model, in the highest precision that its operators support."""

    def __init__(
        self, model: nn.Module, plan: Plan, example_inputs: Any, *, gradients: bool, randomize: bool, seed: int,
        dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32),
        copied: Callable[[torch.dtype], nn.Module] | None = None,
    ) -> None:  # fmt: skip
        self.plan, self.gradients, self.seed = plan, gradients, seed
        self.seed_others, self.drawn = False, set[str]()
        self._copied = copied or (lambda dtype: copy_model(model).to(dtype))
        for self.dtype in dtypes:
            try:
                self._prepare(model, example_inputs, randomize)
                break
            except RuntimeError:
                if self.dtype == dtypes[-1]:
                    raise

    def _prepare(self, model: nn.Module, example_inputs: Any, randomize: bool) -> None:
        with plain_forward(model):
            self.model = self._copied(self.dtype)
        self.model.requires_grad_(True)
        self.inputs = convert_inputs(example_inputs, like=next(self.model.parameters()))
        if randomize:
            randomize_(self.model, seed=self.seed)
        self.dense = self._dense_outputs()

    def _dense_outputs(self) -> list[Tensor]:
        """Return the outputs of a copy, because a model may keep what it computes."""
        with torch.no_grad():
            found = self._outputs(copy_model(self.model))
            if self.seed_others or self._draws_outside_torch(found):
                self.seed_others = True
                found = self._outputs(copy_model(self.model))
        return found

    def _draws_outside_torch(self, found: list[Tensor]) -> bool:
        """Return True if the forward draws from NumPy's or Python's generators, which then get the seed each time.

        Beside other threads, which may have moved the generators, the forward draws if another one gives other outputs.
        """
        if SEEDED.isdisjoint(self.drawn):
            return False
        return threading.active_count() == 1 or _relative_error(self._outputs(copy_model(self.model)), found) > 0

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        found: list[Tensor] = []
        for mode in self.plan.modes:
            wide = InFloat64() if self.dtype == torch.float64 else nullcontext()
            evaluation = eval_mode(model, containers=mode == "train")
            own = private_random(model, self.seed, seed_others=self.seed_others)
            with evaluation, own as drawn, WithoutDropout(), wide, without_autocast():
                found += [_as_real(tensor) for tensor in tensors_of(run_model(model, self.inputs))]
            self.drawn |= drawn
        return found

    def groups_that_fail(
        self, groups: Sequence[Group], ratio: float, trial: _Trial | None = None
    ) -> list[tuple[Group, str]]:
        """Return the groups that fail alone, or the smallest failing set found by bisection, with reasons."""
        trial = trial or self.trial(groups, ratio)
        if trial.good:
            return []
        if len(groups) == 1:
            return [(groups[0], trial.why)]
        half = len(groups) // 2
        bad = self.groups_that_fail(groups[:half], ratio) + self.groups_that_fail(groups[half:], ratio)
        return bad or [(group, trial.why) for group in groups]

    def equivalence_error(self, groups: Sequence[Group], ratio: float) -> EquivalenceError:
        """Find by bisection the first group with which the trial of all groups up to it fails; return the error."""
        low, high = 0, len(groups)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.trial(groups[:middle], ratio).good else (low, middle)
        group, alone = groups[high - 1], self.trial(groups[high - 1 : high], ratio)
        trial = self.trial(groups[:high], ratio) if alone.good else alone
        together = " together with groups before it" if alone.good else ""
        return EquivalenceError(
            f"group {group.name!r}{together}: {trial.why}. The plan is wrong there; trace(..., check=True) locks it, "
            f"or pass ignore={group.name!r}.",
            group=group.name,
            error=trial.error,
        )

    def no_effect_error(self, units: int) -> EquivalenceError:
        """Return the error for trials that cannot show a difference."""
        return EquivalenceError(
            f"removing {units} units changes no output, so that equal outputs prove nothing. The model may return "
            "what it kept from an earlier forward (empty its caches first), or weights of zero may hide the units "
            "(randomize=True replaces them).",
            group=self.plan.prunable[0].name,
            error=0.0,
        )

    def trial(self, groups: Sequence[Group], ratio: float) -> _Trial:
        """Remove a share ``ratio`` of the units of these groups by masking and by surgery, and compare the results."""
        generator = torch.Generator().manual_seed(self.seed)
        selection = random_selection(self.plan, groups, ratio, generator)
        keep = selection.flat(self.plan)
        pruned = copy_model(self.model)
        try:
            prune_(pruned, self.plan, selection)
            got, got_grads = self._run(pruned)
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, AssertionError) as failure:
            return _Trial(float("inf"), float("inf"), 0.0, 0, False, f"the pruned model fails: {failure}")
        del pruned  # keep one copy at a time, because memory may not suffice for two
        masked = copy_model(self.model)
        with Masked(masked, self.plan, keep), standing_in(masked, views_only=True):
            want, want_grads = self._run(masked)
        error = _relative_error(got, want)
        gradient_error = _gradient_error(got_grads, want_grads, self.plan, keep)
        effect = _relative_error(want, self.dense)
        good = max(error, gradient_error) <= TOLERANCE[self.dtype]
        why = f"pruned and masked model differ by {error:.1e}" + (
            f" (gradients by {gradient_error:.1e})" if self.gradients else ""
        )
        return _Trial(error, gradient_error, effect, int((~keep).sum()), good, why)

    def _run(self, model: nn.Module) -> tuple[list[Tensor], dict[str, Tensor]]:
        with torch.set_grad_enabled(self.gradients):
            out = self._outputs(model)
        if not self.gradients:
            return out, {}
        generator = torch.Generator().manual_seed(self.seed)
        loss = sum(
            (t * torch.randn(t.shape, generator=generator, dtype=t.dtype, device="cpu").to(t.device)).sum()
            for t in out
            if t.requires_grad and t.is_floating_point()
        )
        if isinstance(loss, Tensor):
            loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return [t.detach() for t in out], grads


def _as_real(tensor: Tensor) -> Tensor:
    """Convert integers and booleans to float64 and complex numbers to pairs, so that differences can be computed."""
    if tensor.is_complex():
        return torch.view_as_real(tensor)
    return tensor if tensor.is_floating_point() else tensor.double()


def _relative_error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Return the largest |got - want| of a tensor, divided by its largest |want|, over all tensors.

    Infinite if numbers or shapes of the tensors differ, or if values that differ are not finite.
    """
    worst = float("inf") if len(got) != len(want) or not want else 0.0
    for a, b in zip(got, want, strict=False):
        if a.shape != b.shape:
            return float("inf")
        other = a != b  # masked logits may be equal infinities, whose difference is NaN
        if bool(other.any()):
            if not bool(a[other].isfinite().all() and b[other].isfinite().all()):
                return float("inf")
            scale = float(b[b.isfinite()].abs().max())
            worst = max(worst, float((a[other] - b[other]).abs().max()) / scale if scale else float("inf"))
    return worst


def _gradient_error(got: dict[str, Tensor], want: dict[str, Tensor], plan: Plan, keep: Tensor) -> float:
    """Return the largest relative error of a gradient over its kept entries."""
    full = with_no_unit(keep, True)
    sliced = Positions(plan).axes
    top = max((float(g.abs().max()) for g in want.values() if g.numel()), default=0.0)
    worst = 0.0
    for name, grad in got.items():
        if name not in want or ".parametrizations." in name:
            continue  # surgery rescales magnitudes, so their gradients differ although the function is the same
        other = want[name]
        for axis in sliced.get(name, ()):
            other = other.index_select(axis.axis, axis.kept_positions(full).nonzero().flatten().to(other.device))
        if other.shape != grad.shape:
            return float("inf")
        scale = max(float(other.abs().max()), 1e-6 * top) if other.numel() else 0.0
        worst = max(worst, float((grad - other).abs().max()) / scale if scale else 0.0)
    return worst
