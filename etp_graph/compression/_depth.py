"""How many residual blocks a model loses before units: the number whose pruned model is closest to the dense one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from etp_graph._config import require, require_count
from etp_graph.budget import Budget
from etp_graph.collect import loss_growth
from etp_graph.depth import choose_blocks
from etp_graph.errors import BudgetError, PlanError
from etp_graph.model import copy_model
from etp_graph.plan import Cost

Loss = Callable[[nn.Module, Any], Tensor]


class Depth:
    """Choice of the number of blocks.

    Args:
        model: the dense model.
        batches: example inputs, as of :func:`oneshot_`.
        numbers: the number, or several to try.
        loss: measures models; see :func:`etp_graph.collect.loss_growth`.

    Attributes:
        asked: whether any blocks are to be removed.
        n_steps: number of steps that the choice and the removal of blocks take.
        found: what each number was measured to cost.

    Raises:
        PlanError: a number is no count.
    """

    def __init__(
        self, model: nn.Module, batches: Iterable[Any], numbers: int | Sequence[int], loss: Loss | None, goal: Budget
    ) -> None:
        several = [numbers] if isinstance(numbers, int) else list(numbers)
        require(bool(several), "blocks is empty: give at least one number of blocks.", PlanError)
        for number in several:
            require_count("blocks", number, 0, PlanError)
        self._model, self._batches, self._loss = model, batches, loss
        self._numbers = sorted(set(several))
        self.asked = self._numbers != [0]
        trials = len(self._numbers) if len(self._numbers) > 1 else 0
        self.n_steps = 2 + trials if self.asked else 0  # a trace of the whole model, and the removal
        self.found: dict[int, float] = {}
        require(
            not (self.asked and goal.measured),
            f"{goal.as_given} is measured on the whole model: with blocks=, give a target that is counted (params=).",
            BudgetError,
        )

    def absolute(self, goal: Budget, dense: Cost) -> Budget:
        """Return the budget as an amount, so that it is that of the dense model whatever the depth."""
        return goal if goal.memory_mb is not None else goal.with_count(goal.target(dense))

    def choose(
        self, prune: Callable[[nn.Module, Sequence[str]], object], step: Callable[[str, Callable[[], float]], float]
    ) -> tuple[str, ...]:
        """Return the names of the blocks to remove.

        Args:
            prune: removes blocks and units of a copy of the model, in place.
            step: runs an action under a name.
        """
        if not self.asked:
            return ()
        batches = list(self._batches)
        ranked, _ = choose_blocks(self._model, batches, n_blocks=max(self._numbers))
        order = [block.name for block in ranked]
        if len(self._numbers) == 1:
            return tuple(order)
        measure = loss_growth(self._model, batches, self._loss)
        for number in self._numbers:
            copied = copy_model(self._model)
            prune(copied, order[:number])
            self.found[number] = step(f"blocks: {number}", lambda: measure(copied))  # noqa: B023 - called at once
        best = min(self.found, key=lambda number: (not np.isfinite(self.found[number]), self.found[number]))
        return tuple(order[:best])
