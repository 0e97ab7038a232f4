"""Recurrent layers: one unit is a hidden unit of one layer in one direction.

Unit j owns row j of every gate of both weights and biases, column j of the recurrent weight, and what the next layer
reads of it. An ``nn.LSTM`` has one ``hidden_size`` for all of its layers and directions, so each of these runs keeps
equally many units. A unit whose weights and biases are zero stays at zero for ever, in an LSTM, a GRU and an RNN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import _VF, Tensor

from .labels import Producer
from .operators import compact
from .plan import Op

if TYPE_CHECKING:
    from .tracker import Tracker

LAYERS = {_VF.lstm: 4, _VF.gru: 3, _VF.rnn_tanh: 1, _VF.rnn_relu: 1}
"""Functions of whole layers -> number of gates."""
CELLS = {_VF.lstm_cell: 4, _VF.gru_cell: 3, _VF.rnn_tanh_cell: 1, _VF.rnn_relu_cell: 1}
"""Functions of one step -> number of gates."""


@dataclass(slots=True)
class _Run:
    """One layer in one direction: labels of its hidden units, and of what it puts out (projections, or the same)."""

    units: Tensor
    out: Tensor


def follow_layer(tracker: Tracker, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """``torch.lstm`` and its like, on padded or packed sequences."""
    packed = isinstance(args[2], Tensor) or (isinstance(args[2], tuple) and not isinstance(args[3], bool))
    x, states, stored = (args[0], args[2], args[3]) if packed else (args[0], args[1], args[2])
    bidirectional = args[8] if packed else args[7]
    layer = tracker.weights.running(tracker.modules)
    into, positions = tracker.channels(x, -1), x.numel() // x.shape[-1]
    tracker.labels.count((layer.name, "input_size", None), into)
    runs: list[_Run] = []
    per_layer = 2 if bidirectional else 1
    for weights in _runs(stored, args[4] if packed else args[3]):
        runs.append(_run(tracker, weights, into, LAYERS[func], positions))
        if len(runs) % per_layer == 0:
            into = torch.cat([run.out for run in runs[-per_layer:]])
    projected = runs[0].out is not runs[0].units
    tracker.labels.runs.append([run.units for run in runs])
    if projected:
        tracker.labels.runs.append([run.out for run in runs])
        # PyTorch knows a projection by its width being another one than that of the hidden units.
        tracker.labels.floors += [(run.units, len(run.out) + 1) for run in runs]
    lstm = isinstance(states, tuple)
    first, *rest = states if lstm else (states,)
    _states(tracker, layer.name, first, [run.out for run in runs], "proj_size" if projected else "hidden_size")
    for state in rest:
        _states(tracker, layer.name, state, [run.units for run in runs], "hidden_size")
    tracker.labels.count((layer.name, "hidden_size", None), runs[0].units)  # of one run; all have equally many
    if projected:
        tracker.labels.count((layer.name, "proj_size", None), runs[0].out)
    _label(tracker, out[0], into)
    tracker.set(out[1], compact(torch.stack([run.out for run in runs]).unsqueeze(1)))
    if lstm:
        tracker.set(out[2], compact(torch.stack([run.units for run in runs]).unsqueeze(1)))


def _runs(stored: Sequence[Tensor], biases: bool) -> Iterator[list[Tensor]]:
    """The weights of each layer and direction: input, recurrent, biases, and a projection, which narrows the second."""
    projected = stored[1].shape[1] * 4 != stored[1].shape[0] and any(
        t.ndim == 2 and t.shape == (stored[1].shape[1], stored[1].shape[0] // 4) for t in stored[2:5]
    )
    size = (4 if biases else 2) + projected
    for start in range(0, len(stored), size):
        yield list(stored[start : start + size])


def _run(tracker: Tracker, stored: Sequence[Tensor], into: Tensor, gates: int, positions: int) -> _Run:
    labels, weights = tracker.labels, tracker.weights
    w_in, w_rec = (weights.find(tensor, tracker.modules)[0][0] for tensor in stored[:2])
    layer = weights.running(tracker.modules)
    rows = labels.produce(Producer(w_in.axis(0), layer.name, "hidden"), w_in.shape[0])
    units = rows[: len(rows) // gates]
    labels.unite(rows.view(gates, -1), units.expand(gates, -1), "gates of a recurrent layer")
    projection = next((t for t in stored[2:] if t.ndim == 2), None)
    out = units
    if projection is not None:
        ref = weights.find(projection, tracker.modules)[0][0]
        out = labels.produce(Producer(ref.axis(0), f"{layer.name}.projection", "projections"), ref.shape[0])
        weights.record(labels, ref, 1, units)
        tracker.ops.append(Op(name=layer.name, coefficient=positions, axes=(ref.axis(0), ref.axis(1))))
    weights.record(labels, w_in, 1, into)
    labels.inputs.add(w_in.axis(1))
    weights.record(labels, w_rec, 0, rows)
    weights.record(labels, w_rec, 1, out)
    for bias in stored[2:]:
        if bias.ndim == 1:
            weights.along(labels, bias, rows)
    for ref in (w_in, w_rec):
        tracker.ops.append(Op(name=layer.name, coefficient=positions, axes=(ref.axis(0), ref.axis(1))))
    return _Run(units, out)


def _states(tracker: Tracker, module: str, state: Tensor, runs: Sequence[Tensor], attribute: str) -> None:
    """The initial state [runs, batch, units]: zeros made by the layer itself, a state of earlier, or another tensor."""
    known = tracker.get(state)
    own = tracker.labels.attributes.get((module, attribute, None))
    for number, units in enumerate(runs):
        if known is None:
            tracker.labels.lock(units, f"meets an initial state of fixed width in {tracker.where}")
            continue
        held = known.expand(len(runs), *known.shape[1:])[number].reshape(-1)
        if own is None or not torch.equal(held, own):
            tracker.labels.unite(units, held.expand_as(units), f"meets an initial state in {tracker.where}")


def _label(tracker: Tracker, tensor: Tensor, ids: Tensor) -> None:
    tracker.set(tensor, compact(ids.view([1] * (tensor.ndim - 1) + [-1])))


def follow_cell(tracker: Tracker, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """One step: ``torch.lstm_cell`` and its like."""
    x, states, *stored = args
    layer = tracker.weights.running(tracker.modules)
    into = tracker.channels(x, -1)
    tracker.labels.count((layer.name, "input_size", None), into)
    run = _run(tracker, [t for t in stored if t is not None], into, CELLS[func], x.numel() // x.shape[-1])
    tracker.labels.count((layer.name, "hidden_size", None), run.units)
    for state in states if isinstance(states, (tuple, list)) else (states,):
        known = tracker.get(state)
        if known is None:
            tracker.labels.lock(run.units, f"meets a state of fixed width in {tracker.where}")
        else:
            tracker.labels.unite(run.units, known.reshape(-1).expand_as(run.units), "a state of another layer")
    for tensor in out if isinstance(out, tuple) else (out,):
        _label(tracker, tensor, run.units)
