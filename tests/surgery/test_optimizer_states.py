"""States of optimizers: cut where it is known what they hold, else refused before anything changes, or reset."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import etp_graph as etp
from etp_graph.surgery import get_record, rehearse_cut
from tests.support.faults.injected_faults import describe

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def build(width: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))


def planned(model: nn.Module) -> tuple[etp.Plan, etp.Selection]:
    plan = etp.trace(model, X[:1], check=False)
    return plan, etp.allocate(model, plan, etp.criteria.magnitude(model, plan), budget=etp.Budget(speed_up=2))


def step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    def closure() -> float:
        for optimizer in optimizers:
            optimizer.zero_grad()
        with torch.enable_grad():  # closures of transformers run without
            loss = model(X).square().mean()
            loss.backward()
        return float(loss.detach())

    for optimizer in optimizers:
        optimizer.step(closure)


class Keeping(torch.optim.Optimizer):
    """SGD that keeps what ``make`` makes of a gradient."""

    def __init__(self, parameters: Iterable[Tensor], make: Callable[[Tensor], Any], lr: float = 1e-2) -> None:
        self.make = make
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p].setdefault("kept", self.make(p.grad))
                    p.sub_(p.grad, alpha=group["lr"])


@dataclass
class Moments:
    first: Tensor


def kept_rows(plan: etp.Plan, selection: etp.Selection, group: str) -> Tensor:
    return selection.keep[group].nonzero().flatten()


NESTED: dict[str, Callable[[Tensor], Any]] = {
    "dict of dicts": lambda g: {"fast": {"mean": g.clone()}, "steps": 3},
    "list": lambda g: [g.clone(), 1.0, None],
    "tuple": lambda g: (g.clone(), g.square()),
    "mean over an axis": lambda g: g.square().mean(-1, keepdim=True),
    "integers": lambda g: g.sign().to(torch.int8),
    "mask": lambda g: g > 0,
}


@pytest.mark.parametrize("name", NESTED)
def test_nested_states_are_cut(name: str) -> None:
    model = build()
    plan, selection = planned(model)
    optimizer = Keeping(model.parameters(), NESTED[name])
    step(model, optimizer)
    before = copy.deepcopy(optimizer.state[model[2].weight]["kept"])
    etp.prune_(model, plan, selection, optimizer=optimizer)
    after = optimizer.state[model[2].weight]["kept"]
    rows, columns = kept_rows(plan, selection, "2"), kept_rows(plan, selection, "0")
    whole, cut = torch.utils._pytree.tree_leaves(before), torch.utils._pytree.tree_leaves(after)
    assert len(whole) == len(cut)
    for old, new in zip(whole, cut, strict=True):
        if isinstance(old, Tensor):
            old = old[rows] if old.shape[1] == 1 else old[rows][:, columns]
            assert torch.equal(old, new)
        else:
            assert old == new
    step(model, optimizer)


UNKNOWN: dict[str, Callable[[Tensor], Any]] = {
    "preconditioners": lambda g: [torch.eye(n) for n in g.shape],
    "flat": lambda g: g.flatten().clone() if g.ndim > 1 else g.repeat(2),
    "scales of blocks": lambda g: {"codes": g.to(torch.int8), "scale": torch.ones(max(2, g.numel() // 8))},
    "object": lambda g: Moments(g.clone()),
    "sparse": lambda g: g.to_sparse(),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_states_are_refused_or_reset(name: str) -> None:
    model = build()
    plan, selection = planned(model)
    optimizer = Keeping(model.parameters(), UNKNOWN[name])
    assert "on_uncuttable='reset'" in rehearse_cut(optimizer)[0], "found before the first step"
    assert not optimizer.state
    step(model, optimizer)
    before = describe(model), describe(optimizer)
    with pytest.raises(etp.PlanError, match="on_uncuttable='reset'"):
        etp.prune_(model, plan, selection, optimizer=optimizer)
    assert before == (describe(model), describe(optimizer))
    etp.prune_(model, plan, selection, optimizer=optimizer, on_uncuttable="reset")
    assert not optimizer.state
    step(model, optimizer)
    assert optimizer.state[model[0].weight]


def test_a_state_for_all_parameters_is_unknown() -> None:
    model = build()
    plan, selection = planned(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer)
    optimizer.state["slow"] = {"weights": [p.detach().clone() for p in model.parameters()]}
    with pytest.raises(etp.PlanError, match="all parameters"):
        etp.prune_(model, plan, selection, optimizer=optimizer)
    etp.prune_(model, plan, selection, optimizer=optimizer, on_uncuttable="reset")
    assert "slow" not in optimizer.state
    assert optimizer.state[model[0].weight]["momentum_buffer"].shape == model[0].weight.shape
    step(model, optimizer)


def test_square_weights_do_not_hide_a_preconditioner() -> None:
    """The first factor of a square weight has its shape; the others tell that it is no momentum."""
    model = build(16)
    plan, selection = planned(model)
    optimizer = Keeping(model.parameters(), lambda g: [torch.eye(n) for n in g.shape])
    step(model, optimizer)
    with pytest.raises(etp.PlanError, match="cannot be cut"):
        etp.prune_(model, plan, selection, optimizer=optimizer)


def test_lbfgs_is_reset_with_all_that_it_counts() -> None:
    model = build()
    plan, selection = planned(model)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    assert rehearse_cut(optimizer)
    step(model, optimizer)
    with pytest.raises(etp.PlanError, match="cannot be cut"):
        etp.prune_(model, plan, selection, optimizer=optimizer)
    etp.prune_(model, plan, selection, optimizer=optimizer, on_uncuttable="reset")
    step(model, optimizer)


MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adafactor": lambda p: torch.optim.Adafactor(p),
    "nadam": torch.optim.NAdam,
    "asgd": torch.optim.ASGD,
    "rprop": torch.optim.Rprop,
    "adamax": torch.optim.Adamax,
    "adadelta": torch.optim.Adadelta,
}


@pytest.mark.parametrize("name", MAKERS)
def test_optimizers_of_torch_step_on(name: str) -> None:
    model = build()
    plan, selection = planned(model)
    optimizer = MAKERS[name](model.parameters())
    assert rehearse_cut(optimizer) == []
    step(model, optimizer)
    etp.prune_(model, plan, selection, optimizer=optimizer)
    step(model, optimizer)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("width", [16, 32])
def test_factors_of_adafactor_are_cut_along_their_axis(width: int) -> None:
    """Also where the weight is square, so that shapes do not tell rows from columns."""
    transformers = pytest.importorskip("transformers")
    for make in (torch.optim.Adafactor, lambda p: transformers.Adafactor(p, lr=1e-3, relative_step=False)):
        model = build(width)
        plan, selection = planned(model)
        optimizer = make(model.parameters())
        step(model, optimizer)
        weight = model[2].weight
        before = {key: value.flatten() for key, value in optimizer.state[weight].items() if isinstance(value, Tensor)}
        etp.prune_(model, plan, selection, optimizer=optimizer)
        found = 0
        for key, value in optimizer.state[weight].items():
            if key.startswith("row") or key.endswith("row"):
                assert torch.equal(value.flatten(), before[key][kept_rows(plan, selection, "2")])
                found += 1
            if key.startswith("col") or key.endswith("col"):
                assert torch.equal(value.flatten(), before[key][kept_rows(plan, selection, "0")])
                found += 1
        assert found == 2
        step(model, optimizer)


def test_several_optimizers_cut_together() -> None:
    model = build()
    plan, selection = planned(model)
    matrices = torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=1e-3)
    rest = torch.optim.AdamW([p for p in model.parameters() if p.ndim < 2])
    step(model, matrices, rest)
    before = describe(model), describe(matrices), describe(rest)
    with pytest.raises(etp.PlanError, match=r"optimizer does not hold 0\.bias"):
        etp.prune_(model, plan, selection, optimizer=matrices)
    with pytest.raises(etp.PlanError, match="expected a torch"):
        etp.prune_(model, plan, selection, optimizer=[matrices, "rest"])  # type: ignore[list-item]
    with pytest.raises(etp.PlanError, match="on_uncuttable="):
        etp.prune_(model, plan, selection, optimizer=matrices, on_uncuttable="drop")  # type: ignore[arg-type]
    assert before == (describe(model), describe(matrices), describe(rest))
    etp.prune_(model, plan, selection, optimizer=[matrices, rest])
    for optimizer in (matrices, rest):
        for parameter, state in optimizer.state.items():
            assert all(v.shape == parameter.shape for v in state.values() if isinstance(v, Tensor) and v.ndim)
    step(model, matrices, rest)


def test_low_precision_states_of_torchao() -> None:
    optim = pytest.importorskip("torchao.optim")
    with torch.compiler.set_stance("force_eager"):
        check_low_precision(optim)


def check_low_precision(optim: Any) -> None:
    for make in (optim.AdamW8bit, optim.AdamW4bit):
        model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64))
        x = torch.randn(4, 128)
        optimizer = make(model.parameters(), lr=1e-3)
        model(x).square().mean().backward()
        optimizer.step()
        plan = etp.trace(model, x, check=False)
        scores = etp.criteria.magnitude(model, plan)
        selection = etp.allocate(model, plan, scores, budget=etp.Budget(speed_up=2, round_to=16))
        weight = model[2].weight
        before = optimizer.state[weight]["exp_avg"].dequantize()
        etp.prune_(model, plan, selection, optimizer=optimizer)
        now = optimizer.state[weight]["exp_avg"]
        assert type(now).__module__.startswith("torchao")
        kept = before[kept_rows(plan, selection, "2")][:, kept_rows(plan, selection, "0")]
        assert float((now.dequantize() - kept).abs().max()) <= 0.1 * float(kept.abs().max())
        model(x).square().mean().backward()
        optimizer.step()


def test_a_moving_average_loses_the_same_units() -> None:
    model = build()
    plan, selection = planned(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    teacher = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    average.update_parameters(model)
    alone = copy.deepcopy(average.module)
    etp.prune_(alone, plan, selection)
    etp.prune_(model, plan, selection, optimizer=optimizer, also=[average, teacher])
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), average.module.parameters(), strict=True))
    assert get_record(average.module) == get_record(teacher) == get_record(model)
    step(model, optimizer)
    average.update_parameters(model)
    assert average(X).shape == teacher(X).shape == (8, 4)


def test_copies_that_do_not_fit_change_nothing() -> None:
    model = build()
    plan, selection = planned(model)
    before = describe(model)
    shared = build()
    shared[0] = model[0]
    cases: list[tuple[Any, str]] = [
        ([nn.Linear(3, 3)], r"also\[0\]: .*lacks"),
        ([build(), build(16)], r"also\[1\]: .*has shape"),
        ([model], r"also\[0\] shares tensors with the model"),
        ([shared], r"also\[0\] shares tensors"),
        ([AveragedModel(build(16))], "has shape"),
        (["teacher"], r"expected an nn\.Module"),
    ]
    for also, words in cases:
        with pytest.raises(etp.PlanError, match=words):
            etp.prune_(model, plan, selection, also=also)
        assert describe(model) == before


def test_a_lack_of_memory_in_the_rehearsal_is_raised() -> None:
    class Large(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise MemoryError("no room for the states")

    with pytest.raises(MemoryError, match="no room for the states"):
        rehearse_cut(Large(build().parameters(), lr=0.1))
