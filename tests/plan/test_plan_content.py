"""A plan from a file is checked in itself when it is read, and against the model before surgery."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.errors import PlanError
from tests.support.pruned_toy import state


class Custom(nn.Module):
    """A layer that the library does not know, with integers that count units and others that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.seed, self.flag, self.sizes, self.text = 4, 1234, True, (4, 4.0), "x"
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).view(len(x), self.heads, -1).flatten(1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.drop, self.pool, self.custom = nn.Dropout(0.1), nn.MaxPool2d(4), Custom()
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.custom(self.head(self.pool(self.drop(self.conv(x))).flatten(1)))


X = torch.zeros(2, 3, 8, 8)
ALL = {"range": [0, 4]}
HALF = etp.Selection({"conv": torch.arange(4) < 2})  # type: ignore[dict-item]


@pytest.fixture(scope="module")
def body() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(etp.trace(Net(), X).to_json())
    return found


def changed(body: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> str:
    copy = json.loads(json.dumps(body))
    change(copy)
    return json.dumps(copy)


def conv_of(body: dict[str, Any]) -> dict[str, Any]:
    return next(group for group in body["groups"] if group["name"] == "conv")


ATTRIBUTES = {
    "mode of a module": ["drop", "training", None], "window": ["pool", "kernel_size", None],
    "seed": ["custom", "seed", None], "flag": ["custom", "flag", None], "fraction": ["drop", "p", None],
    "entry of a tuple": ["custom", "sizes", 1], "entry that is missing": ["custom", "sizes", 9],
    "entry of a text": ["custom", "text", 0], "kernel": ["conv", "kernel_size", 0], "method": ["conv", "forward", None],
    "tensor": ["conv", "weight", None], "no module": ["nothing", "out_channels", None],
    "no attribute": ["conv", "nothing", None], "constant of a class": ["", "call_super_init", None],
}  # fmt: skip


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_plan_lowers_only_what_counts_units(name: str, body: dict[str, Any]) -> None:
    text = changed(body, lambda found: conv_of(found)["attributes"].append([*ATTRIBUTES[name], ALL, ALL]))
    model, plan = Net(), etp.Plan.from_json(text)
    before = state(model)
    with pytest.raises(PlanError, match=r"[Tt]race"):
        etp.prune_(model, plan, HALF)
    with pytest.raises(PlanError):
        etp.cost(model, plan)
    assert state(model) == before


def set_(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda body: conv_of(body).__setitem__(key, value)


CONTRADICTIONS: dict[str, Callable[[dict[str, Any]], object]] = {
    "private": lambda body: conv_of(body)["attributes"].append(["conv", "__class__", None, ALL, ALL]),
    "unit": lambda body: conv_of(body)["slices"][0].__setitem__(3, {"range": [0, 5]}),
    "position": lambda body: conv_of(body)["slices"][0].__setitem__(2, [0, 1, 2, 4]),
    "negative": lambda body: conv_of(body)["slices"][0].__setitem__(2, [0, 1, 2, -1]),
    "fraction": lambda body: conv_of(body)["slices"][0].__setitem__(2, [0, 1, 2, 2.5]),
    "uneven": lambda body: conv_of(body)["slices"][0].__setitem__(2, [[0], [1, 2]]),
    "length": lambda body: conv_of(body)["slices"][0].__setitem__(2, [0, 1]),
    "axis": lambda body: conv_of(body)["slices"][0].__setitem__(1, 4),
    "tensor": lambda body: conv_of(body)["slices"][0].__setitem__(0, "nothing"),
    "empty attribute": lambda body: conv_of(body)["attributes"].append(["conv", "groups", None, [], []]),
    "blocks": set_("blocks", 3), "no blocks": set_("blocks", 0), "multiple": set_("multiple", 0),
    "units": set_("n_units", 2**31), "twice": set_("name", "head"), "locked": set_("locked", 1),
    "operations": lambda body: body["ops"][0].__setitem__(1, -1),
    "operand": lambda body: body["ops"][0][2].append(["nothing", 0]),
    "parameter": lambda body: body["parameters"].append("nothing"),
    "shape": lambda body: body["tensors"].__setitem__("conv.weight", [4, 3, 3, True]),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_plan_that_contradicts_itself_is_not_read(name: str, body: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="not a plan"):
        etp.Plan.from_json(changed(body, CONTRADICTIONS[name]))


def test_the_plan_itself_is_read_and_applied(body: dict[str, Any]) -> None:
    model, plan = Net(), etp.Plan.from_json(json.dumps(body))
    etp.prune_(model, plan, HALF)
    assert model.conv.out_channels == 2
    assert model(X).shape == (2, 8)
