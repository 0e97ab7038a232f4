"""Numbers of Python code that know where they come from: an attribute of a module, or the size of an activation.

Surgery changes attributes that count units, and sizes of activations. Where such a number is only a size, that is
right. Where its value enters a computation (the scale ``1 / math.sqrt(self.head_size)``), the pruned model would
compute something else. These classes note such uses. The trace then locks the units that the number counts.
"""

from __future__ import annotations

import opcode
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from etp_graph.model import running_line

Origin = tuple[str, str, int | None]
"""Module name, attribute name, entry of a tuple attribute."""

Source = Origin | int
"""Origin of a number: an attribute, or the number of the size that was read from an activation."""


@dataclass(frozen=True, slots=True, eq=False)
class ReadSize:
    """Size of an activation that the code of a model read.

    Attributes:
        labels: compact label of the activation in each reading.
        dim: its dimension.
        where: the running module, for messages.
    """

    labels: tuple[Tensor | None, ...]
    dim: int
    where: str


@dataclass(slots=True)
class Numbers:
    """Uses of the numbers of one trace.

    Attributes:
        model: stands for the model. Caches of functions may keep a number and hand it out in the trace of another one.
        values: (source, line of the model's code) -> how often its value entered a computation there.
        sizes: the sizes of activations that the code read.
        compared: pairs (attribute, number of a size) that the code compared and that are equal.
        fixed: numbers of the sizes that the code compared with an equal number that is not traced, each with the line.
        differ: pairs (larger number, smaller one) that the code compared, each with the line.
    """

    model: object
    values: Counter[tuple[Source, str | None]] = field(default_factory=Counter)
    sizes: list[ReadSize] = field(default_factory=list)
    compared: list[tuple[Origin, int]] = field(default_factory=list)
    fixed: dict[int, str | None] = field(default_factory=dict)
    differ: list[tuple[TracedInt, int, str | None]] = field(default_factory=list)

    def read(self, size: int, found: ReadSize) -> SizeInt:
        """Return the integer for a size that the code reads."""
        self.sizes.append(found)
        return SizeInt(size, frozenset((len(self.sizes) - 1,)))


_running = threading.local()

_models: WeakKeyDictionary[nn.Module, object] = WeakKeyDictionary()


def current_numbers() -> Numbers | None:
    """Return the uses of the trace that this thread runs, or ``None``."""
    found: Numbers | None = getattr(_running, "numbers", None)
    return found


@contextmanager
def noted_numbers(model: nn.Module) -> Iterator[Numbers]:
    """Note the uses of numbers inside this context, in this thread."""
    before, _running.numbers = current_numbers(), Numbers(_models.setdefault(model, object()))
    try:
        yield _running.numbers
    finally:
        _running.numbers = before


def _is_called(depth: int) -> bool:
    """Return True if the code that needs a hash is calling something, as it does with a function that has a cache."""
    frame = sys._getframe(depth)
    return _CALLS[frame.f_code.co_code[frame.f_lasti]]


_CALLS = [name.startswith(("CALL", "PRECALL")) for name in opcode.opname]
"""For each operation code of Python: whether it calls something."""


_LONGEST = 64
"""Operations of a computation that are kept. A loop that adds up a size makes longer ones, which count as unknown."""


