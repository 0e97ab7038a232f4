"""Criteria: properties that hold for all of them, then each against its definition written out as loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from etp_graph import criteria, forces, trace
from etp_graph.criteria import CRITERIA
from etp_graph.errors import ForceError, PlanError, ScoreError
from etp_graph.plan import Group, Plan, Slice, as_tensor
from etp_graph.regularizer import Mode, Order, Regularizer
from tests.support.models.toy import Toy, toy_plan
from tests.support.recorded_batches import COLLECTED, recorded

Score = Callable[[nn.Module, Plan], Tensor]


@dataclass(frozen=True)
class Case:
    name: str
    score: Score
    positional: bool = False  # the score depends on where a unit stands, on purpose


def by_importance(force: forces.Force) -> Score:
    mode: Mode = "gradient" if force.elementwise else "prox"
    return lambda m, p: criteria.etp(m, p, regularizer=Regularizer(m, p, force=force, mode=mode, order="importance"))


CASES = [
    Case("etp", criteria.etp, positional=True),
    *(Case(f"etp {name}", by_importance(force())) for name, force in forces.FORCES.items()),
    Case("torque", criteria.torque, positional=True),
    *(
        Case(f"magnitude p={p} {how}", lambda m, pl, p=p, how=how: criteria.magnitude(m, pl, p=p, normalize=how))
        for p in (1, 2, 1.5) for how in ("mean", "max", "sum", "none")
    ),
    Case("bn_scale", lambda m, p: criteria.bn_scale(m, p.lock({"conv2": "passes through no batch norm"}))),
    Case("taylor", criteria.taylor),
    Case("filter_magnitude", criteria.filter_magnitude),
    *(Case(name, getattr(criteria, name)) for name in ("fpgm", "whc", "lamp")),
    *(
        Case(f"{name} recorded", lambda m, p, name=name: CRITERIA[name](m, p, record=recorded(m, p, name)))
        for name in COLLECTED
    ),
    Case("random", criteria.random, positional=True),
]  # fmt: skip
every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
WEIGHTS = [c for c in CASES if not c.name.endswith("recorded")]  # for the others, see test_collect.py
weights = pytest.mark.parametrize("case", WEIGHTS, ids=lambda case: case.name)
moving = pytest.mark.parametrize("case", [c for c in CASES if not c.positional], ids=lambda case: case.name)


def toy(dtype: torch.dtype = torch.float64, seed: int = 0) -> Toy:
    """With random norms, and gradients of a loss."""
    torch.manual_seed(seed)
    model = Toy().to(dtype)
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    model(torch.randn(4, 3, 8, 8, dtype=dtype)).square().sum().backward()
    return model


def relabel(plan: Plan, new: dict[str, Tensor]) -> Plan:
    """The same plan with unit u of a group called ``new[group][u]``."""

    def move(group: Group) -> Group:
        to = new.get(group.name, torch.arange(group.n_units))
        return replace(
            group,
            slices=tuple(replace(s, unit=to[as_tensor(s.unit)]) for s in group.slices),
            attributes=tuple(replace(a, unit=to[as_tensor(a.unit)]) for a in group.attributes),
        )

    return replace(plan, groups=tuple(move(group) for group in plan.groups))


def test_the_table_misses_no_criterion() -> None:
    assert {case.name.split()[0] for case in CASES} | {"reap"} == set(CRITERIA)  # test_reap.py has a model with experts


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_finite_score_per_unit_and_nothing_changed(case: Case, dtype: torch.dtype) -> None:
    model, plan = toy(dtype), toy_plan()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    scores = case.score(model, plan)
    assert scores.shape == (plan.n_units,)
    assert scores.dtype in (torch.float32, torch.float64)
    assert not scores.requires_grad
    assert bool((scores.isfinite() & (scores >= 0)).all())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True) if p.grad is not None)


@every
def test_the_order_of_slices_does_not_matter(case: Case) -> None:
    model, plan = toy(), toy_plan()
    turned = replace(plan, groups=tuple(replace(g, slices=g.slices[::-1]) for g in plan.groups))
    torch.testing.assert_close(case.score(model, turned), case.score(model, plan))


@moving
def test_scores_follow_a_permutation_of_the_units(case: Case) -> None:
    model, plan = toy(), toy_plan()
    new = {"conv1": torch.randperm(8), "conv2": torch.randperm(6)}
    old, moved = case.score(model, plan), case.score(model, relabel(plan, new))
    for group, span in plan.spans():
        to = new.get(group.name, torch.arange(group.n_units))
        torch.testing.assert_close(moved[span][to], old[span])


@weights
def test_low_precision_agrees_with_double(case: Case) -> None:
    exact, rounded = toy(torch.float64), toy(torch.float64)
    for p in [*exact.parameters(), *rounded.parameters()]:
        p.data = p.data.bfloat16().to(p.dtype)
        assert p.grad is not None
        p.grad = p.grad.bfloat16().to(p.dtype)
    rounded.bfloat16()
    # The weights are the same numbers in both models, so only the arithmetic of the criterion can differ.
    torch.testing.assert_close(
        case.score(rounded, toy_plan()).double(), case.score(exact, toy_plan()).double(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("case", [c for c in WEIGHTS if c.name != "random"], ids=lambda case: case.name)
def test_a_parameter_that_is_not_finite_is_named(case: Case, bad: float) -> None:
    model, plan = toy(), toy_plan()
    model.norm.weight.data[3] = bad
    with pytest.raises((ScoreError, ForceError), match=r"'norm\.weight'"):
        case.score(model, plan)


@pytest.mark.parametrize("order", ["index", "importance"])
def test_a_parameter_that_was_spoiled_while_training_is_named(order: Order) -> None:
    model, plan = toy(), toy_plan()
    reg = Regularizer(model, plan, order=order)
    model.norm.weight.data[3] = torch.nan
    with pytest.raises(ScoreError, match=r"'norm\.weight'"):
        criteria.etp(model, plan, regularizer=reg)


@every
def test_another_model_is_refused(case: Case) -> None:
    model, plan = toy(), toy_plan()
    model.linear = nn.Linear(24, 7).double()
    with pytest.raises(PlanError, match="linear"):
        case.score(model, plan)


def slices(model: nn.Module, plan: Plan) -> list[list[tuple[str, Tensor, Tensor]]]:
    """For each unit (name, weights, gradients) of each of its slices: the definition, without index arithmetic."""
    parameters = dict(model.named_parameters())
    found: list[list[tuple[str, Tensor, Tensor]]] = [[] for _ in range(plan.n_units)]
    for group, span in plan.spans():
        for piece in group.slices:
            if piece.tensor not in parameters:
                continue
            for i, u in zip(as_tensor(piece.index), as_tensor(piece.unit), strict=True):
                weight = parameters[piece.tensor]
                assert weight.grad is not None
                at = (piece.tensor, weight.detach().select(piece.axis, int(i)), weight.grad.select(piece.axis, int(i)))
                found[span.start + int(u)].append(at)
    return found


@pytest.mark.parametrize("p", [1, 2, 3])
def test_magnitude_is_the_norm_over_all_slices(p: float) -> None:
    model, plan = toy(), toy_plan()
    wanted = [torch.cat([w.flatten() for _, w, _ in unit]).norm(p) for unit in slices(model, plan)]
    torch.testing.assert_close(criteria.magnitude(model, plan, p=p, normalize="none"), torch.stack(wanted))


@pytest.mark.parametrize("how", ["mean", "max", "sum"])
def test_normalized_groups_have_measure_one_and_keep_their_order(how: str) -> None:
    model, plan = toy(), toy_plan()
    plain = criteria.magnitude(model, plan, normalize="none")
    scores = criteria.magnitude(model, plan, normalize=how)  # type: ignore[arg-type]
    for _, span in plan.spans():
        assert float(getattr(scores[span], how)()) == pytest.approx(1)
        assert scores[span].argsort().tolist() == plain[span].argsort().tolist()


def test_a_group_of_zeros_scores_zero() -> None:
    model, plan = toy(), toy_plan()
    nn.utils.vector_to_parameters(torch.zeros(sum(p.numel() for p in model.parameters())), model.parameters())
    assert criteria.magnitude(model, plan)[:8].tolist() == [0.0] * 8


def test_taylor_is_the_slope_of_the_loss_towards_removal() -> None:
    """d/dε of the loss with all slices of a unit scaled by 1 − ε, by finite differences."""
    model, plan = toy(), toy_plan()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    model.zero_grad()
    model(x).square().sum().backward()
    scores = criteria.taylor(model, plan)
    for u, unit in enumerate(slices(model, plan)):
        losses = []
        for step in (1e-6, -1e-6):
            kept = [w.clone() for _, w, _ in unit]
            for _, w, _ in unit:
                w.mul_(1 - step)
            with torch.no_grad():
                losses.append(float(model(x).square().sum()))
            for (_, w, _), old in zip(unit, kept, strict=True):
                w.copy_(old)
        assert float(scores[u]) == pytest.approx(abs(losses[0] - losses[1]) / 2e-6, rel=1e-4, abs=1e-6)


def test_taylor_names_what_has_no_gradient() -> None:
    model, plan = toy(), toy_plan()
    model.norm.bias.grad = None
    with pytest.raises(ScoreError, match=r"'norm\.bias'.*backward"):
        criteria.taylor(model, plan)
    model.norm.bias.requires_grad_(False)
    with pytest.raises(ScoreError, match=r"set requires_grad on 'norm\.bias'"):
        criteria.taylor(model, plan)
    model.norm.bias.grad = torch.full_like(model.norm.bias, torch.nan)
    with pytest.raises(ScoreError, match=r"the gradient of norm\.bias"):
        criteria.taylor(model, plan)


def test_bn_scale_is_gamma_and_refuses_groups_without_one() -> None:
    model, plan = toy(), toy_plan()
    locked = plan.lock({"conv2": "no batch norm"})
    torch.testing.assert_close(criteria.bn_scale(model, locked)[:8], model.norm.weight.detach().abs())
    with pytest.raises(ScoreError, match=r"'conv2' pass through no batch norm"):
        criteria.bn_scale(model, plan)


def test_filter_magnitude_is_the_mean_absolute_weight_of_the_filters_that_produce_a_unit() -> None:
    """Of conv1 and conv2: no norm, no bias, and not the weights that read the unit."""
    model, plan = toy(), toy_plan()
    wanted = [
        sum(float(w.abs()) for w in layer.weight[u].detach().flatten()) / layer.weight[u].numel()
        for layer in (model.conv1, model.conv2, model.linear) for u in range(len(layer.weight))
    ]  # fmt: skip
    assert criteria.filter_magnitude(model, plan).tolist() == pytest.approx(wanted)


def test_filter_magnitude_of_a_residual_stream_is_the_mean_over_its_layers() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.head(x + self.second(x).relu())

    model = Residual()
    plan = trace(model, torch.randn(2, 3), prune="all")
    (stream,) = plan.prunable
    wanted = [(model.first.weight[u].abs().sum() + model.second.weight[u].abs().sum()) / (3 + 4) for u in range(4)]
    scores = criteria.filter_magnitude(model, plan)[{g.name: s for g, s in plan.spans()}[stream.name]]
    torch.testing.assert_close(scores, torch.stack(wanted).detach())


def test_random_depends_on_the_seed_alone() -> None:
    plan = toy_plan()
    assert torch.equal(criteria.random(toy(seed=0), plan, seed=3), criteria.random(toy(seed=1), plan, seed=3))
    assert not torch.equal(criteria.random(toy(), plan, seed=3), criteria.random(toy(), plan, seed=4))


def test_etp_without_regularizer_is_that_of_the_default_one() -> None:
    model, plan = toy(), toy_plan()
    torch.testing.assert_close(
        criteria.etp(model, plan), criteria.etp(model, plan, regularizer=Regularizer(model, plan))
    )


@pytest.mark.parametrize("force", [f() for f in forces.FORCES.values()], ids=lambda f: f.name)
@pytest.mark.parametrize("kappa", ["sqrt", "one"])
def test_etp_is_the_directional_derivative_of_the_penalty(force: forces.Force, kappa: str) -> None:
    """At rest the loss balances the penalty: removing u costs, to first order, ⟨∇ penalty, w_u⟩/β, where F > 0."""
    model, plan = toy(), toy_plan()
    mode = "gradient" if force.elementwise else "prox"
    reg = Regularizer(model, plan, force=force, kappa=kappa, beta=1.0, mode=mode)  # type: ignore[arg-type]
    scores, acts = criteria.etp(model, plan, regularizer=reg), reg.forces()
    for group, span in plan.spans():
        if group.locked is not None:
            continue
        for u in range(span.start, span.stop):
            norm = torch.cat([w.flatten() for _, w, _ in slices(model, plan)[u]]).norm(1 if force.elementwise else 2)
            if acts[u] > 0:
                slope = acts[u] * reg.kappa[u] * (norm**2 if force.squared else norm)
                torch.testing.assert_close(scores[u], slope)
            else:
                assert scores[u] > 0


def test_a_unit_without_force_is_not_taken_for_worthless() -> None:
    model, plan = toy(), toy_plan()
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    scores = criteria.torque(model, plan)
    assert scores[0] == scores[1] == scores[:8].min() > 0


def test_etp_refuses_the_regularizer_of_another_plan() -> None:
    model, plan = toy(), toy_plan()
    other = nn.Sequential(nn.Linear(2, 3).double())
    group = Group(name="0", kind="neurons", n_units=3,
                  slices=(Slice(tensor="0.weight", axis=0, index=range(3), unit=range(3)),))  # fmt: skip
    small = Plan(groups=(group,), tensors={"0.weight": (3, 2), "0.bias": (3,)}, parameters=("0.weight", "0.bias"))
    with pytest.raises(ScoreError, match="knows 3 units, the plan 19"):
        criteria.etp(model, plan, regularizer=Regularizer(other, small))


@pytest.mark.parametrize("arguments", [{"p": 0}, {"p": -1}, {"p": float("inf")}, {"p": True}, {"normalize": "median"}])
def test_magnitude_refuses_what_it_does_not_know(arguments: dict[str, object]) -> None:
    with pytest.raises(ScoreError):
        criteria.magnitude(toy(), toy_plan(), **arguments)  # type: ignore[arg-type]


def test_weights_too_large_for_the_sum_are_an_error() -> None:
    model, plan = toy(torch.float32), toy_plan()
    model.conv1.weight.data.fill_(1e30)
    with pytest.raises(ScoreError, match="overflow"):
        criteria.magnitude(model, plan)
