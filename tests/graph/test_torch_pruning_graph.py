"""Our groups equal Torch-Pruning's wherever both are right, and the oracle tells who is right where they differ."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import etp_graph as etp
from benchmarks.models import registry
from etp_graph.integrations.torch_pruning import plan_from_depgraph
from etp_graph.plan import as_tensor
from tests.support.models.constructs import CASES, Net, chain, image
from tests.support.models.small_models import ZOO

tp = pytest.importorskip("torch_pruning")

Unit = frozenset[tuple[str, int, int]]


def depgraph(model: nn.Module, inputs: Any, **hints: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tp.DependencyGraph().build_dependency(model, inputs, verbose=False, **hints)


def units(groups: Iterable[etp.Group]) -> set[Unit]:
    """Every unit as the set of its (tensor, axis, position)."""
    found: set[Unit] = set()
    for group in groups:
        places: list[set[tuple[str, int, int]]] = [set() for _ in range(group.n_units)]
        for piece in group.slices:
            for position, unit in zip(as_tensor(piece.index).tolist(), as_tensor(piece.unit).tolist()):
                places[unit].add((piece.tensor, piece.axis, position))
        found |= {frozenset(place) for place in places}
    return found


def from_zoo(name: str) -> tuple[nn.Module, Tensor]:
    build, size = ZOO[name]
    model = build().eval()
    if hasattr(model, "aux1"):  # the graph is made in eval mode, where the auxiliary heads do not run
        model.aux1, model.aux2, model.aux_logits = None, None, False
    return model, image(1, 3, size, size)


def from_case(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return CASES[name].net().eval(), CASES[name].inputs or (image(),)


SAME_MODELS = (
    "alexnet", "vgg A", "vgg E bn", "resnet18 34", "resnet50 101 152", "densenet", "googlenet", "inception_v3",
    "squeezenet1_0", "mobilenet_v2", "mobilenet_v3_small", "mnasnet", "efficientnet b0-b7", "efficientnet v2",
    "convnext", "cifar resnet164", "cifar vgg19_bn", "cifar densenet40",
)  # fmt: skip
SAME_CONSTRUCTS = (
    "1d", "3d", "transposed 1d", "transposed 2d", "transposed 3d", "depthwise", "batch norm",
    "batch norm without weights", "group norm", "group norm without weights", "layer norm", "instance norm",
    "instance norm with weights", "prelu", "embedding", "embedding tied to the decoder", "layer scale", "chunk",
    "flatten", "squeeze and excitation", "channel attention", "upsampling", "residual", "shared layer",
)  # fmt: skip


@pytest.mark.parametrize("name", SAME_MODELS + SAME_CONSTRUCTS)
def test_same_units_and_both_right(name: str) -> None:
    model, inputs = from_zoo(name) if name in ZOO else from_case(name)
    ours = etp.trace(model, inputs, prune="all", check=False)
    theirs = plan_from_depgraph(depgraph(model, inputs), model, inputs)
    assert etp.verify(model, theirs, inputs, gradients=False, ratio=0.5).error < 1e-10
    assert units(theirs.groups) == units(ours.groups)
    assert units(theirs.prunable) == units(ours.prunable)
    assert theirs.ops == ours.ops
    blocks = {piece.tensor: group.blocks for group in ours.groups for piece in group.slices if group.blocks > 1}
    assert blocks == {piece.tensor: g.blocks for g in theirs.groups for piece in g.slices if g.blocks > 1}


@pytest.mark.parametrize(
    "name", ["resnet18 34", "squeezenet1_0", "mobilenet_v3_small", "chunk", "flatten", "layer norm"]
)
def test_bridge_says_what_the_graph_itself_says(name: str) -> None:
    """The parameters that lose entries when the graph's own group of one channel is pruned, and which entries."""
    model, inputs = from_zoo(name) if name in ZOO else from_case(name)
    graph = depgraph(model, inputs)
    plan = plan_from_depgraph(graph, model, inputs)
    owner = {place: unit for unit in units(plan.prunable) for place in unit}
    names = {module: name for name, module in model.named_modules()}
    compared = 0
    found = list(graph.get_all_groups())
    for group in found[:: max(len(found) // 6, 1)]:
        root = group[0].dep.target.module
        start = (f"{names[root]}.weight", 0, 1)
        if start not in owner:
            continue
        single = graph.get_pruning_group(root, group[0].dep.handler, [1])
        want = set()
        for dep, indices in single:
            weight = getattr(dep.target.module, "weight", None)
            if dep.target.module in names and weight is not None and weight.ndim > 1:
                into = graph.is_in_channel_pruning_fn(dep.handler) and not graph.is_out_channel_pruning_fn(dep.handler)
                want |= {(f"{names[dep.target.module]}.weight", int(into), i) for i in indices}
        assert {place for place in owner[start] if len(plan.tensors[place[0]]) > 1} == want
        compared += 1
    assert compared


GROUPED = ("grouped", "grouped, wider", "resnext", "regnet_x", "regnet_y")


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_convolutions_lose_whole_groups(name: str) -> None:
    """We remove groups of the convolution; Torch-Pruning one channel of each. Elsewhere the units are the same."""
    model, inputs = from_zoo(name) if name in ZOO else from_case(name)
    ours = etp.trace(model, inputs, prune="all", check=False)
    theirs = plan_from_depgraph(depgraph(model, inputs), model, inputs)
    for plan in (ours, theirs):
        assert etp.verify(model, plan, inputs, gradients=False, ratio=0.5).error < 1e-10
    grouped = {
        f"{path}.weight": m
        for path, m in model.named_modules()
        if isinstance(m, nn.Conv2d) and 1 < m.groups < m.in_channels
    }
    assert grouped
    for tensor, module in grouped.items():
        (mine,) = [g for g in ours.groups if any((s.tensor, s.axis) == (tensor, 0) for s in g.slices)]
        (other,) = [g for g in theirs.groups if any((s.tensor, s.axis) == (tensor, 0) for s in g.slices)]
        assert (mine.kind, mine.n_units, mine.blocks) == ("conv-groups", module.groups, 1)
        assert other.n_units == module.out_channels
        assert other.blocks == module.groups or other.locked is not None
    beside = [g for g in ours.groups if any((s.tensor, s.axis) == (tensor, 0) for s in g.slices for tensor in grouped)]
    touched = {piece.tensor for group in beside for piece in group.slices}

    def apart(plan: etp.Plan) -> set[Unit]:
        return {unit for unit in units(plan.groups) if not {place[0] for place in unit} & touched}

    assert apart(ours) == apart(theirs)


@pytest.mark.parametrize("name", ["channel shuffle", "sorted channels", "softmax over channels", "rms norm",
                                  "residual of the raw input", "split into fixed widths", "slice"])  # fmt: skip
def test_oracle_refutes_the_graph_where_it_guesses(name: str) -> None:
    model, inputs = from_case(name)
    theirs = plan_from_depgraph(depgraph(model, inputs), model, inputs)
    with pytest.raises(etp.EquivalenceError) as caught:
        etp.verify(model, theirs, inputs)
    assert caught.value.error > 1e-2


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("layer norm over everything", "'a' to positions [4, 5, 6, 7] of 'b', which has 4"),
        ("concatenation, inception", "'b' to positions [4, 5] of 'a', which has 4"),
        ("pixel shuffle", "of 'c', which has 4"),
        ("padded shortcut", "of 'a', which has 4"),
        ("bare kernels", "of 'w0', which has 3"),
        ("cifar resnet20", "of 'linear', which has 64"),
    ],
)
def test_impossible_indices_name_the_layer(name: str, layer: str) -> None:
    model, inputs = from_zoo(name) if name in ZOO else from_case(name)
    with pytest.raises(etp.PlanError) as caught:
        plan_from_depgraph(depgraph(model, inputs), model, inputs)
    assert layer in str(caught.value)


