"""What a forward writes to its model is undone, whatever holds it. What it builds stays, unless it fails."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.model import restored_state

WIDE = 512


class Caching(nn.Module):
    """Text features of stored prompts, computed in the first forward and kept for later ones."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.text = nn.Sequential(nn.Linear(64, WIDE), nn.ReLU(), nn.Linear(WIDE, 96))
        self.image = nn.Sequential(nn.Linear(32, WIDE), nn.ReLU(), nn.Linear(WIDE, 96))
        self.register_buffer("prompts", torch.randn(80, 64))
        self.register_buffer("memory", torch.zeros(80, 96))
        self.register_buffer("late", None)
        self.place, self.calls, self.features = place, 0, None
        self.by_name: dict[str, Any] = {"inner": [None]}
        self.object, self.list = SimpleNamespace(value=None, more=SimpleNamespace(value=None)), [None]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.kept() is None:
            self.keep(self.text(self.prompts))
        return self.image(x) @ self.kept().T

    def kept(self) -> Any:
        return {
            "attribute": self.features, "dict": self.by_name.get("features"), "nested": self.by_name["inner"][0],
            "list": self.list[0], "object": self.object.value, "object in object": self.object.more.value,
            "buffer in place": self.memory if bool(self.memory.any()) else None, "buffer": self.late,
            "new attribute": vars(self).get("new"), "recorded": None,
        }[self.place]  # fmt: skip

    def keep(self, value: Tensor) -> None:
        self.features = value if self.place == "attribute" else None
        if self.place == "dict":
            self.by_name["features"] = value
        elif self.place == "nested":
            self.by_name["inner"][0] = value
        elif self.place == "list":
            self.list[0] = value
        elif self.place == "object":
            self.object.value = value
        elif self.place == "object in object":
            self.object.more.value = value
        elif self.place == "buffer in place":
            self.memory.copy_(value)
        elif self.place == "buffer":
            self.late = value
        elif self.place == "new attribute":
            self.new = value


PLACES = ("attribute", "new attribute", "dict", "nested", "list", "object", "object in object", "buffer in place")


def contents(model: Caching) -> list[Any]:
    return [
        list(vars(model)), model.calls, model.features, str(model.by_name), str(model.object), str(model.list),
        model.memory.tolist(), model.late, type(model.calls),
    ]  # fmt: skip


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_a_model_that_caches_is_left_as_it_was(place: str, check: bool) -> None:
    model, x = Caching(place).eval(), torch.randn(2, 32)
    before = contents(model)
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
        etp.trace(model, x, check=check)
        assert contents(model) == before
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("place", [*PLACES, "buffer"])
def test_a_full_cache_does_not_break_the_pruned_model(place: str) -> None:
    model, x = Caching(place).eval(), torch.randn(2, 32)
    plan = etp.trace(model, x, check=False)
    with torch.no_grad():
        model(x)
    assert etp.verify(model, plan, x).effect > 0
    locked = {(piece.tensor, piece.axis) for group in plan.groups if group.locked for piece in group.slices}
    assert {("image.2.weight", 0), ("text.2.weight", 0)} <= locked


def test_a_tensor_that_is_only_recorded_locks_nothing() -> None:
    class Recording(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.hidden = nn.Linear(4, 6), nn.Linear(6, 2), None

        def forward(self, x: Tensor) -> Tensor:
            self.hidden = self.first(x).relu()
            return self.last(self.hidden)

    model = Recording()
    assert etp.trace(model, torch.randn(2, 4))["first"].locked is None
    assert model.hidden is None


class Building(nn.Module):
    """A net that makes a mask of the input's length, and an activation, in its first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.built, self.fails = nn.Linear(4, 6), nn.Linear(6, 2), False, False

    def forward(self, x: Tensor) -> Tensor:
        if not self.built:
            self.built, self.act = True, nn.ReLU()
            self.register_buffer("mask", torch.ones(len(x), 1))
        if self.fails:
            raise LookupError("in the middle")
        return self.last(self.act(self.first(x)) * self.mask)


def test_what_the_first_forward_builds_stays() -> None:
    model, x = Building(), torch.randn(2, 4)
    plan = etp.trace(model, x)
    made = model.act
    model(x)
    assert model.act is made and model.built
    plan.check(model)


def test_after_an_error_nothing_is_built() -> None:
    model = Building()
    model.fails = True
    with pytest.raises(LookupError):
        etp.trace(model, torch.randn(2, 4))
    assert [name for name, _ in model.named_modules()] == ["", "first", "last"] and not model.built
    assert not dict(model.named_buffers())


def test_lazy_layers_stay_built() -> None:
    model = nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.LazyLinear(2))
    with restored_state(model):
        model(torch.randn(2, 4))
    assert model[0].in_features == 4 and model(torch.randn(2, 4)).shape == (2, 2)


def test_equal_outputs_without_an_effect_are_no_proof() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    plan = etp.trace(model, torch.randn(2, 4))
    nn.init.zeros_(model[2].weight)
    with pytest.raises(etp.EquivalenceError, match="changes no output"):
        etp.verify(model, plan, torch.randn(2, 4), randomize=False)
    assert etp.verify(model, plan, torch.randn(2, 4)).effect > 0


class Recording(nn.Module):
    """Registers hooks in its first forward, as models of transformers do to collect hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3))
        self.ready = False

    def forward(self, x: Tensor) -> Tensor:
        found: list[Tensor] = []
        self.layers.found = found
        if not self.ready:
            for layer in self.layers:
                layer.register_forward_hook(lambda module, args, out: self.layers.found.append(out))
                layer.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
            self.ready = True
        out: Tensor = self.layers(x)
        assert len(found) == 3, "every hook is there once"
        return out


def test_hooks_that_the_first_forward_registers_are_undone() -> None:
    model, x = Recording(), torch.randn(2, 4)
    kept = model.layers[0].register_forward_hook(lambda module, args, out: None)
    etp.trace(model, x)
    assert not model.ready
    assert [len(layer._forward_hooks) for layer in model.layers] == [1, 0, 0]
    assert [len(layer._forward_pre_hooks_with_kwargs) for layer in model.layers] == [0, 0, 0]
    model(x)
    model(x)
    assert [len(layer._forward_hooks) for layer in model.layers] == [2, 1, 1]
    kept.remove()
    assert [len(layer._forward_hooks) for layer in model.layers] == [1, 1, 1]


def test_hidden_states_of_transformers_after_a_trace() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2
    )
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.tensor([[1, 2, 3]])
    etp.trace(model, {"input_ids": ids, "output_hidden_states": True}, outputs="logits")
    found = model(ids, output_hidden_states=True, output_attentions=False).hidden_states
    assert len(found) == 4
    assert all(state is not None for state in found)
