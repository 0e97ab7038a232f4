"""A budget quantity of a user works from his own file, as a built-in one does: from the budget to the report."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import etp_graph as etp
from etp_graph.budget import QUANTITIES, Budget, Targets, allocate, register, under_way
from etp_graph.cli._imports import import_extension
from etp_graph.errors import BudgetError, PlanError
from etp_graph.integrations.core import Pruning
from etp_graph.plan import CostModel, cost_table, known_targets
from etp_graph.report import write_report
from tests.support.budgets import RANKS, SCOPES, draw_scores
from tests.support.command_line import SHAPE, TOY, invoke
from tests.support.models.synthetic import synthetic
from tests.support.models.toy import Toy, toy_plan
from tests.support.training_loops import Loop, run, toy

SOURCE = """
import torch
from etp_graph import criteria
from etp_graph.budget import register_quantity


@register_quantity(ratio="lighter", title="bytes", suffix="B", help="At most this many bytes of weights.")
def weight_bytes(plan):
    for name, shape in plan.tensors.items():
        if not name.endswith("num_batches_tracked"):
            yield 4, [(name, axis) for axis in range(len(shape))]


@criteria.register_criterion(f"{__name__}-first")
def first_units(model, plan):
    return torch.cat([torch.arange(group.n_units, 0, -1.0) for group in plan.groups])
"""

BUILT_IN = ("speed_up", "macs", "params", "latency_ms", "speed_up_latency", "memory_mb")


def weight_bytes(model: nn.Module) -> int:
    """The quantity by its definition, on the model itself."""
    return sum(4 * tensor.numel() for tensor in model.state_dict().values() if tensor.is_floating_point())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of a user with a name of its own, because Python imports a module once."""
    path = tmp_path / f"quantity_{abs(hash(tmp_path))}.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def user(file: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(str(file.parent))
    importlib.import_module(file.stem)
    return file.stem


@pytest.mark.usefixtures("user")
def test_its_target_is_a_keyword_of_the_budget_and_goes_to_json() -> None:
    for budget in (Budget(weight_bytes=1000.5, min_units=2), Budget(lighter=1.5, scope="local")):
        assert Budget.from_json(budget.to_json()) == budget
        assert budget.quantity == "weight_bytes"
    assert Budget(weight_bytes=1000.5) == Budget(registered_target=("weight_bytes", 1000))
    assert Budget(weight_bytes=1000).as_given == "weight_bytes=1000"
    assert Budget(speed_up=2).with_count(7) == Budget(macs=7)
    assert Budget(lighter=2).with_count(7) == Budget(weight_bytes=7)


@pytest.mark.usefixtures("user")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_bytes": 5, "macs": 3}, "macs and weight_bytes"), ({"weight_bytes": 5, "lighter": 2}, "and lighter"),
        ({"weight_bytes": -1}, r"weight_bytes=-1; it must lie in \[0, inf\)"), ({"lighter": 0.5}, r"in \[1, inf\)"),
        ({"weight_bytes": None}, "found none"), ({"wait_bytes": 5}, "targets are speed_up, .*, weight_bytes, lighter"),
        ({"macs": 2, "min_unit": 5}, "rules are max_ratio, min_units"),
        ({"min_units": 3}, "found none: .* weight_bytes= and lighter="),
    ],
)  # fmt: skip
def test_a_malformed_budget_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget(**arguments)


@pytest.mark.usefixtures("user")
@pytest.mark.parametrize("seed", range(4))
def test_the_prediction_is_the_count_of_the_pruned_model(seed: int) -> None:
    model, plan = synthetic(seed)
    dense, scores = weight_bytes(model), draw_scores(plan, seed)
    budget = Budget(lighter=1.5 + seed / 4, scope=SCOPES[seed % len(SCOPES)], rank=RANKS[seed % 3])
    selection = allocate(model, plan, scores, budget=budget)
    predicted = etp.cost(model, plan, selection).amount("weight_bytes")
    assert plan.dense.amount("weight_bytes") == dense
    etp.prune_(model, plan, selection)
    assert predicted == weight_bytes(model) <= budget.target(plan.dense) == int(dense / (1.5 + seed / 4))
    assert predicted >= 0.97 * budget.target(plan.dense)


