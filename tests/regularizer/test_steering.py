"""``beta="auto"``: enough units are at zero for the budget when the path to it ends, for any model and loss."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils._pytree import tree_leaves, tree_map

import etp_graph as etp
from benchmarks.models import registry
from etp_graph import forces, schedules
from etp_graph.budget import Rank
from etp_graph.errors import BudgetError, ForceError, ScoreError
from etp_graph.methods import get
from etp_graph.model import run_model as forward
from etp_graph.plan import CostModel, Plan
from etp_graph.regularizer import Regularizer
from tests.support.forced_toy import batches, norms_of, same, toy, train
from tests.support.models.toy import Toy, toy_plan
from tests.support.training_loops import X, Y, loss
from tests.support.zero_units import zero_units_

STEPS = 20
FORCES = [forces.exponential(), forces.uniform(), forces.linear(), forces.heaviside(threshold=0.0)]
TARGETS = [etp.Budget(macs=100_000), etp.Budget(params=300), etp.Budget(speed_up=2.0, scope="local")]
BUDGET = etp.Budget(speed_up=3.0)


def steered(model: nn.Module, plan: Plan, **changed: Any) -> Regularizer:
    settings = {
        "beta": "auto", "steps": STEPS, "budget": BUDGET, "order": "importance", "acts_on": "losers",
        "chosen_by": "need-taylor",
    }  # fmt: skip
    return Regularizer(model, plan, **{**settings, **changed})


def alive(model: nn.Module, plan: Plan) -> Tensor:
    """The units whose norm, summed in loops, is not exactly zero; those of locked groups are not looked at."""
    locked = torch.zeros(plan.n_units, dtype=torch.bool)
    for group, span in plan.spans():
        locked[span] = group.locked is not None
    return (norms_of(model, plan) > 0) | locked


def at_zero(model: nn.Module, plan: Plan, quantity: str = "macs") -> int:
    """What the model costs without the units at zero."""
    return int(getattr(CostModel(plan).evaluate(alive(model, plan)), quantity))


def momentum(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


@pytest.mark.parametrize("chosen_by", ["need", "need-taylor", "taylor"])
@pytest.mark.parametrize("acts_on", ["units", "losers"])
@pytest.mark.parametrize(
    "force", [forces.exponential(), forces.uniform(), forces.linear(), forces.heaviside(threshold=0.0)]
)
@pytest.mark.parametrize("order", ["index", "random", "importance"])
def test_the_units_at_zero_are_enough_for_the_budget(
    chosen_by: str, acts_on: str, force: forces.Force, order: str
) -> None:
    model, plan = toy(), toy_plan()
    regularizer = steered(model, plan, acts_on=acts_on, force=force, order=order, chosen_by=chosen_by)
    with regularizer.attach(optimizer := momentum(model)):
        train(model, optimizer, batches(STEPS))
    target = BUDGET.target(CostModel(plan).dense)
    assert at_zero(model, plan) <= target
    if acts_on == "losers":
        assert at_zero(model, plan) > target / 3, "far more is gone than was asked for"


@pytest.mark.parametrize(
    "budget", [etp.Budget(macs=100_000), etp.Budget(params=300), etp.Budget(speed_up=2.0, scope="local")]
)
def test_every_counted_target_is_reached(budget: etp.Budget) -> None:
    model, plan = toy(), toy_plan()
    with steered(model, plan, budget=budget).attach(optimizer := momentum(model)):
        train(model, optimizer, batches(STEPS))
    assert at_zero(model, plan, budget.quantity) <= budget.target(CostModel(plan).dense)


@pytest.mark.parametrize("name", ["cifar_resnet20", "hf:bert", "hf:llama_gqa", "pyg:gat3", "rnn:lstm_lm", "informer"])
def test_real_architectures_end_at_the_budget_and_surgery_changes_nothing(name: str) -> None:
    entry = registry()[name]
    model, inputs = entry.build().double(), entry.small()
    inputs = tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, inputs)
    plan = etp.trace(model, inputs, check=False)
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))  # norms and biases are not at their defaults
    optimizer = AdamW(model.parameters(), lr=1e-3)
    budget = etp.Budget(speed_up=1.5)
    with steered(model, plan, budget=budget, steps=12).attach(optimizer):
        for _ in range(12):
            for parameter in model.parameters():
                parameter.grad = 0.1 * torch.randn_like(parameter)  # a loss that pulls everywhere
            optimizer.step()
    keep = alive(model, plan)
    assert CostModel(plan).evaluate(keep).macs <= budget.target(CostModel(plan).dense)
    selection = etp.allocate(model, plan, norms_of(model, plan), budget=budget)
    with torch.no_grad():
        before = tree_leaves(forward(model.eval(), inputs))
        etp.prune_(model, plan, selection)
        after = tree_leaves(forward(model, inputs))
    for a, b in zip(before, after, strict=True):
        if isinstance(a, Tensor) and a.shape == b.shape:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert before[0].shape == after[0].shape


@pytest.mark.parametrize("path", [schedules.Cubic(end=0.8), schedules.Cubic(end=0.5), schedules.OneShot(start=0.5)])
def test_the_path_is_followed(path: schedules.Schedule) -> None:
    model, plan = toy(), toy_plan()
    steps = 40
    regularizer = steered(model, plan, steps=steps, schedule=path)
    dense, target = CostModel(plan).dense.macs, BUDGET.target(CostModel(plan).dense)
    interval = 4
    with regularizer.attach(optimizer := momentum(model)):
        for done in range(interval, steps + 1, interval):
            train(model, optimizer, batches(interval))
            assert at_zero(model, plan) <= dense - path(done / steps) * (dense - target) + 1


@pytest.mark.parametrize(("speed_up", "end"), [(1.1, 0.2), (2.0, 0.5), (2.5, 0.6), (5.0, 0.8), (8.0, 0.8)])
def test_the_less_has_to_go_the_sooner_it_has_gone(speed_up: float, end: float) -> None:
    model, plan = toy(), toy_plan()
    budget = etp.Budget(speed_up=speed_up)
    regularizer = steered(model, plan, budget=budget, steps=100)
    assert regularizer._steering is not None
    assert regularizer._steering.path.to_dict() == {**schedules.Cubic().to_dict(), "end": pytest.approx(end, abs=1e-3)}
    target = budget.target(CostModel(plan).dense)
    with regularizer.attach(optimizer := momentum(model)):
        train(model, optimizer, batches(int(100 * end) + 5))  # and the interval that it ends in
        assert at_zero(model, plan) <= target


@pytest.mark.parametrize("steps", [1, 2, 7, 23, 61])
def test_any_number_of_steps_ends_at_the_budget_and_training_may_go_on(steps: int) -> None:
    model, plan = toy(), toy_plan()
    target = BUDGET.target(CostModel(plan).dense)
    path = schedules.Cubic(end=1.0)
    with steered(model, plan, steps=steps, schedule=path).attach(optimizer := momentum(model)):
        train(model, optimizer, batches(steps))
        assert at_zero(model, plan) <= target
        for batch in batches(5):
            train(model, optimizer, [batch])
            assert at_zero(model, plan) <= target


def test_it_does_not_depend_on_the_learning_rate() -> None:
    plan, found = toy_plan(), []
    for rate in (0.0, 1e-6, 1.0):
        model = toy()
        with steered(model, plan).attach(optimizer := SGD(model.parameters(), lr=rate)):
            for _ in range(STEPS):
                optimizer.step()  # without gradients
        found.append(model)
    assert same(found[0], found[1])
    assert same(found[0], found[2])
    assert at_zero(found[0], plan) <= BUDGET.target(CostModel(plan).dense)


def test_survivors_are_left_alone() -> None:
    model, plan = toy(), toy_plan()
    before = copy.deepcopy(model)
    with steered(model, plan).attach(optimizer := SGD(model.parameters(), lr=0.1)):
        for _ in range(STEPS):
            optimizer.step()
    keep = alive(model, plan)
    assert bool(keep.all()) is False
    masked = copy.deepcopy(before)
    zero_units_(masked, plan, keep)
    assert all(torch.equal(a, b) for a, b in zip(masked.parameters(), model.parameters(), strict=True))


def test_a_loss_that_brings_units_back_is_answered() -> None:
    model, plan = toy(), toy_plan()
    with steered(model, plan).attach(optimizer := SGD(model.parameters(), lr=0.1)):
        for _ in range(STEPS):
            for parameter in model.parameters():
                parameter.grad = -5 * torch.randn_like(parameter).abs()
            optimizer.step()
    assert at_zero(model, plan) <= BUDGET.target(CostModel(plan).dense)


@pytest.mark.parametrize("kappa", ["sqrt", "mean"])
@pytest.mark.parametrize("stop", [1, 2, 7])
def test_a_resumed_run_is_the_uninterrupted_one(stop: int, kappa: str) -> None:
    plan, data = toy_plan(), batches(STEPS)
    whole, part = toy(), toy()
    with steered(whole, plan, kappa=kappa).attach(optimizer := momentum(whole)):
        train(whole, optimizer, data)
    first = steered(part, plan, kappa=kappa).attach(optimizer := momentum(part))
    train(part, optimizer, data[:stop])
    state, weights, moments = first.state_dict(), copy.deepcopy(part.state_dict()), optimizer.state_dict()
    fresh = toy()
    fresh.load_state_dict(weights)
    second = steered(fresh, plan, kappa=kappa)
    second.load_state_dict(state)
    optimizer = momentum(fresh)
    optimizer.load_state_dict(moments)
    with second.attach(optimizer):
        train(fresh, optimizer, data[stop:])
    assert same(whole, fresh)


@pytest.mark.parametrize("name", ["losers", "sensitivity"])
def test_a_state_without_its_losers_is_refused(name: str) -> None:
    model, plan = toy(), toy_plan()
    state = steered(model, plan).state_dict()
    for spoiled in (None, torch.zeros(3, dtype=state[name].dtype), torch.zeros(plan.n_units, dtype=torch.int8)):
        with pytest.raises(ForceError, match="damaged"):
            steered(model, plan).load_state_dict({**state, name: spoiled})


def backward(model: nn.Module) -> None:
    model.zero_grad()
    loss(model, X.double(), Y).backward()


def test_sensitivity_is_a_running_mean_of_the_squared_slope_along_the_unit() -> None:
    model, plan = toy(), toy_plan()
    regularizer, want = steered(model, plan, steps=400), torch.zeros(plan.n_units, dtype=torch.float64)
    optimizer, stepped = SGD(model.parameters(), lr=0.05), []
    optimizer.register_step_post_hook(lambda *_: stepped.append(norms_of(model, plan).double()))  # before the force
    with regularizer.attach(optimizer):
        for done in range(8):  # an interval: gradients are looked at in every other step of it
            backward(model)
            changes = etp.criteria.taylor(model, plan).double()
            optimizer.step()
            if done % 2 == 0:
                want = 0.9 * want + 0.1 * (changes / stepped[-1]) ** 2
    locked = torch.cat([torch.full((g.n_units,), g.locked is not None) for g in plan.groups])
    found = regularizer.state_dict()["sensitivity"].double()
    torch.testing.assert_close(found[~locked], want[~locked], rtol=1e-5, atol=0)


def test_units_at_zero_stay_there_however_noisy_the_gradients_are() -> None:
    """Four dear units beside many cheap ones: fitting each step of the way closely would bring cheap ones back."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2)).double()
    plan = etp.trace(model, torch.randn(1, 64, dtype=torch.float64))
    budget = etp.Budget(speed_up=3.0, rank="score_per_sqrt_cost")
    lost = torch.zeros(plan.n_units, dtype=torch.bool)
    regularizer = steered(model, plan, budget=budget, steps=100)
    with regularizer.attach(optimizer := SGD(model.parameters(), lr=0.0)):
        for _ in range(100):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            assert regularizer._steering is not None
            assert bool(regularizer._steering.losers[lost].all()), "what is lost was chosen to stay"
            lost = ~alive(model, plan)
    over = at_zero(model, plan) / budget.target(CostModel(plan).dense)
    assert 0.9 < over <= 1, "so many units were taken to zero only to be given back that far more is gone"


