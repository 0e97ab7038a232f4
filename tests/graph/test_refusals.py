"""Models that are refused before anything runs, each with the remedy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def exported() -> nn.Module:
    return torch.export.export(net(), (torch.randn(2, 6),)).module()


class Doubled(Tensor):
    """A tensor that is made of another one, as the weights of quantisation libraries are."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Doubled:
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]
        made.inner = inner
        return made  # type: ignore[no-any-return]

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *rest: object) -> Doubled:
        return Doubled(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Callable[..., object], *rest: object) -> object:
        if func is torch.ops.aten.detach.default:
            return Doubled(rest[1][0].inner)  # type: ignore[index]
        raise NotImplementedError(func)


def wrapped() -> nn.Module:
    model = net()
    model[0].weight = nn.Parameter(Doubled(torch.randn(8, 6)))
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.jit.script(net()), "the model is TorchScript"),
        (lambda: nn.Sequential(nn.Linear(6, 6), torch.jit.script(net())), "the module '1' is TorchScript"),
        (exported, "was exported"),
        (wrapped, "0.weight is a Doubled.*prune the float model"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_refused_with_the_remedy(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(etp.PlanError, match=words):
        etp.trace(make(), torch.randn(2, 6))


def test_a_symbolically_traced_module_is_followed() -> None:
    model = torch.fx.symbolic_trace(net())
    assert [group.n_units for group in etp.trace(model, torch.randn(2, 6)).prunable] == [8]


class Standardised(nn.Conv2d):
    """Convolution with a standardised weight, as in BiT and NFNet."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(input, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias)


def test_a_layer_that_changes_its_own_weight_is_locked_with_the_line() -> None:
    model = nn.Sequential(Standardised(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 2, 1)).eval()
    groups = {group.name: group.locked for group in etp.trace(model, torch.randn(2, 3, 9, 9)).groups}
    assert "its weight is computed while running (test_refusals.py:" in str(groups["0"])
    assert groups["2"] is None
