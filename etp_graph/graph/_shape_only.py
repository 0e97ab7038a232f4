"""Skip the large products of a forward whose values are not needed, because a plan needs only shapes.

Large products return zeros. These zeros, and tensors computed from them, are placeholders: only their shapes are right.
If Python code, an index or a comparison needs the values of a placeholder, :class:`NeedsValues` stops the run. The
trace then starts again and computes all values. Parameters on the meta device have no values, so tensors computed from
them and from inputs on the CPU are placeholders, too.
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
"""Minimum number of multiply-adds of a skipped product. Computing a smaller one is as fast as finding its shape."""

_SAME = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


class NeedsValues(BaseException):
    """Error if a value that was not computed is needed.

    It does not derive from :class:`Exception`, so that ``except Exception`` in the code of a model does not catch it.
    """


class ShapeOnly:
    """The set of placeholders of one run.

    Args:
        active: whether to skip large products.
    """

    def __init__(self, *, active: bool) -> None:
        self._active = active
        self._tensors: Any = WeakTensorKeyDictionary()

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor in self._tensors or (tensor._base is not None and tensor._base in self._tensors)

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of a function of the layer table, or a placeholder if it is a large product."""
        if self._active and _macs_of_call(func, args, kwargs) >= _LARGE:
            out = _empty_result(func, args, kwargs)
            self._mark(out)
            return out
        out = self.run(func, args, kwargs, (*args, *kwargs.values()))
        if self._tensors:
            self.follow(func.__name__, [*args, *kwargs.values()], [out])
        return out

    def run(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        values: Sequence[Any],
        call: Callable[..., Any] = _call,
    ) -> Any:
        """Return the result of a call, or a placeholder if it brings tensors on the meta device to another device.

        Args:
            func, args, kwargs: the call.
            values: a flat list that contains all tensors among the arguments.
            call: makes the call, from function, arguments and keyword arguments.
        """
        tensors = [value for value in values if isinstance(value, Tensor)]
        device = next((t.device for t in tensors if not t.is_meta), kwargs.get("device"))
        if not any(t.is_meta for t in tensors) or device is None or torch.device(device).type == "meta":
            return call(func, args, kwargs)
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
        """Mark the outputs of a call as placeholders if one of its arguments is a placeholder.

        Raises:
            NeedsValues: an output is not a floating-point tensor, or there is none. Later code may need its values.
        """
        if not self._tensors or not any(isinstance(v, Tensor) and v in self for v in values):
            return
        for out in outs or (None,):
            if not isinstance(out, Tensor) or out.dtype not in _SAME:
                raise NeedsValues(name)
            self._mark(out)

    def require_value(self, name: str, value: Any) -> None:
        """Raise :class:`NeedsValues` if values that leave PyTorch are those of a placeholder."""
        if self._tensors and isinstance(value, Tensor) and value in self:
            raise NeedsValues(name)

    def _mark(self, tensor: Tensor) -> None:
        self._tensors[tensor] = True
        if tensor._base is not None:
            self._tensors[tensor._base] = True


def _macs_of_call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the approximate number of multiply-adds of a call, or 0 if the call is never skipped."""
    if torch.is_autocast_enabled("cpu"):
        return 0  # autocast changes the dtype of the result
    row = MIXING_LAYERS.get(func)
    if row is not None:
        call = bind_arguments(row.arguments, args, kwargs)
        x, weight = call["input"], call["weight"]
        return 0 if not args or x.device.type != "cpu" else x.numel() * weight.numel() // weight.shape[row.in_axis]
    if func is F.scaled_dot_product_attention and len(args) > 2 and args[0].device.type == "cpu":
        return int(args[0].numel() * args[1].shape[-2] * 2)
    return 0


def _empty_result(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return zeros of the shape of the result of a call."""
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
