"""Check the JSON of a plan before anything is made of it, so that damage shows here and not during surgery."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

from etp_graph._json import JsonReader, shorten
from etp_graph.errors import PlanError

from ._groups import MAX_UNITS

_KEYS = (*"format groups tensors parameters ops uncounted modes unreached notes device activations".split(),)

_GROUP = (*"name kind n_units slices attributes blocks multiple min_units locked".split(),)

_LARGEST_TERM = 2**200
"""Largest number of operations or of elements in a tensor, so that sums and ratios of a few fit into a float."""

_POSITIONS_PER_LETTER = 1024
"""Most positions of units that one letter of the text may stand for, beyond :data:`MAX_UNITS` in all.

A map takes 8 bytes for each. The slices of large models of transformers stand for at most 500 in a letter.
"""

_READ = JsonReader(PlanError, "Trace the model again, or restore the text from a copy.")

ACTIVATION = "~"
"""Module name of entries that count units along an axis of an activation, for the cost only.

Surgery must skip them, because they are not attributes of a module.
"""


def parse_plan(text: object, known_format: int) -> dict[str, Any]:
    """Return the object in the JSON text of a plan, after a check of its content.

    Names refer to entries that exist, positions lie within their tensors, units within their groups, and nothing is
    so large that reading it takes the machine's memory. Keys that this version does not know are left to the caller.

    Raises:
        PlanError: the text is no plan, is of an unknown format, or contradicts itself.
    """
    where = "this text is not a plan"
    body = _READ.require_object(_READ.parse(text, where, fractions=False), where)
    if type(body.get("format")) is not int or body["format"] != known_format:
        found = shorten(body.get("format"))
        raise PlanError(f"plan format {found} is unknown; this version reads format {known_format}.")
    _READ.require_object(body, where, _KEYS, optional=None)
    shapes = {
        name: [_READ.require_integer(size, at) for at, size in _READ.list_items(shape, at)]
        for at, name, shape in _READ.list_entries(body["tensors"], f"{where}: tensors")
    }
    for name, shape in shapes.items():
        if prod(shape) > _LARGEST_TERM:
            _READ.refuse(f"{where}: tensors", f"{shorten(name)} has more elements than any tensor")
    activations = {
        name: _READ.require_integer(size, at)
        for at, name, size in _READ.list_entries(body["activations"], f"{where}: activations")
    }
    _check_lists(body, shapes, where)
    _check_ops(body["ops"], shapes, activations, f"{where}: ops")
    _check_later_keys(body, shapes, activations, where)
    groups = [
        _check_group(group, at, shapes, activations)
        for at, group in _READ.list_items(body["groups"], f"{where}: groups")
    ]
    _READ.require_unique((name for name, _ in groups), f"{where}: groups")
    if (total := sum(n_units for _, n_units in groups)) > MAX_UNITS:
        _READ.refuse(where, f"{total} units, more than {MAX_UNITS}")
    assert isinstance(text, str)
    if (total := _count_positions(body, shapes, activations)) > (most := MAX_UNITS + _POSITIONS_PER_LETTER * len(text)):
        _READ.refuse(where, f"its units have {total} positions in tensors and attributes, more than {most}")
    return body


def _count_positions(body: Mapping[str, Any], shapes: Mapping[str, list[int]], activations: Mapping[str, int]) -> int:
    """Return the largest number of entries that the maps of units have; see :class:`etp_graph.plan.Positions`.

    A map is as long as its axis, and slices that overlap have a map each.
    """
    found: dict[tuple[Any, ...], list[int]] = {}
    for group in body["groups"]:
        for tensor, axis, *_ in group["slices"]:
            found.setdefault((tensor, axis), []).append(shapes[tensor][axis])
        for module, name, item, index, _ in group["attributes"]:
            stop = index["range"][1] if isinstance(index, dict) else 1 + max(index)
            size = activations[name] if module == ACTIVATION else stop
            found.setdefault((module, name, item), []).append(size)
    return sum(len(sizes) * max(sizes) for sizes in found.values())


def _check_lists(body: Mapping[str, Any], shapes: Mapping[str, Any], where: str) -> None:
    for name in _READ.require_texts(body["parameters"], f"{where}: parameters"):
        if name not in shapes:
            _READ.refuse(f"{where}: parameters", f"{shorten(name)} is no tensor of it")
    for key in ("uncounted", "modes", "unreached", "notes"):
        for at, value in _READ.list_items(body[key], f"{where}: {key}"):
            _READ.require_text(value, at)
    _READ.require_text(body["device"], f"{where}: device")


def _check_later_keys(
    body: Mapping[str, Any], shapes: Mapping[str, list[int]], activations: Mapping[str, int], where: str
) -> None:
    """Check what version 0.1.0 did not write."""
    for at, name, size in _READ.list_entries(body.get("itemsizes", {}), f"{where}: itemsizes"):
        if name not in shapes:
            _READ.refuse(at, f"{shorten(name)} is no tensor of it")
        _READ.require_integer(size, at, low=1, high=16)
    _check_ops(body.get("cache", []), shapes, activations, f"{where}: cache")
    _READ.require_texts(body.get("left_out", []), f"{where}: left_out")
    outputs = _READ.require_object(body.get("outputs", {}), f"{where}: outputs")
    _READ.require_texts(outputs.get("names", []), f"{where}: outputs")
    _READ.require_text(outputs.get("function", ""), f"{where}: outputs")


def _check_ops(value: Any, shapes: Mapping[str, list[int]], activations: Mapping[str, int], where: str) -> None:
    for at, op in _READ.list_items(value, where):
        if len(_READ.require_list(op, at)) != 3:
            _READ.refuse(at, f"expected [name, coefficient, axes], got {shorten(op)}")
        _READ.require_text(op[0], at)
        term = _READ.require_integer(op[1], at)
        for pair in _READ.require_list(op[2], at):
            if len(_READ.require_list(pair, at)) != 2:
                _READ.refuse(at, f"expected [tensor, axis], got {shorten(pair)}")
            name = _READ.require_text(pair[0], at)
            n_axes = len(shapes[name]) if name in shapes else int(name in activations)
            axis = _READ.require_integer(pair[1], f"{at}: axis of {shorten(name)}", high=n_axes - 1)
            term *= shapes[name][axis] if name in shapes else activations[name]
        if term > _LARGEST_TERM:
            _READ.refuse(at, "counts more operations than any model has")


def _check_group(
    value: Any, where: str, shapes: Mapping[str, list[int]], activations: Mapping[str, int]
) -> tuple[str, int]:
    """Check one group; return its name and its number of units."""
    group = _READ.require_object(value, where, _GROUP, optional=None)
    name = _READ.require_text(group["name"], f"{where}: name")
    _READ.require_text(group["kind"], f"{where}: kind")
    n_units = _READ.require_integer(group["n_units"], f"{where}: n_units", high=MAX_UNITS)
    for key in ("blocks", "multiple", "min_units"):
        _READ.require_integer(group[key], f"{where}: {key}", low=int(key != "min_units"), high=MAX_UNITS)
    if n_units % group["blocks"]:
        _READ.refuse(where, f"{n_units} units in {group['blocks']} blocks of equal length")
    if group["locked"] is not None:
        _READ.require_text(group["locked"], f"{where}: locked")
    for at, piece in _READ.list_items(group["slices"], f"{where}: slices"):
        if len(_READ.require_list(piece, at)) != 5 or type(piece[0]) is not str or piece[0] not in shapes:
            _READ.refuse(
                at, f"expected [tensor, axis, index, unit, passive] with a tensor of the plan, got {shorten(piece)}"
            )
        shape = shapes[piece[0]]
        axis = _READ.require_integer(piece[1], f"{at}: axis", high=len(shape) - 1)
        _check_positions(piece[2], piece[3], at, size=shape[axis], n_units=n_units)
        _READ.require_boolean(piece[4], at)
    for at, attribute in _READ.list_items(group["attributes"], f"{where}: attributes"):
        _check_attribute(attribute, at, n_units, activations)
    return name, n_units


def _check_attribute(value: Any, where: str, n_units: int, activations: Mapping[str, int]) -> None:
    if len(_READ.require_list(value, where)) != 5:
        _READ.refuse(where, f"expected [module, name, item, index, unit], got {shorten(value)}")
    module, name = _READ.require_text(value[0], where), _READ.require_text(value[1], where)
    if value[2] is not None:
        _READ.require_integer(value[2], f"{where}: item", low=-64, high=63)
    size = MAX_UNITS
    if module == ACTIVATION:
        size = activations.get(name, 0)
    elif not name.isidentifier() or name.startswith("_"):
        _READ.refuse(where, f"{shorten(name)} is not the name of a public attribute")
    if not _check_positions(value[3], value[4], where, size=size, n_units=n_units):
        _READ.refuse(where, "counts no position")


def _check_positions(index: Any, unit: Any, where: str, *, size: int, n_units: int) -> int:
    """Check positions along an axis of ``size`` and the units that they belong to; return how many there are."""
    count = _check_index(index, f"{where}: index", size)
    if count != _check_index(unit, f"{where}: unit", n_units):
        _READ.refuse(where, "has not one unit for each position")
    return count


def _check_index(value: Any, where: str, size: int) -> int:
    """Check a list or a range of integers from 0 to ``size - 1``; return its length."""
    if type(value) is dict:
        ends = _READ.require_list(_READ.require_object(value, where, ("range",))["range"], where)
        if len(ends) != 2:
            _READ.refuse(where, f"expected [start, stop], got {shorten(ends)}")
        start = _READ.require_integer(ends[0], where, high=size)
        return _READ.require_integer(ends[1], where, low=start, high=size) - start
    entries = _READ.require_list(value, where)
    if not entries:
        return 0
    try:
        numbers = np.asarray(entries)
    except ValueError:  # lists of different lengths
        numbers = np.asarray("")
    if numbers.ndim != 1 or numbers.dtype.kind != "i" or numbers.min() < 0 or numbers.max() >= size:
        _READ.refuse(where, f"expected integers from 0 to {size - 1}, got {shorten(entries)}")
    return len(entries)
