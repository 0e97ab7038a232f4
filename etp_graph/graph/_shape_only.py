"""Skip the arithmetic of a forward whose values nobody looks at: a plan needs only shapes.

Large products put out zeros instead. What is computed from them is *hollow*, and nothing may depend on its values:
where Python code, an index or a comparison would, :class:`NeedsValues` ends the run, which starts again with all
arithmetic. Parameters on the meta device have no values at all: what they make of inputs on the CPU is hollow, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from etp_graph.model import MIXING_LAYERS, bind_arguments

_LARGE = 1 << 22
"""Products of at least so many multiply-adds are skipped; below, working out the shape takes as long."""

_SAME = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class NeedsValues(BaseException):
    """A value that was not computed is needed. No :class:`Exception`, so that no model's own handler takes it."""


class ShapeOnly:
    """Which tensors have no values, in one run.

    Args:
        active: whether anything is skipped at all.
    """

    def __init__(self, *, active: bool) -> None:
        self._active = active
        self._tensors: Any = WeakTensorKeyDictionary()

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor in self._tensors or (tensor._base is not None and tensor._base in self._tensors)

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a function of the layer table; hollow, if it is a large product."""
        if self._active and _macs_of_call(func, args, kwargs) >= _LARGE:
            out = _empty_result(func, args, kwargs)
            self._mark(out)
            return out
        out = self.run(func, args, kwargs, (*args, *kwargs.values()))
        if self._tensors:
            self.follow(func.__name__, [*args, *kwargs.values()], [out])
        return out

    def run(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], values: Sequence[Any]
    ) -> Any:
        """The result of a call; zeros, if tensors on the meta device meet others (or are copied to another device).

        Args:
            func, args, kwargs: the call.
            values: its arguments, among them all its tensors.
        """
        tensors = [value for value in values if isinstance(value, Tensor)]
        device = next((t.device for t in tensors if not t.is_meta), kwargs.get("device"))
        if not any(t.is_meta for t in tensors) or device is None or torch.device(device).type == "meta":
            return func(*args, **kwargs)
        on_meta = {key: "meta" if key == "device" else tree_map(_on_meta, value) for key, value in kwargs.items()}
        with torch._C._DisableTorchDispatch():
            out = func(*tree_map(_on_meta, args), **on_meta)
        schema = getattr(func, "_schema", None)
        if schema is not None and schema.is_mutable and not args[0].is_meta:
            out = args[0]  # in place
        out = tree_map(lambda t: torch.zeros_like(t, device=device) if isinstance(t, Tensor) and t.is_meta else t, out)
        for made in tree_leaves(out):
            if isinstance(made, Tensor):
                self._mark(made)
        return out

    def follow(self, name: str, values: Sequence[Any], outs: Sequence[Any]) -> None:
        """What is made of hollow tensors is hollow.

        Raises:
            NeedsValues: it is no floating-point tensor, so that something will depend on its values.
        """
        if not self._tensors or not any(isinstance(v, Tensor) and v in self for v in values):
            return
        for out in outs or (None,):
            if not isinstance(out, Tensor) or out.dtype not in _SAME:
                raise NeedsValues(name)
            self._mark(out)

    def require_value(self, name: str, value: Any) -> None:
        """Values leave PyTorch; raises :class:`NeedsValues` if they were not computed."""
        if self._tensors and isinstance(value, Tensor) and value in self:
            raise NeedsValues(name)

    def _mark(self, tensor: Tensor) -> None:
        self._tensors[tensor] = True
        if tensor._base is not None:
            self._tensors[tensor._base] = True


def _macs_of_call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """About how many multiply-adds a call takes; 0 for what is never skipped."""
    if torch.is_autocast_enabled("cpu"):
        return 0  # the result would have another dtype
    row = MIXING_LAYERS.get(func)
    if row is not None:
        call = bind_arguments(row.arguments, args, kwargs)
        x, weight = call["input"], call["weight"]
        return 0 if not args or x.device.type != "cpu" else x.numel() * weight.numel() // weight.shape[row.in_axis]
    if func is F.scaled_dot_product_attention and len(args) > 2 and args[0].device.type == "cpu":
        return int(args[0].numel() * args[1].shape[-2] * 2)
    return 0


def _empty_result(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Zeros of the shape that the call would put out."""
    if func is F.linear:
        call = bind_arguments(MIXING_LAYERS[func].arguments, args, kwargs)
        shape = (*call["input"].shape[:-1], call["weight"].shape[0])
    elif func is F.scaled_dot_product_attention:
        shape = (*args[0].shape[:-1], args[2].shape[-1])
    else:
        with torch._C._DisableTorchDispatch():
            shape = func(*tree_map(_on_meta, args), **tree_map(_on_meta, kwargs)).shape
    return torch.zeros(shape, dtype=args[0].dtype, device="cpu")


def _on_meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
