"""Methods that prune a language model without training."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

import etp_graph as etp
from benchmarks.common.scores import given, observed_scores
from benchmarks.llm import torch_pruning
from etp_graph.collect import OwnLabels
from etp_graph.plan import Positions, with_no_unit
from etp_graph.recovery import InputMoments, input_moments

RIDGE = 0.1
"""Chosen on the validation text among 1e-3, 1e-2 and 1e-1, whose perplexities differ by less than 1 %."""


BLOCKS = (0, 2, 4)
"""Numbers of layers that ``fisher+weights+depth`` tries to remove before units."""

MEASURED = 2
"""Batches on which sensitivity is measured: each group is measured four times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How units are chosen and what is made good.

    Attributes:
        criterion: name of the criterion; ``influence`` is that of whole layers.
        made_good: ``"nothing"``; ``"mean"``: the mean of what is lost goes into new biases; ``"weights"``: least
            squares.
        scope, rank: as of :class:`etp_graph.Budget`.
        heads: whether heads may go, too.
        allocation: ``"sensitivity"``: how groups compare is measured, see :func:`etp_graph.criteria.sensitivity`.
        peer: the whole recipe is Torch-Pruning's, by its own code.
        depth: ``"alone"``: only whole layers go; ``"before"``: two or four layers may go before units do.
        source: where the method comes from.
    """

    criterion: str
    made_good: Literal["nothing", "mean", "weights"] = "nothing"
    scope: Literal["global", "local"] = "local"
    rank: Literal["score", "score_per_mac"] = "score"
    heads: bool = True
    allocation: Literal["scores", "sensitivity"] = "scores"
    depth: Literal["none", "alone", "before"] = "none"
    peer: bool = False
    source: str = ""


METHODS: Mapping[str, Method] = {
    "random": Method(criterion="random", source="control; the same share of every group"),
    "magnitude": Method(criterion="magnitude", source="group norm; the same share of every group"),
    "wanda-sp": Method(criterion="wanda", source="An et al. 2024, section 5; the same share of every group"),
    "magnitude, neurons": Method(criterion="magnitude", heads=False, source="as `magnitude`, heads stay"),
    "wanda-sp, neurons": Method(criterion="wanda", heads=False, source="as `wanda-sp`, heads stay"),
    "flap": Method(criterion="flap", made_good="mean", scope="global", source="An et al. 2024"),
    "taylor": Method(criterion="taylor", source="Molchanov et al. 2019; the same share of every group"),
    "fisher": Method(criterion="fisher", scope="global", rank="score_per_mac", source="this library"),
    "fisher+weights": Method(
        criterion="fisher", made_good="weights", scope="global", rank="score_per_mac",
        source=f"this library: `oneshot_` with `ridge={RIDGE:g}`",
    ),
    "kron-obs": Method(criterion="kron_obs", scope="global", rank="score_per_mac", source="this library"),
    "kron-obs+weights": Method(
        criterion="kron_obs", made_good="weights", scope="global", rank="score_per_mac", source="this library"
    ),
    "fisher+weights, sensitivity": Method(
        criterion="fisher", made_good="weights", scope="global", rank="score_per_mac", allocation="sensitivity",
        source="this library: `criteria.sensitivity`",
    ),
    "fisher+weights+depth": Method(
        criterion="fisher", made_good="weights", scope="global", rank="score_per_mac", depth="before",
        source=f"this library: `oneshot_` with `blocks={BLOCKS}`",
    ),
    "shortgpt": Method(criterion="influence", depth="alone", source="Men et al. 2024: the layers of least influence"),
    "wanda-sp+weights": Method(criterion="wanda", made_good="weights", source="Wanda-sp with compensation"),
    "torch-pruning": Method(
        criterion="magnitude", peer=True,
        source="`examples/LLMs/prune_llm.py` of Torch-Pruning, by its own code; the width of the stream is pruned, too",
    ),
}  # fmt: skip


def data_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean cross-entropy of the next token."""
    loss: Tensor = model(**batch, labels=batch["input_ids"]).loss
    return loss


