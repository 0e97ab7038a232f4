"""Outputs that two equal models may give differently: ties, NaN, random numbers, gradients of their own making."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.verification._comparison import describe_difference, describe_failure, relative_error
from etp_graph.verification._replay import Choices, Comparable
from tests.support.models.constructs import Net


def net(run: Callable[..., Any], units: int = 8) -> Net:
    torch.manual_seed(0)
    return Net(run, a=nn.Linear(6, units), b=nn.Linear(units, 5), c=nn.Linear(units, 5))


def best_of_ties(n: Any, x: Tensor) -> Any:
    """The three best rows of scores that are all equal, but for rounding."""
    y = n.a(x).relu()
    scores = (n.b(y) / n.b(y)).sum(-1) + (y.sum(-1) / y.sum(-1))
    found = scores.topk(3)
    return found.values, n.c(y)[found.indices]


def sorted_ties(n: Any, x: Tensor) -> Any:
    y = n.a(x).relu()
    values, order = ((n.b(y).sum(-1) * 0).exp() + n.b(y).sum(-1) * 1e-17).sort(descending=True)
    return values, n.c(y)[order]


def mask_at_a_threshold(n: Any, x: Tensor) -> Any:
    y = n.a(x).relu()
    share = n.b(y) / n.b(y).sum(-1, keepdim=True)
    return n.c(y)[share.sum(-1) >= 1.0]


@pytest.mark.parametrize("run", [best_of_ties, sorted_ties, mask_at_a_threshold])
def test_choices_among_equal_values_are_repeated(run: Callable[..., Any]) -> None:
    model, x = net(run, 48), torch.randn(40, 6)
    plan = etp.trace(model, x)
    assert "a" in [group.name for group in plan.prunable]
    for seed in range(4):
        etp.verify(model, plan, x, seed=seed)


def test_choices_among_other_values_are_not_repeated() -> None:
    scores, rest = torch.tensor([0.0, 2.0, 1.0]), torch.tensor([0.0, 1.0, 2.0])
    recorded = Choices()
    with Comparable(0, steady=False, choices=recorded):
        assert scores.topk(1).indices.tolist() == [1]
    with Comparable(0, steady=False, choices=Choices(recorded)):
        assert rest.topk(1).indices.tolist() == [2]
    with Comparable(0, steady=False, choices=Choices(recorded)):
        assert (scores + 1e-9).topk(1).indices.tolist() == [1]


def test_values_that_are_nan_in_both_are_equal() -> None:
    nan = float("nan")
    assert relative_error([torch.tensor([1.0, nan])], [torch.tensor([1.0, nan])]) == 0.0
    assert relative_error([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, nan])]) == float("inf")


def test_a_model_that_gives_nan_in_float64_is_compared_in_float32() -> None:
    def run(n: Any, x: Tensor) -> Tensor:
        return n.b(n.a(x)) + (0.0 if x.dtype == torch.float32 else float("nan"))

    model, x = net(run), torch.randn(4, 6)
    plan = etp.trace(model, x)
    assert [group.name for group in plan.prunable] == ["a"]
    assert etp.verify(model, plan, x).dtype == "float32"


@pytest.mark.parametrize(
    "noise",
    [torch.rand_like, torch.randn_like, lambda y: torch.bernoulli(torch.full_like(y, 0.5)),
     lambda y: torch.rand(y.shape, dtype=y.dtype) * 2, lambda y: torch.empty_like(y).normal_()],
)  # fmt: skip
def test_random_numbers_for_every_unit(noise: Callable[[Tensor], Tensor]) -> None:
    model, x = net(lambda n, x: n.b(n.a(x).relu() * noise(n.a(x)))), torch.randn(4, 6)
    plan = etp.trace(model, x)
    assert [group.name for group in plan.prunable] == ["a"]
    assert etp.verify(model, plan, x).error < 1e-10


def test_random_numbers_hide_no_error() -> None:
    model, x = net(lambda n, x: n.b((y := n.a(x)) / y.stride(0) * torch.rand_like(y))), torch.randn(4, 6)
    with pytest.raises(etp.EquivalenceError, match="'a'"):
        etp.verify(model, etp.trace(model, x, check=False), x)


class OwnDerivative(torch.autograd.Function):
    """Identity whose derivative depends on the number of units."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * grad.shape[-1]


def test_gradients_that_the_unpruned_model_gets_wrong_are_not_blamed_on_the_plan() -> None:
    model, x = net(lambda n, x: n.b(OwnDerivative.apply(n.a(x)))), torch.randn(4, 6)
    plan = etp.trace(model, x)
    found = etp.verify(model, plan, x)
    assert found.gradient_error is None
    assert "for the unpruned model differ from finite differences" in str(found)
    assert etp.verify(net(lambda n, x: n.b(n.a(x))), plan, x).note == ""


