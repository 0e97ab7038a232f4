"""Several processes: equal bit for bit, equal to one process, and no rank left waiting for another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DataParallel

import etp_graph as etp
from etp_graph import distributed
from tests.support.ddp_worker import build, data, train, work

RUNS = [("prox", "sgd"), ("gradient", "adam")]
pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four processes left behind. A server that has imported everything is forked for each of them."""
    where = tmp_path_factory.mktemp("ddp")
    method = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"
    if method == "forkserver":
        mp.get_context(method).set_forkserver_preload(
            ["torch._dynamo", "lightning.pytorch", "transformers.trainer", "ddp_worker"]
        )
    mp.start_processes(work, (4, str(where), RUNS), nprocs=4, start_method=method)
    return where


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_are_equal_bit_for_bit_and_equal_to_one_process(size: int, folder: Path) -> None:
    for mode, optimizer in RUNS:
        files = [folder / f"{mode}-{optimizer}-{rank}-of-{size}.pt" for rank in range(size)]
        states = [torch.load(file, weights_only=True) for file in files]
        model, before = train(0, 1, mode, optimizer)
        for part, alone in enumerate((before, model.state_dict())):
            for key, value in alone.items():
                assert all(torch.equal(state[part][key], states[0][part][key]) for state in states)
                torch.testing.assert_close(states[0][part][key], value, rtol=0, atol=1e-12)
        assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in build().parameters())


@pytest.mark.parametrize(("name", "package"), [("lightning", "lightning"), ("trainer", "accelerate")])
def test_a_framework_on_four_ranks_does_what_one_process_does(name: str, package: str, folder: Path) -> None:
    pytest.importorskip(package)
    states = [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(4)]
    model, _ = train(0, 1, "prox", "sgd")
    for key, value in model.state_dict().items():
        assert all(torch.equal(state[key], states[0][key]) for state in states)
        torch.testing.assert_close(states[0][key], value, rtol=0, atol=1e-12)
    if name == "trainer":
        manifest = etp.checkpoint.read_manifest(folder / "trainer" / "checkpoint-6")
        assert len(manifest.record.selections) == 1


def test_a_mistake_of_one_rank_is_an_error_on_all(folder: Path) -> None:
    said = [torch.load(folder / f"said-{rank}.pt", weights_only=True) for rank in range(2)]
    assert said[0] == said[1]
    no_room = "PlanError: rank 1: MemoryError: no room No model was changed."
    expected = ["wrapped in DistributedDataParallel", "plan of rank 1 is another", "rank 0 has no selection",
                "SelectionError", "rank 1: the optimizer does not hold", no_room, no_room, "no error"]  # fmt: skip
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