@pytest.mark.parametrize("chosen_by", ["need", "need-taylor", "taylor"])
def test_a_diverged_training_is_noticed(chosen_by: str) -> None:
    model, plan = toy(), toy_plan()

    def run() -> None:
        for step in range(STEPS):
            if step == 6:
                model.conv1.weight.data.fill_(float("nan"))  # type: ignore[union-attr, operator]
            backward(model)
            optimizer.step()

    regularizer = steered(model, plan, chosen_by=chosen_by).attach(optimizer := SGD(model.parameters(), lr=0.0))
    with regularizer, pytest.raises(ScoreError, match="diverged"):
        run()


def test_a_model_that_fits_is_left_alone() -> None:
    model, plan = toy(), toy_plan()
    budget = etp.Budget(macs=10**9, min_units=1_000)
    with steered(model, plan, budget=budget).attach(optimizer := SGD(model.parameters(), lr=0.0)):
        for _ in range(STEPS):
            backward(model)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), toy().parameters(), strict=True))


def test_effects_are_half_relative_to_their_group() -> None:
    plan = toy_plan()
    pull = steered(toy(), plan)._pull
    spans = [span for _, span in plan.spans()]
    values = torch.rand(plan.n_units, generator=torch.Generator().manual_seed(0)) + 0.1
    for power, span in enumerate(spans):
        values[span] *= 9.0**power / values[span].mean()
    found = pull.half_relative(values, floor=0.0)
    for power, span in enumerate(spans):
        torch.testing.assert_close(found[span] * 3.0**power, values[span])
    raised = pull.half_relative(values, floor=1.0)
    for power, span in enumerate(spans):
        torch.testing.assert_close(raised[span].min(), torch.tensor(3.0**power))
    assert not pull.half_relative(torch.zeros_like(values), floor=0.0).any()


