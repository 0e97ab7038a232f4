"""Products with stored matrices and stacks of them, and widths that the code compares by order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp
from tests.support.selections import without_first_units

EDGES = torch.randint(0, 20, (2, 60), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))


class Around(nn.Module):
    """A layer of width 8 between two others."""

    def __init__(self, layer: nn.Module, *, twice: bool = False) -> None:
        super().__init__()
        self.before, self.layer, self.after, self.twice = nn.Linear(6, 8), layer, nn.Linear(8, 3), twice

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        h = torch.relu(self.before(x))
        return self.after(torch.relu(self.layer(h, h, *rest) if self.twice else self.layer(h, *rest)))


class Stack(nn.Module):
    """Four matrices that read the same units; their results are added up."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8, 8))
        self.bias = nn.Parameter(torch.randn(4, 1, 8)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        wide = x.unsqueeze(0).expand(4, -1, -1)
        out = torch.bmm(wide, self.weight) if self.bias is None else torch.baddbmm(self.bias, wide, self.weight)
        return torch.relu(out).sum(0)


class Residual(nn.Module):
    """A product that is added to its own input, as in GCNII."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(x, x, self.weight, beta=0.7, alpha=0.3)


class Padding(nn.Module):
    """Pads inputs that are narrower than it expects."""

    def __init__(self, width: int | None) -> None:
        super().__init__()
        self.width, self.inner = width, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        width = 8 if self.width is None else self.width
        if x.shape[1] < width:
            x = nn.functional.pad(x, (0, width - x.shape[1]))
        return self.inner(x)


def assert_open(model: nn.Module, *inputs: Tensor, group: str = "before") -> None:
    """Assert that a group can be pruned by the plan alone, without the check, and that masking equals pruning."""
    plan = etp.trace(model.eval(), inputs, check=False)
    assert {each.name: each.locked for each in plan.groups}[group] is None
    etp.verify(model, plan, inputs)
    scores = etp.criteria.random(model, plan)
    selection = etp.allocate(model, plan, scores, budget=etp.Budget(params=0.6))
    predicted = etp.cost(model, plan, selection)
    etp.prune_(model, plan, selection)
    again = etp.cost(model, etp.trace(model, inputs, check=False))
    assert (again.macs, again.params) == (predicted.macs, predicted.params)
    assert model(*inputs).shape == (20, 3)


@pytest.mark.parametrize("layer", [Stack(bias=False), Stack(bias=True), Residual(), Padding(8)], ids=repr)
def test_layers_with_stored_products_and_compared_widths_are_open(layer: nn.Module) -> None:
    assert_open(Around(layer), IMAGES)


TYPES = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(2))


class Typed(nn.Module):
    """A matrix for each type of rows, gathered by the types."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.weight = how, nn.Parameter(torch.randn(3, 8, 8))
        self.types = TYPES[:20]

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.weight[self.types] if self.how != "index_select" else self.weight.index_select(0, self.types)
        if self.how == "also elementwise":
            return torch.bmm(x.unsqueeze(1), chosen).squeeze(1) + chosen.abs().sum((1, 2))[:, None]
        if self.how == "turned":
            return torch.bmm(chosen.mT, x.unsqueeze(2)).squeeze(2)
        return torch.matmul(x.unsqueeze(-2), chosen).squeeze(-2)


@pytest.mark.parametrize("how", ["index", "index_select"])
def test_matrices_that_an_index_chooses_are_open(how: str) -> None:
    assert_open(Around(Typed(how)), IMAGES)
    assert_open(Around(Typed(how)), IMAGES, group="layer")


@pytest.mark.parametrize("how", ["also elementwise", "turned"])
def test_other_uses_of_chosen_matrices_lock(how: str) -> None:
    model = nn.Sequential(Around(Typed(how)), nn.Linear(3, 5), nn.Linear(5, 2)).eval()
    plan = etp.trace(model, IMAGES, check=False)
    assert [group.name for group in plan.prunable if group.name.startswith("0.layer")] == []
    assert etp.verify(model, plan, IMAGES).error < 1e-10


@pytest.mark.parametrize("name", ["fast rgcn", "rgat", "rgat, edges", "arma, one stack"])
def test_graph_convolutions_with_types_of_edges_are_right(name: str) -> None:
    pyg = pytest.importorskip("torch_geometric.nn")
    layer, rest = {
        "fast rgcn": lambda: (pyg.FastRGCNConv(8, 8, 3), (TYPES,)),
        "rgat": lambda: (pyg.RGATConv(8, 4, 3, heads=2), (TYPES,)),
        "rgat, edges": lambda: (pyg.RGATConv(8, 4, 3, heads=2, edge_dim=5), (TYPES, torch.randn(60, 5))),
        "arma, one stack": lambda: (pyg.ARMAConv(8, 8), ()),
    }[name]()
    model = Around(layer).eval()
    plan = etp.trace(model, (IMAGES, EDGES, *rest), prune="all", check=False)
    assert plan["before"].locked is None
    assert etp.verify(model, plan, (IMAGES, EDGES, *rest)).error < 1e-10


class Grown(nn.Module):
    """Fills up its input to a width of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.inner = 12, nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.cat([x, x.new_zeros(len(x), self.width - x.shape[1])], 1))


class Flat(nn.Module):
    """Two layers, whose widths the code writes as the same product of attributes."""

    def __init__(self, *, folds: bool) -> None:
        super().__init__()
        self.heads, self.size, self.folds = 2, 4, folds
        self.a, self.b, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).view(len(x), self.heads, self.size) if self.folds else self.a(x)
        return self.out(a.reshape(-1, self.heads * self.size) * self.b(x).view(-1, self.heads * self.size))


class Pieces(nn.Module):
    """Splits into a part that an attribute counts and a multiple of it."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.ratio = 2, 3
        self.a, self.b = nn.Linear(2, 8), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.split([self.size, self.ratio * self.size], -1)
        return self.a(first) + self.b(second)


class OwnHeads(nn.Module):
    """Folds its own width into heads, whose size the code computes, as einops does."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.a, self.b, self.out = 2, nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, v = (self._fold(layer(x)) for layer in (self.a, self.b))
        return self.out(((q @ q.mT * 0.3).softmax(-1) @ v).transpose(0, 1).flatten(1))

    def _fold(self, y: Tensor) -> Tensor:
        return torch.reshape(y, (len(y), self.heads, y.shape[1] // self.heads)).transpose(0, 1)


def test_a_quotient_of_two_numbers_of_the_same_units_stays_as_it_is() -> None:
    model = Around(OwnHeads()).eval()
    plan = etp.trace(model, IMAGES, prune="all", check=False)
    assert [group.n_units for group in plan.prunable if group.kind == "heads"] == [2]
    assert etp.verify(model, plan, IMAGES).error < 1e-10


def test_other_axes_of_an_unflattened_tensor_are_not_written_numbers() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Unflatten(0, (4, 5)), nn.Linear(8, 3)).eval()
    assert [group.n_units for group in etp.trace(model, IMAGES, check=False).prunable] == [8]


@pytest.mark.parametrize("layer", [Grown(), Pieces(), Flat(folds=True), Flat(folds=False)])
def test_sizes_that_are_computed_from_several_numbers_are_right(layer: nn.Module) -> None:
    model = nn.Sequential(Around(layer), nn.Linear(3, 5), nn.Linear(5, 2)).eval()
    plan = etp.trace(model, IMAGES, prune="all", check=False)
    assert etp.verify(model, plan, IMAGES).error < 1e-10


class Cut(nn.Module):
    """Cuts a layer of 12 channels into the first 4 and the other 8, at ends that are computed."""

    def __init__(self, cut: Callable[[Cut, Tensor], Sequence[Tensor]]) -> None:
        super().__init__()
        self.first, self.ratio, self.width, self.cut = 4, 2, 12, cut
        self.layer, self.a, self.b = nn.Linear(6, 12), nn.Linear(4, 5), nn.Linear(8, 5)
        self.out = nn.Sequential(nn.ReLU(), nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        first, rest = self.cut(self, self.layer(x))
        return self.out(self.a(first.tanh()) + self.b(rest.relu()))


CUTS: dict[str, Callable[[Cut, Tensor], Sequence[Tensor]]] = {
    "a multiple of an attribute": lambda m, y: (y[:, : m.first], y[:, m.first : m.first + m.ratio * m.first]),
    "a multiple by a plain number": lambda m, y: (y[:, : m.first], y[:, m.first : 3 * m.first]),
    "a multiple from the end": lambda m, y: (y[:, : m.first], y[:, -2 * m.first :]),
    "narrow": lambda m, y: (y.narrow(1, 0, m.first), y.narrow(1, m.first, m.ratio * m.first)),
    "parts of a size": lambda m, y: y.split([y.shape[1] // 3, y.shape[1] - y.shape[1] // 3], 1),
    "parts of an attribute": lambda m, y: y.split([m.width // 3, m.width // 3 * 2], 1),
    "a rounded part of a size": lambda m, y: (y[:, : y.shape[1] // 3], y[:, y.shape[1] // 3 :]),
    "a number that an attribute leaves over": lambda m, y: (y[:, : m.first], y[:, m.width - 2 * m.first :]),
    "a difference": lambda m, y: (y[:, : m.first], y[:, m.first : m.width]),
    "an attribute and the rest": lambda m, y: (y[:, : m.first], y[:, m.first :]),
}


@pytest.mark.parametrize("cut", CUTS)
def test_cuts_at_computed_ends_are_right_without_the_check(cut: str) -> None:
    model, x = Cut(CUTS[cut]).eval(), torch.randn(5, 6)
    plan = etp.trace(model, x, prune="all", check=False)
    assert {group.name for group in plan.prunable} >= {"a"}
    assert etp.verify(model, plan, x).error < 1e-10


def test_an_attribute_and_the_rest_are_open() -> None:
    plan = etp.trace(Cut(CUTS["an attribute and the rest"]).eval(), torch.randn(5, 6), check=False)
    assert [group.n_units for group in plan.prunable if group.name.startswith("layer")] == [4, 8]


def test_a_dense_weight_as_a_convolution_is_open() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv1d(x.T[None], self.inner.weight.unsqueeze(-1), self.inner.bias)[0].T

    assert_open(Around(Shared()), IMAGES)


@pytest.mark.parametrize("name", ["arma", "gated", "gcn2", "gcn2-own-weights"])
def test_graph_convolutions_are_open(name: str) -> None:
    pyg = pytest.importorskip("torch_geometric.nn")
    layer, twice = {
        "arma": lambda: (pyg.ARMAConv(8, 8, num_stacks=2, num_layers=2), False),
        "gated": lambda: (pyg.GatedGraphConv(8, num_layers=3), False),
        "gcn2": lambda: (pyg.GCN2Conv(8, alpha=0.5, theta=0.3, layer=1), True),
        "gcn2-own-weights": lambda: (pyg.GCN2Conv(8, alpha=0.5, theta=0.3, layer=1, shared_weights=False), True),
    }[name]()
    assert_open(Around(layer, twice=twice), IMAGES, EDGES)


def test_a_width_that_is_below_a_plain_number_after_surgery_is_locked() -> None:
    plan = etp.trace(Around(Padding(None)).eval(), IMAGES, check=False)
    assert {group.name: group.locked for group in plan.groups}["before"] is not None


class AtMost(nn.Module):
    """Refuses inputs that are wider than it expects."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] <= 8
        return self.inner(x)


def test_an_upper_bound_of_a_width_locks_nothing() -> None:
    assert_open(Around(AtMost()), IMAGES)


class Router(nn.Linear):
    """A linear layer with a size of its own, such as the number of experts."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.width = 8

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(-1, self.width)


def test_a_size_that_a_subclass_of_a_layer_has_of_its_own_is_lowered() -> None:
    model = Around(Router())
    assert_open(model, IMAGES, group="layer")
    assert model.layer.width == model.layer.out_features < 8


class Shortcut(nn.Module):
    """Adds two widths; the code asks for them before it projects."""

    def __init__(self, asks: Callable[[Tensor, Tensor, Shortcut], bool]) -> None:
        super().__init__()
        self.asks, self.project = asks, nn.Linear(8, 12)
        self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        y = torch.relu(self.b(x))
        return self.out((self.project(x) if self.asks(x, y, self) else x) + y)


QUESTIONS: dict[str, Callable[[Tensor, Tensor, Shortcut], bool]] = {
    "sizes": lambda x, y, m: x.shape[1] != y.shape[1],
    "shapes": lambda x, y, m: x.shape != y.shape,
    "equal": lambda x, y, m: [True, False][x.size(-1) == y.size(-1)],
    "order": lambda x, y, m: x.size(1) < y.size(1),
    "layers": lambda x, y, m: x.shape[-1] != m.b.out_features,
    "attributes": lambda x, y, m: m.b.in_features != m.b.out_features,
    "plain": lambda x, y, m: y.shape[-1] > 8,
    "computed": lambda x, y, m: 2 * y.shape[-1] > 2 * x.shape[-1],
    "a part": lambda x, y, m: y.shape[-1] // 2 != x.shape[-1] // 2,
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_widths_that_the_code_compares_stay_different(question: str) -> None:
    model = Shortcut(QUESTIONS[question]).eval()
    plan = etp.trace(model, IMAGES, check=False)
    groups = {group.name: group for group in plan.prunable}
    least = 10 if question == "a part" else 9
    assert groups["b"].min_units == least and any("compares widths" in note for note in plan.notes)
    with pytest.raises(etp.SelectionError, match=f"at least {least}"):
        etp.Selection({"b": torch.arange(12) >= 4}).check(plan)  # 8 are left, as many as the other layer has
    assert etp.verify(model, plan, IMAGES).error < 1e-10


class OwnMatrices(nn.Module):
    """Each head has a stored matrix of its own, as in the gates of RG-LRU."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.heads, self.size = how, 4, 3
        out = 5 if how == "wide" else 3
        self.first, self.last = nn.Linear(5, 12), nn.Linear(4 * out, 3)
        self.matrices, self.bias = nn.Parameter(torch.randn(4, 3, out)), nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).view(len(x), self.heads, self.size)
        if self.how == "einsum":
            y = torch.einsum("nhd,hde->nhe", y, self.matrices)
        elif self.how == "baddbmm":
            y = torch.baddbmm(self.bias[:, None], y.transpose(0, 1), self.matrices).transpose(0, 1)
        else:
            y = (y.transpose(0, 1) @ self.matrices).transpose(0, 1)
        return self.last(y.flatten(1))


