"""Run the steps of a streamed run: embed, score, allocate, write, publish."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from etp_graph._config import require
from etp_graph.budget import Budget
from etp_graph.collect import needs_backward
from etp_graph.compression._oneshot import Loss
from etp_graph.compression._progress import Bar
from etp_graph.errors import PlanError
from etp_graph.export import require_free, require_space
from etp_graph.methods import Method
from etp_graph.model import without_autocast
from etp_graph.plan import Cost, Plan, Selection, cost
from etp_graph.recovery import Compensation

from ._blocks import BlockwiseModel
from ._inputs import Batch, digest_of
from ._memory import return_memory
from ._observe import HiddenStates, Scoring
from ._plan import pruned_config, select, trace_blocks
from ._state import Action, RunState
from ._write import Size, Writer


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedFolder:
    """One pruned model of :func:`oneshot`.

    Attributes:
        folder: where it is; ``from_pretrained`` loads it.
        selection: the units that stay.
        cost: its cost.
        compensation: the fit of each layer, or ``None`` if nothing was compensated.
    """

    folder: Path
    selection: Selection
    cost: Cost
    compensation: Compensation | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedResult:
    """What :func:`oneshot` did.

    Attributes:
        plan: the plan that was used.
        dense: cost of the dense model, for a sample of at most 32 tokens.
        sizes: the pruned models, in the order of the budgets.
        seconds: time of the steps of this call, by name. Steps that an earlier call finished are not among them.
    """

    plan: Plan
    dense: Cost
    sizes: tuple[PrunedFolder, ...]
    seconds: dict[str, float]


class Run:
    """One call of :func:`oneshot`.

    Args:
        blockwise: the dense model.
        batches: the batches.
        method: the method with the criterion.
        loss: function of (model, batch), or ``None``.
        budgets: the targets, from large to small.
        targets: the folder of each.
        ridge: of the compensation; ``None`` to change no weights.
        prune, ignore: as for :func:`etp_graph.trace`.
    """

    def __init__(
        self, blockwise: BlockwiseModel, batches: Sequence[Batch], method: Method, loss: Loss | None, *,
        budgets: Sequence[Budget], targets: Sequence[Path], ridge: float | None, prune: Any, ignore: Any,
    ) -> None:  # fmt: skip
        self._blockwise, self._batches, self._method, self._loss = blockwise, batches, method, loss
        self._budgets, self._targets, self._ridge = budgets, targets, ridge
        self._prune, self._ignore = prune, ignore
        self._source = blockwise.source
        self._keys = self._source.keys_of(blockwise.model)
        self.seconds: dict[str, float] = {}

    def to_folders(self, out: Path, *, overwrite: bool, progress: bool) -> StreamedResult:
        """Run all steps that are not finished, and return the result."""
        with torch.inference_mode(False), without_autocast():
            bare, plan = trace_blocks(self._blockwise, self._batches[0], prune=self._prune, ignore=self._ignore)
            reasons = dict.fromkeys(f"{group.name}: {group.locked}" for group in plan.groups if group.locked)
            require(
                bool(plan.prunable),
                f"no group can be removed block by block ({'; '.join(list(reasons)[:3])}): use etp_graph.oneshot_.",
                PlanError,
            )
            state = self._open(out, plan, overwrite=overwrite)
            return_memory()
            passes = 3 if needs_backward(self._method.observes) else 2
            with Bar(passes * len(self._blockwise.blocks) + passes, show=progress) as bar:
                return self._all_steps(state, bare, plan, bar)

    def _open(self, out: Path, plan: Plan, *, overwrite: bool) -> RunState:
        """Return the state of the run. Raise unless the output can be written."""
        tops = {f"size-{number}": target for number, target in enumerate(self._targets)}
        state = RunState(out.with_name(f".{out.name}.oneshot"), self._arguments(plan), tops)
        if state.is_new:
            for target in self._targets:
                require_free(target, overwrite=overwrite)
            require_space(out, self._most_bytes())
        return state

    def _most_bytes(self) -> int:
        """Return an upper bound of what the run writes."""
        config, backward = self._source.config.get_text_config(), needs_backward(self._method.observes)
        tokens = sum(batch["input_ids"].numel() for batch in self._batches)
        states = tokens * config.hidden_size * self._blockwise.dtype.itemsize
        boundaries = len(self._blockwise.blocks) + 3 if backward else 3
        return len(self._targets) * self._source.n_bytes + int(states) * boundaries

    def _arguments(self, plan: Plan) -> dict[str, Any]:
        """Return what the result depends on."""
        loss = self._loss
        return {
            "model": self._source.identity(), "batches": digest_of(self._batches), "plan": plan.fingerprint,
            "budget": [budget.to_dict() for budget in self._budgets], "out": [str(path) for path in self._targets],
            "criterion": self._method.criterion_name, "ridge": self._ridge,
            "loss": None if loss is None else getattr(loss, "__qualname__", type(loss).__name__),
            "dtype": str(self._blockwise.dtype), "device": str(self._blockwise.device), "torch": torch.__version__,
        }  # fmt: skip

    def _all_steps(self, state: RunState, bare: Any, plan: Plan, bar: Bar) -> StreamedResult:
        step = _Steps(state, bar, self.seconds).step
        hidden = HiddenStates(state, self._blockwise, self._batches)
        here = plan.to(self._blockwise.device.type)
        scoring = Scoring(hidden, here, self._method, self._loss, self._load)
        step("embed", partial(hidden.embed, self._read))
        scoring.run(step, self._read)
        chosen = select(bare, plan, scoring.scores().to("cpu"), self._budgets)
        sizes = [
            Size(top=f"size-{number}", selection=selection, config=pruned_config(bare, plan, selection))
            for number, (selection, _) in enumerate(chosen)
        ]
        writer = Writer(
            hidden, here, sizes, read=self._read_cast, keys=self._keys, ridge=self._ridge, hand_on=not scoring.backward
        )
        writer.run(step)
        fits = [writer.fits(number) for number in range(len(sizes))]
        for size in sizes:
            state.publish(size.top)
        state.remove()
        pruned = tuple(
            PrunedFolder(folder=target, selection=selection, cost=amount, compensation=done)
            for target, (selection, amount), done in zip(self._targets, chosen, fits, strict=True)
        )
        return StreamedResult(plan=plan, dense=cost(bare, plan), sizes=pruned, seconds=self.seconds)

    def _read(self, name: str) -> Tensor:
        return self._source.read(self._keys[name])

    def _read_cast(self, name: str) -> Tensor:
        return self._blockwise.cast(self._read(name))

    def _load(self, block: int) -> dict[str, Tensor]:
        """Return the tensors of a block, in the element type in which it computes."""
        return {name: self._read_cast(name) for name in self._blockwise.names_in(block)}


class _Steps:
    """Steps of a run that are stored in its state, timed, and shown in a progress bar."""

    def __init__(self, state: RunState, bar: Bar, seconds: dict[str, float]) -> None:
        self._state, self._bar, self._seconds = state, bar, seconds

    def step(self, name: str, action: Action) -> None:
        """Run a step unless it is finished."""
        self._bar.begin(name)
        if name not in self._state:
            begin = perf_counter()
            result, drop = action()
            self._state.finish(name, result, drop=drop)
            self._seconds[name] = perf_counter() - begin
            return_memory()
        self._bar.end()
