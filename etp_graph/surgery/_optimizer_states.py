"""Cut the states of optimizers together with their parameters, where it is known what an entry holds.

A state is looked at entry by entry, also inside of lists and dictionaries. An entry can be cut if it has the shape of
its parameter, or if it is an average over some axes of it (Adafactor). Entries of low precision of torchao are decoded,
cut and encoded again. Of any other tensor nothing is known: preconditioners (Shampoo, SOAP), flat vectors over all
parameters (LBFGS), codes with scales of their own (bitsandbytes).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from etp_graph.errors import PlanError
from etp_graph.model import inner_optimizer, is_sharded

from ._commit import Change
from ._cuts import Cut

OnUncuttable = Literal["refuse", "reset"]

Optimizers = Optimizer | Iterable[Optimizer] | None

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)

_ALWAYS_PLAIN = 4096
"""torchao keeps states with fewer elements in full precision."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """Tensor in the state of a parameter. ``name`` is its path in the state, such as ``momentum['fast']``."""

    name: str
    value: Any


@dataclass(slots=True)
class _Survey:
    """What an optimizer keeps.

    Attributes:
        unknown: name of each entry of which it is not known how to cut it -> a description of one.
        affected: keys of ``optimizer.state`` that hold such an entry.
    """

    unknown: dict[str, str] = field(default_factory=dict)
    affected: list[Any] = field(default_factory=list)


def list_optimizers(optimizers: Optimizers) -> tuple[Optimizer, ...]:
    """Return the optimizers inside of their wrappers as a tuple, without repetitions.

    Raises:
        PlanError: one of them is not a PyTorch optimizer.
    """
    given = () if optimizers is None else (optimizers,) if isinstance(optimizers, Optimizer) else optimizers
    found = tuple(given) if isinstance(given, Iterable) else (given,)
    for one in found:
        if not isinstance(one, Optimizer):
            raise PlanError(
                f"optimizer: expected a torch.optim.Optimizer or a list of them, not {type(one).__name__}; unwrap it."
            )
    inner = [inner_optimizer(one) for one in found]
    return tuple({id(one): one for one in inner}.values())


def check_choice(on_uncuttable: str) -> None:
    """Raise :class:`PlanError` unless this is a way to treat states that cannot be cut."""
    if on_uncuttable not in get_args(OnUncuttable):
        raise PlanError(f"on_uncuttable={on_uncuttable!r}: it must be one of {', '.join(get_args(OnUncuttable))}.")


def check_held(optimizers: Sequence[Optimizer], cuts: Mapping[str, Cut]) -> None:
    """Raise :class:`PlanError` if none of the optimizers holds a trainable parameter that is cut."""
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, cut in cuts.items():
        tensor = cut.tensor
        if optimizers and isinstance(tensor, nn.Parameter) and tensor.requires_grad and id(tensor) not in held:
            who = "the optimizer does" if len(optimizers) == 1 else "the optimizers do"
            raise PlanError(
                f"{who} not hold {name}: pass the optimizer that trains this model (several as a list), or none."
            )


def find_uncuttable(optimizer: Optimizer, names: Mapping[int, str] | None = None) -> str:
    """Return a description of the states of an optimizer that cannot be cut, or an empty text.

    Args:
        optimizer: the optimizer.
        names: name of each parameter, by its ``id``.
    """
    return _listed(_survey(optimizer, names or {}).unknown)


def refusal(optimizer: Optimizer, unknown: str) -> str:
    """Return the sentence that explains why states cannot be cut, and what to do."""
    return (
        f"{type(optimizer).__name__} keeps {unknown}, which cannot be cut: its meaning is not known. Pass "
        "on_uncuttable='reset', so that these parameters begin with a fresh state, or prune without the optimizer and "
        "make a new one."
    )


def prepare_states(
    optimizer: Optimizer, cuts: Mapping[str, Cut], on_uncuttable: OnUncuttable = "refuse"
) -> list[Change]:
    """Return the changes that cut the states of an optimizer. All new tensors exist when this returns.

    Raises:
        PlanError: a state cannot be cut, and ``on_uncuttable`` is "refuse".
    """
    if not cuts:
        return []
    survey = _survey(optimizer, {id(cut.tensor): name for name, cut in cuts.items()})
    if survey.unknown and on_uncuttable == "refuse":
        raise PlanError(refusal(optimizer, _listed(survey.unknown)))
    gone = {id(key) for key in survey.affected}
    changes = [_forget_state(optimizer, key) for key in survey.affected]
    if isinstance(optimizer, torch.optim.LBFGS):  # it keeps the number of all elements
        changes.append(_set_attribute(optimizer, "_numel_cache", None))
    by_tensor = {id(cut.tensor): cut for cut in cuts.values()}
    for parameter, state in optimizer.state.items():
        cut = by_tensor.get(id(parameter))
        if cut is not None and id(parameter) not in gone:
            changes.append(_replace_state(optimizer, parameter, state, _cut_value(state, cut)))
    return changes


def require_full_shapes(optimizer: Optimizer, cuts: Mapping[str, Cut]) -> None:
    """Raise :class:`PlanError` unless the optimizer holds what is cut, with states of the parameters' shapes only."""
    check_held([optimizer], cuts)
    names = {id(cut.tensor): name for name, cut in cuts.items()}
    for parameter, state in optimizer.state.items() if cuts else ():
        for entry in _entries(state):
            value = entry.value
            whole = isinstance(parameter, Tensor) and isinstance(value, Tensor) and value.shape == parameter.shape
            if not whole:
                raise PlanError(refusal(optimizer, _describe(entry, parameter, names)))


