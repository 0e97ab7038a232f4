"""Random operators draw from private generators: no global generator moves, and results depend on the seed only."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.model import PrivateRandom, kept_generators, preserved_rng
from etp_graph.model._private_random import _random_operator

X = torch.full((4, 5), 0.3)

DRAWS: dict[str, Callable[[], Tensor]] = {
    "rand": lambda: torch.rand(3),
    "randn in float64": lambda: torch.randn(2, 3, dtype=torch.float64),
    "randint": lambda: torch.randint(9, (5,)),
    "randint from low": lambda: torch.randint(2, 9, (5,)),
    "randperm": lambda: torch.randperm(7),
    "rand_like": lambda: torch.rand_like(X),
    "randn_like": lambda: torch.randn_like(X),
    "randint_like": lambda: torch.randint_like(X, 9),
    "into a tensor": lambda: torch.rand(3, out=torch.empty(3)),
    "normal": lambda: torch.normal(X, 1.0),
    "normal_": lambda: torch.empty(3).normal_(),
    "uniform_": lambda: torch.empty(3).uniform_(2, 3),
    "exponential_": lambda: torch.empty(3).exponential_(),
    "bernoulli": lambda: torch.bernoulli(X),
    "bernoulli_": lambda: torch.empty(5).bernoulli_(0.4),
    "multinomial": lambda: torch.multinomial(X, 2),
    "poisson": lambda: torch.poisson(X),
    "binomial": lambda: torch.binomial(10 * torch.ones(4, 5), X),
    "dirichlet": lambda: torch._sample_dirichlet(X),
    "gamma": lambda: torch._standard_gamma(X),
    "dropout": lambda: F.dropout(X),
    "fused dropout": lambda: torch.native_dropout(X, 0.5, True)[0],
    "alpha dropout": lambda: F.alpha_dropout(X, training=True),
    "rrelu": lambda: F.rrelu(-X, training=True),
    "attention": lambda: F.scaled_dot_product_attention(*(torch.ones(1, 2, 4, 8) for _ in range(3)), dropout_p=0.5),
    "gumbel": lambda: F.gumbel_softmax(X),
    "lstm": lambda: nn.LSTM(5, 6, num_layers=2, dropout=0.5)(X)[0].detach(),
    "the global generator, given": lambda: torch.rand(3, generator=torch.default_generator),
}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count no thread that an earlier test left behind, such as the monitor of a progress bar."""
    monkeypatch.setattr(threading, "active_count", lambda: 1)


def states() -> tuple[int, ...]:
    """Return one number per global generator, which keeps the message of a failed comparison short."""
    return hash(torch.get_rng_state().numpy().tobytes()), hash(str(np.random.get_state())), hash(random.getstate())  # noqa: NPY002


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_is_that_of_a_seeded_generator_and_moves_no_global_one(name: str) -> None:
    draw = DRAWS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        expected = draw(), draw()
    before = states()
    with PrivateRandom(7):
        found = draw(), draw()
    assert states() == before
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert not torch.equal(*found), "the generator does not go on"


def test_every_random_operator_of_pytorch_that_knows_generators_is_given_one() -> None:
    lacking = set()
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name)
        if not isinstance(packet, torch._ops.OpOverloadPacket):
            continue
        overloads = [getattr(packet, overload) for overload in packet.overloads()]
        known = any(a.name == "generator" for func in overloads for a in func._schema.arguments)
        for func in overloads:
            operator = _random_operator(func)
            if torch.Tag.nondeterministic_seeded in func.tags and (operator is None or (known and not operator.func)):
                lacking.add(str(func))
    assert not lacking


def test_a_generator_of_the_caller_is_used() -> None:
    with PrivateRandom(7):
        found = torch.rand(3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(found, torch.rand(3, generator=torch.Generator().manual_seed(1)))


@pytest.mark.usefixtures("alone")
def test_seeds_that_a_forward_sets_are_undone() -> None:
    model = nn.Linear(2, 2)
    before = states()
    with kept_generators(model) as changed:
        torch.manual_seed(0), np.random.rand(), random.random()  # noqa: NPY002
        assert states() != before
    assert states() == before and changed == {"torch", "numpy", "python"}


def test_what_another_thread_draws_is_not_taken_back() -> None:
    with ThreadPoolExecutor(1) as pool:
        with kept_generators(nn.Linear(2, 2)):
            first = pool.submit(lambda: (np.random.rand(), random.random(), float(torch.rand(())))).result()  # noqa: NPY002
        second = np.random.rand(), random.random(), float(torch.rand(()))  # noqa: NPY002
    assert not set(first) & set(second)


def test_preserved_generators_of_any_kind_are_as_before() -> None:
    old = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(3))
    try:
        before = str(np.random.get_state(legacy=False))  # noqa: NPY002
        with preserved_rng(nn.Linear(2, 2)):
            np.random.rand(3)  # noqa: NPY002
        assert str(np.random.get_state(legacy=False)) == before  # noqa: NPY002
    finally:
        np.random.set_bit_generator(old)


class Noisy(nn.Module):
    """A net that adds the same number to each output; drawn by ``draw``."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.first, self.last, self.draw = nn.Linear(4, 6), nn.Linear(6, 2), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu()) + self.draw()


@pytest.mark.parametrize("draw", [np.random.rand, random.random, lambda: float(torch.rand(()))])
class TestBothCopiesOfACheckDrawTheSameNumbers:
    @pytest.mark.usefixtures("alone")
    def test_alone(self, draw: Callable[[], float]) -> None:
        model, x = Noisy(draw), torch.randn(3, 4)
        before = states()
        assert etp.verify(model, etp.trace(model, x, check=False), x).error < 1e-12
        assert states() == before

    def test_beside_another_thread(self, draw: Callable[[], float]) -> None:
        model, x = Noisy(draw), torch.randn(3, 4)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(int).result()  # the thread lives on
            assert etp.verify(model, etp.trace(model, x, check=False), x).error < 1e-12
