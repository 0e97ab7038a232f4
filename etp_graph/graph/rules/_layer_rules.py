"""Rules for the functions of the layer table: label the output units, record the input units, note the MACs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from etp_graph.graph._tracker import Tracker
from etp_graph.graph._weights import NamedModule, TensorView
from etp_graph.model import (
    CHANNELWISE_LAYERS,
    EMBEDDING_ARGUMENTS,
    MIXING_LAYERS,
    POOLS,
    MixingLayer,
    bind_arguments,
    is_weightless_norm,
    long_axis,
    mixture,
    norm_over_units,
    routed,
    running_line,
    unit_mean,
)
from etp_graph.plan import Op

from . import _recurrent as recurrent
from ._experts import follow_mixture, follow_routed
from ._operators import Operand, compact_label, label_of_elementwise, labelled_dims
from ._products import follow_attention
from ._terms import ProductTerm


def rule_of_layer(func: Any) -> Callable[[Tracker, Any, Any, Any, Tensor], None] | None:
    """Return the rule for a function of the layer table, or ``None``.

    The rule is called as rule(tracker, func, args, kwargs, out).
    """
    if func in MIXING_LAYERS:
        return _follow_mixing_layer
    if func in CHANNELWISE_LAYERS:
        return _follow_channelwise_layer
    if func in POOLS:
        return _follow_pool
    if func is F.scaled_dot_product_attention:
        return follow_attention
    if func in _OWN:
        return _OWN[func]
    return _follow_embedding if func is F.embedding else recurrent.rule_of_recurrence(func)


def _follow_mixing_layer(tracker: Tracker, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    row = MIXING_LAYERS[func]
    call = bind_arguments(row.arguments, args, kwargs)
    x, weight, bias = call["input"], call["weight"], call.get("bias")
    dim = -(row.spatial + 1)
    refs, reason = tracker.weights.find_stored(weight, tracker.modules)
    tracker.weights.mark_used([bias])
    into = tracker.channels(x, dim)
    positions = (x if row.transposed else out).numel() // (x if row.transposed else out).shape[dim]
    kernel = prod(weight.shape[2:])
    if not refs:
        tracker.labels.lock(into, f"enters {func.__name__} in {tracker.where} with {reason}")
        tracker.ops.append(Op(name=tracker.where.strip("'"), coefficient=positions * weight.numel()))
        return
    layer = tracker.weights.owner(refs[0], tracker.modules)
    term = _add_cost_term(tracker, layer.name, refs[0], positions * kernel)
    groups = call.get("groups", 1)
    made = _produce_conv_groups(tracker, layer, row, refs, into, out.shape[dim], groups) if groups > 1 else None
    into, made_out, kind = made if made else _produce_units(tracker, layer, row, refs, into)
    _write_cost_units(tracker, term, (made_out, into) if row.out_axis == 0 else (into, made_out))
    tracker.weights.add_vector(tracker.labels, bias, made_out, known=None if bias is None else tracker.get(bias))
    if reason:
        tracker.labels.lock(made_out, reason)
        tracker.labels.lock(into, reason)
    tracker.weights.count_attributes(tracker.labels, layer, made_out=made_out, into=into, groups=kind)
    shape = [1] * out.ndim
    shape[dim] = -1
    tracker.set(out, compact_label(made_out.view(shape)))


def _add_cost_term(tracker: Tracker, name: str, ref: TensorView, coefficient: int, first: int = 0) -> int:
    """Add a cost term for a weight or a part of one, and return its number. Its matrix axes begin at ``first``."""
    axes = (ref.axis(first), ref.axis(first + 1))
    if all(tracker.weights.shape(tensor)[axis] == ref.shape[first + d] for d, (tensor, axis) in enumerate(axes)):
        tracker.ops.append(Op(name=name, coefficient=coefficient, axes=axes))
    else:
        tracker.ops.append(ProductTerm(name, (coefficient, *ref.shape[first : first + 2]), ()))
    return len(tracker.ops) - 1


def _write_cost_units(tracker: Tracker, term: int, units: Sequence[Tensor]) -> None:
    """Write the units along the first two axes of a weight into its cost term.

    Needed only if the weight is a part of a stored tensor, such as the query of a fused projection.
    """
    product = tracker.ops[term]
    if not isinstance(product, ProductTerm):
        return
    labels = []
    for at, ids in enumerate(units, 1):
        if len(ids) == product.shape[at] and bool((ids > 0).any()):
            labels.append(ids.view([-1 if d == at else 1 for d in range(3)]))
    tracker.ops[term] = ProductTerm(product.name, product.shape, tuple(labels))


def _produce_units(
    tracker: Tracker, layer: NamedModule, row: MixingLayer, refs: Sequence[TensorView], into: Tensor
) -> tuple[Tensor, Tensor, None]:
    """Produce the output units of a layer without groups, and record its input units."""
    made = tracker.weights.produce(tracker.labels, layer, refs, row.out_axis, row.kind)
    for ref in refs:
        if ref.shape[row.in_axis] > 1 or len(into) == 1:
            tracker.weights.add_axis(tracker.labels, ref, row.in_axis, into)
            tracker.labels.inputs.add(ref.axis(row.in_axis))
    return into, made, None


def _produce_conv_groups(
    tracker: Tracker,
    layer: NamedModule,
    row: MixingLayer,
    refs: Sequence[TensorView],
    into: Tensor,
    n_out: int,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Produce the units of a grouped convolution: one unit is a group, with its input and output channels.

    Any number of groups can be removed, by lowering the attribute ``groups``. Single channels could only be removed at
    the same position of every group. A depthwise convolution has one channel per group.
    """
    wide = n_out // groups > 1 or len(into) // groups > 1
    kind = "conv-groups" if wide else row.kind
    labels = tracker.weights.produce(tracker.labels, layer, refs, 0, kind).view(groups, -1)
    unit = labels[:, :1]
    why = f"convolution in groups over channels of fixed width in {tracker.where}"
    tracker.labels.unite(labels, unit.expand_as(labels), why)
    tracker.labels.unite(unit.expand(groups, len(into) // groups), into.view(groups, -1), why)
    units = unit.flatten()
    return units.repeat_interleave(len(into) // groups), units.repeat_interleave(n_out // groups), units


def _follow_channelwise_layer(tracker: Tracker, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    row = CHANNELWISE_LAYERS[func]
    call = bind_arguments(row.arguments, args, kwargs)
    x = call["input"]
    tracker.uncounted.add(func.__name__)
    label = tracker.get(x)
    tracker.weights.mark_used(call.get(name) for name in row.tensors)
    if is_weightless_norm(func, call):
        tracker.note_norm(_normalised_units(tracker, x, call, label, trailing=row.trailing))
    if label is None:
        return
    first = x.ndim - len(call["normalized_shape"]) if row.trailing else 1
    inside = [d for d in labelled_dims(label) if d >= first] if row.trailing else [1]
    if x.ndim < 2 or len(inside) > 1 or (not row.trailing and set(labelled_dims(label)) - {1}):
        tracker.labels.lock(label, f"lies across the channels that {tracker.where} normalises")
    elif inside and (x.shape[inside[0]] > 1 or not row.trailing):
        ids = tracker.channels(x, inside[0])
        for name in row.tensors:
            tracker.weights.add_vector(
                tracker.labels, call.get(name), ids, axis=inside[0] - first if row.trailing else 0
            )
        tracker.weights.count_attributes(
            tracker.labels, tracker.weights.running_module(tracker.modules), into=ids,
            item=inside[0] - x.ndim if row.trailing else None,
        )  # fmt: skip
        if row.trailing or (func is F.group_norm and call["num_groups"] == 1):
            tracker.labels.normalised.append(ids)
        if func is F.group_norm and call["num_groups"] > 1:
            tracker.labels.blocks.append((ids, call["num_groups"], tracker.where, running_line()))
    tracker.set(out, label)


def _normalised_units(
    tracker: Tracker, x: Tensor, call: dict[str, Any], label: Tensor | None, *, trailing: bool
) -> Tensor | None:
    """Return the labels of the units that a norm without weights averages over, or ``None``."""
    first = x.ndim - len(call["normalized_shape"]) if trailing else 1
    inside = [d for d in labelled_dims(label) if d >= first] if label is not None else []
    return tracker.channels(x, inside[0]) if len(inside) == 1 and (trailing or inside == [1]) else None


def _follow_pool(tracker: Tracker, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    label = tracker.get(args[0])
    tracker.uncounted.add(func.__name__)
    if label is not None and any(d >= label.ndim - POOLS[func] for d in labelled_dims(label)):
        tracker.labels.lock(label, f"is mixed by {func.__name__} in {tracker.where}")
        label = None
    tracker.set(out, label)


def _follow_embedding(tracker: Tracker, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    call = bind_arguments(EMBEDDING_ARGUMENTS, args, kwargs)
    refs, _ = tracker.weights.find_stored(call["weight"], tracker.modules)
    tracker.uncounted.add(func.__name__)
    if refs:
        layer = tracker.weights.owner(refs[0], tracker.modules)
        made = tracker.weights.produce(tracker.labels, layer, refs, 1, "features")
        tracker.weights.count_attributes(tracker.labels, layer, made_out=made)
        tracker.set(out, made.view([1] * (out.ndim - 1) + [-1]))


def stored_matrix(tracker: Tracker, name: str, args: Any, out: Tensor) -> bool:
    """Treat ``x @ w`` with a stored matrix or stack of matrices, or a view of one, as a dense layer.

    The matrices of a stack read the same units, and position j of their results is one unit. ``w`` may also have been
    gathered from a stack by an index, as the matrix of the type of each edge. Return True if ``w`` is stored.
    """
    *added, x, weight = args[:3] if name.startswith(("add", "badd")) else args[:2]
    stacked = name in ("mm", "addmm", "bmm", "baddbmm")
    ref = (tracker.gathered.get(weight) or tracker.weights.view_of(weight)) if stacked else None
    if ref is None or tracker.weights.stored_name(x) is not None:
        return False
    layer, first = tracker.weights.owner(ref, tracker.modules), weight.ndim - 2
    if -1 in (ref.axis(first)[1], ref.axis(first + 1)[1]):
        return False
    own = _has_own_matrices(tracker, x)
    if own and (weight in tracker.gathered or ref.axis(0)[1] == -1):
        return False
    term = _add_cost_term(tracker, layer.name, ref, prod(x.shape[:-1]), first)
    _count_matrices(tracker, term, ref, len(x) if first == 1 else 0)
    if own:
        _follow_own_matrices(tracker, ref, x, added, out)
        return True
    made = _produce_from_matrix(tracker, layer, ref, x, term)
    label: Tensor | None = made.view([-1 if d == out.ndim - 1 else 1 for d in range(out.ndim)])
    for bias in added:
        if tracker.weights.view_of(bias) is None:  # an activation, as in the residual connection of GCNII
            both = [Operand(bias.shape, tracker.get(bias)), Operand(out.shape, label)]
            label = label_of_elementwise(tracker.labels, both, out.shape, tracker.where)
        else:
            tracker.weights.add_vector(tracker.labels, bias, made, axis=bias.ndim - 1)
    tracker.set(out, None if label is None else compact_label(label))
    return True


def _produce_from_matrix(tracker: Tracker, layer: NamedModule, ref: TensorView, x: Tensor, term: int) -> Tensor:
    """Produce the units of ``x @ w`` with a stored matrix or stack, and record those that it reads."""
    first = len(ref.shape) - 2
    into = tracker.channels(x, -1)
    made = tracker.weights.produce(tracker.labels, layer, [ref], first + 1, "neurons")
    _write_cost_units(tracker, term, (into, made))
    tracker.weights.add_axis(tracker.labels, ref, first, into)
    tracker.labels.inputs.add(ref.axis(first))
    if isinstance(layer.module, nn.Linear):  # its code is bypassed, as that of the steps of Mamba
        turned = ref.axis(first)[1] == 0
        out_into = (into, made) if turned else (made, into)
        tracker.weights.count_attributes(tracker.labels, layer, made_out=out_into[0], into=out_into[1])
    reason = tracker.weights.fixed.get(ref.name)
    if reason:
        tracker.labels.lock(made, reason)
        tracker.labels.lock(into, reason)
    return made


def _count_matrices(tracker: Tracker, term: int, ref: TensorView, n: int) -> None:
    """Let the cost of a product with each matrix of a whole stored stack of n follow the number of matrices."""
    op = tracker.ops[term]
    if isinstance(op, Op) and ref.axis(0)[1] != -1 and tracker.weights.shape(ref.name)[ref.axis(0)[1]] == n:
        tracker.ops[term] = replace(op, coefficient=op.coefficient // n, axes=(ref.axis(0), *op.axes))


def _follow_own_matrices(tracker: Tracker, ref: TensorView, x: Tensor, added: Sequence[Tensor], out: Tensor) -> None:
    """Follow ``x [units, n, k] @ w [units, k, m]``: each unit, such as a head, has a stored matrix of its own."""
    ids = tracker.channels(x, 0)
    tracker.weights.add_axis(tracker.labels, ref, 0, ids)
    tracker.labels.headed.append(ids)
    if reason := tracker.weights.fixed.get(ref.name):
        tracker.labels.lock(ids, reason)
    label: Tensor | None = ids.view(-1, 1, 1)
    for bias in added:
        if tracker.weights.view_of(bias) is None:
            both = [Operand(bias.shape, tracker.get(bias)), Operand(out.shape, label)]
            label = label_of_elementwise(tracker.labels, both, out.shape, tracker.where)
        elif bias.ndim == 3:
            tracker.weights.add_vector(tracker.labels, bias, ids, axis=0)
        else:
            tracker.labels.lock(ids, "meets a tensor that is partly of fixed width")
    tracker.set(out, None if label is None else compact_label(label))


def note_gathered(tracker: Tracker, name: str, args: Any, out: Tensor) -> None:
    """Note that a result holds matrices of a stored stack, chosen by an index along its first dimension."""
    stack = args[0]
    if stack.ndim < 3 or out.ndim != stack.ndim or out.shape[1:] != stack.shape[1:]:
        return
    if name == "index_select" and args[1] % stack.ndim != 0:
        return
    if name != "index_select" and (args[1][0] is None or any(index is not None for index in args[1][1:])):
        return
    ref = tracker.weights.view_of(stack)
    if ref is not None and tracker.weights.bare_name(tracker.weights.tensor(ref.name)) is not None:
        tracker.gathered[out] = replace(ref, shape=tuple(out.shape))


def _has_own_matrices(tracker: Tracker, x: Tensor) -> bool:
    """Return True if units lie along the stack: heads with a matrix each."""
    label = tracker.get(x)
    return x.ndim == 3 and label is not None and 0 in labelled_dims(label)


def follow_deformable(tracker: Tracker, args: Any, out: Tensor) -> bool:
    """Treat torchvision's deformable convolution without groups as a convolution. Return True if it is one.

    The offsets and the modulation have one channel for each entry of the kernel, so that their units stay.
    """
    x, weight, offset, modulation, bias = args[:5]
    if list(args[11:13]) != [1, 1]:
        return False
    tracker.lock_all((offset, modulation), f"gives the offsets of {tracker.where}")
    if tracker.weights.stored_name(bias) is None and not bool(bias.any()):
        bias = None  # torchvision makes zeros if the layer has no bias
    _follow_mixing_layer(tracker, F.conv2d, (x, weight, bias), {}, out)
    return True


def _unit_mean(tracker: Tracker, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Follow :func:`etp_graph.model.unit_mean`, which in a pruned model averages over the remaining units."""
    x, dim, weight = args
    ids = tracker.channels(x, dim)
    held = tracker.get(weight)
    if held is None:
        tracker.weights.add_vector(tracker.labels, weight, ids, axis=long_axis(weight))
    else:
        tracker.labels.unite(ids, held.flatten(), f"meets channels of fixed width in {tracker.where}")
    tracker.labels.normalised.append(ids)
    tracker.set(out, None)


def _norm_over_units(tracker: Tracker, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Follow :func:`etp_graph.model.norm_over_units`, which in a pruned model reduces over the remaining units."""
    x, dim, tensors, _ = args
    dim %= x.ndim
    tracker.weights.mark_used(tensors)
    label = tracker.get(x)
    if not tensors:
        tracker.note_norm(None if label is None or label.shape[dim] == 1 else tracker.channels(x, dim))
    if label is None or label.shape[dim] == 1:
        tracker.lock_all(tensors, f"is normalised over fixed channels in {tracker.where}")
        tracker.set(out, label)  # each of the units, such as heads, is normalised by itself
        return
    ids = tracker.channels(x, dim)
    for tensor in tensors:
        held = tracker.get(tensor)
        if held is None:
            tracker.weights.add_vector(tracker.labels, tensor, ids, axis=long_axis(tensor))
        else:
            tracker.labels.unite(ids, held.flatten(), f"meets channels of fixed width in {tracker.where}")
    tracker.labels.normalised.append(ids)
    tracker.set(out, compact_label(ids.view([-1 if d == dim else 1 for d in range(out.ndim)])))


_OWN: dict[Any, Callable[[Tracker, Any, Any, Any, Any], None]] = {
    unit_mean: _unit_mean, norm_over_units: _norm_over_units, routed: follow_routed, mixture: follow_mixture,
}  # fmt: skip
"""Rules for functions of this library. Stand-ins call them if operators alone do not show how units are used."""
