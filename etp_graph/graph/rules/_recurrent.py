"""Pass labels through recurrent layers: ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and their cells.

A *run* is one layer in one direction. Its hidden unit j has row j of every gate in ``weight_ih``, ``weight_hh`` and the
biases. It also has column j of ``weight_hh``, or of ``weight_hr`` if the state is projected. A module has one
``hidden_size`` for all its runs, so all runs keep the same number of units; see
:class:`etp_graph.graph._labels.EqualRuns`.

A hidden unit whose weights are zero stays zero if its initial state is zero, because tanh(0) = relu(0) = 0. A zero unit
with a nonzero initial state has no effect, because all weights that read it are zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from etp_graph.graph._labels import EqualRuns, Labels, Producer
from etp_graph.graph._tracker import Tracker
from etp_graph.graph._weights import NamedModule
from etp_graph.model import bind_arguments, running_line
from etp_graph.plan import Op

from ._operators import compact_label, labelled_dims

_VF: Any = torch._C._VariableFunctions  # the functions of ``torch._VF``, as a function mode gets them

GATES: Mapping[Callable[..., Any], int] = {_VF.lstm: 4, _VF.gru: 3, _VF.rnn_tanh: 1, _VF.rnn_relu: 1}
"""Functions of ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` -> number of gates in ``weight_ih`` and ``weight_hh``."""

CELL_GATES: Mapping[Callable[..., Any], int] = {
    _VF.lstm_cell: 4,
    _VF.gru_cell: 3,
    _VF.rnn_tanh_cell: 1,
    _VF.rnn_relu_cell: 1,
}
"""Functions of the cells -> number of gates."""

_OPTIONS = ("params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first")

_PADDED, _PACKED = ("input", "hx", *_OPTIONS), ("input", "batch_sizes", "hx", *_OPTIONS[:-1])

_CELL = ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh")

_OWN_FORWARDS = {
    cls.forward for cls in (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
}  # fmt: skip


def rule_of_recurrence(func: Any) -> Callable[[Tracker, Any, Any, Any, Any], None] | None:
    """Return the rule for a function that recurrent modules call, or ``None``.

    The rule is called as rule(tracker, func, args, kwargs, out).
    """
    if func in GATES:
        return _follow_layers
    if func in CELL_GATES:
        return _follow_cell
    return {
        torch.zeros: _follow_zero_state,
        _VF._pack_padded_sequence: _follow_packing,
        _VF._pad_packed_sequence: _follow_padding,
    }.get(func)


@dataclass(frozen=True, slots=True)
class _LayerDirection:
    """Names of the tensors of one layer in one direction. ``hr`` is the projection of its state, or ``None``."""

    ih: str
    hh: str
    biases: tuple[str, ...]
    hr: str | None = None


def _follow_zero_state(tracker: Tracker, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    """Label the initial state that a recurrent module creates if it gets none.

    The forward of PyTorch's recurrent modules calls ``torch.zeros`` for nothing else. Other zeros have a fixed size.
    """
    if makes_state(tracker) and out.ndim in (2, 3):
        runs, size = (out.shape[0] if out.ndim == 3 else 1), out.shape[-1]
        label = tracker.labels.new_labels(runs * size).view(runs, size)
        tracker.set(out, label.unsqueeze(1) if out.ndim == 3 else label)


def makes_state(tracker: Tracker) -> bool:
    """Return True if the forward of one of PyTorch's recurrent modules is running."""
    module = tracker.modules[-1] if tracker.modules else None
    return getattr(type(module), "forward", None) in _OWN_FORWARDS and "forward" not in vars(module)


def _follow_layers(tracker: Tracker, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    packed = "batch_sizes" in kwargs or (len(args) > 3 and isinstance(args[3], (list, tuple)))
    call = bind_arguments(_PACKED if packed else _PADDED, args, kwargs)
    directions = 2 if call["bidirectional"] else 1
    params, n_runs = call["params"], call["num_layers"] * directions
    per = len(params) // n_runs
    runs = [params[i * per : (i + 1) * per] for i in range(n_runs)]
    found = _follow_recurrence(tracker, GATES[func], call, runs, directions)
    if found is not None:
        last = found[0][-directions:].flatten()
        tracker.set(out[0], compact_label(last.view([1] * (out[0].ndim - 1) + [-1])))
        for state, units in zip(out[1:], found):
            tracker.set(state, compact_label(units.unsqueeze(1)))


def _follow_cell(tracker: Tracker, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    call = bind_arguments(_CELL, args, kwargs)
    params = [call[name] for name in _CELL[2:] if call.get(name) is not None]
    found = _follow_recurrence(tracker, CELL_GATES[func], call | {"has_biases": len(params) == 4}, [params], 1)
    if found is not None:
        for state, units in zip(_list_states(out), found):
            tracker.set(state, compact_label(units))


def _list_states(value: Any) -> list[Tensor]:
    """Return a list of the only state, or of h and c of an LSTM."""
    return [value] if isinstance(value, Tensor) else list(value)


def _follow_recurrence(
    tracker: Tracker, gates: int, call: Mapping[str, Any], params: Sequence[Sequence[Tensor]], directions: int
) -> tuple[Tensor, Tensor] | None:
    """Follow one call of all runs.

    Args:
        tracker: the tracker.
        gates: number of gates.
        call: the arguments of the call by name.
        params: the tensors of each run. Runs are in the order of the layers, directions of one layer next to each
            other.
        directions: number of directions.

    Returns:
        The units of h [runs, H or P] and of c [runs, H], or ``None`` if the module cannot be pruned.
    """
    x, states = call["input"], _list_states(call["hx"])
    into, steps = tracker.channels(x, -1), x.numel() // x.shape[-1]
    runs = [run for tensors in params if (run := _direction_of(tracker, tensors, call["has_biases"]))]
    if len(runs) < len(params):
        _lock_whole(tracker, [into, *map(tracker.get, states)], params, steps)
        return None
    layer = tracker.weights.running_module(tracker.modules)
    hidden: list[Tensor] = []
    made: list[Tensor] = []
    enters = into
    for number, run in enumerate(runs):
        if number and number % directions == 0:
            enters = torch.cat(made[-directions:])
        cells, put_out = _produce_direction(tracker, layer, run, gates, enters)
        hidden.append(cells)
        made.append(put_out)
        names = [name for name in (run.ih, run.hh, run.hr) if name]
        tracker.ops += [Op(name=layer.name, coefficient=steps, axes=((name, 0), (name, 1))) for name in names]
    found = torch.stack(made), torch.stack(hidden)
    tracker.weights.count_attributes(tracker.labels, layer, made_out=hidden[0], into=into)
    _tie_directions(tracker, layer, runs[0], *found)
    for state, units in zip(states, found):
        _unite_initial_state(tracker, state, units)
    return found


def _direction_of(tracker: Tracker, tensors: Sequence[Tensor], has_biases: bool) -> _LayerDirection | None:
    """Return the names of a run's tensors, or ``None`` if one of them is computed in the forward or is fixed."""
    names = [tracker.weights.name(tensor) for tensor in tensors]
    if any(name is None or name in tracker.weights.fixed for name in names):
        return None
    ih, hh, *rest = map(str, names)
    biases, projection = (rest[:2], rest[2:]) if has_biases else ([], rest)
    return _LayerDirection(ih, hh, tuple(biases), projection[0] if projection else None)


def _lock_whole(
    tracker: Tracker, labels: Sequence[Tensor | None], params: Sequence[Sequence[Tensor]], steps: int
) -> None:
    """Lock the units that enter a module that cannot be pruned, and add its cost. Its outputs get no labels."""
    for label in labels:
        tracker.labels.lock(label, f"enters {tracker.where}, whose weights are computed while running")
    macs = steps * sum(tensor.numel() for tensors in params for tensor in tensors if tensor.ndim == 2)
    tracker.ops.append(Op(name=tracker.where.strip("'"), coefficient=macs))


def _produce_direction(
    tracker: Tracker, layer: NamedModule, run: _LayerDirection, gates: int, into: Tensor
) -> tuple[Tensor, Tensor]:
    """Label all tensors of a run. Return its hidden units [H] and its output units ([P], or the hidden units)."""
    labels = tracker.labels
    hidden = _produce_gates(
        labels, Producer((run.ih, 0), layer.name, "hidden"), tracker.weights.shape(run.ih)[0], gates
    )
    for name in (run.hh, *run.biases):
        labels.add_axis((name, 0), hidden.repeat(gates))
    labels.add_axis((run.ih, 1), into)
    labels.inputs.add((run.ih, 1))
    made = hidden
    if run.hr is not None:
        size = tracker.weights.shape(run.hr)[0]
        made = _produce_gates(labels, Producer((run.hr, 0), layer.name, "projections"), size, 1)
        labels.add_axis((run.hr, 1), hidden)
    labels.add_axis((run.hh, 1), made)
    return hidden, made


def _produce_gates(labels: Labels, producer: Producer, size: int, gates: int) -> Tensor:
    """Return the units [size / gates] of an axis that holds every unit once per gate."""
    known = labels.axes.get(producer.axis)
    units = labels.new_labels(size // gates) if known is None else known[: size // gates]
    labels.add_axis(producer.axis, units.repeat(gates))
    labels.producers.setdefault(producer.axis, producer)
    return units


def _tie_directions(tracker: Tracker, layer: NamedModule, run: _LayerDirection, made: Tensor, hidden: Tensor) -> None:
    """Tie the runs, so that all of them keep the same number of units.

    There must be more hidden units than projections, because PyTorch requires ``proj_size < hidden_size``.
    """
    labels, floor, line = tracker.labels, 1, running_line()
    if run.hr is not None:
        floor += made.shape[1]
        labels.ties.setdefault((run.hr, 0), EqualRuns(made, 1, tracker.where, line))
        if getattr(layer.module, "proj_size", None) == made.shape[1]:
            labels.count((layer.name, "proj_size", None), made[0])
    labels.ties.setdefault((run.ih, 0), EqualRuns(hidden, floor, tracker.where, line))


def _unite_initial_state(tracker: Tracker, state: Tensor, units: Tensor) -> None:
    """Unite the units of an initial state ([runs, batch, H], of a cell [batch, H]) with those of the runs [runs, H].

    Lock both if the state has a fixed size.
    """
    label, why = tracker.get(state), f"the initial state of {tracker.where} has a fixed size"
    if label is None or label.shape[-2] > 1 or label.shape[-1] < state.shape[-1]:
        tracker.labels.lock(label, why)
        tracker.labels.lock(units, why)
    else:
        tracker.labels.unite(label.select(-2, 0).expand_as(units), units, why)


def _follow_packing(tracker: Tracker, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Label a packed sequence [steps, features] made of a padded one [T, B, features] or [B, T, features]."""
    label = _label_of_sequence(tracker, bind_arguments(("input",), args, kwargs)["input"])
    tracker.set(out[0], None if label is None else label[0])


def _follow_padding(tracker: Tracker, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Label a padded sequence [T, B, features] or [B, T, features] made of a packed one [steps, features]."""
    label = _label_of_sequence(tracker, bind_arguments(("data",), args, kwargs)["data"])
    tracker.set(out[0], None if label is None else label.unsqueeze(0))


def _label_of_sequence(tracker: Tracker, tensor: Tensor) -> Tensor | None:
    """Return the label of a sequence. Lock units along its steps or its batch."""
    label = tracker.get(tensor)
    if label is not None and set(labelled_dims(label)) - {tensor.ndim - 1}:
        tracker.labels.lock(label, f"lies along the steps of a sequence in {tracker.where}")
        return None
    return label
