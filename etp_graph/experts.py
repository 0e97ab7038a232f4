"""Mixtures of experts: one unit is an expert, with its rows of the router.

A router that has lost an expert chooses among the others; the same router with that row set to zero would still give it
a logit of 0. The masked reference therefore closes removed experts with a logit of minus infinity.
Which tokens go where depends on the data, so routers and expert layers are taken as wholes: :func:`routed` and
:func:`mixture` mark them for the tracer and run the module's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function
from torch.utils._pytree import tree_leaves

from .labels import Producer
from .operators import compact
from .plan import Op

if TYPE_CHECKING:
    from .tracker import Tracker


def routed(x: Tensor, weight: Tensor, vectors: Sequence[Tensor], top_k: int, run: Callable[[], Any]) -> Any:
    """What ``run`` returns: a router's choice of ``top_k`` experts for the tokens ``x`` [..., d].

    ``weight`` [experts, d] gives the logits, ``vectors`` are further tensors [experts] of the router.
    """
    if has_torch_function((x, weight)):
        return handle_torch_function(routed, (x, weight), x, weight, vectors, top_k, run)
    return run()


def mixture(x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, run: Callable[[], Tensor]) -> Tensor:
    """What ``run`` returns: the sum of the chosen experts' outputs.

    ``x`` [tokens, d]; ``gate_up`` [experts, 2 * neurons, d]; ``down`` [experts, d, neurons]; ``index`` [tokens, top_k].
    """
    if has_torch_function((x, gate_up)):
        found: Tensor = handle_torch_function(mixture, (x, gate_up), x, gate_up, down, index, run)
        return found
    return run()


class Closed(TorchFunctionMode):
    """Inside, the router with this weight gives removed experts a logit of minus infinity."""

    def __init__(self, weight: Tensor, kept: Tensor) -> None:
        super().__init__()
        self.weight, self.gone = weight, ~kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.linear and args[1] is self.weight:
            out = out.masked_fill(self.gone.to(out.device), float("-inf"))
        return out


def follow_routed(tracker: Tracker, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Experts are the rows of the router; at least ``top_k`` of them stay."""
    x, weight, vectors, top_k, _ = args
    refs, reason = tracker.weights.find(weight, tracker.modules)
    into = tracker.channels(x, -1)
    if not refs:
        tracker.labels.lock(into, f"enters a router in {tracker.where} with {reason}")
        return
    ref, layer = refs[0], tracker.weights.running(tracker.modules)
    made = tracker.labels.produce(Producer(ref.axis(0), layer.name, "experts"), ref.shape[0])
    tracker.weights.record(tracker.labels, ref, 1, into)
    tracker.labels.inputs.add(ref.axis(1))
    for vector in vectors:
        tracker.weights.along(tracker.labels, vector, made)
    tracker.labels.floors.append((made, top_k))
    _count(tracker, made, _EXPERTS)
    _count(tracker, into, _WIDTHS)
    tracker.ops.append(Op(name=layer.name, coefficient=x.numel() // x.shape[-1], axes=(ref.axis(0), ref.axis(1))))
    for tensor in tree_leaves(out):
        if isinstance(tensor, Tensor):
            tracker.routes[tensor] = made


def follow_mixture(tracker: Tracker, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Neurons of the same number in all experts are one unit; the router's experts are these experts."""
    x, gate_up, down, index, _ = args
    labels, weights = tracker.labels, tracker.weights
    (first, *_), (second, *_) = weights.find(gate_up, tracker.modules)[0], weights.find(down, tracker.modules)[0]
    layer = weights.running(tracker.modules)
    neurons = labels.produce(Producer(first.axis(1), layer.name, "neurons"), first.shape[1])
    gate, up = neurons.chunk(2)
    labels.unite(gate, up, "gate and input of an expert")
    into = tracker.channels(x, -1)
    _count(tracker, into, _WIDTHS)
    weights.record(labels, first, 2, into)
    if getattr(getattr(layer.module, "config", None), "_experts_implementation", "eager") != "eager":
        labels.multiples += [(gate, _ALIGNMENT), (into, _ALIGNMENT)]
    labels.inputs.add(first.axis(2))
    weights.record(labels, second, 2, gate)
    labels.inputs.add(second.axis(2))
    made = labels.produce(Producer(second.axis(1), f"{layer.name}.down_proj", "neurons"), second.shape[1])
    chosen = tracker.routes.get(index)
    experts = labels.fresh(first.shape[0]) if chosen is None else chosen
    for ref in (first, second):
        weights.record(labels, ref, 0, experts)
    if chosen is not None:
        _count(tracker, experts, _EXPERTS)
    _count(tracker, gate, ("intermediate_dim", "intermediate_size"))
    for ref in (first, second):
        tracker.ops.append(Op(name=layer.name, coefficient=index.numel(), axes=(ref.axis(1), ref.axis(2))))
    tracker.set(out, compact(made.view([1] * (out.ndim - 1) + [-1])))


_ALIGNMENT = 8
"""PyTorch's grouped product takes rows of a multiple of 16 bytes, which are 8 numbers in half precision."""
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")
_WIDTHS = ("hidden_dim", "hidden_size")


def _count(tracker: Tracker, ids: Tensor, names: Sequence[str]) -> None:
    """The attributes of the running module, whose code is not followed, that count these units."""
    layer = tracker.weights.running(tracker.modules)
    for name in names:
        if layer.module is not None and layer.module.__dict__.get(name) == len(ids):
            tracker.labels.count((layer.name, name, None), ids)


def close(weight: Tensor, kept: Tensor | None, run: Callable[[], Any]) -> Any:
    """Run a router whose removed experts are closed."""
    if kept is None:
        return run()
    with Closed(weight, kept):
        return run()


__all__ = ["Closed", "close", "follow_mixture", "follow_routed", "mixture", "routed"]
