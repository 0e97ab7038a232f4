"""Trace a model on example inputs and make its plan."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn

from etp_graph.errors import PlanError
from etp_graph.model import Outputs, check_outputs, without_garbage_collection
from etp_graph.plan import Group, Plan, chosen_kinds, lock_other_kinds
from etp_graph.verification import lock_what_fails, lock_what_fails_in_blocks

from ._forward import follow_model, group_units
from ._labels import TensorAxis
from ._output_notes import SEVERAL, notes_on_outputs
from ._refusals import require_traceable
from ._torch_pruning import trace_with_torch_pruning
from ._warnings import warn_about_attention

CHECK_LIMIT = 400_000_000
"""Maximum number of parameters for which ``check="auto"`` copies the whole model."""


def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    prune: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] = (),
    check: bool | Literal["auto"] = "auto",
    graph: Literal["labels", "torch-pruning"] = "labels",
    outputs: Outputs = None,
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
            residual stream, query heads inside a group, the dimensions of attention heads, and experts
            (:data:`etp_graph.plan.ON_REQUEST`).
        ignore: names or patterns (``"layer4.*"``) of modules. Units that their layers output or normalise are locked.
            Input units of an ignored dense layer may still be removed.
        check: check each group on a copy of the model, and lock the groups that fail, with the measured error as the
            reason. ``"auto"``: in the copy of a model of more than 400 million parameters, or on the meta device, the
            repeated blocks share their weights, and one block of each kind is checked.
        graph: source of the groups. ``"labels"``: as described above. ``"torch-pruning"``: the dependency graph of
            Torch-Pruning (Fang et al. 2023), for comparisons with DepGraph. The same check locks what it gets wrong.
        outputs: what counts as an output of the model. Units that an output shows are locked, all else that the model
            returns may change its width. Names or patterns (``"logits"``, ``"0"`` in a tuple, ``"feats.*"``, or
            ``"*"`` for every tensor), or a function of what the model returns that returns tensors. Default: all but
            caches, the states that recurrent layers hand on, and by-products of models of transformers (hidden
            states and attentions that were not asked for, the encoder's states, embeddings beside logits).
            ``Plan.left_out`` names what does not count; ``verify`` and ``compress`` follow the same choice.

    Returns:
        The plan. ``print(plan)`` lists the groups, their constraints, and the reasons of locked groups.

    Raises:
        PlanError: nothing can be removed, ``prune`` names no kind, a pattern of ``ignore`` or ``outputs`` matches
            nothing, or the model is compiled, scripted, exported or quantised.
        Exception: any error that the model itself raises on the example inputs.
    """
    require_traceable(model)
    kinds, outputs = chosen_kinds(prune), check_outputs(outputs)
    with torch.inference_mode(False):  # inference mode hides operators, and copies made in it cannot be pruned
        with without_garbage_collection():
            plan, input_axes = _unchecked_plan(model, example_inputs, graph, kinds, outputs)
        plan = _restrict_plan(plan, model, kinds, [ignore] if isinstance(ignore, str) else ignore, input_axes)
        plan = _check_plan(plan, model, example_inputs, check)
    if "heads" in kinds:
        warn_about_attention(model, plan)
    return plan


def _unchecked_plan(
    model: nn.Module, example_inputs: Any, graph: str, kinds: frozenset[str], outputs: Outputs
) -> tuple[Plan, Container[TensorAxis]]:
    """Return the plan of a source, and the axes of dense layers that hold their input units."""
    if graph == "torch-pruning":
        return trace_with_torch_pruning(model, example_inputs, outputs), ()
    if graph != "labels":
        raise PlanError(f"graph={graph!r}; choose one of 'labels', 'torch-pruning'.")
    followed = follow_model(model, example_inputs, outputs)
    plan = group_units(followed)
    notes = notes_on_outputs(followed.trackers, plan.groups, kinds, followed.entries)
    return replace(plan, notes=(*plan.notes, *notes)), followed.input_axes


