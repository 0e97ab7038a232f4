"""Several processes: equal bit for bit, equal to one process, and no rank left waiting for another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ddp_worker import build, data, refusals, train, training
from torch import nn
from torch.nn.parallel import DataParallel

import etp_graph as etp
from etp_graph import distributed

RUNS = [("prox", "sgd"), ("gradient", "adam")]
pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_are_equal_bit_for_bit_and_equal_to_one_process(size: int, tmp_path: Path) -> None:
    mp.spawn(training, (size, str(tmp_path), RUNS), nprocs=size)
    for mode, optimizer in RUNS:
        states = [torch.load(tmp_path / f"{mode}-{optimizer}-{rank}.pt", weights_only=True) for rank in range(size)]
        model, before = train(0, 1, mode, optimizer)
        for part, alone in enumerate((before, model.state_dict())):
            for key, value in alone.items():
                assert all(torch.equal(state[part][key], states[0][part][key]) for state in states)
                torch.testing.assert_close(states[0][part][key], value, rtol=0, atol=1e-12)
        assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in build().parameters())


def test_a_mistake_of_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    mp.spawn(refusals, (2, str(tmp_path)), nprocs=2)
    said = [torch.load(tmp_path / f"said-{rank}.pt", weights_only=True) for rank in range(2)]
    assert said[0] == said[1]
    expected = ["wrapped in DistributedDataParallel", "plan of rank 1 is another", "rank 0 has no selection",
                "SelectionError", "rank 1: the optimizer does not hold"]  # fmt: skip
    assert len(said[0]) == len(expected)
    assert all(text in message for text, message in zip(expected, said[0], strict=True)), said[0]


def test_wrappers_are_refused_with_a_remedy() -> None:
    model, x = build(), data()[0][0][:1]
    plan = etp.trace(model, x)
    wrapped = DataParallel(model)
    for action in (
        lambda: etp.trace(wrapped, x), lambda: etp.Regularizer(wrapped, plan), lambda: etp.verify(wrapped, plan, x),
        lambda: etp.prune_(wrapped, plan, etp.Selection({})),
    ):  # fmt: skip
        with pytest.raises(etp.PlanError, match=r"model\.module"):
            action()
    with pytest.raises(etp.PlanError, match="no process group"):
        distributed.prune_(model, plan, etp.Selection({}))
    with pytest.raises(etp.PlanError, match="expected a DistributedDataParallel"):
        distributed.rewrap(nn.Linear(2, 2))  # type: ignore[arg-type]
