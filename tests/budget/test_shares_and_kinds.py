"""A float is a share and an int a count; rules by kind of units; scalars of other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.budget import Budget
from etp_graph.plan import Cost
from tests.support.command_line import SHAPE, TOY, invoke
from tests.support.models.toy import Toy, toy_plan

DENSE = Cost(macs=10_000, params=1000)


class Attention(nn.Module):
    """Two blocks of attention (8 heads of 16 dimensions) and of 256 neurons."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(128, 8, 256, batch_first=True, dropout=0.0)
        self.body, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(128, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@pytest.fixture(scope="module")
def attention() -> tuple[nn.Module, etp.Plan, Tensor]:
    torch.manual_seed(0)
    model = Attention().eval()
    plan = etp.trace(model, torch.randn(1, 4, 128), check=False)
    return model, plan, torch.rand(plan.n_units)


def kept(plan: etp.Plan, selection: etp.Selection) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for group in plan.prunable:
        found.setdefault(group.kind, set()).add(int(selection.keep[group.name].sum()))
    return found


@pytest.mark.parametrize("value", [0.7, np.float64(0.7), torch.tensor(0.7, dtype=torch.float64), np.array(0.7)])
def test_a_float_below_one_is_a_share(value: Any) -> None:
    for name, amount in (("params", 700), ("macs", 7000)):
        budget = Budget(**{name: value})
        assert budget.target(DENSE) == amount
        assert budget.as_given == f"{name}=0.7"
        assert Budget.from_json(budget.to_json()) == budget


@pytest.mark.parametrize("value", [7, np.int64(7), np.int32(7), torch.tensor(7), 7.9, np.float32(7.5)])
def test_a_count_stays_a_count(value: Any) -> None:
    budget = Budget(params=value)
    assert (budget.params, type(budget.params), budget.target(DENSE)) == (7, int, 7)


@pytest.mark.parametrize("share", [0.1, 0.29, 1 / 3, 0.57, 0.999])
@pytest.mark.parametrize("dense", [100, 12_345, 10**17 + 1])
def test_a_share_is_exact(share: float, dense: int) -> None:
    target = Budget(macs=share).largest_amount(dense)
    assert abs(target - share * dense) <= 1 + 1e-12 * dense
    assert Budget(macs=0.29).largest_amount(100) == 29  # 0.29 * 100 is 28.999... in floating point


def test_speed_ups_of_other_libraries_and_wrong_scalars() -> None:
    assert Budget(speed_up=np.float32(2)) == Budget(speed_up=torch.tensor(2.0)) == Budget(speed_up=2.0)
    assert Budget(speed_up=2, min_units=np.int64(3), round_to=torch.tensor(8)) == Budget(
        speed_up=2, min_units=3, round_to=8
    )
    for wrong in (np.True_, torch.tensor([2.0]), np.array([2, 3]), torch.empty((), device="meta"), np.nan):
        with pytest.raises(etp.BudgetError):
            Budget(params=wrong)


@pytest.mark.parametrize("share", [0.5, 0.75])
def test_the_share_is_reached(share: float) -> None:
    model, plan = Toy(), toy_plan()
    dense = etp.cost(model, plan)
    selection = etp.allocate(model, plan, torch.rand(plan.n_units), budget=Budget(params=share))
    assert 0.9 * share <= etp.cost(model, plan, selection).params / dense.params <= share
    with pytest.raises(etp.BudgetError, match=r"params=0.01 is out of reach: the closest is params=0\.\d+") as error:
        etp.allocate(model, plan, torch.rand(plan.n_units), budget=Budget(params=0.01))
    said = float(str(error.value).partition("closest is params=")[2].partition(",")[0])
    etp.allocate(model, plan, torch.rand(plan.n_units), budget=Budget(params=said))


def test_a_width_is_a_multiple_for_kernels(attention: tuple[nn.Module, etp.Plan, Tensor]) -> None:
    model, plan, scores = attention
    found = kept(plan, etp.allocate(model, plan, scores, budget=Budget(params=0.6, round_to=64, scope="local")))
    assert found["heads"] <= {4, 8}  # of 16 dimensions each
    assert 4 in found["heads"]
    assert all(n % 64 == 0 for n in found["neurons"])


@pytest.mark.parametrize(
    ("rules", "heads", "neurons"),
    [
        ({"round_to": {"neurons": 64}}, 1, 64),
        ({"round_to": {"neurons": 64, "heads": 3}}, 3, 64),
        ({"round_to": {"heads": 4}}, 4, 1),
        ({"min_units": {"heads": 7}}, 1, 1),
        ({"min_units": {"neurons": 250}, "round_to": {"heads": 2}}, 2, 1),
    ],
)
def test_rules_by_kind(
    attention: tuple[nn.Module, etp.Plan, Tensor], rules: dict[str, Any], heads: int, neurons: int
) -> None:
    model, plan, scores = attention
    budget = Budget(params=0.8, **rules)
    assert Budget.from_json(budget.to_json()) == budget
    found = kept(plan, etp.allocate(model, plan, scores, budget=budget))
    assert all(n == 8 or n % heads == 0 for n in found["heads"])
    assert all(n == 256 or n % neurons == 0 for n in found["neurons"])
    assert found["heads"] | found["neurons"] != {8, 256}
    floors = rules.get("min_units", {})
    assert all(n >= floors.get(kind, 1) for kind, numbers in found.items() for n in numbers)


@pytest.mark.parametrize("rule", ["round_to", "min_units"])
@pytest.mark.parametrize(
    ("value", "words"), [({"head": 2}, "'heads'"), ({"heads": 0}, r"\['heads'\]=0"), ({"heads": 1.5}, "integer"),
                         ({1: 2}, "'heads'"), ("8", "integer"), ([8], "integer")],
)  # fmt: skip
def test_wrong_rules_by_kind_are_refused(rule: str, value: Any, words: str) -> None:
    with pytest.raises(etp.BudgetError, match=words):
        Budget(speed_up=2, **{rule: value})


@pytest.mark.parametrize("rule", ["round_to", "min_units", "kv_tokens", "scope"])
def test_a_rule_beside_a_target_names_the_remedy(rule: str) -> None:
    with pytest.raises(etp.BudgetError, match=rf"pass budget=etp\.Budget\(\.\.\., {rule}="):
        Budget.of(None, {"params": 0.5, rule: 8})


def test_the_command_line(tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "out"), "--overwrite")
    for target in (("--params", "0.7"), ("--params", "600"), ("--target", "params=0.7")):
        code, text, err = invoke("prune", TOY, *SHAPE, *out, *target, "--round-to", "channels=2", "--min-units", "3")
        assert code == 0, err
        assert "795" in text
    for wrong, words in (
        (("--round-to", "8", "--round-to", "heads=1"), "KIND=NUMBER"),
        (("--min-units", "chanels=2"), "'channels'"),
        (("--round-to", "x"), "KIND=NUMBER"),
    ):
        code, _, err = invoke("prune", TOY, *SHAPE, *out, "--params", "0.7", *wrong)
        assert code == 1
        assert words in err