def _restrict_plan(
    plan: Plan, model: nn.Module, kinds: frozenset[str], ignore: Sequence[str], input_axes: Container[TensorAxis]
) -> Plan:
    """Lock the groups of ignored modules and of kinds that were not asked for.

    Raises:
        PlanError: a pattern matches no module, or every group is locked.
    """
    groups = _lock_ignored(_lock_adapters(plan.groups, model), model, ignore, input_axes)
    groups = lock_other_kinds(groups, kinds)
    plan = replace(plan, groups=groups)
    _require_prunable(plan)
    return plan


def _lock_adapters(groups: Sequence[Group], model: nn.Module) -> tuple[Group, ...]:
    """Lock the groups that lie in adapters alone: their ranks, which the configuration of the adapter sets.

    Layers of peft name their adapters in ``adapter_layer_names``.
    """
    held = tuple(
        f"{path}.{name}." if path else f"{name}."
        for path, module in model.named_modules()
        if isinstance(names := getattr(module, "adapter_layer_names", None), tuple)
        for name in names
    )
    reason = "is the rank of an adapter, which its configuration sets"
    return tuple(
        replace(g, locked=reason) if g.locked is None and all(f"{s.tensor}.".startswith(held) for s in g.slices) else g
        for g in groups
    )


def _lock_ignored(
    groups: Sequence[Group], model: nn.Module, patterns: Sequence[str], input_axes: Container[TensorAxis]
) -> tuple[Group, ...]:
    """Lock the groups that hold units of a module whose name matches a pattern, or of a module inside it.

    Input units of a dense layer do not count as its units, so an ignored classifier may still lose inputs.
    """
    names = [name for name, _ in model.named_modules() if name] if patterns else []
    reasons: dict[str, str] = {}
    for pattern in patterns:
        hits = {name for name in names if fnmatchcase(name, pattern)}
        if not hits:
            raise PlanError(f"ignore={pattern!r} matches no module; names look like {', '.join(names[:5])}.")
        for group in groups:
            places = [(s.tensor, s.axis) for s in group.slices]
            owners = {place[0].rpartition(".")[0] for place in places if place not in input_axes}
            if any(owner == hit or owner.startswith(hit + ".") for owner in owners for hit in hits):
                reasons.setdefault(group.name, f"ignored ({pattern})")
    return tuple(replace(g, locked=g.locked or reasons.get(g.name)) for g in groups)


def _check_plan(plan: Plan, model: nn.Module, example_inputs: Any, check: bool | Literal["auto"]) -> Plan:
    """Lock the groups that fail the check, or note why there was none.

    Raises:
        PlanError: every group is locked.
    """
    if check is False:
        return plan
    run_check = lock_what_fails if check is True else _try_check
    plan = run_check(model, plan, example_inputs)
    _require_prunable(plan)
    return plan


def _try_check(model: nn.Module, plan: Plan, example_inputs: Any) -> Plan:
    """Return the checked plan. If the check cannot run on this model, return the plan with a note that says why."""
    check = lock_what_fails if _small_enough_to_copy(model) else lock_what_fails_in_blocks
    try:
        return check(model, plan, example_inputs)
    except Exception as error:  # noqa: BLE001 - code of a user, in a dtype that it may not expect
        note = f"not checked, because a copy of the model cannot be made or run in float64 or float32: {error!r}"
        return replace(plan, notes=(*plan.notes, note))


def _require_prunable(plan: Plan) -> None:
    if not plan.prunable:
        telling = sorted(plan.groups, key=lambda group: (group.locked or "").startswith(f"kind {group.kind!r}"))
        reasons = (
            "; ".join(f"{group.name}: {group.locked}" for group in telling[:8]) or "no layer of the layer table ran"
        )
        raise PlanError(
            " ".join(
                [
                    f"no group of this model can be pruned ({reasons}).",
                    *(f"{note[0].upper()}{note[1:]}." for note in plan.notes if note.startswith(SEVERAL)),
                ]
            )
        )


def _small_enough_to_copy(model: nn.Module) -> bool:
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters) <= CHECK_LIMIT and all(p.device.type != "meta" for p in parameters)
