"""Score the units of a folder: one block after the other, forward, and backward if the criterion reads gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from etp_graph._config import quoted, require
from etp_graph.collect import Observations, naming_batch, needs_backward, watch
from etp_graph.compression._oneshot import Loss
from etp_graph.errors import ScoreError
from etp_graph.methods import Method
from etp_graph.plan import Plan

from ._blocks import BlockwiseModel
from ._inputs import Batch, mask_of
from ._plan import plan_of_block
from ._state import RunState, Step


class HiddenStates:
    """The hidden states of all batches before each block, and the gradients of the loss by them, as files.

    Args:
        state: the files.
        blockwise: the model.
        batches: the batches.
    """

    def __init__(self, state: RunState, blockwise: BlockwiseModel, batches: Sequence[Batch]) -> None:
        self.state, self.blockwise, self.batches = state, blockwise, batches

    def files(self, kind: str, boundary: int) -> list[str]:
        """Return the names of the files before a block; ``kind`` is ``hidden`` or ``gradient``."""
        return [f"{kind}/{boundary:03d}-{number:05d}.safetensors" for number in range(len(self.batches))]

    def read(self, kind: str, boundary: int, number: int) -> Tensor:
        """Return those of one batch, on the device of the model."""
        return self.blockwise.cast(self.state.read(self.files(kind, boundary)[number])[kind])

    def write(self, kind: str, boundary: int, number: int, values: Tensor) -> None:
        """Write those of one batch."""
        self.state.write(self.files(kind, boundary)[number], {kind: values})

    def embed(self, read: Callable[[str], Tensor]) -> tuple[None, list[str]]:
        """Write what the first block gets."""
        with torch.no_grad(), self.blockwise.loading(read):
            for number, batch in enumerate(self.batches):
                with naming_batch(number + 1):
                    self.write("hidden", 0, number, self.blockwise.embed(batch))
        return None, []

    def through(self, block: int) -> None:
        """Run a block on all batches, and write what it returns.

        Raises:
            ScoreError: it is not finite.
        """
        for number, batch in enumerate(self.batches):
            with naming_batch(number + 1):
                found = self.blockwise.run_block(block, batch, self.read("hidden", block, number))
            self.require_finite(found, block, number)
            self.write("hidden", block + 1, number, found)

    def require_finite(self, found: Tensor, block: int, number: int) -> None:
        """Raise :class:`ScoreError` if what a block returns for tokens that are no padding is not finite."""
        mask = mask_of(self.batches[number])
        seen = found if mask is None or mask.numel() != found[..., 0].numel() else found[mask.to(found.device) > 0]
        require(
            bool(seen.isfinite().all()),
            f"batch {number + 1}: {self.blockwise.blocks[block]} returns NaN or infinite values: check the weights of "
            "the folder, and choose dtype=torch.float32.",
            ScoreError,
        )


class Scoring:
    """Scores of all units from one pass over the folder.

    Args:
        hidden: the hidden states.
        plan: the plan.
        method: the method with the criterion.
        loss: function of (model, batch), if the criterion reads gradients.
        load: returns the tensors of a block by number.
    """

    def __init__(
        self, hidden: HiddenStates, plan: Plan, method: Method, loss: Loss | None,
        load: Callable[[int], dict[str, Tensor]],
    ) -> None:  # fmt: skip
        self._hidden, self._plan, self._method, self._loss, self._load = hidden, plan, method, loss, load
        self.backward = needs_backward(method.observes)
        self._blockwise, self._state = hidden.blockwise, hidden.state

    def run(self, step: Step, read: Callable[[str], Tensor]) -> None:
        """Run all steps."""
        last = len(self._blockwise.blocks)
        for block in range(last):
            step(f"{'forward' if self.backward else 'observe'}-{block:03d}", partial(self._forward, block))
        if self.backward:
            step("head", partial(self._head, read))
            for block in reversed(range(last)):
                step(f"observe-{block:03d}", partial(self._backward, block))

    def _forward(self, block: int) -> tuple[None, list[str]]:
        drop = [] if self.backward or block == 0 else self._hidden.files("hidden", block)
        with torch.no_grad(), self._blockwise.loaded(self._load(block)):
            if self.backward:
                self._hidden.through(block)
            elif self._method.collected:
                with watch(self._blockwise.model, self._block_plan(block), self._method.criterion_name) as record:
                    self._hidden.through(block)
                self._write(block, record)
            else:
                with self._blockwise.zero_outside():
                    found = self._method.scores(self._blockwise.model, self._block_plan(block))
                self._state.write(_scores_file(block), {"scores": self._own(found, block)})
        return None, drop

    def _head(self, read: Callable[[str], Tensor]) -> tuple[None, list[str]]:
        """Write the gradient of the loss by what the last block returns."""
        blockwise, last = self._blockwise, len(self._blockwise.blocks)
        assert self._loss is not None
        with blockwise.loading(read):
            for number, batch in enumerate(self._hidden.batches):
                with torch.enable_grad(), naming_batch(number + 1):
                    hidden = self._hidden.read("hidden", last, number).requires_grad_()
                    torch.autograd.backward(blockwise.run_head(hidden, partial(self._loss, blockwise.model, batch)))
                assert hidden.grad is not None
                self._hidden.write("gradient", last, number, hidden.grad)
        return None, self._hidden.files("hidden", last)

    def _backward(self, block: int) -> tuple[None, list[str]]:
        """Run a block again on what it got, and propagate the gradients of the loss through it."""
        blockwise, trained = self._blockwise, self._method.observes == "gradients"
        with (
            blockwise.loaded(self._load(block), trained=trained),
            torch.enable_grad(),
            watch(blockwise.model, self._block_plan(block), self._method.criterion_name) as record,
        ):
            for number, batch in enumerate(self._hidden.batches):
                hidden = self._hidden.read("hidden", block, number).requires_grad_()
                with naming_batch(number + 1):
                    found = blockwise.run_block(block, batch, hidden)
                    torch.autograd.backward(found, self._hidden.read("gradient", block + 1, number))
                assert hidden.grad is not None
                self._hidden.write("gradient", block, number, hidden.grad)
        self._write(block, record)
        return None, self._hidden.files("gradient", block + 1)

    def _block_plan(self, block: int) -> Plan:
        return plan_of_block(self._plan, self._blockwise.blocks, block)

    def _write(self, block: int, record: Observations) -> None:
        """Write what was observed of the units of a block."""
        if not self._block_plan(block).prunable:
            self._state.write(_scores_file(block), {"scores": torch.zeros(0, dtype=torch.float64)})
            return
        require(
            not record.unwatched,
            f"no module shows the units of {quoted(sorted(record.unwatched))}: leave them out with ignore=, or choose "
            "a criterion that reads weights.",
            ScoreError,
        )
        found = record.values.get(self._method.criterion_name)
        require(found is not None, f"{self._blockwise.blocks[block]}: no batch reached it.", ScoreError)
        assert found is not None
        self._state.write(_scores_file(block), {"scores": self._own(found, block)})

    def _own(self, values: Tensor, block: int) -> Tensor:
        """Return the values of the units of a block."""
        free = {group.name for group in self._block_plan(block).prunable}
        parts = [values[span] for group, span in self._plan.spans() if group.name in free]
        return torch.cat(parts).double().cpu() if parts else torch.zeros(0, dtype=torch.float64)

    def scores(self) -> Tensor:
        """Return the scores of all units, float64 [plan.n_units], from what the steps have written."""
        values = torch.full((self._plan.n_units,), torch.nan, dtype=torch.float64)
        for block in range(len(self._blockwise.blocks)):
            own, free, at = self._state.read(_scores_file(block))["scores"], self._block_plan(block).prunable, 0
            for group in free:
                values[self._span(group.name)] = own[at : at + group.n_units]
                at += group.n_units
        if not self._method.collected:
            return values.nan_to_num(nan=0.0)
        record = Observations({self._method.criterion_name: values})
        return self._method.scores(self._blockwise.model, self._plan, record=record)

    def _span(self, name: str) -> slice:
        return next(span for group, span in self._plan.spans() if group.name == name)


def _scores_file(block: int) -> str:
    return f"scores-{block:03d}.safetensors"
