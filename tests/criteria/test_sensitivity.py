"""Scores from the measured growth of the loss: what removing units costs, and which group goes first."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.criteria import sensitivity
from etp_graph.criteria._sensitivity import _slopes
from etp_graph.errors import ScoreError

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))


class Branches(nn.Module):
    """Two hidden layers side by side; what the second one adds is ``weight`` times as large."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(6, 12), nn.Linear(6, 12)
        self.out_one, self.out_two = nn.Linear(12, 5), nn.Linear(12, 5)
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out_one(self.one(x).relu()) + self.weight * self.out_two(self.two(x).relu())
        return logits


def planned(model: nn.Module) -> tuple[etp.Plan, Tensor]:
    plan = etp.trace(model, X)
    return plan, etp.criteria.magnitude(model, plan)


def divergence(model: nn.Module, plan: etp.Plan, scores: Tensor, name: str, count: int) -> float:
    """The mean divergence after removing the ``count`` lowest units of a group, by surgery."""
    pruned = Branches(model.weight)  # type: ignore[arg-type]
    pruned.load_state_dict(model.state_dict())
    keep = {group.name: torch.ones(group.n_units, dtype=torch.bool) for group in plan.prunable}
    span = {group.name: span for group, span in plan.spans()}[name]
    keep[name][scores[span].argsort()[:count]] = False
    etp.prune_(pruned, plan, etp.Selection(keep))  # type: ignore[arg-type]
    with torch.no_grad():
        return float(
            F.kl_div(pruned(X).log_softmax(-1), model(X).log_softmax(-1), log_target=True, reduction="batchmean")
        )


def test_scores_add_up_to_the_measured_divergence() -> None:
    model = Branches()
    plan, scores = planned(model)
    found = sensitivity(model, plan, scores, [X[:5], X[5:]], shares=(0.5,))
    for group, span in plan.spans():
        if group.locked is None:
            own = found[span][scores[span].argsort(stable=True)]
            want = divergence(model, plan, scores, group.name, 6)
            assert float(own[:6].sum()) == pytest.approx(want, rel=1e-4)


def test_the_order_inside_a_group_stays() -> None:
    model = Branches()
    plan, scores = planned(model)
    found = sensitivity(model, plan, scores, [X])
    assert found.dtype == torch.float64 and bool((found > 0).all())
    for group, span in plan.spans():
        if group.locked is None:
            assert torch.equal(found[span].argsort(stable=True), scores[span].argsort(stable=True))


def test_the_group_that_matters_less_goes_first() -> None:
    model = Branches(weight=0.01)
    plan, scores = planned(model)
    budget = etp.Budget(params=0.7, rank="score_per_mac")
    by_norm = etp.allocate(model, plan, scores, budget=budget)
    measured = etp.allocate(model, plan, sensitivity(model, plan, scores, [X]), budget=budget)
    assert measured.keep["one"].all() and measured.keep["two"].sum() < 6
    assert not by_norm.keep["one"].all()


def test_a_loss_of_the_user_counts_in_place_of_the_divergence() -> None:
    model = Branches()
    plan, scores = planned(model)

    def loss(one: nn.Module, batch: Tensor) -> Tensor:
        hidden: Tensor = one.two(batch).relu()  # type: ignore[operator]
        return hidden.abs().mean() * -1.0  # only the second branch is read, and removing its units is a loss

    found = sensitivity(model, plan, scores, [X], loss=loss)
    spans = {group.name: span for group, span in plan.spans()}
    assert float(found[spans["one"]].max()) < 1e-6 * float(found[spans["two"]].max())


def test_the_model_is_left_alone() -> None:
    model = Branches().train()
    plan, scores = planned(model)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    sensitivity(model, plan, scores, iter([X]))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_padding_does_not_count() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    ))  # fmt: skip
    ids = torch.randint(24, (2, 8))
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    plan = etp.trace(model, {"input_ids": ids}, check=False)
    scores = etp.criteria.magnitude(model, plan)

    def measured(ids: Tensor) -> Tensor:
        return sensitivity(model, plan, scores, [{"input_ids": ids, "attention_mask": mask}], shares=(0.5,))

    other = torch.where(mask > 0, ids, (ids + 7) % 24)
    torch.testing.assert_close(measured(ids), measured(other), rtol=1e-3, atol=1e-9)


def test_slopes_are_those_of_the_lower_hull() -> None:
    """The dip at 2 lies above the line from 0 to 4, and does not count."""
    found = _slopes([(0, 0.0), (2, 3.0), (4, 4.0), (6, 10.0)], 7)
    np.testing.assert_allclose(found, [1, 1, 1, 1, 3, 3, 3], rtol=1e-5)
    assert bool((np.diff(found) > 0).all())
    lost = _slopes([(0, 0.0), (2, 1.0), (4, math.inf)], 5)
    np.testing.assert_allclose(lost[:2], 0.5, rtol=1e-5)
    assert bool((lost[2:] >= 10).all())
    assert bool((np.diff(_slopes([(0, 0.0), (3, 0.0)], 5)) > 0).all())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"batches": []}, "batches is empty"),
        ({"scores": torch.ones(3)}, r"expected \d+ finite numbers"),
        ({"scores": "nan"}, r"expected \d+ finite numbers"),
        ({"shares": ()}, "shares is empty"),
        ({"shares": (0.0,)}, "0 removes nothing"),
        ({"shares": (1.5,)}, "shares"),
        ({"batches": [X * math.nan]}, "logits of the dense model are NaN"),
        ({"batches": [X], "loss": lambda one, batch: one(batch).sum() * math.nan}, "loss of the dense model"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], match: str) -> None:
    model = Branches()
    plan, scores = planned(model)
    if change.get("scores") == "nan":
        change = {"scores": torch.full_like(scores, math.nan)}
    given: dict[str, Any] = {"scores": scores, "batches": [X]} | change
    with pytest.raises(ScoreError, match=match):
        sensitivity(model, plan, given.pop("scores"), given.pop("batches"), **given)