class NoDerivative(torch.autograd.Function):
    """Identity whose backward is refused, as code does that is made for training mode alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise AssertionError("use model.train()")


def overwritten(y: Tensor) -> Tensor:
    """Return values of which the backward needs those that were overwritten."""
    out = y.exp()
    z = out * 2
    out.add_(1)
    return z


@pytest.mark.parametrize(("run", "words"), [(NoDerivative.apply, "model.train()"), (overwritten, "inplace")])
def test_a_model_without_a_backward_is_compared_by_its_outputs(run: Callable[[Tensor], Tensor], words: str) -> None:
    model, x = net(lambda n, x: n.b(run(n.a(x)))), torch.randn(4, 6)
    plan = etp.trace(model, x)
    found = etp.verify(model, plan, x)
    assert found.gradient_error is None
    assert "the unpruned model cannot be differentiated" in found.note
    assert words in found.note
    with pytest.raises(etp.EquivalenceError):
        etp.verify(net(lambda n, x: n.b((y := run(n.a(x))) / y.shape[-1])), plan, x)


def test_tensors_without_entries_are_left_alone() -> None:
    model, x = net(lambda n, x: n.b(torch.cat([n.a(x), n.d(x)], -1))), torch.randn(4, 6)
    model.d = nn.Linear(6, 0)
    plan = etp.trace(model, x)
    assert [group.name for group in plan.prunable] == ["a"]
    assert etp.verify(model, plan, x).units > 0


class DerivativeOfNarrow(OwnDerivative):
    """Identity whose derivative is wrong once units are gone, as those of some kernels are for a single head."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (1 if grad.shape[-1] == 8 or bool((grad == 0).all(0).any()) else 2)


def test_gradients_that_only_the_pruned_model_gets_wrong_are_not_blamed_on_the_plan() -> None:
    model, x = net(lambda n, x: n.b(DerivativeOfNarrow.apply(n.a(x)))), torch.randn(4, 6)
    plan = etp.trace(model, x)
    found = etp.verify(model, plan, x)
    assert found.gradient_error is None
    assert found.error < 1e-10
    assert "for the pruned model differ from finite differences" in str(found)


def test_a_wrong_plan_is_not_excused_by_gradients() -> None:
    x = torch.randn(4, 6)
    plan = etp.trace(net(lambda n, x: n.b(n.a(x))), x)
    with pytest.raises(etp.EquivalenceError):
        etp.verify(net(lambda n, x: n.b((y := DerivativeOfNarrow.apply(n.a(x))) / y.shape[-1])), plan, x)


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (lambda y: y.stride(0) == 8, "(?s)AssertionError.*at 'assert check"),
        (lambda y: [][y.stride(0) - 8], "IndexError: list index out of range"),
    ],
)
def test_an_error_ends_with_a_reason(check: Callable[[Tensor], Any], words: str) -> None:
    def run(n: Any, x: Tensor) -> Tensor:
        y = n.a(x)
        if y.stride(0) != 8:
            assert check(y)
        return n.b(y)

    model, x = net(run), torch.randn(4, 6)
    with pytest.raises(etp.EquivalenceError, match=words):
        etp.verify(model, etp.trace(model, x, check=False), x)


def test_words_for_differences_that_have_no_size() -> None:
    one, two = torch.ones(2), torch.ones(3)
    inf = float("inf")
    assert "1 and 2 tensors" in describe_difference([one], [one, two], inf)
    assert "shapes [2] and [3]" in describe_difference([one], [two], inf)
    assert "NaN or infinite" in describe_difference([one], [one / 0], inf)
    assert "only zeros" in describe_difference([one], [one * 0], inf)
    assert describe_difference([one], [one * 2], 0.5).endswith("5.0e-01")
    assert describe_failure(AssertionError()) == "AssertionError"


class Keeping(nn.Module):
    """Keeps a tensor as a plain attribute from its first forward on, like the codebooks of Mimi."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(4, 3)
        self.rotation: torch.Tensor | None = None
        self.middle = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rotation is None:
            self.rotation = torch.linspace(0, 1, 20, dtype=x.dtype).view(5, 4)
        return self.last(self.middle(torch.relu(self.first(x))) @ self.rotation)


def test_tensors_that_a_forward_has_kept_are_judged_in_float64() -> None:
    model, x = Keeping(), torch.randn(3, 6)
    model(x)
    plan = etp.trace(model, x)
    found = etp.verify(model, plan, x)
    assert found.dtype == "float64"
    assert model.rotation is not None
    assert model.rotation.dtype == torch.float32


def test_a_model_that_is_nan_in_float64_is_judged_in_float32_with_weights_that_round_little() -> None:
    from transformers import SplinterConfig, SplinterForQuestionAnswering

    torch.manual_seed(0)
    config = SplinterConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=64, question_token_id=5,
    )  # fmt: skip
    ids = torch.randint(7, 98, (2, 12))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model = SplinterForQuestionAnswering(config).eval()
    unchecked = etp.trace(model, inputs, check=False)
    assert [group.locked for group in etp.trace(model, inputs).groups] == [group.locked for group in unchecked.groups]
