"""What ``etp-graph prune`` scores units with, measures, and saves: by the weights alone, or on texts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from etp_graph._config import require
from etp_graph.budget import Budget, Rank
from etp_graph.checkpoint import save
from etp_graph.compression import choose_blend, distance_from
from etp_graph.criteria import COLLECTED, find_criterion, magnitude
from etp_graph.depth import shorten_
from etp_graph.errors import BudgetError
from etp_graph.export import huggingface, require_free, restrict_plan
from etp_graph.latency import benchmark
from etp_graph.model import named_tensors
from etp_graph.plan import Plan, Selection
from etp_graph.recovery import prepare_compensation

from ._models import BuiltModel
from ._texts import perplexity, read_texts, score_on_texts

_REPETITIONS = 5
"""Timed forwards of each model."""


class PruningRun:
    """One run of ``etp-graph prune``.

    Args:
        found: the model.
        out: the folder to write.
        data: file of texts, or ``None``.
        plain: whether ``out`` becomes a plain folder of transformers.
        overwrite: whether to replace a model in ``out``.

    Raises:
        EtpError: the texts do not fit the model, or the folder is in use.
    """

    def __init__(self, found: BuiltModel, out: Path, *, data: Path | None, plain: bool, overwrite: bool) -> None:
        self.found, self.out, self.plain, self.overwrite = found, out, plain, overwrite
        if plain:
            require_free(out.absolute(), overwrite=overwrite)
        self.texts = None if data is None else read_texts(data, found.model, found.tokenizer)
        self.inputs: Any = found.inputs if self.texts is None else self.texts.example_inputs

    def restrict(self, plan: Plan) -> Plan:
        """Return the plan without the groups that a plain folder cannot describe."""
        return restrict_plan(self.found.model, plan) if self.plain else plan

    def scores(self, criterion: str, plan: Plan) -> Tensor:
        """Return the scores of a criterion, float [plan.n_units]."""
        model = self.found.model
        if criterion in ("l1", "l2"):
            return magnitude(model, plan, p=1 if criterion == "l1" else 2)
        if criterion in COLLECTED and self.texts is not None:
            return score_on_texts(criterion, model, plan, self.texts)
        return find_criterion(criterion).score(model, plan)

    def remove_blocks(self, number: int) -> str:
        """Remove the residual blocks with the least influence on the texts, or else on the example inputs."""
        batches = [self.inputs] if self.texts is None else self.texts.batches
        result = shorten_(self.found.model, batches, n_blocks=number)
        return f"removed {', '.join(result.removed)}; the model that skips them differs by {result.error:.1e}"

    def compensate(self, dense: nn.Module, plan: Plan, selection: Selection) -> str:
        """Change the weights that read removed units; return a sentence about it, empty without texts.

        Args:
            dense: the model before its blocks were removed; not changed.
            plan: the plan of the model now.
            selection: the units that stay.
        """
        if self.texts is None:
            return ""
        model, batches = self.found.model, self.texts.batches
        weights = prepare_compensation(model, plan, selection, batches)
        blend, _ = choose_blend(model, plan, selection, weights, distance_from(dense, batches))
        weights.changes(blend).commit()
        n_layers, part = len(weights.fits.layers), "" if blend == 1 else f"; {blend:.0%} of the change was best"
        return f"compensated {n_layers} layers by least squares on the texts{part}\n" if n_layers else ""

    def comparison(self, dense: nn.Module) -> str:
        """Return perplexity, time and size of the dense and the pruned model, for models of transformers."""
        if not self.found.is_huggingface:
            return ""
        models = (dense, self.found.model)
        before, after = benchmark(models, self.inputs, repetitions=_REPETITIONS, warm_up=1)
        lines = [f"time of a forward: {before} -> {after}"]
        lines.append("weights: {:.1f} MiB -> {:.1f} MiB".format(*map(_mebibytes, models)))
        if self.texts is not None:
            tokens = sum(window.shape[1] for window in self.texts.held_out)
            values = [perplexity(model, self.texts.held_out) for model in models]
            lines.append("perplexity of the last {} tokens: {:.2f} -> {:.2f}".format(tokens, *values))
        return "\n".join([*lines, ""])

    def save(self) -> str:
        """Save the pruned model, and return a sentence that says where and how it is read."""
        if self.plain:
            model: Any = self.found.model
            with _element_type(model, self.found.dtype):
                huggingface(model, self.out, self.found.tokenizer, overwrite=self.overwrite)
            return f"saved to {self.out}; in Python: {type(model).__name__}.from_pretrained({str(self.out)!r})"
        save(self.found.model, self.out, overwrite=self.overwrite)
        hint = "; --uniform writes a folder that transformers reads" if self.found.is_huggingface else ""
        return f"saved to {self.out}; in Python: etp_graph.load({str(self.out)!r}, build=make_model){hint}"


def rank_of(criterion: str) -> Rank | None:
    """Return how scores of a criterion compare across groups: an estimate of the loss is divided by what it saves."""
    return "score_per_mac" if criterion == "fisher" else None


def with_amount(budget: Budget, plan: Plan) -> Budget:
    """Return a budget with a share of multiply-adds or parameters as an amount, by the plan of the whole model.

    Blocks that are removed first count, so that the share is one of the model that was given.

    Raises:
        BudgetError: the target is in another quantity.
    """
    require(
        budget.quantity in ("macs", "params") and not budget.measured,
        f"--remove-blocks goes with a target in multiply-adds or parameters, not with {budget.as_given}.",
        BudgetError,
    )
    amount = budget.largest_amount(plan.amount(budget.quantity))
    target: dict[str, Any] = {"speed_up": None, "macs": None, "params": None, budget.quantity: amount}
    return replace(budget, **target)


@contextmanager
def _element_type(model: Any, dtype: torch.dtype | None) -> Iterator[None]:
    """Convert the weights to the element type that they are stored with, and back to float32 at the end."""
    if dtype in (None, model.dtype):  # models of GGUF files refuse every conversion
        yield
        return
    model.to(dtype)
    try:
        yield
    finally:
        model.float()


def _mebibytes(model: nn.Module) -> float:
    return sum(tensor.numel() * tensor.element_size() for _, tensor in named_tensors(model)) / 2**20
