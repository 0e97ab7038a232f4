"""Plain Torch-Pruning on one model: its own graph, groups and surgery, against the same model with zeros."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from etp_graph import Group, Plan, Slice
from etp_graph.model import InFloat64, convert_inputs, named_tensors, run_model, tensors_of
from etp_graph.plan import as_index
from etp_graph.verification import TOLERANCE, Masked, randomize_


def judge(
    model: nn.Module, x: Any, *, ratio: float, customized: Mapping[type[nn.Module], Any] | None = None,
    heads: Mapping[nn.Module, int] | None = None, resize: Callable[[nn.Module], object] = lambda model: None,
) -> dict[str, Any]:  # fmt: skip
    """Remove ``ratio`` of the channels of every group, as Torch-Pruning's README does, and compare in float64.

    No hints are given, except that the layers that make the model's output stay whole, ``customized`` pruning
    functions by class of layer, the ``heads`` of layers, and ``resize``, called after surgery. Channels are spread
    evenly; where a group holds a grouped convolution, a group norm or heads, every run loses the same, as there.
    """
    import torch_pruning as tp

    warnings.simplefilter("ignore")
    randomize_(model)
    model = model.double()
    x = convert_inputs(x, like=next(model.parameters()))
    masked = copy.deepcopy(model)
    start, graph, known = time.perf_counter(), tp.DependencyGraph(), customized or {}
    for layer, pruner in known.items():
        graph.register_customized_layer(layer, pruner)
    graph.build_dependency(model, x, verbose=False)
    outputs = [module for module, node in graph.module2node.items() if not node.outputs]
    groups = [group for group in graph.get_all_groups(ignored_layers=outputs) if not _last(group)]
    roots = [(group[0].dep, _runs(graph, group, heads or {})) for group in groups]
    removed = _Removed(
        {**{p: name for name, p in model.named_parameters()}, **dict(map(reversed, model.named_modules()))}
    )
    for dep, runs in roots:
        width = graph.get_out_channels(dep.target.module)
        group = graph.get_pruning_group(dep.target.module, dep.handler, spread(width, runs, ratio))
        if graph.check_pruning_group(group):
            removed.note(graph, group)
            group.prune()
    resize(model)
    seconds = time.perf_counter() - start
    if not removed.gone:
        return {"verdict": "no group", "seconds": seconds}
    want = _masked_output(masked, x, removed, known)
    with torch.no_grad(), InFloat64():
        got = _first(run_model(model, x))
    error = float((got - want).abs().max() / want.abs().max()) if got.shape == want.shape else float("inf")
    verdict, params = "OK" if error <= TOLERANCE[torch.float64] else "wrong", sum(p.numel() for p in model.parameters())
    return {"verdict": verdict, "error": error, "seconds": seconds, "groups": len(roots), "params_after": params}


def _masked_output(masked: nn.Module, x: Any, removed: _Removed, customized: Any) -> Tensor:
    """What the model puts out with zeros in place of what was removed."""
    plan = removed.plan(masked)
    layers = dict(masked.named_modules())  # what was removed may also be a parameter of its own
    gone = {name: where for name, where in removed.gone.items() if type(layers.get(name)) in customized}
    _silence(masked, gone)
    with torch.no_grad(), Masked(masked, plan, torch.tensor([False])), InFloat64():
        return _first(run_model(masked, x))


def _silence(model: nn.Module, channels: Mapping[str, set[int]]) -> None:
    """Layers without weights put out zeros in these channels from now on."""

    def zero(gone: set[int]) -> Any:
        def hook(layer: nn.Module, args: Any, out: Tensor) -> Tensor:
            return out.index_fill(1, torch.tensor(sorted(gone)), 0.0)

        return hook

    for name, gone in channels.items():
        model.get_submodule(name).register_forward_hook(zero(gone))


def spread(width: int, runs: int, ratio: float) -> list[int]:
    """About ``ratio`` of ``width`` channels, evenly spread over each of ``runs`` runs; at least one in each."""
    each = width // runs
    count = max(round(each * ratio), 1)
    return [run * each + i * each // count for run in range(runs) for i in range(count)]


def _runs(graph: Any, group: Any, heads: Mapping[nn.Module, int]) -> int:
    """The runs that must lose equally many channels; a depthwise convolution makes none."""
    found = 1
    for dep, _ in group:
        module = dep.target.module
        if isinstance(module, nn.modules.conv._ConvNd) and module.groups != module.out_channels:
            found = max(found, module.groups)
        elif isinstance(module, nn.GroupNorm):
            found = max(found, module.num_groups)
        elif graph.is_out_channel_pruning_fn(dep.handler):
            found = max(found, heads.get(module, 1))
    return found


def _last(group: Any) -> bool:
    return any(type(dep.target.module).__name__ == "_OutputOp" for dep, _ in group)


def _first(out: Any) -> Tensor:
    """The first real tensor of an output."""
    return next(tensor for tensor in tensors_of(out) if tensor.is_floating_point())


@dataclass(slots=True)
class _Removed:
    """The outputs that the graph removed, layer by layer, in positions of the unpruned model."""

    names: dict[Any, str]
    live: dict[str, list[int]] = field(default_factory=dict)
    gone: dict[str, set[int]] = field(default_factory=dict)

    def note(self, graph: Any, group: Any) -> None:
        for dep, indices in group:
            name = self.names.get(dep.target.module)
            if name is None or not graph.is_out_channel_pruning_fn(dep.handler):
                continue
            live = self.live.setdefault(name, list(range(graph.get_out_channels(dep.target.module) or 0)))
            now = {live[i] for i in indices if i < len(live)}
            self.gone.setdefault(name, set()).update(now)
            self.live[name] = [position for position in live if position not in now]

    def plan(self, model: nn.Module) -> Plan:
        """A plan whose only unit is everything that was removed: masking it silences just that."""
        tensors = {name: tuple(t.shape) for name, t in named_tensors(model)}
        slices = []
        for name, gone in self.gone.items():
            index = as_index(sorted(gone))
            unit = torch.zeros(len(index), dtype=torch.int64)
            if name in tensors:  # a parameter of its own: Torch-Pruning cuts its last axis
                slices.append(Slice(tensor=name, axis=len(tensors[name]) - 1, index=index, unit=unit))  # type: ignore[arg-type]
                continue
            layer = model.get_submodule(name)
            for tensor in ("weight", "bias", "running_mean", "running_var"):
                if f"{name}.{tensor}" in tensors:
                    turned = getattr(layer, "transposed", False) and layer.groups == 1
                    axis = int(tensor == "weight" and (turned or isinstance(layer, nn.Embedding)))
                    slices.append(Slice(tensor=f"{name}.{tensor}", axis=axis, index=index, unit=unit))  # type: ignore[arg-type]
        group = Group(name="removed", kind="channels", n_units=1, slices=tuple(slices))
        return Plan(groups=(group,), tensors=tensors, parameters=tuple(name for name, _ in model.named_parameters()))
