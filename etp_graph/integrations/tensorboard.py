"""Scalars for TensorBoard during a sparse phase: strength, units at zero, and the cost without these units."""

from __future__ import annotations

import math
import os
from typing import Any, Protocol

import torch
from torch import Tensor

from etp_graph.errors import EtpError, ForceError
from etp_graph.plan import CostModel, Plan
from etp_graph.regularizer import Regularizer
from etp_graph.units import Units


class Writer(Protocol):
    """Interface of a writer: :class:`torch.utils.tensorboard.SummaryWriter`, or any object with this method."""

    def add_scalar(self, tag: str, scalar_value: Any, global_step: Any = None) -> None:
        """Write one number under a name and a step."""


class TensorBoard:
    """Log of a sparse phase. Call it once after every ``optimizer.step()``.

    It writes these scalars, each under ``prefix``:

    - ``strength``: β·s(t).
    - ``units_at_zero``, ``share_at_zero``: number and share of units at zero, among units that are not locked.
    - ``reachable_macs``, ``reachable_speed_up``: cost and speed-up of the model if surgery removed its units at zero,
      as many as the constraints of the plan allow. This surgery would not change the output, except through norms that
      average over channels.

    Args:
        writer: a ``SummaryWriter``, or the folder for a new one, which :meth:`close` closes.
        regularizer: the regularizer; in :func:`etp_graph.compress` the one that ``phase.attach`` returns.
        every: number of steps between two writes. Each write costs one pass over the weights.
        prefix: prefix of the names of the scalars.

    Raises:
        ForceError: ``every`` is not a positive integer.
        EtpError: a folder is given, and tensorboard is not installed.
    """

    def __init__(
        self,
        writer: Writer | str | os.PathLike[str],
        regularizer: Regularizer,
        *,
        every: int = 100,
        prefix: str = "etp_graph",
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ForceError(f"every={every!r}; it must be an integer of at least 1.")
        self._own = isinstance(writer, (str, os.PathLike))
        self.writer: Any = _writer(writer) if isinstance(writer, (str, os.PathLike)) else writer
        self.regularizer, self.every, self.prefix = regularizer, every, prefix
        self._costs = CostModel(regularizer.plan)
        self._units = Units(regularizer.model, regularizer.plan, locked=False)
        self._free = _free(regularizer.plan)
        self._last = -1

    def __call__(self, step: int | None = None) -> None:
        """Write the scalars if ``every`` steps have passed.

        Further calls before the next optimizer step (gradient accumulation) write nothing.

        Args:
            step: the step to write them under; default: the number of steps of the regularizer.
        """
        done = self.regularizer.steps_done
        if done % self.every == 0 and done != self._last:
            self._last = done
            for name, value in self.scalars().items():
                self.writer.add_scalar(f"{self.prefix}/{name}", value, done if step is None else step)

    def scalars(self) -> dict[str, float]:
        """Return the current scalars, by name.

        Raises:
            PlanError: the model was pruned, so that the plan of the regularizer no longer fits it.
        """
        regularizer = self.regularizer
        regularizer.plan.check(regularizer.model)
        with torch.no_grad():
            zero = (self._units.squares(self._units.tensors(regularizer.model)) == 0).cpu() & self._free
        reached, dense = self._costs.evaluate(without_zeros(regularizer.plan, zero)), self._costs.dense
        return {
            "strength": regularizer.strength,
            "units_at_zero": float(zero.sum()),
            "share_at_zero": float(zero.sum()) / max(float(self._free.sum()), 1.0),
            "reachable_macs": float(reached.macs),
            "reachable_speed_up": dense.macs / max(reached.macs, 1),
        }

    def close(self) -> None:
        """Close the writer if this object created it."""
        if self._own:
            self.writer.close()


def without_zeros(plan: Plan, zero: Tensor) -> Tensor:
    """Return which units stay if each group loses as many of its units at zero as its constraints allow.

    Args:
        plan: the plan.
        zero: True for units at zero, bool [n_units].

    Returns:
        True for units that stay, bool [n_units].
    """
    keep = torch.ones(plan.n_units, dtype=torch.bool, device="cpu")
    for group, span in plan.spans():
        if group.locked is not None:
            continue
        blocks = zero[span].view(group.blocks, -1)
        width = blocks.shape[1]
        step = math.lcm(group.multiple, group.blocks) // group.blocks
        least = max(width - int(blocks.sum(1).min()), -(-group.min_units // group.blocks))
        gone = max(width - -(-least // step) * step, 0)
        places = blocks.int().argsort(dim=1, descending=True, stable=True)[:, :gone]
        keep[span] = torch.ones_like(blocks).scatter_(1, places, False).flatten()
    return keep


def _free(plan: Plan) -> Tensor:
    """Return a mask of the units that are not locked, bool [n_units]."""
    free = torch.zeros(plan.n_units, dtype=torch.bool, device="cpu")
    for group, span in plan.spans():
        free[span] = group.locked is None
    return free


def _writer(folder: str | os.PathLike[str]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise EtpError('a folder of logs needs tensorboard: pip install "etp-graph[tensorboard]".') from error
    return SummaryWriter(os.fspath(folder))
