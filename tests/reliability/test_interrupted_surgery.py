"""Surgery that is interrupted at any place leaves models, optimizers and records as before, or all of them pruned."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import etp_graph as etp
from etp_graph.surgery import _commit
from tests.support.faults.injected_faults import (
    FaultAtFunction,
    FaultAtOperator,
    describe,
    line_sites,
    run_with_fault_at_line,
    without_objects,
)

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.arange(4) % 5


class Net(nn.Module):
    """Convolutions with a norm, a weight norm, an embedding with sparse gradients, and a stand-in after surgery."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 8, sparse=True)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.mix = nn.Conv2d(8, 8, 1)
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 12))
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.norm(self.conv(x)).relu()).flatten(2).transpose(1, 2)
        x = x[:, :4] + self.embed(TOKENS).tanh()
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.normed(x).relu().mean(1))


class Case:
    """A model in training with two optimizers and a moving average, ready for surgery, and copies of the whole."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = Net()
        sparse = [self.model.embed.weight]
        self.optimizers = [
            torch.optim.SparseAdam(sparse),
            torch.optim.AdamW([p for p in self.model.parameters() if p is not sparse[0]], lr=1e-2),
        ]
        self.average = AveragedModel(self.model)
        for _ in range(2):
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            self.model(X).square().mean().backward()
            for optimizer in self.optimizers:
                optimizer.step()
            self.average.update_parameters(self.model)

    def prune(self, plan: etp.Plan, selection: etp.Selection) -> None:
        etp.prune_(self.model, plan, selection, optimizer=self.optimizers, also=[self.average])

    def facts(self) -> list[Any]:
        return [describe(each) for each in (self.model, self.average, *self.optimizers)]


@pytest.fixture(scope="module")
def plan() -> etp.Plan:
    return etp.trace(Case().model, X, prune=("channels", "neurons", "heads"), check=False)


@pytest.fixture(scope="module")
def selection(plan: etp.Plan) -> etp.Selection:
    model = Case().model
    return etp.allocate(model, plan, etp.criteria.magnitude(model, plan), budget=etp.Budget(speed_up=1.8))


@pytest.fixture(scope="module")
def pruned(plan: etp.Plan, selection: etp.Selection) -> list[Any]:
    case = Case()
    case.prune(plan, selection)
    return without_objects(case.facts())


@pytest.fixture
def signals() -> Iterator[None]:
    """Ctrl-C raises, also in a process that a shell began in the background and lets ignore it."""
    outer = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    yield
    after = {number: signal.getsignal(number) for number in signal.valid_signals()}
    signal.signal(signal.SIGINT, outer)
    assert after == before


def assert_whole(case: Case, before: list[Any], pruned: list[Any]) -> bool:
    """Assert that nothing changed, or all of it. Return whether it did."""
    after = case.facts()
    if after == before:
        return False
    assert without_objects(after) == pruned, "neither as before nor pruned"
    return True


def test_the_case_has_all_that_surgery_changes(plan: etp.Plan, selection: etp.Selection) -> None:
    case = Case()
    kinds = {group.kind for group in plan.prunable}
    assert {"channels", "neurons", "heads"} <= kinds
    before = case.facts()
    assert without_objects(before) == without_objects(Case().facts())
    case.prune(plan, selection)
    assert etp.surgery.get_record(case.model).standins
    assert case.model.embed.weight.grad is not None and case.model.embed.weight.grad.is_sparse
    assert all(a != b for a, b in zip(before, case.facts(), strict=True))


def some_lines(sites: list[Any]) -> list[int]:
    """Return when each line of the commit runs first, and every fifth line of the preparation."""
    first = {site: number for number, site in reversed(list(enumerate(sites)))}
    commit = [number for (file, _), number in first.items() if "/_commit.py" in file or "/_record.py" in file]
    rest = sorted(number for (file, _), number in first.items() if "/surgery/" in file or "/standins/_swap" in file)
    return sorted({*commit, *rest[::5]})


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_exception_at_any_line(
    plan: etp.Plan, selection: etp.Selection, pruned: list[Any], error: type[BaseException], every: bool, signals: None
) -> None:
    Case().prune(plan, selection)  # fills the caches of functions, whose lines then run no more
    case = Case()
    sites = line_sites(lambda: case.prune(plan, selection))
    chosen = range(len(sites)) if every else some_lines(sites)
    outcomes = []
    for at in chosen:
        case = Case()  # a second run of one model finds full caches, and executes fewer lines
        before = case.facts()
        assert run_with_fault_at_line(lambda: case.prune(plan, selection), at, error)  # noqa: B023
        outcomes.append(assert_whole(case, before, pruned))
    assert len(outcomes) > 60 and not all(outcomes)


def test_an_exception_in_the_main_thread_leaves_signals_and_modes_alone(
    plan: etp.Plan, selection: etp.Selection, pruned: list[Any], signals: None
) -> None:
    """The commit holds signals and switches modes off. An exception at any of its lines must leave neither so."""
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    surgery = etp.surgery.prepare_surgery((case := Case()).model, plan, selection, optimizer=case.optimizers)
    sites = line_sites(surgery.commit, own_thread=False)
    first = {site: number for number, site in reversed(list(enumerate(sites)))}
    inside = sorted(number for (file, _), number in first.items() if "/_commit.py" in file)
    inside += [number for number in range(len(sites) - 15, len(sites)) if number not in inside]  # the exits
    for at in inside:
        case = Case()
        before = case.facts()
        surgery = etp.surgery.prepare_surgery(case.model, plan, selection, optimizer=case.optimizers, also=case.average)
        count = len(line_sites(surgery.commit, own_thread=False))
        surgery.undo()
        shift = count - len(sites) if at >= len(sites) - 15 else 0
        assert run_with_fault_at_line(surgery.commit, at + shift, MemoryError, own_thread=False)
        assert torch._C._is_torch_function_enabled()
        assert [signal.getsignal(number) for number in signal.valid_signals()] == handlers
        assert_whole(case, before, pruned)


@pytest.mark.parametrize("mode", [FaultAtFunction, FaultAtOperator])
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_exception_at_any_operation_of_torch(
    plan: etp.Plan, selection: etp.Selection, pruned: list[Any], mode: Any, every: bool, signals: None
) -> None:
    """From one operation on there is no memory, or one operation alone is interrupted."""
    case, watch = Case(), mode(-1, MemoryError)
    with watch:
        case.prune(plan, selection)
    total = watch.passed
    assert total > 50
    case = Case()
    before = case.facts()
    for at in range(total) if every else {*range(0, total, total // 20), *range(total - 10, total)}:
        for error, lasting in ((MemoryError, True), (KeyboardInterrupt, False)):
            with pytest.raises(error), mode(at, error, lasting=lasting):
                case.prune(plan, selection)
            assert not assert_whole(case, before, pruned)


def test_ctrl_c_during_the_commit_is_handled_after_it(
    plan: etp.Plan, selection: etp.Selection, pruned: list[Any], signals: None
) -> None:
    """The interrupt arrives as a real signal at each of the changes, twice."""
    for at in range(0, 60, 7):
        case, passed = Case(), 0
        before = case.facts()
        original = _commit.Change

        def interrupting(apply: Any, undo: Any) -> Any:
            def noisy() -> None:
                nonlocal passed
                passed += 1
                if passed == at:  # noqa: B023
                    signal.raise_signal(signal.SIGINT)  # os.kill may reach another thread first
                    signal.raise_signal(signal.SIGINT)  # os.kill may reach another thread first
                apply()

            return original(noisy, undo)  # noqa: B023

        surgery = etp.surgery.prepare_surgery(case.model, plan, selection, optimizer=case.optimizers, also=case.average)
        surgery._changes = [interrupting(change.apply, change.undo) for change in surgery._changes]
        if at:
            with pytest.raises(KeyboardInterrupt):
                surgery.commit()
        else:
            surgery.commit()
        assert assert_whole(case, before, pruned)
        surgery.undo()
        assert not assert_whole(case, before, pruned)


def test_a_second_interrupt_while_undoing(plan: etp.Plan, selection: etp.Selection, pruned: list[Any]) -> None:
    case = Case()
    before = case.facts()
    surgery = etp.surgery.prepare_surgery(case.model, plan, selection, optimizer=case.optimizers, also=case.average)
    changes, failed = surgery._changes, set[int]()

    def fails() -> None:
        raise MemoryError

    def once(number: int, undo: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            if number not in failed:
                failed.add(number)
                raise KeyboardInterrupt
            undo()

        return run

    surgery._changes = [_commit.Change(c.apply, once(n, c.undo)) for n, c in enumerate(changes)]
    surgery._changes.append(_commit.Change(fails, lambda: None))
    with pytest.raises(KeyboardInterrupt) as caught:
        surgery.commit()
    assert isinstance(caught.value.__context__, (MemoryError, KeyboardInterrupt))
    assert len(failed) == len(changes) and not assert_whole(case, before, pruned)


def test_an_attribute_that_cannot_be_written(plan: etp.Plan, selection: etp.Selection, pruned: list[Any]) -> None:
    class Guarded(nn.Linear):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "in_features" and "in_features" in vars(self):
                raise RuntimeError("sealed")
            super().__setattr__(name, value)

    case = Case()
    case.model.head.__class__ = Guarded
    before = case.facts()
    with pytest.raises(RuntimeError, match="sealed"):
        case.prune(plan, selection)
    case.model.head.__class__ = Guarded
    assert case.facts() == before


def test_training_after_an_undone_surgery_is_the_training_without_it(plan: etp.Plan, selection: etp.Selection) -> None:
    def train(case: Case) -> list[Tensor]:
        for _ in range(2):
            case.model(X).square().mean().backward()
            for optimizer in case.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return [p.detach().clone() for p in case.model.parameters()]

    case, other = Case(), Case()
    surgery = etp.surgery.prepare_surgery(case.model, plan, selection, optimizer=case.optimizers)
    surgery.commit()
    surgery.undo()
    assert all(torch.equal(a, b) for a, b in zip(train(case), train(other), strict=True))
    assert copy.deepcopy(case.model) is not None
