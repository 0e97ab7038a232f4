"""Trials on copies of one model: remove units by masking and by surgery, and compare the results."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import isfinite, isnan, nan
from types import MappingProxyType
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
    kept_generators,
    run_outputs,
    without_autocast,
)
from etp_graph.plan import Group, Plan, Positions, Selection, with_no_unit
from etp_graph.surgery import prune_

from ._comparison import as_real, count_unusable, describe_difference, describe_failure, relative_error
from ._copies import Copy
from ._replay import Choices, Comparable
from ._sampling import random_selection

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Largest relative error that counts as equal."""

SCREENED = 5e-6
"""Largest relative error in float32 that rounding explains. That of right plans of deep models was at most 2.3e-6."""

TOGETHER = "together with others: "
"""How the reason begins of a group that fails only together with others."""

_STEP = 1e-6
"""Step of the finite differences, for parameters of about 1."""

_DERIVATIVE_TOLERANCE = 1e-2
"""Relative difference between gradient and finite difference that kinks of the function may explain."""


@dataclass(frozen=True, slots=True)
class Trial:
    error: float
    gradient_error: float
    effect: float
    units: int
    good: bool
    why: str = ""
    unusable: int = 0


class Trials:
    """Trials on copies of one model, in the highest precision that its operators support.

    Args:
        model, plan, example_inputs, gradients, randomize, seed: as of :func:`etp_graph.verify`.
        dtypes: the precisions, highest first.
        copied: as of :class:`Copy`.
        seeds: ratio -> seed of the random weights in its trial. Trials with other weights than the first see what these
            hide, such as channels that are zero after a ReLU everywhere.
        effect: whether to run the unpruned model, to find a precision in which its outputs are usable, and to measure
            the effect of a removal.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, example_inputs: Any, *, gradients: bool, randomize: bool, seed: int,
        dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32),
        copied: Callable[[torch.dtype], nn.Module] | None = None, effect: bool = True,
        seeds: Mapping[float, int] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self.plan, self.gradients, self.seed, self.seeds = plan, gradients, seed, seeds
        self.ratios_of_gradients: frozenset[float] | None = None
        self.seed_others, self.drawn = False, set[str]()
        self.steady = self.draws = False
        self.note = ""
        self.dense: list[Tensor] | None = None
        for self.dtype in dtypes:
            try:
                self._copy = Copy(model, self.dtype, seed if randomize else None, copied)
                self.inputs = convert_inputs(example_inputs, like=next(self.model.parameters()))
                if not effect:
                    break
                self.dense = self._dense_outputs()
            except RuntimeError:
                if self.dtype == dtypes[-1]:
                    raise
                continue
            if not count_unusable(self.dense):
                break

    @property
    def model(self) -> nn.Module:
        """The copy that all runs are copied from."""
        return self._copy.model

    def _dense_outputs(self) -> list[Tensor]:
        """Return the outputs of a copy, because a model may keep what it computes."""
        with torch.no_grad():
            found = self._outputs(self._copy.run_copy())
            if self.seed_others or self._draws_outside_torch(found):
                self.seed_others = True
                found = self._outputs(self._copy.run_copy())
        return found

    def _draws_outside_torch(self, found: list[Tensor]) -> bool:
        """Return True if the forward draws from NumPy's or Python's generators, which then get the seed each time.

        Beside other threads, which may have moved the generators, the forward draws if another one gives other outputs.
        """
        if SEEDED.isdisjoint(self.drawn):
            return False
        return threading.active_count() == 1 or relative_error(self._outputs(copy_model(self.model)), found) > 0

    def _outputs(self, model: nn.Module, choices: Choices | None = None) -> list[Tensor]:
        found: list[Tensor] = []
        for mode in self.plan.modes:
            wide = InFloat64() if self.dtype == torch.float64 else nullcontext()
            evaluation = eval_mode(model, containers=mode == "train")
            own = kept_generators(model, seed=self.seed if self.seed_others else None)
            comparable = Comparable(self.seed, steady=self.steady, choices=choices)
            with evaluation, own as drawn, comparable, WithoutDropout(), wide, without_autocast():
                chosen = run_outputs(model, self.inputs, self.plan.outputs, every_mode=mode == "eval")
                found += [as_real(tensor) for tensor in chosen.tensors.values()]
            self.drawn |= drawn
            self.draws |= comparable.drew
        return found

    def distrust_gradients(self, trial: Trial, groups: Sequence[Group], ratio: float) -> bool:
        """Stop comparing gradients if only they differ, and those of the unpruned or the pruned model are wrong.

        PyTorch computes wrong ones for some layouts of memory, which may appear only when one head is left.

        Args:
            trial: the trial that is not good.
            groups, ratio: its arguments.

        Returns whether this is so.
        """
        if not self.gradients or trial.error > TOLERANCE[self.dtype]:
            return False
        for which, model in (("unpruned", self.model), ("pruned", self._pruned(groups, ratio))):
            error = self._derivative_error(model)
            if error > _DERIVATIVE_TOLERANCE:
                self.gradients = False
                self.note = (
                    f"gradients were not compared: those that PyTorch computes for the {which} model differ from "
                    f"finite differences by {error:.1e}"
                )
                return True
        return False

    def _drop_gradients(self) -> bool:
        """Stop comparing gradients if the unpruned model itself has none in eval mode. Return whether this is so.

        Some code refuses a backward in eval mode, or overwrites what the backward needs.
        """
        if not self.gradients:
            return False
        try:
            self._run(copy_model(self.model), Choices(), gradients=True)
        except Exception as error:  # noqa: BLE001 - the code of a user
            self.gradients = False
            self.note = (
                f"gradients were not compared: the unpruned model cannot be differentiated: {describe_failure(error)}"
            )
        return not self.gradients

    def _pruned(self, groups: Sequence[Group], ratio: float) -> nn.Module:
        """Return the pruned copy of a trial."""
        model = self._copy.run_copy()
        prune_(model, self.plan, self._selection(groups, ratio))
        return model

    def _selection(self, groups: Sequence[Group], ratio: float) -> Selection:
        return random_selection(self.plan, groups, ratio, torch.Generator().manual_seed(self.seed))

    def _derivative_error(self, model: nn.Module) -> float:
        """Return how far the gradients of a model are from central differences, in a random direction."""
        _, grads = self._run(copy_model(model), Choices(), gradients=True)
        generator = torch.Generator().manual_seed(self.seed)
        steps = {
            name: torch.randn(p.shape, generator=generator, device="cpu").to(p) for name, p in model.named_parameters()
        }
        slope = sum(float((grads[name] * step).sum()) for name, step in steps.items() if name in grads)
        losses = []
        for sign in (1.0, -1.0):
            moved = copy_model(model)
            with torch.no_grad():
                for name, parameter in moved.named_parameters():
                    parameter.add_(steps[name], alpha=sign * _STEP)
            with torch.enable_grad():
                losses.append(float(torch.as_tensor(self._loss(self._outputs(moved))).detach()))
        found = (losses[0] - losses[1]) / (2 * _STEP)
        return abs(found - slope) / max(abs(found), abs(slope), 1e-12)

    def groups_that_fail(
        self, groups: Sequence[Group], ratio: float, trial: Trial | None = None, *, together: int = 1
    ) -> list[tuple[Group, str]]:
        """Return the groups that fail alone, with reasons; of a set of which none does, some that complete a failure.

        The caller locks these and asks again, until no trial fails.

        Args:
            groups, ratio: of the trial.
            trial: its outcome, if it is known.
            together: so many groups of each set that fails only together.
        """
        trial = trial or self.trial(groups, ratio)
        if trial.good:
            return []
        if len(groups) == 1:
            return [(groups[0], trial.why)]
        half = len(groups) // 2
        bad = [
            *self.groups_that_fail(groups[:half], ratio, together=together),
            *self.groups_that_fail(groups[half:], ratio, together=together),
        ]
        if bad:
            return bad
        end = self._end_of_failing(groups, ratio, low=half)
        return [(group, TOGETHER + trial.why) for group in groups[max(0, end - together) : end]]

    def _end_of_failing(self, groups: Sequence[Group], ratio: float, *, low: int = 0) -> int:
        """Find by bisection a number of groups from the first on that fail, of which one less pass.

        Args:
            groups, ratio: of a trial that fails.
            low: so many of them pass.
        """
        high = len(groups)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.trial(groups[:middle], ratio).good else (low, middle)
        return high

    def equivalence_error(self, groups: Sequence[Group], ratio: float) -> EquivalenceError:
        """Find by bisection the first group with which the trial of all groups up to it fails; return the error."""
        high = self._end_of_failing(groups, ratio)
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

    def trial(self, groups: Sequence[Group], ratio: float) -> Trial:
        """Remove a share ``ratio`` of the units of these groups by masking and by surgery, and compare the results.

        If the results differ and the forward draws random numbers, they are compared again with constant ones.
        """
        trial = self._compare(groups, ratio)
        gc.collect(0)  # copies that refer to themselves: the collector may be off
        if trial.good or self.steady or not self.draws:
            return trial
        self.steady = True
        self.dense = self._dense_outputs()
        return self._compare(groups, ratio)

    def _compare(self, groups: Sequence[Group], ratio: float) -> Trial:
        selection = self._selection(groups, ratio)
        # In float32, some draws round by more than the tolerance. A screen may doubt a right plan, a judge may not.
        judges_in_float32 = self.dtype == torch.float32 and self.dense is not None
        self._copy.draw(self.seed if judges_in_float32 else self.seeds.get(ratio, self.seed))
        keep, choices = selection.flat(self.plan), Choices(tolerance=TOLERANCE[self.dtype])
        gradients = self.gradients and (self.ratios_of_gradients is None or ratio in self.ratios_of_gradients)
        pruned = self._copy.run_copy()  # before masking, which writes zeros into the weights that copies share
        try:
            prune_(pruned, self.plan, selection)
        except Exception as failure:  # noqa: BLE001 - of surgery, on a plan that may be wrong
            return _failed(failure)
        try:
            with self._copy.masked(self.plan, keep) as masked:
                want, want_grads = self._run(masked, choices, gradients=gradients)
        except Exception:  # of the user's code; raised again if the unpruned model does not explain it
            if not self._drop_gradients():
                raise
            return self._compare(groups, ratio)
        del masked
        try:
            got, got_grads = self._run(pruned, Choices(choices, tolerance=TOLERANCE[self.dtype]), gradients=gradients)
        except Exception as failure:  # noqa: BLE001 - the code of a user, with sizes that it may not expect
            return _failed(failure)
        error = relative_error(got, want)
        gradient_error = _gradient_error(got_grads, want_grads, self.plan, keep)
        effect = 0.0 if self.dense is None else relative_error(want, self.dense)
        good = max(error, gradient_error) <= TOLERANCE[self.dtype]
        why = describe_difference(got, want, error) + (f" (gradients by {gradient_error:.1e})" if gradients else "")
        return Trial(error, gradient_error, effect, int((~keep).sum()), good, why, count_unusable(want))

    def _run(self, model: nn.Module, choices: Choices, *, gradients: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
        with torch.set_grad_enabled(gradients):
            out = self._outputs(model, choices)
        if not gradients:
            return out, {}
        loss = self._loss(out)
        if isinstance(loss, Tensor):
            loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return [t.detach() for t in out], grads

    def _loss(self, out: Sequence[Tensor]) -> Any:
        """Return a random combination of the outputs that have gradients."""
        generator = torch.Generator().manual_seed(self.seed)
        return sum(
            (t * torch.randn(t.shape, generator=generator, dtype=t.dtype, device="cpu").to(t.device)).sum()
            for t in out
            if t.requires_grad and t.is_floating_point()
        )


def _failed(failure: Exception) -> Trial:
    return Trial(float("inf"), float("inf"), 0.0, 0, False, f"the pruned model fails: {describe_failure(failure)}")


def _gradient_error(got: dict[str, Tensor], want: dict[str, Tensor], plan: Plan, keep: Tensor) -> float:
    """Return the largest relative error of a gradient over its kept entries that are finite with masks."""
    full = with_no_unit(keep, True)
    sliced = Positions(plan).axes
    top = max((size for g in want.values() if g.numel() and isfinite(size := _largest(g))), default=0.0)
    worst = 0.0
    for name, grad in got.items():
        if name not in want or ".parametrizations." in name:
            continue  # surgery rescales magnitudes, so their gradients differ although the function is the same
        kept = {
            part.axis: part.kept_positions(full).nonzero().flatten().to(grad.device) for part in sliced.get(name, ())
        }
        if grad.shape != tuple(len(kept[d]) if d in kept else n for d, n in enumerate(want[name].shape)):
            return float("inf")
        if not grad.numel():
            continue
        difference, largest = _compare_kept(grad, want[name], kept)
        if not isfinite(difference):
            difference, largest = _compare_finite(grad, want[name], kept)
        scale = max(largest, 1e-6 * top)
        worst = max(worst, difference / scale if scale else 0.0)
    return worst


_CHUNK = 2**20
"""Number of elements of the pieces in which gradients are compared, which stay in the cache of a processor."""


def _compare_kept(grad: Tensor, other: Tensor, kept: dict[int, Tensor]) -> tuple[float, float]:
    """Return the largest difference of a gradient from the kept entries of another one, and the largest of these.

    Both are NaN if an entry is.

    Args:
        grad: the gradient.
        other: the other one, of the shape before surgery.
        kept: the positions that ``grad`` has of it, by axis.
    """
    if not grad.ndim:
        return _largest(grad - other), _largest(other)
    rows = kept.get(0, torch.arange(len(other), device=other.device))
    step = max(1, _CHUNK * len(rows) // grad.numel())
    differences, sizes = list[float](), list[float]()
    for mine, piece in zip(grad.split(step), rows.split(step), strict=True):
        part = other.index_select(0, piece)
        for axis, positions in kept.items():
            part = part.index_select(axis, positions) if axis else part
        sizes.append(_largest(part))
        differences.append(_largest(part.sub_(mine)))
    return _maximum(differences), _maximum(sizes)


def _maximum(values: Sequence[float]) -> float:
    """Return the largest value; NaN if one is NaN, which ``max`` would pass over."""
    return nan if any(isnan(value) for value in values) else max(values)


def _compare_finite(grad: Tensor, other: Tensor, kept: dict[int, Tensor]) -> tuple[float, float]:
    """Return what :func:`_compare_kept` does, of the entries that are finite in the other gradient.

    A mask may divide zero by zero where surgery does not, as in the norm of a unit. The opposite is an error.
    """
    grad, other = grad.to_dense(), other.to_dense()  # sparse ones cannot be asked which entries are finite
    for axis, positions in kept.items():
        other = other.index_select(axis, positions)
    usable = other.isfinite()
    if not bool(grad.isfinite()[usable].all()):
        return float("inf"), 1.0
    values = other[usable]
    return (_largest(values - grad[usable]), _largest(values)) if values.numel() else (0.0, 0.0)


def _largest(tensor: Tensor) -> float:
    """Return the largest absolute value; NaN if one is NaN."""
    low, high = (tensor.to_dense().abs() if tensor.is_complex() or tensor.is_sparse else tensor).aminmax()
    return float(torch.maximum(-low, high))