def test_small_units_that_the_loss_needs_stay_and_large_ones_that_it_ignores_go() -> None:
    gone = {}
    for chosen_by in ("need", "need-taylor", "taylor"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 2, bias=False)).double()
        with torch.no_grad():
            model[0].weight[:4] *= 0.5  # type: ignore[union-attr, operator, index]
        plan = etp.trace(model, torch.randn(1, 4, dtype=torch.float64))
        optimizer = SGD(model.parameters(), lr=0.0)
        with steered(model, plan, chosen_by=chosen_by, budget=etp.Budget(speed_up=2.0)).attach(optimizer):
            for _ in range(STEPS):
                for layer in model:
                    layer.weight.grad = torch.zeros_like(layer.weight)
                model[0].weight.grad[:4] = model[0].weight[:4].detach()  # type: ignore[union-attr, index]
                optimizer.step()
        gone[chosen_by] = (model[0].weight == 0).all(1).tolist()  # type: ignore[union-attr]
    assert gone["need"] == [True] * 4 + [False] * 4
    assert gone["need-taylor"] == gone["taylor"] == [False] * 4 + [True] * 4


class Still(Optimizer):
    """Changes nothing, as a fused optimizer where gradients overflow."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


def test_gradients_that_are_missing_or_overflow_say_nothing() -> None:
    model, plan = toy(), toy_plan()
    regularizer = steered(model, plan)
    with regularizer.attach(optimizer := Still(model)):
        backward(model)
        optimizer.step()
        before = regularizer.state_dict()["sensitivity"]
        assert before.any()
        model.conv1.weight.grad.fill_(float("inf"))  # type: ignore[union-attr]
        optimizer.step()
        assert torch.equal(regularizer.state_dict()["sensitivity"], before)
        optimizer.zero_grad()
        optimizer.step()
        torch.testing.assert_close(regularizer.state_dict()["sensitivity"], 0.9 * before)


def test_a_closure_shows_its_gradients_as_a_loop_does() -> None:
    plan, found = toy_plan(), []
    for closed in (True, False):
        model = toy()
        with steered(model, plan).attach(optimizer := momentum(model)):
            for _ in range(STEPS):

                def closure(model: nn.Module = model) -> Tensor:
                    model.zero_grad()
                    value = loss(model, X.double(), Y)
                    value.backward()
                    return value

                if closed:
                    optimizer.step(closure)
                else:
                    closure()
                    optimizer.step()
        found.append(model)
    assert same(found[0], found[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_numbers_reach_zero_as_well(dtype: torch.dtype) -> None:
    model, plan = toy(dtype), toy_plan()
    with steered(model, plan).attach(optimizer := momentum(model)):
        train(model, optimizer, batches(STEPS, dtype))
    assert at_zero(model, plan) <= BUDGET.target(CostModel(plan).dense)


@pytest.mark.parametrize("rank", [None, "score_per_sqrt_cost", "score_per_mac"])
def test_frozen_units_are_not_counted_on(rank: Rank | None) -> None:
    model, plan = toy(), toy_plan()
    model.conv2.bias.requires_grad_(False)
    before = model.conv2.bias.clone()
    budget = etp.Budget(speed_up=1.3, rank=rank)
    with pytest.warns(UserWarning, match="frozen"):
        regularizer = steered(model, plan, budget=budget).attach(optimizer := momentum(model))
    with regularizer:
        train(model, optimizer, batches(STEPS))
    assert torch.equal(before, model.conv2.bias)
    assert at_zero(model, plan) <= etp.Budget(speed_up=1.3).target(CostModel(plan).dense)


def test_the_rank_of_the_budget_says_who_goes() -> None:
    """Over what they cost, units of the first layer are missed least: each costs seven times as much."""
    left = []
    for rank in ("score", "score_per_sqrt_cost", "score_per_mac"):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(4), nn.Conv2d(16, 64, 3, padding=1), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(64, 4),
        )  # fmt: skip
        with torch.no_grad():
            model[0].weight *= 8 * torch.rand(16, 1, 1, 1)  # type: ignore[union-attr, operator]
            model[3].weight *= 2 * torch.rand(64, 1, 1, 1)  # type: ignore[union-attr, operator]
        plan = etp.trace(model, torch.randn(1, 3, 18, 18))
        budget = etp.Budget(speed_up=1.5, rank=rank)
        force = forces.Uniform()
        with steered(model, plan, budget=budget, chosen_by="need", force=force).attach(
            optimizer := SGD(model.parameters(), lr=0.0)
        ):
            for _ in range(STEPS):
                for weight in model.parameters():
                    weight.grad = torch.zeros_like(weight)
                optimizer.step()
        left.append(int((model[0].weight != 0).flatten(1).any(1).sum()))  # type: ignore[arg-type, union-attr]
    assert left[0] > left[1] > left[2]


def test_etp_is_what_the_study_says() -> None:
    method = get("etp")
    assert method.steered
    assert (method.rank, method.chosen_by, method.kappa) == ("score_per_sqrt_cost", "need-taylor", "mean")


def test_the_strength_is_that_of_the_last_step() -> None:
    model, plan = toy(), toy_plan()
    regularizer = steered(model, plan)
    assert regularizer.strength == 0
    with regularizer.attach(optimizer := SGD(model.parameters(), lr=0.1)):
        train(model, optimizer, batches(1))
        one = regularizer.strength
        assert one > 0
        assert math.isfinite(one)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"budget": None}, "budget"),
        ({"steps": None}, "steps"),
        ({"mode": "gradient"}, "mode"),
        ({"every": 2}, "every"),
        ({"refresh_every": 5}, "refresh_every"),
        ({"force": forces.growing()}, "growing"),
        ({"force": forces.ridge()}, "ridge"),
        ({"budget": etp.Budget(latency_ms=3.0)}, "latency_ms"),
        ({"beta": 0.1}, "budget"),
        ({"beta": 0.1, "budget": None}, "losers"),
        ({"beta": 0.1, "budget": None, "acts_on": "units"}, "chosen_by"),
        ({"chosen_by": "loss"}, "need-taylor"),
        ({"beta": "often"}, "auto"),
    ],
)
def test_what_makes_no_sense_is_refused(changed: dict[str, Any], words: str) -> None:
    model, plan = toy(), toy_plan()
    with pytest.raises(ForceError, match=words):
        steered(model, plan, **changed)
    assert same(model, toy())


def test_the_mean_norm_makes_groups_of_any_scale_alike() -> None:
    plan, found = toy_plan(), []
    for scale in (1.0, 100.0):
        model = toy()
        with torch.no_grad():
            model.conv1.weight.mul_(scale)
            model.norm.weight.mul_(scale)
            model.norm.bias.mul_(scale)
            model.conv2.weight.mul_(scale)
            model.conv2.bias.mul_(scale)
            model.linear.weight.mul_(1 / scale)
        regularizer = Regularizer(model, plan, kappa="mean")
        means = [norms_of(model, plan)[span].mean() for group, span in plan.spans() if group.locked is None]
        for (group, span), mean in zip(plan.spans(), means, strict=False):
            assert torch.allclose(regularizer.kappa[span].double(), mean.expand(group.n_units))
        found.append(means)
    assert found[0] != found[1]


def test_a_budget_out_of_reach_is_found_before_training() -> None:
    model, plan = toy(), toy_plan()
    with pytest.raises(BudgetError, match="out of reach"):
        steered(model, plan, budget=etp.Budget(speed_up=1e6))


def test_compress_by_default_loses_nothing_in_surgery() -> None:
    torch.manual_seed(0)
    model = Toy()
    found: list[Tensor] = []

    def run(model: nn.Module, phase: etp.Phase) -> None:
        optimizer = momentum(model)
        phase.attach(optimizer, steps=STEPS)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss(model, X, Y).backward()
            optimizer.step()

    def evaluate(model: nn.Module) -> float:
        with torch.no_grad():
            found.append(model(X))
        return 0.0

    result = etp.compress(model, X[:1], train=run, evaluate=evaluate, speed_up=3.0)
    _, sparse, pruned, _ = found
    torch.testing.assert_close(sparse, pruned, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found[0], sparse)
    assert result.speed_up >= 3
    assert get("etp").steered


def test_the_default_method_asks_for_the_number_of_steps() -> None:
    model = toy().float()

    def run(model: nn.Module, phase: etp.Phase) -> None:
        phase.attach(momentum(model))

    with pytest.raises(ForceError, match="steps=n"):
        etp.compress(model, X[:1], train=run, evaluate=lambda _: 0.0, speed_up=2.0)


def test_a_state_of_another_scope_is_refused_and_the_scope_is_named() -> None:
    model, plan = toy(), toy_plan()
    state = steered(model, plan, budget=etp.Budget(speed_up=2.0, scope="global")).state_dict()
    with pytest.raises(ForceError, match=r"other settings \(budget\.scope: 'global', here 'local'\)"):
        steered(model, plan, budget=etp.Budget(speed_up=2.0, scope="local")).load_state_dict(state)
