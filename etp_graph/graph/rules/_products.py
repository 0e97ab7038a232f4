"""Pass labels through matrix products of activations and through attention, and note the MACs.

In ``a [..., m, k] @ b [..., k, n]`` the units along the batch dimensions (heads) of both operands are the same units.
The same holds for the units along ``k`` (dimensions of queries and keys). The result has the units along ``m`` and
``n``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from etp_graph.graph._labels import REPEATED, Labels
from etp_graph.graph._tracker import Tracker
from etp_graph.model import bind_arguments

from ._operators import Operand, UnknownOperator, compact_label, label_of_elementwise, labelled_dims
from ._terms import ProductTerm, index_space

MATRIX = frozenset(("mm", "bmm", "addmm", "baddbmm", "mv", "dot"))
"""Operators that are matrix products. If the name begins with "add" or "badd", the first operand is added."""

COPIES = ("num_key_value_groups", "n_rep")
"""Names of the attribute with the number of query heads for each head of keys, in transformers and in Llama."""

_ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@dataclass(slots=True)
class _Roles:
    """Labels of one operand by the role of the dimension: batch, contracted (``inner``), free (``outer``)."""

    batch: Operand
    inner: Tensor | None
    outer: Tensor | None


def _split_roles(labels: Labels, operand: Operand, inner: int, where: str) -> _Roles:
    """Split the labels of a matrix operand by role. ``inner`` is its contracted dimension, -1 or -2."""
    shape, label = operand.shape, operand.label
    batch = torch.Size((*shape[:-2], 1, 1))
    if label is None:
        return _Roles(Operand(batch, None), None, None)
    now = labelled_dims(label)
    if not now:  # a single head that all other heads use, such as the keys of multi-query attention
        labels.lock(label, f"is shared by all other units in {where}")
    unbound = labels.is_unbound(label)
    if unbound:  # its entries may be those of units elsewhere; here they have a fixed size
        labels.lock(label, f"is multiplied with a tensor of fixed width in {where}")
    if not now or unbound:
        return _Roles(Operand(batch, None), None, None)
    if len(now) > 1:
        raise UnknownOperator
    at = now[0] - len(shape)
    held = label.reshape(-1)
    return _Roles(
        Operand(batch, label if at < -2 else None),
        held if at == inner else None,
        held if at >= -2 and at != inner else None,
    )


def label_of_product(tracker: Tracker, a: Operand, b: Operand, term: int) -> Tensor | None:
    """Return the compact label of ``a [..., m, k] @ b [..., k, n]``, and write the cost to term number ``term``."""
    labels, where = tracker.labels, tracker.where
    left, right = _split_roles(labels, a, -1, where), _split_roles(labels, b, -2, where)
    size = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    both = _without_originals(labels, left.batch, right.batch, where)
    batch = label_of_elementwise(labels, both, torch.Size((*size, 1, 1)), where)
    inner = _unite_contracted(labels, left.inner, right.inner, where)
    ndim = len(size) + 2
    outer = [
        view for view in (_labels_along(left.outer, ndim, -2), _labels_along(right.outer, ndim, -1)) if view is not None
    ]
    if batch is not None:
        labels.headed.append(batch.flatten())
    found = [*outer, *([] if batch is None else [batch])]
    at = [label.unsqueeze(-1) for label in found] + [
        view for view in [_labels_along(inner, len(size) + 3, -1)] if view is not None
    ]
    tracker.ops[term] = ProductTerm(where.strip("'"), index_space(a.shape, b.shape), tuple(at))
    if batch is not None and outer:
        # The inner reading follows dimensions, the outer one heads. Lock the units of the other kind.
        by_batch = tracker.reading == "outer" and not any(labels.is_copy(label) for label in outer)
        for label in outer if by_batch else [batch]:
            labels.lock(label, f"is mixed with other units in {where}")
        found = [batch] if by_batch else outer
    if len(found) > 1:
        raise UnknownOperator
    return found[0] if found else None


def _without_originals(labels: Labels, a: Operand, b: Operand, where: str) -> list[Operand]:
    """Return the batch dimensions of two operands, those of keys without units if the others hold heads of a group.

    Each of these keys meets several heads of its group, which would become one unit.
    """
    found = [a, b]
    for here, there in ((0, 1), (1, 0)):
        copies, held = found[here].label, found[there].label
        if copies is None or held is None or not labels.is_copy(copies) or labels.is_copy(held):
            continue
        x, y = torch.broadcast_tensors(copies, held)
        pairs = torch.stack((x.flatten(), y.flatten())).unique(dim=1)
        if pairs.shape[1] > len(pairs[1].unique()):
            labels.lock(held, f"{REPEATED} in {where}")
            found[there] = Operand(found[there].shape, None, tuple(range(len(found[there].shape))))
    return found


def add_empty_term(tracker: Tracker, shape: tuple[int, ...]) -> int:
    """Add a cost term without units, and return its number. Both readings of a trace have the same terms."""
    tracker.ops.append(ProductTerm(tracker.where.strip("'"), shape, ()))
    return len(tracker.ops) - 1


def _labels_along(label: Tensor | None, ndim: int, dim: int) -> Tensor | None:
    if label is None:
        return None
    shape = [1] * ndim
    shape[dim] = -1
    return label.view(shape)


def _unite_contracted(labels: Labels, a: Tensor | None, b: Tensor | None, where: str) -> Tensor | None:
    """Unite the units along the contracted dimension, or lock them if the other operand has a fixed size there."""
    if a is not None and b is not None:
        return labels.unite(a, b, f"meets channels of fixed width in {where}")
    labels.lock(a if b is None else b, f"is multiplied with a tensor of fixed width in {where}")
    return None


def label_of_matrix_product(tracker: Tracker, name: str, operands: Sequence[Operand], out: torch.Size) -> Tensor | None:
    """Return the label of ``mm``, ``bmm``, ``addmm``, ``baddbmm``, ``mv`` or ``dot`` of activations. Note the cost."""
    added, (a, b) = operands[:-2], operands[-2:]
    if any(operand.label is not None for operand in operands):
        tracker.split_readings()
    if name == "dot":
        a, b = _as_matrix(a, (1, -1)), _as_matrix(b, (-1, 1))
    elif name == "mv":
        b = _as_matrix(b, (-1, 1))
    term = add_empty_term(tracker, index_space(a.shape, b.shape))
    label = label_of_product(tracker, a, b, term)
    if label is not None and len(out) < label.ndim:
        label = label.reshape(label.shape[: len(out)])
    made = Operand(out, label)
    return label_of_elementwise(tracker.labels, [*added, made], out, tracker.where) if added else label


def _unexpanded(tracker: Tracker, x: Tensor) -> Operand:
    """Return the operand, with size 1 where a batch dimension is expanded from size 1 and holds no units."""
    label = tracker.get(x)
    free = {d for d in range(x.ndim - 2) if x.stride(d) == 0 and (label is None or label.shape[d] == 1)}
    return Operand(torch.Size(1 if d in free else n for d, n in enumerate(x.shape)), label)


MATMUL = frozenset((torch.matmul, Tensor.matmul, Tensor.__matmul__))
"""Functions that broadcast the batch dimensions of a product."""


def _broadcasts_batch(func: Any, args: Any, kwargs: Any) -> bool:
    """Return whether a product uses one matrix for several, such as the keys of multi-query attention for all heads.

    Its operators copy that matrix first, which hides that the copies are one.
    """
    if func not in MATMUL or kwargs or len(args) != 2 or not all(isinstance(x, Tensor) and x.ndim > 2 for x in args):
        return False
    return bool(args[0].shape[:-2] != args[1].shape[:-2])


def _follow_broadcast_product(tracker: Tracker, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Label the result of a product that uses one matrix for several, and note its cost."""
    a, b = (_unexpanded(tracker, x) for x in args)
    label = label_of_matrix_product(tracker, "bmm", [a, b], out.shape)
    tracker.set(out, None if label is None else compact_label(label))


