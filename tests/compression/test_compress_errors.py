"""What the pipeline refuses, in which words, and that it changes nothing by that."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from etp_graph import Budget, schedules, trace
from etp_graph.compression import Phase
from etp_graph.demo.zoo.models import SmallResNet
from etp_graph.errors import BudgetError, EtpError, ForceError, PlanError, ScoreError
from etp_graph.surgery import get_record
from tests.support.models.toy import Toy, toy_plan
from tests.support.pruned_toy import state
from tests.support.training_loops import Loop, run, toy


def never(model: nn.Module, phase: Phase) -> None:
    raise AssertionError("nothing should be trained")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"speed_up": 0.5}, BudgetError, "speed_up=0.5"),
        ({"speed_up": None}, BudgetError, "target"),
        ({"speed_up": 2, "macs": 10}, BudgetError, "one target"),
        ({"speed_up": 2, "budget": Budget(macs=10)}, BudgetError, "budget="),
        ({"speed_up": 1e6}, BudgetError, "closest"),
        ({"budget": Budget(speed_up=2, max_ratio=0.6), "rounds": 2}, BudgetError, "max_ratio"),
        ({"method": "magic"}, ForceError, "etp-paper"),
        ({"method": "network-slimming"}, ScoreError, "conv2"),
        ({"rounds": 0}, ForceError, "rounds"),
        ({"schedule": schedules.Constant(value=0.5)}, ForceError, "climb"),
        ({"plan": trace(SmallResNet(blocks=1), torch.zeros(1, 1, 8, 8), check=False)}, PlanError, "another model"),
        ({"plan": toy_plan(), "ignore": "conv1"}, PlanError, "ignore"),
        ({"ignore": "conv9"}, PlanError, "conv9"),
        ({"evaluate": lambda model: float("nan")}, EtpError, "nan"),
        ({"evaluate": lambda model: float("inf")}, EtpError, "inf"),
        ({"evaluate": lambda model: None}, EtpError, "None"),
        ({"evaluate": lambda model: torch.zeros(3)}, EtpError, "number"),
    ],
)  # fmt: skip
def test_bad_arguments_change_nothing(arguments: dict[str, object], error: type[EtpError], words: str) -> None:
    model = toy()
    before = state(model)
    with pytest.raises(error, match=words):
        run(model, train=never, **arguments)
    assert state(model) == before


def test_weights_that_are_not_finite_change_nothing() -> None:
    model = toy()
    with torch.no_grad():
        model.conv2.weight[0, 0, 0, 0] = float("nan")
    before = state(model)
    with pytest.raises(EtpError, match=r"conv2\.weight"):
        run(model, train=never)
    assert state(model) == before


def test_inference_mode_and_a_plan_from_before_surgery_are_refused() -> None:
    with torch.inference_mode(), pytest.raises(PlanError, match="inference_mode"):
        run(toy(), train=never)
    model = toy()
    run(model)
    with pytest.raises(PlanError, match="pruned after tracing"):
        run(model, train=never, plan=toy_plan())


def attach_nothing(model: nn.Module, phase: Phase) -> None:
    pass


def attach_without_step(model: nn.Module, phase: Phase) -> None:
    phase.attach(torch.optim.SGD(model.parameters(), lr=0.1), steps=1)


@pytest.mark.parametrize("train", [attach_nothing, attach_without_step])
def test_a_sparse_phase_without_force_is_an_error(train: Callable[[nn.Module, Phase], None]) -> None:
    model = toy()
    before = state(model)
    with pytest.raises(ForceError, match=r"never acted.*phase\.attach"):
        run(model, train=train)
    assert {k: v for k, v in state(model).items() if not k.endswith("training")} == {
        k: v for k, v in before.items() if not k.endswith("training")
    }


def test_train_may_not_replace_parameters() -> None:
    loop = Loop()

    def train(model: Toy, phase: Phase) -> None:
        loop.train(model, phase)
        model.conv1.weight = nn.Parameter(model.conv1.weight.detach().clone())

    with pytest.raises(PlanError, match=r"conv1\.weight in the sparse phase"):
        run(toy(), loop, train=train)


def test_an_exception_in_train_goes_through_and_leaves_no_hooks() -> None:
    kept: list[torch.optim.Optimizer] = []

    def train(model: nn.Module, phase: Phase) -> None:
        kept.append(torch.optim.SGD(model.parameters(), lr=0.1))
        phase.attach(kept[0], steps=1)
        raise ZeroDivisionError

    model = toy()
    with pytest.raises(ZeroDivisionError):
        run(model, train=train)
    assert not kept[0]._optimizer_step_post_hooks
    assert not kept[0]._optimizer_step_pre_hooks
    assert get_record(model) == get_record(toy())
