"""Distances of a changed model from the dense one: by their definitions, also of the model itself after its change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etp_graph.collect import Divergence, OutputError, OwnLabels, _divergence, loss_growth
from etp_graph.errors import ScoreError


class Tagger(nn.Module):
    """Logits for each token, in a field."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(6, 5)

    def forward(self, inputs: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.last(inputs)}


def changed(model: nn.Module, by: float = 0.1) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += by * torch.randn_like(parameter)
    return other


def masked_batches() -> list[dict[str, Tensor]]:
    masks = [torch.randint(0, 2, (4, 7)) for _ in range(3)]
    return [{"inputs": torch.randn(4, 7, 6), "attention_mask": mask} for mask in masks]


def test_the_divergence_is_the_mean_over_the_tokens_that_are_not_masked() -> None:
    model, data = Tagger(), masked_batches()
    other, measure = changed(model), Divergence(model, data)
    terms = []
    for batch in data:
        p, q = (F.softmax(one(batch["inputs"])["logits"], -1) for one in (model, other))
        terms.append((p * (p / q).log()).sum(-1)[batch["attention_mask"] > 0])
    assert measure(other) == pytest.approx(float(torch.cat(terms).mean()), rel=1e-4)
    assert measure(model) == pytest.approx(0, abs=1e-7)


def test_the_output_error_is_relative_and_for_any_output() -> None:
    model = nn.Conv2d(3, 4, 3)
    data, other = [torch.randn(2, 3, 8, 8) for _ in range(2)], changed(model)
    a, b = (torch.cat([one(x) for x in data]) for one in (model, other))
    assert OutputError(model, data)(other) == pytest.approx(float((a - b).square().sum() / a.square().sum()), rel=1e-4)


@pytest.mark.parametrize("kind", [Divergence, OutputError])
@pytest.mark.parametrize("kept", [2**28, 40])
def test_the_dense_model_itself_may_change(
    kind: type[Divergence | OutputError], kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_divergence, "_KEPT", kept)
    model, data = Tagger(), masked_batches()
    other, measure = changed(model), kind(model, data)
    there = measure(other)
    model.load_state_dict(other.state_dict())
    assert there > 0 and measure(model) == there


def test_of_many_predictions_a_sample_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = Tagger(), [{"inputs": torch.randn(64, 8, 6)} for _ in range(4)]
    other, every = changed(model), Divergence(model, data)
    monkeypatch.setattr(_divergence, "_KEPT", 64 * 8 * 5)  # a quarter
    some = Divergence(model, data)
    assert sum(part.numel() for part in some._dense) == 64 * 8 * 5
    assert some(other) == pytest.approx(every(other), rel=0.2) and some(other) != every(other)


def test_classes_may_be_in_another_dimension() -> None:
    model, data = nn.Conv2d(3, 4, 1), [torch.randn(2, 3, 5, 5)]
    other = changed(model)
    p, q = (F.softmax(one(data[0]), 1) for one in (model, other))
    found = loss_growth(model, data, OwnLabels(dim=1))
    assert found(other) == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("model", "batch", "kind"),
    [
        (Tagger(), {"inputs": torch.randn(2, 3, 6)}, Divergence),
        (nn.Linear(4, 3), torch.randn(5, 4), Divergence),
        (nn.Linear(4, 1), torch.randn(5, 4), OutputError),
        (nn.Linear(4, 3), torch.randn(2, 5, 4), OutputError),
        (nn.LSTM(4, 3), torch.randn(2, 5, 4), OutputError),
    ],
)
def test_what_is_compared_follows_from_the_outputs(model: nn.Module, batch: Any, kind: type) -> None:
    found = loss_growth(model, [batch], None)
    assert isinstance(found, kind)
    assert found(changed(model, 1.0)) > 1e-4


class Returns(nn.Module):
    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Any:
        return self.what


@pytest.mark.parametrize("output", [None, "text", torch.tensor([1, 2]), torch.full((2, 3, 1), torch.nan)])
def test_outputs_without_finite_numbers_are_an_error(output: Any) -> None:
    with pytest.raises(ScoreError):
        loss_growth(Returns(output), [torch.ones(1)], None)
