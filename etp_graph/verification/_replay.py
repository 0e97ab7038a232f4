"""Make two forwards comparable that choose among equal values, or draw random numbers.

Detectors sort scores and keep the best boxes. If scores are equal, or differ by rounding only, the masked and the
pruned model may keep other boxes, although they compute the same. The pruned model therefore repeats the choices of the
masked one wherever both choose among the same values.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from etp_graph.model import PrivateRandom, is_random_operator

_CHOOSING = frozenset(
    "topk sort argsort argmax argmin max min kthvalue median mode nms batched_nms nonzero unique _unique2 unique_dim "
    "gt lt ge le eq ne searchsorted bucketize multinomial histc round floor ceil".split()
)
"""Operators whose result may change by as much as their operands differ, however little that is."""


class Choices:
    """Record of the results of operators that choose, or of what is repeated of an earlier record.

    Args:
        recorded: the record whose choices are repeated; ``None``: make one.
        tolerance: largest difference of operands, relative to their largest value, that counts as rounding.
    """

    def __init__(self, recorded: Choices | None = None, *, tolerance: float = 1e-6) -> None:
        self.calls: list[tuple[str, list[Tensor], Any]] = []
        self._tolerance = tolerance
        self._recorded: Iterator[tuple[str, list[Tensor], Any]] | None = (
            None if recorded is None else iter(recorded.calls)
        )

    def settle(self, name: str, args: Any, kwargs: Any, out: Any) -> Any:
        """Return what the call of an operator is to return, given its own result ``out``."""
        if not isinstance(out, (Tensor, tuple, list)):
            return out
        operands = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if self._recorded is None:
            self.calls.append((name, [value.detach().clone() for value in operands], out))
            return out
        return self._repeat(name, operands, out)

    def _repeat(self, name: str, operands: list[Tensor], out: Any) -> Any:
        """Return the recorded result of the next call if it is the same call up to rounding, else its own result."""
        found = next(self._recorded, None) if self._recorded is not None else None
        if found is None or found[0] != name or len(found[1]) != len(operands):
            self._recorded = iter(())  # the code took another branch: nothing to repeat any more
            return out
        same = all(_is_rounding(a, b, self._tolerance) for a, b in zip(operands, found[1], strict=True))
        return found[2] if same else out


def _is_rounding(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() or not a.numel():
        return torch.equal(a, b)
    scale = float(b[b.isfinite()].abs().max()) if bool(b.isfinite().any()) else 0.0
    return bool(torch.isclose(a, b, rtol=0.0, atol=tolerance * scale, equal_nan=True).all())


@cache
def _is_plain(func: Any) -> bool:
    """Return True for an operator that neither chooses nor draws random numbers."""
    return func._overloadpacket.__name__ not in _CHOOSING and not is_random_operator(func)


class Comparable(TorchDispatchMode):
    """Context in which a forward can be compared with that of another network that computes the same.

    Random operators draw from private generators or, because networks of other widths draw other numbers, give one
    constant. Choices among equal values are recorded, or repeated. One mode does all of it, because each mode costs as
    much time as a small operator.

    Args:
        seed: seed of the private generators.
        steady: whether random operators give one constant.
        choices: the record of choices, or ``None`` if they do not matter.

    Attributes:
        drew: whether a random operator ran.
    """

    def __init__(self, seed: int, *, steady: bool, choices: Choices | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._private, self._steady, self._choices = PrivateRandom(seed), steady, choices
        self.drew = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_plain(func):
            return func(*args, **kwargs)
        name, out = func._overloadpacket.__name__, self._private.call(func, args, kwargs)
        if name in _CHOOSING and self._choices is not None:
            out = self._choices.settle(name, args, kwargs, out)
        if torch.Tag.nondeterministic_seeded not in func.tags or not isinstance(out, Tensor):
            return out
        if not out.is_floating_point():
            return out
        self.drew = True
        return out.fill_(1.0 if "bernoulli" in name else 0.5) if self._steady else out