@pytest.mark.parametrize("how", ["einsum", "baddbmm", "matmul", "wide"])
def test_heads_with_a_stored_matrix_each(how: str) -> None:
    torch.manual_seed(0)
    model, x = OwnMatrices(how).eval(), torch.randn(6, 5)
    plan = etp.trace(model, x, prune="all")
    assert sorted(group.kind for group in plan.prunable) == ["head_dims", "heads", "neurons"]
    etp.verify(model, plan, x)
    selection = without_first_units(plan)
    expected = etp.cost(model, plan, selection)
    etp.prune_(model, plan, selection)
    assert len(model.matrices) == 3
    assert etp.cost(model, etp.trace(model, x, prune="all")).macs == expected.macs


class UsedTwice(nn.Module):
    """A parameter whose rows are units in one place, and a matrix in another."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.last, self.other = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(5, 4)
        self.table, self.scale = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, other, table = self.first(x), self.other(x), self.table.exp()
        if self.how == "vector":
            return self.last(y * self.scale.exp()), other.sum(-1, keepdim=True).expand(-1, 8) @ self.scale.exp()
        y = (y[..., None] * table).sum(-1)
        return self.last(y), other @ table.t() if self.how == "right" else torch.ones(2, 8) @ table


@pytest.mark.parametrize("how", ["vector", "right", "left"])
def test_an_unchecked_plan_locks_units_of_a_parameter_that_is_also_a_matrix(how: str) -> None:
    both = nn.ModuleDict({"used": UsedTwice(how), "free": nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 2))})
    both.forward = lambda x: (both["used"](x), both["free"](x))  # type: ignore[method-assign]
    plan = etp.trace(both.eval(), torch.randn(2, 5), check=False)
    assert [group.n_units for group in plan.prunable if group.name == "free.0"] == [6]
    assert all(group.locked is not None for group in plan.groups if group.name == "used.first")
