"""Sparse phase, surgery after step n and fine-tuning, as shared by the callbacks of all training frameworks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Unpack

from torch import nn
from torch.utils._pytree import tree_map

from etp_graph import distributed
from etp_graph.budget import Budget, Targets, allocate, show_targets
from etp_graph.compression import budget_of
from etp_graph.errors import BudgetError, CheckpointError, EtpError, ForceError, PlanError
from etp_graph.graph import require_plan_alone, trace
from etp_graph.methods import Method, former_versions, get
from etp_graph.model import Outputs, require_bare
from etp_graph.plan import CostModel, Plan, Selection
from etp_graph.regularizer import Regularizer
from etp_graph.surgery import (
    OnUncuttable,
    Optimizers,
    bare_copies,
    get_record,
    list_copies,
    list_optimizers,
    prune_,
    require_cuttable,
)

FORMAT = 1

Stage = Literal["idle", "sparse", "finetune"]


@dataclass(frozen=True, slots=True)
class Epochs:
    """A point in training after ``n`` epochs; ``n`` may be a fraction. Used as ``prune_at=Epochs(2)``."""

    n: float


class Pruning:
    """A sparse phase, surgery after a given optimizer step, and fine-tuning with the same optimizer.

    Args:
        example_inputs: as for :func:`etp_graph.trace`; tensors are moved to the model's device.
        prune_at: when surgery takes place: after this many optimizer steps (an integer), after this share of all
            steps (a fraction up to 1), or after :class:`Epochs`.
        budget: the target with all its rules. If its ``scope`` or ``rank`` is ``None``, the method's is used.
        method: a name of :data:`etp_graph.methods.METHODS`, or a :class:`etp_graph.methods.Method`. It must have one
            round and a mode other than ``"loss"``. Its criterion must not need data, and it must not choose units
            during training by the criterion.
        prune: kinds of units to prune, see :func:`etp_graph.trace`.
        ignore: names or patterns of modules whose units all stay.
        plan: the plan of the model, if it is traced already.
        check: as for :func:`etp_graph.trace`.
        on_uncuttable: what to do with states of the optimizer that surgery cannot cut, see :func:`etp_graph.prune_`.
            ``"refuse"`` raises the error when training begins.
        outputs: what counts as an output of the model, as for :func:`etp_graph.trace`.
        also: other models that lose the same units, such as a moving average, see :func:`etp_graph.prune_`. A list may
            be filled until training begins. A checkpoint of the training framework does not hold them: to resume after
            surgery, pass copies that :func:`etp_graph.save` and :func:`etp_graph.load` brought back.
        targets: the target, ``speed_up=2`` for example, see :class:`etp_graph.Budget`. Give exactly one, or ``budget``.

    Attributes:
        stage: ``"idle"`` outside of training, ``"sparse"``, or ``"finetune"``.
        prune_step: the optimizer step after which surgery takes place; ``None`` before training.
        plan: the plan; ``None`` before it is traced.
        regularizer: the regularizer of the sparse phase; ``None`` before it, after surgery, and for methods without a
            force.
        selection: the selection that surgery applied; ``None`` before surgery.

    Raises:
        BudgetError: the target is malformed.
        ForceError: the method or ``prune_at`` is not supported.
        PlanError: ``prune``, ``ignore`` or ``outputs`` is given with a plan.
    """

    @show_targets
    def __init__(
        self,
        example_inputs: Any,
        *,
        prune_at: int | float | Epochs,
        budget: Budget | None = None,
        method: str | Method = "etp",
        prune: str | Sequence[str] | None = None,
        ignore: str | Sequence[str] = (),
        plan: Plan | None = None,
        check: bool | Literal["auto"] = "auto",
        on_uncuttable: OnUncuttable = "refuse",
        outputs: Outputs = None,
        also: nn.Module | Iterable[nn.Module] = (),
        **targets: Unpack[Targets],
    ) -> None:
        require_plan_alone(plan, prune=prune, ignore=ignore, outputs=outputs)
        self.method = get(method)
        _check_method(self.method)
        _check_moment(prune_at)
        self.budget = budget_of(budget, self.method, targets)
        self._scope_of_method = Budget.of(budget, targets).scope is None
        self.example_inputs, self.prune_at, self.on_uncuttable = example_inputs, prune_at, on_uncuttable
        self.also = also if isinstance(also, (nn.Module, Collection)) else list(also)  # it is read several times
        self.stage: Stage = "idle"
        self.prune_step: int | None = None
        self.plan: Plan | None = None
        self.regularizer: Regularizer | None = None
        self.selection: Selection | None = None
        self._given, self._trace = plan, {"prune": prune, "ignore": ignore, "check": check, "outputs": outputs}
        self._begun, self._cut = 0, ""
        self._saved: Mapping[str, Any] | None = None
        self._model: nn.Module | None = None
        self._optimizers: Optimizers = None
        self._together = False

    def begin(
        self,
        model: nn.Module,
        optimizer: Optimizers,
        *,
        done: int = 0,
        total: int | None,
        per_epoch: int | None,
        together: bool = False,
    ) -> None:
        """Prepare for training: trace, check the target in a dry run of scoring and allocation, and attach the force.

        After surgery (in a resumed training) only check that the model is pruned.

        Args:
            model: the model, not a wrapper of it.
            optimizer: the optimizer that trains it, or a list of several.
            done: number of optimizer steps before this training; 0 unless it is resumed.
            total: number of optimizer steps at the end of training; ``None`` if unknown.
            per_epoch: number of optimizer steps in an epoch; ``None`` if unknown.
            together: True if all processes of the default group train this model. All of them then apply the selection
                of rank 0.

        Raises:
            ForceError: surgery would not take place within training, or the optimizer cannot be attached.
            PlanError, BudgetError, ScoreError: the model cannot be traced or scored, or the target is out of reach.
            CheckpointError: training is resumed after surgery, and the model is not pruned as in the checkpoint.
        """
        require_bare(model)
        if together and self.budget.measured:
            raise BudgetError(
                f"{self.budget.as_given} with several processes: each would measure another time. Use a target in MACs "
                "or parameters."
            )
        self._release()
        self._model, self._optimizers, self._together = model, list_optimizers(optimizer), together
        saved, self._saved = self._saved, None
        self.prune_step = step = prune_step_of(self.prune_at, total=total, per_epoch=per_epoch)
        self._begun, self._cut = (saved["begun"], saved["cut"]) if saved else (done, "")
        if self._cut or done >= step:
            self._check_cut(model, done)
            self.stage = "finetune"
            return
        self._on_all_ranks(lambda: self._prepare(model, saved, step), "Training did not begin.")
        self.stage = "sparse"

    def _prepare(self, model: nn.Module, saved: Mapping[str, Any] | None, step: int) -> None:
        """Trace the model, rehearse surgery, and attach the force."""
        require_cuttable(self._optimizers, self.on_uncuttable)
        self.plan = self._given or self._traced(model)
        bare_copies(model, self.plan, self.also)
        self._keep_scope(saved)
        # A dry run of scoring and allocation, so that errors appear before training and not at surgery.
        scores = self.method.scores(model, self.plan)
        rehearsed = allocate(model, self.plan, scores, budget=self.budget, example_inputs=self.example_inputs)
        aim = self._aim(rehearsed, saved)
        found = self.method.regularizer(model, self.plan, steps=step - self._begun, budget=aim)
        if found is not None and saved and saved["regularizer"] is not None:
            found.load_state_dict(saved["regularizer"])
        if found is not None:
            assert self._optimizers is not None
            self.regularizer = found.attach(self._optimizers, rehearse_surgery=False)  # rehearsed above

    def _on_all_ranks(self, action: Callable[[], object], consequence: str) -> None:
        """Run an action. If several processes train the model and it fails on one, raise the error on all."""
        if not self._together:
            action()
            return
        try:
            distributed.raise_everywhere(action, consequence, None, PlanError)
        except BaseException:
            self._release()
            raise

    def _keep_scope(self, saved: Mapping[str, Any] | None) -> None:
        """Go on with the scope with which saved training began, if the method is a preset that had it before.

        Raises:
            ForceError: the scope changed for another reason.
        """
        try:
            before = Budget.from_json(saved["regularizer"]["settings"]["budget"]).scope if saved else None
        except (EtpError, LookupError, TypeError, ValueError):  # no budget; of a damaged state, loading it says more
            return
        if before in (None, self.budget.scope):
            return
        known = {former.scope for former in former_versions(self.method)}
        if not self._scope_of_method or before not in known:
            raise ForceError(
                f"training began with scope={before!r} in its budget, here it is {self.budget.scope!r}: use the same."
            )
        warnings.warn(
            f"training began with scope={before!r}, which {self.method.name!r} had in a former version, and goes on "
            f"with it. Today it has {self.budget.scope!r}.",
            stacklevel=2,
        )
        self.budget = replace(self.budget, scope=before)

    def _aim(self, rehearsed: Selection, saved: Mapping[str, Any] | None) -> Budget:
        """Return the regularizer's budget: for a latency target, the MACs of the dry run's selection."""
        if not self.budget.measured:
            return self.budget
        if saved and saved["regularizer"] is not None and (known := saved["regularizer"]["settings"]["budget"]):
            return Budget.from_json(known)  # a new measurement would give a different number of MACs
        assert self.plan is not None
        return self.budget.with_cost(CostModel(self.plan).evaluate(rehearsed.flat(self.plan)))

    def advance(self, done: int) -> bool:
        """Perform surgery if it is due after ``done`` optimizer steps. Return True if it took place.

        Raises:
            ForceError: the force never acted, because training stepped an optimizer that it is not attached to.
            PlanError, BudgetError, ScoreError: surgery is not possible. The model is unchanged.
        """
        if self.stage != "sparse" or self.prune_step is None or done < self.prune_step:
            return False
        assert self._model is not None
        assert self.plan is not None
        chosen: list[Selection] = []
        self._on_all_ranks(lambda: chosen.append(self._select(done)), "The model was not changed.")
        selection = chosen[0]
        if self._together:
            selection = distributed.prune_(
                self._model, self.plan, selection, optimizer=self._optimizers, also=self.also,
                on_uncuttable=self.on_uncuttable,
            )  # fmt: skip
        else:
            prune_(
                self._model, self.plan, selection, optimizer=self._optimizers, also=self.also,
                on_uncuttable=self.on_uncuttable,
            )  # fmt: skip
        self._release()
        self.selection, self.stage, self._cut = selection, "finetune", self.plan.fingerprint
        return True

    def _select(self, done: int) -> Selection:
        """Return which units stay, after a check that the force acted."""
        assert self._model is not None
        assert self.plan is not None
        force = self.regularizer
        if force is not None and force.steps_done == 0:
            raise ForceError(
                f"{done} steps are done, and the force of {self.method.name!r} never acted: the optimizer that was "
                "stepped is not the one that training began with. Keep one optimizer for the whole training."
            )
        scores = self.method.scores(self._model, self.plan, regularizer=force)
        return allocate(self._model, self.plan, scores, budget=self.budget, example_inputs=self.example_inputs)

    def finish(self) -> None:
        """Remove the force at the end of training. Warn if surgery has not taken place."""
        if self.stage == "sparse":
            warnings.warn(
                f"training ended before surgery, which was due after step {self.prune_step}: the model was not pruned.",
                stacklevel=2,
            )
        self.abort()

    def abort(self) -> None:
        """Remove the force at the end of training or after an error. :meth:`state` can still be saved."""
        if self.regularizer is not None:
            self.regularizer.detach()
        self.stage = "idle"

    def state(self) -> dict[str, Any]:
        """Return the state to save besides the model and the optimizer for resuming: plain values and CPU tensors."""
        force = self.regularizer.state_dict() if self.regularizer is not None else None
        return {"format": FORMAT, "begun": self._begun, "cut": self._cut, "regularizer": force}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Store a state of :meth:`state`, from which the next :meth:`begin` resumes.

        Raises:
            CheckpointError: ``state`` is not such a state, or has another format.
        """
        check_state(state)
        self._saved = state

    @property
    def resumed(self) -> bool:
        """True if :meth:`load_state` stored a state that :meth:`begin` has not used yet."""
        return self._saved is not None

    def _traced(self, model: nn.Module) -> Plan:
        device = next(model.parameters()).device
        inputs = tree_map(lambda v: v.to(device) if hasattr(v, "to") else v, self.example_inputs)
        return trace(model, inputs, **self._trace)  # type: ignore[arg-type]

    def _check_cut(self, model: nn.Module, done: int) -> None:
        """Raise :class:`CheckpointError` unless the record of the model contains the surgery of the state."""
        fingerprints = get_record(model).fingerprints
        if self._cut not in fingerprints if self._cut else not fingerprints:
            raise CheckpointError(
                f"training goes on after {done} steps, surgery was due after {self.prune_step}, and this model was not "
                "cut: cut it by the checkpoint's record first (resume), or continue from a checkpoint before surgery."
            )
        for number, given in enumerate(list_copies(self.also)):
            if all(get_record(module).fingerprints != fingerprints for module in given.modules()):
                raise CheckpointError(
                    f"also[{number}] was not cut as the model was, and the checkpoint does not hold it: keep it with "
                    "etp_graph.save beside the checkpoint, and pass what etp_graph.load returns."
                )

    def _release(self) -> None:
        if self.regularizer is not None:
            self.regularizer.detach()
        self.regularizer = None


