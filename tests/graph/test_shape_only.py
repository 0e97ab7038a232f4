"""While tracing, large products are not computed: nothing of the plan may depend on that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp
from etp_graph.graph._forward import follow_forwards, group_units
from etp_graph.graph._shape_only import NeedsValues, ShapeOnly

WIDTH = 512
BATCH = 32  # 32 x 512 x 512 multiply-adds are a large product


class Branch(nn.Module):
    """Two large layers, of which the second depends on what the first one put out; zeros would choose ``low``."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.low, self.high = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.last = nn.Linear(WIDTH, 2)
        nn.init.constant_(self.first.bias, 5.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh() + 1
        return self.last((self.high if self.positive(x) else self.low)(x))

    def positive(self, x: Tensor) -> bool:
        """Whether the mean is above one, found out in several ways."""
        found: Any = {
            "item": lambda: x.mean().item() > 1,
            "bool": lambda: bool((x > 1).any()),
            "numpy": lambda: x.numpy().mean() > 1,
            "tolist": lambda: x[0].tolist()[0] > 1,
            "nonzero": lambda: len((x.mean(1) - 1).clamp(min=0).nonzero()) > 0,
            "in place": lambda: torch.zeros_like(x).add_(x).sum().item() > x.numel(),
            "a part": lambda: self._part(x) > 1,
            "caught": lambda: self._caught(x),
        }[self.how]()
        return bool(found)

    def _part(self, x: Tensor) -> float:
        whole = torch.zeros(2, *x.shape)
        whole[1] = x
        return float(whole.sum() / x.numel())

    def _caught(self, x: Tensor) -> bool:
        try:
            return x.mean().item() > 1
        except Exception:  # noqa: BLE001 - that of a careless model
            return False


@pytest.mark.parametrize("how", ["item", "bool", "numpy", "tolist", "nonzero", "in place", "a part", "caught"])
def test_a_branch_that_depends_on_values_is_the_real_one(how: str) -> None:
    plan = etp.trace(Branch(how), torch.randn(BATCH, WIDTH), check=False)
    held = {piece.tensor for group in plan.groups for piece in group.slices}
    assert "high.weight" in held and "low.weight" not in held


class Routed(nn.Module):
    """Rows chosen by the largest score of a large layer."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.value, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.score(x).mean(1).topk(4).indices
        return self.last(self.value(x)[rows])


class Convolutions(nn.Module):
    """Large convolutions of every kind, and an attention, whose results have the shapes that were worked out."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 64, 5, stride=2, padding=1)
        self.b = nn.Conv2d(64, 64, 3, padding="same", groups=2)
        self.c = nn.ConvTranspose2d(64, 32, 4, stride=2, output_padding=1)
        self.norm, self.last = nn.BatchNorm2d(32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.c(self.b(self.a(x)).relu()).relu()).flatten(2).mT[:, ::16]
        return self.last(nn.functional.scaled_dot_product_attention(x, x, x, scale=0.1))


@pytest.mark.parametrize(
    ("model", "shape"), [(Convolutions(), (2, 3, 96, 96)), (Routed(), (BATCH, WIDTH)), (Branch("item"), (BATCH, WIDTH))]
)
def test_the_plan_is_that_of_a_forward_that_computes_everything(model: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape)
    with torch.inference_mode(False):
        whole = group_units(follow_forwards(model.eval(), x))
    assert etp.trace(model, x, check=False).fingerprint == whole.fingerprint


def test_large_products_are_not_computed() -> None:
    real = nn.functional.linear
    layer, last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
    hollow = ShapeOnly(active=True)
    out = hollow.call(real, (torch.ones(BATCH, WIDTH), layer.weight, layer.bias), {})
    assert out.shape == (BATCH, WIDTH) and out in hollow and not bool(out.any())
    small = hollow.call(real, (out, last.weight, last.bias), {})
    assert small in hollow and torch.equal(small, last.bias.expand(BATCH, 2)), "a small product is computed"
    with pytest.raises(NeedsValues):
        hollow.follow("argmax", [small], [small.argmax(1)])


def test_autocast_keeps_its_own_dtypes() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = etp.trace(model, torch.randn(BATCH, WIDTH), check=False)
    assert plan.prunable[0].n_units == WIDTH


class Failing(nn.Module):
    """Raises after a large layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        raise LookupError(f"no {tuple(self.first(x).shape)}")


def test_an_error_of_the_model_is_raised() -> None:
    with pytest.raises(LookupError, match="no "):
        etp.trace(Failing(), torch.randn(BATCH, WIDTH))


class Tables(nn.Module):
    """Two layers scaled by tables that are read in a given order, before anything else."""

    def __init__(self, order: tuple[str, ...]) -> None:
        super().__init__()
        self.order = order
        self.first, self.second, self.last = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)
        self.p, self.q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        table = {name: getattr(self, name) * 2 for name in self.order}
        return self.last(self.first(x) * table["p"]) + self.last(self.second(x) * table["q"])


def test_the_order_in_which_tables_are_read_changes_nothing() -> None:
    torch.manual_seed(0)
    plans = [etp.trace(Tables(order), torch.randn(2, 3), check=False) for order in (("p", "q"), ("q", "p"))]
    assert plans[0].fingerprint == plans[1].fingerprint


class Scaled(nn.Module):
    """An embedding, a computed scale, positions that depend on values of the input, and a copy from the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.last = nn.Embedding(11, 6), nn.Linear(6, 8), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.rand(8))
        self.register_buffer("shift", torch.rand(8))

    def forward(self, ids: Tensor) -> Tensor:
        length = int((ids > 0).sum())
        x = self.inner(self.table(ids[:length])) * (1 + self.scale)
        out: Tensor = self.last(x.relu_() + self.shift.to(ids.device))  # type: ignore[operator]
        return out


def test_a_model_on_the_meta_device_has_the_plan_of_the_real_one() -> None:
    ids = torch.tensor([1, 5, 7, 0])
    real = etp.trace(Scaled(), ids, check=False)
    with torch.device("meta"):
        model = Scaled()
    plan = etp.trace(model, ids)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert plan.groups[0].kind == real.groups[0].kind and plan.ops == real.ops
    names = [[(s.tensor, s.axis, s.index) for s in group.slices] for group in plan.groups]
    assert names == [[(s.tensor, s.axis, s.index) for s in group.slices] for group in real.groups]


def test_values_that_parameters_on_the_meta_device_cannot_give() -> None:
    with torch.device("meta"):
        model = Branch("item")
    with pytest.raises(etp.PlanError, match=r"meta device.*real device"):
        etp.trace(model, torch.randn(BATCH, WIDTH))