class _Broken:
    """An index mapping gone wrong."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, pairs: list[Any]) -> list[Any]:
        if self.kind == "twice":
            return [*pairs, pairs[0]]
        if self.kind == "rootless":
            return [pair._replace(root_idx=None) for pair in pairs]
        return [pair._replace(idx=pair.idx + 1) for pair in pairs]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("twice", r"edge 'a' -> '_ElementWiseOp.*' maps to the positions \[0\] twice"),
        ("rootless", "does not say where its indices come from"),
        ("endless", r"units of 'a' to positions \[\d+\] of"),
    ],
)
def test_broken_mappings_end_in_an_error(kind: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mapping that counts up on a circle of operators never ends in Torch-Pruning; here it meets a bound."""
    model = chain(nn.Linear(6, 8), nn.ReLU(), nn.Tanh(), nn.Linear(8, 3))
    graph = depgraph(model, image(4, 6))
    for node in graph.module2node.values():
        for dep in node.dependencies:
            if {type(node.module).__name__, type(dep.target.module).__name__} == {"_ElementWiseOp"}:
                dep.index_mapping[0] = _Broken(kind)
    with pytest.raises(etp.PlanError, match=message):
        plan_from_depgraph(graph, model, image(4, 6))


class RmsPruner(tp.BasePruningFunc):  # type: ignore[misc]
    """The hint that Torch-Pruning asks its users for."""

    def prune_out_channels(self, layer: nn.RMSNorm, idxs: list[int]) -> nn.Module:
        keep = [i for i in range(layer.normalized_shape[-1]) if i not in set(idxs)]
        layer.normalized_shape = (len(keep),)
        layer.weight = self._prune_parameter_and_grad(layer.weight, keep, 0)
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: nn.RMSNorm) -> int:
        return layer.normalized_shape[-1]

    get_in_channels = get_out_channels