@pytest.mark.usefixtures("user")
def test_scores_over_the_root_of_the_cost_count_what_the_budget_counts() -> None:
    model, plan = synthetic(7, width=32)
    scores, target = draw_scores(plan, 7) + 0.1, {"weight_bytes": plan.dense.amount("weight_bytes") // 3}
    saved = CostModel(plan, ["weight_bytes"]).marginal("weight_bytes")
    by_rank = allocate(model, plan, scores, budget=Budget(**target, rank="score_per_sqrt_cost"))
    divided = allocate(model, plan, scores / saved.clamp_min(1).sqrt(), budget=Budget(**target))
    assert torch.equal(by_rank.flat(plan), divided.flat(plan))


@pytest.mark.usefixtures("user")
def test_on_the_way_and_out_of_reach() -> None:
    model, plan = synthetic(0)
    scores, dense = draw_scores(plan, 0), plan.dense.amount("weight_bytes")
    budget = Budget(lighter=2)
    way = [under_way(model, plan, scores, budget=budget, share=share) for share in (0.0, 0.5, 1.0)]
    amounts = [etp.cost(model, plan, selection).amount("weight_bytes") for selection in way]
    assert amounts[0] == dense
    assert amounts[1] <= dense - (dense - budget.target(plan.dense)) // 2
    assert way[2].to_json() == allocate(model, plan, scores, budget=budget).to_json()
    with pytest.raises(BudgetError, match=r"weight_bytes=5 is out of reach: the closest is weight_bytes=\d+") as found:
        allocate(model, plan, scores, budget=Budget(weight_bytes=5))
    least = int(str(found.value).partition("closest is weight_bytes=")[2].partition(",")[0])
    assert (
        etp.cost(model, plan, allocate(model, plan, scores, budget=Budget(weight_bytes=least))).amount("weight_bytes")
        == least
    )


@pytest.mark.parametrize("rounds", [1, 2])
def test_compress_with_a_checkpoint_then_save_load_and_report(user: str, rounds: int, tmp_path: Path) -> None:
    loop, model = Loop(), toy()
    dense, home = weight_bytes(model), tmp_path / "run"
    budget = Budget(weight_bytes=dense // 2)
    result = run(model, loop, budget=budget, rounds=rounds, checkpoint=home)  # etp: steered to the budget
    assert result.pruned.amount("weight_bytes") == weight_bytes(model) <= dense // 2
    assert result.dense.amount("weight_bytes") == dense
    assert etp.CompressResult.from_json(result.to_json()).to_json() == result.to_json()
    assert f"{weight_bytes(model):,}" in str(result)

    again = Loop()
    assert run(toy(), again, budget=budget, rounds=rounds, checkpoint=home).to_json() == result.to_json()
    assert not again.phases

    etp.save(model, tmp_path / "model")
    assert weight_bytes(etp.load(tmp_path / "model", build=Toy)) == weight_bytes(model)
    text = write_report(home, tmp_path / "run.html").read_text()
    assert f"weight_bytes={dense // 2}" in text
    assert text.count("bytes left") == 1
    QUANTITIES.discard("weight_bytes")
    with pytest.raises(BudgetError, match=r"'weight_bytes'.*Import the module"):
        write_report(home, tmp_path / "run.html")


def test_keywords_of_compress_and_of_the_callbacks(user: str) -> None:
    model = toy()
    result = run(model, budget=None, weight_bytes=weight_bytes(model) // 2, method="l1")
    assert result.budget.quantity == "weight_bytes"
    assert Pruning(torch.randn(1, 3, 8, 8), prune_at=1, lighter=2.0).budget.as_given == "lighter=2.0"
    for call in (lambda **given: run(toy(), budget=Budget(macs=5), **given), lambda **given: run(toy(), **given)):
        with pytest.raises(BudgetError, match=r"budget= and lighter=|speed_up and lighter"):
            call(lighter=2)
    with pytest.raises(BudgetError, match=r"no target 'wait_bytes'; known are speed_up, .*, weight_bytes, lighter"):
        run(toy(), wait_bytes=3)


@pytest.mark.usefixtures("user")
def test_tables_show_it() -> None:
    plan = toy_plan()
    half = etp.cost(Toy(), plan, allocate(Toy(), plan, torch.ones(plan.n_units), budget=Budget(lighter=2)))
    head, *rows = cost_table({"dense": plan.dense, "half": half}).splitlines()
    assert head.split()[-2:] == ["bytes", "share"]
    assert [row.split()[-4:] for row in rows if row.startswith("dense")] == [["3.244", "kB", "100.0", "%"]]
    assert "bytes 3.244 kB (3,244)" in str(plan)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (lambda plan: 3, "TypeError"), (lambda plan: [3], "TypeError"), (lambda plan: [(0.5, ())], "coefficient 0.5"),
        (lambda plan: [(-1, ())], "coefficient -1"), (lambda plan: [(1, ["conv1.weight"])], "found the axes"),
        (lambda plan: [(1, [("conv1.weight", 9)])], "counts axis 9"), (lambda plan: [(1, [("x", 0)])], "axis 0 of 'x'"),
    ],
)  # fmt: skip
def test_terms_that_cannot_be_counted(terms: Callable[[Any], Any], message: str) -> None:
    register(terms, name="strange")
    for count in (CostModel, lambda plan: plan.dense):
        with pytest.raises((BudgetError, PlanError), match=f"strange.*{message}"):
            count(toy_plan())


def test_names_are_taken_once(user: str) -> None:
    known = sys.modules[user].weight_bytes
    register(known, ratio="lighter", title="bytes", suffix="B", help="")  # a reloaded module registers again
    for name in ("weight_bytes", "macs", "lighter", "min_units", "latency_ms", "two words", "class", ""):
        with pytest.raises(BudgetError):
            register(lambda plan: (), name=name)
    with pytest.raises(BudgetError, match="pass a function"):
        register(3, name="three")  # type: ignore[type-var]


def test_built_in_targets_are_the_same_everywhere() -> None:
    assert tuple(Targets.__annotations__) == BUILT_IN == tuple(known_targets())
    assert {*BUILT_IN} <= {field.name for field in fields(Budget)}
    for function in (etp.compress, Pruning):
        shown = inspect.signature(function).parameters
        assert [name for name in shown if name in BUILT_IN] == [*BUILT_IN]
        assert all(shown[name].default is None for name in BUILT_IN)


def test_the_command_line_imports_the_file(file: Path, tmp_path: Path) -> None:
    dense = weight_bytes(Toy())
    code, out, err = invoke(
        "prune", TOY, *SHAPE, "--import", str(file), "--target", f"weight_bytes={dense // 2}",
        "--method", f"{file.stem}-first", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert code == 0, err
    assert "bytes" in out
    pruned = etp.load(tmp_path / "out", build=Toy)
    assert 0.9 * (dense // 2) <= weight_bytes(pruned) <= dense // 2
    code, out, err = invoke("inspect", TOY, *SHAPE, "--import", file.stem)  # a module that is imported already
    assert code == 0, err
    assert "bytes 3.244 kB" in out


def test_the_command_line_reports_a_run(user: str, file: Path, tmp_path: Path) -> None:
    run(toy(), budget=Budget(lighter=2), method="l1", checkpoint=tmp_path / "run")
    arguments = ["report", str(tmp_path / "run"), "--out", str(tmp_path / "r.html")]
    QUANTITIES.discard("weight_bytes")
    code, _, err = invoke(*arguments)
    assert code == 1
    assert "no 'lighter'" in err
    assert "--import" in err
    sys.modules.pop(user)
    code, _, err = invoke(*arguments, "--import", str(file))
    assert code == 0, err
    assert "bytes left" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["--import", "nowhere.py", "--macs", "3"], "no such file"),
        (["--import", "nowhere_at_all", "--macs", "3"], "ModuleNotFoundError"),
        (["--import", "broken.py", "--macs", "3"], "NameError"), (["--import", "json.py", "--macs", "3"], "rename"),
        (["--target", "weight_bites=3"], "no target 'weight_bites'; known are speed_up"),
        (["--target", "macs"], "NAME=VALUE"), (["--target", "macs=many"], "NAME=VALUE"),
        (["--target", "macs=3", "--macs", "4"], "--macs"), (["--target", "macs=3", "--target", "macs=4"], "already"),
        (["--macs", "3", "--method", "l3"], "--method='l3'; choose one of 'l1', 'l2'"),
        (["--macs", "3", "--method", "taylor"], "choose one of"),
        (["--macs", "3", "--scope", "layer"], "scope='layer'; choose one of 'global'"),
    ],
)  # fmt: skip
def test_errors_are_one_message(args: list[str], hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("undefined_name")
    (tmp_path / "json.py").write_text("")
    code, out, err = invoke("prune", TOY, *SHAPE, "--out", "out", *args)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert hint in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_an_import_leaves_the_path_alone(file: Path) -> None:
    before = list(sys.path)
    assert import_extension(str(file)).weight_bytes
    assert sys.path == before
