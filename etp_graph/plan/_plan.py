"""Plans and selections. Both are immutable, can be printed, and convert to JSON and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import nn

from etp_graph.errors import PlanError
from etp_graph.model import Outputs, UnknownFunction, named_tensors, require_bare

from ._attributes import check_attributes
from ._cost import Cost
from ._groups import Group, group_bytes, group_from_json, group_json
from ._plan_json import ACTIVATION, parse_plan
from ._quantities import Quantity, counted_quantities, find_quantity, memory_quantity

FORMAT = 1


def name_norm(number: int) -> tuple[str, str, int | None]:
    """Return the key of the entry that holds the units of the norm without weights that a forward calls as number n."""
    return ACTIVATION, f"norm {number}", None


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """Term of the MACs: ``coefficient`` times the sizes of the (tensor, axis) pairs in ``axes``.

    A tensor whose name begins with "~" is an activation of the plan, with axis 0.
    """

    name: str
    coefficient: int
    axes: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Plan:
    """All groups of a model, with the tensors and attributes that hold their units; no weights.

    :func:`etp_graph.trace` makes it.

    Attributes:
        groups: the groups. Scores and forces are flat ``[n_units]`` vectors; group i owns
            ``offsets[i]:offsets[i + 1]``.
        tensors: shape of every parameter and buffer of the traced model, by name.
        parameters: the names among ``tensors`` that are parameters.
        ops: the terms of the MACs count for one forward with the example inputs.
        uncounted: operators that ran but are not in the MACs.
        modes: modes of the trace: ``eval``, and ``train`` if that reaches parameters that ``eval`` does not.
        unreached: parameters that no traced forward used; surgery does not change them.
        notes: remarks of the tracer for the user.
        device: device type of the traced model.
        activations: name of each activation axis in ``ops`` -> its size.
        itemsizes: name -> bytes of a number, of the parameters whose numbers do not take 4 bytes.
        cache: terms of the bytes of one token in the cache of keys and values that the traced model returned.
        outputs: what counts as an output of the model: names, a function, or ``None`` for the default of the tracer.
        left_out: names of what the traced model returned besides its outputs. Its width may change.
    """

    groups: tuple[Group, ...]
    tensors: Mapping[str, tuple[int, ...]]
    parameters: tuple[str, ...]
    ops: tuple[Op, ...] = ()
    uncounted: tuple[str, ...] = ()
    modes: tuple[str, ...] = ("eval",)
    unreached: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    device: str = "cpu"
    activations: Mapping[str, int] = field(default_factory=dict)
    itemsizes: Mapping[str, int] = field(default_factory=dict)
    cache: tuple[Op, ...] = ()
    outputs: Outputs = None
    left_out: tuple[str, ...] = ()
    offsets: tuple[int, ...] = field(init=False)
    _fingerprint: str = field(init=False, default="", repr=False)

    def __post_init__(self) -> None:
        names = [group.name for group in self.groups]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise PlanError(
                f"several groups have the name {twice[0]!r}: selections know groups by their names. Trace the model "
                "again with this version, or give each group a name of its own."
            )
        object.__setattr__(self, "offsets", (0, *accumulate(group.n_units for group in self.groups)))

    @property
    def n_units(self) -> int:
        """Return the number of units in all groups, which is the length of score and force vectors."""
        return self.offsets[-1]

    @property
    def dense(self) -> Cost:
        """The cost of the model with all its units.

        Raises:
            PlanError: a cost term names an axis that no tensor of the plan has.
        """
        amounts = {quantity.name: self._count(quantity) for quantity in counted_quantities()}
        return Cost.of(amounts, self.uncounted)

    def amount(self, quantity: str) -> int:
        """Return how much of a quantity the model with all its units takes; the name is that of ``Budget.quantity``.

        Raises:
            BudgetError: the quantity is not registered, or the plan does not count it.
        """
        return self._count(find_quantity(quantity))

    def memory_bytes(self, kv_tokens: int = 0) -> int:
        """Return the bytes of the parameters, and of the keys and values of so many tokens of all samples.

        They are counted in the precision of the traced model.

        Raises:
            BudgetError: the traced model returned no cache.
        """
        return self.amount(memory_quantity(kv_tokens))

    def _count(self, quantity: Quantity) -> int:
        return sum(
            coefficient * prod(self.axis_size(*axis, quantity=quantity.name) for axis in axes)
            for coefficient, axes in quantity.list_terms(self)
        )

    def axis_size(self, tensor: str, axis: int, *, quantity: str) -> int:
        """Return the size of an axis of a tensor or activation that a term of a quantity names.

        Raises:
            PlanError: the plan does not have it.
        """
        size = self.activations.get(tensor)
        shape = self.tensors.get(tensor, () if size is None else (size,))
        if not 0 <= axis < len(shape):
            raise PlanError(
                f"{quantity} counts axis {axis} of {tensor!r}, which the plan does not have: trace again, or correct "
                "the function that counts it."
            )
        return shape[axis]

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 of the plan without its device. It is computed at the first use."""
        if not self._fingerprint:
            body = {**self._body(groups=()), "device": ""}
            body.pop("itemsizes", None)  # a plan belongs to the model in any precision
            digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode())
            for group in self.groups:
                for part in group_bytes(group):
                    digest.update(part)
            object.__setattr__(self, "_fingerprint", digest.hexdigest())
        return self._fingerprint

    @property
    def prunable(self) -> tuple[Group, ...]:
        """Return the groups that are not locked."""
        return tuple(group for group in self.groups if group.locked is None)

    def __getitem__(self, name: str) -> Group:
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.fingerprint == other.fingerprint and self.device == other.device

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def spans(self) -> Iterator[tuple[Group, slice]]:
        """Yield each group with its slice of a flat ``[n_units]`` vector."""
        for group, start, stop in zip(self.groups, self.offsets, self.offsets[1:], strict=False):
            yield group, slice(start, stop)

    def to(self, device: str | torch.device) -> Plan:
        """Return the same plan for the model on another device."""
        return replace(self, device=torch.device(device).type)

    def lock(self, reasons: Mapping[str, str]) -> Plan:
        """Return a copy in which the named groups are locked, each with its reason.

        Raises:
            PlanError: a group of that name does not exist.
        """
        for name in reasons:
            if all(group.name != name for group in self.groups):
                raise PlanError(f"no group named {name!r} to lock; print(plan) lists the names.")
        return replace(self, groups=tuple(replace(g, locked=g.locked or reasons.get(g.name)) for g in self.groups))

    def check(self, model: nn.Module) -> None:
        """Raise :class:`PlanError` unless the model has the tensors, shapes and device of this plan."""
        require_bare(model)
        if type(model).__name__ == "OptimizedModule":
            raise PlanError(
                "the model is compiled; pass the original module (model._orig_mod) and compile it afterwards."
            )
        found = dict(named_tensors(model))
        for name, shape in self.tensors.items():
            if name not in found:
                raise PlanError(f"the plan knows a tensor {name!r} that this model lacks: trace this model.")
            have = tuple(found[name].shape)
            if have != shape:
                smaller = len(have) == len(shape) and all(a <= b for a, b in zip(have, shape, strict=True))
                why = "it was pruned after tracing" if smaller else "it is another model"
                raise PlanError(f"{name} has shape {list(have)}, the plan says {list(shape)}: {why}. Trace it again.")
            if found[name].device.type != self.device:
                raise PlanError(
                    f"{name} is on {found[name].device}, the plan was traced on {self.device!r}: "
                    f"use plan.to({found[name].device.type!r}), or move the model back."
                )
        for name in found:
            if name not in self.tensors:
                raise PlanError(f"the model has a tensor {name!r} that the plan does not know: trace this model.")
        check_attributes(model, self.groups)

    def _body(self, groups: Iterable[Group]) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "groups": [group_json(group) for group in groups],
            "tensors": {name: list(shape) for name, shape in self.tensors.items()},
            "parameters": list(self.parameters),
            "ops": _ops_json(self.ops),
            "uncounted": list(self.uncounted),
            "modes": list(self.modes),
            "unreached": list(self.unreached),
            "notes": list(self.notes),
            "device": self.device,
            "activations": dict(self.activations),
            **self._later_json(),
        }

    def _later_json(self) -> dict[str, Any]:
        """Return the entries that version 0.1.0 did not write; those that are empty are left out, as it did."""
        chosen = self.outputs
        if callable(chosen):
            said: dict[str, Any] = {"function": getattr(chosen, "__qualname__", type(chosen).__qualname__)}
        else:
            said = {"names": [chosen] if isinstance(chosen, str) else list(chosen or ())}
        body = {"outputs": said, "left_out": list(self.left_out), "cache": _ops_json(self.cache),
                "itemsizes": dict(self.itemsizes)}  # fmt: skip
        return {key: value for key, value in body.items() if value not in ([], {}, {"names": []})}

    def to_json(self) -> str:
        """Return the plan as JSON text; :meth:`from_json` reads it back."""
        return json.dumps(self._body(self.groups))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Return the plan that :meth:`to_json` wrote. Raise :class:`PlanError` for any other text."""
        body = parse_plan(text, FORMAT)
        return cls(
            groups=tuple(group_from_json(group) for group in body["groups"]),
            tensors={name: tuple(shape) for name, shape in body["tensors"].items()},
            parameters=tuple(body["parameters"]),
            ops=_ops_from_json(body["ops"]),
            uncounted=tuple(body["uncounted"]),
            modes=tuple(body["modes"]),
            unreached=tuple(body["unreached"]),
            notes=tuple(body["notes"]),
            device=body["device"],
            activations=dict(body["activations"]),
            itemsizes=dict(body.get("itemsizes", {})),
            cache=_ops_from_json(body.get("cache", [])),
            outputs=_outputs_from_json(body.get("outputs", {})),
            left_out=tuple(body.get("left_out", ())),
        )

    def __str__(self) -> str:
        from ._table import plan_table

        return plan_table(self)


def _ops_json(ops: Iterable[Op]) -> list[list[Any]]:
    return [[op.name, op.coefficient, [list(axis) for axis in op.axes]] for op in ops]


def _ops_from_json(body: Iterable[Any]) -> tuple[Op, ...]:
    return tuple(
        Op(name=name, coefficient=coefficient, axes=tuple((tensor, axis) for tensor, axis in axes))
        for name, coefficient, axes in body
    )


def _outputs_from_json(body: Mapping[str, Any]) -> Outputs:
    if "function" in body:
        return UnknownFunction(str(body["function"]))
    return tuple(body.get("names", ())) or None
