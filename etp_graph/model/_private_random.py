"""Let the random operators of one thread draw from private generators, so that no other thread notices them.

PyTorch's global generators belong to the process. To save them, run a forward and restore them repeats the numbers
that another thread drew in between. A dispatch mode belongs to its thread, so the operators are redirected instead.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ._random_state import SEEDED, changed_generators, generator_states, restore_generators_, seed_numpy_and_python_
from ._undone import undone

_SWAP = threading.Lock()
"""Held while an operator that accepts no generator runs with the state of a private one in the global generator."""


@dataclass(frozen=True, slots=True)
class _RandomOperator:
    """An operator that draws random numbers.

    Attributes:
        func: the overload that accepts a generator, or ``None`` if no overload does.
        position: of the generator among the arguments, if it can be given by position.
    """

    func: Any
    position: int | None


class PrivateRandom(TorchDispatchMode):
    """Context in which random operators of this thread draw from generators of its own, one for each device.

    An operator that accepts no generator (``native_dropout``, attention with dropout) runs with the state of the
    private generator in the global one, which gets its own state back right after this one operator. Nothing but what
    another thread draws meanwhile is lost.

    Args:
        seed: seed of the generators.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.call(func, args, kwargs or {})

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the result of an operator; for other dispatch modes, which need not enter this one, too."""
        operator = _random_operator(func)
        if operator is None or (device := _device(args, kwargs)).type == "meta":
            return func(*args, **kwargs)
        if operator.func is not None:
            return self._redirect(operator, device, args, kwargs)
        return self._swap(device, func, args, kwargs) if _draws(func, args, kwargs) else func(*args, **kwargs)

    def _redirect(self, operator: _RandomOperator, device: torch.device, args: Any, kwargs: Any) -> Any:
        """Call the overload with a private generator, unless the caller gave one of his own."""
        given, at = kwargs.get("generator"), operator.position
        if at is not None and len(args) > at:
            given, args = args[at], args[:at]
        own = given if given is not None and not _is_global(given) else self.generator(device)
        return operator.func(*args, **{**kwargs, "generator": own})

    def _swap(self, device: torch.device, func: Any, args: Any, kwargs: Any) -> Any:
        """Run the operator with the state of the private generator in the global generator of the device."""
        own, shared = self.generator(device), _global_generator(device)
        with _SWAP:
            before = shared.get_state()
            shared.set_state(own.get_state())
            try:
                return func(*args, **kwargs)
            finally:
                own.set_state(shared.get_state())
                shared.set_state(before)

    def generator(self, device: torch.device) -> torch.Generator:
        """Return the private generator of a device."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


@cache
def _random_operator(func: Any) -> _RandomOperator | None:
    """Return how an operator can be given a generator; ``None`` if it draws no random numbers."""
    schema = func._schema
    names = [argument.name for argument in schema.arguments]
    if "generator" in names:
        at = names.index("generator")
        return _RandomOperator(func, None if schema.arguments[at].kwarg_only else at)
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return None
    packet = func._overloadpacket
    others = (getattr(packet, name) for name in packet.overloads())
    return _RandomOperator(next((other for other in others if _adds_generator(other, schema)), None), None)


def is_random_operator(func: Any) -> bool:
    """Return True if an operator can draw random numbers, so that :meth:`PrivateRandom.call` treats it apart."""
    return _random_operator(func) is not None


def _adds_generator(other: Any, schema: Any) -> bool:
    """Return True if an overload has the arguments of a schema and a generator that is given by name."""
    more = [a for a in other._schema.arguments if not (a.name == "generator" and a.kwarg_only)]
    same = [(a.name, str(a.type)) for a in more] == [(a.name, str(a.type)) for a in schema.arguments]
    return same and len(more) < len(other._schema.arguments)


def _device(args: Any, kwargs: Any) -> torch.device:
    """Return the device that an operator draws on."""
    found = kwargs.get("device")
    if found is None:
        tensors = (leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        found = next(tensors, torch.device("cpu"))
    device = torch.device(found)
    if device.type in ("cpu", "meta") or device.index is not None:
        return device
    return torch.device(device.type, torch.accelerator.current_device_index())


def _draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Return False if the operator drops nothing, as attention and recurrent layers in eval mode do."""
    arguments = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    arguments |= dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    shares = [arguments[name] for name in ("dropout_p", "dropout", "p") if name in arguments]
    return arguments.get("train") is not False and shares != [0]


def _is_global(generator: torch.Generator) -> bool:
    known: tuple[Any, ...] = (torch.default_generator, *torch.cuda.default_generators)
    own: Any = generator
    return any(own._cdata == other._cdata for other in known)  # an operator gets another Python object


def _global_generator(device: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator


@contextmanager
def kept_generators(model: nn.Module, *, seed: int | None = None) -> Iterator[set[str]]:
    """Keep the global generators as they are while a forward of the model runs under :class:`PrivateRandom`.

    The forward can reach them in three other ways: by NumPy's or Python's functions, by ``torch.manual_seed``, and by
    operators of other libraries. If no other thread runs, every generator that is another one afterwards gets its state
    back. If other threads run, it is not known who drew, and the generators stay as they are: no number comes twice,
    but those that the forward drew are gone.

    Args:
        model: its devices are those whose generators are looked at.
        seed: seed of NumPy's and Python's generators, for a model that draws from them. Their states from before come
            back in any case: what another thread drew from them meanwhile may come again.

    Yields:
        A set that afterwards holds the names of the global generators that changed: ``"numpy"``, ``"python"``, ...
    """
    before, alone, changed = generator_states(model), threading.active_count() == 1, set[str]()

    def restore() -> None:
        changed.update(changed_generators(before))
        still_alone = alone and threading.active_count() == 1
        seeded = {name: state for name, state in before.items() if seed is not None and name in SEEDED}
        restore_generators_(before if still_alone else seeded)

    with undone(restore):
        if seed is not None:
            seed_numpy_and_python_(seed)
        yield changed


@contextmanager
def private_random(model: nn.Module, seed: int = 0, *, seed_others: bool = False) -> Iterator[set[str]]:
    """Run a forward of the model inside without a change of any global generator.

    Args:
        model: the model.
        seed: seed of the private generators.
        seed_others: set the seed of NumPy's and Python's generators, too.

    Yields:
        The names of the global generators that changed, as :func:`kept_generators` does.
    """
    with kept_generators(model, seed=seed if seed_others else None) as changed, PrivateRandom(seed):
        yield changed
