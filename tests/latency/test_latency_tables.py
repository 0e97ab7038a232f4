"""Tables of layer times: what is timed, how it is interpolated, and what they show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.latency import TimedCosts, preferred_multiple, record_calls
from etp_graph.latency._layers import ROOT, TimedLayer, TimedProducts
from etp_graph.latency._tables import LatencyTable, _TableStack, measured_sizes, monotone_fit
from tests.support.models.toy import Toy, toy_plan
from tests.support.timers import Formula

CPU = torch.device("cpu")


def linear(out: int, into: int) -> TimedLayer:
    return TimedLayer(
        name="0", module=nn.Linear(into, out), weight="0.weight", sizes=(out, into), shape=(2, into),
        dtype=torch.float32, device=CPU,
    )  # fmt: skip


@given(arrays.arrays(np.float64, (5, 5), elements=st.floats(0, 9)))
@settings(max_examples=50, deadline=None)
def test_a_table_never_falls(found: np.ndarray) -> None:
    clean = monotone_fit(found)
    assert (np.diff(clean, axis=0) >= 0).all()
    assert (np.diff(clean, axis=1) >= 0).all()
    np.testing.assert_array_equal(monotone_fit(clean), clean)
    assert clean[-1, -1] <= found.max()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 64, 1000])
def test_grids(size: int) -> None:
    points = measured_sizes(size, varies=True)
    assert points[0] == 1
    assert points[-1] == size
    assert list(points) == sorted(points)
    assert set(measured_sizes(size, varies=False)) == {size}


@pytest.mark.parametrize("sizes", [(1, 1), (2, 3), (5, 64), (32, 24)])
def test_between_its_points_a_table_is_bilinear(sizes: tuple[int, int]) -> None:
    def seconds(at: tuple[int, ...]) -> float:
        return 1 + 2 * at[0] + 3 * at[1] + 5 * at[0] * at[1]

    table = LatencyTable.of(linear(*sizes), (True, True), Formula(layer_seconds=seconds))
    points = np.array([(a, b) for a in range(1, sizes[0] + 1) for b in range(1, sizes[1] + 1)], dtype=np.float64)
    np.testing.assert_allclose(_TableStack([table])(points[:, None]).sum(1), [seconds(tuple(p)) for p in points])
    both = _TableStack([table, table])(np.repeat(points[:, None], 2, axis=1)).sum(1)
    np.testing.assert_allclose(both, [2 * seconds(tuple(p)) for p in points])


def test_an_axis_that_stays_is_timed_once() -> None:
    timer = Formula()
    LatencyTable.of(linear(64, 24), (True, False), timer)
    assert sorted(timer.asked) == [(size, 24) for size in measured_sizes(64, varies=True)]


def toy_costs(timer: Formula) -> TimedCosts:
    return TimedCosts(toy_plan(), *record_calls(Toy(), toy_plan(), torch.randn(1, 3, 8, 8)), timer)


def test_seconds_are_a_third_cost() -> None:
    costs = toy_costs(Formula())
    dense = costs.totals(costs.sizes[None])
    assert list(dense) == ["macs", "params", "latency"]
    assert (dense["macs"].tolist(), dense["params"].tolist()) == ([costs.dense.macs], [costs.dense.params])
    assert dense["latency"].tolist() == [1000 * (8 * 3 + 6 * 8 + 5 * 24)]


def test_seconds_of_every_layer_add_up() -> None:
    costs = toy_costs(Formula())
    keep = torch.ones(costs.plan.n_units, dtype=torch.bool)
    assert costs.by_layer(costs.counts(keep)) == pytest.approx({"conv1": 24e-6, "conv2": 48e-6, "linear": 120e-6})
    keep[:4] = False  # half of the channels of conv1
    some = costs.by_layer(costs.counts(keep))
    assert some == pytest.approx({"conv1": 12e-6, "conv2": 24e-6, "linear": 120e-6})
    assert 1e9 * sum(some.values()) == pytest.approx(costs.totals(costs.counts(keep))["latency"][0])


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_seconds_fall_with_every_channel_whatever_the_clock_says(seed: int) -> None:
    noise = np.random.default_rng(seed)
    costs = toy_costs(Formula(layer_seconds=lambda sizes: float(noise.uniform(0, 1e-3))))
    counts = np.stack([noise.integers(1, costs.sizes + 1) for _ in range(50)])
    for dim in range(len(costs.sizes)):
        fewer = counts.copy()
        fewer[:, dim] = np.maximum(fewer[:, dim] - 1, 1)
        assert (costs.totals(fewer)["latency"] <= costs.totals(counts)["latency"] + 1).all()  # nanoseconds are rounded


def test_equal_layers_are_timed_once() -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6)))
    x = torch.randn(2, 16)
    plan = etp.trace(model, x, check=False)
    layers, _ = record_calls(model, plan, x)
    timer = Formula()
    assert len(layers) == 6
    TimedCosts(plan, layers, [], timer)
    assert len(timer.asked) < 3 * 25  # the first, the last, and one of those between


class Block(nn.Module):
    """Attention of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.dim = 4, 8
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(x.transpose(1, 2).reshape(n, length, -1))


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.rnn, self.out = kind(6, 16, 2), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0])


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    "toy": (Toy, (1, 3, 8, 8), 3, 0),
    "depthwise": (lambda: torchvision.models.mobilenet_v3_small(num_classes=4), (1, 3, 32, 32), 54, 0),
    "grouped": (lambda: torchvision.models.regnet_x_400mf(num_classes=4), (1, 3, 32, 32), 72, 0),
    "transposed": (
        lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.ConvTranspose1d(8, 6, 3), nn.Conv1d(6, 2, 1)), (1, 3, 9), 3, 0,
    ),
    "lstm": (lambda: Recurrent(nn.LSTM), (5, 2, 6), 2, 0),
    "gru": (lambda: Recurrent(nn.GRU), (5, 2, 6), 2, 0),
    "encoder": (lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), (1, 5, 32), 3, 1),
    "attention": (Block, (2, 5, 32), 2, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_runs_at_every_size_of_its_table(name: str) -> None:
    make, shape, n_layers, n_products = MODELS[name]
    model, x = make().eval(), torch.randn(shape)
    plan = etp.trace(model, x, check=False)
    layers, products = record_calls(model, plan, x)
    assert (len(layers), len(products)) == (n_layers, n_products)

    class Runs(Formula):
        def layer(self, work: Any, sizes: tuple[int, ...]) -> float:
            work.call(sizes)()
            return super().layer(work, sizes)

    costs = TimedCosts(plan, layers, products, Runs())
    whole = costs.totals(costs.sizes[None])["latency"][0]
    for dim, size in enumerate(costs.sizes.tolist()):
        counts = costs.sizes.copy()
        counts[dim] = max(1, size // 2)
        if size > 1:
            assert costs.totals(counts[None])["latency"][0] <= whole


def test_products_follow_the_heads() -> None:
    model, x = Block(), torch.randn(2, 5, 32)
    plan = etp.trace(model, x, check=False)
    _, (products,) = record_calls(model, plan, x)
    assert (products.name, products.size) == (ROOT, 4)
    shapes: list[tuple[int, ...]] = []

    def seen(work: Any, sizes: tuple[int, ...]) -> float:
        if isinstance(work, TimedProducts):
            shapes.append(sizes)
        return float(sizes[0])

    timer = Formula()
    timer.layer = seen  # type: ignore[method-assign]
    TimedCosts(plan, *record_calls(model, plan, x), timer)
    assert {sizes[0] for sizes in shapes} == {1, 2, 3, 4}


@pytest.mark.parametrize("name", ["toy", "lstm", "encoder"])
def test_recording_changes_nothing(name: str) -> None:
    make, shape, *_ = MODELS[name]
    model, x = make().train(), torch.randn(shape)
    plan = etp.trace(model, x, check=False)
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    record_calls(model, plan, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_what_does_not_run_apart_counts_by_its_macs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(work: TimedLayer, sizes: tuple[int, ...]) -> Any:
        raise RuntimeError("not aligned")

    model, x, plan = Toy(), torch.randn(1, 3, 8, 8), toy_plan()
    monkeypatch.setattr(TimedLayer, "call", refuse)
    layers, products = record_calls(model, plan, x)
    assert (layers, products) == ([], [])
    costs = TimedCosts(plan, layers, products, Formula())
    totals = costs.totals(costs.sizes[None])
    assert totals["macs"] == totals["latency"]


def test_terms_without_a_table_keep_the_pace_of_the_others() -> None:
    model, x, plan = Toy(), torch.randn(1, 3, 8, 8), toy_plan()
    layers, _ = record_calls(model, plan, x)
    some = TimedCosts(plan, layers[:2], [], Formula(layer_seconds=lambda sizes: 1e-6 * 576 * sizes[0] * sizes[1]))
    totals = some.totals(some.sizes[None])
    assert totals["latency"] == pytest.approx(1000 * totals["macs"], rel=1e-6)


def stairs(multiple: int) -> Callable[[tuple[int, ...]], float]:
    return lambda sizes: -(-sizes[0] // multiple) * multiple * sizes[1] * 1e-6


@pytest.mark.parametrize(("multiple", "found"), [(1, 1), (2, 1), (8, 8), (16, 16), (32, 32)])
def test_the_multiple_is_read_from_the_steps(multiple: int, found: int) -> None:
    model, x = nn.Sequential(nn.Linear(8, 256), nn.Linear(256, 192), nn.Linear(192, 4)), torch.randn(2, 8)
    plan = etp.trace(model, x, check=False)
    timer = Formula(layer_seconds=stairs(multiple))
    assert preferred_multiple(TimedCosts(plan, *record_calls(model, plan, x), timer), timer) == found


def test_small_layers_say_nothing_of_steps() -> None:
    timer = Formula(layer_seconds=stairs(8))
    assert preferred_multiple(toy_costs(timer), timer) == 1
