"""Growing regularization and soft pruning act on the units that are about to go, and on no others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from etp_graph import Budget, methods, trace
from etp_graph.budget import allocate
from etp_graph.collect import silence_
from etp_graph.compression import Phase
from etp_graph.compression._losers import PushLosers, SilenceLosers, find_losers
from etp_graph.errors import ForceError
from etp_graph.methods import Method
from etp_graph.plan import Plan
from etp_graph.regularizer import Regularizer
from tests.support.models.toy import Toy, toy_plan
from tests.support.training_loops import STEPS, Loop, X, loss, run, toy

BUDGET = Budget(speed_up=2, scope="local")


def who(model: nn.Module, plan: Plan, method: Method) -> Tensor:
    scores = method.scores(model, plan)
    return ~allocate(model, plan, scores, budget=BUDGET).flat(plan)


def test_greg1_grows_on_the_units_chosen_before_and_on_no_others() -> None:
    model, plan, method = toy(), toy_plan(), methods.get("greg1")
    gone = who(model, plan, method)
    assert 0 < int(gone.sum()) < 14
    optimizer = SGD(model.parameters(), lr=0.0)
    regularizer = method.regularizer(model, plan, steps=4)
    assert regularizer is not None
    regularizer.attach(optimizer)
    chosen = PushLosers(regularizer, find_losers(model, plan, method, BUDGET), at=0)
    chosen.attach(optimizer)
    assert ((regularizer.forces() > 0) == gone).tolist() == [True] * 19
    strengths = []
    for _ in range(4):
        strengths.append(regularizer.strength)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert strengths == [0, 0.25, 0.5, 0.75]  # of beta = 1
    # The gradient of λ/2·‖w_u‖² on the losers: their own weights times λ.
    torch.testing.assert_close(
        model.norm.bias.grad + model.norm.weight.grad,
        0.75 * (model.norm.bias + model.norm.weight).detach() * gone[:8],
    )


def test_greg2_acts_on_all_until_they_separate() -> None:
    model, plan, method = toy(), toy_plan(), replace(methods.get("greg2"), select_at=0.5)
    optimizer = SGD(model.parameters(), lr=0.0)
    regularizer = method.regularizer(model, plan, steps=4)
    assert regularizer is not None
    regularizer.attach(optimizer)
    chosen = PushLosers(regularizer, find_losers(model, plan, method, BUDGET), at=2)
    chosen.attach(optimizer)
    pushed = []
    for step in range(4):
        pushed.append((regularizer.forces() > 0)[:14])
        with torch.no_grad():
            model.norm.weight[0] = 1e-3 if step == 0 else 5.0  # who is small at the beginning does not matter
        optimizer.step()
    gone = who(model, plan, method)[:14]
    assert [bool(one.all()) for one in pushed] == [True, True, False, False]
    assert torch.equal(pushed[2], gone)
    assert torch.equal(pushed[3], gone)
    chosen.detach()
    regularizer.detach()
    assert not optimizer._optimizer_step_post_hooks


def test_soft_pruning_zeroes_what_produces_a_unit_and_lets_it_come_back() -> None:
    model, plan = toy(), toy_plan()
    gone = torch.zeros(19, dtype=torch.bool)
    gone[[2, 9]] = True
    with torch.no_grad():
        model.norm.bias.fill_(0.5)
        model.conv2.bias.fill_(0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    silence_(model, plan, gone)
    for name, p in model.named_parameters():
        kept = torch.ones_like(p)
        if name == "conv1.weight":
            kept[2] = 0
        if name == "conv2.weight":
            kept[1] = 0
        assert torch.equal(p.detach(), before[name] * kept), name
    optimizer = SGD(model.parameters(), lr=0.1)
    loss(model).backward()
    optimizer.step()
    assert bool((model.conv1.weight[2] != 0).any())
    assert bool((model.conv2.weight[1] != 0).any())


def test_soft_pruning_acts_every_so_many_steps_and_at_the_end() -> None:
    model, plan = toy(), toy_plan()
    with torch.no_grad():
        model.norm.bias.fill_(0.5)
        model.conv2.bias.fill_(0.5)
    method = replace(methods.get("sfp"), soft_every=2)
    optimizer = SGD(model.parameters(), lr=0.05)
    soft = SilenceLosers(model, plan, find_losers(model, plan, method, BUDGET), every=2)
    soft.attach(optimizer)

    def silent() -> int:
        return int(
            (model.conv1.weight.flatten(1) == 0).all(1).sum() + (model.conv2.weight.flatten(1) == 0).all(1).sum()
        )

    seen = []
    for _ in range(5):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
        seen.append(silent())
    n = int(who(model, plan, method).sum())
    assert seen == [0, n, 0, n, 0]
    soft.detach()
    assert silent() == n
    assert not optimizer._optimizer_step_post_hooks


def test_transposed_convolutions_are_silenced_along_their_own_axis() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    plan = trace(model, torch.randn(1, 3, 4, 4))
    silence_(model, plan, torch.tensor([True] + [False] * (plan.n_units - 1)))
    assert bool((model[0].weight[:, 0] == 0).all())
    assert bool((model[0].weight[:, 1:] != 0).all())
    assert bool((model[2].weight != 0).all())


def test_soft_pruning_goes_through_compress_and_loses_nothing_in_surgery_but_what_it_silenced() -> None:
    """A filter at zero behind which nothing adds a constant is gone already: surgery changes no output."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 5),
    )  # fmt: skip
    result = run(model, method=replace(methods.get("sfp"), soft_every=STEPS))
    assert result.metric_pruned == pytest.approx(result.metric_sparse, rel=1e-5)