@dataclass(frozen=True, slots=True)
class _Letters:
    """Letters of ``einsum`` for two tensors that share one contracted dimension.

    Attributes:
        first, second, out: letters of the tensors and of the result.
        batch: those of the batch dimensions; a tensor has size 1 where it lacks one.
        row, column: the last letter that the first (second) tensor alone has; empty if there is none.
        inner: the contracted one.
    """

    first: str
    second: str
    out: str
    batch: str
    row: str
    column: str
    inner: str

    @classmethod
    def of(cls, equation: object) -> _Letters | None:
        """Return the letters; ``None`` if it is no such product, or if its operators show as much."""
        found = re.fullmatch(r"(\w+),(\w+)->(\w+)", equation.replace(" ", "")) if isinstance(equation, str) else None
        if found is None or any(len(set(part)) < len(part) for part in found.groups()):
            return None
        first, second, out = found.groups()
        inner = [c for c in first if c in second and c not in out]
        alone = [[c for c in a if c not in b] for a, b in ((first, second), (second, first))]
        summed = any(c not in out for own in alone for c in own)
        if len(inner) != 1 or summed or max(map(len, alone)) < 2:
            return None
        row, column = ("".join(own[-1:]) for own in alone)
        batch = "".join(c for c in out if c not in (row, column))
        return cls(first, second, out, batch, row, column, inner[0])


