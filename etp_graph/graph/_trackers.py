"""Follow a forward with one tracker for each reading that it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from etp_graph.graph.rules._operators import ReadingsDiffer
from etp_graph.model import ModelState, ModuleStack, Outputs, PrivateRandom
from etp_graph.plan import Op

from ._shape_only import ShapeOnly
from ._tracker import Tracker


class Trackers:
    """One to three trackers that follow a forward.

    One tracker follows the forward until a call depends on the reading. From then on there is a tracker for the inner
    and a tracker for the outer reading. If heads of keys and values are repeated for several heads of queries, there
    are two for the outer reading: the units are the heads that are repeated, or copy j of every head.

    Args:
        model: the model.
        compute: whether to compute all values of the forward, see :mod:`etp_graph.graph._shape_only`.
        state: keeps the values of tensors of the model that the forward overwrites; ``None``: they stay overwritten.
        outputs: what counts as an output, as of ``trace``.

    Attributes:
        left_out: names of what the model returned besides its outputs.
        entries: the entries of what it returned that hold outputs.
        all: the only tracker, or those of the inner and the outer reading, with that of the copies of heads last.
        running: the stack of running modules.
        shape_only: the placeholders for values that were not computed.
        random: the generators that random operators of the forward draw from.
        paused: True while calls are not followed.
    """

    def __init__(
        self, model: nn.Module, *, compute: bool = True, state: ModelState | None = None, outputs: Outputs = None
    ) -> None:
        self.model, self.compute, self.state, self.outputs = model, compute, state, outputs
        self.left_out: dict[str, None] = {}
        self.entries: dict[str, None] = {}
        self.running = ModuleStack(model)
        self.all = [Tracker(model, self.running.modules)]
        self.shape_only = ShapeOnly(active=not compute)
        self.random = PrivateRandom()
        self.paused = False

    def each(self, follow: Callable[[Tracker], None], func: Any = None, values: Any = ()) -> None:
        """Let every tracker follow a call. If the call depends on the reading, split the only tracker first.

        A rule that fails locks the units of the call, with the exception as the reason, and the trace goes on.

        Args:
            follow: the rule.
            func: the function or operator of the call, for messages.
            values: arguments and result of the call.
        """
        failures = []
        for tracker in list(self.all):
            failures += self._follow(tracker, follow)
        for tracker in self.all if failures else ():  # in both readings: a position stays if both of its units stay
            tracker.lock_unfollowed(func, values, failures[0])
        self._align_costs()

    def _follow(self, tracker: Tracker, follow: Callable[[Tracker], None]) -> list[Exception]:
        """Let a tracker follow a call, or both parts of one that the call splits. Return the errors of the rule."""
        n_ops = len(tracker.ops)
        try:
            follow(tracker)
        except ReadingsDiffer:
            other = tracker.split()
            self.all.insert(self.all.index(tracker) + 1, other)
            return [*self._follow(tracker, follow), *self._follow(other, follow)]
        except Exception as error:  # noqa: BLE001 - a rule meets calls that nobody foresaw; they lock
            del tracker.ops[n_ops:]
            return [error]
        return []

    def _align_costs(self) -> None:
        """Give both readings the same cost terms, if a rule failed in one of them only."""
        longest = max(self.all, key=lambda tracker: len(tracker.ops))
        for tracker in self.all:
            for term in longest.ops[len(tracker.ops) :]:
                tracker.ops.append(term if isinstance(term, Op) else replace(term, labels=()))