def check_state(state: object) -> None:
    """Raise :class:`CheckpointError` unless this is a state that :meth:`Pruning.state` returned."""
    keys = {"format", "begun", "cut", "regularizer"}
    found = sorted(map(str, state))[:9] if isinstance(state, Mapping) else type(state).__name__
    if not isinstance(state, Mapping) or state.keys() != keys or state["format"] != FORMAT:
        raise CheckpointError(
            f"found {found} where the state of a pruning of format {FORMAT} should be: use a checkpoint that this "
            "version of etp_graph wrote."
        )
    begun, cut, force = state["begun"], state["cut"], state["regularizer"]
    sound = isinstance(begun, int) and not isinstance(begun, bool) and begun >= 0 and isinstance(cut, str)
    if not sound or not (force is None or (isinstance(force, Mapping) and not cut)):
        raise CheckpointError(
            f"the state of the pruning is damaged: begun={begun!r:.50}, cut={cut!r:.80}, regularizer="
            f"{'none' if force is None else 'there'}. Restore it, or use another checkpoint."
        )


def prune_step_of(prune_at: int | float | Epochs, *, total: int | None, per_epoch: int | None) -> int:
    """Return the optimizer step after which surgery takes place, of ``total`` steps with ``per_epoch`` in an epoch.

    Raises:
        ForceError: the step lies after the end of training, or ``total`` or ``per_epoch`` is needed and unknown.
    """
    needed = per_epoch if isinstance(prune_at, Epochs) else total
    if needed is None and not isinstance(prune_at, int):
        raise ForceError(f"prune_at={prune_at!r}, and the length of training is unknown: give a number of steps.")
    if isinstance(prune_at, int):
        step = prune_at
    else:
        share = prune_at.n if isinstance(prune_at, Epochs) else prune_at
        step = max(1, math.ceil(share * (needed or 0) - 1e-9))  # in floating point, 0.1 · 30 is a little more than 3
    if total is not None and step > total:
        raise ForceError(f"prune_at={prune_at!r} is step {step}, and training takes {total} steps: prune earlier.")
    return step


