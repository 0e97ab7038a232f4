"""Plans from Torch-Pruning's dependency graph (Fang et al. 2023, "DepGraph").

The nodes and edges of the graph are read. Its own enumeration of groups is not used, because it has no bound. A *side*
is a layer with one of its two pruning functions. Its positions get labels, the index mappings of the edges unite them,
and groups are built from the labels as in :func:`etp_graph.trace`. The graph may be wrong; :func:`etp_graph.verify`
tells.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from etp_graph.errors import PlanError
from etp_graph.graph.rules._terms import cost_terms
from etp_graph.model import Outputs, counting_attributes, eval_mode, kept_generators, named_tensors, run_outputs
from etp_graph.plan import NO_UNIT, Plan
from etp_graph.standins import standing_in

from ._counted_sizes import counted_sizes
from ._grouping import build_groups
from ._interception import run_followed
from ._labels import Labels, Producer, TensorAxis
from ._probe import probe_pruner
from ._trackers import Trackers

_KINDS: dict[type[nn.Module], str] = {nn.Linear: "neurons", nn.Embedding: "features"}


def plan_from_depgraph(
    graph: Any, model: nn.Module, example_inputs: Any, *, ignored_layers: Sequence[nn.Module] = ()
) -> Plan:
    """Return the plan that a built dependency graph describes; check it with :func:`etp_graph.verify`.

    Channels that Torch-Pruning (Fang et al. 2023, "DepGraph") removes together become one unit. Costs and modes come
    from a forward of this library. The model does not change.

    Args:
        graph: a ``torch_pruning.DependencyGraph`` after ``build_dependency``, with its ``unwrapped_parameters`` and
            ``customized_pruners``. Customized pruners are run on copies of their layers, to find out what they cut.
        model: the model that the graph was built for.
        example_inputs: as for :func:`etp_graph.trace`.
        ignored_layers: modules whose output units must all stay, as in ``DependencyGraph.get_all_groups``.

    Returns:
        The plan. Units that reach the model's output are locked.

    Raises:
        PlanError: the graph belongs to another model or is not built; an edge maps an index beyond the size of its
            layer, or twice, or never stops mapping; or a pruner cuts something that is not a set of positions.
    """
    if getattr(graph, "model", None) is not model or not hasattr(graph, "module2node"):
        raise PlanError(
            "the dependency graph was not built for this model: call graph.build_dependency(model, ...) first."
        )
    return _plan_of_labels(model, example_inputs, _labels_of(graph, model, ignored_layers, lock_wrong_edges=False))


def trace_with_torch_pruning(model: nn.Module, example_inputs: Any, outputs: Outputs = None) -> Plan:
    """Build Torch-Pruning's dependency graph of a model and read its plan. Nothing is checked.

    Edges that map units to impossible positions lock these units, because one edge that the graph library guessed wrong
    need not cost the other groups.

    Raises:
        PlanError: Torch-Pruning is not installed or cannot build its graph.
    """
    graph = _built_graph(model, example_inputs, outputs)
    labels = _labels_of(graph, model, (), lock_wrong_edges=True)
    return _plan_of_labels(model, example_inputs, labels, outputs)


def _built_graph(model: nn.Module, example_inputs: Any, outputs: Outputs) -> Any:
    """Build the graph in eval mode, with gradients, because Torch-Pruning follows autograd nodes."""
    try:
        import torch_pruning as tp
    except ModuleNotFoundError as error:
        raise PlanError("graph='torch-pruning' needs the package torch-pruning: pip install torch-pruning.") from error

    def run(model: nn.Module, inputs: Any) -> list[Tensor]:
        return list(run_outputs(model, inputs, outputs).tensors.values())

    graph = tp.DependencyGraph()
    with eval_mode(model), standing_in(model), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of every bare parameter; the plan shows what became of them
        try:
            graph.build_dependency(model, example_inputs, run, verbose=False)
        except Exception as error:  # whatever another library raises, the remedy is the same
            raise PlanError(
                f"Torch-Pruning cannot build its dependency graph of this model ({type(error).__name__}: {error}): use "
                "the default, graph='labels'."
            ) from error
    return graph


def _labels_of(graph: Any, model: nn.Module, ignored: Sequence[nn.Module], *, lock_wrong_edges: bool) -> Labels:
    """Return the labels of all positions that the graph connects."""
    names = {module: name for name, module in model.named_modules()}
    walk = _Walk(graph, names, lock_wrong_edges=lock_wrong_edges)
    walk.run()
    _Writer(walk, model, names).write(ignored)
    return walk.labels


def _plan_of_labels(model: nn.Module, example_inputs: Any, labels: Labels, outputs: Outputs = None) -> Plan:
    trackers = Trackers(model, outputs=outputs)
    tracker = trackers.all[0]
    parameters = tuple(name for name, _ in model.named_parameters())
    modes = ["eval"]
    for containers in (False, True):
        n_ops, n_seen = len(tracker.ops), len(tracker.weights.seen)
        if containers and not set(parameters) - tracker.weights.seen:
            break
        with kept_generators(model), counted_sizes(model), torch.no_grad():
            found = run_followed(trackers, example_inputs, containers=containers)
            trackers.left_out |= dict.fromkeys(found.left_out)
        if containers:
            del tracker.ops[n_ops:]  # the cost is that of eval mode
            modes += ["train"] * (len(tracker.weights.seen) > n_seen)
    # The axes of activations keep their sizes: the graph does not say which units lie along them.
    ops, activations, _ = cost_terms(tracker.ops)
    tensors = dict(named_tensors(model))
    return Plan(
        groups=build_groups(labels, {}),
        tensors={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        parameters=parameters,
        ops=ops,
        activations=activations,
        uncounted=tuple(sorted(tracker.uncounted)),
        modes=tuple(modes),
        unreached=tuple(name for name in parameters if name not in tracker.weights.seen),
        notes=("groups of a torch_pruning.DependencyGraph",),
        device=next(iter(tensors.values())).device.type,
        outputs=outputs,
        left_out=tuple(trackers.left_out),
    )


@dataclass(slots=True, eq=False)
class _Side:
    """Output or input side of a node, with a label for each position that the walk has reached (0: none)."""

    node: Any
    handler: Callable[..., Any]
    name: str
    size: int | None
    ids: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64, device="cpu"))

    @property
    def is_out(self) -> bool:
        """Return True if the side holds the units that its layer produces."""
        pruner: Any = self.handler.__self__  # type: ignore[attr-defined]
        return bool(self.handler == pruner.prune_out_channels)

    @property
    def is_in(self) -> bool:
        """Return True if the side holds the units that its layer reads.

        In norms and depthwise layers, one side holds both.
        """
        pruner: Any = self.handler.__self__  # type: ignore[attr-defined]
        return bool(self.handler == pruner.prune_in_channels)


class _Walk:
    """Walk that labels every side and unites positions that edges connect. It visits each position of a side once."""

    def __init__(self, graph: Any, names: dict[nn.Module, str], *, lock_wrong_edges: bool) -> None:
        from torch_pruning import _helpers
        from torch_pruning.dependency import index_mapping

        index_mapping.update_index_mapping(graph)  # as Torch-Pruning itself does before it collects a group
        self.graph = graph
        self.labels = Labels()
        self.sides: dict[tuple[Any, Any], _Side] = {}
        self._names = names
        self.lock_wrong_edges = lock_wrong_edges
        self._index = _helpers._HybridIndex
        self._queue: list[tuple[_Side, Tensor, str]] = []

    def run(self) -> None:
        """Walk from every layer along the edges, and label the positions that are reached."""
        nodes = list(self.graph.module2node.values())
        for node in nodes:
            pruner = self.graph.get_pruner_of_module(node.module)
            for handler in (pruner.prune_out_channels, pruner.prune_in_channels):
                side = self._side_of(node, handler)
                if side.size is not None and len(side.ids) == 0:
                    side.ids = self.labels.new_labels(side.size)
                    self._queue.append((side, torch.arange(side.size, device="cpu"), side.name))
        self._limit = sum(side.size or 0 for side in self.sides.values())
        while self._queue:
            side, index, near = self._queue.pop()
            for dep in side.node.dependencies:
                if dep.is_triggered_by(side.handler):
                    self._follow_edge(dep, side, index, near)

    def _side_of(self, node: Any, handler: Any) -> _Side:
        key = (node, handler)
        if key not in self.sides:
            pruner = handler.__self__
            pruner.pruning_dim = node.pruning_dim
            count = pruner.get_out_channels if handler == pruner.prune_out_channels else pruner.get_in_channels
            output = type(node.module).__name__ == "_OutputOp"
            name = self._names.get(node.module) or self.graph._param_to_name.get(node.module) or str(node.name)
            self.sides[key] = _Side(node, handler, name, None if output else count(node.module))
        return self.sides[key]

    def _follow_edge(self, dep: Any, side: _Side, index: Tensor, near: str) -> None:
        target = self._side_of(dep.target, dep.handler)
        try:
            source, to = self._existing_positions(dep, index, target, near)
        except PlanError as error:
            if not self.lock_wrong_edges:
                raise
            self.labels.lock(side.ids[index], f"Torch-Pruning: {error}")
            return
        if len(to) == 0:
            return
        near = target.name if target.size is not None else near
        width = int(to.max()) + 1
        if width > len(target.ids):
            target.ids = torch.cat([target.ids, target.ids.new_zeros(width - len(target.ids))])
        new = to[target.ids[to] == 0].unique()
        target.ids[new] = self.labels.new_labels(len(new))
        self.labels.unite(side.ids[source], target.ids[to], "")
        if len(new):
            self._queue.append((target, new, near))

    def _existing_positions(self, dep: Any, index: Tensor, target: _Side, near: str) -> tuple[Tensor, Tensor]:
        """Return the positions at the source and at the target of an edge, all of which exist."""
        source, to = self._map_indices(dep, index, f"{near!r} -> {target.name!r}")
        top = self._limit if target.size is None else target.size
        beyond = to[(to < 0) | (to >= top)]
        if len(beyond):
            raise PlanError(
                f"the dependency graph maps units of {near!r} to positions {beyond[:8].tolist()} of {target.name!r}, "
                f"which has {top}: give the graph a customized pruner for what lies between, or use etp_graph.trace."
            )
        return source, to

    def _map_indices(self, dep: Any, index: Tensor, where: str) -> tuple[Tensor, Tensor]:
        """Apply the edge's index mappings. Return pairs of a position at its source and one at its target."""
        mappings = [mapping for mapping in dep.index_mapping if mapping is not None]
        if not mappings:
            return index, index
        pairs: Any = [self._index(idx=i, root_idx=i) for i in index.tolist()]
        for mapping in mappings:
            pairs = mapping(pairs)
        if any(pair.root_idx is None for pair in pairs):
            raise PlanError(f"an index mapping of the edge {where} does not say where its indices come from.")
        if len(set(pairs)) != len(pairs):
            twice = sorted({pair.idx for pair in pairs if pairs.count(pair) > 1})
            raise PlanError(f"the edge {where} maps to the positions {twice[:8]} twice.")
        both = torch.tensor([tuple(pair) for pair in pairs], dtype=torch.int64, device="cpu").view(-1, 2)
        return both[:, 1], both[:, 0]


