"""What the tracer does with calls that its rules cannot follow, and with names that two groups could share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.graph.rules import _dispatch
from tests.support.models.constructs import Net


def two_layers(operation: Any) -> Net:
    """A layer whose units an operation meets, and a block of two layers beside it."""
    return Net(
        lambda n, x: (n.b(operation(n.a(x))), n.d(n.c(x).relu())),
        a=nn.Linear(6, 8), b=nn.Linear(8, 3), c=nn.Linear(6, 7), d=nn.Linear(7, 3),
    )  # fmt: skip


def locked(plan: etp.Plan) -> dict[str, str]:
    return {group.name: group.locked for group in plan.groups if group.locked is not None}


@pytest.mark.parametrize(
    "failure", [RuntimeError, TypeError, IndexError, AssertionError, NotImplementedError, KeyError]
)
def test_a_rule_that_fails_locks_what_it_looked_at(failure: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def rule(call: Any) -> Tensor:
        raise failure("a shape that nobody foresaw")

    monkeypatch.setitem(_dispatch._RULES, "flip", rule)  # type: ignore[index]
    model, x = two_layers(lambda y: y.flip(0)), torch.randn(2, 6)
    plan = etp.trace(model, x, check=False)
    assert [group.name for group in plan.prunable] == ["c"]
    reason = locked(plan)["a"]
    assert all(word in reason for word in ("aten.flip", "the model's forward", failure.__name__, "nobody foresaw"))
    etp.verify(model, plan, x)


def test_a_rule_that_fails_in_one_reading_only_leaves_both_with_the_same_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _dispatch.label_of_matrix_product

    def rule(tracker: Any, *args: Any) -> Any:
        found = made(tracker, *args)
        if tracker.reading == "outer":
            raise IndexError("only here")
        return found

    monkeypatch.setattr(_dispatch, "label_of_matrix_product", rule)
    model, x = two_layers(lambda y: (y @ y.transpose(-1, -2)) @ y), torch.randn(2, 5, 6)
    plan = etp.trace(model, x, check=False)
    assert "IndexError" in locked(plan)["a"]
    assert plan.dense.macs > 0


def test_a_label_of_another_shape_than_its_tensor_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_dispatch._RULES, "flip", lambda call: call.label.unsqueeze(0))  # type: ignore[index]
    plan = etp.trace(two_layers(lambda y: y.flip(0)), torch.randn(2, 6), check=False)
    assert "aten.flip" in locked(plan)["a"]


class Positions(nn.Module):
    """A table that is read once for its rows (one for each head) and once for its columns."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.table = nn.Embedding(9, 4)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (layer(x).view(b, t, self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        bias = self.table(torch.arange(t)[:, None] - torch.arange(t)[None] + 4).permute(2, 0, 1)
        return self.out(((q @ k.mT * 0.3 + bias).softmax(-1) @ v).transpose(1, 2).reshape(b, t, -1))


def test_names_of_groups_are_unique() -> None:
    plan = etp.trace(nn.Sequential(nn.Linear(5, 8), Positions(), nn.Linear(8, 3)), torch.randn(2, 4, 5), check=False)
    names = [group.name for group in plan.groups]
    assert len(set(names)) == len(names)
    keep = torch.ones(plan.n_units, dtype=torch.bool)
    assert torch.equal(etp.Selection.from_flat(plan, keep).flat(plan), keep)


def test_a_plan_refuses_two_groups_with_one_name() -> None:
    plan = etp.trace(two_layers(torch.relu), torch.randn(2, 6), check=False)
    twins = (plan.groups[0], replace(plan.groups[1], name=plan.groups[0].name), *plan.groups[2:])
    with pytest.raises(etp.PlanError, match="several groups have the name 'a'"):
        replace(plan, groups=twins)