def _shares_one_matrix(func: Any, args: Any, kwargs: Any) -> bool:
    """Return whether this is an ``einsum`` that uses one matrix for several, as multi-query attention does.

    Its operators fold the dimensions that one tensor alone has, heads and positions, into one.
    """
    return (
        func is torch.einsum and len(args) == 3 and not kwargs and all(isinstance(x, Tensor) for x in args[1:])
        and _Letters.of(args[0]) is not None
    )  # fmt: skip


def _follow_einsum(tracker: Tracker, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Label the result of such an ``einsum``, and note its cost."""
    letters = _Letters.of(args[0])
    assert letters is not None
    a = _arranged(_unexpanded(tracker, args[1]), letters.first, letters.batch, (letters.row, letters.inner))
    b = _arranged(_unexpanded(tracker, args[2]), letters.second, letters.batch, (letters.inner, letters.column))
    sizes = dict(zip(letters.out, out.shape, strict=True)) | {"": 1}
    ordered = (*letters.batch, letters.row, letters.column)
    label = label_of_matrix_product(tracker, "bmm", [a, b], torch.Size(sizes[c] for c in ordered))
    if label is not None:
        label = label.permute([*map(ordered.index, letters.out), *(d for d, c in enumerate(ordered) if not c)])
        label = compact_label(label.reshape(label.shape[: out.ndim]))
    tracker.set(out, label)


def rule_of_shared_matrix(func: Any, args: Any, kwargs: Any) -> Callable[[Tracker, Any, Any, Any, Tensor], None] | None:
    """Return the rule for a product that uses one matrix for several, or ``None``; called as those of layers are."""
    if _broadcasts_batch(func, args, kwargs):
        return _follow_broadcast_product
    return _follow_einsum if _shares_one_matrix(func, args, kwargs) else None


def _arranged(operand: Operand, own: str, batch: str, last: tuple[str, str]) -> Operand:
    """Return the operand with its dimensions in the order of the letters, and size 1 for those that it lacks."""
    order = [own.find(c) if c else -1 for c in (*batch, *last)]
    shape = torch.Size(1 if d < 0 else operand.shape[d] for d in order)
    if operand.label is None:
        return Operand(shape, None)
    held = operand.label.permute([d for d in order if d >= 0])
    sizes = iter(held.shape)
    return Operand(shape, held.reshape([1 if d < 0 else next(sizes) for d in order]))


def label_of_solution(labels: Labels, operands: Sequence[Operand], given: dict[str, Any], where: str) -> Tensor | None:
    """Return the label of x in ``a x = b``, with a [..., m, m] and b [..., m, n].

    The units along the batch dimensions of a and b are the same units, and those along n are solved for one by one.

    Raises:
        UnknownOperator: there are units along m, or the equation is ``x a = b``.
    """
    a, b = operands
    if not given["left"]:
        raise UnknownOperator
    flat = []
    for operand, rows in ((a, (-2, -1)), (b, (-2,))):
        ndim = len(operand.shape)
        mixed = {ndim + d for d in rows}
        if operand.label is not None and mixed & set(labelled_dims(operand.label)):
            raise UnknownOperator
        size = torch.Size(1 if d in mixed else n for d, n in enumerate(operand.shape))
        flat.append(Operand(size, operand.label, operand.expanded))
    size = torch.broadcast_shapes(*(operand.shape for operand in flat))
    return label_of_elementwise(labels, flat, size, where, may_split=True)


def _as_matrix(operand: Operand, shape: tuple[int, int]) -> Operand:
    label = operand.label
    return Operand(
        torch.empty(operand.shape, device="meta").view(shape).shape, None if label is None else label.view(shape)
    )


def follow_attention(tracker: Tracker, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Label the result of ``scaled_dot_product_attention``, and note the cost of its two matrix products.

    The heads of queries, keys and values are united, and so are the dimensions of queries and keys. The result has the
    dimensions of the values.
    """
    tracker.split_readings()
    call = bind_arguments(_ATTENTION, args, kwargs)
    q, k, v = (_unexpanded(tracker, call[name]) for name in ("query", "key", "value"))
    if call.get("enable_gqa"):
        k, v = _repeat_heads(tracker, q.shape[-3], k, v)
    mask = call.get("attn_mask")
    batch, (t, d), (s, d_v) = out.shape[:-2], q.shape[-2:], v.shape[-2:]
    first, second = add_empty_term(tracker, (*batch, t, s, d)), add_empty_term(tracker, (*batch, t, d_v, s))
    try:
        turned = Operand(torch.Size((*k.shape[:-2], k.shape[-1], k.shape[-2])), None if k.label is None else k.label.mT)
        _lock_scaled_dims(tracker, (q, k, v), call)
        scores = Operand(torch.Size((*out.shape[:-1], k.shape[-2])), label_of_product(tracker, q, turned, first))
        if mask is not None:
            both = [scores, Operand(mask.shape, tracker.get(mask))]
            scores = Operand(scores.shape, label_of_elementwise(tracker.labels, both, scores.shape, tracker.where))
        label = label_of_product(tracker, scores, v, second)
    except UnknownOperator:
        tracker.lock_all((args, kwargs), f"is mixed by attention in {tracker.where}")
        label = None
    tracker.set(out, None if label is None else compact_label(label))


def _lock_scaled_dims(tracker: Tracker, operands: Sequence[Operand], call: dict[str, Any]) -> None:
    """Lock the dimensions of a head if their number sets the attention scale.

    Raises:
        UnknownOperator: the units are positions of the sequence, which attention mixes.
    """
    for operand, last in zip(operands, (True, True, False), strict=True):
        for d in labelled_dims(operand.label) if operand.label is not None else ():
            at = d - len(operand.shape)
            if at == -2:
                raise UnknownOperator
            if at == -1 and last and call.get("scale") is None:
                tracker.labels.lock(operand.label, f"their number sets the attention scale in {tracker.where}")


def _repeat_heads(tracker: Tracker, heads: int, *operands: Operand) -> list[Operand]:
    """Repeat keys and values [..., kv heads, s, d], so that there is one for every query head.

    Attributes of the running module that hold the number of copies count them, too: other calls of it, such as those
    with a mask, repeat the heads by this number.
    """
    copied = [tracker.follows_copies(_along_heads(o), o.shape[-3]) and o.shape[-3] < heads for o in operands]
    found = []
    for operand, by_copy in zip(operands, copied, strict=True):
        originals, times = _along_heads(operand), heads // operand.shape[-3]
        label = operand.label
        if by_copy:
            if originals is None:
                tracker.labels.lock(label, f"{REPEATED} in {tracker.where}")
            made = tracker.new_copies(times, _number_of_copies(tracker, times), originals)
            label = made.repeat(operand.shape[-3]).view([1] * (len(operand.shape) - 3) + [-1, 1, 1])
        elif label is not None and originals is not None:
            label = label.repeat_interleave(times, -3)
        found.append(Operand(torch.Size((*operand.shape[:-3], heads, *operand.shape[-2:])), label))
    return found


def _along_heads(operand: Operand) -> Tensor | None:
    """Return the labels along the heads of keys or values [..., kv heads, s, d]; ``None`` if they are no units."""
    return None if operand.label is None or operand.label.shape[-3] == 1 else operand.label.flatten()


def _number_of_copies(tracker: Tracker, times: int) -> tuple[str, str, None] | None:
    """Return the attribute of the running module that says how often heads of keys are repeated."""
    module = tracker.modules[-1] if tracker.modules else None
    name = next((name for name in COPIES if getattr(module, name, None) == times), None)
    return None if name is None else (str(tracker.weights.module_name(module)), name, None)