class TracedInt(int):
    """Integer that knows its sources.

    Attributes:
        sources: what it was read from or computed from.
        steps: (operation, left operand, right operand) that it was computed by; ``None`` if it was read, or if that is
            not known.
        length: operations that it was computed by.
    """

    sources: frozenset[Source]
    steps: tuple[Callable[[Any, Any], Any], Any, Any] | None = None
    length: int = 0
    _model: object

    def __new__(cls, value: int, sources: frozenset[Source] = frozenset()) -> TracedInt:
        """Return the integer ``value``, read or computed from ``sources``."""
        made = super().__new__(cls, value)
        numbers = current_numbers()
        made.sources, made._model = sources, None if numbers is None else numbers.model
        return made

    @property
    def is_read(self) -> bool:
        """Whether the integer was read from the model, not computed."""
        return False

    @property
    def alive(self) -> bool:
        """Whether the number belongs to the model that this thread traces. Others come out of caches of functions."""
        numbers = current_numbers()
        return self._model is None or (numbers is not None and self._model is numbers.model)

    def __hash__(self) -> int:
        """Return a hash of its own in calls: a function with a cache must not hand out the number of another module.

        A lookup in a dict or set needs the hash of the plain integer.
        """
        if self.sources and _is_called(2):
            return hash((int.__hash__(self), id(self._model), *sorted(map(repr, self.sources))))
        return int.__hash__(self)

    def __eq__(self, other: object) -> bool:
        same = int.__eq__(self, other)
        if same is True and self.alive:
            _note_comparison(self, other)
        elif same is False and self.alive:
            _note_difference(self, other)
        return same

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __lt__(self, other: int) -> bool:
        self._note_order(other, flips=True)
        return int.__lt__(self, other)

    def __ge__(self, other: int) -> bool:
        self._note_order(other, flips=True)
        return int.__ge__(self, other)

    def __le__(self, other: int) -> bool:
        self._note_order(other, flips=False)
        return int.__le__(self, other)

    def __gt__(self, other: int) -> bool:
        self._note_order(other, flips=False)
        return int.__gt__(self, other)

    def _note_order(self, other: int, *, flips: bool) -> None:
        """Note a comparison of order.

        An equal plain number matters only if the answer ``flips`` when this number gets smaller. An attribute matters
        in any case: if it does not follow the size, it is larger than the size after surgery.
        """
        if not self.alive:
            return
        if int.__eq__(self, other) is not True:
            _note_difference(self, other)
        elif flips or isinstance(other, TracedInt):
            _note_comparison(self, other)

    def note_steps(self, operation: Callable[[Any, Any], Any], left: Any, right: Any) -> None:
        """Note how this number was computed."""
        length = 1 + getattr(left, "length", 0) + getattr(right, "length", 0)
        if length <= _LONGEST:
            self.steps, self.length = (operation, left, right), length

    def after(self, removed: Mapping[Source, int]) -> int | None:
        """Return what the number becomes if each source counts fewer units, ``None`` if that is not known.

        Args:
            removed: how many units each source loses. Sources that are not named stay.
        """
        if self.steps is None:
            if len(self.sources) != 1:
                return None
            (source,) = self.sources
            return int(self) - removed.get(source, 0) if self.is_read else None
        operation, *operands = self.steps
        values = [value.after(removed) if isinstance(value, TracedInt) else value for value in operands]
        if any(value is None for value in values):
            return None
        try:
            made = operation(*values)
        except (ArithmeticError, ValueError):
            return None
        return made if type(made) is int else None

    def note_value(self) -> None:
        """Note that the value of the number enters a computation."""
        if self.alive:
            _note_values(self.sources, running_line())

    def __float__(self) -> float:
        self.note_value()
        return int.__float__(self)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        """Note a computation of NumPy, such as ``np.sqrt(self.head_size)``."""
        self.note_value()
        plain = [int(value) if isinstance(value, TracedInt) else value for value in inputs]
        return getattr(ufunc, method)(*plain, **kwargs)

    def derive(self, value: int, other: Any) -> TracedInt:
        """Return an integer that was computed from this one and another number."""
        return TracedInt(value, self.sources | getattr(other, "sources", frozenset()))