def _check_method(method: Method) -> None:
    if method.rounds != 1:
        raise ForceError(
            f"method {method.name!r} has {method.rounds} rounds, and a callback does one: use etp_graph.compress, or "
            "dataclasses.replace(method, rounds=1)."
        )
    chooses = (method.acts_on == "losers" and not method.steered) or method.soft_every > 0
    if method.collected or chooses:
        what = "collects data in a phase of its own" if method.collected else "chooses units while it trains"
        raise ForceError(f"method {method.name!r} {what}, which no callback can do: use etp_graph.compress.")
    if method.force is not None and method.mode == "loss":
        raise ForceError(
            f"method {method.name!r} has mode='loss', and the loss is the framework's: use mode='prox' or 'gradient'."
        )


def _check_moment(prune_at: object) -> None:
    """Raise :class:`ForceError` unless ``prune_at`` is a step, a share of training or a number of epochs."""
    moment = prune_at.n if isinstance(prune_at, Epochs) else prune_at
    number = isinstance(moment, (int, float)) and not isinstance(moment, bool) and math.isfinite(moment) and moment > 0
    if not number or (isinstance(prune_at, float) and prune_at > 1):
        raise ForceError(
            f"prune_at={prune_at!r}: give a number of optimizer steps (an integer of at least 1), a share of training "
            "(a fraction up to 1), or Epochs(n)."
        )
