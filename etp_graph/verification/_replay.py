"""Make two forwards comparable that choose among equal values, or draw random numbers.

Detectors sort scores and keep the best boxes. If scores are equal, or differ by rounding only, the masked and the
pruned model may keep other boxes, although they compute the same. The pruned model therefore repeats the choices of the
masked one wherever both choose among the same values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_CHOOSING = frozenset(
    "topk sort argsort argmax argmin max min kthvalue median mode nms batched_nms nonzero unique _unique2 unique_dim "
    "gt lt ge le eq ne searchsorted bucketize multinomial histc round floor ceil".split()
)
"""Operators whose result may change by as much as their operands differ, however little that is."""

_RANDOM = torch.Tag.nondeterministic_seeded


class Choices(TorchDispatchMode):
    """Context that records the results of operators that choose, or repeats those that another context recorded.

    Args:
        recorded: the context whose choices are repeated; ``None``: record them.
        tolerance: largest difference of operands, relative to their largest value, that counts as rounding.
    """

    def __init__(self, recorded: Choices | None = None, *, tolerance: float = 1e-6) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[str, list[Tensor], Any]] = []
        self._tolerance = tolerance
        self._recorded: Iterator[tuple[str, list[Tensor], Any]] | None = (
            None if recorded is None else iter(recorded.calls)
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        if name not in _CHOOSING or not isinstance(out, (Tensor, tuple, list)):
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


class SteadyNoise(TorchDispatchMode):
    """Context in which random operators give one constant, because networks of other widths draw other numbers.

    Attributes:
        active: whether they do.
        seen: whether a random operator ran.
    """

    def __init__(self, *, active: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.active, self.seen = active, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if _RANDOM not in func.tags or not isinstance(out, Tensor) or not out.is_floating_point():
            return out
        self.seen = True
        return out.fill_(1.0 if "bernoulli" in func._overloadpacket.__name__ else 0.5) if self.active else out
