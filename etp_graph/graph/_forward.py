"""Follow the forwards of a model and collect what they show: labels of the units, cost terms and names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from etp_graph.errors import PlanError
from etp_graph.model import (
    ModelState,
    Outputs,
    kept_generators,
    output_entry,
    plain_forward,
    restored_state,
    without_autocast,
)
from etp_graph.plan import Plan
from etp_graph.standins import standing_in

from ._counted_sizes import counted_sizes
from ._interception import run_followed
from ._labels import FEEDS_OUTPUT, TensorAxis
from ._readings import merge_readings
from ._shape_only import NeedsValues
from ._traced_numbers import current_numbers
from ._tracker import Tracker
from ._trackers import Trackers

_MODEL_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError)


@contextmanager
def prepared(model: nn.Module, *, autocast: bool = False) -> Iterator[ModelState]:
    """Prepare a model to be followed, and leave it and the process as they were.

    Stand-ins take the places of modules, integer attributes know their origin, and gradients are off. What the forward
    writes to the model is undone.

    Args:
        model: the model.
        autocast: leave the user's autocast on.
    """
    with (
        nullcontext() if autocast else without_autocast(), plain_forward(model), standing_in(model),
        restored_state(model) as state, counted_sizes(model), kept_generators(model), torch.no_grad(),
    ):  # fmt: skip
        yield state


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowedModel:
    """What the forwards of a model showed.

    Attributes:
        trackers: one for each reading.
        n_ops: number of cost terms of the forward in eval mode. Only these count, because a model in use is in it.
        tensors: name -> shape of every parameter and buffer. Some models make buffers in their first forward.
        parameters: names of the parameters.
        itemsizes: name -> bytes of a number, of the parameters whose numbers do not take 4 bytes.
        device: type of the device of the tensors.
        modes: the modes that the forwards needed to reach all parameters.
        notes: what the user should know.
        outputs: what counts as an output.
        left_out: names of what the model returned besides.
        entries: the entries of what the model returned that count as outputs.
    """

    trackers: tuple[Tracker, ...]
    n_ops: int
    tensors: dict[str, tuple[int, ...]]
    parameters: tuple[str, ...]
    itemsizes: dict[str, int]
    device: str
    modes: tuple[str, ...]
    notes: tuple[str, ...]
    outputs: Outputs = None
    left_out: tuple[str, ...] = ()
    entries: tuple[str, ...] = ()

    @property
    def input_axes(self) -> set[TensorAxis]:
        """Axes of dense layers that hold their input units."""
        return self.trackers[0].labels.inputs


def follow_model(model: nn.Module, example_inputs: Any, outputs: Outputs = None) -> FollowedModel:
    """Follow the model without its large products, or with all values if its code needs them.

    Raises:
        PlanError: no tensor leaves the model, ``outputs`` do not fit what it returns, or it is on the meta device and
            its code needs values.
        Exception: any error that the model itself raises on the example inputs.
    """
    try:
        return follow_forwards(model, example_inputs, outputs, compute=False)
    except (NeedsValues, PlanError, *_MODEL_ERRORS):  # an error of the model itself is raised again below
        pass
    try:
        return follow_forwards(model, example_inputs, outputs)
    except NeedsValues as error:
        raise PlanError(
            f"the forward uses values that parameters on the meta device cannot give ({error}): trace the model on a "
            "real device."
        ) from None


def follow_forwards(
    model: nn.Module, example_inputs: Any, outputs: Outputs = None, *, compute: bool = True
) -> FollowedModel:
    """Follow the model in eval mode and, if that does not reach all parameters, in training mode.

    Args:
        model, example_inputs, outputs: as of ``trace``.
        compute: compute all values. The user's autocast is left on then: some models run under it only.
    """
    with prepared(model, autocast=compute) as state:
        trackers = Trackers(model, compute=compute, state=state, outputs=outputs)
        _follow_once(trackers, example_inputs)
        n_ops = len(trackers.all[0].ops)
        notes: tuple[str, ...] = ()
        modes: tuple[str, ...] = ("eval",)
        if _unreached(trackers):
            notes, modes = _follow_training(trackers, example_inputs)
        notes = (*notes, *_lock_numbers(trackers))
        _lock_caches(trackers, state, example_inputs)
        for tensor in state.built_tensors():
            trackers.shape_only.require_value("a tensor that the model keeps", tensor)
        for tracker in trackers.all:
            tracker.lock_used_elsewhere()
        parameters = dict(model.named_parameters())
        tensors = parameters | dict(model.named_buffers())
        return FollowedModel(
            trackers=tuple(trackers.all),
            n_ops=n_ops,
            tensors={name: tuple(tensor.shape) for name, tensor in tensors.items()},
            parameters=tuple(parameters),
            itemsizes={name: p.element_size() for name, p in parameters.items() if p.element_size() != 4},
            device=next(iter(tensors.values())).device.type,
            modes=modes,
            notes=notes,
            outputs=outputs,
            left_out=tuple(trackers.left_out),
            entries=tuple(trackers.entries),
        )


def _lock_numbers(trackers: Trackers) -> tuple[str, ...]:
    """Lock the units whose number the code uses, or keep their numbers apart; return notes."""
    numbers = current_numbers()
    if numbers is None:
        return ()
    for tracker in trackers.all:
        tracker.lock_used_numbers(numbers)
    return _notes_on_widths(sorted({line for tracker in trackers.all for line in tracker.keep_widths_apart(numbers)}))


def _lock_caches(trackers: Trackers, state: ModelState, example_inputs: Any) -> None:
    """Lock the units of tensors that the model keeps for later forwards: surgery would not cut them.

    A second forward overwrites what the first one only recorded (a map of attention), and leaves what it kept.
    """
    kept = state.kept_tensors()
    if not any(tensor in tracker.label_of for tensor in kept.values() for tracker in trackers.all):
        return
    with suppress(*_MODEL_ERRORS):
        run_followed(Trackers(trackers.model, compute=trackers.compute, state=state), example_inputs)
    left = state.kept_tensors().keys()
    for tracker in trackers.all:
        tracker.lock_all([t for key, t in kept.items() if key in left], "is kept by the model for later forwards")


def group_units(followed: FollowedModel) -> Plan:
    """Group the units that have to stay or go together, and return the plan."""
    inner = followed.trackers[0]
    merged = merge_readings(followed.trackers, followed.n_ops)
    return Plan(
        groups=merged.groups,
        tensors=followed.tensors,
        parameters=followed.parameters,
        ops=merged.ops,
        uncounted=tuple(sorted(inner.uncounted)),
        modes=followed.modes,
        notes=(*followed.notes, *_notes_on_branches(inner)),
        unreached=tuple(name for name in followed.parameters if name not in inner.weights.seen),
        device=followed.device,
        activations=merged.activations,
        itemsizes=followed.itemsizes,
        cache=merged.cache,
        outputs=followed.outputs,
        left_out=followed.left_out,
    )


def _unreached(trackers: Trackers) -> bool:
    seen = trackers.all[0].weights.seen
    return any(name not in seen for name, _ in trackers.model.named_parameters())


def _follow_once(trackers: Trackers, example_inputs: Any, *, containers: bool = False) -> None:
    """Follow one forward and lock the units that its output shows."""
    found = run_followed(trackers, example_inputs, containers=containers)
    trackers.left_out |= dict.fromkeys(found.left_out)
    trackers.entries |= dict.fromkeys(map(output_entry, found.tensors))
    if not containers:
        for tracker in trackers.all:
            tracker.cached = [tracker.cache_term(number, tensor) for number, tensor in enumerate(found.cached)]
    if not found.tensors:
        raise PlanError("there is no tensor in what the model returns: nothing can be proved of it.")
    for tracker in trackers.all:
        for name, tensor in found.tensors.items():
            tracker.note_output(output_entry(name), tensor)
        tracker.lock_all(list(found.tensors.values()), FEEDS_OUTPUT)


def _follow_training(trackers: Trackers, example_inputs: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Follow the model a second time, with the containers in training mode.

    The user did not ask for this pass. A model that cannot run in that mode on these inputs therefore gets a note
    instead of an error, and the units first seen in this pass are locked.

    Returns notes, and the modes that reach parameters.
    """
    before, known = len(trackers.all[0].weights.seen), set(trackers.all[0].labels.producers)
    try:
        _follow_once(trackers, example_inputs, containers=True)
    except (PlanError, *_MODEL_ERRORS) as error:
        _lock_new_units(trackers, known)
        return (f"what eval mode does not reach could not be followed: in training mode the model raises {error!r}",), (
            "eval",
        )
    return (), ("eval", "train") if len(trackers.all[0].weights.seen) > before else ("eval",)


def _lock_new_units(trackers: Trackers, known: set[TensorAxis]) -> None:
    for tracker in trackers.all:
        for axis in set(tracker.labels.producers) - known:
            tracker.labels.lock(tracker.labels.axes[axis], "could not be followed to its end in training mode")


def _notes_on_widths(lines: Sequence[str]) -> tuple[str, ...]:
    """Return a note if the code compares widths that differ, because equal ones would take another branch."""
    if not lines:
        return ()
    return (
        f"the code compares widths ({_first_of(lines)}): the larger one stays larger, so that it takes the same branch",
    )


def _notes_on_branches(tracker: Tracker) -> tuple[str, ...]:
    """Return a note if Python code read values of tensors, because another input may then take another branch."""
    if not tracker.readers:
        return ()
    where = _first_of(list(tracker.readers))
    return (f"the code of {where} reads values of tensors: the plan is that of the branches these inputs take",)


def _first_of(places: Sequence[str]) -> str:
    """Return the first places as a list in words."""
    return ", ".join(places[:3]) + (", ..." if len(places) > 3 else "")
