"""Masked model: the reference for a pruned model, computed without removing anything.

Units are set to zero in every slice, and norms that average over channels (layer, group and RMS norm) are reduced over
the kept entries. Surgery is checked against this definition.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from etp_graph.model import (
    CHANNELWISE_LAYERS,
    bind_arguments,
    is_weightless_norm,
    long_axis,
    named_tensors,
    norm_over_units,
    routed,
    run_with_closed_experts,
    unit_mean,
)
from etp_graph.plan import ACTIVATION, Plan, Positions, SlicedAxis, name_norm, with_no_unit


class Masked(TorchFunctionMode):
    """Context in which the given model runs with norms reduced over the kept entries.

    Args:
        model: a copy of the traced model; its removed units are set to zero by this constructor, in place.
        plan: the plan of the model.
        keep: True for units that stay, bool [plan.n_units].
        finite: whether all weights are finite. They can then be multiplied by zero, which is faster than writing it.
    """

    def __init__(self, model: nn.Module, plan: Plan, keep: Tensor, *, finite: bool = False) -> None:
        super().__init__()
        full = with_no_unit(keep.cpu(), True)
        tensors = dict(named_tensors(model))
        self._modules = {id(module): module for module in model.modules()}
        self._by_weight: dict[int, dict[int, Tensor]] = {}
        self._by_module: dict[int, dict[int, Tensor]] = {}
        self._by_norm: dict[str, Tensor] = {}
        self._n_norms = 0
        for name, parts in Positions(plan).axes.items():
            kept_by_axis = {axis.axis: axis.kept_positions(full) for axis in parts}
            layer = _normed_layer(model, name)
            if layer is None:
                self._by_weight[id(tensors[name])] = kept_by_axis
                _zero_units_(tensors[name], kept_by_axis, finite=finite)
            elif name.endswith("original1"):
                parametrize.register_parametrization(layer, "weight", _Mask(kept_by_axis))
        for (module, name, item), maps in Positions(plan).attributes.items():
            kept = SlicedAxis(module, 0, tuple(maps)).kept_positions(full)
            if module == ACTIVATION:
                self._by_norm[name] = kept
                continue
            self._by_module.setdefault(id(model.get_submodule(module)), {})[0 if item is None else item] = kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is unit_mean:
            return self._unit_mean(*args)
        if func is norm_over_units:
            return self._norm_over_units(*args)
        if func is routed:
            return run_with_closed_experts(args[1], self._by_weight.get(id(args[1]), {}).get(0), args[-1])
        if func not in (F.layer_norm, F.rms_norm, F.group_norm):
            return func(*args, **kwargs)
        row = CHANNELWISE_LAYERS[func]
        call = bind_arguments(row.arguments, args, kwargs)
        self._n_norms += is_weightless_norm(func, call)
        rest = {k: v for k, v in bind_arguments((*row.arguments, "eps"), args, kwargs).items() if k == "eps"}
        return _reduced(func, call, self._masks(call, row.trailing), rest)

    def _unit_mean(self, x: Tensor, dim: int, weight: Tensor) -> Tensor:
        kept = self._by_weight.get(id(weight), {}).get(long_axis(weight))
        return unit_mean(x if kept is None else x.index_select(dim, kept.nonzero().flatten().to(x.device)), dim, weight)

    def _norm_over_units(
        self, x: Tensor, dim: int, tensors: Sequence[Tensor], run: Callable[[Tensor, Sequence[Tensor]], Tensor]
    ) -> Tensor:
        """Run a hand-written norm on the kept entries; return zeros elsewhere."""
        self._n_norms += not tensors
        owner = self._by_weight.get(id(tensors[0]), {}) if tensors else {}
        kept = owner.get(long_axis(tensors[0])) if tensors else self._numbered_norm()
        if kept is None:
            return run(x, tensors)
        index = kept.nonzero().flatten().to(x.device)
        out = run(x.index_select(dim, index), [tensor.index_select(long_axis(tensor), index) for tensor in tensors])
        return torch.zeros_like(x, dtype=out.dtype).index_copy(dim, index, out)

    def _numbered_norm(self) -> Tensor | None:
        """Return the kept positions of the units of the running norm, which has no weights."""
        return self._by_norm.get(name_norm(self._n_norms)[1])

    def _masks(self, call: dict[str, Any], trailing: bool) -> dict[int, Tensor]:
        """Return for each normalised dimension of the input which of its positions are kept, bool [size]."""
        x, weight = call["input"], call.get("weight")
        if trailing:
            first = x.ndim - len(call["normalized_shape"])
            if weight is not None:
                return {first + axis: kept for axis, kept in self._by_weight.get(id(weight), {}).items()}
            found = {item % x.ndim: kept for item, kept in self._module().items()}
            numbered = self._numbered_norm()
            at = [d for d in range(first, x.ndim) if numbered is not None and x.shape[d] == len(numbered)]
            return found or (dict.fromkeys(at[:1], numbered) if numbered is not None else {})
        found = self._by_weight.get(id(weight), {}) if weight is not None else self._module()
        return dict.fromkeys([1], next(iter(found.values()))) if found else {}

    def _module(self) -> dict[int, Tensor]:
        """Return the kept positions of the running module, for a norm without weight.

        They come from the attributes of the module that count units, or else from its own sliced vectors.
        """
        module = self._running_module()
        if module is None or id(module) in self._by_module:
            return self._by_module.get(id(module), {})
        vectors = [p for p in module.parameters(recurse=False) if p.ndim == 1 and id(p) in self._by_weight]
        return {-1: self._by_weight[id(vectors[0])][0]} if vectors else {}

    def _running_module(self) -> nn.Module | None:
        """Return the innermost module whose forward is running.

        It is found in the calls of Python, because hooks on all modules would slow down every forward for a few norms.
        """
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code is _CALL and id(found := frame.f_locals.get("self")) in self._modules:
                return self._modules[id(found)]
            frame = frame.f_back  # type: ignore[assignment]
        return None


_CALL = nn.Module._call_impl.__code__


@torch.no_grad()
def _zero_units_(tensor: Tensor, kept_by_axis: dict[int, Tensor], *, finite: bool) -> None:
    for axis, kept in kept_by_axis.items():
        if finite and axis > 0 and tensor.is_floating_point():
            tensor.mul_(kept.to(tensor).view([-1 if d == axis else 1 for d in range(tensor.ndim)]))
        else:
            tensor.index_fill_(axis, (~kept).nonzero().flatten().to(tensor.device), 0)


def _reduced(
    func: Callable[..., Tensor], call: dict[str, Any], masks: dict[int, Tensor], rest: dict[str, Any]
) -> Tensor:
    """Apply the norm to the kept entries; return zeros elsewhere."""
    x: Tensor = call.pop("input")
    out_shape, index = x.shape, {}
    trailing = "normalized_shape" in call
    for dim, kept in masks.items():
        index[dim] = kept.nonzero().flatten().to(x.device)
        x = x.index_select(dim, index[dim])
    first = x.ndim - len(call["normalized_shape"]) if trailing else 1
    for name in ("weight", "bias"):
        if call.get(name) is not None:
            for dim, positions in index.items():
                call[name] = call[name].index_select(dim - first, positions)
    if trailing:
        call["normalized_shape"] = list(x.shape[first:])
    out = func(x, **{**call, **rest})
    for dim, positions in reversed(index.items()):
        shape = list(out.shape)
        shape[dim] = out_shape[dim]
        out = out.new_zeros(shape).index_copy(dim, positions, out)
    return out


class _Mask(nn.Module):
    """Last parametrization of a weight-normalised weight; it sets removed units to zero after the normalisation."""

    def __init__(self, kept: dict[int, Tensor]) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, weight: Tensor) -> Tensor:
        for axis, kept in self.kept.items():
            shape = [-1 if d == axis else 1 for d in range(weight.ndim)]
            weight = weight * kept.to(weight).view(shape)
        return weight


def _normed_layer(model: nn.Module, name: str) -> nn.Module | None:
    """Return the layer whose weight-normalised weight is computed from this tensor, or ``None``."""
    owner, found, _ = name.partition(".parametrizations.weight.original")
    return model.get_submodule(owner) if found else None
