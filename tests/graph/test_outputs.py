"""What counts as an output: by default, by name and by a function, in trace, verify and the plan's text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp


class Returns(nn.Module):
    """Trunk a (5 -> 8), head b (8 -> 3), and a state c (8 -> 4); ``make`` builds what it returns."""

    def __init__(self, make: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 4), nn.Linear(4, 3)
        self.make = make

    def forward(self, x: Tensor) -> Any:
        hidden = self.a(x).relu()
        state = self.c(hidden)
        return self.make(self.b(hidden) + self.d(state), hidden, state)


class KvCache:
    """An object like those that hand keys and values to the next call."""

    def __init__(self, *tensors: Tensor) -> None:
        self.layers = list(tensors)


class Named(NamedTuple):
    main: Tensor
    aux: Tensor


@dataclass
class Answer:
    scores: Tensor
    past_key_values: tuple[Tensor, ...]


class Recurrent(nn.Module):
    """A recurrent layer (5 -> 8) and a head (8 -> 3); the state is returned in ``place``."""

    def __init__(self, layer: Callable[..., nn.Module], place: str) -> None:
        super().__init__()
        self.layer, self.head, self.place = layer(5, 8), nn.Linear(8, 3), place

    def forward(self, x: Tensor, state: Any = None) -> Any:
        y, state = self.layer(x, state) if isinstance(self.layer, nn.RNNBase) else (self.layer(x, state),) * 2
        y = self.head(y[0] if isinstance(y, tuple) else y)
        named = {"y": y, "state": state}
        return {"beside": (y, state), "named": named, "first": (state, y), "alone": state}[self.place]


X = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))


def opened(plan: etp.Plan) -> set[str]:
    return {group.name for group in plan.prunable}


@pytest.mark.parametrize(
    ("make", "outputs", "opens", "left"),
    [
        (lambda y, h, s: (y, KvCache(h, s)), None, {"a", "c"}, ("1",)),
        (lambda y, h, s: {"y": y, "past_key_values": (h, s)}, None, {"a", "c"}, ("past_key_values",)),
        (lambda y, h, s: Answer(y, (h, s)), None, {"a", "c"}, ("past_key_values",)),
        (lambda y, h, s: [y, {"inner": {"cache": [h]}, "s": s}], None, {"a"}, ("1.inner",)),
        (lambda y, h, s: KvCache(h, s), None, {"b"}, ()),  # nothing else is returned
        (lambda y, h, s: (y, h), None, {"c"}, ()),  # a tensor of a user's model is an output
        (lambda y, h, s: {"y": y, "hidden_states": (h,)}, None, {"c"}, ()),
        (lambda y, h, s: (y, KvCache(h, s)), "*", set(), ()),
        (lambda y, h, s: (y, h, s), "0", {"a", "c"}, ("1", "2")),
        (lambda y, h, s: (y, h, s), ["0", "2"], {"a"}, ("1",)),
        (lambda y, h, s: {"y": y, "deep": {"h": h, "s": s}}, ["y", "deep.s"], {"a"}, ("deep.h",)),
        (lambda y, h, s: {"y": y, "deep": {"h": h, "s": s}}, ["y", "*.h"], {"c"}, ("deep.s",)),
        (lambda y, h, s: Named(y, h), "main", {"a", "c"}, ("aux",)),
        (lambda y, h, s: (y, h, s), lambda out: out[0].softmax(-1), {"a", "c"}, ()),
        (lambda y, h, s: (y, h, s), lambda out: {"mean": out[0].mean(0), "h": out[1] * 2}, {"c"}, ()),
        (lambda y, h, s: y, "output", {"a", "c"}, ()),
    ],
)
def test_units_that_only_feed_other_entries_open(
    make: Callable[..., Any], outputs: Any, opens: set[str], left: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    model = Returns(make)
    if not opens:
        with pytest.raises(etp.PlanError, match="feeds the model's output"):
            etp.trace(model, X, outputs=outputs)
        return
    plan = etp.trace(model, X, outputs=outputs, check=False)
    assert opened(plan) - {"d"} >= opens
    assert not opened(plan) & ({"a", "b", "c"} - opens)
    assert plan.left_out == left
    assert all(name in str(plan) for name in left)
    if "b" not in opens:
        assert etp.verify(model, plan, X).error < 1e-12
    read = etp.Plan.from_json(plan.to_json())
    assert (read, read.left_out) == (plan, plan.left_out)


def test_a_plan_without_a_choice_is_written_as_before() -> None:
    plan = etp.trace(Returns(lambda y, h, s: y), X)
    assert "outputs" not in plan.to_json()
    assert "left_out" not in plan.to_json()


def test_a_function_is_named_and_asked_for_again_after_reading() -> None:
    def only_scores(out: Any) -> Tensor:
        return out[0]

    model = Returns(lambda y, h, s: (y, h))
    plan = etp.trace(model, X, outputs=only_scores)
    read = etp.Plan.from_json(plan.to_json())
    assert "only_scores" in str(plan)
    assert read.fingerprint == plan.fingerprint
    assert etp.verify(model, plan, X).error < 1e-12
    with pytest.raises(etp.PlanError, match=r"only_scores.*pass outputs="):
        etp.verify(model, read, X)
    assert etp.verify(model, read, X, outputs=only_scores).error < 1e-12
    with pytest.raises(etp.EquivalenceError):
        etp.verify(model, read, X, outputs="1")


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ("logits", "matches no tensor.*names are 0, 1"),
        (("0", "2"), "'2' matches no tensor"),
        (lambda out: out.logits, "AttributeError.*tuple with 0, 1"),
        (lambda out: None, "returns no tensor"),
        (3, "give names"),
        ((), "give names"),
    ],
)
def test_a_wrong_choice_names_what_there_is(outputs: Any, words: str) -> None:
    model = Returns(lambda y, h, s: (y, h))
    with pytest.raises(etp.PlanError, match=words):
        etp.trace(model, X, outputs=outputs)


@pytest.mark.parametrize(
    ("layer", "x"),
    [(nn.LSTM, X[None]), (nn.GRU, X[None]), (nn.RNN, X[None]), (nn.LSTMCell, X), (nn.GRUCell, X)],
)
@pytest.mark.parametrize("place", ["beside", "named", "first", "alone"])
def test_states_that_are_only_handed_on(layer: Callable[..., nn.Module], x: Tensor, place: str) -> None:
    torch.manual_seed(0)
    model = Recurrent(layer, place)
    if place == "first":  # such a model is called for the state
        with pytest.raises(etp.PlanError, match="without 0 layer"):
            etp.trace(model, x)
        return
    plan = etp.trace(model, x)
    assert plan["layer"].locked == ("feeds the model's output" if place == "alone" else None)
    if place == "alone":
        return
    assert plan.left_out == ({"beside": "1", "named": "state"}[place],)
    assert etp.verify(model, plan, x).units
    _, state = model(x).values() if place == "named" else model(x)
    with pytest.raises(etp.PlanError, match="initial state"):  # a state that comes from outside keeps its size
        etp.trace(model, (x, state))


def test_the_note_says_what_fewer_outputs_would_open() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleList(nn.Conv2d(n, n + 1, 1) for n in range(3, 7))

        def forward(self, x: Tensor) -> list[Tensor]:
            found = []
            for stage in self.stages:
                x = stage(x)
                found.append(x)
            return found[1:]

    model, x = Pyramid(), torch.randn(1, 3, 4, 4)
    plan = etp.trace(model, x)
    assert opened(plan) == {"stages.0"}
    note = next(note for note in plan.notes if "outputs" in note)
    assert "without 0 stages.1; without 1 stages.2" in note
    assert "stages.3" not in note
    assert opened(etp.trace(model, x, outputs=["2"])) == {"stages.0", "stages.1", "stages.2"}


def test_training_mode_may_return_something_else() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.aux = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Any:
            x = self.a(x)
            return (self.b(x), self.aux(x)) if self.training else {"scores": self.b(x), "hidden": x}

    model = Auxiliary()
    plan = etp.trace(model, X, outputs="scores")
    assert plan.modes == ("eval", "train")
    assert opened(plan) == {"a"}
    assert etp.verify(model, plan, X).units