@dataclass(slots=True)
class Experiment:
    """A dense model with its plan and calibration batches; scores and moments are computed once.

    Attributes:
        model: the dense model.
        plan: its plan.
        batches: calibration batches.
        seed: of the calibration text, and of random numbers.
    """

    model: Any
    plan: etp.Plan
    batches: list[dict[str, Any]]
    seed: int
    _scores: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    _moments: InputMoments | None = None

    def prune(self, method: Method, params: int) -> tuple[Any, etp.Selection | None]:
        """A pruned copy with at most this many parameters, and the units that stay, if units were chosen."""
        if method.peer:
            return torch_pruning.pruned(self.model, params), None
        model, plan = copy.deepcopy(self.model), self.plan
        if method.depth == "alone":
            return self._shortened(model, params), None
        budget = etp.Budget(params=params, scope=method.scope, rank=method.rank)
        if method.depth == "before":
            return self._with_depth(model, method, budget)
        scores = self._score(method.criterion, method.allocation)
        if not method.heads:
            plan = plan.lock({group.name: "heads stay" for group in plan.prunable if group.kind == "heads"})
        if method.made_good == "mean":
            return self._with_biases(model, scores, budget)
        done = etp.oneshot_(
            model, self.batches, budget=budget, criterion=given(scores), plan=plan, ridge=RIDGE, progress=False,
            compensate=self._recorded() if method.made_good == "weights" else False, blend=1,
        )  # fmt: skip
        return model, done.selection

    def _shortened(self, model: Any, params: int) -> Any:
        """The model without its layers of least influence, scored once, as ShortGPT does."""
        blocks = list(etp.depth.find_blocks(model, self.batches[0]))
        number = -(-(model.num_parameters() - params) // blocks[0].parameters)
        influence = etp.depth.block_influence(model, blocks, self.batches)
        least = [blocks[place] for place in influence.argsort()[:number]]
        etp.depth.remove_blocks_(model, least, self.batches[0])
        return model

    def _with_depth(self, model: Any, method: Method, budget: etp.Budget) -> tuple[Any, etp.Selection]:
        done = etp.oneshot_(
            model, self.batches, budget=budget, criterion=method.criterion, ridge=RIDGE, progress=False, blocks=BLOCKS,
            loss=OwnLabels(seed=self.seed), compensate=method.made_good == "weights", blend=1,
        )  # fmt: skip
        return model, done.selection

    def _with_biases(self, model: Any, scores: Tensor, budget: etp.Budget) -> tuple[Any, etp.Selection]:
        """FLAP's compensation: ``W_lost E x_lost`` becomes the bias of the layer that read the lost units."""
        selection = etp.allocate(model, self.plan, scores, budget=budget)
        keep, biases = with_no_unit(selection.flat(self.plan).cpu(), True), dict[str, Tensor]()
        axes = Positions(self.plan).axes
        for place, reader in self._recorded().readers.items():
            part = next((part for part in axes[place.parameter] if part.axis == reader.in_axis), None)
            lost = torch.zeros(0, dtype=torch.bool) if part is None else ~part.kept_positions(keep)
            if not bool(lost.any()):
                continue  # its outputs are units, its inputs are not
            mean = (reader.moments.total / reader.moments.count).float()
            weight = model.get_parameter(place.parameter).detach()
            biases[place.parameter.rpartition(".")[0]] = weight[:, lost] @ mean[lost]
        etp.prune_(model, self.plan, selection)
        for name, bias in biases.items():
            model.get_submodule(name).bias = nn.Parameter(bias)
        return model, selection

    def _recorded(self) -> InputMoments:
        if self._moments is None:
            self._moments = input_moments(self.model, self.plan, self.batches)
        return self._moments

    def _score(self, criterion: str, allocation: Literal["scores", "sensitivity"] = "scores") -> Tensor:
        if (criterion, allocation) not in self._scores:
            found = self._observe(criterion) if allocation == "scores" else self._sensitivity(criterion)
            self._scores[criterion, allocation] = found
        return self._scores[criterion, allocation]

    def _sensitivity(self, criterion: str) -> Tensor:
        some = self.batches[:MEASURED]
        return etp.criteria.sensitivity(self.model, self.plan, self._score(criterion), some, progress=False)

    def _observe(self, criterion: str) -> Tensor:
        losses = [lambda batch=batch: data_loss(self.model, batch) for batch in self.batches]
        return observed_scores(self.model, self.plan, criterion, self.batches, data_losses=losses, seed=self.seed)
