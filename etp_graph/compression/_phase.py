"""One call of the user's ``train`` function, and the progress bar of a run."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from etp_graph.budget import Budget
from etp_graph.collect import Observations
from etp_graph.errors import ForceError
from etp_graph.methods import Method
from etp_graph.plan import Plan
from etp_graph.regularizer import Optimizers, Regularizer, inner_optimizers

from ._calibration import WeightsUnchanged
from ._losers import PushLosers, SilenceLosers, acts_besides_force, find_losers
from ._progress import Bar

PhaseName = Literal["sparse", "calibrate", "finetune"]


class Phase:
    """Argument of ``train(model, phase)``: names the phase and takes the optimizer.

    Attributes:
        name: ``"sparse"``: the force acts after :meth:`attach`. ``"calibrate"``: the criterion records data from the
            batches, and the weights do not change; a few batches are enough. ``"finetune"``: training after surgery,
            without a force.
        round: number of the current round, from 0.
        rounds: number of rounds.
        method: the method.
        regularizer: the regularizer that :meth:`attach` attached; ``None`` before, and in phases without a force.
    """

    def __init__(
        self,
        name: PhaseName,
        *,
        model: nn.Module,
        plan: Plan,
        method: Method,
        budget: Budget,
        bar: Bar,
        round: int,
        rounds: int,
        record: Observations | None = None,
        kept: WeightsUnchanged | None = None,
    ) -> None:
        self.name = name
        self.round = round
        self.rounds = rounds
        self.method = method
        self.regularizer: Regularizer | None = None
        self.steps: int | None = None
        self._model = model
        self._plan = plan
        self._budget = budget
        self._bar = bar
        self._record, self._kept = record, kept
        self._action: PushLosers | SilenceLosers | None = None
        self._open = True

    def __repr__(self) -> str:
        return f"Phase({self.name!r}, round={self.round}, rounds={self.rounds}, method={self.method.name!r})"

    @property
    def forced(self) -> bool:
        """True if the method acts in this phase, so that an optimizer must be attached."""
        return self.name == "sparse" and self.method.sparse

    def attach(self, optimizer: Optimizers, *, steps: int | None = None) -> Regularizer | None:
        """Apply the method's force in every ``optimizer.step()`` of this phase. Call it before the first step.

        In the phase ``calibrate`` it makes the optimizer's steps leave the weights unchanged.

        Args:
            optimizer: the optimizer that trains the model, or a list of several; create new ones in every phase.
            steps: number of optimizer steps of the phase. Methods whose strength changes during the phase, such as
                ``etp``, need it; others ignore it.

        Returns:
            The regularizer; if the method's mode is ``"loss"``, add its ``penalty()`` to the loss. ``None`` if no
            force acts in this phase.

        Raises:
            ForceError: the phase is over, an optimizer is attached already, the optimizer does not hold the model's
                parameters, or ``steps`` is missing.
        """
        if not self._open:
            raise ForceError(f"the {self.name} phase is over; every call of train gets a phase of its own.")
        if self._kept is not None:
            for one in inner_optimizers(optimizer):
                self._kept.hold(one)
        if not self.forced:
            return None
        if self.regularizer is not None or self._action is not None:
            raise ForceError(
                "an optimizer is attached to this phase already: pass several as one list, attach([a, b])."
            )
        found = self.method.regularizer(self._model, self._plan, steps=steps, budget=self._budget)
        who = find_losers(self._model, self._plan, self.method, self._budget)
        acts = acts_besides_force(self.method, found, who, model=self._model, plan=self._plan, steps=steps)
        if found is not None:
            found.attach(optimizer, rehearse_surgery=False)  # surgery goes without it
        if acts is not None:
            acts.attach(optimizer)
        self.regularizer, self._action, self.steps = found, acts, steps
        return found

    def penalty(self) -> Tensor | float:
        """Return the penalty to add to the loss. It is zero unless a force with mode ``"loss"`` acts in this phase."""
        found = self.regularizer
        return found.penalty() if self._open and found is not None and found.settings.mode == "loss" else 0.0

    def labels(self, y: Tensor) -> None:
        """Set the class number of each sample of the next forward, int64 [samples].

        Criteria that compare classes (``f_statistic``) need it in the phase ``calibrate``. In other phases it does
        nothing.

        Raises:
            ScoreError: ``y`` does not hold class numbers.
        """
        if self._record is not None:
            self._record.labels(y)

    def report(self, done: int, total: int, *details: object) -> None:
        """Move the progress bar: ``done`` of ``total`` epochs (or steps) of this phase are over. Optional.

        ``details``, such as a loss, are accepted and not shown.
        """
        self._bar.within(done / total if total else 1.0)

    def check_used(self) -> None:
        """Raise :class:`ForceError` if the method should have acted in this phase and never did."""
        if not self.forced:
            return
        acting = self.regularizer or self._action
        if acting is None or acting.steps_done == 0:
            what = "attached no optimizer" if acting is None else "took no step with the attached optimizer"
            raise ForceError(
                f"train {what} in the sparse phase, so the force of {self.method.name!r} never acted: call "
                "phase.attach(optimizer) before the first optimizer.step(), or choose a method without a force."
            )
        if self.regularizer is not None and self.method.mode == "loss" and not self.regularizer.penalties:
            raise ForceError(
                f"the force of {self.method.name!r} is a term of the loss, and train never added it: call "
                "(loss + phase.penalty()).backward(), or use replace(method, mode='gradient')."
            )

    def close(self) -> None:
        """End the phase: detach the force from the optimizer."""
        self._open = False
        if self._action is not None:
            self._action.detach()
        if self.regularizer is not None:
            self.regularizer.detach()