@pytest.mark.parametrize("name", ["sfp", "greg1", "greg2"])
def test_losers_are_those_of_the_budget(name: str) -> None:
    seen: list[Tensor] = []

    class Watching(Loop):
        def train(self, model: nn.Module, phase: Phase) -> None:
            super().train(model, phase)
            if phase.regularizer is not None:
                seen.append(phase.regularizer.distances())

    method = replace(methods.get(name), soft_every=2 * (name == "sfp"), select_at=0.4 * (name == "greg2"))
    result = run(toy(), Watching(), method=method, plan=toy_plan())
    if seen:
        gone = ~result.selections[0].flat(toy_plan())
        assert torch.equal(seen[0].bool(), gone)


def test_what_a_phase_lacks_is_said() -> None:
    def train(model: nn.Module, phase: Phase) -> None:
        phase.attach(SGD(model.parameters(), lr=0.1))

    for name in ("greg1", "greg2"):
        with pytest.raises(ForceError, match="steps=n"):
            run(toy(), method=name, train=train)
    unsteady = replace(methods.get("greg2"), strength=None)
    with pytest.raises(ForceError, match=r"share of the phase.*steps=n"):
        run(toy(), method=unsteady, train=train)
    with pytest.raises(ForceError, match="took no step"):
        run(toy(), method="sfp", train=train)
    with pytest.raises(ForceError, match="attached no optimizer"):
        run(toy(), method="sfp", train=lambda model, phase: None)


def test_soft_pruning_takes_one_optimizer() -> None:
    def train(model: nn.Module, phase: Phase) -> None:
        phase.attach(SGD(model.parameters(), lr=0.1))
        phase.attach(SGD(model.parameters(), lr=0.1))

    with pytest.raises(ForceError, match="already"):
        run(toy(), method="sfp", train=train)


def test_a_penalty_that_nobody_added_is_told() -> None:
    def train(model: nn.Module, phase: Phase) -> None:
        optimizer = SGD(model.parameters(), lr=0.1)
        phase.attach(optimizer)
        loss(model, X[:8], torch.arange(8) % 5).backward()
        optimizer.step()

    with pytest.raises(ForceError, match=r"never added it: call \(loss \+ phase\.penalty\(\)\)"):
        run(toy(), method="etp-paper", train=train)


def test_the_penalty_of_a_phase_is_that_of_the_mode_loss_and_else_nothing() -> None:
    seen: dict[str, float] = {}

    class Watching(Loop):
        def train(self, model: nn.Module, phase: Phase) -> None:
            super().train(model, phase)
            seen[f"{phase.method.name} {phase.name}"] = float(torch.as_tensor(phase.penalty()).detach())

    for name in ("etp-paper", "etp"):
        run(toy(), Watching(), method=name)
    assert seen.pop("etp-paper sparse") > 0
    assert set(seen.values()) == {0.0}


def test_a_regularizer_keeps_its_chosen_units_through_a_state() -> None:
    model, plan, method = Toy(), toy_plan(), methods.get("greg1")
    one, other = method.regularizer(model, plan, steps=4), method.regularizer(model, plan, steps=4)
    assert isinstance(one, Regularizer)
    assert isinstance(other, Regularizer)
    PushLosers(one, find_losers(model, plan, method, BUDGET), at=0).attach(SGD(model.parameters(), lr=0.1))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.forces(), other.forces())
