"""Mixtures of experts. A unit is an expert with its row of the router, or a neuron (one of each expert).

A pruned router chooses among the remaining experts. If the rows of removed experts were only set to zero, the router
could still choose them, with a logit of 0. The masked reference therefore sets their logits to minus infinity.

The experts of a token depend on the data, so the tracer does not follow the code of routers and expert layers.
:func:`routed` and :func:`mixture` mark each of them as one function for the tracer, and run the module's own code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from etp_graph.graph._labels import Producer
from etp_graph.graph._tracker import Tracker
from etp_graph.plan import Op

from ._operators import compact_label


def follow_routed(tracker: Tracker, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Label the rows of the router as experts, of which at least ``top_k`` stay."""
    x, weight, vectors, top_k, _ = args
    refs, reason = tracker.weights.find_stored(weight, tracker.modules)
    into = tracker.channels(x, -1)
    if not refs:
        tracker.labels.lock(into, f"enters a router in {tracker.where} with {reason}")
        return
    ref, layer = refs[0], tracker.weights.running_module(tracker.modules)
    made = tracker.labels.produce(Producer(ref.axis(0), layer.name, "experts"), ref.shape[0])
    tracker.weights.add_axis(tracker.labels, ref, 1, into)
    tracker.labels.inputs.add(ref.axis(1))
    for vector in vectors:
        tracker.weights.add_vector(tracker.labels, vector, made)
    tracker.labels.floors.append((made, top_k))
    _count_in_attributes(tracker, made, _EXPERTS)
    _count_in_attributes(tracker, into, _WIDTHS)
    tracker.ops.append(Op(name=layer.name, coefficient=x.numel() // x.shape[-1], axes=(ref.axis(0), ref.axis(1))))
    for tensor in tree_leaves(out):
        if isinstance(tensor, Tensor):
            tracker.routes[tensor] = made


def follow_mixture(tracker: Tracker, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Label the experts of the router, and the neurons: neurons of the same number in all experts are one unit."""
    x, packed, index, _ = args
    labels, weights = tracker.labels, tracker.weights
    outer, inner = (2, 1) if packed.transposed else (1, 2)  # the axes of outputs and inputs of a matrix
    (first, *_), (second, *_) = (
        weights.find_stored(packed.gate_up, tracker.modules)[0],
        weights.find_stored(packed.down, tracker.modules)[0],
    )
    layer = weights.running_module(tracker.modules)
    neurons = labels.produce(Producer(first.axis(outer), layer.name, "neurons"), first.shape[outer])
    gate, up = neurons.view(-1, 2).unbind(1) if packed.interleaved else neurons.chunk(2)
    labels.unite(gate, up, "gate and input of an expert")
    into = tracker.channels(x, -1)
    _count_in_attributes(tracker, into, _WIDTHS)
    weights.add_axis(labels, first, inner, into)
    if getattr(getattr(layer.module, "config", None), "_experts_implementation", "eager") != "eager":
        labels.multiples += [(gate, _ALIGNMENT), (into, _ALIGNMENT)]
    labels.inputs.add(first.axis(inner))
    weights.add_axis(labels, second, inner, gate)
    labels.inputs.add(second.axis(inner))
    made = labels.produce(Producer(second.axis(outer), f"{layer.name}.down_proj", "neurons"), second.shape[outer])
    chosen = tracker.routes.get(index)
    experts = labels.new_labels(first.shape[0]) if chosen is None else chosen
    for ref in (first, second):
        weights.add_axis(labels, ref, 0, experts)
    for bias, units in zip(packed.biases or (), (neurons, made), strict=False):
        (ref, *_), _ = weights.find_stored(bias, tracker.modules)
        weights.add_axis(labels, ref, 0, experts)
        weights.add_axis(labels, ref, 1, units)
    if chosen is not None:
        _count_in_attributes(tracker, experts, _EXPERTS)
    _count_in_attributes(tracker, gate, ("intermediate_dim", "intermediate_size"))
    for ref in (first, second):
        tracker.ops.append(Op(name=layer.name, coefficient=index.numel(), axes=(ref.axis(outer), ref.axis(inner))))
    tracker.set(out, compact_label(made.view([1] * (out.ndim - 1) + [-1])))


_ALIGNMENT = 8
"""PyTorch's grouped product requires rows of a multiple of 16 bytes, which are 8 numbers in half precision."""

_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")

_WIDTHS = ("hidden_dim", "hidden_size")


def _count_in_attributes(tracker: Tracker, ids: Tensor, names: Sequence[str]) -> None:
    """Record which of the named attributes of the running module count these units: those equal to their number."""
    layer = tracker.weights.running_module(tracker.modules)
    for name in names:
        if layer.module is not None and layer.module.__dict__.get(name) == len(ids):
            tracker.labels.count((layer.name, name, None), ids)
