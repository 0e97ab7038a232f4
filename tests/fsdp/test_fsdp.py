"""FSDP2: what sharded models become is what one process would have made of them, before and after surgery."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import etp_graph as etp
from tests.support.fsdp_worker import GRIDS, PRUNE, Life, all_lives, loss_of, mistakes
from tests.support.models.fsdp_models import cnn
from tests.support.spawning import spawn

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
LIVES = [
    Life("cnn", "float64", "adamw", "prox", "rows"), Life("cnn", "float32", "sgd", "gradient", "columns"),
    Life("cnn", "float64", "sgd", "loss", "hybrid"), Life("cnn", "mixed", "sgd", "prox", "rows"),
    Life("cnn", "float64", "adamw", "auto", "hybrid"), Life("bert", "float64", "sgd", "auto", "rows"),
    Life("bert", "float64", "sgd", "prox", "rows"), Life("llama", "float64", "adamw", "prox", "hybrid"),
]  # fmt: skip
SLOW = [
    Life(model, dtype, optimizer, mode, layout)  # type: ignore[arg-type]
    for model in ("cnn", "bert", "llama") for dtype in ("float64", "float32") for optimizer in ("sgd", "adamw")
    for mode in ("prox", "gradient", "loss", "auto") for layout in ("rows", "columns", "hybrid")
]  # fmt: skip
TOLERANCE = {"float64": 1e-12, "float32": 1e-6, "mixed": 1e-6}


def run(lives: list[Life], folder: Path) -> Path:
    spawn(all_lives, 4, folder, lives, False)
    spawn(all_lives, 2, folder, lives, True)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four processes left behind, and then two."""
    lives = [life for life in LIVES if life.model == "cnn" or importlib.util.find_spec("transformers")]
    return run(lives, tmp_path_factory.mktemp("fsdp"))


def alone(life: Life) -> dict[str, Any]:
    """The same training in one process; with mixed precision, of each rank's part of a batch by itself."""
    model, batches = life.build(), life.batches()
    plan = etp.trace(model, batches[0][0][:1], prune=life.kinds, check=False)
    optimizer, losses = life.held(model), []
    parts = 4 if life.dtype == "mixed" else 1

    def step(number: int, force: etp.Regularizer | None = None) -> None:
        x, y = batches[number]
        pieces = [(mixed(model, a), b) if parts > 1 else (model(a), b) for a, b in zip(x.chunk(parts), y.chunk(parts))]
        loss = torch.stack([loss_of(out, b) for out, b in pieces]).mean()
        losses.append(float(loss.detach()))
        if force is not None and life.mode == "loss":
            loss = loss + force.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with life.force(model, plan).attach(optimizer) as force:
        for number in range(PRUNE):
            step(number, force)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    chosen = life.select(model, plan, force)
    etp.prune_(model, plan, chosen, optimizer=optimizer)
    step(PRUNE)
    step(PRUNE + 1)
    return {"before": before, "after": dict(model.named_parameters()), "losses": losses, "selection": chosen.to_json()}


def mixed(model: nn.Module, x: Tensor) -> Any:
    """A forward in bfloat16 with master weights in float32."""
    low = {name: p.bfloat16() for name, p in model.named_parameters()}
    return torch.func.functional_call(model, low, x.bfloat16())


def check(life: Life, folder: Path) -> None:
    """Weights and losses of all ranks are those of one process."""
    expected, tolerance = alone(life), TOLERANCE[life.dtype]
    found = [torch.load(folder / f"{life}-{rank}.pt", weights_only=True) for rank in range(4)]
    again = [torch.load(folder / f"{life}-resumed-{rank}.pt", weights_only=True) for rank in range(2)]
    assert {one["selection"] for one in found} == {expected["selection"]}
    assert all(one["rounds"] == 1 for one in again)
    # two ranks sum other parts of a batch in bfloat16 than four
    loose = 1e-4 if life.dtype == "mixed" else tolerance
    for part, ranks, near in (("before", found, tolerance), ("after", found, tolerance), ("after", again, loose)):
        for one in ranks:
            assert one[part].keys() == expected[part].keys()
            for name, value in expected[part].items():
                torch.testing.assert_close(one[part][name], value.detach(), rtol=0, atol=near)
    means = torch.tensor([one["losses"] for one in found], dtype=torch.float64).mean(0)
    torch.testing.assert_close(means, torch.tensor(expected["losses"], dtype=torch.float64), rtol=0, atol=tolerance)
    sizes = [sum(v.numel() for v in expected[part].values()) for part in ("before", "after")]
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("life", LIVES, ids=str)
def test_a_sharded_model_becomes_what_one_process_makes_of_it(life: Life, folder: Path) -> None:
    if life.model != "cnn":
        pytest.importorskip("transformers")
    check(life, folder)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["cnn", "bert", "llama"])
def test_every_combination(model: str, tmp_path: Path) -> None:
    lives = [life for life in SLOW if life.model == model]
    run(lives, tmp_path)
    for life in lives:
        check(life, tmp_path)


def test_any_grid_of_shards_and_copies_feels_the_force_of_one_process(folder: Path) -> None:
    model = cnn().double()
    plan = etp.trace(model, torch.zeros(1, 2, 8, 8, dtype=torch.float64), check=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    with etp.Regularizer(model, plan, beta=0.05, order="importance").attach(optimizer):
        optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
    for file in sorted(folder.glob("grid-*.pt")):
        for name, value in torch.load(file, weights_only=True).items():
            torch.testing.assert_close(value, model.get_parameter(name).detach(), rtol=0, atol=1e-12)
    assert len(list(folder.glob("grid-*.pt"))) == 4 * len(GRIDS)


def test_a_step_takes_one_all_reduce_and_gathers_nothing(folder: Path) -> None:
    life = LIVES[0]
    for rank in range(4):
        calls = torch.load(folder / f"{life}-{rank}.pt", weights_only=True)["calls"]
        # the second is that of the norms by which order="importance" ranks anew after each step
        assert calls == ["all_reduce"] * 2 * PRUNE


def test_a_steered_step_takes_one_all_reduce_for_norms_and_gradients(folder: Path) -> None:
    for life in (life for life in LIVES if life.mode == "auto"):
        for rank in range(4):
            calls = torch.load(folder / f"{life}-{rank}.pt", weights_only=True)["calls"]
            assert calls == ["all_reduce"] * PRUNE


def test_mistakes_and_deaths_are_errors_on_all_ranks_and_leave_the_checkpoint(tmp_path: Path) -> None:
    spawn(mistakes, 2, tmp_path)
    said = [torch.load(tmp_path / f"said-{rank}.pt", weights_only=True) for rank in range(2)]
    assert said[0] == said[1]
    expected = [
        "ForceError: '0.weight' of the model", "PlanError: 0.weight has the placement", "etp_graph.fsdp.prune",
        "etp_graph.fsdp.save", "rank 0 has no selection", "PlanError: rank 0, 1: the optimizer does not hold",
        "rank 1: build() made", "rank 0: ", "holds a saved model", "is gathered on every process: call model.reshard()",
    ]  # fmt: skip
    assert len(said[0]) == len(expected), said[0]
    for text, message in zip(expected, said[0], strict=True):
        assert text in message
    survivor = torch.load(tmp_path / "survivor.pt", weights_only=True)
    assert survivor["same"]
    for text, message in zip(("cannot be summed", "does not answer"), survivor["said"], strict=True):
        assert text in message
