"""Plans that contradict the model are refused before anything changes, by ``verify`` and by ``prune_``."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp
from tests.support.faults.injected_faults import describe
from tests.support.models.toy import Toy, toy_plan

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def selected(plan: etp.Plan) -> etp.Selection:
    return etp.Selection({group.name: torch.arange(group.n_units) % 3 != 0 for group in plan.prunable})  # type: ignore[misc]


def changed(plan: etp.Plan, change: Any) -> etp.Plan:
    body = json.loads(plan.to_json())
    change(body["groups"])
    return etp.Plan.from_json(json.dumps(body))


def refused(model: nn.Module, plan: etp.Plan, words: str, x: Tensor = X) -> None:
    before = describe(model)
    with pytest.raises(etp.PlanError, match=words):
        etp.prune_(model, plan, selected(plan))
    assert describe(model) == before
    with pytest.raises(etp.EquivalenceError):
        etp.verify(model, plan, x, ratio=0.5)
    assert describe(model) == before


@pytest.mark.parametrize("lost", ["conv1 out_channels", "norm num_features", "conv2 in_channels", "linear in_features"])
def test_a_plan_that_lowers_no_attribute_is_refused(lost: str) -> None:
    """The forward of a plain layer does not read these numbers, so outputs are right; export and saving are not."""

    def drop(groups: Any) -> None:
        for group in groups:
            group["attributes"] = [a for a in group["attributes"] if f"{a[0]} {a[1]}" != lost]

    refused(Toy().eval(), changed(toy_plan(), drop), lost.split()[1])


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 12)
        self.norm = nn.LayerNorm(12)
        self.gru = nn.GRU(12, 10, batch_first=True)
        self.act = nn.PReLU(10)
        self.up = nn.ConvTranspose1d(10, 6, 2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gru(self.norm(self.embed(x)))[0]
        return self.head(self.up(self.act(x.transpose(1, 2))).mean(2))


@pytest.mark.parametrize(
    "lost", ["norm normalized_shape", "gru input_size", "gru hidden_size", "act num_parameters",
             "up in_channels", "up out_channels", "head in_features"]
)  # fmt: skip
def test_every_kind_of_layer(lost: str) -> None:
    model, tokens = Parts().eval(), torch.arange(5)[None]
    plan = etp.trace(model, tokens, prune="all")
    found = [f"{a.module} {a.name}" for group in plan.prunable for a in group.attributes]
    assert lost in found

    def drop(groups: Any) -> None:
        for group in groups:
            group["attributes"] = [a for a in group["attributes"] if f"{a[0]} {a[1]}" != lost]

    refused(model, changed(plan, drop), lost.split()[1], tokens)


@pytest.mark.parametrize(
    "attribute",
    [
        ["conv1", "training", None], ["conv1", "kernel_size", 0], ["conv1", "forward", None], ["", "_modules", None],
        ["conv1", "__class__", None], ["nobody", "x", None], ["conv1", "padding_mode", 0], ["norm", "eps", None],
        ["", "seed", None], ["", "few", None], ["", "flag", None], ["", "sizes", 5],
    ],
)  # fmt: skip
def test_attributes_that_count_no_units_are_not_written(attribute: list[Any]) -> None:
    model = Toy()
    model.seed, model.few, model.flag, model.sizes = 10**6, 3, True, (8, 8)  # type: ignore[assignment]

    def add(groups: Any) -> None:
        groups[0]["attributes"].append([*attribute, {"range": [0, 8]}, {"range": [0, 8]}])

    before = describe(model)
    with pytest.raises(etp.PlanError):
        etp.prune_(model, plan := changed(toy_plan(), add), selected(plan))
    assert describe(model) == before


def test_sparse_gradients_stay_sparse() -> None:
    model = nn.Sequential(nn.Embedding(11, 8, sparse=True), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    tokens = torch.tensor([[1, 4, 4]])
    model(tokens).square().sum().backward()
    plan = etp.trace(model, tokens, prune="all", check=False)
    grad = model[0].weight.grad
    assert grad is not None and grad.is_sparse
    whole = grad.to_dense()
    keep = torch.arange(8) < 5
    etp.prune_(model, plan, etp.Selection({"0": keep}))  # type: ignore[dict-item]
    cut = model[0].weight.grad
    assert cut is not None and cut.is_sparse and cut.shape == model[0].weight.shape == (11, 5)
    assert torch.equal(cut.to_dense(), whole[:, keep]) and cut._nnz() <= 3
    torch.optim.SGD(model.parameters(), lr=0.1).step()
