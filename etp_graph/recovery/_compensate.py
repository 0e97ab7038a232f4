"""Compensation in closed form: the layers that read removed units get new weights and biases, without training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from etp_graph._config import require, require_count, require_number
from etp_graph.collect import naming_batch
from etp_graph.errors import ScoreError
from etp_graph.model import (
    eval_mode,
    is_sharded,
    named_tensors,
    run_model,
    without_attention_fast_path,
    without_autocast,
)
from etp_graph.plan import Plan, Positions, Selection, with_no_unit
from etp_graph.surgery import PreparedChanges, writing

from ._least_squares import solve
from ._readers import EMBEDDING, Place, Reader, RecordReaders


@dataclass(frozen=True, slots=True)
class LayerFit:
    """How well one layer reproduces its output from the units that stay.

    Attributes:
        layer: name of the weight.
        before: root mean square error of the output relative to its size, with the old weights. The mean of what is
            lost counts as made good if the layer has a bias.
        after: the same with the new weights.
    """

    layer: str
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Compensation:
    """What :func:`compensate_` did.

    Attributes:
        layers: one fit for each layer with new weights.
        skipped: weights that read removed units and were not changed, with the reason.
    """

    layers: tuple[LayerFit, ...]
    skipped: Mapping[str, str]

    def __str__(self) -> str:
        width = max((len(fit.layer) for fit in self.layers), default=5)
        lines = [f"{'layer':{width}}  error without  with compensation"]
        lines += [f"{fit.layer:{width}}  {fit.before:13.3f}  {fit.after:17.3f}" for fit in self.layers]
        lines += [f"{name}: not changed: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class InputMoments:
    """Means and products of the inputs of all layers that read units; :func:`input_moments` records them.

    Attributes:
        readers: what was recorded of each layer, by the rows of its weight.
        others: parameters that another operator reads, too, and the name of that operator.
    """

    readers: Mapping[Place, Reader] = field(repr=False)
    others: Mapping[str, str] = field(repr=False)


@torch.no_grad()
def compensate_(
    model: nn.Module,
    plan: Plan,
    selection: Selection,
    batches: Iterable[Any] | InputMoments,
    *,
    ridge: float = 1e-3,
    places: int = 4096,
) -> Compensation:
    """Change the weights that read removed units so that their layers give nearly the same outputs without them.

    Call it before :func:`etp_graph.prune_` with the same selection. In between the model is wrong, because the units
    that surgery will remove still count beside what makes them good. Each layer is fitted on its own, by least squares
    of its dense outputs on its kept inputs. If removed inputs are linear combinations of kept ones, the outputs are
    the same, except for ``ridge``. Layers whose weight is computed, packed for several uses or tied to an embedding are
    not changed.

    Source: reconstruction of ThiNet (Luo et al. 2017) and channel pruning (He et al. 2017); the mean goes into the
    bias as in FLAP (An et al. 2024).

    Args:
        model: the dense model, changed in place. It runs in eval mode.
        plan: its plan.
        selection: the units that stay.
        batches: example inputs as :func:`etp_graph.trace` takes them; a few hundred samples. Tokens whose
            ``attention_mask`` is zero are left out. Or what :func:`input_moments` recorded of them, which serves for
            any number of selections.
        ridge: how strongly the old weights are preferred, relative to the mean square of an input. Raise it if there
            are fewer samples than inputs of a layer.
        places: at most this many pixels per convolution and batch are used, drawn at random with a fixed seed.

    Raises:
        PlanError: the plan is not of this model.
        SelectionError: the selection violates a constraint of a group.
        ScoreError: there are no batches, the model does not run on one, activations are not finite, or weights are on
            the meta device or sharded. The model is unchanged, as after any other exception.
    """
    found, changes = prepare_compensation(model, plan, selection, batches, ridge=ridge, places=places)
    changes.commit()
    return found


@torch.no_grad()
def prepare_compensation(
    model: nn.Module,
    plan: Plan,
    selection: Selection,
    batches: Iterable[Any] | InputMoments,
    *,
    ridge: float = 1e-3,
    places: int = 4096,
) -> tuple[Compensation, PreparedChanges]:
    """Do all of :func:`compensate_` that can fail, and change nothing. The arguments are those of :func:`compensate_`.

    Raises:
        PlanError, SelectionError, ScoreError: as :func:`compensate_`.
    """
    plan.check(model)
    selection.check(plan)
    require_number("ridge", ridge, 0)
    require_count("places", places, 1)
    tensors = _whole_tensors(model)
    lossy = _lossy_axes(plan, with_no_unit(selection.flat(plan).cpu(), True), tensors)
    if isinstance(batches, InputMoments):
        recorded = batches
    else:
        recorded = _record(model, {name: tensors[name] for name in lossy}, tensors, batches, places)
    fits, values, skipped = [], dict[str, Tensor](), _unread(recorded, lossy)
    for place, reader in recorded.readers.items():
        kept = lossy.get(place.parameter, {}).get(reader.in_axis)
        if kept is not None and place.parameter not in skipped:
            fits.append(_fit(reader, kept, tensors, values, ridge))
    changes = [writing(tensors[name], value) for name, value in values.items()]
    return Compensation(tuple(fits), skipped), PreparedChanges(changes)


@torch.no_grad()
def input_moments(model: nn.Module, plan: Plan, batches: Iterable[Any], *, places: int = 4096) -> InputMoments:
    """Record what :func:`compensate_` needs of batches, for all selections of a plan.

    Many pruned sizes of one model, or many criteria, then cost one run of the batches. Needs memory for a float64
    matrix [inputs, inputs] of each layer that reads units.

    Args:
        model: the dense model. It runs in eval mode and is not changed.
        plan: its plan.
        batches: example inputs, as for :func:`compensate_`.
        places: as for :func:`compensate_`.

    Raises:
        PlanError, ScoreError: as :func:`compensate_`.
    """
    plan.check(model)
    require_count("places", places, 1)
    tensors = _whole_tensors(model)
    goes = torch.zeros(plan.n_units, dtype=torch.bool)
    for group, span in plan.spans():
        goes[span] = group.locked is None
    lossy = _lossy_axes(plan, with_no_unit(~goes, True), tensors)
    return _record(model, {name: tensors[name] for name in lossy}, tensors, batches, places)


def _whole_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model by name. Raise :class:`ScoreError` if one has no values or is sharded."""
    tensors = dict(named_tensors(model))
    for name, tensor in tensors.items():
        require(
            not (tensor.is_meta or is_sharded(tensor)),
            f"{name} is on the meta device or sharded: compensate a whole model with its weights.",
            ScoreError,
        )
    return tensors


