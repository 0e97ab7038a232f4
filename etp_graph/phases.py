"""A phase of training in the user's hands, and the progress bar over all of them."""

from __future__ import annotations

from types import TracebackType
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.optim import Optimizer

from .budget import Budget
from .calibration import Kept
from .collect import Record
from .errors import ForceError
from .methods import Method
from .plan import Plan
from .regularizer import Regularizer
from .selecting import Chosen, Soft, action, losers

PhaseName = Literal["sparse", "calibrate", "finetune"]


class Bar:
    """A progress bar over the steps of a run; silent unless asked for and unless stdout is a terminal."""

    def __init__(self, total: int, *, show: bool) -> None:
        console = Console()
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(), console=console, disable=not (show and console.is_terminal), transient=True,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=total)
        self._done = 0

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, description: str) -> None:
        """A step begins."""
        self._progress.update(self._task, description=description, refresh=True)

    def within(self, share: float) -> None:
        """The share of the present step that is done."""
        self._progress.update(self._task, completed=self._done + min(max(share, 0.0), 1.0))

    def end(self) -> None:
        """The step is done."""
        self._done += 1
        self._progress.update(self._task, completed=self._done, refresh=True)


class Phase:
    """What ``train(model, phase)`` is told, and where it hands in its optimizer.

    Attributes:
        name: ``"sparse"``: the force acts, once attached. ``"calibrate"``: the criterion watches the batches, and the
            weights stay as they are; a few batches are enough. ``"finetune"``: after surgery; no force acts.
        round: the present round, from 0.
        rounds: number of rounds.
        method: the method.
        regularizer: what :meth:`attach` attached; ``None`` before, and where no force acts.
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
        record: Record | None = None,
        kept: Kept | None = None,
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
        self._action: Chosen | Soft | None = None
        self._open = True

    def __repr__(self) -> str:
        return f"Phase({self.name!r}, round={self.round}, rounds={self.rounds}, method={self.method.name!r})"

    @property
    def forced(self) -> bool:
        """Whether the method acts in this phase, so that an optimizer has to be attached."""
        return self.name == "sparse" and self.method.sparse

    def attach(self, optimizer: Optimizer, *, steps: int | None = None) -> Regularizer | None:
        """Let the method's force act in every ``optimizer.step()`` of this phase; call it before the first one.

        Args:
            optimizer: the one that trains the model; make it anew in every phase.
            steps: how many steps the phase will take. Methods need it whose strength follows the share of the phase
                that is done, such as ``etp``; others ignore it.

        Returns:
            The regularizer, for ``regularizer.penalty()`` where the method's mode is ``"loss"``; ``None`` where no
            force acts (fine-tuning). While calibrating, steps of the optimizer leave the weights as they are.

        Raises:
            ForceError: the phase is over, an optimizer is attached already, it is not the model's, or ``steps``
                is missing.
        """
        if not self._open:
            raise ForceError(f"the {self.name} phase is over; every call of train gets a phase of its own.")
        if self._kept is not None:
            self._kept.hold(optimizer)
        if not self.forced:
            return None
        if self.regularizer is not None or self._action is not None:
            raise ForceError(
                "an optimizer is attached to this phase already: one optimizer holds all parameters of the plan."
            )
        found = self.method.regularizer(self._model, self._plan, steps=steps, budget=self._budget)
        who = losers(self._model, self._plan, self.method, self._budget)
        acts = action(self.method, found, who, model=self._model, plan=self._plan, steps=steps)
        if found is not None:
            found.attach(optimizer)
        if acts is not None:
            acts.attach(optimizer)
        self.regularizer, self._action, self.steps = found, acts, steps
        return found

    def penalty(self) -> Tensor | float:
        """What to add to the loss: the penalty of a method whose mode is ``"loss"``, and zero at all other times."""
        found = self.regularizer
        return found.penalty() if self._open and found is not None and found.settings.mode == "loss" else 0.0

    def labels(self, y: Tensor) -> None:
        """The class number of each sample of the next forward, int64 [samples].

        Criteria of classes (``f_statistic``) need it in the phase ``calibrate``; it does nothing elsewhere.

        Raises:
            ScoreError: these are not class numbers.
        """
        if self._record is not None:
            self._record.labels(y)

    def report(self, done: int, total: int, *details: object) -> None:
        """Move the progress bar: ``done`` of ``total`` epochs (or steps) of this phase are over. Optional.

        Whatever else a training loop tells its callback (a loss) is not shown.
        """
        self._bar.within(done / total if total else 1.0)

    def check_used(self) -> None:
        """Raise :class:`ForceError` if the force of this phase never acted."""
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
        """The end of the phase: no force acts any more."""
        self._open = False
        if self._action is not None:
            self._action.detach()
        if self.regularizer is not None:
            self.regularizer.detach()
