"""Pruning without training, compensation and the removal of blocks are all or nothing, whatever interrupts them."""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.depth import remove_blocks_
from etp_graph.errors import ScoreError
from etp_graph.recovery import compensate_, reestimate_batch_norms_
from tests.support.faults.injected_faults import Site, describe, line_sites, run_with_fault_at_line, without_objects

ERRORS = [KeyboardInterrupt, MemoryError]
SAMPLED = 40
"""Number of lines at which a fast test interrupts each call, besides the last ones."""


def chosen_lines(sites: Sequence[Site], *, every: bool) -> list[int]:
    """Return when to interrupt: a sample, or each line of the library the first and the last time that it runs."""
    last = range(max(0, len(sites) - 40), len(sites))
    if not every:
        return sorted({*range(0, len(sites), max(1, len(sites) // SAMPLED)), *last})
    late = {site: number for number, site in enumerate(sites)}
    first = {site: number for number, site in reversed(list(enumerate(sites)))}
    return sorted({*first.values(), *late.values(), *last})


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.back = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        back: Tensor = self.back(self.norm(self.conv(x)).relu())
        return x + back


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return logits


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def inputs(n_batches: int = 2) -> list[Tensor]:
    return [torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(i)) for i in range(n_batches)]


PLAN = etp.trace(net(), inputs()[0], check=False)
SELECTION = etp.allocate(net(), PLAN, etp.criteria.magnitude(net(), PLAN), budget=etp.Budget(speed_up=1.5))

CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "compensate_": lambda model: compensate_(model, PLAN, SELECTION, inputs()),
    "oneshot_": lambda model: etp.oneshot_(
        model, inputs(), plan=PLAN, speed_up=1.5, batch_norms=True, progress=False
    ),
    "remove_blocks_": lambda model: remove_blocks_(model, ["blocks.1"], inputs()[0]),
    "reestimate_batch_norms_": lambda model: reestimate_batch_norms_(model, inputs()),
}  # fmt: skip


def watch(model: nn.Module) -> None:
    with etp.collect.watch(model, PLAN, "wanda"), torch.no_grad():
        model(inputs()[0])


READERS: dict[str, Callable[[nn.Module], Any]] = {
    "trace": lambda model: etp.trace(model, inputs()[0]),
    "verify": lambda model: etp.verify(model, PLAN, inputs()[0]),
    "watch": watch,
}
"""Calls that change nothing at all."""


def world(model: nn.Module) -> list[Any]:
    """What a call may change: the model, its hooks, the global generators, the collector of garbage."""
    hooks = [(name, len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()]
    return [describe(model), hooks, torch.get_rng_state().tolist(), random.getstate(), gc.isenabled()]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_exception_at_any_line(
    name: str, error: type[BaseException], every: bool, tell: Callable[[str], None]
) -> None:
    call = CALLS[name]
    call(finished := net())  # also fills the caches of functions, whose lines then run no more
    done = without_objects(describe(finished))
    model = net()
    sites = line_sites(lambda: call(model))
    complete, chosen = 0, chosen_lines(sites, every=every)
    for at in chosen:
        model = net()
        before = describe(model)
        assert run_with_fault_at_line(lambda: call(model), at, error), at  # noqa: B023
        if (after := describe(model)) != before:
            assert without_objects(after) == done, f"line {at} of {len(sites)}: {sites[at]}"
            complete += 1
    assert complete < len(chosen) and without_objects(before) != done
    tell(f"{len(chosen)} interrupts of {name}, {complete} after the last change")


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_looking_at_a_model_leaves_it_alone_at_any_line(name: str, every: bool, tell: Callable[[str], None]) -> None:
    call, model = READERS[name], net().train(name != "watch")
    call(model)  # fills the caches of functions, whose lines then run no more
    sites = line_sites(lambda: call(model))
    before = world(model)
    chosen = chosen_lines(sites, every=every)
    for at in chosen:
        assert run_with_fault_at_line(lambda: call(model), at, KeyboardInterrupt), at
        assert world(model) == before, f"line {at} of {len(sites)}: {sites[at]}"
    tell(f"{len(chosen)} interrupts of {name}")


@pytest.mark.parametrize("name", [name for name in CALLS if name != "remove_blocks_"])
def test_data_that_end_in_an_error_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second batch does not fit the model, or the last step of the call fails."""
    model = net()
    before = describe(model)
    bad = [inputs()[0], torch.randn(4, 5, 6, 6)]
    monkeypatch.setitem(globals(), "inputs", lambda: bad)
    with pytest.raises(ScoreError, match="batch 2"):
        CALLS[name](model)
    assert describe(model) == before


def test_a_failure_after_the_cut_undoes_the_cut_and_the_compensation() -> None:
    """Statistics of norms are measured last; a batch that has no finite values is noticed there."""
    model = net()
    before, weights = describe(model), copy.deepcopy(model.state_dict())

    class Later:
        """Batches that hold NaN once the model is cut."""

        def __iter__(self) -> Any:
            cut = model.blocks[0].conv.out_channels < 6  # type: ignore[index,union-attr]
            return iter([torch.full((4, 3, 6, 6), torch.nan) if cut else inputs()[0]])

    with pytest.raises(ScoreError, match=r"blocks\.0\.norm hold NaN"):
        etp.oneshot_(model, Later(), plan=PLAN, speed_up=1.5, batch_norms=True, progress=False)
    assert describe(model) == before
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
