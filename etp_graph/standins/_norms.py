"""Views of norms that are written out in Python, such as the RMS norms of transformers and norms over channels.

A norm is recognised by its output: a copy of the module must give the same result as one of the formulas below, for
large and for small inputs. The view of a norm with another formula runs the code of the module on the units that are
left. Both need no table of classes.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etp_graph.model import (
    CountingAttributes,
    counting_attributes,
    long_axis,
    norm_over_units,
    private_random,
    without_autocast,
)

from ._registry import Row, register_fallback

_EPS = ("eps", "variance_epsilon", "epsilon", "layer_norm_eps", "norm_eps")

_USUAL_EPS = (1e-6, 1e-5, 1e-8, 1e-12, 1e-3, 0.0)
"""Values that norms without an attribute for it write into their code."""


def _rms(x: Tensor, module: Any, eps: float) -> Tensor:
    """weight * x / rms(x), as in Llama, T5, Mistral, Qwen and Phi-3."""
    return F.rms_norm(x, (x.shape[-1],), module.weight, eps)


def _shifted_rms(x: Tensor, module: Any, eps: float) -> Tensor:
    """(1 + weight) * x / rms(x), as in Gemma."""
    scale: Tensor = 1.0 + module.weight
    return F.rms_norm(x, (x.shape[-1],), None, eps) * scale


def _layer(x: Tensor, module: Any, eps: float) -> Tensor:
    """Layer norm with weight and, if there is one, bias."""
    return F.layer_norm(x, (x.shape[-1],), module.weight, getattr(module, "bias", None), eps)


def _rms_in_groups(name: str) -> Callable[[Tensor, Any, float], Tensor]:
    """Return weight * x / rms(x) over groups of equal size, which an attribute holds, as in Mamba-2 and Zamba2."""

    def formula(x: Tensor, module: Any, eps: float) -> Tensor:
        def run(part: Tensor, tensors: Sequence[Tensor]) -> Tensor:
            return F.rms_norm(part, (part.shape[-1],), None, eps)

        parts = x.unflatten(-1, (-1, getattr(module, name)))
        normed: Tensor = norm_over_units(parts, -1, [], run).flatten(-2) * module.weight
        return normed

    return formula


_FORMULAS: dict[int, tuple[Callable[[Tensor, Any, float], Tensor], ...]] = {
    1: (_rms, _shifted_rms, _layer),
    2: (_layer,),
}
"""Number of parameters -> formulas of norms of the last dimension."""

_GATES: tuple[Callable[[Tensor], Tensor], ...] = (F.silu, torch.sigmoid)


@dataclass(frozen=True, slots=True)
class _Norm:
    """Formula that a module computes.

    Attributes:
        formula: norm of the last dimension.
        eps: its epsilon.
        axis: dimension of the channels, -1 or 1.
        gate: activation of the second argument, which is multiplied with the input or with the result; ``None`` if
            calls with a second argument run the module's own code.
        gate_first: whether the input is multiplied, not the result.
        group_size: name of the attribute with the number of channels that are normalised together; ``None``: all.
    """

    formula: Callable[[Tensor, Any, float], Tensor]
    eps: float
    axis: int = -1
    gate: Callable[[Tensor], Tensor] | None = None
    gate_first: bool = False
    group_size: str | None = None

    def __call__(self, module: Any, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """x [..., d], or [n, d, ...] for axis 1 -> the same shape."""
        moves = self.axis != -1 and x.ndim > 2
        factor = None if gate is None or self.gate is None else self.gate(gate)
        if factor is not None and self.gate_first:
            x, factor = x * factor, None
        out = self.formula(x.movedim(1, -1) if moves else x, module, self.eps)
        out = out.movedim(-1, 1) if moves else out
        return out if factor is None else out * factor


_known: dict[tuple[object, ...], type[nn.Module] | None] = {}
"""Results for modules of one class with equal attributes, because deep networks have hundreds of such norms."""


_PLAIN = (bool, int, float, str, FunctionType)
"""Types of attributes that two modules can be compared by."""


def norm_standin(module: nn.Module) -> type[nn.Module] | None:
    """Return a view of a module that is a norm over one dimension; ``None`` for any other module.

    The module must have no submodules and no buffers. Each of its parameters must have one axis longer than 1, and all
    of them the same length. Classes of PyTorch are followed by the functions that they call.
    """
    parameters = list(module.parameters(recurse=False))
    if type(module).__module__.startswith("torch.") or any(True for _ in module.children()) or module._buffers:
        return None
    if len(parameters) > 2 or any(p.numel() != max(p.shape, default=0) or p.numel() < 2 for p in parameters):
        return None
    if len({p.numel() for p in parameters}) > 1 or counting_attributes(module) != CountingAttributes():
        return None
    if not _takes_one(module):
        return None
    own = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
    if not all(isinstance(value, _PLAIN) for value in own.values()):
        return _view_of(module) if parameters else None  # a module that holds objects may be large to copy
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters(recurse=False))
    key = (type(module), tuple(sorted(own.items(), key=lambda item: item[0])), shapes)
    if key not in _known:
        _known[key] = _view_of(module)
    return _known[key]


def _view_of(module: nn.Module) -> type[nn.Module] | None:
    """Return the view of a norm: its formula if that is known, else its own code on the units that are left."""
    names = {name for name, p in module.named_parameters(recurse=False) if p.ndim == 1}
    found = _matching(module) if "weight" in names and names <= {"weight", "bias"} else None
    if found is not None:
        return _view(type(module), found)
    axis = find_reduced_axis(module)
    return None if axis is None else _own_code(type(module), axis)


def _arguments(module: nn.Module) -> list[inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p for p in inspect.signature(type(module).forward).parameters.values() if p.kind in kinds]


def _takes_one(module: nn.Module) -> bool:
    return sum(p.default is p.empty for p in _arguments(module)) == 2  # self and the input


def _view(cls: type[nn.Module], norm: _Norm) -> type[nn.Module]:
    """Return a subclass that computes the formula, and runs the code of ``cls`` for calls with other arguments."""

    def forward(self: nn.Module, x: Tensor, *rest: Any, **others: Any) -> Any:
        extra = [value for value in (*rest, *others.values()) if value is not None]
        if not extra:
            return norm(self, x)
        if len(extra) == 1 and norm.gate is not None and isinstance(extra[0], Tensor):
            return norm(self, x, extra[0])
        return cls.forward(self, x, *rest, **others)

    return type(f"Followed{cls.__name__}", (cls,), {"forward": forward, "__module__": __name__})


def _own_code(cls: type[nn.Module], axis: int) -> type[nn.Module]:
    """Return a subclass that runs the code of ``cls`` as a norm over the units along ``axis``."""

    def forward(self: nn.Module, x: Tensor, *rest: Any, **others: Any) -> Any:
        if any(value is not None for value in (*rest, *others.values())):
            return cls.forward(self, x, *rest, **others)
        own = {name: p for name, p in self._parameters.items() if p is not None}

        def run(x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
            self._parameters.update(zip(own, tensors, strict=True))  # type: ignore[arg-type]
            try:
                found: Tensor = cls.forward(self, x)
            finally:
                self._parameters.update(own)
            return found

        return norm_over_units(x, axis, list(own.values()), run)

    return type(f"Followed{cls.__name__}", (cls,), {"forward": forward, "__module__": __name__})


def _matching(module: nn.Module) -> _Norm | None:
    """Return the formula that a copy of the module computes, or ``None``."""
    with private_random(module), without_autocast(), torch.no_grad():
        probe = _random_copy(module)
        n = next(probe.parameters()).numel()
        for axis, shape in ((-1, (3, 5, n)), (1, (2, n, 3, 5)), (1, (2, n, 5))):
            x = torch.randn(shape, device="cpu")
            inputs = (x, x * 1e-3)  # a small input shows the epsilon
            wanted = [_call(probe, value) for value in inputs]
            for norm in _candidates(module, axis, n):
                same = all(_same(norm(probe, value), want) for value, want in zip(inputs, wanted, strict=True))
                if same and (norm.group_size is not None or _follows_width(norm, probe, n, x)):
                    return _with_gate(norm, probe, x)
    return None


def _random_copy(module: nn.Module) -> nn.Module:
    probe = copy.deepcopy(module)
    meta = any(tensor.is_meta for tensor in (*probe.parameters(), *probe.buffers()))
    probe = (probe.to_empty(device="cpu") if meta else probe.cpu()).float()
    for parameter in probe.parameters():
        parameter.copy_(torch.rand(parameter.shape, device="cpu") + 0.5)
    return probe


def _candidates(module: nn.Module, axis: int, n: int) -> Iterator[_Norm]:
    written = [getattr(module, name) for name in _EPS if isinstance(getattr(module, name, None), float)]
    one = sum(1 for _ in module.parameters(recurse=False)) == 1 and axis == -1
    groups = [name for name, size in _sizes(module).items() if n % size == 0 and one]
    formulas = [(formula, None) for formula in _FORMULAS[sum(1 for _ in module.parameters(recurse=False))]]
    for formula, name in (*formulas, *((_rms_in_groups(name), name) for name in groups)):
        for eps in dict.fromkeys((*written, *_USUAL_EPS)):
            yield _Norm(formula, float(eps), axis, group_size=name)


def _sizes(module: nn.Module) -> dict[str, int]:
    """Return the attributes of a module that may be the number of units of a group."""
    own = ((name, value) for name, value in vars(module).items() if not name.startswith("_"))
    return {name: int(value) for name, value in own if isinstance(value, int) and int(value) > 1}


def _follows_width(norm: _Norm, probe: nn.Module, n: int, x: Tensor) -> bool:
    """Return True unless an attribute that holds the number of units keeps the code from running with fewer units."""
    if n < 4 or n not in _sizes(probe).values():
        return True
    index = torch.arange(n // 2, device="cpu")
    less, part = _with_units(probe, index), x.index_select(norm.axis, index)
    return _same(norm(less, part), _call(less, part))


def _with_gate(norm: _Norm, probe: nn.Module, x: Tensor) -> _Norm:
    """Return the norm with the gate that a second argument is, if the module takes one."""
    if len(_arguments(probe)) < 3:
        return norm
    gate = torch.randn(x.shape, device="cpu")
    want = _call(probe, x, gate)
    for function in _GATES:
        for first in (True, False):
            gated = replace(norm, gate=function, gate_first=first)
            if _same(gated(probe, x, gate), want):
                return gated
    return norm


def find_reduced_axis(module: nn.Module) -> int | None:
    """Return the dimension of the units that a module reduces over as a norm does: -1, 1, or ``None``.

    The module must give the same result for units in another order, must run with fewer units, and a change of one
    unit must change the others.
    """
    with private_random(module), without_autocast(), torch.no_grad():
        probe = _random_copy(module) if any(True for _ in module.parameters()) else copy.deepcopy(module)
        n = next((p.numel() for p in probe.parameters()), 6)
        for axis, shape in ((-1, (3, 5, n)), (1, (2, n, 3, 5)), (1, (2, n, 5))):
            if n > 2 and _reduces_over(probe, axis, torch.randn(shape, device="cpu")):
                return axis
    return None


def _reduces_over(probe: nn.Module, axis: int, x: Tensor) -> bool:
    n = x.shape[axis]
    want = _call(probe, x)
    if want is None or not bool(want.isfinite().all()):
        return False
    for index in (torch.arange(n, device="cpu").roll(2), torch.arange(n, device="cpu")[:-1]):
        got = _call(_with_units(probe, index), x.index_select(axis, index))
        if got is None or (len(index) == n and not _same(got, want.index_select(axis, index))):
            return False
    other = x.clone()
    other.select(axis, 0).mul_(3.0)
    changed = _call(probe, other)
    rest = torch.arange(1, n, device="cpu")
    return changed is not None and not _same(changed.index_select(axis, rest), want.index_select(axis, rest))


def _with_units(probe: nn.Module, index: Tensor) -> nn.Module:
    """Return a copy whose parameters have only these units, in this order."""
    made = copy.deepcopy(probe)
    for parameter in made.parameters():
        parameter.data = parameter.data.index_select(long_axis(parameter), index)
    return made


def _same(got: Tensor, want: Tensor | None) -> bool:
    return want is not None and torch.allclose(got, want, rtol=1e-5, atol=1e-5)


def _call(probe: nn.Module, *inputs: Tensor) -> Tensor | None:
    """Return what the module makes of the inputs; ``None`` if it does not take them."""
    try:
        out = probe(*inputs)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - the code of a user, called with a shape that it may not expect
        return None
    return out if isinstance(out, Tensor) and out.shape == inputs[0].shape else None


register_fallback(Row(norm_standin, view=True))