def _survey(optimizer: Optimizer, names: Mapping[int, str]) -> _Survey:
    """Find the entries that cannot be cut. What is unknown for one parameter is so for all that have the entry."""
    found = _Survey()
    entries = [(key, entry) for key, state in optimizer.state.items() for entry in _entries(state)]
    for key, entry in entries:
        if entry.name not in found.unknown and _cut_axes(entry, key) is None:
            found.unknown[entry.name] = _describe(entry, key, names)
    affected = {id(key): key for key, entry in entries if entry.name in found.unknown}
    found.affected = list(affected.values())
    return found


def _listed(unknown: Mapping[str, str]) -> str:
    first = next(iter(unknown.values()), "")
    return first if len(unknown) < 2 else f"{first} (and {len(unknown) - 1} like it)"


def _describe(entry: _Entry, key: Any, names: Mapping[int, str]) -> str:
    kind = "" if type(entry.value) in _PLAIN else f" ({type(entry.value).__name__})"
    shape = f" of shape {list(entry.value.shape)}" if isinstance(entry.value, Tensor) else ""
    what = f"state {entry.name!r}{kind}{shape}"
    if not isinstance(key, Tensor):
        return f"{what} for all parameters ({key!r})"
    return f"{what} for {names.get(id(key), 'a parameter')} of shape {list(key.shape)}"


def _entries(state: Any, name: str = "") -> Iterator[_Entry]:
    """Yield the tensors of a state that have more than one element, and objects that hold tensors."""
    if isinstance(state, Tensor):
        if state.numel() > 1:
            yield _Entry(name or "state", state)
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from _entries(value, f"{name}[{key!r}]" if name else str(key))
    elif isinstance(state, (list, tuple)):
        for position, value in enumerate(state):
            yield from _entries(value, f"{name}[{position}]")
    elif any(isinstance(value, (Tensor, Mapping, list, tuple)) for value in getattr(state, "__dict__", {}).values()):
        yield _Entry(name or "state", state)


