"""What holds for every integration: nothing is imported before it is used, and what is missing is named."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch

import etp_graph as etp
from etp_graph.integrations.core import Epochs, Pruning, prune_step_of
from etp_graph.model import inner_optimizer
from tests.support.forced_toy import batches, loss_of, toy
from tests.support.models.toy import toy_plan

PACKAGES = ("transformers", "lightning", "accelerate")


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True
    ).stdout


def test_importing_the_library_imports_no_framework_and_what_is_missing_is_named() -> None:
    said = run(
        f"""
        import sys
        import etp_graph, etp_graph.distributed, etp_graph.integrations, etp_graph.integrations.core
        sys.stdout.write(str([name for name in {PACKAGES} if name in sys.modules]))
        for name in ("transformers", "lightning"):
            sys.modules[name] = None
            sys.modules["lightning.pytorch"] = None
            try:
                __import__(f"etp_graph.integrations.{{name}}")
            except ImportError as error:
                sys.stdout.write(f"|{{error}}")
        """
    )
    loaded, *errors = said.split("|")
    assert loaded == "[]"
    assert len(errors) == 2
    for name, error in zip(("transformers", "lightning"), errors, strict=True):
        assert f"pip install 'etp-graph[{name}]'" in error


def test_a_step_that_a_scaler_skips_inside_of_accelerate_feels_no_force() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True)
    model, plan = toy(torch.float32), toy_plan()
    plain = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(plain, scaler=scaler)
    force = etp.Regularizer(model, plan, beta=1e-2).attach(optimizer)
    assert inner_optimizer(optimizer) is plain
    for spoiled in (False, True):
        scaler.scale(loss_of(model, batches(1, torch.float32)[0])).backward()
        if spoiled:
            assert model.linear.bias.grad is not None
            model.linear.bias.grad[0] = torch.inf
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        unchanged = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert all(unchanged) == spoiled == optimizer.step_was_skipped
        assert force.steps_done == 1
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("prune_at", "total", "per_epoch", "step"),
    [(7, 10, None, 7), (7, None, None, 7), (0.1, 30, None, 3), (1e-6, 30, None, 1), (1.0, 30, None, 30),
     (Epochs(2), 30, 5, 10), (Epochs(0.3), 30, 5, 2), (Epochs(1), None, 5, 5)],
)  # fmt: skip
def test_moments_of_surgery(
    prune_at: int | float | Epochs, total: int | None, per_epoch: int | None, step: int
) -> None:
    assert prune_step_of(prune_at, total=total, per_epoch=per_epoch) == step


@pytest.mark.parametrize(("prune_at", "total", "per_epoch"), [(11, 10, 2), (0.5, None, 5), (Epochs(1), 10, None)])
def test_moments_that_do_not_come(prune_at: int | float | Epochs, total: int | None, per_epoch: int | None) -> None:
    with pytest.raises(etp.ForceError):
        prune_step_of(prune_at, total=total, per_epoch=per_epoch)


@pytest.mark.parametrize("name", etp.methods.METHODS)
def test_every_method_works_or_is_refused_with_a_remedy(name: str) -> None:
    model, method = toy(), etp.methods.get(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    chooses = method.acts_on == "losers" and not method.steered
    if method.collected or chooses or method.soft_every or method.mode == "loss":
        with pytest.raises(etp.ForceError, match=r"etp_graph\.compress|use mode="):
            Pruning(batches(1)[0][0][:1], prune_at=2, speed_up=1.5, method=method)
        return
    bare = "conv2" if method.criterion == "bn_scale" else ()  # no batch norm follows it
    pruning = Pruning(batches(1)[0][0][:1], prune_at=2, speed_up=1.5, method=method, ignore=bare)
    pruning.begin(model, optimizer, total=3, per_epoch=None)
    for step, batch in enumerate(batches(3), 1):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        assert pruning.advance(step) == (step == 2)
    pruning.finish()
    assert pruning.selection is not None
    assert pruning.selection.n_removed > 0


def test_the_core_refuses_what_it_cannot_continue() -> None:
    x = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    with pytest.raises(etp.PlanError, match="no effect"):
        Pruning(x, prune_at=1, speed_up=2, plan=toy_plan(), ignore="conv1")
    pruning = Pruning(x, prune_at=2, speed_up=2, plan=toy_plan())
    with pytest.raises(etp.CheckpointError, match="state of a pruning"):
        pruning.load_state({"format": 0})
    model = toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(etp.CheckpointError, match="not cut"):
        pruning.begin(model, optimizer, done=3, total=9, per_epoch=None)
    pruning.begin(model, optimizer, done=0, total=9, per_epoch=None)
    with pytest.raises(etp.ForceError, match="never acted"):
        pruning.advance(2)
    assert [p.shape for p in model.parameters()] == [p.shape for p in toy().parameters()]
    assert not pruning.advance(1)
    pruning.abort()
    assert not optimizer._optimizer_step_post_hooks


def test_training_that_began_with_a_former_preset_goes_on_with_its_scope() -> None:
    former = replace(etp.methods.get("etp"), scope="global")
    data, plan = batches(6), toy_plan()

    def stepped(pruning: Pruning, model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            loss_of(model, data[step]).backward()
            optimizer.step()
            pruning.advance(step + 1)

    def begun(method: str | etp.methods.Method, budget: etp.Budget) -> tuple[Pruning, torch.nn.Module, torch.optim.SGD]:
        model = toy()
        return Pruning(data[0][0][:1], prune_at=5, budget=budget, method=method, plan=plan), model, torch.optim.SGD(
            model.parameters(), lr=0.05
        )  # fmt: skip

    whole, model, optimizer = begun(former, etp.Budget(speed_up=1.5))
    whole.begin(model, optimizer, total=6, per_epoch=None)
    stepped(whole, model, optimizer, range(2))
    state, weights = whole.state(), {name: t.clone() for name, t in model.state_dict().items()}
    stepped(whole, model, optimizer, range(2, 6))
    again, other, fresh = begun("etp", etp.Budget(speed_up=1.5))
    other.load_state_dict(weights)
    again.load_state(state)
    with pytest.warns(UserWarning, match="had in a former version"):
        again.begin(other, fresh, done=2, total=6, per_epoch=None)
    stepped(again, other, fresh, range(2, 6))
    assert again.selection is not None and whole.selection is not None
    assert torch.equal(again.selection.flat(plan), whole.selection.flat(plan))
    mine = replace(etp.methods.get("etp"), name="mine")
    for method, scope in (("etp", "local"), (mine, None)):
        refused, other, fresh = begun(method, etp.Budget(speed_up=1.5, scope=scope))
        refused.load_state(state)
        with pytest.raises(etp.ForceError, match="scope='global' in its budget, here it is 'local'"):
            refused.begin(other, fresh, done=2, total=6, per_epoch=None)
