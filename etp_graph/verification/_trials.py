"""Trials on copies of one model: remove units by masking and by surgery, and compare the results."""

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
    run_outputs,
    without_autocast,
)
from etp_graph.plan import Group, Plan, Positions, Selection, with_no_unit
from etp_graph.standins import standing_in
from etp_graph.surgery import prune_

from ._comparison import as_real, count_unusable, describe_difference, describe_failure, relative_error
from ._masked import Masked
from ._replay import Choices, SteadyNoise
from ._sampling import random_selection, randomize_

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Largest relative error that counts as equal."""

SCREENED = 5e-6
"""Largest relative error in float32 that rounding explains. That of right plans of deep models was at most 2.3e-6."""

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


def _with_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert a copy, also the tensors that its modules keep as plain attributes (what an earlier forward computed)."""
    for module in model.to(dtype).modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                vars(module)[name] = value.to(dtype)
    return model


class Trials:
    """Trials on copies of one model, in the highest precision that its operators support."""

    def __init__(
        self, model: nn.Module, plan: Plan, example_inputs: Any, *, gradients: bool, randomize: bool, seed: int,
        dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32),
        copied: Callable[[torch.dtype], nn.Module] | None = None,
    ) -> None:  # fmt: skip
        self.plan, self.gradients, self.seed = plan, gradients, seed
        self.seed_others, self.drawn = False, set[str]()
        self.steady = self.draws = False
        self.note = ""
        self._copied = copied or (lambda dtype: _with_dtype(copy_model(model), dtype))
        for self.dtype in dtypes:
            try:
                self._prepare(model, example_inputs, randomize)
            except RuntimeError:
                if self.dtype == dtypes[-1]:
                    raise
                continue
            if not count_unusable(self.dense):
                break

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
            found = self._outputs(copy_model(self.model, share=True))
            if self.seed_others or self._draws_outside_torch(found):
                self.seed_others = True
                found = self._outputs(copy_model(self.model, share=True))
        return found

    def _draws_outside_torch(self, found: list[Tensor]) -> bool:
        """Return True if the forward draws from NumPy's or Python's generators, which then get the seed each time.

        Beside other threads, which may have moved the generators, the forward draws if another one gives other outputs.
        """
        if SEEDED.isdisjoint(self.drawn):
            return False
        return threading.active_count() == 1 or relative_error(self._outputs(copy_model(self.model)), found) > 0

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        found: list[Tensor] = []
        for mode in self.plan.modes:
            wide = InFloat64() if self.dtype == torch.float64 else nullcontext()
            evaluation = eval_mode(model, containers=mode == "train")
            own = private_random(model, self.seed, seed_others=self.seed_others)
            noise = SteadyNoise(active=self.steady)
            with evaluation, own as drawn, noise, WithoutDropout(), wide, without_autocast():
                chosen = run_outputs(model, self.inputs, self.plan.outputs, every_mode=mode == "eval")
                found += [as_real(tensor) for tensor in chosen.tensors.values()]
            self.drawn |= drawn
            self.draws |= noise.seen
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
            self._run(copy_model(self.model), Choices())
        except Exception as error:  # noqa: BLE001 - the code of a user
            self.gradients = False
            self.note = (
                f"gradients were not compared: the unpruned model cannot be differentiated: {describe_failure(error)}"
            )
        return not self.gradients

    def _pruned(self, groups: Sequence[Group], ratio: float) -> nn.Module:
        """Return the pruned copy of a trial."""
        model = copy_model(self.model, share=True)
        prune_(model, self.plan, self._selection(groups, ratio))
        return model

    def _selection(self, groups: Sequence[Group], ratio: float) -> Selection:
        return random_selection(self.plan, groups, ratio, torch.Generator().manual_seed(self.seed))

    def _derivative_error(self, model: nn.Module) -> float:
        """Return how far the gradients of a model are from central differences, in a random direction."""
        _, grads = self._run(copy_model(model), Choices())
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
        self, groups: Sequence[Group], ratio: float, trial: Trial | None = None
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

    def trial(self, groups: Sequence[Group], ratio: float) -> Trial:
        """Remove a share ``ratio`` of the units of these groups by masking and by surgery, and compare the results.

        If the results differ and the forward draws random numbers, they are compared again with constant ones.
        """
        trial = self._compare(groups, ratio)
        if trial.good or self.steady or not self.draws:
            return trial
        self.steady = True
        self.dense = self._dense_outputs()
        return self._compare(groups, ratio)

    def _compare(self, groups: Sequence[Group], ratio: float) -> Trial:
        selection = self._selection(groups, ratio)
        keep = selection.flat(self.plan)
        masked, choices = copy_model(self.model, share=True), Choices(tolerance=TOLERANCE[self.dtype])
        _give_own_memory(masked, self.plan)
        try:
            with Masked(masked, self.plan, keep), standing_in(masked, views_only=True):
                want, want_grads = self._run(masked, choices)
        except Exception:  # of the user's code; raised again if the unpruned model does not explain it
            if not self._drop_gradients():
                raise
            return self._compare(groups, ratio)
        del masked  # keep one copy at a time, because memory may not suffice for two
        pruned = copy_model(self.model, share=True)
        try:
            prune_(pruned, self.plan, selection)
            got, got_grads = self._run(pruned, Choices(choices, tolerance=TOLERANCE[self.dtype]))
        except Exception as failure:  # noqa: BLE001 - the code of a user, with sizes that it may not expect
            why = f"the pruned model fails: {describe_failure(failure)}"
            return Trial(float("inf"), float("inf"), 0.0, 0, False, why)
        error = relative_error(got, want)
        gradient_error = _gradient_error(got_grads, want_grads, self.plan, keep)
        effect = relative_error(want, self.dense)
        good = max(error, gradient_error) <= TOLERANCE[self.dtype]
        why = describe_difference(got, want, error) + (
            f" (gradients by {gradient_error:.1e})" if self.gradients else ""
        )
        return Trial(error, gradient_error, effect, int((~keep).sum()), good, why)

    def _run(self, model: nn.Module, choices: Choices) -> tuple[list[Tensor], dict[str, Tensor]]:
        with torch.set_grad_enabled(self.gradients), choices:
            out = self._outputs(model)
        if not self.gradients:
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


def _give_own_memory(model: nn.Module, plan: Plan) -> None:
    """Give the parameters that units slice memory of their own, in a copy that shares it with another model."""
    tensors = dict(named_tensors(model))
    for name in Positions(plan).axes:
        if isinstance(tensors[name], nn.Parameter):
            tensors[name].data = tensors[name].data.clone()


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