def _cut_axes(entry: _Entry, parameter: Any) -> dict[int, int] | None:
    """Return the axis of the parameter for each axis of an entry; ``None`` if it is not known."""
    value = entry.value
    if not isinstance(value, Tensor) or not isinstance(parameter, Tensor) or not _is_readable(value, parameter):
        return None
    own, whole = tuple(value.shape), tuple(parameter.shape)
    if len(own) == len(whole):
        averaged = all(a in (b, 1) for a, b in zip(own, whole, strict=True))
        return {axis: axis for axis, size in enumerate(own) if size == whole[axis]} if averaged else None
    gone = [axis for axis in range(len(whole)) if whole[:axis] + whole[axis + 1 :] == own]
    if not gone:
        return None
    left = [tuple(axis for axis in range(len(whole)) if axis != one) for one in gone]
    if len(gone) == 1:
        return dict(enumerate(left[0]))
    last = entry.name.rpartition(".")[2]
    if not last.endswith(("row", "col")):
        return None
    return dict(enumerate(left[-1] if last.endswith("row") else left[0]))


def _is_readable(value: Tensor, parameter: Tensor) -> bool:
    if value.is_quantized or value.layout != torch.strided:
        return False
    return type(value) in _PLAIN or _is_torchao_state(value) or (is_sharded(value) and is_sharded(parameter))


def _is_torchao_state(value: Tensor) -> bool:
    kind = type(value)
    return kind.__module__.startswith("torchao.") and all(hasattr(kind, name) for name in ("dequantize", "zeros"))


def _cut_value(value: Any, cut: Cut, name: str = "") -> Any:
    """Return the kept part of a state: containers of the same types, with new tensors."""
    if isinstance(value, Tensor):
        return _cut_tensor(value, cut, name) if value.numel() > 1 else value
    if isinstance(value, Mapping):
        parts = {key: _cut_value(part, cut, f"{name}[{key!r}]" if name else str(key)) for key, part in value.items()}
        return parts if type(value) is dict else _same_kind(value, parts)
    if isinstance(value, (list, tuple)):
        items = [_cut_value(part, cut, f"{name}[{position}]") for position, part in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _same_kind(value: Mapping[Any, Any], parts: dict[Any, Any]) -> Any:
    made: Any = copy.copy(value)
    made.update(parts)
    return made


def _cut_tensor(value: Tensor, cut: Cut, name: str) -> Tensor:
    axes = _cut_axes(_Entry(name or "state", value), cut.tensor)
    assert axes is not None, "the survey refuses entries that cannot be cut"
    kept = {axis: cut.kept[whole].to(value.device) for axis, whole in axes.items() if whole in cut.kept}
    if not kept:
        return value
    if type(value) in _PLAIN or is_sharded(value):
        return Cut(value, kept).apply(value)
    decoded = value.dequantize().to(cut.tensor.dtype)
    return _encode(Cut(decoded, kept).apply(decoded), value)


def _encode(values: Tensor, like: Any) -> Tensor:
    """Return values in the number format of a state of torchao, or in full precision where torchao keeps that."""
    block = like.block_size
    if values.numel() < _ALWAYS_PLAIN or values.numel() % block:
        return values
    options: dict[str, Any] = {"block_size": block, "device": values.device}
    if hasattr(like, "signed"):
        options["signed"] = like.signed
    made: Tensor = type(like).zeros(values.shape, **options)
    return made.to(like.dtype).copy_(values) if made.dtype != like.dtype else made.copy_(values)


def _replace_state(optimizer: Optimizer, key: Any, old: Any, new: Any) -> Change:
    """Return the change of one state. A dictionary stays the same object, because others may hold it."""
    if type(old) is not dict:
        return Change(lambda: optimizer.state.__setitem__(key, new), lambda: optimizer.state.__setitem__(key, old))
    before = dict(old)
    return Change(_fill(old, new), _fill(old, before))


def _fill(target: dict[Any, Any], content: dict[Any, Any]) -> Callable[[], None]:
    def fill() -> None:
        target.update(content)

    return fill


def _forget_state(optimizer: Optimizer, key: Any) -> Change:
    """Return the change that removes a state. Undoing it puts all states back in their order."""
    states = optimizer.state
    before = dict(states)

    def put_back() -> None:
        states.clear()
        states.update(before)

    return Change(lambda: states.pop(key, None), put_back)


def _set_attribute(holder: Any, name: str, value: Any) -> Change:
    old = getattr(holder, name)
    return Change(lambda: setattr(holder, name, value), lambda: setattr(holder, name, old))