class HeadsPruner(RmsPruner):
    """Removes two positions for every unit of the norm's first half: no set of positions a unit."""

    def prune_out_channels(self, layer: nn.RMSNorm, idxs: list[int]) -> nn.Module:
        return super().prune_out_channels(layer, sorted({i % 4 for i in idxs} | {i % 4 + 4 for i in idxs}))

    prune_in_channels = prune_out_channels


def test_customized_pruners_are_read_off_their_effect() -> None:
    model, inputs = from_case("rms norm")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = depgraph(model, inputs, customized_pruners={nn.RMSNorm: RmsPruner()})
    plan = plan_from_depgraph(graph, model, inputs)
    ours = etp.trace(model, inputs)
    assert units(plan.prunable) == units(ours.prunable)
    assert {(a.module, a.name) for a in plan["a"].attributes} == {(a.module, a.name) for a in ours["a"].attributes}
    assert etp.verify(model, plan, inputs).error < 1e-10
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    graph = depgraph(model, inputs, customized_pruners={nn.RMSNorm: HeadsPruner()})
    with pytest.raises(etp.PlanError, match=r"pruner of 'b' (cuts .* of weight with several units|changes)"):
        plan_from_depgraph(graph, model, inputs)


def scaled() -> Net:
    weight = nn.Parameter(torch.ones(4, 8))
    return Net(lambda n, x: n.b((n.a(x) * n.w).mean(1)), a=nn.Linear(6, 8), b=nn.Linear(8, 3), w=weight)


@pytest.mark.parametrize(("dim", "right"), [(1, True), (0, False)])
def test_unwrapped_parameters_are_cut_where_the_user_says(dim: int, right: bool) -> None:
    model, inputs = scaled(), image(2, 4, 6)
    graph = depgraph(model, inputs, unwrapped_parameters=[(model.w, dim)])
    if right:
        plan = plan_from_depgraph(graph, model, inputs)
        assert ("w", 1) in {(s.tensor, s.axis) for s in plan["a"].slices}
        assert etp.verify(model, plan, inputs).error < 1e-10
    else:
        with pytest.raises(etp.PlanError, match=r"positions \[4, 5, 6, 7\] of 'w', which has 4"):
            plan_from_depgraph(graph, model, inputs)


def test_plan_serves_the_whole_library() -> None:
    """Regularizer, allocation, surgery and JSON on a plan of the graph; ignored layers keep their units."""
    model, inputs = from_case("residual")
    plan = plan_from_depgraph(depgraph(model, inputs), model, inputs)
    assert etp.Plan.from_json(plan.to_json()) == plan
    selection = etp.allocate(model, plan, torch.rand(plan.n_units), budget=etp.Budget(speed_up=1.5))
    want = etp.cost(model, plan, selection).params
    etp.prune_(model, plan, selection)
    assert sum(p.numel() for p in model.parameters()) == want
    model, inputs = from_case("residual")
    plan = plan_from_depgraph(depgraph(model, inputs), model, inputs, ignored_layers=[model.b])
    assert plan["a"].locked == "ignored"


@pytest.mark.parametrize(
    "make", [lambda m: depgraph(CASES["residual"].net(), (image(),)), lambda m: tp.DependencyGraph()]
)
def test_foreign_graph_is_refused(make: Callable[[nn.Module], Any]) -> None:
    model, inputs = from_case("residual")
    with pytest.raises(etp.PlanError, match="not built for this model"):
        plan_from_depgraph(make(model), model, inputs)


def test_weights_computed_while_running_are_refused() -> None:
    model, inputs = from_case("weight norm")
    with pytest.raises(etp.PlanError, match="a weight of 'b' is computed while running"):
        plan_from_depgraph(depgraph(model, inputs), model, inputs)


def test_oracle_refutes_a_shifted_bridge() -> None:
    """A plan of the graph with one map turned by one is wrong, and is found to be."""
    model, inputs = from_case("flatten")
    plan = plan_from_depgraph(depgraph(model, inputs), model, inputs)
    group = plan["a"]
    turned = tuple(replace(s, index=as_tensor(s.index).roll(1)) if s.tensor == "d.weight" else s for s in group.slices)
    with pytest.raises(etp.EquivalenceError):
        etp.verify(model, replace(plan, groups=(replace(group, slices=turned), *plan.groups[1:])), inputs)


@pytest.mark.parametrize("name", ["resnet18", "hf:bert"])
def test_trace_takes_the_graph_as_a_source(name: str) -> None:
    entry = registry()[name]
    torch.manual_seed(0)
    model, inputs = entry.build(), entry.small()
    plan = etp.trace(model, inputs, graph="torch-pruning")
    assert plan.prunable
    assert etp.verify(model, plan, inputs).error < 1e-6
    assert plan.dense.params == sum(p.numel() for p in model.parameters())


def test_an_unknown_source_is_refused() -> None:
    with pytest.raises(etp.PlanError, match="labels"):
        etp.trace(nn.Linear(2, 2), torch.ones(1, 2), graph="onnx")  # type: ignore[arg-type]
