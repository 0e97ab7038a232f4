"""Skip the arithmetic of a forward whose values nobody looks at: a plan needs only shapes.

Large products put out zeros instead. What is computed from them is *hollow*, and nothing may depend on its values:
where Python code, an index or a comparison would, :class:`NeedsValues` ends the run, which starts again with all
arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from . import layers

_LARGE = 1 << 22
"""Products of at least so many multiply-adds are skipped; below, working out the shape takes as long."""
_SAME = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class NeedsValues(BaseException):
    """A value that was not computed is needed. No :class:`Exception`, so that no model's own handler takes it."""


class Hollow:
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
        if self._active and _macs(func, args, kwargs) >= _LARGE:
            out = _shaped(func, args, kwargs)
            self._mark(out)
            return out
        out = func(*args, **kwargs)
        if self._tensors:
            self.follow(func.__name__, [*args, *kwargs.values()], [out])
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

    def leaves(self, name: str, value: Any) -> None:
        """Values leave PyTorch; raises :class:`NeedsValues` if they were not computed."""
        if self._tensors and isinstance(value, Tensor) and value in self:
            raise NeedsValues(name)

    def _mark(self, tensor: Tensor) -> None:
        self._tensors[tensor] = True
        if tensor._base is not None:
            self._tensors[tensor._base] = True


def _macs(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """About how many multiply-adds a call takes; 0 for what is never skipped."""
    if torch.is_autocast_enabled("cpu"):
        return 0  # the result would have another dtype
    row = layers.DENSE.get(func)
    if row is not None:
        call = layers.bind(row.arguments, args, kwargs)
        x, weight = call["input"], call["weight"]
        return 0 if not args or x.device.type != "cpu" else x.numel() * weight.numel() // weight.shape[row.in_axis]
    if func is F.scaled_dot_product_attention and len(args) > 2 and args[0].device.type == "cpu":
        return int(args[0].numel() * args[1].shape[-2] * 2)
    return 0


def _shaped(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Zeros of the shape that the call would put out."""
    if func is F.linear:
        call = layers.bind(layers.DENSE[func].arguments, args, kwargs)
        shape = (*call["input"].shape[:-1], call["weight"].shape[0])
    elif func is F.scaled_dot_product_attention:
        shape = (*args[0].shape[:-1], args[2].shape[-1])
    else:
        with torch._C._DisableTorchDispatch():
            shape = func(*tree_map(_meta, args), **tree_map(_meta, kwargs)).shape
    return torch.zeros(shape, dtype=args[0].dtype, device="cpu")


def _meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
