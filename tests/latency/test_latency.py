"""Measuring: what is reported, what is refused, and that nothing but the clock moves. No test asks how long it took."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.latency import WallClock
from etp_graph.latency._layers import TimedLayer
from tests.support.models.toy import Toy


class Watched(nn.Module):
    """Notes the conditions under which it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.seen: list[tuple[bool, bool, bool, int]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((self.training, torch.is_grad_enabled(), gc.isenabled(), torch.get_num_threads()))
        torch.rand(1)
        return self.norm(x)


def test_what_is_reported() -> None:
    found = etp.benchmark(Toy(), torch.randn(6, 3, 8, 8), repetitions=5, warm_up=0, threads=1)
    assert 0 < found.p50_ms <= found.p90_ms
    assert found.throughput == pytest.approx(6e3 / found.p50_ms)
    assert (found.threads, found.repetitions, found.device) == (1, 5, "cpu")
    assert found.peak_memory is None or found.peak_memory > 0
    assert etp.Latency.from_json(found.to_json()) == found
    assert "p50" in str(found)


def test_several_models_take_turns() -> None:
    order: list[str] = []

    class Named(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name, self.weight = name, nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            order.append(self.name)
            return x * self.weight

    found = etp.benchmark([Named("a"), Named("b")], torch.ones(2), repetitions=4, warm_up=1)
    assert isinstance(found, tuple)
    assert len(found) == 2
    assert order == ["a", "b"] * 6  # memory, warm-up, and what counts


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_behind(training: bool) -> None:
    model, x = Watched().train(training), torch.randn(3, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    threads, state, enabled = torch.get_num_threads(), torch.get_rng_state(), gc.isenabled()
    etp.benchmark(model, {"x": x}, repetitions=2, warm_up=1, threads=threads + 1)
    assert set(model.seen) == {(False, False, False, threads + 1)}
    assert model.training is model.norm.training is training
    assert (torch.get_num_threads(), gc.isenabled()) == (threads, enabled)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_failing_forward_leaves_nothing_behind() -> None:
    model = Watched()
    with pytest.raises(ValueError, match="expected 2D"):
        etp.benchmark(model, torch.randn(4), threads=torch.get_num_threads() + 1)
    assert model.training
    assert gc.isenabled()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("models", "arguments", "message"),
    [
        ([], {}, "give a model"), ([3], {}, "'int'"), (Toy(), {"repetitions": 0}, "repetitions=0"),
        (Toy(), {"warm_up": -1}, "warm_up=-1"), (Toy(), {"threads": 0}, "threads=0"),
        (Toy(), {"repetitions": 2.5}, "integer"), (nn.Linear(2, 2, device="meta"), {}, "meta device"),
    ],
)  # fmt: skip
def test_what_is_refused(models: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(etp.EtpError, match=message):
        etp.benchmark(models, torch.randn(1, 3, 8, 8), **arguments)


@pytest.mark.parametrize("text", ["", "[1]", '{"p50": 3}'])
def test_json_of_something_else(text: str) -> None:
    with pytest.raises(etp.EtpError, match="not a latency"):
        etp.Latency.from_json(text)


def test_the_wall_clock_measures_models_and_layers() -> None:
    clock = WallClock(repetitions=2, warm_up=0, single=0.0, whole=0.0)
    assert all(seconds > 0 for seconds in clock.models([Toy(), Toy()], torch.randn(1, 3, 8, 8)))
    layer = TimedLayer(
        name="0", module=nn.Linear(4, 6), weight="0.weight", sizes=(6, 4), shape=(2, 4), dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    assert clock.layer(layer, (3, 2)) > 0
