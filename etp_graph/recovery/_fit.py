"""Solve new weights for the layers that read removed units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from math import prod, sqrt

from torch import Tensor

from etp_graph.plan import Plan, Positions

from ._least_squares import solve
from ._readers import ROW_READERS, Reader
from ._record import InputMoments


@dataclass(frozen=True, slots=True)
class LayerFit:
    """How well one layer reproduces its output from the units that stay.

    Attributes:
        layer: name of the weight; of experts with its number, ``mlp.experts.down_proj[3]``.
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


def lossy_axes(plan: Plan, keep: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
    """Return the kept positions, bool [size], of each axis of each floating-point matrix or kernel that loses some.

    Args:
        plan: the plan.
        keep: bool [plan.n_units + 1]; the last entry is True.
        tensors: the tensors to look at, by name; a part of those of the model.
    """
    found: dict[str, dict[int, Tensor]] = {}
    for name, parts in Positions(plan).axes.items():
        if name in tensors and tensors[name].ndim > 1 and tensors[name].is_floating_point():
            lossy = {part.axis: part.kept_positions(keep) for part in parts}
            lossy = {axis: kept for axis, kept in lossy.items() if not bool(kept.all())}
            if lossy:
                found[name] = lossy
    return found


def fit_readers(
    recorded: InputMoments,
    lossy: Mapping[str, Mapping[int, Tensor]],
    tensors: Mapping[str, Tensor],
    *,
    ridge: float,
    release: bool = False,
) -> tuple[dict[str, Tensor], Compensation]:
    """Return the new weights and biases by name, and what was done. The tensors are not changed.

    Args:
        recorded: the inputs of the layers.
        lossy: what stays of each parameter, see :func:`lossy_axes`.
        tensors: the parameters by name.
        ridge: as for :func:`compensate_`.
        release: free the recorded matrices as soon as they were used, so that they can serve no other selection.
    """
    fits, values, skipped = [], dict[str, Tensor](), _unread(recorded, lossy, tensors)
    todo = [
        (reader, lossy[place.parameter][reader.in_axis])
        for place, reader in recorded.readers.items()
        if reader.in_axis in lossy.get(place.parameter, {}) and place.parameter not in skipped
    ]
    for number, (reader, kept) in enumerate(todo):
        last = release and all(later.moments is not reader.moments for later, _ in todo[number + 1 :])
        fits.append(_fit(reader, kept, tensors, values, ridge, release=last))
    return values, Compensation(tuple(fits), skipped)


def _unread(
    recorded: InputMoments, lossy: Mapping[str, Mapping[int, Tensor]], tensors: Mapping[str, Tensor]
) -> dict[str, str]:
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
        elif name not in readers and max(axes) > 0 and not (tensors[name].ndim == 2 and other in ROW_READERS):
            found[name] = "no batch reads it" if other is None else f"it is read by {other}, which is no known layer"
    return found


def _fit(
    reader: Reader, kept: Tensor, tensors: Mapping[str, Tensor], values: dict[str, Tensor], ridge: float, *,
    release: bool,
) -> LayerFit:  # fmt: skip
    """Solve one layer, and write its new weight and bias to ``values``, the new parameters by name."""
    place, at = reader.weight, reader.bias
    new = _copy(values, tensors, place.parameter)
    weight = new.movedim((place.axis, reader.in_axis), (-2, -1) if place.entry is not None else (0, 1))
    weight = (weight if place.entry is None else weight[place.entry]).narrow(0, place.first, place.rows)
    bias = None if at is None else _copy(values, tensors, at.parameter).narrow(0, at.first, at.rows)
    taps = 1 if reader.per_position else prod(weight.shape[2:])
    kept = kept.to(weight.device)
    parts = reader.moments.split(kept.repeat_interleave(taps), centered=bias is not None)
    if release:
        reader.moments.release()
    flat = weight.movedim(1, -1).flatten(0, -2) if reader.per_position else weight.flatten(1)
    found = solve(flat, parts, ridge=ridge)
    weight[:, kept] = _as_kernel(found.weight, weight[:, kept], per_position=reader.per_position)
    if bias is not None:
        bias.add_(found.shift.to(bias.dtype))
    lost, left, total = (max(error, 0.0) for error in (found.lost, found.left, found.total))
    layer = place.parameter if place.entry is None else f"{place.parameter}[{place.entry}]"
    return LayerFit(layer, sqrt(lost / (total or 1)), sqrt(left / (total or 1)))


def _as_kernel(solution: Tensor, like: Tensor, *, per_position: bool) -> Tensor:
    """Return a solved matrix in the shape [outputs, inputs, *kernel] and the dtype of the weight."""
    if not per_position:
        return solution.reshape(like.shape).to(like.dtype)
    return solution.reshape(like.movedim(1, -1).shape).movedim(-1, 1).to(like.dtype)


def _copy(values: dict[str, Tensor], tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in values:
        values[name] = tensors[name].detach().clone()
    return values[name]