class TracedFloat(float):
    """Number that was computed from sizes. Its value counts as used, unless it becomes an integer again."""

    sources: frozenset[Source]
    line: str | None

    def __new__(cls, value: float, sources: frozenset[Source]) -> TracedFloat:
        """Return the number, and note that its sources are used."""
        made = super().__new__(cls, value)
        made.sources, made.line = sources, running_line()
        _note_values(sources, made.line)
        return made

    def _as_size(self, value: int) -> int:
        _note_values(self.sources, self.line, -1)
        return TracedInt(value, self.sources)

    def __int__(self) -> int:
        return int(self._as_size(float.__int__(self)))

    def __round__(self, digits: Any = None) -> Any:
        return self._as_size(float.__round__(self)) if digits is None else float.__round__(self, digits)

    def __floor__(self) -> int:
        return self._as_size(float.__floor__(self))

    def __ceil__(self) -> int:
        return self._as_size(float.__ceil__(self))

    def __trunc__(self) -> int:
        return self._as_size(float.__trunc__(self))


ARITHMETIC = frozenset(
    "add radd iadd sub rsub isub mul rmul imul div rdiv idiv truediv rtruediv itruediv true_divide divide multiply "
    "subtract pow rpow ipow floordiv rfloordiv fmod remainder float_power tensor as_tensor scalar_tensor".split()
)
"""Names of functions, without underscores around them, that compute with the value of an integer argument."""


def note_operands(name: str, values: Any) -> None:
    """Note the traced integers among the operands of a function, if it is arithmetic or makes a tensor of them."""
    if name.strip("_") not in ARITHMETIC:
        return
    for value in values:
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, TracedInt):
                item.note_value()


def _note_values(sources: frozenset[Source], line: str | None, times: int = 1) -> None:
    numbers = current_numbers()
    for source in sources if numbers is not None else ():
        numbers.values[source, line] += times  # type: ignore[union-attr]


def _note_comparison(number: TracedInt, other: object) -> None:
    """Note that a size equals an attribute, or a number that is not traced."""
    numbers = current_numbers()
    if numbers is None or len(number.sources) != 1 or not number.is_read:
        return
    (source,) = number.sources
    if not isinstance(other, TracedInt):
        if isinstance(source, int):
            numbers.fixed.setdefault(source, running_line())
        return
    if len(other.sources) == 1 and other.is_read:
        (second,) = other.sources
        if isinstance(source, int) and not isinstance(second, int):
            numbers.compared.append((second, source))
        elif isinstance(second, int) and not isinstance(source, int):
            numbers.compared.append((source, second))


def _note_difference(number: TracedInt, other: object) -> None:
    """Note that a size or attribute differs from another one, or a size from a plain number.

    Surgery could make them equal. A plain number says nothing about an attribute, such as the number of groups.
    """
    numbers = current_numbers()
    if numbers is None or not isinstance(other, int):
        return
    larger, smaller = (number, other) if int(number) > int(other) else (other, number)
    if not isinstance(larger, TracedInt) or not larger.alive or int(smaller) <= 0:
        return
    if isinstance(smaller, TracedInt) or any(isinstance(source, int) for source in larger.sources):
        numbers.differ.append((larger, smaller, running_line()))


class SizeInt(TracedInt):
    """Size of an activation along its units, as ``x.shape`` or ``x.size`` gave it."""

    @property
    def is_read(self) -> bool:
        """Whether the integer was read from the model, not computed."""
        return True


def _derived(name: str) -> Callable[[TracedInt, Any], Any]:
    plain, real = getattr(int, name), getattr(float, name)

    def operation(self: TracedInt, other: Any) -> Any:
        if type(other) is float:
            return TracedFloat(real(float(int(self)), other), self.sources)
        value = plain(self, other)
        if isinstance(value, float):
            return TracedFloat(value, self.sources | getattr(other, "sources", frozenset()))
        if type(value) is not int:
            return value
        made = self.derive(value, other)
        made.note_steps(plain, self, other)
        return made

    return operation


for _name in ("mul", "rmul", "floordiv", "rfloordiv", "add", "radd", "sub", "rsub", "truediv", "rtruediv", "pow"):
    setattr(TracedInt, f"__{_name}__", _derived(f"__{_name}__"))