def _unread(recorded: InputMoments, lossy: Mapping[str, Mapping[int, Tensor]]) -> dict[str, str]:
    """Return the weights that stay as they are although they read removed units, with the reason of each."""
    readers = {place.parameter: reader.in_axis for place, reader in recorded.readers.items()}
    places = {name: [place for place in recorded.readers if place.parameter == name] for name in readers}
    found = {}
    for name, axes in lossy.items():
        other = recorded.others.get(name)
        if name in readers and readers[name] in axes and other is not None:
            found[name] = f"{other} reads it, too"
        elif any(a.overlaps(b) for a, b in combinations(places.get(name, ()), 2)):
            found[name] = "it is read as a whole and in parts"
        elif name not in readers and 1 in axes and other != EMBEDDING:
            found[name] = "no batch reads it" if other is None else f"it is read by {other}, which is no known layer"
    return found


def _lossy_axes(plan: Plan, keep: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
    """Return the kept positions, bool [size], of each axis of each floating-point matrix or kernel that loses some."""
    found: dict[str, dict[int, Tensor]] = {}
    for name, parts in Positions(plan).axes.items():
        if tensors[name].ndim > 1 and tensors[name].is_floating_point():
            lossy = {part.axis: part.kept_positions(keep) for part in parts}
            lossy = {axis: kept for axis, kept in lossy.items() if not bool(kept.all())}
            if lossy:
                found[name] = lossy
    return found


def _record(
    model: nn.Module, lossy: Mapping[str, Tensor], tensors: Mapping[str, Tensor], batches: Iterable[Any], places: int
) -> InputMoments:
    """Run the model on all batches and return what was recorded."""
    biases = {name: tensor for name, tensor in tensors.items() if name not in lossy}
    mode, number = RecordReaders(lossy, biases, places=places), 0
    with eval_mode(model), without_autocast(), without_attention_fast_path():
        for number, batch in enumerate(batches, start=1):
            mode.begin_batch(batch.get("attention_mask") if isinstance(batch, Mapping) else None)
            with naming_batch(number), mode:
                run_model(model, batch)
    require(number > 0, "batches is empty: pass at least one batch of example inputs.", ScoreError)
    for place, reader in mode.readers.items():
        require(
            reader.moments.finite,
            f"the inputs of {place.parameter} hold NaN or infinite values: check the model and the batches.",
            ScoreError,
        )
    return InputMoments(mode.readers, mode.others)


def _fit(
    reader: Reader, kept: Tensor, tensors: Mapping[str, Tensor], values: dict[str, Tensor], ridge: float
) -> LayerFit:
    """Solve one layer, and write its new weight and bias to ``values``, the new parameters by name."""
    place, at = reader.weight, reader.bias
    new = _copy(values, tensors, place.parameter)
    weight = new.movedim((place.axis, reader.in_axis), (0, 1)).narrow(0, place.first, place.rows)
    bias = None if at is None else _copy(values, tensors, at.parameter).narrow(0, at.first, at.rows)
    taps = 1 if reader.per_position else prod(weight.shape[2:])
    kept = kept.to(weight.device)
    mean, second = reader.moments.mean_and_second(centered=bias is not None)
    flat = weight.movedim(1, -1).flatten(0, -2) if reader.per_position else weight.flatten(1)
    found = solve(flat.double(), mean, second, kept.repeat_interleave(taps), ridge=ridge)
    weight[:, kept] = _as_kernel(found.weight, weight[:, kept], per_position=reader.per_position)
    if bias is not None:
        bias.add_(found.shift.to(bias.dtype))
    lost, left, total = (max(error, 0.0) for error in (found.lost, found.left, found.total))
    return LayerFit(place.parameter, sqrt(lost / (total or 1)), sqrt(left / (total or 1)))


def _as_kernel(solution: Tensor, like: Tensor, *, per_position: bool) -> Tensor:
    """Return a solved matrix in the shape [outputs, inputs, *kernel] and the dtype of the weight."""
    if not per_position:
        return solution.reshape(like.shape).to(like.dtype)
    return solution.reshape(like.movedim(1, -1).shape).movedim(-1, 1).to(like.dtype)


def _copy(values: dict[str, Tensor], tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in values:
        values[name] = tensors[name].detach().clone()
    return values[name]