class _Writer:
    """Record the labels of the sides for the tensors and attributes that their pruning functions cut."""

    def __init__(self, walk: _Walk, model: nn.Module, names: dict[nn.Module, str]) -> None:
        self._lock_wrong_edges = walk.lock_wrong_edges
        self.labels, self._spared = walk.labels, walk.graph.ignored_params
        order = {module: i for i, module in enumerate(names)}
        self._sides = sorted(walk.sides.values(), key=lambda side: order.get(side.node.module, len(order)))
        self._tensors = {id(tensor): name for name, tensor in named_tensors(model)}

    def write(self, ignored: Sequence[nn.Module]) -> None:
        """Record all sides in the order of the model's modules, and lock ignored units and those of the output."""
        for side in self._sides:
            module = side.node.module
            if side.is_out and any(module is other for other in ignored):
                self.labels.lock(side.ids, "ignored")
            output = type(module).__name__ == "_OutputOp"
            if output or (side.is_out and not side.node.outputs):
                self.labels.lock(side.ids, "feeds the model's output")
            if not output and side.size and not any(module is other for other in self._spared):
                self._write_or_lock(side)

    def _write_or_lock(self, side: _Side) -> None:
        try:
            self._write_side(side)
        except PlanError as error:
            if not self._lock_wrong_edges:
                raise
            self.labels.lock(side.ids, f"Torch-Pruning: {error}")

    def _write_side(self, side: _Side) -> None:
        module = side.node.module
        places = _sliced_tensors(side)
        if places is None:
            axes = self._probe_axes(side)
        else:
            axes = [self._add_axis(side, tensor, axis, side.ids) for tensor, axis in places if tensor is not None]
            self._count_attributes(side)
        makes = isinstance(module, nn.modules.conv._ConvNd | nn.Linear | nn.Embedding)
        if axes and side.is_out and (makes or (places is None and not side.is_in)):
            kind = next((kind for cls, kind in _KINDS.items() if isinstance(module, cls)), "channels")
            self.labels.producers.setdefault(axes[0], Producer(axes[0], side.name, kind))
        if isinstance(module, nn.GroupNorm) and module.num_groups > 1:
            self.labels.blocks.append((side.ids, module.num_groups, side.name, None))
        if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1 and not (side.is_in and side.is_out):
            self.labels.blocks.append((side.ids, module.groups, side.name, None))

    def _add_axis(self, side: _Side, tensor: Tensor, axis: int, ids: Tensor) -> TensorAxis:
        """Record that an axis of a tensor holds these units, and return the axis.

        In the weight of a grouped convolution, one position belongs to one channel of every group. These channels are
        united, because surgery can only remove them together.
        """
        name = self._tensors.get(id(tensor))
        if name is None:
            raise PlanError(f"a weight of {side.name!r} is computed while running: remove its parametrization first.")
        size = tensor.shape[axis]
        if len(ids) % size:
            raise PlanError(f"{side.name!r} has {len(ids)} units for the {size} positions of axis {axis} of {name}.")
        if len(ids) != size:
            folded = ids.view(-1, size)
            self.labels.unite(folded, folded[:1].expand_as(folded), "")
            ids = folded[0]
        self.labels.add_axis((name, axis % tensor.ndim), ids)
        return name, axis % tensor.ndim

    def _count_attributes(self, side: _Side) -> None:
        row = counting_attributes(side.node.module)
        both = side.is_in and side.is_out
        for attribute, mine in ((row.out, side.is_out), (row.into, side.is_in), (row.groups, both)):
            if attribute is not None and mine:
                tuple_ = isinstance(getattr(side.node.module, attribute), tuple)
                self.labels.count((side.name, attribute, side.node.pruning_dim if tuple_ else None), side.ids)

    def _probe_axes(self, side: _Side) -> list[TensorAxis]:
        """Record what a customized pruner cuts, found by running it on copies of its layer, and return the axes."""
        cut = probe_pruner(side.node.module, side.handler, side.node.pruning_dim, len(side.ids), side.name)
        for path, name, item in cut.attributes:
            self.labels.count((".".join(filter(None, (side.name, path))), name, item), side.ids)
        tensors = dict(named_tensors(side.node.module))
        return [
            self._add_axis(side, tensors[name], axis, torch.where(unit == NO_UNIT, 0, side.ids[unit]))
            for (name, axis), unit in cut.axes.items()
        ]


def _sliced_tensors(side: _Side) -> list[tuple[Tensor | None, int]] | None:
    """Return the tensors and axes that Torch-Pruning's own functions cut; ``None`` for a customized pruner."""
    from torch_pruning.pruner import function

    module, pruner = side.node.module, type(side.handler.__self__)  # type: ignore[attr-defined]
    if pruner is function.ParameterPruner:
        return [(module, side.node.pruning_dim)]
    if pruner is function.EmbeddingPruner:
        return [(module.weight, 1)]
    if pruner in (function.ConvPruner, function.LinearPruner, function.DepthwiseConvPruner):
        swapped = getattr(module, "transposed", False) and pruner is function.ConvPruner
        return [(module.weight, int(swapped)), (module.bias, 0)] if side.is_out else [(module.weight, int(not swapped))]
    if pruner in (
        function.BatchnormPruner,
        function.InstanceNormPruner,
        function.GroupNormPruner,
        function.PReLUPruner,
    ):
        return [(getattr(module, name, None), 0) for name in ("weight", "bias", "running_mean", "running_var")]
    if pruner is function.LayernormPruner:
        return [(module.weight, side.node.pruning_dim), (module.bias, side.node.pruning_dim)]
    return None
