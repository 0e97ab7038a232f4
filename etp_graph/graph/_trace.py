"""Trace a model on example inputs and make its plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn

from etp_graph.errors import PlanError
from etp_graph.model import (
    eval_mode,
    named_tensors,
    plain_forward,
    preserved_rng,
    require_bare,
    run_model,
    tensors_of,
    without_attention_fast_path,
    without_garbage_collection,
)
from etp_graph.plan import Group, Plan, chosen_kinds, lock_other_kinds
from etp_graph.standins import standing_in
from etp_graph.verification import lock_what_fails

from ._interception import watching
from ._readings import MergedReadings, merge_readings
from ._shape_only import NeedsValues
from ._tracker import Tracker, Trackers
from ._warnings import warn_about_attention

_MODEL_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError)

CHECK_LIMIT = 400_000_000
"""Maximum number of parameters for which ``check="auto"`` runs the check."""


def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    prune: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] = (),
    check: bool | Literal["auto"] = "auto",
) -> Plan:
    """Find the groups of units that can be removed from a model. Does not change the model.

    The model runs on the example inputs, in eval mode and without gradients. Labels of the units are passed along
    with the activations (``graph/_labels.py``). If it is not certain what an operator does to the units, they are
    locked. If eval mode does not reach all parameters (auxiliary heads), a second pass follows, in which the
    containers are in training mode, but the layers are not.

    Args:
        model: any module whose forward takes tensors.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. The MACs of the plan
            are those of one forward with these inputs.
        prune: kinds of units to prune (:data:`etp_graph.plan.KINDS`), or ``"all"``. Default: all except the
            residual stream, the dimensions of attention heads and experts (:data:`etp_graph.plan.ON_REQUEST`).
        ignore: names or patterns (``"layer4.*"``) of modules. Units that their layers output or normalise are locked.
            Input units of an ignored dense layer may still be removed.
        check: check each group on a copy of the model, and lock the groups that fail, with the measured error as the
            reason. ``"auto"``: only for models of at most 400 million parameters that are not on the meta device.

    Returns:
        The plan. ``print(plan)`` lists the groups, their constraints, and the reasons of locked groups.

    Raises:
        PlanError: nothing can be removed, ``prune`` names no kind, an ``ignore`` pattern matches nothing, or the model
            is compiled.
        Exception: any error that the model itself raises on the example inputs.
    """
    require_bare(model)
    if type(model).__name__ == "OptimizedModule":
        raise PlanError("the model is compiled; trace the original module (model._orig_mod) and compile it afterwards.")
    if not any(True for _ in named_tensors(model)):
        raise PlanError("the model has no parameters: there is nothing to prune.")
    kinds = chosen_kinds(prune)
    with torch.inference_mode(False):  # inference mode hides operators, and copies made in it cannot be pruned
        patterns = [ignore] if isinstance(ignore, str) else ignore
        with plain_forward(model), standing_in(model), without_attention_fast_path(), without_garbage_collection():
            try:
                plan = _unchecked_plan(model, example_inputs, patterns, compute=False)
            except (NeedsValues, *_MODEL_ERRORS):  # an error of the model itself is raised again there
                plan = _computed_plan(model, example_inputs, patterns)
        plan = replace(plan, groups=lock_other_kinds(plan.groups, kinds))
        _require_prunable(plan)
        if check is True:
            plan = lock_what_fails(model, plan, example_inputs)
        elif check == "auto" and _small_enough_to_check(model):
            plan = _try_check(model, plan, example_inputs)
        elif check == "auto":
            note = "not checked, because the model is too large to copy or on the meta device: run etp_graph.verify"
            plan = replace(plan, notes=(*plan.notes, note))
        _require_prunable(plan)
    if "heads" in kinds:
        warn_about_attention(model, plan)
    return plan


def _computed_plan(model: nn.Module, example_inputs: Any, patterns: Sequence[str]) -> Plan:
    """Return the plan, from a forward that computes all values."""
    try:
        return _unchecked_plan(model, example_inputs, patterns)
    except NeedsValues as error:
        raise PlanError(
            f"the forward uses values that parameters on the meta device cannot give ({error}): trace the model on a "
            "real device."
        ) from None


def _unchecked_plan(model: nn.Module, example_inputs: Any, ignore: Sequence[str], *, compute: bool = True) -> Plan:
    """Return the plan without a check."""
    trackers = Trackers(model, compute=compute)
    notes, found, n_ops = _follow_model(trackers, example_inputs)
    inner = trackers.all[0]
    merged = merge_readings(trackers.all, n_ops)
    parameters = tuple(name for name, _ in model.named_parameters())
    # Read after the forward, because the first forward of some models creates buffers of the input's size.
    tensors = dict(named_tensors(model))
    return Plan(
        groups=_lock_ignored(inner, merged, ignore),
        tensors={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        parameters=parameters,
        ops=merged.ops,
        uncounted=tuple(sorted(inner.uncounted)),
        modes=("eval", "train") if found else ("eval",),
        notes=(*notes, *_notes_on_branches(inner)),
        unreached=tuple(name for name in parameters if name not in inner.weights.seen),
        device=next(iter(tensors.values())).device.type,
        activations=merged.activations,
    )


def _notes_on_branches(tracker: Tracker) -> tuple[str, ...]:
    """Return a note if Python code read values of tensors, because another input may then take another branch."""
    if not tracker.readers:
        return ()
    where = ", ".join(list(tracker.readers)[:3]) + (", ..." if len(tracker.readers) > 3 else "")
    return (f"the code of {where} reads values of tensors: the plan is that of the branches these inputs take",)


def _follow_model(trackers: Trackers, example_inputs: Any) -> tuple[tuple[str, ...], bool, int]:
    """Follow the model in eval mode and, if that does not reach all parameters, in training mode.

    Returns notes, whether training mode reached further parameters, and the number of cost terms of eval mode. Only
    these terms count, because a model in use is in eval mode.
    """
    notes: tuple[str, ...] = ()
    found = False
    _follow_forward(trackers, example_inputs)
    first = trackers.all[0]
    n_ops = len(first.ops)
    if {name for name, _ in first.model.named_parameters()} - first.weights.seen:
        notes, found = _follow_training(trackers, example_inputs)
    for tracker in trackers.all:
        tracker.lock_used_elsewhere()
    return notes, found, n_ops


def _try_check(model: nn.Module, plan: Plan, example_inputs: Any) -> Plan:
    """Return the checked plan. If the check cannot run on this model, return the plan with a note that says why."""
    try:
        return lock_what_fails(model, plan, example_inputs)
    except (RuntimeError, TypeError, ValueError) as error:
        note = f"not checked, because a copy of the model cannot be made or run in float64 or float32: {error}"
        return replace(plan, notes=(*plan.notes, note))


def _follow_forward(trackers: Trackers, example_inputs: Any, *, containers: bool = False) -> None:
    model = trackers.all[0].model
    with eval_mode(model, containers=containers), preserved_rng(model), watching(trackers):
        out = run_model(model, example_inputs)
    tensors = tensors_of(out)
    if not tensors:
        raise PlanError(
            f"the model returns {type(out).__name__}, in which there is no tensor: nothing can be proved of it."
        )
    for tracker in trackers.all:
        tracker.lock_all(tensors, "feeds the model's output")


def _follow_training(trackers: Trackers, example_inputs: Any) -> tuple[tuple[str, ...], bool]:
    """Follow the model a second time, with the containers in training mode.

    The user did not ask for this pass. A model that cannot run in that mode on these inputs therefore gets a note
    instead of an error, and the units first seen in this pass are locked.

    Returns notes, and whether the pass reached further parameters.
    """
    before, known = len(trackers.all[0].weights.seen), set(trackers.all[0].labels.producers)
    try:
        _follow_forward(trackers, example_inputs, containers=True)
    except _MODEL_ERRORS as error:
        for tracker in trackers.all:
            for axis in set(tracker.labels.producers) - known:
                tracker.labels.lock(tracker.labels.axes[axis], "could not be followed to its end in training mode")
        return (
            f"what eval mode does not reach could not be followed: in training mode the model raises {error!r}",
        ), False
    return (), len(trackers.all[0].weights.seen) > before


def _require_prunable(plan: Plan) -> None:
    if not plan.prunable:
        reasons = (
            "; ".join(f"{group.name}: {group.locked}" for group in plan.groups[:8]) or "no layer of the layer table ran"
        )
        raise PlanError(f"no group of this model can be pruned ({reasons}).")


def _lock_ignored(tracker: Tracker, merged: MergedReadings, patterns: Sequence[str]) -> tuple[Group, ...]:
    """Lock the groups that hold units of a module whose name matches a pattern, or of a module inside it.

    Input units of a dense layer do not count as its units, so an ignored classifier may still lose inputs.
    """
    groups = merged.groups
    names = [name for name, _ in tracker.model.named_modules() if name]
    reasons: dict[str, str] = {}
    for pattern in patterns:
        hits = {name for name in names if fnmatchcase(name, pattern)}
        if not hits:
            raise PlanError(f"ignore={pattern!r} matches no module; names look like {', '.join(names[:5])}.")
        for group in groups:
            places = {(piece.tensor, piece.axis) for piece in group.slices} - tracker.labels.inputs
            owners = {tensor.rpartition(".")[0] for tensor, _ in places}
            if any(owner == hit or owner.startswith(hit + ".") for owner in owners for hit in hits):
                reasons.setdefault(group.name, f"ignored ({pattern})")
    return tuple(replace(g, locked=g.locked or reasons.get(g.name)) for g in groups)


def _small_enough_to_check(model: nn.Module) -> bool:
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters) <= CHECK_LIMIT and all(p.device.type != "meta" for p in parameters)
